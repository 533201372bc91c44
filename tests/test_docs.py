"""The documentation: links, commands, YAML, messages and pictures are what the code has."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer.main
from ruamel.yaml import YAML

from pipeline import reference
from pipeline.cli import app
from pipeline.spec_reader import load_spec
from stages import KINDS, own
from stages.data.chat import CHATML, HERMES, ChatEncoder, Encoded
from stages.data.source import DataSource
from stages.init import train_tokenizer

from .conftest import write_jsonl

ROOT = Path(__file__).parents[1]
SKIPPED = {".git", ".venv", "runs", "data", "node_modules", "build"}  # of folders that are made, but stages/data is not


def _documents() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.split("\n") if name and (ROOT / name).is_file()]
    return [p for p in ROOT.rglob("*.md") if not SKIPPED & {*p.relative_to(ROOT).parts[:1]}]


DOCUMENTS = sorted(_documents())
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))


def prose(document: Path) -> str:
    """Without blocks of code."""
    return re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def inline(document: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(document))


def anchors(document: Path) -> set[str]:
    """Of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).lower()).replace(" ", "-") for heading in headings}


# ------------------------------------------------------------------------------------------------ links and paths


def test_the_documents_are_found() -> None:
    names = {str(path.relative_to(ROOT)) for path in DOCUMENTS}
    assert names >= {"README.md", "CONTRIBUTING.md", "pipeline/README.md", "pipeline/SPEC.md", "stages/README.md"}


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", prose(document))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), f"{target}: there is no {file}"
        assert file.is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors(file), f"{target}: {file.name} has no such heading"


@each_document
def test_no_path_of_a_machine(document: Path) -> None:
    for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), 1):
        found = re.search(r"(?<![\w.:/])/(work|root|home|tmp|mnt|Users|opt)/\w", line)
        assert found is None, f"line {number}: {line}"


# ------------------------------------------------------------------------------------------------ commands


COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
COMMAND = re.compile(r"(?:^|\s)(?:raylign|python -m pipeline) (.+)")


def lines_of_blocks(document: Path) -> Iterator[str]:
    """Lines of a shell, comments (two spaces and more before them) left out."""
    for block in [*blocks(document, ""), *blocks(document, "sh"), *blocks(document, "bash")]:
        for line in block.splitlines():
            yield re.split(r"\s{2,}#|\s{3,}", line.strip())[0]


def parsed(line: str) -> None:
    """A whole command line, as the command itself parses it."""
    name, *arguments = shlex.split(line)
    assert name in COMMANDS, f"raylign {line}: there is no such command"
    COMMANDS[name].make_context(name, arguments)


def options_exist(line: str) -> None:
    """A command that is spoken of, perhaps without all that it needs."""
    words = re.sub(r"[\[\]]", " ", line).split()
    assert words[0] in COMMANDS, f"raylign {line}: there is no such command"
    known = {o for p in COMMANDS[words[0]].params for o in (*p.opts, *p.secondary_opts)} | {"--debug", "--help"}
    assert {w.partition("=")[0] for w in words[1:] if w.startswith("-")} <= known, f"raylign {line}: of {sorted(known)}"


@each_document
def test_commands_parse(document: Path) -> None:
    for line in lines_of_blocks(document):
        if match := COMMAND.search(line):
            parsed(match.group(1))
    for code in inline(document):
        if match := re.fullmatch(r"(?:raylign|python -m pipeline) (.+)", code):
            options_exist(match.group(1))


def test_every_command_is_in_the_table() -> None:
    said = {code.split()[1] for code in inline(ROOT / "pipeline" / "README.md") if re.match(r"raylign \w", code)}
    assert COMMANDS.keys() <= said


def test_a_wrong_command_is_seen() -> None:
    for wrong in ("runn spec.yaml", "run", "plan spec.yaml --jsn", "inspect spec.yaml -n many"):
        with pytest.raises(Exception, match=r"."):
            parsed(wrong)
    with pytest.raises(AssertionError):
        options_exist("chat RUN [--stge NAME]")


@each_document
def test_scripts_and_targets_are_there(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    said = [*lines_of_blocks(document), *inline(document)]
    for code in said:
        if match := re.match(r"make ([a-z-]+)", code):
            assert re.search(rf"^{match.group(1)}:", makefile, re.MULTILINE), code
        if match := re.match(r"python (?:-m ([\w.]+)|(\S+\.py))(.*)", code):
            module, script, rest = match.groups()
            if module and module.partition(".")[0] not in ("pipeline", "tests"):
                continue
            file = ROOT / (script or f"{module.replace('.', '/')}.py")
            assert file.is_file() or file.with_suffix("").is_dir(), code
            if file.is_file():
                for option in re.findall(r"(?<=\s)--[a-z-]+", rest):
                    assert option in file.read_text(), f"{code}: {file.name} has no {option}"


# ------------------------------------------------------------------------------------------------ YAML and Python

# Stages that fragments speak of without having them.
OTHERS: dict[str, dict[str, Any]] = {
    "sft": {"kind": "sft", "data": [{"path": "chats.jsonl"}]},
    "reward": {"kind": "reward", "model": "stages.sft", "data": [{"path": "pairs.jsonl"}]},
    "dpo": {"kind": "dpo", "model": "stages.sft", "data": [{"path": "pairs.jsonl"}]},
}


def whole(fragment: dict[str, Any]) -> dict[str, Any]:
    """A block as a spec: it is one, or its stages, or one stage's data."""
    if "data" in fragment and "kind" not in fragment:
        fragment = {"sft": {"kind": "sft", **fragment}}
    if "stages" not in fragment:
        assert all(isinstance(stage, dict) and "kind" in stage for stage in fragment.values()), (
            "neither spec nor stages"
        )
        fragment = {"stages": fragment}
    spec = {"model": "org/model", **fragment}
    named = set(re.findall(r"stages\.([a-z][\w-]*)", str(spec["stages"])))
    missing = {name: OTHERS[name] for name in OTHERS if name in named and name not in spec["stages"]}
    if "reward" in missing or "dpo" in missing:
        missing = {"sft": OTHERS["sft"]} | missing
    return spec | {"stages": missing | spec["stages"]}


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the modules that the documents name; forgotten afterwards."""
    monkeypatch.setenv(own.CODE, str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    shutil.copy(ROOT / "examples" / "own.py", tmp_path / "own.py")
    shutil.copy(ROOT / "examples" / "quickstart_rewards.py", tmp_path / "my_rewards.py")
    before = {*sys.modules}
    yield tmp_path
    for name in {"own", "my_rewards"} - before:
        sys.modules.pop(name, None)


def read(spec: dict[str, Any], folder: Path) -> Any:
    """As the command reads it, but for files and models: `within` says that they are elsewhere."""
    file = folder / "spec.yaml"
    with file.open("w") as out:
        YAML(typ="safe").dump(spec, out)
    return load_spec(file, within=folder / "elsewhere")


@each_document
def test_yaml_is_a_spec(document: Path, modules: Path) -> None:
    for block in blocks(document, "yaml"):
        read(whole(YAML(typ="safe").load(block)), modules)


def test_wrong_yaml_is_seen(modules: Path) -> None:
    read(whole({"sft": OTHERS["sft"]}), modules)
    for wrong in (
        {"sft": {"kind": "sft", "data": [{"path": "a.jsonl"}], "train": {"learning_rte": 1.0}}},
        {"dpo": {"kind": "dpo", "model": "stages.reward", "data": [{"path": "a.jsonl"}]}},
        {
            "eval": {
                "kind": "evaluate",
                "models": ["stages.sft"],
                "data": [{"path": "a"}],
                "gates": [{"check": "own:nothing"}],
            }
        },
    ):
        with pytest.raises(Exception, match=r"unknown key|makes a reward model|has no 'nothing'"):
            read(whole(wrong), modules)


@each_document
def test_python_is_python(document: Path) -> None:
    for block in blocks(document, "python"):
        for node in ast.parse(block).body:
            if isinstance(node, ast.ImportFrom | ast.Import):
                exec(compile(ast.Module([node], []), str(document), "exec"), {})


# ------------------------------------------------------------------------------------------------ the code's own words


def test_the_reference_is_current() -> None:
    written = (ROOT / "pipeline" / "SPEC.md").read_text(encoding="utf-8")
    assert written == reference.reference(), "run `python -m pipeline.reference`"


def test_the_reference_describes_every_kind_and_key() -> None:
    made = reference.reference()
    for kind in KINDS:
        assert f"## kind: {kind}\n" in made
    rows = re.findall(r"^\| `(\w+)` \| .* \| .* \| (.*) \|$", made, re.MULTILINE)
    assert [key for key, text in rows if not text.strip()] == []


def strings() -> list[str]:
    """Every constant text of the two packages; those of an f-string are apart where something stands between them."""
    found = []
    for package in ("pipeline", "stages"):
        for file in (ROOT / package).rglob("*.py"):
            nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            found += [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return found


def test_what_a_user_can_bring_is_the_example_that_is_run() -> None:
    block = next(b for b in blocks(ROOT / "pipeline" / "README.md", "python") if "class Average" in b)
    assert (ROOT / "examples" / "own.py").read_text(encoding="utf-8").endswith(block)


def test_messages_that_are_explained_are_those_of_the_code() -> None:
    """Each piece between `...` of a message in the tables of troubleshooting stands in one text of the code."""
    text = (ROOT / "pipeline" / "README.md").read_text(encoding="utf-8")
    _, _, section = text.partition("## Troubleshooting by message")
    first = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    messages = [message for cell in first for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 20
    known = "\0".join(strings())
    for message in messages:
        pieces = [piece.strip() for piece in message.split("...")]
        assert any(len(piece) > 5 for piece in pieces), message
        for piece in pieces:
            assert piece in known, f"{message!r}: no message of the code has {piece!r}"


def test_every_module_is_in_the_map() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for package in ("pipeline", "stages"):
        for file in (ROOT / package).rglob("*.py"):
            if not file.name.startswith("__"):
                assert re.search(rf"\b{re.escape(file.name)}\b", text), f"{file.relative_to(ROOT)} is not in the map"


# ------------------------------------------------------------------------------------------------ pictures


SVG = "{http://www.w3.org/2000/svg}"
NEWLINE = "↵"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Rain in Rome?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Rome"}}}],
    },
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "No rain."},
]
THOUGHT = [
    {"role": "user", "content": "17*3?"},
    {"role": "assistant", "reasoning_content": "17*3=51", "content": "51"},
    {"role": "user", "content": "+1?"},
    {"role": "assistant", "reasoning_content": "51+1=52", "content": "52"},
]
# Shows the reasoning of answers after the last user turn alone, as many public templates do.
FORGETS = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content and loop.index0 > ns.last %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("pictures") / "chats.jsonl"
    write_jsonl(path, [{"messages": CHAT[:3]}])
    return train_tokenizer([DataSource(path=str(path))], 400, CHATML)


def encoded(
    tokenizer: Any, template: str, messages: list[dict[str, Any]], **options: Any
) -> list[list[tuple[str, bool]]]:
    """Each example as lines of characters with whether they are trained; a newline ends its line."""
    tokenizer.chat_template = template
    encoder = ChatEncoder(tokenizer, **options)
    out = []
    for example in encoder.encode_each([messages])[0]:
        assert isinstance(example, Encoded), example
        pairs = zip(example.input_ids, example.labels, strict=True)
        text = [
            (character.replace("\n", NEWLINE), label != -100)
            for token, label in pairs
            for character in encoder.tokenizer.decode([token], skip_special_tokens=False)
        ]
        out.append(text)
    return out


def drawn(picture: str, group: str) -> list[list[tuple[str, bool]]]:
    """The lines of a group: characters, and whether they are drawn as trained."""
    root = ElementTree.parse(ROOT / "stages" / "data" / picture).getroot()
    found = next(g for g in root.iter(f"{SVG}g") if g.get("id") == group)
    return [
        [(c, span.get("class") == "on") for span in line.iter(f"{SVG}tspan") for c in span.text or ""]
        for line in found.iter(f"{SVG}text")
    ]


def test_the_picture_of_a_mask_is_the_mask(tokenizer: Any) -> None:
    lines = drawn("masks.svg", "conversation")
    (found,) = encoded(tokenizer, HERMES, CHAT)
    assert [c for line in lines for c in line] == found

    root = ElementTree.parse(ROOT / "stages" / "data" / "masks.svg").getroot()
    for value in ("assistant", "last_assistant", "completion", "all"):
        (found,) = encoded(tokenizer, HERMES, CHAT, train_on=value)
        trained, at = [], 0
        for line in lines:
            trained.append(any(on for _, on in found[at : at + len(line)]))
            at += len(line)
        group = next(g for g in root.iter(f"{SVG}g") if g.get("id") == value)
        assert [r.get("class") == "trained" for r in group.iter(f"{SVG}rect")] == trained, value


def test_the_picture_of_forgotten_reasoning_is_what_happens(tokenizer: Any) -> None:
    examples = encoded(tokenizer, FORGETS, THOUGHT, history="per_turn")
    assert [[c for line in drawn("masks-history.svg", name) for c in line] for name in ("first", "second")] == examples
    assert encoded(tokenizer, FORGETS, THOUGHT, history="last_turn") == examples[1:]
    rendered = "".join(c for line in drawn("masks-history.svg", "whole") for c, _ in line)
    assert rendered == "".join(c for c, _ in examples[1])  # the first answer without its reasoning


@pytest.mark.parametrize("picture", sorted(ROOT.glob("*/**/*.svg")), ids=lambda p: p.name)
def test_pictures_fetch_and_run_nothing(picture: Path) -> None:
    for node in ElementTree.parse(picture).iter():
        assert node.tag.removeprefix(SVG) not in ("script", "foreignObject", "image")
        for key, value in node.attrib.items():
            assert not key.rsplit("}", 1)[-1].startswith("on")
            assert "href" not in key or value.startswith("#"), f"{picture.name}: {key}={value}"
