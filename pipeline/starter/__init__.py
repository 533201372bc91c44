"""`raylign init`: looks at the data, the model and the machine, and writes a commented spec that runs."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.spec import json_schema
from pipeline.spec_reader import load_spec
from pipeline.starter import heldout
from pipeline.starter.base import TINY, Base, fresh, look_at
from pipeline.starter.choices import Choice, held_out_for, length_for, step_rows_for, way_for
from pipeline.starter.columns import Reading
from pipeline.starter.machine import look_round
from pipeline.starter.page import SCHEMA
from pipeline.starter.seen import Measured, Seen, measure, measure_roughly, records_of, see, turns_of
from pipeline.starter.sentences import about_lengths, about_rows
from pipeline.starter.writing import Draft, Part, spec_text
from stages.data import files
from stages.data.chat import BUILT_IN
from stages.data.encode import Recipe
from stages.data.records import Conversation, Prompt
from stages.data.source import DataSource
from stages.data.tokenizer import load_tokenizer, tokenizer_spec
from stages.errors import DataError, Problem, SpecError

SEED = 0
PART = {"conversation": "sft", "preference": "dpo", "labelled": "kto"}
CHOSEN_FIRST = (
    "learns the answers that are wanted, before they are compared; a model that answers so already needs no sft"
)
ALREADY_SEEN = "sft has seen the wanted answers of these rows, the stages after it have not"


def write_starter(
    out: Path, model: str, data: Sequence[str], preference: Sequence[str], columns: Mapping[str, str]
) -> list[str]:
    """Write a spec, its schema and the rows that it holds out.

    Args:
        out: the spec; the other files lie beside it.
        model: a folder, a hub id, or `tiny`.
        columns: a file's own name -> what the column is, of each file that has it.

    Returns:
        What was found and written, in lines.

    Raises:
        SpecError: a file is there already, or its folder is not.
        DataError: the model or the data cannot be used.
    """
    _may_write(out)
    seen = see([*data, *preference], columns)
    seen = [_checked(each, "data" if i < len(data) else "preference") for i, each in enumerate(seen)]
    base = _base(model, seen)
    parts, history, base = _parts(seen, base, out)
    machine = look_round()
    longest = max((length_for(p.measured, p.all_rows, base.limit).value for p in parts), default=1024)
    way = way_for(base, machine, longest, step_rows_for(parts[0].rows))
    found = [line for part in parts for line in _about(part)] + [f"model: {base}", f"machine: {machine}"]
    notes = [*base.notes, *([machine.note] if machine.note else [])]
    parts, evaluated = _hold_out(parts, out)
    draft = Draft(
        name=_name(out, seen),
        command=_command(model, data, preference, columns),
        base=base,
        model=base.name if not os.path.isabs(base.name) else path_from(base.name, out),
        parts=parts,
        way=way,
        history=history,
        found=[*found, *notes],
        evaluated=evaluated,
    )
    try:
        written = publish(out, spec_text(draft))
    except BaseException:
        for name in evaluated:
            out.with_name(name).unlink(missing_ok=True)
        raise
    notes += [line for part in parts for line in _warnings(part)]
    made = ", ".join([str(out), *(str(out.with_name(name)) for name in evaluated), written])
    return [*found, *notes, *draft.way.note, "", f"written: {made}", *_next(out)]


def _may_write(out: Path) -> None:
    for path in (out, *(out.with_name(f"{out.stem}-{name}") for name in HELD_OUT.values())):
        if path.exists():
            raise SpecError([Problem("", f"{path} exists; name another spec with --out, or move it away")])
    if not out.parent.is_dir():
        raise SpecError([Problem("", f"--out {out}: there is no folder {out.parent}")])


HELD_OUT = {"sft": "eval.jsonl", "dpo": "eval-pairs.jsonl", "kto": "eval-wanted.jsonl"}  # of a stage's data


def _checked(seen: Seen, asked: str) -> Seen:
    """The data as what it was given for; conversations are no preferences, but preferences may be all there is."""
    if isinstance(seen.records[0], Prompt):
        raise DataError(
            f"{seen.given}: these rows are prompts without answers ({', '.join(seen.names)}), and from those alone "
            "nothing is learned; name the column of the answers with --columns completion=NAME, or train with a reward: "
            "kind grpo (examples/grpo.yaml)"
        )
    if asked == "preference" and seen.task == "conversation":
        raise DataError(
            f"{seen.given}: these rows are {seen.format} ({', '.join(seen.names)}), preference pairs (prompt, chosen, "
            f"rejected) or labelled answers are wanted here; give them as --data {seen.given}"
        )
    return seen


def _base(model: str, seen: Sequence[Seen]) -> Base:
    tools = any(turns_of(each)[2] for each in seen)
    if model != TINY:
        return look_at(model, tools)
    if any(each.format == "tokens" for each in seen):
        raise DataError("these rows are tokens of a tokenizer: name its model with --model")
    size = sum(0 if file.kind == "hf" else files.size(file) for each in seen for file in each.files)
    return fresh([each.source for each in seen], size, tools)


# ------------------------------------------------------------------------------------------------ the stages


def _parts(seen: Sequence[Seen], base: Base, out: Path) -> tuple[list[Part], str | None, Base]:
    """The stages that train, how earlier turns are rendered, and the model with the chat template that suits the data."""
    by_kind: dict[str, list[Seen]] = {}
    for each in seen:
        by_kind.setdefault(PART[each.task], []).append(each)
    says = ""
    if "sft" not in by_kind:
        wanted = [made for each in seen if (made := wanted_answers(each)) is not None]
        if wanted:
            by_kind["sft"], says = wanted, CHOSEN_FIRST
    history, base = _settle([each for group in by_kind.values() for each in group], base)
    parts = []
    for kind in ("sft", "dpo", "kto"):
        if kind not in by_kind:
            continue
        measured = [_measure(each, base, history) for each in by_kind[kind]]
        if not any(m.lengths for m in measured):
            raise DataError("\n".join(_nothing_left(by_kind[kind], measured, base)))
        share = None if kind == "sft" and says else _share(by_kind[kind])
        paths = [path_from(each.source.path, out) for each in by_kind[kind]]
        parts.append(Part(kind, by_kind[kind], measured, paths, share, says if kind == "sft" else ""))
    return parts, history, base


def wanted_answers(seen: Seen) -> Seen | None:
    """Preferences as conversations with their wanted answers, by options of the source; None where that cannot be said."""
    columns, first = dict(seen.source.columns), next(row for _, _, row in seen.sample if isinstance(row, dict))
    if seen.task == "labelled":
        there = {*first, *columns}
        format = next((f for f, c in CHATS.items() if c in there), "prompt_completion")
        source = DataSource(path=seen.source.path, columns=columns, format=format, filter="label")
    else:
        chosen = columns.pop("chosen", "chosen")
        columns.pop("rejected", None)
        answer = first.get(chosen)
        asked = {"prompt", *CHATS.values()} & {*first, *columns}
        if asked <= {"prompt"} and asked:
            columns["completion"], format = chosen, "prompt_completion"
        elif asked:
            return None  # a conversation and an answer to it, in two columns
        elif isinstance(answer, str):
            columns["text"], format = chosen, "transcript"
        else:
            turn = answer[0] if isinstance(answer, list) and answer and isinstance(answer[0], dict) else {}
            format = "messages" if "role" in turn else "sharegpt"
            columns[CHATS[format]] = chosen
        source = DataSource(path=seen.source.path, columns=columns, format=format)
    records, broken, example = records_of(seen.sample, source, format)
    broken.pop("filtered", None)
    if not any(isinstance(record, Conversation) for record in records):
        return None
    reading = Reading(format, dict(source.columns))
    return replace(seen, source=source, reading=reading, records=records, broken=broken, example=example)


CHATS = {"messages": "messages", "sharegpt": "conversations"}


def _settle(seen: Sequence[Seen], base: Base) -> tuple[str | None, Base]:
    """`mask.history`, and the model with the chat template, with which fewest rows are left out: what the model has itself,
    unless that loses more than a hundredth more."""
    if base.tokenizer is None:
        return None, base
    share, reasons = _lost(seen, base, None)
    tried: list[tuple[float, str | None, Base]] = [(share, None, base)]
    if "history_rewritten" in reasons:
        tried.append((_lost(seen, base, "per_turn")[0], "per_turn", base))
    if reasons & {"tools_dropped", "tool_calls_dropped"} and not base.chat_template:
        hermes = replace(base, tokenizer=load_tokenizer(base.name, BUILT_IN["hermes"]), chat_template="hermes")
        tried.append((_lost(seen, hermes, None)[0], None, hermes))
    least = min(share for share, _, _ in tried)
    _, history, base = next(t for t in tried if t[0] <= least + 0.01)
    return history, base


def _lost(seen: Sequence[Seen], base: Base, history: str | None) -> tuple[float, set[str]]:
    """The share of the rows that cannot be used, and the reasons."""
    measured = [_measure(each, base, history) for each in seen]
    lost = sum(sum(m.lost.values()) for m in measured)
    return lost / max(sum(m.read for m in measured), 1), {reason for m in measured for reason in m.lost}


def _measure(seen: Seen, base: Base, history: str | None) -> Measured:
    if base.tokenizer is None:
        return measure_roughly(seen)
    given = {"history": history} if history else {}
    found = measure(seen, Recipe("conversation", tokenizer_spec(base.tokenizer), **given))  # type: ignore[arg-type]
    found.lost.pop("filtered", None)
    return found


def _nothing_left(seen: Sequence[Seen], measured: Sequence[Measured], base: Base) -> list[str]:
    lines = [f"none of the rows that were looked at can be used with {base.name}:"]
    for each, m in zip(seen, measured, strict=True):
        lines += [f"  {reason} {count:,}: {m.example[reason]}" for reason, count in m.lost.most_common(3)]
        lines[-1] += f" ({each.given})"
    if any(reason.endswith("_dropped") for m in measured for reason in m.lost):
        lines.append(
            "  the model's chat template has no place for it: take a model that has, or leave it out of the data"
        )
    return lines


def _share(seen: Sequence[Seen]) -> Choice | None:
    counts = [each.rows for each in seen]
    return held_out_for(None if None in counts else sum(count or 0 for count in counts))


def _hold_out(parts: Sequence[Part], out: Path) -> tuple[list[Part], dict[str, str]]:
    """The parts, and file -> what is in it, for the evaluation: rows that are held out, or where there are too few to give any
    away, those that are trained on."""
    evaluated: dict[str, str] = {}
    done: list[Part] = []
    for part in parts:
        if part.says:  # its data is that of the stage after it
            done.append(part)
            continue
        path = out.with_name(f"{out.stem}-{HELD_OUT[part.kind]}")
        records = []
        if part.share is not None:
            records = [r for each in part.seen for r in heldout.held_out(each, part.share.value, SEED)][: heldout.MOST]
        count = heldout.write(path, records)
        if count:
            what = f"{count:,} of the rows that `eval` holds out, with seed 0: raise `eval`, never lower it"
            evaluated[path.name] = what + ("; " + ALREADY_SEEN) * any(p.says for p in parts)
        else:
            part = replace(part, share=None)
            records = [record for each in part.seen for record in each.records][: heldout.MOST]
            if heldout.write(path, records):
                evaluated[path.name] = (
                    "too few rows to hold any out: these are trained on, so this says what was learned by heart"
                )
        done.append(part)
    return done, evaluated


# ------------------------------------------------------------------------------------------------ words and files


def _about(part: Part) -> list[str]:
    lines = []
    for seen, measured in zip(part.seen, part.measured, strict=True):
        if part.says:
            continue  # told with the stage whose data it is
        lines += [*about_rows(seen), *about_lengths(measured)]
    return lines


def _warnings(part: Part) -> list[str]:
    return [
        f"warning: {m.share_lost:.0%} of the rows of {seen.given} that were looked at cannot be used; see `raylign inspect`"
        for seen, m in zip(part.seen, part.measured, strict=True)
        if m.share_lost > 0.05
    ]


def _name(out: Path, seen: Sequence[Seen]) -> str:
    stem = out.stem if out.stem != "spec" else Path(seen[0].given.rstrip("/")).name.split(".")[0]
    return re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "run"


def _command(model: str, data: Sequence[str], preference: Sequence[str], columns: Mapping[str, str]) -> str:
    parts = ["raylign", "init"]
    parts += ["--model", model] if model != TINY else []
    parts += [word for path in data for word in ("--data", path)]
    parts += [word for path in preference for word in ("--preference", path)]
    parts += [word for old, new in columns.items() for word in ("--columns", f"{new}={old}")]
    return shlex.join(parts)


def _next(out: Path) -> list[str]:
    spec = shlex.quote(str(out))
    return [
        f"  raylign inspect {spec}   what of each row is trained",
        f"  raylign plan {spec}      steps, memory and disk; starts nothing",
        f"  raylign run {spec}       carries it out",
    ]


def path_from(path: str, out: Path) -> str:
    """A path as the spec has it: relative to the spec where it lies beside or below it.

    Raises:
        SpecError: a spec cannot name it.
    """
    if "${" in path:
        raise SpecError([Problem("", f"{path}: a spec reads ${{...}} as a variable of the environment; rename it")])
    if "://" in path:
        return path
    relative = os.path.relpath(path, out.resolve().parent)
    return path if relative.startswith(os.path.join("..", "..")) else relative


def publish(out: Path, text: str) -> str:
    """The spec under its name, once it has been read and found to be one; and the schema for editors beside it. The name of
    that."""
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        load_spec(temporary)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    schema = out.with_name(SCHEMA)
    schema.write_text(json.dumps(json_schema(), separators=(",", ":")), encoding="utf-8")
    return str(schema)
