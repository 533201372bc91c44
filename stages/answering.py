"""Answers to chunks of prompts, and their scores: a file for each chunk, and the workers (stages/pool.py) that write them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.data.groups import read_group
from stages.data.prepare import Prepared
from stages.data.tokenizer import load_tokenizer
from stages.rewards import Answered, Scorer, Scoring
from stages.selection import unusable
from stages.storage import names, pull, push


@dataclass(frozen=True)
class Chunk:
    """Consecutive prompts of the prepared data."""

    number: int
    first: int  # number of its first prompt among all
    file: str
    group: int  # row group of the file
    start: int  # within the row group
    count: int

    def prompts(self) -> list[dict[str, Any]]:
        """Rows of the `prompt` task (stages/data/encode.py)."""
        return read_group(self.file, self.group).slice(self.start, self.count).to_pylist()


def cut(data: Prepared, size: int, most: int | None = None) -> list[Chunk]:
    """The prompts in chunks of `size`, the first `most` of them."""
    out: list[Chunk] = []
    first, left = 0, data.rows if most is None else most
    for file, group, count in data.row_groups():
        for start in range(0, count, size):
            here = min(size, count - start, left)
            if here > 0:
                out.append(Chunk(len(out), first, file, group, start, here))
                first, left = first + here, left - here
    return out


def _file(folder: Path, chunk: Chunk) -> Path:
    return folder / f"{chunk.number:06}.json"


def left_of(folder: Path, chunks: Sequence[Chunk]) -> list[Chunk]:
    """The chunks that are not done yet."""
    there = names(folder)
    return [chunk for chunk in chunks if _file(folder, chunk).name not in there]


def read_chunk(folder: Path, chunk: Chunk) -> Any:
    return json.loads(pull(_file(folder, chunk)).read_text())


def write_chunk(folder: Path, chunk: Chunk, value: Any) -> None:
    """The file is there only once it is whole; writing it again does no harm."""
    path = _file(folder, chunk)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    folder.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)
    push(path)


# ------------------------------------------------------------------------------------------------ what workers do


class Sampler:
    """Writes the answers to a chunk's prompts; gives how many tokens these are."""

    def __init__(self, model: str, chat_template: str | None, folder: Path, options: dict[str, Any]) -> None:
        from stages.sampling import stop_ids_of
        from stages.scoring import load_for_scoring

        self.folder, self.options = folder, options
        self.tokenizer = load_tokenizer(model, chat_template)
        self.model = load_for_scoring(model)
        self.stops = stop_ids_of(self.model.generation_config, self.tokenizer)

    def __call__(self, chunk: Chunk) -> int:
        from stages.sampling import sample

        samples = sample(
            self.model,
            [prompt["prompt_ids"] for prompt in chunk.prompts()],
            pad_id=self.tokenizer.pad_token_id,
            stop_ids=self.stops,
            first=chunk.first,
            **self.options,
        )
        write_chunk(
            self.folder, chunk, [[as_answer(s.ids, s.stopped, self.tokenizer) for s in each] for each in samples]
        )
        return sum(len(s.ids) for each in samples for s in each)


def as_answer(ids: list[int], stopped: bool, tokenizer: Any) -> dict[str, Any]:
    """An answer as a chunk's file has it; its text is without the stop token and other special tokens."""
    text = tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return {"ids": ids, "text": text, "stopped": stopped}


class Judge:
    """Writes the scores of a chunk's answers: of each that can be used a list, one for every term; of the others None."""

    def __init__(self, terms: list[Scorer], samples: Path, folder: Path, batch_size: int) -> None:
        self.samples, self.folder = samples, folder
        self.scoring = Scoring(terms, batch_size)

    def __call__(self, chunk: Chunk) -> None:
        sampled = read_chunk(self.samples, chunk)
        usable = {
            (i, n): answered(prompt, answer)
            for i, (prompt, answers) in enumerate(zip(chunk.prompts(), sampled, strict=True))
            for n, answer in enumerate(answers)
            if unusable(answer["text"], answer["stopped"]) is None
        }
        scores = dict(zip(usable, self.scoring(list(usable.values())), strict=True))
        write_chunk(
            self.folder, chunk, [[scores.get((i, n)) for n in range(len(each))] for i, each in enumerate(sampled)]
        )


def answered(prompt: dict[str, Any], answer: dict[str, Any]) -> Answered:
    """An answer as a chunk's file has it, to a row of prompts, for those that score it."""
    return Answered(
        prompt_ids=prompt["prompt_ids"],
        prompt=json.loads(prompt["messages"]),
        answer_ids=answer["ids"],
        answer=answer["text"],
        source=prompt["source"],
        row=prompt["row"],
        expected=prompt["expected"],
        columns=json.loads(prompt["columns"]),
    )
