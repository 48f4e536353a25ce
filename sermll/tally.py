"""What a campaign shows: its runs merged over seeds, an interval for each row, and rows compared in pairs.

A row is a combination of all axes but `seed` and `fold`. The confusion counts of its seeds are added up, fold by fold
and speaker by speaker. Every seed tests the same utterances: with n_c of class c, k_cs of them right with seed s of R,
the recall of the sums is sum_s k_cs / (R n_c), the mean over s of k_cs / n_c. So UA and WA of summed counts are means
over seeds, whichever speakers are drawn; macro F1 is that of all answers together. Only folds that are finished with
every seed count: a row must not owe its number to a seed that did only the easy ones.

A group is the rows that test the same utterances; its first row is the reference that the others are compared with.
Intervals and p know of speakers, not of seeds, see `sermll.compare`: the spread over seeds stands beside them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sermll import compare, metrics, results
from sermll.errors import DataError
from sermll.files import FRESH_S, failure, fetch_run, naming, read_json
from sermll.storage import fetch, place

Json = dict[str, Any]
Places = Mapping[str, Mapping[int, Path]]
"""For each seed, the folder of each fold."""
SEED, FOLD = "seed", "fold"
COLUMNS = ["utterance", "speaker", "fold", "label", "predicted"]


@dataclass(frozen=True)
class Scores:
    """The numbers of a row, shares from 0 to 1, of the folds that are finished with every seed."""

    selected: Mapping[str, Mapping[str, Any]]
    """By the epoch of `protocol.select`: `value`, `low` and `high` of ua, wa, macro_f1 and their pooled forms."""
    last: Mapping[str, Mapping[str, Any]]
    """The same by the last epoch."""
    chosen_on_test_ua: float
    """No result, but what choosing every epoch on its test fold would have shown."""
    seed_sd: float | None
    """Standard deviation of the seeds' UA; None with one seed."""
    fold_sd: float | None
    """Standard deviation of the folds' UA, mean over seeds; None with one fold."""
    counts: NDArray[np.float64] = field(repr=False)
    """[S, C, C] confusion counts of each fold and speaker, summed over seeds."""
    fold_of: NDArray[np.int64] = field(repr=False)
    """[S] the fold of each of them."""
    speaker_of: NDArray[np.str_] = field(repr=False)
    """[S] the speaker of each of them."""
    tested: Mapping[int, Sequence[tuple[int, str, str]]] = field(repr=False)
    """Utterances and labels of each fold."""
    dev_ua: NDArray[np.float64] = field(repr=False)
    """[epochs] mean over folds and seeds, as far as all of them reached."""


@dataclass(frozen=True)
class Versus:
    """A row's UA minus that of its reference."""

    difference: compare.Difference
    folds: tuple[int, ...]
    """Those that both have finished with every seed."""
    speakers: int
    p_holm: float
    """Corrected over all differences of the campaign."""

    @property
    def verdict(self) -> str:
        """'higher', 'lower' or 'no difference shown'."""
        return compare.verdict(self.difference, self.p_holm)


@dataclass(frozen=True)
class Cost:
    """Hours of the finished folds; None where one was trained by a version that did not tell what it held."""

    wall_h: float = 0.0
    """Each fold from start to end, summed: folds side by side count each."""
    train_h: float = 0.0
    """Of them, in epochs; times what the workers of each epoch held, cpu_h and gpu_h."""
    cpu_h: float | None = 0.0
    gpu_h: float | None = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        cpu_h, gpu_h = (
            None if one is None or two is None else one + two
            for one, two in ((self.cpu_h, other.cpu_h), (self.gpu_h, other.gpu_h))
        )
        return Cost(self.wall_h + other.wall_h, self.train_h + other.train_h, cpu_h, gpu_h)


@dataclass(frozen=True)
class Row:
    """One combination of all axes but seed and fold."""

    labels: Mapping[str, str]
    seeds: int
    facts: Json | None
    """run.json of its first run; None before one has started."""
    codes: frozenset[str]
    """Versions of the code that its runs were made with."""
    asked: int
    """Folds times seeds."""
    finished: int
    failures: tuple[str, ...]
    """Seed, fold and the first line of why."""
    folds: tuple[int, ...]
    """Those finished with every seed."""
    scores: Scores | None
    """None before there is such a fold."""
    cost: Cost
    versus: Versus | None = None
    """None for a reference, and where there are not two speakers to compare by."""

    @property
    def select(self) -> str | None:
        """The rule by which its epochs were chosen; None before a run has started."""
        return self.facts["protocol"]["select"] if self.facts else None

    @property
    def leaks(self) -> list[str]:
        """What stands on two sides of a fold, each in words."""
        return self.facts["protocol"]["leaks"] if self.facts else []


@dataclass(frozen=True)
class Group:
    """Rows that test the same utterances, the reference first; or the rows of which no run has started."""

    title: str
    rows: tuple[Row, ...]

    @property
    def names(self) -> list[str]:
        """The rows, told apart by the axes that vary among them."""
        first = self.rows[0].labels
        axes = [axis for axis in first if len({row.labels[axis] for row in self.rows}) > 1] or list(first)
        return [", ".join(_word(axis, row.labels[axis]) for axis in axes) or "all" for row in self.rows]

    @property
    def smallest_p(self) -> float | None:
        """What the test over so few speakers gives at least, however large a difference; None without differences."""
        speakers = [row.versus.speakers for row in self.rows if row.versus]
        if not speakers:
            return None
        return compare.smallest_p(max(speakers))


@dataclass(frozen=True)
class Tally:
    """A campaign's rows, in groups."""

    folder: Path
    campaign: Json
    """campaign.json."""
    groups: tuple[Group, ...]

    @property
    def rows(self) -> list[Row]:
        """All of them, group by group."""
        return [row for group in self.groups for row in group.rows]

    def as_json(self) -> list[Json]:
        """A flat record for each row, shares from 0 to 1; None where there is no number."""
        return [_record(group, row) for group in self.groups for row in group.rows]


def tally(campaign_dir: Path) -> Tally:
    """Count what the runs of a campaign have finished so far.

    Args:
        campaign_dir: `runs/campaign-<name>`.

    Raises:
        DataError: no campaign, or a file in it or in a run is damaged; the seeds of a row tested different utterances.
    """
    campaign = read(campaign_dir)
    members: dict[tuple[tuple[str, str], ...], list[Json]] = {}
    for cell in campaign["cells"]:
        labels = tuple((axis, value) for axis, value in cell["labels"].items() if axis not in (SEED, FOLD))
        members.setdefault(labels, []).append(cell)
    grouped = _grouped([_row(dict(labels), cells) for labels, cells in members.items()])
    found = [_versus(rows[0], row) for rows in grouped for row in rows]
    corrected = iter(compare.holm([one.difference.p for one in found if one]))
    versus = iter([replace(one, p_holm=next(corrected)) if one else None for one in found])
    groups = [
        Group(title, tuple(replace(row, versus=next(versus)) for row in rows))
        for title, rows in zip(_titles(grouped), grouped, strict=True)
    ]
    return Tally(campaign_dir, campaign, tuple(groups))


def read(campaign_dir: Path) -> Json:
    """Content of campaign.json.

    Raises:
        DataError: there is none, or it is damaged.
    """
    path = Path(campaign_dir) / "campaign.json"
    fetch(path)
    if not path.is_file():
        raise DataError(f"{campaign_dir}: no campaign (no campaign.json); give a folder `campaign-<name>`")
    with naming(path):
        campaign = read_json(path)
        _ = campaign["cells"]
        return campaign


def finished(cell: Json) -> dict[int, Path]:
    """Folders of the folds that a cell asks for and that are finished."""
    run = place(cell["run_dir"])
    fetch_run(run, max_age_s=FRESH_S)
    places = {fold: run / f"fold-{fold}" for fold in cell["folds"]}
    return {fold: place for fold, place in places.items() if (place / "result.json").is_file()}


def _row(labels: Mapping[str, str], cells: Sequence[Json]) -> Row:
    """Merge the cells of a row: its seeds, and its folds where they are an axis."""
    done: dict[str, dict[int, Path]] = {}
    failed, spent = [], Cost()
    for cell in cells:
        seed, places = cell["labels"].get(SEED, ""), finished(cell)
        done[seed] = done.get(seed, {}) | places
        failed += [f"seed {seed}, {failure}" if seed else failure for failure in failures(cell)]
        spent += cost(cell)
    runs = [run for run in dict.fromkeys(place(cell["run_dir"]) for cell in cells) if (run / "run.json").is_file()]
    facts = [_facts(run) for run in runs]
    other = next((run for run, told in zip(runs, facts, strict=True) if _identity(told) != _identity(facts[0])), None)
    if other:
        raise DataError(
            f"{other} and {runs[0]} are seeds of one row and differ in data or folds; give them another axis"
        )
    folds = sorted(set.intersection(*(set(places) for places in done.values())))
    return Row(
        labels=labels,
        seeds=len(done),
        facts=facts[0] if facts else None,
        codes=frozenset(code_in_words(told["code"]) for told in facts),
        asked=sum(len(cell["folds"]) for cell in cells),
        finished=sum(map(len, done.values())),
        failures=tuple(failed),
        folds=tuple(folds),
        scores=_scores(done, folds, facts[0]["data"]["classes"]) if folds else None,
        cost=spent,
    )


def _scores(done: Places, folds: Sequence[int], classes: Sequence[str]) -> Scores:
    chosen, last = (
        {(seed, fold): _answers(done[seed][fold] / name) for seed in done for fold in folds}
        for name in (results.PREDICTIONS, results.LAST_PREDICTIONS)
    )
    tested = {fold: compare.tested(chosen[next(iter(done)), fold]) for fold in folds}
    for (seed, fold), table in chosen.items():
        if compare.tested(table) != tested[fold]:
            raise DataError(
                f"{done[seed][fold]}: its seed was tested on other utterances than the first seed of its row"
            )
    counts, fold_of, speaker_of = results.by_speaker(pa.concat_tables(chosen.values()), classes)
    # UA of each seed and fold, [R, F].
    ua = np.array(
        [[metrics.ua(results.by_speaker(chosen[seed, f], classes)[0].sum(axis=0)) for f in folds] for seed in done]
    )
    histories = []
    for path in (done[seed][fold] / "history.json" for seed in done for fold in folds):
        with naming(path):
            epochs = [(epoch["dev_ua"], metrics.ua(epoch["test_confusion"])) for epoch in read_json(path)]
            histories.append(np.array(epochs, np.float64))
    reached = min(map(len, histories))
    return Scores(
        selected=results.estimate(pa.concat_tables(chosen.values()), classes)[0],
        last=results.estimate(pa.concat_tables(last.values()), classes)[0],
        chosen_on_test_ua=float(np.mean([history[:, 1].max() for history in histories])),
        seed_sd=float(np.std(ua.mean(axis=1), ddof=1)) if len(done) > 1 else None,
        fold_sd=float(np.std(ua, axis=1, ddof=1).mean()) if len(folds) > 1 else None,
        counts=counts,
        fold_of=fold_of,
        speaker_of=speaker_of,
        tested=tested,
        dev_ua=np.mean([history[:reached, 0] for history in histories], axis=0),
    )


def _answers(path: Path) -> pa.Table:
    with naming(path):
        return pq.read_table(path, columns=COLUMNS)


def _facts(run: Path) -> Json:
    with naming(run / "run.json"):
        told = read_json(run / "run.json")
        _ = (
            _identity(told),
            code_in_words(told["code"]),
            *(told["protocol"][key] for key in ("name", "leaks", "select")),
        )
        return told


def _identity(facts: Json) -> tuple[Any, ...]:
    """Data, classes and the speakers tested in each fold; settings of training and choice are left out."""
    data, folds = facts["data"], facts["protocol"]["folds"]
    return data["title"], data["data_hash"], data["classes"], [(fold["fold"], fold["test"]) for fold in folds]


def cost(cell: Json) -> Cost:
    """What the finished folds of a cell took."""
    total = Cost()
    for folder in finished(cell).values():
        with naming(folder / "result.json"):
            result = read_json(folder / "result.json")
            wall_h, train_h = result["wall_s"] / 3600, result["seconds"] / 3600
        with naming(folder / "history.json"):
            history = read_json(folder / "history.json")
            cpu_h, gpu_h = (
                sum((row["train_s"] + row["eval_s"]) * row["workers"] * row[held] for row in history) / 3600
                if all(held in row for row in history)
                else None
                for held in ("cpus_per_worker", "gpus_per_worker")
            )
        total += Cost(wall_h, train_h, cpu_h, gpu_h)
    return total


def failures(cell: Json) -> list[str]:
    """Fold and the first line of why, for the folds of a cell that failed; one that was trained later did not."""
    run = place(cell["run_dir"])
    fetch_run(run, max_age_s=FRESH_S)
    told = {fold: failure(run / f"fold-{fold}") for fold in cell["folds"]}
    return [f"fold {fold}: {why}" for fold, why in told.items() if why is not None]


def _grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that test the same utterances together, those that have not started last.

    A row belongs to the first group that has its data, and its utterances and labels in every fold that both know.
    """
    groups: list[tuple[dict[int, Any], list[Row]]] = []
    for row in rows:
        tested = dict(row.scores.tested) if row.scores else {}
        for known, members in groups if row.facts else []:
            same = _identity(members[0].facts or {}) == _identity(row.facts or {})
            if same and all(known.get(fold, keys) == keys for fold, keys in tested.items()):
                known |= tested
                members.append(row)
                break
        else:
            if row.facts:
                groups.append((tested, [row]))
    waiting = [row for row in rows if row.facts is None]
    return [members for _, members in groups] + ([waiting] if waiting else [])


def _titles(groups: Sequence[Sequence[Row]]) -> list[str]:
    """Data and protocol, and where these are the same the labels that all rows of the group share."""
    facts = [rows[0].facts for rows in groups]
    plain = [
        f"{told['data']['title']}, protocol {told['protocol']['name']}" if told else "not started" for told in facts
    ]
    shared = [
        {axis: value for axis, value in rows[0].labels.items() if all(row.labels[axis] == value for row in rows)}
        for rows in groups
    ]
    return [
        f"{title}, {_words(labels)}" if plain.count(title) > 1 and labels else title
        for title, labels in zip(plain, shared, strict=True)
    ]


def _versus(reference: Row, row: Row) -> Versus | None:
    """The difference to the reference, its p not corrected yet."""
    if row is reference or reference.scores is None or row.scores is None:
        return None
    folds = sorted(set(reference.folds) & set(row.folds))
    theirs, mine = (np.isin(scores.fold_of, folds) for scores in (reference.scores, row.scores))
    speaker_of = row.scores.speaker_of[mine]
    speakers = len(set(speaker_of))
    if speakers < 2:
        return None
    difference = compare.paired_difference(
        reference.scores.counts[theirs],
        row.scores.counts[mine],
        row.scores.fold_of[mine],
        speaker_of,
        compare.SEED,
    )
    return Versus(difference, tuple(folds), speakers, p_holm=difference.p)


def _record(group: Group, row: Row) -> Json:
    def flat(name: str, estimate: Mapping[str, Any]) -> Json:
        ends = {"": "value", "_low": "low", "_high": "high"}
        return {name + end: estimate.get(key) for end, key in ends.items()}

    record: Json = {"group": group.title, **{f"axis_{axis}": value for axis, value in row.labels.items()}}
    for prefix, estimates in (("", row.scores and row.scores.selected), ("last_", row.scores and row.scores.last)):
        for name in metrics.METRICS:
            record |= flat(prefix + name, (estimates or {}).get(name, {}))
    alone = ("seed_sd", "fold_sd", "chosen_on_test_ua")
    record |= {name: getattr(row.scores, name) if row.scores else None for name in alone}
    versus = row.versus
    record |= flat("difference", vars(versus.difference) if versus else {})
    record |= {"p": versus.difference.p if versus else None, "p_holm": versus.p_holm if versus else None}
    record |= {"verdict": versus.verdict if versus else None, "compared_folds": list(versus.folds) if versus else []}
    record |= {"folds": list(row.folds), "finished": row.finished, "asked": row.asked, "failures": list(row.failures)}
    record |= {"leaks": row.leaks, "select": row.select}
    return record | vars(row.cost)


def code_in_words(code: Json) -> str:
    """A version of the code, such as `sermll 0.1.0, commit 0123456789ab, with uncommitted changes`."""
    commit = f", commit {code['commit'][:12]}" if code["commit"] else ""
    return f"sermll {code['version']}{commit}{', with uncommitted changes' if code['dirty'] else ''}"


def _words(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{axis} {value}" for axis, value in labels.items())


def _word(axis: str, value: str) -> str:
    """A value that speaks for itself, or with its axis: `lam`, but `warp 0.1`."""
    alone = value[:1].isalpha() and value.lower() not in ("true", "false", "null", "none", "yes", "no", "on", "off")
    return value if alone else f"{axis.rpartition('.')[2]} {value}"
