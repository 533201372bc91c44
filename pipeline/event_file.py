"""TensorBoard's event files, written without TensorBoard: every library that writes them imports torch, seconds and hundreds of
MB that the process carrying a run out does without.

A file is a row of records (tensorflow/core/lib/io/record_writer.h), each a protocol buffer `Event`
(tensorflow/core/util/event.proto):

    uint64 length, uint32 masked CRC-32C of the length, the record, uint32 masked CRC-32C of the record     (little endian)
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed
MASK = 0xA282EAD8


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return table


TABLE = _table()


def crc32c(data: bytes) -> int:
    """RFC 3720, appendix B.4."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + _masked(length) + data + _masked(data)


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + MASK) & 0xFFFFFFFF)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _text(field: int, data: bytes) -> bytes:
    """A field of bytes, a string or a message."""
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def first_event(time: float) -> bytes:
    """What a file begins with. `time`: seconds since 1970, as everywhere here."""
    return b"\x09" + struct.pack("<d", time) + _text(3, b"brain.Event:2")


def scalars_event(time: float, step: int, values: Mapping[str, float]) -> bytes:
    """Scalars of a step: wall_time = 1, step = 2, summary = 5 {value = 1 {tag = 1, simple_value = 2}}."""
    summary = b"".join(
        _text(1, _text(1, tag.encode()) + b"\x15" + struct.pack("<f", _float32(value))) for tag, value in values.items()
    )
    return b"\x09" + struct.pack("<d", time) + b"\x10" + _varint(step) + _text(5, summary)


def _float32(value: float) -> float:
    """What is too large for a float32 is infinite there."""
    largest = 3.4028234663852886e38
    return value if abs(value) <= largest or value != value else float("inf") * (1 if value > 0 else -1)


class EventFile:
    """A file that scalars are added to; what was added is on disk when `add` returns.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, time: float) -> None:
        self.file = path.open("xb")  # never through a link
        self._write(first_event(time))

    def add(self, time: float, step: int, values: Mapping[str, float]) -> None:
        self._write(scalars_event(time, step, values))

    def _write(self, event: bytes) -> None:
        self.file.write(record(event))
        self.file.flush()

    def close(self) -> None:
        self.file.close()
