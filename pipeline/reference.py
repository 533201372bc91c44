"""SPEC.md, the reference of the spec, made from the code: types, defaults and descriptions are those of the pydantic models.

python -m pipeline.reference            # writes pipeline/SPEC.md
python -m pipeline.reference --check    # exit code 1 where it is not what the code says
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline.spec import Cluster, Head
from stages import KINDS, Stage
from stages.base import Config
from stages.data.mask import Mask, TrainMask
from stages.data.source import DataSource
from stages.data.turns import Turn
from stages.evaluate import Gate
from stages.init import TokenizerConfig
from stages.rewards import RewardTerm
from stages.rl.settings import PPOSettings
from stages.rl.stage import Kept, RLStage
from stages.rl.watching import Limits
from stages.training.arguments import MANAGED, TrainConfig, library_fields
from stages.training.drift import Samples
from stages.training.stage import EarlyStopping, TrainStage
from stages.training.tuning import Full, Lora, QLora, QLoraOptions

FILE = Path(__file__).with_name("SPEC.md")

# Models that are written within others -> the heading they have here
PARTS: dict[type[BaseModel], str] = {
    Cluster: "cluster", DataSource: "data", Turn: "messages", Mask: "mask", TrainMask: "mask", EarlyStopping: "early_stopping",
    Samples: "watch", RewardTerm: "rewards", Kept: "samples", Limits: "limits", Gate: "gates", TokenizerConfig: "tokenizer",
    Full: "tuning", Lora: "tuning", QLora: "tuning",
}  # fmt: skip
ANCHORS = {cls.__name__: heading for cls, heading in PARTS.items()} | {"ModelInit": "kind-init"}

INTRODUCTION = """\
# The spec, key by key

Made by `python -m pipeline.reference` from the code: do not edit. What stages are for, and how to choose, is in
[stages/README.md](../stages/README.md), data and masks in [stages/data/README.md](../stages/data/README.md), runs in
[README.md](README.md). `raylign schema` prints the same as JSON Schema.

A key that is not known is an error that names its line and the nearest key. `${NAME}` and `${NAME:-default}` stand for
variables of the environment, and `--set stages.sft.train.max_steps=10` replaces a value. Paths are relative to the spec.
"""

TRAIN = """\
`train` of a stage takes the fields of its trainer's own class, by their own names; what they mean is in that library's
documentation. Below stands the class of each kind, and what differs. Of every kind: `report_to` is the spec's where it is
absent (%REPORT%), `save_total_limit` is 2, on a CPU `gradient_checkpointing` is off, and
`optim` and `lr_scheduler_type` may name your own, as `module:name`.

These fields are decided elsewhere, and are an error here:
"""


def reference() -> str:
    """The whole page."""
    of_training = ", ".join(kind for kind, cls in KINDS.items() if issubclass(cls, TrainStage))
    of_rl = [kind for kind, cls in KINDS.items() if issubclass(cls, RLStage)]
    parts = [
        INTRODUCTION,
        "## The top\n",
        table(fields_of(Head)),
        "`stages` is a mapping of names (small letters, digits, `-`, `_`) to stages. What each has is below, by its `kind`.\n",
        *section("cluster", Cluster),
        "## Every stage\n",
        "`kind` is one of "
        + ", ".join(f"[`{kind}`](#kind-{kind})" for kind in KINDS)
        + ", or a class of yours as `module:Class`.\n",
        table(fields_of(Stage, without=("kind",))),
        f"## Stages that train\n\nOf {of_training}, besides:\n",
        table(fields_of(TrainStage, without=(*Stage.model_fields, "train"))),
        "### train\n",
        TRAIN.replace("%REPORT%", words(Head.model_json_schema()["properties"]["report_to"])),
        managed(),
        "### tuning\n",
        *tunings(),
        *section("early_stopping", EarlyStopping, 3),
        f"## Stages that learn from rewards\n\nOf {', '.join(of_rl)}, besides what all stages that train have:\n",
        table(fields_of(RLStage, beyond=TrainStage)),
        *section("rewards", RewardTerm, 3),
        *section("samples", Kept, 3),
        *section("limits", Limits, 3),
        *(part for kind, cls in KINDS.items() for part in of_kind(kind, cls)),
        "## Data and masks\n",
        *section("data", DataSource, 3),
        *section("messages", Turn, 3),
        *section("mask", TrainMask, 3, "`train_on` is of `sft` alone."),
    ]
    return "\n".join(parts)


def of_kind(kind: str, cls: type[Stage]) -> Iterator[str]:
    """The section of one kind of stage."""
    base = next(each for each in (RLStage, TrainStage, Stage) if issubclass(cls, each))
    takes = "; ".join(f"`{field}`: {' or '.join(kinds)}" for field, kinds in cls.accepts.items())
    yield f"## kind: {kind}\n"
    yield f"{said(cls)} Makes: {cls.produces}." + (f" Takes: {takes}." if takes else "") + "\n"
    if rows := fields_of(cls, beyond=base, without=("kind", "train")):
        yield table(rows)
    if issubclass(cls, TrainStage):
        yield from trainer(cls)
    nested: dict[str, tuple[str, type[BaseModel]]] = {
        "dpo": ("watch", Samples),
        "evaluate": ("gates", Gate),
        "init": ("tokenizer", TokenizerConfig),
    }
    if kind in nested:
        name, inner = nested[kind]
        yield from section(name, inner, 3)


def trainer(cls: type[TrainStage]) -> Iterator[str]:
    """Whose fields `train` takes, and those that are ours or take other values."""
    annotation: Any = cls.model_fields["train"].annotation
    name: str = annotation.library
    theirs = library_fields(name)
    whose = f"transformers' {name}" if name == "TrainingArguments" else f"TRL's {name}"
    if name == "TrainingArguments":  # PPO's own settings are no library's any more
        yield f"`train`: {whose}, and these, by the names of TRL's last PPOConfig where it had them:\n"
        yield table(fields_of(PPOSettings))
        return
    schema = annotation.model_json_schema()
    of_all = TrainConfig.model_fields.keys() | {"report_to"}
    other = [
        field
        for field, made in annotation.model_fields.items()
        if field in theirs and field not in of_all and made.annotation != theirs[field]
    ]
    if other:
        yield f"`train`: {whose}. These fields are narrower, or wider, than there:\n"
        yield "\n".join(f"- `{field}`: {words(schema['properties'][field])}" for field in other) + "\n"
    else:
        yield f"`train`: {whose}.\n"


def tunings() -> Iterator[str]:
    """`tuning:` has three methods, of which two are peft's."""
    yield f"- `{{method: full}}`, the default. {said(Full)}"
    yield f"- `{{method: lora, ...}}` takes the fields of peft's LoraConfig. {said(Lora.__mro__[1])}"
    yield "- `{method: qlora, ...}` takes those and bitsandbytes' own, below. " + said(QLora.__mro__[1]) + "\n"
    yield table(fields_of(QLoraOptions))


def managed() -> str:
    """What `train` does not take."""
    lines: dict[str, list[str]] = {}
    for field, instead in MANAGED.items():
        lines.setdefault(instead, []).append(f"`{field}`")
    rows = [f"| {', '.join(fields)} | {cell(instead)} |" for instead, fields in lines.items()]
    return "\n".join(["| not in `train` | instead |", "|---|---|", *rows, ""])


def section(name: str, cls: type[BaseModel], level: int = 2, note: str = "") -> list[str]:
    says = " ".join(filter(None, (said(cls), note)))
    return [f"{'#' * level} {name}\n", says + "\n", table(fields_of(cls))]


# ------------------------------------------------------------------------------------------------ fields

Row = tuple[str, str, str, str]  # key, type, default, description


def fields_of(cls: type[BaseModel], *, beyond: type[BaseModel] | None = None, without: Iterable[str] = ()) -> list[Row]:
    """The keys of a model; `beyond` another, those that it has not got or has otherwise."""
    properties = cls.model_json_schema()["properties"]
    known = beyond.model_fields if beyond is not None else {}
    return [
        (name, words(properties[name]), default(cls.model_fields[name]), described(cls.model_fields[name]))
        for name in cls.model_fields
        if name not in without and not (name in known and same(cls.model_fields[name], known[name]))
    ]


def same(one: Any, other: Any) -> bool:
    return all(getattr(one, a) == getattr(other, a) for a in ("annotation", "default", "description"))


def described(field: Any) -> str:
    """The field's description, or that of the model it holds; a union of models has a section of its own."""
    if field.description:
        return str(field.description)
    inner = field.annotation if isinstance(field.annotation, type) else None
    return said(inner) if inner is not None and issubclass(inner, Config) else ""


def said(cls: type) -> str:
    """The first paragraph of a docstring, as one line."""
    return " ".join((cls.__doc__ or "").split("\n\n")[0].split())


def default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, BaseModel):
        return ""
    return f"`{value if isinstance(value, str) else json.dumps(value, default=str)}`"


def words(schema: Mapping[str, Any]) -> str:
    """A JSON Schema in words."""
    if ref := schema.get("$ref"):
        name = ref.rsplit("/", 1)[-1]
        return f"[{ANCHORS[name].removeprefix('kind-')}](#{ANCHORS[name]})" if name in ANCHORS else name
    if options := schema.get("anyOf", schema.get("oneOf")):
        said = list(dict.fromkeys(words(option) for option in options if option.get("type") != "null"))
        return ("; or " if any("," in each for each in said) else " or ").join(said)
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    kinds = schema.get("type", "anything")
    kind = next(k for k in ([kinds] if isinstance(kinds, str) else kinds) if k != "string" or kinds == "string")
    if kind == "array":
        return f"list of {words(schema.get('items', {}))}"
    if kind == "object":
        inner = schema.get("additionalProperties")
        return f"mapping to {words(inner)}" if isinstance(inner, dict) and inner else "mapping"
    plain = {
        "integer": "whole number",
        "number": "number",
        "boolean": "true or false",
        "string": "text",
        "anything": "any value",
    }
    return ", ".join([plain[kind], *bounds(schema)]) if schema.get("format") != "date" else "date"


def bounds(schema: Mapping[str, Any]) -> Iterator[str]:
    for key, text in (("minimum", "{} or more"), ("exclusiveMinimum", "above {}"), ("maximum", "{} or less"),
                      ("exclusiveMaximum", "below {}")):  # fmt: skip
        if key in schema:
            yield text.format(f"{schema[key]:g}")


def table(rows: Iterable[Row]) -> str:
    lines = [f"| `{key}` | {cell(kind)} | {cell(value)} | {cell(text)} |" for key, kind, value, text in rows]
    return "\n".join(["| key | value | default | |", "|---|---|---|---|", *lines, ""])


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main(arguments: list[str]) -> int:
    made = reference()
    if arguments == ["--check"]:
        current = FILE.is_file() and FILE.read_text(encoding="utf-8") == made
        print(
            f"{FILE.name} is {'what the code says' if current else 'not what the code says: python -m pipeline.reference'}"
        )
        return int(not current)
    FILE.write_text(made, encoding="utf-8")
    print(f"written: {FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
