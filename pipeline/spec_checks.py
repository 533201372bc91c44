"""Every mistake of a spec at once, each with its line, its path and the nearest right name. Starts nothing, reads the files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError

from pipeline.spec import BASE, Head, Spec
from pipeline.spec_messages import existing, message_of
from pipeline.sweep import Expanded, expand, get, told
from pipeline.training_checks import spec_problems
from stages import Init, Stage, kind_problem, own, stage_class
from stages.data.hub import SCHEME
from stages.data.records import RECORD_OF, Conversation, Labelled, Preference, Prompt, Text, Tokens
from stages.data.source import DataSource, find_files, is_reference, resolve_formats
from stages.data.tokenizer import check_model_folder, read_chat_template
from stages.errors import DataError, Problem, SpecError, nearest
from stages.init import config_problems
from stages.rewards import is_function
from stages.storage import is_remote
from stages.training.deepspeed import PRESETS

NAME = re.compile(r"[a-z][a-z0-9_-]*")
RESERVED = {"logs", "report", "run", "spec", "tensorboard", "wandb"}
# s3://key:secret@bucket, or ?secret_key=...; gs://anonymous@ is none
CREDENTIALS = re.compile(
    r"\w[\w+.-]*://(?!anonymous@)([^/?#\s]*@|[^/?#\s:@]+:[^?#\s@]+@|\S*[?&][\w-]*(key|token|secret|password|signature)[\w-]*=)",
    re.IGNORECASE,
)
# a stage's task -> the records it takes, and what they are called
WANTED: dict[str, tuple[tuple[type, ...], str]] = {
    "conversation": ((Conversation, Text, Tokens), "conversations or text"),
    "preference": ((Preference,), "preference pairs"),
    "labelled": ((Labelled, Preference), "answers with a label, or preference pairs"),
    "prompt": ((Prompt, Conversation, Preference, Labelled), "prompts, conversations, or answers to prompts"),
}


def build_spec(
    raw: dict[str, Any],
    *,
    folder: Path,
    lines: Mapping[tuple[Any, ...], int] | None = None,
    file: str | None = None,
    default_name: str = "run",
    problems: list[Problem] | None = None,
    within: Path | None = None,
) -> Spec:
    """Check a spec given as plain data.

    Args:
        within: of a spec that is sent elsewhere, the folder that goes with it: data and models outside are not looked at.

    Raises:
        SpecError: with every mistake, those in `problems` included.
    """
    return _Checker(
        raw, folder, lines or {}, file, default_name, problems if problems is not None else [], within
    ).build()


class _Checker:
    def __init__(
        self,
        raw: dict[str, Any],
        folder: Path,
        lines: Mapping[tuple[Any, ...], int],
        file: str | None,
        default_name: str,
        problems: list[Problem],
        within: Path | None = None,
    ) -> None:
        self.raw, self.folder, self.lines, self.file, self.problems = raw, folder, lines, file, problems
        self.default_name, self.within = default_name, within
        self.stages: dict[str, Stage | None] = {}
        self.expanded = Expanded()
        self.of_variants: list[tuple[tuple[Any, ...], str]] = []  # mistakes of variants, by their paths in `expanded`

    def build(self) -> Spec:
        own.use(str(self.folder))
        if unsafe := list(credentials(self.raw)):
            for path in unsafe:
                self._problem(path, "an address with credentials in it; keep them in the environment")
            self._raise()  # what would be told besides shows the address
        head = self._validate(Head, {k: v for k, v in self.raw.items() if k != "stages"}, ())
        raw_stages = self._raw_stages(head)
        stages = self.stages = {name: self._stage(name, raw) for name, raw in raw_stages.items()}
        self._references(raw_stages)
        for name, stage in stages.items():
            if stage is not None:
                self._files(name, stage)
            else:
                self._unvalidated_files(name, raw_stages[name])
        template = None
        if isinstance(head, Head):
            template = self._path(head.chat_template, only_files=True)
            try:
                read_chat_template(template)
            except DataError as error:
                self._problem(("chat_template",), str(error).removeprefix("chat_template: "))
            if isinstance(head.model, str) and not head.model.startswith("stages."):
                self._model(("model",), self._model_path(head.model))
        if not isinstance(head, Head):
            self._raise()
        spec = Spec(
            name=head.name or re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9._-]", "-", self.default_name).lstrip("-") or "run",
            model=self._model_path(head.model) if isinstance(head.model, str) else f"stages.{BASE}",
            storage=head.storage if is_remote(head.storage) else str((self.folder / head.storage).resolve()),
            seed=head.seed,
            cluster=head.cluster,
            chat_template=template,
            allow_pickle=head.allow_pickle,
            report_to=head.report_to,
            project=head.project,
            stages={name: stage for name, stage in stages.items() if stage is not None},
            sweeps=self._sweeps(raw_stages),
            file=self.file,
        )
        for name, path, message in spec_problems(spec):
            self._problem(("stages", name, *path), message)
        if self.problems or self.of_variants:
            self._raise()
        return spec

    def _raise(self) -> NoReturn:
        of_variants = [
            Problem(dotted(path), message, line_of(path, self.lines))
            for path, message in told(self.of_variants, self.expanded)
        ]
        raise SpecError(sorted(self.problems + of_variants, key=lambda p: p.line or 0), self.file)

    # -- the parts

    def _raw_stages(self, head: Any) -> dict[str, Any]:
        raw = self.raw.get("stages")
        if not isinstance(raw, dict) or not raw:
            self._problem(("stages",), "a mapping of at least one stage is wanted")
            raw = {}
        for name in raw:
            if not NAME.fullmatch(name) or name in RESERVED:
                self._problem(
                    ("stages", name), "a stage's name is small letters, digits, - and _, and not a file of a run"
                )
        self.expanded = expand(raw, self._problem)
        raw = self.expanded.stages
        if isinstance(self.raw.get("model"), dict) and isinstance(self.raw["model"].get("init"), dict):
            if BASE in raw:
                self._problem(("stages", BASE), "this name is taken by `model: {init: ...}`")
            init = dict(self.raw["model"]["init"])
            if "sweep" in init:
                self._problem(
                    ("model", "init", "sweep"), "one model is wanted; sweep over a stage of kind init instead"
                )
            init.setdefault("data", self._data_of_base(raw))
            raw = {BASE: {"kind": "init", **init}, **raw}
        return raw

    def _data_of_base(self, raw: dict[str, Any]) -> list[Any]:
        """What a fresh model's tokenizer is trained on where nothing is said: the data of the stages that start from it."""
        sources: list[Any] = []
        of_sweeps: list[Any] = []
        for name, stage in raw.items():
            if not isinstance(stage, dict) or stage.get("model") is not None or not isinstance(stage.get("data"), list):
                continue
            sweep = self.expanded.sweep_of(name)
            for source in stage["data"]:
                if not isinstance(source, dict) or self._reference(source) or (sweep, source) in of_sweeps:
                    continue  # what a stage makes is made after the tokenizer
                sources.append(source)
                if sweep is not None:
                    of_sweeps.append((sweep, source))  # what variants share counts once
        return sources

    def _sweeps(self, raw_stages: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
        """The settings of each variant, with absolute paths."""
        return {
            sweep: {
                variant: {path: get(self._with_paths(raw_stages[variant]), path) for path in chosen}
                for variant, chosen in variants.items()
            }
            for sweep, variants in self.expanded.sweeps.items()
        }

    def _stage(self, name: str, raw: Any) -> Stage | None:
        path = ("stages", name) if name in self.expanded.stages else ("model", "init")
        if not isinstance(raw, dict):
            self._problem(path, "a stage is a mapping with at least `kind`")
            return None
        kind = raw.get("kind")
        cls = stage_class(kind)
        if cls is None:
            self._problem((*path, "kind") if kind is not None else path, str(kind_problem(kind)))
            return None
        stage = self._validate(cls, self._with_paths(raw), path)
        if isinstance(stage, Init):
            for key, message in config_problems(stage.config).items():
                self._problem((*path, "config", key), message)
        return stage  # type: ignore[return-value]

    def _with_paths(self, raw: dict[str, Any]) -> dict[str, Any]:
        """The stage with its paths made absolute."""
        out = dict(raw)
        if isinstance(out.get("data"), list):
            out["data"] = [
                {**d, "path": self._data_path(d["path"])}
                if isinstance(d, dict) and isinstance(d.get("path"), str)
                else d
                for d in out["data"]
            ]
        for field in ("model", "value_model"):
            if isinstance(out.get(field), str):
                out[field] = self._model_path(out[field])
        if isinstance(out.get("models"), list):
            out["models"] = [self._model_path(m) if isinstance(m, str) else m for m in out["models"]]
        if isinstance(out.get("rewards"), list):
            out["rewards"] = [
                self._reward(r)
                if isinstance(r, str)
                else {**r, "reward": self._reward(r["reward"])}
                if isinstance(r, dict) and isinstance(r.get("reward"), str)
                else r
                for r in out["rewards"]
            ]
        if isinstance(out.get("gates"), list):
            out["gates"] = [
                {k: self._model_path(v) if k in ("of", "over") and isinstance(v, str) else v for k, v in gate.items()}
                if isinstance(gate, dict)
                else gate
                for gate in out["gates"]
            ]
        if isinstance(out.get("deepspeed"), str) and out["deepspeed"] not in PRESETS:
            out["deepspeed"] = self._path(out["deepspeed"], only_files=True)
        return out

    def _path(self, value: str | None, only_files: bool = False) -> Any:
        if value is None or "://" in value:
            return value
        target = self.folder / Path(value).expanduser()
        return str(target) if not only_files or target.is_file() else value

    def _data_path(self, value: str) -> str:
        """As other paths; the dataset of hf:// may be a folder, and stages.NAME is what a stage makes."""
        if self._reference({"path": value}):
            return value
        folder = self.folder / Path(value.removeprefix(SCHEME)).expanduser()
        return f"{SCHEME}{folder}" if value.startswith(SCHEME) and folder.is_dir() else str(self._path(value))

    def _reference(self, source: Any) -> str | None:
        """The stages.NAME that a source is; None where it is files, which may have such a name too."""
        path = source.get("path") if isinstance(source, dict) else None
        return path if isinstance(path, str) and is_reference(path) and not (self.folder / path).exists() else None

    def _reward(self, value: str) -> str:
        return value if is_function(value) else self._model_path(value)

    def _model_path(self, value: str) -> str:
        """A model is a reference, a folder (relative to the spec) or else a hub id."""
        if value.startswith("stages.") or "://" in value:
            return value
        target = self.folder / Path(value).expanduser()
        return str(target) if value.startswith((".", "/", "~")) or target.exists() else value

    def _references(self, raw_stages: dict[str, Any]) -> None:
        graph: dict[str, list[str]] = {}
        for name, raw in raw_stages.items():
            cls = stage_class(raw.get("kind")) if isinstance(raw, dict) else None
            graph[name] = []
            if cls is not None and isinstance(raw.get("gates"), list):
                self._gates(name, raw)
            for field, wanted in (cls.accepts if cls else {}).items():
                value = raw.get(field)
                for i, ref in enumerate(value if isinstance(value, list) else [value]):
                    path: tuple[Any, ...] = ("stages", name, field)
                    if isinstance(value, list):
                        path = (*path, i)
                    if isinstance(ref, dict):  # a reward with its weight
                        path, ref = (*path, "reward"), ref.get("reward")
                    if not isinstance(ref, str):
                        continue
                    if (ref in raw_stages or ref in self.expanded.sweeps) and not ref.startswith("stages."):
                        self._problem(path, f"write stages.{ref} to use what the stage {ref!r} makes")
                    if not ref.startswith("stages."):
                        continue
                    graph[name] += self._refers(path, ref, wanted, raw_stages)
            data = raw.get("data") if isinstance(raw, dict) else None
            for i, source in enumerate(data if isinstance(data, list) else []):
                path = (*self._data_place(name), i, "path")
                said = source.get("path") if isinstance(source, dict) else None
                if isinstance(said, str) and said in raw_stages and not (self.folder / said).exists():
                    self._problem(path, f"write stages.{said} to use what the stage {said!r} makes")
                if ref := self._reference(source):
                    if cls is Init:
                        self._problem(path, f"{ref}: a tokenizer is trained on files; the stages come after it")
                        continue
                    graph[name] += self._refers(path, ref, ("dataset",), raw_stages)
        for cycle in _cycles(graph):
            self._problem(("stages", cycle[0]), f"the stages go round in a circle: {' -> '.join([*cycle, cycle[0]])}")

    def _refers(self, path: tuple[Any, ...], ref: str, wanted: Sequence[str], raw_stages: dict[str, Any]) -> list[str]:
        """The stage that `ref` names, if there is one; whether it makes what is wanted is checked."""
        target = ref.removeprefix("stages.")
        if target not in raw_stages:
            what = f"there is no stage {target!r}{nearest(target, [*raw_stages, *self.expanded.sweeps])}"
            self._problem(path, self.expanded.choice(ref) or what)
            return []
        made = stage_class(raw_stages[target].get("kind")) if isinstance(raw_stages[target], dict) else None
        if made is not None and made.produces not in wanted:
            self._problem(path, f"{ref} makes a {made.produces}; wanted here: {' or '.join(wanted)}")
        return [target]

    def _gates(self, name: str, raw: dict[str, Any]) -> None:
        models = [m for m in raw.get("models") or [] if isinstance(m, str)]
        for i, gate in enumerate(raw["gates"]):
            check = gate.get("check") if isinstance(gate, dict) else None
            if own.is_named(check) and (problem := own.problem(str(check))):
                self._problem(("stages", name, "gates", i, "check"), problem)
            for field in ("of", "over"):
                model = gate.get(field) if isinstance(gate, dict) else None
                if isinstance(model, str) and model not in models:
                    what = f"{model} is not among `models`{nearest(model, models)}"
                    self._problem(("stages", name, "gates", i, field), self.expanded.choice(model) or what)

    def _data_place(self, name: str) -> tuple[str, ...]:
        """Where the data of a stage stands in the spec; nothing where it is that of others, and looked at there."""
        if name in self.expanded.stages:
            return ("stages", name, "data")
        # the stage that `model: {init: ...}` stands for: by default its data is that of the stages that use it
        return ("model", "init", "data") if "data" in self.raw["model"]["init"] else ()

    def _unvalidated_files(self, name: str, raw: Any) -> None:
        """The data of a stage that has other mistakes: missing files are told with them."""
        place = self._data_place(name)
        data = raw.get("data") if isinstance(raw, dict) and place else None
        for i, source in enumerate(data if isinstance(data, list) else []):
            path = source.get("path") if isinstance(source, dict) else None
            if self._reference(source):
                continue
            if not isinstance(path, str) or self._elsewhere(self._data_path(path)):
                continue
            if not path.startswith(SCHEME):  # a dataset's other options may be what is wrong
                try:
                    find_files(DataSource(path=self._data_path(path)))
                except DataError as error:
                    self._problem((*place, i), str(error))

    def _files(self, name: str, stage: Stage) -> None:
        """Everything a stage names is there and can be read, before anything is started."""
        sources: list[DataSource] = stage.sources()
        place = self._data_place(name)
        for i, source in enumerate(sources if place else []):
            try:
                unseen = source.made_by or self._elsewhere(source.path)
                format = self._made_format(source) if unseen else resolve_formats([source])[0]
            except DataError as error:
                self._problem((*place, i), str(error))
                continue
            if format is None:
                continue
            records, wanted = WANTED.get(getattr(stage, "task", ""), (None, ""))
            if records is not None and RECORD_OF[format] not in records:
                hint = "; if their answers are in another column, name it: `columns: {completion: ...}`"
                what = f"{source.path}: {stage.kind} wants {wanted}, these rows are {format}"
                hint = "; see `make` of that stage" if source.made_by else hint * (format == "prompt")
                self._problem((*place, i), what + hint)
        for field, refs in stage.references().items():
            for ref in refs:
                if not ref.startswith("stages."):
                    self._model(("stages", name, field), ref)

    def _made_format(self, source: DataSource) -> str | None:
        """The format of what a stage makes; None where the stage has mistakes, or makes no dataset. Of files: what is said."""
        made = self.stages.get(str(source.made_by))
        if own.is_named(source.format):
            return None  # known when there are rows
        return "messages" if source.messages else source.format or (made.makes if made is not None else None)

    def _elsewhere(self, path: str) -> bool:
        """Whether a path is not this machine's to judge."""
        return self.within is not None and not Path(os.path.normpath(path)).is_relative_to(self.within)

    def _model(self, path: tuple[Any, ...], model: str) -> None:
        if self._elsewhere(model):
            return
        try:
            check_model_folder(model, whole=False, allow_pickle=self.raw.get("allow_pickle") is True)
        except DataError as error:
            self._problem(path, str(error))

    # -- telling

    def _problem(self, path: tuple[Any, ...], message: str) -> None:
        if len(path) > 1 and path[0] == "stages" and self.expanded.sweep_of(path[1]):
            if not any(known == path for known, _ in self.of_variants):
                self.of_variants.append((path, message))
            return
        path = self.expanded.place(path)
        if not any(known.path == dotted(path) for known in self.problems):  # the first is the cause of what follows
            self.problems.append(Problem(dotted(path), message, line_of(path, self.lines)))

    def _validate(self, cls: type[BaseModel], raw: Any, path: tuple[Any, ...]) -> BaseModel | None:
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            seen: set[tuple[Any, ...]] = set()
            for e in error.errors():
                where = existing(raw, e["loc"])
                if where in seen and e["type"] != "extra_forbidden":
                    continue  # the members of a union each complain of the same value
                seen.add(where)
                self._problem((*path, *where), message_of(cls, dict(e), where))
            return None


def credentials(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where an address has a user, a password or a key in it."""
    if isinstance(node, str):
        if CREDENTIALS.match(node):
            yield path
    elif isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from credentials(value, (*path, key))


def dotted(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))


def line_of(path: tuple[Any, ...], lines: Mapping[tuple[Any, ...], int]) -> int | None:
    """The line of a path, or of the nearest thing around it."""
    for end in range(len(path), 0, -1):
        if path[:end] in lines:
            return lines[path[:end]]
    return None


def _cycles(graph: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Circles of a graph, each told once."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> None:
        if node in trail:
            circle = trail[trail.index(node) :]
            if not any(set(circle) == set(other) for other in found):
                found.append(circle)
            return
        if node in done:
            return
        for target in graph.get(node, ()):
            visit(target, [*trail, node])
        done.add(node)

    for start in graph:
        visit(start, [])
    return found
