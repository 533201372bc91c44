"""Answers sampled by vLLM engines, which Ray Data runs (`ray.data.llm`). Imported only where vllm is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.base import StageContext
from stages.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from stages.answering import Chunk


def sample_with_vllm(chunks: Sequence[Chunk], folder: Path, options: dict[str, Any], ctx: StageContext) -> int:
    """Writes the answers to the prompts of the chunks, each chunk when it is whole; gives how many tokens these are.

    Args:
        options: those of `stages.sampling.sample`. vLLM draws its own random numbers, from a seed for each answer.
    """
    import ray.data
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig
    from transformers import GenerationConfig

    from stages.answering import as_answer, write_chunk
    from stages.sampling import ended, stop_ids_of

    model = ctx.input().model
    tokenizer = load_tokenizer(model, ctx.chat_template)
    stops = stop_ids_of(GenerationConfig.from_pretrained(model), tokenizer)
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=model,
            engine_kwargs={"generation_config": "vllm", "seed": ctx.seed % 2**31},  # not the model's own top_p and such
            concurrency=(ctx.resources.workers, ctx.resources.workers),
            batch_size=options["batch_size"],
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
        ),
        preprocess=lambda row: {
            "tokenized_prompt": row["prompt_ids"],
            "sampling_params": {
                "max_tokens": options["max_new_tokens"],
                "temperature": options["temperature"],
                "top_p": options["top_p"],
                "top_k": options["top_k"],
                "stop_token_ids": stops,
                "seed": row["seed"],
                "detokenize": False,
            },
        },
        postprocess=lambda row: {"place": row["place"], "ids": row["generated_tokens"]},
    )
    by_number = {chunk.number: chunk for chunk in chunks}
    waiting: dict[int, dict[tuple[int, int], dict[str, Any]]] = {number: {} for number in by_number}
    tokens = done = 0
    for row in processor(ray.data.from_items(_asked(chunks, options))).iter_rows():
        number, i, n = (int(part) for part in row["place"])
        answer = ended([int(token) for token in row["ids"]], stops)
        tokens += len(answer.ids)
        mine, count = waiting[number], by_number[number].count
        mine[i, n] = as_answer(answer.ids, answer.stopped, tokenizer)
        if len(mine) == count * options["per_prompt"]:
            each = [[mine[i, n] for n in range(options["per_prompt"])] for i in range(count)]
            write_chunk(folder, by_number[number], each)
            del waiting[number]
            done += 1
            ctx.report.progress(done, len(chunks), "chunk")
    return tokens


def _asked(chunks: Sequence[Chunk], options: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each answer: its prompt, its place (chunk, prompt in it, number of the answer) and its seed."""
    each = options["per_prompt"]
    return [
        {
            "prompt_ids": prompt["prompt_ids"],
            "place": [chunk.number, i, n],
            "seed": (options["seed"] + (chunk.first + i) * each + n) % 2**31,
        }
        for chunk in chunks
        for i, prompt in enumerate(chunk.prompts())
        for n in range(each)
    ]
