"""Who samples the answers of an iteration: transformers, or vLLM on the GPUs that train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from stages.sampling import Sample


class Engine(Protocol):
    def sample(self, prompts: Sequence[Sequence[int]], *, seed: int, first: int) -> list[Sample]:
        """An answer to each prompt (tokens, without padding), in order.

        `first` is the number of the first prompt among all of the training: a prompt's number and `seed` decide its draws.
        """
        ...


class TransformersEngine:
    """Samples with the policy itself: batches of prompts of like length, with a cache of keys and values, until all ended.

    Args:
        policy: opens the plain model with whole weights (`gathered`); its mode and attention are put right here.
        batch_size: answers that are sampled together.
    """

    def __init__(
        self,
        policy: Callable[[], AbstractContextManager[Any]],
        *,
        max_new_tokens: int,
        temperature: float,
        pad_id: int,
        stop_ids: Sequence[int],
        batch_size: int,
    ) -> None:
        self.policy = policy
        self.options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens, "temperature": temperature, "pad_id": pad_id, "stop_ids": stop_ids,
            "batch_size": batch_size,
        }  # fmt: skip

    def sample(self, prompts: Sequence[Sequence[int]], *, seed: int, first: int) -> list[Sample]:
        from stages.sampling import sample
        from stages.training import documents
        from stages.training.drift import evaluating

        with self.policy() as model, documents.set_aside(model), evaluating(model):
            drawn = sample(model, prompts, per_prompt=1, top_p=1.0, top_k=0, seed=seed, first=first, **self.options)
        return [answer for (answer,) in drawn]


class VLLMEngine:
    """Samples with a vLLM engine in the worker's own process, on the GPU that it trains on.

    TRL's VLLMGeneration makes the engine and hands it the policy's weights, under ZeRO-3 and with an adapter merged in too.
    Its own `generate` has one seed for all prompts, which would draw alike for like prompts; so the engine is called here.
    vLLM draws its own random numbers: answers are not those of `TransformersEngine`.

    NEVER RUN: there was no GPU to run it on. Written after the sources of TRL 1.16 and of vLLM's `LLM.generate`.

    Args:
        policy: the policy's module, not wrapped by DeepSpeed or DDP; its `name_or_path` names a folder vLLM can load.
        step: how often the weights were changed, the same on all workers; they are handed over where it is another number
            than last time.
        stop_ids: all that ends an answer; the model's own stop token does so only where it is among them.
        max_length: most tokens of a prompt with its answer; None: the model's positions.
        memory: share of the GPU's memory for vLLM: weights and cache. The rest is for training.
    """

    def __init__(
        self,
        policy: Any,
        accelerator: Any,
        tokenizer: Any,
        step: Callable[[], int],
        *,
        max_new_tokens: int,
        temperature: float,
        stop_ids: Sequence[int],
        max_length: int | None = None,
        memory: float = 0.3,
    ) -> None:
        from trl.generation.vllm_generation import VLLMGeneration

        self.generation = VLLMGeneration(
            policy, accelerator, tokenizer, mode="colocate", gpu_memory_utilization=memory, max_model_length=max_length
        )
        self.step = step
        self.handed_over: int | None = None
        self.stop_ids = list(stop_ids)
        self.sampling: dict[str, Any] = {
            "max_tokens": max_new_tokens, "temperature": temperature, "top_p": 1.0, "top_k": 0,
            "stop_token_ids": self.stop_ids, "ignore_eos": True, "detokenize": False,
        }  # fmt: skip

    def sample(self, prompts: Sequence[Sequence[int]], *, seed: int, first: int) -> list[Sample]:
        from vllm import SamplingParams  # type: ignore[import-not-found]

        from stages.sampling import ended

        now = self.step()
        if now != self.handed_over:
            self.generation.sync_weights()
            self.handed_over = now
        outputs = self.generation.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            sampling_params=[
                SamplingParams(**self.sampling, seed=_own_seed(seed, first + i)) for i in range(len(prompts))
            ],
            use_tqdm=False,
        )
        return [ended([int(token) for token in output.outputs[0].token_ids], self.stop_ids) for output in outputs]


def _own_seed(seed: int, prompt: int) -> int:
    """A prompt's own, which no other prompt has under another seed."""
    import numpy as np

    return int(np.random.SeedSequence((seed % 2**64, prompt)).generate_state(1)[0])


@contextmanager
def gathered(wrapped: Any, module: Any) -> Iterator[None]:
    """Under ZeRO-3: the module's whole weights on every worker, for as long as answers are sampled. Else nothing is done.

    DeepSpeed's hooks, which fetch each layer's weights by all workers together and let go of them again, are off meanwhile:
    workers stop sampling at different times. All workers have to come here.

    Args:
        wrapped: DeepSpeed's engine; `module` is in it, or is its whole module.
    """
    parameters = list(module.parameters())
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed
    from trl.models.utils import add_hooks, remove_hooks

    with deepspeed.zero.GatheredParameters(parameters):
        remove_hooks(wrapped)
        try:
            yield
        finally:
            add_hooks(wrapped)
