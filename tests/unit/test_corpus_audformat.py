"""audformat databases, built and saved with the package itself; skipped where it is not installed."""

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from sermll.corpora.audformat import open_corpus
from sermll.errors import ConfigError, CorpusError
from sermll.rows import Problem, Utterance

FILES = ["wav/03a.wav", "wav/03b.wav", "wav/08a.wav", "wav/08b.wav"]
EMOTIONS = ["anger", "neutral", "neutral", "anger"]


@pytest.fixture(scope="module")
def audformat() -> Any:
    return pytest.importorskip("audformat", reason="audformat is not installed: pip install 'sermll[audformat]'")


def put(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def add(audformat: Any, database: Any, table: str, index: Any, **columns: list) -> None:
    """A table whose columns have the scheme of their name where there is one; `emotion_1` has that of emotion."""
    database[table] = audformat.Table(index)
    for column, values in columns.items():
        scheme = column.partition("_")[0]
        database[table][column] = audformat.Column(scheme_id=scheme if scheme in database.schemes else None)
        database[table][column].set(values)


@pytest.fixture
def database(audformat: Any) -> Any:
    """Like the EMO-DB that audEERING publishes: labels in one table and, by split, in others; speakers elsewhere."""
    database = audformat.Database("emo", source="https://example.org/emo", author="F. Burkhardt", license="CC0-1.0")
    database.schemes["emotion"] = audformat.Scheme(labels={"neutral": {"letter": "N"}, "anger": {"letter": "W"}})
    database.schemes["speaker"] = audformat.Scheme(labels={"03": {"gender": "male"}, "08": {"gender": "female"}})
    add(audformat, database, "emotion", audformat.filewise_index(FILES), emotion=EMOTIONS)
    add(audformat, database, "emotion.test", audformat.filewise_index(FILES[2:]), emotion=EMOTIONS[2:])
    add(audformat, database, "files", audformat.filewise_index(FILES), speaker=["03", "03", "08", "08"])
    return database


def save(database: Any, root: Path, **options: Any) -> Path:
    database.save(str(root), **options)
    return put(root, *FILES)


def rows(root: Path, classes: tuple[str, ...] | None = None) -> list[Utterance | Problem]:
    corpus, folder = open_corpus(root, "mine", classes)
    assert folder == root
    return list(corpus.read(folder))


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "audformat", None)
    with pytest.raises(ConfigError, match=r'pip install "sermll\[audformat\]"'):
        open_corpus(tmp_path, "mine", None)


@pytest.mark.parametrize("storage_format", ["csv", "parquet"])
def test_labels_in_several_tables_and_speakers_in_another(database: Any, tmp_path: Path, storage_format: str) -> None:
    root = save(database, tmp_path, storage_format=storage_format)
    corpus, _ = open_corpus(root, "mine", None)
    assert (corpus.name, corpus.title, corpus.classes) == ("mine", "mine", ("neutral", "anger"))
    assert (corpus.licence, corpus.citation) == ("CC0-1.0", "F. Burkhardt: emo")
    assert (corpus.source, corpus.default_folds) == ("https://example.org/emo", "speaker")
    assert rows(root) == [
        Utterance("wav/03a", "wav/03a.wav", "anger", "03", sex="male"),
        Utterance("wav/03b", "wav/03b.wav", "neutral", "03", sex="male"),
        Utterance("wav/08a", "wav/08a.wav", "neutral", "08", sex="female"),
        Utterance("wav/08b", "wav/08b.wav", "anger", "08", sex="female"),
    ]
    assert open_corpus(root, "mine", ("anger", "neutral"))[0].classes == ("anger", "neutral")


def test_tables_by_split_are_read_together(audformat: Any, database: Any, tmp_path: Path) -> None:
    database.drop_tables(["emotion", "emotion.test"])
    for part, name in enumerate(("dev", "test")):
        here = slice(2 * part, 2 * part + 2)
        add(audformat, database, f"emotion.{name}", audformat.filewise_index(FILES[here]), emotion=EMOTIONS[here])
    found = {row.path: row.label for row in rows(save(database, tmp_path)) if isinstance(row, Utterance)}
    assert found == dict(zip(FILES, EMOTIONS, strict=True))


def test_tables_that_disagree_are_refused(audformat: Any, database: Any, tmp_path: Path) -> None:
    add(audformat, database, "perceived", audformat.filewise_index(FILES[:2]), emotion=["neutral", "neutral"])
    with pytest.raises(CorpusError, match=r"disagree about 'emotion'.*drop_tables.*perceived \(emotion\)"):
        open_corpus(save(database, tmp_path / "tables"), "mine", None)
    database.drop_tables(["perceived", "emotion", "emotion.test"])
    add(audformat, database, "votes", audformat.filewise_index(FILES), emotion_1=EMOTIONS, emotion_2=EMOTIONS[::-1])
    open_corpus(save(database, tmp_path / "same"), "mine", None)  # anger neutral neutral anger is its own mirror
    database["votes"]["emotion_2"].set(["neutral"] * 4)
    with pytest.raises(CorpusError, match=r"disagree about 'emotion'.*votes \(emotion_1, emotion_2\)"):
        open_corpus(save(database, tmp_path / "raters"), "mine", None)


def test_parts_of_files_have_the_speakers_of_their_files(audformat: Any, database: Any, tmp_path: Path) -> None:
    """In an order in which `Database.get`, asked for both schemes at once, mixes the speakers up."""
    database.drop_tables(["emotion", "emotion.test"])
    files = [FILES[0], FILES[2], FILES[0], FILES[2], FILES[3]]
    index = audformat.segmented_index(files, ["0s", "0.1s", "2.5s", "7s", "0s"], ["1s", "0.7s", "3s", None, None])
    add(audformat, database, "parts", index, emotion=["anger", "neutral", "anger", "anger", "neutral"])
    assert rows(save(database, tmp_path)) == [
        Utterance("wav/03a#0.0-1.0", FILES[0], "anger", "03", sex="male", start_s=0.0, end_s=1.0),
        Utterance("wav/08a#0.1-0.7", FILES[2], "neutral", "08", sex="female", start_s=0.1, end_s=0.7),
        Utterance("wav/03a#2.5-3.0", FILES[0], "anger", "03", sex="male", start_s=2.5, end_s=3.0),
        Utterance("wav/08a#7.0-", FILES[2], "anger", "08", sex="female", start_s=7.0),
        Utterance("wav/08b", FILES[3], "neutral", "08", sex="female"),
    ]


def test_speakers_of_parts_and_labels_in_a_misc_table(audformat: Any, tmp_path: Path) -> None:
    import pandas as pd

    database = audformat.Database("dialogues")
    database["speaker"] = audformat.MiscTable(pd.Index([3, 12], name="speaker", dtype="Int64"))
    database.schemes["gender"] = audformat.Scheme(labels=["female", "male", "other"])
    database["speaker"]["gender"] = audformat.Column(scheme_id="gender")
    database["speaker"]["gender"].set(["other", "female"])
    database.schemes["speaker"] = audformat.Scheme("int", labels="speaker")
    index = audformat.segmented_index(FILES[:1] * 2, ["0s", "1s"], ["1s", "2s"])
    add(audformat, database, "turns", index, emotion=["sad", "angry"], speaker=[3, 12])
    corpus, _ = open_corpus(save(database, tmp_path), "mine", None)
    assert corpus.classes == ("angry", "sad")  # the column has no scheme
    assert (corpus.licence, corpus.citation, corpus.source) == ("the owner's",) * 3
    first, second = rows(tmp_path)
    assert isinstance(first, Utterance)
    assert isinstance(second, Utterance)
    assert [(row.label, row.speaker, row.sex) for row in (first, second)] == [
        ("sad", "3", None),
        ("angry", "12", "female"),
    ]


def test_what_is_not_told(audformat: Any, database: Any, tmp_path: Path) -> None:
    database["emotion"]["emotion"].set(["anger", None, "neutral", "anger"])
    root = save(database, tmp_path / "emotions")
    (root / FILES[3]).unlink()
    problems = [row for row in rows(root) if isinstance(row, Problem)]
    assert [(row.path, row.reason) for row in problems] == [(FILES[3], "missing"), (FILES[1], "label")]
    database["files"]["speaker"].set(["03", "03", None, "08"])
    with pytest.raises(CorpusError, match=r"wav/08a\.wav, column speaker, value '': is blank"):
        open_corpus(save(database, tmp_path / "speakers"), "mine", None)
    database["emotion"]["emotion"].set([None] * 4)
    database.drop_tables("emotion.test")
    with pytest.raises(CorpusError, match="no rows"):
        open_corpus(save(database, tmp_path / "nothing"), "mine", None)


def test_no_emotion_or_no_speaker_at_all(database: Any, tmp_path: Path) -> None:
    database["files"].drop_columns("speaker", inplace=True)
    with pytest.raises(
        CorpusError, match=r"no column of the scheme or name 'speaker'; there are emotion \(emotion\); emo"
    ):
        open_corpus(save(database, tmp_path / "a"), "mine", None)
    database.drop_tables(["emotion", "emotion.test"])
    with pytest.raises(CorpusError, match=r"or name 'emotion'; there are files \(\)"):
        open_corpus(save(database, tmp_path / "b"), "mine", None)
    database.drop_tables("files")
    with pytest.raises(CorpusError, match="there are no tables"):
        open_corpus(save(database, tmp_path / "c"), "mine", None)


def test_files_outside_and_labels_outside_the_classes(audformat: Any, database: Any, tmp_path: Path) -> None:
    root = save(database, tmp_path / "a")
    with pytest.raises(CorpusError, match=r"wav/03b\.wav, column label, value 'neutral': is none of the classes anger"):
        open_corpus(root, "mine", ("anger",))
    add(audformat, database, "more", audformat.filewise_index(["../x.wav"]), emotion=["anger"], speaker=["03"])
    with pytest.raises(CorpusError, match=r"column file, value '\.\./x\.wav': leads upwards"):
        open_corpus(save(database, tmp_path / "b"), "mine", None)


class Touch:
    """Pickled, it writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_nothing_in_a_database_is_run(database: Any, tmp_path: Path) -> None:
    root, written = save(database, tmp_path / "a"), tmp_path / "written"
    (root / "db.emotion.pkl").write_bytes(pickle.dumps(Touch(written)))
    assert len(rows(root)) == 4
    (root / "db.emotion.parquet").unlink()
    with pytest.raises(
        CorpusError, match=r"neither db\.emotion\.parquet nor db\.emotion\.csv .*pickled tables are not"
    ):
        open_corpus(root, "mine", None)
    root = save(database, tmp_path / "b")
    with (root / "db.yaml").open("a") as header:
        header.write(f"meta: !!python/object/apply:builtins.open ['{written}', 'w']\n")
    with pytest.raises(CorpusError, match="not a readable audformat database"):
        open_corpus(root, "mine", None)
    assert not written.exists()


@pytest.mark.parametrize("header", ["", "- a", "name: [", "tables: 3", "name: x\ntables: {a: {type: odd}}"])
def test_damaged_databases_are_refused(audformat: Any, tmp_path: Path, header: str) -> None:
    with pytest.raises(CorpusError, match=r"no db\.yaml"):
        open_corpus(tmp_path, "mine", None)
    (tmp_path / "db.yaml").write_text(header)
    with pytest.raises(CorpusError, match="not a readable audformat database"):
        open_corpus(tmp_path, "mine", None)


def test_damaged_table_is_refused(database: Any, tmp_path: Path) -> None:
    root = save(database, tmp_path)
    (root / "db.files.parquet").write_bytes(b"PAR1")
    with pytest.raises(CorpusError, match="not a readable audformat database"):
        open_corpus(root, "mine", None)


def test_ten_thousand_parts_are_read(audformat: Any, tmp_path: Path) -> None:
    database = audformat.Database("large")
    files = [f"wav/{number}.wav" for number in range(5_000)]
    index = audformat.segmented_index(files * 2, ["0s"] * 5_000 + ["1s"] * 5_000, ["1s"] * 5_000 + ["2s"] * 5_000)
    add(audformat, database, "parts", index, emotion=["sad", "angry"] * 5_000)
    add(
        audformat,
        database,
        "files",
        audformat.filewise_index(files),
        speaker=[f"s{number % 40}" for number in range(5_000)],
    )
    root = save(database, tmp_path)
    put(root, files[7])
    found = rows(root)
    assert len(found) == 10_000
    assert [row.speaker for row in found if isinstance(row, Utterance)] == ["s7", "s7"]
