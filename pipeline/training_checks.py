"""What can be known of a training before it starts: settings that clash, lengths, libraries, the hub, the disk.

`spec_problems` looks at what the spec alone says, and is told with the spec's other mistakes; `run_problems` knows the
workers besides, and asks this machine and the hub.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.spec import Spec
from stages import Generate, Init, own
from stages.base import workers_range
from stages.data.tokenizer import WEIGHTS, check_model_folder, code_problem
from stages.errors import DataError, Problem
from stages.generate import engine_problem
from stages.own import is_own
from stages.rewards import is_function
from stages.rl.stage import RLStage
from stages.training.architecture import HUB_TIMEOUT, cached, length_limit, read_config
from stages.training.arguments import library_defaults, optimizer_names
from stages.training.deepspeed import clashes, deepspeed_config, zero_stage
from stages.training.kernels import attention_problem, missing_libraries, optimizer_problem, precision_problem
from stages.training.stage import TrainStage
from stages.training.tuning import missing_library, tuning_problems

if TYPE_CHECKING:
    from pipeline.plan import Plan, PlannedStage

# Bytes a stage can write for each byte of a model in bfloat16: three checkpoints of float32 weights, two moments and
# DeepSpeed's two copies, and the model.
AT_MOST = 32
DEFAULT_OPTIMIZER = "adamw_torch_fused"  # transformers computes it from torch's version
Found = Iterator[tuple[tuple[str, ...], str]]  # (path within the stage, message)


def spec_problems(spec: Spec) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """(stage, path within it, message), of what does not depend on the machine."""
    cluster = spec.cluster
    pushed: dict[str, str] = {}
    gpu = None if cluster.gpus_per_worker is None else cluster.gpus_per_worker > 0
    for name, stage in spec.stages.items():
        if isinstance(stage, TrainStage):
            _, most = workers_range(stage.workers or cluster.workers) or (None, None)
            config = model_config(spec, name)
            for path, message in stage_problems(stage, workers=most, gpu=gpu, config=config):
                yield name, path, message
            if stage.push_to_hub is not None and (other := pushed.setdefault(stage.push_to_hub, name)) != name:
                what = f"{stage.push_to_hub} is where stages.{other} is pushed; one model to a repository"
                yield name, ("push_to_hub",), what
        if isinstance(stage, Generate | RLStage):
            for path, message in _answering_problems(stage, model_config(spec, name)):
                yield name, path, message


def _answering_problems(stage: Generate | RLStage, config: Mapping[str, Any] | None) -> Found:
    for i, term in enumerate(stage.rewards):
        if is_function(term.reward) and (problem := own.problem(term.reward)):
            yield ("rewards", str(i)), problem
    limit = length_limit(config or {})
    if limit is not None and stage.max_new_tokens >= limit:
        yield (
            ("max_new_tokens",),
            f"{stage.max_new_tokens} leaves no room for a prompt in the model's {limit} positions",
        )


def run_problems(plan: Plan, local: bool) -> list[Problem]:
    """What keeps the stages that are to run from running: on these workers and, if `local`, with this machine's libraries.

    Asks the hub about the models that it is to give; takes at most `HUB_TIMEOUT` seconds for each.
    """
    found: list[Problem] = []
    asked: set[str] = set()
    to_run = [p for p in plan.stages if p.state != "cached"]
    for planned in to_run:
        where = f"stages.{planned.name}"
        for field, refs in planned.inputs.items():
            for model in refs:
                if model.startswith("stages.") or model in asked:
                    continue
                asked.add(model)
                pickle = plan.spec.allow_pickle
                here = Path(model).is_dir()
                if problem := _folder_problem(model, pickle) if here else hub_problem(model, allow_pickle=pickle):
                    found.append(Problem(f"{where}.{field}", problem))
        if isinstance(planned.stage, TrainStage):
            of_stage: dict[str, str] = {}  # of each place the first, which is the cause of what follows
            for path, message in _on_workers(plan, planned, local):
                of_stage.setdefault(".".join((where, *path)), message)
            found += [Problem(path, message) for path, message in of_stage.items()]
        engine = planned.stage.engine if local and isinstance(planned.stage, Generate | RLStage) else ""
        known = any(problem.path == f"{where}.engine" for problem in found)
        if not known and (problem := engine_problem(engine)):
            found.append(Problem(f"{where}.engine", problem.removeprefix("engine: ")))
    if not found and (problem := _disk(plan, [p for p in to_run if isinstance(p.stage, TrainStage)])):
        found.append(Problem("storage", problem))
    return found


def _folder_problem(model: str, allow_pickle: bool) -> str | None:
    try:
        check_model_folder(model, allow_pickle=allow_pickle)
    except DataError as error:
        return str(error)
    return None


def _on_workers(plan: Plan, planned: PlannedStage, local: bool) -> Found:
    stage, resources = planned.stage, planned.resources
    assert isinstance(stage, TrainStage)
    gpu = resources.gpus_per_worker > 0
    config = model_config(plan.spec, planned.name)
    yield from stage_problems(stage, workers=resources.workers, gpu=gpu, config=config)
    if config is not None and stage.tuning.model_fields_set & {"target_modules", "modules_to_save"}:
        from stages.training.architecture import read_architecture  # imports torch: seconds

        try:
            architecture = read_architecture(config, reward=stage.produces == "reward model")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            yield ("model",), f"transformers cannot make a model of its config: {error}"
        else:
            yield from _tuning(stage, architecture)
    if not local:
        return
    train = stage.train.given()
    for field, message in missing_libraries(train, stage.attention):
        yield tuple(field.split(".")), message
    if missing := missing_library(stage.tuning):
        yield ("tuning", "method"), missing
    if gpu and train.get("bf16") and (problem := precision_problem(train, gpu=True, bf16_there=gpus_have_bf16())):
        yield ("train", "bf16"), problem


# ------------------------------------------------------------------------------------------------ one stage


def stage_problems(
    stage: TrainStage, *, workers: int | None, gpu: bool | None, config: Mapping[str, Any] | None
) -> Found:
    """Settings of a stage that contradict each other, the model or the workers.

    Args:
        workers, gpu: how many workers there will be and whether they have GPUs; None where it is not known yet.
        config: of the model, as in its config.json; None where it is not known yet.
    """
    given = stage.train.given()
    train = with_defaults(stage, gpu)
    deepspeed = deepspeed_config(stage.deepspeed, gpu=bool(gpu))
    if deepspeed is not None:
        for key, message in clashes(deepspeed, train, given, workers, gpu):
            yield ("deepspeed", key), f"{message} ({Path(str(stage.deepspeed)).name})"
    yield from _tuning(stage, None)
    half = True if given.get("bf16") or given.get("fp16") else False if given.get("bf16") is False else None
    if problem := attention_problem(stage.attention, gpu=gpu, half=half):
        yield ("attention",), problem
    if problem := precision_problem(given, gpu=gpu, bf16_there=None):
        yield ("train", "fp16"), problem
    yield from _own(given)
    optimizer = given.get("optim")
    if optimizer is not None and not is_own(optimizer) and (
        problem := optimizer_problem(optimizer, optimizer_names(), gpu=gpu)
    ):  # fmt: skip
        yield ("train", "optim"), problem
    if isinstance(stage, RLStage) and stage.engine == "vllm" and gpu is False:
        yield ("engine",), "vllm runs in the workers that train, which have no GPU; use `engine: transformers`"
    if given.get("use_liger_kernel") and gpu is False:
        yield ("train", "use_liger_kernel"), "liger kernels run on a GPU only, and the workers have none; leave it out"
    if given.get("liger_kernel_config") and not given.get("use_liger_kernel"):
        yield ("train", "liger_kernel_config"), "nothing uses it: write use_liger_kernel: true, or leave it out"
    if config is not None and (problem := length_problem(given.get("max_length"), config)):
        yield ("train", "max_length"), problem


def _tuning(stage: TrainStage, architecture: Any) -> Found:
    zero, reward = zero_stage(deepspeed_config(stage.deepspeed)), stage.produces == "reward model"
    for field, message in tuning_problems(stage.tuning, architecture, reward=reward, zero_stage=zero):
        yield ("tuning", field), message


def with_defaults(stage: TrainStage, gpu: bool | None) -> dict[str, Any]:
    """The training arguments with the trainer's defaults, and ours; what depends on GPUs is None where they may be."""
    ours: dict[str, Any] = {"optim": DEFAULT_OPTIMIZER, "bf16": None if gpu is not False else False}
    train = library_defaults(stage.train.library) | ours | stage.train.given()
    if train["bf16"] is None and gpu:
        train["bf16"] = not train.get("fp16")
    return train


def _own(given: Mapping[str, Any]) -> Found:
    """Of optimizers and schedules of the user's."""
    for field in ("optim", "lr_scheduler_type"):
        if is_own(given.get(field)) and (problem := own.problem(given[field])):
            yield ("train", field), problem
    if is_own(given.get("optim")):
        try:
            own.options(given.get("optim_args"))
        except ValueError as error:
            yield ("train", "optim_args"), str(error)


def length_problem(max_length: int | None, config: Mapping[str, Any]) -> str | None:
    """A `max_length` over the model's positions."""
    limit = length_limit(config)
    if max_length is None or limit is None or max_length <= limit:
        return None
    return (
        f"{max_length} is more than the {limit} positions of the model (max_position_embeddings); write {limit} or less"
    )


# ------------------------------------------------------------------------------------------------ the model


def model_config(spec: Spec, name: str) -> dict[str, Any] | None:
    """config.json of the model a stage starts from: of a folder, of the hub's cache, or of the stage that makes it."""
    start = first_model(spec, name)
    if isinstance(start, Init):
        return {"model_type": "llama", **start.config}
    return read_config(start) if start is not None else None


def first_model(spec: Spec, name: str) -> str | Init | None:
    """Where the chain of models that ends in a stage begins: a folder, a hub id, or the stage that makes a fresh one."""
    seen: set[str] = set()
    while name not in seen:
        seen.add(name)
        ref = next(iter(spec.references(name).get("model") or []), None)
        if ref is None or not ref.startswith("stages."):
            return ref
        name = ref.removeprefix("stages.")
        stage = spec.stages.get(name)
        if stage is None or isinstance(stage, Init):
            return stage
    return None


def hub_problem(model: str, timeout: float = HUB_TIMEOUT, allow_pickle: bool = False) -> str | None:
    """Why the hub will not give a model; None where it will, or need not because all of it has been downloaded."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if _downloaded(model):
        return code_problem(model, read_config(model) or {})
    if constants.HF_HUB_OFFLINE:
        return f"{model} is neither a folder nor in the cache of the hub, and HF_HUB_OFFLINE is set"
    try:
        info = HfApi().model_info(model, timeout=timeout)
        if info.gated:
            HfApi().auth_check(model)
    except GatedRepoError:
        return f"{model} is gated: accept its terms on the hub, then set HF_TOKEN or run `hf auth login`"
    except (RepositoryNotFoundError, HFValidationError):
        return f"{model} is neither a folder here nor a model on the hub (of a private one: set HF_TOKEN)"
    except Exception as error:  # of the network: of a dozen classes, of httpx, ssl and the system
        what = str(error).strip().splitlines() or [type(error).__name__]
        return (
            f"{model} has not been downloaded, and the hub cannot be reached ({what[0]}); name a folder, or try again"
        )
    if not allow_pickle and not {file.rfilename for file in info.siblings or []} & set(WEIGHTS):
        return (
            f"{model} has no .safetensors weights on the hub; only those are loaded, never pickled weights"
            " (unless the spec says `allow_pickle: true`)"
        )
    return code_problem(model, info.config or {})


def _downloaded(model: str) -> bool:
    if cached(model, "config.json") is None:
        return False
    if cached(model, "model.safetensors"):
        return True
    index = cached(model, "model.safetensors.index.json")
    return index is not None and all(
        cached(model, shard) for shard in set(json.loads(index.read_text())["weight_map"].values())
    )


# ------------------------------------------------------------------------------------------------ this machine


@lru_cache
def gpus(field: str) -> list[float]:
    """What the driver says of each of this machine's GPUs, by nvidia-smi's name for it; found without torch.

    Nothing where there is no GPU, or no such number.
    """
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        return [float(line) for line in asked.stdout.split()]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def gpus_have_bf16() -> bool | None:
    """Whether this machine's GPUs compute bf16 (compute capability 8.0 or more); None if unknown."""
    capabilities = gpus("compute_cap")
    return min(capabilities) >= 8.0 if capabilities else None


def _disk(plan: Plan, stages: list[PlannedStage]) -> str | None:
    """What the stages will write, against what is free. Counted exactly, in seconds, only where it might be too much."""
    folder = plan.folder.path
    sizes = [_weights_on_disk(plan.spec, planned.name) for planned in stages]
    if None not in sizes and disk_problem(AT_MOST * sum(size or 0 for size in sizes), folder) is None:
        return None
    from pipeline.estimate import Unpredictable, amount_of, disk_bytes, training_of

    need = 0
    for planned in stages:
        assert isinstance(planned.stage, TrainStage)
        amount = amount_of(plan, planned)
        try:
            size = disk_bytes(planned.stage, training_of(plan, planned, amount), amount) or 0
        except (Unpredictable, DataError):
            continue  # not known: the run will see
        work = plan.folder.work(planned.name, planned.fingerprint)
        need += max(0, size - sum(f.stat().st_size for f in work.rglob("*") if f.is_file()))
    return disk_problem(need, folder)


def _weights_on_disk(spec: Spec, name: str) -> int | None:
    """Bytes of the weights a stage starts from: 0 of a fresh, small model, None where they are not here."""
    start = first_model(spec, name)
    if isinstance(start, Init):
        return 0
    files = list(Path(start).glob("*.safetensors")) if start is not None else []
    return sum(file.stat().st_size for file in files) or None


def disk_problem(need: int, folder: Path) -> str | None:
    """Too little free space on the disk of a folder, which need not be there yet. `need`: bytes."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(there).free
    if need <= free:
        return None
    gib = 2**30
    return f"checkpoints and model need {need / gib:.1f} GiB, {there} has {free / gib:.1f}; free some, or set `storage`"
