"""`raylign chat`: answers as they come, side by side, each model with the conversation as it went with it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from pipeline.chat import Talker, device, show_answers


@pytest.fixture
def talker(model: str) -> Callable[..., Talker]:
    def made(name: str = "sft", tokens: int = 8) -> Talker:
        talker = Talker(name, Path(model), tokens)
        # A fresh model says anything, and may stop at once: this one says words.
        words = {i for token, i in talker.tokenizer.get_vocab().items() if re.fullmatch("Ġ[a-z]+", token)}
        talker.model.generation_config.suppress_tokens = sorted(set(range(len(talker.tokenizer))) - words)
        return talker

    return made


def prompts_of(talker: Talker) -> list[str]:
    """What the model is given from now on, as text."""
    seen: list[str] = []
    generate = talker.model.generate

    def watched(**inputs: Any) -> Any:
        seen.append(talker.tokenizer.decode(inputs["input_ids"][0]))
        return generate(**inputs)

    talker.model.generate = watched
    return seen


def test_an_answer_is_shown_piece_by_piece_while_it_is_made(talker: Callable[..., Talker]) -> None:
    one = talker(tokens=24)
    steps, pieces = [], []
    one.model.register_forward_hook(lambda *_: steps.append(1))
    one.answer("Reverse: a b c", lambda piece: pieces.append((len(steps), piece)))
    shown = [(at, piece) for at, piece in pieces if piece]
    assert len(shown) > 2 and shown[0][0] < len(steps) == 24  # tokens made when the first piece was shown
    ids = one.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Reverse: a b c"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    whole = one.model.generate(ids.to(one.model.device), do_sample=False, max_new_tokens=24)[0, ids.shape[1] :]
    assert "".join(piece for _, piece in pieces) == one.tokenizer.decode(whole, skip_special_tokens=True)


def test_a_model_is_given_all_that_was_said_with_it_before(talker: Callable[..., Talker]) -> None:
    one = talker()
    seen = prompts_of(one)
    for line in ("Reverse: a b c", "Reverse: d e f"):
        one.answer(line, lambda piece: None)
    first, second = seen
    answer = one.messages[1]["content"]
    assert [m["role"] for m in one.messages] == ["user", "assistant"] * 2 and answer
    assert "d e f" not in first and second.startswith(first + answer)
    assert second.index("Reverse: a b c") < second.index("Reverse: d e f")


@pytest.mark.parametrize(("width", "beside"), [(120, True), (60, False)])
def test_answers_stand_side_by_side_where_there_is_room(
    talker: Callable[..., Talker], width: int, beside: bool
) -> None:
    drawn = io.StringIO()
    console = Console(file=drawn, width=width, force_terminal=True, color_system=None)
    both = [talker("sft"), talker("dpo")]
    show_answers(both, "Reverse: a b c", console)
    last = drawn.getvalue().rsplit("sft", 1)[1]
    assert ("dpo" in last.splitlines()[0]) is beside and "dpo" in last
    assert len(both[0].messages) == len(both[1].messages) == 2


def test_without_a_terminal_answers_are_lines(talker: Callable[..., Talker]) -> None:
    told = io.StringIO()
    both = [talker("sft"), talker("dpo")]
    show_answers(both, "Reverse: a b c", Console(file=told, width=80))
    for each in both:
        assert f"{each.name}: {each.messages[-1]['content']}" in told.getvalue()


def test_models_answer_on_the_gpu_where_there_is_one(talker: Callable[..., Talker]) -> None:
    assert talker().model.device.type == device()
    assert (device() == "cuda") is torch.cuda.is_available()
