"""The corpora sermll reads, and the formats of a user's own. A module's docstring is its datasheet.

A new corpus is a module and an entry in `CORPORA`; a new format is one in `FORMATS`.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from sermll.corpora import (
    audformat,
    audiofolder,
    cremad,
    emodb,
    iemocap,
    manifest,
    msp_improv,
    ravdess,
    savee,
    synthetic,
)
from sermll.rows import Corpus

CORPORA: dict[str, Corpus] = {
    "iemocap": iemocap.CORPUS,
    "msp_improv": msp_improv.CORPUS,
    "ravdess": ravdess.CORPUS,
    "savee": savee.CORPUS,
    "emodb": emodb.CORPUS,
    "cremad": cremad.CORPUS,
    "synthetic": synthetic.CORPUS,
}
"""Every corpus by the name used in `sermll prepare` and in configurations."""

FORMATS: dict[str, Callable[[Path, str, tuple[str, ...] | None], tuple[Corpus, Path]]] = {
    "manifest": manifest.open_corpus,
    "audformat": audformat.open_corpus,
    "audiofolder": audiofolder.open_corpus,
}
"""For a user's own data: the function that, given file or folder, name and classes, tells the corpus and its folder."""


def datasheet(name: str) -> str:
    """Layout, counts, folds, traps, licence and citation of a corpus, or the columns of a format, in words."""
    return inspect.cleandoc(import_module(f"{__name__}.{name}").__doc__ or "")


def facts(corpus: Corpus) -> dict[str, Any]:
    """The same for programs, as JSON."""
    return {
        "name": corpus.name,
        "title": corpus.title,
        "classes": list(corpus.classes),
        "other_labels": list(corpus.other_labels),
        "counts": dict(corpus.counts),
        "folds": [*corpus.folds, *({corpus.default_folds} - set(corpus.folds))],
        "default_folds": corpus.default_folds,
        "licence": corpus.licence,
        "citation": corpus.citation,
        "source": corpus.source,
        "download": bool(corpus.archives),
    }
