"""What a user is told when something is wrong: what, where, what to do. No traceback without `--debug`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


class RaylignError(Exception):
    """An error meant for the user. `str(error)` is the whole message; `exit_code` is what the command line returns."""

    exit_code = 1


@dataclass(frozen=True)
class Problem:
    """One mistake in a spec: `path` is dotted (`stages.sft.train.learning_rate`), `line` is 1-based."""

    path: str
    message: str
    line: int | None = None

    def render(self, file: str | None) -> str:
        where = f"{file}:{self.line}: " if file and self.line else f"{file}: " if file else ""
        return f"{where}{self.path}: {self.message}" if self.path else f"{where}{self.message}"


class SpecError(RaylignError):
    """The spec or the arguments are wrong; nothing was started. Carries every problem that was found."""

    exit_code = 2

    def __init__(self, problems: list[Problem], file: str | None = None) -> None:
        self.problems, self.file = problems, file
        lines = [problem.render(file) for problem in problems]
        if len(lines) > 1:
            lines.insert(0, f"{len(problems)} mistakes in the spec:")
        super().__init__("\n".join(lines))


class DataError(RaylignError):
    """A data file or a model folder cannot be used; found before anything was started."""

    exit_code = 2


class StageError(RaylignError):
    """A stage failed. What the other stages had done stays in place, and a rerun goes on from there."""

    exit_code = 1


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that was probably meant, as the end of a message; nothing where none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
