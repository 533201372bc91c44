"""Evaluation: models side by side on held-out rows.

Conversations give the loss on trained tokens and, from greedy samples, exact match where rows carry an `expected` answer.
Preference pairs give accuracies: of a reward model by its scores, of a preference-tuned model by its implicit reward
beta * (log p(y|x) - log p_ref(y|x)) (Rafailov et al. 2023), of any other model by its likelihoods.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from stages.base import Artifact, ArtifactKind, Config, Share, Stage, StageContext, StageResult
from stages.data.chat import tokenizer_spec
from stages.data.encode import Recipe, Task
from stages.data.ledger import check_lost, read_entries, summary, write_entries
from stages.data.mask import Mask
from stages.data.prepare import Prepared, prepare
from stages.data.source import DataSource, resolve_formats
from stages.data.tokenizer import load_tokenizer
from stages.training.launch import launch, quiet_ray, worker_rank

PREFERENCE_TUNED = ("dpo",)


class Gate(Config):
    """A metric that must hold, or the run fails: `metric` of one model, alone or over another's."""

    metric: Literal["loss", "exact_match", "stopped", "preference_accuracy", "margin"]
    of: str = Field(description="stages.NAME, one of `models`.")
    over: str | None = Field(default=None, description="Compare with this model: the difference is what must hold.")
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Gate:
        if self.at_least is None and self.at_most is None:
            raise ValueError("a gate needs at_least or at_most")
        return self


class Evaluate(Stage):
    """Compares models on held-out conversations and preference pairs."""

    kind: Literal["evaluate"] = "evaluate"
    models: list[str] = Field(min_length=1, description="stages.NAME, folders or hub ids.")
    data: list[DataSource] = Field(min_length=1, description="Held-out conversations, preference pairs, or both.")
    batch_size: int = Field(default=32, ge=1)
    max_new_tokens: int = Field(default=256, ge=1, description="Bound of a greedy sample.")
    max_samples: int | None = Field(
        default=None, ge=0, description="Sample only the first rows; all with an expected answer if absent."
    )
    shown: int = Field(default=8, ge=0, description="Samples kept for the report, side by side.")
    mask: Mask = Mask()
    max_dropped: Share = Field(default=0.01, description="Rows that may be lost before the run is stopped.")
    gates: list[Gate] = Field(default_factory=list)
    workers: int | None = Field(default=None, ge=1)

    produces: ClassVar = "metrics"
    accepts: ClassVar[dict[str, tuple[ArtifactKind, ...]]] = {"models": ("model", "reward model")}

    @field_validator("data")
    @classmethod
    def _all_of_it(cls, data: list[DataSource]) -> list[DataSource]:
        for source in data:
            if source.weight != 1.0 or source.eval is not None:
                raise ValueError(f"{source.path}: held-out rows are scored once each; leave `weight` and `eval` out")
        return data

    def recipe(self, task: Task, tokenizer: Any) -> Recipe:
        """How held-out rows become tokens."""
        return Recipe(task, tokenizer_spec(tokenizer), **self.mask.options())

    def run(self, ctx: StageContext) -> StageResult:
        quiet_ray()
        (ctx.work / "metrics.jsonl").unlink(missing_ok=True)
        by_format = list(zip(self.data, resolve_formats(self.data), strict=True))
        pairs = [source for source, format in by_format if format == "preference"]
        chats = [source for source, format in by_format if format != "preference"]
        metrics: dict[str, Any] = {}
        samples: dict[str, list[dict[str, Any]]] = {}
        used: dict[str, Prepared] = {}  # models of one tokenizer share their prepared rows
        for number, artifact in enumerate(ctx.inputs["models"]):
            ctx.report.phase("evaluate", model=artifact.name)
            tokenizer = load_tokenizer(artifact.model, ctx.chat_template)
            tasks: list[tuple[Task, list[DataSource]]] = [("evaluation", chats), ("preference", pairs)]
            prepared = {
                task: prepare(sources, self.recipe(task, tokenizer), ctx.prepared)
                for task, sources in tasks
                if sources and not (task == "evaluation" and artifact.kind == "reward model")
            }
            for data in prepared.values():
                check_lost(data.manifest["ledger"], self.max_dropped)
            used |= {str(data.path): data for data in prepared.values()}
            job = {
                "stage": self.model_dump(),
                "artifact": artifact,
                "prepared": prepared,
                "chat_template": ctx.chat_template,
            }
            outcome = launch(
                evaluate_on_worker,
                job,
                resources=ctx.resources,
                local=ctx.local,
                folder=ctx.work / "ray" / str(number),
            )
            metrics[artifact.name], samples[artifact.name] = outcome["metrics"], outcome["samples"]
            ctx.report.metrics(0, {"model": artifact.name, **outcome["metrics"]})
        side_by_side = _side_by_side(samples, self.shown)
        (ctx.work / "samples.json").write_text(json.dumps(side_by_side, indent=1))
        rows = _write_ledgers(list(used.values()), ctx)
        return StageResult(metrics, rows=rows, details={"samples": side_by_side})


def check_gate(gate: Gate, metrics: dict[str, Any]) -> dict[str, Any]:
    """Whether a gate holds, and the sentence that says so. A metric that a model has not got does not hold."""
    names = [name.removeprefix("stages.") for name in (gate.of, gate.over) if name]
    what = f"{gate.metric} of {names[0]}" + (f" over {names[1]}" if len(names) > 1 else "")
    bounds = [
        f"{w} {bound:g}" for w, bound in (("at least", gate.at_least), ("at most", gate.at_most)) if bound is not None
    ]
    values = [metrics.get(name, {}).get(gate.metric) for name in names]
    if None in values:
        lacking = names[values.index(None)]
        known = ", ".join(sorted(metrics.get(lacking, {})))
        return {"metric": gate.metric, "holds": False, "value": None, "says": f"{what}: {lacking} has only {known}"}
    value = values[0] - (values[1] if len(values) > 1 else 0.0)
    holds = (gate.at_least is None or value >= gate.at_least) and (gate.at_most is None or value <= gate.at_most)
    says = f"{what} is {value:.4g}, wanted {' and '.join(bounds)}"
    return {"metric": gate.metric, "holds": holds, "value": value, "says": says}


def evaluate_on_worker(config: dict[str, Any]) -> dict[str, Any]:
    """One model on this worker's rows; the sums of all workers are added up."""
    import torch.distributed as dist

    from stages.scoring import load_for_scoring, preference_metrics, sample_greedily, trained_token_loss

    quiet_ray()
    rank, workers = worker_rank()
    stage, artifact = Evaluate.model_validate(config["stage"]), config["artifact"]
    prepared: dict[Task, Prepared] = config["prepared"]
    tokenizer = load_tokenizer(artifact.model, config["chat_template"])
    sums: dict[str, float] = {}
    samples: list[dict[str, Any]] = []
    model = load_for_scoring(artifact.model, reward=artifact.kind == "reward model")
    if "evaluation" in prepared:
        rows = prepared["evaluation"].read()[rank::workers]
        sums |= trained_token_loss(model, rows, tokenizer.pad_token_id, stage.batch_size)
        asked = [row for row in rows if row["prompt_ids"] and row["expected"] is not None]
        if not asked:  # no expected answers: a few samples to look at
            asked = [row for row in rows if row["prompt_ids"]][: stage.shown]
        if stage.max_samples is not None:
            asked = asked[: -(-stage.max_samples // workers)]
        found, counts = sample_greedily(model, asked, tokenizer, stage.batch_size, stage.max_new_tokens)
        samples, sums = found, sums | counts
    if "preference" in prepared:
        rows = prepared["preference"].read()[rank::workers]
        reference = None
        if artifact.manifest.get("kind") in PREFERENCE_TUNED:
            reference = load_for_scoring(artifact.manifest["inputs"]["model"][0]["model"])
        sums |= preference_metrics(model, reference, rows, tokenizer.pad_token_id, stage.batch_size)
    parts: list[Any] = [(sums, samples)]
    if workers > 1:
        parts = [None] * workers
        dist.all_gather_object(parts, (sums, samples))
    total: dict[str, float] = {}
    for part, _ in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    merged = sorted((s for _, found in parts for s in found), key=lambda s: (s["source"], s["row"]))
    return {"metrics": metrics_from(total, artifact), "samples": merged}


def metrics_from(sums: dict[str, float], artifact: Artifact) -> dict[str, Any]:
    """Means from the sums that workers made."""
    out: dict[str, Any] = {}
    if sums.get("tokens"):
        out |= {"loss": sums["nll"] / sums["tokens"], "trained_tokens": int(sums["tokens"])}
    if sums.get("expected"):
        out |= {"exact_match": sums["matched"] / sums["expected"], "stopped": sums["stopped"] / sums["sampled"]}
        out |= {"answers": int(sums["expected"])}
    if sums.get("pairs"):
        tuned, reward = artifact.manifest.get("kind") in PREFERENCE_TUNED, artifact.kind == "reward model"
        by = "reward" if reward else "implicit reward" if tuned else "likelihood"
        out |= {"preference_accuracy": sums["right"] / sums["pairs"], "margin": sums["margin"] / sums["pairs"]}
        out |= {"pairs": int(sums["pairs"]), "preference_by": by}
    return out


def _side_by_side(samples: dict[str, list[dict[str, Any]]], shown: int) -> list[dict[str, Any]]:
    """The same prompts with every model's answer; prompts on which the models differ come first."""
    table: dict[tuple[str, int], dict[str, Any]] = {}
    for name, found in samples.items():
        for sample in found:
            entry = table.setdefault(
                (sample["source"], sample["row"]), {k: sample[k] for k in ("prompt", "expected")} | {"answers": {}}
            )
            entry["answers"][name] = sample["answer"]
    ordered = sorted(table.values(), key=lambda e: len({a.strip() for a in e["answers"].values()}) < 2)
    return ordered[:shown]


def _write_ledgers(used: list[Prepared], ctx: StageContext) -> int:
    entries = [entry for data in used for entry in read_entries(data.path)]
    rows = sum(data.rows for data in used)
    kept, read = (sum(data.manifest["ledger"][what] for data in used) for what in ("kept", "read"))
    (ctx.work / "ledger.json").write_text(json.dumps(summary(read, kept, entries), indent=1))
    write_entries(ctx.work / "ledger.jsonl", entries)
    return rows
