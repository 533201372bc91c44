"""How many bytes of text each token stands for, for tokenizers that lose nothing: then no offsets are needed.

Character offsets cost the tokenizer about a third of its speed. Of a byte-level BPE (GPT-2, Llama 3, Qwen) or a
SentencePiece BPE that only writes spaces as "▁" (Gemma), the running sum of the tokens' lengths says the same, and
that it adds up to the length of the text is checked for each text.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
Lengths = np.ndarray  # by token id; far below 0 for an id that no token has


@lru_cache(maxsize=8)
def token_lengths(tokenizer_json: str) -> Lengths | None:
    """Token id -> bytes of text, or None where the tokenizer is of no kind that is known to lose nothing."""
    parts = json.loads(tokenizer_json)
    added = parts.get("added_tokens", [])
    if parts["model"].get("type") != "BPE" or any(
        t["lstrip"] or t["rstrip"] or t["normalized"] for t in added if t["special"]
    ):
        return None  # such tokens take white space along
    if any(part.get("add_prefix_space") for part in _flat(parts.get("pre_tokenizer"), "pretokenizers")):
        return None
    kinds = {part["type"] for part in _flat(parts.get("pre_tokenizer"), "pretokenizers")}
    normalizers = _flat(parts.get("normalizer"), "normalizers")
    vocabulary: dict[str, int] = parts["model"]["vocab"]
    if (
        "ByteLevel" in kinds
        and kinds <= {"ByteLevel", "Split", "Digits"}
        and all(n["type"] == "NFC" for n in normalizers)
    ):
        lengths = {i: len(token) for token, i in vocabulary.items()}  # each character of a token is a byte
    elif kinds <= {"Split"} and [_spaces(n) for n in normalizers] == [True]:
        lengths = {i: 1 if BYTE.fullmatch(t) else len(t.replace("▁", " ").encode()) for t, i in vocabulary.items()}
    else:
        return None
    lengths |= {token["id"]: len(token["content"].encode()) for token in added}
    table = np.full(max(lengths, default=0) + 1, -(1 << 40), dtype=np.int64)
    table[list(lengths)] = list(lengths.values())
    return table


def _flat(part: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return [p for item in part[inside] for p in _flat(item, inside)] if part["type"] == "Sequence" else [part]


def _spaces(normalizer: dict[str, Any]) -> bool:
    return normalizer["type"] == "Replace" and normalizer["pattern"] == {"String": " "} and normalizer["content"] == "▁"


class TokenRange(NamedTuple):
    """The tokens `first:last` lie wholly in a span; `exact` says that no token reaches over its borders."""

    first: int
    last: int
    exact: bool


def token_ranges(
    texts: Sequence[str], ids: Sequence[list[int]], spans: Sequence[Sequence[tuple[int, int]]], table: Lengths
) -> list[list[TokenRange] | None]:
    """The tokens of each text's spans (in characters), or None for a text that its tokens do not add up to."""
    if not texts:
        return []
    stops = list(accumulate(map(len, ids)))  # in tokens, all texts one after the other
    ends = np.zeros(stops[-1] + 1, dtype=np.int64)  # in bytes
    np.cumsum(table[np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=stops[-1])], out=ends[1:])
    bytes_to = ends[stops].tolist()
    whole, edges, at = [], [], 0
    for text, places, end in zip(texts, spans, bytes_to, strict=True):
        plain = text.isascii()
        size = len(text) if plain else len(text.encode())
        whole.append(size == end - at and (plain or unicodedata.is_normalized("NFC", text)))
        for place in places:
            for edge in place:
                edges.append(at + (edge if plain else len(text[:edge].encode())))
        at = end
    found = np.searchsorted(ends, edges, side="right") - 1  # tokens that end at or before each edge
    exact = (ends[found] == edges).tolist()
    tokens = found.tolist()
    out: list[list[TokenRange] | None] = []
    edge, first_token = 0, 0
    for places, good, stop in zip(spans, whole, stops, strict=True):
        ranges = []
        for _ in places:
            first, last = tokens[edge] + (not exact[edge]) - first_token, tokens[edge + 1] - first_token
            ranges.append(TokenRange(first, max(first, last), exact[edge] and exact[edge + 1]))
            edge += 2
        out.append(ranges if good else None)
        first_token = stop
    return out
