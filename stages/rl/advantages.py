"""From what answers are worth to what each of their tokens is worth: rewards, advantages and returns, as pure functions.

An answer is an episode: token t (from 0) is an action, taken in the state that the prompt and the tokens before it make. With
pi the policy that sampled it, pi_0 the reference, V the value model and R the score of the whole answer,

    k_t = log pi(a_t|s_t) - log pi_0(a_t|s_t)                         Ziegler et al. 2019 (arXiv:1909.08593), eq. 2
    r_t = - beta k_t + [t is the last] R
    d_t = r_t + gamma V(s_t+1) - V(s_t),  V after the last token is 0
    A_t = d_t + gamma lambda A_t+1                                     Schulman et al. 2016 (arXiv:1506.02438), eq. 16
    G_t = A_t + V(s_t)                                                 what the value model learns

Everything is float64 in padded arrays (episodes, tokens), with a mask that is true where an answer has a token. What stands
elsewhere is 0. All workers compute all of it, from the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

KL_ESTIMATORS = ("k1", "k3")


def padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of different length as (rows, longest), zeros after each."""
    out = np.zeros((len(rows), max(map(len, rows), default=0)))
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out


def masked(lengths: Sequence[int]) -> np.ndarray:
    """(rows, longest): true where a row of that length has something."""
    return np.arange(max(lengths, default=0)) < np.asarray(lengths)[:, None]


def token_kl(logps: np.ndarray, ref_logps: np.ndarray, estimator: str) -> np.ndarray:
    """Of each token an estimate of KL(pi || pi_0), with x = log pi_0 - log pi (Schulman, http://joschu.net/blog/kl-approx.html):

    k1  -x, unbiased, of either sign: what Ziegler et al. 2019 and Ouyang et al. 2022 subtract from the reward
    k3  exp(x) - 1 - x, unbiased and never negative
    """
    x = ref_logps - logps
    return -x if estimator == "k1" else np.expm1(x) - x


def token_rewards(scores: np.ndarray, kl: np.ndarray, mask: np.ndarray, beta: float) -> np.ndarray:
    """r_t, (episodes, tokens): the KL penalty at every token, the score at the last.

    Args:
        scores: (episodes,), R.
        kl: (episodes, tokens), as `token_kl` estimates it.
    """
    rewards = -beta * kl * mask
    rewards[np.arange(len(scores)), mask.sum(1) - 1] += scores
    return rewards


def advantages_and_returns(
    rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, *, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """A_t and G_t, both (episodes, tokens): generalized advantage estimation, from the last token to the first."""
    advantages = np.zeros_like(rewards)
    after_value = after_advantage = np.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * after_value - values[:, t]
        advantages[:, t] = np.where(here, delta + gamma * lam * after_advantage, 0.0)
        after_advantage = advantages[:, t]
        after_value = np.where(here, values[:, t], 0.0)
    return advantages, np.where(mask, advantages + values, 0.0)


def whitened(values: np.ndarray, mask: np.ndarray, *, shift_mean: bool = True) -> np.ndarray:
    """With variance 1 over what the mask holds, and mean 0 or the one it had (Huang et al. 2024, "The N+ implementation details
    of RLHF with PPO", detail 23: advantages are shifted, rewards are not). Of fewer than two numbers nothing is changed."""
    held = values[mask]
    if len(held) < 2:
        return values
    mean = held.mean()
    white = (values - mean) / np.sqrt(held.var() + 1e-8)
    return np.where(mask, white if shift_mean else white + mean, 0.0)


def explained_variance(values: np.ndarray, returns: np.ndarray, mask: np.ndarray) -> float:
    """1 - Var(G - V) / Var(G): 1 where the value model foresees every return, 0 where it says nothing (or all are the same),
    below 0 where it misleads."""
    spread = returns[mask].var()
    return float(1 - (returns - values)[mask].var() / spread) if spread > 0 else 0.0


@dataclass
class KLCoefficient:
    """beta: constant, or with a `target` adapted so that the KL of an answer comes to it (Ziegler et al. 2019, eq. 3):

        e = clip((KL - target) / target, -0.2, 0.2),   beta <- beta (1 + e episodes / horizon)

    The paper's K = 0.1 for a batch of 1024 is a `horizon` of 10,000 episodes, as its code has it.
    """

    value: float
    target: float | None = None
    horizon: int = 10_000

    def update(self, kl: float, episodes: int) -> None:
        """After an iteration whose answers had a KL of `kl` nats in the mean."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * min(episodes / self.horizon, 1.0)  # never below 0
