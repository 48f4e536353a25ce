"""All benchmarks that need no GPU, one after the other; writes benchmarks/results/<date>-<machine>.json and .md.

    python benchmarks/cpu.py [GROUP ...]     # make bench

At most 15 minutes on two cores. Each group runs as a program of its own. A group that fails is told, the others go on,
and the exit status is 1; a result is written only when all groups were asked for and none failed.
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
    load, began, rows, failed = other_load(), time.monotonic(), list[Row](), list[str]()
    if load is not None and load > BUSY:
        say(f"the machine is busy: other work uses {100 * load:.0f} % of its CPUs")
    with tempfile.TemporaryDirectory() as folder:
        for group in asked:
            started, told = time.monotonic(), Path(folder) / f"{group}.json"
            script = Path(__file__).with_name(f"{group}.py")
            done = subprocess.run([sys.executable, str(script), "--json", str(told)], stdout=subprocess.DEVNULL)
            if done.returncode:
                failed.append(group)
                say(f"{group}: failed with exit status {done.returncode}")
                continue
            found = read_rows(told)
            say(f"{group}, {time.monotonic() - started:.0f} s\n\n{table(found)}\n\n{remarks(found)}\n")
            rows += found
    if not failed and set(asked) == set(GROUPS):
        slug = re.sub(r"[^a-z0-9]+", "-", f"{os.cpu_count()} cpus {machine()['cpu']}".lower()).strip("-")
        say(f"written: {write(rows, slug, 'make bench', time.monotonic() - began, load)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
