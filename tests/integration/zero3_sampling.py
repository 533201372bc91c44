"""A worker of test_engines: samples between the steps of a training under ZeRO-3. usage: RANK WORLD RENDEZVOUS MODEL SAMPLES?"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from stages.rl.engines import TransformersEngine, gathered
from stages.sampling import Sample
from stages.training.deepspeed import init_deepspeed

PROMPTS = [[5, 6, 7], [8, 9], list(range(10, 30)), [40, 41, 42, 43, 44]]
STOPS = {0: [2], 1: [2, *range(50, 250)]}  # workers stop at different times


class Both(torch.nn.Module):
    """A policy, and something else in the same engine."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy
        self.value = torch.nn.Linear(policy.config.hidden_size, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out = self.policy(ids, labels=ids, output_hidden_states=True, use_cache=False)
        return out.loss + self.value(out.hidden_states[-1]).square().mean()


def main(rank: int, world: int, rendezvous: str, model: str, samples: bool) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
    }  # fmt: skip
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    init_deepspeed("gloo")
    import deepspeed

    torch.manual_seed(0)
    both = Both(AutoModelForCausalLM.from_pretrained(model))
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=both, optimizer=torch.optim.AdamW(both.parameters(), 1e-2), config=config)
    policy = engine.module.policy

    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "pad_id": 0, "stop_ids": STOPS[rank]}
    sampler = TransformersEngine(lambda: held(engine, policy), batch_size=3, **options)
    losses, drawn, right = [], [], []
    for step in range(3):
        if samples:
            drawn.append(sampler.sample(PROMPTS[rank:], seed=step, first=0))
            right.append(by_a_plain_model(model, engine, policy, options, step, rank))
        assert next(policy.parameters()).numel() == 0  # shared out again
        loss = engine(torch.tensor([PROMPTS[2][step + rank : step + rank + 15]]))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    assert drawn == right and (not samples or drawn[0] != drawn[2])
    print(json.dumps({"losses": losses, "tokens": [len(s.ids) for each in drawn for s in each]}))


@contextmanager
def held(engine: Any, policy: Any) -> Iterator[Any]:
    with gathered(engine, policy):
        yield policy


def by_a_plain_model(
    model: str, engine: Any, policy: Any, options: dict[str, Any], step: int, rank: int
) -> list[Sample]:
    with gathered(engine, policy):
        weights = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    plain = AutoModelForCausalLM.from_pretrained(model)
    plain.load_state_dict(weights)
    return TransformersEngine(lambda: held(plain, plain), batch_size=3, **options).sample(
        PROMPTS[rank:], seed=step, first=0
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5] == "samples")
