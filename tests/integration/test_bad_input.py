"""What is wrong is told in a few lines, with exit code 2, before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from .test_chain import SPEC, raylign


@pytest.fixture
def spec(tmp_path: Path, data: Path) -> str:
    return SPEC.format(data=data, config="{model_type: llama}")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("chats.jsonl", "gone.jsonl"), "gone.jsonl: no such file"),
        (("kind: dpo", "kind: dop"), "did you mean dpo?"),
        (
            ("learning_rate: 3e-3", "learning_rat: 3e-3"),
            "spec.yaml:10: stages.sft.train.learning_rat: unknown key; did you mean learning_rate?",
        ),
        (("deepspeed: zero2", "deepspeed: zero9"), "'zero9' is neither a preset"),
        (
            ("{model_type: llama}", "{model_type: llama, max_position_embeddings: 64}"),
            "spec.yaml:10: stages.sft.train.max_length: 128 is more than the 64 positions of the model",
        ),
        (
            ("learning_rate: 3e-3", "optim: adamw_troch, learning_rate: 3e-3"),
            "spec.yaml:10: stages.sft.train.optim: 'adamw_troch' is not an optimizer of transformers; did you mean adamw_torch?",
        ),
        (("stages:\n", "stages: [\n"), "not YAML"),
    ],
)
def test_a_wrong_spec(tmp_path: Path, spec: str, change: tuple[str, str], says: str) -> None:
    (tmp_path / "spec.yaml").write_text(spec.replace(*change))
    done = raylign(tmp_path, "run", "spec.yaml")
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 8
    assert not (tmp_path / "runs").exists()


def test_five_mistakes_are_five_lines(tmp_path: Path, spec: str) -> None:
    for change in (("learning_rate: 3e-3", "lerning_rate: 3e-3"), ("stages.sft, data", "stages.stf, data"), ("max_length: 128", "max_length: long"),
                   ("name: chain", "nme: chain"), ("kind: evaluate", "kind: evaluation")):  # fmt: skip
        spec = spec.replace(*change)
    (tmp_path / "spec.yaml").write_text(spec)
    done = raylign(tmp_path, "run", "spec.yaml")
    assert done.returncode == 2
    assert "6 mistakes in the spec" in done.stderr  # the wrong reference stands twice
    for says in (
        "did you mean learning_rate?",
        "did you mean sft?",
        "valid integer, not 'long'",
        "did you mean name?",
        "did you mean evaluate?",
    ):
        assert says in done.stderr


def test_wrong_arguments(tmp_path: Path) -> None:
    assert raylign(tmp_path, "run").returncode == 2
    assert raylign(tmp_path, "run", "nothing.yaml").returncode == 2
    assert raylign(tmp_path, "status", "nothing").returncode == 2
    assert raylign(tmp_path, "frobnicate").returncode == 2


def test_more_workers_than_this_machine_has_cores(tmp_path: Path, spec: str) -> None:
    (tmp_path / "spec.yaml").write_text(spec)
    done = raylign(tmp_path, "run", "spec.yaml", "--set", "stages.sft.workers=999")
    assert done.returncode == 2 and "stages.sft: needs 999 CPU; have " in done.stderr and "never start" in done.stderr
    assert not (tmp_path / "runs" / "chain" / "run.json").exists()


def test_a_deepspeed_file_that_clashes_with_train(tmp_path: Path, spec: str) -> None:
    (tmp_path / "ds.json").write_text(
        '{"train_batch_size": 12, "gradient_clipping": 0.5, "zero_optimization": {"stage": 2}}'
    )
    (tmp_path / "spec.yaml").write_text(spec.replace("deepspeed: zero2", "deepspeed: ds.json"))
    done = raylign(tmp_path, "run", "spec.yaml", "--set", "stages.sft.workers=2")
    assert done.returncode == 2 and "2 mistakes in the spec" in done.stderr
    assert "deepspeed.gradient_clipping: 0.5, but train.max_grad_norm is 1.0 (by default)" in done.stderr
    assert "deepspeed.train_batch_size: 12, but 8 rows x 1 accumulation steps x 2 workers are 16" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_what_cannot_be_had_here_is_told_before_anything_starts(tmp_path: Path, spec: str) -> None:
    """A library, a GPU, a LoRA target, a model of the hub: each is known without starting Ray."""
    tuned = "{method: lora, target_modules: [q_porj]}"
    other = "kind: sft\n    model: org/no-such-model"
    for change, says in (
        (
            "attention: flash_attention_2",
            "stages.sft.attention: flash_attention_2 cannot be used: the workers have no GPU",
        ),
        (
            f"tuning: {tuned}",
            "stages.sft.tuning.target_modules: 'q_porj' matches nothing in this model; did you mean q_proj?",
        ),
        (
            other,
            "stages.sft.model: org/no-such-model is neither a folder nor in the cache of the hub, and HF_HUB_OFFLINE is set",
        ),
    ):
        text = (
            spec.replace("kind: sft", change)
            if change is other
            else spec.replace("kind: sft", f"kind: sft\n    {change}")
        )
        (tmp_path / "spec.yaml").write_text(text)
        done = raylign(tmp_path, "run", "spec.yaml")
        assert done.returncode == 2 and says in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / "runs" / "chain" / "run.json").exists()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    assert "Traceback" in raylign(tmp_path, "run", "nothing.yaml", "--debug").stderr


def test_init_writes_a_spec_that_is_valid_and_says_what_it_cannot_read(tmp_path: Path, data: Path, model: str) -> None:
    arguments = [
        "init",
        "--model",
        model,
        "--data",
        str(data / "chats.jsonl"),
        "--preference",
        str(data / "pairs.jsonl"),
    ]
    assert raylign(tmp_path, *arguments).returncode == 0
    done = raylign(tmp_path, "plan", "spec.yaml")
    assert done.returncode == 0, done.stderr
    assert raylign(tmp_path, *arguments).returncode == 2  # it would overwrite
    done = raylign(tmp_path, "init", "--model", model, "--preference", str(data / "chats.jsonl"), "--out", "other.yaml")
    assert done.returncode == 2 and "give them as --data" in done.stderr
    assert raylign(tmp_path, "init", "--out", "other.yaml").returncode == 2  # of what?
    done = raylign(tmp_path, "init", "--from", "spec.yaml", "--out", "other.yaml")
    assert done.returncode == 2 and "a spec of raylign needs no conversion" in done.stderr


def test_submit_says_what_is_wrong_before_it_connects(tmp_path: Path, spec: str) -> None:
    (tmp_path / "spec.yaml").write_text(spec)
    done = raylign(tmp_path, "submit", "spec.yaml", "--address", "http://127.0.0.1:9")
    assert done.returncode == 2 and "travels with the job and is gone after it" in done.stderr
    (tmp_path / "spec.yaml").write_text(spec.replace("storage: runs", "storage: /tmp/raylign-runs"))
    done = raylign(tmp_path, "submit", "spec.yaml", "--address", "http://127.0.0.1:9", "--env", "NO_SUCH_VARIABLE")
    assert done.returncode == 2 and "NO_SUCH_VARIABLE" in done.stderr
    done = raylign(tmp_path, "submit", "spec.yaml", "--address", "http://127.0.0.1:9")
    assert done.returncode == 1 and "http://127.0.0.1:9" in done.stderr and "Traceback" not in done.stderr
