"""What somebody else wrote (models, checkpoints, data, templates, specs, run folders) does nothing but what it is for."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from pipeline.artifacts import NAME, RunFolder
from pipeline.chat import talk
from pipeline.report import write_report
from pipeline.report.reading import read_run
from pipeline.spec_reader import load_spec
from pipeline.sweep import expand
from pipeline.tables import render_run
from stages import storage
from stages.data.chunks import BadRow
from stages.data.source import DataSource, find_files, read_file
from stages.data.template import ChatTemplate
from stages.data.tokenizer import check_model_folder, load_tokenizer
from stages.errors import DataError, RaylignError, SpecError, StageError
from stages.training.checkpoint import Record, publish, saved
from stages.training.unpickling import load, tensors_only
from stages.training.writer import write_state

from .conftest import write_jsonl


class Evil:
    """A pickle of it makes a file where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "mark"


@pytest.fixture
def evil(mark: Path) -> Evil:
    """Shown to work, so that a mark that is not there says something."""
    pickle.loads(pickle.dumps(Evil(mark)))
    mark.unlink()
    return Evil(mark)


# ------------------------------------------------------------------------------------------------ checkpoints


def test_a_checkpoint_runs_nothing(tmp_path: Path, evil: Evil, mark: Path) -> None:
    """Its hashes are right: whoever can change a file can change them too."""
    making = tmp_path / ".saving-1"
    making.mkdir()
    files = {"state.pt": write_state(making / "state.pt", {"optimizer": {"state": torch.ones(2), "more": evil}})}
    path = publish(making, Record(1, 0, 8, 1, None, "m", files))
    assert saved(path) is not None
    with pytest.raises(StageError, match="holds more than tensors"):
        load(path / "state.pt")
    assert not mark.exists()


def test_deepspeed_reads_a_checkpoint_of_its_own_but_runs_nothing(tmp_path: Path, evil: Evil, mark: Path) -> None:
    """It asks torch for everything (`weights_only=False`); all it needs of that are a few classes of its own."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    file, engine = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt", TorchCheckpointEngine()
    scalers = [LossScaler(scale=2.0), DynamicLossScaler(256.0, 100, 1.0, 1, False)]
    state = {"stage": ZeroStageEnum.weights, "scalers": scalers, "where": fragment_address(numel=3, start=1)}
    torch.save(state, file)
    with tensors_only(tmp_path, deepspeed=True):
        read = engine.load(str(file))
    assert read["stage"] == ZeroStageEnum.weights and read["where"] == fragment_address(3, 1)
    assert [vars(scaler) for scaler in read["scalers"]] == [vars(scaler) for scaler in scalers]
    torch.save(state | {"more": evil}, file)
    with pytest.raises(StageError, match=r"holds more than tensors.*system"), tensors_only(tmp_path, deepspeed=True):
        engine.load(str(file))
    assert not mark.exists()
    engine.load(str(file))  # what it does otherwise
    assert mark.exists()


@pytest.mark.parametrize("asked", [("dict", "clear"), ("enum", "__init__"), ("enum", "mro"), ("enum", "system")])
def test_getattr_in_a_checkpoint_gives_members_of_enums_alone(asked: tuple[str, str], tmp_path: Path) -> None:
    """Some versions of Python write members of enums so."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    class Asks:
        def __init__(self, *what: Any) -> None:
            self.what = what

        def __reduce__(self) -> Any:
            return getattr, self.what

    torch.save({"stage": Asks(ZeroStageEnum, "weights")}, tmp_path / "enum.pt")
    with tensors_only(tmp_path, deepspeed=True):
        assert torch.load(tmp_path / "enum.pt", weights_only=False) == {"stage": ZeroStageEnum.weights}
    torch.save({"x": Asks({"dict": dict, "enum": ZeroStageEnum}[asked[0]], asked[1])}, tmp_path / "other.pt")
    with pytest.raises(StageError, match="holds more than tensors"), tensors_only(tmp_path, deepspeed=True):
        torch.load(tmp_path / "other.pt", weights_only=False)


def test_what_is_known_stays_known_around_a_file_that_is_read_within(tmp_path: Path) -> None:
    import numpy as np

    before = set(torch.serialization.get_safe_globals())
    torch.save({"a": np.float64(1.5), "b": np.arange(3)}, tmp_path / "own.pt")
    with tensors_only(tmp_path):
        load(tmp_path / "own.pt")
        assert torch.load(tmp_path / "own.pt", weights_only=False)["a"] == 1.5
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ and set(torch.serialization.get_safe_globals()) == before


def test_numpy_s_own_ways_to_unpickle_are_no_way_round(tmp_path: Path, evil: Evil, mark: Path) -> None:
    """An array of objects, and a scalar that says it is one."""
    import numpy as np

    class Scalar:
        def __reduce__(self) -> Any:
            return np.float64(0).__reduce__()[0], (np.dtype("O"), pickle.dumps(evil))

    for i, value in enumerate((np.array([evil], dtype=object), Scalar())):
        torch.save(value, tmp_path / f"{i}.pt")
        with suppress(StageError, TypeError):  # it may also be read, as what it says it is
            load(tmp_path / f"{i}.pt")
        assert not mark.exists()


def test_a_checkpoint_for_other_workers_is_converted_without_running_it(tmp_path: Path, evil: Evil, mark: Path) -> None:
    from stages.training.universal import converted

    making = tmp_path / ".saving-1"
    names = ["mp_rank_00_model_states.pt", *(f"zero_pp_rank_{i}_mp_rank_00_optim_states.pt" for i in (0, 1))]
    for name in names:
        (making / "global_step1").mkdir(parents=True, exist_ok=True)
        torch.save({"ds_version": "0.19", "module": evil, "optimizer_state_dict": evil}, making / "global_step1" / name)
    checkpoint = saved(publish(making, Record(1, 0, 8, 2, 2, "m", {})))
    assert checkpoint is not None
    with pytest.raises(StageError, match="holds more than tensors"):
        converted(replace(checkpoint))
    assert not mark.exists()


# ------------------------------------------------------------------------------------------------ models


@pytest.fixture
def copy(model: str, tmp_path: Path) -> Path:
    """A model folder to change."""
    return Path(shutil.copytree(model, tmp_path / "model"))


def as_pickle(folder: Path, *more: Any) -> None:
    """The weights as old models have them."""
    torch.save(dict(load_file(folder / "model.safetensors")) | dict(enumerate(more)), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def spec_of(folder: Path, base: Path | str, **more: Any) -> Path:
    """A spec with one stage, and its data."""
    write_jsonl(folder / "chats.jsonl", [{"prompt": "Hi", "completion": "Hello"}] * 4)
    stage = {"kind": "sft", "data": [{"path": "chats.jsonl"}]}
    (folder / "spec.yaml").write_text(json.dumps({"model": str(base), "stages": {"sft": stage}} | more))  # JSON is YAML
    return folder / "spec.yaml"


def refused(spec: Path, *overrides: str) -> str:
    with pytest.raises(SpecError) as error:
        load_spec(spec, overrides)
    return str(error.value)


def test_pickled_weights_are_refused(copy: Path, tmp_path: Path, evil: Evil, mark: Path) -> None:
    as_pickle(copy, evil)
    assert "its weights are pickles (pytorch_model.bin)" in refused(spec_of(tmp_path, copy))
    for whole in (True, False):
        with pytest.raises(DataError, match=r"which can hold code; only safetensors are loaded\. Convert them"):
            check_model_folder(str(copy), whole=whole)
    for name in ("model.pt", "pytorch_model-00001-of-00002.bin"):
        (copy / "pytorch_model.bin").rename(copy / name)
        with pytest.raises(DataError, match="its weights are pickles"):
            check_model_folder(str(copy))
        (copy / name).rename(copy / "pytorch_model.bin")
    assert not mark.exists()


def test_a_pickle_is_not_taken_for_safetensors(copy: Path, evil: Evil) -> None:
    """transformers takes pickles by other ways: named in the config or in an index, or where safetensors have other names."""
    shutil.copy(copy / "model.safetensors", copy / "other.safetensors")
    as_pickle(copy, evil)
    with pytest.raises(DataError, match="its weights are pickles"):
        check_model_folder(str(copy))
    index = copy / "model.safetensors.index.json"
    for shard, says in (("pytorch_model.bin", "are pickles"), ("../../a.safetensors", "lie outside of the folder")):
        index.write_text(json.dumps({"weight_map": {"a": shard, "b": "other.safetensors"}}))
        with pytest.raises(DataError, match=says):
            check_model_folder(str(copy))
    index.unlink()
    (copy / "other.safetensors").rename(copy / "model.safetensors")
    check_model_folder(str(copy))  # a pickle beside safetensors is not read
    (copy / "pytorch_model.bin").rename(copy / "adapter_model.bin")
    change(copy / "config.json", transformers_weights="adapter_model.bin")
    with pytest.raises(DataError, match=r"are pickles \(adapter_model.bin\)"):
        check_model_folder(str(copy))


def test_pickled_weights_that_were_asked_for_run_nothing(copy: Path, tmp_path: Path, evil: Evil, mark: Path) -> None:
    from stages.scoring import load_for_scoring

    want = load_for_scoring(str(copy)).state_dict()
    as_pickle(copy)
    spec = load_spec(spec_of(tmp_path, copy, allow_pickle=True))
    assert "weights may be pickles" in spec.warnings()[0] and spec.as_yaml()["allow_pickle"] is True
    assert not load_spec(spec_of(tmp_path, copy.parent / "org"), ["model=org/name"]).warnings()
    have = load_for_scoring(str(copy)).state_dict()
    assert all(torch.equal(have[name], tensor) for name, tensor in want.items())
    torch.save(dict(want) | {"more": evil}, copy / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError):
        load_for_scoring(str(copy))
    assert not mark.exists()


def test_an_adapter_of_pickles_is_refused_like_any_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(DataError, match="a LoRA adapter"):
        check_model_folder(str(tmp_path))


CODE = "import pathlib; pathlib.Path({mark!r}).touch()\nclass Own: ...\n"


def test_code_that_comes_with_a_model_is_not_run(copy: Path, tmp_path: Path, mark: Path) -> None:
    (copy / "own.py").write_text(CODE.format(mark=str(mark)))
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    change(copy / "config.json", auto_map=own)
    load_spec(spec_of(tmp_path, copy))  # of an architecture that transformers has: it takes its own
    change(copy / "config.json", model_type="own")
    assert "its architecture (own) is Python code that comes with the model" in refused(spec_of(tmp_path, copy))
    assert "trust_remote_code: code that comes with a model is never run" in refused(
        tmp_path / "spec.yaml", "stages.sft.train.trust_remote_code=true"
    )
    assert not mark.exists()


@pytest.mark.parametrize("answer", ["y", ""])
def test_a_tokenizer_s_code_is_not_run_and_nobody_is_asked(
    copy: Path, mark: Path, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks on standard input whether to run it."""
    (copy / "own.py").write_text(CODE.format(mark=str(mark)))
    change(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]}, tokenizer_class="Own")
    change(copy / "config.json", model_type="own")
    asked = []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or answer)
    with pytest.raises(DataError, match="the tokenizer cannot be loaded"):
        load_tokenizer(str(copy))
    assert not asked and not mark.exists()


def sources() -> Iterator[tuple[Path, ast.AST]]:
    for package in ("pipeline", "stages"):
        for file in sorted((Path(__file__).parents[1] / package).rglob("*.py")):
            yield file, ast.parse(file.read_text())


def test_nothing_of_ours_trusts_code_or_unpickles() -> None:
    loads, unpickles = 0, set()
    for file, tree in sources():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            given = {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert given.get("trust_remote_code", "False") == "False", f"{file}:{call.lineno}"
            if name.endswith(".from_pretrained") and not name.startswith(("GenerationConfig", "PeftModel")):
                assert "trust_remote_code" in given, f"{file}:{call.lineno}: would ask on standard input"
                loads += 1
            if name == "torch.load":
                assert given.get("weights_only") == "True", f"{file}:{call.lineno}"
            if name.endswith(("pickle.load", "pickle.loads")):
                unpickles.add(file.name)
    assert loads >= 15 and unpickles == {"stage_process.py", "pool.py"}  # between processes of ours


# ------------------------------------------------------------------------------------------------ data


@pytest.mark.parametrize("nested", [False, True])
def test_a_parquet_file_of_python_objects_is_not_unpickled(
    tmp_path: Path, evil: Evil, mark: Path, nested: bool
) -> None:
    """Ray's Arrow type for Python objects unpickles a value when it is read; it is registered where Ray Data is imported."""
    import ray.data
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

    assert ray.data
    column: Any = ArrowPythonObjectArray.from_objects([evil])
    column = pa.StructArray.from_arrays([column], ["inner"]) if nested else column
    table = pa.table({"prompt": ["Hi"], "completion": ["Hello"], "more": column})
    pq.write_table(table, tmp_path / "rows.parquet")
    (file,) = find_files(DataSource(path=str(tmp_path / "rows.parquet")))
    rows = [row for _, row in read_file(file)]
    assert all(isinstance(row, BadRow) and "pickled Python objects" in row.detail for row in rows) and rows
    assert not mark.exists()
    pq.read_table(tmp_path / "rows.parquet").to_pylist()  # what it does otherwise
    assert mark.exists()


# ------------------------------------------------------------------------------------------------ chat templates

REACHING = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "joiner": "{{ joiner.__init__.__globals__['__builtins__']['open']('MARK', 'w').write('x') }}",
    "mutation": "{{ messages.append(1) }}",
    "range": "{% for i in range(10 ** 9) %}x{% endfor %}",
}


@pytest.mark.parametrize("source", REACHING.values(), ids=REACHING)
def test_a_template_that_reaches_for_more_is_refused(
    copy: Path, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (copy / "chat_template.jinja").write_text(source)
    with pytest.raises(DataError, match="the chat template does what a template may not"):
        load_tokenizer(str(copy))
    from transformers import AutoTokenizer

    with pytest.raises(Exception, match=r"unsafe|Range too big"):  # as `chat` and the checks of a handoff render it
        tokenizer: Any = AutoTokenizer.from_pretrained(str(copy), trust_remote_code=False)
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert not (tmp_path / "MARK").exists()


def test_a_template_sees_nothing_of_ours_through_what_it_is_given() -> None:
    """Undefined, and so empty: methods and functions lead nowhere."""
    for source in (
        "{{ strftime_now.__self__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ '{0.__class__}'.format(1) }}",
    ):
        template = ChatTemplate(source, {})
        assert template.render([{"role": "user", "content": "Hi"}]) == ""
    marked = ChatTemplate("{% for m in messages %}{{ m.content }}{{ raylign_begin.__self__ }}{% endfor %}", {})
    assert marked.segments([{"role": "user", "content": "Hi"}], "Hi").segments == {0: (0, 2)}


def test_a_template_that_does_not_come_to_an_end(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.data.template.PATIENCE_S", 0.2)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (copy / "chat_template.jinja").write_text(endless)
    with pytest.raises(DataError, match=r"two turns are not rendered after 0\.2 s"):
        load_tokenizer(str(copy))


def test_templates_that_refuse_these_turns_are_no_danger(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("{{ raise_exception('a system turn is wanted') }}")
    load_tokenizer(str(copy))


# ------------------------------------------------------------------------------------------------ specs


def test_tags_make_no_objects(tmp_path: Path, mark: Path) -> None:
    file = spec_of(tmp_path, "org/model")
    plain = "model: org/model\nstages: {sft: {kind: sft, data: [{path: chats.jsonl}]}}\n"
    call = f"!!python/object/apply:os.system ['touch {mark}']"
    for text in (f"name: {call}", f"seed: {call}", "seed: !!python/name:os.system", "storage: !own {a: 1}"):
        file.write_text(f"{text}\n{plain}")
        assert f"spec.yaml:1: {text.partition(':')[0]}: the tag " in refused(file)
    file.write_text(f"name: !!str plain\n{plain}")
    assert load_spec(file).name == "plain"
    assert "the value is not YAML" in refused(file, f"seed={call}")
    assert not mark.exists()


def test_few_lines_that_stand_for_very_many(tmp_path: Path) -> None:
    file = spec_of(tmp_path, "org/model")
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    file.write_text("\n".join([*lines, "model: org/model", "stages: {}"]))
    assert "more than 100,000 values, of which an alias" in refused(file)
    file.write_text("a: " + "[" * 1500 + "]" * 1500)
    assert "nested too deeply" in refused(file)
    file.write_text("a: &a {<<: *a}\nmodel: org/model")
    assert "not YAML" in refused(file)


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "..", ".hidden", "a/b", "a\\b", "a\nb", "", "Logs", "logs"])
def test_names_stay_within_the_run_folder(tmp_path: Path, name: str) -> None:
    stage = {"kind": "sft", "data": [{"path": "chats.jsonl"}]}
    assert "a stage's name is small letters" in refused(spec_of(tmp_path, "org/model", stages={name: stage}))
    if name.lower() != "logs":
        assert "name:" in refused(spec_of(tmp_path, "org/model", name=name))


@pytest.mark.parametrize("file", ["...yaml", ".prepared.yaml", "-x.yaml", "a b.yaml", "ü.yaml"])
def test_the_name_of_a_spec_file_makes_a_plain_folder(tmp_path: Path, file: str) -> None:
    spec = spec_of(tmp_path, "org/model").rename(tmp_path / file)
    assert load_spec(spec).name in ("run", "prepared", "x", "a-b")


def test_values_of_a_sweep_make_plain_names() -> None:
    values = ["../../out", "/etc/passwd", "..", "a/../b", "\x1b[1m", "", "a\nb"]
    made = expand({"dpo": {"kind": "dpo", "sweep": {"model": values}}}, lambda path, message: pytest.fail(message))
    assert len(made.stages) == len(values)
    assert all(NAME.fullmatch(name) and name.startswith("dpo-model-") for name in made.stages)


def run_of(folder: Path, state: Any, **manifests: Any) -> Path:
    """A run folder as somebody may have sent it."""
    run = folder / "run"
    run.mkdir(parents=True)
    (run / "run.json").write_text(state if isinstance(state, str) else json.dumps(state))
    for name, manifest in manifests.items():
        (run / name).mkdir()
        (run / name / "manifest.json").write_text(json.dumps(manifest))
    return run


@pytest.mark.parametrize(
    "stages", [{"../../out": {}}, {"/etc": {}}, {"..": {}}, {".work/x": {}}, {"a\n": {}}, [], {"sft": 1}, None]
)
def test_a_run_folder_that_was_sent_leads_nowhere(tmp_path: Path, stages: Any) -> None:
    run = run_of(tmp_path, {"name": "run", "state": "done", "stages": stages})
    for command in ("status", "report", "chat"):
        with pytest.raises(DataError, match=r"run\.json: "):
            talk(str(run), [], 1, None) if command == "chat" else RunFolder.open(run)  # type: ignore[arg-type]


def test_a_run_s_record_that_is_none(tmp_path: Path) -> None:
    for i, text in enumerate(("{", "[]", "null", "1")):
        with pytest.raises(DataError, match="not the record of a run"):
            RunFolder.open(run_of(tmp_path / str(i), text))


HOSTILE = "</pre><script>alert(1)</script><img src=x onerror='alert(1)'>\"{{ 7 * 7 }}[bold]"


def test_a_run_folder_that_was_sent_is_text_in_the_report(tmp_path: Path) -> None:
    manifest = {
        "name": HOSTILE, "kind": HOSTILE, "produces": "model", "fingerprint": "f", "seconds": 1, "inputs": {}, "versions": {},
        "metrics": {HOSTILE: HOSTILE, "loss": 1.0}, "config": {HOSTILE: HOSTILE}, "rows": 1, "steps": 1,
        "details": {
            "ledger": {"read": 2, "kept": 1, "reasons": {HOSTILE: 1},
                       "examples": [{"source": HOSTILE, "row": 1, "reason": HOSTILE, "detail": HOSTILE}]},
            "warnings": {HOSTILE: 1}, "kernels": {HOSTILE: HOSTILE},
        },
    }  # fmt: skip
    record = {"kind": HOSTILE, "state": HOSTILE, "fingerprint": "f", "error": HOSTILE}
    state = {"name": HOSTILE, "state": HOSTILE, "started": 0, "finished": 1, "stages": {"sft": record}, "sweeps": {}}
    run = run_of(tmp_path, state, sft=manifest)
    (run / "spec.yaml").write_text(HOSTILE)
    folder = RunFolder.open(run)
    write_report(folder)
    page = (run / "report.html").read_text()
    assert "alert(1)" in page and "<script" not in page and "<img" not in page and "onerror='" not in page
    assert page.count("</pre>") == page.count("<pre>")
    render_run(read_run(folder))


def test_links_in_a_run_folder_are_not_written_through(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    run = run_of(tmp_path, {"name": "run", "state": "done", "started": 0, "stages": {}})
    for name in ("report.html", ".report.html.tmp", f".report.html.{os.getpid()}.tmp"):
        (run / name).symlink_to(outside)
    folder = RunFolder.open(run)
    write_report(folder)
    folder.save_state(folder.state())
    assert outside.read_text() == "mine" and not (run / "report.html").is_symlink()


def test_names_in_an_object_store_stay_within_its_mirror(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    monkeypatch.setenv(storage.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(storage.STORAGE, raising=False)
    base = uuid4().hex
    endpoint = f"http://{s3.partition('endpoint_override=')[2].partition('&')[0]}"
    store = boto3.client("s3", endpoint_url=endpoint)
    for key in ("run/run.json", "run/a/../../../../out"):
        store.put_object(Bucket="bucket", Key=f"{base}/{key}", Body=b"x")
    try:
        root = storage.use(f"s3://bucket/{base}{s3}")
        with pytest.raises(StageError, match="a name that leads out of its folder"):
            storage.pull(root / "run")
        assert not [p for p in tmp_path.rglob("out") if not p.is_relative_to(root)]
    finally:
        os.environ.pop(storage.STORAGE, None)


def test_a_mirror_in_a_folder_of_somebody_else_s_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "raylign").symlink_to(tmp_path / "theirs")
    with pytest.raises(StageError, match="belongs to somebody else; set RAYLIGN_CACHE"):
        storage._default_cache(str(tmp_path))
    (tmp_path / "raylign").unlink()
    assert Path(storage._default_cache(str(tmp_path))).stat().st_mode & 0o077 == 0


# ------------------------------------------------------------------------------------------------ secrets

SECRETS = {
    "HF_TOKEN": "hf_s3cr3tInTheEnvironment", "AWS_SECRET_ACCESS_KEY": "aws-s3cr3t", "WANDB_API_KEY": "wandb-s3cr3t",
    "MY_PASSWORD": "pass-s3cr3t",
}  # fmt: skip


@pytest.mark.parametrize("name", [*SECRETS, "hf_token", "APIKEY", "SSH_PRIVATE_KEY", "GCP_CREDENTIALS"])
def test_a_secret_does_not_get_into_a_spec(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "s3cr3t")
    for value in (f"${{{name}}}", f"s3://bucket/${{{name}}}/x", f"${{{name}:-other}}"):
        said = refused(spec_of(tmp_path, "org/model", storage=value))
        assert f"storage: {name} holds a secret" in said and "s3cr3t" not in said


@pytest.mark.parametrize("name", ["MAX_TOKENS", "TOKENIZER", "MONKEY", "KEYBOARD", "DATA_FOLDER"])
def test_other_variables_do(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "here")
    assert load_spec(spec_of(tmp_path, "org/model", name=f"${{{name}}}")).name == "here"


ADDRESSES = (
    "s3://key:s3cr3t@bucket/x", "s3://s3cr3t@bucket/x", "https://user:s3cr3t@host/x", "s3://bucket/x?secret_key=s3cr3t",
    "s3://key:s3cr3t/with/slashes@bucket/x", "s3://bucket/x?region=a&X-Amz-Security-Token=s3cr3t", "gs://s3cr3t@bucket/x",
)  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_with_credentials_are_refused_and_not_shown(tmp_path: Path, address: str) -> None:
    data = [{"path": address}]
    for more in ({"storage": address}, {"model": address}, {"stages": {"sft": {"kind": "sft", "data": data}}}):
        said = refused(spec_of(tmp_path, "org/model", **more))
        assert "an address with credentials in it" in said and "s3cr3t" not in said
    if "@bucket" in address and "slashes" not in address:
        for open_it in (lambda: RunFolder.open(address), lambda: find_files(DataSource(path=address))):
            with pytest.raises(RaylignError) as error:
                open_it()
            assert "s3cr3t" not in str(error.value)
    assert storage.STORAGE not in os.environ, "a store that was refused is not the next run's"


def test_the_hub_s_token_is_not_a_setting(tmp_path: Path) -> None:
    said = refused(spec_of(tmp_path, "org/model"), "stages.sft.train.hub_token=s3cr3t")
    assert "read from the environment, HF_TOKEN" in said and "s3cr3t" not in said


def command(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | environment
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=400
    )


def test_secrets_of_the_environment_are_nowhere_after_a_run(tmp_path: Path, data: Path) -> None:
    """Of what is kept and shown of a run: spec, records, report, logs, what is printed; also where it fails."""
    init = {"kind": "init", "config": {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1},
            "tokenizer": {"vocab_size": 300}, "data": [{"path": str(data / "chats.jsonl")}]}  # fmt: skip
    spec_of(tmp_path, "org/model", stages={"base": init, "broken": init | {"config": {"num_attention_heads": 7}}})
    done = command(tmp_path, "run", "spec.yaml", **SECRETS)
    assert done.returncode == 1, done.stderr
    texts = [done.stdout, done.stderr]
    texts += [p.read_bytes().decode(errors="replace") for p in (tmp_path / "runs").rglob("*") if p.is_file()]
    assert len(texts) > 8 and (tmp_path / "runs" / "spec" / "report.html").is_file()
    assert not [value for value in SECRETS.values() for text in texts if value in text]


# ------------------------------------------------------------------------------------------------ network


def python(code: str, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "HF_", "DO_NOT"))} | environment
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout


TOLD = """
import pipeline, os, json
import datasets.config, huggingface_hub.constants as hub
from ray._common.usage.usage_lib import usage_stats_enabled
print(json.dumps([hub.HF_HUB_DISABLE_TELEMETRY, hub.HF_HUB_DISABLE_UPDATE_CHECK, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS,
      usage_stats_enabled()]))
"""


def test_telemetry_is_off_unless_the_environment_says_otherwise() -> None:
    assert json.loads(python(TOLD)) == [True, True, False, False]
    assert json.loads(python(TOLD, RAY_USAGE_STATS_ENABLED="1"))[3]


LISTENING = """
import json, os, subprocess, sys, psutil
from pipeline.cluster import RayCluster
cluster = RayCluster()
cluster.start()
address = cluster.address()
join = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); f = ray.remote(lambda: 7); print(ray.get(f.remote()))"
stage = subprocess.run([sys.executable, "-c", join, address], capture_output=True, text=True, timeout=300)

def listens(process):
    try:
        return {c.laddr.ip for c in process.net_connections("inet") if c.status == "LISTEN"}
    except (psutil.NoSuchProcess, FileNotFoundError):  # one of the stage's, which has just ended
        return set()

me = psutil.Process()
sockets = set().union(*map(listens, (me, *me.children(recursive=True))))
print(json.dumps([address, stage.stdout.strip(), sorted(sockets)]))
sys.stdout.flush()
cluster.stop()
os._exit(0)
"""


def test_ray_of_this_machine_listens_on_loopback_only() -> None:
    """No dashboard, and Ray's own servers where only this machine's processes reach them; those of stages do."""
    address, answer, sockets = json.loads(python(LISTENING).splitlines()[-1])
    assert address.startswith("127.0.0.1:") and answer == "7" and sockets
    assert {ip.removeprefix("::ffff:") for ip in sockets} <= {"127.0.0.1", "::1"}


def test_no_dashboard_of_ours() -> None:
    """What starts a Ray says so."""
    starts = [
        {k.arg: ast.unparse(k.value) for k in call.keywords}
        for _, tree in sources()
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "ray.init"
    ]
    local = [given for given in starts if given.get("address") == "'local'"]
    assert len(local) == 1 and local[0]["include_dashboard"] == "False"
    assert all("address" in given for given in starts)  # an absent one starts a Ray, with a dashboard
