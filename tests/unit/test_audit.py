"""The audit: every planted leak is found and named, and clean data give none."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from conftest import SPEAKERS
from prepared import prepare_without_ray

from sermll.audit import Audit, audit, text
from sermll.audit_page import build
from sermll.cli import main
from sermll.corpora import CORPORA
from sermll.shards import Prepared

LETTERS = "WLEAFTN"


def babble(rng: np.random.Generator, duration_s: float = 1.5) -> np.ndarray:
    """Noise whose spectrum and level wander like those of speech; no two are alike."""
    size = int(duration_s * 16_000)
    times = np.linspace(0, 1, 24)
    sound = np.zeros(size)
    for low_hz in (150, 400, 900, 1800, 3200):
        gain = np.interp(np.linspace(0, 1, size), times, rng.lognormal(0, 1, len(times)))
        phase = 2 * np.pi * np.cumsum(low_hz * (1 + 0.4 * np.interp(np.linspace(0, 1, size), times, rng.random(24))))
        sound += gain * np.sin(phase / 16_000)
    return 0.05 * sound / np.abs(sound).max() + 1e-4 * rng.standard_normal(size)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four speakers, each emotion once; one recording comes back louder, one as it is under another label."""
    wav = tmp_path_factory.mktemp("planted") / "emodb" / "wav"
    wav.mkdir(parents=True)
    rng = np.random.default_rng(0)
    sounds = {f"{speaker}a01{letter}a": babble(rng) for speaker in SPEAKERS[:4] for letter in LETTERS}
    sounds["08a01Wa"] = 3 * sounds["03a01Wa"]
    sounds["09a01Fa"] = sounds["08a01Na"]
    for name, sound in sounds.items():
        soundfile.write(wav / f"{name}.wav", sound, 16_000)
    return prepare_without_ray(wav.parent, wav.parents[1] / "data")


@pytest.fixture(scope="module")
def found(planted: Path) -> Audit:
    return audit(planted)


def kinds(found: Audit) -> set[tuple[int, str, tuple[str, str]]]:
    return {(leak.fold, leak.kind, leak.sides) for leak in found.leaks}


def test_copies_across_speakers_are_leaks(found: Audit) -> None:
    # Folds test 03, 08, 09, 10 in turn; the next speaker is dev.
    assert kinds(found) == {
        (0, "copy", ("dev", "test")),  # 03 in test, 08 in dev
        (0, "audio", ("train", "dev")),  # 08 in dev, 09 in train
        (1, "copy", ("train", "test")),
        (1, "audio", ("dev", "test")),
        (2, "audio", ("train", "test")),
        (3, "copy", ("train", "dev")),
    }
    (louder,) = [copy for copy in found.copies if not copy.identical]
    assert {found.ids[louder.first], found.ids[louder.second]} == {"03a01Wa", "08a01Wa"}
    (same,) = [copy for copy in found.copies if copy.identical]
    assert {found.ids[same.first], found.ids[same.second]} == {"08a01Na", "09a01Fa"}


def test_one_recording_under_two_labels_is_told(found: Audit) -> None:
    (noise,) = [warning for warning in found.warnings if warning.kind == "label noise"]
    assert noise.members == ("08a01Na (neutral) = 09a01Fa (happiness)",)


def test_texts_on_both_sides_are_told(found: Audit) -> None:
    (texts,) = [warning for warning in found.warnings if warning.kind == "texts"]
    assert texts.message.startswith("100 % of a fold's test utterances")


def test_the_terminal_names_what_was_found(found: Audit) -> None:
    shown = text(found)
    assert f"leaks: {len(found.leaks)}" in shown and "copies: 2" in shown
    assert "03a01Wa (03, anger) = 08a01Wa (08, anger): similarity" in shown
    assert "08a01Na (08, neutral) = 09a01Fa (09, happiness): the same samples" in shown


def test_the_page_holds_everything_it_shows(found: Audit, tmp_path: Path) -> None:
    page = build(found, tmp_path / "out").read_text()
    assert "numbers from these folds would be too high" in page
    assert page.count('<img src="data:image/svg+xml;base64,') == 4
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    for stem in ("balance", "lengths", "levels", "spectrograms"):
        assert (tmp_path / "out" / f"{stem}.png").stat().st_size > 1000


def test_clean_data_have_no_leak(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(tiny_data), "--out", str(tmp_path / "page"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer.keys() == {"leaks", "duplicates", "warnings"}
    assert answer["leaks"] == []
    assert {"texts"} <= {warning["kind"] for warning in answer["warnings"]}


def test_published_leaks_are_found_and_named(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = Prepared.open(tiny_data).table["id"].to_pylist()
    by_text = {text: [name for name in ids if name[2:5] == text] for text in ("a01", "a02")}
    shuffled = np.random.default_rng(0).permutation(ids).tolist()
    lists = {
        "all speakers shared": [{"test": by_text["a01"], "dev": by_text["a02"][::2], "train": by_text["a02"][1::2]}],
        "dev is test": [{"test": [name], "dev": [name]} for name in SPEAKERS],
        "random utterances": [{"test": shuffled[:28], "dev": shuffled[28:42], "train": shuffled[42:]}],
    }
    said = {
        "all speakers shared": "train and test share 10 speakers (03, 08",
        "dev is test": "dev and test are the same 14 utterances",
        "random utterances": "train and test share",
    }
    for name, listed in lists.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(listed))
        leaks = audit(tiny_data, str(tmp_path / f"{name}.yaml")).leaks
        assert any(said[name] in str(leak) for leak in leaks), leaks
    assert main(["audit", str(tiny_data), str(tmp_path / "dev is test.yaml"), "--out", str(tmp_path), "--json"]) == 1
    captured = capsys.readouterr()
    told = json.loads(captured.out.splitlines()[-1])["leaks"]
    assert {leak["kind"] for leak in told} == {"same split", "speaker"} and len({leak["fold"] for leak in told}) == 10
    assert "numbers from these folds would be too high" in captured.err


def test_a_class_nobody_is_tested_on_is_told(tiny_corpus: Path, tmp_path: Path) -> None:
    wav = tmp_path / "emodb" / "wav"
    shutil.copytree(tiny_corpus / "wav", wav)
    for path in wav.glob("03*E*.wav"):
        path.unlink()
    for path in [path for path in wav.glob("16*.wav") if path.name[5] != "W"]:
        path.unlink()
    data = prepare_without_ray(tmp_path / "emodb", tmp_path / "data")
    told = {warning.message: warning.members for warning in audit(data).warnings if warning.kind == "balance"}
    assert told["fold 0: no test utterance of disgust"] == ("disgust",)
    assert told["1 speakers have utterances of one class only"] == ("16",)


def test_sides_of_one_class_alone_are_told_and_training_on_them_is_not_recommended(
    tiny_corpus: Path, tmp_path: Path, undrawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    wav = tmp_path / "emodb" / "wav"
    wav.mkdir(parents=True)
    # Speakers in the folds' order: 03 has seven classes, 08 and 09 one each.
    for path in (path for name in ("03*", "08*W*", "09*A*") for path in (tiny_corpus / "wav").glob(f"{name}.wav")):
        shutil.copy(path, wav)
    data = prepare_without_ray(wav.parent, tmp_path / "data")
    found = audit(data)
    told = {warning.message: warning.members for warning in found.warnings if warning.kind == "balance"}
    assert told["fold 0: every train utterance is fear: it cannot be learned"] == ("fear",)
    assert told["fold 0: every dev utterance is anger: it tells no epoch from another"] == ("anger",)
    assert told["fold 1: every test utterance is anger: who always says so is right"] == ("anger",)
    assert not any(message.startswith("fold 0: no test") for message in told)
    assert main(["audit", str(data), "--out", str(tmp_path / "page")]) == 0
    said = capsys.readouterr().out
    assert "next: choose other folds or labels, `sermll train` refuses these: fold 0: every training" in said


def test_data_of_one_class_altogether_are_told_once(tiny_corpus: Path, tmp_path: Path) -> None:
    wav = tmp_path / "emodb" / "wav"
    wav.mkdir(parents=True)
    for path in (tiny_corpus / "wav").glob("*W*.wav"):
        shutil.copy(path, wav)
    found = audit(prepare_without_ray(wav.parent, tmp_path / "data"))
    told = [str(warning.message) for warning in found.warnings if warning.kind == "balance"]
    assert told == ["every utterance is anger: no class can be told from another"]


def test_every_known_corpus_can_be_audited_by_its_default_protocol() -> None:
    for corpus in CORPORA.values():
        assert corpus.default_folds in {*corpus.folds, "speaker", "session"}


def test_the_next_command_trains_on_what_was_audited_and_pages_do_not_replace_each_other(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], undrawn: None
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["audit", str(tiny_data)]) == 0
    assert f"next: sermll train EXPERIMENT.yaml data.path={tiny_data}\n" in capsys.readouterr().out
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "emodb.yaml").touch()
    assert main(["audit", str(tiny_data), "protocol.folds=speaker", "--labels", "4class"]) == 0
    wanted = (
        f"next: sermll train experiments/emodb.yaml data.path={tiny_data} protocol.folds=speaker data.labels=4class"
    )
    assert wanted in capsys.readouterr().out
    labels = "{calm: [boredom, neutral], loud: [anger, fear]}"
    assert main(["audit", str(tiny_data), "--labels", labels]) == 0
    assert shlex.split(capsys.readouterr().out.splitlines()[-1])[-1] == f"data.labels={labels}"  # for a shell
    name = tiny_data.name
    assert {path.parent.name for path in tmp_path.glob("*/index.html")} == {f"audit-{name}", f"audit-{name}-speaker"}
