"""Rows as training has them: every token with its text, whether it is trained, and who speaks it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from stages.data.chat import IGNORE, ChatEncoder, Encoded, Refused
from stages.data.encode import Recipe, encode_rows
from stages.data.lengths import token_lengths
from stages.data.records import Message
from stages.data.source import BadRow, DataSource
from stages.data.spans import shapes
from stages.data.template import Tools

ROLES = ("system", "developer", "user", "assistant", "tool", "text", "template")  # in the order they are shown
# What is not seen, or would move the terminal's cursor or the order of the letters.
INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """The text with the characters that cannot be seen spelled out."""
    return INVISIBLE.sub(lambda match: ascii(match.group())[1:-1], text)


@dataclass(frozen=True, slots=True)
class Token:
    id: int
    start: int  # of its characters in the text; -1 where they are not known
    end: int
    trained: bool
    special: bool  # a control token


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one speaker, trained or not; a control token is a piece of its own."""

    text: str
    role: str
    trained: bool
    special: bool
    at: int  # its first character


@dataclass(frozen=True)
class Example:
    """What a row became, or one of the two answers of a pair with the prompt before it. Cut rows are shown as cut."""

    source: str
    row: int
    text: str
    who: list[str]  # of each character: who speaks it
    marked: list[bool]  # of each character: whether it is trained
    tokens: list[Token]
    trained_tokens: int
    answer: str = ""  # chosen, rejected; wanted, unwanted
    margin: float | None = None  # how much better the chosen answer is said to be
    answer_at: int | None = None  # where the answer begins
    cut: tuple[int, int] = (0, 0)  # tokens that are left out at the beginning and at the end
    weights: list[float] = field(default_factory=list)  # of the loss, where they are not all 1
    expected: str | None = None
    copies: int = 1
    warnings: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        segments = [
            {"text": piece, "trained": trained, "role": role}
            for piece, trained, role in _runs(self.text, self.marked, self.who)
        ]
        row: dict[str, Any] = {"source": self.source, "row": self.row, "text": self.text, "segments": segments}
        row |= {"tokens": len(self.tokens), "trained_tokens": self.trained_tokens}
        more = {"answer": self.answer, "expected": self.expected, "weights": self.weights, "warnings": self.warnings}
        cut = {"cut": {"beginning": self.cut[0], "end": self.cut[1]}} if any(self.cut) else {}
        copies = {"copies": self.copies} if self.copies != 1 else {}
        margin = {"margin": self.margin} if self.margin is not None else {}
        return row | {key: value for key, value in more.items() if value} | margin | cut | copies

    def pieces(self, start: int = 0, end: int | None = None) -> list[Piece]:
        """The text from `start` to `end`, cut where the speaker changes, where training does, and at control tokens."""
        end = len(self.text) if end is None else end
        control = [0] * len(self.text)
        for number, token in enumerate(self.tokens, 1):
            if token.special and token.start >= 0:
                control[token.start : token.end] = [number] * (token.end - token.start)
        out, at = [], start
        keys = zip(self.who[start:end], self.marked[start:end], control[start:end], strict=True)
        for (role, trained, number), run in groupby(keys):
            size = sum(1 for _ in run)
            out.append(Piece(self.text[at : at + size], role, trained, number > 0, at))
            at += size
        return out

    def borders(self) -> dict[int, list[int]]:
        """First character -> the ids of the tokens that begin there; several where they share a character."""
        out: dict[int, list[int]] = {}
        for token in self.tokens:
            if token.start >= 0:
                out.setdefault(token.start, []).append(token.id)
        return out


def is_pair(row: Sequence[Example]) -> bool:
    """Whether these are two answers to one prompt."""
    return len(row) == 2 and all(example.answer for example in row)


def _runs(text: str, marked: list[bool], who: list[str]) -> Iterator[tuple[str, bool, str]]:
    at = 0
    for (trained, role), run in groupby(zip(marked, who, strict=True)):
        size = sum(1 for _ in run)
        yield text[at : at + size], trained, role
        at += size


# ------------------------------------------------------------------------------------------------ from rows to examples


@dataclass(frozen=True, slots=True)
class Seen:
    """A conversation (or a plain text, then without messages) and what the encoder made of it."""

    encoded: Encoded
    messages: Sequence[Message] | None = None
    tools: Tools = None


class Watched(ChatEncoder):
    """An encoder that remembers what it encoded. Shares everything with the one it is made of."""

    def __init__(self, encoder: ChatEncoder) -> None:
        vars(self).update(vars(encoder))
        self.seen: list[Seen] = []
        self.prompts: list[Seen] = []
        self.control_ids = {i for i, t in self.tokenizer.get_added_tokens_decoder().items() if t.special}

    def encode_each(
        self, conversations: Sequence[Sequence[Message]], tools: Tools | Sequence[Tools] = None
    ) -> list[list[Encoded | Refused]]:
        results = super().encode_each(conversations, tools)
        each: Sequence[Any] = tools or [None] * len(conversations)
        for messages, offered, encoded in zip(conversations, each, results, strict=True):
            self.seen += [Seen(result, messages, offered) for result in encoded if isinstance(result, Encoded)]
        return results

    def encode_text(self, texts: Sequence[str]) -> list[Encoded | Refused]:
        results = super().encode_text(texts)
        self.seen += [Seen(result) for result in results if isinstance(result, Encoded)]
        return results

    def encode_prompt(self, messages: Sequence[Message], tools: Tools = None) -> Encoded | Refused:
        made = super().encode_prompt(messages, tools)
        if isinstance(made, Encoded):
            untrained = Encoded(made.text, made.input_ids, [IGNORE] * len(made.input_ids), [], warnings=made.warnings)
            self.prompts.append(Seen(untrained, messages, tools))
        return made


def examples_of(
    row: dict[str, Any] | BadRow,
    number: int,
    *,
    file: str,
    format: str,
    source: DataSource,
    recipe: Recipe,
    encoder: Watched,
) -> list[Example]:
    """What a row becomes; nothing where it does not reach training."""
    encoder.seen.clear()
    encoder.prompts.clear()
    outcome = next(
        encode_rows(iter([(number, row)]), file=file, format=format, source=source, recipe=recipe, encoder=encoder)
    )
    about: dict[str, Any] = {"copies": outcome.copies, "warnings": sorted(outcome.warnings)}
    seen = encoder.seen
    if not outcome.examples:
        return []
    first = outcome.examples[0]
    if "input_ids" in first:
        seen = seen or [Seen(Encoded("", row["input_ids"], row["labels"], [])) for row in outcome.examples]
        return [
            _of_sequence(one, made, file, number, encoder, about)
            for one, made in zip(seen, outcome.examples, strict=True)
        ]
    if "chosen_ids" in first:
        answers = [("chosen", first["chosen_ids"]), ("rejected", first["rejected_ids"])]
        about |= {"margin": first["margin"]}
    elif "completion_ids" in first:
        answers = [("wanted" if made["label"] else "unwanted", made["completion_ids"]) for made in outcome.examples]
    else:
        made = {"input_ids": first["prompt_ids"], "labels": [IGNORE] * len(first["prompt_ids"])} | first
        return [_of_sequence(encoder.prompts[0], made, file, number, encoder, about)]
    return [
        _of_answer(one, first["prompt_ids"], answer, name, file, number, encoder, about)
        for one, (name, answer) in zip(seen, answers, strict=True)
    ]


def _of_sequence(
    seen: Seen, made: dict[str, Any], file: str, row: int, encoder: Watched, about: dict[str, Any]
) -> Example:
    whole, ids = seen.encoded.input_ids, made["input_ids"]
    kept = places_kept(whole, ids)
    weights = sorted(
        {w for w, label in zip(made.get("weights") or [], made["labels"], strict=False) if label != IGNORE}
    )
    about = about | {"weights": [] if weights == [1.0] else weights, "expected": made.get("expected")}
    cut = (0, len(whole) - len(ids)) if kept == list(range(len(ids))) else (len(whole) - len(ids), 0)
    return _example(seen, kept, [label != IGNORE for label in made["labels"]], file, row, encoder, about | {"cut": cut})


def _of_answer(
    seen: Seen,
    prompt: list[int],
    answer: list[int],
    name: str,
    file: str,
    row: int,
    encoder: Watched,
    about: dict[str, Any],
) -> Example:
    whole = seen.encoded.input_ids
    trained = [i for i, label in enumerate(seen.encoded.labels) if label != IGNORE]
    first, size = trained[0], trained[-1] + 1 - trained[0]
    kept = [*places_kept(whole[:first], prompt), *range(first, first + len(answer))]
    cut = (first - len(prompt), size - len(answer))
    marks = [False] * len(prompt) + [True] * len(answer)
    return _example(seen, kept, marks, file, row, encoder, about | {"answer": name, "cut": cut}, prompt=len(prompt))


def places_kept(whole: list[int], part: list[int]) -> list[int]:
    """Which tokens a cut has left: the first ones, the last ones, or the very first and the last ones."""
    size = len(part)
    if part == whole[:size]:
        return list(range(size))
    if part == whole[len(whole) - size :]:
        return list(range(len(whole) - size, len(whole)))
    return [0, *range(len(whole) - size + 1, len(whole))]


def _example(
    seen: Seen, kept: list[int], trained: list[bool], file: str, row: int, encoder: Watched, about: dict[str, Any],
    prompt: int | None = None,
) -> Example:  # fmt: skip
    """The example of the tokens `kept`, of which the first `prompt` stand before an answer."""
    text, ids = seen.encoded.text, seen.encoded.input_ids
    if text:
        places, who = offsets(encoder, text, ids), speakers(encoder, seen)
    else:  # a row of tokens
        text, places = spelled(encoder, ids)
        who = ["text"] * len(text)
    if places is None:
        tokens = [
            Token(ids[i], -1, -1, mark, ids[i] in encoder.control_ids) for i, mark in zip(kept, trained, strict=True)
        ]
        marked = _painted(len(text), [(start, end) for _, start, end in seen.encoded.spans])
        at = None if prompt is None or True not in marked else marked.index(True)
        return Example(file, row, text, who, marked, tokens, sum(trained), answer_at=at, **about)
    ranges, whole = [(0, len(text))], len(kept) == len(ids)
    if not whole:
        runs = [[i for _, i in run] for _, run in groupby(enumerate(kept), lambda pair: pair[1] - pair[0])]
        ranges = [(places[run[0]][0], places[run[-1]][1]) for run in runs]

    def moved(at: int) -> int:
        return at if whole else sum(min(at, end) - start for start, end in ranges if start < at)

    tokens = [
        Token(ids[i], moved(places[i][0]), moved(places[i][1]), mark, ids[i] in encoder.control_ids)
        for i, mark in zip(kept, trained, strict=True)
    ]
    text = "".join(text[a:b] for a, b in ranges)
    who = [name for a, b in ranges for name in who[a:b]]
    marked = _painted(len(text), [(token.start, token.end) for token in tokens if token.trained])
    at = None if prompt is None else tokens[prompt].start
    return Example(file, row, text, who, marked, tokens, sum(trained), answer_at=at, **about)


def _painted(size: int, spans: Sequence[tuple[int, int]]) -> list[bool]:
    out = [False] * size
    for start, end in spans:
        out[start:end] = [True] * (end - start)
    return out


# ------------------------------------------------------------------------------------------------ whose text is it


def speakers(encoder: ChatEncoder, seen: Seen) -> list[str]:
    """Who speaks each character; what no message wrote is the template's."""
    text, messages = seen.encoded.text, seen.messages
    out = ["template"] * len(text)
    if messages is None:
        size = len(text.removesuffix(encoder.spec.eos_token or ""))
        return ["text"] * size + out[size:]
    for candidate in _as_rendered(messages, seen.encoded):
        try:
            fits = text.startswith(encoder.render(candidate, seen.tools) or "\0")
            regions = encoder.speakers(candidate, seen.tools) if fits else []
        except Exception:  # the template's, on a shape that it cannot read
            continue
        if fits:
            for start, end, role in regions:
                out[start:end] = [role] * (end - start)
            break
    if encoder.train_on != "all":  # an end mark that the template writes later is still the answer's
        for message, start, end in seen.encoded.spans:
            out[start:end] = [messages[message]["role"]] * (end - start)
    return out


def _as_rendered(messages: Sequence[Message], encoded: Encoded) -> Iterator[Sequence[Message]]:
    """What the encoder may have rendered: the conversation, or the part of it up to the turn that is trained, reshaped."""
    yield from shapes(messages)
    if encoded.spans and (upto := encoded.spans[-1][0] + 1) < len(messages):
        yield from shapes(messages[:upto])


# ------------------------------------------------------------------------------------------------ which text is a token's


def offsets(encoder: ChatEncoder, text: str, ids: list[int]) -> list[tuple[int, int]] | None:
    """Each token's characters; None where they cannot be known (see `control_tokens: text`)."""
    encoding = encoder.tokenizer.encode(text, add_special_tokens=False)
    if encoding.ids == ids:
        return _without_gaps(encoding.offsets)
    table = token_lengths(encoder.spec.json)
    return None if table is None else _by_lengths(text, ids, table)


def _without_gaps(offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """White space that a tokenizer leaves out of its offsets belongs to the token after it."""
    out, at = [], 0
    for start, end in offsets:
        out.append((min(at, start), end))
        at = max(at, end)
    return out


def _by_lengths(text: str, ids: list[int], table: np.ndarray) -> list[tuple[int, int]] | None:
    ends = np.cumsum(table[np.array(ids, dtype=np.int64)])
    characters = np.concatenate([[0], np.cumsum([len(character.encode()) for character in text])])
    if not len(ends) or ends[-1] != characters[-1]:
        return None
    starts = np.concatenate([[0], ends[:-1]])
    first = np.searchsorted(characters, starts, side="right") - 1
    last = np.searchsorted(characters, ends, side="left")
    return list(zip(first.tolist(), last.tolist(), strict=True))


def spelled(encoder: ChatEncoder, ids: list[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of a row that came as tokens."""
    text, places = "", []
    for token in ids:
        part = encoder.tokenizer.decode([token], skip_special_tokens=False)
        places.append((len(text), len(text) + len(part)))
        text += part
    return text, places
