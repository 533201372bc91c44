"""`raylign inspect`: real rows of a stage as the model will see them, what is trained of them, and what is left out.

Reads through the same functions that prepare the data, so what is shown is what is trained.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.text import Text

from pipeline.plan import Plan, PlannedStage
from stages.data.chat import IGNORE, ChatEncoder, Encoded, Refused
from stages.data.encode import Recipe, encode_rows, encoder_for
from stages.data.ledger import LedgerEntry
from stages.data.prepare import resolve_formats
from stages.data.records import Conversation, Preference, Rejected, normalise, rename
from stages.data.records import Text as PlainText
from stages.data.source import BadRow, DataSource, chunks, find_files, read_chunk
from stages.data.tokenizer import load_tokenizer
from stages.errors import Problem, SpecError
from stages.init import CHATML, train_tokenizer
from stages.training.stage import TrainStage

LEDGER_ROWS = 10_000  # rows of a stage that are looked at for the ledger


@dataclass(frozen=True)
class Inspection:
    stage: str
    rows: list[dict[str, Any]]
    ledger: dict[str, int]
    looked_at: int

    def as_json(self) -> dict[str, Any]:
        """The contract of `inspect --json`."""
        return {"stage": self.stage, "rows": self.rows, "ledger": self.ledger}


def inspect(plan: Plan, stage: str | None, n: int) -> Inspection:
    """The first `n` rows of a stage (the first that trains, where none is named) that reach training.

    Raises:
        SpecError: no such stage.
    """
    planned = _choose(plan, stage)
    config = planned.stage
    assert isinstance(config, TrainStage)
    recipe = config.recipe(stage_tokenizer(plan, planned))
    encoder = encoder_for(recipe)
    rows: list[dict[str, Any]] = []
    ledger: Counter[str] = Counter()
    looked_at = 0
    for source, format in zip(config.data, resolve_formats(config.data), strict=True):
        for file, number, row, result in _encoded(source, format, recipe, encoder):
            if looked_at >= LEDGER_ROWS:
                break
            looked_at += 1
            if isinstance(result, LedgerEntry):
                ledger[result.reason] += 1
            elif len(rows) < n and isinstance(row, dict):
                rows.extend(show(row, format, source, encoder, file, number))
    return Inspection(planned.name, rows, dict(ledger.most_common()), looked_at)


def _choose(plan: Plan, stage: str | None) -> PlannedStage:
    trainable = [s for s in plan.stages if isinstance(s.stage, TrainStage)]
    names = ", ".join(s.name for s in trainable)
    if stage is None:
        if not trainable:
            raise SpecError([Problem("stages", "no stage of this spec trains on data, so there is nothing to inspect")])
        return trainable[0]
    found = next((s for s in trainable if s.name == stage), None)
    if found is None:
        raise SpecError([Problem(f"--stage {stage}", f"no such training stage; there are: {names}")])
    return found


def stage_tokenizer(plan: Plan, planned: PlannedStage) -> Any:
    """The tokenizer a stage will use, whether or not the stages before it have run: they all hand on that of the base."""
    model = planned.inputs["model"][0]
    while model.startswith("stages."):
        made = plan[model.removeprefix("stages.")]
        if published := plan.folder.find(made.name, made.fingerprint):
            return load_tokenizer(str(published / "model"), plan.spec.template)
        if made.stage.kind == "init":
            config: Any = made.stage
            return train_tokenizer(config.data, config.tokenizer.vocab_size, plan.spec.template or CHATML)
        model = made.inputs["model"][0]
    return load_tokenizer(model, plan.spec.template)


def _encoded(
    source: DataSource, format: str, recipe: Recipe, encoder: ChatEncoder
) -> Iterator[tuple[str, int, dict[str, Any] | BadRow, dict[str, Any] | LedgerEntry]]:
    for file in find_files(source.path):
        for chunk in chunks(0, file):
            raw = list(read_chunk(chunk))
            encoded = encode_rows(
                iter(raw), file=file.path, format=format, columns=source.columns, recipe=recipe, encoder=encoder
            )
            for (number, row), (_, result) in zip(raw, encoded, strict=True):
                yield file.path, number, row, result


def show(
    row: dict[str, Any], format: str, source: DataSource, encoder: ChatEncoder, file: str, number: int
) -> list[dict[str, Any]]:
    """A row as `inspect` shows it; a preference pair is two, its chosen and its rejected answer."""
    try:
        record = normalise(rename(row, source.columns), format)
    except Rejected:
        return []
    if isinstance(record, Preference):
        variants = {"chosen": [*record.prompt, record.chosen], "rejected": [*record.prompt, record.rejected]}
    elif isinstance(record, Conversation):
        variants = {"": record.messages}
    else:
        assert isinstance(record, PlainText)
        encoded = encoder.encode_text([record.text])[0]
        return [] if isinstance(encoded, Refused) else [_row(encoded, [], encoder, file, number, "")]
    out = []
    for which, messages in variants.items():
        encoded = encoder.encode_batch([messages])[0]
        if isinstance(encoded, Encoded):
            ends = list(zip(encoder.message_ends(messages), (m["role"] for m in messages), strict=True))
            out.append(_row(encoded, ends, encoder, file, number, which))
    return out


def _row(
    encoded: Encoded, ends: list[tuple[int, str]], encoder: ChatEncoder, file: str, number: int, which: str
) -> dict[str, Any]:
    row = {
        "source": file,
        "row": number,
        "text": encoded.text,
        "segments": segments(encoded, ends, encoder),
        "tokens": len(encoded.input_ids),
        "trained_tokens": encoded.trained,
    }
    return row | ({"answer": which} if which else {})


def segments(encoded: Encoded, ends: list[tuple[int, str]], encoder: ChatEncoder) -> list[dict[str, Any]]:
    """The text cut where what is trained or who speaks changes. Trained is what the labels say, token by token."""
    text = encoded.text
    trained = [False] * len(text)
    offsets = encoder.tokenizer.encode(text, add_special_tokens=False).offsets
    for (start, end), label in zip(offsets, encoded.labels, strict=True):
        if label != IGNORE:
            trained[start:end] = [True] * (end - start)
    out: list[dict[str, Any]] = []
    at = 0
    for i, flag in enumerate(trained):
        while at < len(ends) - 1 and i >= ends[at][0]:
            at += 1
        role = ends[at][1] if ends else "text"
        if out and out[-1]["trained"] == flag and out[-1]["role"] == role:
            out[-1]["text"] += text[i]
        else:
            out.append({"text": text[i], "trained": flag, "role": role})
    return out


# ------------------------------------------------------------------------------------------------ showing


def render(inspection: Inspection) -> Group:
    """For the terminal: trained text on green."""
    parts: list[Any] = []
    for row in inspection.rows:
        title = f"{row['source']}:{row['row']}" + (f" ({row['answer']})" if "answer" in row else "")
        parts.append(Text(f"{title}  {row['tokens']} tokens, {row['trained_tokens']} trained", style="bold"))
        line = Text()
        for segment in row["segments"]:
            line.append(segment["text"], style="black on green" if segment["trained"] else "dim")
        parts += [line, Text("")]
    parts.append(Text(f"{inspection.stage}: {inspection.looked_at} rows looked at; green is trained, the rest is not"))
    left_out = ", ".join(f"{reason} {count}" for reason, count in inspection.ledger.items())
    parts.append(Text(f"left out: {left_out or 'none'}"))
    return Group(*parts)


STYLE = (
    "body{font:15px system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
    "pre{white-space:pre-wrap}mark{background:#7bd88f}"
)


def _marked(segment: dict[str, Any]) -> str:
    tag = "mark" if segment["trained"] else "span"
    return f"<{tag} title='{segment['role']}'>{html.escape(segment['text'])}</{tag}>"


def render_html(inspection: Inspection) -> str:
    """One self-contained page."""
    body = []
    for row in inspection.rows:
        marked = "".join(_marked(segment) for segment in row["segments"])
        which = f" ({row['answer']})" if "answer" in row else ""
        title = html.escape(f"{row['source']}:{row['row']}{which}")
        body.append(f"<h3>{title}: {row['tokens']} tokens, {row['trained_tokens']} trained</h3><pre>{marked}</pre>")
    ledger = (
        "".join(f"<li>{html.escape(reason)}: {count}</li>" for reason, count in inspection.ledger.items())
        or "<li>none</li>"
    )
    return (
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(inspection.stage)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(inspection.stage)}</h1><p>{inspection.looked_at} rows looked at. Marked text is trained.</p>"
        f"{''.join(body)}<h2>Left out</h2><ul>{ledger}</ul>"
    )
