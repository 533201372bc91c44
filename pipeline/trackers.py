"""MLflow and Weights & Biases, by their documented clients, as pipeline/tracking_process.py uses them.

A run of ours is one of theirs, with the stages under it: in MLflow as nested runs, in Weights & Biases as a group.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import quote, unquote, urlsplit, urlunsplit

PROJECT = "raylign"
TIMEOUT_S = 10
State = Literal["running", "done", "failed", "interrupted"]


class TrackerError(Exception):
    """What the user can mend, in a line."""


@dataclass(frozen=True)
class Point:
    """Metrics of a step. `time`: seconds since 1970."""

    step: int
    time: float
    values: dict[str, float]


@dataclass(frozen=True)
class Told:
    """A run of a tracker: that of the pipeline (`kind` is "pipeline") or of one of its stages."""

    name: str
    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    started: float | None = None  # seconds since 1970


class Tracker(Protocol):
    """Every method raises whatever the client raises."""

    def place(self) -> str:
        """Where it keeps its runs: ids are of this place alone. No credentials are in it."""

    def begin(self, told: Told, parent: str | None) -> str:
        """A new run; returns its id."""

    def resume(self, run: str, told: Told, parent: str | None) -> bool:
        """Go on with a run. False where there is none of that id."""

    def url(self, run: str) -> str | None:
        """Where to look at it."""

    def points(self, run: str, points: list[Point]) -> None: ...

    def end(self, run: str, state: State, ended: float, tags: Mapping[str, str], files: list[Path]) -> None: ...


def without_credentials(address: str) -> tuple[str, str | None, str | None]:
    """(the address, user, password) of `http://user:password@host`."""
    parts = urlsplit(address)
    if "@" not in parts.netloc:
        return address, None, None
    place = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return place, unquote(parts.username or ""), unquote(parts.password or "")


# ------------------------------------------------------------------------------------------------ MLflow


class MLflow:
    """By MlflowClient (https://mlflow.org/docs/latest/api_reference/python_api/mlflow.client.html); the server is that of
    MLFLOW_TRACKING_URI."""

    STATUS: Mapping[State, str] = {
        "running": "RUNNING",
        "done": "FINISHED",
        "failed": "FAILED",
        "interrupted": "KILLED",
    }
    AT_ONCE = 1000  # metrics in a request; 100 parameters, 100 tags
    VALUE = 5000  # characters of a tag or parameter

    def __init__(self, project: str | None) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(TIMEOUT_S))  # 120 s, and again and again
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        address, user, password = without_credentials(os.environ.get("MLFLOW_TRACKING_URI", ""))
        if user is not None and password is not None:  # not to be read in any message
            os.environ |= {
                "MLFLOW_TRACKING_URI": address, "MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password,
            }  # fmt: skip
        from mlflow.tracking import MlflowClient

        self.client, self.address = MlflowClient(tracking_uri=address), address
        self.project = project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        self._experiment: str | None = None

    def place(self) -> str:
        return self.address

    @property
    def experiment(self) -> str:
        if self._experiment is None:
            found = self.client.get_experiment_by_name(self.project)
            self._experiment = found.experiment_id if found else self.client.create_experiment(self.project)
        return self._experiment

    def begin(self, told: Told, parent: str | None) -> str:
        from mlflow.entities import Param

        tags = {"raylign.kind": told.kind, **self._tags(told.tags)}
        if parent is not None:
            tags["mlflow.parentRunId"] = parent
        started = int(1000 * told.started) if told.started else None
        run = self.client.create_run(self.experiment, start_time=started, tags=tags, run_name=told.name).info.run_id
        parameters = [Param(self._key(key), self._value(value)) for key, value in told.config.items()]
        for i in range(0, len(parameters), 100):
            self.client.log_batch(run, params=parameters[i : i + 100])
        return str(run)

    def resume(self, run: str, told: Told, parent: str | None) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            if self.client.get_run(run).info.lifecycle_stage != "active":
                return False
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        self.client.update_run(run, status=self.STATUS["running"])
        return True

    def url(self, run: str) -> str | None:
        if not self.address.startswith("http"):
            return None
        return f"{self.address.rstrip('/')}/#/experiments/{quote(self.experiment)}/runs/{run}"

    def points(self, run: str, points: list[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(self._key(name), value, int(1000 * point.time), point.step)
            for point in points
            for name, value in point.values.items()
        ]
        for i in range(0, len(metrics), self.AT_ONCE):
            self.client.log_batch(run, metrics=metrics[i : i + self.AT_ONCE])

    def end(self, run: str, state: State, ended: float, tags: Mapping[str, str], files: list[Path]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(run, tags=[RunTag(key, value) for key, value in self._tags(tags).items()])
        for file in files:
            self.client.log_artifact(run, str(file))
        self.client.set_terminated(run, self.STATUS[state], int(1000 * ended))

    def _tags(self, tags: Mapping[str, str]) -> dict[str, str]:
        return {f"raylign.{self._key(key)}": value[: self.VALUE] for key, value in tags.items()}

    def _value(self, value: Any) -> str:
        return (value if isinstance(value, str) else json.dumps(value))[: self.VALUE]

    @staticmethod
    def _key(name: str) -> str:
        """What it allows in a name."""
        return re.sub(r"[^\w.\- :/]", "_", name)[:250]


# ------------------------------------------------------------------------------------------------ Weights & Biases


class WandB:
    """By wandb.init and Run (https://docs.wandb.ai/ref/python/); settings and key are those of its own variables, or of
    `wandb login`."""

    CODES: Mapping[State, int] = {"running": 0, "done": 0, "failed": 1, "interrupted": 130}

    def __init__(self, project: str | None, folder: Path, group: str) -> None:
        import wandb

        self.wandb, self.group = wandb, group
        self.folder = os.environ.get("WANDB_DIR") or str(folder)
        self.project = project or os.environ.get("WANDB_PROJECT") or PROJECT
        self.runs: dict[str, Any] = {}

    def place(self) -> str:
        address, _, _ = without_credentials(os.environ.get("WANDB_BASE_URL", "wandb.ai"))
        return "/".join(filter(None, (address, os.environ.get("WANDB_ENTITY"), self.project)))

    def begin(self, told: Told, parent: str | None) -> str:
        run = hashlib.sha256(os.urandom(16)).hexdigest()[:12]
        self._open(run, told)
        return run

    def resume(self, run: str, told: Told, parent: str | None) -> bool:
        if run not in self.runs:
            self._open(run, told)
        return True

    def _open(self, run: str, told: Told) -> None:
        """Go on with a run, or begin it."""
        if os.environ.get("WANDB_MODE", "online") == "online" and not self.wandb.login(prompt=False, verify=False):
            raise TrackerError("no credentials: set WANDB_API_KEY, run `wandb login`, or set WANDB_MODE=offline")
        settings = self.wandb.Settings(
            init_timeout=3 * TIMEOUT_S, silent=True, console="off", x_disable_stats=True, x_disable_meta=True,
            x_disable_machine_info=True, disable_git=True, disable_code=True,
        )  # fmt: skip
        self.runs[run] = self.wandb.init(
            project=self.project, id=run, resume="allow", name=told.name, group=self.group, job_type=told.kind,
            config=told.config | {"raylign": told.tags}, dir=self.folder, reinit="create_new", settings=settings,
        )  # fmt: skip

    def url(self, run: str) -> str | None:
        opened = self.runs.get(run)
        return opened.url if opened is not None else None

    def points(self, run: str, points: list[Point]) -> None:
        for point in points:
            self.runs[run].log(point.values, step=point.step)

    def end(self, run: str, state: State, ended: float, tags: Mapping[str, str], files: list[Path]) -> None:
        opened = self.runs[run]
        opened.config.update({"raylign": dict(opened.config.get("raylign", {})) | dict(tags)}, allow_val_change=True)
        for file in files:
            opened.save(str(file), base_path=str(file.parent), policy="now")
        opened.finish(exit_code=self.CODES[state])
        del self.runs[run]


def trackers_of(name: str, project: str | None, folder: Path, group: str) -> Tracker:
    return MLflow(project) if name == "mlflow" else WandB(project, folder, group)


def redacted(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """A message of a library without what the environment holds of secrets."""
    text = re.sub(r"//[^/@\s]*@", "//", text)
    for secret in _secrets(environment):
        text = text.replace(secret, "***")
    return text


def _secrets(environment: Mapping[str, str]) -> Iterator[str]:
    for name, value in environment.items():
        if len(value) >= 8 and re.search(r"KEY|TOKEN|SECRET|PASSWORD", name):
            yield value
