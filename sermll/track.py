"""The only writer to MLflow. Everything it sends is read from the run's folder, so that it can be sent again.

One parent run per experiment run, one child per fold; a campaign's run stands above those of its cells.
`<run>/mlflow.json` remembers what the server has; a server that is away is tried again later and, at the end, by
`sermll track RUN`.
"""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sermll.config import Experiment, flatten, without_password
from sermll.errors import ConfigError, DataError
from sermll.files import fetch_run, read_json, read_yaml, write_json
from sermll.results import read_model_settings
from sermll.storage import address, origin, place

RETRY_S = 60.0
SYNC_S = 5.0
"""Epochs are sent together: what is shorter than this would cost the training beside it more than it tells."""
NOT_PARAMS = ("resources", "tracking")


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
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs / 'mlflow.db'}"


class _Sender:
    """What MLflow has of a folder, and the way there."""

    def __init__(self, folder: Path, uri: str | None, experiment: str) -> None:
        """`uri` None: tracking is off."""
        self._folder, self._uri, self._experiment = folder, uri, experiment
        self._fault: str | None = None
        self._tried_at = -RETRY_S
        self._ready: Any = None

    def _attempt(self, send: Callable[[], Any]) -> None:
        self._tried_at = time.monotonic()
        try:
            send()
            self._fault = None
        except Exception as error:  # whatever a server or its client raises, training goes on and the user is told
            said = str(error).strip().partition(chr(10))[0]
            self._fault = f"{type(error).__name__}: {without_password(said)}"

    def client(self) -> Any:  # mlflow is loaded when first needed
        """The connection to the server."""
        if self._ready is None:
            # A server that is away should cost seconds, not the minutes of MLflow's own retries.
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
            from mlflow import MlflowClient

            for name in ("mlflow", "alembic"):  # their own setup of logging runs on import
                logging.getLogger(name).setLevel(logging.ERROR)
            self._ready = MlflowClient(tracking_uri=self._uri)
        return self._ready

    def _memory(self) -> dict[str, Any]:
        """What the server at this URI already has."""
        path = self._folder / "mlflow.json"
        memory = read_json(path) if path.exists() else {}
        uri = without_password(self._uri or "")
        return memory if memory.get("uri") == uri else {"uri": uri, "runs": {}}

    def _remember(self, memory: dict[str, Any]) -> None:
        write_json(self._folder / "mlflow.json", memory)

    def _experiment_id(self, client: Any, memory: dict[str, Any]) -> str:
        if "experiment_id" not in memory:
            found = client.get_experiment_by_name(self._experiment)
            if found is None:
                local = self._uri is not None and self._uri.startswith("sqlite:")
                place = (self._folder.parent / "mlflow-artifacts").as_uri() if local else None
                memory["experiment_id"] = client.create_experiment(self._experiment, artifact_location=place)
            else:
                memory["experiment_id"] = found.experiment_id
        return memory["experiment_id"]


class CampaignTracker(_Sender):
    """The MLflow run above the runs of a campaign's cells: its table, page and pictures."""

    @classmethod
    def of(cls, experiment: Experiment, folder: Path) -> "CampaignTracker":
        """The tracker of a campaign whose cells are like `experiment`."""
        uri = _uri(experiment, folder.parent)
        return cls(folder, uri, experiment.tracking.experiment or experiment.name)

    def run(self) -> str:
        """MLflow's id of the campaign; it is created if need be."""
        memory = self._memory()
        if "campaign" not in memory["runs"]:
            told = read_json(self._folder / "campaign.json")
            tags = {
                "sermll.campaign": told["name"],
                "sermll.version": told["code"]["version"],
                "sermll.commit": str(told["code"]["commit"]),
                "sermll.dirty": str(told["code"]["dirty"]),
                **{f"sermll.axis.{axis}": ", ".join(values)[:5000] for axis, values in told["axes"].items()},
            }
            experiment = self._experiment_id(self.client(), memory)
            created = self.client().create_run(experiment, run_name=self._folder.name, tags=tags)
            memory["runs"]["campaign"] = created.info.run_id
            self._remember(memory)
        return memory["runs"]["campaign"]

    def finish(self) -> str | None:
        """Send the table, the page and the pictures; returns what went wrong, None if nothing did."""
        if self._uri is None:
            return None
        self._attempt(self._send)
        return self._fault

    def _send(self) -> None:
        client, run = self.client(), self.run()
        told = read_json(self._folder / "campaign.json")
        asked = {(cell["run_dir"], fold) for cell in told["cells"] for fold in cell["folds"]}
        done = sum((place(folder) / f"fold-{fold}" / "result.json").exists() for folder, fold in asked)
        for name, value in {"cells": len(told["cells"]), "folds": len(asked), "folds_finished": done}.items():
            client.log_metric(run, name, value)
        client.log_artifact(run, str(self._folder / "campaign.json"))
        client.log_artifacts(run, str(self._folder / "report"), "report")
        client.set_terminated(run)


class SearchTracker(_Sender):
    """The MLflow run of a search, above one for each trial."""

    @classmethod
    def of(cls, experiment: Experiment, folder: Path) -> "SearchTracker":
        """The tracker of a search for settings of `experiment`."""
        uri = _uri(experiment, folder.parent)
        return cls(folder, uri, experiment.tracking.experiment or experiment.name)

    def finish(self) -> str | None:
        """Send what search.json says and the page; returns what went wrong, None if nothing did."""
        if self._uri is None:
            return None
        self._attempt(self._send)
        return self._fault

    def _send(self) -> None:
        client, memory = self.client(), self._memory()
        told = read_json(self._folder / "search.json")
        experiment = self._experiment_id(client, memory)
        if "search" not in memory["runs"]:
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
            memory["runs"]["search"] = client.create_run(experiment, run_name=self._folder.name, tags=tags).info.run_id
            self._remember(memory)
        above = memory["runs"]["search"]
        for study in told["studies"]:
            for trial in study["trials"]:
                name = f"fold {'-'.join(map(str, study['test_folds']))} trial {trial['number']}"
                if trial["state"] != "RUNNING" and name not in memory["runs"]:
                    memory["runs"][name] = self._send_trial(client, experiment, above, told, name, trial)
                    self._remember(memory)
        if told["final"]:
            for row in ("searched", "defaults"):
                client.log_metric(above, f"test_ua_{row}", told["final"][row]["value"])
        client.log_artifact(above, str(self._folder / "search.json"))
        client.log_artifacts(above, str(self._folder / "report"), "report")
        client.set_terminated(above)

    def _send_trial(
        self, client: Any, experiment: str, above: str, told: dict[str, Any], name: str, trial: dict[str, Any]
    ) -> str:
        from mlflow.entities import Metric, Param

        tags = {
            "mlflow.parentRunId": above,
            "sermll.search": told["name"],
            "sermll.trial": str(trial["number"]),
            "sermll.state": trial["state"],
            **({"sermll.note": trial["note"]} if trial["note"] else {}),
        }
        run = client.create_run(experiment, run_name=name, tags=tags).info.run_id
        now = int(time.time() * 1000)
        aims = zip(told["objectives"], trial["values"] or [], strict=False)
        found = {**{aim["name"]: value for aim, value in aims}, **(trial["all"] or {})}
        metrics = [Metric(key, value, now, 0) for key, value in found.items()]
        metrics += [Metric("dev_ua_so_far", value, now, step) for step, value in trial["intermediate"]]
        params = [Param(key, str(value)[:6000]) for key, value in trial["settings"].items()]
        client.log_batch(run, metrics=metrics[:1000], params=params[:100])
        client.set_terminated(run, {"FAIL": "FAILED", "PRUNED": "KILLED"}.get(trial["state"], "FINISHED"))
        return run


class Tracker(_Sender):
    """Brings MLflow up to date with a run's folder."""

    def __init__(
        self,
        run_dir: Path,
        uri: str | None,
        experiment: str,
        campaign: CampaignTracker | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """`campaign`: what the run belongs to, with its `labels` there."""
        super().__init__(run_dir, uri, experiment)
        self._campaign, self._labels = campaign, labels or {}
        self._sizes: dict[str, int] = {}

    @classmethod
    def of(
        cls,
        experiment: Experiment,
        run_dir: Path,
        campaign: CampaignTracker | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> "Tracker":
        """The tracker that an experiment asks for."""
        uri = _uri(experiment, run_dir.parent)
        return cls(run_dir, uri, experiment.tracking.experiment or experiment.name, campaign, labels)

    def client(self) -> Any:
        """The connection to the server; a campaign's runs share one."""
        return self._campaign.client() if self._campaign else super().client()

    def sync(self) -> None:
        """Send what is new, now and then. A failure is tried again a minute later; it never stops training."""
        if self._uri is None or time.monotonic() - self._tried_at < (RETRY_S if self._fault else SYNC_S):
            return
        sizes = {str(path): path.stat().st_size for path in self._folder.glob("fold-*/*.json")}
        if sizes == self._sizes:
            return
        self._attempt(lambda: self._send(artifacts=False))
        if self._fault is None:
            self._sizes = sizes

    def finish(self) -> str | None:
        """Send everything, files included; returns what went wrong, None if nothing did."""
        if self._uri is None:
            return None
        self._attempt(lambda: self._send(artifacts=True))
        return self._fault

    def _send(self, *, artifacts: bool) -> None:
        client, memory = self.client(), self._memory()
        run = read_json(self._folder / "run.json")
        settings = read_yaml(self._folder / "config.yaml")
        self._experiment_id(client, memory)
        above = self._campaign.run() if self._campaign else None
        parent = self._known(client, memory, run, settings, self._folder.name, above)
        if above and memory.get("campaign") != above:  # it was begun by itself, or by another campaign
            client.set_tag(parent["run"], "mlflow.parentRunId", above)
            memory["campaign"] = above
            self._remember(memory)
        for folder in sorted(self._folder.glob("fold-*"), key=lambda path: int(path.name[5:])):
            if (folder / "history.json").exists():
                fold = self._known(client, memory, run, settings, folder.name, parent["run"], folder.name[5:])
                self._send_fold(client, memory, fold, folder, artifacts=artifacts)
        if artifacts:
            self._send_summary(client, memory, parent)

    def _known(
        self,
        client: Any,
        memory: dict[str, Any],
        run: dict[str, Any],
        settings: dict[str, Any],
        name: str,
        parent: str | None,
        fold: str | None = None,
    ) -> dict[str, Any]:
        """What MLflow has of the run or fold `name`; it is created, with parameters, tags and data set, if need be."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        if name not in memory["runs"]:
            tags = {
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
                **{f"sermll.{axis}": value for axis, value in self._labels.items()},
            }
            if parent is not None:
                tags["mlflow.parentRunId"] = parent
            if fold is not None:
                tags["sermll.fold"] = fold
            created = client.create_run(memory["experiment_id"], run_name=name, tags=tags)
            memory["runs"][name] = {"run": created.info.run_id, "described": False, "epochs": 0, "finished": 0}
            self._remember(memory)
        known = memory["runs"][name]
        if not known["described"]:
            params = flatten({key: value for key, value in settings.items() if key not in NOT_PARAMS})
            if fold is not None:
                params["fold"] = fold
            client.log_batch(known["run"], params=[Param(key, str(value)) for key, value in params.items()])
            data = run["data"]
            dataset = Dataset(
                name=data["corpus"],
                digest=data["data_hash"][:12],
                source_type="local",
                source=json.dumps({"uri": " + ".join(data["paths"])}),
                profile=json.dumps({"utterances": data["utterances"], "hours": data["hours"], **data["counts"]}),
            )
            client.log_inputs(known["run"], [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
            known["described"] = True
            self._remember(memory)
        return known

    def _send_fold(
        self,
        client: Any,
        memory: dict[str, Any],
        fold: dict[str, Any],
        folder: Path,
        *,
        artifacts: bool,
    ) -> None:
        """Epochs that MLflow does not have; with `artifacts`, the results and files of a finished fold."""
        from mlflow.entities import Metric

        history = read_json(folder / "history.json")
        now_ms = int(time.time() * 1000)
        values = [
            Metric(key, float(value), now_ms, row["epoch"] + 1)
            for row in history[fold["epochs"] :]
            for key, value in row.items()
            if key != "epoch" and isinstance(value, int | float)
        ]
        for start in range(0, len(values), 1000):  # the most that one call may carry
            client.log_batch(fold["run"], metrics=values[start : start + 1000])
        fold["epochs"] = max(fold["epochs"], len(history))
        self._remember(memory)
        if not artifacts or fold["finished"] or not (folder / "result.json").exists():
            return
        result = read_json(folder / "result.json")
        summary = read_json(self._folder / "metrics.json")
        row = next(row for row in summary["folds"] if row["fold"] == result["fold"])
        finals = {f"test_{name}": row[name] for name in ("ua", "wa", "macro_f1")}
        finals |= {f"test_last_{name}": value for name, value in row["last"].items()}
        finals |= {"best_epoch": row["best_epoch"] + 1, "seconds": row["seconds"]}
        client.log_batch(fold["run"], metrics=[Metric(key, float(value), now_ms, 0) for key, value in finals.items()])
        for name in ("history.json", "result.json", "predictions.parquet", "predictions_last.parquet"):
            client.log_artifact(fold["run"], str(folder / name))
        best = folder / result["best_checkpoint"]
        client.log_artifact(fold["run"], str(best / "model.safetensors"), "model")
        for name in ("config.yaml", "run.json"):  # what the weights need to be used
            client.log_artifact(fold["run"], str(self._folder / name), "model")
        client.set_terminated(fold["run"])
        fold["finished"] = 1
        self._remember(memory)

    def _send_summary(self, client: Any, memory: dict[str, Any], parent: dict[str, Any]) -> None:
        """Scores over the finished folds and the report; sent again when more folds have finished."""
        from mlflow.entities import Metric

        summary = read_json(self._folder / "metrics.json")
        now_ms = int(time.time() * 1000)
        values = {
            f"test_{prefix}{name}{suffix}": estimate[part]
            for prefix, estimates in (("", summary["selected"]), ("last_", summary.get("last", {})))
            for name, estimate in estimates.items()
            for suffix, part in (("", "value"), ("_low", "low"), ("_high", "high"))
            if estimate[part] is not None
        }
        values["folds"] = len(summary["folds"])
        done = len(summary["folds"])
        if parent["finished"] == done:
            return
        client.log_batch(parent["run"], metrics=[Metric(key, float(v), now_ms, done) for key, v in values.items()])
        for name in (
            "config.yaml",
            "run.json",
            "metrics.json",
            "predictions.parquet",
            "predictions_last.parquet",
        ):
            client.log_artifact(parent["run"], str(self._folder / name))
        if (self._folder / "report").is_dir():  # a campaign has one page for all its runs
            client.log_artifacts(parent["run"], str(self._folder / "report"), "report")
        if summary["complete"]:
            client.set_terminated(parent["run"])
        parent["finished"] = done
        self._remember(memory)


def upload(run_dir: Path, uri: str | None) -> str | None:
    """Send a run's results to MLflow again, or to another server; returns what went wrong, None if nothing did.

    Raises:
        DataError: the folder is not a run.
    """
    run_dir = run_dir.absolute()
    fetch_run(run_dir)
    if not (run_dir / "metrics.json").exists():
        raise DataError(f"{address(run_dir)}: no metrics.json; give the folder of a finished `sermll train`")
    settings = read_model_settings(run_dir)
    if uri is not None:
        settings = settings.model_copy(update={"tracking": settings.tracking.model_copy(update={"mlflow": uri})})
    return Tracker.of(settings, run_dir).finish()


def serve(runs: Path, port: int) -> int:
    """Show the store of a runs folder in a browser, until the user interrupts; returns the server's exit status.

    Raises:
        DataError: results go to a server already, or there are none.
    """
    uri = default_uri(runs.absolute())
    if not uri.startswith("sqlite:"):
        raise DataError(f"results go to {without_password(uri)} (MLFLOW_TRACKING_URI): open that address in a browser")
    if not Path(uri.removeprefix("sqlite:///")).is_file():
        raise DataError(f"{runs}: no results were tracked here yet; give the folder of `tracking.runs`")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--port", str(port)]
    return subprocess.call(command)
