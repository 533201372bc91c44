"""What GRPO and RLOO share: a prompt is answered several times, and its answers are compared with each other.

Losses, advantages and sampling are those of TRL's trainers (1.16: trl/trainer/grpo_trainer.py, rloo_trainer.py). Ours are the
prompts and their tokens, the order they come in, what an answer is worth, checkpoints, and what is told.

A generation is TRL's word for an iteration: `per_device_train_batch_size x steps_per_generation` answers on each worker,
`num_generations` to a prompt, trained on `num_iterations` times in micro-batches of per_device_train_batch_size. All answers
to a prompt are on one worker, one after another, so that what TRL gathers from the workers is whole groups.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from pydantic import model_validator

from stages.answering import answered, as_answer
from stages.base import StageContext, StageResult
from stages.errors import StageError
from stages.generate import choose_engine
from stages.rewards import Scorer, Scoring
from stages.rl import words
from stages.rl.iterations import Iterations
from stages.rl.loop import Iterating
from stages.rl.stage import Beside, Kept, RLStage
from stages.rl.watching import KeptSamples, LimitGuard, Limits
from stages.training.arguments import TrainConfig, library_defaults
from stages.training.drift import evaluating, share, stop_tokens
from stages.training.fed import Fed
from stages.training.feed import Feed, Row, Shares
from stages.training.job import Build, TrainerParts, TrainJob
from stages.training.meter import Meter
from stages.training.stage import run_training

# What PPO is told, and what to write here.
VALUE = "kind: ppo has a value model; here answers are compared with each other"
NOT_PPO = {
    "kl_coef": "write beta",
    "cliprange": "write epsilon",
    "num_ppo_epochs": "write num_iterations",
    "num_mini_batches": "write steps_per_generation: micro-batches of a worker that are answered together",
    "total_episodes": "write max_steps or num_train_epochs",
    "missing_eos_penalty": "write mask_truncated_completions, or a function in `rewards` that says what an end is worth",
    "kl_target": "beta is constant",
    "target_kl": "write num_iterations: 1, and the policy that is trained is the one that answered",
    "placement": "reward models are in the workers that train",
    "judge_processes": "reward models are in the workers that train",
    **dict.fromkeys(
        (
            "value_model",
            "value_learning_rate",
            "vf_coef",
            "cliprange_value",
            "gamma",
            "lam",
            "whiten_advantages",
            "whiten_rewards",
        ),
        VALUE,
    ),
}
# Set by the stage; the values are where.
DECIDED = {
    "temperature": "`temperature` beside `train`",
    "max_new_tokens": "`max_new_tokens` beside `train`",
    "eos_token_id": "the model's generation config",
    "stop_token_ids": "the model's generation config",
    "pad_token_id": "the tokenizer",
}
# TRL's names of metrics -> ours, which are those of PPO. (`kl` is of an answer there, of a token here.)
RENAMED = {
    "completions/mean_length": "answer_tokens",
    "clip_ratio/region_mean": "clip_fraction",
    "kl": "kl_per_token",
}
T = TypeVar("T")


class GroupStage(RLStage):
    """A stage that is trained by comparing the answers to a prompt."""

    train: TrainConfig

    instead: ClassVar[Mapping[str, str]] = words.COMMON | NOT_PPO

    @model_validator(mode="after")
    def _whole_groups(self) -> GroupStage:
        Sizes.of(self.train)
        return self

    @model_validator(mode="after")
    def _nothing_twice(self) -> GroupStage:
        given = self.train.given().get("generation_kwargs")
        if isinstance(given, str):
            raise ValueError("generation_kwargs: write it as a mapping")
        for name in given or {}:
            if name in DECIDED:
                raise ValueError(f"generation_kwargs: {name} is decided by {DECIDED[name]}")
        return self

    @property
    def answers_to_each(self) -> int:
        return int(self._said("num_generations"))

    def cut(self, workers: int) -> tuple[Shares, int]:
        sizes = Sizes.of(self.train)
        return Shares(1, sizes.prompts * workers), sizes.updates

    def beside(self, workers: int, inputs: Mapping[str, Sequence[str]]) -> Beside:
        return Beside(
            rewards=tuple(inputs.get("rewards", ())),
            reference="shared" if self._said("beta") else "",
            sampled=Sizes.of(self.train).prompts * self.answers_to_each,
            whole_logits=False,  # TRL's head goes over them in tiles
        )

    def _said(self, name: str) -> Any:
        return self.train.given().get(name, library_defaults(self.train.library)[name])

    def train_in_groups(self, ctx: StageContext, build: Build) -> StageResult:
        engine = choose_engine(self.engine, gpu=ctx.resources.gpus_per_worker > 0)
        if engine == "vllm" and not ctx.resources.gpus_per_worker:
            raise StageError(
                "engine: vllm runs in the workers that train, which have no GPU; use `engine: transformers`"
            )
        answers = Answers(
            self.judges(ctx), self.max_new_tokens, self.temperature, engine == "vllm", self.samples, self.limits
        )
        return run_training(self, ctx, build, {"answers": answers})


@dataclass(frozen=True)
class Sizes:
    """How an iteration is cut."""

    prompts: int  # on each worker
    updates: int  # optimiser steps

    @classmethod
    def of(cls, train: TrainConfig) -> Sizes:
        """
        Raises:
            ValueError: with what does not divide.
        """
        said = library_defaults(train.library) | {k: v for k, v in train.given().items() if v is not None}
        batch, accumulation = said["per_device_train_batch_size"], said["gradient_accumulation_steps"]
        generations, again = said["num_generations"], said["num_iterations"]
        micro_batches = said["steps_per_generation"] or accumulation
        if generations < 2:
            raise ValueError("num_generations must be at least 2: the answers to a prompt are compared with each other")
        for name, value in (("steps_per_generation", micro_batches), ("num_iterations", again)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if batch * micro_batches % generations:
            raise ValueError(
                f"per_device_train_batch_size {batch} x steps_per_generation {micro_batches} answers on each worker are not "
                f"whole groups of num_generations {generations}"
            )
        if micro_batches * again % accumulation:
            raise ValueError(
                f"steps_per_generation {micro_batches} x num_iterations {again} micro-batches of an iteration are not whole "
                f"steps of gradient_accumulation_steps {accumulation}"
            )
        return cls(batch * micro_batches // generations, micro_batches * again // accumulation)


@dataclass(frozen=True)
class Answers:
    """How answers are sampled and judged, sent to the workers."""

    judges: list[Scorer]
    max_new_tokens: int
    temperature: float
    vllm: bool
    samples: Kept
    limits: Limits


# ------------------------------------------------------------------------------------------------ the prompts


def filled(prompts: Sequence[T], count: int) -> list[T]:
    """`count` of them, the first ones again where there are fewer: TRL takes no smaller iteration."""
    return [prompts[i % len(prompts)] for i in range(count)]


class Prompts:
    """The micro-batches of a training in iterations, as TRL's trainers want them: with each the rows of the whole iteration on
    this worker, every row once for each of its answers. TRL looks at the first one's.

    Args:
        iterations: of a feed that gives every worker all prompts.
        count: prompts of an iteration over all workers. The last iteration of an epoch may have fewer; then its first ones are
            asked again, whatever the number of workers.
        repeat: answers to a prompt.
    """

    def __init__(self, iterations: Iterations, *, rank: int, count: int, repeat: int) -> None:
        self.feed, self.rank, self.count, self.repeat = iterations, rank, count, repeat
        self.meter: Meter | None = None

    def __len__(self) -> int:
        return self.feed.micro_batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        feed = self.feed
        for prompts in feed.feed:
            own = filled(prompts, self.count)[self.rank :: feed.workers]
            asked = [row for row in own for _ in range(self.repeat)]
            for _ in range(feed.updates):
                feed.step += 1
                for _ in range(feed.shares.accumulation):
                    yield {"asked": asked}


# ------------------------------------------------------------------------------------------------ the trainer


class Term:
    """A term of the reward as TRL calls it, which has it in its log by name. All terms are scored together before."""

    def __init__(self, name: str, index: int, scores: list[list[float]]) -> None:
        self.__name__, self.index, self.scores = name, index, scores

    def __call__(self, **_: Any) -> list[float]:
        return [each[self.index] for each in self.scores]


class Grouped(Iterating):
    """Mixin before `Fed` and one of TRL's trainers."""

    job: TrainJob
    accelerator: Any
    state: Any
    control: Any
    meter: Meter
    model_wrapped: Any
    processing_class: Any
    num_generations: int
    num_iterations: int
    eos_token_ids: list[int]
    _metrics: dict[str, dict[str, list[float]]]

    scoring: Scoring
    scores: list[list[float]]  # of this worker's answers that are being judged: of each the score of every term

    # A reward is what counts; TRL's loss of a step is near 0 whatever is learned.
    hopeless: ClassVar[float] = math.inf

    @property
    def answers(self) -> Answers:
        found: Answers = self.job.options["answers"]
        return found

    # -- the prompts

    @property
    def updates(self) -> int:
        args = self.args
        return int(args.steps_per_generation * self.num_iterations // args.gradient_accumulation_steps)

    @property
    def prompts_per_iteration(self) -> int:
        return int(self.args.generation_batch_size // self.num_generations)

    def loader_of(self, feed: Feed, job: TrainJob) -> Any:
        args, count = self.args, self.prompts_per_iteration
        if (rest := feed.rows % count) and args.process_index == 0:
            again = f"its first ones are asked again, {count - rest} in all"
            print(f"the last iteration of an epoch has {rest} of {count} prompts: {again}", flush=True)
        iterations = Iterations(feed, self.updates, args.gradient_accumulation_steps, args.world_size)
        return Prompts(iterations, rank=args.process_index, count=count, repeat=self.num_generations)

    def _of_all(self, own: T) -> list[T]:
        """Of each worker."""
        from accelerate.utils import gather_object

        return list(gather_object([own]))

    def join(self, job: TrainJob, loader: Any) -> None:
        super().join(job, loader)  # type: ignore[misc]
        kept, limits = self.answers.samples, self.answers.limits
        self.kept = KeptSamples(job.work, kept.every, kept.prompts)
        self.limit_guard = LimitGuard(
            limits, kl_coef="beta", ends="a function in `rewards` that says what an end is worth"
        )
        self._latest: dict[str, float] = {}  # entropy and KL of the last micro-batch
        self._enough = ""
        # TRL samples where its count of micro-batches, `_step`, is a multiple of an iteration's. It begins at 0, and so does
        # whatever goes on from a checkpoint, which is made between iterations.

    @property
    def _rollouts(self) -> dict[str, Any]:
        """What an iteration hands on to the next: a checkpoint keeps it."""
        return {"first": self.limit_guard.first, "latest": self._latest, "enough": self._enough}

    @_rollouts.setter
    def _rollouts(self, value: dict[str, Any]) -> None:
        self.limit_guard.first, self._latest, self._enough = value["first"], value["latest"], value["enough"]

    # -- the loss is TRL's, which knows itself what a step holds

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = super(Fed, self).compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        told = self._metrics["train"]
        self._latest |= {RENAMED.get(name, name): told[name][-1] for name in ("entropy", "kl") if told.get(name)}
        return loss

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> None:
        return None

    def _prepare_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        inputs: dict[str, Any] = super()._prepare_inputs(batch["asked"])  # type: ignore[misc]
        batch |= as_answers(inputs)
        self.meter.batch(batch)
        return inputs

    # -- the answers

    def _generate_and_score_completions(self, inputs: list[Row]) -> dict[str, Any]:
        self._asked = inputs
        with self.meter.paused(), self._timed("rollout"):
            made: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        told = self._metrics["train"]
        now = {name: told[name][-1] for name in ("reward", "stopped")}
        now |= {"answer_tokens": told["completions/mean_length"][-1]} | self._latest
        self.hold_to_limits(now)
        return made

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._metrics["train"][f"seconds/{what}"].append(time.perf_counter() - began)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self._timed("generate"):
            return super()._generate_single_turn(*args, **kwargs)  # type: ignore[misc]

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """The tokens that the data engine made, which a reward model and an evaluation see too."""
        return [row["prompt_ids"] for row in self._asked], None, {}

    def _calculate_rewards(self, inputs: list[Row], prompts: Any, completions: Any, completion_ids: Any) -> Any:
        found = [as_answer(ids, ids[-1] in self.eos_token_ids, self.processing_class) for ids in completion_ids]
        with self._timed("judge"):
            self.scores[:] = self._together(
                lambda: self.scoring([answered(row, answer) for row, answer in zip(inputs, found, strict=True)])
            )
        stopped = [float(answer["stopped"]) for answer in found]
        self._metrics["train"]["stopped"].append(mean(self._of_all(mean(stopped))))
        self._keep_samples(inputs, found)
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids)  # type: ignore[misc]

    def _together(self, work: Callable[[], T]) -> T:
        """What `work` gives. What goes wrong with one worker stops all, which would wait for it for ever.

        Raises:
            StageError: as `work` does.
        """
        result, problem = None, None
        try:
            result = work()
        except StageError as error:
            problem = error
        told = next((said for said in self._of_all(str(problem) if problem else None) if said), None)
        if told is not None:
            raise problem or StageError(told)
        return result  # type: ignore[return-value]

    def _keep_samples(self, inputs: list[Row], found: list[dict[str, Any]]) -> None:
        """The first answer to each prompt."""
        names = [scorer.name for scorer in self.answers.judges]
        rows = [
            {
                "prompt": inputs[i]["prompt"],
                "answer": found[i]["text"],
                "reward": self._reward(self.scores[i]),
                "scores": dict(zip(names, self.scores[i], strict=True)),
                "stopped": found[i]["stopped"],
            }
            for i in range(0, len(inputs), self.num_generations)[: self.answers.samples.prompts]
        ]
        each = self._of_all(rows)
        if self.accelerator.is_main_process:
            in_order = [part[i] for i in range(max(map(len, each))) for part in each if i < len(part)]
            step = self.state.global_step
            last = step + self.updates >= self.feed.steps
            self.kept.keep(self.feed.iteration(step), step, last, in_order)

    def _reward(self, scores: list[float]) -> float:
        return sum(scorer.weight * score for scorer, score in zip(self.answers.judges, scores, strict=True))

    # -- what is told

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            metrics = self._metrics["train"]
            metrics.pop("completions/clipped_ratio", None)  # `stopped` says it
            for name in list(metrics):
                ours = name.removesuffix("/mean") if name.startswith("rewards/") else RENAMED.get(name, name)
                metrics[ours] = metrics.pop(name)
        super().log(logs, start_time)  # type: ignore[misc]

    def held_out_metrics(self) -> dict[str, float]:
        """An answer to each held-out prompt, judged. The same on any number of workers."""
        from trl.models.utils import unwrap_model_for_generation

        from stages.sampling import sample

        job, answers, args = self.job, self.answers, self.args
        rows = Feed(
            job.held_out, rank=0, shares=Shares(1, sum(n for _, _, n in job.held_out)), steps=1, seed=None
        )  # fmt: skip
        (everything,) = rows
        part = share(len(everything), args.process_index, args.world_size)
        with (
            unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model, evaluating(model)
        ):  # fmt: skip
            sampled = sample(
                model, [row["prompt_ids"] for row in everything[part]], per_prompt=1,
                max_new_tokens=answers.max_new_tokens, temperature=answers.temperature, top_p=1.0, top_k=0, seed=job.seed,
                pad_id=self.processing_class.pad_token_id, stop_ids=self.eos_token_ids,
                batch_size=args.per_device_eval_batch_size, first=part.start,
            )  # fmt: skip
        found = [as_answer(one.ids, one.stopped, self.processing_class) for (one,) in sampled]
        scores = self._together(
            lambda: self.scoring([answered(r, a) for r, a in zip(everything[part], found, strict=True)])
        )
        told = [
            {
                "eval_reward": self._reward(own),
                **{f"eval_rewards/{s.name}": score for s, score in zip(answers.judges, own, strict=True)},
                "eval_stopped": float(answer["stopped"]),
                "eval_answer_tokens": float(len(answer["ids"])),
            }
            for own, answer in zip(scores, found, strict=True)
        ]
        each = [one for part_told in self._of_all(told) for one in part_told]
        return {name: mean([one[name] for one in each]) for name in each[0]} | {"eval_rows": len(each)}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def as_answers(inputs: dict[str, Any]) -> dict[str, Any]:
    """TRL's micro-batch, prompts padded left and answers right, as a batch of answers (stages/training/answers.py) that the
    meter counts and of which the guard writes down the rows."""
    import torch

    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    prompt, answer = inputs["prompt_mask"], inputs["completion_mask"]
    sizes = answer.sum(1)
    begin = torch.arange(len(ids), device=ids.device) * ids.shape[1] + prompt.shape[1]
    trained = sizes > 0  # of an answer that is left out since it did not end, nothing is
    return {
        "input_ids": ids,
        "attention_mask": torch.cat([prompt, answer], 1),
        "answer_ids": inputs["completion_ids"][answer.bool()],
        "answer_of": torch.repeat_interleave(sizes[trained]),
        "ends": (begin + sizes - 1)[trained],
    }


# ------------------------------------------------------------------------------------------------ putting it together


def group_trainer(parts: TrainerParts, trainer: Any, config: Any, **fixed: Any) -> Any:
    """A trainer of TRL's with our prompts, rewards and sampling.

    Args:
        trainer, config: the classes; `fixed`: of the config.
    """
    job = parts.job
    answers: Answers = job.options["answers"]
    # Before the trainer's arguments: once those of ZeRO-3 are there, transformers cuts up every model that it loads.
    batch_size = (
        job.arguments.get("per_device_train_batch_size")
        or library_defaults(config.__name__)["per_device_train_batch_size"]
    )
    scoring = Scoring(answers.judges, batch_size)
    if answers.vllm:
        stops = {"stop_token_ids": job.stop_ids} if job.stop_ids else {}
        fixed |= {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "generation_kwargs": (job.arguments.get("generation_kwargs") or {}) | stops,
        }
    args = parts.arguments(
        config,
        max_completion_length=answers.max_new_tokens,
        temperature=answers.temperature,
        reward_weights=[scorer.weight for scorer in answers.judges],
        num_generations_eval=1,
        log_completions=False,
        **fixed,
    )
    scores: list[list[float]] = []
    made = trainer(
        model=job.model,
        reward_funcs=[Term(scorer.name, i, scores) for i, scorer in enumerate(answers.judges)],
        args=args,
        train_dataset=parts.dataset,
        eval_dataset=parts.eval_dataset(args),
        processing_class=parts.tokenizer,
        peft_config=parts.peft_config,
    )
    made.scoring, made.scores = scoring, scores
    made.eos_token_ids = stop_tokens(made.accelerator.unwrap_model(made.model), parts.tokenizer, job.stop_ids)
    if not answers.vllm:
        made.generation_config.eos_token_id = made.generation_kwargs["eos_token_id"] = made.eos_token_ids
    return made
