"""What a policy's answers are worth: the score of every reward term, and what the reference says of each token.

`colocated` (`Judge`): in the training worker's own process, which then holds the reward models and the reference besides
the policy. `separate` (`JudgeActors`): in Ray actors with resources of their own; a training worker may do something else
until it needs the result. Both give the same numbers, to rounding, however answers are cut into batches.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.errors import StageError
from stages.pool import told_of
from stages.rewards import Answered, Scorer, Scoring
from stages.storage import pull_model

if TYPE_CHECKING:
    from stages.training.head import TrainedHead

RESTARTS = 2  # of an actor that is lost

Result = Callable[[], "list[Judged]"]


@dataclass(frozen=True)
class Judged:
    """What is said of one answer.

    `scores`: of each reward term, without the weights. `ref_logps`: (answer tokens,) float32, log p of each token under the
    reference, stop token included; None where no reference was named.
    """

    scores: list[float]
    ref_logps: np.ndarray | None


@dataclass(frozen=True)
class JudgeOptions:
    """All that a process needs to judge; sent to it by Ray.

    Args:
        reference: a model folder or hub id; None where it is had already (an adapter switched off), or not wanted.
        temperature: log-probabilities are those of logits / temperature, as answers are drawn.
        batch_size: answers that go through a model together, and to an actor at a time.
        load_options: for `from_pretrained` of the reference (dtype, attn_implementation).
    """

    scorers: list[Scorer]
    reference: str | None
    temperature: float
    batch_size: int
    load_options: dict[str, Any]


class Judge:
    """Judges in this process.

    Args:
        device: of the reference; None: this process's GPU where it has one. (Reward models are always there.)

    Raises:
        StageError: a function cannot be imported.
    """

    def __init__(self, options: JudgeOptions, device: Any = None) -> None:
        with whole_weights():
            self.scoring = Scoring(options.scorers, options.batch_size)
            self.reference = None if options.reference is None else _Reference(options, device)

    def submit(self, answers: Sequence[Answered]) -> Result:
        """A function that judges the answers, in order.

        Its Raises:
            StageError: a reward raised, or gave anything but a number; with its name and the row.
        """
        return lambda: self.judge(answers)

    def judge(self, answers: Sequence[Answered]) -> list[Judged]:
        scores = self.scoring(answers)
        logps = [None] * len(answers) if self.reference is None else self.reference(answers)
        return [Judged(*each) for each in zip(scores, logps, strict=True)]


@contextmanager
def whole_weights() -> Iterator[None]:
    """`from_pretrained` gives whole models: in a worker that trains under ZeRO-3 it would share the weights out, and every
    forward pass would have to be made by all workers together."""
    from transformers.integrations import deepspeed

    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


# ------------------------------------------------------------------------------------------------ the reference


class _Reference:
    def __init__(self, options: JudgeOptions, device: Any) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from stages.training.answers import best_layout
        from stages.training.head import TrainedHead

        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        reference = options.reference and pull_model(options.reference)
        self.model = (
            AutoModelForCausalLM.from_pretrained(reference, trust_remote_code=False, **options.load_options)
            .eval()
            .to(device)
        )
        self.head, self.temperature, self.batch_size = TrainedHead(self.model), options.temperature, options.batch_size
        attention = self.model.config._attn_implementation
        self.layout = best_layout(self.model, attention, device.type == "cpu", "auto")

    def __call__(self, answers: Sequence[Answered]) -> list[np.ndarray]:
        rows = [{"prompt_ids": list(a.prompt_ids), "answer_ids": list(a.answer_ids)} for a in answers]
        return answer_logps(self.head, self.model, rows, self.layout, self.temperature, self.batch_size)


def answer_logps(
    head: TrainedHead,
    model: Any,
    rows: Sequence[dict[str, list[int]]],
    layout: Any,
    temperature: float,
    batch_size: int,
) -> list[np.ndarray]:
    """log p(token | prompt, answer before it) of every token of each row's answer, under logits / temperature, no gradient.

    Args:
        head: that of `model`, which is in evaluation mode.
        rows: `prompt_ids` and `answer_ids`, stop token included.
        layout: of stages/training/answers.py, as the model attends.

    Returns:
        Of each row (answer tokens,) float32, in order.
    """
    import torch

    from stages.training.answers import answer_collator, model_inputs
    from stages.training.losses import token_logps

    collate = answer_collator(0, ("answer_ids",), layout=layout)  # what stands for padding is never seen
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["prompt_ids"]) + len(rows[i]["answer_ids"]))
    out: list[np.ndarray] = [np.empty(0, np.float32)] * len(rows)
    for at in range(0, len(rows), batch_size):
        chosen = order[at : at + batch_size]
        batch = collate([rows[i] for i in chosen])
        batch = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        with torch.no_grad():
            logits, _ = head.logits(model, model_inputs(batch), batch["answer_at"])
            logps, _ = token_logps(logits if temperature == 1.0 else logits / temperature, batch["answer_ids"])
        ends = np.cumsum([len(rows[i]["answer_ids"]) for i in chosen])
        for i, part in zip(chosen, np.split(logps.cpu().numpy(), ends[:-1]), strict=True):
            out[i] = part
    return out


# ------------------------------------------------------------------------------------------------ in actors


class _JudgeActor:
    """A judge in a process of its own. Errors come back as data: Ray would wrap them in traces of its own."""

    def __init__(self, options: JudgeOptions, cpus: float, gpus: float) -> None:
        if not gpus:  # by our settings of Ray (launch.py) it would see those of the machine
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        import torch
        import transformers

        from stages.training.launch import quiet_ray

        quiet_ray()
        transformers.logging.set_verbosity_error()
        if not gpus:
            torch.set_num_threads(max(1, int(cpus)))
        self.own: Judge | None = None
        self.failed = ""
        try:
            self.own = Judge(options)
        except Exception as error:
            self.failed = told_of(error)

    def ready(self) -> str:
        """What went wrong when it was made, or nothing."""
        return self.failed

    def judge(self, answers: Sequence[Answered]) -> tuple[list[Judged], str]:
        """(judged, ""), or nothing and what went wrong."""
        if self.own is None:
            return [], self.failed
        try:
            return self.own.judge(answers), ""
        except Exception as error:
            return [], told_of(error)


@dataclass(frozen=True)
class JudgeActors:
    """Judges in Ray actors, made by a stage's driver; its workers are sent this handle and call it, all at once if they like.

    The actors live as long as the driver, or until `close`.
    """

    actors: list[Any]
    batch_size: int

    @classmethod
    def start(
        cls, options: JudgeOptions, *, actors: int, cpus: float, gpus: float, timeout_s: float, grows: bool = True
    ) -> JudgeActors:
        """Actors whose models are loaded.

        Args:
            cpus, gpus: that each of them takes of the cluster. On this machine 0 CPUs: the runner shares out the cores.
            timeout_s: for the cluster to have room, and for models to be loaded.
            grows: whether nodes may be added to the cluster. Where not, what has no room in it is told at once.

        Raises:
            StageError: there is no room for them, or what an actor says that cannot load its models.
        """
        import ray

        if not grows and not fits([node["Resources"] for node in ray.nodes() if node["Alive"]], actors, cpus, gpus):
            raise StageError(f"{actors} processes that judge answers have no room: {_asked(cpus, gpus)}")
        remote = ray.remote(_JudgeActor).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=RESTARTS, max_task_retries=RESTARTS
        )
        made = cls([remote.remote(options, cpus, gpus) for _ in range(actors)], options.batch_size)
        try:
            made._wait(timeout_s, _asked(cpus, gpus))
        except BaseException:
            made.close()
            raise
        return made

    def _wait(self, timeout_s: float, asked: str) -> None:
        """Until all are ready; what one of them says is told as soon as it says it."""
        import ray

        waiting = [actor.ready.remote() for actor in self.actors]
        end = time.monotonic() + timeout_s
        while waiting:
            done, waiting = ray.wait(waiting, timeout=max(0.0, end - time.monotonic()))
            for failed in _got(done):
                if failed:
                    raise StageError(failed)
            if waiting and time.monotonic() >= end:
                raise StageError(
                    f"{len(waiting)} of {len(self.actors)} processes that judge answers are not ready after "
                    f"{timeout_s:g} s: {asked}"
                )

    def submit(self, answers: Sequence[Answered]) -> Result:
        """Sends the answers off, `batch_size` to an actor at a time, and gives a function that waits for the result, in order.

        Its Raises:
            StageError: what `Judge.submit` raises; or an actor was lost more often than it is restarted.
        """
        chunks = [answers[at : at + self.batch_size] for at in range(0, len(answers), self.batch_size)]
        # Workers do not know of each other: each begins at some actor, so that few chunks do not all go to the first. Not with
        # the generators that are seeded and saved with a checkpoint.
        first = random.SystemRandom().randrange(len(self.actors))
        sent = [self.actors[(first + i) % len(self.actors)].judge.remote(list(chunk)) for i, chunk in enumerate(chunks)]

        def result() -> list[Judged]:
            out: list[Judged] = []
            for judged, failed in _got(sent):
                if failed:
                    raise StageError(failed)
                out += judged
            return out

        return result

    def close(self) -> None:
        """End the actors; what they were about to say is lost."""
        import ray

        for actor in self.actors:
            ray.kill(actor)


def _got(sent: list[Any]) -> list[Any]:
    import ray

    try:
        return list(ray.get(sent))
    except ray.exceptions.RayActorError as error:
        raise StageError(
            f"a process that judges answers was lost {RESTARTS + 1} times: out of memory? Try fewer answers at a time, or "
            f"more memory\n  Ray says: {str(error).splitlines()[0]}"
        ) from error
    except ray.exceptions.RayError as error:
        raise StageError(f"judging answers: Ray says: {str(error).splitlines()[-1]}") from error


def fits(nodes: Sequence[dict[str, float]], actors: int, cpus: float, gpus: float) -> bool:
    """Whether nodes that have these resources, if nothing else ran on them, have room for the actors."""

    def most(node: dict[str, float]) -> float:
        each = [node.get(name, 0.0) / wanted for name, wanted in (("CPU", cpus), ("GPU", gpus)) if wanted]
        return math.floor(min(each) + 1e-6) if each else math.inf  # shares of a GPU add up to rounding

    return sum(map(most, nodes)) >= actors


def _asked(cpus: float, gpus: float) -> str:
    """What each actor asks for, and what there is."""
    import ray

    there, free = ray.cluster_resources(), ray.available_resources()
    has = " and ".join(f"{there.get(name, 0):g} {name}s ({free.get(name, 0):g} free)" for name in ("CPU", "GPU"))
    return (
        f"each asks for {cpus:g} CPUs and {gpus:g} GPUs, and the cluster has {has}; ask for fewer or smaller ones, or use "
        "`placement: colocated`"
    )
