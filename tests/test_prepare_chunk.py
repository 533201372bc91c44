"""What one task does, with rows of every kind of wrong: no traceback, no wrong count, the good rows unharmed."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.inspection import looking
from stages.data.chat import IGNORE, TokenizerSpec, tokenizer_spec
from stages.data.chunks import chunks
from stages.data.encode import Recipe, Task
from stages.data.ledger import read_entries
from stages.data.shards import percentiles, prepare_chunk
from stages.data.source import DataSource, find_files

GOOD = {
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "tools": "[]"},
    "alpaca": {"instruction": "a", "input": "", "output": "b", "history": [["c", "d"]]},
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "text": {"text": "a b"},
    "transcript": {"text": "\n\nHuman: a\n\nAssistant: b"},
    "tokens": {"input_ids": [5, 6, 7], "labels": [IGNORE, 6, 7]},
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1},
    "kto": {"prompt": "a", "completion": "b", "label": True},
    "prompt": {"prompt": "a", "extra": 1},
}  # fmt: skip
TASKS: dict[str, Task] = {"preference": "preference", "kto": "labelled", "prompt": "prompt"}
OTHER: list[tuple[str, Task]] = [("preference", "labelled"), ("preference", "prompt"), ("kto", "prompt")]
ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["assistant", "user", "<|im_end|>", "\ud800", "<think>", "\U0010fff0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "train", "weight"]),
        inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@st.composite
def damaged(draw: Any, good: Any) -> Any:
    """A good row with one of its parts replaced, anywhere in it."""
    if not isinstance(good, dict | list) or not good or draw(st.integers(0, 3)) == 0:
        return draw(ODD)
    key = draw(st.sampled_from(sorted(good) if isinstance(good, dict) else range(len(good))))
    out = dict(good) if isinstance(good, dict) else list(good)
    out[key] = draw(damaged(good[key]))
    return out


def lines(format: str) -> st.SearchStrategy[bytes]:
    def dumped(row: Any) -> bytes:
        return json.dumps(row).encode()

    return st.one_of(
        st.just(dumped(GOOD[format])), damaged(GOOD[format]).map(dumped), ODD.map(dumped),
        st.binary(max_size=20).map(lambda raw: raw.replace(b"\n", b" ")), st.just(b'{"messages": [{"role": "user", '),
    )  # fmt: skip


def prepared(
    path: Path, format: str, spec: TokenizerSpec, task: Task | None = None, **options: Any
) -> tuple[dict[str, Any], list[dict[str, Any]], list[Any]]:
    """(counts, rows, ledger) of the only chunk of a file."""
    source = DataSource(path=str(path), format=format, **options)
    recipe = Recipe(task or TASKS.get(format, "conversation"), spec, max_length=60)
    (chunk,) = chunks(0, find_files(source)[0])
    prepare_chunk(0, chunk, source, format, recipe, path.parent)
    done = json.loads((path.parent / "done-000000.json").read_text())
    rows = pq.read_table(path.parent / done["shard"]["file"]).to_pylist() if done["shard"] else []
    return done, rows, list(read_entries(path.parent))


@pytest.mark.parametrize(("format", "task"), [*((format, None) for format in sorted(GOOD)), *OTHER])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_every_row_is_trained_or_in_the_ledger(
    tokenizer: Any, format: str, task: Task | None, data: st.DataObject
) -> None:
    raw = data.draw(st.lists(lines(format), min_size=1, max_size=12))
    present = [line for line in raw if line.strip()]
    if not present:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(b"\n".join(raw) + b"\n")
        done, rows, entries = prepared(path, format, tokenizer_spec(tokenizer), task)
    if (format, task) == ("preference", "labelled"):
        assert [row["label"] for row in rows] == [True, False] * done["kept"]
        done["examples"], rows = done["examples"] // 2, rows[::2]
    assert done["read"] == len(present) == done["kept"] + len(entries)
    assert done["examples"] == len(rows) == done["kept"]
    assert sorted([row["row"] for row in rows] + [entry.row for entry in entries]) == [
        n for n, line in enumerate(raw, 1) if line.strip()
    ]
    good = json.dumps(GOOD[format]).encode()
    assert {row["row"] for row in rows} >= {n for n, line in enumerate(raw, 1) if line == good}
    for row in rows:
        if "labels" in row:
            assert len(row["labels"]) == len(row["input_ids"]) and any(label != IGNORE for label in row["labels"])
    assert all(entry.reason and entry.reason.replace("_", "").isalpha() for entry in entries)


def test_a_truncated_gzip_and_a_huge_row_keep_the_rest(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": f"a {i}", "completion": "x" * 10_000_000 if i == 50 else "b"} for i in range(2000)]
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    (tmp_path / "rows.jsonl.gz").write_bytes(whole[: len(whole) * 2 // 3])
    done, kept, entries = prepared(tmp_path / "rows.jsonl.gz", "prompt_completion", tokenizer_spec(tokenizer))
    assert (entries[0].row, entries[0].reason, entries[-1].reason) == (51, "too_long", "truncated_file")
    assert [row["row"] for row in kept] == [n for n in range(1, len(kept) + 2) if n != 51] and len(kept) > 100
    assert done["read"] == done["kept"] + len(entries)


def test_a_template_that_raises_refuses_its_rows_by_name(tmp_path: Path, tokenizer: Any) -> None:
    template = (
        "{% if messages[0].content == 'bad' %}{{ raise_exception('not this one') }}{% endif %}"
        + tokenizer.chat_template
    )
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": "b"}) + "\n" for p in ("good", "bad", "good")))
    done, kept, entries = prepared(path, "prompt_completion", tokenizer_spec(tokenizer, template))
    assert [row["row"] for row in kept] == [1, 3] and done["read"] == 3
    assert [(e.row, e.reason, e.detail) for e in entries] == [(2, "template_error", "not this one")]


@given(st.lists(st.integers(1, 40), max_size=300))
def test_lengths_are_those_that_inspect_shows(lengths: list[int]) -> None:
    shown = looking.percentiles(lengths)
    shown.pop("shortest", None)
    assert percentiles(Counter(lengths)) == shown
