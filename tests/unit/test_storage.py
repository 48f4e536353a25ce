"""Object storage: what is written on one machine is there on another, and what is wrong with it is named."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.fs as fs
import pytest
import yaml
from bucket import object_storage
from prepared import finish, tiny_settings
from pyarrow.fs import FileSystem
from runs import change, with_models, write_campaign, write_run
from sqlalchemy import make_url

from sermll import cli, storage, trials
from sermll.config import Experiment, resolve
from sermll.errors import ConfigError, DataError, StorageError
from sermll.feed import FoldData
from sermll.files import fetch_run, read_json, write_json
from sermll.job import FoldJob
from sermll.results import read_model_settings
from sermll.search import _claim
from sermll.search_plan import Search, load_search
from sermll.shards import Prepared, Waveforms
from sermll.storage import address, fetch, names, origin, place, remove, send, sizes, sqlite, unsent
from sermll.store import store
from sermll.study import Taken
from sermll.track import Tracker, upload
from sermll.train import Designs, Run


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    """One bucket for all tests; each has a prefix of its own."""
    with object_storage() as variables:
        yield variables


Machine = Callable[[str], None]


@pytest.fixture
def machine(server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """`machine("b")`: be another machine from now on, one with a cache of its own."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    storage._system.cache_clear()

    def become(name: str) -> None:
        monkeypatch.setenv(storage.CACHE, str(tmp_path / name))
        storage._looked.clear()

    become("a")
    return become


def test_a_uri_is_a_path_that_knows_where_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage.CACHE, str(tmp_path))
    for uri in ("s3://lab/runs/x", "gs://lab/x"):
        assert origin(place(uri)) == address(place(uri)) == uri
        assert origin(place(uri) / "fold-0") == f"{uri}/fold-0"
    assert place("s3://lab/x/") == place("s3://lab/x") == tmp_path / "s3" / "lab" / "x"
    for path in (tmp_path, tmp_path / "locks", Path("runs"), Path("/data")):
        assert origin(path) == "" and address(path) == str(path)
    assert unsent(Path("/data")) == Path("/data") and origin(unsent(place("s3://lab/x"))) == ""
    monkeypatch.setenv(storage.ROOT, "s3://lab/mine")
    assert address(place("runs")) == "s3://lab/mine/runs" and place("/data") == Path("/data")


@pytest.mark.parametrize("uri", ["ftp://host/x", "https://host/x", "s3://", "s3:///"])
def test_other_uris_are_refused(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StorageError, match="give a folder, or s3://bucket/name or gs://bucket/name"):
        place(uri)
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", uri])
    assert ended.value.code == 2 and "not a place for data or runs" in capsys.readouterr().err


def arrows(uri: str) -> str | None:
    """The place that Arrow, and with it Ray, takes a URI for; None: none."""
    try:
        return FileSystem.from_uri(uri)[1]
    except ValueError:
        return None


@pytest.mark.parametrize("name", ["my runs", "Läufe", "a%20b", "a?b", "a#b", "a[b]"])
def test_names_that_no_uri_has_as_they_are_are_refused(name: str, machine: Machine) -> None:
    with pytest.raises(StorageError, match=r"letters without accents, digits, - _ and \."):
        place(f"s3://lab/{name}/x")
    assert arrows(f"s3://lab/{name}/x") != f"lab/{name}/x"


def test_names_that_uris_have_are_the_same_to_arrow(machine: Machine) -> None:
    name = "Runs_2-a.b~c!$&'()*+,;=:@d"
    assert address(place(f"s3://lab/{name}/x")) == f"s3://lab/{name}/x"
    assert arrows(f"s3://lab/{name}/x") == f"lab/{name}/x"


@pytest.mark.parametrize("uri", ["s3://AKIA0:SEC/RET@lab/x", "s3://AKIA0:SECRET@lab", "gs://me@lab/x"])
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["report", uri])
    told = capsys.readouterr().err
    assert "credentials do not belong into a URI" in told and "AKIA0" not in told and "RET" not in told


def test_relative_places_in_a_folder_that_ray_deletes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(storage.ROOT, raising=False)
    (tmp_path / "_ray_pkg_0a1b" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "_ray_pkg_0a1b" / "sub")
    with pytest.raises(ConfigError, match=r"^runs: .*Ray deletes.*'{\"env_vars\": {\"SERMLL_ROOT\": \"/shared\"}}'"):
        place("runs")
    assert place("/runs") == Path("/runs")
    monkeypatch.setenv(storage.ROOT, "/shared")
    assert place("runs") == Path("/shared/runs")


def test_a_working_directory_that_is_gone_is_asked_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()  # Ray does so when a job has left its cluster, and numbers are still to be written
    assert place(tmp_path / "runs") == tmp_path / "runs"
    monkeypatch.setenv("SERMLL_ROOT", str(tmp_path))
    assert place("runs") == tmp_path / "runs"


@pytest.mark.parametrize("name", ["a%20b", "a?b"])
def test_folders_that_no_sqlite_uri_holds_are_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / name / "x.db"
    with pytest.raises(ConfigError, match="would be looked for elsewhere; give another folder"):
        sqlite(file)
    assert make_url(sqlite(tmp_path / "a #ü" / "x.db")).database == str(tmp_path / "a #ü" / "x.db")
    assert make_url(f"sqlite:///{file}").database != str(file)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StorageError, match=r"/x: the file system has no locks"), storage.locked(tmp_path / "x"):
        pass


def test_a_lock_that_cannot_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(StorageError, match=r"/x: cannot be opened \(Is a directory\)"), storage.locked(tmp_path / "x"):
        pass

    def deny(*arguments: object) -> None:  # root, as whom tests may run, is denied nothing
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(StorageError, match=r"/y: .*Permission denied.* give a"), storage.locked(tmp_path / "y"):
        pass


def test_who_waits_for_a_lock_is_told_once_by_whom_it_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(storage, "QUIET_S", 0.05)

    def wait() -> None:
        with storage.locked(tmp_path / "lock", what="the final runs") as held:
            assert held

    with storage.locked(tmp_path / "lock"):
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.3)
        assert waiting.is_alive()
        with storage.locked(tmp_path / "lock", wait=False) as held:
            assert not held
    waiting.join(10)
    wait()  # of a lock that is free nothing is told
    (line,) = capsys.readouterr().err.splitlines()
    who = f"process {os.getpid()} on {os.uname().nodename}, since "
    assert line.startswith(f"waiting for the final runs: held by {who}") and line.endswith(" UTC")


def test_a_cache_that_somebody_else_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "cache"))
    place("s3://lab/x")
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(StorageError, match="belongs to another user; set SERMLL_CACHE"):
        place("s3://lab/x")


def test_what_one_machine_writes_another_reads(machine: Machine) -> None:
    folder = place("s3://lab/one")
    folder.mkdir(parents=True)
    write_json(folder / "a.json", 1)
    (folder / "sub" / ".hidden").mkdir(parents=True)
    for name in ("sub/b", "sub/.hidden/c", ".d"):
        (folder / name).write_bytes(b"b" * 3_000_000)
    send(folder)
    assert names(folder) == ["a.json", "sub"] and sizes(folder / "sub") == {"b": 3_000_000}
    machine("b")
    there = place("s3://lab/one")
    assert fetch(there) == 2 and fetch(there) == 0
    assert read_json(there / "a.json") == 1 and (there / "sub" / "b").read_bytes() == b"b" * 3_000_000
    assert [path.name for path in there.rglob(".*")] == []
    assert fetch(place("s3://lab/none")) == 0 and names(place("s3://lab/none")) == []


def test_changes_are_seen_unless_an_old_answer_will_do(machine: Machine) -> None:
    file = place("s3://lab/two/a.json")
    file.parent.mkdir(parents=True)
    write_json(file, [1])
    machine("b")
    copy = place("s3://lab/two/a.json")
    assert fetch(copy) == 1
    machine("a")
    write_json(file, [1, 2])
    machine("b")
    assert fetch(copy) == 1 and read_json(copy) == [1, 2]
    machine("a")
    write_json(file, [1, 2, 3])
    machine("b")
    storage._looked[copy] = time.monotonic()
    assert fetch(copy, max_age_s=60) == 0 and read_json(copy) == [1, 2]
    assert fetch(copy) == 1 and read_json(copy) == [1, 2, 3]


@pytest.mark.parametrize("before", [None, b"old and whole"])
def test_what_was_broken_off_is_not_stored_and_what_was_there_before_is_kept(
    before: bytes | None, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = place(f"s3://lab/broken-{before is None}/a")
    file.parent.mkdir(parents=True)
    if before is not None:
        file.write_bytes(before)
        send(file)
    file.write_bytes(os.urandom(30_000_000))
    whole = shutil.copyfileobj

    def interrupted(source: Any, sink: Any, size: int) -> None:
        sink.write(source.read(20_000_000))
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        send(file)
    monkeypatch.setattr(shutil, "copyfileobj", whole)
    assert names(file.parent) == ([] if before is None else ["a"]) and file.stat().st_size == 30_000_000
    machine("b")
    copy = place(f"s3://lab/broken-{before is None}/a")
    fetch(copy)
    assert (copy.read_bytes() if copy.exists() else None) == before
    machine("a")
    send(file)
    machine("b")
    assert fetch(copy) == 1 and copy.read_bytes() == file.read_bytes() and names(copy.parent) == ["a"]


def test_what_is_not_sent_yet_is_not_overwritten(machine: Machine) -> None:
    file = place("s3://lab/three/a.json")
    file.parent.mkdir(parents=True)
    write_json(file, "old")
    later = time.time() + 5
    file.write_text('"new"')
    os.utime(file, (later, later))
    assert fetch(file.parent) == 0 and read_json(file) == "new"


def test_removed_here_is_removed_there_and_an_exact_copy_follows(machine: Machine) -> None:
    folder = place("s3://lab/four")
    for name in ("kept", "gone"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text(name)
    send(folder)
    machine("b")
    copy = place("s3://lab/four")
    fetch(copy)
    (copy / "own").mkdir()
    (copy / "own" / "file").touch()
    machine("a")
    remove(folder / "gone")
    assert names(folder) == ["kept"]
    machine("b")
    fetch(copy)
    assert sorted(path.name for path in copy.iterdir()) == ["gone", "kept", "own"]
    fetch(copy, exact=True)
    assert [path.name for path in copy.iterdir()] == ["kept"]
    remove(place("s3://lab/never"))
    remove(folder / "kept" / "file")
    assert names(folder / "kept") == [] and not (folder / "kept" / "file").exists()


def test_folders_can_be_left_out(machine: Machine) -> None:
    run = place("s3://lab/five")
    for name in ("run.json", "fold-0/history.json", "fold-0/checkpoints/checkpoint_00001/model.safetensors"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")
    send(run)
    machine("b")
    copy = place("s3://lab/five")
    fetch_run(copy)
    assert not (copy / "fold-0" / "checkpoints").exists() and (copy / "fold-0" / "history.json").exists()


def test_several_processes_fetch_a_file_once(machine: Machine, tmp_path: Path) -> None:
    file = place("s3://lab/six/big")
    file.parent.mkdir(parents=True)
    file.write_bytes(os.urandom(5_000_000))
    send(file)
    code = "import sys; from sermll.storage import *; print(fetch(place('s3://lab/six/big')))"
    others = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, storage.CACHE: str(tmp_path / "shared")},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    assert sorted(other.communicate(timeout=60)[0].strip() for other in others) == ["0", "0", "0", "1"]
    assert (tmp_path / "shared/s3/lab/six/big").read_bytes() == file.read_bytes()


def test_storage_that_is_away_is_asked_again_and_then_named(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(storage, "PATIENCE_S", 1.5)
    times = iter([OSError("AWS Error NETWORK_CONNECTION"), OSError("AWS Error SLOW_DOWN"), None])

    def look() -> str:
        fault = next(times)
        if fault:
            raise fault
        return "here"

    monkeypatch.setattr(storage, "PATIENCE_S", 60)
    assert storage._patiently("s3://lab/x", look) == "here" and slept == [1.0, 2.0]
    assert capsys.readouterr().err.count("does not answer") == 1
    monkeypatch.setattr(storage, "PATIENCE_S", 0.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    storage._system.cache_clear()
    with pytest.raises(StorageError, match=r"s3://lab/x: the storage refuses or does not answer.*NETWORK_CONNECTION"):
        fetch(place("s3://lab/x"))
    storage._system.cache_clear()


def test_googles_storage_that_is_away_is_named_in_time(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("CLOUD_STORAGE_EMULATOR_ENDPOINT", "GCE_METADATA_ROOT"):
        monkeypatch.setenv(name, "http://127.0.0.1:9" if name.startswith("CLOUD") else "127.0.0.1:9")
    monkeypatch.setattr(storage, "GOOGLE_RETRIES_S", 0.5)
    monkeypatch.setattr(storage, "PATIENCE_S", 0.5)
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"gs://lab/x: the storage refuses or does not answer, asked for 0\.5 s"):
        fetch(place("gs://lab/x"))
    assert time.monotonic() - began < 20


class GoogleFolders:
    """Google's storage as Arrow shows it: to delete a folder that is not there is a fault."""

    def __init__(self, *files: str) -> None:
        self.files = set(files)

    def get_file_info(self, path: str) -> fs.FileInfo:
        if path in self.files:
            return fs.FileInfo(path, fs.FileType.File, size=1)
        inside = any(file.startswith(f"{path}/") for file in self.files)
        return fs.FileInfo(path, fs.FileType.Directory if inside else fs.FileType.NotFound)

    def delete_file(self, path: str) -> None:
        self.files.remove(path)

    def delete_dir(self, path: str) -> None:
        if self.get_file_info(path).type != fs.FileType.Directory:
            raise OSError(f"No such directory: {path}")
        self.files = {file for file in self.files if not file.startswith(f"{path}/")}


@pytest.mark.parametrize(
    ("removed", "kept"),
    [("file", {"lab/x/file2", "lab/x/sub/a"}), ("sub", {"lab/x/file", "lab/x/file2"}), ("absent", None)],
)
def test_files_folders_and_what_is_not_there_are_removed_from_googles_storage(
    removed: str, kept: set[str] | None, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = GoogleFolders("lab/x/file", "lab/x/file2", "lab/x/sub/a")
    before = set(folders.files)
    monkeypatch.setattr(storage, "_system", lambda scheme, bucket: folders)
    remove(place(f"gs://lab/x/{removed}"))
    assert folders.files == (before if kept is None else kept)


def test_a_denied_access_and_a_missing_bucket_are_told_at_once(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def denied() -> None:
        asked.append(1)
        raise OSError("AWS Error ACCESS_DENIED during PutObject operation: no")

    with pytest.raises(StorageError, match="ACCESS_DENIED"):
        storage._patiently("s3://lab/x", denied)
    assert len(asked) == 1
    file = place("s3://no-such-bucket/x")
    file.parent.mkdir(parents=True)
    file.touch()
    with pytest.raises(StorageError, match="no-such-bucket/x: the storage refuses"):
        send(file)


def test_prepared_data_are_opened_without_their_audio_and_shards_are_verified(
    machine: Machine, tiny_data: Path, tmp_path: Path
) -> None:
    stored = place("s3://lab/data/tiny")
    stored.parent.mkdir(parents=True)
    shutil.copytree(tiny_data, stored)
    send(stored)
    machine("b")
    prepared, local = Prepared.open("s3://lab/data/tiny"), Prepared.open(tiny_data)
    assert prepared.data_hash == local.data_hash and prepared.path == "s3://lab/data/tiny"
    copy = place("s3://lab/data/tiny")
    assert not (copy / "shards").exists()
    prepared.verify()  # fetches nothing
    assert not (copy / "shards").exists()
    shard, row = (prepared.table[name].to_numpy() for name in ("shard", "row"))
    assert (Waveforms(prepared.files, shard, row)[5] == Waveforms(local.files, shard, row)[5]).all()

    machine("a")
    damaged = stored / "shards" / "00000.arrow"
    content = bytearray(damaged.read_bytes())
    content[-2000] ^= 1
    damaged.write_bytes(content)
    send(damaged)
    machine("c")
    damaged_data = Prepared.open("s3://lab/data/tiny")
    for _ in range(2):  # what is damaged is not kept for the second time
        with pytest.raises(DataError, match=r"s3://lab/data/tiny/shards/00000.arrow: the shard is damaged"):
            _ = Waveforms(damaged_data.files, shard, row)[0]
    with pytest.raises(DataError, match=r"s3://lab/data/none: no such folder"):
        Prepared.open("s3://lab/data/none")


def test_runs_on_object_storage_need_a_server_for_mlflow(
    machine: Machine, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def settings(**tracking: object) -> Experiment:
        tree = tiny_settings(tiny_data, Path("runs"))
        return resolve({**tree, "tracking": {"runs": "s3://lab/runs", **tracking}}, {})

    run = Run.of(settings(mlflow=False), Designs())
    assert address(run.folder).startswith("s3://lab/runs/tiny-")
    run.open()
    with pytest.raises(ConfigError, match=r"runs in s3://lab/runs need an MLflow server"):
        Tracker.of(settings(), run.folder)
    Tracker.of(settings(mlflow="http://127.0.0.1:5000"), run.folder)
    machine("b")
    renamed = settings(mlflow=False).model_copy(update={"name": "other"})
    found = Run.of(renamed, Designs())  # begun under another name, on another machine
    assert address(found.folder) == "s3://lab/runs/" + run.folder.name


def test_results_are_in_mlflow_once_whichever_machine_sends_them(machine: Machine, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    settings = {"tracking.experiment": "two", "tracking.mlflow": uri}
    send(with_models(write_run(place("s3://lab/tracked/demo-x"), groups=(("a", "b"),), epochs=2, overrides=settings)))
    machine("b")
    there = place("s3://lab/tracked/demo-x")
    assert upload(there, uri) is None  # the model, too, which only the first machine has had
    machine("c")
    again = place("s3://lab/tracked/demo-x")
    fetch_run(again)
    (again / "mlflow.json").unlink()  # a command on this machine has begun by what it needs alone
    assert Tracker.of(read_model_settings(again), again).finish() is None
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("two")
    assert experiment is not None
    found = {run.info.run_name: run.info.run_id for run in client.search_runs([experiment.experiment_id])}
    assert found.keys() == {"demo-x", "fold-0"} and len(client.search_runs([experiment.experiment_id])) == 2
    model = next((there / "fold-0").rglob("model.safetensors"))
    assert {file.path: file.file_size for file in client.list_artifacts(found["fold-0"], "model")}[
        "model/model.safetensors"
    ] == model.stat().st_size


def test_a_run_that_is_no_longer_asked_for_leaves_the_predictions_in_the_bucket(machine: Machine) -> None:
    axes = {"seed": ("0", "1")}
    campaign = write_campaign(place("s3://lab/stored"), axes, lambda labels: {"seed": int(labels["seed"])})
    store(campaign)
    send(campaign.parent)
    machine("b")
    fetch(place("s3://lab/stored"), without="predictions")
    campaign = place("s3://lab/stored") / campaign.name
    change(campaign / "campaign.json", cells=read_json(campaign / "campaign.json")["cells"][1:])
    store(campaign)
    assert names(campaign / "predictions") == ["demo-000000000001.parquet"]


def a_search(folder: Path, data: Path, space: dict[str, Any]) -> Search:
    """A search of two inner folds, with its trials in s3://lab/searched."""
    folder.mkdir(exist_ok=True)
    settings = {**tiny_settings(data, Path("runs")), "tracking": {"runs": "s3://lab/searched", "mlflow": False}}
    (folder / "x.yaml").write_text(yaml.safe_dump(settings))
    told = {"name": "x", "experiment": "x.yaml", "space": space, "inner_folds": 2, "storage": f"{folder}/x.journal"}
    (folder / "x.search.yaml").write_text(yaml.safe_dump(told))
    return load_search(folder / "x.search.yaml", {})


def test_a_folder_that_another_machine_searches_in_is_refused(
    machine: Machine, tiny_data: Path, tmp_path: Path
) -> None:
    rate, weight = {"optim.lr": {"loguniform": [1e-4, 1e-2]}}, {"losses.focal.weight": {"uniform": [0.1, 2]}}
    for name, space in (("a", rate), ("b", rate), ("c", weight)):
        machine(name)
        search = a_search(tmp_path / "search", tiny_data, space)
        search.folder.mkdir(parents=True)
        if space is rate:
            _claim(search)
        else:
            with pytest.raises(ConfigError, match="holds another search"):
                _claim(search)


def test_inner_folds_that_another_machine_has_finished_are_not_trained_again(
    machine: Machine, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray import tune

    def work() -> tuple[list[FoldJob], list[FoldData]]:
        search = a_search(tmp_path / "search", tiny_data, {"optim.lr": {"loguniform": [1e-4, 1e-2]}})
        inner = search.studies[0]
        prepared, labelled = inner.design.prepared, inner.design.labelled
        folds = [FoldData.of(f"{fold.index}", prepared, labelled, fold.rows) for fold in inner.design.folds.folds]
        return search.jobs(inner, Taken(3, {})), folds

    jobs, folds = work()
    finish(jobs[0], folds[0])
    send(Path(jobs[0].folder))
    machine("b")
    jobs, folds = work()
    trained: list[FoldJob] = []

    def train(job: FoldJob, *words: Any, **named: Any) -> None:
        trained.append(job)
        finish(job, folds[job.fold])

    told: list[dict[str, Any]] = []
    monkeypatch.setattr(trials, "train_fold", train)
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    monkeypatch.setattr(tune, "report", told.append)
    desk = SimpleNamespace(begin=SimpleNamespace(remote=lambda number: jobs))
    mark = place("s3://lab/searched/search-x/fingerprint.json")
    trials._work({"number": 3}, desk, mark, folds, None)
    assert trained == [jobs[1]] and told[0]["note"] == "" and told[0]["seconds"] == 40.0
