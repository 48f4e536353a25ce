"""`sermll prepare`: a corpus folder in, content-hashed Arrow shards out, by Ray Data.

The rows of a corpus are cut into shards before any file is read, so that the same input gives the same shards
whatever the number of workers; a file that fails leaves its shard one row shorter. Everything is written to a
staging folder beside the output, which takes the output's name in one rename once it is whole. A run that was cut
off finds its finished shards there and goes on.
"""

import csv
import glob
import hashlib
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sermll import __version__
from sermll.audio import SAMPLE_RATE_HZ, read_recording
from sermll.cluster import connected, here
from sermll.errors import AudioError, CorpusError, DataError
from sermll.files import write_json
from sermll.progress import Progress
from sermll.rows import Corpus, Problem, Utterance
from sermll.shards import (
    FORMAT,
    HASHED,
    TABLE_SCHEMA,
    Prepared,
    content_hash,
    file_sha256,
    read_shard,
    shard_name,
    write_shard,
)
from sermll.storage import address, fetch, names, origin, send, unsent

TOLD = ("path", "duration_s", "source_rate_hz", "source_channels", "source_encoding")
"""Columns that the manifest sums up, beside those of the data hash."""
UTTERANCES_PER_SHARD = 128
"""Enough for large sequential reads, few enough that a shard of half-minute utterances stays under 130 MB."""
DIGITS = 12
"""Of the input's fingerprint, in the name of a folder whose shards are not finished."""


@dataclass(frozen=True)
class Preparation:
    """What `prepare` made or found."""

    prepared: Prepared
    made: bool
    """False: the folder already held exactly this."""


def prepare(corpus: Corpus, root: Path, out: Path, trim_db: float | None = None) -> Preparation:
    """Decode, resample to 16 kHz and shard a corpus.

    Args:
        corpus: how to read the folder.
        root: the corpus folder.
        out: where the prepared data go; absent, empty, or holding these same data.
        trim_db: cut silent ends this many decibels below the loudest part; None keeps them.

    Raises:
        CorpusError: `root` is not this corpus, or none of its files is usable.
        DataError: `out` cannot be written, or holds something else.
    """
    out = out.expanduser().absolute()
    fetch(root)
    fetch(out / "manifest.json")
    rows, problems = _read_rows(corpus, root)
    source = _fingerprint(corpus, root, rows, problems, trim_db)
    if (out / "manifest.json").exists():
        if "manifest.json" not in names(out):  # made on this machine, and cut off when it was to be stored
            send(out)
        existing = Prepared.open(out)
        if existing.manifest["source"]["fingerprint"] == source:
            return Preparation(existing, made=False)
        raise DataError(
            f"{address(out)} holds data prepared from another input or with other settings "
            f"({existing.corpus}, {existing.table.num_rows} utterances, trim_db={existing.manifest['trim_db']}); "
            "give another --out, or delete it first"
        )
    staging = unsent(out.parent) / f".{out.name}.{source[:DIGITS]}.partial"
    try:
        if names(out):
            raise DataError(f"{address(out)} is not empty and holds no prepared data; give another --out")
        (staging / "shards").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error})") from None
    try:
        _write_shards(root, staging, out, rows, trim_db)
        _write_manifest(corpus, root, staging, rows, problems, trim_db, source)
        if out.exists():
            out.rmdir()
        out.parent.mkdir(parents=True, exist_ok=True)
        os.rename(staging, out)
        send(out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error}); finished shards are kept for the next try") from None
    # All of the digits, as an output of another name may begin with this one's.
    for leftover in staging.parent.glob(f".{glob.escape(out.name)}.{'[0-9a-f]' * DIGITS}.partial"):
        shutil.rmtree(leftover)
    return Preparation(Prepared.open(out), made=True)


def _read_rows(corpus: Corpus, root: Path) -> tuple[list[Utterance], list[Problem]]:
    """The corpus's rows ordered by id, and what could not become one; a repeated id is a problem."""
    rows: dict[str, Utterance] = {}
    problems: list[Problem] = []
    for item in corpus.read(root):
        if isinstance(item, Problem):
            problems.append(item)
        elif item.id in rows:
            problems.append(Problem(item.path, "repeated-id", f"{rows[item.id].path} has the same id {item.id}"))
        else:
            rows[item.id] = item
    if not rows:
        raise CorpusError(f"{root}: no usable file of {corpus.title}; {len(problems)} problems, first: {problems[:1]}")
    return [rows[key] for key in sorted(rows)], problems


def _fingerprint(
    corpus: Corpus, root: Path, rows: Sequence[Utterance], problems: Sequence[Problem], trim_db: float | None
) -> str:
    """Names the input: settings, rows, and each file's size and time of change. Not the data hash: that is content."""
    digest = hashlib.sha256(json.dumps([FORMAT, corpus.name, corpus.classes, trim_db, UTTERANCES_PER_SHARD]).encode())
    for row in rows:
        try:
            stat = (root / row.path).stat()
            size_and_time = (stat.st_size, stat.st_mtime_ns)
        except OSError:  # listed among the problems when its turn comes
            size_and_time = None
        digest.update(json.dumps([_cells(row), size_and_time]).encode())
    digest.update(json.dumps([asdict(problem) for problem in problems]).encode())
    return digest.hexdigest()


def _write_shards(root: Path, staging: Path, out: Path, rows: Sequence[Utterance], trim_db: float | None) -> None:
    """Have Ray Data's workers write every shard that is not there yet."""
    shards = [rows[start : start + UTTERANCES_PER_SHARD] for start in range(0, len(rows), UTTERANCES_PER_SHARD)]
    missing = [index for index in range(len(shards)) if not _is_finished(staging, index)]
    root, target = root.expanduser().absolute(), staging / "shards"

    def write(job: dict[str, Any]) -> dict[str, Any]:
        utterances = [_utterance(row) for row in json.loads(job["utterances"])]
        return _write_one_shard(root, target, int(job["shard"]), utterances, trim_db)

    with Progress("preparing", len(rows)) as progress:
        progress.advance(len(rows) - sum(len(shards[index]) for index in missing))
        if not missing:
            return
        with connected():
            import ray.data

            jobs = [
                {"shard": index, "utterances": json.dumps([_cells(row) for row in shards[index]])} for index in missing
            ]
            # A block per shard, so that no worker holds more than one shard of audio at a time.
            # What is a copy of object storage is on this machine alone.
            where = here() if origin(root) or origin(out) else None
            with _unreserved():
                dataset = ray.data.from_items(jobs, override_num_blocks=len(jobs)).map(
                    write, num_cpus=1, label_selector=where
                )
                for done in dataset.iter_rows():
                    progress.advance(len(shards[done["shard"]]))


@contextmanager
def _unreserved() -> Iterator[None]:
    """Let Ray Data's one step have the whole cluster: half would be kept for other steps, which there are not."""
    import ray.data

    context = ray.data.DataContext.get_current()
    before, context.op_resource_reservation_enabled = context.op_resource_reservation_enabled, False
    try:
        yield
    finally:
        context.op_resource_reservation_enabled = before


def _cells(utterance: Utterance) -> dict[str, Any]:
    """As `asdict` gives them, which takes ten times as long to copy what cannot be changed."""
    return {name: getattr(utterance, name) for name in Utterance.__slots__}


def _utterance(row: dict[str, Any]) -> Utterance:
    """A row that was sent as JSON, which has no tuples."""
    if row["votes"] is not None:
        row["votes"] = tuple((label, count) for label, count in row["votes"])
    return Utterance(**row)


def _is_finished(staging: Path, index: int) -> bool:
    """Whether a shard of an earlier, cut-off run is whole: its bytes are those noted beside it."""
    file = staging / "shards" / shard_name(index)
    try:
        note = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        return note["sha256"] == file_sha256(file)
    except (OSError, ValueError, KeyError):
        return False


def _write_one_shard(
    root: Path, target: Path, index: int, utterances: Sequence[Utterance], trim_db: float | None
) -> dict[str, Any]:
    """Decode a shard's files and write it with a note of its hash and its problems; the note comes last."""
    rows: list[dict[str, Any]] = []
    problems: list[Problem] = []
    for utterance in utterances:
        path = root / utterance.path
        try:
            recording = read_recording(path, trim_db, utterance.start_s, utterance.end_s)
            source_sha256 = file_sha256(path)
        except AudioError as error:
            problems.append(Problem(utterance.path, error.reason, str(error)))
            continue
        except OSError as error:
            problems.append(Problem(utterance.path, "unreadable", str(error)))
            continue
        rows.append(
            _cells(utterance)
            | {
                "num_samples": len(recording.samples),
                "duration_s": len(recording.samples) / SAMPLE_RATE_HZ,
                "source_rate_hz": recording.source_rate_hz,
                "source_channels": recording.source_channels,
                "source_encoding": recording.source_encoding,
                "source_sha256": source_sha256,
                "audio_sha256": hashlib.sha256(recording.samples.tobytes()).hexdigest(),
                "audio": recording.samples,
            }
        )
    file = target / shard_name(index)
    write_shard(file, rows)
    note = {
        "sha256": file_sha256(file),
        "rows": len(rows),
        "problems": [asdict(problem) for problem in problems],
    }
    write_json(file.with_suffix(".json"), note)
    return {"shard": index}


def _write_manifest(
    corpus: Corpus,
    root: Path,
    staging: Path,
    rows: Sequence[Utterance],
    problems: list[Problem],
    trim_db: float | None,
    source: str,
) -> None:
    """Gather the shards' tables and notes into utterances.parquet, problems.csv and manifest.json."""
    folder = staging / "shards"
    shards: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    speakers: Counter[str] = Counter()
    formats: defaultdict[tuple[int, int, str], list[str]] = defaultdict(list)
    by_audio: defaultdict[str, list[str]] = defaultdict(list)
    duration_s = 0.0

    def utterances(writer: pq.ParquetWriter) -> Iterator[dict[str, Any]]:
        nonlocal duration_s
        for index in range(-(-len(rows) // UTTERANCES_PER_SHARD)):
            file = folder / shard_name(index)
            note = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
            problems.extend(Problem(**problem) for problem in note["problems"])
            shards.append(
                {
                    "file": file.name,
                    "rows": note["rows"],
                    "bytes": file.stat().st_size,
                    "sha256": note["sha256"],
                }
            )
            batch = read_shard(file).drop_columns(["audio"])
            place = {"shard": [index] * len(batch), "row": list(range(len(batch)))}
            table = pa.Table.from_batches([batch])
            for name, values in place.items():
                table = table.append_column(name, pa.array(values, pa.int32()))
            writer.write_table(table.cast(TABLE_SCHEMA))
            for row in table.select([*HASHED, *TOLD]).to_pylist():
                counts[row["label"]] += 1
                speakers[row["speaker"]] += 1
                formats[row["source_rate_hz"], row["source_channels"], row["source_encoding"]].append(row["path"])
                by_audio[row["audio_sha256"]].append(row["id"])
                duration_s += row["duration_s"]
                yield row

    with pq.ParquetWriter(staging / "utterances.parquet", TABLE_SCHEMA) as writer:
        data_hash = content_hash(corpus.name, corpus.classes, utterances(writer))
    if not counts:
        raise CorpusError(f"{root}: none of {len(rows)} files is usable; first problem: {problems[0]}")
    for note in folder.glob("*.json"):
        note.unlink()
    problems.extend(_unusual(formats))
    with (staging / "problems.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["path", "reason", "detail", "used"])
        table.writerows(
            (problem.path, problem.reason, problem.detail, "yes" if problem.used else "no") for problem in problems
        )
    manifest = {
        "format": FORMAT,
        "made_by": f"sermll {__version__}",
        "corpus": corpus.name,
        "title": corpus.title,
        "classes": corpus.classes,
        "other_labels": corpus.other_labels,
        "default_labels": corpus.default_labels,
        "default_folds": corpus.default_folds,
        "folds": dict(corpus.folds),
        "licence": corpus.licence,
        "data_hash": data_hash,
        "utterances": sum(counts.values()),
        "hours": round(duration_s / 3600, 4),
        "sample_rate_hz": SAMPLE_RATE_HZ,
        "trim_db": trim_db,
        "counts": {name: counts[name] for name in (*corpus.classes, *corpus.other_labels)},
        "published_counts": dict(corpus.counts),
        "speakers": dict(sorted(speakers.items())),
        "problems": dict(Counter(problem.reason for problem in problems if not problem.used)),
        "noted": dict(Counter(problem.reason for problem in problems if problem.used)),
        "identical_audio": sorted(ids for ids in by_audio.values() if len(ids) > 1),
        "source": {"root": str(root.expanduser().absolute()), "fingerprint": source},
        "shards": shards,
    }
    (staging / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")


def _unusual(formats: dict[tuple[int, int, str], list[str]]) -> list[Problem]:
    """Recordings of another format than most of the corpus: used, but worth a look."""
    usual = max(formats, key=lambda format: len(formats[format]))
    return [
        Problem(path, "format", f"{_format(format)}; most are {_format(usual)}", used=True)
        for format, paths in formats.items()
        if format != usual
        for path in dict.fromkeys(paths)
    ]


def _format(format: tuple[int, int, str]) -> str:
    rate_hz, channels, encoding = format
    return f"{rate_hz} Hz, {channels} channel{'' if channels == 1 else 's'}, {encoding}"
