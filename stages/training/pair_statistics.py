"""What scores of preference pairs say: how often they are right, how sure they may be, and how much of them is length."""

from __future__ import annotations

import numpy as np

BINS = 10  # of the calibration error, equally wide over the confidences 0.5 .. 1


def pair_statistics(
    chosen: np.ndarray, rejected: np.ndarray, chosen_tokens: np.ndarray, rejected_tokens: np.ndarray
) -> dict[str, float]:
    """Statistics of pairs from their rewards and the lengths of their answers in tokens, each an array of (pairs,).

    accuracy            share of pairs whose chosen answer has the higher reward; a tie is not right
    margin              mean of reward(chosen) - reward(rejected)
    calibration_error   see there: 0 where the Bradley-Terry probabilities are what they claim to be
    length_accuracy     share of pairs whose chosen answer is the longer one, ties a half: what length alone would get
    length_correlation  Pearson's, of the differences in reward with those in tokens; 0 where either is the same for all pairs
    reward_mean, reward_std  over the rewards of both sides, the standard deviation of a population

    Raises:
        ValueError: without pairs, with arrays of different lengths, or with a reward that is not a number.
    """
    rewards = [np.asarray(side, dtype=np.float64) for side in (chosen, rejected)]
    tokens = [np.asarray(side, dtype=np.float64) for side in (chosen_tokens, rejected_tokens)]
    if len({side.shape for side in (*rewards, *tokens)}) != 1 or rewards[0].ndim != 1 or not len(rewards[0]):
        raise ValueError("the statistics of pairs want four arrays of one length, with at least one pair")
    if not np.isfinite(rewards).all():
        raise ValueError("a reward is not a finite number")
    margins, longer = rewards[0] - rewards[1], tokens[0] - tokens[1]
    return {
        "accuracy": float((margins > 0).mean()),
        "margin": float(margins.mean()),
        "calibration_error": calibration_error(margins),
        "length_accuracy": float((np.sign(longer) / 2 + 0.5).mean()),
        "length_correlation": _correlation(margins, longer),
        "reward_mean": float(np.mean(rewards)),
        "reward_std": float(np.std(rewards)),
    }


def calibration_error(margins: np.ndarray) -> float:
    """Expected calibration error of sigmoid(margin) as the probability that an answer is the better one (Guo et al. 2017).

    A pair is a guess at its better answer with confidence sigmoid(|margin|), right where the margin is positive; a tie is
    right by half. The error is the mean over `BINS` bins of |share right - mean confidence|, each by its number of pairs.

    Shapes:
        margins: (pairs,), reward(chosen) - reward(rejected).
    """
    # sigmoid(|m|) as (1 + tanh(|m| / 2)) / 2: no overflow
    confidence = 0.5 + np.tanh(np.abs(margins) / 2) / 2
    right = np.sign(margins) / 2 + 0.5
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(margins))


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])
