"""Data files on this machine (`path`, `file://`) and in object stores (`s3://`, `gs://`): which there are, and their bytes.

Only pyarrow.fs is needed. Credentials come from where the stores' own tools find them (environment, ~/.aws, instance roles);
options stand behind the address: `s3://bucket/chats?endpoint_override=localhost:9000&scheme=http`.
"""

from __future__ import annotations

import fnmatch
import glob
import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from stages.errors import DataError

SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
BROKEN = (EOFError, gzip.BadGzipFile, zlib.error)  # what a damaged gzip raises
GCS_PATIENCE = 30  # seconds
BUFFER = 1 << 20  # bytes asked for at once: a request to an object store is slow to start


@dataclass(frozen=True)
class DataFile:
    """A file, or a shard of a `datasets` dataset (stages/data/hub.py). `path` is what is shown, and enough to open it."""

    path: str
    kind: str  # jsonl, json, csv, parquet, hf
    gzipped: bool = False
    dataset: tuple[str, str | None, str, str | None] | None = None  # of hf: path, name, split, revision
    shard: int = 0
    shards: int = 1


def classify(path: str) -> DataFile | None:
    """The kind of a file by its name, or None where it is not a data file."""
    name = split_address(path)[1].lower()
    gzipped = name.endswith(".gz")
    kind = SUFFIXES.get(PurePosixPath(name[:-3] if gzipped else name).suffix)
    return DataFile(path, kind, gzipped) if kind and not (gzipped and kind == "parquet") else None


def list_files(path: str) -> list[DataFile]:
    """The data files behind a file, a glob or a folder, in a fixed order. Hidden ones (`.x`, `_x`) are left out.

    Raises:
        DataError: nothing there, no access, a file of an unknown kind, or an empty file.
    """
    with _told(path):
        sizes, folder = _remote(path) if "://" in path else _local(path)
    if not sizes and folder:
        raise DataError(f"{path}: no data files in this folder (looked for {', '.join(SUFFIXES)}, also .gz)")
    if not sizes:
        wild = any(c in path for c in "*?[")
        raise DataError(f"{path}: {'no file matches' if wild else 'no such file'}; check `path` under `data`")
    files = []
    for name in sorted(sizes):
        file = classify(name)
        if file is None:
            raise DataError(f"{name}: not a kind of file that can be read ({', '.join(SUFFIXES)}, also .gz)")
        if sizes[name] == 0:
            raise DataError(f"{name}: the file is empty")
        files.append(file)
    return files


def _local(path: str) -> tuple[dict[str, int], bool]:
    """(name -> size, whether the path is a folder); of a folder only the data files."""
    target = Path(path)
    if target.is_dir():
        found = [
            p for p in target.rglob("*") if not _hidden(p.relative_to(target)) and classify(str(p)) and p.is_file()
        ]
        return {str(p): p.stat().st_size for p in found}, True
    names = [path] if target.is_file() else [n for n in glob.glob(path, recursive=True) if Path(n).is_file()]
    return {name: Path(name).stat().st_size for name in names}, False


def _remote(path: str) -> tuple[dict[str, int], bool]:
    """As `_local`, through pyarrow.fs."""
    base, inner, query = split_address(path)
    store = store_of(base + query)
    info = store.get_file_info(inside(base, inner))
    if info.type == fs.FileType.File:
        return {path: info.size}, False
    wild = re.search(r"[*?\[]", inner)
    is_folder = info.type == fs.FileType.Directory
    if not is_folder and not wild:
        return {}, False
    folder = inner if is_folder or not wild else inner[: wild.start()].rpartition("/")[0]
    pattern = inner[len(folder) :].strip("/").split("/")
    start, found = inside(base, folder), {}
    for entry in store.get_file_info(fs.FileSelector(start, recursive=True, allow_not_found=True)):
        name = PurePosixPath(entry.path[len(start) :].strip("/"))
        chosen = not _hidden(name) and classify(str(name)) if is_folder else _matches(name.parts, pattern)
        if entry.type == fs.FileType.File and chosen:
            found[base + "/".join(filter(None, [folder.strip("/"), str(name)])) + query] = entry.size
    return found, is_folder


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path matches a glob: `*` stays within a folder, `**` does not, and neither finds dot files."""
    if not parts or not pattern:
        return not parts and list(pattern) in ([], ["**"])
    if parts[0].startswith("."):
        return False
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or _matches(parts[1:], pattern)
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _hidden(path: Path | PurePosixPath) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def split_address(path: str) -> tuple[str, str, str]:
    """(scheme://bucket/, path inside, ?options); of a local path only the middle one."""
    if "://" not in path:
        return "", path, ""
    path, mark, query = path.rpartition("?") if re.search(r"\?\w+=", path) else (path, "", "")
    scheme, rest = path.split("://", 1)
    bucket, _, inner = rest.partition("/")
    return f"{scheme}://{bucket}/", inner, mark + query


def inside(base: str, inner: str) -> str:
    """The path as its filesystem has it: with the bucket, or absolute on this machine."""
    bucket = urlsplit(base).netloc.rpartition("@")[2]
    return f"{bucket}/{inner}".rstrip("/") if bucket else f"/{inner}"


@lru_cache(maxsize=64)
def store_of(base: str) -> fs.FileSystem:
    if "@" in base and not base.startswith("gs://anonymous@"):
        raise DataError("keep credentials in the environment, not in the address")
    if base.startswith("gs://") and "retry_limit_seconds" not in base:  # or it tries for a quarter of an hour
        base += ("&" if "?" in base else "?") + f"retry_limit_seconds={GCS_PATIENCE}"
    return fs.FileSystem.from_uri(base)[0]


@contextmanager
def _told(path: str) -> Iterator[None]:
    """What goes wrong with a store as an error the user can act on."""
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{path}: {short(error)}; addresses start with file://, s3://, gs:// or hf://") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {short(error)}") from error


def short(error: Exception) -> str:
    """The first line of what an error says."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return first if len(first) <= 200 else first[:199] + "…"


def open_file(path: str) -> BinaryIO:
    """A file's bytes, buffered and seekable.

    Raises:
        DataError: it is gone, or may not be read.
    """
    with _told(path):
        if "://" not in path:
            return open(path, "rb", buffering=BUFFER)
        base, inner, query = split_address(path)
        remote = store_of(base + query).open_input_file(inside(base, inner))
        return io.BufferedReader(_Remote(path, remote), BUFFER)


class _Remote(io.RawIOBase):
    """A file of a store. What fails on the way is a `DataError`: it must not pass for damage in the file."""

    def __init__(self, path: str, data: pa.NativeFile) -> None:
        self.path, self.data = path, data

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        with _told(self.path):
            return int(self.data.readinto(buffer))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _told(self.path):
            return int(self.data.seek(offset, whence))

    def tell(self) -> int:
        return int(self.data.tell())

    def close(self) -> None:
        self.data.close()
        super().close()


class _Gunzip(io.RawIOBase):
    """Decompressed bytes, and all there are before a damaged place: gzip's own reads drop what the last one had begun."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw, self.data = raw, gzip.GzipFile(fileobj=raw)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        part = self.data.read1(len(buffer))
        buffer[: len(part)] = part
        return len(part)

    def skip(self, to: int) -> None:
        """Decompress up to an offset."""
        while to and (part := self.data.read1(min(to, BUFFER))):
            to -= len(part)

    def close(self) -> None:
        self.raw.close()
        super().close()


def open_stream(file: DataFile, start: int = 0) -> BinaryIO:
    """The file's (decompressed) bytes from an offset on. A damaged gzip raises one of `BROKEN` when read that far."""
    raw = open_file(file.path)
    if not file.gzipped:
        raw.seek(start)
        return raw
    data = _Gunzip(raw)
    data.skip(start)
    return io.BufferedReader(data, BUFFER)


def size(file: DataFile) -> int:
    """Bytes, as stored."""
    with _told(file.path):
        return _info(file.path).size if "://" in file.path else Path(file.path).stat().st_size


def _info(path: str) -> fs.FileInfo:
    base, inner, query = split_address(path)
    return store_of(base + query).get_file_info(inside(base, inner))


def content_hash(file: DataFile) -> str:
    """What identifies a file: its bytes; in an object store its address, size and date, so that nothing is downloaded."""
    hashed = hashlib.blake2b(digest_size=16)
    with _told(file.path):
        if is_remote(file):
            info = _info(file.path)
            hashed.update(f"{file.path} {info.size} {info.mtime_ns}".encode())
            return hashed.hexdigest()
        with open_file(file.path) as data:
            while block := data.read(BUFFER):
                hashed.update(block)
    return hashed.hexdigest()


def is_remote(file: DataFile) -> bool:
    """Whether its bytes would have to be downloaded."""
    return "://" in file.path and not file.path.startswith("file://")
