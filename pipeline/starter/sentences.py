"""What was found in the data, in sentences: for the terminal, and for the top of the spec."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from pipeline.starter.seen import Measured, Seen, turns_of

FORMATS = {
    "messages": "conversations (messages)",
    "sharegpt": "conversations (ShareGPT)",
    "alpaca": "instructions and answers (Alpaca)",
    "prompt_completion": "questions and answers",
    "text": "plain text",
    "transcript": "conversations (Human: / Assistant:)",
    "tokens": "token ids",
    "preference": "preference pairs",
    "kto": "answers with a label, wanted or not",
    "prompt": "prompts",
}
SHOWN = 3  # reasons


def about_rows(seen: Seen) -> Iterator[str]:
    """`faq.csv: 200 rows (CSV) with the columns question, answer: questions and answers.`"""
    kinds = ", ".join(dict.fromkeys(file.kind + " in gzip" * file.gzipped for file in seen.files))
    where = f"{len(seen.files)} files, {kinds}" if len(seen.files) > 1 else kinds
    rows = "rows" if seen.rows is None else f"{'' if seen.exact else 'about '}{seen.rows:,} row{'s' * (seen.rows != 1)}"
    yield f"{seen.given}: {rows} ({where}), columns {', '.join(seen.names)}: {FORMATS[seen.format]}"
    renamed = ", ".join(f"{new} is {old}" for new, old in seen.reading.columns.items())
    if renamed:
        yield f"  read with {renamed}"
    if seen.reading.messages:
        yield "  messages are made of the columns"
    turns, system, tools = turns_of(seen)
    facts = []
    if turns:
        longest = max(turns)
        facts.append("one answer each" if longest == 1 else f"up to {longest} answers in a conversation")
    if seen.task != "conversation" or turns:
        facts.append(_some(system, len(seen.records), "a system message"))
        facts.append(_some(tools, len(seen.records), "tools"))
    labels = Counter(record.label for record in seen.records if hasattr(record, "label"))
    if labels:
        facts.append(f"{labels[True]:,} wanted and {labels[False]:,} not")
    if facts:
        yield "  " + ", ".join(facts) + ("" if seen.whole else f" (of {len(seen.sample):,} rows that were looked at)")
    for note in seen.reading.notes:
        yield f"  {note}"


def _some(count: int, of: int, what: str) -> str:
    return (
        f"no {what.removeprefix('a ')}"
        if not count
        else f"all with {what}"
        if count == of
        else f"{count:,} with {what}"
    )


def about_lengths(measured: Measured) -> Iterator[str]:
    """Lengths, and what would be left out."""
    if measured.lengths:
        said = ", ".join(f"{name} {n:,}" for name, n in measured.quantiles.items() if name != "shortest")
        yield f"  tokens: {said}" + ("" if measured.exact else " (estimated from characters)")
    if lost := sum(measured.lost.values()):
        yield f"  left out: {lost:,} of {measured.read:,} rows that were looked at"
        for reason, count in measured.lost.most_common(SHOWN):
            yield f"    {reason} {count:,}: {measured.example[reason]}"
