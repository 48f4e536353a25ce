"""The corpora sermll reads. A module's docstring is its datasheet; a new corpus is a module and an entry."""

from sermll.corpora import emodb, ravdess, synthetic
from sermll.rows import Corpus

CORPORA: dict[str, Corpus] = {
    "ravdess": ravdess.CORPUS,
    "emodb": emodb.CORPUS,
    "synthetic": synthetic.CORPUS,
}
"""Every corpus by the name used in `sermll prepare` and in configurations."""
