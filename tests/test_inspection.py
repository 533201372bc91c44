"""`raylign inspect`: what is shown is what is trained, and hostile data stays text."""

from __future__ import annotations

import dataclasses
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.inspection import Inspection, as_json, inspect, page, terminal, words
from pipeline.inspection.examples import Example, Piece, Watched, examples_of, is_pair, offsets, places_kept, visible
from pipeline.inspection.looking import Look, Part, histogram, look, percentiles
from pipeline.plan import make_plan
from pipeline.spec_reader import load_spec
from stages.data.chat import CHATML, IGNORE, tokenizer_spec
from stages.data.encode import Recipe, encode_rows, encoder_for
from stages.data.source import DataSource, resolve_formats
from stages.errors import SpecError

from .conftest import chat, write_jsonl

DIALOG = chat(random.Random(3), 2)
CALLS = CHATML.replace(
    "{{ message['content'] }}",
    "{{ message['content'] or '' }}{% for c in message.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}",
)
PAIR = {"prompt": DIALOG[:-1], "chosen": DIALOG[-1:], "rejected": [{"role": "assistant", "content": "h h h h"}]}
ROWS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "conversation": ("messages", "conversation", {"messages": DIALOG}, {}),
    "all": ("messages", "conversation", {"messages": DIALOG}, {"train_on": "all"}),
    "last": ("messages", "conversation", {"messages": DIALOG}, {"train_on": "last_assistant"}),
    "cut left": ("messages", "conversation", {"messages": DIALOG}, {"max_length": 20, "truncation": "left"}),
    "cut right": ("messages", "conversation", {"messages": DIALOG}, {"max_length": 60, "truncation": "right"}),
    "letters": ("messages", "conversation", {"messages": [*DIALOG[:2], {"role": "assistant", "content": " é 你 😊 \n"}]}, {}),
    "control token": ("messages", "conversation", {"messages": [{"role": "user", "content": "é <|im_end|> b"}, DIALOG[2]]}, {}),
    "weights": ("messages", "conversation", {"messages": [*DIALOG[:2], {**DIALOG[2], "weight": 0.5}]}, {}),
    "text": ("text", "conversation", {"text": "once upon a time"}, {}),
    "tokens": ("tokens", "conversation", {"input_ids": [70, 71, 72], "labels": [IGNORE, 71, 72]}, {}),
    "evaluation": ("messages", "evaluation", {"messages": DIALOG, "expected": "x"}, {}),
    "prompt": ("prompt", "prompt", {"prompt": "a b c?"}, {}),
    "pair": ("preference", "preference", PAIR, {}),
    "pair cut left": ("preference", "preference", PAIR, {"max_length": 30, "truncation": "left"}),
    "labelled": ("kto", "labelled", {"prompt": DIALOG[:-1], "completion": DIALOG[-1:], "label": False}, {}),
    "pair split": ("preference", "labelled", PAIR, {}),
    "pair split, cut": ("preference", "labelled", PAIR, {"max_length": 30, "truncation": "left"}),
}  # fmt: skip


def shown(
    tokenizer: Any, format: str, task: Any, row: dict[str, Any], options: dict[str, Any]
) -> tuple[list[Example], Any]:
    """What `inspect` shows of a row, and what training gets of it."""
    template = options.pop("template", None)
    recipe = Recipe(task, tokenizer_spec(tokenizer, template), **options)
    how: dict[str, Any] = {"file": "f", "format": format, "source": DataSource(path="f"), "recipe": recipe}
    encoder = encoder_for(recipe)
    outcome = next(encode_rows(iter([(7, row)]), **how, encoder=encoder))
    assert outcome.entry is None, outcome.entry
    return examples_of(row, 7, **how, encoder=Watched(encoder)), outcome


@pytest.mark.parametrize("name", ROWS)
def test_what_is_shown_is_what_is_trained(tokenizer: Any, name: str) -> None:
    format, task, row, options = ROWS[name]
    examples, outcome = shown(tokenizer, format, task, row, dict(options))
    made = outcome.examples[0]
    if task == "preference":
        wanted = [(made["prompt_ids"], made["chosen_ids"]), (made["prompt_ids"], made["rejected_ids"])]
    elif task == "labelled":
        wanted = [(made["prompt_ids"], made["completion_ids"]) for made in outcome.examples]
    elif task == "prompt":
        wanted = [(made["prompt_ids"], [])]
    else:
        kept = [label for label in made["labels"] if label != IGNORE]
        assert [t.id for t in examples[0].tokens] == made["input_ids"]
        assert [t.trained for t in examples[0].tokens] == [label != IGNORE for label in made["labels"]]
        wanted = [([t.id for t in examples[0].tokens if not t.trained], kept)]
    assert len(examples) == len(wanted)
    for example, (before, trained) in zip(examples, wanted, strict=True):
        assert [t.id for t in example.tokens if t.trained] == trained
        assert [t.id for t in example.tokens if not t.trained] == before
        assert example.trained_tokens == len(trained)
        found = example.as_json()
        assert "".join(s["text"] for s in found["segments"]) == found["text"] == example.text
        text = "".join(s["text"] for s in found["segments"] if s["trained"])
        assert text == tokenizer.decode(trained, skip_special_tokens=False)
        assert "".join(piece.text for piece in example.pieces()) == example.text


def test_who_speaks(tokenizer: Any) -> None:
    (example,), _ = shown(tokenizer, "messages", "conversation", {"messages": DIALOG}, {})
    assert [s["role"] for s in example.as_json()["segments"] if s["trained"]] == ["assistant", "assistant"]
    roles = list(dict.fromkeys(example.who))
    assert roles == ["system", "user", "assistant"]
    (example,), _ = shown(tokenizer, "text", "conversation", {"text": "abc"}, {})
    assert [(p.text, p.role, p.special) for p in example.pieces()] == [
        ("abc", "text", False),
        ("<|im_end|>", "template", True),
    ]
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}
    row = {"messages": [DIALOG[1], call, {"role": "tool", "content": "2"}, DIALOG[2]]}
    (example,), _ = shown(tokenizer, "messages", "conversation", row, {"template": "BEGIN " + CALLS})
    assert list(dict.fromkeys(example.who)) == ["template", "user", "assistant", "tool"]
    assert "<call>" in next(p.text for p in example.pieces() if p.trained)


def test_each_turn_of_a_template_that_rewrites_history_is_shown_with_its_own_text(tokenizer: Any) -> None:
    template = CHATML.replace(
        "{{ message['content'] }}",
        "{{ message['content'].split('</think>')[-1] if message.role == 'assistant' and not loop.last else message['content'] }}",
    )
    thought = [{**m, "content": "<think>x y</think>" + m["content"]} if m["role"] == "assistant" else m for m in DIALOG]
    options = {"template": template, "history": "per_turn"}
    examples, outcome = shown(tokenizer, "messages", "conversation", {"messages": thought}, options)
    assert len(examples) == len(outcome.examples) == 2
    for example, made in zip(examples, outcome.examples, strict=True):
        assert [t.id for t in example.tokens if t.trained] == [label for label in made["labels"] if label != IGNORE]
        assert [role for p in example.pieces() if p.trained for role in [p.role]] == ["assistant", "assistant"]


def test_a_pair_has_its_prompt_once(tokenizer: Any) -> None:
    (chosen, rejected), _ = shown(tokenizer, *ROWS["pair"])
    assert chosen.text[: chosen.answer_at] == rejected.text[: rejected.answer_at]
    assert chosen.text[chosen.answer_at :] == DIALOG[-1]["content"] + "<|im_end|>"
    (chosen, _), _ = shown(tokenizer, *ROWS["pair cut left"])
    assert chosen.cut[0] > 0 and chosen.cut[1] == 0
    assert chosen.text.endswith("assistant\n" + DIALOG[-1]["content"] + "<|im_end|>")


def test_a_pair_that_is_split_shows_its_prompt_once_and_which_answer_is_wanted(tokenizer: Any) -> None:
    row, _ = shown(tokenizer, *ROWS["pair split"])
    assert is_pair(row) and [example.answer for example in row] == ["wanted", "unwanted"]
    pair, _ = shown(tokenizer, *ROWS["pair"])
    assert [example.text for example in row] == [example.text for example in pair]
    assert not is_pair(shown(tokenizer, *ROWS["labelled"])[0])


def test_a_margin_is_shown(tokenizer: Any) -> None:
    format, task, row, options = ROWS["pair"]
    (chosen, _), _ = shown(tokenizer, format, task, row | {"margin": 1.5}, dict(options))
    assert chosen.as_json()["margin"] == 1.5 and words.margin(chosen) == "margin 1.5"
    (chosen, _), _ = shown(tokenizer, *ROWS["pair"])
    assert "margin" not in chosen.as_json() and words.margin(chosen) == ""


def test_what_a_cut_leaves() -> None:
    assert places_kept([1, 2, 3], [1, 2, 3]) == [0, 1, 2]
    assert places_kept([1, 2, 3, 4], [1, 2]) == [0, 1]
    assert places_kept([1, 2, 3, 4], [3, 4]) == [2, 3]
    assert places_kept([1, 2, 3, 4], [1, 4]) == [0, 3]


def test_a_left_cut_keeps_the_first_token(tokenizer: Any) -> None:
    spec = tokenizer_spec(tokenizer, "{{ bos_token }}" + CHATML)
    spec = dataclasses.replace(spec, variables=spec.variables | {"bos_token": "<|endoftext|>"})
    recipe = Recipe("conversation", spec, max_length=30, truncation="left")
    encoder = Watched(encoder_for(recipe))
    source = DataSource(path="f")
    (example,) = examples_of(
        {"messages": DIALOG}, 1, file="f", format="messages", source=source, recipe=recipe, encoder=encoder
    )
    assert example.text.startswith("<|endoftext|>") and example.text.endswith(DIALOG[-1]["content"] + "<|im_end|>\n")
    assert len(example.tokens) == 30 and example.cut[0] > 0
    assert "".join(example.text[t.start : t.end] for t in example.tokens) == example.text


def test_token_borders_where_content_spells_a_control_token(tokenizer: Any) -> None:
    (example,), _ = shown(tokenizer, *ROWS["control token"])
    assert "control_token_as_text" in example.warnings
    spelled = [p for p in example.pieces() if p.role == "user" and p.special]
    assert [p.text for p in spelled] == ["<|im_start|>", "<|im_end|>"]  # the template's own
    places = offsets(
        encoder_for(Recipe("conversation", tokenizer_spec(tokenizer))), example.text, [t.id for t in example.tokens]
    )
    assert places and places[-1][1] == len(example.text)


# ------------------------------------------------------------------------------------------------ numbers


def part(path: Path, tokenizer: Any, **options: Any) -> Part:
    source = DataSource(path=str(path), **options.pop("source", {}))
    recipe = Recipe("conversation", tokenizer_spec(tokenizer), **options)
    return Part(recipe, [source], resolve_formats([source]), max_dropped=0.01)


def test_the_numbers_add_up(data: Path, tokenizer: Any) -> None:
    found = look(part(data / "chats.jsonl", tokenizer), 2)
    stats = found.stats
    assert (stats.read, stats.kept, stats.complete, len(found.rows)) == (101, 101, True, 2)
    assert sum(counts["tokens"] for counts in stats.roles.values()) == stats.tokens
    assert sum(counts["trained"] for counts in stats.roles.values()) == stats.trained_tokens
    assert stats.roles["assistant"]["trained"] == stats.trained_tokens and 0 < stats.share < 1
    assert sum(bar.count for bar in stats.histogram) == 101
    assert stats.stops is None and not stats.lost


def test_what_is_left_out(tmp_path: Path, tokenizer: Any) -> None:
    rows: list[Any] = [{"messages": DIALOG}, {"messages": DIALOG}, {"messages": []}, {"messages": DIALOG[:2]}]
    rows += [{"messages": chat(random.Random(9), 12)}, {"messages": chat(random.Random(4), 1), "skip": True}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    options = {"max_length": 200, "packing": True, "deduplicate": True, "source": {"filter": "skip is not defined"}}
    stats = look(part(path, tokenizer, **options), 3).stats
    assert stats.asked_for == {"duplicate": 1, "filtered": 1}
    assert stats.lost.keys() == {"empty_messages", "no_assistant_turn", "too_long"} or sum(stats.lost.values()) == 3
    assert stats.over == 1 and stats.lengths["longest"] > 200 and stats.kept == 1
    assert stats.packing == {"packs": 1, "fill": stats.tokens / 200}
    assert stats.stops and "max_dropped" in stats.stops
    cut = look(part(path, tokenizer, max_length=200, truncation="left"), 3).stats
    assert cut.over == 1 and [w["code"] for w in cut.warnings] == ["truncated"] and cut.lengths["longest"] > 200


def test_sources_are_looked_at_in_turn(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.inspection import looking

    monkeypatch.setattr(looking, "LOOKED_AT", 25)
    monkeypatch.setattr(looking, "BATCH", 10)
    monkeypatch.setattr(looking, "SAMPLED", 5)
    sources = []
    for name, count in (("a", 40), ("b", 3)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", [{"messages": chat(random.Random(i), 1)} for i in range(count)])
        sources.append(DataSource(path=str(path)))
    recipe = Recipe("conversation", tokenizer_spec(tokenizer))
    found = look(Part(recipe, sources, resolve_formats(sources), 0.01), 3)
    assert (found.stats.read, found.stats.complete, found.stats.roles_of) == (25, False, 5)
    assert [(Path(row[0].source).name, row[0].row) for row in found.rows] == [
        ("a.jsonl", 1),
        ("a.jsonl", 2),
        ("b.jsonl", 1),
    ]


def test_the_histogram() -> None:
    assert histogram([]) == [] and percentiles([]) == {}
    bars = histogram([5, 5, 12, 99])
    assert [(b.start, b.end) for b in bars[:2]] == [(5, 10), (10, 15)] and sum(b.count for b in bars) == 4
    tail = histogram([100] * 999 + [90_000], mark=150)
    assert tail[-1].end is None and tail[-1].count == 1 and len(tail) < 30
    assert any(b.start <= 150 < (b.end or 0) for b in tail)
    assert histogram([7])[0].count == 1


# ------------------------------------------------------------------------------------------------ showing

HOSTILE = "</script><script>alert(1)</script> \"q\" 'q' & {{ 7 * 7 }} \u202e\x1b[31m\x07 [bold]x[/bold]"


@pytest.fixture
def hostile(tmp_path: Path, tokenizer: Any) -> list[Inspection]:
    rows: list[Any] = [{"messages": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE}]}]
    rows.append({"messages": [{"role": HOSTILE, "content": "x"}]})
    chats = look(part(write_jsonl(tmp_path / "</script>\x1b[1m.jsonl".replace("/", "-"), rows), tokenizer), 3)
    source = DataSource(path=str(write_jsonl(tmp_path / "pairs.jsonl", [PAIR])))
    recipe = Recipe("preference", tokenizer_spec(tokenizer))
    pairs = look(Part(recipe, [source], ["preference"], 0.01), 3)
    return [Inspection("sft", "sft", chats), Inspection("dpo", "dpo", pairs)]


def printed(inspections: list[Inspection], width: int = 120, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, **options)
    terminal.show(inspections, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_page_escapes_everything_and_needs_no_network(hostile: list[Inspection]) -> None:
    html = page.render(hostile, HOSTILE)
    assert "alert(1)" in html and "<script" not in html and "\u202e" not in html and "\x1b" not in html
    assert "49" not in html.split("<section")[0] and "http" not in html
    assert html.count("<mark>") > 2 and "<kbd>" in html and 'title="token' in html
    assert 'class="chosen"' in html and 'class="rejected"' in html and "<svg" in html


def test_the_terminal_without_colours(hostile: list[Inspection]) -> None:
    text = printed(hostile)
    assert "\x1b" not in text and "\u202e" not in text and "\x07" not in text
    assert "⟦</script>" in text and "<|im_end|>⟧" in text and "[bold]x[/bold]" in text
    assert text.count("⟦") == text.count("⟧")
    assert text.count(DIALOG[1]["content"]) == 1  # the prompt of a pair, once
    beside = next(line for line in text.splitlines() if line.startswith("chosen"))
    assert "rejected" in beside
    narrow = printed(hostile, width=60)
    assert not any("rejected" in line for line in narrow.splitlines() if line.startswith("chosen"))


def test_the_terminal_with_colours(hostile: list[Inspection]) -> None:
    text = printed(hostile, force_terminal=True, color_system="standard", no_color=False, _environ={})
    assert "\x1b[30;42m" in text and "⟦" not in text
    assert "\x1b[31m\x07" not in text
    assert "⟦" in printed(hostile, force_terminal=True, color_system="standard", no_color=True, _environ={})


def test_labelled_answers_and_split_pairs(tmp_path: Path, tokenizer: Any) -> None:
    paths = [
        write_jsonl(tmp_path / "pairs.jsonl", [PAIR]),
        write_jsonl(tmp_path / "kto.jsonl", [{"prompt": "a?", "completion": "b", "label": False}]),
    ]
    sources = [DataSource(path=str(path)) for path in paths]
    recipe = Recipe("labelled", tokenizer_spec(tokenizer))
    kto = Inspection("kto", "kto", look(Part(recipe, sources, resolve_formats(sources), 0.01), 3))
    text = printed([kto])
    assert "2 kept as 3 examples (1 wanted, 2 unwanted)" in text
    assert text.count(DIALOG[1]["content"]) == 1
    beside = next(line for line in text.splitlines() if line.startswith("wanted"))
    assert "unwanted" in beside and "kto.jsonl:1 (unwanted)" in text
    html = page.render([kto], "kto")
    assert 'class="wanted"' in html and 'class="unwanted"' in html


def test_long_rows_lose_their_middle() -> None:
    pieces = [Piece("a" * 10, "user", False, False, 0), Piece("b" * 100, "assistant", True, False, 10)]
    parts = words.abridged(pieces, 20, 1000)
    assert [getattr(p, "text", p) for p in parts] == ["a" * 10, "b" * 10, words.Gap(80, "assistant", True), "b" * 10]
    assert sum(p.characters if isinstance(p, words.Gap) else len(p.text) for p in parts) == 110
    many = [Piece("c" * 10, "user", False, False, 10 * i) for i in range(100)]
    parts = words.abridged(many, 20, 100)
    assert len(parts) < 15 and sum(p.characters if isinstance(p, words.Gap) else len(p.text) for p in parts) == 1000
    assert words.abridged(many, 20, 1000) == many


def test_visible() -> None:
    assert visible("a\tb\n\x00\u202e\ud800 é 👩‍🚀") == "a\tb\n\\x00\\u202e\\ud800 é 👩‍🚀"


# ------------------------------------------------------------------------------------------------ a spec


@pytest.fixture
def spec(data: Path, model: str, tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(
        f"name: t\nmodel: {model}\nstorage: {tmp_path}/runs\nstages:\n"
        f"  eval: {{kind: evaluate, models: [stages.dpo], data: [{{path: {data}/heldout.jsonl}}, {{path: {data}/pairs.jsonl}}]}}\n"
        f"  sft: {{kind: sft, data: [{{path: {data}/chats.jsonl}}], train: {{max_length: 256}}}}\n"
        f"  reward: {{kind: reward, model: stages.sft, data: [{{path: {data}/pairs.jsonl}}], train: {{max_length: 256}}}}\n"
        f"  dpo: {{kind: dpo, model: stages.sft, data: [{{path: {data}/pairs.jsonl}}], train: {{max_length: 256}}}}\n"
    )
    return path


def test_every_stage_that_reads_data_is_looked_at(spec: Path) -> None:
    plan = make_plan(load_spec(spec, []))
    found = inspect(plan, None, 2)
    assert [words.title(i) for i in found] == ["sft", "dpo", "reward", "eval: conversations", "eval: pairs"]
    assert found[1].look is found[2].look  # the same rows, looked at once
    whole = as_json(found)
    json.dumps(whole)
    assert {"stage", "rows", "ledger"} <= whole.keys() and whole["stage"] == "sft" and len(whole["others"]) == 4
    row = whole["rows"][0]
    assert {"source", "row", "text", "segments", "tokens", "trained_tokens"} <= row.keys()
    assert {"text", "trained", "role"} == row["segments"][0].keys()
    one = as_json(inspect(plan, "dpo", 1))
    assert "others" not in one and [r["answer"] for r in one["rows"]] == ["chosen", "rejected"]
    with pytest.raises(SpecError, match="no such stage"):
        inspect(plan, "nope", 1)


def test_nothing_to_show(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", [{"messages": [DIALOG[1]]}])
    found: list[Inspection] = [Inspection("sft", "sft", look(part(path, tokenizer), 3))]
    assert isinstance(found[0].look, Look) and found[0].rows == [] and found[0].stats.stops
    assert "A run would stop" in printed(found) and "No row of it" in page.render(found, "t")
