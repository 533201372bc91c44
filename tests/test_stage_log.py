"""The lines of a log that matter, among those that do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.stage_log import telling_lines

LOG = """\
[2026-01-01 00:00:00,000] [INFO] [real_accelerator.py:260:get_accelerator] Setting ds_accelerator to cpu
FutureWarning: `x` is deprecated: use y
Loading weights: 100%|##########| 75/75
(RayTrainWorker pid=4242) Traceback (most recent call last):
(RayTrainWorker pid=4242)   File "train.py", line 3, in <module>
(RayTrainWorker pid=4242)     raise ValueError("no")
(RayTrainWorker pid=4242, ip=10.0.0.2) torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB
RuntimeError: [gloo/tcp/pair.cc:537] Read error: Connection reset by peer.
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB
the worker was killed by the kernel
"""


def test_errors_are_found_once_and_without_their_tracebacks(tmp_path: Path) -> None:
    log = tmp_path / "sft.log"
    log.write_text("ValueError: of an earlier attempt\n")
    since = log.stat().st_size
    with log.open("a") as file:
        file.write(LOG)
    assert telling_lines(log, since) == [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "the worker was killed by the kernel",
    ]
    assert telling_lines(log)[0] == "ValueError: of an earlier attempt"
    assert telling_lines(log, since, most=1) == ["the worker was killed by the kernel"]


def test_a_log_that_says_nothing_or_is_not_there(tmp_path: Path) -> None:
    assert telling_lines(tmp_path / "none.log") == []
    (tmp_path / "quiet.log").write_bytes(b"all is well\n\xff\xfe")
    assert telling_lines(tmp_path / "quiet.log") == []


def test_what_raylets_say_is_in_the_logs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray tells every driver; workers' own lines, in a notebook that has them printed, stay."""
    from ray._private import worker

    from pipeline.cluster import _quiet

    printed: list[str] = []
    monkeypatch.setattr(worker, "print_to_stdstream", lambda data, ignore_prefix: printed.extend(data["lines"]))
    _quiet()
    _quiet()
    worker.print_to_stdstream({"lines": ["8 PYTHON worker processes have been started"], "pid": "raylet"}, False)
    worker.print_to_stdstream({"lines": ["of a task"], "pid": "417"}, False)
    assert printed == ["of a task"]
