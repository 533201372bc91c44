"""Row groups of prepared data: what feeds, references and samples are cut from."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stages.storage import pull

Group = tuple[str, int, int]  # file, row group, rows


def read_group(file: str, group: int, columns: list[str] | None = None) -> pa.Table:
    """A row group of a file of prepared data, which is fetched where this node has not got it."""
    return pq.ParquetFile(pull(Path(file))).read_row_group(group, columns=columns)
