"""What a run leaves on disk, and the scores that are taken from it.

Predictions are rows of utterance, speaker, corpus, fold, label, predicted, probabilities and embedding. Each fold has
its own files; `gather` joins those of the finished folds and writes metrics.json.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sermll import calibration, metrics
from sermll.config import Experiment
from sermll.errors import DataError
from sermll.files import FRESH_S, fetch_run, fold_folders, naming, read_json, read_yaml, whole, write_json
from sermll.storage import address

PREDICTIONS = "predictions.parquet"
"""Test utterances, by the epoch that `protocol.select` names."""
LAST_PREDICTIONS = "predictions_last.parquet"
"""Test utterances, by the last epoch."""
DEV_PREDICTIONS = "predictions_dev.parquet"
"""Dev utterances, by the epoch of `PREDICTIONS`."""
BOOTSTRAP_SEED = 0


def read_run(run_dir: Path) -> dict[str, Any]:
    """Content of a run's run.json.

    Raises:
        DataError: the folder is no run.
    """
    fetch_run(run_dir, max_age_s=FRESH_S)
    if not (run_dir / "run.json").is_file():
        raise DataError(f"{address(run_dir)}: no run (no run.json in it); give the folder that `sermll train` printed")
    return read_json(run_dir / "run.json")


def read_predictions(run_dir: Path, name: str = PREDICTIONS) -> pa.Table:
    """The rows of a run's file of predictions.

    Raises:
        DataError: the folder is no run, has no results yet, or the file is damaged.
    """
    read_run(run_dir)
    if not (run_dir / name).is_file():
        raise DataError(
            f"{address(run_dir)}: no results yet (no {name}); `sermll train` writes them when a fold is finished"
        )
    with naming(run_dir / name):
        return pq.read_table(run_dir / name)


def read_model_settings(run_dir: Path) -> Experiment:
    """The settings of a run whose models are to be used.

    Raises:
        DataError: missing, damaged, or of a version with other settings.
    """
    tree = read_yaml(run_dir / "config.yaml")
    with naming(run_dir / "config.yaml"):
        return Experiment.model_validate(tree)


def finished_folds(run_dir: Path) -> list[dict[str, Any]]:
    """Content of result.json of every finished fold, in the folds' order."""
    fetch_run(run_dir, max_age_s=FRESH_S)
    results = (folder / "result.json" for _, folder in fold_folders(run_dir))
    return [read_json(path) for path in results if path.exists()]


def gathered(run_dir: Path) -> bool:
    """Whether the run's numbers are those of the folds that are finished now."""
    summary = run_dir / "metrics.json"
    if not summary.exists() or not (run_dir / DEV_PREDICTIONS).exists():
        return False
    written = summary.stat().st_mtime_ns
    results = [folder / "result.json" for _, folder in fold_folders(run_dir)]
    times = [path.stat().st_mtime_ns for path in results if path.exists()]
    return len(read_json(summary)["folds"]) == len(times) and max(times, default=written) < written


def gather(run_dir: Path) -> dict[str, Any]:
    """Join the finished folds: predictions of all, and metrics.json from their counts.

    Raises:
        DataError: no fold is finished, a fold's file is missing or damaged, or folds began with different weights.
    """
    fetch_run(run_dir)
    run = read_json(run_dir / "run.json")
    classes = run["data"]["classes"]
    results = finished_folds(run_dir)
    if not results:
        raise DataError(f"{address(run_dir)}: no fold is finished")
    weights = {result["encoder"]: result["fold"] for result in results if "encoder" in result}
    if len(weights) > 1:
        raise DataError(
            f"{address(run_dir)}: folds {' and '.join(map(str, weights.values()))} began with different weights of the "
            "encoder; remove the folders of those with the wrong ones, and give the same command again"
        )
    tables: dict[str, pa.Table] = {}
    for name in (PREDICTIONS, LAST_PREDICTIONS, DEV_PREDICTIONS):
        parts = []
        for path in (run_dir / f"fold-{result['fold']}" / name for result in results):
            with naming(path):
                parts.append(pq.read_table(path))
        tables[name] = pa.concat_tables(parts)
        with whole(run_dir / name) as partial:
            pq.write_table(tables[name], partial)
    selected, chosen_counts = estimate(tables[PREDICTIONS], classes)
    last, last_counts = estimate(tables[LAST_PREDICTIONS], classes)
    rows, highest = [], []
    for result in results:
        history = read_json(run_dir / f"fold-{result['fold']}" / "history.json")
        highest.append(max(float(metrics.ua(np.array(row["test_confusion"]))) for row in history))
        rows.append(
            {
                **{name: result[name] for name in ("fold", "epochs", "best_epoch", "seconds")},
                **scores(chosen_counts[result["fold"]]),
                "last": _rates(last_counts[result["fold"]]),
            }
        )
    complete = len(results) == len(run["protocol"]["folds"])
    summary = {
        "folds": rows,
        "selected": selected,
        "last": last,
        # No result, but what publications that choose the epoch on the test fold would have called one.
        "chosen_on_test_ua": float(np.mean(highest)),
        "calibration": calibrate(tables[PREDICTIONS], tables[DEV_PREDICTIONS], classes),
        "complete": complete,
        "leaks": run["protocol"]["leaks"],
    }
    write_json(run_dir / "metrics.json", summary)
    return summary


def scores(counts: NDArray[np.float64]) -> dict[str, Any]:
    """Scores of one fold's confusion counts [C, C], its recalls and the counts, as JSON."""
    recalls = [None if np.isnan(value) else float(value) for value in metrics.recalls(counts)]
    return {**_rates(counts), "recalls": recalls, "confusion": counts.astype(int).tolist()}


def _rates(counts: NDArray[np.float64]) -> dict[str, float]:
    return {name: float(getattr(metrics, name)(counts)) for name in ("ua", "wa", "macro_f1")}


def estimate(table: pa.Table, classes: Sequence[str]) -> tuple[dict[str, Any], dict[int, NDArray[np.float64]]]:
    """Scores of predictions with intervals by bootstrap over speakers, and the confusion counts of each fold."""
    counts, folds, speakers = by_speaker(table, classes)
    estimates = metrics.speaker_bootstrap(counts, folds, speakers, BOOTSTRAP_SEED)
    values = {name: _as_json(estimate) for name, estimate in estimates.items()}
    return values, {int(fold): counts[folds == fold].sum(axis=0) for fold in np.unique(folds)}


def by_speaker(
    table: pa.Table, classes: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.str_]]:
    """Confusion counts of each fold and speaker, [S, C, C], their folds and their speakers, [S]; ordered by both.

    A speaker may be tested in several folds. In joined data the corpus is part of the speaker's name.
    """
    owner, tested = _speakers(table)
    labels, predicted = (_indices(table, column, classes) for column in ("label", "predicted"))
    size = len(classes)
    cells = np.bincount((owner * size + labels) * size + predicted, minlength=len(tested) * size * size)
    folds, speakers = np.array([fold for fold, _ in tested], np.int64), np.array([name for _, name in tested], np.str_)
    return cells.reshape(len(tested), size, size).astype(np.float64), folds, speakers


def calibrate(test: pa.Table, dev: pa.Table, classes: Sequence[str]) -> dict[str, Any]:
    """How far the confidence in the test utterances can be believed, as it is and with a temperature.

    Each fold has a temperature of its own, fitted on the fold's dev utterances; test utterances have no say in it. Of
    dev utterances of one class alone it would learn how readily this class is said, not how rightly: it is 1 then.

    Args:
        test: predictions of the folds' test utterances.
        dev: predictions of the same folds' dev utterances.
        classes: class order of the probabilities.

    Returns:
        ECE with intervals by bootstrap over speakers, negative log-likelihood in nats and reliability by range of
        confidence, each as it is and "_scaled"; the temperatures in the folds' order. As JSON.

    Raises:
        DataError: a fold has no dev utterances, or what should be probabilities are none.
    """
    said, labels = probabilities(test, classes)
    dev_said, dev_labels = probabilities(dev, classes)
    folds, dev_folds = (table["fold"].to_numpy() for table in (test, dev))
    temperatures, scaled = [], said.copy()
    for fold in np.unique(folds):
        held_out = dev_folds == fold
        one = len(np.unique(dev_labels[held_out])) == 1
        temperatures.append(1.0 if one else calibration.fit_temperature(dev_said[held_out], dev_labels[held_out]))
        scaled[folds == fold] = calibration.apply_temperature(said[folds == fold], temperatures[-1])
    owner, tested = _speakers(test)
    speaker = metrics.numbered([name for _, name in tested])[0][owner]
    summary: dict[str, Any] = {"temperatures": temperatures}
    for ending, shown in (("", said), ("_scaled", scaled)):
        bins = vars(calibration.reliability(shown, labels))
        summary |= {
            f"ece{ending}": _as_json(calibration.speaker_bootstrap(shown, labels, speaker, BOOTSTRAP_SEED)),
            f"nll{ending}": calibration.negative_log_likelihood(shown, labels),
            f"reliability{ending}": {
                name: [None if np.isnan(value) else value for value in values.tolist()] for name, values in bins.items()
            },
        }
    return summary


def probabilities(table: pa.Table, classes: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Probabilities [n, C] of predictions, and the true classes [n]."""
    told = np.array(table["probabilities"].to_pylist(), np.float64).reshape(len(table), len(classes))
    return told, _indices(table, "label", classes)


def _indices(table: pa.Table, column: str, classes: Sequence[str]) -> NDArray[np.int64]:
    index = {name: place for place, name in enumerate(classes)}
    return np.array([index[name] for name in table[column].to_pylist()], np.int64)


def _speakers(table: pa.Table) -> tuple[NDArray[np.int64], list[tuple[int, str]]]:
    """Of each row the place of its fold and speaker in the list that follows, ordered by fold and speaker."""
    keys = list(zip(table["fold"].to_pylist(), table["speaker"].to_pylist(), strict=True))
    tested = sorted(set(keys))
    place = {key: number for number, key in enumerate(tested)}
    return np.array([place[key] for key in keys], np.int64), tested


def _as_json(estimate: metrics.Estimate) -> dict[str, float | None]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}
