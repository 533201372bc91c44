"""Whether nodes see the run folder. One that does not is refused in tests/integration/test_nodes.py, on hosts of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.cluster import check_shared


@pytest.mark.usefixtures("ray_address")
def test_a_node_that_is_lost_while_it_is_asked_is_no_error(tmp_path: Path) -> None:
    """What runs there deals with the loss; found by tests/chaos (`node`, struck as the workers' places were checked)."""
    gone = "e1" * 28
    check_shared(tmp_path / "runs", [gone])
    assert list((tmp_path / "runs").iterdir()) == []
