"""`sermll prepare` on a real Ray cluster: one hash however it is run, and nothing lost, whatever the files hold."""

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import write_corpus
from prepared import kill_when

from sermll import prepare as preparing
from sermll.corpora import CORPORA
from sermll.errors import CorpusError, DataError
from sermll.prepare import prepare
from sermll.shards import Prepared

pytestmark = pytest.mark.ray
EMODB = CORPORA["emodb"]


def test_ray_workers_write_the_same_bytes_as_one_process(
    ray_cluster: None, tiny_corpus: Path, tiny_data: Path, tmp_path: Path
) -> None:
    made = prepare(EMODB, tiny_corpus, tmp_path / "out")
    assert made.made and made.prepared.data_hash == Prepared.open(tiny_data).data_hash
    for shard in sorted((tiny_data / "shards").iterdir()):
        if shard.suffix == ".arrow":
            assert (tmp_path / "out" / "shards" / shard.name).read_bytes() == shard.read_bytes()
    made.prepared.verify()


def test_again_is_a_no_op_and_other_input_is_refused(ray_cluster: None, tmp_path: Path) -> None:
    root, out = write_corpus(tmp_path / "emodb", takes=1), tmp_path / "out"
    first = prepare(EMODB, root, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    second = prepare(EMODB, root, out)
    assert not second.made and second.prepared.data_hash == first.prepared.data_hash
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(DataError, match="other settings"):
        prepare(EMODB, root, out, trim_db=30)
    next((root / "wav").iterdir()).unlink()
    with pytest.raises(DataError, match="another input"):
        prepare(EMODB, root, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_bad_files_are_listed_and_the_rest_is_prepared(ray_cluster: None, tmp_path: Path) -> None:
    root = write_corpus(tmp_path / "emodb", takes=1)
    wav = root / "wav"
    (wav / "03a07Wa.wav").write_text("renamed text")
    (wav / "03a07Fa.wav").write_bytes(b"")
    soundfile.write(wav / "03a07Ta.wav", np.zeros(8000), 16_000)
    soundfile.write(wav / "03a07Na.wav", np.full(8000, np.nan), 16_000, subtype="FLOAT")
    soundfile.write(wav / "03a07La.wav", np.ones(100), 16_000)
    soundfile.write(wav / "03a07Xa.wav", np.ones(8000), 16_000)
    whole = (wav / "08a01Wa.wav").read_bytes()
    (wav / "03a07Aa.wav").write_bytes(whole[: len(whole) // 2])
    soundfile.write(wav / "03a07Ea.wav", np.ones(30 * 60 * 8000) / 2, 8000, subtype="PCM_U8")
    rng = np.random.default_rng(0)
    unusual = {"16a07Wa": (16_000, 1, "PCM_U8"), "16a07Fa": (16_000, 1, "PCM_24"), "16a07Ta": (96_000, 6, "PCM_16")}
    for name, (rate_hz, channels, encoding) in unusual.items():
        sound = rng.normal(0, 0.1, (rate_hz // 2, channels))
        soundfile.write(wav / f"{name}.wav", sound, rate_hz, subtype=encoding)
    shutil.copy(wav / "08a01Wa.wav", wav / "08a02Wa.wav")
    prepared = prepare(EMODB, root, tmp_path / "out").prepared
    with (tmp_path / "out" / "problems.csv").open() as file:
        rows = {Path(row["path"]).stem: row for row in csv.DictReader(file)}
    reasons = {name: row["reason"] for name, row in rows.items() if row["used"] == "no"}
    assert reasons == {
        "03a07Aa": "corrupt",
        "03a07Ea": "long",
        "03a07Wa": "corrupt",
        "03a07Fa": "empty",
        "03a07Ta": "silent",
        "03a07Na": "nan",
        "03a07La": "short",
        "03a07Xa": reasons["03a07Xa"],
    }
    assert reasons["03a07Xa"] in ("label", "name")
    assert {name for name, row in rows.items() if row["used"] == "yes"} == set(unusual)
    assert rows["16a07Ta"]["detail"] == "96000 Hz, 6 channels, PCM_16; most are 16000 Hz, 1 channel, PCM_16"
    assert prepared.table.num_rows == 74 and sum(prepared.manifest["problems"].values()) == 8
    assert prepared.manifest["noted"] == {"format": 3}
    heard = {row["id"]: row["num_samples"] for row in prepared.table.to_pylist()}
    assert [heard[name] for name in unusual] == [8000, 8000, 8000]
    assert prepared.manifest["identical_audio"] == [["08a01Wa", "08a02Wa"]]


def test_a_corpus_without_a_usable_file_is_refused(ray_cluster: None, tmp_path: Path) -> None:
    (tmp_path / "wav").mkdir()
    (tmp_path / "wav" / "03a01Wa.wav").write_text("not audio")
    with pytest.raises(CorpusError, match="none of 1 files is usable"):
        prepare(EMODB, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_outputs_that_cannot_be_written_are_refused(tiny_corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written"):
        prepare(EMODB, tiny_corpus, tmp_path / "file" / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match="is not empty and holds no prepared data"):
        prepare(EMODB, tiny_corpus, tmp_path / "full")
    assert (tmp_path / "full" / "thesis.tex").read_text() == "precious"


def test_finished_shards_of_a_cut_off_run_are_kept_and_damaged_ones_made_again(
    ray_cluster: None, tiny_corpus: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preparing, "_write_manifest", cut)
        with pytest.raises(KeyboardInterrupt):
            prepare(EMODB, tiny_corpus, tmp_path / "out")
    (staging,) = tmp_path.glob(".out.*.partial")
    assert not (tmp_path / "out").exists()
    first, second = sorted((staging / "shards").glob("*.arrow"))
    first.write_bytes(first.read_bytes()[:-10])
    kept = second.stat().st_mtime_ns
    prepared = prepare(EMODB, tiny_corpus, tmp_path / "out").prepared
    assert prepared.data_hash == Prepared.open(tiny_data).data_hash
    assert (tmp_path / "out" / "shards" / second.name).stat().st_mtime_ns == kept
    assert not list(tmp_path.glob(".out.*.partial"))


def test_what_other_outputs_have_begun_is_left(ray_cluster: None, tiny_corpus: Path, tmp_path: Path) -> None:
    others = [tmp_path / f".{name}.0123456789ab.partial" for name in ("emodb[1].v2", "emodb1", "emodb[1].dev")]
    own = tmp_path / ".emodb[1].ba9876543210.partial"  # of other input
    for folder in (*others, own):
        folder.mkdir()
    prepare(EMODB, tiny_corpus, tmp_path / "emodb[1]")
    assert sorted(tmp_path.glob(".*.partial")) == sorted(others)


def test_killed_and_started_again_gives_the_same_hash(
    tiny_corpus: Path, tiny_data: Path, tmp_path: Path, killable: Callable[..., subprocess.Popen]
) -> None:
    command = ["prepare", "emodb", "--root", str(tiny_corpus), "--out", str(tmp_path / "out")]
    kill_when(killable(command), lambda: list(tmp_path.glob(".out.*.partial/shards/*")))
    subprocess.run([sys.executable, "-m", "sermll", *command], check=True, env=os.environ, timeout=240)
    assert Prepared.open(tmp_path / "out").data_hash == Prepared.open(tiny_data).data_hash


def test_rates_and_channels_are_noted(ray_cluster: None, tmp_path: Path) -> None:
    wav = tmp_path / "emodb" / "wav"
    wav.mkdir(parents=True)
    rng = np.random.default_rng(0)
    soundfile.write(wav / "03a01Wa.wav", rng.normal(0, 0.1, (48_000, 2)), 48_000)
    soundfile.write(wav / "03a01Fa.flac", rng.normal(0, 0.1, 8_000), 8_000)
    table = prepare(EMODB, tmp_path / "emodb", tmp_path / "out").prepared.table
    rows = {row["id"]: row for row in table.to_pylist()}
    assert (rows["03a01Wa"]["source_rate_hz"], rows["03a01Wa"]["source_channels"]) == (48_000, 2)
    assert rows["03a01Wa"]["num_samples"] == rows["03a01Fa"]["num_samples"] == 16_000
