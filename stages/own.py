"""Code of the user's that a spec names as `package.module:name`: stages, formats, rewards, gates, optimizers and schedules.

Modules are looked for in the environment and then in the folder of the spec, which every process of a run is told by the
environment (`RAYLIGN_CODE`).
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.machinery
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.errors import StageError, nearest

CODE = "RAYLIGN_CODE"
_added: set[str] = set()  # folders of specs that are on the path because of us
NAMED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_named(value: Any) -> bool:
    """Whether a value is written as `package.module:name`."""
    return isinstance(value, str) and NAMED.fullmatch(value) is not None


def is_own(name: Any) -> bool:
    """Whether a value of `optim` or `lr_scheduler_type` names something of the user's: the trainer's names have no dots."""
    return isinstance(name, str) and ("." in name or ":" in name)


def use(folder: str) -> None:
    """Have modules looked for in this folder too, here and in the processes that this one starts."""
    for other in _added - {folder}:
        if other in sys.path:
            sys.path.remove(other)
    os.environ[CODE] = folder


def _folder() -> str:
    return os.environ.get(CODE) or os.getcwd()


def environment() -> dict[str, str]:
    """What a process that this one does not start has to be told."""
    return {CODE: os.environ[CODE]} if CODE in os.environ else {}


def load(path: str) -> Callable[..., Any]:
    """The object that `package.module:name` (or `package.module.name`) stands for.

    Raises:
        ValueError: there is no such module, or nothing callable of that name in it.
    """
    module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    if _folder() not in sys.path:
        sys.path.append(_folder())
        _added.add(_folder())
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ValueError(f"{path!r}: {error}; modules are looked for beside the spec and in the environment") from error
    except AttributeError:
        raise ValueError(f"{path!r}: the module {module} has no {name!r}") from None
    if not callable(found):
        raise ValueError(f"{path!r} is a {type(found).__name__}, wanted is a class or function")
    return found


def load_for(what: str, path: str) -> Callable[..., Any]:
    """As `load`, whatever the user's module raises.

    Args:
        what: what it is for, which an error begins with.

    Raises:
        StageError: it cannot be imported.
    """
    try:
        return load(path)
    except ValueError as error:
        raise StageError(f"{what}: {error}") from error
    except Exception as error:  # whatever a module raises when it is imported
        raise StageError(f"{what}: {path}: its module cannot be imported: {raised(error)}") from error


def raised(error: Exception) -> str:
    """What was raised, and where: `KeyError: 'answer' (line 12 of my_formats.py)`."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" (line {frames[-1].lineno} of {Path(frames[-1].filename).name})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def problem(path: str) -> str | None:
    """What is wrong with `package.module:name`, as far as it is known without importing anything."""
    top, folder = path.partition(":")[0].split(".")[0], _folder()
    if importlib.machinery.PathFinder.find_spec(top, [*sys.path, folder]) is None:
        return f"{path!r}: there is no module {top!r} in {folder} or in the environment"
    name, file = path.partition(":")[2], source(path)
    names = _names(file) if name and file is not None and file.is_relative_to(folder) else None
    if names is not None and name not in names:
        return f"{path!r}: {file} has no {name!r}{nearest(name, names)}"
    return None


def _names(file: Path) -> set[str] | None:
    """Names that a module may have, of what it defines and imports; None where they cannot be told without importing it."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (SyntaxError, ValueError):
        return None
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    names |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    imported = [alias for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
    names |= {alias.asname or alias.name.split(".")[0] for alias in imported}
    return None if names & {"*", "__getattr__"} else names


def source(path: str) -> Path | None:
    """The file of the module in `module:name`; None where it has none that can be found without importing anything."""
    search: list[str] | None = [*sys.path, _folder()]
    found = None
    for part in path.partition(":")[0].split("."):
        found = importlib.machinery.PathFinder.find_spec(part, search)
        if found is None:
            return None
        search = list(found.submodule_search_locations or [])
    return Path(found.origin) if found is not None and found.has_location and found.origin else None


def key(path: str) -> str | None:
    """The hash of the module in `module:name`; what it imports is not looked at."""
    file = source(path)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file is not None else None


def options(text: str | None) -> dict[str, Any]:
    """`optim_args` for an optimizer of the user's: keyword arguments as in Python, `"momentum=0.9, betas=(0.9, 0.95)"`.

    Raises:
        ValueError: they are not such.
    """
    if not text:
        return {}
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        wanted = 'keyword arguments with plain values, as "momentum=0.9, betas=(0.9, 0.95)"'
        raise ValueError(f"{text!r}: wanted are {wanted}") from error
