"""From texts with spans to tokens with labels: each text tokenised once, a token trained where it lies wholly in a span."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from tokenizers import Encoding, Tokenizer

from stages.data.lengths import TokenRange, token_lengths, token_ranges
from stages.data.messages import THINK
from stages.data.spans import Refused

IGNORE = -100  # the label of a token that is not trained, as torch's cross-entropy has it
ControlTokens = Literal["text", "refuse", "allow"]


@dataclass(slots=True)  # not frozen: one is made for each row, and freezing triples what that costs
class Encoded:
    """A conversation as the model sees it. `spans` are (message index, start, end) in characters of `text`: what is trained."""

    text: str
    input_ids: list[int]
    labels: list[int]  # IGNORE where untrained
    spans: list[tuple[int, int, int]]
    weights: list[float] | None = None  # of each token's loss, where any is not 1
    stop: int | None = None  # the token that ends its last trained turn, where that is a control token
    conversation: int = 0  # which of the batch this is of
    warnings: frozenset[str] = frozenset()  # see WARNINGS in spans.py

    @property
    def trained(self) -> int:
        return len(self.labels) - self.labels.count(IGNORE)


@dataclass(frozen=True)
class TokenizerSpec:
    """All the encoder needs of a tokenizer, small enough to be sent to every task: no transformers, no files."""

    json: str  # tokenizer.json
    chat_template: str | None
    variables: dict[str, Any] = field(default_factory=dict)  # bos_token, eos_token, ... as templates use them
    eos_token: str | None = None

    def __hash__(self) -> int:
        return hash((self.json, self.chat_template))


@lru_cache(maxsize=8)
def load_tokenizer_json(json: str, control_as_text: bool = False) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = control_as_text
    return tokenizer


class Job(NamedTuple):
    """A text to be tokenised."""

    conversation: int
    text: str
    turns: list[tuple[int, int, int]]
    contents: list[tuple[int, int]]  # where no control token may come to be
    weights: dict[int, float]  # of messages, where not 1
    warnings: frozenset[str]


def tokenizer_spec(tokenizer: Any, chat_template: str | None = None) -> TokenizerSpec:
    """What the encoder needs of a transformers tokenizer.

    Raises:
        ValueError: the tokenizer has no Rust backend, so tokens cannot be traced back to characters.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("the tokenizer has no fast (Rust) version, which masks need: tokens without character offsets")
    template = chat_template or tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return TokenizerSpec(
        json=tokenizer.backend_tokenizer.to_str(),
        chat_template=template,
        variables={k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)},
        eos_token=tokenizer.eos_token,
    )


@contextmanager
def no_collection() -> Iterator[None]:
    """No search for cycles in what is made here: it is hundreds of thousands of lists of numbers, and there are none.

    Of the time of encoding that search is 7%, and it grows with what else there is in memory.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Tokeniser:
    """Args:
    control_tokens: what becomes of a control token that is spelled in a content (see ChatEncoder).
    stop_token: what ends an answer, where the user names it.
    """

    def __init__(self, spec: TokenizerSpec, control_tokens: ControlTokens, stop_token: str | None) -> None:
        self.spec, self.control_tokens = spec, control_tokens
        self.tokenizer = load_tokenizer_json(spec.json)
        self.lengths = token_lengths(spec.json)
        self.control = {t.content: i for i, t in self.tokenizer.get_added_tokens_decoder().items() if t.special}
        self._stops = set(self.control.values())
        if stop_token is not None and (named := self.tokenizer.token_to_id(stop_token)) is not None:
            self._stops.add(named)
        # Reasoning tags are what a data set means them to be, even where a tokenizer calls them special.
        guarded = [token for token in self.control if not THINK.fullmatch(token)]
        self.guarded = re.compile("|".join(map(re.escape, sorted(guarded, key=len, reverse=True))) or r"(?!)")
        self._prefixes = tuple({token[:2] for token in guarded})  # a quick look before the slow one

    def encode(self, texts: list[str]) -> list[Encoding]:
        """Without offsets, which cost a third of the speed, where the lengths of the tokens say the same."""
        if self.lengths is None:
            return self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)

    def label(self, jobs: list[Job], encodings: list[Encoding]) -> Iterator[Encoded | Refused]:
        ids = [encoding.ids for encoding in encodings]
        known: Sequence[list[TokenRange] | None] = [None] * len(jobs)
        if self.lengths is not None:
            spans = [[(start, end) for _, start, end in job.turns] for job in jobs]
            known = token_ranges([job.text for job in jobs], ids, spans, self.lengths)
        for job, encoding, row, ranges in zip(jobs, encodings, ids, known, strict=True):
            if self.control_tokens != "allow" and (places := self._spelled(job)):
                yield self._as_text(job, places)
                continue
            if ranges is None:
                if self.lengths is not None:
                    encoding = self.tokenizer.encode(job.text, add_special_tokens=False)
                ranges = self._ranges_by_offsets(job, encoding.offsets)
            yield self._labelled(job, row, ranges)

    def _spelled(self, job: Job) -> list[tuple[int, int]]:
        """Where contents spell control tokens."""
        found: list[tuple[int, int]] = []
        for start, end in job.contents:
            content = job.text[start:end]
            for prefix in self._prefixes:
                if prefix in content:
                    found += [match.span() for match in self.guarded.finditer(job.text, start, end)]
                    break
        return found

    def _as_text(self, job: Job, places: list[tuple[int, int]]) -> Encoded | Refused:
        """Tokenised with the control tokens at `places` as the plain text they are in.

        The text is cut at the template's own control tokens, and what stands between is tokenised with control tokens
        switched off. That this gives the tokens of the whole is seen on the same text with the places blotted out.
        """
        a, b = places[0]
        spelled = job.text[a:b]
        if self.control_tokens == "refuse":
            return Refused("control_token_in_content", f"{spelled!r} at character {a}")
        blotted = list(job.text)
        for start, end in places:
            blotted[start:end] = "x" * (end - start)
        masked = "".join(blotted)
        whole = self.tokenizer.encode(masked, add_special_tokens=False)
        special = set(self.control.values())
        own = [(i, *place) for i, place in zip(whole.ids, whole.offsets, strict=True) if i in special]
        for before in ("", "\n"):
            if self._in_pieces(masked, own, before) == (whole.ids, whole.offsets):
                ids, offsets = self._in_pieces(job.text, own, before)
                if self.tokenizer.decode(ids, skip_special_tokens=False).count(spelled) < job.text.count(spelled):
                    break  # the tokenizer cannot write it ("▁" is its space)
                job = job._replace(warnings=job.warnings | {"control_token_as_text"})
                return self._labelled(job, ids, self._ranges_by_offsets(job, offsets))
        return Refused("control_token_in_content", f"{spelled!r} at character {a} cannot be told from the real one")

    def _in_pieces(
        self, text: str, own: list[tuple[int, int, int]], before: str
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids, offsets) of a text whose control tokens are `own` (id, start, end), and nothing else.

        `before` is put before each piece and its tokens taken off again, for tokenizers that put a space before a text.
        """
        plain = load_tokenizer_json(self.spec.json, control_as_text=True)
        lead = len(plain.encode(before, add_special_tokens=False).ids) if before else 0
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        for token, start, end in [*own, (-1, len(text), len(text))]:
            if at < start:
                here = before if at else ""
                piece = plain.encode(here + text[at:start], add_special_tokens=False)
                skip = lead if here else 0
                ids += piece.ids[skip:]
                offsets += [(max(a - len(here), 0) + at, b - len(here) + at) for a, b in piece.offsets[skip:]]
            if token >= 0:
                ids.append(token)
                offsets.append((start, end))
            at = end
        return ids, offsets

    def _ranges_by_offsets(self, job: Job, offsets: list[tuple[int, int]]) -> list[TokenRange]:
        """The tokens of each turn by their characters. Tokens without any (a prefix that was added) are not trained.

        A stop token may take the white space after it along (`rstrip`, as Phi-3's do): it is trained all the same.
        """
        ranges, at = [], 0
        for _, start, end in job.turns:
            exact = True
            while at < len(offsets) and (offsets[at][0] < start or offsets[at][0] == offsets[at][1]):
                exact = exact and offsets[at][1] <= start
                at += 1
            first = at
            while at < len(offsets) and offsets[at][1] <= end and offsets[at][0] < end:
                at += 1
            if at < len(offsets) and offsets[at][0] < end:
                a, b = offsets[at]
                if job.text[a:end].strip() in self.control and job.text[end:b].isspace():
                    at += 1
                else:
                    exact = False
            ranges.append(TokenRange(first, at, exact))
        return ranges

    def _labelled(self, job: Job, ids: list[int], ranges: list[TokenRange]) -> Encoded | Refused:
        labels = [IGNORE] * len(ids)
        weights: list[float] | None = [1.0] * len(ids) if job.weights else None
        some, exact = False, True
        for (message, _, _), (first, last, clean) in zip(job.turns, ranges, strict=True):
            exact = exact and clean
            if first < last:
                some = True
                labels[first:last] = ids[first:last]
                if weights is not None and message in job.weights:
                    weights[first:last] = [job.weights[message]] * (last - first)
        if not some:
            return Refused("no_trained_token", f"none of {len(ids)} tokens")
        warnings = job.warnings
        if not exact:
            warnings |= {"straddling_token"}
        _, start, end = job.turns[-1]
        whole = start == 0 and end == len(job.text)  # plain language modelling
        eos = self.spec.eos_token
        if eos and not whole and "no_stop_token" not in warnings and not job.text.endswith(eos, 0, end):
            warnings |= {"eos_is_not_stop"}
        first, last, _ = ranges[-1]
        ended = first < last and ids[last - 1] in self._stops and not whole and "no_stop_token" not in warnings
        stop = ids[last - 1] if ended else None
        return Encoded(job.text, ids, labels, job.turns, weights, stop, job.conversation, warnings)
