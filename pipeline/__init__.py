"""A run: what was asked for, and how it is carried out.

from pipeline import Pipeline
from stages import DPO, SFT

run = Pipeline(
    model="Qwen/Qwen2.5-0.5B",
    stages={
        "sft": SFT(data=[{"path": "chats.jsonl"}], train={"learning_rate": 2e-5}),
        "dpo": DPO(model="stages.sft", data=[{"path": "pairs.jsonl"}]),
    },
).run()
print(run["dpo"].metrics, run["dpo"].model)
"""

from __future__ import annotations

from pipeline.api import Pipeline

__all__ = ["Pipeline"]
