"""`raylign chat`: talk to models of a run, in the chat template they were trained with; several answer one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from pipeline.artifacts import RunFolder
from stages.data.tokenizer import check_model_folder
from stages.errors import DataError
from stages.storage import pull

NARROWEST = 36  # columns an answer needs to stand beside another


def choose_models(folder: RunFolder, stages: Sequence[str]) -> dict[str, Path]:
    """Stage -> model folder, of the stages that are named or else of the last one that made a policy.

    Raises:
        DataError: there is none.
    """
    names = list(folder.state().get("stages", {}))
    is_model = lambda name: (folder.manifest(name) or {}).get("produces") == "model"  # noqa: E731
    for stage in stages:
        if stage not in names or not is_model(stage):
            known = ", ".join(filter(is_model, names)) or "none yet"
            raise DataError(f"--stage {stage}: no published model of that name; there are: {known}")
    chosen = list(stages) or list(islice(filter(is_model, reversed(names)), 1))
    if not chosen:
        raise DataError(f"{folder.path}: no model is published in this run yet")
    return {name: folder.stage(name) / "model" for name in chosen}


def device() -> str:
    """Where a model answers: on this machine's GPU where it has one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


@dataclass
class Talker:
    """A model with its side of the conversation."""

    name: str
    path: Path
    max_new_tokens: int
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_model_folder(str(self.path))  # the run may be another's
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(self.path, trust_remote_code=False)
        self.model: Any = model.eval().to(device())

    def answer(self, line: str, show: Callable[[str], None]) -> None:
        """Answer greedily, with all that was said before; `show` is given every piece of text as it comes."""
        from transformers import TextStreamer

        class Shown(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                pieces.append(text)
                show(text)

        pieces: list[str] = []
        self.messages.append({"role": "user", "content": line})
        inputs = self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        inputs = {k: v.to(self.model.device) for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
        streamer = Shown(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.model.generate(**inputs, do_sample=False, max_new_tokens=self.max_new_tokens, streamer=streamer)
        self.messages.append({"role": "assistant", "content": "".join(pieces)})


def talk(run: str, stages: Sequence[str], max_new_tokens: int, console: Console) -> None:
    """Read lines and have them answered, each model with the conversation as it went with it, until an empty line."""
    models = choose_models(RunFolder.open(run), stages)
    talkers = [Talker(name, pull(path), max_new_tokens) for name, path in models.items()]
    for talker in talkers:
        console.print(f"{talker.name}: {talker.path}", style="dim", highlight=False, soft_wrap=True)
    console.print("an empty line ends", style="dim")
    while True:
        try:
            line = console.input("[bold]> [/]").strip()
        except EOFError:
            return
        if not line:
            return
        show_answers(talkers, line, console)


def show_answers(talkers: Sequence[Talker], line: str, console: Console) -> None:
    """The models' answers as they come: side by side in a terminal that is wide enough, else one below another."""
    texts = {talker.name: "" for talker in talkers}
    drawn = Live(console=console, refresh_per_second=12, get_renderable=lambda: _side_by_side(texts, console.width))
    with drawn if console.is_terminal else nullcontext():
        for talker in talkers:

            def show(piece: str, name: str = talker.name) -> None:
                texts[name] += piece

            talker.answer(line, show)
    if not console.is_terminal:
        for name, text in texts.items():
            console.print(Text(f"{name}: " * (len(texts) > 1) + text), soft_wrap=True)


def _side_by_side(texts: dict[str, str], width: int) -> RenderableType:
    if len(texts) == 1:
        return Text(next(iter(texts.values())))
    each = width // len(texts)
    across = each if each >= NARROWEST else width
    panels = [Panel(Text(text), title=name, title_align="left", width=across - 1) for name, text in texts.items()]
    return Columns(panels, padding=0)
