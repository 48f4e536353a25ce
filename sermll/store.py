"""The answers of all runs of a campaign as one Parquet dataset: every utterance by the models that never heard it."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sermll import results, tally
from sermll.errors import DataError
from sermll.files import naming, read_json, whole
from sermll.storage import names, place, remove

FOLDER = "predictions"


def store(campaign_dir: Path) -> Path:
    """Gather the test predictions of the finished folds, one file for each run, by the epochs of their rule.

    A file is written again only if its run has other folds, or has them anew, or the campaign has another name for it.

    Args:
        campaign_dir: `runs/campaign-<name>`.

    Returns:
        The folder, for `pyarrow.parquet.read_table` or pandas: the columns of a run's predictions, `run_id`, `leaks`
        and `axis_<name>` as text, for each axis but `fold`. Empty while nothing is finished.

    Raises:
        DataError: no campaign, a damaged file, or a folder that cannot be written.
    """
    folds: dict[Path, dict[int, Path]] = {}
    columns: dict[Path, dict[str, str]] = {}
    for cell in tally.read(campaign_dir)["cells"]:
        run = place(cell["run_dir"])
        folds[run] = folds.get(run, {}) | tally.finished(cell)
        axes = {f"axis_{axis}": value for axis, value in cell["labels"].items() if axis != tally.FOLD}
        columns[run] = {"run_id": cell["run_id"], **axes}
    folder = Path(campaign_dir) / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        kept = {folder / f"{run.name}.parquet" for run, places in folds.items() if places}
        there = {folder / name for name in names(folder) if name.endswith(".parquet")}
        for path in there - kept:  # of runs that are no longer asked for
            remove(path)
        for run, places in folds.items():
            if places:
                with naming(run / "run.json"):
                    leaks = "; ".join(read_json(run / "run.json")["protocol"]["leaks"])
                _write(folder / f"{run.name}.parquet", dict(sorted(places.items())), columns[run] | {"leaks": leaks})
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error})") from None
    return folder


def _write(path: Path, places: dict[int, Path], columns: dict[str, str]) -> None:
    ended = {fold: (folder / "result.json").stat().st_mtime_ns for fold, folder in places.items()}
    holds = {b"sermll": json.dumps([ended, columns]).encode()}
    if path.exists() and (pq.read_schema(path).metadata or {}).get(b"sermll") == holds[b"sermll"]:
        return
    tables = []
    for folder in places.values():
        with naming(folder / results.PREDICTIONS):
            tables.append(pq.read_table(folder / results.PREDICTIONS))
    table = pa.concat_tables(tables)
    for name, value in columns.items():
        table = table.append_column(name, pa.repeat(value, len(table)))
    with whole(path) as partial:
        pq.write_table(table.replace_schema_metadata(holds), partial)
