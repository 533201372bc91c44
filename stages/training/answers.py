"""Answers to prompts: rows of pairs, or of answers with a label, to tensors, and the log-probability of each answer.

The policy in training and the reference that is run once over the data (reference.py) go through the same two functions, so
that where nothing was trained yet they say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stages.training.feed import OF_THE_FEED
from stages.training.head import TrainedHead
from stages.training.losses import token_logps

if TYPE_CHECKING:
    from torch import Tensor

Row = dict[str, Any]
Batch = dict[str, Any]

# shared: one line, in which a prompt stands once and its answers branch off (documents.py). flat: one line, each answer after
# a prompt of its own, for flash attention. padded: a line for each answer.
Layout = Literal["shared", "flat", "padded"]
PAIR = ("chosen_ids", "rejected_ids")
# What a batch of answers has besides the model's inputs; `kl` is the batch of answers to other prompts, for KTO.
OF_ANSWERS = ("answer_at", "answer_of", "answer_ids", "answer_weights", "ends", "real", "extra", "kl")


def answer_collator(
    pad_id: int,
    sides: Sequence[str],
    *,
    layout: Layout,
    extra: Sequence[str] = (),
    ld_alpha: float | None = None,
    token_share: bool = False,
    pad_to_multiple_of: int | None = None,
) -> Callable[[list[Row]], Batch]:
    """A function of rows that gives the model's inputs (`input_ids`, and `position_ids` of a single line), and

    - `answer_ids` (n,): the tokens of all answers, `answer_at` where in the lines laid end to end the state is that predicts
      each, `answer_of` which answer it is of. Answer number side * rows + row;
    - `ends` (answers,): where each one's last token is;
    - `answer_weights` (n,): what a token counts for in its answer, where `ld_alpha` is given: 1 up to the length of the
      shorter answer of its pair, beyond it `ld_alpha` (Liu et al. 2024, "Length Desensitization in DPO", eq. 10);
    - `real` (rows,): 0 for a placeholder, else 1, and `loss_share`: how many are real, and where `token_share` is wanted how
      many tokens their first answers have;
    - `extra`: name -> (rows,) of the columns that are named;
    - `tokens`: how many there are, padding not counted.

    Args:
        sides: the columns of the answers: `PAIR`, or one.
    """

    def collate(rows: list[Row]) -> Batch:
        import torch

        answers = [[row[side] for row in rows] for side in sides]
        lines, positions, starts, line_of = _laid_out([row["prompt_ids"] for row in rows], answers, layout)
        longest = max(map(len, lines))
        if pad_to_multiple_of:
            longest = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
        ids = np.full((len(lines), longest), pad_id, np.int64)
        for out, line in zip(ids, lines, strict=True):
            out[: len(line)] = line
        batch: Batch = {"input_ids": torch.from_numpy(ids)}
        if layout == "padded":
            sizes = torch.tensor([len(line) for line in lines])
            batch["attention_mask"] = torch.arange(longest).lt(sizes[:, None]).long()
        else:
            padding = np.arange(longest - len(positions))  # as if it were a document of its own
            batch["position_ids"] = torch.from_numpy(np.concatenate([positions, padding]))[None]
        flat = [answer for side in answers for answer in side]
        lengths = np.array([len(answer) for answer in flat])
        begins = np.array(starts) + np.array(line_of) * longest
        # The state before an answer's first token is its prompt's last, which is not always the place before it.
        prompts = np.array([len(row["prompt_ids"]) for row in rows] * len(sides))
        trunk = begins - 1
        if layout == "shared":
            first = begins[: len(rows)] - prompts[: len(rows)]
            trunk = np.concatenate([first] * len(sides)) + prompts - 1
        at = [np.concatenate([[t], np.arange(b, b + n - 1)]) for t, b, n in zip(trunk, begins, lengths, strict=True)]
        batch["answer_at"] = torch.from_numpy(np.concatenate(at))
        batch["answer_of"] = torch.from_numpy(np.repeat(np.arange(len(flat)), lengths))
        batch["answer_ids"] = torch.from_numpy(np.concatenate([np.asarray(a, np.int64) for a in flat]))
        batch["ends"] = torch.from_numpy(begins + lengths - 1)
        if ld_alpha is not None:
            shorter = np.tile(lengths.reshape(len(sides), -1).min(0), len(sides))
            each = [np.where(np.arange(n) < s, 1.0, ld_alpha) for n, s in zip(lengths, shorter, strict=True)]
            batch["answer_weights"] = torch.from_numpy(np.concatenate(each).astype(np.float32))
        real = np.array([not row.get("placeholder") for row in rows])
        batch["real"] = torch.from_numpy(real.astype(np.float32))
        batch["loss_share"] = (float(real.sum()), *([float(lengths[: len(rows)][real].sum())] if token_share else []))
        batch["extra"] = {
            name: torch.tensor([0.0 if row.get(name) is None else float(row[name]) for row in rows]) for name in extra
        }
        batch["tokens"] = sum(map(len, lines))
        return batch

    return collate


def _laid_out(
    prompts: list[list[int]], answers: list[list[list[int]]], layout: Layout
) -> tuple[list[list[int]], np.ndarray, list[int], list[int]]:
    """(lines, positions of the tokens of a single line, where in its line each answer begins, which line that is)."""
    rows = len(prompts)
    if layout == "padded":
        lines = [prompts[i] + side[i] for side in answers for i in range(rows)]
        starts = [len(prompt) for _ in answers for prompt in prompts]
        return lines, np.empty(0), starts, list(range(len(lines)))
    line: list[int] = []
    positions: list[np.ndarray] = []
    place: dict[tuple[int, int], int] = {}
    for i, prompt in enumerate(prompts):
        for s, side in enumerate(answers):
            if s == 0 or layout == "flat":
                line += prompt
                positions.append(np.arange(len(prompt) + len(side[i])))
            else:
                positions.append(np.arange(len(prompt), len(prompt) + len(side[i])))
            place[s, i] = len(line)
            line += side[i]
    starts = [place[s, i] for s in range(len(answers)) for i in range(rows)]
    return [line], np.concatenate(positions), starts, [0] * len(starts)


@dataclass
class Answers:
    """What a model gives the answers of a batch."""

    logps: Tensor  # (sides, rows): the sum of log p over the answer's tokens, weighted where weights are given
    means: Tensor  # (sides, rows): the plain mean over its tokens
    agreement: (
        Tensor | None
    )  # (sides, rows): mean over its tokens of log p_t - log sum_v p_v^2, without a gradient (WPO)
    lengths: Tensor  # (sides, rows): tokens
    outputs: Any


def model_inputs(batch: Batch, router_logits: bool = False) -> Batch:
    """What the model itself is called with. Lines are padded on the right, which causal attention does not see, so no mask is
    given, but for the load balance of a mixture of experts, which counts tokens."""
    given = {k: v for k, v in batch.items() if k not in (*OF_THE_FEED, *OF_ANSWERS)}
    if router_logits:
        return given | {"output_router_logits": True}
    return {k: v for k, v in given.items() if k != "attention_mask"}


def score_answers(
    head: TrainedHead, model: Any, batch: Batch, *, sides: int, router_logits: bool = False, agreement: bool = False
) -> Answers:
    """Run the model over a batch of `answer_collator`; `agreement` is given where it is wanted."""
    logits, outputs = head.logits(model, model_inputs(batch, router_logits), batch["answer_at"])
    logps, squares = token_logps(logits, batch["answer_ids"], squares=agreement)
    count = sides * len(batch["real"])
    of = batch["answer_of"]

    def summed(values: Tensor) -> Tensor:
        return values.new_zeros(count).index_add(0, of, values).view(sides, -1)

    lengths = summed(logps.detach().new_ones(len(of)))
    plain = summed(logps)
    weights = batch.get("answer_weights")
    return Answers(
        logps=plain if weights is None else summed(logps * weights),
        means=plain / lengths,
        agreement=summed((logps - squares).detach()) / lengths if agreement else None,
        lengths=lengths,
        outputs=outputs,
    )


def best_layout(model: Any, attention: str, on_cpu: bool, asked: str) -> Layout:
    """The layout for a model that runs with `attention`; on a CPU where nothing else was `asked` for it is switched to
    attention by documents if it can be."""
    from stages.training import documents
    from stages.training.kernels import FLASH

    if on_cpu and asked == "auto" and documents.use(model):
        return "shared"
    return "flat" if attention == FLASH else "padded"
