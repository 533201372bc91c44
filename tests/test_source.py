"""Files to rows: every kind of file, with its row numbers, and what is wrong with some of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.data import source
from stages.data.records import Rejected, normalise
from stages.data.source import BadRow, DataSource, chunks, count_rows, find_files, read_chunk
from stages.errors import DataError

ROWS = [{"text": f"row {i} é"} for i in range(7)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def read(path: Path) -> list[tuple[int, object]]:
    return [row for file in find_files(str(path)) for chunk in chunks(0, file) for row in read_chunk(chunk)]


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
    assert [Path(f.path).name for f in find_files(str(tmp_path / "*.json*"))] == ["a.jsonl", "b.jsonl.gz", "c.json"]


def test_chunks_cut_at_lines_and_keep_row_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "CHUNK_BYTES", 30)
    path = tmp_path / "a.jsonl"
    path.write_text(LINES.rstrip("\n"))  # no newline at the end
    assert len(chunks(0, find_files(str(path))[0])) > 2
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
        find_files(str(path))


def test_a_glob_that_matches_nothing_and_a_kind_that_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file matches"):
        find_files(str(tmp_path / "*.jsonl"))
    (tmp_path / "x.docx").write_text("x")
    with pytest.raises(DataError, match="not a kind of file"):
        find_files(str(tmp_path / "x.docx"))


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
