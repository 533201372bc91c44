"""What pydantic finds wrong with a part of a spec, in words that say what to write."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from stages.errors import nearest
from stages.training.arguments import MANAGED


def existing(raw: Any, loc: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pydantic's location without what is not in the data: tags of unions, names of their members."""
    out: list[Any] = []
    node = raw
    for i, part in enumerate(loc):
        if isinstance(node, dict) and (part in node or i == len(loc) - 1):
            out.append(part)
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            out.append(part)
            node = node[part]
    return tuple(out)


def message_of(cls: type[BaseModel], error: dict[str, Any], where: tuple[Any, ...]) -> str:
    kind, value = error["type"], error.get("input")
    if kind == "extra_forbidden" and "train" in where[:-1] and where[-1] in MANAGED:
        return MANAGED[where[-1]]
    if kind == "extra_forbidden":
        return f"unknown key{_meant(cls, str(where[-1]), where[:-1], error['loc'][:-1])}"
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return str(error["ctx"]["error"])
    shown = f"{value!r}" if isinstance(value, str | int | float | bool | type(None)) else f"a {type(value).__name__}"
    return f"{error['msg'].removeprefix('Input ')}, not {shown}"


def _meant(cls: type[BaseModel], key: str, where: tuple[Any, ...], loc: Sequence[Any]) -> str:
    """What was probably meant by a key that is not known in its place, as the end of a message."""
    train = cls.model_fields.get("train")
    if where == ("train",) and key in cls.model_fields:
        return "; write it beside `train`"
    if where == () and train is not None and key in _fields_at(train.annotation, ()):
        return f"; write it in `train`: `train: {{{key}: ...}}`"
    if where in ((), ("train",)) and (instead := getattr(cls, "instead", {}).get(key)):
        return f"; {instead}"
    return nearest(key, _fields_at(cls, loc))


def _fields_at(cls: Any, loc: Sequence[Any]) -> list[str]:
    """Names that may stand at a location of a model."""
    for part in loc:
        models = _models_in(cls)
        found = [m.model_fields[part].annotation for m in models if isinstance(part, str) and part in m.model_fields]
        if found:
            cls = typing.Union[tuple(found)]  # noqa: UP007 - built at run time
        elif isinstance(part, str):  # a union's tag
            tagged = [
                m
                for m in models
                if part in {getattr(m.model_fields.get("method"), "default", None), m.__name__.lower()}
            ]
            cls = tagged[0] if tagged else cls
    return [name for m in _models_in(cls) for name in m.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in typing.get_args(annotation) for m in _models_in(arg)]
