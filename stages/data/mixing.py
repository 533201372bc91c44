"""Which rows come up, and how often: weights, splits and exact duplicates, decided by the content of a row alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from stages.data.records import Record
from stages.data.source import DataSource


def hash_of(record: Record, salt: bytes = b"") -> bytes:
    text = json.dumps([type(record).__name__, vars(record)], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, salt=salt).digest()


def draw(record: Record, source: DataSource, seed: int) -> tuple[int, bool]:
    """(how often the row is taken, whether it is held out). A pure function of the row's content and the seed.

    So it is the same wherever the row stands and whoever reads it, and equal rows of sources with the same share fall on
    the same side of the split (of sources with another share, leave duplicates out).
    """
    share, weight = source.eval, source.weight
    if share and _uniform(record, seed, b"eval") < share:
        return 1, True
    whole = int(weight)
    more = weight > whole and _uniform(record, seed, b"weight") < weight - whole
    return whole + more, False


def _uniform(record: Record, seed: int, purpose: bytes) -> float:
    return int.from_bytes(hash_of(record, purpose + (seed % 2**32).to_bytes(4, "little")), "little") / 2**64


def mark_duplicates(work: Path, count: int) -> None:
    """From the hashes of all chunks, the rows of each that stand in an earlier place already.

    The hashes are gone through a sixteenth at a time, so that they need not all be in memory.
    """
    arrays = [np.load(work / f"hashes-{i:06}.npy", mmap_mode="r") for i in range(count)]
    repeated: list[list[np.ndarray]] = [[] for _ in arrays]
    for part in range(16):
        chosen = [np.flatnonzero((array[:, 1] & np.uint64(15)) == part) for array in arrays]
        hashes = np.concatenate([array[places, 1] for array, places in zip(arrays, chosen, strict=True)])
        again = np.ones(len(hashes), dtype=bool)
        again[np.unique(hashes, return_index=True)[1]] = False  # the first of each is kept
        at = 0
        for i, places in enumerate(chosen):
            repeated[i].append(arrays[i][places[again[at : at + len(places)]], 0])
            at += len(places)
    for i, rows in enumerate(repeated):
        np.save(work / f"duplicates-{i:06}.npy", np.sort(np.concatenate(rows)).astype(np.int64))
