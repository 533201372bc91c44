"""The spec: what a run is asked to do, as strict typed models.

`spec_reader.py` reads it from YAML and `spec_checks.py` finds every mistake in it. Paths in a spec (data, models, storage,
DeepSpeed and template files) are relative to the folder of the spec.
"""

from __future__ import annotations

import os
from typing import Any

from pydantic import Field

from pipeline.sweep import Sweeps, fold
from stages import KINDS, Stage, own
from stages.base import Config, Workers
from stages.data.records import FORMATS
from stages.data.tokenizer import read_chat_template
from stages.tracking import ReportTo

BASE = "base"  # the name of the stage that `model: {init: ...}` stands for


class Cluster(Config):
    """What every training stage gets; what is not said is what this machine has."""

    workers: Workers | None = Field(
        default=None,
        description="Training workers: one per GPU, or one on a CPU machine. `2..8`: as many of these as there is room for.",
    )
    stall_minutes: float = Field(
        default=10,
        gt=0,
        description="Workers that have not moved for so long are ended; training goes on from a checkpoint.",
    )
    wait_minutes: float = Field(
        default=30, gt=0, description="How long a stage waits for a cluster to have room, or to grow, before it fails."
    )
    gpus_per_worker: int | None = Field(default=None, ge=0, description="1 where there are GPUs.")
    cpus_per_worker: int | None = Field(default=None, ge=1, description="CPUs each worker gets, 1 by default.")
    gpu_memory_gib: float | None = Field(
        default=None, gt=0, description="Memory of a GPU, for `raylign plan`; by default that of this machine's."
    )


class ModelInit(Config):
    """`model: {init: ...}`: a fresh small model instead of a pretrained one."""

    init: dict[str, Any]


class Spec(Config):
    """A validated spec. `stages` are in the order of the file; `model` is what a stage without one starts from.

    A sweep has become its variants: `sweeps` says which stages those are, and what each one's values are.
    """

    name: str
    model: str
    storage: str = "runs"
    seed: int = 0
    cluster: Cluster = Cluster()
    chat_template: str | None = None
    allow_pickle: bool = False
    report_to: ReportTo = "tensorboard"
    project: str | None = None
    stages: dict[str, Any]
    sweeps: Sweeps = Field(default_factory=dict)
    file: str | None = None

    @property
    def folder(self) -> str:
        """Where the spec lies: modules of the user's are looked for there. Of one made in Python, the present folder."""
        # Not where a link leads to: files of a Kubernetes ConfigMap are links into a folder that each pod calls otherwise.
        return os.path.dirname(os.path.abspath(self.file)) if self.file else os.getcwd()

    @property
    def template(self) -> str | None:
        """The text of the chat template, where the spec names one."""
        return read_chat_template(self.chat_template)

    def warnings(self) -> list[str]:
        """What was asked for that is better not asked for."""
        said = (
            "allow_pickle: weights may be pickles, which can hold code; they are read by torch's unpickler for tensors. "
            "Better: convert them once, AutoModelForCausalLM.from_pretrained(...).save_pretrained(...), and take it out"
        )
        return [said] if self.allow_pickle else []

    def references(self, name: str) -> dict[str, list[str]]:
        """Field -> what it refers to (`stages.NAME`, a folder or a hub id), the spec's model where nothing is said."""
        stage: Stage = self.stages[name]
        given = stage.references()
        if "model" in given and not given["model"]:
            given["model"] = [self.model]
        made = [source.path for source in stage.sources() if source.made_by]
        return given | ({"data": made} if made else {})

    def upstream(self, name: str) -> list[str]:
        """Names of the stages this one needs."""
        refs = [ref for values in self.references(name).values() for ref in values]
        return list(dict.fromkeys(ref.removeprefix("stages.") for ref in refs if ref.startswith("stages.")))

    def as_yaml(self) -> dict[str, Any]:
        """The resolved spec: defaults that were not said stay unsaid, paths are absolute, sweeps are sweeps."""
        stages = {n: s.model_dump(exclude_unset=True, mode="json") | {"kind": s.kind} for n, s in self.stages.items()}
        model: Any = self.model
        if model == f"stages.{BASE}":
            model = {"init": {k: v for k, v in stages.pop(BASE).items() if k != "kind"}}
        head: dict[str, Any] = {"name": self.name, "model": model, "storage": self.storage, "seed": self.seed}
        cluster = self.cluster.model_dump(exclude_unset=True)
        extra: dict[str, Any] = {"cluster": cluster} if cluster else {}
        if self.chat_template:
            extra["chat_template"] = self.chat_template
        if self.allow_pickle:
            extra["allow_pickle"] = True
        if self.report_to != "tensorboard":
            extra["report_to"] = self.report_to
        if self.project:
            extra["project"] = self.project
        return {**head, **extra, "stages": fold(stages, self.sweeps)}


class Head(Config):
    """The spec without its stages, which are validated one by one so that each one's mistakes are told."""

    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="The run's, and that of its folder; by default the file's name.",
    )
    model: str | ModelInit = Field(
        description="What stages without a `model` start from: a hub id, a folder, or {init: ...} for a fresh small model."
    )
    storage: str = Field(
        default="runs",
        description="Where runs are kept: a folder, on a cluster one that every node mounts, or a bucket.",
    )
    seed: int = Field(default=0, description="Of all that is drawn: order of rows, weights of new heads, samples.")
    cluster: Cluster = Cluster()
    chat_template: str | None = Field(
        default=None, description="chatml, hermes, or a file, in the place of the model's own."
    )
    allow_pickle: bool = Field(
        default=False, description="Take models whose weights are pickles (pytorch_model.bin), not safetensors."
    )
    report_to: ReportTo = Field(
        default="tensorboard",
        description="Who is told of the stages' metrics: tensorboard (files in the run folder), mlflow, wandb, a list, or "
        "none.",
    )
    project: str | None = Field(
        default=None,
        min_length=1,
        description="MLflow's experiment, Weights & Biases' project; by default what MLFLOW_EXPERIMENT_NAME and "
        "WANDB_PROJECT say, else raylign.",
    )


VARIABLE = r"^\$\{[A-Za-z_][A-Za-z0-9_]*(:-[^}]*)?\}$"  # a value of the environment, whatever type it has in the end
OWN = {"type": "string", "pattern": f"^{own.NAMED.pattern}$"}  # the user's own, as module:name
SHARE = {
    "anyOf": [
        {"type": "number", "minimum": 0, "maximum": 1},
        {"type": "string", "pattern": r"^[0-9.]+\s*%$|^\$\{"},
    ]
}


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a spec, for editors.

    It is of draft 7, which all of them know; a stage's keys are those of its `kind`, by `if` and `then`, so that a mistake is
    told of the one kind that is meant. What only reading the spec can tell (files, references, clashes) is not in it.
    """
    schema = Head.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    for kind, cls in KINDS.items():
        part = cls.model_json_schema()
        definitions.update(part.pop("$defs", {}))
        part["required"] = sorted({*part.get("required", []), "kind"})
        definitions[f"{kind}-stage"] = part
    fresh = definitions["init-stage"]
    definitions["ModelInit"]["properties"]["init"] = fresh | {
        "properties": {k: v for k, v in fresh["properties"].items() if k not in ("kind", "sweep")},
        "required": [k for k in fresh["required"] if k != "kind"],
    }
    of_data = definitions["DataSource"]["properties"]
    of_data["format"] = {"anyOf": [{"enum": [*FORMATS, None]}, OWN], "description": of_data["format"]["description"]}
    schema["properties"]["stages"] = {
        "type": "object",
        "minProperties": 1,
        "propertyNames": {"pattern": "^[a-z][a-z0-9_-]*$"},
        "additionalProperties": {
            "type": "object",
            "required": ["kind"],
            "properties": {"kind": {"anyOf": [{"enum": list(KINDS)}, OWN], "description": "What the stage does."}},
            "allOf": [
                {
                    "if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]},
                    "then": {"$ref": f"#/$defs/{kind}-stage"},
                }
                for kind in KINDS
            ],
        },
    }
    schema["required"] = ["model", "stages"]
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Raylign spec"} | _for_editors(schema)


def _for_editors(node: Any) -> Any:
    """Without what only clutters an editor (titles, defaults of nothing); `${VARIABLE}` may stand for any number or truth."""
    if isinstance(node, list):
        return [_for_editors(value) for value in node]
    if not isinstance(node, dict):
        return node
    if {"ge", "le"} & node.keys():  # a share: pydantic has no JSON Schema for what is read before it is checked
        return SHARE | {"description": node["description"]} if "description" in node else SHARE
    out = {}
    for key, value in node.items():
        if key in ("properties", "$defs"):
            out[key] = {name: _for_editors(part) for name, part in value.items()}
        elif key in ("title", "discriminator") or (key == "default" and (value is None or isinstance(value, dict))):
            continue
        else:
            out[key] = value if key in ("enum", "const", "required", "default") else _for_editors(value)
    if out.get("type") in ("integer", "number", "boolean"):
        return out | {"type": [out["type"], "string"], "pattern": VARIABLE}
    return out
