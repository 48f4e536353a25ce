"""The frame of every benchmark: two ways of doing one thing, measured in turns, and what came of it as a table.

A group is a module with a function `rows`, and runs alone: `python benchmarks/losses.py`. `benchmarks/cpu.py` runs
all groups that need no GPU and writes benchmarks/results/<date>-<machine>.json with a Markdown table beside it.

Ours and the peer's are measured alternately, each round in the other order, and a ratio is the median over the rounds'
ratios: whatever else the machine does meets both alike. `ours` and `peer` are medians of their own, so that their
quotient may differ from the ratio in the last digit.
"""

import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "torch",
    "transformers",
    "ray",
    "numpy",
    "scipy",
    "pyarrow",
    "soundfile",
    "soxr",
    "audiomentations",
    "pytorch-metric-learning",
    "lhotse",
    "speechbrain",
)
BUSY = 0.25
"""Other work per CPU from which on a machine is called busy."""


@dataclass(frozen=True)
class Target:
    """What a row must reach."""

    sign: Literal["<=", ">="]
    value: float
    of: Literal["ratio", "ours"] = "ratio"

    def met(self, ratio: float | None, ours: float | None) -> bool | None:
        """Whether it is reached; None if there is nothing to judge."""
        found = ratio if self.of == "ratio" else ours
        if found is None:
            return None
        return found <= self.value if self.sign == "<=" else found >= self.value


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    unit: str
    """Of `ours` and `peer`."""
    against: str
    """What the peer is."""
    ours: float | None = None
    """None, as `peer`: not measured, and `note` says why."""
    peer: float | None = None
    ratio: float | None = None
    """As `ratio_is` says, median over rounds."""
    ratio_is: str = ""
    spread: tuple[float, float] | None = None
    """Lowest and highest ratio of a round."""
    target: Target | None = None
    """None: told for what it says about another row."""
    limit: str = ""
    """What physics, or the machine, would allow, and how close this comes."""
    note: str = ""
    failed: bool = False
    """What was to be measured broke off, and `note` says why."""

    @property
    def met(self) -> bool | None:
        """Whether the target is reached, None if there is none or nothing was measured."""
        return self.target.met(self.ratio, self.ours) if self.target else None

    def as_json(self) -> dict[str, Any]:
        """The row for the result file."""
        target = f"{self.target.of} {self.target.sign} {self.target.value:g}" if self.target else None
        return asdict(self) | {"target": target, "met": self.met}


Rounds = dict[str, list[float]]
"""What each way gave in each round."""


def in_turns(ways: dict[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> Rounds:
    """Call every way once a round, in the opposite order in every other round; the first rounds are thrown away."""
    found: Rounds = {name: [] for name in ways}
    for index in range(warm_up + rounds):
        for name in reversed(ways) if index % 2 else ways:
            value = ways[name]()
            if index >= warm_up:
                found[name].append(value)
    return found


def seconds_of(work: Callable[[], Any], least_s: float = 0.1) -> Callable[[], float]:
    """A way that gives the seconds of one call, as the mean over as many calls as make up `least_s`.

    Seconds for which this process had a core, over all of its threads: other work on the machine changes them little.
    """

    def measure() -> float:
        calls, began = 0, time.process_time()
        while True:
            work()
            calls += 1
            passed = time.process_time() - began
            if passed >= least_s:
                return passed / calls

    return measure


def compared(
    found: Rounds,
    ours: str,
    peer: str,
    ratio_is: Literal["peer / ours", "ours / peer"] = "peer / ours",
    *,
    scale: float = 1.0,
    **about: Any,
) -> Row:
    """The row of two ways, whose ratio is taken in each round; `scale` brings what was measured to the row's unit."""
    pairs = list(zip(found[ours], found[peer], strict=True))
    ratios = [mine / theirs if ratio_is == "ours / peer" else theirs / mine for mine, theirs in pairs]
    return Row(
        ours=scale * statistics.median(found[ours]),
        peer=scale * statistics.median(found[peer]),
        ratio=statistics.median(ratios),
        ratio_is=ratio_is,
        spread=(min(ratios), max(ratios)),
        **about,
    )


_broken: dict[str, str] = {}
"""What was raised when a peer's package was imported, where it is installed."""


def optional(name: str) -> Any:  # a module, or None
    """A peer's module, None where it is not installed or cannot be imported."""
    package = name.split(".")[0]
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != package:
            _broken[package] = _first_line(error)
    except Exception as error:  # a peer that does not go with what else is installed may raise anything
        _broken[package] = _first_line(error)
    return None


def missing(package: str) -> str:
    """What a row says whose peer is not installed, or cannot be imported."""
    why = _broken.get(package.replace("-", "_").lower())
    if why:
        return f"not measured: {package} cannot be imported ({why})"
    return f"not measured: {package} is not installed (pip install -c constraints.txt -e '.[bench]')"


def failure(name: str, error: Exception, against: str = "") -> Row:
    """The row of a measurement that broke off; the traceback goes to standard error."""
    traceback.print_exception(error)
    return Row(name=name, unit="", against=against, note=f"failed: {_first_line(error)}", failed=True)


def as_far_as_it_goes(name: str, measured: Iterable[Row]) -> Iterator[Row]:
    """Rows as they come, each told on standard error; if one cannot be had, a last one that says why."""
    try:
        for row in measured:
            sys.stderr.write(f"{row.name}: {row.note if row.ours is None else f'{_number(row.ours)} {row.unit}'}\n")
            yield row
    except Exception as error:  # what was measured before is not lost
        yield failure(name, error)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def cpu_seconds() -> float:
    """Seconds of a core that this process and all that descend from it have used; ended children count, too."""
    import psutil

    total = 0.0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    told = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", told, re.MULTILINE)
    facts: dict[str, Any] = {
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": platform.platform(terse=True),
        "threads": os.environ.get("OMP_NUM_THREADS", "torch's own choice"),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["gpu_memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9)
        facts["cuda"] = torch.version.cuda
    return facts


def versions() -> dict[str, str]:
    """Of Python and of what is compared."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def other_load(over_s: float = 2.0) -> float | None:
    """Share of all CPUs that is in use while this process waits; None where the system does not tell."""
    counters = Path("/proc/stat")
    if not counters.exists():
        return None

    def used() -> tuple[int, int]:
        ticks = [int(word) for word in counters.read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
        return sum(ticks) - ticks[3] - ticks[4], sum(ticks)

    (before, began), _, (after, ended) = used(), time.sleep(over_s), used()
    return round((after - before) / max(1, ended - began), 3)


def table(rows: Iterable[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| what | ours | peer | ratio | must reach | met |", "|---|---|---|---|---|---|"]
    for row in rows:
        spread = "" if row.spread is None else f" ({_number(row.spread[0])} to {_number(row.spread[1])})"
        ratio = "" if row.ratio is None else f"{_number(row.ratio)}{spread}, {row.ratio_is}"
        target = ""
        if row.target is not None:
            target = f"{'ours ' if row.target.of == 'ours' else ''}{row.target.sign} {row.target.value:g}"
        met = "" if row.target is None else {True: "yes", False: "**no**", None: "not measured"}[row.met]
        met = "**failed**" if row.failed else met
        peer = row.against if row.peer is None else f"{_number(row.peer)} {row.unit}: {row.against}"
        ours = "" if row.ours is None else f"{_number(row.ours)} {row.unit}"
        lines.append(f"| {row.name} | {ours} | {peer} | {ratio} | {target} | {met} |")
    return "\n".join(lines)


def remarks(rows: Iterable[Row]) -> str:
    """Limits and notes of the rows, one line each, as Markdown."""
    return "\n".join(
        f"- {row.name}: {' '.join(word for word in (row.limit, row.note) if word)}"
        for row in rows
        if row.limit or row.note
    )


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def write(rows: Sequence[Row], slug: str, command: str, took_s: float, load: float | None) -> Path:
    """Write the result file and its Markdown twin; returns the former."""
    from sermll.source import code_version

    today = datetime.now(UTC).date().isoformat()
    told = {
        "date": today,
        "command": command,
        "took_s": round(took_s),
        "machine": machine() | {"other_load_before": load, "busy": load is not None and load > BUSY},
        "versions": versions(),
        "code": code_version(),
        "rows": [row.as_json() for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{today}-{slug}.json"
    path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    facts = told["machine"]
    what = facts.get("gpu") or f"{facts['cpus']} CPUs, {facts['cpu']}"
    dirty = ", with changes" if told["code"]["dirty"] else ""
    busy = " **The machine was busy with other work.**" if facts["busy"] else ""
    commit = told["code"]["commit"] or "unknown"
    head = (
        f"# {today}, {what}\n\n`{command}`, {took_s / 60:.0f} minutes, commit {commit}{dirty}.{busy} "
        f"{', '.join(f'{name} {number}' for name, number in told['versions'].items())}.\n"
    )
    text = f"{head}\n{table(rows)}\n\n{remarks(rows)}\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return path


def say(text: str) -> None:
    """Print at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def alone(measure: Callable[[], Iterable[Row]]) -> None:
    """Run one group as a program of its own; with --json FILE its rows are written there, too.

    Ends with status 1 if a measurement failed.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = list(as_far_as_it_goes(Path(sys.argv[0]).stem, measure()))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")
    say(table(rows))
    say(remarks(rows))
    sys.exit(any(row.failed for row in rows))


def read_rows(path: Path) -> list[Row]:
    """The rows that `alone` wrote."""
    rows = []
    for fields in json.loads(path.read_text(encoding="utf-8")):
        target = Target(**fields.pop("target")) if fields["target"] else None
        spread = fields.pop("spread")
        fields.pop("target", None)
        rows.append(Row(**fields, target=target, spread=tuple(spread) if spread else None))
    return rows
