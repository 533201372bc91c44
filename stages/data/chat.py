"""Which tokens are trained: a conversation rendered with the model's chat template, masked, and tokenised once.

What is trained of an assistant turn is what the model has to write there: its content as the template renders it (reasoning
and tool calls included) and its stop token, never the header and never the white space after the stop token. Where that
stands is derived from the template (spans.py), right or refused with a reason, never guessed at.

Deriving costs a dozen renderings, so it is done once for each *shape* of conversation (the roles of its messages) on a
probe, which gives a layout: the texts between the contents, and which of them are trained. A conversation whose one rendering
equals its layout filled with its contents has its spans from there. One that does not (tool calls, reasoning, a
template that looks into contents) is derived itself.
"""

from __future__ import annotations

import datetime
import gc
import re
from collections import deque
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from tokenizers import Encoding, Tokenizer

from stages.data.lengths import TokenRange, token_lengths, token_ranges
from stages.data.records import Message
from stages.data.spans import THINK, Refused, SpanFinder, shapes
from stages.data.template import ChatTemplate, MarksMoved, Tools

IGNORE = -100  # the label of a token that is not trained, as torch's cross-entropy has it
TrainOn = Literal["assistant", "last_assistant", "completion", "all"]
History = Literal["refuse", "per_turn", "last_turn"]
ControlTokens = Literal["text", "refuse", "allow"]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# ChatML with tools, as Nous Hermes and Qwen write them, and reasoning.
HERMES = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "You may call these functions:\n<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools>\n"
    "For each call write its name and arguments as JSON within <tool_call></tool_call>.<|im_end|>\n{% endif %}"
    "{% for message in messages %}{% if not (loop.first and tools and message.role == 'system') %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{% if message.content or not loop.first %}\n{% endif %}<tool_call>\n"
    '{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BUILT_IN = {"chatml": CHATML, "hermes": HERMES}
SHAPES = 4096  # layouts that are kept
AHEAD = 2
BATCH = 256  # conversations that are rendered while the ones before them are being tokenised


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


@dataclass(frozen=True, slots=True)
class Layout:
    """A shape's text: `between[0] content between[1] content ...`, the contents in order, each stripped as `strip` says."""

    between: list[str]
    strip: list[str]  # of each content: a method of str, or ""
    turns: list[tuple[int, int, int]]  # (message, characters of the text before its content, characters after it)
    warnings: frozenset[str]
    rewritten: bool

    def fits(self, messages: Sequence[Message]) -> bool:
        """Whether spans of the probe are those of these messages, should the text be.

        Where the generation prompt opens something that the probe had not ("<think>"), an answer may begin with just that,
        and where nothing else bounds an answer its outer white space has to be looked at.
        """
        if self.rewritten and any("<" in m["content"] for m in messages):
            return False  # what is rewritten may depend on a block of reasoning
        if not self.warnings & {"prompt_differs", "no_stop_token"}:
            return True
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        return not any(a != a.strip() or a.startswith(("<", "[")) for a in answers)


class _Spans(NamedTuple):
    """A conversation's text, its assistant turns (message, start, end), and where its contents stand."""

    text: str
    turns: list[tuple[int, int, int]]
    contents: list[tuple[int, int]]
    warnings: frozenset[str]
    rewritten: bool


class _Job(NamedTuple):
    """A text to be tokenised."""

    conversation: int
    text: str
    turns: list[tuple[int, int, int]]
    contents: list[tuple[int, int]]  # where no control token may come to be
    weights: dict[int, float]  # of messages, where not 1
    warnings: frozenset[str]


class ChatEncoder:
    """Encodes conversations for one tokenizer and template.

    Args:
        tokenizer: a `TokenizerSpec`, or a fast transformers tokenizer.
        train_on: `assistant` trains every assistant turn and its stop token, `last_assistant` the last of them,
            `completion` those after the last user message, `all` every token (plain language modelling). A message with
            `train: false` is left out, one with `weight: 0.3` counts as much.
        history: what to do where the template renders an earlier turn differently from how the model wrote it (drops its
            reasoning): `refuse` it where something is lost, train `per_turn` (one example for each assistant turn, after
            exactly the text it is generated from), or train the `last_turn` only.
        stop_token: what ends an answer, for templates that write nothing there.
        control_tokens: what becomes of a control token that is spelled in a content: plain `text` tokens, `refuse` the
            conversation, or `allow` it to be the control token.
        reshape: give the template tool calls and contents in another shape (arguments as a dict or as text, content as
            parts) where it does not render them as they are. The text is then not that of `apply_chat_template`.
        date: what templates that print today's date print; today if absent.
        parallel: use all cores; else the encoder is one of many that share them.

    Raises:
        ValueError: there is no chat template, or it cannot be compiled, or the tokenizer is not a fast one.
    """

    def __init__(
        self,
        tokenizer: Any,
        train_on: TrainOn = "assistant",
        history: History = "refuse",
        *,
        stop_token: str | None = None,
        control_tokens: ControlTokens = "text",
        reshape: bool = False,
        date: datetime.datetime | None = None,
        parallel: bool = True,
    ) -> None:
        spec = tokenizer if isinstance(tokenizer, TokenizerSpec) else tokenizer_spec(tokenizer)
        if spec.chat_template is None:
            raise ValueError("the tokenizer has no chat template")
        self.spec, self.train_on, self.history, self.control_tokens = spec, train_on, history, control_tokens
        self.parallel = parallel
        self.tokenizer = load_tokenizer_json(spec.json)
        self.template = ChatTemplate(spec.chat_template, spec.variables, date)
        self._control_ids = {t.content: i for i, t in self.tokenizer.get_added_tokens_decoder().items() if t.special}
        self.control = list(self._control_ids)
        self._stops = set(self._control_ids.values())
        if stop_token is not None and (named := self.tokenizer.token_to_id(stop_token)) is not None:
            self._stops.add(named)
        self.finder = SpanFinder(self.template, self.control, spec.eos_token, stop_token, reshape)
        self._lengths = token_lengths(spec.json)
        self._layouts: dict[tuple[str, ...], Layout | None] = {}
        # Reasoning tags are what a data set means them to be, even where a tokenizer calls them special.
        guarded = [token for token in self.control if not THINK.fullmatch(token)]
        self._guarded = re.compile("|".join(map(re.escape, sorted(guarded, key=len, reverse=True))) or r"(?!)")
        self._prefixes = tuple({token[:2] for token in guarded})  # a quick look before the slow one

    # ------------------------------------------------------------------------------ conversations

    def render(self, messages: Sequence[Message], tools: Tools = None, add_generation_prompt: bool = False) -> str:
        """The text of a conversation; raises what the template raises."""
        return self.template.render([_bare(m) for m in messages], tools, add_generation_prompt)

    def prompt(self, messages: Sequence[Message], tools: Tools = None) -> str:
        """The text after which the assistant's answer to `messages` stands."""
        return self.render(messages, tools, add_generation_prompt=True)

    def encode_batch(
        self, conversations: Sequence[Sequence[Message]], tools: Tools | Sequence[Tools] = None
    ) -> list[Encoded | Refused]:
        """Encode conversations, in order; with `history="per_turn"` one may give several, told by `Encoded.conversation`.

        Args:
            tools: the JSON schemas of the tools of all conversations, or a list with those of each.
        """
        return [result for results in self.encode_each(conversations, tools) for result in results]

    def encode_each(
        self, conversations: Sequence[Sequence[Message]], tools: Tools | Sequence[Tools] = None
    ) -> list[list[Encoded | Refused]]:
        """The examples of each conversation: one, or with `history="per_turn"` several, or the reason for none."""
        each = _tools_of_each(tools, len(conversations))
        out: list[list[Encoded | Refused]] = [[] for _ in conversations]
        with no_collection():
            for jobs, encodings in self._tokenised(self._batches(conversations, each, out)):
                for job, result in zip(jobs, self._label(jobs, encodings), strict=True):
                    out[job.conversation].append(result)
        return out

    def _batches(
        self, conversations: Sequence[Sequence[Message]], tools: Sequence[Tools], out: list[list[Encoded | Refused]]
    ) -> Iterator[list[_Job]]:
        """What is to be tokenised, some conversations at a time; what is refused goes into `out` at once."""
        for start in range(0, len(conversations), BATCH):
            jobs: list[_Job] = []
            for i in range(start, min(start + BATCH, len(conversations))):
                for job in self._jobs(i, conversations[i], tools[i]):
                    if isinstance(job, Refused):
                        out[i].append(job)
                    else:
                        jobs.append(job)
            yield jobs

    def _tokenised(self, batches: Iterator[list[_Job]]) -> Iterator[tuple[list[_Job], list[Encoding]]]:
        """Each batch with its tokens. Where there are cores to spare, Rust has the next ones while this one is looked at:
        two at a time, since one that is done waits for its turn to say so."""
        if not self.parallel:
            yield from ((jobs, self._encode([job.text for job in jobs])) for jobs in batches)
            return
        waiting: deque[tuple[list[_Job], Future[list[Encoding]]]] = deque()
        with ThreadPoolExecutor(AHEAD) as threads:
            for jobs in batches:
                waiting.append((jobs, threads.submit(self._encode, [job.text for job in jobs])))
                if len(waiting) > AHEAD:
                    jobs, encodings = waiting.popleft()
                    yield jobs, encodings.result()
            for jobs, encodings in waiting:
                yield jobs, encodings.result()

    def encode_prompt(self, messages: Sequence[Message], tools: Tools = None) -> Encoded | Refused:
        """The text after which an answer is to be sampled, tokenised with the same care as a conversation."""
        given = [_bare(message) for message in messages]
        why = Refused("template_error", "")
        for shaped in shapes(given) if self.finder.reshape else [given]:
            try:
                text = self.template.render(shaped, tools, add_generation_prompt=True)
            except Exception as error:  # whatever a template raises refuses the prompt
                why = Refused("template_error", str(error) or type(error).__name__)
                continue
            lost = next((t for m in given for t in _strings(m.get("content")) if t.strip() not in text), None)
            if lost is None:
                break
            why = Refused("content_dropped", f"{lost.strip()[:80]!r} is not in the text of the prompt")
        else:
            return why
        job = _Job(0, text, [(0, 0, len(text))], self._spelled_in(text, given), {}, frozenset())
        return next(self._label([job], self._encode([text])))

    def _spelled_in(self, text: str, messages: Sequence[Message]) -> list[tuple[int, int]]:
        """Where contents that spell control tokens stand in a text that has them in order."""
        places, at = [], 0
        for message in messages:
            for content in _strings(message.get("content")):
                core = content.strip()
                if self._guarded.search(core) and (start := text.find(core, at)) >= 0:
                    places.append((start, start + len(core)))
                    at = start + len(core)
        return places

    def encode_text(self, texts: Sequence[str]) -> list[Encoded | Refused]:
        """Plain text for language modelling: every token is trained, and the end-of-text token after it."""
        jobs = []
        for i, text in enumerate(texts):
            whole = text + (self.spec.eos_token or "")
            jobs.append(_Job(i, whole, [(0, 0, len(whole))], [(0, len(text))], {}, frozenset()))
        encodings = self._encode([job.text for job in jobs])
        return list(self._label(jobs, encodings))

    def speakers(self, messages: Sequence[Message], tools: Tools = None) -> list[tuple[int, int, str]]:
        """(start, end, role) of what the template writes for each message; what stands between is the template's own."""
        bare = [_bare(m) for m in messages]
        text = self.template.render(bare, tools)
        try:
            segments = self.template.segments(bare, text, tools).segments
        except MarksMoved:
            return []
        return sorted((start, end, bare[i]["role"]) for i, (start, end) in segments.items())

    # ------------------------------------------------------------------------------ from messages to spans

    def _jobs(self, i: int, messages: Sequence[Message], tools: Tools) -> Iterator[_Job | Refused]:
        """What is to be tokenised of a conversation."""
        weights: dict[int, float] = {}
        shape = _shape(messages)
        if shape is None:
            if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages):
                yield Refused("malformed_message", "a message is a dict with a role")
                return
            for n, message in enumerate(messages):
                weight = message.get("weight", 1.0)
                if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight >= 0:
                    yield Refused("malformed_message", f"message {n} has the weight {weight!r:.40}")
                    return
                if message.get("train") is False or weight != 1.0:
                    weights[n] = 0.0 if message.get("train") is False else float(weight)
            if weights and self.train_on == "all":
                yield Refused("weight_not_used", "train_on: all trains every token, whatever messages say")
                return
            messages = [_bare(message) for message in messages]
            shape = _shape(messages)
        chosen = self._chosen(messages, weights)
        if self.train_on != "all" and not chosen:
            yield Refused("no_assistant_turn", f"none of {len(messages)} messages is to be trained")
            return
        found = self._spans(messages, tools, shape)
        if self.train_on == "all":
            yield found if isinstance(found, Refused) else self._whole(i, found)
            return
        lost = isinstance(found, Refused) and found.reason == "history_rewritten"
        if lost and chosen == [len(messages) - 1]:  # no earlier turn is trained: they may be abridged
            found, lost = self._derived(messages, tools, only=chosen[0]), False
        if self.history != "refuse" and (lost or (isinstance(found, _Spans) and found.rewritten)):
            if self.history == "last_turn":
                chosen = chosen[-1:]
            if chosen:
                for n in chosen:
                    alone = self._derived(messages[: n + 1], tools, only=n)
                    yield alone if isinstance(alone, Refused) else self._job(i, alone, [n], weights)
                return
        yield found if isinstance(found, Refused) else self._job(i, found, chosen, weights)

    def _chosen(self, messages: Sequence[Message], weights: dict[int, float]) -> list[int]:
        """The assistant turns that are trained."""
        turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        if self.train_on == "last_assistant":
            turns = turns[-1:]
        elif self.train_on == "completion":
            last_user = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=-1)
            turns = [n for n in turns if n > last_user]
        return [n for n in turns if weights.get(n, 1.0) > 0] if weights else turns

    def _job(self, i: int, found: _Spans, chosen: list[int], weights: dict[int, float]) -> _Job:
        turns = found.turns
        if len(turns) != len(chosen):
            turns = [turn for turn in turns if turn[0] in chosen]
        return _Job(i, found.text, turns, found.contents, weights, found.warnings)

    def _whole(self, i: int, found: _Spans) -> _Job:
        last = found.turns[-1][0] if found.turns else 0
        return _Job(i, found.text, [(last, 0, len(found.text))], found.contents, {}, found.warnings)

    def _spans(self, messages: Sequence[Message], tools: Tools, shape: tuple[str, ...] | None) -> _Spans | Refused:
        """Text and spans: from the layout of the conversation's shape, or derived."""
        if not tools and shape is not None:
            layout = self._layout(shape)
            if isinstance(layout, Layout):
                try:
                    text = self.template.render_plain(messages)
                except Exception as error:  # whatever a template raises refuses the row
                    return Refused("template_error", str(error) or type(error).__name__)
                if layout.fits(messages) and (found := _fill(layout, messages, text)):
                    return found
        return self._derived(messages, tools)

    def _derived(self, messages: Sequence[Message], tools: Tools, only: int | None = None) -> _Spans | Refused:
        found = self.finder.find(messages, tools, only)
        if isinstance(found, Refused):
            return found
        if self.control_tokens != "allow":
            placed = {n for n, (start, _) in found.contents.items() if start >= 0}
            for text in _strings(
                [tools, *(m if n not in placed else {**m, "content": ""} for n, m in enumerate(messages))]
            ):
                if token := self._guarded.search(text):
                    return Refused("control_token_in_content", f"{token.group()!r} in {text[:80]!r}")
        turns = [(turn.message, turn.start, turn.end) for turn in found.turns]
        contents = [place for place in found.contents.values() if place[0] >= 0]
        return _Spans(found.text, turns, contents, found.warnings, found.rewritten is not None)

    def _layout(self, shape: tuple[str, ...]) -> Layout | None:
        if shape not in self._layouts:
            if len(self._layouts) >= SHAPES:
                self._layouts.clear()
            self._layouts[shape] = self._make_layout(shape)
        return self._layouts[shape]

    def _make_layout(self, shape: tuple[str, ...]) -> Layout | None:
        """The layout of conversations of these roles, or None where the template has no such thing for them."""
        probe = [{"role": role, "content": f"Probe{n}x"} for n, role in enumerate(shape)]
        found = self.finder.find(probe, None)
        if isinstance(found, Refused) or "reshaped" in found.warnings:
            return None
        if sorted(found.contents) != list(range(len(shape))):
            return None
        places = [found.contents[n] for n in range(len(shape))]
        if places != sorted(places):
            return None
        edges = [0, *(edge for place in places for edge in place), len(found.text)]
        between = [found.text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]
        turns = [(t.message, places[t.message][0] - t.start, t.end - places[t.message][1]) for t in found.turns]
        if any(before < 0 or after < 0 for _, before, after in turns):
            return None
        strip = self._stripping([{**m, "content": f" \n {m['content']} \n "} for m in probe], between)
        if strip is None:
            return None
        return Layout(between, strip, turns, found.warnings, found.rewritten is not None)

    def _stripping(self, probe: list[Message], between: list[str]) -> list[str] | None:
        """How the template treats the white space around each content."""
        try:
            text = self.template.render(probe)
        except Exception:  # then nothing with such white space can be laid out either
            return None
        out, at = [], len(between[0])
        for message, after in zip(probe, between[1:], strict=True):
            for how in ("", "strip", "lstrip", "rstrip"):
                content = _stripped(message["content"], how)
                if text.startswith(content + after, at):
                    out.append(how)
                    at += len(content) + len(after)
                    break
            else:
                return None
        return out

    # ------------------------------------------------------------------------------ from spans to tokens

    def _encode(self, texts: list[str]) -> list[Encoding]:
        """Without offsets, which cost a third of the speed, where the lengths of the tokens say the same."""
        if self._lengths is None:
            return self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)

    def _label(self, jobs: list[_Job], encodings: list[Encoding]) -> Iterator[Encoded | Refused]:
        ids = [encoding.ids for encoding in encodings]
        known: Sequence[list[TokenRange] | None] = [None] * len(jobs)
        if self._lengths is not None:
            spans = [[(start, end) for _, start, end in job.turns] for job in jobs]
            known = token_ranges([job.text for job in jobs], ids, spans, self._lengths)
        for job, encoding, row, ranges in zip(jobs, encodings, ids, known, strict=True):
            if self.control_tokens != "allow" and (places := self._spelled(job)):
                yield self._as_text(job, places)
                continue
            if ranges is None:
                if self._lengths is not None:
                    encoding = self.tokenizer.encode(job.text, add_special_tokens=False)
                ranges = self._ranges_by_offsets(job, encoding.offsets)
            yield _labelled(job, row, ranges, self.spec.eos_token, self._stops)

    def _spelled(self, job: _Job) -> list[tuple[int, int]]:
        """Where contents spell control tokens."""
        found: list[tuple[int, int]] = []
        for start, end in job.contents:
            content = job.text[start:end]
            for prefix in self._prefixes:
                if prefix in content:
                    found += [match.span() for match in self._guarded.finditer(job.text, start, end)]
                    break
        return found

    def _as_text(self, job: _Job, places: list[tuple[int, int]]) -> Encoded | Refused:
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
        special = set(self._control_ids.values())
        own = [(i, *place) for i, place in zip(whole.ids, whole.offsets, strict=True) if i in special]
        for before in ("", "\n"):
            if self._in_pieces(masked, own, before) == (whole.ids, whole.offsets):
                ids, offsets = self._in_pieces(job.text, own, before)
                if self.tokenizer.decode(ids, skip_special_tokens=False).count(spelled) < job.text.count(spelled):
                    break  # the tokenizer cannot write it ("▁" is its space)
                job = job._replace(warnings=job.warnings | {"control_token_as_text"})
                return _labelled(job, ids, self._ranges_by_offsets(job, offsets), self.spec.eos_token, self._stops)
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

    def _ranges_by_offsets(self, job: _Job, offsets: list[tuple[int, int]]) -> list[TokenRange]:
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
                if job.text[a:end].strip() in self._control_ids and job.text[end:b].isspace():
                    at += 1
                else:
                    exact = False
            ranges.append(TokenRange(first, at, exact))
        return ranges


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


def _bare(message: Message) -> Message:
    """The message as the template sees it: without what only we read, and, as transformers has it, without nulls."""
    return {k: v for k, v in message.items() if v is not None and k not in ("train", "weight")}


def _tools_of_each(tools: Tools | Sequence[Tools], count: int) -> Sequence[Tools]:
    if tools and not isinstance(tools[0], dict) and len(tools) != count:
        raise ValueError(f"tools of {len(tools)} conversations for {count}; give one list for all, or one for each")
    if not tools or isinstance(tools[0], dict):
        return [tools or None] * count  # type: ignore[list-item]
    return tools  # type: ignore[return-value]


def _strings(value: Any) -> Iterator[str]:
    """Every text in a nested value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _shape(messages: Sequence[Message]) -> tuple[str, ...] | None:
    """The roles, where the messages are nothing but plain contents."""
    try:
        shape = tuple([message["role"] for message in messages if len(message) == 2 and message["content"].strip()])
        return shape if len(shape) == len(messages) else None
    except (AttributeError, KeyError, TypeError):  # something else than a text
        pass
    return None


def _stripped(content: str, how: str) -> str:
    return getattr(content, how)() if how else content


def _fill(layout: Layout, messages: Sequence[Message], text: str) -> _Spans | None:
    """The spans of a text that is its layout filled with these contents, else None."""
    between = layout.between
    pieces, contents, at = [between[0]], [], len(between[0])
    for message, how, after in zip(messages, layout.strip, between[1:], strict=True):
        content = message["content"]
        if how:
            content = getattr(content, how)()
        end = at + len(content)
        contents.append((at, end))
        pieces += (content, after)
        at = end + len(after)
    if at != len(text) or "".join(pieces) != text:
        return None
    turns = [(n, contents[n][0] - before, contents[n][1] + after) for n, before, after in layout.turns]
    return _Spans(text, turns, contents, layout.warnings, layout.rewritten)


def _labelled(
    job: _Job, ids: list[int], ranges: list[TokenRange], eos: str | None, stops: Set[int]
) -> Encoded | Refused:
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
    if eos and not whole and "no_stop_token" not in warnings and not job.text.endswith(eos, 0, end):
        warnings |= {"eos_is_not_stop"}
    final = ids[ranges[-1].last - 1]
    stop = final if final in stops and not whole and "no_stop_token" not in warnings else None
    return Encoded(job.text, ids, labels, job.turns, weights, stop, job.conversation, warnings)


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
