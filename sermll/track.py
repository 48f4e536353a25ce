"""The only writer to MLflow. Everything it sends is read from the run's folder, so that it can be sent again.

One parent run per experiment run, one child per fold; a campaign's run stands above those of its cells.
`<run>/mlflow.json` remembers what each server has. It is written before a run is asked for and before metrics get their
times, so that what is sent again, because the answer was lost, is the same to the server and is not there twice. A
server that is away is tried again later and, at the end, by `sermll track FOLDER`.
"""

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from sermll.cluster import unless_set
from sermll.config import Experiment, flatten, without_password
from sermll.errors import ConfigError, DataError
from sermll.files import fetch_run, fold_folders, naming, read_json, read_yaml, write_json
from sermll.job import FoldJob
from sermll.results import finished_folds, read_model_settings
from sermll.storage import address, fetch, locked, origin, place, sqlite

RETRY_S = 60.0
SYNC_S = 5.0
SERVER_ENDS_S = 5.0
"""How long a server that shows results may take to end."""
"""Epochs are sent together: what is shorter than this would cost the training beside it more than it tells."""
SHARE = 0.2
"""Of the driver's time, what sending may take while folds are trained."""
ANSWER_S, UPLOAD_S = 10, 300
"""How long a server may take to answer: to small questions, and at the end, when it may hand large files on."""
LAST_TRIES_S = (0.0, 1.0, 4.0)
"""Pauses before the tries at the end, for a server that is just being started again."""
BATCH = 1000
"""The most metrics that one call may carry."""
NOT_PARAMS = ("resources", "tracking")
Json = dict[str, Any]


def _uri(experiment: Experiment, runs: Path) -> str | None:
    """The store an experiment asks for: its `tracking.mlflow`, MLFLOW_TRACKING_URI, or a SQLite file; None: none."""
    if experiment.tracking.mlflow is False:
        return None
    uri = experiment.tracking.mlflow or default_uri(runs)
    if uri.startswith("sqlite:") and origin(Path(uri.removeprefix("sqlite:///"))):
        raise ConfigError(
            f"runs in {origin(runs)} need an MLflow server: MLFLOW_TRACKING_URI or tracking.mlflow=http://..., or "
            "tracking.mlflow=off"
        )
    return uri


def default_uri(runs: Path) -> str:
    """Where results go if nobody says: MLFLOW_TRACKING_URI, else a SQLite file in the runs folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or sqlite(runs / "mlflow.db")


class _Server:
    """A store, the way there, and how it went lately. Those of a campaign share one."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.fault: str | None = None
        self._gone = False
        self._rest_until = 0.0
        self._ready: Any = None

    @property
    def file(self) -> Path | None:
        """The file of a SQLite store."""
        return Path(self.uri.removeprefix("sqlite:///")) if self.uri.startswith("sqlite:///") else None

    def client(self) -> Any:  # mlflow is loaded when first needed
        """The connection; opened, and a SQLite file's tables made, at the first call."""
        if self._ready is None:
            from mlflow import MlflowClient

            for name in ("mlflow", "alembic"):  # their own setup of logging runs on import
                logging.getLogger(name).setLevel(logging.ERROR)
            client = MlflowClient(tracking_uri=self.uri)
            if self.file:
                self.file.parent.mkdir(parents=True, exist_ok=True)
            # Two that make the tables of one file at the same time stumble over each other.
            with locked(self.file.with_name(f".{self.file.name}.lock")) if self.file else nullcontext():
                client.search_experiments(max_results=1)
            self._ready = client
        return self._ready

    @property
    def due(self) -> bool:
        """Whether it may be asked for something that can wait."""
        return time.monotonic() >= self._rest_until

    def send(self, send: Callable[[], None]) -> bool:
        """Send what can be sent again later; returns whether it went well."""
        began, before = time.monotonic(), self.fault
        sent = self._try(send, ANSWER_S)
        took = time.monotonic() - began
        if sent != (before is None):
            what = "answers again" if sent else f"does not take what is new ({self.fault}); asked again now and then"
            sys.stderr.write(f"MLflow at {without_password(self.uri)} {what}\n")
        self._rest_until = time.monotonic() + (took * (1 / SHARE - 1) if sent else RETRY_S)
        return sent

    def send_at_last(self, send: Callable[[], None]) -> str | None:
        """Send at the end; returns what went wrong. A server that is gone is not asked again."""
        for pause in () if self._gone else LAST_TRIES_S:
            time.sleep(pause)
            if self.fault and not self._try(self._ask, ANSWER_S):
                self._gone = pause == LAST_TRIES_S[-1]
                continue
            if self._try(send, UPLOAD_S):
                return None
        return self.fault

    def _ask(self) -> None:
        self.client().search_experiments(max_results=1)

    def _try(self, send: Callable[[], None], timeout_s: int) -> bool:
        try:
            with _patience(timeout_s):
                send()
            self.fault = None
        except Exception as error:  # whatever a server or its client raises, training goes on and the user is told
            said = str(error).strip().partition(chr(10))[0]
            self.fault = f"{type(error).__name__}: {without_password(said)}"
        return self.fault is None


@contextmanager
def _patience(timeout_s: int) -> Iterator[None]:
    """How MLflow's client behaves with a server that is away, unless the user's environment says so.

    Its own retries take minutes, and may make a run twice; ours know what was asked for. The addresses that it prints
    hold the password, if there is one.
    """
    given = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s),
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }
    with unless_set(given):
        yield


class _Sender:
    """What MLflow has of a folder."""

    def __init__(self, folder: Path, server: _Server | None, experiment: str) -> None:
        """`server` None: tracking is off."""
        self._folder, self._server, self._experiment = folder, server, experiment
        self._known: Json = {}

    @contextmanager
    def _remembering(self, *, wait: bool = True) -> Iterator[None]:
        """Hold the folder's memory of the server; of several commands one sends at a time."""
        with locked(self._folder / ".mlflow.lock", wait=wait) as held:
            if not held:
                raise DataError(f"{self._folder}: another command is sending it")
            path = self._folder / "mlflow.json"
            fetch(path)
            known = read_json(path) if path.exists() else {}
            self._known = known.get(self._name, {"runs": {}, "asked": {}})
            yield

    def _remember(self) -> None:
        path = self._folder / "mlflow.json"
        write_json(path, (read_json(path) if path.exists() else {}) | {self._name: self._known})

    @property
    def _name(self) -> str:
        return without_password(self._server.uri if self._server else "")

    @property
    def _client(self) -> Any:
        assert self._server is not None
        return self._server.client()

    def _experiment_id(self) -> str:
        if "experiment_id" not in self._known:
            found = self._client.get_experiment_by_name(self._experiment)
            self._known["experiment_id"] = found.experiment_id if found else self._new_experiment()
        return self._known["experiment_id"]

    def _new_experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        # A server knows where files go; beside a database they lie with the runs.
        served = self._server is None or self._server.uri.startswith(("http", "databricks"))
        beside = self._folder.parent / "mlflow-artifacts"
        place = None if served else origin(beside) or beside.as_uri()
        try:
            return self._client.create_experiment(self._experiment, artifact_location=place)
        except MlflowException as error:
            found = self._client.get_experiment_by_name(self._experiment)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                raise
            return found.experiment_id  # another command was quicker

    def _run(self, name: str, tags: Callable[[], Mapping[str, str]], **facts: Any) -> Json:
        """What MLflow has of the run `name`, which is created if need be; `facts` are remembered of a new one."""
        if name in self._known["runs"]:
            return self._known["runs"][name]
        experiment, key = self._experiment_id(), self._known["asked"].get(name)
        found = []
        if key:  # no answer came, but the server may have made it
            found = self._client.search_runs([experiment], f"tags.`sermll.key` = '{key}'", max_results=1)
        else:
            key = self._known["asked"][name] = uuid.uuid4().hex
            self._remember()
        told = {**tags(), "sermll.key": key}
        made = found[0] if found else self._client.create_run(experiment, run_name=name, tags=told)
        self._known["runs"][name] = {"run": made.info.run_id, "at_ms": {}, **facts}
        del self._known["asked"][name]
        self._remember()
        return self._known["runs"][name]

    def _log(self, run: Json, values: Mapping[str, Mapping[str, float]], steps: Mapping[str, int]) -> None:
        """Send metrics in groups, each with a step and a time of its own; the same again are the same to MLflow."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        if new := [group for group in values if group not in run["at_ms"]]:
            run["at_ms"] |= dict.fromkeys(new, now_ms)
            self._remember()
        metrics = [
            Metric(key, float(value), run["at_ms"][group], steps[group])
            for group, found in values.items()
            for key, value in found.items()
        ]
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(run["run"], metrics=metrics[start : start + BATCH])


class CampaignTracker(_Sender):
    """The MLflow run above the runs of a campaign's cells: its table, page and pictures; and those runs."""

    def __init__(self, folder: Path, server: _Server | None, experiment: str) -> None:
        """`folder` of the campaign."""
        super().__init__(folder, server, experiment)
        self._cells: dict[Path, Tracker] = {}

    @classmethod
    def of(cls, folder: Path, cells: Iterable[tuple[Experiment, Path, Mapping[str, str]]]) -> "CampaignTracker":
        """The tracker of a campaign whose cells have these settings, run folders and labels."""
        cells = list(cells)
        experiment = cells[0][0]
        uri = _uri(experiment, folder.parent)
        tracker = cls(folder, _Server(uri) if uri else None, experiment.tracking.experiment or experiment.name)
        for settings, run_dir, labels in cells:
            name = settings.tracking.experiment or settings.name
            tracker._cells[run_dir] = Tracker(run_dir, tracker._server, name, tracker, labels)
        return tracker

    def watch(self, running: Sequence[FoldJob], ended: Sequence[FoldJob]) -> None:
        """Send the epochs of folds in training, and of those that have just ended; who waited longest comes first."""
        folders = dict.fromkeys(Path(job.folder).parent for job in [*running, *ended])
        for tracker in sorted((self._cells[folder] for folder in folders), key=lambda tracker: tracker.looked_at):
            tracker.sync()

    def run(self) -> str:
        """MLflow's id of the campaign; it is created if need be."""
        if self._folder.name not in self._known.get("runs", {}):
            with self._remembering():
                self._run(self._folder.name, self._tags)
        return self._known["runs"][self._folder.name]["run"]

    def _tags(self) -> Mapping[str, str]:
        told = read_json(self._folder / "campaign.json")
        return {
            "sermll.campaign": told["name"],
            "sermll.version": told["code"]["version"],
            "sermll.commit": str(told["code"]["commit"]),
            "sermll.dirty": str(told["code"]["dirty"]),
            **{f"sermll.axis.{axis}": ", ".join(values)[:5000] for axis, values in told["axes"].items()},
        }

    def finish(self) -> str | None:
        """Send results, files and, last, the campaign's own; returns what went wrong first, None if nothing did."""
        if self._server is None:
            return None
        faults = [tracker.finish() for folder, tracker in self._cells.items() if finished_folds(folder)]
        return next((fault for fault in [*faults, self._server.send_at_last(self._send)] if fault), None)

    def _send(self) -> None:
        run = self.run()
        with self._remembering():
            told = read_json(self._folder / "campaign.json")
            asked = {(cell["run_dir"], fold) for cell in told["cells"] for fold in cell["folds"]}
            done = sum((place(folder) / f"fold-{fold}" / "result.json").exists() for folder, fold in asked)
            counts = {"cells": len(told["cells"]), "folds": len(asked), "folds_finished": done}
            self._log(self._known["runs"][self._folder.name], {f"{counts}": counts}, {f"{counts}": 0})
            self._client.log_artifact(run, str(self._folder / "campaign.json"))
            if (self._folder / "report").is_dir():  # one that was interrupted has none yet
                self._client.log_artifacts(run, str(self._folder / "report"), "report")
            self._client.set_terminated(run)


class SearchTracker(_Sender):
    """The MLflow run of a search, above one for each trial."""

    @classmethod
    def of(cls, experiment: Experiment, folder: Path) -> "SearchTracker":
        """The tracker of a search for settings of `experiment`."""
        uri = _uri(experiment, folder.parent)
        return cls(folder, _Server(uri) if uri else None, experiment.tracking.experiment or experiment.name)

    def finish(self) -> str | None:
        """Send what search.json says and the page; returns what went wrong, None if nothing did."""
        return self._server.send_at_last(self._send) if self._server else None

    def _send(self) -> None:
        told = read_json(self._folder / "search.json")
        tags = {
            "sermll.search": told["name"],
            "sermll.sampler": told["sampler"],
            "sermll.pruner": told["pruner"],
            "sermll.protocol": told["protocol"],
            "sermll.version": told["code"]["version"],
            "sermll.commit": str(told["code"]["commit"]),
            "sermll.dirty": str(told["code"]["dirty"]),
            **{f"sermll.space.{name}"[:250]: words[:5000] for name, words in told["space"].items()},
        }
        with self._remembering():
            above = self._run(self._folder.name, lambda: tags)
            for study in told["studies"]:
                for trial in study["trials"]:
                    name = f"fold {'-'.join(map(str, study['test_folds']))} trial {trial['number']}"
                    if trial["state"] != "RUNNING":
                        self._send_trial(above["run"], told, name, trial)
            if told["final"]:
                scores = {f"test_ua_{row}": told["final"][row]["value"] for row in ("searched", "defaults")}
                self._log(above, {f"{scores}": scores}, {f"{scores}": 0})
            self._client.log_artifact(above["run"], str(self._folder / "search.json"))
            self._client.log_artifacts(above["run"], str(self._folder / "report"), "report")
            self._client.set_terminated(above["run"])

    def _send_trial(self, above: str, told: Json, name: str, trial: Json) -> None:
        from mlflow.entities import Param

        tags = {
            "mlflow.parentRunId": above,
            "sermll.search": told["name"],
            "sermll.trial": str(trial["number"]),
            "sermll.state": trial["state"],
            **({"sermll.note": trial["note"][:5000]} if trial["note"] else {}),
        }
        run = self._run(name, lambda: tags, sent=False)
        if run["sent"]:
            return
        aims = zip(told["objectives"], trial["values"] or [], strict=False)
        found = {**{aim["name"]: value for aim, value in aims}, **(trial["all"] or {})}
        reached = {str(step): {"dev_ua_so_far": value} for step, value in trial["intermediate"]}
        self._log(run, {"end": found, **reached}, {"end": 0, **{step: int(step) for step in reached}})
        params = [Param(key, str(value)[:6000]) for key, value in trial["settings"].items()]
        self._client.log_batch(run["run"], params=params[:100])
        self._client.set_terminated(run["run"], {"FAIL": "FAILED", "PRUNED": "KILLED"}.get(trial["state"], "FINISHED"))
        run["sent"] = True
        self._remember()


class Tracker(_Sender):
    """Brings MLflow up to date with a run's folder."""

    def __init__(
        self,
        run_dir: Path,
        server: _Server | None,
        experiment: str,
        campaign: CampaignTracker | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """`campaign`: what the run belongs to, with its `labels` there."""
        super().__init__(run_dir, server, experiment)
        self._campaign, self._labels = campaign, labels or {}
        self._sizes: dict[str, int] = {}
        self.looked_at = -SYNC_S

    @classmethod
    def of(cls, experiment: Experiment, run_dir: Path) -> "Tracker":
        """The tracker that an experiment asks for."""
        uri = _uri(experiment, run_dir.parent)
        return cls(run_dir, _Server(uri) if uri else None, experiment.tracking.experiment or experiment.name)

    def sync(self) -> None:
        """Send what is new, now and then. A failure is tried again a minute later; it never stops training."""
        if self._server is None or not self._server.due or time.monotonic() - self.looked_at < SYNC_S:
            return
        sizes = {str(path): path.stat().st_size for path in self._folder.glob("fold-*/*.json")}
        if sizes != self._sizes and self._server.send(lambda: self._send(artifacts=False)):
            self._sizes = sizes
        self.looked_at = time.monotonic()

    def finish(self) -> str | None:
        """Send everything, files included; returns what went wrong, None if nothing did."""
        return self._server.send_at_last(lambda: self._send(artifacts=True)) if self._server else None

    def _send(self, *, artifacts: bool) -> None:
        above = self._campaign.run() if self._campaign else None
        with self._remembering(wait=artifacts):
            told = read_json(self._folder / "run.json"), read_yaml(self._folder / "config.yaml")
            parent = self._described(*told, self._folder.name, above)
            for number, folder in fold_folders(self._folder):
                if (folder / "history.json").exists():
                    self._set_aside(folder)
                    fold = self._described(*told, folder.name, parent["run"], str(number))
                    self._send_fold(fold, folder, artifacts=artifacts)
            if artifacts:
                self._send_summary(parent)

    def _described(self, run: Json, settings: Json, name: str, above: str | None, fold: str | None = None) -> Json:
        """What MLflow has of the run or fold `name`; it is created, with parameters, tags and data set, if need be."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        belongs = {
            **{f"sermll.axis.{axis}": value for axis, value in self._labels.items()},
            **({"mlflow.parentRunId": above} if above is not None else {}),
        }
        tags = {
            **belongs,
            "sermll.run_id": run["run_id"],
            "sermll.data_hash": run["data"]["data_hash"],
            "sermll.corpus": run["data"]["corpus"],
            "sermll.protocol": run["protocol"]["name"],
            "sermll.protocol_hash": run["protocol"]["hash"],
            "sermll.leaks": str(len(run["protocol"]["leaks"])),
            "sermll.version": run["code"]["version"],
            "sermll.commit": str(run["code"]["commit"]),
            "sermll.dirty": str(run["code"]["dirty"]),
            "sermll.seed": str(settings["seed"]),
            **({"sermll.fold": fold} if fold is not None else {}),
        }
        known = self._run(name, lambda: tags, described=False, epochs=0, finished=0, belongs=belongs)
        before = known.get("belongs", {})
        if self._campaign and before != belongs:  # it was begun by itself, or by another campaign
            for key in before.keys() - belongs.keys():
                self._delete_tag(known["run"], key)
            for key, value in belongs.items():
                self._client.set_tag(known["run"], key, value)
            known["belongs"] = belongs
            self._remember()
        if not known["described"]:
            params = flatten({key: value for key, value in settings.items() if key not in NOT_PARAMS})
            if fold is not None:
                params["fold"] = fold
            self._client.log_batch(
                known["run"], params=[Param(key, str(value)[:6000]) for key, value in params.items()]
            )
            data = run["data"]
            dataset = Dataset(
                name=data["corpus"],
                digest=data["data_hash"][:12],
                source_type="local",
                source=json.dumps({"uri": " + ".join(data["paths"])}),
                profile=json.dumps({"utterances": data["utterances"], "hours": data["hours"], **data["counts"]}),
            )
            self._client.log_inputs(
                known["run"], [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
            )
            known["described"] = True
            self._remember()
        return known

    def _set_aside(self, folder: Path) -> None:
        """Let a fold that was trained anew, or is just then, be a new run beside what MLflow has of it."""
        known, now = self._known["runs"].get(folder.name), _digest(folder / "result.json")
        if known and known["finished"] and known.get("result", now) != now:
            self._client.set_tag(known["run"], "sermll.trained_anew", "True")
            del self._known["runs"][folder.name]
            self._remember()

    def _delete_tag(self, run: str, key: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.delete_tag(run, key)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # it was deleted before, and the answer lost
                raise

    def _send_fold(self, fold: Json, folder: Path, *, artifacts: bool) -> None:
        """Epochs that MLflow does not have; with `artifacts`, the results and files of a finished fold."""
        history = read_json(folder / "history.json")
        if len(history) > fold["epochs"]:
            epochs = {
                str(row["epoch"] + 1): {
                    key: value for key, value in row.items() if key != "epoch" and isinstance(value, int | float)
                }
                for row in history[fold["epochs"] :]
            }
            self._log(fold, epochs, {epoch: int(epoch) for epoch in epochs})
            fold["epochs"] = len(history)
            self._remember()
        if not artifacts or fold["finished"] or not (folder / "result.json").exists():
            return
        result = read_json(folder / "result.json")
        summary = read_json(self._folder / "metrics.json")
        row = next(row for row in summary["folds"] if row["fold"] == result["fold"])
        finals = {f"test_{name}": row[name] for name in ("ua", "wa", "macro_f1")}
        finals |= {f"test_last_{name}": value for name, value in row["last"].items()}
        finals |= {"best_epoch": row["best_epoch"] + 1, "seconds": row["seconds"]}
        self._log(fold, {"end": finals}, {"end": 0})
        for name in ("history.json", "result.json", "predictions.parquet", "predictions_last.parquet"):
            self._client.log_artifact(fold["run"], str(folder / name))
        model = folder / result["best_checkpoint"] / "model.safetensors"
        fetch(model)  # another machine may have trained the fold
        self._client.log_artifact(fold["run"], str(model), "model")
        for name in ("config.yaml", "run.json"):  # what the weights need to be used
            self._client.log_artifact(fold["run"], str(self._folder / name), "model")
        self._client.set_terminated(fold["run"])
        fold |= {"finished": 1, "result": _digest(folder / "result.json")}
        self._remember()

    def _send_summary(self, parent: Json) -> None:
        """Scores over the finished folds and the report; sent again when folds have finished, or have done so anew."""
        summary = read_json(self._folder / "metrics.json")
        done, now = len(summary["folds"]), _digest(self._folder / "metrics.json")
        if parent["finished"] == done and parent.get("summary", now) == now:
            return
        values = {
            f"test_{prefix}{name}{suffix}": estimate[part]
            for prefix, estimates in (("", summary["selected"]), ("last_", summary.get("last", {})))
            for name, estimate in estimates.items()
            for suffix, part in (("", "value"), ("_low", "low"), ("_high", "high"))
            if estimate[part] is not None
        }
        self._log(parent, {f"{done} folds, {now}": values | {"folds": done}}, {f"{done} folds, {now}": done})
        for name in ("config.yaml", "run.json", "metrics.json", "predictions.parquet", "predictions_last.parquet"):
            if (self._folder / name).exists():  # an ensemble has no last epoch
                self._client.log_artifact(parent["run"], str(self._folder / name))
        if (self._folder / "report").is_dir():  # a campaign has one page for all its runs
            self._client.log_artifacts(parent["run"], str(self._folder / "report"), "report")
        if summary["complete"]:
            self._client.set_terminated(parent["run"])
        parent |= {"finished": done, "summary": now}
        self._remember()


def _digest(path: Path) -> str:
    """What tells a file from another; "": there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.exists() else ""


def upload(folder: Path, uri: str | None) -> str | None:
    """Send the results of a run, a campaign or a search to MLflow again, or to another server.

    Returns:
        What went wrong, None if nothing did.

    Raises:
        DataError: the folder is none of them, or none that has come to its end.
    """
    folder = folder.absolute()
    fetch_run(folder)

    def there(settings: Experiment) -> Experiment:
        tracking = settings.tracking.model_copy(update={"mlflow": uri} if uri is not None else {})
        return settings.model_copy(update={"tracking": tracking})

    if (folder / "metrics.json").exists():
        return Tracker.of(there(read_model_settings(folder)), folder).finish()
    if (folder / "search.json").exists():
        told = read_json(folder / "search.json")
        with naming(folder / "search.json"):
            settings = Experiment.model_validate(told["settings"])
        return SearchTracker.of(there(settings), folder).finish()
    if (folder / "campaign.json").exists():
        found = []
        for cell in read_json(folder / "campaign.json")["cells"]:
            run_dir = place(cell["run_dir"])
            fetch_run(run_dir)
            if (run_dir / "metrics.json").exists():
                labels = {axis: value for axis, value in cell["labels"].items() if axis != "fold"}
                found.append((there(read_model_settings(run_dir)), run_dir, labels))
        if found:
            return CampaignTracker.of(folder, found).finish()
    raise DataError(
        f"{address(folder)}: no metrics.json; give the folder of a finished `sermll train`, `sermll run`, "
        "`sermll matrix` or `sermll search`"
    )


def stored(runs: Path) -> str:
    """URI of the store that a runs folder has.

    Raises:
        DataError: results go to a server already, or there are none.
    """
    uri = default_uri(runs.absolute())
    if not uri.startswith("sqlite:"):
        raise DataError(f"results go to {without_password(uri)} (MLFLOW_TRACKING_URI): open that address in a browser")
    if not Path(uri.removeprefix("sqlite:///")).is_file():
        raise DataError(f"{runs}: no results were tracked here yet; give the folder of `tracking.runs`")
    return uri


def serve(uri: str, port: int) -> int:
    """Show a store in a browser, until the user interrupts; returns the server's exit status, 0 if interrupted."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--port", str(port)]
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # A group of its own, since the server leaves processes behind when it alone is told to end.
    server = subprocess.Popen(command, start_new_session=True)
    try:
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                server.wait(SERVER_ENDS_S)
            os.killpg(server.pid, signal.SIGKILL)
        signal.signal(signal.SIGTERM, before)
