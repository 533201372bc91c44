"""Which tokens are trained: a conversation rendered with the model's chat template, masked, and tokenised once.

What is trained of an assistant turn is what the model has to write there: its content as the template renders it (reasoning
and tool calls included) and its stop token, never the header and never the white space after the stop token. Where that
stands is derived from the template (spans.py), right or refused with a reason, never guessed at.

Plain conversations have their spans from the layout of their roles (layout.py), which is derived once; those with tool calls
or reasoning, or of a template that looks into contents, are derived themselves. tokenise.py makes tokens and labels of them.
"""

from __future__ import annotations

import datetime
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

from tokenizers import Encoding

from stages.data.layout import Layout, Shape, Spans, make_layout, shape_of
from stages.data.records import Message
from stages.data.shapes import shapes
from stages.data.spans import Refused, SpanFinder
from stages.data.template import ChatTemplate, MarksMoved, Tools
from stages.data.tokenise import (
    IGNORE,
    ControlTokens,
    Encoded,
    Job,
    Tokeniser,
    TokenizerSpec,
    load_tokenizer_json,
    no_collection,
    tokenizer_spec,
)

__all__ = [
    "BUILT_IN", "CHATML", "HERMES", "IGNORE", "ChatEncoder", "ControlTokens", "Encoded", "History", "Refused",
    "TokenizerSpec", "TrainOn", "load_tokenizer_json", "no_collection", "tokenizer_spec",
]  # fmt: skip

TrainOn = Literal["assistant", "last_assistant", "completion", "all"]
History = Literal["refuse", "per_turn", "last_turn"]

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
AHEAD = 2  # batches that are being tokenised at a time
BATCH = 256  # conversations that are rendered while the ones before them are being tokenised


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
        self.template = ChatTemplate(spec.chat_template, spec.variables, date)
        self.tokeniser = Tokeniser(spec, control_tokens, stop_token)
        self.tokenizer, self.control = self.tokeniser.tokenizer, list(self.tokeniser.control)
        self.finder = SpanFinder(self.template, self.control, spec.eos_token, stop_token, reshape)
        self._layouts: dict[Shape, Layout | None] = {}

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
                for job, result in zip(jobs, self.tokeniser.label(jobs, encodings), strict=True):
                    out[job.conversation].append(result)
        return out

    def _batches(
        self, conversations: Sequence[Sequence[Message]], tools: Sequence[Tools], out: list[list[Encoded | Refused]]
    ) -> Iterator[list[Job]]:
        """What is to be tokenised, some conversations at a time; what is refused goes into `out` at once."""
        for start in range(0, len(conversations), BATCH):
            jobs: list[Job] = []
            for i in range(start, min(start + BATCH, len(conversations))):
                for job in self._jobs(i, conversations[i], tools[i]):
                    if isinstance(job, Refused):
                        out[i].append(job)
                    else:
                        jobs.append(job)
            yield jobs

    def _tokenised(self, batches: Iterator[list[Job]]) -> Iterator[tuple[list[Job], list[Encoding]]]:
        """Each batch with its tokens. Where there are cores to spare, Rust has the next ones while this one is looked at:
        two at a time, since one that is done waits for its turn to say so."""
        if not self.parallel:
            yield from ((jobs, self.tokeniser.encode([job.text for job in jobs])) for jobs in batches)
            return
        waiting: deque[tuple[list[Job], Future[list[Encoding]]]] = deque()
        with ThreadPoolExecutor(AHEAD) as threads:
            for jobs in batches:
                waiting.append((jobs, threads.submit(self.tokeniser.encode, [job.text for job in jobs])))
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
        job = Job(0, text, [(0, 0, len(text))], self._spelled_in(text, given), {}, frozenset())
        return next(self.tokeniser.label([job], self.tokeniser.encode([text])))

    def _spelled_in(self, text: str, messages: Sequence[Message]) -> list[tuple[int, int]]:
        """Where contents that spell control tokens stand in a text that has them in order."""
        places, at = [], 0
        for message in messages:
            for content in _strings(message.get("content")):
                core = content.strip()
                if self.tokeniser.guarded.search(core) and (start := text.find(core, at)) >= 0:
                    places.append((start, start + len(core)))
                    at = start + len(core)
        return places

    def encode_text(self, texts: Sequence[str]) -> list[Encoded | Refused]:
        """Plain text for language modelling: every token is trained, and the end-of-text token after it."""
        jobs = []
        for i, text in enumerate(texts):
            whole = text + (self.spec.eos_token or "")
            jobs.append(Job(i, whole, [(0, 0, len(whole))], [(0, len(text))], {}, frozenset()))
        encodings = self.tokeniser.encode([job.text for job in jobs])
        return list(self.tokeniser.label(jobs, encodings))

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

    def _jobs(self, i: int, messages: Sequence[Message], tools: Tools) -> Iterator[Job | Refused]:
        """What is to be tokenised of a conversation."""
        weights: dict[int, float] = {}
        shape = shape_of(messages)
        if shape is None:
            if (wrong := next((n for n, message in enumerate(messages) if not _is_message(message)), None)) is not None:
                yield Refused("malformed_message", f"message {wrong}: {messages[wrong]!r:.200}")
                return
            for n, message in enumerate(messages):
                weight = 1.0 if message.get("weight") is None else message["weight"]
                if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight >= 0:
                    yield Refused("malformed_message", f"message {n} has the weight {weight!r:.40}")
                    return
                if message.get("train") is False or weight != 1.0:
                    weights[n] = 0.0 if message.get("train") is False else float(weight)
            if weights and self.train_on == "all":
                yield Refused("weight_not_used", "train_on: all trains every token, whatever messages say")
                return
            messages = [_bare(message) for message in messages]
            shape = shape_of(messages)
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
        if self.history != "refuse" and (lost or (isinstance(found, Spans) and found.rewritten)):
            if self.history == "last_turn":
                chosen = chosen[-1:]
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

    def _job(self, i: int, found: Spans, chosen: list[int], weights: dict[int, float]) -> Job:
        turns = found.turns
        if len(turns) != len(chosen):
            turns = [turn for turn in turns if turn[0] in chosen]
        return Job(i, found.text, turns, found.contents, weights, found.warnings)

    def _whole(self, i: int, found: Spans) -> Job:
        last = found.turns[-1][0] if found.turns else 0
        return Job(i, found.text, [(last, 0, len(found.text))], found.contents, {}, found.warnings)

    def _spans(self, messages: Sequence[Message], tools: Tools, shape: Shape | None) -> Spans | Refused:
        """Text and spans: from the layout of the conversation's shape, or derived."""
        if not tools and shape is not None:
            layout = self._layout(shape)
            if isinstance(layout, Layout):
                try:
                    text = self.template.render_plain(messages)
                except Exception as error:  # whatever a template raises refuses the row
                    return Refused("template_error", str(error) or type(error).__name__)
                if layout.fits(messages) and (found := layout.fill(messages, text)):
                    return found
        return self._derived(messages, tools)

    def _derived(self, messages: Sequence[Message], tools: Tools, only: int | None = None) -> Spans | Refused:
        found = self.finder.find(messages, tools, only)
        if isinstance(found, Refused):
            return found
        if self.control_tokens != "allow":
            placed = {n for n, (start, _) in found.contents.items() if start >= 0}
            for text in _strings(
                [tools, *(m if n not in placed else {**m, "content": ""} for n, m in enumerate(messages))]
            ):
                if token := self.tokeniser.guarded.search(text):
                    return Refused("control_token_in_content", f"{token.group()!r} in {text[:80]!r}")
        turns = [(turn.message, turn.start, turn.end) for turn in found.turns]
        contents = [place for place in found.contents.values() if place[0] >= 0]
        return Spans(found.text, turns, contents, found.warnings, found.rewritten)

    def _layout(self, shape: Shape) -> Layout | None:
        if shape not in self._layouts:
            if len(self._layouts) >= SHAPES:
                self._layouts.clear()
            self._layouts[shape] = make_layout(self.finder, shape)
        return self._layouts[shape]


def _is_message(message: Any) -> bool:
    """Whether it has the shape that is relied on (records.py says more of what is wrong with a row)."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list) and not all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return False
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        return False
    named = [call.get("function") or call for call in calls or []]
    return isinstance(content, str | list | None) and all(
        isinstance(f, dict) and isinstance(f.get("name"), str) for f in named
    )


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
