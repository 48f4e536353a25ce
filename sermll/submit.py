"""Jobs on a cluster through Ray's Jobs API: the code goes there, data and runs are there already.

What is sent is the sermll that submits and the text files of the working directory: code, experiment files, notes.
Folders of data and results, environments, and what git ignores stay behind. On the cluster the command runs in a copy
of these files, and relative paths of data and runs mean the folder of SERMLL_ROOT, which its machines share.
"""

import asyncio
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sermll.cluster import QUIET
from sermll.config import without_password
from sermll.errors import ConfigError, SermllError
from sermll.source import STAMP, code_version
from sermll.storage import ROOT

CODE = frozenset({".py", ".yaml", ".yml", ".toml", ".txt", ".csv", ".json", ".sh", ".md", ".cfg", ".ini"})
"""Endings of the files that are sent."""
MAX_BYTES = 10_000_000
"""Of all files together, before they are packed."""
RESULTS = ("manifest.json", "run.json", "campaign.json", "search.json", "bank.json", "pyvenv.cfg", "MLmodel")
"""A folder that holds one of these is data, a result or an environment."""
SKIPPED = frozenset(
    {"__pycache__", "node_modules", "site-packages", "tests", "runs", "data", "mlruns", "build", "dist"}
)
SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE", re.IGNORECASE)
"""Names of variables that are not sent: whoever sees the cluster's jobs would see their values."""
POLL_S = 1.0
PATIENCE_S = 60.0
"""How long a cluster that does not answer any more is asked again while a job is followed."""
ENDED = {"SUCCEEDED", "FAILED", "STOPPED"}


@dataclass(frozen=True)
class Job:
    """A job of the cluster, as its API tells it."""

    id: str
    status: str
    command: str
    started: str
    """Date and time of day here; empty: it waits."""
    exit_code: int | None
    message: str


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str | None) -> None:
        """Connect.

        Args:
            address: such as http://head:8265; None: RAY_API_SERVER_ADDRESS, else this machine's.

        Raises:
            SermllError: nobody answers there, or the token is missing or wrong.
        """
        for name in ("RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED"):
            os.environ.setdefault(name, QUIET[name])
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray").setLevel(logging.ERROR)
        self.address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
        if not re.match(r"https?://", self.address):
            raise ConfigError(f"--address {self.address}: give the dashboard's, such as http://head:8265")
        with self._asking():
            self._client = JobSubmissionClient(self.address)

    def submit(
        self,
        arguments: Sequence[str],
        folder: Path,
        root: str,
        variables: Mapping[str, str],
        needed: Sequence[Path] = (),
    ) -> str:
        """Send the code and begin a job.

        Args:
            arguments: of sermll, such as ["train", "experiments/ravdess.yaml"].
            folder: the working directory to send.
            root: what relative paths of data and runs mean on the cluster, a folder or a URI.
            variables: of the environment, for the job and all its workers.
            needed: files below `folder` that the command reads.

        Returns:
            The job's id.

        Raises:
            ConfigError: the code is too large or a needed file would stay here, or a variable or the command holds a
                secret.
        """
        environment = _checked(variables) | {ROOT: root}
        if any(without_password(word) != word for word in [*arguments, root]):
            raise ConfigError(
                "the command holds a password, and whoever sees the cluster's jobs would see it; leave it out of "
                "the URL and set it on the nodes: PGPASSWORD for PostgreSQL, MLFLOW_TRACKING_PASSWORD for MLflow"
            )
        name = f"{arguments[0]}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
        with tempfile.TemporaryDirectory(prefix="sermll-") as staged:
            stage(folder, Path(staged), needed)
            # Jobs that share a package lose their working directory when the first of them ends.
            (Path(staged) / ".job").write_text(name, encoding="utf-8")
            with self._asking():
                return self._client.submit_job(
                    entrypoint=f"python -m sermll {shlex.join(arguments)}",
                    submission_id=name,
                    runtime_env={"working_dir": staged, "env_vars": environment},
                )

    def list(self) -> list[Job]:
        """Jobs that were submitted, the latest last."""
        with self._asking():
            found = self._client.list_jobs()
        told = sorted((job for job in found if job.submission_id), key=lambda job: job.start_time or 0)
        return [_describe(job) for job in told]

    def find(self, job: str) -> Job:
        """One job.

        Raises:
            ConfigError: there is none of this id.
        """
        with self._asking(job):
            return _describe(self._client.get_job_info(job))

    def logs(self, job: str) -> str:
        """Everything that a job has printed so far."""
        self.find(job)
        with self._asking(job):
            return self._client.get_job_logs(job)

    def follow(self, job: str) -> Iterator[str]:
        """What a job prints, as it comes, until it has ended; a lost connection is taken up again.

        Raises:
            SermllError: the cluster does not answer any more.
        """
        shown, last, answered = 0, False, time.monotonic()
        while True:
            text, whole = "", True
            try:
                for part in self._tail(job):
                    text += part
                    if len(text) > shown:  # a connection that was taken up begins at the beginning
                        yield text[shown:]
                        shown = len(text)
            except Exception:  # whatever a connection that breaks raises
                whole = False
            try:
                ended = self.find(job).status in ENDED  # asking tells whether the cluster is still there
                answered = time.monotonic()
            except ConfigError:
                raise
            except SermllError as error:
                if time.monotonic() - answered > PATIENCE_S:
                    raise SermllError(f"{error}, for {PATIENCE_S:g} s; {self.goes_on(job)}") from None
                ended = False
            if ended and (whole or last):
                return
            last = ended  # the connection broke: once more, for its last words
            time.sleep(POLL_S)

    def goes_on(self, job: str) -> str:
        """What becomes of a job that is not followed any more."""
        return f"job {job} goes on; sermll jobs logs {job} --follow --address {self.address} shows it again"

    def _tail(self, job: str) -> Iterator[str]:
        parts = self._client.tail_job_logs(job)
        loop = asyncio.new_event_loop()
        try:
            while (part := loop.run_until_complete(anext(parts, None))) is not None:
                yield part
        finally:
            loop.run_until_complete(parts.aclose())  # pyright: ignore[reportAttributeAccessIssue] - a generator
            loop.close()

    def stop(self, job: str) -> Job:
        """Ask a job to end; its finished epochs are kept."""
        self.find(job)
        with self._asking(job):
            self._client.stop_job(job)
        while (found := self.find(job)).status not in ENDED:
            time.sleep(POLL_S)
        return found

    @contextmanager
    def _asking(self, job: str = "") -> Iterator[None]:
        """Name what goes wrong with a question to the cluster."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError:
            raise SermllError(
                f"{self.address} does not accept this machine's token, or there is none; put the cluster's into "
                "~/.ray/auth_token or RAY_AUTH_TOKEN"
            ) from None
        except (RuntimeError, OSError, ValueError) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()
            if job and "does not exist" in str(error):
                raise ConfigError(f"{self.address} has no job {job}; `sermll jobs list` shows all") from None
            raise SermllError(f"{self.address}: {said[0]}") from None


def _describe(job: Any) -> Job:  # Ray's JobDetails
    began = datetime.fromtimestamp(job.start_time / 1000).strftime("%Y-%m-%d %H:%M") if job.start_time else ""
    command = job.entrypoint.removeprefix("python -m ")
    message = (job.message or "").strip().splitlines()
    return Job(
        job.submission_id, str(job.status.value), command, began, job.driver_exit_code, message[0] if message else ""
    )


def _checked(variables: Mapping[str, str]) -> dict[str, str]:
    for name, value in variables.items():
        if SECRET.search(name) or without_password(value) != value:
            raise ConfigError(
                f"{name} looks like a secret, and whoever sees the cluster's jobs would see it; set it on the nodes "
                "of the cluster, as a Kubernetes Secret or in the environment of `ray start`"
            )
    return dict(variables)


def stage(folder: Path, to: Path, needed: Sequence[Path] = ()) -> int:
    """Copy what a job needs: the text files of a folder, and the sermll that runs.

    Args:
        folder: the working directory.
        to: an empty folder.
        needed: files that must be among them, relative to `folder`.

    Returns:
        Bytes that were copied.

    Raises:
        ConfigError: they are too many, the largest are named; or a needed one is not among them.
    """
    package = Path(__file__).resolve().parent
    files = {path.relative_to(folder): path for path in _code(folder)}
    for name in needed:
        if Path(os.path.normpath(name)) not in files:
            raise ConfigError(f"{name}: would not be sent, {_why_not(folder, name)}; copy it to where code lies")
    files |= {Path("sermll", path.relative_to(package)): path for path in package.rglob("*.py")}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    total = sum(sizes.values())
    if total > MAX_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
        told = "\n".join(f"  {sizes[name] / 1e6:8.1f} MB  {name}" for name in largest)
        raise ConfigError(
            f"{folder}: {total / 1e6:.0f} MB of text files would be sent, at most {MAX_BYTES / 1e6:.0f} are; move "
            f"these away, let git ignore them, or submit from another folder:\n{told}"
        )
    for name, path in files.items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to / name)
    (to / "sermll" / STAMP).write_text(json.dumps(code_version()), encoding="utf-8")
    return total


def _code(folder: Path) -> list[Path]:
    """The text files below a folder that are neither tests, data, results nor an environment's, nor ignored by git."""
    found = []
    for place, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith(".") and name not in SKIPPED)
        below[:] = [name for name in below if not any(Path(place, name, mark).is_file() for mark in RESULTS)]
        found += [Path(place, name) for name in sorted(names) if Path(name).suffix in CODE and not name.startswith(".")]
    ignored = _ignored(folder, found)
    return [path for path in found if path not in ignored and not path.is_symlink()]


def _why_not(folder: Path, name: Path) -> str:
    """Why `_code` leaves a file out."""
    path = folder / name
    if path.suffix not in CODE:
        return f"since its name ends in {path.suffix or 'nothing'}, not in one of {' '.join(sorted(CODE))}"
    if path.is_symlink():
        return "since it is a link"
    if any(part.startswith(".") for part in name.parts):
        return "since a name on its way begins with a dot"
    if _ignored(folder, [path]):
        return "since git ignores it"
    return "since it lies in a folder of tests, data, results or an environment"


def _ignored(folder: Path, files: Sequence[Path]) -> set[Path]:
    """Those of the files that git ignores; none where there is no git or no repository.

    Raises:
        ConfigError: git does not say.
    """
    command = ["git", "-C", str(folder), "check-ignore", "-z", "--stdin"]
    asked = "\0".join(map(str, files))
    try:
        told = subprocess.run(
            command, input=asked, capture_output=True, text=True, timeout=60, env={**os.environ, "LC_ALL": "C"}
        )
    except FileNotFoundError:
        return set()
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{folder}: git does not say within a minute what it ignores; submit from a clone") from None
    if told.returncode > 1 and "not a git repository" not in told.stderr:  # 1: it ignores none of them
        raise ConfigError(f"{folder}: git does not say what it ignores ({told.stderr.strip().splitlines()[0]})")
    return {Path(name) for name in told.stdout.split("\0") if name}
