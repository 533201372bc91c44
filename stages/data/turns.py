"""A source's own shape, in Jinja over the columns of a row: turn templates (`messages`) and which rows to use (`filter`).

Templates are rendered in a sandbox. A column that a row lacks, or holds nothing in, rejects the row: it is never an empty
string or the word None in the training data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

from jinja2 import StrictUndefined, TemplateSyntaxError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import Field, field_validator

from stages.base import Config
from stages.data.messages import Rejected

CARRIED = ("expected", "tools", "label")  # columns that mean the same beside templates as beside messages


def _something(value: Any) -> Any:
    if value is None:
        raise UndefinedError("a column is empty (null)")
    return value


ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, finalize=_something, keep_trailing_newline=True, autoescape=False
)


class Turn(Config):
    """A message made of a row's columns."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(description="Who speaks.")
    content: str = Field(description="Jinja over the row's columns: 'Question: {{ question }}'.")
    train: bool | None = Field(default=None, description="Whether this turn is trained, whatever the mask says.")
    weight: float | None = Field(default=None, ge=0, allow_inf_nan=False, description="Weight of this turn's loss.")

    @field_validator("content")
    @classmethod
    def _compiles(cls, content: str) -> str:
        _compiled(content, _template)
        return content


def check_turns(turns: Sequence[Turn]) -> None:
    """Raises ValueError where a template is not Jinja (a `Turn` made by pydantic has been checked)."""
    for turn in turns:
        _compiled(turn.content, _template)


def check_filter(expression: str) -> None:
    """Raises ValueError where it is not a Jinja expression."""
    _compiled(expression, _expression)


def _compiled(text: str, compile: Callable[[str], Any]) -> None:
    try:
        compile(text)
    except TemplateSyntaxError as error:
        raise ValueError(f"not Jinja: {error.message}, in {text[:80]!r}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


@lru_cache(maxsize=256)
def _template(text: str) -> Callable[..., str]:
    return ENVIRONMENT.from_string(text).render


@lru_cache(maxsize=256)
def _expression(text: str) -> Callable[..., Any]:
    return ENVIRONMENT.compile_expression(text, undefined_to_none=False)


def templated(row: dict[str, Any], turns: Sequence[Turn]) -> dict[str, Any]:
    """A row of the format `messages`. A system turn that renders blank is left out.

    Raises:
        Rejected: missing_field or template_error.
    """
    messages = []
    for i, turn in enumerate(turns):
        try:
            content = _template(turn.content)(row)
        except UndefinedError as error:
            raise Rejected("missing_field", f"messages[{i}]: {error.message}") from None
        except Exception as error:  # the template is the user's own program, on whatever the row holds
            raise Rejected("template_error", f"messages[{i}]: {str(error) or type(error).__name__}") from None
        if turn.role != "system" or content.strip():
            options = {"train": turn.train, "weight": turn.weight}
            messages.append(
                {"role": turn.role, "content": content, **{k: v for k, v in options.items() if v is not None}}
            )
    return {"messages": messages, **{name: row[name] for name in CARRIED if name in row}}


def keep(row: dict[str, Any], expression: str) -> bool:
    """Whether a row is to be used.

    Raises:
        Rejected: filter_error, where the expression cannot be evaluated on this row.
    """
    try:
        return bool(_expression(expression)(row))
    except Exception as error:  # as above
        raise Rejected("filter_error", str(error) or type(error).__name__) from None
