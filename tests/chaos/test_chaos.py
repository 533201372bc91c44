"""A seeded set of the chaos suite: each fault once. `python -m tests.chaos.chaos` runs as many as one likes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from .chaos import FAULTS, OWN_DISK, disturbed, run_undisturbed

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_undisturbed(folder)
    return folder


def can_mount(folder: Path) -> bool:
    try:
        done = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True)
    except FileNotFoundError:
        return False
    return done.returncode == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_ends_with_the_models_of_an_undisturbed_one(fault: str, undisturbed: Path, tmp_path: Path) -> None:
    if fault in OWN_DISK and not can_mount(tmp_path):
        pytest.skip("this machine allows no mounts: a disk of its own cannot be made")
    print(disturbed(fault, 1, undisturbed))
