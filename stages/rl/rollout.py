"""An iteration's answers: what is known of each, what is learned from all, and the batches they are trained in."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.rl.advantages import (
    advantages_and_returns,
    explained_variance,
    masked,
    padded,
    token_kl,
    token_rewards,
    whitened,
)
from stages.rl.settings import PPOSettings
from stages.training.answers import Batch, Row


@dataclass(frozen=True)
class Episode:
    """An answer, and what the models said of each of its tokens: float32, (tokens,)."""

    prompt_ids: list[int]
    answer_ids: list[int]  # to the end of the stop token
    stopped: bool
    text: str
    logps: np.ndarray  # of the policy that sampled
    ref_logps: np.ndarray | None  # of the reference; None where there is none
    values: np.ndarray
    entropy: float  # of the policy, mean over the tokens
    scores: list[float]  # of each reward term


@dataclass(frozen=True)
class Rollout:
    """The answers of an iteration, as rows to train on, and what is told of them."""

    rows: list[Row]
    metrics: dict[str, float]
    rewards: np.ndarray  # (episodes,): the weighted sum of the scores


def make_rollout(
    episodes: Sequence[Episode], settings: PPOSettings, *, names: Sequence[str], weights: Sequence[float], beta: float
) -> Rollout:
    """Rewards, advantages and returns of all answers of an iteration, over all workers.

    Args:
        names, weights: of the reward terms.
        beta: the coefficient of the KL penalty, as it is now.
    """
    lengths = [len(e.answer_ids) for e in episodes]
    mask = masked(lengths)
    scores = np.array([e.scores for e in episodes])
    rewards = scores @ np.asarray(weights)
    stopped = np.array([e.stopped for e in episodes])
    judged = rewards if settings.missing_eos_penalty is None else rewards - settings.missing_eos_penalty * ~stopped
    logps, values = padded([e.logps for e in episodes]), padded([e.values for e in episodes])
    known = [
        logps[i, :n] if e.ref_logps is None else e.ref_logps
        for i, (e, n) in enumerate(zip(episodes, lengths, strict=True))
    ]
    references = padded(known)
    each = token_rewards(judged, token_kl(logps, references, settings.kl_estimator), mask, beta)
    if settings.whiten_rewards:
        each = whitened(each, mask, shift_mean=False)
    advantages, returns = advantages_and_returns(each, values, mask, gamma=settings.gamma, lam=settings.lam)
    white = whitened(advantages, mask) if settings.whiten_advantages else advantages
    rows = [
        {
            "prompt_ids": e.prompt_ids,
            "completion_ids": e.answer_ids,
            "old_logps": e.logps,
            "old_values": e.values,
            "advantages": white[i, :n].astype(np.float32),
            "returns": returns[i, :n].astype(np.float32),
        }
        for i, (e, n) in enumerate(zip(episodes, lengths, strict=True))
    ]
    kl = ((logps - references) * mask).sum(1)
    metrics = {
        "reward": rewards.mean(),
        "reward_std": rewards.std(),
        **{f"rewards/{name}": column.mean() for name, column in zip(names, scores.T, strict=True)},
        "answer_tokens": np.mean(lengths),
        "entropy": np.average([e.entropy for e in episodes], weights=lengths),
        "stopped": stopped.mean(),
        "advantage_std": advantages[mask].std(),
        "value": values[mask].mean(),
        "return": returns[mask].mean(),
        "explained_variance": explained_variance(values, returns, mask),
    }
    if episodes[0].ref_logps is not None:
        metrics |= {"kl": kl.mean(), "kl_per_token": kl.sum() / mask.sum(), "rlhf_reward": (judged - beta * kl).mean()}
    return Rollout(rows, {name: float(value) for name, value in metrics.items()}, rewards)


def mini_batches(count: int, parts: int, seed: Sequence[int]) -> list[np.ndarray]:
    """`count` answers, shuffled and dealt into `parts` of like size."""
    return np.array_split(np.random.default_rng(list(seed)).permutation(count), parts)


def micro_batches(rows: Sequence[Row], rank: int, workers: int, accumulation: int) -> list[list[Row]]:
    """This worker's rows of a mini-batch in `accumulation` micro-batches, rows of like length together. Some may be empty."""
    ordered = sorted(rows, key=lambda row: len(row["prompt_ids"]) + len(row["completion_ids"]))
    return [list(part) for part in _split(ordered[rank::workers], accumulation)]


def _split(rows: Sequence[Row], parts: int) -> list[Sequence[Row]]:
    ends = [len(rows) * i // parts for i in range(parts + 1)]
    return [rows[a:b] for a, b in itertools.pairwise(ends)]


TOKENS = ("old_logps", "old_values", "advantages", "returns")  # columns with a number for each token of the answer


def rollout_collator(answers: Callable[[list[Row]], Batch]) -> Callable[[list[Row]], Batch]:
    """A collator of answers (stages/training/answers.py) that adds the numbers of their tokens, in the order of `answer_ids`.

    A step's loss is divided by its tokens.
    """

    def collate(rows: list[Row]) -> Batch:
        import torch

        batch = answers(rows)
        for name in TOKENS:
            each = [row.get(name, np.zeros(len(row["completion_ids"]), np.float32)) for row in rows]
            batch[name] = torch.from_numpy(np.concatenate(each).astype(np.float32))
        batch["loss_share"] = batch["loss_share"][1:]
        return batch

    return collate


class Rollouts:
    """The micro-batches of a training in iterations, as the trainer's loop wants them: the policy that answers is the one that
    the steps before have left, since a batch is made when it is asked for.

    Args:
        iterations: the feed (stages/rl/iterations.py), all of its prompts on every worker.
        collect: answers an iteration's prompts: (iteration, number of its first prompt, prompts) to a rollout.
        skipped: whether the rest of the iteration is to be left out: its batches are placeholders.
    """

    def __init__(
        self,
        iterations: Any,
        collate: Callable[[list[Row]], Batch],
        placeholder: Row,
        settings: PPOSettings,
        *,
        rank: int,
        collect: Callable[[int, int, list[Row]], Rollout],
        skipped: Callable[[], bool],
        seed: int,
    ) -> None:
        self.feed, self.collate, self.placeholder, self.settings = iterations, collate, placeholder, settings
        self.rank, self.collect, self.skipped, self.seed = rank, collect, skipped, seed
        self.meter: Any = None

    def __len__(self) -> int:
        return int(self.feed.micro_batches)

    def __iter__(self) -> Iterator[Batch]:
        feed = self.feed
        for prompts in feed.feed:
            iteration = feed.iteration(feed.step)
            epoch, first, _ = feed.span(feed.step)
            rollout = self.collect(iteration, epoch * feed.rows + first, prompts)
            for again in range(self.settings.num_ppo_epochs):
                for chosen in mini_batches(
                    len(rollout.rows), self.settings.num_mini_batches, (self.seed, iteration, again)
                ):
                    feed.step += 1
                    yield from self._batches([rollout.rows[i] for i in chosen])

    def _batches(self, rows: list[Row]) -> Iterator[Batch]:
        """Of a step. `left_out`: it holds nothing on any worker, so there is nothing to be done for it; what has fewer answers
        than mini-batches has such steps too."""
        left_out = self.skipped() or not rows
        for part in micro_batches(rows, self.rank, self.feed.workers, self.feed.shares.accumulation):
            taken = [] if left_out else part
            batch = self.collate(taken or [self.placeholder])
            batch |= {"rows": len(taken), "left_out": left_out}
            if self.meter is not None:
                self.meter.batch(batch)
            yield batch
