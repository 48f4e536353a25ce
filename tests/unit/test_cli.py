"""The command line as a user meets it: help, JSON, and errors that say what to do and exit with 1."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sermll.cli import main

VERBS = ("corpora", "download", "prepare", "audit", "train", "report", "compare", "predict", "track")


def sermll(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sermll", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ, cwd=cwd, timeout=60)


def test_help_answers_without_loading_the_heavy_packages() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "sermll", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert all(verb in done.stdout for verb in VERBS)
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert loaded.isdisjoint({"torch", "ray", "mlflow", "transformers", "numpy", "pyarrow", "matplotlib", "pydantic"})


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example_and_json(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert f"example: sermll {verb}" in shown
    assert "--json" in shown


def test_wrong_usage_exits_with_2() -> None:
    assert sermll("fly").returncode == 2
    told = sermll("train", "x.yaml", "seed=1", "--fold", "0")
    assert told.returncode == 2 and "unrecognized arguments: --fold 0" in told.stderr
    assert sermll().returncode == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prepare", "timit", "--out", "x"], "no corpus 'timit'; known: iemocap, msp_improv, ravdess"),
        (["prepare", "ravdess", "--out", "x"], "--root is needed"),
        (["prepare", "manifest", "--out", "x"], "--root is needed"),
        (["prepare", "emodb", "--root", "emodb", "--out", "x", "--classes", "a,b"], "--classes has no effect"),
        (["corpora", "timit"], "no corpus 'timit'"),
        (["download", "iemocap", "--out", "x"], "iemocap"),
        (["download", "ravdess", "--out", "x"], "--accept-licence"),
        (["audit", "missing"], "no such folder"),
        (["prepare", "ravdess", "--root", "missing", "--out", "x"], "no such folder"),
        (["prepare", "ravdess", "--root", "empty", "--out", "x"], "no WAV or FLAC file"),
        (["prepare", "ravdess", "--root", "emodb", "--out", "x"], "none of the"),
        (["train", "missing.yaml"], "no such experiment file"),
        (["train", "x.yaml", "optim.lrr=1"], "did you mean 'lr'?"),
        (["train", "x.yaml", "nonsense"], "an override is key=value"),
        (["train", "x.yaml"], "no such folder; make it with `sermll prepare"),
        (["report", "empty"], "empty"),
        (["compare", "empty"], "needs two runs at least"),
        (["compare", "empty", "empty"], "no run (no run.json"),
        (["predict", "empty", "a.wav"], "give the folder that `sermll train` printed"),
        (["track", "empty"], "no metrics.json"),
    ],
)
def test_mistakes_are_named_and_exit_with_1(
    words: list[str],
    message: str,
    tiny_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "emodb").symlink_to(tiny_corpus)
    (tmp_path / "x.yaml").write_text("{name: x, data: {path: nowhere}}")
    assert main(words) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith(f"sermll {words[0]}: ")
    assert "Traceback" not in captured.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emodb", "empty", "x.yaml"]


def test_json_is_the_last_line(tiny_data: Path, tiny_corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prepare", "emodb", "--root", str(tiny_corpus), "--out", str(tiny_data), "--json"]
    assert main(words) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer.keys() == {"path", "data_hash", "utterances", "problems", "hours"}
    assert answer["utterances"] == 140
    assert answer["problems"] == 0
    assert len(answer["data_hash"]) == 64


def test_too_many_problems_fail_after_the_work_is_done(
    tmp_path: Path, tiny_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from prepared import prepare_without_ray

    root = tmp_path / "emodb" / "wav"
    root.mkdir(parents=True)
    for path in (tiny_corpus / "wav").iterdir():
        (root / path.name).symlink_to(path)
    for number in range(1, 4):  # 3 of 143 files, more than 1 %
        (root / f"03a0{number}Wb.wav").write_text("not audio")
    out = prepare_without_ray(root.parent, tmp_path / "out")
    words = ["prepare", "emodb", "--root", str(root.parent), "--out", str(out), "--json"]
    assert main(words) == 1
    captured = capsys.readouterr()
    assert "3 of 143 files (2.1%) are unusable, more than 1.0%" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["problems"] == 3
    assert main([*words, "--max-problems", "0.05"]) == 0


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m sermll --help | head -1"
    assert subprocess.run(command, shell=True, capture_output=True, check=True, env=os.environ).stderr == b""


def test_corpora_tells_all_and_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["corpora", "--json"]) == 0
    table = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"iemocap", "ravdess", "cremad"} <= {row["name"] for row in table}
    assert main(["corpora", "iemocap"]) == 0
    shown = capsys.readouterr().out
    assert "Traps:" in shown and "next: ask for it at" in shown
    assert main(["corpora", "manifest"]) == 0
    assert "speaker" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("actors", "wanted"),
    [
        (range(1, 25), "sermll audit {out}"),
        (range(1, 4), "sermll audit {out} speaker   (its usual folds, hicmae, need speakers that are not there)"),
        (range(1, 3), "prepare more of the corpus; test, dev and train need a speaker each at least"),
    ],
)
def test_a_part_of_a_corpus_is_recommended_folds_that_fit_it(
    actors: range, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from conftest import tone
    from prepared import prepare_without_ray

    from sermll.corpora import CORPORA

    rng = np.random.default_rng(0)
    for actor in actors:
        folder = tmp_path / "ravdess" / f"Actor_{actor:02d}"
        folder.mkdir(parents=True)
        for emotion in (1, 4):
            name = f"03-01-{emotion:02d}-01-01-01-{actor:02d}.wav"
            soundfile.write(folder / name, tone(100.0 * emotion, 0.3, rng), 16_000)
    out = prepare_without_ray(tmp_path / "ravdess", tmp_path / "out", CORPORA["ravdess"])
    assert main(["prepare", "ravdess", "--root", str(tmp_path / "ravdess"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.endswith(f"next: {wanted.format(out=out)}\n")
