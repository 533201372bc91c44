"""How far a policy drifts from its reference, seen on answers that are sampled, since the data's own do not show it.

Before training the policy is the reference, and is sampled: `reference_samples.json`. At every evaluation and at the end the
policy is sampled again for the same prompts, and the first samples are scored, so nothing of this needs a second model:

    samples/tokens   mean length of the policy's answers in tokens, and `samples/length_ratio` to that of the reference's
    samples/stopped  share of them that ended by themselves
    samples/kl       mean of log pi_0(y|x) - log pi(y|x) over the reference's samples: KL(reference || policy), nats an answer

(The KL of policy and reference the other way round needs the reference again: an `evaluate` stage gives it.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import Field

from stages.base import Config
from stages.data.groups import Group, read_group
from stages.training import documents
from stages.training.answers import score_answers
from stages.training.architecture import positions
from stages.training.job import TrainJob

FILE = "reference_samples.json"
COLLAPSED = -0.5  # nats a token that chosen answers have become less likely, in the mean
TWICE = 2.0
LESS_STOPPED = 0.25


class Samples(Config):
    """Answers that are sampled to see how far the policy drifts."""

    prompts: int = Field(default=32, ge=0, description="Prompts to sample an answer for; 0: none.")
    max_new_tokens: int = Field(default=128, ge=1, description="Bound of a sampled answer.")


class Drift:
    """Mixin before `Fed`, for policies that have a reference."""

    job: TrainJob
    args: Any
    head: Any
    state: Any
    accelerator: Any
    model_wrapped: Any
    processing_class: Any
    samples_collator: Any  # of answers with one side, in the layout the model is trained with
    reference_rows: list[dict[str, Any]]

    def begin(self) -> None:
        """Sample the reference, or read what was sampled when the training began."""
        super().begin()  # type: ignore[misc]
        self.reference_rows = []
        wanted: Samples = self.job.options["watch"]
        plugin = self.accelerator.state.deepspeed_plugin
        if not wanted.prompts or (plugin is not None and plugin.zero_stage == 3):
            return  # under ZeRO-3 every token of every answer would gather all weights
        file = self.job.work / FILE
        if self.state.global_step:
            self.reference_rows = json.loads(file.read_text()) if file.is_file() else []
            return
        limit = positions(self.job.model)
        prompts = first_prompts(self.job.held_out or self.job.groups, wanted.prompts)
        if limit is not None:  # a model made for so many positions may have no more
            prompts = [prompt for prompt in prompts if len(prompt) + wanted.max_new_tokens <= limit]
        rows = self._sampled(prompts)
        self.reference_rows = [row | {"logps": logps} for row, logps in zip(rows, self._scored(rows), strict=True)]
        if self.args.process_index == 0:
            temporary = file.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.reference_rows))
            temporary.replace(file)

    def watch(self) -> dict[str, float]:
        rows = self.reference_rows
        if not rows:
            return {}
        now = self._sampled([row["prompt_ids"] for row in rows])
        tokens, before = (sum(len(row["completion_ids"]) for row in each) / len(each) for each in (now, rows))
        kl = sum(row["logps"] - logps for row, logps in zip(rows, self._scored(rows), strict=True)) / len(rows)
        return {
            "samples/tokens": tokens,
            "samples/length_ratio": tokens / before,
            "samples/stopped": sum(row["stopped"] for row in now) / len(now),
            "samples/kl": kl,
        }

    def finish(self) -> tuple[dict[str, float], list[str]]:
        metrics, warnings = super().finish()  # type: ignore[misc]
        logged: dict[str, float] = next(
            (entry for entry in reversed(self.state.log_history) if "chosen_ratio" in entry), {}
        )
        before = sum(row["stopped"] for row in self.reference_rows) / max(len(self.reference_rows), 1)
        return metrics, [*warnings, *drift_warnings(logged | metrics, before)]

    def _sampled(self, prompts: list[list[int]]) -> list[dict[str, Any]]:
        """An answer to each prompt, over all workers: `prompt_ids`, `completion_ids` and whether it `stopped`."""
        from stages.sampling import sample

        model = self.accelerator.unwrap_model(self.model_wrapped)
        mine = share(len(prompts), self.args.process_index, self.args.world_size)
        with documents.set_aside(model), evaluating(model):
            found = sample(
                model, prompts[mine], per_prompt=1, max_new_tokens=self.job.options["watch"].max_new_tokens, temperature=1.0,
                top_p=1.0, top_k=0, seed=self.job.seed, pad_id=self.processing_class.pad_token_id,
                stop_ids=stop_tokens(model, self.processing_class, self.job.stop_ids),
                batch_size=self.args.per_device_train_batch_size, first=mine.start,
            )  # fmt: skip
        answers = [(answer.ids, answer.stopped) for (answer,) in found]
        return [
            {"prompt_ids": prompt, "completion_ids": ids, "stopped": stopped}
            for prompt, (ids, stopped) in zip(prompts, self._gathered(answers), strict=True)
        ]

    def _scored(self, rows: list[dict[str, Any]]) -> list[float]:
        """log p of each answer under the policy as it is, over all workers."""
        import torch

        model = self.accelerator.unwrap_model(self.model_wrapped)
        mine = rows[share(len(rows), self.args.process_index, self.args.world_size)]
        size, logps = self.args.per_device_train_batch_size, []
        with evaluating(model), torch.no_grad():
            for at in range(0, len(mine), size):
                inputs = self._prepare_inputs(self.samples_collator(mine[at : at + size]))  # type: ignore[attr-defined]
                logps += score_answers(self.head, model, inputs, sides=1).logps[0].tolist()
        return self._gathered(logps)

    def _gathered(self, mine: list[Any]) -> list[Any]:
        return of_all_workers(mine, self.args.world_size)


def of_all_workers(mine: list[Any], workers: int) -> list[Any]:
    """What each has, in order of the workers."""
    import torch.distributed as dist

    if workers == 1:
        return mine
    parts: list[list[Any]] = [[] for _ in range(workers)]
    dist.all_gather_object(parts, mine)
    return [one for part in parts for one in part]


def drift_warnings(told: dict[str, float], stopped_before: float) -> list[str]:
    """What of a finished training looks wrong, in words.

    Args:
        told: its last metrics.
        stopped_before: share of the reference's samples that ended by themselves.
    """
    out = []
    if (ratio := told.get("chosen_ratio", 0.0)) < COLLAPSED:
        out.append(
            f"chosen answers have become less likely by {-ratio:.2f} nats a token: the policy learns what to avoid and "
            "forgets what to say; a lower learning_rate, a higher beta or `loss_type: [sigmoid, sft]` holds them"
        )
    longer = told.get("samples/length_ratio", 1.0)
    if not 1 / TWICE <= longer <= TWICE:
        out.append(
            f"sampled answers are {longer:.2g} times as long as the reference's ({told['samples/tokens']:.0f} tokens): "
            "length may be what is learned; compare the lengths of chosen and rejected answers, or use sigmoid_norm or ld_alpha"
        )
    if told.get("samples/stopped", stopped_before) < stopped_before - LESS_STOPPED:
        out.append(
            f"{told['samples/stopped']:.0%} of sampled answers end by themselves, {stopped_before:.0%} of the reference's did"
        )
    return out


def first_prompts(groups: list[Group], count: int) -> list[list[int]]:
    """The prompts of the first rows, each once."""
    found: dict[tuple[int, ...], None] = {}
    for file, group, _ in groups:
        for prompt in read_group(file, group, ["prompt_ids"])["prompt_ids"].to_pylist():
            found[tuple(prompt)] = None
            if len(found) == count:
                return [list(one) for one in found]
    return [list(one) for one in found]


def share(count: int, rank: int, workers: int) -> slice:
    """A worker's part of `count` things, next to each other."""
    return slice(count * rank // workers, count * (rank + 1) // workers)


def stop_tokens(model: Any, tokenizer: Any, trained: list[int]) -> list[int]:
    """What ends an answer: the tokens that end those of the data, and the model's own."""
    named = model.generation_config.eos_token_id
    named = tokenizer.eos_token_id if named is None else named
    own = [] if named is None else list(named) if isinstance(named, list) else [named]
    return list(dict.fromkeys([*own, *trained]))


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
