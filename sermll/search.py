"""`sermll search`: settings found by trials on training speakers alone, then scored once on speakers they never saw.

    runs/search-<name>/
      search.json            the space, every trial, the best, the final scores
      best.yaml              an experiment file; with nested=true best-fold-<n>.yaml, one for each outer fold
      tested.json            every time that test folds were scored, and with what; only added to
      study.db               Optuna's storage, unless another was given; beside it the locks of who runs trials
      fold-0/trials/         what each trial trained; of the test folds in the name, no utterance is in it
      report/                one page, pictures, trials.csv

Ray Tune schedules the trials, Optuna proposes them. A trial is a set of overrides; it trains one model for each inner
fold and seed, one after the other in one process, and each inner fold's dev speakers are another group of the
protocol's speakers. When the trials are done, the best settings and the experiment as it stands are trained as
ordinary runs, and their test folds are compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from optuna.trial import FrozenTrial

from sermll import __version__, compare, results, search_page
from sermll.cluster import connected
from sermll.config import resolve, with_overrides
from sermll.errors import ConfigError, DataError, TrainingError
from sermll.feed import FoldData
from sermll.files import naming, read_json, whole, write_json
from sermll.job import FoldJob
from sermll.losses import auto_weight
from sermll.schedule import train_jobs
from sermll.search_plan import DIRECTIONS, Inner, Search
from sermll.source import code_version
from sermll.space import as_meant, params_of, settings_of
from sermll.storage import address, fetch, locked
from sermll.study import Study
from sermll.track import SearchTracker
from sermll.train import Run
from sermll.trials import open_study, run_trials

SEARCHED, DEFAULTS = "searched", "defaults"


@dataclass(frozen=True)
class Outcome:
    """What a search leaves behind."""

    folder: Path
    found: dict[str, Any]
    """Content of search.json."""
    page: Path
    best: tuple[str, ...]
    """For each test fold an experiment file with the best settings, and the override that trains this fold alone."""
    not_tracked: str | None

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        studies = self.found["studies"]

        def shown(study: Mapping[str, Any], number: int) -> dict[str, Any]:
            trial = _trial(study, number)
            value = trial["values"][0] if len(trial["values"]) == 1 else trial["values"]
            return {"overrides": trial["overrides"], "value": value}

        bests = [None if study["best"] is None else shown(study, study["best"]) for study in studies]
        final = self.found["final"]
        ua = final and final[SEARCHED]
        return {
            "study": str(self.folder),
            "trials": sum(trial["state"] != "RUNNING" for study in studies for trial in study["trials"]),
            "best": bests if self.found["nested"] else bests[0],
            "pareto": [shown(study, number) for study in studies for number in study["pareto"]],
            "nested_test": {"ua": ua["value"], "ua_low": ua["low"], "ua_high": ua["high"]}
            if ua and self.found["nested"]
            else None,
            "leaks": self.found["leaks"],
        }


def run_search(search: Search) -> Outcome:
    """Run the trials that are not done, then the final runs, the page and the record in MLflow.

    Raises:
        TrainingError: no trial has finished, or a final run has failed; the page tells the rest.
        SermllError: the folder holds another search, its storage cannot be opened, or the cluster is too small. What
            was finished is kept.
    """
    try:
        search.folder.mkdir(parents=True, exist_ok=True)
        _claim(search)
    except OSError as error:
        raise DataError(f"{search.folder}: cannot be written ({error}); give another tracking.runs") from None
    tracker = SearchTracker.of(search.experiment, search.folder)
    told = []
    for inner in search.studies:
        with open_study(search, inner) as study:
            study.begin(_guesses(search))
            run_trials(search, inner, study)
            told.append(_describe_study(search, inner, study))
    # Of several drivers the first trains, the others find it done.
    with locked(search.folder / "final.lock", what=f"the final runs of search {search.file.name}"):
        best = tuple(
            command
            for inner, study in zip(search.studies, told, strict=True)
            for command in _write_best(search, inner, study)
        )
        final = None
        if search.file.test and all(study["best"] is not None for study in told):
            final_runs = _FinalRuns.of(search, told)
            if final_runs.work:
                _keep(search, told, None)  # what the trials found is to be seen, whatever becomes of the final runs
            final = final_runs.scores()
        found, page = _keep(search, told, final)
        outcome = Outcome(search.folder, found, page, best, tracker.finish())
    fruitless = [study for study in told if study["best"] is None]
    if fruitless:
        notes = [f"trial {trial['number']}: {trial['note']}" for trial in fruitless[0]["trials"] if trial["note"]]
        tested = ", ".join(map(str, fruitless[0]["test_folds"]))
        raise TrainingError(
            "\n".join([f"no trial of the search for test fold {tested} has finished", *notes[:3], f"page: {page}"])
        )
    return outcome


def _keep(search: Search, studies: list[dict[str, Any]], final: dict[str, Any] | None) -> tuple[dict[str, Any], Path]:
    """Write search.json and the page."""
    found = _describe(search, studies, final)
    write_json(search.folder / "search.json", found)
    return found, search_page.build(search.folder)


def _trial(study: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A trial of a described study."""
    return next(trial for trial in study["trials"] if trial["number"] == number)


def _claim(search: Search) -> None:
    """Refuse a folder that holds another search."""
    mark = search.mark
    with locked(search.folder / "claim.lock"):  # not the final one, which is held for as long as final runs train
        now = {inner.folder.name: search.fingerprint(inner) for inner in search.studies}
        fetch(mark)
        held = read_json(mark) if mark.exists() else {}
        for name, fingerprint in now.items():
            if held.get(name, fingerprint) != fingerprint:
                raise ConfigError(
                    f"{search.folder} holds another search: the space, the settings, the objectives, the inner folds "
                    "or the data differ, and its trials would not compare with new ones; give another name=..."
                )
        if held | now != held:
            write_json(mark, held | now)


def _guesses(search: Search) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """The experiment as it stands, and what the file gives beside it."""
    space, tree = search.file.space, search.experiment.model_dump(mode="json")
    keys = {key for name, choice in space.items() for key in choice.keys(name)}
    found = []
    for given in ({}, *search.file.first):
        guess = as_meant(tree, given)
        settings = resolve(search.tree, guess, str(search.source)).model_dump(mode="json")
        for name in ("kl", "focal"):  # whose "auto" is a number, so that the sampler can learn what it is worth
            section = settings["losses"][name]
            if section and section["weight"] == "auto":
                section["weight"] = auto_weight(len(search.studies[0].design.classes))
        # What differs in more than the space has says nothing about the space: the sampler is told of no choice.
        found.append((guess, params_of(space, settings) if guess.keys() <= keys else {}))
    return found


def _write_best(search: Search, inner: Inner, study: Mapping[str, Any]) -> list[str]:
    """Write the best settings as an experiment file, and say how its test folds, and no others, are trained."""
    if study["best"] is None:
        return []
    name = f"best-{inner.folder.name}" if search.file.nested else "best"
    overrides = _trial(study, study["best"])["overrides"]
    first, *more = inner.test_folds
    tree = with_overrides(search.tree, {**overrides, "name": f"{search.file.name}_best"})
    tree |= {"seed": search.file.seeds[0], "fold": first}
    path = search.folder / f"{name}.yaml"
    header = (
        f"# Found by {len(study['trials'])} trials of the search {search.file.name}; no trial saw test {inner.title}.\n"
    )
    header += "# The speakers of all other folds were seen by trials: scores of those folds would be too high.\n"
    with whole(path) as partial:
        partial.write_text(header + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return [str(path), *(f"{path} fold={fold}" for fold in more)]


@dataclass(frozen=True)
class _FinalRuns:
    """The best settings and the experiment as it stands, as ordinary runs of the test folds."""

    search: Search
    runs: Mapping[str, Mapping[tuple[int, int], Run]]
    """Of SEARCHED and DEFAULTS, by fold and seed."""
    work: Mapping[Path, tuple[FoldJob, FoldData]]
    """What is not trained yet, by its folder."""
    ended: int
    """Trials that the best were chosen of."""

    @classmethod
    def of(cls, search: Search, studies: Sequence[Mapping[str, Any]]) -> "_FinalRuns":
        """Those of described studies."""
        runs: dict[str, dict[tuple[int, int], Run]] = {SEARCHED: {}, DEFAULTS: {}}
        for inner, study in zip(search.studies, studies, strict=True):
            for name, overrides in ((SEARCHED, _trial(study, study["best"])["overrides"]), (DEFAULTS, {})):
                for fold in inner.test_folds:
                    for seed in search.file.seeds:
                        experiment = resolve(search.tree, {**overrides, "seed": seed, "fold": fold}, str(search.source))
                        runs[name][fold, seed] = Run.of(experiment, search.designs, f"{name} ")
        work: dict[Path, tuple[FoldJob, FoldData]] = {}
        for run in (run for found in runs.values() for run in found.values()):
            run.open()
            work |= {Path(job.folder): (job, data) for job, data in run.unfinished}
        ended = sum(trial["state"] != "RUNNING" for study in studies for trial in study["trials"])
        return cls(search, runs, work, ended)

    def folders(self, name: str) -> list[Path]:
        """Of the trained folds, in order."""
        return [run.folder / f"fold-{fold}" for (fold, _), run in self.runs[name].items()]

    def _looks(self) -> list[dict[str, Any]]:
        """Note that the test folds are scored with these settings, unless they were the last time; all such notes."""
        path = self.search.folder / "tested.json"
        fetch(path)
        looks = read_json(path) if path.exists() else []
        runs = [address(folder) for folder in self.folders(SEARCHED)]
        if not looks or looks[-1]["runs"] != runs:
            looks.append({"at": datetime.now(UTC).isoformat(timespec="seconds"), "trials": self.ended, "runs": runs})
            write_json(path, looks)
        return looks

    def scores(self) -> dict[str, Any]:
        """Train what is not trained, and score the test folds of both.

        Raises:
            TrainingError: a run has failed.
        """
        search, looks = self.search, self._looks()  # noted before: a fold's epochs are scored while it is trained
        if self.work:
            with connected():
                failures = train_jobs(list(self.work.values()), f"testing {search.file.name}", search.folder, _unheard)
            if failures:
                told = [f"{job.title}: {why}" for job, why in failures.items()]
                page = f"page: {search.folder / 'report' / 'index.html'}"
                raise TrainingError("\n".join([*told, page, "The trials are kept; the same command goes on from here"]))
        for folder in dict.fromkeys(run.folder for found in self.runs.values() for run in found.values()):
            results.gather(folder)
        classes = search.studies[0].design.classes
        tables = {
            (name, kind): pa.concat_tables(_answers(folder / kind) for folder in self.folders(name))
            for name in self.runs
            for kind in (results.PREDICTIONS, results.LAST_PREDICTIONS)
        }
        scores = {key: results.estimate(table, classes)[0]["ua"] for key, table in tables.items()}
        counts = {name: results.by_speaker(tables[name, results.PREDICTIONS], classes) for name in self.runs}
        same = self.folders(SEARCHED) == self.folders(DEFAULTS)
        difference = None
        speakers = len(set(counts[SEARCHED][2]))
        if not same and speakers > 1:
            difference = compare.paired_difference(
                counts[DEFAULTS][0], counts[SEARCHED][0], *counts[DEFAULTS][1:], compare.SEED
            )
        return {
            "folds": sorted({fold for fold, _ in self.runs[SEARCHED]}),
            "seeds": list(search.file.seeds),
            "speakers": speakers,
            "utterances": len(tables[SEARCHED, results.PREDICTIONS]) // len(search.file.seeds),
            "test_reads": len({*self.folders(SEARCHED), *self.folders(DEFAULTS)}),
            "looks": looks,
            SEARCHED: scores[SEARCHED, results.PREDICTIONS],
            DEFAULTS: scores[DEFAULTS, results.PREDICTIONS],
            f"{SEARCHED}_last": scores[SEARCHED, results.LAST_PREDICTIONS],
            f"{DEFAULTS}_last": scores[DEFAULTS, results.LAST_PREDICTIONS],
            "difference": difference and asdict(difference),
            "verdict": "no difference shown" if difference is None else compare.verdict(difference, difference.p),
            "runs": {name: sorted({str(run.folder) for run in found.values()}) for name, found in self.runs.items()},
        }


def _unheard(running: list[FoldJob], ended: list[FoldJob]) -> None:
    """Nobody watches the final runs; their progress bar tells enough."""


def _answers(path: Path) -> pa.Table:
    with naming(path):
        return pq.read_table(path, columns=["utterance", "speaker", "fold", "label", "predicted"])


def _describe_study(search: Search, inner: Inner, study: Study) -> dict[str, Any]:
    """A study as JSON."""
    best = study.best()
    return {
        "test_folds": list(inner.test_folds),
        "storage": study.url,
        "pool_speakers": len(
            {name for fold in inner.design.folds.folds for names in fold.speakers.values() for name in names}
        ),
        "inner": [
            {split: list(fold.speakers[split]) for split in ("train", "dev")} for fold in inner.design.folds.folds
        ],
        "trials": [_describe_trial(search, trial) for trial in study.trials() if "driver" in trial.user_attrs],
        "best": best,
        "pareto": study.front() if len(search.file.objectives) > 1 else [],
        "importance": study.importance(),
    }


def _describe_trial(search: Search, trial: FrozenTrial) -> dict[str, Any]:
    overrides = trial.user_attrs.get("overrides", {})
    experiment = resolve(search.tree, overrides, str(search.source))
    return {
        "number": trial.number,
        "state": trial.state.name,
        "values": trial.values if trial.state.name == "COMPLETE" else None,
        "all": trial.user_attrs.get("all"),
        "intermediate": [[step, value] for step, value in sorted(trial.intermediate_values.items())],
        "overrides": overrides,
        "settings": settings_of(search.file.space, experiment),
        "seconds": trial.user_attrs.get("seconds"),
        "note": trial.user_attrs.get("note", ""),
    }


def _describe(search: Search, studies: list[dict[str, Any]], final: dict[str, Any] | None) -> dict[str, Any]:
    """Everything as JSON, for the page and whoever reads the results."""
    design = search.designs.of(search.experiment)
    file = search.file
    return {
        "name": file.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": {"version": __version__, **code_version()},
        "experiment": file.experiment,
        "settings": search.experiment.model_dump(mode="json"),
        "title": design.prepared.manifest["title"],
        "classes": list(design.classes),
        "protocol": design.folds.name,
        "select": design.rules["select"],
        "leaks": [str(leak) for leak in design.leaks],
        "objectives": [{"name": name, "direction": DIRECTIONS[name]} for name in file.objectives],
        "sampler": file.sampler,
        "pruner": search.file.rule,
        "trials": file.trials,
        "inner_folds": file.inner_folds,
        "seeds": list(file.seeds),
        "nested": file.nested,
        "space": {name: choice.words() for name, choice in file.space.items()},
        "studies": studies,
        "final": final,
    }
