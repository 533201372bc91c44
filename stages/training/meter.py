"""How fast a training is: tokens a second, how many of them are trained, what padding and waiting cost, and MFU."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# Dense bf16 peak of one GPU in FLOP/s, by a part of its name (makers' data sheets, without sparsity).
PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12,
    "L40": 181e12, "L4": 121e12, "A40": 150e12, "A10G": 70e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """FLOPs of a model for one forward and backward pass (PaLM, Chowdhery et al. 2022, appendix B): 6 for each weight that a
    token meets (4 for a frozen one, which gets no gradient), and 12 x layers x hidden size for each token it attends to.
    What is computed again under gradient checkpointing is not counted: it is no progress."""

    body: int  # FLOPs of a token in all layers, attention to other tokens left out
    head: int  # FLOPs of a token in the output head
    attention: int  # layers x hidden size

    @classmethod
    def of(cls, model: Any) -> Work:
        config = model.config.get_text_config()
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()

        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
        met = (getattr(config, "num_experts_per_tok", None) or experts) / experts

        def flops(parameter: Any, share: float = 1.0) -> int:
            size = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves an empty tensor in its place
            if (state := getattr(parameter, "quant_state", None)) is not None:
                size = math.prod(state.shape)  # bitsandbytes holds two weights in a byte
            return round((6 if parameter.requires_grad else 4) * size * share)

        each = {id(p): flops(p, met if ".experts." in name else 1.0) for name, p in model.named_parameters()}
        for outside in (embedding, head):
            if outside is not None:
                each.pop(id(outside.weight), None)
        at_head = 0 if head is None else flops(head.weight)
        return cls(sum(each.values()), at_head, config.num_hidden_layers * config.hidden_size)

    def flops(self, tokens: int, scored: int, length: float) -> float:
        """Of `tokens` tokens in documents of about `length`, each attending to half of its own; `scored` met the head."""
        return self.body * tokens + self.head * scored + 12.0 * self.attention * tokens * length / 2


class Meter:
    """Counts of one worker since it was last read."""

    names = ("tokens", "trained", "slots", "flops", "waited")

    def __init__(self, work: Work | None, peak: float | None) -> None:
        self.work, self.peak = work, peak
        self.counts = dict.fromkeys(self.names, 0.0)
        self.since = time.perf_counter()

    def batch(self, batch: dict[str, Any]) -> None:
        """Count a collated micro-batch (`rows` 0: a placeholder, which is no work)."""
        if not batch.get("rows", 1):
            return
        ids = batch["input_ids"]
        tokens = batch.get("tokens") or int(batch["attention_mask"].sum())
        scored = batch["answer_ids"] if "answer_ids" in batch else batch["loss_weights"] > 0
        trained_tokens = len(scored) if "answer_ids" in batch else int(scored.sum())
        self.counts["tokens"] += tokens
        self.counts["trained"] += trained_tokens
        self.counts["slots"] += ids.numel()
        if self.work is not None:
            positions = batch.get("position_ids")
            documents = len(ids) if positions is None else max(int(positions.eq(0).sum()), 1)
            self.counts["flops"] += self.work.flops(tokens, trained_tokens, tokens / documents)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens here is not training: evaluation, checkpoints."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.since += time.perf_counter() - began

    def wait(self, seconds: float) -> None:
        self.counts["waited"] += seconds

    def read(self, reduce: Any, workers: int) -> dict[str, float]:
        """Rates over all workers since the last reading; `reduce` sums a list of numbers over them."""
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        tokens, trained, slots, flops, waited = reduce([self.counts[name] for name in self.names])
        self.counts = dict.fromkeys(self.names, 0.0)
        if not tokens or seconds <= 0:
            return {}
        rates = {
            "tokens_per_second": round(tokens / seconds, 1),
            "trained_tokens_per_second": round(trained / seconds, 1),
            "padding_share": round(1 - tokens / slots, 4),
            "data_wait_share": round(waited / seconds / workers, 4),
        }
        if self.peak and flops:
            rates["mfu"] = round(flops / seconds / workers / self.peak, 4)
        return rates


def peak_flops() -> float | None:
    """Of this worker's GPU; None on a CPU, or for a GPU that is not in the table."""
    import torch

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS.items() if part in name), None)
