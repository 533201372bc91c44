"""`raylign init --from FILE`: a configuration of TRL, LLaMA-Factory or axolotl as a spec.

What means the same is carried over; what could not be is listed with the reason, in the terminal and at the end of the spec,
and so is what means something else here. Nothing of theirs is lost without a word.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.converter import axolotl, llama_factory, trl
from pipeline.converter.parts import Ours
from pipeline.reach import hub_silence
from pipeline.spec import Head, json_schema
from pipeline.spec_reader import load_spec
from pipeline.starter.page import SCHEMA, Page, head
from stages.data.hub import SCHEME
from stages.errors import Problem, SpecError

TOOLS = {"axolotl": axolotl, "LLaMA-Factory": llama_factory, "TRL": trl}  # in this order: the first that knows the file
LOOKS = (
    "neither of TRL (model_name_or_path, dataset_name), nor of LLaMA-Factory (stage, finetuning_type, dataset), nor of axolotl "
    "(base_model, datasets)"
)


def write_converted(file: Path, out: Path) -> list[str]:
    """Write the spec, and its schema.

    Returns:
        What was carried over, what was not, and what is left to do, in lines.

    Raises:
        SpecError: not a configuration of one of these tools, or of something that there is no stage for.
    """
    if out.exists():
        raise SpecError([Problem("", f"{out} exists; name another file with --out, or move it away")])
    if not out.parent.is_dir():
        raise SpecError([Problem("", f"--out {out}: there is no folder {out.parent}")])
    config = read(file)
    ours = convert(config, file, out)
    out.write_text(spec_text(ours, file), encoding="utf-8")
    schema = out.with_name(SCHEMA)
    schema.write_text(json.dumps(json_schema(), separators=(",", ":")), encoding="utf-8")
    return [
        f"{file}: a configuration of {ours.tool}, as a stage of kind {ours.kind}",
        *_listed("not carried over:", [f"{what}\n      {why}" for what, why in ours.lost]),
        *_listed("means something else here:", ours.differs),
        *_listed("to mend before it runs:", to_mend(out)),
        "",
        f"written: {out}, {schema}",
        f"  raylign plan {shlex.quote(str(out))}",
    ]


def read(file: Path) -> dict[str, Any]:
    """A configuration in YAML or JSON.

    Raises:
        SpecError: there is no such file, or it is neither.
    """
    if not file.is_file():
        raise SpecError([Problem("", f"--from {file}: no such file")])
    try:
        config = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError, RecursionError) as error:
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SpecError([Problem("", f"not YAML: {what}")], str(file)) from error
    if not isinstance(config, dict):
        raise SpecError([Problem("", "a configuration is a mapping of keys and values")], str(file))
    return {str(key): value for key, value in config.items()}


def convert(config: Mapping[str, Any], file: Path, out: Path) -> Ours:
    for tool in TOOLS.values():
        if tool.is_theirs(config):
            return tool.convert(config, file, out)
    hint = "; a spec of raylign needs no conversion" if "stages" in config else ""
    raise SpecError([Problem("", f"whose configuration is it? {LOOKS}{hint}")], str(file))


def to_mend(out: Path) -> list[str]:
    """What a run would say of the spec, as far as it can be known here."""
    text = out.read_text(encoding="utf-8")
    within = out.resolve().parent if f"path: {SCHEME}" in text and hub_silence() else None
    try:
        load_spec(out, within=within)
    except SpecError as error:
        return [problem.render(str(out)) for problem in error.problems]
    return ["the hub does not answer, so datasets there were not looked at"] if within else []


def _listed(title: str, lines: list[str]) -> list[str]:
    return ["", title, *(f"  - {line}" for line in lines)] if lines else []


# ------------------------------------------------------------------------------------------------ the spec


def spec_text(ours: Ours, file: Path) -> str:
    page = Page()
    counts = (
        f"{len(ours.lost)} of its keys were not carried over, and {len(ours.differs)} mean something else: see the end."
    )
    head(page, f"raylign init --from {file}", [f"Of a configuration of {ours.tool}. {counts}"])
    name = re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9._-]+", "-", ours.name).strip("-.") or "run"
    page.key(0, "name", name)
    page.key(0, "model", ours.model)
    page.key(0, "storage", "runs", "theirs was output_dir")
    for key, value in ours.head.items():
        if key in Head.model_fields:
            page.key(0, key, value, ours.was.get(key, ""))
    page.add(0, "stages:")
    page.add(2, f"{ours.kind}:")
    page.key(4, "kind", ours.kind)
    page.add(4, "data:" if ours.data else "data: []", "" if ours.data else "theirs names none: write - path: FILE")
    for source in ours.data:
        page.source(6, source, {"eval": "held out, by their content"})
    if ours.mask:
        page.key(4, "mask", ours.mask)
    for key, value in ours.stage.items():
        comment = f"theirs: {ours.was[key]}" if key in ours.was else ""
        if key == "rewards" and not value:
            comment = "theirs names none: a reward stage, a model, or module:name"
        page.key(4, key, value, comment)
    page.add(4, "train:")
    for key, value in ours.train.items():
        page.key(6, key, value, f"theirs: {ours.was[key]}" if key in ours.was else "")
    if not ours.train:
        page.lines[-1] = "    train: {}"
    page.key(4, "tuning", ours.tuning or {"method": "full"})
    _evaluation(page, ours)
    for title, lines in (
        ("Not carried over:", [f"{what}  ({why})" for what, why in ours.lost]),
        ("Means something else here:", ours.differs),
    ):
        if lines:
            page.lines.append("")
            page.comment(0, title)
            for line in lines:
                page.comment(0, f"- {line}")
    return page.text()


def _evaluation(page: Page, ours: Ours) -> None:
    if not ours.heldout:
        return
    page.add(2, "eval:", "their held-out data")
    page.key(4, "kind", "evaluate")
    page.key(4, "models", [f"stages.{ours.kind}"])
    page.add(4, "data:")
    for source in ours.heldout:
        page.source(6, {k: v for k, v in source.items() if k != "eval"}, {})
