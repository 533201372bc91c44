"""A shape's layout: what the template writes around the contents of plain conversations of the same roles.

Deriving spans costs a dozen renderings (spans.py). Done once on a probe, it tells the texts between the contents and which
of them are trained; a conversation whose one rendering is its layout filled with its contents has its spans from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stages.data.records import Message
from stages.data.spans import Refused, SpanFinder

Shape = tuple[str, ...]  # the roles


class Spans(NamedTuple):
    """A conversation's text, its assistant turns (message, start, end), and where its contents stand."""

    text: str
    turns: list[tuple[int, int, int]]
    contents: list[tuple[int, int]]
    warnings: frozenset[str]
    rewritten: bool


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

    def fill(self, messages: Sequence[Message], text: str) -> Spans | None:
        """The spans of a text that is this layout filled with these contents, else None."""
        between = self.between
        pieces, contents, at = [between[0]], [], len(between[0])
        for message, how, after in zip(messages, self.strip, between[1:], strict=True):
            content = message["content"]
            if how:
                content = getattr(content, how)()
            end = at + len(content)
            contents.append((at, end))
            pieces += (content, after)
            at = end + len(after)
        if at != len(text) or "".join(pieces) != text:
            return None
        turns = [(n, contents[n][0] - before, contents[n][1] + after) for n, before, after in self.turns]
        return Spans(text, turns, contents, self.warnings, self.rewritten)


def shape_of(messages: Sequence[Message]) -> Shape | None:
    """The roles, where the messages are nothing but plain contents."""
    try:
        shape = tuple([message["role"] for message in messages if len(message) == 2 and message["content"].strip()])
        return shape if len(shape) == len(messages) else None
    except (AttributeError, KeyError, TypeError):  # something else than a text
        pass
    return None


def make_layout(finder: SpanFinder, shape: Shape) -> Layout | None:
    """The layout of conversations of these roles, or None where the template has no such thing for them."""
    probe = [{"role": role, "content": f"Probe{n}x"} for n, role in enumerate(shape)]
    found = finder.find(probe, None)
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
    strip = _stripping(finder, [{**m, "content": f" \n {m['content']} \n "} for m in probe], between)
    if strip is None:
        return None
    return Layout(between, strip, turns, found.warnings, found.rewritten)


def _stripping(finder: SpanFinder, probe: list[Message], between: list[str]) -> list[str] | None:
    """How the template treats the white space around each content."""
    try:
        text = finder.template.render(probe)
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


def _stripped(content: str, how: str) -> str:
    return getattr(content, how)() if how else content
