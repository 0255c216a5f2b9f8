"""One frame of the log: a checksummed header and its payload, and how to find frames again after damage."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

MAGIC = b"\xa5SK\x1a"  # the first byte is no UTF-8, so no JSON payload can hold it
FRAME_VERSION = 1
_BODY = struct.Struct("<4sBBHIIqiI")  # magic, version, kind, zero, length, crc of payload, step, attempt, sequence
_CHECK = struct.Struct("<I")  # crc of the above
HEADER_BYTES = _BODY.size + _CHECK.size


class FrameKind(IntEnum):
    """What a payload holds; a reader skips kinds it does not know."""

    META = 1  # JSON: schema, row layouts, names
    DATA = 2  # sections of packed rows, see `sections`
    SEAL = 3  # empty: the writer is done with this segment


class Frame(NamedTuple):
    """One intact frame; `payload` is a view of the log it was found in."""

    version: int
    kind: int
    step: int
    attempt: int
    sequence: int  # number of the frame within its segment
    payload: memoryview
    end: int  # offset of the byte after it


@dataclass(frozen=True)
class Gap:
    """Bytes of a log that are no intact frame."""

    offset: int
    length: int
    reaches_end: bool  # as a torn last write does


def encode_frame(kind: FrameKind, step: int, attempt: int, sequence: int, payload: Sequence[bytes]) -> list[bytes]:
    """The buffers of one frame, header first, none of them copied.

    Raises:
        struct.error: a number does not fit its field; a payload may hold 4 GiB.
    """
    checksum = length = 0
    for part in payload:
        checksum = zlib.crc32(part, checksum)
        length += len(part)
    body = _BODY.pack(MAGIC, FRAME_VERSION, kind, 0, length, checksum, step, attempt, sequence)
    return [body + _CHECK.pack(zlib.crc32(body)), *payload]


def scan_frames(log: bytes) -> Iterator[Frame | Gap]:
    """Every intact frame of a log in order, and a gap for what lies between them.

    A damaged frame costs itself: the scan goes on at the next magic where both checksums hold.
    """
    view = memoryview(log)
    position = 0
    while position < len(log):
        frame = _frame_at(view, position)
        if frame is not None:
            yield frame
            position = frame.end
            continue
        resumed = _next_frame(log, view, position + 1)
        yield Gap(position, resumed - position, reaches_end=resumed == len(log))
        position = resumed


def _frame_at(view: memoryview, position: int) -> Frame | None:
    """The frame that starts at `position`, None where there is none or a checksum fails."""
    start = position + HEADER_BYTES
    if start > len(view) or view[position : position + 4] != MAGIC:
        return None
    (expected,) = _CHECK.unpack_from(view, position + _BODY.size)
    if zlib.crc32(view[position : position + _BODY.size]) != expected:
        return None
    _, version, kind, _, length, checksum, step, attempt, sequence = _BODY.unpack_from(view, position)
    payload = view[start : start + length]
    if len(payload) != length or zlib.crc32(payload) != checksum:
        return None
    return Frame(version, kind, step, attempt, sequence, payload, start + length)


def _next_frame(log: bytes, view: memoryview, position: int) -> int:
    """Offset of the first intact frame from `position` on, the length of the log where there is none."""
    while (position := log.find(MAGIC, position)) >= 0:
        if _frame_at(view, position) is not None:
            return position
        position += 1
    return len(log)
