"""Files that are whole or not there, and errors that name them."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sermll.errors import DataError
from sermll.files import naming, read_json, read_yaml, whole, write_json


def test_a_file_appears_when_its_writing_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with whole(path) as partial:
        partial.write_text("1")
        assert not path.exists()
    assert read_json(path) == 1
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_writing_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [None, 1.5]})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(UnicodeEncodeError), whole(path) as partial:
        partial.write_text("half" * 10**6 + "é", encoding="ascii")
    assert read_json(path) == {"a": [None, 1.5]}
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(("content", "message"), [(None, "a: not there"), ("{", "a: damaged"), ("a: [", "a: damaged")])
def test_what_is_wrong_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "a"
    if content is not None:
        path.write_text(content)
    for read in (read_json, read_yaml):
        with pytest.raises(DataError, match=message):
            read(path)
    with pytest.raises(DataError, match=message), naming(path):
        pq.read_table(path)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a: no 'folds' in it; .*another version"), naming(tmp_path / "a"):
        {}["folds"]
