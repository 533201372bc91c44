"""Where each assistant turn begins and ends in a rendered conversation: derived from the template itself, and verified.

A turn's span starts where its generation prompt ends and ends with its stop token: what the model has to write, and
nothing else. Four texts are compared with the whole conversation F: F with every turn of the template's loop marked, F with
every content marked, the generation prompt before each turn, and (where a template has none, or another one than F)
the same conversation with a plain answer in that place, which shows how long the header is. What cannot be told from them
is refused with a reason; what can be told but is worth knowing is a warning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from stages.data.messages import THINK, Message
from stages.data.shapes import shapes
from stages.data.template import MARKS, REASONING, ChatTemplate, Marked, MarksMoved, Tools

PROBE = "Zyzzyva"  # a plain answer, put where a header is to be measured
# An end mark, or two, that are not tokens of this tokenizer.
MARK_LIKE = re.compile(r"(?:<[^<>\s]{1,40}>|\[[^\[\]\s]{1,40}\])+|([^\w\s])\1{1,9}")

WARNINGS = {
    "no_stop_token": "the template writes no end mark after this answer: the model will not learn to stop",
    "prompt_differs": "the answer is trained after another text than the one it will be generated from",
    "history_differs": "an earlier answer is rendered differently from how it was when it was the last",
    "eos_is_not_stop": "the tokenizer's eos token is not the token that ends an answer",
    "control_token_as_text": "content spells a control token; it was tokenised as the plain text it is",
    "straddling_token": "a token reaches across the border of an answer and is not trained",
    "tools_dropped": "the template does not say which tools there are",
    "reshaped": "tool calls or contents were given to the template in the shape it can read",
}


@dataclass(frozen=True)
class Refused:
    reason: str  # short and stable
    detail: str


@dataclass(frozen=True)
class Turn:
    """An assistant turn: `text[start:end]` is its content and its stop token."""

    message: int
    start: int
    end: int


@dataclass(frozen=True)
class Found:
    text: str
    turns: list[Turn]
    contents: dict[int, tuple[int, int]]  # message -> where its content stands
    warnings: frozenset[str]
    rewritten: bool  # an earlier turn differs from what it was as the last, or stands after another text


class _Refusal(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.refused = Refused(reason, detail[:400])


class SpanFinder:
    """Args:
    control: the tokenizer's control tokens.
    eos: its end-of-text token.
    stop_token: what ends an answer, where the user names it.
    reshape: try the other shapes of messages that templates know, where one does not render what it is given.
    """

    def __init__(
        self,
        template: ChatTemplate,
        control: Sequence[str],
        eos: str | None,
        stop_token: str | None = None,
        reshape: bool = False,
    ) -> None:
        self.template, self.eos, self.stop_token, self.reshape = template, eos, stop_token, reshape
        tokens = sorted({*control, *filter(None, (eos, stop_token))}, key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")

    def find(self, messages: Sequence[Message], tools: Tools, only: int | None = None) -> Found | Refused:
        """The spans of every assistant turn, or of the turn `only`, whose earlier turns may then be abridged.

        What a template does not render as it is given (arguments as text, content as a string) is tried in other shapes,
        where that is allowed; the first that renders everything is used.
        """
        first: Refused | None = None
        for number, shaped in enumerate(shapes(messages) if self.reshape else [list(messages)]):
            try:
                found = _Conversation(self, shaped, tools, only).find()
            except _Refusal as refusal:
                first = first or refusal.refused
                continue
            if number:
                return replace(found, warnings=found.warnings | {"reshaped"})
            return found
        assert first is not None
        return first


class _Conversation:
    """One conversation's derivation."""

    def __init__(self, finder: SpanFinder, messages: list[Message], tools: Tools, only: int | None) -> None:
        self.finder, self.template = finder, finder.template
        self.messages, self.tools, self.only = messages, tools, only
        self.warnings: set[str] = set()

    def find(self) -> Found:
        try:
            self.text = self.template.render(self.messages, self.tools)
        except Exception as error:  # a template is the model's own program: whatever it raises refuses the row
            raise _Refusal("template_error", str(error) or type(error).__name__) from None
        if MARKS.search(self.text):
            raise _Refusal("private_use_characters", "the text has characters that are used to mark it")
        self.segments = self._segments()
        self.contents = self._contents()
        self.assistants = [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]
        turns = [turn for i in self.assistants if self.only in (None, i) and (turn := self._turn(i))]
        self._check_all_is_there({turn.message: turn for turn in turns})
        self._check_nothing_else_is_trained(turns)
        rewritten = self._rewritten(turns)
        return Found(self.text, turns, self.contents, frozenset(self.warnings), rewritten)

    # ---------------------------------------------------------------------------------- where things are

    def _segments(self) -> dict[int, tuple[int, int]]:
        try:
            return self.template.segments(self.messages, self.text, self.tools).segments
        except Exception:  # marks upset this template: contents must do
            return {}

    def _contents(self) -> dict[int, tuple[int, int]]:
        """Message -> where its content stands; absent where the template changed it."""
        marked = self._marked(begin=True) or self._marked(begin=False)
        found: dict[int, tuple[int, int]] = {}
        for i, message in enumerate(self.messages):
            core = _core(message)
            if not core:
                continue
            if marked and i in marked.twice:
                raise _Refusal("rendered_twice", f"message {i} ({message['role']}) stands in the text more than once")
            start = marked.starts.get(i) if marked else None
            end = marked.ends.get(i) if marked else None
            if end is None:
                start, end = self._search(i, core)
            elif start is None and self.text.endswith(core, 0, end):
                start = end - len(core)
            if end is not None:
                found[i] = (start if start is not None else -1, end)
        return found

    def _marked(self, begin: bool) -> Marked | None:
        try:
            return self.template.contents(self.messages, self.text, self.tools, begin=begin)
        except Exception:  # the template looks at what is marked, or does not read strings
            return None

    def _search(self, i: int, core: str) -> tuple[int | None, int | None]:
        """A content that bears no marks, where it stands exactly once in its message's part of the text."""
        start, end = self.segments.get(i, (0, len(self.text)))
        at = self.text.find(core, start, end)
        if at < 0 or self.text.find(core, at + 1, end) >= 0:
            return None, None
        return at, at + len(core)

    # ---------------------------------------------------------------------------------- one turn

    def _turn(self, i: int) -> Turn | None:
        if lost := _missing_calls(self.messages[i], self.text):
            raise _Refusal("tool_calls_dropped", f"turn {i}: {lost[:80]!r} is not in the text")
        start = self._start(i)
        end = self._end(i, start)
        if start < end:
            return Turn(i, start, end)
        if _core(self.messages[i]) or not self._is_plain(i):
            raise _Refusal("not_found", f"turn {i} is rendered as nothing")
        return None

    def _render(self, messages: list[Message], prompt: bool = False) -> str | None:
        try:
            return self.template.render(messages, self.tools, prompt)
        except Exception:  # half a conversation may be against the template's rules
            return None

    def _start(self, i: int) -> int:
        before = self.messages[:i]
        prompt = self._render(before, prompt=True)
        bare = self._render(before) if prompt is not None else None
        header = self._prompt_header(prompt, bare) if prompt is not None and bare is not None else ""
        floor = max((end for j, (_, end) in self.contents.items() if j < i), default=0)
        if prompt is not None and len(prompt) >= floor and self.text.startswith(prompt):
            start, _ = self.contents.get(i, (-1, -1))
            if header.strip() and 0 <= start < len(prompt) and not THINK.match(self.text, start):
                # The answer begins with the very words of the prompt: the header may not be in the text at all.
                raise _Refusal("prompt_in_answer", f"turn {i} begins like its generation prompt {header[:40]!r}")
            if header.strip():
                return len(prompt)
            gap = self._plain_gap(i, prompt)
            if gap is not None and (own := self._own_header(gap, self.text[len(prompt) :])) is not None:
                return len(prompt) + own
        if i not in self.segments:
            raise _Refusal("prompt_not_prefix", f"turn {i}: {_difference(prompt or '', self.text)}")
        self.warnings.add("prompt_differs")
        begin, _ = self.segments[i]
        start, end = self.contents.get(i, (-1, -1))
        message = self.messages[i]
        alone = not _calls(message) and not _reasoning(message) and self.text[start:end] == _core(message)
        if start >= begin and alone:  # the turn is its content: all before it is header
            return begin + len(self.text[begin:start].rstrip(" "))
        for candidate in self._headers(i):
            length = self._header_length(candidate, header)
            if length is not None and self.text.startswith(candidate[:length], begin):
                return begin + length
        raise _Refusal("prompt_not_prefix", f"turn {i}: {_difference(prompt or '', self.text)}")

    def _prompt_header(self, prompt: str, bare: str) -> str:
        """What asking for a generation prompt adds: from where the two texts part, not within a control token."""
        at = _common(prompt, bare)
        inside = (m.start() for m in self.finder.control.finditer(prompt) if m.start() < at < m.end())
        return prompt[next(inside, at) :]

    def _plain_gap(self, i: int, prompt: str) -> str | None:
        """What stands between a prompt that names no speaker and a plain answer: the header, '' where there is none."""
        messages = [*self.messages[:i], _plain(self.messages[i], PROBE)]
        text = self._render(messages)
        if text is None or not text.startswith(prompt) or text.count(PROBE) != 1:
            return None
        gap = text[len(prompt) : text.index(PROBE)]
        return gap.rstrip(" ") if gap.strip() else ""

    def _own_header(self, gap: str, rest: str) -> int | None:
        """How much of `rest` is header, where a plain answer has `gap` before it: all of the gap, or up to where both open
        something of their own (a block of reasoning, of calls, of the answer)."""
        if rest.startswith(gap):
            return len(gap)
        common = _common(gap, rest)
        at = max((m.end() for m in self.finder.control.finditer(gap, 0, common)), default=0)
        opens = all(MARK_LIKE.match(text, at) or self.finder.control.match(text, at) for text in (gap, rest))
        return at if opens else None

    def _headers(self, i: int) -> Iterator[str]:
        """Texts from the beginning of turn i's segment to the content of a plain answer there."""
        plain = _plain(self.messages[i], PROBE)
        for after in (self.messages[i + 1 :], [{"role": "user", "content": "?"}], []):
            messages = [*self.messages[:i], plain, *after]
            text = self._render(messages)
            if text is None or text.count(PROBE) != 1:
                continue
            try:
                begin, _ = self.template.segments(messages, text, self.tools).segments.get(i, (-1, -1))
            except MarksMoved:
                continue
            if 0 <= begin <= text.index(PROBE):
                yield text[begin : text.index(PROBE)]

    def _header_length(self, header: str, prompt: str) -> int | None:
        """How much of what stands before a plain answer is its header: as far as the generation prompt goes with it."""
        whole = len(header.rstrip(" "))
        if not prompt.strip():
            return whole
        indent = len(header) - len(header.lstrip())
        if header.strip().casefold() == prompt.strip().casefold():
            return whole  # "assistant:" and "Assistant:"
        common = indent + _common(header[indent:], prompt.lstrip())
        if common >= whole or common >= indent + len(prompt.strip()):
            return common
        at = max((match.end() for match in self.finder.control.finditer(header, 0, common)), default=0)
        return at if at and not header[at:common].strip() else None

    def _is_plain(self, i: int) -> bool:
        message = self.messages[i]
        return not _calls(message) and not _reasoning(message) and not THINK.search(_core(message))

    def _end(self, i: int, start: int) -> int:
        segment_end = self._segment_end(i)
        _, content_end = self.contents.get(i, (-1, -1))
        control = self.finder.control
        if segment_end < 0:
            # Without its segment only a control token right after the content is certainly its own.
            if content_end < 0 or _calls(self.messages[i]):
                raise _Refusal("not_found", f"turn {i} cannot be found in the text")
            at = content_end + _blank(self.text, content_end)
            if match := control.match(self.text, at):
                return match.end()
            raise _Refusal("no_stop_token", f"turn {i} is followed by {self.text[content_end : content_end + 40]!r}")
        if _calls(self.messages[i]) or content_end < start:
            # No content to go by: the model stops at its end-of-text token, or where its turn ends.
            written = len(self.text[:segment_end].rstrip())
            stops = [(match.group(), match.end()) for match in control.finditer(self.text, start, segment_end)]
            ends = [end for token, end in stops if token == self.finder.eos] or [
                end for _, end in stops if end == written
            ]
            if ends:
                return ends[0]
            content_end = written
        elif match := control.search(self.text, content_end, segment_end):
            at = match.end()
            while match := control.match(self.text, at, segment_end):  # "end of answer", "end of turn"
                at = match.end()
            return at
        tail = self.text[content_end:segment_end]
        if tail.strip():
            mark = MARK_LIKE.fullmatch(tail.strip())
            if mark is None:
                raise _Refusal("no_stop_token", f"turn {i} is followed by {tail[:80]!r}")
            return content_end + len(tail.rstrip())
        return self._end_in_what_follows(i, content_end, segment_end)

    def _segment_end(self, i: int) -> int:
        """The end of what the template wrote for turn i; -1 where that is unknown. Some write the tools' results with it."""
        begin, end = self.segments.get(i, (-1, -1))
        if any(j > i and begin <= at < end for j, (at, _) in self.contents.items()):
            upto = self._render(self.messages[: i + 1])
            if upto is None:
                return -1
            common = _common(upto, self.text)
            inside = (
                m.start() for m in self.finder.control.finditer(self.text, begin, end) if m.start() < common < m.end()
            )
            end = next(inside, common)
        return end

    def _end_in_what_follows(self, i: int, content_end: int, segment_end: int) -> int:
        """Some templates write the end mark of an answer when they come to the next message, or after the last."""
        at = segment_end + _blank(self.text, segment_end)
        stop = self.finder.stop_token
        if stop and self.text.startswith(stop, at):
            return at + len(stop)
        match = self.finder.control.match(self.text, at)
        if match and (self._follows_anyhow(i, match.end()) or self._precedes_a_header(i, match.end())):
            return match.end()
        if self.finder.eos and self.text[segment_end:].strip() == self.finder.eos:
            return at + len(self.finder.eos)
        if stop and not self.text[content_end:].strip():
            self.text = self.text[:content_end] + stop
            return len(self.text)
        self.warnings.add("no_stop_token")
        return content_end

    def _follows_anyhow(self, i: int, end: int) -> bool:
        """Whether `text[:end]` stands there too when the conversation ends after turn i, or when it goes on."""
        if i + 1 < len(self.messages):
            other = self._render(self.messages[: i + 1])
        else:
            other = self._render([*self.messages, {"role": "user", "content": PROBE}])
        return other is not None and other.startswith(self.text[:end])

    def _precedes_a_header(self, i: int, end: int) -> bool:
        """Whether the next message's header, as it is where no answer stands before it, begins after `end`."""
        for j, message in enumerate(self.messages):
            if i + 1 >= len(self.messages) or message["role"] != self.messages[i + 1]["role"] or j not in self.segments:
                continue
            begin, (start, _) = self.segments[j][0], self.contents.get(j, (-1, -1))
            header = self.text[begin:start].strip() if start > begin else ""
            if header and (j == 0 or self.messages[j - 1]["role"] != "assistant"):
                upto, _ = self.contents.get(i + 1, (-1, -1))
                return self.text[end:upto].strip() == header
        return False

    # ---------------------------------------------------------------------------------- nothing lost, nothing else

    def _check_all_is_there(self, turns: dict[int, Turn]) -> None:
        last = self.assistants[-1] if self.assistants else -1
        for i, message in enumerate(self.messages):
            abridged = self.only is not None and i in self.assistants and i != self.only
            begin, end = self.segments.get(i, (0, len(self.text)))
            if i in turns:
                begin, end = min(begin or turns[i].start, turns[i].start), turns[i].end
            part = self.text[begin:end]
            if (missing := self._missing_content(i, message, part)) is not None and not abridged:
                if message["role"] == "assistant" and i != last and self._was_there(i, missing):
                    raise _Refusal("history_rewritten", f"turn {i} is rendered without {missing[:80]!r}")
                what = "system" if message["role"] in ("system", "developer") else "content"
                raise _Refusal(
                    f"{what}_dropped", f"message {i} ({message['role']}): {missing[:80]!r} is not in the text"
                )
            thought = _reasoning(message)
            if thought and thought.strip() not in part and not abridged:
                if i != last and self._was_there(i, thought.strip()):
                    raise _Refusal("history_rewritten", f"turn {i} is rendered without its reasoning")
                raise _Refusal("reasoning_dropped", f"turn {i}: the template does not render reasoning")
            if lost := _missing_calls(message, part):
                raise _Refusal("tool_calls_dropped", f"turn {i}: {lost[:80]!r} is not in the text")
        for tool in self.tools or []:
            function = tool.get("function")
            name = (function if isinstance(function, dict) else tool).get("name")
            if isinstance(name, str) and name not in self.text:
                self.warnings.add("tools_dropped")

    def _missing_content(self, i: int, message: Message, part: str) -> str | None:
        core = _core(message)
        if not core:
            return None
        start, end = self.contents.get(i, (-1, -1))
        if start >= 0 and self.text[start:end] == core:
            return None
        pieces = [piece.strip() for piece in THINK.split(core) if piece.strip()]
        whole = self.text if message["role"] in ("system", "developer") else part
        return next((piece for piece in pieces if piece not in whole), None)

    def _was_there(self, i: int, what: str) -> bool:
        return what in (self._render(self.messages[: i + 1]) or "")

    def _check_nothing_else_is_trained(self, turns: list[Turn]) -> None:
        for turn in turns:
            for j, (start, end) in self.contents.items():
                if j != turn.message and start < turn.end and end > turn.start:
                    raise _Refusal("overlap", f"turn {turn.message} would take in message {j}")
            start, end = self.contents.get(turn.message, (-1, -1))
            if end > turn.end:
                raise _Refusal("not_found", f"turn {turn.message}'s content reaches over its end")
        for one, other in pairwise(turns):
            if one.end > other.start:
                raise _Refusal("overlap", f"turns {one.message} and {other.message}")

    def _rewritten(self, turns: list[Turn]) -> bool:
        """Whether a turn is not what, or does not stand where, it was written by the model."""
        for turn in turns[:-1]:
            upto = self._render(self.messages[: turn.message + 1])
            if upto is not None and not upto.startswith(self.text[: turn.end]):
                self.warnings.add("history_differs")
                return True
        return "prompt_differs" in self.warnings


def _core(message: Message) -> str:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    return content.strip() if isinstance(content, str) else ""


def _calls(message: Message) -> list[dict[str, Any]]:
    return message.get("tool_calls") or []


def _reasoning(message: Message) -> str | None:
    return next((message[key] for key in REASONING if message.get(key)), None)


def _plain(message: Message, text: str) -> Message:
    """A plain answer in the place of `message`."""
    shaped = isinstance(message.get("content"), list)
    return {"role": message["role"], "content": [{"type": "text", "text": text}] if shaped else text}


def _missing_calls(message: Message, part: str) -> str | None:
    """A name or an argument of a tool call that is not in the text, or a JSON text that was encoded twice."""
    for call in _calls(message):
        function = call.get("function") or call
        name, arguments = str(function.get("name")), function.get("arguments")
        if name not in part:
            return name
        if isinstance(arguments, str) and arguments.strip() not in part:
            return arguments
        for leaf in _leaves(arguments) if isinstance(arguments, dict) else ():
            if not any(form in part for form in _forms(leaf)):
                return str(leaf)
    return None


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif value is not None and not isinstance(value, bool):  # None and booleans are spelled in more than one way
        yield value


def _forms(leaf: Any) -> set[str]:
    if not isinstance(leaf, str):
        return {str(leaf), json.dumps(leaf)}
    return {leaf.strip(), json.dumps(leaf)[1:-1], json.dumps(leaf, ensure_ascii=False)[1:-1]}


def _common(a: str, b: str) -> int:
    """Length of the common beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _blank(text: str, at: int) -> int:
    return len(text) - at - len(text[at:].lstrip())


def _difference(a: str, b: str) -> str:
    at = _common(a, b)
    return f"{a[at : at + 40]!r} where the whole conversation has {b[at : at + 40]!r}"
