"""`hf://`: datasets of the Hugging Face hub, or of a folder, streamed by `datasets`; a shard of it is read as a file is."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from stages.data.files import BUFFER, DataFile, short
from stages.errors import DataError

SCHEME = "hf://"
COMMIT = re.compile(r"[0-9a-f]{40}")
PIN = "pin `revision:` to a commit, or check the network"


def repository_problem(name: str) -> str | None:
    """What is wrong with the name of a repository that is to be written to."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return str(error)
    return None if "/" in name else f"{name!r} is wanted with its owner: `org/name`, or `user/name`"


def shards(path: str, name: str | None, split: str, revision: str | None) -> list[DataFile]:
    """The shards of a split, of the very revision that is there now.

    Raises:
        DataError: no such dataset, configuration or split, or it cannot be reached.
    """
    target = path.removeprefix(SCHEME)
    if Path(target).is_dir():
        if revision is not None:
            raise DataError(f"{path}: a folder has no `revision`")
    elif target.startswith((".", "/", "~")):
        raise DataError(f"{path}: no such folder")
    else:
        revision = _commit(target, revision)
    dataset = (target, name, split, revision)
    count = _load(dataset).num_shards
    return [DataFile(f"{path}[{split}]#{i}", "hf", dataset=dataset, shard=i, shards=count) for i in range(count)]


def _commit(repository: str, revision: str | None) -> str:
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    try:
        sha = HfApi().dataset_info(repository, revision=revision).sha
    except Exception as error:  # of the network and the hub: of a dozen classes, some of requests, some of httpx
        raise DataError(f"{SCHEME}{repository}: cannot be looked up on the hub: {short(error)}; {PIN}") from error
    if sha is None:
        raise DataError(f"{SCHEME}{repository}: the hub names no commit; {PIN}")
    return sha


def _load(dataset: tuple[str, str | None, str, str | None]) -> Any:
    from datasets import load_dataset

    path, name, split, revision = dataset
    try:
        return load_dataset(path, name, split=split, revision=revision, streaming=True)
    except Exception as error:  # as above, and of the dataset's own files
        raise DataError(f"{SCHEME}{path}: cannot be opened: {short(error)}") from error


def stream(file: DataFile) -> Iterator[dict[str, Any]]:
    """The rows of a shard.

    Raises:
        ValueError: the shard's files are damaged from here on.
        DataError: they cannot be reached.
    """
    assert file.dataset is not None
    try:
        yield from _load(file.dataset).shard(num_shards=file.shards, index=file.shard)
    except (ValueError, DataError):
        raise
    except Exception as error:
        raise DataError(f"{file.path}: cannot be read: {short(error)}") from error


def known_rows(file: DataFile) -> int | None:
    """Rows of the whole split, where the dataset says so without being read."""
    assert file.dataset is not None
    splits = _load(file.dataset).info.splits or {}
    info = splits.get(file.dataset[2])
    return (info.num_examples if info else None) or None


def is_local(file: DataFile) -> bool:
    return file.dataset is not None and file.dataset[3] is None


def content_hash(file: DataFile) -> str:
    """The commit of a hub's dataset, or the bytes of a folder's files; and which part of it this is."""
    assert file.dataset is not None
    path, name, split, revision = file.dataset
    identity = revision or _folder_hash(tuple((p, p.stat().st_size, p.stat().st_mtime_ns) for p in _files(Path(path))))
    key = f"{path if revision else ''} {name} {split} {identity} {file.shard}/{file.shards}"
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


def _files(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.relative_to(folder).parts[0].startswith(".")]


@lru_cache(maxsize=16)
def _folder_hash(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Of the bytes; the sizes and dates are there to be told apart by the cache."""
    hashed = hashlib.blake2b(digest_size=16)
    for path, size, _ in files:
        hashed.update(f"{path.name} {size} ".encode())
        with path.open("rb") as data:
            while block := data.read(BUFFER):
                hashed.update(block)
    return hashed.hexdigest()
