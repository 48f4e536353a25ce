"""Servers that tests start on this machine: PostgreSQL and MariaDB from their Debian packages, MLflow before one."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from machines import free_port, until

PASSWORD = "s3cr-et"
START_S = 120


@dataclass(frozen=True)
class Postgres:
    """A running PostgreSQL with one superuser."""

    port: int
    user: str = "me"

    def url(self, database: str = "postgres", password: str = PASSWORD) -> str:
        """For SQLAlchemy."""
        return f"postgresql+psycopg2://{self.user}:{password}@127.0.0.1:{self.port}/{database}"


def _binaries() -> Path:
    """Where PostgreSQL's programs lie; the test is skipped where they are absent."""
    found = [Path(program).resolve().parent for program in [shutil.which("initdb")] if program]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    found = [
        folder for folder in found if all((folder / name).exists() for name in ("initdb", "postgres", "pg_isready"))
    ]
    if not found:
        pytest.skip("PostgreSQL is not installed (no initdb on PATH or in /usr/lib/postgresql)")
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed")
    return found[-1]


def _unprivileged(user: str) -> str | None:
    """Whom a server runs as that refuses root: `user` or nobody. None: whoever runs the tests."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return user if user in names else "nobody"


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A new PostgreSQL, with a password, on a port of the loopback interface."""
    binaries, user = _binaries(), _unprivileged("postgres")
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    server = Postgres(free_port())
    (folder / "password").write_text(PASSWORD)
    if user:
        for path in (folder, folder / "password"):
            shutil.chown(path, user)
    options = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}
    make = ["-D", "data", "-U", server.user, "--auth=scram-sha-256", "--pwfile=password", "--no-sync", "-E", "UTF8"]
    told = subprocess.run(
        [str(binaries / "initdb"), *make], cwd=folder, capture_output=True, text=True, check=False, **options
    )
    assert told.returncode == 0, told.stderr
    settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off", "max_connections": 100}
    words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    log = (folder / "log").open("wb")
    process = subprocess.Popen(
        [str(binaries / "postgres"), "-D", "data", "-p", str(server.port), *words],
        cwd=folder,
        stdout=log,
        stderr=subprocess.STDOUT,
        **options,
    )
    ready = [str(binaries / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(server.port)]
    try:
        until(lambda: subprocess.run(ready, check=False).returncode == 0, START_S)
        yield server
    finally:
        process.send_signal(signal.SIGINT)  # a fast shutdown
        process.wait(30)
        shutil.rmtree(folder)


def database(server: Postgres, name: str) -> str:
    """Make an empty database; returns its URL."""
    import psycopg2

    connection = psycopg2.connect(
        host="127.0.0.1", port=server.port, user=server.user, password=PASSWORD, dbname="postgres"
    )
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {name}")
    connection.close()
    return server.url(name)


@dataclass(frozen=True)
class Mariadb:
    """A running MariaDB with one user, whose password stands in a file alone."""

    port: int
    options: Path

    def url(self, database: str) -> str:
        """For SQLAlchemy, without the password."""
        return f"mysql+pymysql://me@127.0.0.1:{self.port}/{database}?read_default_file={self.options}"

    def ask(self, statement: str, *values: object, database: str | None = None) -> tuple[tuple[object, ...], ...]:
        """What a statement gives."""
        import pymysql

        with (
            pymysql.connect(
                host="127.0.0.1", port=self.port, user="me", password=PASSWORD, database=database, autocommit=True
            ) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute(statement, values)
            return cursor.fetchall()


@contextmanager
def mariadb() -> Iterator[Mariadb]:
    """A new MariaDB, with a password, on a port of the loopback interface."""
    install, run = (shutil.which(name) for name in ("mariadb-install-db", "mariadbd"))
    if not install or not run:
        pytest.skip("MariaDB is not installed (no mariadb-install-db or mariadbd on PATH)")
    pytest.importorskip("pymysql", reason="pymysql is not installed")
    user, folder = _unprivileged("mysql"), Path(tempfile.mkdtemp(prefix="my"))
    server = Mariadb(free_port(), folder / "me.cnf")
    server.options.write_text(f"[client]\npassword={PASSWORD}\n")
    server.options.chmod(0o600)
    data = folder / "data"
    data.mkdir()
    folder.chmod(0o755)
    (folder / "begin.sql").write_text(f"CREATE USER me@'%' IDENTIFIED BY '{PASSWORD}';\nGRANT ALL ON *.* TO me@'%';\n")
    words: list[str] = []
    if user:
        shutil.chown(data, user)
        words = [f"--user={user}"]
    made = subprocess.run(
        [install, "--no-defaults", f"--datadir={data}", "--skip-test-db", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    settings = [f"--datadir={data}", f"--port={server.port}", "--bind-address=127.0.0.1", f"--socket={data}/socket"]
    settings += [f"--init-file={folder / 'begin.sql'}", "--innodb-flush-log-at-trx-commit=0"]
    settings += ["--innodb-flush-method=nosync", "--innodb-doublewrite=0", "--sync-frm=0"]
    log = (folder / "log").open("wb")
    process = subprocess.Popen([run, "--no-defaults", *settings, *words], stdout=log, stderr=subprocess.STDOUT)

    def ready() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        with suppress(Exception):  # until it listens, and knows its user
            return server.ask("SELECT 1") == ((1,),)
        return False

    try:
        until(ready, START_S)
        yield server
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(folder)


@dataclass
class Mlflow:
    """`mlflow server` on PostgreSQL, with files in a folder of its own that only the server writes to."""

    backend: str
    artifacts: Path
    log: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen | None = None

    @property
    def uri(self) -> str:
        """Without a password."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Begin, and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={self.port}", "--workers=2"]
        self.process = subprocess.Popen(
            [*command, f"--artifacts-destination={self.artifacts}"],
            env={**os.environ, "MLFLOW_BACKEND_STORE_URI": self.backend},
            cwd=self.log.parent,
            stdout=self.log.open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        until(self.answers, START_S)

    def answers(self) -> bool:
        """Whether it is well."""
        assert self.process and self.process.poll() is None, self.log.read_text()
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """All its processes at once."""
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
