"""Where runs lie: a folder that every node sees, or an object store (`s3://`, `gs://`) with a mirror of it on each node.

All code works on local paths. Of an object store these are paths under a mirror root, the same on every node: `pull` brings a
file or folder of the store to this node, `push` takes it there, `remove` removes it there. On a folder all three do nothing.
Files of the store are told apart by size and date, which a mirrored file has too, so nothing is fetched twice and nothing old
is taken for new.

Which store it is, is told to every process of a run by the environment (`RAYLIGN_STORAGE`); `RAYLIGN_CACHE` is the folder of
mirrors on each node. Only pyarrow.fs is needed (stages/data/files.py says where credentials come from).
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import tempfile
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock
from pyarrow import fs

from stages.data.files import inside, short, split_address, store_of
from stages.errors import StageError

STORAGE, CACHE = "RAYLIGN_STORAGE", "RAYLIGN_CACHE"
AT_ONCE = 8  # files on their way
BLOCK = 8 << 20
AHEAD = 8  # blocks of a file that are given to the store before it has taken them
# Files that are one node's own: locks, and what is being written.
OWN = (".lock", ".pull-", ".tmp", ".sending")


_blocks = 0


def count_block() -> None:
    """A block of a file has been sent, fetched or written."""
    global _blocks
    _blocks += 1  # threads may lose one to each other: it is enough that the number changes


def blocks() -> int:
    """Blocks of files that this process has sent, fetched or written: while the number grows, it does not hang."""
    return _blocks


def _copy(source: Any, out: Any) -> None:
    """Copy a file by blocks. To S3 pyarrow sends in the background: were it not waited for, the whole file would be in memory,
    and blocks counted that are not sent."""
    written = 0
    while block := source.read(BLOCK):
        out.write(block)
        written += 1
        if written % AHEAD == 0:
            out.flush()
        count_block()


def is_remote(storage: str) -> bool:
    return "://" in storage and not storage.startswith("file://")


def use(storage: str) -> Path:
    """Have this process, and those it starts, keep runs there. The local folder of it.

    Raises:
        StageError: the store cannot be reached, or may not be written to.
    """
    if not is_remote(storage):
        os.environ.pop(STORAGE, None)
        return Path(storage.removeprefix("file://"))
    opened = _store_at(storage)
    os.environ[STORAGE] = storage
    return opened.root


def environment() -> dict[str, str]:
    """What processes elsewhere have to be told."""
    return {name: os.environ[name] for name in (STORAGE, CACHE) if name in os.environ} if _given() else {}


def _given() -> str | None:
    return os.environ.get(STORAGE)


class _Store:
    """An object store and its mirror on this node."""

    def __init__(self, storage: str, cache: str) -> None:
        base, path, query = split_address(storage)
        self.fs, self.base = store_of(base + query), inside(base, path)
        self.address, self.options = base + path.strip("/"), query
        name = PurePosixPath(self.base).name
        self.root = Path(cache) / f"{name}-{hashlib.sha256(self.base.encode()).hexdigest()[:12]}"

    def key(self, path: Path) -> str | None:
        """Where a path of the mirror lies in the store."""
        try:
            return f"{self.base}/{path.relative_to(self.root).as_posix()}".removesuffix("/.")
        except ValueError:
            return None

    def path(self, key: str) -> Path:
        part = key[len(self.base) :].strip("/")
        if ".." in part.split("/"):  # a store's names are any text
            raise OSError(f"{key}: a name that leads out of its folder")
        return self.root / part

    def files(self, key: str) -> dict[str, fs.FileInfo]:
        """The file of that name, or all files of the folder."""
        info = self.fs.get_file_info(key)
        if info.type == fs.FileType.File:
            return {key: info}
        if info.type == fs.FileType.NotFound:
            return {}
        found = self.fs.get_file_info(fs.FileSelector(key, recursive=True, allow_not_found=True))
        return {info.path: info for info in found if info.type == fs.FileType.File}

    def fetch(self, key: str, info: fs.FileInfo, target: Path) -> None:
        if _same(target, info):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        with self.fs.open_input_stream(key) as source, temporary.open("wb") as out:
            _copy(source, out)
        if temporary.stat().st_size != info.size:
            raise OSError(f"{temporary.stat().st_size} bytes of {info.size} came")
        os.utime(temporary, ns=(info.mtime_ns, info.mtime_ns))
        os.replace(temporary, target)

    def send(self, source: Path, key: str) -> None:
        if isinstance(self.fs, fs.SubTreeFileSystem | fs.LocalFileSystem):
            self.fs.create_dir(PurePosixPath(key).parent.as_posix(), recursive=True)
        with source.open("rb") as data, self.fs.open_output_stream(key) as out:
            _copy(data, out)
        info = self.fs.get_file_info(key)
        os.utime(source, ns=(info.mtime_ns, info.mtime_ns))


@lru_cache(maxsize=4)
def _open(storage: str, cache: str) -> _Store:
    with _told(storage):
        return _Store(storage, cache)


def _store() -> _Store:
    storage = _given()
    assert storage is not None
    return _store_at(storage)


def _store_at(storage: str) -> _Store:
    return _open(storage, os.environ.get(CACHE) or _default_cache(tempfile.gettempdir()))


@lru_cache
def _default_cache(folder: str) -> str:
    """Where all users of a machine may write: a folder that another has made first, or a link, is not taken."""
    own = Path(folder) / "raylign"
    own.mkdir(mode=0o700, exist_ok=True)
    if own.is_symlink() or own.stat().st_uid != os.getuid():
        raise StageError(f"{own} belongs to somebody else; set {CACHE} to a folder of yours, the same on every node")
    return str(own)


def _key(path: Path) -> str | None:
    """Where a path lies in the store; None where there is none, or the path is not of its mirror."""
    return None if _given() is None else _store().key(path)


def mirrored(path: Path) -> bool:
    """Whether a path is a node's own copy of what lies in an object store."""
    return _key(path) is not None


def address(path: Path) -> str:
    """Where a path lies, as a user writes it in `path`, and is told of it."""
    key = _key(path)
    return str(path) if key is None else f"{_store().address}{key[len(_store().base) :]}{_store().options}"


@contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StageError(f"{what}: {short(error)}") from error


def pull(path: Path, *, only: str | None = None, without: Collection[str] = ()) -> Path:
    """The path, with what the store has there on this node.

    Args:
        only: of a folder the files whose path in it matches (`*` matches a `/` too); all others in absence.
        without: names of files and folders in it that are left out.

    Raises:
        StageError: the store does not give it.
    """
    key = _key(path)
    if key is None:
        return path
    store = _store()
    with _told(address(path)):
        wanted = {k: i for k, i in store.files(key).items() if not _below(k[len(key) :], without)}
        if only is not None:
            wanted = {k: i for k, i in wanted.items() if fnmatch.fnmatchcase(k[len(key) :].strip("/"), only)}
        if all(_same(store.path(k), info) for k, info in wanted.items()):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        # Of a node's processes one fetches.
        with FileLock(path.with_name(f".pull-{path.name}.lock")), ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda item: store.fetch(item[0], item[1], store.path(item[0])), wanted.items()))
    return path


def _below(name: str, names: Collection[str]) -> bool:
    return bool(set(names) & set(PurePosixPath(name).parts))


def push(
    path: Path, *, last: str | None = None, only: Collection[str] | None = None, without: Collection[str] = ()
) -> None:
    """Take a file or folder to the store; what is there already, as it is here, is not sent again.

    Args:
        last: the name of a file that is sent when all others are there: what is complete has it.
        only: paths of files in the folder; all in absence.
        without: names of files and folders that stay here.

    Raises:
        StageError: the store does not take it.
    """
    key = _key(path)
    if key is None:
        return
    store = _store()
    if only is not None:
        files = [path / name for name in only]
    else:
        files = [path] if path.is_file() else [p for p in sorted(path.rglob("*")) if p.is_file()]
    with _told(address(path)):
        there = store.files(key)
        todo: list[tuple[Path, str]] = []
        for file in files:
            part = file.relative_to(path).as_posix()
            target = key if file == path else f"{key}/{part}"
            own = any(sign in file.name for sign in OWN) or (file != path and _below(part, without))
            if not own and not (target in there and _same(file, there[target])):
                todo.append((file, target))
        final = [item for item in todo if item[0].name == last and item[0].parent == path]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda item: store.send(*item), [item for item in todo if item not in final]))
        for item in final:
            store.send(*item)


def put(path: Path, text: str) -> None:
    """A small file in the store alone, for another node, or process of this one, to pull."""
    key = _key(path)
    assert key is not None, f"{path} is not of a mirror"
    with _told(address(path)), _store().fs.open_output_stream(key) as out:
        out.write(text.encode())


def stored(path: Path) -> dict[str, int]:
    """What the store has of a folder: the path of each file in it -> bytes. Of a single file its own name."""
    key = _key(path)
    assert key is not None, f"{path} is not of a mirror"
    with _told(address(path)):
        found = _store().files(key)
    return {name[len(key) :].strip("/") or path.name: info.size for name, info in found.items()}


def there(path: Path) -> bool:
    """Whether there is such a file: of a store not what only this node's mirror has, be it left of what was removed there."""
    return pull(path).is_file() and (not mirrored(path) or bool(stored(path)))


def look(path: Path) -> tuple[str, float] | None:
    """A small file as the store has it, and since when (s since 1970, by the store's clock); None where it is not there."""
    key = _key(path)
    assert key is not None, f"{path} is not of a mirror"
    store = _store()
    with _told(address(path)):
        info = store.fs.get_file_info(key)
        if info.type != fs.FileType.File:
            return None
        try:
            with store.fs.open_input_stream(key) as source:
                return source.read().decode(), info.mtime_ns / 1e9
        except FileNotFoundError:  # removed meanwhile
            return None


def _same(file: Path, info: fs.FileInfo) -> bool:
    try:
        stat = file.stat()
    except FileNotFoundError:
        return False
    return stat.st_size == info.size and stat.st_mtime_ns == info.mtime_ns


def names(path: Path) -> set[str]:
    """Names of what the folder has, here or in the store."""
    found = {child.name for child in path.iterdir()} if path.is_dir() else set()
    key = _key(path)
    if key is None:
        return found
    with _told(address(path)):
        there = _store().fs.get_file_info(fs.FileSelector(key, allow_not_found=True))
    return found | {PurePosixPath(info.path).name for info in there}


def remove(path: Path, first: str | None = None) -> None:
    """Remove a file or folder in the store; `first`: the file without which it counts for nothing."""
    key = _key(path)
    if key is None:
        return
    store = _store()
    with _told(address(path)):
        files = sorted(store.files(key), key=lambda k: PurePosixPath(k).name != first)
        for file in files:
            store.fs.delete_file(file)


def pull_model(model: str) -> str:
    """A model's folder with its files on this node; a hub id as it is."""
    path = Path(model)
    if path.is_absolute():
        pull(path)
    return model


def ray_storage(folder: Path) -> dict[str, Any]:
    """The folder as Ray Train's RunConfig has it."""
    key = _key(folder)
    return {"storage_path": str(folder)} if key is None else {"storage_path": key, "storage_filesystem": _store().fs}
