"""Reward modelling: a scalar head that scores the chosen answer above the rejected one (Bradley-Terry).

When it is trained the model is looked at on held-out pairs: how often it is right, whether it is as sure as it is right, how
much of its reward is just length, and whether it reads the prompt at all. The mean and spread of its rewards go into the
manifest, for those that train against it.
"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar, Literal

import numpy as np

from stages.base import StageContext, StageResult
from stages.data.encode import Task
from stages.data.groups import Group, read_group
from stages.training.answers import PAIR, answer_collator, model_inputs
from stages.training.arguments import TrainConfig, train_config
from stages.training.fed import Fed, Scored
from stages.training.head import ScoreHead
from stages.training.job import TrainerParts
from stages.training.pair_statistics import pair_statistics
from stages.training.preference import bradley_terry
from stages.training.stage import TrainStage, run_training

JUDGED = 512  # pairs that the trained model is looked at with
LENGTH, BLIND = 0.7, 0.6  # bounds of what is worth a warning

RewardArguments: type[TrainConfig] = train_config("RewardConfig")


class Reward(TrainStage):
    """Trains a reward model on preference pairs: -log sigmoid(r(chosen) - r(rejected) - margin), Ouyang et al. 2022, eq. 1."""

    kind: Literal["reward"] = "reward"
    train: RewardArguments = RewardArguments()  # type: ignore[valid-type]

    produces: ClassVar = "reward model"
    task: ClassVar[Task] = "preference"
    version: ClassVar[int] = 2

    def lora(self) -> dict[str, Any] | None:
        options = super().lora()
        if options is None:
            return None
        # The score head is new, so it is always trained and saved with the adapter.
        return options | {"modules_to_save": [*(options.get("modules_to_save") or []), "score"]}

    def run(self, ctx: StageContext) -> StageResult:
        return run_training(self, ctx, build_trainer)


def build_trainer(parts: TrainerParts) -> Any:
    """TRL's RewardTrainer with a loss of our own."""
    import torch
    from trl import RewardConfig, RewardTrainer

    class FedRewardTrainer(Fed, RewardTrainer):
        head: ScoreHead

        def score(self, model: Any, inputs: dict[str, Any]) -> Scored:
            rewards, outputs = rewards_of(self.head, model, inputs, 2)
            each = bradley_terry(rewards, inputs["extra"]["margin"], self.args.center_rewards_coefficient)
            real, told = inputs["real"], rewards.detach()
            margin = told[0] - told[1]
            metrics = {
                "accuracy": (margin > 0).float(),
                "margin": margin,
                "mean_reward": (told[0] + told[1]) / 2,
                "rewards/chosen": told[0],
                "rewards/rejected": told[1],
            }
            count = real.sum()
            terms = (each * real).sum()[None]
            return Scored(terms, {k: torch.stack([(v * real).sum(), count]) for k, v in metrics.items()}, outputs)

        def finish(self) -> tuple[dict[str, float], list[str]]:
            metrics, warnings = super().finish()
            judged = self.judged()
            return metrics | judged, [*warnings, *reward_warnings(judged)]

        def judged(self) -> dict[str, float]:
            """The model on held-out pairs, or where none are held out on the first it was trained on (see `reward_facts`)."""
            job, args = self.job, self.args
            rows = first_rows(job.held_out or job.groups, JUDGED)
            rows = [row | {"other_ids": other} for row, other in zip(rows, other_answers(rows), strict=True)]
            mine = rows[args.process_index :: args.world_size]
            size = args.per_device_train_batch_size
            batches = -(-len(rows) // (size * args.world_size))  # as many on every worker, as ZeRO-3 wants it
            found = []
            self.model_wrapped.eval()
            with torch.no_grad():
                for at in range(0, batches * size, size):
                    part = mine[at : at + size]
                    inputs = self._prepare_inputs(three_answers(part or [job.placeholder | {"other_ids": [0]}]))
                    rewards, _ = rewards_of(self.head, self.model_wrapped, inputs, 3)
                    found += rewards.T.tolist()[: len(part)]
            self.model_wrapped.train()
            every: list[list[list[float]]] = [found] * args.world_size
            if args.world_size > 1:
                torch.distributed.all_gather_object(every, found)
            rewards = [every[i % args.world_size][i // args.world_size] for i in range(len(rows))]
            return reward_facts(rewards, rows, held_out=bool(job.held_out))

    args = parts.arguments(RewardConfig, max_length=None)
    trainer = FedRewardTrainer(
        model=parts.job.model,
        args=args,
        train_dataset=parts.dataset,
        eval_dataset=parts.eval_dataset(args),
        processing_class=parts.tokenizer,
        peft_config=parts.peft_config,
    )
    trainer.head = ScoreHead(trainer.model)
    pad, layout = parts.tokenizer.pad_token_id, parts.layout(trainer.model)
    trainer.data_collator = answer_collator(
        pad, PAIR, layout=layout, extra=("margin",), pad_to_multiple_of=parts.multiple()
    )
    three_answers = answer_collator(pad, (*PAIR, "other_ids"), layout=layout)
    return trainer


def rewards_of(head: ScoreHead, model: Any, inputs: dict[str, Any], sides: int) -> tuple[Any, Any]:
    """(sides, rows): the score at the last token of each answer; and the model's outputs."""
    scores, outputs = head.scores(model, model_inputs(inputs))
    return scores[inputs["ends"]].view(sides, -1), outputs


def first_rows(groups: list[Group], count: int) -> list[dict[str, Any]]:

    rows: list[dict[str, Any]] = []
    for file, group, _ in groups:
        rows += read_group(file, group).to_pylist()
        if len(rows) >= count:
            break
    return rows[:count]


def other_answers(rows: list[dict[str, Any]]) -> list[list[int]]:
    """For each row the chosen answer of the next one, in a circle, that has another prompt; its own where none has."""
    out = []
    for i, row in enumerate(rows):
        following = itertools.chain(itertools.islice(rows, i + 1, None), rows)
        other = next((r for r in following if r["prompt_ids"] != row["prompt_ids"]), row)
        out.append(other["chosen_ids"])
    return out


def reward_facts(rewards: list[list[float]], rows: list[dict[str, Any]], *, held_out: bool) -> dict[str, float]:
    """What `pair_statistics` tells, and

    other_prompt_accuracy  how often the chosen answer is scored above one that was chosen for another prompt: half of the time
                           where the model does not read the prompt
    judged_pairs, judged_held_out  on how many pairs, and whether they were held out (1) or trained on (0)

    Args:
        rewards: (pairs, 3), of the chosen answer, the rejected one, and another prompt's.
    """
    chosen, rejected, other = np.array(rewards).T
    lengths = [np.array([len(row[side]) for row in rows]) for side in PAIR]
    facts = pair_statistics(chosen, rejected, *lengths)
    if any(row["prompt_ids"] != rows[0]["prompt_ids"] for row in rows):
        facts["other_prompt_accuracy"] = float((chosen > other).mean())
    return facts | {"judged_pairs": len(rows), "judged_held_out": int(held_out)}


def reward_warnings(facts: dict[str, float]) -> list[str]:
    out = []
    if abs(facts["length_correlation"]) > LENGTH:
        out.append(
            f"the reward goes with the length of answers (correlation {facts['length_correlation']:.2f}; the longer "
            f"answer is the chosen one in {facts['length_accuracy']:.0%} of pairs): a policy may learn length from it"
        )
    if facts.get("other_prompt_accuracy", 1.0) < BLIND:
        out.append(
            f"only {facts['other_prompt_accuracy']:.0%} of chosen answers are scored above one to another prompt: "
            "the reward hardly looks at the prompt"
        )
    return out
