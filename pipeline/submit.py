"""`raylign submit`: a spec as a Ray job, which runs `python -m pipeline run SPEC` as it would by hand.

What goes along is the present folder and the environment variables that are named, nothing else. The job's id comes from the
run (its storage and name), so one command submits it, follows it while it runs, and submits it again once it has ended: the run
then goes on where it stopped.
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.job_log import follow
from pipeline.spec import Spec
from pipeline.spec_reader import load_spec
from stages.errors import Problem, RaylignError, SpecError

# Folders that stay here, wherever they lie; besides what git ignores.
STAYS = ("runs", ".git", ".venv", "venv", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache")
WILD = re.compile(r"[*?\[\]\\]")  # what a pattern gives a meaning of its own
DIGEST = "raylign_digest"  # in the job's metadata: of the spec's text and the command
START_S = 120.0  # how long a head that has just been started may say that it takes no jobs yet


def submit_spec(
    spec: Path, address: str, overrides: Sequence[str] = (), env: Sequence[str] = (), wait: bool = True
) -> int:
    """Submit a spec from the present folder, follow its log, and return the run's exit code (130: the job was stopped).

    Args:
        address: of the cluster's dashboard, `http://head:8265`.
        overrides: `dotted.path=value` strings of `--set`.
        env: names of environment variables to send along. Their values go to Ray alone.
        wait: follow the job to its end.

    Raises:
        SpecError: the spec is wrong, needs what does not travel, or an environment variable is not set.
        RaylignError: the cluster cannot be reached, refuses the job, or runs it now with another text of the spec.
    """
    file = _shipped(spec)
    read = load_spec(file, overrides, within=Path.cwd())
    named = named_paths(read)
    if problems := _problems(read, named, env):
        raise SpecError(problems, str(file))
    command = ["python", "-m", "pipeline", "run", str(file), *(a for o in overrides for a in ("--set", o))]
    digest = hashlib.sha256(shlex.join(command).encode() + file.read_bytes()).hexdigest()
    with _explained(address):
        client = _connect(address)
        job, runs = job_id(client.list_jobs(), stem(read), digest)
        if not runs:
            _send(
                client,
                entrypoint=shlex.join(command),
                submission_id=job,
                metadata={DIGEST: digest},
                runtime_env={
                    "working_dir": ".",
                    "excludes": excludes(named),
                    "env_vars": {name: os.environ[name] for name in env},
                },
            )
        print(f"job {job} {'runs already' if runs else 'submitted'}: {address}", flush=True)
        hint = f"the same command follows it, `ray job stop {job} --address {address}` ends it"
        if not wait:
            print(hint)
            return 0
        try:
            return _end(follow(client, job), job)
        except KeyboardInterrupt:
            print(f"\nthe job goes on; {hint}", file=sys.stderr)
            return 130


# ------------------------------------------------------------------------------------------------ what travels


def _shipped(spec: Path) -> Path:
    """The spec relative to the present folder, which is what the job is run in."""
    here = Path.cwd()
    if not spec.absolute().is_relative_to(here) or ".." in spec.parts:
        raise SpecError(
            [Problem("", f"{spec} is not in the present folder, which is what travels; submit from its own")]
        )
    return spec.absolute().relative_to(here)


def named_paths(spec: Spec) -> list[Path]:
    """What a spec names of the present folder (data, models, templates, ...), relative to it. Of data, it may be a glob."""

    def strings(node: Any) -> Iterator[str]:
        if isinstance(node, str):
            yield node
        elif isinstance(node, dict | list):
            for child in node.values() if isinstance(node, dict) else node:
                yield from strings(child)

    here = Path.cwd()
    paths = [Path(os.path.normpath(s)) for s in strings(spec.as_yaml()["stages"]) if s.startswith("/")]
    paths += [Path(os.path.normpath(s)) for s in (spec.model, spec.chat_template or "") if s.startswith("/")]
    return list(dict.fromkeys(path.relative_to(here) for path in paths if path.is_relative_to(here)))


def _problems(spec: Spec, named: Sequence[Path], env: Sequence[str]) -> list[Problem]:
    """What cannot work on a cluster."""
    found = []
    if Path(spec.storage).is_relative_to(Path.cwd()):
        what = "travels with the job and is gone after it; name an object store (s3://bucket/runs) or a shared folder"
        found.append(Problem("storage", f"{spec.storage} {what}"))
    for path in named:
        if stays := next((part for part in path.parts if part in STAYS), None):
            found.append(Problem("", f"{path}: {stays}/ does not travel with the job; put it elsewhere"))
    if missing := [name for name in env if name not in os.environ]:
        found.append(Problem("--env", f"not set: {', '.join(missing)}"))
    return found


def excludes(named: Sequence[Path]) -> list[str]:
    """What Ray is to leave here, as patterns. Ray reads .gitignore too, unless told not to, but knows no exceptions."""
    ignored = ignored_by_git(named)
    if ignored is not None:
        os.environ["RAY_RUNTIME_ENV_IGNORE_GITIGNORE"] = "1"
    return [f"{name}/" for name in STAYS] + (ignored or [])


def ignored_by_git(named: Sequence[Path]) -> list[str] | None:
    """What git ignores of the present folder, as patterns for Ray; but what the spec names (generated data, say) is to travel.

    None where git has nothing to say.
    """
    if shutil.which("git") is None:
        return None
    listed = subprocess.run(
        ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "--directory", "-z"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    ignored = [path for path in listed.stdout.split("\0") if path and not any(_meet(path, name) for name in named)]
    return ["/" + WILD.sub(r"\\\g<0>", path) for path in ignored] if listed.returncode == 0 else None


def _meet(ignored: str, named: Path) -> bool:
    one = Path(ignored)
    return one.is_relative_to(named) or named.is_relative_to(one) or fnmatch.fnmatch(str(one), str(named))


# ------------------------------------------------------------------------------------------------ the job


def stem(spec: Spec) -> str:
    """What the ids of a run's jobs begin with: of the run folder, which only one of them may write at a time."""
    where = hashlib.sha256(f"{spec.storage}\0{spec.name}".encode()).hexdigest()[:8]
    return f"raylign-{re.sub('[^A-Za-z0-9._-]', '-', spec.name)}-{where}"


def job_id(jobs: Sequence[Any], begins: str, digest: str) -> tuple[str, bool]:
    """The id for a submission, and whether that very job runs now. Ids are numbered: Ray takes each only once.

    Raises:
        RaylignError: the run has a job now, with another spec or other overrides.
    """
    known = {job.submission_id: job for job in jobs}
    number = 1
    while (job := known.get(f"{begins}-{number}")) is not None:
        if not job.status.is_terminal():
            if (job.metadata or {}).get(DIGEST) != digest:
                what = "runs now with another spec or other overrides; wait for its end, or end it with `ray job stop`"
                raise RaylignError(f"the job {begins}-{number} {what}")
            return f"{begins}-{number}", True
        number += 1
    return f"{begins}-{number}", False


def _connect(address: str) -> Any:
    """A client of the cluster's job server. Ray lets the environment win over the address that is given: it is put there."""
    os.environ["RAY_API_SERVER_ADDRESS"] = address if "://" in address else f"http://{address}"
    from ray.dashboard.modules import dashboard_sdk
    from ray.dashboard.modules.job import sdk

    # Otherwise every file that is packed is told, and every connection that is lost.
    for logger in (logging.getLogger("ray"), sdk.logger, dashboard_sdk.logger):
        logger.setLevel(logging.ERROR)
    return sdk.JobSubmissionClient(address)


def _send(client: Any, **job: Any) -> None:
    """Submit a job."""
    until = time.monotonic() + START_S
    while True:
        try:
            client.submit_job(**job)
            return
        except RuntimeError as error:
            if "try again later" not in str(error) or time.monotonic() > until:
                raise
        time.sleep(1)


@contextmanager
def _explained(address: str) -> Iterator[None]:
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        refused = error.message.startswith("Authentication failed")
        what = "refuses the token that was sent" if refused else "wants a token, and none was sent"
        how = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN; `ray get-auth-token` on the head prints it"
        raise RaylignError(f"{address}: the cluster {what}: {how} (cluster_configs/README.md)") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise RaylignError(f"{address}: {(str(error) or type(error).__name__).splitlines()[0]}") from error


def _end(info: Any, job: str) -> int:
    """Tell how the job ended, as the run's own exit code."""
    print(f"job {job}: {info.status.value.lower()}")
    if info.driver_exit_code is None and info.status.value == "FAILED":  # it never ran: its message is all there is
        print("\n".join((info.message or "").strip().splitlines()[:6]), file=sys.stderr)
    if info.status.value == "STOPPED":
        return 130
    return 0 if info.status.value == "SUCCEEDED" else info.driver_exit_code or 1
