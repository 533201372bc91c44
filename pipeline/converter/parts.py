"""What a converter fills in: the parts of a spec, what was not carried over and why, and what means something else here."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

from stages import KINDS
from stages.data.files import classify
from stages.training.arguments import MANAGED

PROMPTS = "prompts have the model's positions, less `max_new_tokens`, which stands beside `train`"
NOTHING: tuple[Any, ...] = (None, "", [], {})
# Ways to write the same path of DeepSpeed's configuration: `ds_z3_config.json`, `deepspeed_configs/zero3_bf16.json`, `zero2`
ZERO = re.compile(r"(?:zero|(?:^|[_-])z|stage[_-]?)([0-3])", re.IGNORECASE)


class Theirs:
    """Their configuration; what nobody took is left."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)
        self.taken: set[str] = set()

    def take(self, name: str, default: Any = None) -> Any:
        """A value, or the default where it is absent or says nothing."""
        self.taken.add(name)
        value = self.values.get(name)
        return default if value in NOTHING else value

    def give_back(self, *names: str) -> None:
        """What was taken and is of no use after all; it will be told."""
        self.taken -= set(names)

    def left(self) -> dict[str, Any]:
        """Keys that were not taken and say something."""
        return {k: v for k, v in self.values.items() if k not in self.taken and v not in NOTHING}


@dataclass
class Ours:
    """A spec with one stage that trains, and perhaps an evaluation."""

    tool: str
    kind: str
    name: str
    model: str
    head: dict[str, Any] = field(default_factory=dict)  # keys of the spec
    stage: dict[str, Any] = field(default_factory=dict)  # keys of the stage, besides the others here
    data: list[dict[str, Any]] = field(default_factory=list)
    heldout: list[dict[str, Any]] = field(default_factory=list)  # for an evaluation
    train: dict[str, Any] = field(default_factory=dict)
    tuning: dict[str, Any] = field(default_factory=dict)
    mask: dict[str, Any] = field(default_factory=dict)
    was: dict[str, str] = field(default_factory=dict)  # a key of ours -> theirs, where it has another name
    lost: list[tuple[str, str]] = field(default_factory=list)  # (theirs, why it was not carried over)
    differs: list[str] = field(default_factory=list)

    def drop(self, key: str, value: Any, why: str) -> None:
        self.lost.append((f"{key}: {shown(value)}", why))

    def trains(
        self, theirs: Theirs, names: Mapping[str, str], convert: Callable[[str, Any], Any] | None = None
    ) -> None:
        """Carry keys over into `train` by a table of their names and ours."""
        for name, ours in names.items():
            value = theirs.take(name)
            if value is None:
                continue
            value = number(convert(ours, value) if convert else value)
            if ours in fields_of(self.kind):
                self.train[ours] = value
                if name != ours:
                    self.was[ours] = name
            else:
                self.drop(name, value, MANAGED.get(ours, f"a {self.kind} stage has no {ours}"))

    def finish(self, theirs: Theirs, reasons: Mapping[str, str], silent: Iterable[str] = ()) -> None:
        """What is left: with the reason a table knows, the trainer's own fields by their own names, or as unknown.

        Args:
            silent: keys that say where the other tool keeps its files, and nothing of the training.
        """
        for name, value in theirs.left().items():
            if name in silent:
                continue
            if (why := next((w for part, w in reasons.items() if re.fullmatch(part, name)), None)) is not None:
                if value is not False:
                    self.drop(name, value, why)
            elif name in fields_of(self.kind):
                self.train[name] = number(value)
            elif name in MANAGED:
                if value is not False:
                    self.drop(name, value, MANAGED[name])
            else:
                self.drop(name, value, f"not known to this converter; is it a key of {self.tool}?")


def fields_of(kind: str) -> Mapping[str, Any]:
    """The fields of a stage's `train`."""
    return KINDS[kind].model_fields["train"].annotation.model_fields  # type: ignore[union-attr]


def shown(value: Any) -> str:
    text = str(value).replace("\n", " ")
    return text if len(text) <= 60 else text[:59] + "…"


def number(value: Any) -> Any:
    """`2e-4` is text to YAML 1.1, which these tools read."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value.strip()):
        return float(value)
    return value


def split_names(value: Any) -> list[str]:
    """`a, b` or a list."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else list(value or [])


def deepspeed_of(value: Any, folder: Path, out: Path, ours: Ours) -> None:
    """Their DeepSpeed file where it is there, else the preset that its name says."""
    if isinstance(value, dict):
        zero = value.get("zero_optimization", {})
        ours.stage["deepspeed"] = f"zero{zero.get('stage', 0)}" + "+offload" * ("offload_optimizer" in zero)
        ours.drop(
            "deepspeed", value, "a preset in its place; write the mapping to a JSON file and name that, for all of it"
        )
        return
    file = place_of(str(value), folder)
    if file.is_file():
        ours.stage["deepspeed"] = os.path.relpath(file.resolve(), out.resolve().parent)
    elif found := ZERO.search(Path(str(value)).name):
        preset = f"zero{found.group(1)}" + "+offload" * ("offload" in str(value) and found.group(1) != "0")
        ours.stage["deepspeed"] = preset
        ours.was["deepspeed"] = f"{value}, which is not here: the preset of its name"
    else:
        ours.drop("deepspeed", value, "the file is not here, and its name is no stage of ZeRO; write zero2 or zero3")


def place_of(value: str, folder: Path) -> Path:
    """Where a path of theirs leads: beside their file, or from where the command is given, as their tools take it."""
    path = os.path.expanduser(value)
    places = [folder / path, Path.cwd() / path]
    return next((place for place in places if place.exists() or glob(str(place))), places[0])


def source_path(value: str, folder: Path, out: Path) -> str:
    """Their data as a path: a file or folder relative to the spec, an address, or a dataset of the hub."""
    if "://" in value:
        return value
    there = place_of(value, folder)
    if there.exists() or value.startswith((".", "/", "~")) or classify(value) or any(c in value for c in "*?"):
        return os.path.relpath(os.path.abspath(there), out.resolve().parent)
    return f"hf://{value}"


def model_path(value: str, folder: Path, out: Path) -> str:
    """A folder relative to the spec, or a hub id."""
    there = place_of(value, folder)
    if there.exists() or value.startswith((".", "/", "~")):
        return os.path.relpath(os.path.abspath(there), out.resolve().parent)
    return value


def held_out(ours: Ours, key: str, value: Any) -> None:
    """Their validation set as `eval` of each source."""
    if isinstance(value, int | float) and 0 < value < 1:
        for source in ours.data:
            source["eval"] = f"{100 * value:g}%"
        ours.differs.append(f"{key}: rows are held out by their content, so the same ones whatever stands beside them")
    else:
        ours.drop(key, value, "a number of rows; `eval` of a data source is a share of them: eval: 2%")


def flash(ours: Ours, key: str, value: Any) -> None:
    names = {"sdpa": "sdpa", "eager": "eager"}
    if value in names:
        ours.stage["attention"] = names[value]
    else:
        ours.differs.append(
            f"{key}: {value}: `attention: auto`, the default, takes flash attention where it can be had"
        )
