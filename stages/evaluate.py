"""Evaluation: models side by side on held-out rows.

Conversations give the loss on trained tokens and, from greedy samples, exact match where rows carry an `expected` answer,
and how long the answers are. Preference pairs give accuracies: of a reward model by its scores, of a preference-tuned model by
its implicit reward log p(y|x) - log p_ref(y|x), which is that of Rafailov et al. 2023 without its factor beta, of any other
model by its likelihoods. Of a reward model they also say whether it is as sure as it is right, and how much of it is length
(stages/training/pair_statistics.py).

A model from preference tuning or reinforcement learning is held against its reference, the model it was given: `kl` is
KL(policy || reference) in nats an answer, the mean of log p(y|x) - log p_ref(y|x) over answers y sampled from the policy at
temperature 1, of at most `max_new_tokens` (k1 of Schulman, "Approximating KL divergence",
http://joschu.net/blog/kl-approx.html).
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from stages import own
from stages.base import Artifact, ArtifactKind, Config, Share, Stage, StageContext, StageResult
from stages.data.chat import tokenizer_spec
from stages.data.encode import Recipe, Task
from stages.data.ledger import check_lost, read_entries, summary, write_entries
from stages.data.mask import Mask
from stages.data.prepare import Prepared, prepare
from stages.data.source import DataSource, resolve_formats
from stages.data.tokenizer import load_tokenizer
from stages.errors import StageError
from stages.training.launch import launch, quiet_ray, use_given_threads, worker_rank
from stages.training.pair_statistics import pair_statistics
from stages.training.preference import REFERENCE_FREE
from stages.training.vocabulary import grow_vocabulary

PREFERENCE_TUNED = ("dpo", "kto")
HAS_REFERENCE = (*PREFERENCE_TUNED, "ppo", "grpo", "rloo")
SIDES = ("chosen", "rejected")
TWICE = 2.0  # as long, or half as long: worth a warning
LESS_STOPPED = 0.05  # share of answers that no longer end by themselves: worth a warning


class Gate(Config):
    """What must hold, or the run fails: `metric` of one model, alone or over another's, or a `check` of the user's."""

    metric: (
        Literal[
            "loss", "exact_match", "stopped", "answer_tokens", "kl", "preference_accuracy", "margin", "calibration_error",
            "length_correlation",
        ]
        | None
    ) = Field(default=None, description="A metric of the evaluation.")  # fmt: skip
    check: str | None = Field(
        default=None,
        description="A function of yours, module:name: check(metrics, samples) gets {model: {metric: value}} and the "
        "report's samples, and returns None where all is well, else a sentence that says what is not.",
    )
    of: str | None = Field(default=None, description="stages.NAME, one of `models`.")
    over: str | None = Field(default=None, description="Compare with this model: the difference is what must hold.")
    at_least: float | None = Field(default=None, description="The least that it may be.")
    at_most: float | None = Field(default=None, description="The most that it may be.")

    @model_validator(mode="after")
    def _bounded(self) -> Gate:
        bounds = [name for name in ("of", "over", "at_least", "at_most") if getattr(self, name) is not None]
        if (self.metric is None) == (self.check is None):
            raise ValueError("a gate has either a metric or a check")
        if self.check is not None:
            if not own.is_named(self.check):
                raise ValueError(f"check: write a function as module:name (got {self.check!r})")
            if bounds:
                raise ValueError(f"a check decides by itself; leave {', '.join(bounds)} out")
        elif self.of is None:
            raise ValueError("a gate's metric is `of` one of `models`: stages.NAME")
        elif self.at_least is None and self.at_most is None:
            raise ValueError("a gate needs at_least or at_most")
        return self


class Evaluate(Stage):
    """Compares models on held-out conversations and preference pairs."""

    kind: Literal["evaluate"] = "evaluate"
    models: list[str] = Field(min_length=1, description="stages.NAME, folders or hub ids.")
    data: list[DataSource] = Field(min_length=1, description="Held-out conversations, preference pairs, or both.")
    batch_size: int = Field(default=32, ge=1, description="Rows that are scored, or sampled for, together.")
    max_new_tokens: int = Field(default=256, ge=1, description="Bound of a greedy sample.")
    max_samples: int | None = Field(
        default=None, ge=0, description="Sample only the first rows; all with an expected answer if absent."
    )
    kl_samples: int = Field(
        default=128,
        ge=0,
        description="Prompts, the first ones, that a model with a reference is sampled for to measure its KL; 0: none.",
    )
    shown: int = Field(default=8, ge=0, description="Samples kept for the report, side by side.")
    mask: Mask = Mask()
    max_dropped: Share = Field(default=0.01, description="Rows that may be lost before the run is stopped.")
    gates: list[Gate] = Field(default_factory=list, description="What must hold, or the run fails.")
    workers: int | None = Field(default=None, ge=1, description="Workers of this stage, 1 by default.")

    produces: ClassVar = "metrics"
    version: ClassVar[int] = 2
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
                task: prepare(sources, self.recipe(task, tokenizer), ctx.prepared, report=ctx.report)
                for task, sources in tasks
                if sources and not (task == "evaluation" and artifact.kind == "reward model")
            }
            for data in prepared.values():
                check_lost(data.manifest["ledger"], self.max_dropped)
            used |= {str(data.path): data for data in prepared.values()}
            reference, grown = reference_of(artifact), ctx.work / f"reference-{number}"
            if reference is not None:  # with the rows that its tokenizer may have got before the training
                reference, _ = grow_vocabulary(reference, tokenizer, grown)
            job = EvaluationJob(self, artifact, reference, prepared, ctx.chat_template, ctx.seed)
            outcome = launch(
                evaluate_on_worker,
                {"job": job},
                resources=ctx.resources,
                local=ctx.local,
                folder=ctx.work / "ray" / str(number),
            )
            shutil.rmtree(grown, ignore_errors=True)
            metrics[artifact.name], samples[artifact.name] = outcome["metrics"], outcome["samples"]
            ctx.report.metrics(0, {"model": artifact.name, **outcome["metrics"]})
        side_by_side = _side_by_side(samples, self.shown)
        (ctx.work / "samples.json").write_text(json.dumps(side_by_side, indent=1))
        rows = _write_ledgers(list(used.values()), ctx)
        warnings = drift_warnings(metrics, ctx.inputs["models"])
        return StageResult(metrics, rows=rows, details={"samples": side_by_side, "evaluation_warnings": warnings})


def check_gate(gate: Gate, metrics: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether a gate holds, and the sentence that says so. A metric that a model has not got does not hold.

    Raises:
        StageError: the user's function raised, or returned what is no answer.
    """
    if gate.check is not None:
        return _check(gate.check, metrics, samples)
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


def _check(name: str, metrics: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    function = own.load_for("gate", name)
    try:
        said = function(metrics=metrics, samples=samples)
    except Exception as error:  # whatever a function of the user's raises
        raise StageError(f"gate {name} raised {own.raised(error)}") from error
    if said is not None and not isinstance(said, str):
        raise StageError(
            f"gate {name} returned a {type(said).__name__}; wanted is None, or a sentence that says what is wrong"
        )
    return {"metric": name, "holds": said is None, "value": None, "says": f"{name}: {said or 'holds'}"}


def evaluate_on_worker(config: dict[str, Any]) -> dict[str, Any]:
    """One model on this worker's rows, then its reference on what needs one: never both in memory."""
    import torch.distributed as dist

    from stages.scoring import load_for_scoring

    quiet_ray()
    use_given_threads()
    rank, workers = worker_rank()
    job: EvaluationJob = config["job"]
    part = _Part(job, rank, workers)
    model = load_for_scoring(job.artifact.model, reward=job.artifact.kind == "reward model")
    part.measure(model)
    del model
    if job.reference is not None:
        part.subtract(load_for_scoring(job.reference))
    parts: list[Any] = [part.found]
    if workers > 1:
        parts = [None] * workers
        dist.all_gather_object(parts, part.found)
    total: Counter[str] = Counter()
    for found in parts:
        total.update(found["sums"])
    values = {
        name: np.concatenate([found["values"][name] for found in parts if name in found["values"]])
        for name in dict.fromkeys(name for found in parts for name in found["values"])
    }
    merged = sorted((s for found in parts for s in found["samples"]), key=lambda s: (s["source"], s["row"]))
    return {"metrics": metrics_from(total, values, job.artifact), "samples": merged}


@dataclass(frozen=True)
class EvaluationJob:
    """What every worker needs to evaluate one model."""

    stage: Evaluate
    artifact: Artifact
    reference: str | None  # of a model that has one
    prepared: dict[Task, Prepared]
    chat_template: str | None
    seed: int


class _Part:
    """One worker's part of an evaluation. `found`: sums over rows, values of each row, greedy samples."""

    def __init__(self, job: EvaluationJob, rank: int, workers: int) -> None:
        self.job, self.stage = job, job.stage
        self.tokenizer = load_tokenizer(job.artifact.model, job.chat_template)
        self.conversations, self.pairs = (
            job.prepared[task].read() if task in job.prepared else [] for task in ("evaluation", "preference")
        )
        asked = [row for row in self.conversations if row["prompt_ids"]]  # of plain text there are none
        self.prompts = asked or self.pairs
        self.rank, self.workers = rank, workers
        self.sums: dict[str, float] = {}
        self.values: dict[str, np.ndarray] = {}
        self.samples: list[dict[str, Any]] = []
        self.drawn: list[dict[str, Any]] = []  # answers for the KL

    @property
    def found(self) -> dict[str, Any]:
        return {"sums": self.sums, "values": self.values, "samples": self.samples}

    def measure(self, model: Any) -> None:
        """Everything that the evaluated model itself says."""
        from stages.scoring import rewards, sample_answers, sample_greedily, trained_token_loss

        stage, pad = self.stage, self.tokenizer.pad_token_id
        if rows := self.conversations[self.rank :: self.workers]:
            self.sums |= trained_token_loss(model, rows, pad, stage.batch_size)
            asked = [row for row in rows if row["prompt_ids"] and row["expected"] is not None]
            if not asked:  # no expected answers: a few samples to look at
                asked = [row for row in rows if row["prompt_ids"]][: stage.shown]
            if stage.max_samples is not None:
                asked = asked[: -(-stage.max_samples // self.workers)]
            greedy = sample_greedily(model, asked, self.tokenizer, stage.batch_size, stage.max_new_tokens)
            self.samples, self.sums = greedy[0], self.sums | greedy[1]
        if rows := self._mine_of_pairs():
            for side in SIDES:
                if self.job.artifact.kind == "reward model":
                    self.values[side] = rewards(model, rows, f"{side}_ids", pad, stage.batch_size)
                else:
                    self.values[side] = self._logprobs(model, rows, f"{side}_ids")
                self.values[f"{side}_tokens"] = np.array([len(row[f"{side}_ids"]) for row in rows])
        if self.job.reference is not None and stage.kl_samples:
            prompts = self.prompts[: stage.kl_samples]
            mine = slice(len(prompts) * self.rank // self.workers, len(prompts) * (self.rank + 1) // self.workers)
            self.drawn = sample_answers(
                model, prompts[mine], self.tokenizer, stage.batch_size, stage.max_new_tokens,
                seed=self.job.seed, first=mine.start,
            )  # fmt: skip
            self.values["kl"] = self._logprobs(model, self.drawn, "answer_ids")

    def subtract(self, reference: Any) -> None:
        """Log-probabilities become log ratios to the reference's."""
        if (rows := self._mine_of_pairs()) and has_implicit_reward(self.job.artifact):
            for side in SIDES:
                self.values[side] = self.values[side] - self._logprobs(reference, rows, f"{side}_ids")
        if "kl" in self.values:
            self.values["kl"] = self.values["kl"] - self._logprobs(reference, self.drawn, "answer_ids")

    def _mine_of_pairs(self) -> list[dict[str, Any]]:
        return self.pairs[self.rank :: self.workers]

    def _logprobs(self, model: Any, rows: list[dict[str, Any]], side: str) -> np.ndarray:
        from stages.scoring import answer_logprobs

        return answer_logprobs(model, rows, side, self.tokenizer.pad_token_id, self.stage.batch_size)


def metrics_from(sums: Mapping[str, float], values: Mapping[str, np.ndarray], artifact: Artifact) -> dict[str, Any]:
    """A model's metrics.

    Args:
        sums: over the rows of all workers.
        values: of each pair `chosen`, `rejected` (rewards, log ratios or log-probabilities), `chosen_tokens` and
            `rejected_tokens`; of each sampled answer `kl`, its log ratio of policy to reference.

    Raises:
        StageError: one of the values is not a finite number.
    """
    for name, found in values.items():
        if bad := int((~np.isfinite(found)).sum()):
            raise StageError(f"{artifact.name}: {bad} of {len(found)} scores ({name}) are not finite numbers")
    out: dict[str, Any] = {}
    if sums.get("tokens"):
        out |= {"loss": sums["nll"] / sums["tokens"], "trained_tokens": int(sums["tokens"])}
    if sums.get("expected"):
        out |= {"exact_match": sums["matched"] / sums["expected"], "answers": int(sums["expected"])}
    if sums.get("sampled"):
        out |= {name: sums[name] / sums["sampled"] for name in ("stopped", "answer_tokens")}
    if len(values.get("chosen", ())):
        reward = artifact.kind == "reward model"
        told = pair_statistics(*(values[name] for name in (*SIDES, *(f"{side}_tokens" for side in SIDES))))
        by = "reward" if reward else "implicit reward" if has_implicit_reward(artifact) else "likelihood"
        out |= {"preference_accuracy": told["accuracy"], "margin": told["margin"]}
        if reward:
            out |= {name: told[name] for name in ("calibration_error", "length_accuracy", "length_correlation")}
        out |= {"pairs": len(values["chosen"]), "preference_by": by}
    if count := len(values.get("kl", ())):
        out |= {"kl": float(values["kl"].mean()), "kl_answers": count}
        if count > 1:
            out["kl_stderr"] = float(values["kl"].std(ddof=1) / count**0.5)
    return out


def reference_of(artifact: Artifact) -> str | None:
    """The model that preference tuning or reinforcement learning was given, its reference; None of any other model."""
    if artifact.manifest.get("kind") not in HAS_REFERENCE:
        return None
    return str(artifact.manifest["inputs"]["model"][0]["model"])


def has_implicit_reward(artifact: Artifact) -> bool:
    """Whether its training compared answers by it: not with losses like SimPO's, which go by likelihood alone."""
    given = ((artifact.manifest.get("config") or {}).get("train") or {}).get("loss_type") or ["sigmoid"]
    types = [given] if isinstance(given, str) else given
    return artifact.manifest.get("kind") in PREFERENCE_TUNED and not set(types) <= set(REFERENCE_FREE)


def drift_warnings(metrics: Mapping[str, Mapping[str, Any]], models: Sequence[Artifact]) -> list[str]:
    """What of the sampled answers of a tuned model has run away from its reference's, where both are compared."""
    names = {artifact.model: artifact.name for artifact in models}
    out = []
    for artifact in models:
        tuned, before = metrics[artifact.name], names.get(reference_of(artifact) or "")
        if before is None or not {"answer_tokens", "stopped"} <= tuned.keys() & metrics[before].keys():
            continue
        reference = metrics[before]
        longer = tuned["answer_tokens"] / reference["answer_tokens"]
        if not 1 / TWICE <= longer <= TWICE:
            out.append(
                f"answers of {artifact.name} are {longer:.2g} times as long as those of {before}, its reference "
                f"({tuned['answer_tokens']:.1f} tokens against {reference['answer_tokens']:.1f}): length may be what it learned"
            )
        if tuned["stopped"] < reference["stopped"] - LESS_STOPPED:
            out.append(
                f"{tuned['stopped']:.0%} of the answers of {artifact.name} end by themselves, of those of {before}, its "
                f"reference, {reference['stopped']:.0%}"
            )
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
