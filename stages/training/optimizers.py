"""Optimizers and schedules: the trainer's, by its own names, or a user's own as `package.module:name`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def is_own(name: Any) -> bool:
    """Whether a value of `optim` or `lr_scheduler_type` names something of the user's: the trainer's names have no dots."""
    return isinstance(name, str) and ("." in name or ":" in name)


def load(path: str) -> Callable[..., Any]:
    """The object that `package.module:name` (or `package.module.name`) stands for.

    Raises:
        ValueError: there is no such module, or nothing callable of that name in it.
    """
    module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ValueError(f"{path!r}: {error}; modules are looked for beside the spec and in the environment") from error
    except AttributeError:
        raise ValueError(f"{path!r}: the module {module} has no {name!r}") from None
    if not callable(found):
        raise ValueError(f"{path!r} is a {type(found).__name__}, wanted is a class or function")
    return found


def options(text: str | None) -> dict[str, Any]:
    """`optim_args` of the trainer, `"a=1,b=0.5,c=(0.9, 0.95)"`, with Python values where they are such."""
    import ast

    if not text:
        return {}
    calls = ast.parse(f"f({text})", mode="eval").body
    assert isinstance(calls, ast.Call)
    return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in calls.keywords}
