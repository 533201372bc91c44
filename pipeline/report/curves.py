"""From the lines of metrics.jsonl to charts: which metrics belong together, and how many points are enough. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.report.reading import finite
from pipeline.report.words import number, share
from pipeline.sweep import labels, text

POINTS = 500  # of a line: more than a chart has pixels for
FEWER, ALL_POINTS = 120, 60_000  # of a line where there are many lines, and of a page
VARIANTS = 12  # lines of a sweep in one chart
HELD_OUT = "eval_"
PREFERENCE = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
NO_CURVE = {"time", "step", "epoch", "model", "num_tokens", "episodes", "total_flos", "consumed"}


@dataclass(frozen=True)
class Group:
    """Metrics that share a chart. `keys`: patterns of whole names, without `eval_`. `main`: what is learned, shown at once."""

    title: str
    keys: str
    main: bool = True
    unit: str = "number"  # or share, tokens, rate: how axis and values are written
    vague: bool = False  # the title does not say which metric it is where there is only one


GROUPS = (
    Group("loss", "loss"),
    Group("reward", "reward|rlhf_reward"),
    Group("terms of the reward", r"rewards/(?!.*/std$).+", vague=True),
    Group("KL to the reference, nats an answer", "kl|samples/kl"),
    Group("KL a token, nats", "kl_per_token"),
    Group("margin between the rewards", "rewards/margins|margin"),
    Group("reward of answers", "rewards/chosen|rewards/rejected|mean_reward"),
    Group("accuracy", "rewards/accuracies|accuracy|mean_token_accuracy|exact_match", unit="share"),
    Group("log-probability a token", "logps/chosen|logps/rejected"),
    Group("length of answers, tokens", "answer_tokens|samples/tokens|completions/m(in|ax|ean)_length"),
    Group("answers that end", "stopped|samples/stopped", unit="share"),
    Group("entropy, nats a token", "entropy"),
    Group("clipped share", "clip_fraction|value_clip_fraction", unit="share"),
    Group("tokens a second", "tokens_per_second|trained_tokens_per_second", main=False, unit="tokens"),
    Group("learning rate", "learning_rate", main=False, unit="rate"),
    Group("gradient norm", "grad_norm", main=False),
    Group("losses of policy and value", "policy_loss|value_loss", main=False, vague=True),
    Group("value and return", "value|return", main=False, vague=True),
    Group("explained variance", "explained_variance", main=False),
    Group("spread", "reward_std|advantage_std|rewards/.+/std", main=False, vague=True),
    Group("KL and ratio of a step", "approx_kl|ratio", main=False, vague=True),
    Group("shares", "padding_share|data_wait_share|mfu|frac_reward_zero_std", main=False, unit="share", vague=True),
    Group("seconds", "seconds/.+|step_time", main=False, vague=True),
    Group("clip ratios", "clip_ratio/.+", main=False, unit="share", vague=True),
    Group("lengths of completions, tokens", "completions/.+", main=False, vague=True),
)
COMPARED = (
    "loss",
    "reward",
    "KL to the reference, nats an answer",
    "margin between the rewards",
    "accuracy",
)  # in sweeps
SPOKEN = {"rlhf_reward": "less KL penalty", "grad_norm": "gradient norm", "nll": "negative log-likelihood"}
SHARES = re.compile("|".join(f"(?:{g.keys})" for g in GROUPS if g.unit == "share"))


@dataclass(frozen=True)
class Series:
    label: str
    points: list[tuple[float, float]]  # (step, value), steps ascending
    held_out: bool = False


@dataclass(frozen=True)
class Chart:
    title: str
    series: list[Series]
    unit: str = "number"
    main: bool = True
    vague: bool = False


@dataclass
class Curves:
    charts: list[Chart] = field(default_factory=list)
    constant: list[tuple[str, str]] = field(default_factory=list)  # (metric, value) of those that never changed
    once: list[tuple[str, str]] = field(default_factory=list)  # the same of those that were logged once
    odd: list[str] = field(default_factory=list)  # what was not a number


def curves(metrics: Sequence[Mapping[str, Any]], points: int = POINTS) -> Curves:
    """The charts of a stage."""
    known, odd = series_of(metrics)
    out = Curves(odd=[f"{name}: {count} of its values are not numbers, and not shown" for name, count in odd.items()])
    out.once = [(spoken(name), _said(name, found[0][1])) for name, found in known.items() if len(found) == 1]
    known = {name: found for name, found in known.items() if len(found) > 1}
    reinforced = "reward" in known
    if known.get("rewards/reward") == known.get("reward") or len(_terms(known)) == 1:
        known = {name: found for name, found in known.items() if name not in _terms(known)}  # the reward once more
    for name in [n for n in known if len({value for _, value in known[n]}) == 1]:
        out.constant.append((spoken(name), _said(name, known.pop(name)[0][1])))
    left = dict(known)
    for group in GROUPS:
        pattern = re.compile(group.keys)
        names = [n for n in left if pattern.fullmatch(n.removeprefix(HELD_OUT)) and _fits(group, n)]
        if names:
            own = [Series(_label(n, names), thin(left.pop(n), points), n.startswith(HELD_OUT)) for n in sorted(names)]
            main = group.main and not (group.title == "loss" and reinforced)  # there it says nothing
            out.charts.append(Chart(group.title, own, group.unit, main, group.vague))
    for name, found in left.items():
        out.charts.append(Chart(spoken(name), [Series(spoken(name), thin(found, points))], main=False))
    out.charts.sort(key=lambda chart: not chart.main)
    return out


def swept(
    variants: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, Sequence[Mapping[str, Any]]], points: int = POINTS
) -> list[Chart]:
    """Charts with a line for each variant of a sweep, of what is learned."""
    told = labels(list(next(iter(variants.values()), {})))
    known = {v: series_of(metrics.get(v, []))[0] for v in list(variants)[:VARIANTS]}
    known = {v: {n: found for n, found in own.items() if len(found) > 1} for v, own in known.items()}
    reinforced = any("reward" in own for own in known.values())
    out = []
    for group in (g for g in GROUPS if g.title in COMPARED):
        if group.title == "loss" and reinforced:
            continue
        pattern = re.compile(group.keys)
        present = dict.fromkeys(n for own in known.values() for n in own if _fits(group, n))
        names = [n for n in present if pattern.fullmatch(n.removeprefix(HELD_OUT)) and n not in ("rlhf_reward",)]
        name = next((n for n in names if n.startswith(HELD_OUT)), names[0] if names else None)
        having = [v for v, own in known.items() if name in own]
        if name is None or len(having) < 2:
            continue
        own = [Series(_variant(variants[v], told), thin(known[v][name], points)) for v in having]
        out.append(Chart(group.title + ", held out" * name.startswith(HELD_OUT), own, group.unit))
    return out


def _variant(chosen: Mapping[str, Any], told: Mapping[str, str]) -> str:
    return ", ".join(f"{told.get(path, path)} {text(value)}" for path, value in chosen.items())


def series_of(
    metrics: Iterable[Mapping[str, Any]],
) -> tuple[dict[str, list[tuple[float, float]]], Counter[str]]:
    """(metric -> points by step, metric -> how many values are not numbers). Of a step that comes twice the later counts."""
    found: dict[str, dict[float, float]] = {}
    odd: Counter[str] = Counter()
    for line in metrics:
        step = finite(line.get("step"))
        if step is None or "model" in line:
            continue
        for name, value in line.items():
            if name in NO_CURVE:
                continue
            if (known := finite(value)) is None:
                odd[name] += 1
            else:
                found.setdefault(name, {})[step] = known
    return {name: sorted(points.items()) for name, points in found.items()}, odd


def thin(points: list[tuple[float, float]], at_most: int = POINTS) -> list[tuple[float, float]]:
    """At most so many of them, with the first, the last, and the least and greatest of each stretch."""
    if len(points) <= at_most:
        return points
    stretches = (at_most - 2) // 2
    inner = points[1:-1]
    out = [points[0]]
    for i in range(stretches):
        part = inner[i * len(inner) // stretches : (i + 1) * len(inner) // stretches]
        low, high = min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])
        out += sorted({low, high})
    return [*out, points[-1]]


def points_each(lines: int) -> int:
    """Points of a line on a page with so many lines."""
    return max(FEWER, min(POINTS, ALL_POINTS // max(1, lines)))


def summary(chart: Chart) -> str:
    """The chart in words, for those who do not see it."""
    said = [
        f"{s.label} from {value(chart, s.points[0][1])} at step {number(s.points[0][0])} "
        f"to {value(chart, s.points[-1][1])} at step {number(s.points[-1][0])}"
        f" (least {value(chart, min(v for _, v in s.points))}, greatest {value(chart, max(v for _, v in s.points))})"
        for s in chart.series
    ]
    return f"{chart.title}: {'; '.join(said)}"


def value(chart: Chart, of: float) -> str:
    return share(of) if chart.unit == "share" else number(of)


def _terms(known: Iterable[str]) -> list[str]:
    """Names of a reinforced stage's terms: a preference's rewards have names of the same form."""
    return [n for n in known if n.startswith("rewards/") and n not in PREFERENCE and not n.endswith("/std")]


def _fits(group: Group, name: str) -> bool:
    return group.title != "terms of the reward" or name.removeprefix(HELD_OUT) not in PREFERENCE


def spoken(name: str) -> str:
    """
    >>> spoken("eval_rewards/accuracies"), spoken("grad_norm")
    ('accuracies, held out', 'gradient norm')
    """
    base = name.removeprefix(HELD_OUT)
    for before in ("rewards/", "samples/", "completions/", "seconds/", "logps/", "clip_ratio/"):
        base = base.removeprefix(before)
    return SPOKEN.get(base, base.replace("_", " ")) + (", held out" if name.startswith(HELD_OUT) else "")


def _label(name: str, names: list[str]) -> str:
    base = name.removeprefix(HELD_OUT)
    if all(n.removeprefix(HELD_OUT) == base for n in names):  # training and held-out values of one metric
        return "held out" if name != base else "training" if len(names) > 1 else spoken(base)
    if name.endswith("tokens_per_second"):
        return "trained" if name.startswith("trained") else "all"
    if name.startswith("samples/"):
        return f"{spoken(name)}, watched"
    return spoken(name)


def _said(name: str, of: float) -> str:
    return share(of) if SHARES.fullmatch(name.removeprefix(HELD_OUT)) else number(of)
