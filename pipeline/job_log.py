"""The log of a Ray job, followed to its end."""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import aclosing
from typing import Any

from stages.errors import RaylignError

QUIET_S = 60.0  # without a line for so long, the job is asked whether it lives: a cut connection says nothing by itself
PATIENCE_S = 600.0  # how long a cluster that does not answer is asked again


class Once:
    """Prints a log that is read from its beginning again and again: each character once."""

    def __init__(self) -> None:
        self.printed = self.read = 0

    def rewind(self) -> None:
        self.read = 0

    def write(self, text: str) -> None:
        new = text[max(0, self.printed - self.read) :]
        self.read += len(text)
        self.printed = max(self.printed, self.read)
        sys.stdout.write(new)
        sys.stdout.flush()


def follow(client: Any, job: str) -> Any:
    """Print a job's log until it ends, over as many connections as that takes, and return what Ray knows of it then.

    Raises:
        RaylignError: nobody has answered for PATIENCE_S, or the cluster does not know the job any more.
    """
    log, answered = Once(), time.monotonic()
    while True:
        try:
            asyncio.run(_tail(client, job, log))
            info = client.get_job_info(job)
            log.rewind()
            log.write(client.get_job_logs(job))  # what the connection did not bring, if it was cut or came too early
            if info.status.is_terminal():
                return info
            answered = time.monotonic()
        except (OSError, RuntimeError) as error:
            if "status code 404" in str(error):
                what = "is not known any more (was the head started again?); the same command submits it anew"
                raise RaylignError(f"the job {job} {what}") from error
            if time.monotonic() - answered > PATIENCE_S:
                what = f"no answer for {PATIENCE_S:.0f} s; the same command follows the job {job}"
                raise RaylignError(what) from error
        time.sleep(1)


async def _tail(client: Any, job: str, log: Once) -> None:
    """Print what one connection brings, until it ends: with the job, or because something between here and there cut it."""
    import aiohttp

    log.rewind()
    async with aclosing(client.tail_job_logs(job)) as chunks:
        while True:
            try:
                log.write(await asyncio.wait_for(anext(chunks), QUIET_S))
            except (StopAsyncIteration, TimeoutError, aiohttp.ClientError, RuntimeError):
                return
