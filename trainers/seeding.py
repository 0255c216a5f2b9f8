"""One seed, many independent random streams."""

from __future__ import annotations

import random
import zlib

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries that draw from the global generator must repeat too
    torch.manual_seed(seed)


def generator(seed: int, stream: str) -> torch.Generator:
    """A generator of its own for `stream`: what one part draws never shifts what another part sees."""
    words = np.random.SeedSequence([seed, zlib.crc32(stream.encode())]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> 1))
