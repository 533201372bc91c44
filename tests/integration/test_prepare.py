"""Preparation through Ray Data: every row read is either prepared or in the ledger, and the work is reused."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.estimate import longest_sequence
from stages.data import chunks, shards
from stages.data import prepare as preparation
from stages.data.chat import IGNORE, tokenizer_spec
from stages.data.encode import Recipe
from stages.data.ledger import check_lost, read_entries
from stages.data.prepare import prepare
from stages.data.source import DataSource
from stages.errors import DataError
from stages.training import feed as feed_module
from stages.training.feed import Feed, Position, Shares

from ..conftest import write_jsonl

pytestmark = pytest.mark.usefixtures("ray_address")


def test_rows_read_are_rows_kept_and_rows_in_the_ledger(
    tmp_path: Path, data: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (data / "chats.jsonl").read_text().splitlines()
    lines[3:3] = ['{"messages": ', '{"messages": [{"role": "user", "content": "Hi"}]}', '{"messages": []}', "[1]"]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4000)  # several tasks, several shards
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


def test_pairs_and_labelled_answers_in_one_dataset(tmp_path: Path, data: Path, tokenizer: Any) -> None:
    """A pair is one row of the ledger and two examples; what their labels and margins come to is in the manifest."""
    pairs = [json.loads(line) for line in (data / "pairs.jsonl").open()]
    pairs[3] |= {"margin": 0.5}
    pairs[4] |= {"rejected": " "}
    pairs[5] |= {"margin": "much"}
    alone = [
        {"prompt": pair["prompt"], "completion": pair["chosen"], "label": i % 3 == 0} for i, pair in enumerate(pairs)
    ]
    sources = [
        DataSource(path=str(write_jsonl(tmp_path / "pairs.jsonl", pairs)), weight=2.0, eval=0.2),
        DataSource(path=str(write_jsonl(tmp_path / "alone.jsonl", alone))),
    ]
    made = prepare(sources, Recipe("labelled", tokenizer_spec(tokenizer)), tmp_path / "prepared")
    ledger, held = made.manifest["ledger"], made.manifest["ledger"]["reasons"]["held_out"]
    assert ledger["reasons"] == {"held_out": held, "empty_answer": 1, "wrong_type": 1} and 0 < held < 20
    assert ledger["read"] == ledger["kept"] + held + 2 == 74
    rows = made.read()
    assert len(rows) == made.rows == made.manifest["examples"] == 2 * 2 * (35 - held) + 37
    labels = Counter(row["label"] for row in rows)
    assert made.manifest["labels"] == {"true": labels[True], "false": labels[False]}
    assert sum(rows for _, _, rows in made.row_groups("eval")) == 2 * held
    assert "margins" not in made.manifest
    assert longest_sequence(made) == max(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows)

    as_pairs = prepare(sources[:1], Recipe("preference", tokenizer_spec(tokenizer)), tmp_path / "prepared")
    margins = [row["margin"] for row in as_pairs.read() if row["margin"] is not None]
    assert as_pairs.manifest["margins"] == len(margins) and set(margins) <= {0.5}
    assert "labels" not in as_pairs.manifest


def test_long_rows_go_to_the_ledger_and_are_not_cut(tmp_path: Path, data: Path, tokenizer: Any) -> None:
    sources = [DataSource(path=str(data / "chats.jsonl"))]
    whole = prepare(sources, Recipe("conversation", tokenizer_spec(tokenizer)), tmp_path)
    limit = sorted(len(row["input_ids"]) for row in whole.read())[50]
    cut = prepare(sources, Recipe("conversation", tokenizer_spec(tokenizer), max_length=limit), tmp_path)
    assert cut.manifest["longest"] == cut.manifest["lengths"]["longest"] <= limit
    assert whole.manifest["lengths"]["median"] == limit  # of 101 rows
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
    folders = sorted(p.name for p in (tmp_path / "p").iterdir() if p.is_dir())
    assert folders == sorted({first.path.name, other.path.name})


@pytest.mark.parametrize(
    ("max_dropped", "says"),
    [
        (0.01, r"3 of 20 rows \(15.0%\) cannot be trained on; `max_dropped` allows 1.0%:\n  no_assistant_turn 2, for example "
         r".*x.jsonl, row 19: .*\n  wrong_type 1, .*\nMend"),
        (0.2, None),
    ],
)  # fmt: skip
def test_a_run_stops_where_too_much_is_lost(
    tmp_path: Path, tokenizer: Any, max_dropped: float, says: str | None
) -> None:
    good = [{"prompt": f"a{i}", "completion": "b"} for i in range(17)]
    bad = [
        {"prompt": 1, "completion": "b"},
        *[{"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "user", "content": "b"}]}] * 2,
    ]
    path = write_jsonl(tmp_path / "x.jsonl", good + bad)
    made = prepare([DataSource(path=str(path))], Recipe("conversation", tokenizer_spec(tokenizer)), tmp_path)
    if says is None:
        return check_lost(made.manifest["ledger"], max_dropped)
    with pytest.raises(DataError, match=says):
        check_lost(made.manifest["ledger"], max_dropped)


def test_data_of_which_no_row_can_be_used(tmp_path: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": [{"role": "user", "content": "Hi"}]}])
    made = prepare([DataSource(path=str(path))], Recipe("conversation", tokenizer_spec(tokenizer)), tmp_path)
    with pytest.raises(DataError, match=r"none of the 1 rows can be used:\n  no_assistant_turn 1, .*x.jsonl, row 1"):
        check_lost(made.manifest["ledger"], 1.0)


def test_a_mixture_is_what_its_manifest_says(tmp_path: Path, tokenizer: Any) -> None:
    """Weights above and below 1, a filter, a split and duplicates: every row is where it should be, and counted."""
    a = [{"prompt": f"a {i}", "completion": f"x {i}", "lang": "en" if i % 2 else "de"} for i in range(200)]
    b = [{"prompt": f"b {i}", "completion": f"y {i}"} for i in range(300)]
    sources = [
        DataSource(path=str(write_jsonl(tmp_path / "a.jsonl", [*a, *a[:50]])), filter="lang == 'en'", weight=2.5),
        DataSource(path=str(write_jsonl(tmp_path / "b.jsonl", b)), weight=0.5, eval="10%"),
    ]
    recipe = Recipe("conversation", tokenizer_spec(tokenizer), deduplicate=True, seed=3)
    made = prepare(sources, recipe, tmp_path / "p")
    seen = Counter(tokenizer.decode([t for t in row["labels"] if t != IGNORE]) for row in made.read())
    of_a = {text: n for text, n in seen.items() if text.startswith("x")}
    of_b = {text: n for text, n in seen.items() if text.startswith("y")}
    assert len(of_a) == 100 and set(of_a.values()) == {2, 3}
    assert 230 < sum(of_a.values()) < 270 and set(of_b.values()) == {1} and 100 < len(of_b) < 170
    ledger = made.manifest["ledger"]
    held = sum(shard["rows"] for shard in made.manifest["eval"])
    assert ledger["reasons"]["filtered"] == 125 and ledger["reasons"]["duplicate"] == 25
    assert ledger["reasons"]["held_out"] == held and 15 < held < 50
    assert ledger["reasons"]["weight"] + held + len(of_b) == 300
    assert ledger["read"] == 550 == ledger["kept"] + sum(ledger["reasons"].values())
    check_lost(ledger, 0.0)  # all of it was asked for
    mixture = made.manifest["sources"]
    assert [s["examples"] for s in mixture] == [sum(of_a.values()), len(of_b)] and made.rows == sum(seen.values())
    assert sum(s["share_of_tokens"] for s in mixture) == pytest.approx(1.0)
    other = prepare(sources, dataclasses.replace(recipe, seed=4), tmp_path / "p")
    assert {r["row"] for r in other.read()} != {r["row"] for r in made.read()}


def test_packing_keeps_every_token_and_leaves_little_room(
    tmp_path: Path, data: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4000)
    spec, sources = tokenizer_spec(tokenizer), [DataSource(path=str(data / "chats.jsonl"))]
    plain = prepare(sources, Recipe("conversation", spec, max_length=400), tmp_path)
    packed = prepare(sources, Recipe("conversation", spec, max_length=400, packing=True), tmp_path)
    assert packed.tokens == plain.tokens and packed.rows < plain.rows / 2
    assert packed.manifest["fill"] == packed.tokens / (packed.rows * 400) > 0.9
    documents = Counter()
    for pack in packed.read():
        assert sum(pack["lengths"]) == len(pack["input_ids"]) <= 400
        at = 0
        for length, row in zip(pack["lengths"], pack["rows"], strict=True):
            documents[row, tuple(pack["input_ids"][at : at + length]), tuple(pack["labels"][at : at + length])] += 1
            at += length
    assert documents == Counter((r["row"], tuple(r["input_ids"]), tuple(r["labels"])) for r in plain.read())


def test_preparation_goes_on_where_it_stopped(
    tmp_path: Path, data: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4000)
    recipe, sources = Recipe("conversation", tokenizer_spec(tokenizer)), [DataSource(path=str(data / "chats.jsonl"))]
    whole = prepare(sources, recipe, tmp_path / "whole")

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(sources, recipe, tmp_path / "p", stop)
    (work,) = (tmp_path / "p").glob(".making-*")
    done = {path.name: path.stat().st_mtime_ns for path in work.glob("done-*.json")}
    shards = {name.replace("done", "shard").replace("json", "parquet") for name in done}
    stamps = {path.name: path.stat().st_mtime_ns for path in work.glob("shard-*.parquet") if path.name in shards}
    assert stamps
    made = prepare(sources, recipe, tmp_path / "p")
    assert made.read() == whole.read() and not list((tmp_path / "p").glob(".making-*"))
    assert {name: (made.path / name).stat().st_mtime_ns for name in stamps} == stamps


def test_what_a_task_says_to_the_user_is_said(
    tmp_path: Path, data: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of our own comes out of Ray's wrappings; data that changes while it is read is not kept."""

    def unreachable(*_: Any) -> None:
        raise DataError("s3://bucket/x: no access")

    recipe, sources = Recipe("conversation", tokenizer_spec(tokenizer)), [DataSource(path=str(data / "chats.jsonl"))]
    with monkeypatch.context() as patched:
        patched.setattr(preparation, "prepare_chunk", unreachable)
        with pytest.raises(DataError, match=r"^s3://bucket/x: no access$"):
            prepare(sources, recipe, tmp_path / "p")
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a", "completion": "b"}])

    def change(done: int, total: int) -> None:
        write_jsonl(path, [{"prompt": "a", "completion": "c"}])

    with pytest.raises(DataError, match="changed while it was being prepared"):
        prepare([DataSource(path=str(path))], recipe, tmp_path / "p", change)
    assert not [p for p in (tmp_path / "p").iterdir() if (p / "manifest.json").is_file()]


def test_the_key_has_what_decides_and_nothing_else(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": f"a{i}", "completion": "b"} for i in range(3)]
    spec, path = tokenizer_spec(tokenizer), write_jsonl(tmp_path / "x.jsonl", rows)
    (tmp_path / "y.json").write_bytes(path.read_bytes())

    def folder(name: str, seed: int = 0, **options: Any) -> str:
        recipe = Recipe("conversation", spec, seed=seed)
        return prepare([DataSource(path=str(tmp_path / name), **options)], recipe, tmp_path / "p").path.name

    plain = folder("x.jsonl")
    assert plain == folder("x.jsonl", 1) == folder("x.jsonl", format="prompt_completion")
    assert len({plain, folder("y.json"), folder("x.jsonl", weight=1.5), folder("x.jsonl", 1, weight=1.5)}) == 4


def test_no_more_than_a_few_rows_are_held_at_a_time(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "GROUP_ROWS", 64)
    rows = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(1000)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    made = prepare(
        [DataSource(path=str(tmp_path / "a.json"))], Recipe("conversation", tokenizer_spec(tokenizer)), tmp_path
    )
    assert [row["row"] for row in made.read()] == list(range(1, 1001))


def test_an_expected_answer_is_for_evaluation_and_never_trained(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}], "expected": "b"}]
    path, spec = write_jsonl(tmp_path / "x.jsonl", rows), tokenizer_spec(tokenizer)
    trained = prepare([DataSource(path=str(path))], Recipe("conversation", spec), tmp_path / "p")
    assert trained.rows == 0 and trained.manifest["ledger"]["reasons"] == {"no_assistant_turn": 1}
    (row,) = prepare([DataSource(path=str(path))], Recipe("evaluation", spec), tmp_path / "p").read()
    assert row["expected"] == "b" and row["prompt"].endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("start", [0, 5, 26, 40])
def test_the_feed_streams_through_ray_data_what_is_left(
    tmp_path: Path, data: Path, tokenizer: Any, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several windows, two epochs of 26 steps, two workers: from any step on, exactly the rows that were next."""
    monkeypatch.setattr(feed_module, "WINDOW_ROWS", 20)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4000)  # several shards, so several row groups
    made = prepare(
        [DataSource(path=str(data / "chats.jsonl"))], Recipe("conversation", tokenizer_spec(tokenizer)), tmp_path
    )
    assert len(made.row_groups()) > 4
    shares = Shares(2, 2)
    steps = 2 * shares.steps(101)

    def rows(from_step: int) -> list[list[int]]:
        out = []
        for rank in range(2):
            begun = Position(from_step // 26, from_step % 26 * 4, from_step)
            feed = Feed(made.row_groups(), rank=rank, shares=shares, steps=steps, seed=0, start=begun)
            out.append([row["row"] for _ in range(from_step // 26, 2) for batch in feed for row in batch])
        return out

    whole, rest = rows(0), rows(start)
    assert sorted(whole[0] + whole[1]) == sorted([*range(1, 102)] * 2)
    assert [worker[len(worker) - len(r) :] for worker, r in zip(whole, rest, strict=True)] == rest
    assert sum(map(len, rest)) == 202 - (start % 26 * 4 + start // 26 * 101)
