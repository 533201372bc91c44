"""Data that the pipeline makes itself: a model answers prompts, rewards judge the answers, and pairs, labelled answers or the
best conversations come out: so SFT -> reward -> on-policy DPO, or rejection sampling back into SFT, is one spec.

Prompts are sampled and scored a chunk at a time; each chunk's results are files in the stage's work folder, so what was
interrupted goes on with the chunks that are left. The chunks, and with them the samples, do not depend on how many share them.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow.parquet as pq
from pydantic import Field, field_validator, model_validator

from stages.base import ArtifactKind, Share, Stage, StageContext, StageResult
from stages.data.chat import Refused, tokenizer_spec
from stages.data.encode import Recipe, Task
from stages.data.ledger import LedgerEntry, check_lost, read_entries, summary, write_entries
from stages.data.mask import Mask
from stages.data.prepare import Prepared, prepare
from stages.data.source import DataSource
from stages.data.tokenizer import load_tokenizer
from stages.errors import DataError, StageError
from stages.pool import run_pool
from stages.rewards import Answered, Reward, Scorer, Scoring, check, is_function, scorers
from stages.selection import FORMAT, Answer, Choice, Make, choose, rows, unusable
from stages.training.architecture import positions
from stages.training.launch import quiet_ray

CHUNK = 64  # prompts that are sampled together, and are made again where it was interrupted
LITTLE = 4  # chunks that are not worth starting processes for
ROWS_IN_FILE = 50_000
SHOWN = 8  # prompts kept for the report, with all their answers

Engine = Literal["transformers", "vllm"]


class Generate(Stage):
    """Samples answers to prompts, scores them, and makes a dataset of them."""

    kind: Literal["generate"] = "generate"
    model: str | None = Field(
        default=None, description="Who answers: stages.NAME, a folder or a hub id; the spec's model if absent."
    )
    data: list[DataSource] = Field(min_length=1, description="Rows of any format: their prompts are used.")
    samples: int = Field(default=4, ge=1, description="Answers to each prompt.")
    max_new_tokens: int = Field(
        default=256, ge=1, description="Bound of an answer; one that has not ended is left out."
    )
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, description="0 samples from all tokens.")
    max_prompts: int | None = Field(default=None, ge=1, description="The first so many; all if absent.")
    rewards: list[Reward] = Field(
        min_length=1,
        description="Reward stages, reward models or functions `module:name`; with weights, their sum decides.",
    )
    make: Make = Field(
        default="pairs",
        description="pairs (the best answer against the worst), kto (each answer with a label) or best (the best answer as "
        "a conversation).",
    )
    margin: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="Of pairs: the least difference in reward."
    )
    threshold: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Of kto: the least reward of a wanted answer, by default what is over the mean of its prompt's answers; of "
        "best: the least reward of an answer that is kept.",
    )
    engine: Literal["auto", "transformers", "vllm"] = Field(
        default="auto", description="auto: vllm where it is installed and there are GPUs, else transformers."
    )
    batch_size: int = Field(default=64, ge=1, description="Answers that are sampled, or scored, together.")
    mask: Mask = Mask()
    max_dropped: Share = Field(default=0.01, description="Rows that may hold no prompt before the run is stopped.")
    workers: int | None = Field(default=None, ge=1, description="Workers of this stage, where not the cluster's.")

    produces: ClassVar = "dataset"
    accepts: ClassVar[dict[str, tuple[ArtifactKind, ...]]] = {"model": ("model",), "rewards": ("reward model",)}
    task: ClassVar[Task] = "prompt"

    @field_validator("data")
    @classmethod
    def _each_once(cls, data: list[DataSource]) -> list[DataSource]:
        for source in data:
            if source.weight != 1.0 or source.eval is not None:
                raise ValueError(
                    f"{source.path}: every prompt is answered `samples` times; leave `weight` and `eval` out"
                )
        return data

    @model_validator(mode="after")
    def _fits_together(self) -> Generate:
        if self.samples < 2 and (self.make == "pairs" or (self.make == "kto" and self.threshold is None)):
            raise ValueError(f"samples: make: {self.make} compares a prompt's answers, so there have to be at least 2")
        if "margin" in self.model_fields_set and self.make != "pairs":
            raise ValueError(f"margin: the difference within a pair; make: {self.make} has `threshold`")
        if self.threshold is not None and self.make == "pairs":
            raise ValueError("threshold: pairs compare answers with each other; set `margin`")
        return self

    @property
    def makes(self) -> str:
        return FORMAT[self.make]

    def references(self) -> dict[str, list[str]]:
        models = [term.reward for term in self.rewards if not is_function(term.reward)]
        return {"model": [] if self.model is None else [self.model], "rewards": models}

    def functions(self) -> list[str]:
        return [term.reward for term in self.rewards if is_function(term.reward)]

    def recipe(self, tokenizer: Any, room: int | None = None) -> Recipe:
        """How rows become prompts, of at most `room` tokens."""
        return Recipe("prompt", tokenizer_spec(tokenizer), max_length=room, **self.mask.options())

    def run(self, ctx: StageContext) -> StageResult:
        quiet_ray()
        policy, terms = ctx.input(), scorers(self.rewards, ctx.inputs.get("rewards", []))
        check(terms, policy, ctx.chat_template, ctx.code)
        engine = choose_engine(self.engine, gpu=ctx.resources.gpus_per_worker > 0)
        ctx.report.phase("prepare")
        data = self._prompts(ctx)
        chunks = cut(data, max(CHUNK, self.batch_size // self.samples), self.max_prompts)
        ctx.report.phase("sample", prompts=sum(chunk.count for chunk in chunks), samples=self.samples, engine=engine)
        speed = self._sample(chunks, ctx, engine)
        ctx.report.phase("score", rewards=len(terms))
        self._score(chunks, terms, ctx)
        ctx.report.phase("write")
        made = _Making(self, terms, ctx.data_dir)
        for chunk in chunks:
            made.add(chunk, _read(_samples(ctx), chunk), _read(_rewards(ctx), chunk))
        result = made.result(data, ctx.work, speed)
        for folder in (_samples(ctx), _rewards(ctx)):
            shutil.rmtree(folder)
        return result

    def _prompts(self, ctx: StageContext) -> Prepared:
        model = ctx.input().model
        limit = positions(model)
        if limit is not None and limit <= self.max_new_tokens:
            raise DataError(
                f"max_new_tokens: {self.max_new_tokens} leaves no room for a prompt in the model's {limit} positions"
            )
        recipe = self.recipe(load_tokenizer(model, ctx.chat_template), limit and limit - self.max_new_tokens)
        data = prepare(self.data, recipe, ctx.prepared, lambda done, total: ctx.report.progress(done, total, "chunk"))
        check_lost(data.manifest["ledger"], self.max_dropped)
        return data

    def _sample(self, chunks: Sequence[Chunk], ctx: StageContext, engine: Engine) -> dict[str, Any]:
        left = _left(_samples(ctx), chunks)
        started = time.time()
        options = {
            "per_prompt": self.samples,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "batch_size": self.batch_size,
            "seed": ctx.seed,
        }
        if engine == "vllm" and left:
            from stages.vllm_sampling import sample_with_vllm

            tokens = sample_with_vllm(left, _samples(ctx), options, ctx)
        else:
            how = {"model": ctx.input().model, "chat_template": ctx.chat_template, "folder": _samples(ctx)}
            tokens = sum(
                run_pool(
                    Sampler,
                    how | {"options": options},
                    left,
                    ctx=ctx,
                    little=len(left) <= LITTLE,
                    progress=_progress(ctx, len(chunks) - len(left)),
                )
            )
        seconds = time.time() - started
        return {"sampling_seconds": round(seconds, 2), "tokens_per_second": round(tokens / seconds) if left else None}

    def _score(self, chunks: Sequence[Chunk], terms: list[Scorer], ctx: StageContext) -> None:
        left = _left(_rewards(ctx), chunks)
        how = {"terms": terms, "samples": _samples(ctx), "folder": _rewards(ctx), "code": ctx.code}
        run_pool(
            Judge,
            how | {"batch_size": self.batch_size},
            left,
            ctx=ctx,
            little=len(left) <= LITTLE,
            progress=_progress(ctx, len(chunks) - len(left)),
        )


def choose_engine(asked: str, *, gpu: bool) -> Engine:
    """The engine that samples.

    Raises:
        StageError: `vllm` was asked for, and is not installed.
    """
    if asked == "vllm" and (problem := engine_problem(asked)):
        raise StageError(problem)
    return "vllm" if asked == "vllm" or (asked == "auto" and gpu and engine_problem("vllm") is None) else "transformers"


def engine_problem(asked: str) -> str | None:
    """What the engine lacks here."""
    from importlib.util import find_spec

    if asked != "vllm" or find_spec("vllm") is not None:
        return None
    return "engine: vllm is not installed; `pip install vllm`, or `engine: transformers`"


# ------------------------------------------------------------------------------------------------ chunks


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
        return pq.ParquetFile(self.file).read_row_group(self.group).slice(self.start, self.count).to_pylist()


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


def _samples(ctx: StageContext) -> Path:
    return ctx.work / "samples"


def _rewards(ctx: StageContext) -> Path:
    return ctx.work / "rewards"


def _file(folder: Path, chunk: Chunk) -> Path:
    return folder / f"{chunk.number:06}.json"


def _left(folder: Path, chunks: Sequence[Chunk]) -> list[Chunk]:
    """The chunks that are not done yet."""
    folder.mkdir(exist_ok=True)
    return [chunk for chunk in chunks if not _file(folder, chunk).is_file()]


def _read(folder: Path, chunk: Chunk) -> Any:
    return json.loads(_file(folder, chunk).read_text())


def write_chunk(folder: Path, chunk: Chunk, value: Any) -> None:
    """The file is there only once it is whole; writing it again does no harm."""
    path = _file(folder, chunk)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


def _progress(ctx: StageContext, before: int) -> Callable[[int, int], None]:
    return lambda done, total: ctx.report.progress(before + done, before + total, "chunk")


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

    def __init__(self, terms: list[Scorer], samples: Path, folder: Path, code: str | None, batch_size: int) -> None:
        self.samples, self.folder = samples, folder
        self.scoring = Scoring(terms, batch_size, code)

    def __call__(self, chunk: Chunk) -> None:
        sampled = _read(self.samples, chunk)
        usable = {
            (i, n): _answered(prompt, answer)
            for i, (prompt, answers) in enumerate(zip(chunk.prompts(), sampled, strict=True))
            for n, answer in enumerate(answers)
            if unusable(answer["text"], answer["stopped"]) is None
        }
        scores = dict(zip(usable, self.scoring(list(usable.values())), strict=True))
        write_chunk(
            self.folder, chunk, [[scores.get((i, n)) for n in range(len(each))] for i, each in enumerate(sampled)]
        )


def _answered(prompt: dict[str, Any], answer: dict[str, Any]) -> Answered:
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


# ------------------------------------------------------------------------------------------------ the dataset


@dataclass
class _Spread:
    """Mean and standard deviation of numbers that come one after another."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        self.count, self.total, self.squares = self.count + 1, self.total + value, self.squares + value * value

    @property
    def mean(self) -> float | None:
        return self.total / self.count if self.count else None

    @property
    def std(self) -> float | None:
        return max(0.0, self.squares / self.count - (self.total / self.count) ** 2) ** 0.5 if self.count else None


class _Writer:
    """Rows to `part-*.jsonl`."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was interrupted
        folder.mkdir()
        self.folder, self.rows = folder, 0

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        if rows:
            with (self.folder / f"part-{self.rows // ROWS_IN_FILE:05}.jsonl").open("a") as part:
                part.writelines(json.dumps(row) + "\n" for row in rows)
            self.rows += len(rows)


@dataclass
class _Making:
    """The dataset as it is written, and what is counted on the way."""

    stage: Generate
    terms: list[Scorer]
    folder: Path
    prompts: int = 0
    samples: int = 0
    stopped: int = 0
    tokens: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  # answers, by reason
    reward: _Spread = field(default_factory=_Spread)
    shown: list[dict[str, Any]] = field(default_factory=list)
    entries: list[LedgerEntry] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.writer = _Writer(self.folder)
        self.each = [_Spread() for _ in self.terms]
        self.used: dict[str, _Spread] = {}  # use of an answer -> its tokens
        self.margin = _Spread()

    def add(self, chunk: Chunk, sampled: list[Any], scored: list[Any]) -> None:
        for prompt, answers, scores in zip(chunk.prompts(), sampled, scored, strict=True):
            self._prompt(prompt, [self._answer(a, s) for a, s in zip(answers, scores, strict=True)])

    def _answer(self, answer: dict[str, Any], scores: list[float] | None) -> Answer:
        self.samples += 1
        self.stopped += answer["stopped"]
        self.tokens += len(answer["ids"])
        made = Answer(answer["text"], len(answer["ids"]), answer["stopped"])
        if scores is None:
            self.left_out[str(unusable(made.text, made.stopped))] += 1
            return made
        for spread, score in zip(self.each, scores, strict=True):
            spread.add(score)
        reward = sum(term.weight * score for term, score in zip(self.terms, scores, strict=True))
        self.reward.add(reward)
        return replace(made, reward=reward)

    def _prompt(self, prompt: dict[str, Any], answers: list[Answer]) -> None:
        stage = self.stage
        self.prompts += 1
        choice = choose(stage.make, answers, stage.margin, stage.threshold)
        if len(self.shown) < SHOWN:
            self.shown.append(_shown(prompt, answers, choice))
        if isinstance(choice, Refused):
            self.entries.append(LedgerEntry(prompt["source"], prompt["row"], choice.reason, choice.detail))
            return
        tools = json.loads(prompt["tools"]) if prompt["tools"] else None
        made = rows(stage.make, json.loads(prompt["messages"]), tools, answers, choice)
        self.writer.add(made)
        for i, use in choice.uses.items():
            self.used.setdefault(use, _Spread()).add(answers[i].tokens)
        if stage.make == "pairs":
            self.margin.add(made[0]["margin"])

    def result(self, data: Prepared, work: Path, speed: dict[str, Any]) -> StageResult:
        """The ledger written, and what goes into the manifest.

        Raises:
            StageError: not one prompt gave a row.
        """
        entries = [*read_entries(data.path), *self.entries, *_beyond(data, self.prompts)]
        ledger = summary(data.manifest["ledger"]["read"], self.prompts - len(self.entries), entries)
        (work / "ledger.json").write_text(json.dumps(ledger, indent=1))
        write_entries(work / "ledger.jsonl", entries)
        if not self.writer.rows:
            reasons = ", ".join(f"{reason} {n}" for reason, n in Counter(e.reason for e in self.entries).most_common())
            raise StageError(
                f"none of {self.prompts} prompts gave a row: {reasons}; {work / 'ledger.jsonl'} has them all"
            )
        metrics = {
            "prompts": self.prompts,
            "samples": self.samples,
            "rows": self.writer.rows,
            "reward_mean": self.reward.mean,
            "reward_std": self.reward.std,
            "stopped": self.stopped / self.samples,
            "answer_tokens": self.tokens / self.samples,
            **({"margin": self.margin.mean} if self.margin.count else {}),
            **{f"{use}_tokens": spread.mean for use, spread in self.used.items()},
            **speed,
        }
        details = {
            "ledger": ledger,
            "answers_left_out": dict(self.left_out),
            "uses": {use: spread.count for use, spread in self.used.items()},
            "rewards": [
                {"name": term.name, "weight": term.weight, "mean": spread.mean, "std": spread.std}
                for term, spread in zip(self.terms, self.each, strict=True)
            ],
            "samples": self.shown,
        }
        return StageResult(metrics, rows=self.writer.rows, tokens=self.tokens, details=details)


def _shown(prompt: dict[str, Any], answers: Sequence[Answer], choice: Choice | Refused) -> dict[str, Any]:
    uses = {} if isinstance(choice, Refused) else choice.uses
    return {
        "prompt": prompt["prompt"],
        "expected": prompt["expected"],
        "reason": choice.reason if isinstance(choice, Refused) else None,
        "answers": [
            {"text": a.text, "reward": a.reward, "tokens": a.tokens, "stopped": a.stopped, "use": uses.get(i)}
            for i, a in enumerate(answers)
        ],
    }


def _beyond(data: Prepared, asked: int) -> Iterator[LedgerEntry]:
    """The rows beyond `max_prompts`."""
    for shard in data.manifest["shards"]:
        if asked < shard["rows"]:
            rows = pq.read_table(data.path / shard["file"], columns=["source", "row"]).slice(asked).to_pylist()
            yield from (LedgerEntry(r["source"], r["row"], "max_prompts", "beyond the first asked for") for r in rows)
        asked = max(0, asked - shard["rows"])
