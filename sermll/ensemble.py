"""`sermll ensemble`: several runs of one protocol joined into one, by the probabilities they have already given.

Members say what they say of each test utterance by the models of the fold in which it is tested. "mean" takes the mean
of their probabilities. "stack" takes the weighted mean of their log-probabilities, with weights and a temperature of
each fold that were fitted on the fold's dev utterances: no member of the fold was trained on them, and the fold's test
speakers are not among them. (Each member's epoch was chosen on them; that flatters all members alike.)

The test predictions of the other folds would be more data, and the wrong ones: the models that gave them were trained
on this fold's test speakers, so that these would have a say in weights they are then tested with.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.optimize import LinearConstraint, minimize
from scipy.special import log_softmax, softmax

from sermll import __version__, calibration, metrics, results
from sermll.compare import SEED, paired_difference, tested
from sermll.errors import DataError
from sermll.files import read_json, write_json
from sermll.results import DEV_PREDICTIONS, PREDICTIONS
from sermll.source import code_version
from sermll.storage import send

Array = NDArray[np.float64]
Method = Literal["mean", "stack"]


@dataclass(frozen=True)
class Ensemble:
    """What `ensemble` leaves behind."""

    run_dir: Path
    metrics: dict[str, Any]
    """Content of metrics.json: scores as of any run, and under "ensemble" its members, the place of the best of them,
    the difference to it, and the weights and temperatures of "stack" by fold."""

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        selected, joined = self.metrics["selected"], self.metrics["ensemble"]
        scores = {name: selected[name]["value"] for name in ("ua", "wa", "macro_f1")}
        return {
            "run_dir": str(self.run_dir),
            "metrics": scores | {"ua_low": selected["ua"]["low"], "ua_high": selected["ua"]["high"]},
            "members": [{name: member[name] for name in ("run_dir", "ua")} for member in joined["members"]],
            "difference": joined["difference"],
            "leaks": self.metrics["leaks"],
        }


@dataclass(frozen=True)
class _Member:
    """A run's description and its predictions, ordered by fold and utterance."""

    path: Path
    run: dict[str, Any]
    test: pa.Table
    dev: pa.Table | None
    """None in runs of versions that did not keep them."""


def ensemble(runs: Sequence[Path], out: Path, method: Method) -> Ensemble:
    """Join finished runs and write the result as a run folder that `sermll report` and `sermll compare` read.

    Args:
        runs: folders of at least two runs with the same test utterances, folds, labels and classes.
        out: folder to write; may exist if it holds the same ensemble.
        method: "mean" or "stack", see above. Of few dev speakers "mean" is the safer one.

    Raises:
        DataError: runs that cannot be joined, with the reason; or `out` holds something else.
    """
    members = [_open(Path(run)) for run in runs]
    _check(members)
    if method == "stack":
        for member in members:
            if member.dev is None:
                raise DataError(f"{member.path}: no {DEV_PREDICTIONS}, which stack is fitted on; mean needs none")
            _check_fitted_on(member.path, member.dev)
    first, classes = members[0].run, members[0].run["data"]["classes"]
    ids = [member.run["run_id"] for member in members]
    run_id = hashlib.sha256(json.dumps([method, *sorted(ids)]).encode()).hexdigest()[:12]
    _claim(out, run_id)

    devs = [member.dev for member in members if member.dev is not None]
    stacked = _fit(devs, classes) if method == "stack" else {}
    test = _join([member.test for member in members], classes, stacked)
    counts, folds, speakers = results.by_speaker(test, classes)
    selected, by_fold = results.estimate(test, classes)
    theirs = [results.by_speaker(member.test, classes)[0] for member in members]
    ua = [float(metrics.weighted_ua(np.ones((1, len(folds))), each, folds)[0]) for each in theirs]
    best = int(np.argmax(ua))
    summary: dict[str, Any] = {
        "folds": [{"fold": fold, **results.scores(cells)} for fold, cells in by_fold.items()],
        "selected": selected,
        "complete": len(by_fold) == len(first["protocol"]["folds"]),
        "leaks": first["protocol"]["leaks"],
        "ensemble": {
            "members": [
                {"run_dir": str(member.path), "run_id": name, "ua": value}
                for member, name, value in zip(members, ids, ua, strict=True)
            ],
            "best": best,
            "difference": vars(paired_difference(theirs[best], counts, folds, speakers, SEED)),
            "stack": [
                {"fold": fold, "weights": weights.tolist(), "temperature": temperature}
                for fold, (weights, temperature) in stacked.items()
            ],
        },
    }
    description = first | {
        "run_id": run_id,
        "name": f"{first['name']}-{method}-of-{len(members)}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": {"version": __version__, **code_version()},
        "members": ids,
        "method": method,
    }
    shutil.copyfile(members[0].path / "config.yaml", out / "config.yaml")
    write_json(out / "run.json", description)
    pq.write_table(test, out / PREDICTIONS)
    if len(devs) == len(members):
        dev = _join(devs, classes, stacked)
        pq.write_table(dev, out / DEV_PREDICTIONS)
        summary["calibration"] = results.calibrate(test, dev, classes)
    send(out)
    write_json(out / "metrics.json", summary)
    return Ensemble(out, summary)


def text(found: Ensemble) -> str:
    """Members and gain for the terminal; scores and folds are `report.text_table`'s."""
    joined = found.metrics["ensemble"]
    names = [Path(member["run_dir"]).name for member in joined["members"]]
    width = max(map(len, names))
    lines = [f"{'member':<{width}}      UA"]
    for place, (name, member) in enumerate(zip(names, joined["members"], strict=True)):
        lines.append(f"{name:<{width}}  {100 * member['ua']:>6.1f}{'  best' if place == joined['best'] else ''}")
    for row in joined["stack"]:
        weights = " ".join(f"{weight:.2f}" for weight in row["weights"])
        lines.append(f"fold {row['fold']}: weights {weights}, temperature {row['temperature']:.2f}")
    value, low, high = (100 * joined["difference"][name] for name in ("value", "low", "high"))
    p = joined["difference"]["p"]
    lines.append(f"UA of the ensemble minus the best member's: {value:+.1f} [{low:+.1f}, {high:+.1f}], p {p:.4f}")
    lines.append("The best is picked by its test UA, which flatters it: the gain is told too low rather than too high.")
    return "\n".join(lines)


def fit_stack(probabilities: Array, labels: NDArray[np.int64]) -> tuple[Array, float]:
    """Weights of members, and a temperature, of least negative log-likelihood.

    It is a multinomial logistic regression on the members' log-probabilities with one coefficient for each member,
    none negative: weight / temperature. So it has one minimum, and weights may be exactly 0.

    Args:
        probabilities: [M, n, C] of utterances that are neither trained on nor tested, rows sum to 1.
        labels: [n] true classes, 0 to C - 1.

    Returns:
        [M] weights, none negative, sum 1; and a temperature within `calibration.TEMPERATURES`. Equal weights and 1
        where none are better.

    Raises:
        DataError: there are no utterances, or these are no probabilities of their labels.
    """
    count = len(probabilities)
    for each in probabilities:
        calibration.negative_log_likelihood(each, labels)  # refuses what are no probabilities
    told, rows = calibration.logits(probabilities), np.arange(len(labels))

    def loss(coefficients: Array) -> tuple[float, Array]:
        said = log_softmax(np.tensordot(coefficients, told, axes=1), axis=1)
        wrong = np.exp(said)
        wrong[rows, labels] -= 1
        return float(-said[rows, labels].mean()), (told * wrong).sum(axis=(1, 2)) / len(labels)

    lowest, highest = (1 / temperature for temperature in reversed(calibration.TEMPERATURES))
    found: Any = minimize(
        loss,
        np.full(count, 1 / count),
        jac=True,
        method="SLSQP",
        bounds=[(0, highest)] * count,
        constraints=LinearConstraint(np.ones(count), lowest, highest),
        options={"ftol": 1e-10, "maxiter": 500},
    )
    if found.status not in (0, 8):  # 8: no step lowers it any more, at the limit of precision
        raise DataError(f"the weights of an ensemble could not be fitted ({found.message}); mean needs no fit")
    return found.x / found.x.sum(), float(1 / found.x.sum())


def _check_fitted_on(path: Path, dev: pa.Table) -> None:
    """Refuse a fold with dev utterances of one class alone: who says it most readily would have all the weight."""
    folds, labels = dev["fold"].to_numpy(), np.array(dev["label"].to_pylist())
    for fold in np.unique(folds):
        held = np.unique(labels[folds == fold])
        if len(held) == 1:
            raise DataError(
                f"{path}: every dev utterance of fold {fold} is {str(held[0])!r}, and stack would weigh members by how "
                "readily they say so; mean needs no dev utterances"
            )


def _fit(devs: Sequence[pa.Table], classes: Sequence[str]) -> dict[int, tuple[Array, float]]:
    """Weights and temperature of each fold, from its dev utterances."""
    folds = devs[0]["fold"].to_numpy()
    told = np.stack([results.probabilities(dev, classes)[0] for dev in devs])
    labels = results.probabilities(devs[0], classes)[1]
    return {int(fold): fit_stack(told[:, folds == fold], labels[folds == fold]) for fold in np.unique(folds)}


def _join(tables: Sequence[pa.Table], classes: Sequence[str], stacked: dict[int, tuple[Array, float]]) -> pa.Table:
    """What the members say together: their mean where `stacked` has nothing of a fold. There are no embeddings."""
    told = np.stack([results.probabilities(table, classes)[0] for table in tables])
    joined = told.mean(axis=0)
    folds = tables[0]["fold"].to_numpy()
    for fold, (weights, temperature) in stacked.items():
        pooled = np.tensordot(weights, calibration.logits(told[:, folds == fold]), axes=1)
        joined[folds == fold] = softmax(pooled / temperature, axis=1)
    columns = {name: tables[0][name] for name in tables[0].column_names}
    return pa.table(
        columns
        | {
            "predicted": [classes[place] for place in joined.argmax(axis=1)],
            "probabilities": pa.array(list(joined), pa.list_(pa.float64())),
            "embedding": pa.array([[]] * len(joined), pa.list_(pa.float32())),
        }
    )


def _open(path: Path) -> _Member:
    run, test = results.read_run(path), _ordered(path, PREDICTIONS)
    dev = _ordered(path, DEV_PREDICTIONS) if (path / DEV_PREDICTIONS).is_file() else None
    return _Member(path, run, test, dev)


def _ordered(path: Path, name: str) -> pa.Table:
    return results.read_predictions(path, name).sort_by([("fold", "ascending"), ("utterance", "ascending")])


def _check(members: Sequence[_Member]) -> None:
    """Refuse what is no ensemble."""
    if len(members) < 2:
        raise DataError(f"an ensemble needs two runs at least, {len(members)} given")
    for place, member in enumerate(members):
        for other in members[:place]:
            if other.run["run_id"] == member.run["run_id"]:
                raise DataError(f"{other.path} and {member.path} are one run, {member.run['run_id']}; give it once")
    first = members[0]
    for member in members[1:]:
        pair = f"{member.path} and {first.path}"
        mine, theirs = (one.run["data"]["classes"] for one in (member, first))
        if mine != theirs:
            raise DataError(f"{pair} differ in {len(set(mine) ^ set(theirs))} classes, or in their order")
        for split, one, other in (("tested", member.test, first.test), ("validated on dev", member.dev, first.dev)):
            if one is None or other is None:
                continue
            differing = set(tested(one)) ^ set(tested(other))
            if differing:
                raise DataError(
                    f"{pair} were not {split} on the same utterances in the same folds with the same labels "
                    f"({len(differing)} differ); join runs of one protocol, with the same folds finished"
                )
        hashes = [one.run["protocol"]["hash"] for one in (member, first)]
        if hashes[0] != hashes[1]:
            raise DataError(
                f"{pair} are of protocols {hashes[0]} and {hashes[1]}: data, label space, targets, folds, dev rule or "
                "the rule by which epochs are chosen differ; join runs of one protocol"
            )


def _claim(out: Path, run_id: str) -> None:
    """Make the folder; refuse one that holds anything but this ensemble."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        run = out / "run.json"
        held = read_json(run)["run_id"] if run.is_file() else None
        if held != run_id and any(out.iterdir()):
            raise DataError(f"{out}: holds {'another run' if held else 'other files'}; give a new folder")
    except (OSError, ValueError) as error:
        raise DataError(f"{out}: cannot be written ({error}); give another folder for the ensemble") from None
