"""What you can bring along: a data format, a stage and a gate; a spec names them as `own:NAME`."""

import shutil
from typing import Any

from pydantic import Field
from safetensors.torch import load_file, save_file

from stages import Stage, StageContext, StageResult


def tickets(row: dict[str, Any]) -> dict[str, Any] | None:
    """A format: from a row as it is in the file a row of a known format, or None to leave it out."""
    if row["status"] != "solved":
        return None
    return {"prompt": f"{row['subject']}: {row['body']}", "completion": row["reply"], "expected": row["reply"]}


class Average(Stage):
    """A stage: the mean of models' weights ("model soups", Wortsman et al. 2022). Its fields are its keys in the spec."""

    models: list[str] = Field(min_length=2, description="What to average, of one architecture.")
    produces = "model"
    accepts = {"models": ("model",)}  # noqa: RUF012 - the base declares it a class variable

    def run(self, ctx: StageContext) -> StageResult:
        folders = [artifact.model for artifact in ctx.inputs["models"]]
        weights = [load_file(f"{folder}/model.safetensors") for folder in folders]
        mean = {name: sum(each[name].float() for each in weights) / len(weights) for name in weights[0]}
        shutil.copytree(folders[0], ctx.model_dir)
        like = {name: tensor.to(weights[0][name].dtype).contiguous() for name, tensor in mean.items()}
        save_file(like, ctx.model_dir / "model.safetensors", metadata={"format": "pt"})
        return StageResult(metrics={"parameters": sum(tensor.numel() for tensor in like.values())})


def no_worse(metrics: dict[str, dict[str, float]], samples: list[dict[str, Any]]) -> str | None:
    """A gate: None where all is well, else what is not."""
    *parts, average = metrics.values()
    worst = max(part["loss"] for part in parts)
    return None if average["loss"] <= worst else f"the average loses {average['loss']:.3f}, the worse part {worst:.3f}"
