"""Reports on run folders written here: what they say, what they refuse, and that all can be drawn."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from answers import gathered
from matplotlib.figure import Figure
from runs import Page, change, fail, write_run
from sklearn.decomposition import PCA
from sklearn.metrics import balanced_accuracy_score

from sermll import metrics, pictures, report
from sermll.corpora import CORPORA
from sermll.errors import DataError
from sermll.files import read_json, write_json

RAVDESS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the drawing out, for tests of what a page says."""
    monkeypatch.setattr(pictures, "save", lambda stem, draw: b"<svg/>")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_page_is_whole_and_the_same_each_time(tmp_path: Path) -> None:
    run = gathered(tmp_path / "demo-0123456789ab", groups=(("a", "b"), ("c", "d")), epochs=3)
    first = report.build([run], tmp_path / "first")
    written = files(tmp_path / "first")
    assert first == tmp_path / "first" / "index.html"
    assert set(written) == {"index.html"} | {
        f"{stem}.{ending}" for stem in report.PICTURES for ending in ("png", "svg")
    }
    for stem in ("curves", "embedding", "calibration"):
        again = pictures.save(tmp_path / stem, report._drawings(report.load(run))[stem])
        assert again == written[f"{stem}.svg"]
        assert (tmp_path / f"{stem}.png").read_bytes() == written[f"{stem}.png"]

    page = Page(first)
    assert page.headings[0].split() == ["demo"]
    assert page.headings[1:] == [
        *("Scores", "Folds", "Confusion matrix", "Learning curves", "UA on dev", "Speakers", "Embeddings"),
        *("Calibration", "How it was run", "Provenance", "Words"),
    ]
    assert page.images == [written[f"{stem}.svg"] for stem in report.PICTURES]
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe")
        assert (attributes.get("src") or "data:").startswith("data:")
        assert (attributes.get("href") or "#").startswith("#")
    for told in (
        "2 folds, test speakers never in training or dev",
        "95 % interval",
        "Chance 33.3 %",
        "/data/demo (hash feedc0dedeadbeef)",
    ):
        assert told in page.text
    for name, content in written.items():
        if name.endswith(".png"):
            assert content.startswith(b"\x89PNG")
        if name.endswith(".svg"):
            ElementTree.fromstring(content)


def test_numbers_are_those_of_the_predictions(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo-0123456789ab", epochs=3)
    table = pq.read_table(run / "predictions.parquet").to_pandas()
    text = report.text_table(report.load(run))
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line[:1].isdigit()}
    for fold, rows_of_fold in table.groupby("fold"):
        expected = 100 * balanced_accuracy_score(rows_of_fold.label, rows_of_fold.predicted)
        assert float(rows[str(fold)][1]) == pytest.approx(expected, abs=0.051)
        assert rows[str(fold)][4:8] == ["2", "of", "3", "1.5"]
    scores = json.loads((run / "metrics.json").read_text())["selected"]["ua"]
    interval = f"{100 * scores['value']:.1f} [{100 * scores['low']:.1f}, {100 * scores['high']:.1f}]"
    assert f"chosen on dev           {interval}" in text
    assert f"last epoch              {interval}" in text
    assert max(map(len, text.splitlines())) <= 100

    drawings = report._drawings(report.load(run))
    names, ua, folds, chance = drawings["speakers"].args  # type: ignore[attr-defined]
    for name, value, fold in zip(names, ua, folds, strict=True):
        own = table[(table.speaker == name) & (table.fold == fold)]
        assert value == pytest.approx(balanced_accuracy_score(own.label, own.predicted))
    assert chance == pytest.approx(1 / 3)
    counts, recalls, _ = drawings["confusion"].args  # type: ignore[attr-defined]
    assert counts.sum() == len(table)
    assert recalls[0] == pytest.approx((table.predicted[table.label == "angry"] == "angry").mean())


def test_curves_are_weighted_and_averaged(tmp_path: Path) -> None:
    run = report.load(write_run(tmp_path / "demo-0123456789ab", finished=2, epochs=4))
    rows = json.loads((run.folder / "fold-1" / "history.json").read_text())
    assert run.histories[1]["loss_center"] == pytest.approx([0.002 * row["loss_center"] for row in rows])
    terms = [name for name in run.histories[1] if name.startswith("loss_")]
    assert sum(run.histories[1][name] for name in terms) == pytest.approx([row["loss"] for row in rows])

    folds = {fold: curves["loss"] for fold, curves in run.histories.items()}
    assert [len(values) for values in folds.values()] == [4, 4, 2]
    lines = pictures.curves({"total": folds}).axes[0].lines
    assert lines[-1].get_ydata() == pytest.approx(np.mean([values[:2] for values in folds.values()], axis=0))
    assert np.array_equal(lines[0].get_xdata(), [1, 2, 3, 4])


def test_unfinished_runs_say_so(tmp_path: Path, quick: None) -> None:
    half = write_run(tmp_path / "half-0123456789ab", finished=2)
    assert "2 of 3 folds finished; the scores are of fold 0, 1 alone" in report.text_table(report.load(half))
    page = Page(report.build([half], tmp_path / "half"))
    assert "2 of 3 folds finished" in page.text
    assert len(page.images) == 5

    begun = write_run(tmp_path / "begun-0123456789ab", finished=0)
    assert not (begun / "metrics.json").exists()
    out = tmp_path / "begun"
    out.mkdir()
    for name in ("speakers.png", "curves.png", "mine.png"):
        (out / name).touch()
    page = Page(report.build([begun], out))
    assert "0 of 3 folds finished, no scores yet" in page.text
    assert len(page.images) == 2
    assert sorted(files(out)) == ["curves.png", "index.html", "mine.png"]
    assert "not finished, 2 epochs so far" in report.text_table(report.load(begun))

    fail(begun, 0, "epoch 3, batch 2: loss is nan\n" + "a long story " * 20)
    fail(begun, 1, "worker 0 failed: " + "killed by the system " * 6)
    told = report.text_table(report.load(begun))
    assert "0 of 3 folds finished, 2 failed, no scores yet" in told
    assert "\n0     failed, 2 epochs so far\n1     failed\n2     not started\n" in told
    assert "\nfold 0 failed: epoch 3, batch 2: loss is nan\n" in told and "a long story" not in told
    assert told.count("killed by the system") == 6 and max(map(len, told.splitlines())) <= 100
    page = Page(report.build([begun], out)).text
    assert "Fold 0 failed: epoch 3, batch 2: loss is nan" in page and "not started" in page
    write_json(begun / "fold-0" / "result.json", {"fold": 0, "epochs": 5, "best_epoch": 2})  # it was tried again
    assert list(report.load(begun).failures) == [1]
    (begun / "fold-0" / "result.json").unlink()

    # Nothing is left of the first fold either: the run has just been started.
    (begun / "fold-0" / "history.json").write_text("[]")
    assert Page(report.build([begun], out)).images == []


def test_a_fold_finished_after_the_scores_were_gathered(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo-0123456789ab", finished=2)
    (run / "fold-2" / "result.json").write_text('{"fold": 2, "best_epoch": 3, "epochs": 5}')
    text = report.text_table(report.load(run))
    assert "3 of 3 folds finished; the scores are of fold 0, 1 alone" in text
    assert re.search(r"^2 +— +— +— +4 of 5 +—  e f$", text, re.MULTILINE)


def test_several_runs_are_compared_by_what_differs(tmp_path: Path, quick: None) -> None:
    runs = [
        write_run(tmp_path / "demo-aaaaaaaaaaaa"),
        write_run(
            tmp_path / "demo-bbbbbbbbbbbb",
            overrides={"model.pool.kind": "mean", "losses.focal": None, "tracking.mlflow": "off"},
        ),
        write_run(tmp_path / "elsewhere" / "demo-aaaaaaaaaaaa", finished=1, seed=1),
    ]
    loaded = [report.load(path) for path in runs]
    assert report._differences(loaded) == [
        {"model.pool.kind": "flam", "losses.focal": "on"},
        {"model.pool.kind": "mean", "losses.focal": "off"},
        {"model.pool.kind": "flam", "losses.focal": "on"},
    ]
    assert report._differences(loaded[:1]) == [{}]
    text = report.build(runs, tmp_path / "out").read_text(encoding="utf-8")
    page = Page(tmp_path / "out" / "index.html")
    assert page.headings[0] == "3 runs"
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == ["#demo-aaaaaaaaaaaa", "#demo-bbbbbbbbbbbb", "#demo-aaaaaaaaaaaa-2"]
    sections = [str(attributes["id"]) for tag, attributes in page.tags if tag == "section" and "id" in attributes]
    assert [f"#{name}" for name in sections] == links
    assert text.index("settings that differ") < text.index('id="demo-aaaaaaaaaaaa"')
    assert all((tmp_path / "out" / name).is_dir() for name in sections)


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>"
    run = write_run(
        tmp_path / "demo-0123456789ab",
        classes=(evil, "$\\frac$", "a name of a class that goes on & on", "d"),
        groups=[(f"{evil}\x1b[2J",)],
        title=f"{evil} & Söhne",
        absent=(1,),
        epochs=1,
    )
    change(run / "run.json", versions={evil: '"'}, name=evil)
    page = Page(report.build([run], tmp_path / "out"))
    assert "script" not in [tag for tag, _ in page.tags]
    assert "<script" not in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert f"{evil} & Söhne" in page.text
    assert "No interval" in page.text
    for image in page.images:
        assert not [element for element in ElementTree.fromstring(image).iter() if element.tag.endswith("script")]
    text = report.text_table(report.load(run))
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_values_that_are_not_finite_are_shown_as_missing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo-0123456789ab", groups=(("a", "b"), ("c", "d")), epochs=4)
    history_path = folder / "fold-1" / "history.json"
    rows = json.loads(history_path.read_text())
    rows[2]["loss"], rows[2]["loss_kl"], rows[3]["dev_ua"] = float("nan"), float("inf"), None
    history_path.write_text(json.dumps(rows))
    table = pq.read_table(folder / "predictions.parquet").to_pylist()
    table[0]["embedding"][0] = float("nan")
    pq.write_table(pa.Table.from_pylist(table), folder / "predictions.parquet")

    run = report.load(folder)
    assert run.warnings == (
        "Fold 1: loss is missing or not finite in epoch 3.",
        "Fold 1: loss_kl is missing or not finite in epoch 3.",
        "Fold 1: dev_ua is missing or not finite in epoch 4.",
        "1 embeddings are not finite; they are left out of the map.",
    )
    assert all(warning in report.text_table(run) for warning in run.warnings)
    panel = pictures.curves({"total": {fold: curves["loss"] for fold, curves in run.histories.items()}}).axes[0]
    one, other, mean, crosses = panel.lines
    assert np.isfinite(one.get_ydata()).all()
    assert list(np.isfinite(other.get_ydata())) == list(np.isfinite(mean.get_ydata())) == [1, 1, 0, 1]
    assert np.array_equal(crosses.get_xdata(), [3])
    assert [text.get_text() for text in panel.texts] == ["1 value is not finite"]
    points, _ = report._drawings(run)["embedding"].args  # type: ignore[attr-defined]
    assert sum(len(vectors) for vectors, _ in points.values()) == len(table) - 1
    metrics_path = folder / "metrics.json"
    scores = json.loads(metrics_path.read_text())
    scores["selected"]["ua"] = {"value": float("nan"), "low": None, "high": None}
    metrics_path.write_text(json.dumps(scores))
    assert "chosen on dev           not finite" in report.text_table(report.load(folder))


def test_calibration_is_told_where_it_was_measured(tmp_path: Path, quick: None) -> None:
    older = write_run(tmp_path / "demo-aaaaaaaaaaaa")
    assert "ECE" not in report.text_table(report.load(older))
    assert "Calibration" not in Page(report.build([older], tmp_path / "older")).headings

    sharp = gathered(tmp_path / "demo-bbbbbbbbbbbb", sharpness=4.0)
    table = pq.read_table(sharp / "predictions.parquet").to_pandas()
    confidence = np.stack(table.probabilities.tolist()).max(axis=1)
    right = table.label == table.predicted
    kept = json.loads((sharp / "metrics.json").read_text())["calibration"]
    page = Page(report.build([sharp], tmp_path / "sharp")).text
    assert f"confidence is {100 * (confidence.mean() - right.mean()):.1f} points above the share that is right" in page
    gain = 100 * (kept["ece"]["value"] - kept["ece_scaled"]["value"])
    assert f"make the ECE {gain:.1f} points lower" in page
    assert f"Temperatures of {min(kept['temperatures']):.2f} to" in page
    line = next(line for line in report.text_table(report.load(sharp)).splitlines() if line.startswith("calibration"))
    assert re.fullmatch(r"calibration +ECE [\d.]+ \[[\d.]+, [\d.]+\], with temperature [\d.]+ \[[\d.]+, [\d.]+\]", line)
    assert f"ECE {100 * kept['ece']['value']:.1f} [" in line
    flat = gathered(tmp_path / "demo-cccccccccccc", sharpness=0.2)
    page = Page(report.build([flat], tmp_path / "flat")).text
    assert "points below the share that is right" in page


def test_reliability_is_drawn_where_there_are_utterances(tmp_path: Path) -> None:
    run = report.load(gathered(tmp_path / "demo-0123456789ab"))
    panels = report._drawings(run)["calibration"].args[0]  # type: ignore[attr-defined]
    figure = drawn(lambda: pictures.reliability(panels))
    assert [panel.get_title(loc="left") for panel in figure.axes[:2]] == ["as it is", "with temperature"]
    for bins, share, counts in zip(panels.values(), figure.axes[:2], figure.axes[2:], strict=True):
        some = bins["count"] > 0
        assert 0 < some.sum() < len(some)
        points = next(line for line in share.lines if line.get_marker() == "o")
        expected = np.stack([100 * bins["confidence"][some], 100 * bins["accuracy"][some]], axis=1)
        np.testing.assert_allclose(np.asarray(points.get_xydata()), expected)
        assert [bar.get_height() for bar in counts.containers[0]] == bins["count"].tolist()


def test_settings_are_told_in_words(tmp_path: Path) -> None:
    run = report.load(
        write_run(tmp_path / "demo-0123456789ab", overrides={"losses.supcon": None, "model.pool.kind": "max"})
    )
    assert report._summary(run.settings) == {
        "encoder": "microsoft/wavlm-large (tune transformer, layer last, gradient_checkpointing no)",
        "pooling": "max",
        "losses": "KL (weight auto); focal (weight auto, gamma 2.0); center (weight 0.002)",
        "mixup": "energy-adaptive (probability 0.5, snr_db -5.0 to 10.0)",
        "training": "5 epochs, batch 16, learning rate 0.0001 (centers 0.005), fp32",
        "seed": "0",
    }
    assert report._summary({"model": {"pool": "flam"}, "losses": 3})["pooling"] == "flam"


def test_the_promise_about_speakers_is_checked(tmp_path: Path, quick: None) -> None:
    run = write_run(tmp_path / "demo-0123456789ab")
    facts = json.loads((run / "run.json").read_text())
    facts["protocol"]["leaks"] = ["fold 1: train and test share 1 speakers (c)"]
    (run / "run.json").write_text(json.dumps(facts))
    page = Page(report.build([run], tmp_path / "out"))
    assert "never in training or dev" not in page.text
    assert "LEAK, scores are too high: fold 1: train and test share 1 speakers (c)." in page.text
    assert "LEAK" in report.text_table(report.load(run))


def test_where_the_last_epoch_is_the_rule_it_is_told_once_and_not_as_chosen(tmp_path: Path, quick: None) -> None:
    last = gathered(tmp_path / "demo-aaaaaaaaaaaa", epochs=3, overrides={"protocol.select": "last"})
    text = report.text_table(report.load(last))
    assert "chosen on dev" not in text and text.count("last epoch ") == 1
    page = Page(report.build([last], tmp_path / "last")).text
    assert "chosen on dev" not in page.lower() and "Mean over folds, last epoch. 95 % interval" in page

    best = gathered(tmp_path / "demo-bbbbbbbbbbbb", epochs=3)
    text = report.text_table(report.load(best))
    assert text.count("chosen on dev ") == text.count("last epoch ") == 1
    page = Page(report.build([best, last], tmp_path / "both")).text
    assert "Mean over folds, epoch chosen on dev." in page and "Mean over folds, last epoch." in page
    assert "Chosen on dev" in page and page.partition("Mean over folds")[0].count("the same") == 1


def test_dropped_utterances_and_ties_are_told(tmp_path: Path, quick: None) -> None:
    run = write_run(tmp_path / "demo-0123456789ab")
    facts = json.loads((run / "run.json").read_text())
    facts["data"] |= {"dropped": {"xxx": 3, "fru": 2}, "ties": 1}
    (run / "run.json").write_text(json.dumps(facts))
    told = report.text_table(report.load(run))
    assert "5 utterances have no class in label space native: xxx 3, fru 2." in told
    assert "1 utterance had no majority" in told


TASKS = {
    "iemocap": ({"angry": ["ang"], "happy": ["hap", "exc"], "neutral": ["neu"], "sad": ["sad"]}, "session", 5, 5531),
    "msp_improv": ({name: [name] for name in ("angry", "sad", "happy", "neutral")}, "session", 6, 7798),
    "ravdess": ({name: [name] for name in RAVDESS}, "hicmae", 6, 1440),
    "savee": ({name: [name] for name in CORPORA["savee"].classes}, "speaker", 4, 480),
}
"""Classes with the labels they take, folds, their number and the utterances: what the paper's numbers are of."""


def published(folder: Path, corpus: str, run: dict[str, Any] | None = None, **data: Any) -> bool:
    """Whether the paper's numbers stand beside a run of its task, but for what `write_run` and run.json are told."""
    members, protocol, folds, utterances = TASKS[corpus]
    groups = tuple((f"{fold}a", f"{fold}b") for fold in range(folds))
    facts = {"members": members, "utterances": utterances} | data
    task = {"classes": list(facts["members"]), "groups": groups, "corpus": corpus, "protocol": protocol, "epochs": 2}
    path = write_run(folder / "demo-0123456789ab", **(task | (run or {})))
    change(path / "run.json", data=read_json(path / "run.json")["data"] | facts)
    page = Page(report.build([path], folder / "out"))
    return "Beside the published result" in page.headings


@pytest.mark.parametrize("corpus", TASKS)
def test_published_numbers_stand_beside_the_task_they_are_of(tmp_path: Path, quick: None, corpus: str) -> None:
    members, protocol, _, utterances = TASKS[corpus]
    assert published(tmp_path / "as it is", corpus)
    assert published(tmp_path / "by name", corpus, {"overrides": {"protocol.folds": protocol}})
    named_otherwise = {f"class {number}": labels for number, labels in enumerate(reversed(members.values()))}
    assert published(tmp_path / "named otherwise", corpus, members=named_otherwise)
    assert published(tmp_path / "a file could not be used", corpus, utterances=utterances - 1)
    assert published(tmp_path / "last", corpus, {"overrides": {"protocol.select": "last"}})
    assert Page(tmp_path / "last" / "out" / "index.html").text.count("this run, last epoch") == 1
    said = Page(tmp_path / "as it is" / "out" / "index.html").text
    assert said.count("this run, epoch chosen on dev") == said.count("this run, last epoch") == 1
    paper = report.PUBLISHED[corpus, protocol]
    assert f"{paper.ua:.2f}" in said and ("which actors form a fold" in said) is (corpus == "ravdess")


IEMOCAP = TASKS["iemocap"][0]


@pytest.mark.parametrize(
    ("corpus", "run", "data"),
    [
        ("ravdess", {"protocol": "emobox"}, {}),
        ("ravdess", {"corpus": "crema-d"}, {}),
        ("ravdess", {"finished": 5}, {}),
        ("ravdess", {"groups": tuple((f"{actor}",) for actor in range(5))}, {}),
        ("ravdess", {}, {"members": {name: [name] for name in RAVDESS[:7]}}),
        ("iemocap", {}, {"members": {"angry": ["ang"], "frustrated": ["fru"], "neutral": ["neu"], "sad": ["sad"]}}),
        ("iemocap", {}, {"members": IEMOCAP | {"happy": ["hap"]}}),
        ("iemocap", {}, {"members": IEMOCAP | {"angry": ["ang", "fru"]}}),
        ("iemocap", {}, {"targets": "soft"}),
        ("iemocap", {"overrides": {"protocol.folds": "mine/session.yaml"}}, {}),
        ("iemocap", {}, {"utterances": 2943}),  # improvised dialogs alone
        ("savee", {}, {"utterances": 4800}),  # own recordings in a folder of that name
    ],
)
def test_published_numbers_do_not_stand_beside_another_task(
    tmp_path: Path, quick: None, corpus: str, run: dict[str, Any], data: dict[str, Any]
) -> None:
    assert not published(tmp_path, corpus, run, **data)


def test_published_numbers_are_those_of_the_paper() -> None:
    numbers = {key: (paper.ua, paper.wa, paper.folds) for key, paper in report.PUBLISHED.items()}
    assert numbers == {
        ("iemocap", "session"): (79.14, 78.47, 5),
        ("msp_improv", "session"): (58.34, 58.55, 6),
        ("ravdess", "hicmae"): (92.28, 93.40, 6),
        ("savee", "speaker"): (72.3, None, 4),
    }


def test_folders_that_are_not_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: not a run folder .*`sermll train`"):
        report.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no run to report"):
        report.build([], tmp_path / "out")
    run = write_run(tmp_path / "demo-0123456789ab")
    with pytest.raises(DataError, match=r"config\.yaml: not a folder"):
        report.build([run], run / "config.yaml")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", "{", r"run\.json: damaged"),
        ("run.json", "[]", r"run\.json: damaged \(a list where a dict should be\)"),
        ("run.json", '{"data": {}}', r"run\.json: no 'classes' in it"),
        ("config.yaml", "a: [", r"config\.yaml: damaged"),
        ("config.yaml", "word", r"config\.yaml: damaged \(a str where a dict should be\)"),
        ("metrics.json", "{}", r"metrics\.json: no 'folds' in it"),
        (
            "metrics.json",
            '{"folds": [{"fold": 0, "confusion": [[1]]}]}',
            r"metrics\.json: damaged \(.*3 classes",
        ),
        ("fold-0/history.json", "{}", r"history\.json: damaged \(a dict where a list should be\)"),
        ("fold-0/history.json", '[{"epoch": 0, "loss_kl": 1}]', r"history\.json: no 'weight_kl' in it"),
        ("predictions.parquet", "PAR1", r"predictions\.parquet: damaged"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    run = write_run(tmp_path / "demo-0123456789ab")
    (run / name).write_text(content)
    with pytest.raises(DataError, match=message):
        report.load(run)


def test_predictions_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo-0123456789ab")
    table = pq.read_table(run / "predictions.parquet")
    pq.write_table(table.drop_columns(["embedding"]), run / "predictions.parquet")
    with pytest.raises(DataError, match="no column embedding"):
        report.load(run)
    pq.write_table(pa.Table.from_pylist([table.to_pylist()[0] | {"label": "joy"}]), run / "predictions.parquet")
    with pytest.raises(DataError, match=r"damaged .*joy"):
        report.load(run)
    pq.write_table(table.slice(0, 0), run / "predictions.parquet")
    assert "speakers" not in report._drawings(report.load(run))


def test_principal_components_are_those_of_scikit_learn() -> None:
    vectors = np.random.default_rng(0).normal(size=(40, 6)) * [5, 4, 3, 2, 1, 1] + 7
    points, share = pictures.principal_components(vectors)
    pca = PCA(2).fit(vectors)
    assert np.abs(points) == pytest.approx(np.abs(pca.transform(vectors)))
    assert share == pytest.approx(pca.explained_variance_ratio_.sum())
    mirrored, _ = pictures.principal_components(vectors[::-1])
    assert mirrored[::-1] == pytest.approx(points)


@pytest.mark.parametrize("vectors", [np.ones((4, 3)), np.ones((1, 3)), np.arange(4.0)[:, None], np.empty((0, 3))])
def test_principal_components_of_little(vectors: np.ndarray) -> None:
    points, share = pictures.principal_components(vectors)
    assert points.shape == (len(vectors), 2)
    assert np.isfinite(points).all()
    assert share == pytest.approx(1)


def drawn(draw: Callable[[], Figure]) -> Figure:
    """The figure with everything in its place, in the report's style."""
    with matplotlib.rc_context(pictures._STYLE):
        figure = draw()
        figure.draw_without_rendering()
    return figure


@pytest.mark.parametrize(("count", "fold_size"), [(91, 1), (24, 4), (10, 1), (1, 1), (130, 26)])
def test_names_of_speakers_do_not_overlap(count: int, fold_size: int) -> None:
    names = [f"S{1000 + index}" for index in range(count)]
    ua = np.random.default_rng(0).uniform(0.4, 1, size=count)
    folds = [index // fold_size for index in range(count)]
    labels = drawn(lambda: pictures.speakers(names, ua, folds, 0.25)).axes[0].get_xticklabels()
    assert len(labels) == (count if count <= 120 else 0)
    boxes = [label.get_window_extent() for label in labels]
    assert all(left.x1 <= right.x0 + 0.5 for left, right in pairwise(boxes))


@pytest.mark.parametrize("size", [2, 8, 15])
def test_confusion_cells_hold_their_text(size: int) -> None:
    counts = np.full((size, size), 1234)
    names = [f"surprise{index}" for index in range(size)]
    cells = drawn(lambda: pictures.confusion(counts, metrics.recalls(counts), names)).axes[0]
    panel = cells.get_window_extent()
    for text in cells.texts:
        box = text.get_window_extent()
        assert box.width < panel.width / size
        assert box.height < panel.height / size


def test_an_empty_class_and_names_with_signs_can_be_drawn() -> None:
    counts = np.array([[0, 0], [1, 2]])
    figure = drawn(lambda: pictures.confusion(counts, metrics.recalls(counts), ["$x$", "y" * 80]))
    assert [text.get_text() for text in figure.axes[0].texts] == ["—", "—", "1\n33 %", "2\n67 %"]
    assert [text.get_text() for text in figure.axes[1].texts] == ["not tested", "66.7 %"]
    labels = figure.axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["$x$", "y" * 23 + "…"]


def test_importing_the_report_does_not_import_matplotlib() -> None:
    heavy = "{'matplotlib', 'pyarrow', 'ray', 'torch'}"
    code = f"import sys, sermll.report; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_numbers_can_be_read_on_every_shade() -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize, to_rgb

    def luminance(colour: Any) -> float:
        """Of WCAG 2.2, from 0 to 1."""
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    shades = pictures._shades()
    cells = ScalarMappable(Normalize(0, 1), shades)
    inks = set()
    for value in np.linspace(0, 1, 257):
        ink, ground = pictures._ink(cells, value), shades(value)[:3]
        light, dark = sorted((luminance(ink), luminance(ground)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, value
        inks.add(ink)
    assert inks == {"black", "white"}


def test_chance_is_seen_where_nothing_is_as_low() -> None:
    figure = drawn(lambda: pictures.dev_ua({0: np.array([0.265, 0.58])}, {0: 1}, 0.25))
    assert figure.axes[0].get_ylim()[0] <= 22


def test_small_matrices_have_a_frame_around_cells_of_zero() -> None:
    figure = drawn(lambda: pictures.confusions({"all said": np.array([[5, 0], [5, 0]])}, ("x", "y")))
    assert all(spine.get_visible() for spine in figure.axes[0].spines.values())
