"""All benchmarks that need no GPU, one after the other; writes benchmarks/results/<date>-<machine>.json and .md.

    python benchmarks/cpu.py [GROUP ...]     # make bench

At most 15 minutes on two cores. Each group runs as a program of its own. Where one fails, the others go on, what it had
measured stays, a row of the result says what failed, and the exit status is 1. A result is written only when all groups
were asked for.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from side_by_side import BUSY, Row, machine, other_load, read_rows, remarks, say, table, write

GROUPS = ("padding", "mixing", "intervals", "losses", "preparing", "ingest", "training")


def main() -> int:
    """Run the groups asked for, or all."""
    asked = sys.argv[1:] or list(GROUPS)
    unknown = set(asked) - set(GROUPS)
    if unknown:
        raise SystemExit(f"no such group: {', '.join(sorted(unknown))}; known are {', '.join(GROUPS)}")
    load, began, rows = other_load(), time.monotonic(), list[Row]()
    if load is not None and load > BUSY:
        say(f"the machine is busy: other work uses {100 * load:.0f} % of its CPUs")
    with tempfile.TemporaryDirectory() as folder:
        for group in asked:
            started, told = time.monotonic(), Path(folder) / f"{group}.json"
            script = Path(__file__).with_name(f"{group}.py")
            done = subprocess.run([sys.executable, str(script), "--json", str(told)], stdout=subprocess.DEVNULL)
            found = read_rows(told) if told.exists() else []
            if done.returncode and not any(row.failed for row in found):
                note = f"failed: the program ended with status {done.returncode}"
                found.append(Row(name=group, unit="", against="", note=note, failed=True))
            say(f"{group}, {time.monotonic() - started:.0f} s\n\n{table(found)}\n\n{remarks(found)}\n")
            rows += found
    if set(asked) == set(GROUPS):
        slug = re.sub(r"[^a-z0-9]+", "-", f"{os.cpu_count()} cpus {machine()['cpu']}".lower()).strip("-")
        say(f"written: {write(rows, slug, 'make bench', time.monotonic() - began, load)}")
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
