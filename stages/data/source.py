"""Where rows come from: an entry of `data:`, the files behind it, and what its options make of a row.

Paths are files, globs and folders on this machine or in an object store (files.py) and `datasets` datasets (hub.py); how
files are cut and read is in chunks.py, what rows become is in records.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import Field, field_validator, model_validator

from stages import own
from stages.base import Config, Share
from stages.data import files, hub
from stages.data.chunks import BadRow, Chunk, chunks, parquet_rows, read_chunk, read_file
from stages.data.files import DataFile
from stages.data.messages import Rejected
from stages.data.records import FORMATS, detect_format, rename
from stages.data.turns import Turn, check_filter, keep, templated
from stages.errors import DataError, StageError

__all__ = [
    "BadRow", "Chunk", "DataFile", "DataSource", "Turn", "chunks", "content_hash", "count_rows", "find_files", "first_row",
    "read_chunk", "read_file", "resolve_formats", "shaped",
]  # fmt: skip

LOOKED_AT = 100  # rows of a file that are tried for its format


class DataSource(Config):
    """One entry of `data:`."""

    path: str = Field(
        description="A file, a glob or a folder (.jsonl, .json, .csv, also .gz, and .parquet), here or at s3:// or gs://; "
        "hf://org/name, hf://folder: a dataset of the hub or in a folder; or stages.NAME: what a stage makes."
    )
    format: str | None = Field(
        default=None,
        description=f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}, found from the first row if absent; or a function of yours, "
        "module:name, that makes a row of one of these from a row of the file.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Renames columns, new name first: {prompt: question, completion: answer}."
    )
    messages: list[Turn] | None = Field(
        default=None, min_length=1, description="Makes the messages of a row from its columns, with Jinja templates."
    )
    weight: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="How often its rows come up beside those of other sources."
    )
    eval: Share | None = Field(
        default=None, gt=0, lt=1, description="Share of the rows held out for evaluation while training: 2% or 0.02."
    )
    filter: str | None = Field(
        default=None, description="Rows to use, as a Jinja expression over their columns: messages|length < 10."
    )
    split: str = Field(default="train", description="Of an hf:// dataset: its split.")
    name: str | None = Field(default=None, description="Of an hf:// dataset: its configuration.")
    revision: str | None = Field(default=None, description="Of an hf:// dataset on the hub: branch, tag or commit.")

    @property
    def made_by(self) -> str | None:
        """The stage whose dataset it is (`path: stages.NAME`), None of files. Where its files are, the runner knows."""
        return self.path.removeprefix("stages.") if is_reference(self.path) else None

    @field_validator("filter")
    @classmethod
    def _is_an_expression(cls, value: str | None) -> str | None:
        if value is not None:
            check_filter(value)
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> DataSource:
        given = [name for name in ("split", "name", "revision") if getattr(self, name) not in (None, "train")]
        if given and not self.path.startswith(hub.SCHEME):
            raise ValueError(f"{', '.join(given)}: only for hf:// datasets, {self.path} is read as files")
        if self.messages is not None and self.format not in (None, "messages"):
            raise ValueError(f"`messages` makes rows of the format messages, not {self.format}; leave `format` out")
        if own.is_named(self.format) and self.columns:
            raise ValueError(f"{self.format} gets the rows as they are in the file; leave `columns` out")
        return self


def is_reference(path: str) -> bool:
    """Whether a source's path names a stage."""
    return path.startswith("stages.") and "/" not in path


# ---------------------------------------------------------------------------------------------- files


def find_files(source: DataSource) -> list[DataFile]:
    """The files behind a source, in a fixed order; of an hf:// dataset its shards.

    Raises:
        DataError: nothing there, no access, a file of an unknown kind, or an empty file.
    """
    if source.path.startswith(hub.SCHEME):
        return hub.shards(source.path, source.name, source.split, source.revision)
    return files.list_files(source.path)


def content_hash(file: DataFile) -> str:
    """What identifies the content of a file: with the options it decides the prepared data."""
    return hub.content_hash(file) if file.kind == "hf" else files.content_hash(file)


def count_rows(source: DataSource) -> int | None:
    """Rows of a source as its files have them, before any is left out; None where they would have to be downloaded."""
    found = find_files(source)
    if found[0].kind == "hf":
        known = hub.known_rows(found[0])
        return sum(map(_count, found)) if known is None and hub.is_local(found[0]) else known
    if any(files.is_remote(file) and file.kind != "parquet" for file in found):
        return None
    return sum(map(_count, found))


def _count(file: DataFile) -> int:
    if file.kind == "parquet" and (rows := parquet_rows(file)) is not None:
        return rows
    if file.kind == "jsonl" and not file.gzipped:  # without decoding them
        with files.open_stream(file) as lines:
            return sum(not line.isspace() for line in lines)
    return sum(1 for _ in read_file(file))


# ---------------------------------------------------------------------------------------------- rows


def shaped(row: dict[str, Any], source: DataSource) -> dict[str, Any]:
    """A row after the source's `columns`, `filter` and `messages`, or the user's own function, ready to be normalised.

    Raises:
        Rejected: filtered, filter_error, missing_field, template_error or format_error.
    """
    row = rename(row, source.columns)
    if source.filter is not None and not keep(row, source.filter):
        raise Rejected("filtered", source.filter)
    if own.is_named(source.format):
        return _by_function(row, str(source.format))
    return row if source.messages is None else templated(row, source.messages)


def _by_function(row: dict[str, Any], name: str) -> dict[str, Any]:
    """What the user's function makes of a row; None of it leaves the row out."""
    function = own.load_for("format", name)
    try:
        made = function(row)
    except Exception as error:  # whatever a function of the user's raises
        raise Rejected("format_error", f"{name} raised {own.raised(error)}") from error
    if made is None:
        raise Rejected("filtered", name)
    if not isinstance(made, dict):
        raise Rejected("format_error", f"{name} returned a {type(made).__name__}; wanted is a row, a dict")
    return made


def first_row(file: DataFile) -> dict[str, Any] | BadRow | None:
    """The first readable row of a file, for detecting its format; a `BadRow` where its first rows cannot be read."""
    return next(iter(_first_rows(file)), None)


def _first_rows(file: DataFile) -> Iterator[dict[str, Any] | BadRow]:
    """The readable rows among the first of a file; a single `BadRow` where there is none."""
    bad: BadRow | None = None
    for number, row in read_file(file):
        if isinstance(row, dict):
            yield row
        else:
            bad = bad or row
        if number > LOOKED_AT:
            break
    if bad is not None:
        yield bad


def resolve_formats(sources: Sequence[DataSource]) -> list[str]:
    """The format of each source, from its first readable row where it is not named.

    Raises:
        DataError: no such file, columns that are no known format, or options that do not fit the columns.
    """
    return [_format_of(source) for source in sources]


def _format_of(source: DataSource) -> str:
    mine = own.is_named(source.format)
    if source.format is not None and source.format not in FORMATS and not mine:
        known = f"known: {', '.join(FORMATS)}, or a function of yours as module:name"
        raise DataError(f"{source.path}: unknown format {source.format!r}; {known}")
    why = ""
    for file in find_files(source):
        for row in _first_rows(file):
            if not isinstance(row, dict):
                why = why or f": {file.path}: {row.reason}: {row.detail}"
                break
            made = _tried(row, source, file)
            if made is None and mine:
                why = why or f": {source.format} leaves out the first rows of {file.path}"
                continue  # only what the function makes has a format
            looked_at = made if mine and made is not None else rename(row, source.columns)
            given = "messages" if source.messages else None if mine else source.format
            if found := given or detect_format(looked_at):
                return found
            hint = (
                f"{source.format} is to make rows of one of them"
                if mine
                else "rename them with `columns: {prompt: ..., completion: ...}`, make `messages` of them or name the `format`"
            )
            known = ", ".join(FORMATS)
            raise DataError(
                f"{file.path}: rows have the columns {', '.join(looked_at)}, which is none of the formats {known}; {hint}"
            )
    raise DataError(f"{source.path}: no row can be read, so the format is unknown{why}")


def _tried(row: dict[str, Any], source: DataSource, file: DataFile) -> dict[str, Any] | None:
    """A first row as the source's options make it; None where they leave it out.

    Raises:
        DataError: the options are wrong, or the row is: rather told than trained without.
    """
    absent = [old for old in source.columns.values() if old not in row]
    if absent:
        raise DataError(f"{file.path}: `columns` names {', '.join(absent)}, but rows have {', '.join(row)}")
    try:
        return shaped(row, source)
    except Rejected as error:
        if error.reason == "filtered":
            return None
        raise DataError(f"{file.path}: {error}, in its first row, which has {', '.join(row)}") from error
    except StageError as error:
        raise DataError(f"{source.path}: {error}") from error
