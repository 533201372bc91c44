"""Packing: several documents in one row of at most `max_length` tokens, by best fit over a whole window of the data.

Best-fit decreasing (Johnson 1973): the longest document first, each into the fullest pack that still takes it. With lengths
far below the capacity that leaves next to nothing empty. Documents of a pack do not see each other: a pack carries their
lengths, from which the collator (stages/training/collate.py) makes positions that begin anew and masks that do not cross.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.data.chat import IGNORE


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs of indices, each with at most `capacity` tokens in all; every index once, in the order of its packs.

    Raises:
        ValueError: a length is over the capacity.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    packs: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # packs with so much room left
    rooms = 0  # bit r is set where by_room[r] is not empty: the least room that is enough is found in one step
    for i in order:
        length = lengths[i]
        if length > capacity:
            raise ValueError(f"a document of {length} tokens does not fit into {capacity}")
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            pack = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(i)
        left = room - length
        by_room[left].append(pack)
        rooms |= 1 << left
    return packs


def pack_table(table: pa.Table, capacity: int, seed: int | None) -> pa.Table:
    """Rows of `input_ids`, `labels` and `weights` as packs of them, in an order drawn from `seed`, or by their first rows.

    A pack has its documents end to end, with their `lengths` (tokens), `sources` and `rows` (where they come from). The
    first token of a document is never trained: what stands before it is another document.
    """
    lengths = pc.list_value_length(table["input_ids"]).to_numpy()
    packs = best_fit(lengths.tolist(), capacity)
    if seed is None:
        packs = sorted((sorted(pack) for pack in packs), key=lambda pack: pack[0])
    else:
        np.random.default_rng([seed, len(packs)]).shuffle(packs)
    order = np.concatenate([np.array(pack, dtype=np.int64) for pack in packs])
    documents = table.take(pa.array(order)).combine_chunks()
    sizes = lengths[order]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    in_documents = np.concatenate([[0], np.cumsum([len(pack) for pack in packs])])
    in_tokens = pa.array(starts[in_documents], pa.int32())
    in_documents = pa.array(in_documents, pa.int32())
    labels = _flat(documents["labels"]).to_numpy().copy()
    labels[starts[:-1]] = IGNORE
    columns = {
        "input_ids": pa.ListArray.from_arrays(in_tokens, _flat(documents["input_ids"])),
        "labels": pa.ListArray.from_arrays(in_tokens, pa.array(labels)),
        "weights": _weights(documents["weights"], sizes, in_tokens, len(packs)),
        "lengths": pa.ListArray.from_arrays(in_documents, pa.array(sizes, pa.int32())),
        "sources": pa.ListArray.from_arrays(in_documents, documents["source"].chunk(0)),
        "rows": pa.ListArray.from_arrays(in_documents, documents["row"].chunk(0)),
    }
    return pa.table(columns)


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0).flatten()


def _weights(column: pa.ChunkedArray, sizes: np.ndarray, in_tokens: pa.Array, packs: int) -> pa.Array:
    if column.null_count == len(column):
        return pa.nulls(packs, pa.list_(pa.float32()))
    each = [[1.0] * size if row is None else row for row, size in zip(column.to_pylist(), sizes, strict=True)]
    return pa.ListArray.from_arrays(in_tokens, pa.array(np.concatenate(each), pa.float32()))
