"""The design of an experiment: prepared data, a label space, and folds, hashed together and checked for leaks.

What `sermll train` trains on and `sermll audit` looks at is the same design, so that neither can see another one.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sermll import config
from sermll.corpora import CORPORA
from sermll.errors import ProtocolError
from sermll.labels import Labelled, apply_labels, describe, label_space
from sermll.protocol import Fold, Folds, Leak, check_classes, check_dev, find_leaks, make_folds
from sermll.shards import Prepared

ONE_CLASS = (
    "give other protocol.folds, more protocol.dev_speakers or protocol.select=last, by which dev chooses nothing"
)
"""What to do where dev has no other."""


@dataclass(frozen=True)
class Design:
    """Data, labels and folds, all of them fixed before anything is trained."""

    prepared: Prepared
    labelled: Labelled
    folds: Folds
    """Without the utterances that the label space drops."""
    rules: dict[str, Any]
    """What decides a result beside who is where: data, classes and their order, targets, dev and selection rule."""

    @classmethod
    def of(cls, data: config.Data, protocol: config.Protocol) -> "Design":
        """Open the data, apply the label space, divide the utterances.

        Raises:
            DataError: there are no prepared data, or they are damaged.
            ConfigError: the label space or the targets do not fit them.
            ProtocolError: the folds do not fit them.
        """
        prepared = Prepared.open(data.path)
        setting = prepared.manifest["default_labels"] if data.labels == "default" else data.labels
        known = {**{name: corpus.classes for name, corpus in CORPORA.items()}, **prepared.corpora}
        space = label_space(
            setting, prepared.classes, prepared.manifest["other_labels"], known, tuple(prepared.corpora)
        )
        table = prepared.table
        labelled = apply_labels(space, table["label"].to_pylist(), table["votes"].to_pylist(), data.targets)
        folds = make_folds(protocol, table, prepared.manifest["folds"], prepared.manifest["default_folds"])
        folds = Folds(folds.name, tuple(fold.keep(labelled.kept) for fold in folds.folds))
        rules = {
            "data": prepared.data_hash,
            "classes": {name: list(members) for name, members in space.members.items()},
            "targets": data.targets,
            "dev_speakers": protocol.dev_speakers,
            "select": protocol.select,
        }
        # A run's folds have one order of classes. That of the corpus is not written out, the ids of runs depend on it.
        place = {label: at for at, label in enumerate((*prepared.classes, *prepared.manifest["other_labels"]))}
        usual = sorted(space.members, key=lambda name: min(place[label] for label in space.members[name]))
        if usual != list(space.classes):
            rules["order"] = list(space.classes)
        return cls(prepared, labelled, folds, rules)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class order of the label space."""
        return self.labelled.space.classes

    @cached_property
    def hash(self) -> str:
        """Names the protocol: data, label space, folds, dev rule and selection rule."""
        return self.folds.hash(self.rules)

    @cached_property
    def leaks(self) -> list[Leak]:
        """Everything that stands on two sides of a fold."""
        return [leak for fold in self.folds.folds for leak in find_leaks(fold, self.prepared.table)]

    def check(self, protocol: config.Protocol) -> None:
        """Refuse folds that leak, unless `protocol.allow_leak`, and folds that cannot be learned or scored.

        Raises:
            ProtocolError: naming the leaks, or the fold that cannot be used, or that nothing leaks and `allow_leak` is
                set.
        """
        if self.leaks and not protocol.allow_leak:
            shown = "\n".join(f"  {leak}" for leak in self.leaks[:10])
            more = f"\n  and {len(self.leaks) - 10} more" if len(self.leaks) > 10 else ""
            raise ProtocolError(
                f"protocol {self.folds.name!r} leaks:\n{shown}{more}\nScores would be too high. Use other folds or "
                "remove the copies; protocol.allow_leak=true runs it all the same and marks every result"
            )
        if protocol.allow_leak and not self.leaks:
            raise ProtocolError(f"protocol.allow_leak has no effect: protocol {self.folds.name!r} does not leak")
        for fold in self.folds.folds:
            check_classes(fold, self.labelled.labels, self.classes)
            if protocol.select != "last":
                check_dev(fold, self.labelled.labels, self.classes, ONE_CLASS)

    def describe(self) -> dict[str, Any]:
        """The design as JSON, for the record of every run."""
        manifest = self.prepared.manifest
        return {
            "data": {
                "paths": list(self.prepared.paths),
                "data_hash": self.prepared.data_hash,
                "corpus": self.prepared.corpus,
                "title": manifest["title"],
                "classes": self.classes,
                "utterances": int(self.labelled.kept.sum()),
                "hours": round(float(self.prepared.num_samples[self.labelled.kept].sum() / 16_000 / 3600), 4),
                "trim_db": dict(self.prepared.trim_db),
                "targets": self.rules["targets"],
                **describe(self.labelled, self.prepared.table["corpus"].to_pylist()),
            },
            "protocol": {
                "name": self.folds.name,
                "hash": self.hash,
                "select": self.rules["select"],
                "leaks": [str(leak) for leak in self.leaks],
                "folds": [self._describe_fold(fold) for fold in self.folds.folds],
            },
        }

    def _describe_fold(self, fold: Fold) -> dict[str, Any]:
        counts = {split: len(rows) for split, rows in fold.rows.items()}
        told = {"fold": fold.index, **fold.speakers, "utterances": counts}
        if len(self.prepared.corpora) > 1:
            for split in ("train", "test"):
                corpora = self.prepared.table["corpus"].take(fold.rows[split]).to_pylist()
                told[f"{split}_corpora"] = list(dict.fromkeys(corpora))
        return told
