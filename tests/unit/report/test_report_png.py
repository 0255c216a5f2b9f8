import struct
import sys
import zlib

import pytest

from stabilitykit.read import Run
from stabilitykit.report import png


def chunks(data: bytes) -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {}
    at = 8
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        found.setdefault(kind.decode(), []).append(body)
        at += 12 + length
    return found


@pytest.mark.parametrize("name", ["diverging", "empty", "one_step", "hostile"])
def test_every_run_gives_an_image_1320_pixels_wide(name: str, request: pytest.FixtureRequest) -> None:
    data = png.render(request.getfixturevalue(name))

    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">I", chunks(data)["IHDR"][0][:4])[0] == 1320
    assert len(data) < 1_000_000


def test_the_verdict_is_in_the_files_metadata(diverging: Run) -> None:
    texts = chunks(png.render(diverging))

    titles = [body for kind in ("tEXt", "iTXt") for body in texts.get(kind, []) if body.startswith(b"Title\0")]
    assert diverging.diagnosis is not None
    assert diverging.diagnosis.verdict[1:].encode() in titles[0]


def test_no_global_state_of_matplotlib_is_touched(killed: Run) -> None:
    png.render(killed)

    assert "matplotlib.pyplot" not in sys.modules
