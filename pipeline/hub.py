"""Publishing a model on the Hugging Face hub: `push_to_hub` of a stage, and `raylign push`.

What goes there is the stage's model folder and a card (model_card.py) as README.md, in one commit. The card is made for the
hub: the artifact in the run folder stays as it was checked and handed over. The token is that of the environment, or of
`hf auth login`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pipeline.artifacts import RunFolder, read_json, write_json
from pipeline.chat import choose_models
from pipeline.model_card import model_card
from pipeline.plan import Plan
from stages import Evaluate
from stages.data.hub import repository_problem
from stages.errors import DataError, Problem, StageError
from stages.storage import pull, push
from stages.training.architecture import HUB_TIMEOUT

PUSHED = "pushed.json"  # by stage, what of it is on the hub
CARD = "README.md"
# What an earlier push may have left, and from_pretrained would load in the place of, or on top of, what is pushed now.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", "adapter_config.json")


@dataclass(frozen=True)
class Upload:
    """What goes to a repository. `files`: by their names there, without the card."""

    stage: str
    repository: str
    private: bool | None
    files: dict[str, Path]
    card: str
    message: str

    @property
    def identity(self) -> dict[str, str]:
        """What tells it from another push of the same stage."""
        return {
            "repository": self.repository,
            "message": self.message,
            "card": hashlib.sha256(self.card.encode()).hexdigest(),
        }


def upload_of(folder: RunFolder, stage: str, repository: str, private: bool | None) -> Upload:
    """What would be pushed of a published stage.

    Raises:
        DataError: the stage has no model, or its folder holds links, which could lead to any file of this machine.
    """
    manifest = folder.manifest(stage)
    if manifest is None or manifest["produces"] not in ("model", "reward model"):
        raise DataError(f"{stage}: no model of that name is published in {folder.address}")
    model = pull(folder.stage(stage) / "model")
    paths = sorted(path for path in model.rglob("*") if not path.is_dir())
    if not paths:
        raise DataError(f"{model}: there is nothing in it")
    if link := next((path for path in (model, *model.rglob("*")) if path.is_symlink()), None):
        raise DataError(f"{link}: a link; only files are pushed")
    files = {path.relative_to(model).as_posix(): path for path in paths}
    files.pop(CARD, None)
    message = f"{folder.path.name}: {stage}, {manifest['fingerprint']}"
    return Upload(stage, repository, private, files, model_card(folder, stage, repository), message)


def account_problem(repository: str, private: bool | None) -> str | None:
    """Why the hub will not take a push; None where it will, as far as can be known without writing there."""
    from huggingface_hub import HfApi, constants, get_session, get_token
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    if problem := repository_problem(repository):
        return problem
    token = get_token()
    if not token:
        return "the hub wants a token: set HF_TOKEN, or run `hf auth login`"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        asked = get_session().get(
            f"{constants.ENDPOINT}/api/whoami-v2", headers=build_hf_headers(token=token), timeout=HUB_TIMEOUT
        )
        hf_raise_for_status(asked)
        if problem := _rights_problem(asked.json(), repository):
            return problem
        there = HfApi().model_info(repository, timeout=HUB_TIMEOUT)
    except RepositoryNotFoundError:
        return None  # it will be made
    except Exception as error:  # of the network and the hub: of a dozen classes
        return _said(error)
    if private and not there.private:
        return f"{repository} is there and public, and a private one is wanted; make it private on the hub, or name another"
    return None


def _rights_problem(who: dict[str, Any], repository: str) -> str | None:
    """What whoami-v2 says against writing. Of a fine-grained token it does not say enough."""
    role = ((who.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        return "the token may only read; make one that may write, https://huggingface.co/settings/tokens"
    owner, user = repository.split("/")[0], who.get("name", "")
    roles = {org.get("name"): org.get("roleInOrg") for org in who.get("orgs") or []}
    if role == "fineGrained" or owner == user:
        return None
    if owner not in roles:
        return f"{user}, whose token this is, is not {owner} and not a member of it"
    return f"{user}, whose token this is, may only read in {owner}" if roles[owner] == "read" else None


def _said(error: Exception) -> str:
    """What the hub says, in a line."""
    code = getattr(getattr(error, "response", None), "status_code", None)
    lines = [
        line.strip() for line in (getattr(error, "server_message", None) or str(error)).splitlines() if line.strip()
    ]
    what = lines[0] if lines else type(error).__name__
    if code == 401:
        return f"the hub does not take the token ({what}); set HF_TOKEN, or run `hf auth login`"
    if code == 403:
        return f"the token may not write there ({what})"
    return f"the hub does not take it: {code} {what}" if code else f"the hub cannot be reached ({what})"


def send(upload: Upload) -> str:
    """Push it; the address of the commit.

    Raises:
        StageError: the hub does not take it. What was uploaded so far is not sent again by another try.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi()
    try:
        api.create_repo(upload.repository, private=upload.private, exist_ok=True)
        if upload.private and not api.model_info(upload.repository, timeout=HUB_TIMEOUT).private:
            raise StageError("it is there and public, and a private one is wanted")
        there = api.list_repo_files(upload.repository)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(CARD, upload.card.encode()),
            *(CommitOperationAdd(name, path) for name, path in upload.files.items()),
            *(CommitOperationDelete(name) for name in stale(there, upload)),
        ]
        return api.create_commit(upload.repository, operations, commit_message=upload.message).commit_url
    except StageError:
        raise
    except Exception as error:  # as above
        raise StageError(_said(error)) from error


def stale(there: list[str], upload: Upload) -> Iterator[str]:
    """Weights in the repository that are not the model's."""
    for name in there:
        if name not in upload.files and any(fnmatch(name, pattern) for pattern in WEIGHTS):
            yield name


# ------------------------------------------------------------------------------------------------ of a run


def push_problems(plan: Plan) -> list[Problem]:
    """What keeps the stages with `push_to_hub` from being pushed, as far as it can be known before the run."""
    found = []
    for name, repository, private in _wanted(plan):
        told = _pushed(plan.folder).get(name, {})
        if plan[name].state == "cached" and told.get("repository") == repository:
            continue  # it is there, and its card is looked at when all gates are judged
        if problem := account_problem(repository, private):
            found.append(Problem(f"stages.{name}.push_to_hub", problem))
    return found


def _wanted(plan: Plan) -> Iterator[tuple[str, str, bool | None]]:
    for planned in plan.stages:
        if repository := getattr(planned.stage, "push_to_hub", None):
            yield planned.name, repository, getattr(planned.stage, "hub_private_repo", None)


def _pushed(folder: RunFolder) -> dict[str, dict[str, Any]]:
    return read_json(pull(folder.path / PUSHED)) or {}


def remember(folder: RunFolder, upload: Upload, url: str) -> None:
    write_json(folder.path / PUSHED, _pushed(folder) | {upload.stage: {**upload.identity, "url": url}})
    push(folder.path / PUSHED)


def push_stages(plan: Plan, records: dict[str, dict[str, Any]], say: Callable[[str], None]) -> dict[str, str]:
    """Push what the spec wants pushed, at the end of a run; stage -> why it could not be.

    Args:
        records: of the stages, as in run.json.
    """
    failed = {}
    for name, repository, private in _wanted(plan):
        if records[name]["state"] not in ("done", "cached"):
            continue  # it has failed, or another has that it needs: told already
        if held_back := gate_problem(plan, name, records):
            say(f"{name}: not pushed to {repository}: {held_back}")
            continue
        try:
            upload = upload_of(plan.folder, name, repository, private)
            told = _pushed(plan.folder).get(name, {})
            if {key: told.get(key) for key in upload.identity} == upload.identity:
                continue
            say(f"{name}: is pushed to {repository}")
            url = send(upload)
        except (DataError, StageError) as error:
            failed[name] = (
                f"stage {name} is done, and could not be pushed to {repository}: {error}\n  run the same command again, or "
                f"`raylign push {plan.folder.address} --stage {name} --to {repository}`"
            )
            continue
        remember(plan.folder, upload, url)
        say(f"{name}: pushed, {url}")
    return failed


def gate_problem(plan: Plan, name: str, records: dict[str, dict[str, Any]]) -> str | None:
    """Why the gates of a stage's model do not let it out: one does not hold, or could not be judged."""
    for judge in plan.stages:
        gates = judge.stage.gates if isinstance(judge.stage, Evaluate) else []
        mine = [of_stage(gate.of, judge.inputs.get("models", []), name) for gate in gates]
        if not any(mine):
            continue
        verdicts = records[judge.name].get("gates") or []
        if len(verdicts) != len(gates):
            return f"{judge.name}, which has gates for it, has not judged it"
        for verdict, counts in zip(verdicts, mine, strict=True):
            if counts and not verdict["holds"]:
                return f"gate not met: {verdict['says']}"
    return None


def of_stage(of: str | None, models: list[str], name: str) -> bool:
    """Whether a gate is about a stage's model: that which it names, or any of the evaluation's where it names none."""
    return of == f"stages.{name}" or (of is None and f"stages.{name}" in models)


# ------------------------------------------------------------------------------------------------ `raylign push`


def push_by_hand(run: str, stage: str | None, repository: str, private: bool | None, dry_run: bool) -> Iterator[str]:
    """Push a model of a run, whatever its gates say: the card says it too. Yields what the user is told.

    Raises:
        DataError: there is no such model, or the hub will not take it.
    """
    folder = RunFolder.open(run)
    name = stage or next(iter(choose_models(folder, [])))
    if problem := repository_problem(repository):
        raise DataError(f"--to {repository}: {problem}")
    upload = upload_of(folder, name, repository, private)
    if dry_run:
        sizes = {CARD: len(upload.card.encode())} | {each: path.stat().st_size for each, path in upload.files.items()}
        yield f"would be pushed to {repository}, of {folder.address}, stage {name}:"
        yield from (f"  {size:>14,}  {each}" for each, size in sizes.items())
        yield f"  {sum(sizes.values()):>14,}  bytes in all\n\n{CARD}:\n\n{upload.card}"
        return
    if problem := account_problem(repository, private):
        raise DataError(f"--to {repository}: {problem}")
    yield f"{name}: is pushed to {repository}"
    url = send(upload)
    remember(folder, upload, url)
    yield f"{name}: pushed, {url}"
