"""Shards: what is written comes back, and damage of any kind is named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from sermll.errors import DataError
from sermll.shards import SHARD_SCHEMA, Prepared, Waveforms, content_hash, read_shard, write_shard


@pytest.fixture
def copy(tiny_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_data, tmp_path / "copy"))


def test_every_waveform_comes_back_bit_exact(tiny_data: Path, tiny_corpus: Path) -> None:
    prepared = Prepared.open(tiny_data)
    waveforms = Waveforms(str(tiny_data), prepared.table["shard"].to_numpy(), prepared.table["row"].to_numpy())
    for index, row in enumerate(prepared.table.to_pylist()):
        samples, _ = soundfile.read(tiny_corpus / row["path"], dtype="int16")
        np.testing.assert_array_equal(waveforms[index], samples)
        assert row["num_samples"] == len(samples) and row["duration_s"] == len(samples) / 16_000


def test_waveforms_are_views_of_the_file_not_copies(tiny_data: Path) -> None:
    prepared = Prepared.open(tiny_data)
    waveforms = Waveforms(str(tiny_data), prepared.table["shard"].to_numpy(), prepared.table["row"].to_numpy())
    assert not waveforms[0].flags.writeable and not waveforms[0].flags.owndata


def test_rows_are_ordered_by_id_and_counts_follow_the_class_order(tiny_data: Path) -> None:
    prepared = Prepared.open(tiny_data)
    ids = prepared.table["id"].to_pylist()
    assert ids == sorted(ids) and len(ids) == 140
    assert prepared.manifest["counts"] == dict.fromkeys(prepared.classes, 20)


def test_an_empty_shard_is_whole(tmp_path: Path) -> None:
    write_shard(tmp_path / "00000.arrow", [])
    batch = read_shard(tmp_path / "00000.arrow")
    assert len(batch) == 0 and batch.schema.names == SHARD_SCHEMA.names


def test_the_data_hash_is_of_content_alone(tiny_data: Path) -> None:
    prepared = Prepared.open(tiny_data)
    rows = pq.read_table(tiny_data / "utterances.parquet").to_pylist()
    assert content_hash("emodb", prepared.classes, rows) == prepared.data_hash
    moved = [row | {"path": "elsewhere", "source_sha256": "other encoding", "shard": 9} for row in rows]
    assert content_hash("emodb", prepared.classes, moved) == prepared.data_hash
    for change in ({"label": "sadness"}, {"speaker": "99"}, {"audio_sha256": "0"}, {"id": "x"}):
        assert content_hash("emodb", prepared.classes, [rows[0] | change, *rows[1:]]) != prepared.data_hash
    assert content_hash("emodb", prepared.classes[::-1], rows) != prepared.data_hash


def test_a_flipped_byte_is_found(copy: Path) -> None:
    shard = copy / "shards" / "00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    prepared = Prepared.open(copy)  # same size: only the hash can tell
    with pytest.raises(DataError, match=r"00000\.arrow: the shard is damaged"):
        prepared.verify()


def test_a_truncated_or_missing_shard_is_refused(copy: Path) -> None:
    shard = copy / "shards" / "00000.arrow"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"00000\.arrow: \d+ bytes, the manifest says"):
        Prepared.open(copy)
    shard.unlink()
    with pytest.raises(DataError, match=r"00000\.arrow: missing"):
        Prepared.open(copy)


def test_garbage_in_place_of_a_shard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "00000.arrow").write_bytes(b"not arrow at all" * 100)
    with pytest.raises(DataError, match="not a readable shard"):
        read_shard(tmp_path / "00000.arrow")


def test_another_version_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(DataError, match="format 99, this version of sermll reads format 2"):
        Prepared.open(copy)


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_damaged_manifest_is_refused(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="prepare again"):
        Prepared.open(copy)


def test_a_changed_table_is_refused(copy: Path) -> None:
    table = pq.read_table(copy / "utterances.parquet")
    pq.write_table(table.slice(1), copy / "utterances.parquet")
    with pytest.raises(DataError, match="does not give the manifest's data_hash"):
        Prepared.open(copy)


def test_missing_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        Prepared.open(tmp_path / "missing")
    with pytest.raises(DataError, match=r"no manifest\.json"):
        Prepared.open(tmp_path)
