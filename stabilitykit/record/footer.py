"""A checksum for a part's footer: parquet has them for pages only, and a flip in a column's name goes unnoticed."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

FOOTER_KEY = "stabilitykit.footer_crc32"
UNSTAMPED = "00000000"  # the value under the key while the checksum is taken
_TAIL = 8  # length of the footer, magic


def stamp_footer(part: bytes) -> bytes:
    """`part`, written with FOOTER_KEY: UNSTAMPED among its facts, with the checksum of its footer in that place.

    The length stays, so every offset does, and other readers see one more fact.
    """
    start = len(part) - _TAIL - int.from_bytes(part[-_TAIL:-4], "little")
    footer = part[start:-_TAIL]
    value = _value_offset(footer)
    assert value is not None
    assert footer[value : value + len(UNSTAMPED)] == UNSTAMPED.encode()
    stamped = footer[:value] + _checksum(footer, value) + footer[value + len(UNSTAMPED) :]
    return part[:start] + stamped + part[-_TAIL:]


def is_footer_damaged(path: Path) -> bool:
    """Whether the footer contradicts its checksum; one without a checksum is left to the parquet reader."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(size - _TAIL, 0))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(size - _TAIL - length, 0))
        footer = file.read(length)
    value = _value_offset(footer)
    return value is not None and footer[value : value + len(UNSTAMPED)] != _checksum(footer, value)


def _value_offset(footer: bytes) -> int | None:
    key = footer.find(FOOTER_KEY.encode())
    return None if key < 0 else key + len(FOOTER_KEY) + 2  # a field header and the value's length lie between


def _checksum(footer: bytes, value: int) -> bytes:
    unstamped = footer[:value] + UNSTAMPED.encode() + footer[value + len(UNSTAMPED) :]
    return f"{zlib.crc32(unstamped):08x}".encode()
