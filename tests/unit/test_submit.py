"""What a job is sent: code and experiment files, and neither data, results, environments nor secrets."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sermll import cli, source, storage, submit
from sermll.config import load_experiment
from sermll.errors import ConfigError, DataError, SermllError
from sermll.shards import Prepared
from sermll.submit import Job, Jobs, stage

HERE = Path(__file__).parents[2]


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def sent(folder: Path, to: Path) -> set[str]:
    stage(folder, to)
    found = {str(path.relative_to(to)) for path in to.rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith("sermll/")}


def test_code_goes_and_nothing_else(tmp_path: Path) -> None:
    project = tmp_path / "project"
    write(project, experiments__a_dot_yaml="a", notes_dot_md="b", scripts__c_dot_py="c", corpora__d_dot_csv="d")
    write(project, data__ravdess__manifest_dot_json="no", runs__x__metrics_dot_json="no", elsewhere__run_dot_json="no")
    write(project, elsewhere__config_dot_yaml="no", env__pyvenv_dot_cfg="no", env__lib__x_dot_py="no")
    write(project, x_dot_wav="no", model_dot_safetensors="no")
    (project / ".git").mkdir()
    (project / ".git" / "config.txt").write_text("no")
    (project / ".env").write_text("no")
    (project / "link.py").symlink_to("/etc/passwd")
    expected = {"experiments/a.yaml", "notes.md", "scripts/c.py", "corpora/d.csv"}
    assert sent(project, tmp_path / "staged") == expected


def test_what_git_ignores_stays(tmp_path: Path) -> None:
    project = tmp_path / "project"
    write(project, a_dot_yaml="a", private__b_dot_yaml="b", c_dot_yaml="c")
    (project / ".gitignore").write_text("private/\n")
    assert sent(project, tmp_path / "before") == {"a.yaml", "c.yaml", "private/b.yaml"}
    subprocess.run(["git", "init", "-q", str(project)], check=True)
    assert sent(project, tmp_path / "after") == {"a.yaml", "c.yaml"}  # committed or not


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("private/a.yaml", "git ignores it"),
        ("data/a.yaml", "it lies in a folder of tests, data, results or an environment"),
        ("tests/a.yaml", "it lies in a folder of tests, data, results or an environment"),
        (".hidden/a.yaml", "a name on its way begins with a dot"),
        ("a.experiment", "its name ends in .experiment, not in one of .cfg"),
        ("link.yaml", "it is a link"),
    ],
)
def test_a_file_that_the_command_reads_and_that_would_stay_is_told(name: str, why: str, tmp_path: Path) -> None:
    project = tmp_path / "project"
    write(
        project,
        private__a_dot_yaml="a",
        data__a_dot_yaml="a",
        tests__a_dot_yaml="a",
        a_dot_experiment="a",
        a_dot_yaml="a",
    )
    (project / ".hidden").mkdir()
    (project / ".hidden" / "a.yaml").touch()
    (project / "link.yaml").symlink_to("a.yaml")
    (project / ".gitignore").write_text("private/\n")
    subprocess.run(["git", "init", "-q", str(project)], check=True)
    with pytest.raises(ConfigError) as told:
        stage(project, tmp_path / "staged", [Path("a.yaml"), Path(name)])
    assert f"{name}: would not be sent, since {why}" in str(told.value)
    stage(project, tmp_path / "staged", [Path("./a.yaml")])


def test_git_that_does_not_say_what_it_ignores_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "project", a_dot_yaml="a")
    (tmp_path / "git").write_text("#!/bin/sh\necho 'fatal: detected dubious ownership' >&2; exit 128\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(ConfigError, match=r"does not say what it ignores .*dubious ownership"):
        stage(tmp_path / "project", tmp_path / "staged")


def test_folds_of_a_file_are_needed_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, x_dot_yaml="{name: x, data: {path: data/x}, protocol: {folds: folds.yaml}}", folds_dot_yaml="[]")
    monkeypatch.chdir(tmp_path)
    needed = [
        cli._read_there(cli._parser().parse_args(words), tmp_path)
        for words in (["train", "x.yaml"], ["train", "x.yaml", "protocol.folds=speaker"], ["audit", "d", "folds.yaml"])
    ]
    assert needed == [[Path("x.yaml"), Path("folds.yaml")], [Path("x.yaml")], [Path("folds.yaml")]]


class Flaky(Jobs):
    """A cluster that answers, or does not, as it is told."""

    def __init__(self, answers: list[str]) -> None:
        self.address, self._answers = "http://head:8265", iter(answers)

    def _tail(self, job: str) -> Iterator[str]:
        raise ConnectionError
        yield

    def find(self, job: str) -> Job:
        answer = next(self._answers)
        if answer == "away":
            raise SermllError("http://head:8265: refused")
        if answer == "interrupt":
            raise KeyboardInterrupt
        return Job(job, answer, "", "", 0, "")


def test_a_cluster_that_is_away_for_a_while_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit, "POLL_S", 0.0)
    words = "job x goes on; sermll jobs logs x --follow --address http://head:8265"
    done = ["SUCCEEDED"] * 3
    assert cli._follow(Flaky(["RUNNING", "away", "away", *done]), "x", as_json=False) == 0
    assert cli._follow(Flaky(["RUNNING", "interrupt"]), "x", as_json=False) == 130
    assert words in capsys.readouterr().err
    monkeypatch.setattr(submit, "PATIENCE_S", -1.0)
    with pytest.raises(SermllError, match=f"refused, for -1 s; {words}"):
        cli._follow(Flaky(["RUNNING", "away"]), "x", as_json=False)


def test_the_sermll_that_submits_goes_along_and_knows_its_commit(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    stage(tmp_path / "project", tmp_path / "staged")
    package = HERE / "sermll"
    names = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    found = {str(path.relative_to(tmp_path / "staged" / "sermll")) for path in (tmp_path / "staged").rglob("*.py")}
    assert found == names and "corpora/__init__.py" in found
    told = subprocess.run(
        ["python3", "-c", "from sermll.source import code_version; import json; print(json.dumps(code_version()))"],
        cwd=tmp_path / "staged",
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(told.stdout) == source.code_version()


def test_half_a_gigabyte_of_results_beside_the_code_is_not_sent(tmp_path: Path) -> None:
    project = tmp_path / "project"
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{HERE}", str(project)], check=True)
    for name in ("runs/a-1/history.json", "data/b/shards/0.arrow", "checkpoints/c.safetensors", "elsewhere/notes.csv"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        with (project / name).open("w") as file:
            file.truncate(125 * 2**20)  # sparse
    (project / "elsewhere" / "run.json").write_text("{}")
    assert stage(project, tmp_path / "staged") < 2e6
    assert (tmp_path / "staged" / "experiments" / "ravdess.yaml").is_file()


def test_too_much_is_refused_by_name(tmp_path: Path) -> None:
    project = tmp_path / "project"
    write(project, small_dot_yaml="a", deep__large_dot_csv="")
    with (project / "deep" / "large.csv").open("w") as file:
        file.truncate(11_000_000)
    with pytest.raises(
        ConfigError, match=r"12 MB of text files would be sent, at most 10 are; [^$]*11\.0 MB  deep/large\.csv"
    ):
        stage(project, tmp_path / "staged")
    assert not (tmp_path / "staged").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--env", "MY_API_KEY", "--", "corpora"], "MY_API_KEY looks like a secret"),
        (["--env", "DATABASE", "--", "corpora"], "DATABASE looks like a secret"),
        (["--env", "NOT_SET_HERE", "--", "corpora"], "not set here"),
        (["--root", "s3://AK:secret@lab/x", "--", "corpora"], "the command holds a password"),
        (["--", "audit", "data/x", "folds.yaml"], "not a file below"),
        (["--", "train", "no/such.yaml"], "not a file below"),
        (["--", "train", "/etc/hostname"], "not a file below"),
        (["--", "train", "../outside.yaml"], "not a file below"),
        (["--", "ui"], "ui is for this machine"),
        (["--address", "head:8265", "--", "corpora"], "give the dashboard's"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_sent(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "outside.yaml").touch()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("MY_API_KEY", "x")
    monkeypatch.setenv("DATABASE", "postgresql://me:secret@host/db")
    if "--address" not in words:
        monkeypatch.setattr(Jobs, "__init__", lambda self, address: setattr(self, "address", "nowhere"))
    assert cli.main(["submit", *words]) == 1
    told = capsys.readouterr().err
    assert message in told and "secret@" not in told


def test_wrong_usage_of_the_submitted_verb_is_told_here(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["submit", "--", "train"])
    assert "sermll train" in capsys.readouterr().err


def test_nobody_answering_is_an_error_of_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["jobs", "list", "--address", "http://127.0.0.1:9"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("words", "message"), [(["list", "x"], "takes no job"), (["stop"], "give the job's id")])
def test_jobs_asks_for_an_id_where_one_is_needed(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["jobs", *words]) == 1
    assert message in capsys.readouterr().err


def test_relative_places_are_in_the_root_where_one_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(storage.ROOT, raising=False)
    assert storage.place("runs") == Path("runs")
    monkeypatch.setenv(storage.ROOT, "/shared/me")
    assert storage.place("runs") == Path("/shared/me/runs") and storage.place("/data/x") == Path("/data/x")
    assert storage.place("~/x") == Path.home() / "x"
    with pytest.raises(DataError, match=r"^/shared/me/data/none: no such folder"):
        Prepared.open("data/none")
    assert load_experiment(HERE / "experiments" / "ravdess.yaml", {}).data.path == "data/ravdess"
