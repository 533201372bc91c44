"""Rows to tokens: a recipe says what of a row becomes what, and every row comes out as examples or with a reason why not."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from stages.data import spans, truncate
from stages.data.chat import IGNORE, ChatEncoder, ControlTokens, Encoded, History, Refused, TokenizerSpec, TrainOn
from stages.data.chunks import BadRow
from stages.data.ledger import LedgerEntry
from stages.data.mixing import draw, hash_of
from stages.data.records import (
    Conversation,
    Labelled,
    Message,
    Preference,
    Prompt,
    Record,
    Rejected,
    Text,
    Tokens,
    normalise,
)
from stages.data.source import DataSource, shaped
from stages.data.truncate import Truncation, cut_both_answers, cut_to, too_long

OWN_WEIGHT = ("train", "weight")
ONLY_STOP = "has no token but its stop token once rendered"
DATA_VERSION = 3  # raised when the same input would be prepared differently
BATCH_ROWS = 512  # rows encoded together
WARNINGS = spans.WARNINGS | truncate.WARNINGS  # code -> what it means; counted in the manifest of prepared data
PRINTED_DATE = datetime.datetime(2026, 1, 1)  # what templates that print today's date print, where the spec names none

Task = Literal["conversation", "preference", "labelled", "prompt", "evaluation"]
Row = dict[str, Any]
WANTS: dict[Task, tuple[type, ...]] = {
    "conversation": (Conversation, Text, Tokens),
    "preference": (Preference,),
    "labelled": (Labelled, Preference),
    "prompt": (Prompt, Conversation, Preference, Labelled),
    "evaluation": (Conversation, Text, Tokens, Prompt),
}


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Recipe:
    """All that decides how rows become tokens."""

    task: Task
    tokenizer: TokenizerSpec
    train_on: TrainOn = "assistant"
    history: History = "refuse"
    stop_token: str | None = None
    control_tokens: ControlTokens = "text"
    date: datetime.datetime = PRINTED_DATE
    max_length: int | None = None  # of an example, in tokens
    truncation: Truncation = "drop"
    packing: bool = False
    deduplicate: bool = False
    shuffle: bool = True  # else packs stay in the order of the data
    seed: int = 0  # of which rows are held out or repeated, and of the order of packs

    def key(self, drawn: bool) -> dict[str, Any]:
        """What prepared data is addressed by. `drawn`: some rows are held out, or taken by a weight that is no whole number."""
        own = {k: v for k, v in vars(self).items() if k not in ("tokenizer", "date", "seed", "shuffle")}
        own |= {"seed": self.seed if drawn or (self.packing and self.shuffle) else None}
        own |= {"shuffle": self.shuffle if self.packing else None}
        dated = "strftime_now" in (self.tokenizer.chat_template or "")
        return own | {
            "version": DATA_VERSION,
            "tokenizer": digest(self.tokenizer.json),
            "template": digest(self.tokenizer.chat_template or ""),
            "variables": self.tokenizer.variables,
            "date": self.date.isoformat() if dated else None,
        }


def encoder_for(recipe: Recipe, *, parallel: bool = True) -> ChatEncoder:
    """The answers of a pair are its last turn alone: earlier assistant turns belong to the prompt, as it is rendered."""
    last = recipe.task in ("preference", "labelled")
    return ChatEncoder(
        recipe.tokenizer,
        "last_assistant" if last else recipe.train_on,
        recipe.history,
        stop_token=recipe.stop_token,
        control_tokens=recipe.control_tokens,
        reshape=True,
        date=recipe.date,
        parallel=parallel,
    )


# ------------------------------------------------------------------------------------------------ one row


@dataclass(frozen=True, slots=True)
class Examples:
    """What a row became: several rows of prepared data where each turn is an example of its own."""

    rows: list[Row]
    warnings: frozenset[str] = frozenset()
    stops: frozenset[int] = frozenset()  # the tokens that end its answers


def encode(records: Sequence[Record], encoder: ChatEncoder, recipe: Recipe) -> list[Examples | Refused]:
    """What each record becomes, in order."""
    out: list[Examples | Refused | None] = []
    for record in records:
        wrong = None if isinstance(record, WANTS[recipe.task]) else _wrong_format(record, recipe.task)
        out.append(wrong)
    fits = [record for record, wrong in zip(records, out, strict=True) if wrong is None]
    encoded = iter(_ENCODERS[recipe.task](fits, encoder, recipe))
    return [wrong if wrong is not None else next(encoded) for wrong in out]


def _wrong_format(record: Record, task: Task) -> Refused:
    wanted = " or ".join(kind.__name__.lower() for kind in WANTS[task])
    return Refused("wrong_format", f"a {type(record).__name__.lower()} where a {wanted} is wanted")


def _conversations(records: Sequence[Any], encoder: ChatEncoder, recipe: Recipe) -> Iterator[Examples | Refused]:
    chats = [record for record in records if isinstance(record, Conversation)]
    each = iter(encoder.encode_each([_of_completion(c, recipe) for c in chats], [c.tools for c in chats]))
    texts = iter(encoder.encode_text([record.text for record in records if isinstance(record, Text)]))
    for record in records:
        if isinstance(record, Tokens):
            yield _finish([_given(record, encoder)], encoder, recipe)
        else:
            yield _finish(next(each) if isinstance(record, Conversation) else [next(texts)], encoder, recipe)


def _of_completion(record: Conversation, recipe: Recipe) -> list[Message]:
    """The messages; with `train_on: completion` an answer that stands in the prompt of its row is none."""
    messages = record.messages
    if recipe.train_on != "completion" or not record.prompt_messages:
        return messages
    before, after = messages[: record.prompt_messages], messages[record.prompt_messages :]
    return [{**m, "train": False} if m["role"] == "assistant" else m for m in before] + after


def _given(record: Tokens, encoder: ChatEncoder) -> Encoded | Refused:
    size = encoder.tokenizer.get_vocab_size(with_added_tokens=True)
    if (highest := max(record.input_ids)) >= size:
        return Refused("token_out_of_range", f"token {highest}, the tokenizer has {size}")
    labels = list(record.labels if record.labels is not None else record.input_ids)
    if (highest := max(labels)) >= size:
        return Refused("token_out_of_range", f"label {highest}, the tokenizer has {size}")
    if all(label == IGNORE for label in labels[1:]):
        return Refused("no_trained_token", "nothing is predicted from but the first token")
    return Encoded("", list(record.input_ids), labels, [])


def _finish(results: Iterable[Encoded | Refused], encoder: ChatEncoder, recipe: Recipe) -> Examples | Refused:
    """The rows of a conversation, not longer than is allowed; one that cannot be used refuses them all."""
    rows: list[Row] = []
    warnings: set[str] = set()
    stops: set[int] = set()
    for result in results:
        if isinstance(result, Refused):
            return result
        row: Row = {"input_ids": result.input_ids, "labels": result.labels, "weights": result.weights}
        if recipe.max_length is not None and len(result.input_ids) > recipe.max_length:
            cut = cut_to(row, recipe.max_length, recipe.truncation, _bos(encoder))
            if isinstance(cut, Refused):
                return cut
            row, note = cut
            warnings.add(note)
        warnings |= result.warnings
        if result.stop is not None:
            stops.add(result.stop)
        rows.append(row)
    return Examples(rows, frozenset(warnings), frozenset(stops))


def _bos(encoder: ChatEncoder) -> int | None:
    bos = encoder.spec.variables.get("bos_token")
    return encoder.tokenizer.token_to_id(bos) if bos else None


def _evaluations(records: Sequence[Any], encoder: ChatEncoder, recipe: Recipe) -> Iterator[Examples | Refused]:
    """Rows with the prompt of the last answer beside them, for greedy samples, and the answer that is expected."""
    asked = [_as_conversation(record) if isinstance(record, Prompt) else record for record in records]
    answered = [_answered(record) if isinstance(record, Conversation) else record for record in asked]
    for record, result in zip(asked, _conversations(answered, encoder, recipe), strict=True):
        if isinstance(result, Refused):
            yield result
            continue
        prompt: Row = {"prompt_ids": None, "prompt": None, "expected": None}
        if isinstance(record, Conversation):
            last = record.messages[-1]["role"] == "assistant"
            messages = record.messages[:-1] if last else record.messages
            if messages:
                asked_for = encoder.encode_prompt(messages, record.tools)
                if isinstance(asked_for, Refused):
                    yield asked_for
                    continue
                prompt = {"prompt_ids": asked_for.input_ids, "prompt": asked_for.text, "expected": record.expected}
        yield Examples([row | prompt for row in result.rows], result.warnings, result.stops)


def _as_conversation(record: Prompt) -> Conversation:
    return Conversation(record.prompt, record.tools, record.expected)


def _answered(record: Conversation) -> Conversation:
    """The conversation with its expected answer as the last turn where the row ends with a question."""
    if record.expected is None or record.messages[-1]["role"] == "assistant":
        return record
    return Conversation(
        [*record.messages, {"role": "assistant", "content": record.expected}], record.tools, record.expected
    )


def _preferences(records: Sequence[Any], encoder: ChatEncoder, recipe: Recipe) -> Iterator[Examples | Refused]:
    """`prompt_ids` and two answers, each to the end of its stop token."""
    answers = [[*r.prompt, _unweighted(answer)] for r in records for answer in (r.chosen, r.rejected)]
    encoded = iter(encoder.encode_each(answers, [r.tools for r in records for _ in range(2)]))
    for record in records:
        (chosen,), (rejected,) = next(encoded), next(encoded)
        if any(key in answer for answer in (record.chosen, record.rejected) for key in OWN_WEIGHT):
            yield Refused("weight_not_used", "an answer of a pair has no weight of its own")
            continue
        if isinstance(chosen, Refused) or isinstance(rejected, Refused):
            yield chosen if isinstance(chosen, Refused) else rejected  # type: ignore[misc]
            continue
        sides = {"chosen": chosen, "rejected": rejected}
        (prompt, good), (other, bad) = map(_prompt_and_answer, sides.values())
        if silent := [name for name, side in sides.items() if _only_stop(side)]:
            yield Refused("empty_answer", f"{silent[0]} {ONLY_STOP}")
        elif prompt != other:
            yield Refused("different_prompts", "the tokens before the answers differ")
        elif good == bad:
            yield Refused("equal_answers", "the same tokens once rendered")
        else:
            row: Row = {"prompt_ids": prompt, "chosen_ids": good, "rejected_ids": bad, "margin": record.margin}
            stops = frozenset(stop for stop in (chosen.stop, rejected.stop) if stop is not None)
            yield _answers_cut(row, chosen.warnings | rejected.warnings, stops, encoder, recipe)


def _labelled(records: Sequence[Any], encoder: ChatEncoder, recipe: Recipe) -> Iterator[Examples | Refused]:
    """`prompt_ids`, `completion_ids` to the end of its stop token, and whether it is wanted.

    A pair becomes two of them, after the same prompt, if it can be used as a pair.
    """
    pairs = _preferences([record for record in records if isinstance(record, Preference)], encoder, recipe)
    answers = _labelled_answers([record for record in records if isinstance(record, Labelled)], encoder, recipe)
    for record in records:
        yield next(answers) if isinstance(record, Labelled) else _split(next(pairs))


def _split(pair: Examples | Refused) -> Examples | Refused:
    if isinstance(pair, Refused):
        return pair
    rows = [
        {"prompt_ids": row["prompt_ids"], "completion_ids": row[side], "label": label}
        for row in pair.rows
        for side, label in (("chosen_ids", True), ("rejected_ids", False))
    ]
    return Examples(rows, pair.warnings, pair.stops)


def _labelled_answers(records: Sequence[Any], encoder: ChatEncoder, recipe: Recipe) -> Iterator[Examples | Refused]:
    conversations = [[*r.prompt, _unweighted(r.completion)] for r in records]
    each = encoder.encode_each(conversations, [r.tools for r in records])
    for record, (result,) in zip(records, each, strict=True):
        if any(key in record.completion for key in OWN_WEIGHT):
            yield Refused("weight_not_used", "a labelled answer has no weight of its own")
            continue
        if isinstance(result, Refused):
            yield result
            continue
        if _only_stop(result):
            yield Refused("empty_answer", f"completion {ONLY_STOP}")
            continue
        prompt, completion = _prompt_and_answer(result)
        row: Row = {"prompt_ids": prompt, "completion_ids": completion, "label": record.label}
        stops = frozenset() if result.stop is None else frozenset([result.stop])
        yield _answers_cut(row, result.warnings, stops, encoder, recipe)


def _unweighted(answer: Message) -> Message:
    return {k: v for k, v in answer.items() if k not in OWN_WEIGHT}


def _prompt_and_answer(encoded: Encoded) -> tuple[list[int], list[int]]:
    trained = [i for i, label in enumerate(encoded.labels) if label != IGNORE]
    return encoded.input_ids[: trained[0]], encoded.input_ids[trained[0] : trained[-1] + 1]


def _only_stop(encoded: Encoded) -> bool:
    """Whether nothing but its stop token is trained of the answer: its text is in a token that begins in the prompt."""
    return encoded.stop is not None and encoded.trained == 1


def _answers_cut(
    row: Row, warnings: frozenset[str], stops: frozenset[int], encoder: ChatEncoder, recipe: Recipe
) -> Examples | Refused:
    if recipe.max_length is None:
        return Examples([row], warnings, stops)
    cut = cut_both_answers(row, recipe.max_length, recipe.truncation, _bos(encoder))
    if isinstance(cut, Refused):
        return cut
    row, note = cut
    return Examples([row], warnings | ({note} if note else set()), stops)


def _prompts(records: Sequence[Any], encoder: ChatEncoder, recipe: Recipe) -> Iterator[Examples | Refused]:
    """The text after which an answer is to be sampled, and what stands behind it, as JSON: the messages and tools, of which
    a later stage makes conversations, and the row's other columns, which go to reward functions."""
    for record in records:
        messages = _question(record)
        if not messages:
            yield Refused("no_prompt", "nothing stands before the answer")
            continue
        if messages[-1]["role"] == "assistant":
            yield Refused("ends_with_answer", "the last message before the answer is the assistant's too")
            continue
        extra, expected = getattr(record, "extra", {}), getattr(record, "expected", None)
        try:
            given = {
                "messages": json.dumps([_unweighted(message) for message in messages], default=str),
                "tools": json.dumps(record.tools, default=str) if record.tools else None,
                "columns": json.dumps(extra, default=str),
            }
        except (TypeError, ValueError) as error:  # keys that are no strings, numbers that Python will not write
            yield Refused("wrong_type", f"the row's columns: {error}")
            continue
        asked = encoder.encode_prompt(messages, record.tools)
        if isinstance(asked, Refused):
            yield asked
        elif recipe.max_length is not None and len(asked.input_ids) > recipe.max_length:
            yield too_long(len(asked.input_ids), recipe.max_length)
        else:
            row: Row = {"prompt_ids": asked.input_ids, "prompt": asked.text, "expected": expected}
            yield Examples([row | given], asked.warnings)


def _question(record: Any) -> list[Message]:
    """What stands before the last answer."""
    if not isinstance(record, Conversation):
        return record.prompt
    return record.messages[:-1] if record.messages[-1]["role"] == "assistant" else record.messages


_ENCODERS: dict[Task, Any] = {
    "conversation": _conversations,
    "preference": _preferences,
    "labelled": _labelled,
    "prompt": _prompts,
    "evaluation": _evaluations,
}

# ------------------------------------------------------------------------------------------------ rows of a source


@dataclass(slots=True)
class Outcome:
    """What became of one row."""

    row: int
    entry: LedgerEntry | None = None
    examples: list[Row] = field(default_factory=list)
    copies: int = 1
    held_out: bool = False
    warnings: frozenset[str] = frozenset()
    stops: frozenset[int] = frozenset()


def encode_rows(
    rows: Iterator[tuple[int, Row | BadRow]],
    *,
    file: str,
    format: str,
    source: DataSource,
    recipe: Recipe,
    encoder: ChatEncoder,
    duplicates: frozenset[int] = frozenset(),
) -> Iterator[Outcome]:
    """What became of every row that is read, in order: nothing is lost on the way.

    Args:
        duplicates: numbers of rows that stand elsewhere already.
    """
    while batch := list(islice(rows, BATCH_ROWS)):
        outcomes: list[Outcome] = []
        records: list[Record] = []
        for number, row in batch:
            outcome = Outcome(number)
            outcomes.append(outcome)
            try:
                record = _record(row, source, format)
                outcome.copies, outcome.held_out = draw(record, source, recipe.seed)
                if not outcome.copies:
                    raise Rejected("weight", f"not drawn at weight {source.weight:g}")
                if number in duplicates:
                    raise Rejected("duplicate", "the same as an earlier row")
            except Rejected as error:
                outcome.entry = LedgerEntry(file, number, error.reason, error.detail)
            else:
                records.append(record)
        encoded = iter(encode(records, encoder, recipe))
        for outcome in outcomes:
            if outcome.entry is None:
                result = next(encoded)
                if isinstance(result, Refused):
                    outcome.entry = LedgerEntry(file, outcome.row, result.reason, result.detail)
                else:
                    outcome.examples, outcome.warnings, outcome.stops = result.rows, result.warnings, result.stops
            yield outcome


def _record(row: Row | BadRow, source: DataSource, format: str) -> Record:
    if isinstance(row, BadRow):
        raise Rejected(row.reason, row.detail)
    return normalise(shaped(row, source), format)


def record_hashes(
    rows: Iterator[tuple[int, Row | BadRow]], source: DataSource, format: str, seed: int
) -> Iterator[tuple[int, int]]:
    """(row number, 64-bit hash of its record) of every row that is drawn: equal rows of any format are equal here."""
    for number, row in rows:
        try:
            record = _record(row, source, format)
        except Rejected:
            continue
        if draw(record, source, seed)[0]:
            yield number, int.from_bytes(hash_of(record), "little")
