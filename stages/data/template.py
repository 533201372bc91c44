"""A chat template, rendered just as transformers renders it, and rendered again with marks that say which text is whose.

The marks are private-use characters. Those that bound a message are put into the template's syntax tree, at both ends of
every loop's body: white space control is done by the lexer, so the text itself does not move. At run time a mark asks
whether the loop's variable *is* one of the messages, so it does not matter what the loop runs over. Those that bound a
content are put into the data. Either way the marks are only believed where the text without them is the plain text.
"""

from __future__ import annotations

import datetime
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError

from stages.data.records import Message
from stages.errors import DataError

Tools = list[dict[str, Any]] | None
REASONING = ("reasoning_content", "thinking", "reasoning")  # the names that transformers knows

PATIENCE_S = 5.0  # of processor time, for a template's compilation and its first text: they take milliseconds

_BEGIN, _END, _CONTENT_BEGIN, _CONTENT_END = (chr(0x10FFF0 + i) for i in range(4))
_NUMBER = 0x10E000  # a mark is followed by the message's number, as one private-use character
_NUMBERS = 0x1000
MARKS = re.compile("[\U0010e000-\U0010efff\U0010fff0-\U0010fff3]")


class MarksMoved(Exception):
    """The text with marks is not the plain text: the template looks at what it renders."""


@dataclass(frozen=True)
class Marked:
    """Where the parts of a rendered text lie, in characters of the plain text; a part is absent where its mark is."""

    segments: dict[int, tuple[int, int]]  # message -> all that its turn of the loop wrote
    twice: frozenset[int]  # messages that were written more than once
    starts: dict[int, int]  # message -> first character of its content, without outer white space
    ends: dict[int, int]


class ChatTemplate:
    """Args:
    source: the Jinja text.
    variables: `bos_token`, `eos_token` and what else the tokenizer defines.
    date: what `strftime_now` says, so that a text does not change from day to day.
    """

    def __init__(self, source: str, variables: dict[str, Any], date: datetime.datetime | None = None) -> None:
        plain, marked = _compiled(source)
        self.variables = variables
        self.date = date or datetime.datetime.now()
        self._plain, self._marked = plain, marked
        own = {"documents": None, "strftime_now": self.date.strftime}
        self._names = {**plain.globals, **own, **variables}  # all that templates see but the conversation

    def render(self, messages: Sequence[Message], tools: Tools = None, add_generation_prompt: bool = False) -> str:
        """The text; raises whatever the template raises."""
        return self._render(self._plain, [_with_reasoning(m) for m in messages], tools, add_generation_prompt)

    def render_plain(self, messages: Sequence[Message]) -> str:
        """The text of messages of which each has a role and a content and nothing else."""
        return self._render(self._plain, messages, None, False)

    def _render(self, template: Template, messages: Sequence[Message], tools: Tools, prompt: bool, **marks: Any) -> str:
        # As `template.render` does it, without merging all names anew each time: that is half of the time it takes.
        names = {**self._names, "messages": messages, "tools": tools, "add_generation_prompt": prompt, **marks}
        return "".join(template.root_render_func(template.new_context(names, shared=True)))

    def segments(self, messages: Sequence[Message], text: str, tools: Tools = None) -> Marked:
        """What each message's turn of the template's loop wrote into `text`.

        Raises:
            MarksMoved: marking changed the text.
        """
        copies = [_with_reasoning(message) for message in messages]
        marks = _LoopMarks(copies)
        rendered = self._render(self._marked, copies, tools, False, raylign_begin=marks.begin, raylign_end=marks.end)
        return _read_marks(rendered, text)

    def contents(self, messages: Sequence[Message], text: str, tools: Tools = None, begin: bool = True) -> Marked:
        """Where each message's content stands in `text`. `begin=False` marks ends only.

        Raises:
            MarksMoved: marking changed the text.
        """
        marked = [{**m, "content": _mark_content(i, m.get("content"), begin)} for i, m in enumerate(messages)]
        return _read_marks(self.render(marked, tools), text)


def _with_reasoning(message: Message) -> Message:
    """A copy that has its reasoning under every name that templates read, as transformers does."""
    reasoning = next((message[key] for key in REASONING if message.get(key) is not None), None)
    return dict(message) if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _mark_content(i: int, content: Any, begin: bool) -> Any:
    if not isinstance(content, str) or not content.strip():
        return content
    core = content.strip()
    at = content.index(core)
    number = chr(_NUMBER + i % _NUMBERS)
    before = _CONTENT_BEGIN + number if begin else ""
    return content[:at] + before + core + _CONTENT_END + number + content[at + len(core) :]


class _LoopMarks:
    """The two functions that a marked template calls at the ends of a loop's body."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self.index = {id(message): i for i, message in enumerate(messages)}
        self.open: list[int | None] = []

    def begin(self, item: Any) -> str:
        index = self.index.get(id(item))
        if index is None and type(item) is int and 0 <= item < len(self.index):
            index = item  # `for i in range(messages | length)`: confirmed by where the contents are
        self.open.append(index)
        return "" if index is None else _BEGIN + chr(_NUMBER + index % _NUMBERS)

    def end(self) -> str:
        index = self.open.pop()
        return "" if index is None else _END + chr(_NUMBER + index % _NUMBERS)


def _read_marks(rendered: str, text: str) -> Marked:
    if MARKS.sub("", rendered) != text:
        raise MarksMoved
    spans: dict[int, list[tuple[int, int]]] = {}
    open_at: list[tuple[int, int]] = []
    starts: dict[int, list[int]] = {}
    ends: dict[int, list[int]] = {}
    marks = list(MARKS.finditer(rendered))
    for before, (mark, after) in enumerate(zip(marks, [*marks[1:], None], strict=False)):
        at, kind = mark.start() - before, mark.group()
        number = ord(after.group()) - _NUMBER if after else 0
        if kind == _BEGIN:
            open_at.append((number, at))
        elif kind == _END:
            index, start = open_at.pop()
            if text[start:at]:
                spans.setdefault(index, []).append((start, at))
        elif kind == _CONTENT_BEGIN:
            starts.setdefault(number, []).append(at)
        elif kind == _CONTENT_END:
            ends.setdefault(number, []).append(at)
    several = {i for found in (spans, starts, ends) for i, places in found.items() if len(places) > 1}
    return Marked(
        {i: places[0] for i, places in spans.items() if len(places) == 1},
        frozenset(several),
        {i: places[0] for i, places in starts.items() if len(places) == 1},
        {i: places[0] for i, places in ends.items() if len(places) == 1},
    )


# ------------------------------------------------------------------------------------------------ somebody else's code


class TooLong(BaseException):
    """Not an Exception: templates are tried, and what one raises is no reason to stop."""


def try_template(model: str, source: str, variables: dict[str, Any]) -> None:
    """Compile a template and render two turns: it comes with a model, as code of somebody else's. It runs in Jinja's sandbox,
    so what reaches for more than it may comes to nothing; here the user is told. Its time is bounded (in the main thread,
    where signals arrive), its memory is not.

    Raises:
        DataError: it does what a template may not, or does not come to an end.
        TemplateSyntaxError: it is not Jinja.
    """
    from transformers.utils import chat_template_utils  # takes seconds, which are not the template's

    assert chat_template_utils
    bounded = threading.current_thread() is threading.main_thread()
    if bounded:
        before = signal.signal(signal.SIGVTALRM, _too_long)
        signal.setitimer(signal.ITIMER_VIRTUAL, PATIENCE_S)
    try:
        ChatTemplate(source, variables).render(
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        )
    except (SecurityError, OverflowError, TooLong) as error:
        raise DataError(f"{model}: the chat template does what a template may not: {error}") from error
    except TemplateSyntaxError:
        raise
    except Exception:  # whatever else it raises of these turns will be told of the rows it is raised for
        return
    finally:
        if bounded:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)


def _too_long(*_: Any) -> None:
    raise TooLong(f"two turns are not rendered after {PATIENCE_S:g} s")


# ------------------------------------------------------------------------------------------------ the syntax tree


@lru_cache(maxsize=32)
def _compiled(source: str) -> tuple[Template, Template]:
    """The template in the very environment that transformers renders it in, plain and with loops marked."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    plain = _compile_jinja_template(source)
    environment = plain.environment
    tree = environment.parse(source)
    for loop in list(tree.find_all(nodes.For)):
        if isinstance(loop.target, nodes.Name):
            begin = _call("raylign_begin", [nodes.Name(loop.target.name, "load")], loop)
            loop.body = [begin, *_ending(loop.body, loop), _call("raylign_end", [], loop)]
    return plain, environment.from_string(tree)


def _ending(body: list[nodes.Node], loop: nodes.For) -> list[nodes.Node]:
    """The body with the end mark before each `break` and `continue` of this loop."""
    out: list[nodes.Node] = []
    for node in body:
        if isinstance(node, nodes.Continue | nodes.Break):
            out.append(_call("raylign_end", [], loop))
        elif isinstance(node, nodes.If):
            for branch in _branches(node):
                branch.body = _ending(branch.body, loop)
            node.else_ = _ending(node.else_, loop)
        elif isinstance(node, nodes.With | nodes.Scope | nodes.CallBlock):
            node.body = _ending(node.body, loop)
        out.append(node)
    return out


def _branches(node: nodes.If) -> Iterator[nodes.If]:
    yield node
    yield from node.elif_


def _call(name: str, arguments: list[nodes.Expr], near: nodes.Node) -> nodes.Node:
    node = nodes.Output([nodes.Call(nodes.Name(name, "load"), arguments, [], None, None)])
    node.set_lineno(near.lineno)
    assert near.environment is not None
    node.set_environment(near.environment)
    return node
