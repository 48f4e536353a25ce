"""From run folders to a table for the terminal, pictures for slides, and a page that needs nothing beside it.

A run that is not finished is reported as far as it got, and says so. Numbers are those of the run's own
files; what is computed here is only what they do not hold: sums of confusion matrices and scores of speakers.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray

from sermll import metrics, page, pictures
from sermll.config import flatten
from sermll.errors import DataError
from sermll.files import FRESH_S, failure, fetch_run, naming, read_json, read_yaml
from sermll.storage import address, send
from sermll.tables import cut, leak_notices, percent, with_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Json = dict[str, Any]
_T = TypeVar("_T")

PICTURES = ("confusion", "curves", "dev_ua", "speakers", "embedding", "calibration")
"""Stems of the pictures `build` writes, each as PNG and SVG."""


@dataclass(frozen=True)
class Published:
    """Numbers of the paper, in percent, for a corpus and protocol."""

    classes: str
    """The corpus's labels that are told apart; those joined by + are one class."""
    utterances: int
    folds: int
    ua: float
    wa: float | None
    unstated: str = "how its epochs were chosen"
    """What the paper does not tell about how the numbers came about."""


PUBLISHED: dict[tuple[str, str], Published] = {
    ("iemocap", "session"): Published(classes="ang hap+exc neu sad", utterances=5531, folds=5, ua=79.14, wa=78.47),
    ("msp_improv", "session"): Published(
        classes="angry happy neutral sad", utterances=7798, folds=6, ua=58.34, wa=58.55
    ),
    ("ravdess", "hicmae"): Published(
        classes="neutral calm happy sad angry fearful disgust surprised",
        utterances=1440,
        folds=6,
        ua=92.28,
        wa=93.40,
        unstated="how its epochs were chosen, and which actors form a fold",
    ),
    ("savee", "speaker"): Published(
        classes="neutral anger disgust fear happiness sadness surprise", utterances=480, folds=4, ua=72.3, wa=None
    ),
}
"""Results of Wang et al., Interspeech 2026 (doi 10.21437/Interspeech.2026-1219), by corpus and protocol."""

_LOSSES = {"kl": "KL", "focal": "focal", "center": "center", "supcon": "SupCon"}
_SCORES = {"ua": "UA", "wa": "WA", "macro_f1": "macro F1"}


@dataclass(frozen=True)
class Predictions:
    """Test utterances of the finished folds, by the model of the chosen epoch."""

    speakers: tuple[str, ...]
    """N speakers."""
    folds: NDArray[np.int64]
    """[N]"""
    labels: NDArray[np.int64]
    """[N] true classes."""
    predicted: NDArray[np.int64]
    """[N] recognised classes."""
    embeddings: NDArray[np.float64]
    """[N, D]; D is 0 if the run kept none. Each fold's model has a space of its own."""


@dataclass(frozen=True)
class Run:
    """What a run folder holds; see `load`."""

    folder: Path
    facts: Json
    """run.json: identity, code, data and folds."""
    settings: Json
    """config.yaml: the resolved settings."""
    scores: Json | None
    """metrics.json; None before it is written."""
    histories: Mapping[int, Mapping[str, NDArray[np.float64]]]
    """For each fold that was started, its curves [epochs]; NaN where a value is missing or not finite."""
    results: Mapping[int, Json]
    """For each finished fold, its epochs and chosen epoch, and its scores once metrics.json is written."""
    failures: Mapping[int, str]
    """For each fold that could not be trained, why."""
    predictions: Predictions | None
    warnings: tuple[str, ...]
    """What a reader must know before trusting the numbers, one sentence each."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of every matrix."""
        return tuple(self.facts["data"]["classes"])

    @property
    def folds(self) -> list[Json]:
        """The protocol's folds: `fold`, and the speakers of `test`, `dev` and `train`."""
        return self.facts["protocol"]["folds"]

    @property
    def complete(self) -> bool:
        """Whether every fold of the protocol is in the scores."""
        return self.scores is not None and len(self.scores["folds"]) == len(self.folds)

    @property
    def progress(self) -> str:
        """How many folds are finished, and which of them the scores are of."""
        finished = f"{len(self.results)} of {page.count(self.folds, 'fold')} finished"
        finished += f", {len(self.failures)} failed" if self.failures else ""
        scored = [str(fold["fold"]) for fold in self.scores["folds"]] if self.scores else []
        if self.complete or not scored:
            return finished + ("" if scored else ", no scores yet")
        return f"{finished}; the scores are of fold {', '.join(scored)} alone"

    def reached(self, fold: int) -> int:
        """How many epochs a fold has behind it."""
        return len(self.histories[fold]["loss"]) if fold in self.histories else 0

    def confusion(self) -> NDArray[np.int64] | None:
        """[C, C] test utterances summed over the scored folds, true class by recognised class."""
        if not self.scores or not self.scores["folds"]:
            return None
        return np.sum([fold["confusion"] for fold in self.scores["folds"]], axis=0)


def load(path: Path) -> Run:
    """Read a run folder, finished or not.

    Args:
        path: `runs/<name>-<run id>`.

    Raises:
        DataError: not a run folder, or a file in it is damaged; the message names it.
    """
    path = Path(path)
    fetch_run(path, max_age_s=FRESH_S)
    for name in ("run.json", "config.yaml"):
        if not (path / name).is_file():
            raise DataError(f"{address(path)}: not a run folder (no {name}); give the folder printed by `sermll train`")
    facts = _read_json(path / "run.json", dict)
    with naming(path / "run.json"):
        classes = [str(name) for name in facts["data"]["classes"]]
        numbers = [int(fold["fold"]) for fold in facts["protocol"]["folds"]]
        _ = (
            facts["run_id"],
            facts["name"],
            facts["protocol"]["name"],
            facts["data"]["corpus"],
            facts["data"]["title"],
        )
        warnings = leak_notices({facts["name"]: facts["protocol"]["leaks"]})
        warnings += _label_notes(facts["data"])
    settings = _of_kind(dict, path / "config.yaml", read_yaml(path / "config.yaml"))

    histories: dict[int, Mapping[str, NDArray[np.float64]]] = {}
    results: dict[int, Json] = {}
    failures: dict[int, str] = {}
    for number in numbers:
        history, result = path / f"fold-{number}" / "history.json", path / f"fold-{number}" / "result.json"
        if history.is_file():
            with naming(history):
                histories[number] = _curves(_read_json(history, list))
            warnings += _gaps(number, histories[number])
        if result.is_file():
            results[number] = _read_json(result, dict)
        if (why := failure(path / f"fold-{number}")) is not None:
            failures[number] = why
    scores = _read_scores(path / "metrics.json", classes) if (path / "metrics.json").is_file() else None
    for fold in scores["folds"] if scores else []:
        results[int(fold["fold"])] = results.get(int(fold["fold"]), {}) | fold
    parquet = path / "predictions.parquet"
    predictions = _read_predictions(parquet, classes) if parquet.is_file() else None
    if predictions is not None and not np.isfinite(predictions.embeddings).all():
        count = int((~np.isfinite(predictions.embeddings)).any(axis=1).sum())
        warnings.append(f"{count} embeddings are not finite; they are left out of the map.")
    results = dict(sorted(results.items()))
    return Run(path, facts, settings, scores, histories, results, failures, predictions, tuple(warnings))


def _read_json(path: Path, kind: type[_T]) -> _T:
    return _of_kind(kind, path, read_json(path))


def _of_kind(kind: type[_T], path: Path, value: object) -> _T:
    if not isinstance(value, kind):
        raise DataError(f"{path}: damaged (a {type(value).__name__} where a {kind.__name__} should be)")
    return value


def _read_scores(path: Path, classes: Sequence[str]) -> Json:
    scores = _read_json(path, dict)
    with naming(path):
        for fold in scores["folds"]:
            _ = int(fold["fold"])
            if np.shape(fold["confusion"]) != (len(classes), len(classes)):
                raise ValueError(f"the confusion matrix is {np.shape(fold['confusion'])}, with {len(classes)} classes")
    return scores


def _label_notes(data: Json) -> Iterator[str]:
    """What a reader must know of the labels: which utterances were left out, and which had no clear majority."""
    if data["dropped"]:
        named = ", ".join(f"{label} {count}" for label, count in data["dropped"].items())
        yield f"{sum(data['dropped'].values())} utterances have no class in label space {data['space']}: {named}."
    if data["ties"]:
        yield f"{page.count(range(data['ties']), 'utterance')} had no majority: equal votes, see data.targets."


def _curves(epochs: Sequence[Json]) -> dict[str, NDArray[np.float64]]:
    """Curves [epochs] of a history: the sum `loss`, every weighted term, `dev_loss` and `dev_ua`."""
    length = max((int(epoch["epoch"]) for epoch in epochs), default=-1) + 1
    terms = sorted(
        {key for epoch in epochs for key in epoch if key.startswith("loss_")},
        key=lambda key: ([*_LOSSES, key.removeprefix("loss_")].index(key.removeprefix("loss_")), key),
    )
    curves = {name: np.full(length, np.nan) for name in ("loss", *terms, "dev_loss", "dev_ua")}
    for epoch in epochs:
        for name, values in curves.items():
            value = epoch.get(name)
            if value is not None and name in terms:
                value *= epoch[name.replace("loss_", "weight_")]
            if value is not None and math.isfinite(value):
                values[int(epoch["epoch"])] = value
    return curves


def _gaps(fold: int, curves: Mapping[str, NDArray[np.float64]]) -> Iterator[str]:
    for name, values in curves.items():
        missing = (np.flatnonzero(np.isnan(values)) + 1).tolist()
        if missing:
            epochs = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
            yield f"Fold {fold}: {name} is missing or not finite in epoch {epochs}."


def _read_predictions(path: Path, classes: Sequence[str]) -> Predictions:
    import pyarrow.parquet as pq

    columns = ["speaker", "fold", "label", "predicted", "embedding"]
    with naming(path):
        with pq.ParquetFile(path) as file:
            absent = [name for name in columns if name not in file.schema_arrow.names]
            if absent:
                raise DataError(f"{path}: no column {', '.join(absent)}; was it written by another version?")
            table = file.read(columns)
        labels, predicted = (
            np.array([classes.index(name) for name in table.column(column).to_pylist()], dtype=np.int64)
            for column in ("label", "predicted")
        )
        rows = len(table)
        flat = table.column("embedding").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        embeddings = np.asarray(flat, dtype=np.float64).reshape(rows, -1 if rows else 0)
        folds = table.column("fold").to_numpy().astype(np.int64)
    return Predictions(tuple(map(str, table.column("speaker").to_pylist())), folds, labels, predicted, embeddings)


def text_table(run: Run) -> str:
    """The run's results for the terminal, at most 100 columns wide."""
    lines = [f"{run.facts['name']}  {run.facts['data']['title']}, {_protocol(run)}"]
    lines.append(f"run {run.facts['run_id']}, {len(run.classes)} classes, chance UA {percent(1 / len(run.classes))} %")
    if not run.complete:
        lines.append(run.progress)
    lines += [f"WARNING: {warning}" for warning in run.warnings]
    lines += ["", f"{'fold':<6}{'UA':>6}{'WA':>8}{'macro F1':>10}{'epoch':>12}{'minutes':>10}  test speakers"]
    for fold in run.folds:
        number = fold["fold"]
        result = run.results.get(number)
        if result is None:
            reached = page.count(range(run.reached(number)), "epoch")
            lines.append(f"{number:<6}{_state(run, number)}" + (f", {reached} so far" if run.reached(number) else ""))
            continue
        scores = [percent(result.get(name)) for name in _SCORES]
        epoch = f"{_epoch(result.get('best_epoch'))} of {result['epochs']}" if "epochs" in result else "—"
        minutes = _minutes(result)
        row = f"{number:<6}{scores[0]:>6}{scores[1]:>8}{scores[2]:>10}{epoch:>12}{minutes:>10}  "
        lines.append(row + " ".join(_tested(fold)))
    for number, why in run.failures.items():
        lines += ["", *wrap(f"fold {number} failed: {why}", 100, subsequent_indent="  ")]
    if run.scores and run.scores.get("selected"):
        lines += ["", f"{'mean of folds':<24}" + "".join(f"{name:<22}" for name in _SCORES.values()).rstrip()]
        for key, title in _epochs(run).items():
            cells = [with_interval(run.scores[key].get(name)) for name in _SCORES]
            lines.append(f"{title.removeprefix('epoch '):<24}" + "".join(f"{cell:<22}" for cell in cells).rstrip())
        if "calibration" in run.scores:
            before, after = (with_interval(run.scores["calibration"][name]) for name in ("ece", "ece_scaled"))
            lines.append(f"{'calibration':<24}ECE {before}, with temperature {after}")
        if "chosen_on_test_ua" in run.scores:
            value = percent(run.scores["chosen_on_test_ua"])
            lines.append(f"no result, but what choosing each epoch on its test fold would have shown: UA {value}")
    return "\n".join(cut(line, 100) for line in lines) + "\n"


def build(paths: Sequence[Path], out: Path) -> Path:
    """Write `out`/index.html and the pictures, those of several runs in a folder for each.

    The page holds everything it shows. The same runs give the same bytes.

    Args:
        paths: run folders, in the order they are to be shown.
        out: folder to write into; made if it is missing.

    Returns:
        Path of the page.

    Raises:
        DataError: no run was given, one of them is not a run folder, or `out` is not a folder.
    """
    runs = [load(path) for path in paths]
    if not runs:
        raise DataError("no run to report; give one or more folders printed by `sermll train`")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: not a folder; give a folder for the report")
    titles = _titles(runs)
    sections = []
    for run, title in zip(runs, titles, strict=True):
        folder = out if len(runs) == 1 else out / title
        folder.mkdir(parents=True, exist_ok=True)
        sections.append(_section(run, title, _draw(run, folder), heading="h1" if len(runs) == 1 else "h2"))
    if len(runs) > 1:
        sections.insert(0, _comparison(runs, titles))
    path = out / "index.html"
    path.write_text(page.page(" · ".join(titles), [*sections, _glossary(runs)]), encoding="utf-8", newline="\n")
    send(out)
    return path


def _titles(runs: Sequence[Run]) -> list[str]:
    """Folder names, told apart where two are the same: a run repeated elsewhere has the same name and id."""
    seen: Counter[str] = Counter()
    titles = []
    for run in runs:
        name = run.folder.resolve().name
        seen[name] += 1
        titles.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return titles


def _draw(run: Run, folder: Path) -> dict[str, bytes]:
    """Write the pictures that the run has data for; others, of an earlier report, are removed."""
    drawings = _drawings(run)
    for stem in PICTURES:
        if stem not in drawings:
            for ending in (".png", ".svg"):
                (folder / (stem + ending)).unlink(missing_ok=True)
    return {stem: pictures.save(folder / stem, draw) for stem, draw in drawings.items()}


def _drawings(run: Run) -> "dict[str, Callable[[], Figure]]":
    drawings: dict[str, Callable[[], Figure]] = {}
    chance = 1 / len(run.classes)
    counts = run.confusion()
    if counts is not None:
        drawings["confusion"] = partial(pictures.confusion, counts, metrics.recalls(counts), run.classes)
    started = {fold: curves for fold, curves in run.histories.items() if len(curves["loss"])}
    if started:
        names = {name: None for curves in started.values() for name in curves if name != "dev_ua"}
        terms = {
            _curve_title(name): {fold: curves[name] for fold, curves in started.items() if name in curves}
            for name in sorted(names, key=lambda name: name == "dev_loss")
        }
        drawings["curves"] = partial(pictures.curves, terms)
        chosen = {fold: int(result["best_epoch"]) for fold, result in run.results.items() if "best_epoch" in result}
        by_fold = {fold: curves["dev_ua"] for fold, curves in started.items()}
        drawings["dev_ua"] = partial(pictures.dev_ua, by_fold, chosen, chance)
    told = run.predictions
    if told is not None and told.speakers:
        groups = sorted(set(zip(told.speakers, told.folds.tolist(), strict=True)))
        names = np.array(told.speakers)
        confusions = [
            metrics.confusion(told.labels[rows], told.predicted[rows], len(run.classes))
            for rows in ((names == speaker) & (told.folds == fold) for speaker, fold in groups)
        ]
        speakers, folds = zip(*groups, strict=True)
        drawings["speakers"] = partial(pictures.speakers, speakers, metrics.ua(confusions), folds, chance)
        finite = np.isfinite(told.embeddings).all(axis=1)
        if told.embeddings.shape[1] and finite.any():
            points = {}
            for fold in sorted(set(told.folds[finite].tolist())):
                rows = finite & (told.folds == fold)
                points[fold] = (told.embeddings[rows], told.labels[rows])
            drawings["embedding"] = partial(pictures.embedding, points, run.classes)
    measured = (run.scores or {}).get("calibration")
    if measured:
        drawings["calibration"] = partial(
            pictures.reliability,
            {
                title: {name: np.array(values, np.float64) for name, values in measured[key].items()}  # None is NaN
                for key, title in (("reliability", "as it is"), ("reliability_scaled", "with temperature"))
            },
        )
    return drawings


def _curve_title(name: str) -> str:
    if name == "loss":
        return "total loss"
    if name == "dev_loss":
        return "dev loss"
    term = name.removeprefix("loss_")
    return _LOSSES.get(term, term)


def _section(run: Run, title: str, drawn: Mapping[str, bytes], heading: str) -> page.Html:
    """Everything about one run."""
    return page.tag(
        "section",
        _headline(run, heading),
        *_score_tables(run),
        *_pictures(run, drawn),
        *_calibration(run, drawn),
        *_published(run),
        *_how(run),
        id=title,
    )


def _headline(run: Run, heading: str) -> page.Html:
    data, chance = run.facts["data"], 1 / len(run.classes)
    size = [f"{data['utterances']:,} utterances"] if "utterances" in data else []
    size += [f"{data['hours']:.1f} hours"] if "hours" in data else []
    size += [f"{len(run.classes)} classes"]
    lines = [
        page.tag(heading, run.facts["name"], " ", page.tag("small", run.facts["run_id"])),
        page.tag("p", page.tag("strong", data["title"]), f" ({', '.join(size)}). {_protocol(run, in_full=True)}"),
    ]
    if run.scores and run.scores.get("selected"):
        score = run.scores["selected"]["ua"]
        interval = (
            "No interval: fewer than two speakers were tested"
            if score.get("low") is None
            else f"95 % interval {percent(score['low'])} to {percent(score['high'])} %, by bootstrap over speakers"
        )
        number = page.tag("span", f"UA {percent(score['value'])} %", class_="score")
        lines.append(
            page.tag(
                "p",
                number,
                f"Mean over folds, {_epochs(run)['selected']}. {interval}. Chance {percent(chance)} %.",
                class_="result",
            )
        )
    if not run.complete:
        lines.append(page.tag("p", f"{run.progress}.", class_="notice"))
    lines += [page.tag("p", warning, class_="notice") for warning in run.warnings]
    return page.tag("header", *lines)


def _protocol(run: Run, in_full: bool = False) -> str:
    """The protocol in words; the promise about speakers is made only where the fold lists keep it."""
    protocol = run.facts["protocol"]
    count = page.count(run.folds, "fold")
    if not in_full:
        return f"protocol {protocol['name']}: {count}"
    held = sorted({len(fold["dev"]) for fold in run.folds})
    dev = " to ".join(map(str, sorted({held[0], held[-1]}))) if held else "0"
    promise = (
        "which leak between training and test, see below" if _leaks(run) else "test speakers never in training or dev"
    )
    rule = {"dev_ua": "chosen by UA", "dev_loss": "chosen by loss", "last": "the last one, watched"}[protocol["select"]]
    return (
        f"Protocol {protocol['name']}: {count}, {promise}; the epoch is {rule} on {dev} "
        f"dev speaker{'' if dev == '1' else 's'} held back from training."
    )


def _epochs(run: Run) -> dict[str, str]:
    """By which epoch each part of the scores is; where the last is the rule, it is told once."""
    if run.facts["protocol"]["select"] == "last":
        return {"selected": "last epoch"}
    last = {"last": "last epoch"} if run.scores and "last" in run.scores else {}  # an ensemble has none
    return {"selected": "epoch chosen on dev"} | last


def _score_tables(run: Run) -> Iterator[page.Html]:
    if run.scores and run.scores.get("selected"):
        yield page.tag("h3", "Scores")
        kinds = _epochs(run)
        rows = [
            (
                f"{name}, {kind}",
                *(with_interval(run.scores[which].get(prefix + key)) for which in kinds),
            )
            for prefix, kind in (("", "mean over folds"), ("pooled_", "pooled"))
            for key, name in _SCORES.items()
        ]
        yield page.table(("in %", *kinds.values()), rows)
        if "chosen_on_test_ua" in run.scores:
            value, honest = run.scores["chosen_on_test_ua"], run.scores["selected"]["ua"]["value"]
            yield page.tag(
                "p",
                f"Had the epoch of each fold been chosen on its test fold, the mean UA would read {percent(value)} %, "
                f"{percent(value - honest)} points higher. This is no result: it tells how far published numbers may "
                "be lifted where the choice of the epoch is not stated.",
            )
    yield page.tag("h3", "Folds")
    rows = []
    for fold in run.folds:
        number, result = fold["fold"], run.results.get(fold["fold"])
        who = ", ".join(_tested(fold))
        if result is None:
            rows.append((number, "—", "—", _state(run, number), run.reached(number), "—", who))
        else:
            score = (percent(result.get("ua")), percent(result.get("wa")))
            epochs = (_epoch(result.get("best_epoch")), result.get("epochs", "—"))
            rows.append((number, *score, *epochs, _minutes(result), who))
    yield page.table(
        ("fold", "UA\u00a0%", "WA\u00a0%", "chosen epoch", "epochs", "minutes", "test speakers"),
        rows,
        words=(0, 6),
    )
    for number, why in run.failures.items():
        yield page.tag("p", f"Fold {number} failed: {why}", class_="notice")


def _state(run: Run, fold: int) -> str:
    """What there is to say of a fold that is not finished."""
    if fold in run.failures:
        return "failed"
    return "not finished" if run.reached(fold) else "not started"


def _tested(fold: Json) -> list[str]:
    """Test speakers of a fold; across corpora they are too many to be named."""
    if "test_corpora" in fold and len(fold["test"]) > 12:
        return [f"{len(fold['test'])} of {', '.join(fold['test_corpora'])}"]
    return [str(name) for name in fold["test"]]


def _pictures(run: Run, drawn: Mapping[str, bytes]) -> Iterator[page.Html]:
    folds = page.count(run.scores["folds"] if run.scores else [], "finished fold")
    hidden = ""
    if run.predictions is not None and len(set(run.predictions.folds.tolist())) > pictures.MOST_PANELS:
        hidden = f" The first {pictures.MOST_PANELS} folds are shown."
    told = {
        "confusion": (
            "Confusion matrix",
            f"Test utterances of {folds}: count and share of the true class. Colour follows the share.",
        ),
        "curves": (
            "Learning curves",
            "Terms of the training loss as they enter the sum (weighted), and the loss on dev. "
            "Thin: one fold each. Thick: their mean over the epochs all of them reached.",
        ),
        "dev_ua": (
            "UA on dev",
            "The dot is the epoch whose model is tested. "
            "A fold's dev speakers are neither trained on nor tested in it.",
        ),
        "speakers": (
            "Speakers",
            "UA of each test speaker over the classes the speaker has, and the mean over speakers.",
        ),
        "embedding": (
            "Embeddings",
            "Test utterances by the two largest principal components of their embeddings, coloured by true "
            "class. Each fold has a model, and so a space, of its own: "
            "directions cannot be compared between panels." + hidden,
        ),
    }
    for stem, (title, caption) in told.items():
        yield page.tag("h3", title)
        if stem not in drawn:
            yield page.tag(
                "p", "Nothing to draw yet." if not run.complete else "The run kept no data for this picture."
            )
            continue
        yield page.figure(drawn[stem], title, caption)


def _calibration(run: Run, drawn: Mapping[str, bytes]) -> Iterator[page.Html]:
    """Whether confidence can be believed; nothing for runs of versions that did not measure it."""
    measured = (run.scores or {}).get("calibration")
    if not measured:
        return
    yield page.tag("h3", "Calibration")
    rows = [
        (
            title,
            with_interval(measured[f"ece{ending}"]),
            f"{measured[f'nll{ending}']:.3f}",
            percent(_mean(measured[f"reliability{ending}"], "confidence")),
            percent(_mean(measured[f"reliability{ending}"], "accuracy")),
        )
        for ending, title in (("", "as it is"), ("_scaled", "with temperature"))
    ]
    header = ("", "ECE % [95 % interval]", "loss in nats", "mean confidence\u00a0%", "right\u00a0%")
    yield page.table(header, rows)
    before, after = (measured[name]["value"] for name in ("ece", "ece_scaled"))
    over = _mean(measured["reliability"], "confidence") - _mean(measured["reliability"], "accuracy")
    lowest, highest = min(measured["temperatures"]), max(measured["temperatures"])
    yield page.tag(
        "p",
        f"On average, confidence is {percent(abs(over))} points {'above' if over > 0 else 'below'} the share that is "
        "right. "
        f"Temperatures of {lowest:.2f} to {highest:.2f}, each fitted on its fold's dev speakers, or 1 where those have "
        "one class (above 1 lowers confidence), make the ECE "
        f"{percent(abs(after - before))} points {'lower' if after < before else 'higher'}. "
        "An interval from 0 on does not rule out that confidence is right as it stands.",
    )
    caption = (
        "Test utterances in ranges of confidence: the share that is right with its 95 % interval (of independent "
        "utterances), and in pale blue how far it lies from the dotted line, where confidence is right. "
        "Below: how many utterances a range holds."
    )
    yield page.figure(drawn["calibration"], "Calibration", caption)


def _mean(bins: Json, name: str) -> float:
    """Mean over utterances of what is stored by range of confidence; an empty range holds None."""
    filled = [(count, value) for count, value in zip(bins["count"], bins[name], strict=True) if count]
    return sum(count * value for count, value in filled) / sum(count for count, _ in filled)


def _published(run: Run) -> Iterator[page.Html]:
    """The paper's row beside ours, only where the task is the same and nothing leaks."""
    paper = PUBLISHED.get((run.facts["data"]["corpus"], run.facts["protocol"]["name"]))
    if paper is None or not run.complete or not run.scores or _leaks(run) or _members(run):
        return
    if not _same_task(run, paper):
        return
    yield page.tag("h3", "Beside the published result")
    rows = [
        (
            f"this run, {title}",
            *(percent(run.scores[which][name]["value"], digits=2) for name in ("ua", "wa")),
            f"encoder {_encoder(run.settings)}" if which == "selected" else "the same",
        )
        for which, title in _epochs(run).items()
    ]
    wa = "—" if paper.wa is None else f"{paper.wa:.2f}"
    theirs = f"encoder WavLM-Large; not stated: {paper.unstated}"
    rows.append(("Wang et al., Interspeech 2026", f"{paper.ua:.2f}", wa, theirs))
    yield page.table(("mean over folds", "UA\u00a0%", "WA\u00a0%", "how"), rows, words=(0, 3))


def _same_task(run: Run, paper: Published) -> bool:
    """Whether a run tells the paper's classes apart, whatever it calls them, on the paper's data and folds."""
    data, folds = run.facts["data"], _part(run.settings, "protocol").get("folds")
    theirs = {frozenset(labels.split("+")) for labels in paper.classes.split()}
    return (
        {frozenset(labels) for labels in data.get("members", {}).values()} == theirs
        and data.get("targets") == "hard"  # of soft ones the labels are another majority
        # Own recordings may bear the corpus's name, or parts of it be missing; `prepare` lets 1 % be unusable.
        and abs(data.get("utterances", 0) - paper.utterances) <= 0.01 * paper.utterances
        and folds in ("default", run.facts["protocol"]["name"])  # a file of that name is no list of the corpus's
        and len(run.folds) == paper.folds
    )


def _how(run: Run) -> Iterator[page.Html]:
    """The settings in words and in full, and what the numbers were made with."""
    protocol = run.facts["protocol"]
    yield page.tag("h3", "How it was run")
    if _members(run):
        runs = ", ".join(f"{member['run_id']} (UA {percent(member['ua'])} %)" for member in _members(run))
        yield page.facts({"ensemble": f"{run.facts['method']} of the runs {runs}; the settings are those of the first"})
    yield page.facts(_summary(run.settings))
    text = yaml.safe_dump(run.settings, sort_keys=False, allow_unicode=True)
    yield page.tag("details", page.tag("summary", "All settings"), page.tag("pre", text))
    yield page.tag("h3", "Provenance")
    code, data = run.facts.get("code", {}), run.facts["data"]
    commit = f", commit {code['commit']}" if code.get("commit") else ""
    changed = ", with uncommitted changes" if code.get("dirty") else ""
    versions = ", ".join(f"{name} {version}" for name, version in run.facts.get("versions", {}).items())
    yield page.facts(
        {
            "run": run.facts["run_id"],
            "started": run.facts.get("created", "not recorded"),
            "data": f"{', '.join(data.get('paths', ['not recorded']))} (hash {data.get('data_hash', 'not recorded')})",
            "folds": f"{protocol['name']} (hash {protocol.get('hash', 'not recorded')})",
            "code": f"sermll {code.get('version', '')}{commit}{changed}",
            "packages": versions or "not recorded",
        }
    )


def _leaks(run: Run) -> list[str]:
    """What stands on two sides of a fold, each in words."""
    return run.facts["protocol"]["leaks"]


def _members(run: Run) -> list[Json]:
    """The runs whose probabilities an ensemble joins; none for a run that was trained."""
    return (run.scores or {}).get("ensemble", {}).get("members", [])


def _summary(settings: Json) -> dict[str, str]:
    """The settings a reader asks for first. Runs of other versions may lack some, and then it says so."""
    model, optim, losses = (_part(settings, name) for name in ("model", "optim", "losses"))
    rates = f"learning rate {optim.get('lr')} (centers {optim.get('center_lr')}), {optim.get('precision')}"
    on = {name: _part(losses, key) for key, name in _LOSSES.items() if losses.get(key)}
    return {
        "encoder": _encoder(settings),
        "pooling": _words(model.get("pool"), {"flam": "frame-level attention"}),
        "losses": "; ".join(_words({"kind": name, **section}) for name, section in on.items()),
        "mixup": _words(settings.get("mixup"), {"eam": "energy-adaptive", "lam": "label-adaptive"}),
        "training": f"{optim.get('epochs')} epochs, batch {optim.get('batch_size')}, {rates}",
        "seed": str(settings.get("seed")),
    }


def _encoder(settings: Json) -> str:
    return _words(_part(settings, "model").get("encoder"), {"logmel": "log-mel from scratch"})


def _part(tree: Json, name: str) -> Json:
    part = tree.get(name)
    return part if isinstance(part, dict) else {}


def _words(section: object, names: Mapping[str, str] | None = None) -> str:
    """A section with a kind in words, such as `energy-adaptive (probability 0.5, snr_db -5.0 to 10.0)`."""
    if not isinstance(section, dict):
        return "not recorded" if section is None else str(section)
    options = [f"{key} {_value(value)}" for key, value in section.items() if key not in ("kind", "name")]
    # An encoder's name says more than its kind.
    kind = str(section.get("name", section.get("kind")))
    title = (names or {}).get(kind, kind)
    return f"{title} ({', '.join(options)})" if options else title


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " to ".join(map(str, value)) if isinstance(value, list) else str(value)


def _differences(runs: Sequence[Run]) -> list[dict[str, str]]:
    """For each run, the settings of science that are not the same in all runs, by short name."""
    outside = ("name", "fold", "resources.", "tracking.", "data.path")
    flats = [
        {key: value for key, value in flatten(run.settings).items() if not key.startswith(outside)}
        | {
            "data": f"{run.facts['data']['title']} {run.facts['data'].get('data_hash', '')[:8]}",
            "code": " ".join(str(run.facts.get("code", {}).get(key) or "")[:12] for key in ("version", "commit")),
        }
        for run in runs
    ]
    differences: list[dict[str, str]] = [{} for _ in runs]
    for key in dict.fromkeys(key for flat in flats for key in flat):
        # A section that is off in a run has no keys of its own there: only runs that have a key are compared.
        having = {str(flat[key]) for flat in flats if key in flat}
        off = any(flat.get(key, "") is None for flat in flats) and any(key not in flat for flat in flats)
        if len(having) < 2 and not off:
            continue
        for flat, difference in zip(flats, differences, strict=True):
            if key in flat or off:
                difference[key] = "off" if off and key in flat else str(flat.get(key, "on"))
    return differences


def _comparison(runs: Sequence[Run], titles: Sequence[str]) -> page.Html:
    """One row for each run, first on a page of several."""
    rows = []
    for run, title, difference in zip(runs, titles, _differences(runs), strict=True):
        link = page.tag("a", title, href=f"#{title}")
        words = page.Html("".join(page.tag("div", f"{key} {value}") for key, value in difference.items()) or "none")
        selected, last = (run.scores or {}).get("selected") or {}, (run.scores or {}).get("last") or {}
        notes = [*([] if run.complete else [run.progress]), *(["LEAK, see below"] if _leaks(run) else [])]
        name = page.Html(link + "".join(page.tag("small", note) for note in notes))
        wa, ua = (percent(score["value"]) if score else "—" for score in (selected.get("wa"), last.get("ua")))
        if last and "last" not in _epochs(run):
            ua = "the same"
        rows.append((name, words, with_interval(selected.get("ua")), wa, ua))
    header = ("run", "settings that differ", "UA % [95 % interval]", "WA\u00a0%", "last-epoch UA %")
    return page.tag("section", page.tag("h1", f"{len(runs)} runs"), page.table(header, rows, words=(0, 1)))


def _glossary(runs: Sequence[Run]) -> page.Html:
    terms = {
        "UA": "unweighted accuracy, the mean of the recalls of the classes: every class counts the same.",
        "WA": "weighted accuracy, the share of utterances recognised: frequent classes count more.",
        "Chosen on dev": "the best epoch on the dev speakers, by the rule above; test speakers have no say.",
        "ECE": "expected calibration error: how far confidence, the probability of the recognised class, lies from the "
        "share that is right, on average over utterances in 15 ranges of confidence; 0 is best.",
        "Interval": "where the score lies in 95 % of random draws of the test speakers, with replacement; "
        "another seed or other training speakers vary it further.",
    }
    if all(run.facts["protocol"]["select"] == "last" for run in runs):
        del terms["Chosen on dev"]
    return page.tag("footer", page.tag("h3", "Words"), page.facts(terms))


def _epoch(index: int | None) -> str:
    """People count epochs from 1."""
    return "—" if index is None else str(index + 1)


def _minutes(result: Json) -> str:
    seconds = result.get("seconds")
    return "—" if seconds is None else f"{seconds / 60:.1f}"
