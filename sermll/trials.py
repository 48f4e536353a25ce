"""The trials of a search under Ray Tune: Optuna proposes, Tune schedules, a trial trains its inner folds one by one."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from sermll import calibration, checkpoint, metrics, results
from sermll.bank import Bank
from sermll.cluster import connected, here, room, share, summoned
from sermll.config import Experiment
from sermll.errors import ConfigError, SermllError, TrainingError
from sermll.feed import FoldData, stream
from sermll.files import CHECKPOINTS, naming, read_json
from sermll.loop import FoldJob, selection_scores, train_fold
from sermll.progress import Progress
from sermll.search_plan import DIRECTIONS, Inner, Search
from sermll.space import Chooser, suggest
from sermll.storage import fetch, names, origin, reach, remove
from sermll.study import Rules, Study, Taken

POLL_S = 2.0
ENDS_SEARCH = "ends_search"
"""In what a trial reports: no other would be spared what its note says."""
SCRATCH = ".tune-"
"""Begins the name of the folder that Ray Tune writes to for a driver."""


def open_study(search: Search, inner: Inner) -> Study:
    """Open or begin the study of some test folds.

    Raises:
        DataError: its storage cannot be opened.
    """
    file = search.file
    rules = Rules(
        sampler=file.sampler,
        pruner=search.file.rule,
        directions=tuple(DIRECTIONS[name] for name in file.objectives),
        seed=file.sampler_seed,
        warm_up_steps=max(1, search.experiment.optim.epochs // 3),
    )
    inner.folder.mkdir(parents=True, exist_ok=True)
    if not file.storage and origin(search.folder):
        raise ConfigError(
            f"a search in {origin(search.folder)} needs a database for its trials: storage=postgresql://..., or "
            "another tracking.runs"
        )
    return Study(inner.folder, search.study_name(inner), search.storage, rules)


def run_trials(search: Search, inner: Inner, study: Study) -> None:
    """Run trials until the study has all of them, seen to by this driver or by others.

    Raises:
        TrainingError: a trial met with what no other would be spared, such as a full disk; it is kept as it is.
    """

    def left() -> int:
        states = [trial.state for trial in study.trials()]
        return search.file.trials - sum(state.is_finished() for state in states)

    if left() <= 0:
        return
    with connected(), Progress(f"searching {search.file.name}", search.file.trials, search.file.trials - left()) as bar:
        while (unfinished := left()) > 0:
            with summoned(search.experiment.resources, bar.say):
                _tune(search, inner, study, bar)
            waited = False
            while left() > 0 and (others := study.of_others()):
                if not waited:
                    bar.say("waiting for " + ", ".join(f"trial {number} of {who}" for number, who in others.items()))
                waited = True
                time.sleep(POLL_S)
            if left() == unfinished and not waited:  # a driver that was waited for may have died: its trial is ours
                raise TrainingError("Ray Tune has ended with trials unfinished; the same command goes on from here")


def _tune(search: Search, inner: Inner, study: Study, progress: Progress) -> None:
    """Let Ray Tune schedule trials until there is none left to begin."""
    import os

    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its tables would tear the progress bar
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # who interrupts means the search, not Tune's part of it
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    import ray
    from ray import tune

    resources = search.experiment.resources
    gpus, at_once = room(resources, "trial")
    folds = [
        FoldData.of(f"{inner.design.hash}/fold-{fold.index}", inner.design.prepared, inner.design.labelled, fold.rows)
        for fold in inner.design.folds.folds
    ]
    bank = _bank(search, inner, gpus)
    desk: Any = ray.remote(num_cpus=0)(Desk).options(label_selector=here()).remote(search, inner)
    for name in names(inner.folder):
        if name.startswith(SCRATCH) and not study.alive(name.removeprefix(SCRATCH)):
            remove(inner.folder / name)
    scratch = inner.folder / f"{SCRATCH}{study.driver}"
    faults: list[str] = []
    try:
        tune.Tuner(
            tune.with_resources(
                tune.with_parameters(_work, desk=desk, mark=search.mark, folds=folds, bank=bank and bank.folder),
                tune.PlacementGroupFactory([share(resources, gpus)]),
            ),
            tune_config=tune.TuneConfig(
                search_alg=_proposer(search, inner, study, progress, faults),
                max_concurrent_trials=at_once,
                num_samples=search.file.trials,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=origin(scratch) or str(scratch),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=resources.max_failures),
            ),
        ).fit()
    finally:
        ray.kill(desk)
        remove(scratch)
    if faults:
        raise TrainingError("\n".join([*faults, "The trials are kept; the same command goes on from here"]))


class Desk:
    """Hands trials their jobs and judges how they go, so that workers need no way to the storage. An actor."""

    def __init__(self, search: Search, inner: Inner) -> None:
        self._search, self._inner = search, inner
        self._study = open_study(search, inner)

    def begin(self, number: int) -> list[FoldJob]:
        """What a trial trains."""
        self._study.note_fault(number, "")
        frozen = self._study.trials()[number]
        return self._search.jobs(self._inner, Taken(number, frozen.user_attrs["overrides"]))

    def failed(self, number: int, why: str) -> None:
        """Note why a trial is about to fail; it may be tried again."""
        self._study.note_fault(number, why)

    def report(self, number: int, step: int, value: float) -> bool:
        """Whether a trial that has come so far is to be ended."""
        return self._study.report(number, step, value)


def _bank(search: Search, inner: Inner, gpus: float) -> Bank | None:
    """The feature bank of all speakers that trials hear, made if need be."""
    import ray
    import torch

    recipe = search.recipe
    if recipe is None:
        return None
    data = inner.pool()
    root = search.folder.parent / "feature-banks"
    if gpus and not torch.cuda.is_available():  # the driver is on a machine without one
        build = ray.remote(num_gpus=1)(Bank.build)
        return ray.get(build.remote(root, data, recipe, torch.device("cuda")))
    return Bank.build(root, data, recipe, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _work(config: dict[str, Any], desk: Any, mark: Path, folds: Sequence[FoldData], bank: Path | None) -> None:
    """A trial, as Ray Tune runs it: train a model for each seed and inner fold, or end early.

    It trains in the folder of `mark`, if it sees that this is the search's, on the feature bank of a folder if any.
    """
    import os

    import ray
    import torch
    from ray import tune

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    number = config["number"]
    jobs: list[FoldJob] = ray.get(desk.begin.remote(number))
    job, done, seconds = jobs[0], [], 0.0
    try:
        reach(mark.parent, mark.name)
        opened = Bank.open(bank) if bank else None  # here, where it is told if this machine cannot
        for place, job in enumerate(jobs):
            reached = [unit["dev_ua"] for unit in done]

            def stop(
                history: list[dict[str, Any]], job: FoldJob = job, place: int = place, reached: Any = reached
            ) -> bool:
                scores = selection_scores(job.settings["protocol"]["select"], history)
                best, epochs = history[int(np.argmax(scores))]["dev_ua"], job.settings["optim"]["epochs"]
                value, step = float(np.mean([*reached, best])), place * epochs + len(history)
                # What has come to its last step is told of as well, and is not ended: its value is known.
                return ray.get(desk.report.remote(number, step, value)) and step < len(jobs) * epochs

            fetch(Path(job.folder), without=CHECKPOINTS)  # another machine may have begun the trial
            if not job.finished:
                Path(job.folder).mkdir(parents=True, exist_ok=True)
                begun, _ = checkpoint.newest(job.checkpoints, job.run)
                history = begun.notes["history"] if begun else []
                # A kill may have come between an epoch's checkpoint and its report, or between that and the end.
                if not any(stop(history[: epoch + 1]) for epoch in range(len(history))):
                    batches, encoder = stream, None
                    if opened is not None:
                        batches, encoder = opened.batches, opened.stand_in(Experiment.model_validate(job.settings))
                    train_fold(job, folds[job.fold], batches, device, stop=stop, encoder=encoder)
            if not job.finished:
                seconds += sum(row["train_s"] + row["eval_s"] for row in job.history())
                told = {"note": "", "seconds": seconds}
                break
            done.append(_measure(job, folds[job.fold].classes))
            seconds += done[-1]["seconds"]
            remove(job.checkpoints)  # the model itself is of no use any more
        else:
            values = {name: float(np.mean([unit[name] for unit in done])) for name in ("dev_ua", "ece")}
            values |= {"worst_speaker_ua": min(unit["worst_speaker_ua"] for unit in done)}
            told = {"note": "", "seconds": seconds, **values}
    except Exception as error:
        raised = getattr(error, "cause", error)  # what the desk raised, without Ray's account of where
        said = (str(raised).strip() or type(raised).__name__).splitlines()[0]
        why = f"{job.title}: {'out of memory: ' if out_of_memory(error) else ''}{said}"
        if not of_the_trial(error, number):
            if isinstance(error, SermllError):
                tune.report({"note": why, ENDS_SEARCH: True})
                return
            ray.get(desk.failed.remote(number, why))
            raise  # Tune tries again, in another process: this one's GPU may be of no use any more
        told = {"note": why}
        if device.type == "cuda":  # the next trial of this process, or another on this GPU, can have it
            torch.cuda.empty_cache()
    for job in jobs:
        remove(job.checkpoints)
    tune.report(told)


def of_the_trial(error: BaseException, number: int) -> bool:
    """Whether an error comes of what a trial chose, so that others need not meet with it.

    Trial 0 is the experiment as it stands: if its settings do not fit together, no trial's do.
    """
    return out_of_memory(error) or isinstance(error, TrainingError) or (isinstance(error, ConfigError) and number > 0)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: a GPU's, or the machine's."""
    import torch

    # On a CPU torch's allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _measure(job: FoldJob, classes: Sequence[str]) -> dict[str, float]:
    """What a finished inner fold is worth, on its dev speakers, by the epoch that `protocol.select` names."""
    folder = Path(job.folder)
    result = read_json(folder / "result.json")
    with naming(folder / results.DEV_PREDICTIONS):
        dev = pq.read_table(folder / results.DEV_PREDICTIONS)
    counts, _, _ = results.by_speaker(dev, classes)
    said, labels = results.probabilities(dev, classes)
    return {
        "dev_ua": float(metrics.ua(counts.sum(axis=0))),
        "worst_speaker_ua": float(np.nanmin(metrics.ua(counts))),
        "ece": calibration.expected_calibration_error(said, labels),
        "seconds": float(result["seconds"]),
    }


def _proposer(search: Search, inner: Inner, study: Study, progress: Progress, faults: list[str]) -> Any:
    """Ray Tune's view of the study: it asks for trials and tells how they ended; to `faults` it adds what ends all."""
    from ray.tune.search import Searcher

    tree = search.experiment.model_dump(mode="json")

    def choose(chooser: Chooser) -> dict[str, Any]:
        return suggest(search.file.space, tree, chooser)

    def lost(number: int) -> str:
        """Why a trial could not be brought to its end; its checkpoints are removed, as the others' are."""
        attributes = study.trials()[number].user_attrs
        for job in search.jobs(inner, Taken(number, attributes["overrides"])):
            remove(job.checkpoints)
        why = attributes.get("fault") or f"trial {number}: its process was lost, for want of memory or with its node"
        return f"{why}; tried {search.experiment.resources.max_failures + 1} times"

    class Proposer(Searcher):
        """A trial for Tune is the number of one of the study's."""

        def __init__(self) -> None:
            super().__init__()
            self._numbers: dict[str, int] = {}

        def __reduce__(self) -> Any:
            """Tune keeps a copy for a restart of its own; ours begins from the study."""
            return Searcher, ()

        def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
            return True

        def suggest(self, trial_id: str) -> Any:  # FINISHED is a string
            taken = None if faults else study.take(search.file.trials, choose)
            if taken is None:
                return Searcher.FINISHED
            self._numbers[trial_id] = taken.number
            return {"number": taken.number}

        def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
            number = self._numbers.pop(trial_id)
            if result and not error and ENDS_SEARCH in result:
                faults.append(result["note"])
                return
            told: dict[str, Any] = {"note": lost(number)} if error or not result else result
            measured = {name: told[name] for name in DIRECTIONS if name in told}
            values = [measured[name] for name in search.file.objectives] if "dev_ua" in measured else None
            facts = {"seconds": told.get("seconds"), "all": measured if values else None}
            study.tell(number, values, told["note"], facts)
            words = told["note"] or (f"dev UA {measured['dev_ua']:.3f}" if values else "ended early")
            progress.advance(1, f"trial {number}: {words}")

        def save(self, checkpoint_path: str) -> None:
            """Nothing: what matters is in the study."""

        def restore(self, checkpoint_path: str) -> None:
            """Nothing: what matters is in the study."""

    return Proposer()
