import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabilitykit.record.frame import HEADER_BYTES, MAGIC, Frame, FrameKind, Gap, encode_frame, scan_frames

PAYLOADS = st.lists(st.binary(max_size=60) | st.builds(lambda tail: MAGIC + tail, st.binary(max_size=60)), max_size=6)


def log_of(payloads: list[bytes]) -> bytes:
    frames = [encode_frame(FrameKind.DATA, step, 0, step, [part]) for step, part in enumerate(payloads)]
    return b"".join(bytes(part) for frame in frames for part in frame)


def intact(log: bytes) -> dict[int, bytes]:
    return {item.sequence: bytes(item.payload) for item in scan_frames(log) if isinstance(item, Frame)}


@given(payloads=PAYLOADS)
def test_every_frame_comes_back_whatever_its_payload(payloads: list[bytes]) -> None:
    log = log_of(payloads)

    assert intact(log) == dict(enumerate(payloads))
    assert not any(isinstance(item, Gap) for item in scan_frames(log))


@given(step=st.integers(-(2**63), 2**63 - 1), attempt=st.integers(-(2**31), 2**31 - 1))
def test_a_header_holds_any_step_and_attempt(step: int, attempt: int) -> None:
    log = b"".join(encode_frame(FrameKind.SEAL, step, attempt, 7, []))

    [frame] = scan_frames(log)

    assert isinstance(frame, Frame)
    assert (frame.kind, frame.step, frame.attempt, frame.sequence) == (FrameKind.SEAL, step, attempt, 7)


@given(payloads=PAYLOADS, rubbish=st.binary(min_size=1, max_size=80), place=st.integers(0, 6))
def test_rubbish_between_frames_costs_no_frame_and_is_told(payloads: list[bytes], rubbish: bytes, place: int) -> None:
    before, after = log_of(payloads[:place]), log_of(payloads)[len(log_of(payloads[:place])) :]

    items = list(scan_frames(before + rubbish + after))

    assert intact(before + rubbish + after) == dict(enumerate(payloads))
    assert [item.length for item in items if isinstance(item, Gap)] == [len(rubbish)]


def test_whatever_bit_flips_one_frame_is_lost_and_none_is_wrong(small_log: bytes) -> None:
    frames = intact(small_log)

    for bit in range(len(small_log) * 8):
        damaged = bytearray(small_log)
        damaged[bit // 8] ^= 1 << bit % 8
        items = list(scan_frames(bytes(damaged)))

        left = {item.sequence: item.payload for item in items if isinstance(item, Frame)}
        assert len(left) == len(frames) - 1
        assert all(frames[sequence] == payload for sequence, payload in left.items())
        assert sum(isinstance(item, Gap) for item in items) == 1


def test_a_log_cut_anywhere_is_a_prefix_of_its_frames(small_log: bytes) -> None:
    frames = intact(small_log)

    for size in range(len(small_log)):
        left = intact(small_log[:size])

        assert left == {sequence: frames[sequence] for sequence in range(len(left))}


@pytest.mark.parametrize("seed", range(20))
def test_overwritten_stretches_never_make_up_a_frame(small_log: bytes, seed: int) -> None:
    noise = random.Random(seed)
    frames, damaged = intact(small_log), bytearray(small_log)

    for _ in range(3):
        start = noise.randrange(len(damaged))
        damaged[start : start + noise.randrange(200)] = noise.randbytes(noise.randrange(200))

    assert intact(bytes(damaged)).items() <= frames.items()


def test_a_length_beyond_the_log_allocates_nothing(small_log: bytes) -> None:
    huge = bytearray(b"".join(encode_frame(FrameKind.DATA, 0, 0, 0, [b"x"])))
    huge[8:12] = b"\xff\xff\xff\xff"

    items = list(scan_frames(bytes(huge) + small_log))

    assert isinstance(items[0], Gap)
    assert items[0].length == HEADER_BYTES + 1
