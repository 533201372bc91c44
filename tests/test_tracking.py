"""What trackers are told: event files, lines of metrics.jsonl each once, names that are refused, secrets that stay here."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import tracking
from pipeline.event_file import EventFile, crc32c
from pipeline.plan import make_plan
from pipeline.spec_checks import build_spec
from pipeline.trackers import redacted, without_credentials
from pipeline.tracking import Board, Lines, flat, lacks, numbers, read_record, remote, tracked, tracking_problems
from pipeline.tracking_process import summary
from stages.base import Reporter
from stages.errors import SpecError
from stages.training.arguments import train_config


def events(path: Path) -> Iterator[Any]:
    """The events of a file, by the protocol buffers and checksums of tensorboardX."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    data, at = path.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack("<Q", data[at : at + 8])
        body = data[at + 12 : at + 12 + length]
        assert data[at + 8 : at + 12] == struct.pack("<I", masked_crc32c(data[at : at + 8]))
        assert data[at + 12 + length : at + 16 + length] == struct.pack("<I", masked_crc32c(body))
        yield Event.FromString(body)
        at += 16 + length


def points(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, values) of what a TensorBoard shows of a folder."""
    files = sorted(folder.glob("events.out.tfevents.*"))
    return [
        (e.step, {v.tag: v.simple_value for v in e.summary.value}) for f in files for e in events(f) if e.summary.value
    ]


# ------------------------------------------------------------------------------------------------ event files


@pytest.mark.parametrize(
    ("data", "crc"),
    [(b"\0" * 32, 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E), (b"123456789", 0xE3069283)],
)
def test_checksums_of_rfc_3720(data: bytes, crc: int) -> None:
    assert crc32c(data) == crc


def test_event_files_are_what_tensorboard_reads(tmp_path: Path) -> None:
    file = EventFile(tmp_path / "events.out.tfevents.1", 1.5e9)
    file.add(1.5e9 + 1, 1, {"loss": 0.5, "rewards/chosen": -2.0})
    file.add(1.5e9 + 2, 123_456, {"größe": 1e300, "bad": float("nan"), "low": -float("inf")})
    file.close()
    first, second, third = events(tmp_path / "events.out.tfevents.1")
    assert (first.file_version, first.wall_time) == ("brain.Event:2", 1.5e9)
    assert second.step == 1 and second.wall_time == 1.5e9 + 1
    assert {v.tag: v.simple_value for v in second.summary.value} == {"loss": 0.5, "rewards/chosen": -2.0}
    values = {v.tag: v.simple_value for v in third.summary.value}
    assert third.step == 123_456 and values["größe"] == float("inf") and values["low"] == -float("inf")
    assert values["bad"] != values["bad"]


def test_an_event_file_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "events").symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError):
        EventFile(tmp_path / "events", 0.0)
    assert (tmp_path / "mine").read_text() == "kept"


# ------------------------------------------------------------------------------------------------ lines


def steps(lines: Lines, folder: Path) -> list[int]:
    return [line["step"] for line in lines.read(folder)]


def test_each_line_once_though_training_goes_back(tmp_path: Path) -> None:
    report, lines = Reporter(tmp_path), Lines()
    assert steps(lines, tmp_path) == []  # nothing there yet
    for step in range(1, 8):
        report.metrics(step, {"loss": 1.0})
        if step == 3:
            assert steps(lines, tmp_path) == [1, 2, 3]
    assert steps(lines, tmp_path) == [4, 5, 6, 7]
    report.rewind(5)  # from a checkpoint
    assert steps(lines, tmp_path) == []
    for step in range(6, 10):
        report.metrics(step, {"loss": 1.0})
    assert steps(lines, tmp_path) == [8, 9]
    # Another process, which is told how far it was: several lines may be of one step.
    report.metrics(9, {"eval_loss": 2.0})
    report.metrics(9, {"samples/kl": 1.0})
    later = Lines((9, 2))
    (last,) = later.read(tmp_path)
    assert "samples/kl" in last and later.sent == (9, 3)


def test_a_line_that_is_half_there_waits_for_its_end(tmp_path: Path) -> None:
    lines, file = Lines(), tmp_path / "metrics.jsonl"
    with file.open("a") as out:
        out.write('{"step": 1, "time": 1.0, "loss": 1}\n{"step": 2, "ti')
        out.flush()
        assert steps(lines, tmp_path) == [1]
        assert steps(lines, tmp_path) == []
        out.write('me": 2.0, "loss": 1}\n')
    assert steps(lines, tmp_path) == [2]


@pytest.mark.parametrize("torn", ["\0\0\0\n", '{"step": 2\n', "[1, 2]\n", '{"step": "2", "time": 1}\n', "\n"])
def test_what_is_no_line_is_passed_over(tmp_path: Path, torn: str) -> None:
    good = '{"step": %d, "time": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(good % 1 + torn + good % 3)
    assert steps(Lines(), tmp_path) == [1, 3]


def test_numbers_of_a_line() -> None:
    line = {"time": 1.0, "step": 3, "loss": 0.5, "epoch": 1, "flag": True, "by": "reward", "none": None}
    assert numbers(line) == {"loss": 0.5, "epoch": 1.0}
    assert numbers({"model": "sft", "step": 0, "loss": 0.5}) == {"sft/loss": 0.5}


def test_a_config_as_parameters() -> None:
    config = {
        "train": {"beta": 0.1, "betas": [1, 2]},
        "data": [{"path": "a"}, {"path": "b"}],
        "kind": "dpo",
        "empty": [],
    }
    assert flat(config) == {
        "train.beta": 0.1, "train.betas": [1, 2], "data.0.path": "a", "data.1.path": "b", "kind": "dpo", "empty": [],
    }  # fmt: skip


def test_what_a_manifest_has_besides_its_curves(tmp_path: Path) -> None:
    Reporter(tmp_path).metrics(10, {"loss": 0.5})
    manifest = {"metrics": {"loss": 0.5, "first_loss": 2.0, "by": "words"}, "rows": 7, "tokens": None, "seconds": 3.0}
    point = summary(manifest, tmp_path)
    assert point is not None and point.step == 10
    assert point.values == {"first_loss": 2.0, "rows": 7.0, "seconds": 3.0}
    assert summary({}, tmp_path) is None


# ------------------------------------------------------------------------------------------------ TensorBoard


def test_a_board_is_begun_anew_by_each_process(tmp_path: Path) -> None:
    """No point twice, whatever was in the file when the last process was killed; another fingerprint's points go."""
    stage, folder = tmp_path / "stage", tmp_path / "tensorboard" / "sft"
    stage.mkdir()
    report = Reporter(stage)
    report.metrics(1, {"loss": 1.0})
    first = Board(folder, "a" * 64)
    assert not first.is_written()
    first.follow(stage)
    report.metrics(2, {"loss": 0.5})
    first.follow(stage)
    assert points(folder) == [(1, {"loss": 1.0}), (2, {"loss": 0.5})] and first.is_written()
    second = Board(folder, "a" * 64)  # of the next process
    report.rewind(1)
    second.follow(stage)
    report.metrics(2, {"loss": 0.5})
    second.follow(stage)
    second.close()
    assert points(folder) == [(1, {"loss": 1.0}), (2, {"loss": 0.5})]
    changed = Board(folder, "b" * 64)
    assert not changed.is_written()
    (stage / "metrics.jsonl").unlink()
    report.metrics(1, {"loss": 3.0})
    changed.follow(stage)
    assert points(folder) == [(1, {"loss": 3.0})]


# ------------------------------------------------------------------------------------------------ what is asked for


def plan_of(data: Path, model: str, folder: Path, train: dict[str, Any] | None = None, **head: Any) -> Any:
    sft = {"kind": "sft", "data": [{"path": str(data / "chats.jsonl")}], "train": train or {}}
    return make_plan(build_spec({"model": model, "storage": str(folder), "stages": {"sft": sft}} | head, folder=data))


def test_who_is_told_of_a_stage(data: Path, model: str, tmp_path: Path) -> None:
    def told(*arguments: Any, **head: Any) -> list[str]:
        plan = plan_of(data, model, tmp_path, *arguments, **head)
        return tracked(plan, plan["sft"]).trackers

    assert told() == ["tensorboard"]
    assert told(report_to="none") == []
    assert told(report_to=["tensorboard", "mlflow", "mlflow"]) == ["tensorboard", "mlflow"]
    assert told({"report_to": "wandb"}) == ["wandb"]
    assert told({"report_to": ["mlflow"]}, report_to="wandb") == ["mlflow"]
    assert told({"report_to": "none"}, report_to="wandb") == []
    plan = plan_of(data, model, tmp_path, {"learning_rate": 1e-3}, report_to=["wandb", "tensorboard"])
    assert remote({"sft": tracked(plan, plan["sft"])}) == ["wandb"]
    assert tracked(plan, plan["sft"]).config["train.learning_rate"] == 1e-3


def test_who_is_told_decides_no_fingerprint(data: Path, model: str, tmp_path: Path) -> None:
    plain, told = (
        plan_of(data, model, tmp_path),
        plan_of(data, model, tmp_path, {"report_to": "mlflow"}, report_to="wandb"),
    )
    assert plain["sft"].fingerprint == told["sft"].fingerprint


@pytest.mark.parametrize(
    ("train", "head", "path", "message"),
    [
        ({}, {"report_to": "tensorbord"}, "report_to", "did you mean tensorboard?"),
        (
            {},
            {"report_to": ["mlflow", "all"]},
            "report_to",
            "'all' is no tracker; there are tensorboard, mlflow, wandb",
        ),
        ({"report_to": "comet_ml"}, {}, "stages.sft.train.report_to", "'comet_ml' is no tracker"),
        ({"project": "x"}, {}, "stages.sft.train.project", "at the top of the spec"),
        ({"push_to_hub": True}, {}, "stages.sft.train.push_to_hub", "write it beside `train`: `push_to_hub: org/name`"),
        ({"hub_model_id": "a/b"}, {}, "stages.sft.train.hub_model_id", "`push_to_hub: org/name`"),
        ({}, {"tracking": {}}, "tracking", "unknown key"),
    ],
)
def test_what_is_refused(
    data: Path, model: str, tmp_path: Path, train: dict[str, Any], head: dict[str, Any], path: str, message: str
) -> None:
    with pytest.raises(SpecError) as error:
        plan_of(data, model, tmp_path, train, **head)
    assert {p.path: message in p.message for p in error.value.problems} == {path: True}


def test_a_stage_s_name_is_no_folder_of_the_trackers(data: Path, model: str) -> None:
    stages = {"tensorboard": {"kind": "sft", "data": [{"path": str(data / "chats.jsonl")}]}}
    with pytest.raises(SpecError, match="not a file of a run"):
        build_spec({"model": model, "stages": stages}, folder=data)


def test_the_trainer_itself_reports_to_nobody() -> None:
    """Each worker would make a run of its own."""
    assert train_config("SFTConfig").model_validate({"report_to": ["wandb"]}).given() == {"report_to": ["wandb"]}
    from stages.training.job import TrainerParts, TrainJob

    job = TrainJob("conversation", "m", Path("w"), [], {"report_to": ["wandb"], "learning_rate": 1e-3})
    parts = TrainerParts(job, None, None, None, on_cpu=True)
    parts.__dict__["kernels"] = type("K", (), {"precision": {}, "load_options": lambda self: {}})()
    given = parts.arguments(dict)
    assert given["report_to"] == "none" and given["learning_rate"] == 1e-3


def test_what_is_not_installed_is_told_before(
    data: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    plan = plan_of(data, model, tmp_path, report_to=["tensorboard", "mlflow", "wandb"])
    said = [(problem.path, problem.message) for problem in tracking_problems(plan)]
    assert said == [
        ("report_to", "mlflow is not installed: `pip install 'raylign[mlflow]'`"),
        ("report_to", "wandb is not installed: `pip install 'raylign[wandb]'`"),
    ]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (problem,) = tracking_problems(plan)
    assert "set MLFLOW_TRACKING_URI" in problem.message


def test_a_record_that_cannot_be_read_is_begun_anew(data: Path, model: str, tmp_path: Path) -> None:
    record = tmp_path / tracking.RECORD
    for text in ("", "{", "[]", '{"mlflow": 1}', '{"mlflow": {"stages": []}}'):
        record.write_text(text)
        assert read_record(record) == {}
    plan = plan_of(data, model, tmp_path, report_to="mlflow")
    assert lacks(plan.folder, plan, "mlflow", {"sft": tracked(plan, plan["sft"])})


# ------------------------------------------------------------------------------------------------ secrets


def test_secrets_stay_out_of_what_is_told() -> None:
    said = "401 for http://ann:s3cr3tword@host/api with key 0123456789abcdef"
    told = redacted(said, {"WANDB_API_KEY": "0123456789abcdef", "PATH": "with", "MY_TOKEN": "401"})
    assert told == "401 for http://host/api with key ***"


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("http://host:5000", ("http://host:5000", None, None)),
        ("https://ann:p%40ss@host/x", ("https://host/x", "ann", "p@ss")),
        ("databricks", ("databricks", None, None)),
        ("sqlite:////tmp/x.db", ("sqlite:////tmp/x.db", None, None)),
    ],
)
def test_an_address_without_its_credentials(address: str, parts: tuple[str, str | None, str | None]) -> None:
    assert without_credentials(address) == parts


def test_the_libraries_report_nothing_of_their_own() -> None:
    import stages.telemetry

    for name in ("MLFLOW_DISABLE_TELEMETRY", "WANDB_ERROR_REPORTING"):
        assert os.environ[name] == stages.telemetry.OFF[name]


def test_lines_are_json(tmp_path: Path) -> None:
    """What Python writes for NaN is read again, and drawn as a gap."""
    Reporter(tmp_path).metrics(1, {"loss": float("nan")})
    assert "NaN" in (tmp_path / "metrics.jsonl").read_text()
    (line,) = Lines().read(tmp_path)
    assert json.dumps(numbers(line)) == '{"loss": NaN}'
