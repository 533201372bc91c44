"""Kahneman-Tversky optimisation: single answers, each wanted or not, without pairs (Ethayarajh et al. 2024).

Pairs are taken too: each becomes two rows. The reference is the model the stage was given, run once over the data before
training, as for DPO. What is the KL of policy and reference is estimated on answers that belong to other prompts
(reference.py says which), over the whole step, so that it does not depend on micro-batches or workers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from stages.base import StageContext, StageResult
from stages.data.encode import Task
from stages.data.prepare import Prepared
from stages.errors import DataError, nearest
from stages.training.answers import answer_collator, score_answers
from stages.training.arguments import TrainConfig, library_defaults, train_config
from stages.training.drift import Drift, Samples
from stages.training.fed import Fed, Scored
from stages.training.head import TrainedHead
from stages.training.job import TrainerParts
from stages.training.preference import KTO_LOSS_TYPES, kto_loss
from stages.training.reference import KL, LABELLED, REFERENCE, References, references_elsewhere
from stages.training.stage import TrainStage, run_training

KTOArguments: type[TrainConfig] = train_config("KTOConfig")


class KTO(TrainStage):
    """Trains a policy on answers that are wanted or not."""

    kind: Literal["kto"] = "kto"
    train: KTOArguments = KTOArguments()  # type: ignore[valid-type]
    watch: Samples = Samples()

    produces: ClassVar = "model"
    task: ClassVar[Task] = "labelled"

    @model_validator(mode="after")
    def _one_loss(self) -> KTO:
        settings = self.settings()
        if (name := settings.pop("loss_type")) not in KTO_LOSS_TYPES:
            raise ValueError(
                f"loss_type: {name} is not one of {', '.join(KTO_LOSS_TYPES)}{nearest(name, KTO_LOSS_TYPES)}"
            )
        for name, value in settings.items():
            if value <= 0:
                raise ValueError(f"{name} must be above 0, not {value:g}")
        return self

    def settings(self) -> dict[str, Any]:
        """What the loss is made with."""
        names = ("beta", "desirable_weight", "undesirable_weight", "loss_type")
        return {name: library_defaults("KTOConfig")[name] for name in names} | {
            name: value
            for name, value in self.train.given().items()  # type: ignore[attr-defined]
            if name in names
        }

    def arguments(self) -> dict[str, Any]:
        return {k: v for k, v in super().arguments().items() if k != "loss_type"}

    def check_data(self, data: Prepared) -> list[str]:
        """Warnings.

        Raises:
            DataError: there is nothing to tell wanted answers from.
        """
        wanted, not_wanted = (data.manifest["labels"][label] for label in ("true", "false"))
        if not wanted or not not_wanted:
            kind = "desirable (label true)" if wanted else "undesirable (label false)"
            raise DataError(
                f"all {wanted or not_wanted} answers are {kind}: KTO wants both kinds; see the column `label`"
            )
        settings = self.settings()
        ratio = settings["desirable_weight"] * wanted / (settings["undesirable_weight"] * not_wanted)
        if 1 / 4 <= ratio <= 4:
            return []
        name = "undesirable_weight" if ratio > 1 else "desirable_weight"
        times = max(ratio, 1 / ratio)
        return [
            f"{wanted} desirable and {not_wanted} undesirable answers: weighed as they are, one kind counts {times:.1f} times "
            f"the other; weights that make them even, as the paper's section 4.2 advises: {name}: {settings[name] * times:.3g}"
        ]

    def run(self, ctx: StageContext) -> StageResult:
        settings = self.settings()
        options = {"kto": settings, "watch": self.watch}
        return run_training(self, ctx, build_trainer, options, References(LABELLED, kl=settings["loss_type"] == "kto"))


def build_trainer(parts: TrainerParts) -> Any:
    """TRL's KTOTrainer with a loss of our own."""
    import torch
    import trl.trainer.kto_trainer as trl

    settings = parts.job.options["kto"]

    class FedKTOTrainer(Drift, Fed, trl.KTOTrainer):
        head: TrainedHead
        kl: Any = torch.zeros(())  # of the step that is being made

        def ratios(self, model: Any, inputs: dict[str, Any], reference: str) -> tuple[Any, Any]:
            """(log ratios, what the model gave), (rows,)."""
            own = score_answers(self.head, model, inputs, sides=1, router_logits=self.aux_loss_enabled)
            return own.logps[0] - inputs["extra"][reference], own

        def before_step(self, batches: Iterable[dict[str, Any]]) -> None:
            if settings["loss_type"] != "kto":
                return
            total, count = 0.0, 0.0
            with torch.no_grad():
                for batch in batches:
                    inputs = self._prepare_inputs(batch["kl"])
                    ratios, _ = self.ratios(self.model_wrapped, inputs, KL[1])
                    total, count = total + float((ratios * inputs["real"]).sum()), count + float(inputs["real"].sum())
            total, count = self._sum([total, count])
            self.kl = torch.tensor(max(0.0, total / max(count, 1.0)), device=self.args.device)

        def score(self, model: Any, inputs: dict[str, Any]) -> Scored:
            ratios, own = self.ratios(model, inputs, REFERENCE[LABELLED][0])
            wanted, real = inputs["extra"]["label"], inputs["real"]
            loss = kto_loss(ratios, wanted, self.kl, **settings)
            rewards, logps = settings["beta"] * ratios.detach(), own.logps[0].detach()
            metrics = {}
            for side, mine in (("chosen", real * wanted), ("rejected", real * (1 - wanted))):
                for name, values in (("rewards", rewards), ("logps", logps)):
                    metrics[f"{name}/{side}"] = torch.stack([(values * mine).sum(), mine.sum()])
            mine = real * wanted
            metrics["chosen_ratio"] = torch.stack([(ratios.detach() / own.lengths[0] * mine).sum(), mine.sum()])
            metrics["kl"] = torch.stack([self.kl * real.sum(), real.sum()])
            return Scored((loss * real).sum()[None], metrics, own.outputs)

        def means(self, sums: dict[str, Any]) -> dict[str, float]:
            means = super().means(sums)
            if {"rewards/chosen", "rewards/rejected"} <= means.keys():
                means["rewards/margins"] = round(means["rewards/chosen"] - means["rewards/rejected"], 6)
            return means

    # TRL's own KL goes with micro-batches, of at least two rows; the other loss has none.
    args = parts.arguments(trl.KTOConfig, max_length=None, precompute_ref_log_probs=True, loss_type="apo_zero_unpaired")
    with references_elsewhere(trl):
        trainer = FedKTOTrainer(
            model=parts.job.model,
            args=args,
            train_dataset=parts.dataset,
            eval_dataset=parts.eval_dataset(args),
            processing_class=parts.tokenizer,
            peft_config=parts.peft_config,
        )
    trainer.head = TrainedHead(trainer.model)
    pad, layout, multiple = parts.tokenizer.pad_token_id, parts.layout(trainer.model), parts.multiple()
    extra = ("label", *REFERENCE[LABELLED])
    answers = answer_collator(pad, LABELLED, layout=layout, extra=extra, pad_to_multiple_of=multiple)
    others = answer_collator(pad, KL[:1], layout=layout, extra=KL[1:], pad_to_multiple_of=multiple)
    trainer.samples_collator = answer_collator(pad, LABELLED, layout=layout)
    with_kl = settings["loss_type"] == "kto"
    trainer.data_collator = lambda rows: answers(rows) | ({"kl": others(rows)} if with_kl else {})
    return trainer
