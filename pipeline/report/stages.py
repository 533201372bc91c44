"""A stage's part of the page: its facts, its data, its curves, what was checked of it, what it cost. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from pipeline.progress import brief
from pipeline.report.charts import Figure, line_chart
from pipeline.report.curves import curves, spoken
from pipeline.report.reading import StageRead, finite, mapping, mappings, texts
from pipeline.report.results import Iteration, Samples, generated, iterations
from pipeline.report.words import clip, duration, number, share
from stages.data.encode import WARNINGS

MODELS = {"model": "AutoModelForCausalLM", "reward model": "AutoModelForSequenceClassification"}
LOG_OF = ("failed", "interrupted")


@dataclass(frozen=True)
class Ledger:
    read: str
    kept: str
    reasons: list[tuple[str, str, str]]  # reason, rows, share of those read
    examples: list[tuple[str, str, str]]  # where, reason, detail


@dataclass(frozen=True)
class Check:
    holds: bool | None  # None: a fact, nothing that could fail
    says: str


@dataclass
class StageView:
    """A stage as the template shows it: texts, and figures."""

    name: str
    kind: str
    state: str
    took: str = ""
    says: str = ""  # its error, what it waits for, how far it is, or its metrics
    error: str = ""
    done: float | None = None
    facts: list[tuple[str, str]] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    more: list[Figure] = field(default_factory=list)
    constant: list[tuple[str, str]] = field(default_factory=list)
    once: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    ledger: Ledger | None = None
    mixture: list[list[str]] = field(default_factory=list)
    samples: Samples | None = None
    iterations: list[Iteration] = field(default_factory=list)
    metrics: list[tuple[str, str]] = field(default_factory=list)
    kernels: list[tuple[str, str]] = field(default_factory=list)
    load: str = ""
    manifest: str = ""


def view(stage: StageRead, points: int, tell: Callable[[str], None], attempt: Callable[..., Any]) -> StageView:
    """All parts of it that can be made; one that cannot is told."""
    out = StageView(stage.name, stage.kind, stage.state, duration(stage.seconds), done=stage.done)
    if stage.state == "cached":
        out.took = f"unchanged, took {out.took}" if out.took else "unchanged"
    record = stage.record
    out.error = clip(record.get("error") or "", 4000) if stage.state in LOG_OF else ""
    out.says = str(out.error or record.get("waiting") or stage.doing).partition("\n")[0]
    out.says = out.says or brief(mapping(stage.manifest.get("metrics")))

    def part(what: str, make: Callable[[], Any]) -> None:
        attempt(f"{stage.name}: {what}", make)

    def draw() -> None:
        found = curves(stage.metrics, points)
        drawn = [line_chart(chart) for chart in found.charts]
        out.figures, out.more = [f for f in drawn if f.main], [f for f in drawn if not f.main]
        out.constant, out.once = found.constant, found.once
        for odd in found.odd:
            tell(f"{stage.name}: {odd}")

    part("facts", lambda: out.facts.extend(facts(stage)))
    part("curves", draw)
    part("warnings", lambda: out.warnings.extend(warnings(stage)))
    part("checks", lambda: out.checks.extend(checks(stage)))
    part("ledger", lambda: setattr(out, "ledger", ledger(stage)))
    part("mixture", lambda: out.mixture.extend(mixture(stage)))
    if stage.kind != "evaluate":
        part("samples", lambda: setattr(out, "samples", generated(stage)))
        part("answers", lambda: out.iterations.extend(iterations(stage)))
        part("metrics", lambda: out.metrics.extend(last_metrics(stage)))
    part(
        "kernels",
        lambda: out.kernels.extend((str(k), str(v)) for k, v in mapping(stage.details.get("kernels")).items()),
    )
    part("code", lambda: setattr(out, "load", load(stage)))
    part("manifest", lambda: setattr(out, "manifest", json.dumps(stage.manifest, indent=1) if stage.manifest else ""))
    return out


def facts(stage: StageRead) -> list[tuple[str, str]]:
    """What it was made from and what it took: (name, value), those that are known."""
    made, details = stage.manifest, stage.details
    rows, tokens = finite(made.get("rows")), finite(made.get("tokens"))
    trained = finite(details.get("trained_tokens"))
    out = [
        ("from", ", ".join(stage.inputs)),
        ("rows", number(rows)),
        ("tokens", number(tokens)),
        ("trained tokens", f"{number(trained)} ({share(trained / tokens)})" if trained and tokens else ""),
        ("tokens a row", number(round(tokens / rows, 1)) if tokens and rows else ""),
        ("tokens an example", ", ".join(f"{at} {number(n)}" for at, n in mapping(details.get("lengths")).items())),
        ("packed rows are full to", share(details.get("fill")) if finite(details.get("fill")) is not None else ""),
        ("epochs", number(details.get("epochs"))),
        ("steps", number(made.get("steps"))),
        *(
            (spoken(key), number(mapping(made.get("metrics")).get(key)))
            for key in ("prompts", "parameters", "vocab_size")
        ),
        *cost(stage),
    ]
    return [(name, said) for name, said in out if said]


def cost(stage: StageRead) -> list[tuple[str, str]]:
    rates = [rate for line in stage.metrics if (rate := finite(line.get("tokens_per_second"))) is not None]
    lost = finite(mapping(stage.details.get("workers")).get("lost"))
    return [
        ("time", duration(stage.seconds)),
        ("of it training", duration(finite(mapping(stage.manifest.get("metrics")).get("train_seconds")))),
        ("workers", number(workers(stage))),
        ("worker-hours", number(worker_hours(stage))),
        ("tokens a second, median", number(round(median(rates))) if rates else ""),
        ("workers lost", number(lost) if lost else ""),
    ]


def workers(stage: StageRead) -> float | None:
    """As many as it had; until that is known, as many as it may have."""
    had = finite(mapping(stage.details.get("workers")).get("workers"))
    return had or finite(stage.record.get("workers")) or finite(stage.manifest.get("workers"))


def worker_hours(stage: StageRead) -> float | None:
    count = workers(stage)
    return None if count is None or stage.seconds is None else float(f"{count * stage.seconds / 3600:.3g}")


def warnings(stage: StageRead) -> list[str]:
    details = stage.details
    counted = mapping(details.get("warnings"))
    out = [f"{number(count)} rows: {WARNINGS.get(code, code)}" for code, count in counted.items()]
    for key in ("training_warnings", "evaluation_warnings"):
        out += texts(details.get(key))
    return out + texts(mapping(stage.manifest.get("handoff")).get("warnings"))


def checks(stage: StageRead) -> list[Check]:
    """What was checked of a model before the next stage could have it."""
    known = mapping(stage.manifest.get("handoff"))
    out = []
    difference, allowed = finite(known.get("logits_difference")), finite(known.get("logits_allowed"))
    if difference is not None and allowed is not None:
        probes = f" on {number(known['probes'])} probes" if "probes" in known else ""
        out.append(
            Check(
                difference <= allowed,
                f"read again it computes the same{probes}: logits differ by {number(difference)}, "
                f"{number(allowed)} is allowed",
            )
        )
    if isinstance(known.get("stops"), bool):
        out.append(
            Check(known["stops"], "its answers end by themselves" if known["stops"] else "its answers do not end")
        )
    told = {
        "parameters": "parameters", "dtype": "stored as", "chat_template": "chat template", "stop_token_ids": "stop tokens",
        "pad_token_id": "padding token",
    }  # fmt: skip
    said = [f"{what} {_listed(known[key])}" for key, what in told.items() if known.get(key) not in (None, [])]
    return [*out, *([Check(None, "; ".join(said))] if said else [])]


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else number(value)


def ledger(stage: StageRead) -> Ledger | None:
    """Rows that were read and not used; of a stage that is still going too, where it has prepared its data."""
    given = mapping(stage.details.get("ledger")) or stage.ledger
    read = finite(given.get("read"))
    if read is None:
        return None
    reasons = [
        (str(reason), number(count), share(count / read) if read and finite(count) is not None else "")
        for reason, count in mapping(given.get("reasons")).items()
    ]
    examples = [
        (f"{e.get('source', '')}:{e.get('row', '')}", str(e.get("reason", "")), clip(e.get("detail", ""), 400))
        for e in mappings(given.get("examples"))
    ]
    return Ledger(number(read), number(given.get("kept")), reasons, examples)


def mixture(stage: StageRead) -> list[list[str]]:
    """A row for each source: path, format, rows read, used, held out, examples, tokens, share of tokens."""
    return [
        [
            str(source.get("path", "")),
            str(source.get("format") or ""),
            *(number(source.get(key)) for key in ("weight", "read", "kept", "held_out", "examples", "tokens")),
            share(source.get("share_of_tokens")),
        ]
        for source in mappings(stage.details.get("mixture"))
    ]


def last_metrics(stage: StageRead) -> list[tuple[str, str]]:
    known = mapping(stage.manifest.get("metrics"))
    return [
        (str(name).replace("_", " "), number(value))
        for name, value in known.items()
        if not isinstance(value, dict | list)
    ]


def load(stage: StageRead) -> str:
    """Python that loads the model that came out."""
    kind = MODELS.get(str(stage.manifest.get("produces")))
    if kind is None or stage.folder is None or not (stage.folder / "model").is_dir():
        return ""
    folder = json.dumps(str((stage.folder / "model").absolute()))
    return (
        f"from transformers import {kind}, AutoTokenizer\n\n"
        f"folder = {folder}\n"
        f"model = {kind}.from_pretrained(folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)"
    )
