"""Rows to tokens: a recipe says what of a row becomes what, and every row comes out encoded or with a reason why not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from stages.data.chat import IGNORE, ChatEncoder, Encoded, Refused, TokenizerSpec, TrainOn
from stages.data.ledger import LedgerEntry
from stages.data.records import Conversation, Preference, Record, Rejected, Text, normalise, rename
from stages.data.source import BadRow

DATA_VERSION = 1  # raised when the same input would be prepared differently
BATCH_ROWS = 512  # rows encoded together

Task = Literal["conversation", "preference", "evaluation"]


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Recipe:
    """All that decides how rows become tokens."""

    task: Task
    tokenizer: TokenizerSpec
    train_on: TrainOn = "assistant"
    max_length: int | None = None  # longer rows go to the ledger, they are never cut

    def key(self) -> dict[str, Any]:
        return {
            "version": DATA_VERSION,
            "task": self.task,
            "tokenizer": digest(self.tokenizer.json),
            "template": digest(self.tokenizer.chat_template or ""),
            "variables": self.tokenizer.variables,
            "train_on": self.train_on,
            "max_length": self.max_length,
        }


def encode(records: Sequence[Record], encoder: ChatEncoder, recipe: Recipe) -> list[dict[str, Any] | Refused]:
    """Rows of the recipe's schema, or why not; in order."""
    if recipe.task == "preference":
        return _encode_preferences(records, encoder, recipe)
    texts = iter(encoder.encode_text([r.text for r in records if isinstance(r, Text)]))
    answered = _answered if recipe.task == "evaluation" else lambda record: record.messages
    chats = iter(encoder.encode_batch([answered(r) for r in records if isinstance(r, Conversation)]))
    out: list[dict[str, Any] | Refused] = []
    for record in records:
        if isinstance(record, Preference):
            out.append(Refused("wrong_format", "a preference pair where a conversation is wanted"))
            continue
        encoded = next(texts) if isinstance(record, Text) else next(chats)
        if isinstance(encoded, Encoded) and (long := _too_long(len(encoded.input_ids), recipe)):
            encoded = long
        if isinstance(encoded, Refused):
            out.append(encoded)
            continue
        row: dict[str, Any] = {"input_ids": encoded.input_ids, "labels": encoded.labels}
        if recipe.task == "evaluation":
            row |= _evaluation_fields(record, encoder)
        out.append(row)
    return out


def _answered(record: Conversation) -> list[dict[str, Any]]:
    """The conversation with its expected answer as the last turn where the row ends with a question."""
    if record.expected is not None and record.messages[-1]["role"] != "assistant":
        return [*record.messages, {"role": "assistant", "content": record.expected}]
    return record.messages


def _evaluation_fields(record: Record, encoder: ChatEncoder) -> dict[str, Any]:
    """What greedy samples need: the prompt of the last answer, and the answer that is expected."""
    if not isinstance(record, Conversation):
        return {"prompt_ids": None, "prompt": None, "expected": None}
    messages = record.messages[:-1] if record.messages[-1]["role"] == "assistant" else record.messages
    if not messages:
        return {"prompt_ids": None, "prompt": None, "expected": None}
    prompt = encoder.prompt(messages)
    ids = encoder.tokenizer.encode(prompt, add_special_tokens=False).ids
    return {"prompt_ids": ids, "prompt": prompt, "expected": record.expected}


def _encode_preferences(
    records: Sequence[Record], encoder: ChatEncoder, recipe: Recipe
) -> list[dict[str, Any] | Refused]:
    pairs = [r for r in records if isinstance(r, Preference)]
    answers = [[*p.prompt, answer] for p in pairs for answer in (p.chosen, p.rejected)]
    encoded = iter(encoder.encode_batch(answers))
    out: list[dict[str, Any] | Refused] = []
    for record in records:
        if not isinstance(record, Preference):
            out.append(Refused("wrong_format", "a conversation where a preference pair is wanted"))
            continue
        chosen, rejected = next(encoded), next(encoded)
        out.append(_pair(chosen, rejected, recipe))
    return out


def _pair(chosen: Encoded | Refused, rejected: Encoded | Refused, recipe: Recipe) -> dict[str, Any] | Refused:
    """`prompt_ids` and the two answers, each to the end of its stop token."""
    split = []
    for answer in (chosen, rejected):
        if isinstance(answer, Refused):
            return answer
        if long := _too_long(len(answer.input_ids), recipe):
            return long
        at = next(i for i, label in enumerate(answer.labels) if label != IGNORE)
        end = max(i for i, label in enumerate(answer.labels) if label != IGNORE) + 1
        split.append((answer.input_ids[:at], answer.input_ids[at:end]))
    (prompt, good), (other, bad) = split
    if prompt != other:
        return Refused("different_prompts", "the tokens before the answers differ")
    if good == bad:
        return Refused("equal_answers", "the same tokens once rendered")
    return {"prompt_ids": prompt, "chosen_ids": good, "rejected_ids": bad}


def _too_long(tokens: int, recipe: Recipe) -> Refused | None:
    if recipe.max_length is not None and tokens > recipe.max_length:
        return Refused("too_long", f"{tokens} tokens, max_length is {recipe.max_length}")
    return None


def encoder_for(recipe: Recipe) -> ChatEncoder:
    """Answers of a pair are its last turn alone; earlier assistant turns belong to the prompt."""
    return ChatEncoder(recipe.tokenizer, "last_assistant" if recipe.task == "preference" else recipe.train_on)


def encode_rows(
    rows: Iterator[tuple[int, dict[str, Any] | BadRow]],
    *,
    file: str,
    format: str,
    columns: dict[str, str],
    recipe: Recipe,
    encoder: ChatEncoder,
) -> Iterator[tuple[int, dict[str, Any] | LedgerEntry]]:
    """(row number, encoded row or ledger entry) for every row read, in order: nothing is lost on the way."""
    while batch := list(islice(rows, BATCH_ROWS)):
        records: list[Record | Refused] = []
        for _, row in batch:
            try:
                if isinstance(row, BadRow):
                    raise Rejected(row.reason, row.detail)
                records.append(normalise(rename(row, columns), format))
            except Rejected as error:
                records.append(Refused(error.reason, error.detail))
        encoded = iter(encode([r for r in records if not isinstance(r, Refused)], encoder, recipe))
        for (number, _), record in zip(batch, records, strict=True):
            result = record if isinstance(record, Refused) else next(encoded)
            if isinstance(result, Refused):
                yield number, LedgerEntry(file, number, result.reason, result.detail)
            else:
                yield number, result | {"source": file, "row": number}
