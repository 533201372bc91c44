"""Sweeps: a stage that stands for several, one for each combination of the values it sweeps over.

    dpo: {kind: dpo, model: stages.sft, sweep: {train.beta: [0.05, 0.1]}}

is the two stages `dpo-beta-0.05` and `dpo-beta-0.1`. An evaluation takes them all by `models: [stages.dpo]`; so does
`sweep: {model: [stages.dpo]}`, which makes one stage after each of them. Pure: plain data in, plain data out. Everything after
knows only ordinary stages.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MODEL, MODELS = "model", "models"  # fields in which a sweep stands for all its variants: swept over, or side by side
AT_MOST = 64  # variants of one sweep
LONGEST_NAME, LONGEST_VALUE = 120, 40  # characters; a file's name has at most 255

Path = tuple[Any, ...]
Tell = Callable[[Path, str], None]
Sweeps = dict[str, dict[str, dict[str, Any]]]  # sweep -> name of a variant -> dotted path -> value


@dataclass
class Expanded:
    """The stages of a spec without sweeps."""

    stages: dict[str, Any] = field(default_factory=dict)
    sweeps: Sweeps = field(default_factory=dict)
    written: dict[Path, Path] = field(default_factory=dict)  # a place in these stages -> where it was written

    def place(self, path: Path) -> Path:
        """Where in the spec something was written that now stands at `path`."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.written:
                return self.written[path[:end]] + path[end:]
        return path

    def sweep_of(self, name: Any) -> str | None:
        """The sweep a stage is a variant of."""
        return next((sweep for sweep, variants in self.sweeps.items() if name in variants), None)

    def choice(self, ref: str) -> str | None:
        """What is wrong with naming a sweep where one stage is wanted; None where `ref` is no sweep."""
        variants = self.sweeps.get(ref.removeprefix("stages."))
        if variants is None:
            return None
        return f"{ref} is a sweep; name one of its variants: {', '.join(f'stages.{name}' for name in variants)}"


def expand(stages: Mapping[str, Any], tell: Tell) -> Expanded:
    """The stages with each sweep in the place of its variants.

    Args:
        stages: as written.
        tell: called with (path, message) of each mistake; a stage with one is taken without its sweep.
    """
    return _Expansion(stages, tell).carry_out()


class _Expansion:
    def __init__(self, stages: Mapping[str, Any], tell: Tell) -> None:
        self.given, self.tell = stages, tell
        self.out = Expanded()
        self.made: dict[str, dict[str, Any]] = {}  # stage -> its variants; itself where it has no sweep

    def carry_out(self) -> Expanded:
        for name in self.given:
            for variant, stage in self.variants(name).items():
                self.out.stages[variant] = self._with_models(variant, stage)
        return self.out

    def variants(self, name: str) -> dict[str, Any]:
        if name in self.made:
            return self.made[name]
        stage = self.given[name]
        self.made[name] = {name: stage}  # what goes round in a circle is told with the references
        if not isinstance(stage, dict) or "sweep" not in stage:
            return self.made[name]
        base = {key: value for key, value in stage.items() if key != "sweep"}
        self.made[name] = {name: base}
        problems = dict(_problems(base, stage["sweep"]))
        for at, message in problems.items():
            self.tell(("stages", name, "sweep", *at), message)
        if not problems:
            self._sweep(name, base, stage["sweep"])
        return self.made[name]

    def _sweep(self, name: str, base: dict[str, Any], sweep: dict[str, list[Any]]) -> None:
        choices = [list(self._values(path, values)) for path, values in sweep.items()]
        count = math.prod(map(len, choices))
        if count > AT_MOST:
            self.tell(("stages", name, "sweep"), f"{count} variants, at most {AT_MOST} are made; leave some values out")
            return
        combinations = list(itertools.product(*choices))
        names = _names(name, list(sweep), [[value for _, value in chosen] for chosen in combinations])
        if taken := [n for n in names if n in self.given or self.out.sweep_of(n)]:
            self.tell(("stages", name, "sweep"), f"its variant {taken[0]} has the name of another stage; rename one")
            return
        self.made[name], self.out.sweeps[name] = {}, {}
        for variant, chosen in zip(names, combinations, strict=True):
            stage = copy.deepcopy(base)
            self.out.written["stages", variant] = ("stages", name)
            for path, (index, value) in zip(sweep, chosen, strict=True):
                keys = _put(stage, path, value)
                self.out.written["stages", variant, *keys] = ("stages", name, "sweep", path, index)
            self.made[name][variant] = stage
            self.out.sweeps[name][variant] = {p: value for p, (_, value) in zip(sweep, chosen, strict=True)}

    def _values(self, path: str, values: list[Any]) -> Iterator[tuple[int, Any]]:
        """(index as written, value); a sweep among the models that are swept over gives each of its variants."""
        for index, value in enumerate(values):
            for each in self._each(value) if path == MODEL else [value]:
                yield index, each

    def _each(self, ref: Any) -> list[Any]:
        target = ref.removeprefix("stages.") if isinstance(ref, str) and ref.startswith("stages.") else ""
        if target not in self.given or self.variants(target).keys() == {target}:
            return [ref]
        return [f"stages.{variant}" for variant in self.variants(target)]

    def _with_models(self, name: str, stage: Any) -> Any:
        """A stage whose list of models has all variants of the sweeps it names."""
        if not isinstance(stage, dict) or not isinstance(stage.get(MODELS), list):
            return stage
        models: list[Any] = []
        written = self.out.place(("stages", name, MODELS))
        for index, ref in enumerate(stage[MODELS]):
            each = self._each(ref)
            for model in each:
                if len(each) == 1 or model not in models:  # one of them may be named besides
                    self.out.written["stages", name, MODELS, len(models)] = (*written, index)
                    models.append(model)
        return {**stage, MODELS: models}


def told(found: Sequence[tuple[Path, str]], expanded: Expanded) -> Iterator[tuple[Path, str]]:
    """Mistakes of variants, by their paths in `expanded`, as (path in the spec, message): where all variants of a sweep have
    one it is told once, else with the variants that have it."""
    groups: dict[tuple[str, Path, str], list[str]] = {}
    for (_, variant, *keys), message in found:
        groups.setdefault((expanded.sweep_of(variant) or "", tuple(keys), message), []).append(variant)
    for (sweep, rest, message), variants in groups.items():
        written: dict[Path, list[str]] = {}
        for variant in variants:
            written.setdefault(expanded.place(("stages", variant, *rest)), []).append(variant)
        if len(variants) == len(expanded.sweeps[sweep]):  # whatever the value
            written = {at[:-1] if at[2:3] == ("sweep",) and len(at) == 5 else at: [] for at in written}
        for at, having in written.items():
            few = ", ".join(having[:3]) + (f" and {len(having) - 3} more" if len(having) > 3 else "")
            yield at, message + (f" (variant{'s' * (len(having) > 1)} {few})" if having else "")


def _problems(base: dict[str, Any], sweep: Any) -> Iterator[tuple[Path, str]]:
    """(path within the sweep, message)."""
    if not isinstance(sweep, dict) or not sweep or not all(isinstance(path, str) for path in sweep):
        yield (), "a mapping of paths to their values is wanted, for example {train.beta: [0.05, 0.1]}"
        return
    for path, values in sweep.items():
        keys = path.split(".")
        inside = next((other for other in sweep if other != path and f"{path}.".startswith(f"{other}.")), None)
        if keys[0] in ("kind", "sweep"):
            yield (path,), f"{keys[0]} cannot be swept"
        elif isinstance(values, dict):
            yield (path,), f"write the path with dots: {path}.{next(iter(values), 'NAME')}: [...]"
        elif not isinstance(values, list):
            yield (path,), f"a list of values is wanted, not {_json(values)}"
        elif not values:
            yield (path,), "the list is empty; a value for each variant is wanted"
        elif inside is not None:
            yield (path,), f"{inside} is swept as well, which holds it"
        elif (twice := _twice(values)) is not None:
            yield (path, twice), f"{_json(values[twice])} stands here twice"
        else:
            try:
                given = get(base, path)
            except TypeError as error:
                yield (path,), str(error)
                continue
            if given is not None:
                yield (path,), f"{path} is given besides, {_json(given)}; leave one of them out"


def _twice(values: list[Any]) -> int | None:
    """Index of the first value that stands there before."""
    texts = [_json(value) for value in values]
    return next((i for i, text in enumerate(texts) if text in texts[:i]), None)


# ------------------------------------------------------------------------------------------------ paths within a stage


def get(stage: dict[str, Any], path: str) -> Any:
    """The value at a dotted path, None where there is nothing.

    Raises:
        TypeError: something on the way is neither a mapping nor a list that has the place.
    """
    node: Any = stage
    keys = path.split(".")
    for i, key in enumerate(keys):
        before = ".".join(keys[:i])
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise TypeError(f"{before} is a list of {len(node)}, {key!r} is not in it")
            node = node[int(key)]
        elif isinstance(node, dict):
            node = node.get(key)
        elif node is None:
            return None
        else:
            raise TypeError(f"{before} is not a mapping")
    return node


def _put(stage: dict[str, Any], path: str, value: Any) -> Path:
    """Set a value, mappings on the way made where they are missing; returns the path as the keys that lead there."""
    node: Any = stage
    out: list[Any] = []
    for key in path.split("."):
        out.append(int(key) if isinstance(node, list) else key)
        parent = node
        if isinstance(node, list):
            node = node[int(key)]
        else:
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
    parent[out[-1]] = value
    return tuple(out)


def _without(stage: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    """A stage without the value at a path, and without mappings that are empty then."""
    key, rest = keys[0], keys[1:]
    if not rest:
        return {k: v for k, v in stage.items() if k != key}
    inner: Any = stage[key]
    if isinstance(inner, list):
        at = int(rest[0])
        return {**stage, key: [_without(v, rest[1:]) if i == at else v for i, v in enumerate(inner)]}
    left = _without(inner, rest)
    return {**stage, key: left} if left else {k: v for k, v in stage.items() if k != key}


def fold(stages: dict[str, Any], sweeps: Sweeps) -> dict[str, Any]:
    """The inverse: stages as plain data, each sweep again in the place of its variants."""
    first = {next(iter(variants)): sweep for sweep, variants in sweeps.items()}
    others = {variant for variants in sweeps.values() for variant in variants} - set(first)
    out: dict[str, Any] = {}
    for name, stage in stages.items():
        if name in first:
            settings = list(sweeps[first[name]].values())
            swept = {path: _distinct([chosen[path] for chosen in settings]) for path in settings[0]}
            for path in swept:
                stage = _without(stage, path.split("."))
            if MODEL in swept:
                swept[MODEL] = _as_sweeps(swept[MODEL], sweeps)
            out[first[name]] = {**stage, "sweep": swept}
        elif name not in others:
            out[name] = stage
    return {n: {k: _as_sweeps(v, sweeps) if k == MODELS else v for k, v in stage.items()} for n, stage in out.items()}


def _as_sweeps(models: list[Any], sweeps: Sweeps) -> list[Any]:
    """A list of models with all variants of a sweep, where they stand one after another, as the sweep."""
    for sweep, variants in sweeps.items():
        each = [f"stages.{variant}" for variant in variants]
        for at in range(len(models)):
            if models[at : at + len(each)] == each:
                models = [*models[:at], f"stages.{sweep}", *models[at + len(each) :]]
    return models


def _distinct(values: list[Any]) -> list[Any]:
    return list({_json(value): value for value in values}.values())


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


# ------------------------------------------------------------------------------------------------ names


def labels(paths: list[str]) -> dict[str, str]:
    """The last parts of each path, as many as tell them apart."""
    out = {}
    for path in paths:
        parts = path.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        out[path] = next(e for e in ends if sum(f".{other}".endswith(f".{e}") for other in paths) == 1 or e == path)
    return out


def text(value: Any) -> str:
    """A value in few characters: of a folder its name, of a mapping its keys and values."""
    if isinstance(value, dict):
        return "-".join(f"{k}-{text(v)}" for k, v in value.items())
    if isinstance(value, list):
        return "-".join(map(text, value))
    if isinstance(value, str):
        return value.removeprefix("stages.").rstrip("/").rpartition("/")[2]
    return "none" if value is None else _json(value)


def _names(stage: str, paths: list[str], combinations: list[list[Any]]) -> list[str]:
    """A name for each combination, fit for a folder; numbered where they would be the same."""
    said = labels(paths)
    names = []
    for values in combinations:
        parts = [f"{_fit(said[path])}-{_fit(text(v))[:LONGEST_VALUE]}" for path, v in zip(paths, values, strict=True)]
        names.append("-".join([stage, *parts])[:LONGEST_NAME])
    count = Counter(names)
    taken = set(names)
    out = []
    for name in names:
        if count[name] > 1:
            name = next(n for i in itertools.count(1) if (n := f"{name}-{i}") not in taken)
            taken.add(name)
        out.append(name)
    return out


def _fit(said: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", said.lower())
