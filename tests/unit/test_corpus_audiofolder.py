"""Hugging Face's audiofolder layout: metadata where they lie, and no guessing of speakers."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sermll.corpora.audiofolder import open_corpus
from sermll.errors import CorpusError
from sermll.rows import Problem, Utterance

GOOD = "file_name,label,speaker\na.wav,sad,03\nb/c.wav,happy,10\n"


def put(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Recordings without metadata."""
    return put(
        tmp_path / "mine", *(f"{folder}{name}" for folder in ("", "train/", "test/") for name in ("a.wav", "b/c.wav"))
    )


def rows(root: Path, classes: tuple[str, ...] | None = None) -> list[Utterance | Problem]:
    corpus, folder = open_corpus(root, "mine", classes)
    assert folder == root
    return list(corpus.read(folder))


def faults(root: Path, classes: tuple[str, ...] | None = None) -> list[str]:
    with pytest.raises(CorpusError) as caught:
        open_corpus(root, "mine", classes)
    return str(caught.value).splitlines()[1:]


def test_the_three_kinds_of_metadata_say_the_same(root: Path) -> None:
    expected = [
        Utterance("a", "a.wav", "sad", "03", valence=0.5, votes=(("sad", 2.0),)),
        Utterance("b/c#1.0-", "b/c.wav", "happy", "10", start_s=1.0),
    ]
    columns = ["file_name", "label", "speaker", "valence", "votes:sad", "start_s"]
    table = [["a.wav", "sad", "03", 0.5, 2, None], ["b/c.wav", "happy", "10", None, None, 1]]
    lines = [",".join("" if value is None else str(value) for value in row) for row in [columns, *table]]
    (root / "metadata.csv").write_text("\n".join(lines))
    assert rows(root) == expected
    (root / "metadata.csv").unlink()
    objects = [dict(zip(columns, row, strict=True)) for row in table]
    (root / "metadata.jsonl").write_text("\n\n".join(json.dumps(line) for line in objects))
    assert rows(root) == expected
    (root / "metadata.jsonl").unlink()
    pq.write_table(pa.Table.from_pylist(objects), root / "metadata.parquet")
    assert rows(root) == expected


def test_metadata_below_are_relative_to_their_own_folder(root: Path) -> None:
    for folder in ("train", "test"):
        (root / folder / "metadata.csv").write_text(GOOD)
    put(root, ".cache/a.wav")
    (root / ".cache" / "metadata.csv").write_text("nonsense")
    corpus, _ = open_corpus(root, "mine", ("sad", "happy"))
    found = [row for row in rows(root) if isinstance(row, Utterance)]
    assert [row.id for row in found] == ["test/a", "test/b/c", "train/a", "train/b/c"]
    assert [row.path for row in found] == ["test/a.wav", "test/b/c.wav", "train/a.wav", "train/b/c.wav"]
    assert (corpus.classes, corpus.default_folds, corpus.folds) == (("sad", "happy"), "speaker", {})


def test_folders_named_by_label_tell_no_speaker(tmp_path: Path) -> None:
    put(tmp_path, "train/angry/x.wav", "train/sad/y.wav")
    with pytest.raises(CorpusError, match=r"tell no speaker.*cannot be trusted.*file_name, label, speaker"):
        open_corpus(tmp_path, "mine", None)


def test_metadata_without_speakers_are_refused(root: Path) -> None:
    (root / "metadata.csv").write_text("file_name,label\na.wav,sad\n")
    with pytest.raises(CorpusError, match=r"metadata\.csv: no column speaker; .*cannot be trusted"):
        open_corpus(root, "mine", None)


def test_missing_folder_and_two_metadata_files(root: Path) -> None:
    with pytest.raises(CorpusError, match="nowhere: no such folder"):
        open_corpus(root / "nowhere", "mine", None)
    with pytest.raises(CorpusError, match=r"a\.wav: no such folder"):
        open_corpus(root / "a.wav", "mine", None)
    put(root, "train/metadata.csv", "train/metadata.jsonl")
    with pytest.raises(CorpusError, match=r"train: holds metadata\.csv and metadata\.jsonl; keep one"):
        open_corpus(root, "mine", None)


def test_faults_are_told_by_file_row_column_and_value(root: Path, tmp_path: Path) -> None:
    put(tmp_path, "secret.wav")
    (root / "train" / "link.wav").symlink_to(tmp_path / "secret.wav")
    text = "file_name,label,speaker\n../a.wav,sad,1\n/a.wav,sad,1\nlink.wav,sad,1\n,sad,1\na.wav,hapy,\n"
    (root / "train" / "metadata.csv").write_text(text)
    upwards, absolute, link, blank, label, speaker = faults(root, ("sad", "happy"))
    place = "train/metadata.csv row"
    assert upwards.startswith(f"{place} 2, column file_name, value 'train/../a.wav': leads upwards")
    assert absolute.startswith(f"{place} 3, column file_name, value '/a.wav': is absolute")
    assert link.startswith(f"{place} 4, column file_name, value 'train/link.wav': is a link that leads outside")
    assert blank == f"{place} 5, column file_name, value '': is blank; every row needs one"
    assert label.startswith(f"{place} 6, column label, value 'hapy': is none of the classes sad, happy; did you mean")
    assert speaker == f"{place} 6, column speaker, value '': is blank; every row needs one"


def test_ids_are_unique_over_all_metadata(root: Path) -> None:
    (root / "metadata.csv").write_text("file_name,label,speaker\ntrain/a.wav,sad,03\n")
    (root / "train" / "metadata.csv").write_text(GOOD)
    (fault,) = faults(root)
    assert fault.startswith("train/metadata.csv row 2, column id, value 'train/a': stands in metadata.csv row 2 too")


def test_unknown_and_missing_columns_of_any_file(root: Path) -> None:
    (root / "test" / "metadata.csv").write_text(GOOD)
    (root / "train" / "metadata.csv").write_text("file_name,label,speakers\na.wav,sad,1\n")
    with pytest.raises(CorpusError, match=r"train/metadata\.csv: no column speaker"):
        open_corpus(root, "mine", None)
    (root / "train" / "metadata.csv").write_text("file_name,label,speaker,path\na.wav,sad,1,a.wav\n")
    with pytest.raises(CorpusError, match=r"train/metadata\.csv: unknown column 'path'"):
        open_corpus(root, "mine", None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "b/c.wav",', "line 2 is not JSON"),
        ('["b/c.wav", "sad", "1"]', "line 2 is not an object"),
        (
            '{"file_name": "b/c.wav", "label": ["sad"], "speaker": "1"}',
            r"line 2, column label, value \['sad'\]: is of type list",
        ),
        (
            '{"file_name": "b/c.wav", "label": "sad", "speaker": 1.0}',
            "line 2, column speaker, value 1.0: is of type float",
        ),
        ('{"file_name": "b/c.wav", "label": "sad"}', "line 2, column speaker, value '': is blank"),
        (
            '{"file_name": "b/c.wav", "label": "sad", "speaker": "1", "valence": NaN}',
            "line 2, column valence, value nan",
        ),
        ('{"file_name": "b/c.wav", "label": "sad", "speaker": "1", "sesion": 1}', "did you mean session"),
        ('{"file_name": "b/c.wav", "label": "sad", "speaker": "J\xfcrgen"}', "cannot be read as UTF-8"),
    ],
)
def test_faults_of_json_lines(root: Path, line: str, message: str) -> None:
    good = '{"file_name": "a.wav", "label": "sad", "speaker": 3}\n'
    (root / "metadata.jsonl").write_bytes((good + line).encode("latin-1"))
    with pytest.raises(CorpusError, match=message):
        open_corpus(root, "mine", None)
    (root / "metadata.jsonl").write_text(good)
    assert rows(root) == [Utterance("a", "a.wav", "sad", "3")]


def test_empty_metadata_and_missing_files(root: Path) -> None:
    for name, text in (("metadata.jsonl", "\n"), ("metadata.csv", "file_name,label,speaker\n")):
        (root / name).write_text(text)
        with pytest.raises(CorpusError, match="no rows"):
            open_corpus(root, "mine", None)
        (root / name).unlink()
    (root / "metadata.csv").write_text(GOOD + "no.wav,sad,1\n")
    assert [row.reason for row in rows(root) if isinstance(row, Problem)] == ["missing"]
