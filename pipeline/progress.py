"""What a run shows while it goes: in a terminal all its stages, with bars for those that run; plain lines in a job's log."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

LINE_EVERY_S = 10.0  # in a log

# What the table and the terminal show of a stage's metrics, in this order, where it has them.
SHOWN = (
    "loss", "eval_loss", "accuracy", "rewards/accuracies", "rewards/margins", "parameters", "reward_mean", "stopped",
)  # fmt: skip
# Of reinforcement learning, whose loss says nothing. GRPO's KL is of a token.
SHOWN_OF_ANSWERS = ("reward", "eval_reward", "kl", "kl_per_token", "stopped", "answer_tokens")


def brief(metrics: dict[str, Any]) -> str:
    """The few metrics of a stage that are worth a line."""
    # Those of an evaluation are by model, and a model may have the name of a metric.
    wanted = [name for name in shown_of(metrics) if isinstance(metrics.get(name), int | float)]
    if "kl" in wanted and "kl_per_token" in wanted:
        wanted.remove("kl_per_token")
    return ", ".join(f"{name.removeprefix('rewards/').replace('_', ' ')} {number(metrics[name])}" for name in wanted)


def shown_of(metrics: dict[str, Any]) -> tuple[str, ...]:
    return SHOWN_OF_ANSWERS if "reward" in metrics else SHOWN


def number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


@dataclass
class Line:
    """What is shown of a stage."""

    kind: str
    needs: list[str]
    depth: int  # how many stages come before it, one after another
    state: str = "waiting"
    began: float = 0.0
    seconds: float = 0.0
    said: str = ""  # the metrics it ended with, or why it has not
    read: int = 0  # bytes of its events that were read
    told: float = 0.0  # when a log had its last line of it
    phase: str = ""
    waits: str = ""  # for what, and how long
    values: str = ""
    unit: str = ""
    done: int = 0
    total: int | None = None
    since: tuple[float, int] = (0.0, 0)  # the time of the phase's first progress, and how far it was then
    at: float = 0.0  # the time of the last

    def event(self, event: dict[str, Any]) -> None:
        """Take what the stage has reported (stages/base.py, Reporter)."""
        if "waiting" in event:
            what = event["waiting"]
            self.waits = "" if what is None else f"waiting for {what}; {event['seconds']} s of {event['limit']}"
        elif "phase" in event:
            self.phase, self.total, self.values, self.unit = event["phase"], None, "", ""
        else:
            if not self.unit or event["done"] < self.done:  # also where training has gone back to a checkpoint
                self.since = (event.get("time", time.time()), event["done"])
            self.at = event.get("time", time.time())
            self.done, self.total, self.unit = event["done"], event["total"], event["unit"]
            known = [key for key in ("loss", "reward", "kl") if event.get(key) is not None]
            self.values = "  ".join(f"{key} {event[key]:.3f}" for key in known)

    def progress(self) -> str:
        """`train 200/400 steps  loss 1.500  2.3 steps/s, 1:04 left`."""
        count = f" {self.done}/{self.total} {self.unit}s" if self.unit else ""
        return "  ".join(part for part in (self.phase + count, self.values, self.pace()) if part)

    def rate(self) -> float | None:
        """Units a second since the phase's first progress, which may be that of a run that is gone on with."""
        seconds, units = self.at - self.since[0], self.done - self.since[1]
        return units / seconds if units > 0 and seconds > 0.5 else None

    def pace(self) -> str:
        """`2.3 steps/s, 1:04 left`."""
        rate = self.rate()
        if rate is None:
            return ""
        slow = f"{rate:.3g} {self.unit}s/s" if rate >= 1 else f"{1 / rate:.3g} s/{self.unit}"
        return slow + (f", {clock((self.total - self.done) / rate)} left" if self.total else "")


def read_events(events: Path, line: Line | None = None) -> list[dict[str, Any]]:
    """The whole lines of a stage's events; where a `line` is given, those that it has not read."""
    begin = line.read if line else 0
    if not events.is_file() or events.stat().st_size == begin:
        return []
    with events.open("rb") as file:
        file.seek(begin)
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]  # the rest is being written
    if line:
        line.read += len(whole)
    return [json.loads(each) for each in whole.splitlines()]


MARKS = {"waiting": "·", "cached": "=", "done": "✓", "failed": "✗"}
STYLES = {"waiting": "dim", "cached": "cyan", "done": "green", "failed": "red", "running": "bold"}


class Terminal:
    """Shows a run. `quiet` shows nothing; errors are told by whoever catches them."""

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(quiet=quiet)
        self.started = time.time()
        self.lines: dict[str, Line] = {}
        self.spinner = Spinner("dots")
        self.live = Live(
            console=self.console, get_renderable=self._tree, refresh_per_second=4, transient=True, auto_refresh=self.shows
        )  # fmt: skip

    @property
    def shows(self) -> bool:
        """Whether there is a terminal to draw in; a job's log gets lines."""
        return self.console.is_terminal and not self.console.quiet

    def __enter__(self) -> Terminal:
        if self.shows:
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.shows:
            self.live.stop()

    def plan(self, stages: Iterable[tuple[str, str, list[str]]]) -> None:
        """The stages of the run in order: (name, kind, names of those it needs)."""
        for name, kind, needs in stages:
            self.lines[name] = Line(kind, needs, 1 + max((self.lines[n].depth for n in needs), default=-1))

    def stage(
        self,
        name: str,
        state: str,
        *,
        seconds: float = 0,
        metrics: dict[str, Any] | None = None,
        why: str = "",
        resumed: bool = False,
    ) -> None:
        """A stage has come to a state: cached, running, done or failed."""
        line = self.lines[name]
        line.state, line.seconds, line.waits = state, seconds, ""
        if state == "running":
            line.began = time.time()
            self._say(f"{name}: {'goes on where it was' if resumed else 'started'} ({line.kind})")
            return
        line.said = why.split("\n")[0] or brief(metrics or {})
        tail = {"cached": "unchanged", "done": f"done in {seconds:.1f} s", "failed": "failed"}[state]
        self._say(f"{name}: [{STYLES[state]}]{tail}[/]" + (f"  ({escape(line.said)})" if line.said else ""))

    def phase(self, name: str) -> str:
        """What a running stage is at."""
        return self.lines[name].phase

    def waiting(self, name: str) -> str | None:
        """What a stage waits for, and how long."""
        return self.lines[name].waits or None

    def follow(self, name: str, events: Path) -> None:
        """Show what a running stage has reported since the last call."""
        line = self.lines[name]
        for event in read_events(events, line):
            self._event(name, event)

    def _event(self, name: str, event: dict[str, Any]) -> None:
        line = self.lines[name]
        first = not line.waits
        line.event(event)
        if "phase" in event:
            facts = ", ".join(f"{k} {number(v)}" for k, v in event.items() if k not in ("phase", "time"))
            self._say(f"{name}: {event['phase']}" + (f" ({escape(facts)})" if facts else ""))
        elif time.time() - line.told > LINE_EVERY_S or (line.waits and first):
            if line.waits or "waiting" not in event:
                self._say(f"{name}: {escape(line.waits or line.progress())}")
        else:
            return
        line.told = time.time()

    def note(self, text: str) -> None:
        """A line that is of no stage; above the tree in a terminal. May be called from any thread."""
        self.console.print(
            f"[dim]{time.time() - self.started:7.1f} s[/]  {escape(text)}", highlight=False, soft_wrap=True
        )

    def _say(self, text: str) -> None:
        """A line for a log; a terminal shows it in the tree."""
        if not self.shows:
            self.console.print(f"[dim]{time.time() - self.started:7.1f} s[/]  {text}", highlight=False, soft_wrap=True)

    # -- the tree

    def _tree(self) -> RenderableType:
        grid = Table.grid(padding=(0, 1))
        for _ in range(3):
            grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True, width=24)
        grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        shown = self._shown(self.console.height - 3)
        for name in shown:
            grid.add_row(*self._row(name, self.lines[name]))
        if hidden := [line.state for name, line in self.lines.items() if name not in shown]:
            counts = ", ".join(f"{hidden.count(state)} {state}" for state in dict.fromkeys(hidden))
            grid.add_row("", Text(f"and {len(hidden)} more: {counts}", style="dim"))
        return grid

    def _shown(self, room: int) -> list[str]:
        """The stages there is room for: what runs or failed before what is done, before what waits."""
        urgent = {"running": 0, "failed": 1, "done": 2, "cached": 3, "waiting": 4}
        first = sorted(self.lines, key=lambda name: urgent[self.lines[name].state])[: max(room, 3)]
        return [name for name in self.lines if name in first]

    def _row(self, name: str, line: Line) -> tuple[RenderableType, ...]:
        style, indent = STYLES[line.state], "  " * min(line.depth, 6)
        head = (Text(indent + name, style=style), Text(line.kind, style="dim"))
        if line.state == "running":
            took = clock(time.time() - line.began)
            bar = ProgressBar(
                total=line.total or 1, completed=line.done if line.total else 0, width=24, pulse=not line.total
            )
            said = line.waits or f"{line.progress()}  ({took})"
            return (self.spinner, *head, bar, Text(said))
        time_taken = Text(f"{line.seconds:.1f} s" if line.seconds else "", style="dim")
        needs = [n for n in line.needs if self.lines[n].state not in ("done", "cached")]
        said = f"after {', '.join(needs)}" if line.state == "waiting" and needs else line.said
        return (
            Text(MARKS[line.state], style=style),
            *head,
            time_taken,
            Text(said, style="dim" * (line.state == "waiting")),
        )


def clock(seconds: float) -> str:
    """`0:42`, `12:05`, `3:02:11`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
