"""Whatever is in a row or a file: a record, a reason or a `BadRow` comes out, and nothing is lost on the way."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import typing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.data import chunks as chunks_module
from stages.data.chunks import BadRow, Row, chunks, read_chunk
from stages.data.files import classify
from stages.data.messages import ROLE_OF, Rejected
from stages.data.records import FORMATS, Record, detect_format, normalise
from stages.data.turns import Turn, keep, templated

COLUMNS = (
    "messages", "conversations", "prompt", "completion", "chosen", "rejected", "label", "text", "transcript", "input_ids",
    "labels", "instruction", "input", "output", "history", "system", "tools", "expected", "x",
)  # fmt: skip
KEYS = ("role", "from", "content", "value", "tool_calls", "function_call", "function", "name", "arguments", "train", "weight", "type", "text")  # fmt: skip
odd = st.sampled_from(
    [10**400, -(2**70), float("nan"), float("inf"), "\ud83d", "\n\nHuman: a\n\nAssistant: b", "", b"\xff", ()]
)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | odd
    | st.sampled_from(sorted(ROLE_OF))
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=2), inner, max_size=4)
    ),
    max_leaves=12,
)
turn = st.fixed_dictionaries(
    {"role": st.sampled_from(sorted(ROLE_OF)), "content": st.text(min_size=1, max_size=4) | values},
    optional=dict.fromkeys(("tool_calls", "function_call", "name", "train", "weight", "value"), values),
)
rows = st.dictionaries(st.sampled_from(COLUMNS), values | st.lists(turn, max_size=3) | turn, max_size=6)
fuzz = settings(
    max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)


def record_or_reason(row: dict[str, Any], format: str) -> None:
    try:
        record = normalise(row, format)
    except Rejected as error:
        assert error.reason.isidentifier() and len(error.detail) <= 800
        error.detail.encode()
    else:
        assert isinstance(record, typing.get_args(Record))


@fuzz
@given(rows)
def test_any_row_is_a_record_or_rejected(row: dict[str, Any]) -> None:
    assert detect_format(row) in (*FORMATS, None)
    for format in FORMATS:
        record_or_reason(row, format)


def nested(depth: int, *, wrap: str) -> Any:
    value: Any = "end"
    for _ in range(depth):
        value = [value] if wrap == "list" else {"messages": value, "function": value, "content": value}
    return value


@pytest.mark.parametrize("wrap", ["list", "dict"])
@pytest.mark.parametrize("format", FORMATS)
def test_rows_nested_beyond_any_stack(format: str, wrap: str) -> None:
    deep = nested(20_000, wrap=wrap) if wrap == "list" else nested(3000, wrap="list")
    for inner in (deep, [deep], {"role": "user", "content": deep}, [{"role": "user", "content": "a", "x": deep}]):
        record_or_reason(dict.fromkeys(COLUMNS, inner) | {"label": True}, format)


@fuzz
@given(
    rows,
    st.sampled_from(
        ["{{ prompt }}", "{{ messages[0].content | upper }}", "{% for m in messages %}{{ m }}{% endfor %}"]
    ),
)
def test_any_row_in_a_template_or_a_filter(row: dict[str, Any], template: str) -> None:
    for use in (
        lambda: templated(row, [Turn(role="user", content=template)]),
        lambda: keep(row, "messages|length > text"),
    ):
        try:
            use()
        except Rejected as error:
            assert error.reason in ("missing_field", "template_error", "filter_error")


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
lines = st.lists(json_like.map(json.dumps).map(str.encode) | st.binary(max_size=12) | st.just(b""), max_size=12).map(
    b"\n".join
)
texts = lines | st.binary(max_size=60) | st.lists(json_like, max_size=5).map(json.dumps).map(str.encode) | st.text(alphabet='"a,\n\r [{}]:1', max_size=40).map(str.encode)  # fmt: skip


def read(path: Path, data: bytes) -> list[tuple[int, Row]]:
    path.write_bytes(data)
    file = classify(str(path))
    assert file is not None
    found = [row for chunk in chunks(0, file) for row in read_chunk(chunk)]
    assert all(a < b for (a, _), (b, _) in itertools.pairwise(found))
    assert all(isinstance(row, dict | BadRow) for _, row in found)
    assert repr(found) == repr(list(read_chunk(chunks_module.Chunk(0, file))))  # repr: nan is not equal to itself
    return found


@fuzz
@given(data=texts, size=st.sampled_from([1, 7, 1 << 20]))
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_any_bytes_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: bytes, size: int
) -> None:
    monkeypatch.setattr(chunks_module, "CHUNK_BYTES", size)
    found = read(tmp_path / name, data)
    if name == "a.jsonl":
        assert len(found) == sum(bool(line.strip()) for line in data.split(b"\n"))
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as out:
        out.write(data)
    assert repr(read(tmp_path / (name + ".gz"), packed.getvalue())) == repr(found)


@fuzz
@given(data=texts, cut=st.integers(0, 200), size=st.sampled_from([1, 1 << 20]))
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz"])
def test_a_gzip_that_is_cut_or_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: bytes, cut: int, size: int) -> None:  # fmt: skip
    monkeypatch.setattr(chunks_module, "CHUNK_BYTES", size)
    read(tmp_path / name, gzip.compress(data, mtime=0)[: cut + 1])
    read(tmp_path / name, data)


@fuzz
@given(at=st.integers(0, 5000), junk=st.binary(min_size=1, max_size=40))
def test_a_parquet_file_with_damage(tmp_path: Path, at: int, junk: bytes) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": [f"row {i} {i * i}" for i in range(600)]}), sink, row_group_size=200)
    whole = sink.getvalue()
    at %= len(whole)
    read(tmp_path / "a.parquet", whole[:at] + junk + whole[at + len(junk) :])
