"""Whether epochs can be chosen in every fold of a corpus."""

from collections.abc import Iterable

import pyarrow as pa

from sermll.config import Protocol
from sermll.protocol import make_folds
from sermll.rows import Corpus, Problem, Utterance


def fewest_dev_classes(corpus: Corpus, rows: Iterable[Utterance | Problem]) -> int:
    """Native classes among the dev utterances of a fold, in the fold with the fewest, of all protocols."""
    told = [row for row in rows if isinstance(row, Utterance)]
    columns = {name: [getattr(row, name) for row in told] for name in ("id", "speaker", "session", "fold")}
    table = pa.table(columns | {"corpus": [corpus.name] * len(told)})
    names = {"speaker", *corpus.folds, corpus.default_folds}
    folds = [fold for name in names for fold in make_folds(Protocol(folds=name), table, corpus.folds, "").folds]
    dev = [{told[row].label for row in fold.rows["dev"].tolist()} & set(corpus.classes) for fold in folds]
    return min(map(len, dev))
