"""Preparation through Ray Data: every row read is either prepared or in the ledger, and the work is reused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.data import source
from stages.data.chat import IGNORE, tokenizer_spec
from stages.data.encode import Recipe
from stages.data.ledger import read_entries
from stages.data.prepare import prepare
from stages.data.source import DataSource
from stages.errors import DataError
from stages.training import feed as feed_module
from stages.training.feed import Feed, Shares

from ..conftest import write_jsonl

pytestmark = pytest.mark.usefixtures("ray_address")


def test_rows_read_are_rows_kept_and_rows_in_the_ledger(
    tmp_path: Path, data: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (data / "chats.jsonl").read_text().splitlines()
    lines[3:3] = ['{"messages": ', '{"messages": [{"role": "user", "content": "Hi"}]}', '{"messages": []}', "[1]"]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(source, "CHUNK_BYTES", 4000)  # several tasks, several shards
    made = prepare(
        [DataSource(path=str(path), format="messages")], Recipe("conversation", tokenizer_spec(tokenizer)), tmp_path
    )
    ledger = made.manifest["ledger"]
    assert (ledger["read"], ledger["kept"], made.rows) == (105, 101, 101)
    assert ledger["reasons"] == {"malformed_json": 1, "no_assistant_turn": 1, "empty_content": 1, "not_an_object": 1}
    assert [(e.row, e.reason) for e in read_entries(made.path)] == [
        (4, "malformed_json"), (5, "no_assistant_turn"), (6, "empty_content"), (7, "not_an_object"),
    ]  # fmt: skip
    rows = made.read()
    assert len(made.manifest["shards"]) > 1
    assert [row["row"] for row in rows] == [n for n in range(1, 106) if n not in (4, 5, 6, 7)]
    assert made.tokens == sum(len(row["input_ids"]) for row in rows)
    assert made.manifest["trained_tokens"] == sum(label != IGNORE for row in rows for label in row["labels"])


def test_every_kind_of_file_prepares_the_same(tmp_path: Path, data: Path, tokenizer: Any) -> None:
    rows = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(20)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.csv").write_text("question,answer\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet", row_group_size=7)
    recipe = Recipe("conversation", tokenizer_spec(tokenizer))
    columns = {"prompt": "question", "completion": "answer"}
    sources = [DataSource(path=str(tmp_path / n)) for n in ("a.jsonl", "b.json", "d.parquet")]
    sources.append(DataSource(path=str(tmp_path / "c.csv"), columns=columns))
    made = prepare(sources, recipe, tmp_path / "prepared")
    counts = Counter(tuple(row["input_ids"]) for row in made.read())
    assert len(counts) == 20 and set(counts.values()) == {4}


def test_pairs_share_their_prompt_and_end_with_the_stop_token(tmp_path: Path, data: Path, tokenizer: Any) -> None:
    made = prepare(
        [DataSource(path=str(data / "pairs.jsonl"))], Recipe("preference", tokenizer_spec(tokenizer)), tmp_path
    )
    raw = [json.loads(line) for line in (data / "pairs.jsonl").open()]
    assert made.rows == len(raw)
    for row, pair in zip(made.read(), raw, strict=True):
        prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        assert row["prompt_ids"] == prompt
        for side in ("chosen", "rejected"):
            assert tokenizer.decode(row[f"{side}_ids"]) == pair[side][0]["content"] + "<|im_end|>"


def test_long_rows_go_to_the_ledger_and_are_not_cut(tmp_path: Path, data: Path, tokenizer: Any) -> None:
    sources = [DataSource(path=str(data / "chats.jsonl"))]
    whole = prepare(sources, Recipe("conversation", tokenizer_spec(tokenizer)), tmp_path)
    limit = sorted(len(row["input_ids"]) for row in whole.read())[50]
    cut = prepare(sources, Recipe("conversation", tokenizer_spec(tokenizer), max_length=limit), tmp_path)
    assert cut.manifest["longest"] <= limit
    assert cut.rows + cut.manifest["ledger"]["reasons"]["too_long"] == whole.rows
    assert [r for r in whole.read() if len(r["input_ids"]) <= limit] == cut.read()


def test_prepared_data_is_reused_by_content(tmp_path: Path, data: Path, tokenizer: Any) -> None:
    recipe = Recipe("conversation", tokenizer_spec(tokenizer))
    first = prepare([DataSource(path=str(data / "chats.jsonl"))], recipe, tmp_path / "p")
    stamp = (first.path / "manifest.json").stat().st_mtime_ns
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((data / "chats.jsonl").read_bytes())
    again = prepare([DataSource(path=str(copy))], recipe, tmp_path / "p")
    assert again.path == first.path and (again.path / "manifest.json").stat().st_mtime_ns == stamp
    other = prepare(
        [DataSource(path=str(copy))],
        Recipe("conversation", tokenizer_spec(tokenizer), "last_assistant"),
        tmp_path / "p",
    )
    assert other.path != first.path
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == sorted({first.path.name, other.path.name})


def test_data_of_which_no_row_can_be_used(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": [{"role": "user", "content": "Hi"}]}])
    with pytest.raises(
        DataError, match=r"none of the 1 rows can be used: no_assistant_turn 1; for example .*x.jsonl, row 1"
    ):
        prepare([DataSource(path=str(path))], Recipe("conversation", tokenizer_spec(tokenizer)), tmp_path)


def test_an_expected_answer_is_for_evaluation_and_never_trained(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}], "expected": "b"}]
    path, spec = write_jsonl(tmp_path / "x.jsonl", rows), tokenizer_spec(tokenizer)
    with pytest.raises(DataError, match="no_assistant_turn"):
        prepare([DataSource(path=str(path))], Recipe("conversation", spec), tmp_path / "p")
    (row,) = prepare([DataSource(path=str(path))], Recipe("evaluation", spec), tmp_path / "p").read()
    assert row["expected"] == "b" and row["prompt"].endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("start", [0, 5, 26, 40])
def test_the_feed_streams_through_ray_data_what_is_left(
    tmp_path: Path, data: Path, tokenizer: Any, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several windows, two epochs of 26 steps, two workers: from any step on, exactly the rows that were next."""
    monkeypatch.setattr(feed_module, "WINDOW_ROWS", 20)
    monkeypatch.setattr(source, "CHUNK_BYTES", 4000)  # several shards, so several row groups
    made = prepare(
        [DataSource(path=str(data / "chats.jsonl"))], Recipe("conversation", tokenizer_spec(tokenizer)), tmp_path
    )
    assert len(made.row_groups()) > 4
    shares = Shares(2, 2)
    steps = 2 * shares.steps(101)

    def rows(from_step: int) -> list[list[int]]:
        out = []
        for rank in range(2):
            feed = Feed(made.row_groups(), rank=rank, shares=shares, steps=steps, seed=0, start_step=from_step)
            out.append([row["row"] for _ in range(from_step // 26, 2) for batch in feed for row in batch])
        return out

    whole, rest = rows(0), rows(start)
    assert sorted(whole[0] + whole[1]) == sorted([*range(1, 102)] * 2)
    assert [worker[len(worker) - len(r) :] for worker, r in zip(whole, rest, strict=True)] == rest
    assert sum(map(len, rest)) == 202 - (start % 26 * 4 + start // 26 * 101)
