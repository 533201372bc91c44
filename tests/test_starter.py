"""`raylign init`: what is found in data, what is chosen by it, and that every spec that is written is one that can be planned."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from pipeline.advice import GIB
from pipeline.estimate import describe
from pipeline.plan import make_plan
from pipeline.spec import json_schema
from pipeline.spec_reader import load_spec
from pipeline.starter import choices, heldout, publish, write_starter
from pipeline.starter.base import Base, _by_name
from pipeline.starter.columns import read_columns
from pipeline.starter.machine import Machine
from pipeline.starter.page import scalar
from pipeline.starter.seen import Measured, see
from stages.data.mixing import draw
from stages.data.records import Conversation, Labelled, normalise
from stages.data.source import DataSource, read_file, shaped
from stages.errors import DataError, RaylignError, SpecError

ASKED = [(f"What is {i} and {i}, “{i}”: a\\b?", f"It is {2 * i}, für \U0001f389 — {{{i}}}") for i in range(60)]
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# name -> rows, and the kinds of the stages that come of them
ROWS: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "messages": ([{"messages": [turn("system", "Be kind."), turn("user", q), turn("assistant", a)]} for q, a in ASKED], ["sft"]),
    "alpaca": ([{"instruction": q, "input": "", "output": a} for q, a in ASKED], ["sft"]),
    "context": ([{"instruction": q, "context": "", "response": a, "category": "x"} for q, a in ASKED], ["sft"]),
    "sharegpt": ([{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in ASKED], ["sft"]),
    "dialog": ([{"dialog": [turn("user", q), turn("assistant", a)], "id": q} for q, a in ASKED], ["sft"]),
    "tools": (
        [{"messages": [turn("user", q), CALL, turn("tool", "2"), turn("assistant", a)], "tools": [TOOL]} for q, a in ASKED],
        ["sft"],
    ),
    "numbers": ([{"question": q, "answer": i} for i, (q, _) in enumerate(ASKED)], ["sft"]),
    "text": ([{"text": a, "lang": "de"} for _, a in ASKED], ["sft"]),
    "transcript": ([{"text": f"\n\nHuman: {q}\n\nAssistant: {a}"} for q, a in ASKED], ["sft"]),
    "pairs": ([{"prompt": q, "chosen": a, "rejected": "No."} for q, a in ASKED], ["sft", "dpo"]),
    "named pairs": ([{"question": q, "preferred": a, "dispreferred": "No."} for q, a in ASKED], ["sft", "dpo"]),
    "whole pairs": (
        [{"chosen": [turn("user", q), turn("assistant", a)], "rejected": [turn("user", q), turn("assistant", "No.")]} for q, a in ASKED],
        ["sft", "dpo"],
    ),
    "pairs in columns": (
        [{"conversations": [{"from": "human", "value": q}], "chosen": {"from": "gpt", "value": a}, "rejected": {"from": "gpt", "value": "No."}} for q, a in ASKED],
        ["dpo"],
    ),
    "kto": ([{"prompt": q, "completion": a, "label": i % 2 == 0} for i, (q, a) in enumerate(ASKED)], ["sft", "kto"]),
    "thumbs": ([{"question": q, "response": a, "thumbs_up": i % 2} for i, (q, a) in enumerate(ASKED)], ["sft", "kto"]),
    "one row": ([{"prompt": "Hi", "completion": "Hello"}], ["sft"]),
    "some empty": ([{"prompt": q, "completion": a if i % 6 else ""} for i, (q, a) in enumerate(ASKED)], ["sft"]),
}  # fmt: skip


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def planned(spec: Path) -> dict[str, dict[str, Any]]:
    """The stages of `raylign plan`, by their kinds; the spec is what the schema says too."""
    tree = YAML(typ="safe").load(spec.read_text(encoding="utf-8"))
    assert not list(jsonschema.Draft7Validator(json_schema()).iter_errors(tree))
    assert spec.read_text().startswith("# yaml-language-server: $schema=.raylign-schema.json\n")
    json.loads((spec.parent / ".raylign-schema.json").read_text())
    return {row["kind"]: row for row in describe(make_plan(load_spec(spec)))}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("fresh", [True, False])
def test_every_shape_of_rows_becomes_a_spec_that_can_be_planned(
    tmp_path: Path, model: str, name: str, fresh: bool
) -> None:
    rows, kinds = ROWS[name]
    data, out = jsonl(tmp_path / f"{name}'s.jsonl", rows), tmp_path / "spec.yaml"
    said = "\n".join(write_starter(out, "tiny" if fresh else model, [data], [], {}))
    stages = planned(out)
    assert [kind for kind in stages if kind not in ("init", "evaluate")] == kinds
    assert stages["evaluate"]["rows"] and stages["evaluate"]["fits"] and f"{len(rows):,} row" in said
    assert all(stages[kind]["rows"] and stages[kind]["steps"] and stages[kind]["fits"] for kind in kinds)
    assert not list(tmp_path.glob(".*.tmp"))


def test_tables_and_their_quotes(tmp_path: Path) -> None:
    with (tmp_path / "faq.csv").open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.writer(file)
        table.writerow(["question", "answer"])
        table.writerows([q, a + '\n"quoted", twice'] for q, a in ASKED)
    pq.write_table(pa.table({"input": [q for q, _ in ASKED], "target": [a for _, a in ASKED]}), tmp_path / "it.parquet")
    with gzip.open(tmp_path / "faq.json.gz", "wt", encoding="utf-8") as file:
        json.dump([{"query": q, "reply": a, "system_prompt": "Be kind."} for q, a in ASKED], file)
    for name, columns in (
        ("faq.csv", {"prompt": "question", "completion": "answer"}),
        ("it.parquet", {"prompt": "input", "completion": "target"}),
        ("faq.json.gz", {"prompt": "query", "completion": "reply", "system": "system_prompt"}),
    ):
        out = tmp_path / f"{name.partition('.')[0]}-{name.rpartition('.')[2]}.yaml"
        write_starter(out, "tiny", [str(tmp_path / name)], [], {})
        assert planned(out)["sft"]["rows"] == 54  # of 60 a tenth is held out
        spec = load_spec(out)
        assert spec.stages["sft"].data[0].columns == columns
        assert "path: " + name in out.read_text()  # relative to the spec


def test_chats_and_pairs_together(tmp_path: Path, data: Path, model: str) -> None:
    out = tmp_path / "spec.yaml"
    said = write_starter(out, model, [str(data / "chats.jsonl")], [str(data / "pairs.jsonl")], {})
    stages = planned(out)
    assert list(stages) == ["sft", "dpo", "evaluate"] and stages["dpo"]["inputs"] == ["stages.sft"]
    text = out.read_text()
    assert "the longest of 101 rows has " in text and "256 positions" in text
    assert {"spec-eval.jsonl", "spec-eval-pairs.jsonl"} <= {path.name for path in tmp_path.iterdir()}
    assert any("up to 3 answers in a conversation, all with a system message, no tools" in line for line in said)


def test_what_is_held_out_is_what_training_leaves_out(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "chats.jsonl", ROWS["messages"][0])
    write_starter(tmp_path / "spec.yaml", "tiny", [data], [], {})
    (source,) = load_spec(tmp_path / "spec.yaml").stages["sft"].data
    kept = [json.loads(line)["messages"] for line in (tmp_path / "spec-eval.jsonl").read_text().splitlines()]
    (seen,) = see([data], {})
    left = [r for _, _, row in seen.sample if draw(r := normalise(shaped(dict(row), source), "messages"), source, 0)[1]]
    assert kept == [record.messages for record in left] and 0 < len(kept) < 20


def test_a_held_out_answer_is_expected_where_it_is_short() -> None:
    short, long = (normalise({"prompt": "a", "completion": text}, "prompt_completion") for text in ("b", "b" * 100))
    assert heldout.as_row(short)["expected"] == "b" and "expected" not in heldout.as_row(long)  # type: ignore[index, operator]


# ------------------------------------------------------------------------------------------------ columns


@pytest.mark.parametrize(
    ("row", "format", "columns"),
    [
        ({"question": "a", "answer": "b"}, "prompt_completion", {"prompt": "question", "completion": "answer"}),
        ({"prompt": "a", "response": "b"}, "prompt_completion", {"completion": "response"}),
        ({"User Message": "a", "Assistant_Message": "b"}, "prompt_completion", {"prompt": "User Message", "completion": "Assistant_Message"}),
        ({"instruction": "a", "input": "", "response": "b"}, "alpaca", {"output": "response"}),
        ({"question": "a", "context": "c", "answer": "b"}, "alpaca", {"instruction": "question", "input": "context", "output": "answer"}),
        ({"input": "a", "output": "b"}, "prompt_completion", {"prompt": "input", "completion": "output"}),
        ({"document": "a", "summary": "b"}, "prompt_completion", {"prompt": "document", "completion": "summary"}),
        ({"text": "a", "summary": "b"}, "prompt_completion", {"prompt": "text", "completion": "summary"}),
        ({"text": "a", "label": 1}, "text", {}),
        ({"review": "a"}, "text", {"text": "review"}),
        ({"chat": [turn("user", "a")]}, "messages", {"messages": "chat"}),
        ({"question": "a", "chosen": "b", "rejected": "c"}, "preference", {"prompt": "question"}),
        ({"question": "a", "answer": "b", "source": "c"}, "prompt_completion", {"prompt": "question", "completion": "answer"}),
        ({"source": "a", "target": "b"}, "prompt_completion", {"prompt": "source", "completion": "target"}),
        ({"input": "a", "context": "c", "output": "b"}, "alpaca", {"instruction": "input", "input": "context"}),
        ({"prompt": "a", "completion": "b", "system_prompt": "c"}, "prompt_completion", {"system": "system_prompt"}),
    ],
)  # fmt: skip
def test_columns_by_other_names(row: dict[str, Any], format: str, columns: dict[str, str]) -> None:
    reading = read_columns("data.csv", [row], {})
    assert (reading.format, reading.columns) == (format, columns)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "a", "query": "b", "answer": "c"}, "question and query could both be the prompt"),
        ({"context": "a", "text": "b", "summary": "c"}, "context and text could both be the prompt"),
        ({"Frage": "a", "Antwort": "b"}, "--columns prompt=Frage --columns completion=Antwort"),
        ({"prompt": "a", "completion": "b", "label": "true"}, "as text (true)"),
        ({"question": "a", "answer": "b", "liked": "no"}, "as text (no)"),
        ({"chosen": "a", "rejected": "b", "id": "c"}, "no column with what was asked"),
        ({"a": 1, "b": 2}, "no known format"),
    ],
)
def test_columns_that_could_be_anything_are_asked_about(row: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as error:
        read_columns("data.csv", [row], {})
    assert says in str(error.value)


def test_columns_that_are_given(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "faq.jsonl", [{"Frage": q, "Antwort": a} for q, a in ASKED])
    write_starter(tmp_path / "spec.yaml", "tiny", [data], [], {"Frage": "prompt", "Antwort": "completion"})
    assert "prompt=Frage" in (tmp_path / "spec.yaml").read_text() and planned(tmp_path / "spec.yaml")["sft"]["fits"]
    with pytest.raises(DataError, match="but rows have Frage, Antwort"):
        see([data], {"nothing": "prompt"})
    with pytest.raises(DataError, match="it has both Frage and Antwort"):
        see([data], {"Frage": "prompt", "Antwort": "prompt"})


@pytest.mark.parametrize(
    ("row", "given", "format", "columns"),
    [
        # what is said goes before what names let guess, and the other columns are still known by their names
        ({"question": "a", "query": "b", "answer": "c"}, {"prompt": "query"}, "prompt_completion", {"prompt": "query", "completion": "answer"}),
        ({"Q": "a", "answer": "b"}, {"question": "Q"}, "prompt_completion", {"prompt": "Q", "completion": "answer"}),
        ({"ticket": "a", "better": "b", "worse": "c"}, {"prompt": "ticket"}, "preference", {"prompt": "ticket", "chosen": "better", "rejected": "worse"}),
        ({"q": "a", "answer": "b", "win": "c", "lose": "d"}, {"prompt": "q", "completion": "answer"}, "prompt_completion", {"prompt": "q", "completion": "answer"}),
        ({"question": "a", "source": "b", "answer": "c"}, {"instruction": "question", "input": "source", "output": "answer"}, "alpaca", {"instruction": "question", "input": "source", "output": "answer"}),
        ({"prompt": "a", "completion": "b", "good": True}, {"other": "good"}, "prompt_completion", {"other": "good"}),
    ],
)  # fmt: skip
def test_given_columns_and_those_that_are_known(
    row: dict[str, Any], given: dict[str, str], format: str, columns: dict[str, str]
) -> None:
    reading = read_columns("data.csv", [row], given)
    assert (reading.format, reading.columns) == (format, columns)


def test_given_columns_are_those_of_each_file_that_has_them(tmp_path: Path) -> None:
    """Whichever of several files an error is about, doing what it says helps."""
    faq = jsonl(tmp_path / "faq.jsonl", [{"Frage": q, "Antwort": a} for q, a in ASKED])
    more = jsonl(tmp_path / "more.jsonl", [{"Anliegen": q, "Antwort": a} for q, a in ASKED])
    pairs = jsonl(tmp_path / "pairs.jsonl", [{"ticket": q, "chosen": a, "rejected": "No."} for q, a in ASKED])
    named = {"Frage": "prompt", "Antwort": "completion", "Anliegen": "prompt"}
    with pytest.raises(DataError, match=r"pairs.jsonl: .*; say which: --columns prompt=COLUMN$"):
        write_starter(tmp_path / "spec.yaml", "tiny", [faq, more], [pairs], named)
    write_starter(tmp_path / "spec.yaml", "tiny", [faq, more], [pairs], named | {"ticket": "prompt"})
    assert planned(tmp_path / "spec.yaml")["dpo"]["rows"] == 54
    stages = load_spec(tmp_path / "spec.yaml").stages
    assert [source.columns for source in (*stages["sft"].data, *stages["dpo"].data)] == [
        {"prompt": "Frage", "completion": "Antwort"},
        {"prompt": "Anliegen", "completion": "Antwort"},
        {"prompt": "ticket"},
    ]
    with pytest.raises(DataError, match=r"names Fragen, but rows have Frage, Antwort \(.*\); ticket, chosen, rejected"):
        see([faq, pairs], {"Fragen": "prompt"})


# ------------------------------------------------------------------------------------------------ labels, numbers


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "a", "completion": "b", "thumbs_up": 0}, {"label": "thumbs_up"}),
        ({"question": "a", "answer": "b", "liked": True}, {"prompt": "question", "completion": "answer", "label": "liked"}),
        ({"messages": [turn("user", "a"), turn("assistant", "b")], "thumbs_up": 1}, {"label": "thumbs_up"}),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "good": 1}, {"label": "good"}),
        ({"instruction": "a", "output": "b", "label": 0}, {"prompt": "instruction", "completion": "output"}),
        ({"dialog": [turn("user", "a"), turn("assistant", "b")], "liked": 0}, {"messages": "dialog", "label": "liked"}),
    ],
)  # fmt: skip
def test_answers_with_a_label_are_for_kto(row: dict[str, Any], columns: dict[str, str]) -> None:
    """SFT would learn those that are not wanted too."""
    reading = read_columns("data.jsonl", [row], {})
    assert (reading.format, reading.columns) == ("kto", columns)
    record = normalise(shaped(row, DataSource(path="x", columns=columns, format="kto")), "kto")
    assert isinstance(record, Labelled) and record.completion["content"] == "b"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "a", "context": "c", "answer": "b", "liked": 1}, "the column liked says whether"),
        ({"instruction": "a", "input": "c", "output": "b", "label": False}, "Make one column of all that is asked"),
        (
            {"text": "\n\nHuman: a\n\nAssistant: b", "liked": 0},
            "(transcript) wanted and unwanted answers would be trained",
        ),
        ({"messages": [turn("user", "a"), turn("assistant", "b")], "label": "false"}, "as text (false)"),
        ({"question": "a", "context": "c", "answer": "b", "liked": "no"}, "as text (no)"),
        ({"instruction": "a", "output": "b", "thumbs_up": 1.0}, "as numbers (1.0)"),
        ({"prompt": "a", "completion": "b", "thumbs": -1}, "as numbers (-1)"),
        ({"prompt": "a", "completion": "b", "good": "yes"}, "if it says something else: --columns other=good"),
    ],
)
def test_labels_that_no_stage_reads_are_told(row: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as error:
        read_columns("data.jsonl", [row], {})
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("row", "content"),
    [
        ({"Question Text": "2+2", "answer": 4}, ["2+2", "4"]),
        ({"question-text": "2+2", "answer": 4.5, "system-prompt": "Add."}, ["Add.", "2+2", "4.5"]),
        ({"question": "2+2", "answer": 4, "system_prompt": None}, ["2+2", "4"]),
        ({"prompt": 4, "completion": 5, "system": "Next."}, ["Next.", "4", "5"]),
        ({"instruction": "Double it.", "input": 2, "output": 4}, ["Double it.\n2", "4"]),
        ({"question": "Add.", "context": "", "answer": 4}, ["Add.", "4"]),
    ],
)
def test_numbers_become_text(tmp_path: Path, row: dict[str, Any], content: list[str]) -> None:
    data, out = jsonl(tmp_path / "sums.jsonl", [row] * 3), tmp_path / "spec.yaml"
    write_starter(out, "tiny", [data], [], {})
    (source,) = load_spec(out).stages["sft"].data
    record = normalise(shaped(row, source), "messages")
    assert isinstance(record, Conversation) and [m["content"] for m in record.messages] == content


def test_labelled_preferences_are_held_out_beside_conversations(tmp_path: Path) -> None:
    data, labelled = jsonl(tmp_path / "chats.jsonl", ROWS["messages"][0]), jsonl(tmp_path / "kto.jsonl", ROWS["kto"][0])
    write_starter(tmp_path / "spec.yaml", "tiny", [data], [labelled], {})
    stages = load_spec(tmp_path / "spec.yaml").stages
    assert [stages[name].data[0].eval for name in ("sft", "kto")] == [0.1, 0.1]
    assert [source.path for source in stages["eval"].data] == [
        str(tmp_path / f"spec-eval{n}.jsonl") for n in ("", "-wanted")
    ]
    wanted = [json.loads(line)["messages"] for line in (tmp_path / "spec-eval-wanted.jsonl").read_text().splitlines()]
    (source,) = stages["kto"].data
    records = [normalise(row, "kto") for row in ROWS["kto"][0]]
    assert wanted == [[*r.prompt, r.completion] for r in records if r.label and draw(r, source, 0)[1]]  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.csv", b"", "the file is empty"),
        ("header.csv", b"question,answer\n", "there are no rows in it"),
        ("broken.jsonl", b'{"prompt": "a", "compl', "no row can be read: malformed_json"),
        ("broken.json", b"[{", "no row can be read"),
        ("broken.parquet", b"nope", "no row can be read: damaged_file"),
        ("broken.csv.gz", b"nope", "no row can be read: truncated_file"),
        ("latin.csv", "question,answer\nWas?,Über\n".encode("cp1252"), "it is not UTF-8"),
        ("latin.csv", "question,answer\nWas?,Über\nWann?,Jetzt\n".encode("cp1252"), "iconv -f cp1252 -t utf-8"),
        ("latin.csv.gz", gzip.compress("question,answer\nWas?,Über\n".encode("cp1252")), "gunzip -c"),
        ("header.csv", "question,answer,geprüft\na,b,c\n".encode("cp1252"), "it is not UTF-8"),
        (
            "latin.jsonl",
            '{"prompt": "a", "completion": "b"}\n{"prompt": "Über", "completion": "b"}\n'.encode("cp1252"),
            "it is not UTF-8",
        ),
        ("wide.csv", "question,answer\na,b\n".encode("utf-16"), "iconv -f utf-16 -t utf-8"),
        ("half.jsonl", rb'{"prompt": "a", "completion": "b", "\ud83d": 1}', "a spec cannot name it"),
        ("notes.txt", b"hello", "one for each paragraph is made by"),
        ("tabs.tsv", b"a\tb\n", "separated by tabs"),
        ("semi.csv", b"question;answer\na;b\n", "separated by semicolons"),
        ("commas.csv", b"question;answer\na, b;c, d\n", "separated by semicolons"),
        ("quoted.csv", b'\xef\xbb\xbf"question, short";"answer"\r\n"a";"b"\r\n', "separated by semicolons"),
        ("tabs.csv", b"question\tanswer\na\tb\n", "separated by tabs"),
        ("prompts.jsonl", b'{"prompt": "a"}\n', "prompts without answers"),
        ("blank.jsonl", b'{"prompt": "a", "completion": " "}\n', "none of the 1 rows"),
        ("${HOME}.jsonl", b'{"prompt": "a", "completion": "b"}\n', "a spec reads ${...} as a variable"),
    ],
)
def test_data_that_cannot_be_used_is_told_and_nothing_is_written(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RaylignError) as error:
        write_starter(tmp_path / "spec.yaml", "tiny", [str(tmp_path / name)], [], {})
    assert says in str(error.value) and error.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_commands_that_are_told_make_what_is_read(tmp_path: Path) -> None:
    """Of a table as Excel writes it in Germany: first the encoding is told, then the separator."""
    rows = [{"question": f'{q}; "so, und so"\nja', "answer": "für 3 €"} for q in "ab"]
    lines = [
        '"question";"answer"',
        *('"' + '";"'.join(v.replace('"', '""') for v in row.values()) + '"' for row in rows),
    ]
    (tmp_path / "it's.csv").write_bytes("\r\n".join([*lines, ""]).encode("cp1252"))
    (tmp_path / "bom.csv.gz").write_bytes(gzip.compress("\r\n".join([*lines, ""]).encode("utf-8-sig")))
    for name, others in (("it's.csv", ["utf8-it's.csv", "commas.csv"]), ("bom.csv.gz", ["commas.csv"])):
        for made in others:
            with pytest.raises(DataError) as error:
                see([str(tmp_path / name)], {})
            said = str(error.value)
            command = said[said.index("iconv" if "iconv" in said else "python -c") :].replace(
                "python -c", f"{sys.executable} -c"
            )
            subprocess.run(command, shell=True, check=True, cwd=tmp_path)
            name = made
        (seen,) = see([str(tmp_path / "commas.csv")], {})
        assert [row for _, _, row in seen.sample] == rows


@pytest.mark.parametrize(
    "lines",
    [
        ["question,answer", *(f"für {i},é" for i in range(9)), "\udce9,x"],  # one byte that went wrong
        ['question,"answer (short; clear; polite)"', "a,b"],
        ['"question","answer"', '"a;b;c","d"'],
    ],
)
def test_tables_that_only_look_like_others(tmp_path: Path, lines: list[str]) -> None:
    (tmp_path / "faq.csv").write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    (seen,) = see(
        [str(tmp_path / "faq.csv")],
        {"question": "prompt", "answer (short; clear; polite)": "completion"} if "short" in lines[0] else {},
    )
    assert len(seen.records) == sum("\udce9" not in line for line in lines) - 1


def test_a_spec_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        publish(tmp_path / "spec.yaml", "name: \udce9")
    assert not list(tmp_path.iterdir())


def test_files_that_are_there_stay_as_they_are(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "chats.jsonl", ROWS["messages"][0])
    for name in ("spec.yaml", "spec-eval.jsonl"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(SpecError, match="name another spec with --out"):
            write_starter(tmp_path / "spec.yaml", "tiny", [data], [], {})
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    with pytest.raises(SpecError, match="there is no folder"):
        write_starter(tmp_path / "gone" / "spec.yaml", "tiny", [data], [], {})


def test_chats_given_as_preferences_and_models_that_are_none(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "chats.jsonl", ROWS["messages"][0])
    with pytest.raises(DataError, match="give them as --data"):
        write_starter(tmp_path / "spec.yaml", "tiny", [], [data], {})
    with pytest.raises(DataError, match="no such model folder"):
        write_starter(tmp_path / "spec.yaml", "./gone", [data], [], {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"there is no config.json in it"):
        write_starter(tmp_path / "spec.yaml", str(tmp_path / "folder"), [data], [], {})


def test_a_model_of_the_hub_without_a_network(tmp_path: Path) -> None:
    """The hub is offline in tests: size by the name, lengths by characters, and both are said."""
    data = jsonl(tmp_path / "chats.jsonl", ROWS["messages"][0])
    said = "\n".join(write_starter(tmp_path / "spec.yaml", "org/Model-7B-Instruct", [data], [], {}))
    assert (
        "the hub does not answer" in said and "7.0 billion parameters" in said and "estimated from characters" in said
    )
    assert planned(tmp_path / "spec.yaml")["sft"]["rows"] == 54
    assert load_spec(tmp_path / "spec.yaml").stages["sft"].tuning.method in ("lora", "qlora")


# ------------------------------------------------------------------------------------------------ choices

QWEN_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip


def machine(gpus: int = 0, gib: int | None = None, memory: int = 32) -> Machine:
    return Machine("this machine", 8, memory * GIB, gpus, gib * GIB if gib else None)


@pytest.mark.slow
def test_a_model_of_7_billion_gets_what_fits() -> None:
    base = Base("org/name", False, QWEN_7B, 7_600_000_000, 32768)
    large = choices.way_for(base, machine(1, 80), 1024, 32)
    small = choices.way_for(base, machine(1, 16), 1024, 32)
    none = choices.way_for(base, machine(), 1024, 32)
    assert large.method == "lora" and large.memory is not None and large.memory < 80 * GIB
    assert small.method == "qlora" and small.memory is not None and small.memory < 16 * GIB
    assert none.elsewhere and none.gpu and "written for a GPU of 24 GiB" in none.note[0]


def test_small_models_are_trained_whole_and_several_gpus_share() -> None:
    small = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "vocab_size": 512,
    }
    base = Base("org/name", False, small | {"num_attention_heads": 4}, 200_000, 256)
    assert choices.way_for(base, machine(), 128, 16).method == "full"
    shared = choices.way_for(base, machine(4, 24), 128, 16)
    assert (shared.method, shared.deepspeed, shared.workers, shared.batch) == ("full", "zero2", 4, 4)


@pytest.mark.parametrize(
    ("lengths", "rows", "limit", "length", "says"),
    [
        ([10, 100], 2, None, 128, "the longest of 2 rows has 100 tokens"),
        ([10, 120], 5000, None, 256, "the longest of 2 rows that were looked at has 120 tokens"),
        (
            [10, 3000],
            2,
            2048,
            2048,
            "the model's positions; the longest of 2 rows has 3,000 tokens; 1 longer ones are left out",
        ),
        ([100] * 999 + [60_000], 1000, None, 128, "60,000 tokens; 1 longer ones are left out"),
    ],
)
def test_max_length(lengths: list[int], rows: int, limit: int | None, length: int, says: str) -> None:
    choice = choices.length_for([Measured(lengths=lengths, read=len(lengths))], rows, limit)
    assert choice.value == length and says in choice.why


@pytest.mark.parametrize(("rows", "share"), [(10, None), (60, "10%"), (1000, "5%"), (3000, "2%"), (100_000, "1%")])
def test_held_out(rows: int, share: str | None) -> None:
    choice = choices.held_out_for(rows)
    assert (choice.value if choice else None) == share


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 5e8),
        ("org/SmolLM2-135M", 1.35e8),
        ("meta-llama/Llama-3.1-8B", 8e9),
        ("org/name", None),
    ],
)
def test_the_size_in_a_name(name: str, parameters: float | None) -> None:
    assert _by_name(name) == parameters


@pytest.mark.parametrize("value", [2e-5, 0.002, 1.0, 0.0, 1e-7, 123456.0, True, "yes", "2%", "a: b", "#x", "", "ü\u2028", "1e3", "-", "null", ["a", {"b": 1}], "./x y", "~"])  # fmt: skip
def test_values_are_read_back_as_they_were(value: Any) -> None:
    assert YAML(typ="safe").load(f"key: {scalar(value)}") == {"key": value}


def test_the_rows_of_a_source_are_counted(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "chats.jsonl", ROWS["messages"][0])
    (seen,) = see([data], {})
    assert seen.rows == 60 and seen.exact and seen.whole
    assert len(list(read_file(seen.files[0]))) == 60 and seen.source == DataSource(path=data, format="messages")


# ------------------------------------------------------------------------------------------------ the schema


def test_the_schema_says_what_is_wrong_with_the_kind_that_is_meant(tmp_path: Path) -> None:
    schema = json_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    spec: dict[str, Any] = {
        "model": "org/name",
        "stages": {
            "sft": {
                "kind": "sft",
                "data": [{"path": "x", "eval": "2%"}],
                "train": {"lerning_rate": 1},
                "workers": "2..8",
            },
            "own": {"kind": "my_stages:Mine", "anything": 1},
            "dpo": {
                "kind": "dpo",
                "data": [{"path": "x", "eval": 0.02}],
                "train": {"max_steps": "${STEPS:-10}"},
                "max_dropped": "1%",
            },
        },
    }
    errors = [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(spec)]
    assert errors == ["Additional properties are not allowed ('lerning_rate' was unexpected)"]


@pytest.mark.parametrize("file", sorted(Path(__file__).parent.parent.glob("examples/*.yaml")), ids=lambda p: p.name)
def test_the_examples_are_what_the_schema_says(file: Path) -> None:
    tree = YAML(typ="safe").load(file.read_text())
    assert not [error.message for error in jsonschema.Draft7Validator(json_schema()).iter_errors(tree)]


@pytest.mark.parametrize(
    ("rows", "batch", "tokens", "steps"),
    [
        (400, 8, 22.0, 1000),
        (587, 16, 310.0, 400),
        (100_000, 16, 40.0, 1500),
        (50, 8, 4000.0, 100),
        (None, 16, 100.0, 1200),
    ],
)
def test_a_fresh_model_is_trained_for_minutes_whatever_the_rows(
    rows: int | None, batch: int, tokens: float, steps: int
) -> None:
    """Found by a trial with 587 rows of 310 tokens: 700 steps took nine minutes of the ten a first run may take."""
    chosen = choices.tiny_steps_for(rows, batch, tokens)
    assert chosen.value == steps and chosen.why.endswith("min on two cores")
