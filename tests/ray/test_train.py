"""`sermll train` on a real Ray cluster: complete, resumable, the same with one worker and with two."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import ray.train
import yaml
from prepared import kill_when, prepare_without_ray, tiny_settings
from sklearn.metrics import balanced_accuracy_score

from sermll.config import Experiment, with_overrides
from sermll.corpora import FORMATS
from sermll.errors import CheckpointError, ConfigError, DataError, ProtocolError, TrainingError
from sermll.group import Together
from sermll.labels import apply_labels, label_space
from sermll.lane_start import cause
from sermll.report import load, text_table
from sermll.results import gather
from sermll.shards import Prepared, Waveforms
from sermll.train import train

pytestmark = pytest.mark.ray
Settings = Callable[..., Experiment]
TIMED = ("train_s", "eval_s", "utterances_per_s", "data_wait_share")


def balanced(counts: list[list[int]]) -> float:
    """UA from a confusion matrix, by hand."""
    recalls = [row[true] / sum(row) for true, row in enumerate(counts) if sum(row)]
    return sum(recalls) / len(recalls)


def histories(run_dir: Path) -> list[list[dict[str, Any]]]:
    """Every fold's history without what the clock decides."""
    found = [json.loads(path.read_text()) for path in sorted(run_dir.glob("fold-*/history.json"))]
    return [[{k: v for k, v in row.items() if k not in TIMED} for row in history] for history in found]


@pytest.fixture(scope="module")
def finished(ray_cluster: None, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Path]:
    """Folds 0 and 1 of the tiny corpus, with MLflow in a SQLite file. Read-only."""
    folder = tmp_path_factory.mktemp("finished")
    tree = with_overrides(
        tiny_settings(tiny_data, folder / "runs"),
        {"optim.epochs": 3, "optim.lr": 3e-3, "tracking.mlflow": f"sqlite:///{folder / 'runs' / 'mlflow.db'}"},
    )
    for fold in (0, 1):
        outcome = train(Experiment.model_validate(tree | {"fold": fold}))
        assert outcome.not_tracked is None
    return Experiment.model_validate(tree), outcome.run_dir


def test_folds_of_one_experiment_meet_in_one_run(finished: tuple[Experiment, Path]) -> None:
    _, run_dir = finished
    summary = json.loads((run_dir / "metrics.json").read_text())
    lifted = [max(balanced(row["test_confusion"]) for row in history) for history in histories(run_dir)]
    assert summary["chosen_on_test_ua"] == pytest.approx(np.mean(lifted))
    assert summary["chosen_on_test_ua"] >= summary["selected"]["ua"]["value"]
    assert [fold["fold"] for fold in summary["folds"]] == [0, 1] and not summary["complete"]
    assert summary["selected"]["ua"]["value"] == pytest.approx(np.mean([fold["ua"] for fold in summary["folds"]]))


def test_every_test_utterance_is_scored_exactly_once(finished: tuple[Experiment, Path], tiny_data: Path) -> None:
    _, run_dir = finished
    run = json.loads((run_dir / "run.json").read_text())
    tested = {speaker for fold in run["protocol"]["folds"][:2] for speaker in fold["test"]}
    rows = [row for row in Prepared.open(tiny_data).table.to_pylist() if row["speaker"] in tested]
    for name in ("predictions.parquet", "predictions_last.parquet"):
        table = pq.read_table(run_dir / name).to_pylist()
        assert sorted(row["utterance"] for row in table) == sorted(row["id"] for row in rows)
        assert all(abs(sum(row["probabilities"]) - 1) < 1e-9 for row in table)


def test_reported_scores_are_those_of_the_stored_predictions(finished: tuple[Experiment, Path]) -> None:
    _, run_dir = finished
    summary = json.loads((run_dir / "metrics.json").read_text())
    for row in summary["folds"]:
        for name, ua in (("predictions", row["ua"]), ("predictions_last", row["last"]["ua"])):
            table = pq.read_table(run_dir / f"fold-{row['fold']}" / f"{name}.parquet").to_pandas()
            assert ua == pytest.approx(balanced_accuracy_score(table["label"], table["predicted"]))


def test_the_epoch_is_chosen_on_dev_and_earliest_among_equals(finished: tuple[Experiment, Path]) -> None:
    _, run_dir = finished
    for fold in run_dir.glob("fold-*"):
        history, result = (json.loads((fold / name).read_text()) for name in ("history.json", "result.json"))
        scores = [row["dev_ua"] for row in history]
        assert result["best_epoch"] == scores.index(max(scores))
        chosen = json.loads((fold / result["best_checkpoint"] / "checkpoint.json").read_text())
        assert chosen["epoch"] == result["best_epoch"]
        stored = pq.read_table(fold / "predictions.parquet").to_pandas()
        hits = np.trace(np.array(history[result["best_epoch"]]["test_confusion"]))
        assert hits == (stored["label"] == stored["predicted"]).sum()


def test_a_finished_run_is_not_trained_again(finished: tuple[Experiment, Path]) -> None:
    experiment, run_dir = finished
    before = {path: path.stat().st_mtime_ns for path in run_dir.glob("fold-*/*.json")}
    train(experiment.model_copy(update={"fold": 0}))
    assert {path: path.stat().st_mtime_ns for path in run_dir.glob("fold-*/*.json")} == before


def test_mlflow_has_a_parent_and_a_child_per_fold(finished: tuple[Experiment, Path]) -> None:
    from mlflow import MlflowClient

    experiment, run_dir = finished
    client = MlflowClient(tracking_uri=f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    found = client.get_experiment_by_name("tiny")
    assert found is not None
    runs = {run.info.run_name: run for run in client.search_runs([found.experiment_id])}
    assert set(runs) == {run_dir.name, "fold-0", "fold-1"}
    parent = runs[run_dir.name]
    for fold in (0, 1):
        child = runs[f"fold-{fold}"]
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.params["optim.lr"] == "0.003" and child.info.status == "FINISHED"
        history = json.loads((run_dir / f"fold-{fold}" / "history.json").read_text())
        for key in ("loss", "loss_kl", "loss_supcon", "dev_ua", "lr", "utterances_per_s", "data_wait_share"):
            logged = sorted((metric.step, metric.value) for metric in client.get_metric_history(child.info.run_id, key))
            assert logged == [(row["epoch"] + 1, pytest.approx(row[key])) for row in history]
        names = {item.path for item in client.list_artifacts(child.info.run_id)}
        assert {"model", "predictions.parquet", "history.json"} <= names
        assert child.inputs is not None
        assert child.inputs.dataset_inputs[0].dataset.digest == Prepared.open(experiment.data.path).data_hash[:12]
    summary = json.loads((run_dir / "metrics.json").read_text())
    assert parent.data.metrics["test_ua"] == pytest.approx(summary["selected"]["ua"]["value"])
    assert "index.html" in {Path(item.path).name for item in client.list_artifacts(parent.info.run_id, "report")}


def test_two_workers_train_as_one(ray_cluster: None, settings: Settings, tmp_path: Path) -> None:
    # Dropout and masks are drawn per worker; without them the two runs must agree to rounding.
    quiet = (
        "model.encoder.dropout=0",
        "model.encoder.spec_augment=false",
        "fold=3",
        "protocol.dev_speakers=2",
    )
    rows = []
    for workers in (1, 2):
        runs = tmp_path / f"workers-{workers}"
        outcome = train(settings(*quiet, f"resources.workers={workers}", f"tracking.runs={runs}"))
        rows.append(histories(outcome.run_dir)[0])
        scored = pq.read_table(outcome.run_dir / "predictions.parquet")
        assert scored.num_rows == len(set(scored["utterance"].to_pylist())) == 14
    for one, two in zip(*rows, strict=True):
        for key in ("loss", "loss_kl", "loss_focal", "loss_center", "loss_supcon", "grad_norm", "dev_loss"):
            assert two[key] == pytest.approx(one[key], rel=2e-3), key


def test_a_killed_driver_goes_on_and_ends_with_the_same_numbers(
    ray_cluster: None, settings: Settings, tmp_path: Path, killable: Callable[..., subprocess.Popen]
) -> None:
    experiment = settings("fold=0", "optim.epochs=6", "optim.average=0.9")  # two sets of weights to resume
    undisturbed = train(experiment)
    tree = experiment.model_dump(mode="json")
    tree["tracking"]["runs"] = str(tmp_path / "killed")
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tree))
    process = killable(["train", str(tmp_path / "x.yaml")])
    kill_when(process, lambda: list(tmp_path.glob("killed/*/fold-0/history.json")))
    (run_dir,) = (tmp_path / "killed").glob("tiny-*")
    reached = len(histories(run_dir)[0])
    assert 1 <= reached < 6 and not (run_dir / "fold-0" / "result.json").exists()
    resumed = train(Experiment.model_validate(tree))
    assert histories(resumed.run_dir) == histories(undisturbed.run_dir)
    assert resumed.metrics["selected"] == undisturbed.metrics["selected"]


def test_a_damaged_newest_checkpoint_is_passed_over(ray_cluster: None, settings: Settings, tmp_path: Path) -> None:
    whole = train(settings("fold=0", "optim.epochs=4"))
    again = shutil.copytree(whole.run_dir, tmp_path / "copy" / whole.run_dir.name)
    fold = again / "fold-0"
    (fold / "result.json").unlink()
    newest = max((fold / "checkpoints").glob("checkpoint_0*"))
    (newest / "model.safetensors").write_bytes(b"cut off")
    outcome = train(settings("fold=0", "optim.epochs=4", f"tracking.runs={tmp_path / 'copy'}"))
    assert histories(outcome.run_dir) == histories(whole.run_dir)


def test_nan_stops_the_fold_names_the_utterances_and_the_page_says_so(ray_cluster: None, settings: Settings) -> None:
    with pytest.raises(TrainingError, match=r"fold 0: epoch 1, batch \d+: .*nan.* The batch holds \d\d"):
        train(settings("fold=0", "optim.lr=1e30", "optim.clip_norm=1e30"))
    (page,) = Path(settings().tracking.runs).glob("*/report/index.html")
    assert "Fold 0 failed: epoch 1, batch" in page.read_text()


def test_a_fold_that_failed_says_so_until_it_is_tried_again(ray_cluster: None, settings: Settings) -> None:
    done = train(settings("fold=1")).run_dir
    (done / "fold-0").mkdir()
    (done / "fold-0" / "checkpoints").write_text("a file where a folder belongs")
    with pytest.raises(TrainingError, match="Not a directory"):
        train(settings("fold=0"))
    assert "Not a directory" in load(done).failures[0]
    assert "Fold 0 failed" in (done / "report" / "index.html").read_text()
    (done / "fold-0" / "checkpoints").unlink()
    train(settings("fold=0"))
    assert not (done / "fold-0" / "failed.json").exists() and not load(done).failures


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (["fold=10"], ConfigError, "has the folds 0 to 9"),
        (["optim.batch_size=500"], ConfigError, "only 112 training utterances"),
        (["data.path=/nowhere"], DataError, "no such folder"),
        (
            ["model.encoder.kind=pretrained", "model.encoder.name=/no/such", "fold=0"],
            TrainingError,
            "/no/such",
        ),
        (["resources.workers=4", "resources.cpus_per_worker=2", "fold=0"], ConfigError, "need 8 CPUs"),
        (["resources.gpus_per_worker=1", "fold=0"], ConfigError, "1 GPUs and 0 GB, the cluster has 5, 0 and "),
        (["tracking.runs=/dev/null/runs"], Exception, "cannot be written"),
    ],
)
def test_bad_input_is_named(
    ray_cluster: None, settings: Settings, words: list[str], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        train(settings(*words))


def test_a_damaged_shard_stops_before_training(ray_cluster: None, settings: Settings, tmp_path: Path) -> None:
    copy = shutil.copytree(str(settings().data.path), tmp_path / "copy")
    shard = copy / "shards" / "00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match="the shard is damaged"):
        train(settings(f"data.path={copy}"))


def test_mlflow_away_does_not_stop_training_and_track_sends_it_later(
    ray_cluster: None, settings: Settings, tmp_path: Path
) -> None:
    from sermll.track import upload

    outcome = train(settings("fold=0", "tracking.mlflow=http://127.0.0.1:9"))
    assert outcome.not_tracked and (outcome.run_dir / "metrics.json").exists()
    uri = f"sqlite:///{tmp_path / 'later.db'}"
    assert upload(outcome.run_dir, uri) is None

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name("tiny")
    assert found is not None and len(client.search_runs([found.experiment_id])) == 2
    assert upload(outcome.run_dir, uri) is None  # again: nothing twice
    assert len(client.search_runs([found.experiment_id])) == 2


def test_predict_agrees_with_the_stored_predictions(
    finished: tuple[Experiment, Path], tiny_corpus: Path, tmp_path: Path
) -> None:
    _, run_dir = finished
    stored = pq.read_table(run_dir / "fold-0" / "predictions.parquet").to_pylist()[:4]
    files = [str(tiny_corpus / "wav" / f"{row['utterance']}.wav") for row in stored]
    (tmp_path / "notes.wav").write_text("not audio")
    command = [sys.executable, "-m", "sermll", "predict", str(run_dir), *files, "--fold", "0", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ, timeout=120)
    for row, prediction in zip(stored, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert prediction["label"] == row["predicted"]
        np.testing.assert_allclose(list(prediction["probabilities"].values()), row["probabilities"], atol=1e-5)
    command[5:5] = [str(tmp_path / "notes.wav")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ, timeout=120)
    assert done.returncode == 1 and "notes.wav: corrupt" in done.stderr
    assert len(json.loads(done.stdout.splitlines()[-1])) == 4  # the others are answered all the same


def test_a_run_without_its_checkpoint_is_refused_by_name(finished: tuple[Experiment, Path], tmp_path: Path) -> None:
    from sermll.predict import Predictor

    copy = shutil.copytree(finished[1], tmp_path / "copy")
    result = json.loads((copy / "fold-0" / "result.json").read_text())
    (copy / "fold-0" / result["best_checkpoint"] / "model.safetensors").write_bytes(b"tampered")
    with pytest.raises(CheckpointError, match="truncated or changed"):
        Predictor.load(copy)
    with pytest.raises(DataError, match="fold 7 is not finished"):
        Predictor.load(copy, 7)
    assert gather(copy)["folds"]


def test_ray_data_streams_the_plans_batches_in_order(
    ray_cluster: None, settings: Settings, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sermll import feed as feed_module
    from sermll.feed import SPLITS, Feed, FoldData, make_batch, stream

    received = []

    def slowly(*arguments: Any) -> Any:  # in this process, so that Ray Data's workers are ahead of it
        time.sleep(0.2)
        return make_batch(*arguments)

    def receive(*arguments: Any) -> Any:
        received.append(arguments)
        return unpatched(*arguments)

    unpatched = feed_module._from_table
    monkeypatch.setattr(feed_module, "make_batch", slowly)
    monkeypatch.setattr(feed_module, "_from_table", receive)

    prepared = Prepared.open(tiny_data)
    rows = np.arange(140)
    labels = prepared.table["label"].to_pylist()
    labelled = apply_labels(label_space("native", prepared.classes), labels, [None] * 140, "hard")
    splits = {"train": rows[:100], "dev": rows[100:120], "test": rows[120:]}
    data = FoldData.of("stream", prepared, labelled, splits)
    feed = Feed.for_run("stream", settings(), data)
    expected = [
        (epoch, split, index)
        for epoch in (1, 2)
        for split in SPLITS
        for index in range(feed.plan(split, epoch).num_batches)
    ]
    for rank in range(2):
        streamed = list(stream(feed, 1, 3, rank, 2))
        assert [(batch.epoch, batch.split, batch.index) for batch in streamed] == expected
        for batch in streamed:
            made = make_batch(feed, batch.split, batch.epoch, batch.index, rank, 2)
            np.testing.assert_array_equal(batch.waveform, made.waveform)
            np.testing.assert_array_equal(batch.targets, made.targets)
            np.testing.assert_array_equal(batch.rows, made.rows)
            np.testing.assert_array_equal(batch.labels, made.labels)
    assert received, "none of the batches came from Ray Data"
    assert isinstance(Waveforms(prepared.files, data.shard, data.row)[0], np.ndarray)


def test_a_pretrained_encoder_is_fine_tuned_by_two_workers(
    ray_cluster: None, settings: Settings, tmp_path: Path
) -> None:
    import torch
    from transformers import WavLMConfig, WavLMModel

    torch.manual_seed(0)
    tiny = WavLMConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, conv_dim=[8] * 7,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, feat_extract_norm="group",
    )  # fmt: skip
    WavLMModel(tiny).save_pretrained(tmp_path / "wavlm")
    encoder = [f"model.encoder.{word}" for word in ("kind=pretrained", f"name={tmp_path / 'wavlm'}", "layer=weighted")]
    experiment = settings(*encoder, "resources.workers=2", "fold=0", "optim.epochs=1")
    outcome = train(experiment)
    assert np.isfinite(histories(outcome.run_dir)[0][0]["loss"])


def test_a_killed_training_worker_is_replaced_and_the_numbers_stay(
    ray_cluster: None, settings: Settings, tmp_path: Path
) -> None:
    import threading

    import psutil

    undisturbed = train(settings("fold=0", "optim.epochs=5", f"tracking.runs={tmp_path / 'a'}"))
    killed: list[int] = []

    def kill_a_worker() -> None:
        deadline = time.monotonic() + 120
        while not killed and time.monotonic() < deadline:
            if list((tmp_path / "b").glob("*/fold-0/history.json")):
                for process in psutil.Process().children(recursive=True):  # of this test's own cluster
                    if any("RayTrainWorker" in word for word in process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
            time.sleep(0.02)

    watcher = threading.Thread(target=kill_a_worker)
    watcher.start()
    disturbed = train(
        settings("fold=0", "optim.epochs=5", "resources.max_failures=1", f"tracking.runs={tmp_path / 'b'}")
    )
    watcher.join()
    assert killed, "no training worker was found to kill"
    assert histories(disturbed.run_dir) == histories(undisturbed.run_dir)


def test_own_recordings_with_votes_train_on_soft_labels_and_a_leak_marks_every_result(
    ray_cluster: None, settings: Settings, tiny_corpus: Path, tmp_path: Path
) -> None:
    wav = tiny_corpus / "wav"
    lines = ["path,label,speaker,votes:anger,votes:sadness,votes:none"]
    for path in sorted(wav.glob("*.wav")):
        if path.name[5] in "WT":
            votes = "3,1,1" if path.name[5] == "W" else "2,2,0"
            lines.append(f"{path.name},{'anger' if path.name[5] == 'W' else 'sadness'},{path.name[:2]},{votes}")
    manifest = Path(shutil.copytree(wav, tmp_path / "mine")) / "manifest.csv"
    manifest.write_text("\n".join(lines) + "\n")
    corpus, root = FORMATS["manifest"](manifest, "mine", None)
    data = prepare_without_ray(root, tmp_path / "data", corpus)
    (tmp_path / "leaky.yaml").write_text("[{test: ['03', '08'], dev: ['09'], train: ['08', '10', '11', '12']}]")
    words = [f"data.path={data}", "data.targets=soft", f"protocol.folds={tmp_path / 'leaky.yaml'}", "optim.epochs=1"]
    with pytest.raises(ProtocolError, match="train and test share 1 speakers"):
        train(settings(*words))
    outcome = train(settings(*words, "protocol.allow_leak=true"))
    facts = json.loads((outcome.run_dir / "run.json").read_text())
    assert facts["data"]["targets"] == "soft" and facts["data"]["ties"] == 20
    assert outcome.metrics["leaks"] and outcome.metrics["leaks"] == facts["protocol"]["leaks"]
    assert "LEAK" in text_table(load(outcome.run_dir)) and "LEAK" in outcome.report.read_text()
    row = histories(outcome.run_dir)[0][0]
    assert 0 < row["loss_kl"] < np.log(2)


def test_workers_that_die_while_they_are_joined_are_a_failure_that_ray_train_counts(
    ray_cluster: None,
) -> None:
    @ray.remote(num_cpus=0)
    class Worker:
        def do(self, rank: int) -> None:
            while rank != 1:  # it waits for the other
                time.sleep(0.1)
            os._exit(7)

    class Workers:
        members: ClassVar[list[Any]] = [Worker.remote() for _ in range(2)]

        def __len__(self) -> int:
            return len(self.members)

        def execute_single(self, rank: int, do: Any) -> str:
            return "tcp://here"

        def execute_single_async(self, rank: int, do: Any, *arguments: Any) -> Any:
            return self.members[rank].do.remote(rank)

        def abort(self) -> None:
            for member in self.members:
                ray.kill(member)
            self.members.clear()

    together, workers = Together("gloo"), cast(Any, Workers())
    with pytest.raises(ray.train.WorkerGroupError) as died:  # counted by max_failures, unlike an actor's death
        together.backend_cls().on_start(workers, together)
    assert list(died.value.worker_failures) == [1] and len(workers) == 0
    assert cause(died.value.worker_failures).startswith("worker 1 failed: ")
