"""Data that the pipeline makes itself: a model answers prompts, rewards judge the answers, and pairs, labelled answers or the
best conversations come out: so SFT -> reward -> on-policy DPO, or rejection sampling back into SFT, is one spec.

Prompts are sampled and scored a chunk at a time; each chunk's results are files, so what was interrupted goes on with the
chunks that are left. The chunks, and with them the samples, do not depend on how many share them. Samples lie beside the
prepared data, named by all that decides them: another reward, margin or `make` judges the same answers.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from filelock import FileLock
from pydantic import Field, field_validator, model_validator

from stages.answering import Chunk, Judge, Sampler, cut, left_of, read_chunk
from stages.base import Artifact, ArtifactKind, Share, Stage, StageContext, StageResult
from stages.data.chat import tokenizer_spec
from stages.data.encode import Recipe, Task, digest
from stages.data.ledger import check_lost
from stages.data.mask import Mask
from stages.data.prepare import Prepared, prepare
from stages.data.source import DataSource
from stages.data.tokenizer import load_tokenizer
from stages.dataset import Dataset
from stages.errors import DataError, StageError
from stages.pool import run_pool
from stages.rewards import Reward, Scorer, check, is_function, scorers
from stages.selection import FORMAT, Make
from stages.training.architecture import positions
from stages.training.launch import quiet_ray

CHUNK = 64  # prompts that are sampled together, and are made again where it was interrupted
LITTLE = 1e12  # parameters x tokens: some ten seconds of a core, about what it takes to start another process
FEW = 4  # chunks that are not worth it whatever a function of the user's does with them

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
    temperature: float = Field(default=1.0, gt=0, description="Answers are drawn with.")
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Samples from the likeliest tokens that have this share of the probability.",
    )
    top_k: int = Field(default=0, ge=0, description="Samples from so many of the likeliest tokens; 0: from all.")
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
        check(terms, policy, ctx.chat_template)
        engine = choose_engine(self.engine, gpu=ctx.resources.gpus_per_worker > 0)
        ctx.report.phase("prepare")
        data = self._prompts(ctx)
        chunks = cut(data, max(CHUNK, self.batch_size // self.samples), self.max_prompts)
        samples, rewards = self._samples_folder(ctx, data, chunks, engine), ctx.work / "rewards"
        rewards.mkdir(exist_ok=True)
        ctx.report.phase("sample", prompts=sum(chunk.count for chunk in chunks), samples=self.samples, engine=engine)
        with FileLock(samples.with_name(f".lock-{samples.name}")):  # a stage beside this one may want the same
            samples.mkdir(exist_ok=True)
            speed = self._sample(chunks, samples, ctx, engine, data.tokens / data.rows + self.max_new_tokens)
        ctx.report.phase("score", rewards=len(terms))
        self._score(chunks, terms, samples, rewards, ctx, data.tokens / data.rows + self.max_new_tokens)
        ctx.report.phase("write")
        made = Dataset(ctx.data_dir, terms, self.make, self.margin, self.threshold)
        for chunk in chunks:
            made.add(chunk, read_chunk(samples, chunk), read_chunk(rewards, chunk))
        result = made.result(data, ctx.work, speed)
        shutil.rmtree(rewards)
        return result

    def _prompts(self, ctx: StageContext) -> Prepared:
        model = ctx.input().model
        limit = positions(model)
        if limit is not None and limit <= self.max_new_tokens:
            raise DataError(
                f"max_new_tokens: {self.max_new_tokens} leaves no room for a prompt in the model's {limit} positions"
            )
        recipe = self.recipe(load_tokenizer(model, ctx.chat_template), limit and limit - self.max_new_tokens)
        progress = lambda done, total: ctx.report.progress(done, total, "chunk")  # noqa: E731
        data = prepare(self.data, recipe, ctx.prepared, progress, ctx.report)
        check_lost(data.manifest["ledger"], self.max_dropped)
        return data

    def _options(self, ctx: StageContext) -> dict[str, Any]:
        """Those of `stages.sampling.sample`."""
        return {
            "per_prompt": self.samples,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": ctx.seed,
        }

    def _samples_folder(self, ctx: StageContext, data: Prepared, chunks: Sequence[Chunk], engine: Engine) -> Path:
        """Where the answers lie: named by all that decides them."""
        key = {
            "version": self.version,
            "model": _identity(ctx.input()),
            "prompts": data.path.name,
            "chunks": [chunk.count for chunk in chunks],
            "engine": engine,
            **self._options(ctx),
        }
        return ctx.prepared / f"samples-{digest(json.dumps(key, sort_keys=True))}"

    def _sample(
        self, chunks: Sequence[Chunk], folder: Path, ctx: StageContext, engine: Engine, length: float
    ) -> dict[str, Any]:
        """`length`: tokens of a prompt with its answer, about."""
        left = left_of(folder, chunks)
        started = time.time()
        options = self._options(ctx) | {"batch_size": self.batch_size}
        if engine == "vllm" and left:
            from stages.vllm_sampling import sample_with_vllm

            tokens = sample_with_vllm(left, folder, options, ctx)
        else:
            how = {"model": ctx.input().model, "chat_template": ctx.chat_template, "folder": folder}
            tokens = sum(
                run_pool(
                    Sampler,
                    how | {"options": options},
                    left,
                    ctx=ctx,
                    little=is_little([ctx.input().model], left, self.samples * length),
                    progress=_progress(ctx, len(chunks) - len(left)),
                )
            )
        seconds = time.time() - started
        return {"sampling_seconds": round(seconds, 2), "tokens_per_second": round(tokens / seconds) if left else None}

    def _score(
        self,
        chunks: Sequence[Chunk],
        terms: list[Scorer],
        samples: Path,
        folder: Path,
        ctx: StageContext,
        length: float,
    ) -> None:
        left = left_of(folder, chunks)
        models = [term.model for term in terms if term.model is not None]
        little = not models or is_little(models, left, self.samples * length)
        how = {"terms": terms, "samples": samples, "folder": folder}
        run_pool(
            Judge,
            how | {"batch_size": self.batch_size},
            left,
            ctx=ctx,
            little=little and (len(left) <= FEW or not self.functions()),
            progress=_progress(ctx, len(chunks) - len(left)),
        )


def is_little(models: Sequence[str], chunks: Sequence[Chunk], tokens: float) -> bool:
    """Whether so little is to be done that it is done here; `tokens` are those of a prompt with its answers."""
    weights = sum(file.stat().st_size for model in models for file in Path(model).glob("*.safetensors")) / 4
    return len(chunks) == 1 or 0 < weights * tokens * sum(chunk.count for chunk in chunks) < LITTLE


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


def _identity(model: Artifact) -> Any:
    """What identifies a model: the fingerprint of its stage; of the user's own the sizes and dates of its files."""
    if model.manifest:
        return model.manifest["fingerprint"]
    files = sorted(Path(model.model).iterdir()) if Path(model.model).is_dir() else []
    return [model.model, *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]


def _progress(ctx: StageContext, before: int) -> Callable[[int, int], None]:
    return lambda done, total: ctx.report.progress(before + done, before + total, "chunk")
