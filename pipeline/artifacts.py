"""The run folder: what a run publishes, atomically, and what it remembers of itself.

    runs/NAME/spec.yaml, run.json, report.html
    runs/NAME/STAGE/manifest.json, metrics.jsonl, ledger.json, model/, checkpoints/, or data/ of a dataset
    runs/NAME/logs/STAGE.log
    runs/NAME/.work/STAGE-FINGERPRINT/    a stage that is being made, or was interrupted
    runs/NAME/.previous/STAGE-FINGERPRINT/    what a changed spec replaced: changing it back finds it again

A stage is made in `.work` and becomes visible by one rename, its manifest written before it. In an object store, where nothing
can be renamed, it is the manifest, sent last, that makes it visible; here is its mirror (stages/storage.py). What was cut off
while it was sent has SENDING beside its manifest, and is sent again.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.lease import is_leased, leased
from stages.base import Artifact
from stages.data.files import split_address
from stages.errors import DataError, RaylignError
from stages.storage import address, is_remote, mirrored, names, pull, push, remove, there, use

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a run or a stage: of a folder, that is
SHORT = 12  # characters of a fingerprint in a folder's name
SENDING = ".sending"
LARGE = ("model", "adapter", "data", "checkpoints")


def write_json(path: Path, value: Any) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of one."""
    write_text(path, json.dumps(value, indent=1))


def write_text(path: Path, text: str) -> None:
    """As `write_json`; a link that stands in the way is replaced, not written through: the folder may be another's."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    with temporary.open("x") as out:
        out.write(text)
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """What a file holds; None where there is none.

    Raises:
        DataError: it is not whole.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not whole: {error}") from error


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What is published in a folder; None where nothing is. The mirror's own copy of what the store has not counts only while
    it is being sent from here: somebody may have removed it there.

    Raises:
        DataError: it cannot be told what was published, so neither used nor made again without a word.
    """
    file = folder / "manifest.json"
    if not (folder / SENDING).is_file() and not there(file):
        return None
    mend = f"put it back, or remove the folder {address(folder)} and run the spec again, which makes the stage anew"
    try:
        manifest = read_json(file)
    except DataError as error:
        raise DataError(f"{error}\n  {mend}") from error
    if manifest is not None and not (isinstance(manifest, dict) and isinstance(manifest.get("fingerprint"), str)):
        raise DataError(f"{file}: not the manifest of a stage: it has no fingerprint\n  {mend}")
    return manifest


def _state_problem(file: Path) -> str | None:
    """What is wrong with a run's record, which may be another's."""
    try:
        state = read_json(file)
    except DataError as error:
        return f"not the record of a run ({error.__cause__}); running the spec again writes it anew"
    stages = state.get("stages") if isinstance(state, dict) else None
    if not isinstance(stages, dict) or not all(isinstance(stage, dict) for stage in stages.values()):
        return "not the record of a run"
    odd = next((name for name in stages if not NAME.fullmatch(name)), None)
    return None if odd is None else f"{odd!r} is no name of a stage"


def use_run(path: str) -> Path:
    """The local folder of a run that is named by its folder or address."""
    if not is_remote(path):
        return Path(path)
    base, inner, query = split_address(path)
    storage, _, name = inner.rstrip("/").rpartition("/")
    return use(f"{base}{storage}{query}") / name


def product(folder: Path, produces: str) -> Path:
    """The folder that a stage's users read."""
    return folder / ("data" if produces == "dataset" else "model")


class RunFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run: its folder, or address in an object store.

        Raises:
            DataError: the folder is not that of a run, or its record is not what is written there.
        """
        folder = use_run(str(path))
        if not pull(folder / "run.json").is_file():
            raise DataError(f"{path}: not a run folder (there is no run.json in it)")
        run = cls(folder)
        if problem := _state_problem(run.path / "run.json"):
            raise DataError(f"{path}/run.json: {problem}")
        if mirrored(folder):
            for name in run.state().get("stages", {}):
                run.fetch(name)
        return run

    @property
    def address(self) -> str:
        """Where it lies, as the user is told."""
        return address(self.path)

    def fetch(self, name: str) -> None:
        """Have what is told of a published stage here: all but its large files."""
        pull(self.stage(name), without=LARGE)

    @property
    def prepared(self) -> Path:
        """Prepared data is shared by all runs of a storage."""
        return self.path.parent / ".prepared"

    def stage(self, name: str) -> Path:
        return self.path / name

    def log(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    def work(self, name: str, fingerprint: str) -> Path:
        return self.path / ".work" / f"{name}-{fingerprint[:SHORT]}"

    def _previous(self, name: str, fingerprint: str) -> Path:
        return self.path / ".previous" / f"{name}-{fingerprint[:SHORT]}"

    def manifest(self, name: str) -> dict[str, Any] | None:
        return read_manifest(self.stage(name))

    def published(self, kind: str) -> list[tuple[str, dict[str, Any]]]:
        """(name, manifest) of the stages of a kind that are published as the run's present spec wants them."""
        records = {n: r for n, r in self.state().get("stages", {}).items() if r.get("kind") == kind}
        made = [(name, self.manifest(name), record.get("fingerprint")) for name, record in records.items()]
        return [(name, manifest) for name, manifest, wanted in made if manifest and manifest["fingerprint"] == wanted]

    def find(self, name: str, fingerprint: str) -> Path | None:
        """The folder of a published artifact: the stage's own, or where a change that was taken back had put it aside."""
        for folder in (self.stage(name), self._previous(name, fingerprint)):
            manifest = read_manifest(folder)
            if manifest is not None and manifest["fingerprint"] == fingerprint:
                return folder
        return None

    def was_started(self, name: str, fingerprint: str) -> bool:
        work = self.work(name, fingerprint)
        pull(work / "checkpoints", only="*/complete.json")
        return any(work.glob("checkpoints/checkpoint-*/complete.json")) or "rewards" in names(work)

    def recall(self, name: str, fingerprint: str) -> None:
        """Bring a published artifact to its place if a later one stands there; finish sending it where that was cut off."""
        manifest = self.manifest(name)
        if manifest is None or manifest["fingerprint"] != fingerprint:
            self._replace(name, self._previous(name, fingerprint))
        elif (self.stage(name) / SENDING).is_file():
            _send(self.stage(name))

    def publish(self, name: str, manifest: dict[str, Any]) -> Path:
        """Make a finished stage visible. What stood there is kept aside."""
        work = self.work(name, manifest["fingerprint"])
        write_json(work / "manifest.json", manifest)
        self._replace(name, work)
        return self.stage(name)

    def _replace(self, name: str, source: Path) -> None:
        target, old = self.stage(name), self.manifest(name)
        if mirrored(source):
            pull(source, without=("checkpoints",)), pull(target)
        if old is None and mirrored(target) and target.exists():
            _remove(target)  # of a stage that the store does not have
        if target.exists():
            aside = self._previous(name, old["fingerprint"] if old else "unknown")
            aside.parent.mkdir(exist_ok=True)
            if aside.exists():
                _remove(aside)
            os.replace(target, aside)
            _send(aside)
            remove(target, first="manifest.json")
        os.replace(source, target)
        _send(target)
        remove(source, first="manifest.json")

    def artifact(self, name: str) -> Artifact:
        """A published artifact, as the stages that use it get it."""
        manifest = self.manifest(name)
        assert manifest is not None, f"{name} is not published"
        return Artifact(name, manifest["produces"], str(product(self.stage(name), manifest["produces"])), manifest)

    # -- the run's own record

    def save_spec(self, spec: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        YAML().dump(spec, text)
        write_text(self.path / "spec.yaml", text.getvalue())
        push(self.path / "spec.yaml")

    def save_state(self, state: dict[str, Any]) -> None:
        write_json(self.path / "run.json", state)
        push(self.path / "run.json")

    def state(self) -> dict[str, Any]:
        return read_json(self.path / "run.json") or {}

    def is_locked(self) -> bool:
        """Whether a process is carrying the run out."""
        if mirrored(self.path):
            return is_leased(self.path)
        try:
            with self.lock():
                return False
        except RaylignError:
            return True

    @contextmanager
    def lock(self, say: Callable[[str], None] = print) -> Iterator[Callable[[], None]]:
        """Only one process carries out a run at a time. Gives what raises a StageError where that is no longer this one.

        Raises:
            RaylignError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RaylignError(f"{self.path}: another process is carrying out this run") from None
            if not mirrored(self.path):
                yield lambda: None
                return
            with leased(self.path, say) as lease:
                yield lease.check


def _send(folder: Path) -> None:
    """Publish a folder in the store, where there is one. Checkpoints have led to the model: there they are not kept."""
    if mirrored(folder):
        (folder / SENDING).touch()
        push(folder, last="manifest.json", without=("checkpoints",))
        (folder / SENDING).unlink()


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)
