"""The global random streams: read without advancing them, put back; cheap where nobody has drawn."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomStates:
    """Every global random stream: torch's CPU and CUDA generators, Python's and numpy's."""

    torch_cpu: Tensor
    torch_cuda: tuple[Tensor, ...]
    python: tuple[Any, ...]
    numpy: tuple[Any, ...] | Mapping[str, Any]

    @classmethod
    def capture(cls) -> RandomStates:
        """Read the streams without advancing them."""
        cuda = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
        return cls(torch.get_rng_state(), cuda, _PYTHON_STREAM.state(), _NUMPY_STREAM.state())

    def restore(self) -> None:
        """Put every stream back where it was."""
        torch.set_rng_state(self.torch_cpu)
        if self.torch_cuda:
            torch.cuda.set_rng_state_all(list(self.torch_cuda))
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # type: ignore[arg-type]  # noqa: NPY002
        _NUMPY_STREAM.forget()


MT19937_BYTES = 4 * 624 + 4  # of a Mersenne twister: the key and the position in it


class _PythonStream:
    """Python's global random stream.

    `random.getstate()` makes 625 integers, which costs a small step 20 to 40 us; to read the generator's memory costs
    0.4. So the call is made when that memory, or the second number of a pair of normals, has changed; and always where
    the memory is not where CPython has it, which is tried out on a generator of our own first.
    """

    def __init__(self) -> None:
        self._stream: Any = getattr(random.random, "__self__", None)
        known = isinstance(self._stream, random.Random) and _holds_its_state(random.Random(0))
        self._address = id(self._stream) + object.__basicsize__ if known else 0
        self._seen: tuple[bytes, float | None] = b"", None
        self._state: tuple[Any, ...] = ()

    def state(self) -> tuple[Any, ...]:
        """As `random.getstate()`."""
        if not self._address:
            return random.getstate()
        seen = ctypes.string_at(self._address, MT19937_BYTES), self._stream.gauss_next
        if seen != self._seen:
            self._seen, self._state = seen, random.getstate()
        return self._state


def _holds_its_state(generator: random.Random) -> bool:
    """Whether position and key follow the header of the object in memory, before and after a draw."""
    if sys.implementation.name != "cpython" or type(generator).__basicsize__ < object.__basicsize__ + MT19937_BYTES:
        return False
    for _ in range(2):
        position, *key = memoryview(ctypes.string_at(id(generator) + object.__basicsize__, MT19937_BYTES)).cast("I")
        if (*key, position) != generator.getstate()[1]:
            return False
        generator.random()
    return True


class _NumpyStream:
    """numpy's global random stream.

    Its public call costs 30 us, as much as a small step's other bookkeeping; to read the generator's memory, whose
    address numpy hands out, 0.4. So the call is made when that memory has changed, or where it does not hold all: the
    second number of a pair of legacy normals lies elsewhere.
    """

    def __init__(self) -> None:
        self._memory = b""
        self._state: Any = None

    def forget(self) -> None:
        """The stream was set: the same memory may now go with another half of a pair."""
        self._memory = b""

    def state(self) -> Any:
        """As `numpy.random.get_state()`."""
        generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
        if type(generator) is not np.random.MT19937:
            return np.random.get_state()  # noqa: NPY002
        memory = ctypes.string_at(generator.ctypes.state_address, MT19937_BYTES)
        if memory != self._memory or self._state[3]:
            self._memory, self._state = memory, np.random.get_state()  # noqa: NPY002
        return self._state


_PYTHON_STREAM, _NUMPY_STREAM = _PythonStream(), _NumpyStream()
