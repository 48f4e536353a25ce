"""`sermll run` and `sermll matrix` on a real Ray cluster: complete, killed again and again, with failures."""

import csv
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import write_corpus
from prepared import prepare_without_ray, tiny_settings
from sklearn.metrics import balanced_accuracy_score

from sermll import campaign_page, matrix
from sermll.campaign import load_campaign, run_campaign
from sermll.corpora import FORMATS

pytestmark = pytest.mark.ray
AXES = {
    "mixup": {"eam": {}, "lam": {"mixup.kind": "lam"}, "mean": {"model.pool.kind": "mean"}},
    "seed": [0, 1],
    "fold": [0, 1, 2, 3],
}


def write_campaign(folder: Path, data: Path, axes: dict[str, Any], **overrides: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "x.yaml").write_text(yaml.safe_dump(tiny_settings(data, folder / "runs")))
    path = folder / "x.campaign.yaml"
    # one fold at once: on two cores, starting more workers takes longer than these folds
    overrides = {"resources.parallel_folds": 1, **overrides}
    content = {"name": "x", "experiment": "x.yaml", "overrides": overrides, "axes": axes}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def scores(folder: Path) -> list[dict[str, str]]:
    """The campaign's table without what the clock decides."""
    with (folder / "report" / "table.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{key: row[key] for key in row if key.startswith(("axis", "ua", "wa_", "macro"))} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A campaign of 24 cells, never interrupted; tracked in MLflow. Read-only."""
    folder = tmp_path_factory.mktemp("campaign")
    uri = f"sqlite:///{folder / 'runs' / 'mlflow.db'}"
    path = write_campaign(folder, tiny_data, AXES, **{"tracking.mlflow": uri, "resources.parallel_folds": 2})
    return run_campaign(load_campaign(path, {}), campaign_page.build)


def test_every_cell_is_trained_and_the_numbers_are_those_of_the_predictions(undisturbed: Any) -> None:
    assert (undisturbed.cells, undisturbed.finished, undisturbed.failures) == (24, 24, ())
    stored = pq.read_table(undisturbed.folder / "predictions").to_pandas()
    assert len(stored) == 24 * 14 and set(stored["axis_mixup"]) == set(AXES["mixup"])
    for row in scores(undisturbed.folder):
        mine = stored[stored["axis_mixup"] == row["axis_mixup"]]
        each = [
            balanced_accuracy_score(part["label"], part["predicted"]) for _, part in mine.groupby(["run_id", "fold"])
        ]
        assert len(each) == 8 and float(row["ua"]) == pytest.approx(np.mean(each))


def test_mlflow_shows_campaign_above_cell_above_fold(undisturbed: Any) -> None:
    from mlflow import MlflowClient

    assert undisturbed.not_tracked is None
    client = MlflowClient(tracking_uri=f"sqlite:///{undisturbed.folder.parent / 'mlflow.db'}")
    found = client.get_experiment_by_name("x")
    assert found is not None
    runs = {run.info.run_id: run for run in client.search_runs([found.experiment_id], max_results=100)}
    above = {key: run.data.tags.get("mlflow.parentRunId") for key, run in runs.items()}
    (top,) = [key for key, parent in above.items() if parent is None]
    cells = [key for key, parent in above.items() if parent == top]
    assert runs[top].info.run_name == "campaign-x" and len(cells) == 6
    for cell in cells:
        assert runs[cell].data.tags["sermll.axis.mixup"] in AXES["mixup"]
        assert sorted(str(runs[key].info.run_name) for key, parent in above.items() if parent == cell) == [
            f"fold-{fold}" for fold in AXES["fold"]
        ]
    assert {"index.html", "table.csv"} <= {Path(item.path).name for item in client.list_artifacts(top, "report")}
    seeded = client.search_runs([found.experiment_id], "tags.`sermll.seed` = '1' and tags.`sermll.fold` = '0'")
    assert len(seeded) == 3


def test_a_finished_campaign_trains_nothing_again(undisturbed: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.folder.parent.glob("x-*/fold-*/*")}
    path = undisturbed.folder.parents[1] / "x.campaign.yaml"
    again = run_campaign(load_campaign(path, {}), campaign_page.build)
    assert again.finished == 24 and before
    assert {path: path.stat().st_mtime_ns for path in undisturbed.folder.parent.glob("x-*/fold-*/*")} == before


def test_killed_five_times_it_ends_with_the_same_table(
    undisturbed: Any,
    tiny_data: Path,
    tmp_path: Path,
    killable: Callable[..., subprocess.Popen],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)  # a cluster that outlives the driver
    path = write_campaign(tmp_path / "killed", tiny_data, AXES, **{"resources.parallel_folds": 2})
    chance = random.Random(0)
    runs = tmp_path / "killed" / "runs"

    def progress() -> tuple[int, ...]:
        return tuple(len(json.loads(file.read_text())) for file in sorted(runs.glob("x-*/fold-*/history.json")))

    def all_trained() -> bool:
        return len(list(runs.glob("x-*/fold-*/result.json"))) == 24

    ended: dict[Path, int] = {}
    for kill in range(5):
        before = progress()
        # Something must have been gained, or it would never end; the last kill meets what comes after training.
        happened = all_trained if kill == 4 else lambda before=before: progress() != before
        process = killable(["run", str(path)])
        deadline = time.monotonic() + 240
        while not happened() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 1))
        assert process.poll() is None, "there was nothing left to disturb"
        process.kill()
        process.wait()
        for result in runs.glob("x-*/fold-*/result.json"):
            ended.setdefault(result, result.stat().st_mtime_ns)
    assert len(ended) == 24
    outcome = run_campaign(load_campaign(path, {}), campaign_page.build)
    assert outcome.finished == 24
    assert scores(outcome.folder) == scores(undisturbed.folder)
    assert {result: result.stat().st_mtime_ns for result in ended} == ended  # trained to the end once
    assert {len(json.loads(file.read_text())) for file in runs.glob("x-*/fold-*/history.json")} == {2}


def test_a_cell_that_fails_is_told_and_the_others_are_trained(
    ray_cluster: None, tiny_data: Path, tmp_path: Path
) -> None:
    rates = {"fine": {}, "wild": {"optim.lr": 1e30, "optim.clip_norm": 1e30}}
    path = write_campaign(tmp_path / "wild", tiny_data, {"rate": rates, "fold": [0]})
    outcome = run_campaign(load_campaign(path, {}), campaign_page.build)
    assert (outcome.cells, outcome.finished) == (2, 1)
    (told,) = outcome.failures
    assert told.startswith("wild, fold 0: epoch 1, batch") and "\n" not in told
    assert "epoch 1, batch" in outcome.page.read_text()


def test_workers_that_die_again_and_again_cost_their_cell_alone(
    ray_cluster: None, tiny_data: Path, tmp_path: Path
) -> None:
    # A width whose weights no machine can hold: the workers of this cell end without a word of ours.
    sizes = {"vast": {"model.embedding_dim": 10**12}, "small": {}}
    path = write_campaign(tmp_path / "vast", tiny_data, {"size": sizes, "fold": [0]}, **{"resources.max_failures": 1})
    outcome = run_campaign(load_campaign(path, {}), campaign_page.build)
    assert (outcome.cells, outcome.finished) == (2, 1)
    assert outcome.failures[0].startswith("vast, fold 0: worker 0 failed")


def test_cells_of_one_and_of_two_workers_share_a_campaign(ray_cluster: None, tiny_data: Path, tmp_path: Path) -> None:
    workers = {"one": {}, "two": {"resources.workers": 2, "seed": 1}}
    path = write_campaign(tmp_path / "workers", tiny_data, {"workers": workers, "fold": [0, 1]})
    assert run_campaign(load_campaign(path, {}), campaign_page.build).finished == 4


@pytest.fixture(scope="module")
def three_corpora(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The tiny corpus and two of its kind under other names, of other speakers' recordings."""
    folder = tmp_path_factory.mktemp("corpora")
    made = [tiny_data]
    for seed, name, speakers in ((1, "left", ("01", "02", "04")), (2, "right", ("05", "06", "07"))):
        root = write_corpus(folder / name / "audio", speakers, takes=1, seed=seed)
        names = {
            "W": "anger",
            "L": "boredom",
            "E": "disgust",
            "A": "fear",
            "F": "happiness",
            "T": "sadness",
            "N": "neutral",
        }
        lines = [f"{path.name},{names[path.name[5]]},{path.name[:2]}" for path in sorted((root / "wav").glob("*.wav"))]
        manifest = root / "wav" / "manifest.csv"
        manifest.write_text("\n".join(["path,label,speaker", *lines]) + "\n")
        corpus, place = FORMATS["manifest"](manifest, name, None)
        made.append(prepare_without_ray(place, folder / name / "data", corpus))
    return made


def test_the_matrix_is_one_model_for_each_training_corpus(
    ray_cluster: None, three_corpora: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tiny_settings(three_corpora[0], tmp_path / "runs")))
    path = tmp_path / "m.yaml"
    labels = {"loud": ["anger", "happiness"], "quiet": ["sadness", "boredom"]}
    content = {"name": "m", "experiment": "x.yaml", "corpora": [str(each) for each in three_corpora], "labels": labels}
    path.write_text(
        yaml.safe_dump(content | {"overrides": {"optim.epochs": 1, "optim.batch_size": 4, "protocol.dev_speakers": 1}})
    )
    command = [sys.executable, "-m", "sermll", "matrix", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    names = ["emodb", "left", "right"]
    assert told["test"] == names and told["train"] == [*names, "all others"]
    runs = {cell["labels"]["part"]: Path(cell["run_dir"]) for cell in json.loads(
        (tmp_path / "runs" / "campaign-m" / "campaign.json").read_text()
    )["cells"]}  # fmt: skip
    assert len(list(runs["from one corpus"].glob("fold-*"))) == 3  # three models, nine cells with the diagonal
    table = pq.read_table(runs["from one corpus"] / "predictions.parquet").to_pandas()
    for row, train in enumerate(names):
        for column, test in enumerate(names):
            if train == test:
                summary = json.loads((runs[f"within {train}"] / "metrics.json").read_text())["selected"]["ua"]
                assert told["ua"][row][column] == pytest.approx(summary["value"])
                assert told["ua_low"][row][column] == pytest.approx(summary["low"])
                continue
            cell = table[(table["fold"] == row) & (table["corpus"] == test)]
            assert set(cell["speaker"].str.partition("/")[0]) == {test}
            assert told["ua"][row][column] == pytest.approx(balanced_accuracy_score(cell["label"], cell["predicted"]))
    facts = json.loads((runs["from all others"] / "run.json").read_text())["protocol"]["folds"]
    assert [fold["test_corpora"] for fold in facts] == [[name] for name in names]
    report = tmp_path / "runs" / "campaign-m" / "report"
    assert {"matrix.html", "matrix.csv", "matrix.md", "matrix.tex", "matrix.png", "matrix.svg"} <= {
        file.name for file in report.iterdir()
    }
    assert matrix.read_matrix(report.parent).as_json() == told
