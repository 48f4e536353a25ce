"""One quiet progress bar on a terminal; a line now and then where the output is kept in a file."""

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

LINE_EVERY_S = 30.0


class Progress:
    """Counts `total` things on standard error, so that standard output stays for results."""

    def __init__(self, title: str, total: int, done: int = 0, unit: str = "it") -> None:
        """Start at `done` of `total`; bytes, of the unit "B", are shown as kB, MB and GB."""
        self._title, self._total, self._done = title, total, done
        self._is_terminal = sys.stderr.isatty()
        self._said_at = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=title,
            disable=not self._is_terminal,
            unit=unit,
            unit_scale=unit == "B",
            leave=False,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Self:
        """Nothing to open; see `__exit__`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar off the screen."""
        self._bar.close()

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more are done; `note` is shown behind the bar."""
        self._done += count
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        if not self._is_terminal and time.monotonic() - self._said_at >= LINE_EVERY_S:
            self._said_at = time.monotonic()
            print(f"{self._title}: {self._done} of {self._total}  {note}", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """Print a line without tearing the bar."""
        self._bar.write(line, file=sys.stderr)
