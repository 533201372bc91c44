"""Files to rows: every kind of file, with its row numbers, and what is wrong with some of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.data import chunks as chunks_module
from stages.data.records import Rejected, normalise
from stages.data.source import (
    BadRow,
    DataSource,
    chunks,
    content_hash,
    count_rows,
    find_files,
    read_chunk,
    resolve_formats,
    shaped,
)
from stages.errors import DataError

ROWS = [{"text": f"row {i} é"} for i in range(7)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def read(path: Path) -> list[tuple[int, object]]:
    return [
        row for file in find_files(DataSource(path=str(path))) for chunk in chunks(0, file) for row in read_chunk(chunk)
    ]


def write_all(folder: Path) -> None:
    (folder / "a.jsonl").write_text(LINES)
    with gzip.open(folder / "b.jsonl.gz", "wt") as out:
        out.write(LINES)
    (folder / "c.json").write_text(json.dumps(ROWS))
    (folder / "d.csv").write_text("text\n" + "".join(row["text"] + "\n" for row in ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "e.parquet", row_group_size=3)


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.json", "d.csv", "e.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    write_all(tmp_path)
    assert read(tmp_path / name) == list(enumerate(ROWS, 1))
    assert count_rows(DataSource(path=str(tmp_path / name))) == len(ROWS)


def test_a_folder_and_a_glob_give_every_file(tmp_path: Path) -> None:
    write_all(tmp_path)
    (tmp_path / "notes.txt").write_text("not data")
    assert len(read(tmp_path)) == 5 * len(ROWS)
    assert [Path(f.path).name for f in find_files(DataSource(path=str(tmp_path / "*.json*")))] == [
        "a.jsonl",
        "b.jsonl.gz",
        "c.json",
    ]


def test_chunks_cut_at_lines_and_keep_row_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks_module, "CHUNK_BYTES", 30)
    path = tmp_path / "a.jsonl"
    path.write_text(LINES.rstrip("\n"))  # no newline at the end
    assert len(chunks(0, find_files(DataSource(path=str(path)))[0])) > 2
    assert read(path) == list(enumerate(ROWS, 1))


def test_bad_rows_are_told_with_their_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": \n\n[1]\n{"text": "\xff"}\n{"text": "b"}\n')
    found = {n: row.reason if isinstance(row, BadRow) else row for n, row in read(path)}
    assert found == {1: {"text": "a"}, 2: "malformed_json", 4: "not_an_object", 5: "malformed_json", 6: {"text": "b"}}


def test_a_truncated_gzip_keeps_the_rows_before_the_break(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress("".join(json.dumps({"text": str(i) * 50}) + "\n" for i in range(500)).encode())
    path.write_bytes(whole[: len(whole) // 2])
    rows = read(path)
    last = rows[-1][1]
    assert isinstance(last, BadRow) and last.reason in ("truncated_file", "malformed_json")


def test_a_csv_row_with_too_many_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\none\ntwo,too many\nthree\n")
    assert [row.reason if isinstance(row, BadRow) else row["text"] for _, row in read(path)] == [
        "one",
        "malformed_csv",
        "three",
    ]  # type: ignore[index]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: None, "no such file"),
        (lambda p: p.write_text(""), "the file is empty"),
        (lambda p: p.mkdir(), "no data files in this folder"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, make: object, says: str) -> None:
    path = tmp_path / "x.jsonl"
    make(path)  # type: ignore[operator]
    with pytest.raises(DataError, match=says):
        find_files(DataSource(path=str(path)))


def test_a_glob_that_matches_nothing_and_a_kind_that_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file matches"):
        find_files(DataSource(path=str(tmp_path / "*.jsonl")))
    (tmp_path / "x.docx").write_text("x")
    with pytest.raises(DataError, match="not a kind of file"):
        find_files(DataSource(path=str(tmp_path / "x.docx")))


def test_a_csv_from_a_spreadsheet_and_one_with_bytes_of_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbftext\none\nna\xefve\n" + b"x" * 200_000 + b"\nlast\n")
    rows = [row["text"] for _, row in read(path)]  # type: ignore[index]
    assert (rows[0], rows[2], rows[3]) == ("one", "x" * 200_000, "last")
    with pytest.raises(Rejected, match="invalid_unicode"):
        normalise({"text": rows[1]}, "text")


def test_rows_that_are_json_but_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("[" * 100_000 + "\n" + '{"text": ' + "9" * 5000 + "}\n" + '{"text": "\\ud83d"}\n{"text": "good"}\n')
    rows = read(path)
    assert [type(row) for _, row in rows] == [BadRow, BadRow, dict, dict]
    with pytest.raises(Rejected, match="invalid_unicode"):
        normalise(rows[2][1], "text")  # type: ignore[arg-type]


def test_hidden_folders_are_not_read(tmp_path: Path) -> None:
    for name in (".ipynb_checkpoints", "_old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text(LINES)
    assert len(read(tmp_path)) == len(ROWS)


def test_addresses_are_read_as_paths_are(tmp_path: Path) -> None:
    write_all(tmp_path)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.jsonl").write_text(LINES)
    (tmp_path / "deep er").mkdir()
    (tmp_path / "deep er" / "f.jsonl").write_text(LINES)
    for pattern in ("", "/*.json*", "/**/*.jsonl", "/deep er", "/a.jsonl", "/[ab].*"):
        here = find_files(DataSource(path=f"{tmp_path}{pattern}"))
        there = find_files(DataSource(path=f"file://{tmp_path}{pattern}"))
        assert [f"file://{file.path}" for file in here] == [file.path for file in there]
        assert [content_hash(file) for file in here] == [content_hash(file) for file in there]
        for file in there:
            assert [row for chunk in chunks(0, file) for row in read_chunk(chunk)] == list(enumerate(ROWS, 1))
    for bad, says in (("file:///no/such.jsonl", "no such file"), ("http://a/b.jsonl", "addresses start with"), ("s3://key:secret@b/a.jsonl", "credentials")):  # fmt: skip
        with pytest.raises(DataError, match=says):
            find_files(DataSource(path=bad))


def test_a_dataset_folder_is_streamed_in_shards(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(LINES)
    data = DataSource(path=f"hf://{tmp_path}")
    found = find_files(data)
    assert [file.path for file in found] == [f"hf://{tmp_path}[train]#{i}" for i in range(2)]
    assert [row for file in found for chunk in chunks(0, file) for row in read_chunk(chunk)] == 2 * list(
        enumerate(ROWS, 1)
    )
    assert count_rows(data) == 14 and resolve_formats([data]) == ["text"]
    before = content_hash(found[0])
    (tmp_path / "two.jsonl").write_text(LINES + LINES)
    assert content_hash(find_files(data)[0]) != before
    with pytest.raises(DataError, match=r"Bad split|split"):
        find_files(DataSource(path=data.path, split="test"))
    with pytest.raises(DataError, match="pin `revision:`"):
        find_files(DataSource(path="hf://org/name"))


@pytest.mark.parametrize("name", ["b.jsonl.gz", "d.csv", "d.csv.gz"])
def test_other_files_are_cut_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(chunks_module, "CHUNK_BYTES", 30)
    write_all(tmp_path)
    quoted = 'text\n"one\r\n1"\n\n"two ""2"""\nthree,extra\n"four"\n'
    with gzip.open(tmp_path / "d.csv.gz", "wt", newline="") as out:
        out.write(quoted)
    (file,) = find_files(DataSource(path=str(tmp_path / name)))
    assert len(chunks(0, file)) > 1
    expected = ROWS if name != "d.csv.gz" else [{"text": "one\r\n1"}, {"text": 'two "2"'}, None, {"text": "four"}]
    assert [(n, None if isinstance(row, BadRow) else row) for n, row in read(tmp_path / name)] == list(
        enumerate(expected, 1)
    )


def test_a_json_file_is_decoded_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks_module, "BUFFER", 16)
    long = {"text": "é" * 5000}
    cases = {
        json.dumps([*ROWS, long], ensure_ascii=False): [*ROWS, long],
        LINES: ROWS,
        "[]": [],
        '[{"a": 1}, {"a": }, {"a": 2}]': [{"a": 1}, "malformed_json"],
        '[{"a": 1}, {"a": ' + "9" * 5000 + '}, {"a": 2}]': [{"a": 1}, "malformed_json", {"a": 2}],
        '[{"a": 1}, 3': [{"a": 1}, "not_an_object", "malformed_json"],
    }
    for text, rows in cases.items():
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            (tmp_path / "a.json").write_text(text, encoding=encoding)
            found = read(tmp_path / "a.json")
            assert [row.reason if isinstance(row, BadRow) else row for _, row in found] == rows


def test_a_damaged_parquet_file_keeps_its_other_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=3, compression="zstd", use_dictionary=False)
    offset = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 8] = b"\xff" * 8
    path.write_bytes(data)
    found = [row.reason if isinstance(row, BadRow) else row for _, row in read(path)]
    assert found == [*ROWS[:3], *["damaged_file"] * 3, ROWS[6]]


def test_options_of_a_source_are_checked() -> None:
    assert DataSource(path="a", weight=2).weight == 2 and DataSource(path="a", eval="2%").eval == 0.02
    turns = [{"role": "user", "content": "{{ a }}"}]
    for wrong in ({"weight": 0}, {"weight": float("inf")}, {"eval": 2}, {"eval": 0}, {"eval": 1.0}, {"eval": "x%"}, {"eval": "nan%"}, {"filter": "a <"}, {"split": "test"}, {"revision": "main"}, {"messages": turns, "format": "text"}, {"messages": []}):  # fmt: skip
        with pytest.raises(ValueError):
            DataSource.model_validate({"path": "a.jsonl", **wrong})


def test_a_source_shapes_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "Hi", "n": 1}\n')
    turns = [{"role": "user", "content": "{{ question }}"}, {"role": "assistant", "content": "{{ n }}"}]
    data = DataSource.model_validate(
        {"path": str(path), "columns": {"question": "q"}, "messages": turns, "filter": "n < 2"}
    )
    assert resolve_formats([data]) == ["messages"]
    assert [m["content"] for m in shaped({"q": "Hi", "n": 1}, data)["messages"]] == ["Hi", "1"]
    with pytest.raises(Rejected, match="filtered"):
        shaped({"q": "Hi", "n": 2}, data)
    with pytest.raises(DataError, match="missing_field"):
        resolve_formats([DataSource.model_validate({"path": str(path), "messages": turns})])
