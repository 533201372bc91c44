"""Notices of spot nodes, as the clouds give them; what is done at one is in tests/integration/test_spot.py."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPException

import pytest

from stages import spot

from .metadata import Metadata, metadata


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metadata]:
    with metadata() as made:
        monkeypatch.setenv(spot.METADATA, made.address)
        yield made


def test_the_time_of_aws() -> None:
    now = 1_505_722_800.0  # 2017-09-18 08:20:00 UTC
    assert spot.seconds_until("2017-09-18T08:22:00Z", now) == 120
    assert spot.seconds_until("2017-09-18T08:22:00Z", now + 30.5) == 89
    assert spot.seconds_until("2017-09-18T08:22:00Z", now + 200) == 0, "what is past is now"


@pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
def test_aws(service: Metadata, action: str) -> None:
    assert spot.aws() is None, "and a recommendation to rebalance is none"
    then = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 120))
    service.action = f'{{"action": "{action}", "time": "{then}"}}'
    assert 115 <= (spot.aws() or 0) <= 120
    assert service.asked == ["PUT /latest/api/token", "GET /latest/meta-data/spot/instance-action"] * 2


def test_google_cloud(service: Metadata) -> None:
    assert spot.gcp() is None
    service.preempted = "TRUE\n"
    assert spot.gcp() == 30


@pytest.mark.parametrize("cloud", spot.CLOUDS)
def test_a_service_that_refuses_or_is_not_there_is_told(
    service: Metadata, cloud: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.failing = 503
    with pytest.raises(OSError, match=r"/.*: 503 Service Unavailable"):
        spot.CLOUDS[cloud]()
    monkeypatch.setenv(spot.METADATA, "127.0.0.1:9")
    with pytest.raises((OSError, HTTPException)):
        spot.CLOUDS[cloud]()


def test_where_ray_is_not_it_says_so_and_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stages.spot", "aws", "--node", "no such"], capture_output=True, text=True,
        env=os.environ | {spot.METADATA: "127.0.0.1:9"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "0 nodes of Ray are on this machine by that id, not one\n"
