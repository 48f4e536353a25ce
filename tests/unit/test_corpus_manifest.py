"""A user's own manifest: what is read, and that every fault is told by row, column and value."""

import csv
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sermll.corpora.manifest import open_corpus
from sermll.errors import ConfigError, CorpusError
from sermll.rows import Problem, Utterance


def put(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def write(root: Path, text: str, encoding: str = "utf-8") -> Path:
    put(root, "a.wav", "b.wav", "c/d.flac")
    (root / "manifest.csv").write_bytes(text.encode(encoding))
    return root


def rows(root: Path, classes: tuple[str, ...] | None = None) -> list[Utterance | Problem]:
    corpus, folder = open_corpus(root, "mine", classes)
    return list(corpus.read(folder))


def utterances(root: Path, classes: tuple[str, ...] | None = None) -> list[Utterance]:
    found = rows(root, classes)
    assert all(isinstance(row, Utterance) for row in found)
    return [row for row in found if isinstance(row, Utterance)]


def faults(root: Path, classes: tuple[str, ...] | None = None) -> list[str]:
    """The lines that an error has beside its first one."""
    with pytest.raises(CorpusError) as caught:
        open_corpus(root, "mine", classes)
    return str(caught.value).splitlines()[1:]


def test_three_columns_are_enough(tmp_path: Path) -> None:
    write(tmp_path, "path,label,speaker\nc/d.flac,sad,03\na.wav,happy,03\nb.wav,angry,10\n")
    corpus, folder = open_corpus(tmp_path, "mine", None)
    assert folder == tmp_path
    assert (corpus.name, corpus.title, corpus.classes) == ("mine", "mine", ("angry", "happy", "sad"))
    assert (corpus.counts, corpus.folds, corpus.default_folds) == ({}, {}, "speaker")
    assert (corpus.licence, corpus.citation, corpus.source) == ("the owner's",) * 3
    assert list(corpus.read(folder)) == [
        Utterance("c/d", "c/d.flac", "sad", "03"),
        Utterance("a", "a.wav", "happy", "03"),
        Utterance("b", "b.wav", "angry", "10"),
    ]


def test_every_column(tmp_path: Path) -> None:
    write(
        tmp_path,
        "votes:sad,path,label,speaker,id,session,fold,text,sex,start_s,end_s,valence,arousal,dominance,votes:happy\n"
        "0.5,a.wav,happy,s1,one,Ses01,2,hello,female,0.5,2.25,1,2.5,-3,2\n"
        ",b.wav,sad,s2,,,1,,,,,,,,\n"
        "0,b.wav,sad,s2,two,,1,,male,1,,,,,0\n",
    )
    one, blank, two = utterances(tmp_path)
    assert one == Utterance(
        id="one",
        path="a.wav",
        label="happy",
        speaker="s1",
        session="Ses01",
        text="hello",
        sex="female",
        fold="2",
        start_s=0.5,
        end_s=2.25,
        votes=(("happy", 2.0), ("sad", 0.5)),
        valence=1.0,
        arousal=2.5,
        dominance=-3.0,
    )
    assert blank == Utterance("b", "b.wav", "sad", "s2", fold="1")
    assert two == Utterance("two", "b.wav", "sad", "s2", sex="male", fold="1", start_s=1.0)
    assert open_corpus(tmp_path, "mine", None)[0].default_folds == "fold"


def test_the_file_itself_or_the_folder_that_holds_one(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"neither manifest\.csv nor manifest\.parquet"):
        open_corpus(tmp_path, "mine", None)
    with pytest.raises(CorpusError, match="nowhere: no such file or folder"):
        open_corpus(tmp_path / "nowhere", "mine", None)
    write(tmp_path, "path,label,speaker\na.wav,sad,1\n")
    (tmp_path / "manifest.csv").rename(tmp_path / "own.csv")
    assert len(utterances(tmp_path / "own.csv")) == 1
    with pytest.raises(CorpusError, match=r"a\.wav: not a manifest"):
        open_corpus(tmp_path / "a.wav", "mine", None)
    put(tmp_path, "manifest.csv", "manifest.parquet")
    with pytest.raises(CorpusError, match=r"both manifest\.csv and manifest\.parquet"):
        open_corpus(tmp_path, "mine", None)


def test_given_classes_set_the_order_and_refuse_other_labels(tmp_path: Path) -> None:
    write(tmp_path, "path,label,speaker\na.wav,sad,1\nb.wav,hapy,1\nc/d.flac,bored,1\n")
    assert open_corpus(tmp_path, "mine", ("sad", "hapy", "calm", "bored"))[0].classes[2] == "calm"
    assert faults(tmp_path, ("sad", "happy")) == [
        "row 3, column label, value 'hapy': is none of the classes sad, happy; did you mean happy?",
        "row 4, column label, value 'bored': is none of the classes sad, happy",
    ]
    with pytest.raises(ConfigError, match="stands twice"):
        open_corpus(tmp_path, "mine", ("sad", "happy", "sad"))


def test_one_class_is_read(tmp_path: Path) -> None:
    write(tmp_path, "path,label,speaker\na.wav,sad,1\nb.wav,sad,2\n")
    assert open_corpus(tmp_path, "mine", None)[0].classes == ("sad",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "row 1 is empty"),
        ("path,label,speaker\n", "no rows"),
        ("path,label,speaker\n\n,,\n", "no rows"),
        ("path,label\na.wav,sad\n", "no column speaker; .*results cannot be trusted"),
        ("path;label;speaker\na.wav;sad;1\n", "no column path, label, speaker; .*found are path;label;speaker"),
        ("path,label,speaker,sesion\na.wav,sad,1,1\n", "unknown column 'sesion'; did you mean session?"),
        ("path,label,speaker,Fold\na.wav,sad,1,1\n", "unknown column 'Fold'; did you mean fold?"),
        ("path,label,speaker,microphone\na.wav,sad,1,1\n", "unknown column 'microphone'; there are path, .*remove it"),
        ("path,label,speaker,votes:\na.wav,sad,1,1\n", "unknown column 'votes:'"),
        ("path,label,speaker,votes: sad\na.wav,sad,1,1\n", "unknown column 'votes: sad'"),
        ("path,label,speaker,label\na.wav,sad,1,sad\n", "the column label stands twice"),
        ('path,label,speaker\na.wav,sad,1\n"b.wav,sad,1\n', "row 3 is not CSV"),
        ('path,label,speaker\n"a"b.wav,sad,1\n', "row 2 is not CSV"),
    ],
)
def test_faults_of_the_whole_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        open_corpus(write(tmp_path, text), "mine", None)


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    text = "path,label,speaker\na.wav,sad,Jürgen\n"
    for encoding in ("latin-1", "utf-16"):
        with pytest.raises(CorpusError, match="cannot be read as UTF-8"):
            open_corpus(write(tmp_path, text, encoding), "mine", None)


def test_what_spreadsheets_write(tmp_path: Path) -> None:
    text = 'path,label,speaker,text\r\na.wav,"sad",Jürgen,"one, ""two"",\r\nthree"\r\n,,,\r\nb.wav,sad,03,\r\n\r\n'
    first, second = utterances(write(tmp_path, text, "utf-8-sig"))
    assert (first.speaker, first.text) == ("Jürgen", 'one, "two",\r\nthree')
    assert (second.speaker, second.text) == ("03", None)


@pytest.mark.parametrize(
    ("column", "value", "why"),
    [
        ("path", "", "is blank; every row needs one"),
        ("path", "/etc/a.wav", "is absolute; give it relative to"),
        ("path", "C:/a.wav", "is absolute"),
        ("path", "c\\d.flac", "has a backslash"),
        ("path", "../a.wav", "leads upwards"),
        ("path", "c/../a.wav", "leads upwards"),
        ("path", ".", "names no file"),
        ("path", "a\0.wav", "cannot be the name of a file"),
        ("path", "a.wav ", "starts or ends with a space"),
        ("label", "", "is blank"),
        ("label", " sad", "starts or ends with a space"),
        ("speaker", "", "is blank"),
        ("sex", "f", "is neither female nor male"),
        ("start_s", "-0.5", "is less than 0"),
        ("start_s", "0,5", "is not a number such as 0.5"),
        ("start_s", "nan", "is not a number"),
        ("end_s", "0", "is not after the start, 0.0 s"),
        ("valence", "high", "is not a number"),
        ("arousal", "inf", "is not a number"),
        ("dominance", "1 2", "is not a number"),
        ("votes:sad", "-1", "is less than 0"),
        ("votes:sad", "two", "is not a number"),
    ],
)
def test_a_faulty_value_is_told_by_row_column_and_value(tmp_path: Path, column: str, value: str, why: str) -> None:
    put(tmp_path, "a.wav", "b.wav")
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        good = {"path": "b.wav", "label": "sad", "speaker": "1"}
        table = csv.DictWriter(file, list(dict.fromkeys([*good, column])))
        table.writeheader()
        table.writerow(good | ({} if column in good else {column: ""}) | {"path": "a.wav"})
        table.writerow(good | {column: value})
    (fault,) = faults(tmp_path)
    assert fault.startswith(f"row 3, column {column}, value {value!r}: {why}")


def test_rows_of_another_length(tmp_path: Path) -> None:
    write(tmp_path, "path,label,speaker\n\na.wav,sad\nb.wav,sad,1\nc/d.flac,sad,1,2\n")
    assert faults(tmp_path) == [
        "row 3: has 2 values for 3 columns; put quotes around commas",
        "row 5: has 4 values for 3 columns; put quotes around commas",
    ]


def test_ten_faults_are_told(tmp_path: Path) -> None:
    write(tmp_path, "path,label,speaker\n" + "a.wav,sad,\n" * 12)
    with pytest.raises(CorpusError, match=r"manifest\.csv: 12 faults, the first 10:\n"):
        open_corpus(tmp_path, "mine", None)
    told = faults(tmp_path)
    assert [fault.split(",")[0] for fault in told] == [f"row {number}" for number in range(2, 12)]


def test_several_faults_of_one_row(tmp_path: Path) -> None:
    write(tmp_path, "path,label,speaker,start_s\n/a.wav,,,x\n")
    assert [fault.split(", ")[1] for fault in faults(tmp_path)] == [
        f"column {column}" for column in ("path", "label", "speaker", "start_s")
    ]


def test_links_must_not_lead_outside(tmp_path: Path) -> None:
    root = put(tmp_path / "data", "real.wav")
    put(tmp_path, "secret/x.wav")
    (root / "inside.wav").symlink_to(root / "real.wav")
    (root / "outside.wav").symlink_to(tmp_path / "secret" / "x.wav")
    (root / "folder").symlink_to(tmp_path / "secret")
    text = "path,label,speaker\ninside.wav,sad,1\noutside.wav,sad,1\nfolder/x.wav,sad,1\n"
    (root / "manifest.csv").write_text(text)
    first, second = faults(root)
    assert first.startswith("row 3, column path, value 'outside.wav': is a link that leads outside")
    assert second.startswith("row 4, column path, value 'folder/x.wav': is a link that leads outside")
    (tmp_path / "link").symlink_to(root)  # the folder itself may be a link
    (root / "manifest.csv").write_text("path,label,speaker\ninside.wav,sad,1\n")
    assert len(utterances(tmp_path / "link")) == 1


def test_missing_files_are_problems(tmp_path: Path) -> None:
    write(tmp_path, "path,label,speaker\na.wav,sad,1\nno.wav,sad,1\nc,sad,1\n")
    found = rows(tmp_path)
    assert [row.path for row in found if isinstance(row, Problem)] == ["no.wav", "c"]
    assert {row.reason for row in found if isinstance(row, Problem)} == {"missing"}
    write(tmp_path, "path,label,speaker\nx/a.wav,sad,1\nx/b.wav,sad,1\n")
    corpus, folder = open_corpus(tmp_path, "mine", None)
    with pytest.raises(CorpusError, match=r"none of the files of its 2 rows exists, such as .*x/a\.wav"):
        corpus.read(folder)


def test_parts_of_one_file(tmp_path: Path) -> None:
    header = "path,label,speaker,start_s,end_s\n"
    write(tmp_path, header + "./a.wav,sad,1,,1.5\na.wav,sad,1,1.5,3\na.wav,sad,1,1234.5678,\na.wav,sad,1,,\n")
    found = utterances(tmp_path)
    assert [row.id for row in found] == ["a#-1.5", "a#1.5-3.0", "a#1234.5678-", "a"]
    assert [(row.start_s, row.end_s) for row in found] == [(None, 1.5), (1.5, 3.0), (1234.5678, None), (None, None)]
    assert {row.path for row in found} == {"a.wav"}
    write(tmp_path, header + "a.wav,sad,1,2,1.5\n")
    assert faults(tmp_path) == ["row 2, column end_s, value '1.5': is not after the start, 2.0 s"]


def test_ids_are_unique(tmp_path: Path) -> None:
    put(tmp_path, "a.flac")
    write(tmp_path, "path,label,speaker\na.wav,sad,1\nb.wav,sad,1\na.flac,sad,1\n")
    assert faults(tmp_path) == ["row 4, column id, value 'a': stands in row 2 too; give every row its own id"]
    write(tmp_path, "path,label,speaker,id\na.wav,sad,1,x\nb.wav,sad,1,a\na.flac,sad,1,\n")
    assert faults(tmp_path) == ["row 4, column id, value 'a': stands in row 3 too; give every row its own id"]


def test_folds_are_given_to_all_or_none(tmp_path: Path) -> None:
    write(tmp_path, "path,label,speaker,fold\na.wav,sad,1,1\nb.wav,sad,1,\nc/d.flac,sad,1,2\n")
    assert faults(tmp_path) == ["row 3, column fold, value '': other rows have a fold; give every row one, or none"]
    write(tmp_path, "path,label,speaker,fold\na.wav,sad,1,\nb.wav,sad,1,\n")
    assert open_corpus(tmp_path, "mine", None)[0].default_folds == "speaker"


def parquet(root: Path, **columns: object) -> Path:
    put(root, "a.wav", "b.wav")
    pq.write_table(pa.table({"path": ["a.wav", "b.wav"], **columns}), root / "manifest.parquet")
    return root


def test_parquet_integers_are_text_where_text_is_asked(tmp_path: Path) -> None:
    columns = {"label": pa.array(["sad", "happy"]).dictionary_encode(), "speaker": [3, 12], "fold": [0, 1]}
    numbers = {"valence": [0.5, None], "start_s": [0, 1], "votes:sad": pa.array([2, None], pa.int8())}
    first, second = utterances(parquet(tmp_path, **columns, **numbers))
    assert (first.speaker, first.fold, first.valence, first.votes) == ("3", "0", 0.5, (("sad", 2.0),))
    assert second == Utterance("b#1.0-", "b.wav", "happy", "12", fold="1", start_s=1.0)


def test_parquet_text_keeps_leading_zeros(tmp_path: Path) -> None:
    assert [row.speaker for row in utterances(parquet(tmp_path, label=["sad"] * 2, speaker=["03", "3"]))] == ["03", "3"]


def test_parquet_of_other_types_is_refused(tmp_path: Path) -> None:
    found = faults(parquet(tmp_path, label=["sad", None], speaker=[3.0, 4.0], fold=[True, True], valence=[True, False]))
    assert found[0] == "row 2, column speaker, value 3.0: is of type float; give text"
    assert found[1] == "row 2, column fold, value True: is of type bool; give text"
    assert found[2] == "row 2, column valence, value True: is not a number such as 0.5"
    assert found[3] == "row 3, column label, value '': is blank; every row needs one"


def test_damaged_and_foreign_parquet_is_refused(tmp_path: Path) -> None:
    file = parquet(tmp_path, label=["sad"] * 2, speaker=["1"] * 2) / "manifest.parquet"
    content = file.read_bytes()
    for damaged in (b"", content[:-20], b"path,label,speaker\n"):
        file.write_bytes(damaged)
        with pytest.raises(CorpusError, match="cannot be read as Parquet"):
            open_corpus(file, "mine", None)
    broken = bytearray(content)
    broken[4:40] = bytes(36)
    file.write_bytes(broken)
    with pytest.raises(CorpusError, match="cannot be read as Parquet after row 1"):
        open_corpus(file, "mine", None)
    with pytest.raises(CorpusError, match="unknown column 'audio'"):
        open_corpus(parquet(tmp_path, label=["sad"] * 2, speaker=["1"] * 2, audio=[b"", b""]), "mine", None)


def test_ten_thousand_rows_are_read(tmp_path: Path) -> None:
    put(tmp_path, "s0/u0.wav", "s1/x")
    lines = [
        f"s{row % 2}/u{row}.wav,{'sad' if row % 3 else 'happy'},{row % 40:02d},{row % 5},1" for row in range(10_000)
    ]
    (tmp_path / "manifest.csv").write_text("\n".join(["path,label,speaker,fold,votes:sad", *lines]))
    corpus, folder = open_corpus(tmp_path, "mine", ("sad", "happy"))
    found = list(corpus.read(folder))
    assert len(found) == 10_000
    assert isinstance(found[0], Utterance)
