"""What came out: models side by side, gates, the frontier, sweeps, and answers with their differences. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.report.charts import Figure, Point, frontier_chart
from pipeline.report.reading import Run, StageRead, finite, mapping, mappings
from pipeline.report.words import Piece, clip, differences, number, prompt
from pipeline.sweep import text
from pipeline.tables import COLUMNS, HIGHER, LOWER, SHARES, cell

SHOWN, SHOWN_AT_MOST = 6, 100  # samples at once, and in the fold below them
GOOD = (
    "exact_match",
    "reward",
    "reward_mean",
    "preference_accuracy",
)  # what a frontier is drawn of, the first there is
USES = {"chosen": "good", "wanted": "good", "best": "good", "rejected": "bad", "unwanted": "bad"}


@dataclass(frozen=True)
class Cell:
    text: str
    share: float | None = None  # 0 to 1: drawn as a bar
    best: bool = False


@dataclass(frozen=True)
class Gate:
    holds: bool
    says: str


@dataclass(frozen=True)
class Answer:
    models: list[str]  # who gave it
    pieces: list[Piece]
    right: bool | None = None
    reward: str = ""
    use: str = ""
    mark: str = ""  # good, bad or nothing
    stopped: bool = True


@dataclass(frozen=True)
class Sample:
    prompt: list[Piece]
    expected: str | None
    answers: list[Answer]
    note: str = ""


@dataclass(frozen=True)
class Samples:
    shown: list[Sample]
    folded: list[Sample]
    left: int = 0  # that are not on the page

    @staticmethod
    def of(samples: Sequence[Sample], total: int | None = None) -> Samples:
        total = len(samples) if total is None else total
        folded = samples[SHOWN:SHOWN_AT_MOST]
        return Samples(list(samples[:SHOWN]), list(folded), max(0, total - SHOWN - len(folded)))


@dataclass(frozen=True)
class Evaluation:
    name: str
    state: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    gates: list[Gate]
    samples: Samples
    frontier: Figure | None = None


@dataclass(frozen=True)
class Iteration:
    title: str
    samples: list[Sample] = field(default_factory=list)


def evaluations(run: Run) -> list[Evaluation]:
    """Every evaluation of which there is something."""
    out = []
    for stage in run.stages.values():
        metrics = compared(stage)
        gates = gates_of(stage)
        if stage.kind != "evaluate" or not (metrics or gates):
            continue
        columns = [c for c in COLUMNS if any(c in of for of in metrics.values())]
        best = {c: _best(c, [of.get(c) for of in metrics.values()]) for c in columns}
        rows = [(model, [_cell(of, c, best[c]) for c in columns]) for model, of in metrics.items()]
        samples = [_compared(sample) for sample in mappings(stage.details.get("samples"))[:SHOWN_AT_MOST]]
        total = len(mappings(stage.details.get("samples")))
        out.append(
            Evaluation(
                stage.name, stage.state, [COLUMNS[c] for c in columns], rows, gates, Samples.of(samples, total),
                frontier(metrics, run),
            )
        )  # fmt: skip
    return out


def compared(stage: StageRead) -> dict[str, dict[str, Any]]:
    """An evaluation's metrics by model; while it goes, of the models that are done."""
    made = stage.manifest.get("metrics")
    if isinstance(made, dict):
        return {str(model): of for model, of in made.items() if isinstance(of, dict)}
    return {str(line["model"]): line for line in stage.metrics if "model" in line}


def gates_of(stage: StageRead) -> list[Gate]:
    given = mappings(stage.record.get("gates"))
    return [Gate(gate.get("holds") is True, str(gate.get("says", "what it says is missing"))) for gate in given]


def _cell(metrics: Mapping[str, Any], name: str, best: float | None) -> Cell:
    value = finite(metrics.get(name))
    share = min(1.0, max(0.0, value)) if value is not None and name in SHARES else None
    known = {k: v for k, v in metrics.items() if isinstance(v, int | float | str)}
    return Cell(cell(known, name), share, best is not None and value == best)


def _best(metric: str, values: list[Any]) -> float | None:
    """The best of a column in which it is known which is better, and not all are the same."""
    known = [v for v in values if finite(v) is not None]
    if metric not in HIGHER + LOWER or len(set(known)) < 2:
        return None
    return max(known) if metric in HIGHER else min(known)


# ------------------------------------------------------------------------------------------------ frontier


def frontier(metrics: Mapping[str, Mapping[str, Any]], run: Run) -> Figure | None:
    """How good each model is against its KL; None where fewer than two models have both.

    The model they were all trained from, where it was evaluated too, is at a KL of 0: it is what the others' is measured to.
    """
    having = [model for model, of in metrics.items() if finite(of.get("kl")) is not None]
    metric = next((m for m in GOOD if sum(finite(metrics[model].get(m)) is not None for model in having) > 1), None)
    if metric is None:
        return None
    having = [model for model in having if finite(metrics[model].get(metric)) is not None]
    sweep_of = {v: sweep for sweep, variants in run.sweeps.items() for v in variants}
    points = []
    for model in sorted(
        having, key=lambda m: (list(metrics).index(sweep_group(m, sweep_of, metrics)), metrics[m]["kl"])
    ):
        of = metrics[model]
        chosen = run.sweeps.get(sweep_of.get(model, ""), {}).get(model, {})
        points.append(
            Point(
                model, sweep_of.get(model, model), ", ".join(text(v) for v in chosen.values()),
                of["kl"], finite(of.get("kl_stderr")) or 0.0, of[metric],
            )
        )  # fmt: skip
    bases = {_base(run, model) for model in having}
    base = bases.pop() if len(bases) == 1 else ""
    value = finite(metrics.get(base, {}).get(metric))
    if value is not None and base not in having:
        points.insert(0, Point(base, base, "", 0.0, 0.0, value))
    return frontier_chart(points, COLUMNS.get(metric, metric), metric in SHARES)


def sweep_group(model: str, sweep_of: Mapping[str, str], metrics: Mapping[str, Any]) -> str:
    """The first model of the same sweep, so that a sweep stays together."""
    sweep = sweep_of.get(model)
    return next((m for m in metrics if sweep is not None and sweep_of.get(m) == sweep), model)


def _base(run: Run, model: str) -> str:
    stage = run.stages.get(model)
    refs = mappings(mapping(stage.manifest.get("inputs")).get("model")) if stage else []
    return str(refs[0].get("stage", "")) if refs else ""


# ------------------------------------------------------------------------------------------------ answers


def _compared(sample: Mapping[str, Any]) -> Sample:
    """A sample of an evaluation: the same answers once, with what differs from the expected one or, without it, the first."""
    given = {str(model): str(answer) for model, answer in mapping(sample.get("answers")).items()}
    expected = None if sample.get("expected") is None else str(sample["expected"])
    who: dict[str, list[str]] = {}
    for model, answer in given.items():
        who.setdefault(answer, []).append(model)
    other = expected if expected is not None else next(iter(who), "")
    answers = [
        Answer(
            models,
            differences(clip(other.strip()), clip(answer.strip()))
            if answer.strip()
            else [Piece("(nothing)", "control")],
            None if expected is None else answer.strip() == expected.strip(),
        )
        for answer, models in who.items()
    ]
    return Sample(prompt(str(sample.get("prompt", ""))), None if expected is None else clip(expected), answers)


def generated(stage: StageRead) -> Samples:
    """What was sampled and judged to make data: answers with their rewards and what became of them."""
    given = mappings(stage.details.get("samples"))
    out = []
    for sample in given[:SHOWN_AT_MOST]:
        expected = None if sample.get("expected") is None else clip(sample["expected"])
        answers = [
            Answer(
                [], [Piece(clip(a.get("text", "")))], None, number(a.get("reward")), str(a.get("use") or ""),
                USES.get(str(a.get("use")), ""), a.get("stopped") is not False,
            )
            for a in mappings(sample.get("answers"))
        ]  # fmt: skip
        note = str(sample.get("reason") or "").replace("_", " ")
        out.append(Sample(prompt(str(sample.get("prompt", ""))), expected, answers, note))
    return Samples.of(out, len(given))


def iterations(stage: StageRead, at_most: int = 8) -> list[Iteration]:
    """Answers of reinforcement learning by iteration; a prompt that comes again shows what changed since."""
    by: dict[float, list[dict[str, Any]]] = {}
    for line in stage.samples:
        if (iteration := finite(line.get("iteration"))) is not None:
            by.setdefault(iteration, []).append(line)
    before: dict[str, str] = {}
    out = []
    chosen = _spread(sorted(by), at_most)
    for iteration in chosen:
        lines = by[iteration]
        rewards = [r for line in lines if (r := finite(line.get("reward"))) is not None]
        title = f"iteration {number(iteration)}"
        if rewards:
            title += f": mean reward {number(sum(rewards) / len(rewards))} of {len(rewards)} shown"
        samples = []
        for line in lines[:SHOWN_AT_MOST]:
            asked, said = str(line.get("prompt", "")), clip(str(line.get("answer", "")).strip())
            pieces = differences(before[asked], said) if asked in before else [Piece(said)]
            before[asked] = said
            answer = Answer([], pieces, None, number(line.get("reward")), stopped=line.get("stopped") is not False)
            samples.append(Sample(prompt(asked), None, [answer]))
        out.append(Iteration(title, samples))
    return out


def _spread(values: list[float], at_most: int) -> list[float]:
    """So many of them, the first and the last among them."""
    if len(values) <= at_most:
        return values
    return [values[round(i * (len(values) - 1) / (at_most - 1))] for i in range(at_most)]
