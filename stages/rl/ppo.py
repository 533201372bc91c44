"""PPO's iteration on a worker: answer the prompts, judge the answers, train on them, as a trainer for our training core.

    prompts -> answers (engines.py) -> scores and reference (judging.py) -> advantages (rollout.py) -> steps (losses.py)

Each worker answers its share of an iteration's prompts; what is known of the answers is then shared, so every worker computes
the same advantages and cuts the same mini-batches, and takes its part of each. What is drawn depends on the seed and the number
of the prompt. So a run is the same whatever the workers and the micro-batches, to rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stages.answering import answered, as_answer
from stages.base import Artifact, StageContext
from stages.capacity import Need
from stages.cluster import wait_for_room
from stages.data.groups import read_group
from stages.errors import StageError
from stages.rewards import Scorer
from stages.rl.advantages import KLCoefficient
from stages.rl.engines import TransformersEngine, VLLMEngine, gathered
from stages.rl.iterations import Iterations
from stages.rl.judging import Judge, JudgeActors, JudgeOptions
from stages.rl.loop import Iterating
from stages.rl.losses import approximate_kl, policy_loss, value_loss
from stages.rl.rollout import TOKENS, Episode, Rollout, Rollouts, make_rollout, rollout_collator
from stages.rl.settings import PPOSettings
from stages.rl.stage import TOGETHER, Kept
from stages.rl.watching import KeptSamples, LimitGuard, Limits
from stages.storage import pull_model
from stages.training import documents
from stages.training.answers import answer_collator
from stages.training.architecture import positions
from stages.training.drift import evaluating, of_all_workers, share, stop_tokens
from stages.training.fed import Fed, Scored, add_metrics
from stages.training.feed import Feed, Row
from stages.training.job import TrainerParts, TrainJob
from stages.training.kernels import model_dtype
from stages.training.launch import per_worker

SAVED = 10  # iterations from one checkpoint to the next, where the user does not say
ACTORS_TIMEOUT = 600.0  # seconds for processes that judge to start and load their models


@dataclass(frozen=True)
class PPOOptions:
    """What a PPO worker is sent besides the job."""

    settings: PPOSettings
    scorers: list[Scorer]
    value: str  # model folder
    value_scale: tuple[float, float]  # what its scores are multiplied by, and what is taken off then
    max_new_tokens: int
    temperature: float
    engine: str
    samples: Kept
    limits: Limits
    judges: JudgeActors | None = None  # None: in the worker itself

    def judging(self, job: TrainJob, load_options: dict[str, Any]) -> JudgeOptions:
        """The reference of a policy with an adapter is the policy without it; of another, the model it was given."""
        separate = self.settings.kl_coef > 0 and job.lora is None
        return JudgeOptions(
            scorers=self.scorers,
            reference=job.model if separate else None,
            temperature=self.temperature,
            batch_size=job.arguments.get("per_device_train_batch_size", 8),
            load_options=load_options,
        )


def value_scale(begins_as: Artifact, scorers: Sequence[Scorer]) -> tuple[float, float]:
    """(a, b) of a value a score - b. A reward model that is one of the terms begins by foreseeing what it gives: its score less
    the mean, in standard deviations, times its weight."""
    of = next((s for s in scorers if s.model == begins_as.model), None)
    return (1.0, 0.0) if of is None else (of.weight / of.std, of.weight * of.mean / of.std)


@contextmanager
def judged_elsewhere(job: TrainJob, processes: int, ctx: StageContext) -> Iterator[TrainJob]:
    """The job with processes that judge, while it trains; 0: as it is."""
    if not processes:
        yield job
        return
    resources = ctx.resources
    ctx.report.phase("start judges", processes=processes)
    wait_for_room([Need(processes, per_worker(resources))], ctx.report)
    dtype = {"dtype": "bfloat16" if resources.gpus_per_worker else "float32"}
    judges = JudgeActors.start(
        job.options["ppo"].judging(job, dtype),
        actors=processes,
        cpus=0 if ctx.local else resources.cpus_per_worker,
        gpus=resources.gpus_per_worker,
        timeout_s=ACTORS_TIMEOUT,
        grows=not ctx.local,
    )
    try:
        yield replace(job, options={"ppo": replace(job.options["ppo"], judges=judges)})
    finally:
        judges.close()


def build_trainer(parts: TrainerParts) -> Any:
    """The trainer of one worker."""
    import torch
    import transformers

    from stages.rl.actor_critic import Acted, ActorCritic

    class PPOTrainer(Iterating, Fed, transformers.Trainer):
        options: PPOOptions
        settings: PPOSettings
        judge: Judge | JudgeActors
        _moved: Any  # of this worker, in the step that is being made: sum of approximate_kl, and tokens

        # -- iterations

        @property
        def updates(self) -> int:
            return self.settings.num_ppo_epochs * self.settings.num_mini_batches

        @property
        def prompts_per_iteration(self) -> int:
            args = self.args
            step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
            return int(step * self.settings.num_mini_batches)

        def loader_of(self, feed: Feed, job: TrainJob) -> Any:
            iterations = Iterations(feed, self.updates, self.args.gradient_accumulation_steps, self.args.world_size)
            return Rollouts(
                iterations, self.data_collator, job.placeholder, self.settings,
                rank=self.args.process_index, collect=self.collect, skipped=lambda: self._skipping, seed=job.seed,
            )  # fmt: skip

        def join(self, job: TrainJob, loader: Any) -> None:
            super().join(job, loader)
            settings = self.settings
            self.beta = KLCoefficient(settings.kl_coef, settings.kl_target, settings.kl_horizon)
            self.limit_guard = LimitGuard(self.options.limits)
            self.kept = KeptSamples(job.work, self.options.samples.every, self.options.samples.prompts)
            self.stops = stop_tokens(self.policy, self.processing_class, job.stop_ids)
            self._skipping, self._enough = False, ""
            how: dict[str, Any] = {
                "max_new_tokens": self.options.max_new_tokens,
                "temperature": self.options.temperature,
                "stop_ids": self.stops,
            }
            if self.options.engine == "vllm":
                self.engine: Any = VLLMEngine(
                    self.policy, self.accelerator, self.processing_class, lambda: self.state.global_step,
                    max_length=positions(job.model), **how,
                )  # fmt: skip
            else:
                size = max(TOGETHER, self.args.per_device_train_batch_size)
                pad_id = self.processing_class.pad_token_id
                self.engine = TransformersEngine(self.answering, batch_size=size, pad_id=pad_id, **how)

        @property
        def _rollouts(self) -> dict[str, Any]:
            """What an iteration hands on to the next: a checkpoint keeps it."""
            return {"beta": self.beta.value, "first": self.limit_guard.first, "enough": self._enough}

        @_rollouts.setter
        def _rollouts(self, value: dict[str, Any]) -> None:
            self.beta.value, self.limit_guard.first, self._enough = value["beta"], value["first"], value["enough"]

        # -- what an iteration begins with

        def collect(self, iteration: int, first: int, prompts: list[Row]) -> Rollout:
            """Answers to all prompts, over all workers, and what is learned from them."""
            with self.meter.paused():
                began = time.perf_counter()
                self._skipping = False
                episodes, seconds = self.episodes(prompts, first, self.args.seed)
                terms = self.options.scorers
                rollout = make_rollout(
                    episodes, self.settings, names=[s.name for s in terms], weights=[s.weight for s in terms],
                    beta=self.beta.value,
                )  # fmt: skip
                told = rollout.metrics | {"kl_coef": self.beta.value}
                seconds |= {"seconds/rollout": time.perf_counter() - began}
                self._tell(told | seconds | {"episodes": len(episodes)})
                if self.args.process_index == 0:
                    last = iteration == self.feed.steps // self.updates - 1
                    kept = [self._sample(p, e, r) for p, e, r in zip(prompts, episodes, rollout.rewards, strict=True)]
                    self.kept.keep(iteration, iteration * self.updates, last, kept)
                self.hold_to_limits(told)
                if "kl" in told:
                    self.beta.update(told["kl"], len(episodes))
                return rollout

        def episodes(self, prompts: list[Row], first: int, seed: int) -> tuple[list[Episode], dict[str, float]]:
            """Answers to the prompts, in order, and the seconds that each part took on this worker.

            Args:
                first: the number of the first prompt; a number and the seed decide what is drawn.
            """
            clock = Clock()
            mine = share(len(prompts), self.args.process_index, self.args.world_size)
            rows = prompts[mine]
            with clock("generate"):
                drawn = self.engine.sample([row["prompt_ids"] for row in rows], seed=seed, first=first + mine.start)
            answers = [as_answer(s.ids, s.stopped, self.processing_class) for s in drawn]
            with clock("judge"):
                pending = self.judge.submit([answered(row, a) for row, a in zip(rows, answers, strict=True)])
            with clock("score"):
                said = self.said(
                    [
                        {"prompt_ids": row["prompt_ids"], "completion_ids": a["ids"]}
                        for row, a in zip(rows, answers, strict=True)
                    ],
                    most=-(-len(prompts) // self.args.world_size),
                )
            with clock("judge"):
                judged = pending()
            own = [
                Episode(
                    prompt_ids=row["prompt_ids"], answer_ids=answer["ids"], stopped=answer["stopped"], text=answer["text"],
                    logps=logps, ref_logps=verdict.ref_logps if reference is None else reference, values=values,
                    entropy=float(entropy.mean()), scores=verdict.scores,
                )
                for row, answer, (logps, entropy, values, reference), verdict in zip(rows, answers, said, judged, strict=True)
            ]  # fmt: skip
            with clock("gather"):
                every = of_all_workers(own, self.args.world_size)
            return every, clock.seconds

        @torch.no_grad()
        def said(self, rows: list[Row], most: int) -> list[tuple[np.ndarray, ...]]:
            """Of each answer's tokens: log-probabilities, entropies, values, and of a policy with an adapter what the reference
            says, else None.

            Args:
                most: rows of the worker that has most: under ZeRO-3 every worker has to make as many passes.
            """
            size = self.args.per_device_train_batch_size
            out: list[Any] = []
            model = self.model_wrapped
            with evaluating(model):
                for at in range(0, max(most, 1), size):
                    part = rows[at : at + size]
                    inputs = self._prepare_inputs(self.data_collator(part or [self.job.placeholder]))
                    acted = self.act(model, inputs, entropy=True)
                    reference = None
                    if self.settings.kl_coef > 0 and hasattr(self.policy, "peft_config"):
                        with self.policy.disable_adapter():
                            reference = self.act(model, inputs, value=False).logps
                    lengths = [len(row["completion_ids"]) for row in part]
                    columns = [_cut(column, lengths) for column in (*acted, reference)]
                    out += zip(*columns, strict=True)
            return out

        @property
        def policy(self) -> Any:
            return self.accelerator.unwrap_model(self.model_wrapped).policy

        @contextmanager
        def answering(self) -> Iterator[Any]:
            """The policy with whole weights, to answer with."""
            policy = self.policy
            with gathered(self.model_wrapped, policy), self.accelerator.autocast():
                yield policy

        def _sample(self, prompt: Row, episode: Episode, reward: float) -> dict[str, Any]:
            scores = dict(zip((s.name for s in self.options.scorers), episode.scores, strict=True))
            return {
                "prompt": prompt["prompt"], "answer": episode.text, "reward": float(reward), "scores": scores,
                "stopped": episode.stopped,
            }  # fmt: skip

        def _tell(self, told: dict[str, float]) -> None:
            """Metrics that are the same on every worker."""
            ones = {k: torch.tensor([float(v), 1.0], device=self.args.device) for k, v in told.items()}
            add_metrics(self._metric_sums, ones)

        # -- the steps on it

        def act(self, model: Any, inputs: dict[str, Any], **wanted: bool) -> Acted:
            given = {name: inputs[name] for name in ("input_ids", "position_ids") if name in inputs}
            return Acted(*model(given, inputs["answer_at"], inputs["answer_ids"], **wanted))

        def score(self, model: Any, inputs: dict[str, Any]) -> Scored:
            settings = self.settings
            acted = self.act(model, inputs, entropy=settings.entropy_coef > 0)
            old_logps, old_values, advantages, returns = (inputs[name] for name in TOKENS)
            of_policy, ratio, clipped = policy_loss(acted.logps, old_logps, advantages, settings.cliprange)
            of_value, value_clipped = value_loss(acted.values, old_values, returns, settings.cliprange_value)
            each = of_policy + settings.vf_coef * of_value
            if settings.entropy_coef > 0:
                each = each - settings.entropy_coef * acted.entropy
            weight = inputs["real"][inputs["answer_of"]]
            count = weight.sum()
            metrics = {
                "policy_loss": of_policy,
                "value_loss": of_value,
                "ratio": ratio,
                "clip_fraction": clipped,
                "value_clip_fraction": value_clipped,
                "approx_kl": approximate_kl(acted.logps, old_logps),
            }
            sums = {k: torch.stack([(v.detach() * weight).sum(), count]) for k, v in metrics.items()}
            self._moved = self._moved + sums["approx_kl"].double()
            return Scored((each * weight).sum()[None], sums, None)

        def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
            left_out = inputs["left_out"]
            # Without a backward pass no engine makes a step, and optimizers leave weights without gradients alone. (Only a
            # scaler of gradients, for fp16, will have some: those of placeholders are 0.)
            if left_out and self.accelerator.scaler is None:
                loss = torch.zeros((), device=self.args.device)
            else:
                loss = super().training_step(model, inputs, num_items_in_batch)
            if self.accelerator.sync_gradients:
                self._tell({"skipped_steps": float(left_out)})
                if self.settings.target_kl is not None and not left_out:
                    moved, tokens = self._sum(self._moved.tolist())
                    self._skipping = moved / max(tokens, 1.0) > self.settings.target_kl
                self._moved = torch.zeros(2, device=self.args.device, dtype=torch.float64)
            return loss

        @property
        def hopeless(self) -> float:
            # Advantages have no scale that a loss could be held against; limits are those of watching.py.
            return math.inf

        def create_optimizer(self, model: Any = None) -> Any:
            optimizer = super().create_optimizer(model)
            if self.settings.value_learning_rate is not None:
                if not hasattr(optimizer, "add_param_group"):
                    raise StageError(
                        "value_learning_rate: the DeepSpeed file's own optimizer has one rate for all; leave one out"
                    )
                of_value = {id(p) for p in self.accelerator.unwrap_model(self.model).value.parameters()}
                split_groups(optimizer, of_value, self.settings.value_learning_rate)
            return optimizer

        # -- what is told and made of it

        def held_out_metrics(self) -> dict[str, float]:
            """The held-out prompts answered by the policy as it is; always with the same draws."""
            prompts = [row for file, group, _ in self.job.held_out for row in read_group(file, group).to_pylist()]
            episodes, _ = self.episodes(prompts, 0, self.args.seed + 1)
            terms = self.options.scorers
            told = make_rollout(
                episodes,
                self.settings,
                names=[s.name for s in terms],
                weights=[s.weight for s in terms],
                beta=self.beta.value,
            ).metrics
            names = ("reward", "reward_std", "kl", "rlhf_reward", "entropy", "answer_tokens", "stopped")
            told = {k: v for k, v in told.items() if k in names or k.startswith("rewards/")}
            return {"eval_rows": len(prompts)} | {f"eval_{k}": v for k, v in told.items()}

        def trained_model(self, **options: Any) -> Any:
            return super().trained_model(**options).policy

        def trained_state(self) -> dict[str, Any]:
            state = super().trained_state() or {}  # ZeRO-3 gathers them on the first worker alone
            return {k.removeprefix("policy."): v for k, v in state.items() if k.startswith("policy.")}

        def save_adapter(self, folder: str) -> None:
            state = self.trained_state()
            if self.args.process_index == 0:
                self.policy.save_pretrained(folder, state_dict=state)

    job, options = parts.job, parts.job.options["ppo"]
    # What is not trained is loaded before the arguments are made: under ZeRO-3 they have all that is loaded after partitioned.
    # The reference is frozen, and there is no autocast around it: it is loaded as it computes.
    frozen = {"dtype": model_dtype(parts.kernels.precision, frozen=True)}
    judge = options.judges or Judge(options.judging(job, parts.kernels.load_options() | frozen))
    settings = options.settings
    updates = settings.num_ppo_epochs * settings.num_mini_batches

    def made(**given: Any) -> Any:
        given.pop("model_init_kwargs")
        return transformers.TrainingArguments(**({"logging_steps": updates, "save_steps": SAVED * updates} | given))

    args = parts.arguments(made)
    if settings.total_episodes is not None:
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        args.max_steps = -(-settings.total_episodes // (step * settings.num_mini_batches)) * updates
    transformers.set_seed(args.seed)  # of adapters, and of a value head that is new
    policy = _loaded(parts, transformers.AutoModelForCausalLM, job.model, parts.peft_config, args)
    value = _value_model(parts, options, args)
    layout = parts.layout(policy)
    if layout == "shared" and not documents.use(value):
        documents.leave(policy)
        layout = "padded"
    answers = answer_collator(
        parts.tokenizer.pad_token_id, ("completion_ids",), layout=layout, token_share=True,
        pad_to_multiple_of=parts.multiple(),
    )  # fmt: skip
    trainer = PPOTrainer(
        model=ActorCritic(policy, value, options.temperature, options.value_scale[1]),
        args=args,
        data_collator=rollout_collator(answers),
        train_dataset=parts.dataset,
        eval_dataset=parts.eval_dataset(args),
        processing_class=parts.tokenizer,
    )
    trainer.options, trainer.settings, trainer.judge = options, settings, judge
    trainer._skipping, trainer._moved = False, torch.zeros(2, device=args.device, dtype=torch.float64)
    return trainer


def _loaded(parts: TrainerParts, family: Any, model: str, peft_config: Any, args: Any, **more: Any) -> Any:
    """A model that is trained, with an adapter where the stage has one."""
    loaded = family.from_pretrained(
        pull_model(model), trust_remote_code=False, **parts.kernels.load_options(), **parts.quantization(), **more
    )
    loaded.config.use_cache = False
    if peft_config is None:
        return loaded
    from peft import get_peft_model, prepare_model_for_kbit_training

    if parts.job.quantization is not None:
        loaded = prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=False)
    if args.gradient_checkpointing:
        loaded.enable_input_require_grads()
    return get_peft_model(loaded, peft_config)


def _value_model(parts: TrainerParts, options: PPOOptions, args: Any) -> Any:
    import torch
    import transformers

    peft_config = None
    if (lora := parts.job.lora) is not None:
        from peft import LoraConfig

        saved = [*(lora.get("modules_to_save") or []), "score"]
        peft_config = LoraConfig(task_type="SEQ_CLS", **lora | {"modules_to_save": saved})
    # Of the policy's own model the one that has rows for added tokens.
    model = parts.job.model if options.value == parts.job.given_model else options.value
    value = _loaded(parts, transformers.AutoModelForSequenceClassification, model, peft_config, args, num_labels=1)
    value.config.pad_token_id = parts.tokenizer.pad_token_id
    heads = [p for name, p in value.named_parameters() if ".score." in f".{name}"]
    with _whole(heads), torch.no_grad():
        for head in heads:
            head.mul_(options.value_scale[0])
    return value


def _whole(parameters: list[Any]) -> AbstractContextManager[Any]:
    """Weights that ZeRO-3 has partitioned, to be changed."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def split_groups(optimizer: Any, parameters: set[int], learning_rate: float) -> None:
    """Give the parameters (by id) of an optimizer that has made no step yet another learning rate."""
    for group in list(optimizer.param_groups):
        theirs = [p for p in group["params"] if id(p) in parameters]
        if theirs:
            group["params"] = [p for p in group["params"] if id(p) not in parameters]
            optimizer.add_param_group({**group, "params": theirs, "lr": learning_rate})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


class Clock:
    """Seconds of named parts, added up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            key = f"seconds/{name}"
            self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - began


def _cut(column: Any, lengths: list[int]) -> list[Any]:
    """A tensor of all tokens as an array for each answer."""
    if column is None:
        return [None] * len(lengths)
    return np.split(column.float().cpu().numpy()[: sum(lengths)], np.cumsum(lengths)[:-1]) if lengths else []
