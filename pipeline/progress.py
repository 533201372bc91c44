"""What a run shows while it goes: a live line per running stage in a terminal, plain lines in a job's log."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

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


class Terminal:
    """Shows a run. `quiet` shows nothing; errors are told by whoever catches them."""

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(quiet=quiet)
        self.started = time.time()
        self.bars: dict[str, TaskID] = {}
        self.read: dict[str, int] = {}  # stage -> bytes of its events already read
        self.phase: dict[str, str] = {}
        self.waiting: dict[str, str] = {}  # stage -> what it waits for, and how long
        self.told: dict[str, float] = {}
        self.live = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[what]}"),
            TimeElapsedColumn(), TimeRemainingColumn(compact=True), console=self.console, transient=True,
            disable=not self.console.is_terminal,
        )  # fmt: skip

    def __enter__(self) -> Terminal:
        self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.live.stop()

    def stage(
        self,
        name: str,
        kind: str,
        state: str,
        *,
        seconds: float = 0,
        metrics: dict[str, Any] | None = None,
        resumed: bool = False,
    ) -> None:
        """A stage has come to a state: cached, running, done or failed."""
        if state == "running":
            self.bars[name] = self.live.add_task(f"[bold]{name}[/]", total=None, what=kind)
            self._say(f"{name}: {'goes on where it was' if resumed else 'started'} ({kind})")
            return
        if name in self.bars:
            self.live.remove_task(self.bars.pop(name))
        style, tail = {
            "cached": ("cyan", "unchanged"),
            "done": ("green", f"done in {seconds:.1f} s"),
            "failed": ("red", "failed"),
        }[state]
        said = brief(metrics or {})
        self._say(f"{name}: [{style}]{tail}[/]" + (f"  ({said})" if said else ""))

    def follow(self, name: str, events: Path) -> None:
        """Show what a running stage has reported since the last call."""
        if not events.is_file() or events.stat().st_size == self.read.get(name, 0):
            return
        with events.open() as file:
            file.seek(self.read.get(name, 0))
            lines = file.readlines()
            if lines and not lines[-1].endswith("\n"):
                lines.pop()
            self.read[name] = self.read.get(name, 0) + sum(len(line.encode()) for line in lines)
        for line in lines:
            self._event(name, json.loads(line))

    def _event(self, name: str, event: dict[str, Any]) -> None:
        if "waiting" in event:
            self._waits(name, event)
            return
        if "phase" in event:
            self.phase[name] = event["phase"]
            facts = ", ".join(f"{k} {number(v)}" for k, v in event.items() if k not in ("phase", "time"))
            self.live.update(self.bars[name], what=self.phase[name], total=None)
            if not self.console.is_terminal:
                self._say(f"{name}: {event['phase']}" + (f" ({facts})" if facts else ""))
            self.told[name] = time.time()
            return
        said = [f"  {key} {event[key]:.3f}" for key in ("loss", "reward", "kl") if event.get(key) is not None]
        what = f"{self.phase.get(name, '')} {event['done']}/{event['total']} {event['unit']}s{''.join(said)}"
        self.live.update(self.bars[name], completed=event["done"], total=event["total"], what=what)
        if not self.console.is_terminal and time.time() - self.told.get(name, 0) > LINE_EVERY_S:
            self.told[name] = time.time()
            self._say(f"{name}: {what}")

    def _waits(self, name: str, event: dict[str, Any]) -> None:
        """`waiting for 4 GPU: have 0 free of 2, can grow to 4; 12 s of 1800`."""
        if event["waiting"] is None:
            self.waiting.pop(name, None)
            self.live.update(self.bars[name], what=self.phase.get(name, ""))
            return
        what = f"waiting for {event['waiting']}; {event['seconds']} s of {event['limit']}"
        first, self.waiting[name] = name not in self.waiting, what
        self.live.update(self.bars[name], what=what, total=None)
        if not self.console.is_terminal and (first or time.time() - self.told.get(name, 0) > LINE_EVERY_S):
            self.told[name] = time.time()
            self._say(f"{name}: {what}")

    def _say(self, text: str) -> None:
        self.console.print(f"[dim]{time.time() - self.started:7.1f} s[/]  {text}", highlight=False, soft_wrap=True)
