"""Shards: what is written comes back, and damage of any kind is named."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from prepared import write_prepared

from sermll.errors import DataError
from sermll.shards import SHARD_SCHEMA, Prepared, Waveforms, content_hash, read_shard, write_shard


@pytest.fixture
def copy(tiny_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_data, tmp_path / "copy"))


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Three corpora whose names of utterances and speakers repeat; none fills its last shard."""
    rows = [("u1", "joy", "a"), ("u2", "anger", "a"), ("u3", "joy", "b"), ("u4", "anger", "b")]
    other = [("u1", "sad", "a"), ("u2", "joy", "c")]
    return [
        write_prepared(tmp_path / "north", "north", rows, {"noted": {"format": 2}}, session=["1", "1", "2", "2"]),
        write_prepared(tmp_path / "south", "south", other, {"other_labels": ["xxx"], "noted": {"format": 1, "odd": 1}}),
        write_prepared(tmp_path / "east", "east", rows[::-1], {"problems": {"silent": 3}}, fold=["x", "x", "y", "y"]),
    ]


def heard(prepared: Prepared) -> list[list[int]]:
    """The samples of every utterance."""
    table = prepared.table
    waveforms = Waveforms(prepared.files, table["shard"].to_numpy(), table["row"].to_numpy())
    return [waveforms[row].tolist() for row in range(len(table))]


def test_every_waveform_comes_back_bit_exact(tiny_data: Path, tiny_corpus: Path) -> None:
    prepared = Prepared.open(tiny_data)
    waveforms = Waveforms(prepared.files, prepared.table["shard"].to_numpy(), prepared.table["row"].to_numpy())
    for index, row in enumerate(prepared.table.to_pylist()):
        samples, _ = soundfile.read(tiny_corpus / row["path"], dtype="int16")
        np.testing.assert_array_equal(waveforms[index], samples)
        assert row["num_samples"] == len(samples) and row["duration_s"] == len(samples) / 16_000


def test_waveforms_are_views_of_the_file_not_copies(tiny_data: Path) -> None:
    prepared = Prepared.open(tiny_data)
    waveforms = Waveforms(prepared.files, prepared.table["shard"].to_numpy(), prepared.table["row"].to_numpy())
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


def test_a_single_corpus_is_as_it_was_prepared_and_says_its_name(three: list[Path], tiny_data: Path) -> None:
    prepared = Prepared.open(tiny_data)
    assert prepared.table.drop_columns("corpus").equals(pq.read_table(tiny_data / "utterances.parquet"))
    assert set(prepared.table["corpus"].to_pylist()) == {"emodb"} and list(prepared.corpora) == ["emodb"]
    alone, listed = Prepared.open(three[0]), Prepared.open([str(three[0])])
    assert listed.table.equals(alone.table) and listed.data_hash == alone.data_hash
    assert alone.table["id"].to_pylist() == ["u1", "u2", "u3", "u4"]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0], [1, 2, 0]])
def test_joined_corpora_are_their_rows_one_after_the_other(three: list[Path], order: list[int]) -> None:
    paths = [three[index] for index in order]
    joined = Prepared.open(paths)
    expected: list[dict[str, Any]] = []
    samples: list[list[int]] = []
    for path in paths:
        alone = Prepared.open(path)
        samples += heard(alone)
        for row in pq.read_table(path / "utterances.parquet").to_pylist():
            named = {name: row[name] and f"{path.name}/{row[name]}" for name in ("id", "speaker", "session", "fold")}
            expected.append(row | named | {"corpus": path.name, "shard": None})
    assert [row | {"shard": None} for row in joined.table.to_pylist()] == expected
    assert len(set(joined.table["id"].to_pylist())) == len(expected)
    assert heard(joined) == samples
    assert joined.num_samples.tolist() == [len(one) for one in samples]
    joined.verify()


def test_facts_of_joined_corpora(three: list[Path]) -> None:
    joined = Prepared.open(three)
    assert joined.corpus == "north+south+east" and joined.manifest["title"] == "NORTH + SOUTH + EAST"
    assert joined.classes == ("anger", "joy", "sad")
    assert joined.corpora == {"north": ("anger", "joy"), "south": ("joy", "sad"), "east": ("anger", "joy")}
    assert joined.manifest["other_labels"] == ["xxx"] and joined.manifest["folds"] == {}
    assert joined.manifest["noted"] == {"format": 3, "odd": 1} and joined.manifest["problems"] == {"silent": 3}
    assert joined.path == " + ".join(str(path.resolve()) for path in three)


def test_the_hash_of_joined_corpora_covers_each_and_their_order(three: list[Path], tmp_path: Path) -> None:
    reference = Prepared.open(three[:2]).data_hash
    moved = shutil.copytree(three[1], tmp_path / "elsewhere")
    assert Prepared.open([three[0], moved]).data_hash == reference
    changed = write_prepared(tmp_path / "changed", "south", [("u1", "sad", "a"), ("u2", "joy", "d")])
    others = [[three[0], changed], three[1::-1], three, three[:1], three[1:2]]
    assert len({reference, *(Prepared.open(paths).data_hash for paths in others)}) == 6


def test_a_corpus_is_joined_once(three: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="south is given twice; give each corpus once"):
        Prepared.open([three[1], three[0], three[1] / "." / "shards" / ".."])
    copy = shutil.copytree(three[0], tmp_path / "copy")
    with pytest.raises(DataError, match=r"north and .*copy are both called north"):
        Prepared.open([three[0], copy])
    with pytest.raises(DataError, match="no such folder"):
        Prepared.open([three[0], tmp_path / "missing"])


def test_a_flipped_byte_of_any_joined_corpus_is_found(three: list[Path]) -> None:
    shard = three[2] / "shards" / "00001.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"east/shards/00001\.arrow: the shard is damaged.*delete .*east and prepare"):
        Prepared.open(three).verify()
