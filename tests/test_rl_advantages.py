"""Rewards, advantages and returns of tokens, against the formulas of the papers written out token by token."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.rl.advantages import (
    KL_ESTIMATORS,
    KLCoefficient,
    advantages_and_returns,
    explained_variance,
    masked,
    padded,
    token_kl,
    token_rewards,
    whitened,
)

LENGTHS = [5, 1, 8, 3, 1, 2]  # ragged, and of one token


def numbers(seed: int, lengths: list[int] = LENGTHS) -> list[np.ndarray]:
    """Rows of these lengths."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=n) * 3 for n in lengths]


def same(padded_rows: np.ndarray, rows: list[Any]) -> None:
    """Rows of a padded array, with nothing after each."""
    assert padded_rows.dtype == np.float64 and padded_rows.shape == (len(rows), max(map(len, rows)))
    for line, row in zip(padded_rows, rows, strict=True):
        np.testing.assert_allclose(line[: len(row)], row, rtol=1e-12, atol=1e-12)
        assert not line[len(row) :].any()


def test_rows_are_padded_with_nothing() -> None:
    rows = numbers(0)
    same(padded(rows), rows)
    np.testing.assert_array_equal(masked(LENGTHS), [[t < n for t in range(8)] for n in LENGTHS])
    assert padded([]).shape == masked([]).shape == (0, 0)
    single = padded([row.astype(np.float32) for row in rows])
    np.testing.assert_array_equal(single[2], rows[2].astype(np.float32).astype(np.float64))


# ------------------------------------------------------------------------------------------------ rewards


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_the_kl_of_a_token(estimator: str) -> None:
    """With r = pi_0 / pi: k1 = -log r, k3 = (r - 1) - log r (Schulman's note)."""
    logps, reference = padded(numbers(1)) - 4, padded(numbers(2)) - 4
    got = token_kl(logps, reference, estimator)
    for place in itertools.product(range(len(LENGTHS)), range(max(LENGTHS))):
        log_r = float(reference[place]) - float(logps[place])
        wanted = -log_r if estimator == "k1" else (math.exp(log_r) - 1) - log_r
        assert got[place] == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert not token_kl(logps, logps, estimator).any()
    # Where policies are close k3 is half a square, which 1 - 1 would lose in rounding.
    assert token_kl(np.array([1e-6]), np.zeros(1), "k3")[0] == pytest.approx(0.5e-12, rel=1e-3)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_both_estimates_have_the_mean_they_estimate(estimator: str) -> None:
    """Over all actions, each as often as the policy takes it: KL(pi || pi_0) exactly."""
    rng = np.random.default_rng(3)
    p, q = rng.dirichlet(np.ones(7)), rng.dirichlet(np.ones(7))
    kl = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert float(p @ token_kl(np.log(p), np.log(q), estimator)) == pytest.approx(kl, rel=1e-12)
    if estimator == "k3":
        assert (token_kl(np.log(p), np.log(q), estimator) >= 0).all()


@pytest.mark.parametrize("beta", [0.0, 0.05, 1.5])
def test_the_score_is_the_last_tokens_and_the_penalty_every_tokens(beta: float) -> None:
    """Ziegler et al. 2019, eq. 2: R(x, y) = r(x, y) - beta log(pi(y|x) / rho(y|x)), spread over the tokens of y."""
    kl, scores = numbers(4), np.random.default_rng(5).normal(size=len(LENGTHS))
    garbage = np.where(masked(LENGTHS), padded(kl), 99.0)  # what stands after an answer is nothing
    got = token_rewards(scores, garbage, masked(LENGTHS), beta)
    wanted = [
        [-beta * k + (score if t == len(row) - 1 else 0.0) for t, k in enumerate(row)]
        for row, score in zip(kl, scores, strict=True)
    ]
    same(got, wanted)
    totals = [score - beta * math.fsum(row) for row, score in zip(kl, scores, strict=True)]
    np.testing.assert_allclose(got.sum(1), totals)


# ------------------------------------------------------------------------------------------------ advantages


def by_the_sum(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> tuple[list[float], list[float]]:
    """Schulman et al. 2016, eq. 16: A_t = sum_l (gamma lambda)^l delta_t+l, delta_t = r_t + gamma V_t+1 - V_t (below eq. 9);
    the episode ends with its last token, so the state after it is worth 0."""
    n = len(rewards)
    following = [*values[1:], 0.0]
    deltas = [float(rewards[t]) + gamma * float(following[t]) - float(values[t]) for t in range(n)]
    advantages = [math.fsum((gamma * lam) ** l * deltas[t + l] for l in range(n - t)) for t in range(n)]  # noqa: E741
    return advantages, [a + float(v) for a, v in zip(advantages, values, strict=True)]


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("lam", [0.0, 0.7, 0.95, 1.0])
def test_advantages_are_the_discounted_sum_of_what_was_not_foreseen(gamma: float, lam: float) -> None:
    rewards, values = numbers(6), numbers(7)
    advantages, returns = advantages_and_returns(padded(rewards), padded(values), masked(LENGTHS), gamma=gamma, lam=lam)
    wanted = [by_the_sum(r, v, gamma, lam) for r, v in zip(rewards, values, strict=True)]
    same(advantages, [a for a, _ in wanted])
    same(returns, [g for _, g in wanted])
    if lam == 1:  # eq. 18: the discounted rewards that follow, less the value
        sums = [
            [math.fsum(gamma**k * row[t + k] for k in range(len(row) - t)) for t in range(len(row))] for row in rewards
        ]
        same(returns, sums)
    if lam == 0:  # eq. 17: the error of one step
        same(returns, [[r + gamma * v for r, v in zip(a, [*b[1:], 0.0], strict=True)] for a, b in zip(rewards, values, strict=True)])  # fmt: skip


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_advantages_are_the_mean_of_those_that_look_some_steps_ahead(steps: int) -> None:
    """Schulman et al. 2016, eq. 11-16 as they are derived: (1 - lambda) sum_k lambda^(k-1) A^(k), where A^(k) looks k steps
    ahead; in an episode that ends all that look beyond its end are the same, and have what is left of the weights."""
    gamma, lam, n = 0.9, 0.8, 2 + steps
    rng = np.random.default_rng(steps)
    r, v = rng.normal(size=n), rng.normal(size=n)

    def ahead(t: int, k: int) -> float:
        end = min(t + k, n)
        after = gamma ** (end - t) * float(v[end]) if end < n else 0.0
        return math.fsum(gamma ** (i - t) * float(r[i]) for i in range(t, end)) + after - float(v[t])

    wanted = [
        math.fsum((1 - lam) * lam ** (k - 1) * ahead(t, k) for k in range(1, n - t)) + lam ** (n - t - 1) * ahead(t, n)
        for t in range(n)
    ]
    got, _ = advantages_and_returns(r[None], v[None], np.ones((1, n), bool), gamma=gamma, lam=lam)
    np.testing.assert_allclose(got[0], wanted, rtol=1e-12)


def test_what_stands_after_an_answer_does_not_matter_to_it() -> None:
    mask = masked(LENGTHS)
    rewards, values = padded(numbers(8)), padded(numbers(9))
    clean = advantages_and_returns(rewards, values, mask, gamma=1.0, lam=0.95)
    dirty = advantages_and_returns(
        np.where(mask, rewards, 7.0), np.where(mask, values, -5.0), mask, gamma=1.0, lam=0.95
    )
    for one, other in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_value_model_that_foresees_everything_leaves_no_advantage() -> None:
    rewards = numbers(10)
    values = [np.array([math.fsum(row[t:]) for t in range(len(row))]) for row in rewards]
    for lam in (0.0, 0.5, 1.0):
        advantages, returns = advantages_and_returns(
            padded(rewards), padded(values), masked(LENGTHS), gamma=1.0, lam=lam
        )
        np.testing.assert_allclose(advantages, 0, atol=1e-12)
        same(returns, values)


# ------------------------------------------------------------------------------------------------ scales


@pytest.mark.parametrize("shift", [True, False])
def test_whitened(shift: bool) -> None:
    """Huang et al. 2024, detail 23: (x - mean) / sqrt(var + 1e-8), and for rewards + mean."""
    rows, mask = numbers(11), masked(LENGTHS)
    held = [float(x) for row in rows for x in row]
    mean = math.fsum(held) / len(held)
    variance = math.fsum((x - mean) ** 2 for x in held) / len(held)
    got = whitened(np.where(mask, padded(rows), 50.0), mask, shift_mean=shift)
    same(got, [[(x - mean) / math.sqrt(variance + 1e-8) + (0 if shift else mean) for x in row] for row in rows])
    assert got[mask].mean() == pytest.approx(0 if shift else mean, abs=1e-12)
    assert got[mask].var() == pytest.approx(1, rel=1e-6)


def test_nothing_is_whitened_where_there_is_no_spread_to_tell() -> None:
    one = np.array([[3.0, 0.0]])
    np.testing.assert_array_equal(whitened(one, np.array([[True, False]])), one)
    np.testing.assert_array_equal(whitened(np.full((2, 2), 3.0), np.ones((2, 2), bool)), np.zeros((2, 2)))


def test_explained_variance() -> None:
    mask = masked(LENGTHS)
    returns, values = padded(numbers(12)), padded(numbers(13))
    g, v = returns[mask].tolist(), values[mask].tolist()

    def variance(x: list[float]) -> float:
        mean = math.fsum(x) / len(x)
        return math.fsum((y - mean) ** 2 for y in x) / len(x)

    wanted = 1 - variance([a - b for a, b in zip(g, v, strict=True)]) / variance(g)
    assert explained_variance(values, returns, mask) == pytest.approx(wanted, rel=1e-12)
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(np.zeros_like(returns), returns, mask) == pytest.approx(0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3)
    assert explained_variance(values, np.ones_like(returns), mask) == 0


# ------------------------------------------------------------------------------------------------ the coefficient


def by_the_paper(beta: float, kl: float, target: float, episodes: int) -> float:
    """Ziegler et al. 2019, eq. 3, with its K_beta = 0.1 for batches of 1024 as a rate for each episode: about 1e-4."""
    error = (kl - target) / target
    return beta * (1 + max(-0.2, min(0.2, error)) * episodes / 10_000)


@given(st.floats(-5, 50), st.floats(0.1, 20), st.integers(1, 2048))
def test_the_coefficient_follows_the_kl(kl: float, target: float, episodes: int) -> None:
    coefficient = KLCoefficient(0.05, target)
    coefficient.update(kl, episodes)
    assert coefficient.value == pytest.approx(by_the_paper(0.05, kl, target, episodes), rel=1e-9)
    assert (coefficient.value - 0.05) * (kl - target) >= 0  # more KL than wanted costs more, less costs less
    assert abs(coefficient.value / 0.05 - 1) <= 0.2 * episodes / 10_000 + 1e-12


def test_the_coefficient_is_constant_without_a_target_and_faster_with_a_short_horizon() -> None:
    constant = KLCoefficient(0.05)
    constant.update(1e9, 1000)
    assert constant.value == 0.05
    fast = KLCoefficient(1.0, target=6.0, horizon=1000)
    fast.update(600.0, 500)
    assert fast.value == pytest.approx(1 + 0.2 * 0.5)
    fast.update(6.0 * 0.9, 500)
    assert fast.value == pytest.approx(1.1 * (1 - 0.1 * 0.5))
    fast.update(-3.0, 500)  # as k1 estimates it of few answers
    assert fast.value == pytest.approx(1.1 * 0.95 * (1 - 0.2 * 0.5))
