"""A spec file to a checked `Spec`: YAML with line numbers, `--set` overrides, `${ENVIRONMENT}`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq, TaggedScalar
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from pipeline.spec import Spec
from pipeline.spec_checks import build_spec, dotted, line_of
from stages.errors import Problem, SpecError, nearest

AT_MOST = 100_000  # values in a spec; an alias counts as often as it is used
TEXT = "tag:yaml.org,2002:str"
# Variables that hold a secret, by their names; PAD_TOKEN looks like one too, and MAX_TOKENS does not.
SECRET = re.compile(
    r"(TOKEN|SECRETS?|PASSWORDS?|PASSWD|PASSPHRASE|CREDENTIALS?|(^|_|API|ACCESS|PRIVATE)KEY)(_|$)", re.IGNORECASE
)


def load_spec(path: str | Path, overrides: Sequence[str] = (), within: Path | None = None) -> Spec:
    """Read and check a spec file.

    Args:
        overrides: `dotted.path=value` strings of `--set`; the value is read as YAML.
        within: of a spec that is sent elsewhere, the folder that goes with it: data and models outside are not looked at.

    Raises:
        SpecError: with every mistake that was found.
    """
    file = Path(path)
    if not file.is_file():
        raise SpecError([Problem("", f"{path}: no such spec file")])
    yaml = YAML(typ="rt")
    try:
        tree = yaml.load(file.read_text())
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise SpecError(
            [Problem("", f"not YAML: {error.problem}", mark.line + 1 if mark else None)], str(path)
        ) from error
    except (
        YAMLError,
        UnicodeDecodeError,
        AttributeError,
    ) as error:  # the last one of a mapping that is merged into itself
        raise SpecError([Problem("", f"not YAML: {error}")], str(path)) from error
    except RecursionError:
        raise SpecError([Problem("", "nested too deeply")], str(path)) from None
    if not isinstance(tree, CommentedMap):
        raise SpecError([Problem("", "a spec is a mapping with `model` and `stages`")], str(path))
    problems: list[Problem] = []
    for override in overrides:
        _apply_override(tree, override, problems)
    if _is_larger(tree, AT_MOST):
        what = f"more than {AT_MOST:,} values, of which an alias (*name) counts as often as it is used"
        raise SpecError([Problem("", what)], str(path))
    lines: dict[tuple[Any, ...], int] = {}
    raw = _plain(tree, (), lines, problems)
    folder = Path(os.path.abspath(file)).parent  # as `Spec.folder`
    return build_spec(
        raw, folder=folder, lines=lines, file=str(path), default_name=file.stem, problems=problems, within=within
    )


def _apply_override(tree: Any, override: str, problems: list[Problem]) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        problems.append(
            Problem(f"--set {override}", "write it as path=value, for example stages.sft.train.max_steps=10")
        )
        return
    keys: list[Any] = path.split(".")
    try:
        value = YAML(typ="safe").load(text)  # plain: its lines are not those of the file
    except (YAMLError, RecursionError) as error:
        problems.append(Problem(f"--set {override}", f"the value is not YAML: {error}"))
        return
    node = tree
    for i, key in enumerate(keys):
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                problems.append(
                    Problem(f"--set {path}", f"{'.'.join(keys[:i])} is a list of {len(node)}, {key!r} is not in it")
                )
                return
            key = int(key)
        elif not isinstance(node, dict):
            problems.append(Problem(f"--set {path}", f"{'.'.join(keys[:i])} is not a mapping"))
            return
        if i == len(keys) - 1:
            node[key] = value
            return
        if isinstance(node, dict):
            if keys[:i] == ["stages"] and key not in node:
                problems.append(Problem(f"--set {path}", f"there is no stage {key!r}{nearest(key, list(node))}"))
                return
            if node.get(key) is None:
                node[key] = CommentedMap()
        node = node[key]


def _is_larger(tree: Any, size: int) -> bool:
    """Whether a tree has more values, written out: aliases of aliases make few lines very many, and endless where they meet."""
    left, seen = [tree], 0
    while left and seen <= size:
        node = left.pop()
        seen += 1
        if isinstance(node, dict | list) and seen + len(left) + len(node) > size:
            return True
        left += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return seen > size


_ENV = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def _plain(node: Any, path: tuple[Any, ...], lines: dict[tuple[Any, ...], int], problems: list[Problem]) -> Any:
    """The tree as plain Python, environment variables read; fills in the line of every path."""
    tag = getattr(getattr(node, "tag", None), "value", None)
    if tag not in (None, TEXT):  # nothing is made of it; said, since it was meant for something
        problems.append(Problem(dotted(path), f"the tag {tag}: a spec has plain values only", line_of(path, lines)))
    if isinstance(node, TaggedScalar):
        node = node.value
    if isinstance(node, dict):
        for key in node:
            if isinstance(node, CommentedMap) and key in (node.lc.data or {}):
                lines[(*path, key)] = node.lc.data[key][0] + 1
        return {str(k): _plain(v, (*path, k), lines, problems) for k, v in node.items()}
    if isinstance(node, list):
        for i in range(len(node)):
            if isinstance(node, CommentedSeq) and i in (node.lc.data or {}):
                lines[(*path, i)] = node.lc.data[i][0] + 1
        return [_plain(v, (*path, i), lines, problems) for i, v in enumerate(node)]
    if isinstance(node, str) and "${" in node:
        return _environment(str(node), path, lines, problems)
    if isinstance(node, bool) or node is None:
        return node
    return next((kind(node) for kind in (int, float, str) if isinstance(node, kind)), str(node))


def _environment(
    text: str, path: tuple[Any, ...], lines: Mapping[tuple[Any, ...], int], problems: list[Problem]
) -> Any:
    def value(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        if SECRET.search(name):
            what = f"{name} holds a secret, by its name, and a spec is kept in the run folder and shown in its report; "
            hint = (
                f"leave it out: what needs {name} reads the environment (where it is no secret, give it another name)"
            )
            problems.append(Problem(dotted(path), what + hint, line_of(path, lines)))
            return ""
        found = os.environ.get(name, default)
        if found is None:
            what = f"the environment variable {name} is not set; set it, or write ${{{name}:-default}}"
            problems.append(Problem(dotted(path), what, line_of(path, lines)))
            return ""
        return found

    whole = _ENV.fullmatch(text)
    out = _ENV.sub(value, text)
    return _number(out) if whole else out


def _number(text: str) -> Any:
    """A lone variable may be a number or a truth value; anything else stays the text it is."""
    try:
        value = YAML(typ="safe").load(text)
    except YAMLError:
        return text
    return value if isinstance(value, bool | int | float) else text
