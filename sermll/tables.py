"""How numbers are written, and tables for documents: Markdown and LaTeX."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Sequence[str]]

_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}"},
}


def percent(value: float | None, digits: int = 1) -> str:
    """A share of 0..1 in percent; a dash where there is none."""
    if value is None:
        return "—"
    return f"{100 * value:.{digits}f}" if math.isfinite(value) else "not finite"


def with_interval(score: Mapping[str, Any] | None) -> str:
    """A score of 0..1 in percent with the interval from its "low" to its "high", where it has one."""
    if score is None:
        return "—"
    if score.get("low") is None or score.get("high") is None:
        return percent(score["value"])
    return f"{percent(score['value'])} [{percent(score['low'])}, {percent(score['high'])}]"


def leak_notices(leaks: Mapping[str, Sequence[str]]) -> list[str]:
    """What stands beside scores of folds that leak: each leak once, with whose it is unless it is everybody's.

    Args:
        leaks: those of each run, row or cell that is shown, by name.
    """
    owners: dict[str, list[str]] = {}
    for name, those in leaks.items():
        for leak in dict.fromkeys(those):
            owners.setdefault(leak, []).append(name)
    return [
        f"LEAK, scores are too high: {leak}." + (f" This is of {'; '.join(names)}." if len(names) < len(leaks) else "")
        for leak, names in owners.items()
    ]


def cut(line: str, width: int) -> str:
    """The line cut to the terminal, without characters that would steer it."""
    line = "".join(character if character.isprintable() else "?" for character in line)
    return line if len(line) <= width else line[: width - 1] + "…"


def markdown(header: Sequence[str], rows: Rows, notices: Sequence[str] = ()) -> str:
    """A table of plain text cells below its notices; characters that Markdown would read are escaped."""
    lines = [[_markdown(cell) for cell in row] for row in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    above = "".join(f"{_markdown(notice)}\n\n" for notice in notices)
    return above + "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def latex(header: Sequence[str], groups: Sequence[Rows], columns: str, note: str, notices: Sequence[str] = ()) -> str:
    """A booktabs table; a rule stands between groups of rows.

    Args:
        header: one cell for each column.
        groups: rows of plain text cells, group by group.
        columns: letters of the tabular environment, such as "lrr".
        note: a comment above the table.
        notices: what is printed below it.
    """
    bodies = ["\n".join(" & ".join(map(_latex, row)) + r" \\" for row in rows) for rows in groups]
    lines = [
        f"% {note}; needs the package booktabs.",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(map(_latex, header)) + r" \\",
        r"\midrule",
        "\n\\midrule\n".join(bodies),
        r"\bottomrule",
        r"\end{tabular}",
        *(rf"\par {_latex(notice)}" for notice in notices),
    ]
    return "\n".join(lines) + "\n"


def _markdown(cell: str) -> str:
    line = " ".join(cell.split())
    line = "".join(f"\\{character}" if character in "\\`*_<>|#" else character for character in line)
    return line.replace("](", "]\\(")  # a link; other brackets are intervals


def _latex(cell: str) -> str:
    line = "".join(_LATEX.get(character, character) for character in " ".join(cell.split()))
    line = re.sub(r"(?<![\w-])-(?=\d)", "$-$", line)  # a minus, no hyphen
    return f"{{}}{line}" if line.startswith(("[", "*")) else line  # which after \\ would be its argument
