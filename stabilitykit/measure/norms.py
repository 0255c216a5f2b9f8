"""L2 norms of many tensors at once, without a transfer and without overflow in the combination."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor

from stabilitykit.measure.values import ordinary, values


class Norms:
    """L2 norms by name, as 0-d tensors until they are brought to the host: all norms of a step together.

    Attributes:
        names: of the tensors.
        pending: 0-d tensors that `finish` waits for.
        values: the norms, in the order of `names`, once they are here.
        whole: the L2 norm of all together; nan where there are none.
    """

    def __init__(self, names: Sequence[str] = (), norms: Sequence[Tensor] = ()) -> None:
        self.names, self.pending = names, norms
        self.values: Sequence[float] = ()
        self.whole = math.nan

    def finish(self, received: Iterator[float]) -> None:
        """Take those it waits for from the front of `received`."""
        if self.pending:
            self.values, self.pending = list(islice(received, len(self.pending))), ()
            self.whole = combine(self.values)

    def read(self) -> Mapping[str, float]:
        """The norms by name, brought over on their own."""
        self.finish(iter(transfer(self.pending)))
        return dict(zip(self.names, self.values, strict=True))

    def bad(self) -> Mapping[str, float]:
        """Those that are NaN or Inf, by name."""
        if not self.values or math.isfinite(self.whole):
            return {}
        return {name: norm for name, norm in zip(self.names, self.values, strict=True) if not math.isfinite(norm)}

    def known_bad(self) -> bool:
        """Whether one is known to be NaN or Inf without a transfer: those on the host are read now."""
        if all([norm.is_cpu for norm in self.pending]):  # noqa: C419 - half the time of a generator
            self.finish(iter([norm.item() for norm in self.pending]))
        return bool(self.bad())

    def widen(self, tensors: Mapping[str, Tensor]) -> None:
        """Measure again, scaled by the largest magnitude, what is bad: finite values may have had a norm that is not.

        Args:
            tensors: what the norms were taken of, by name, as long as it is unchanged.
        """
        if not self.bad():
            return
        wide = [
            norm if math.isfinite(norm) or name not in tensors else _scaled_norm(tensors[name], norm)
            for name, norm in zip(self.names, self.values, strict=True)
        ]
        self.values, self.whole = wide, combine(wide)


def tensor_norms(tensors: Iterable[Tensor]) -> list[Tensor]:
    """One 0-d tensor each, the L2 norm in the tensor's own dtype, float16 in float32; NaN and Inf carry through.

    The norm of finite float32 values above 1e19 overflows to Inf: an Inf here is a suspicion, `is_finite` the proof.
    Values of float16 have such a norm when a thousand are 2,000. bfloat16 has the range of float32, and its norm in
    float32 takes the CPU fourteen times as long.
    """
    plain = [_readable(entry) for entry in tensors]
    dtypes = {entry.dtype for entry in plain}
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    return list(torch._foreach_norm(plain, 2, wide if torch.float16 in dtypes else None)) if plain else []


def fusible(tensor: Tensor) -> bool:
    """Whether `torch._foreach_norm` gives what `tensor_norms` does, without a look at the tensor."""
    return ordinary(tensor) and tensor.dtype is not torch.float16


def transfer(scalars: Sequence[Tensor]) -> list[float]:
    """Bring 0-d tensors to the host in one transfer a device."""
    if not scalars:
        return []
    try:
        return torch.stack(list(scalars)).tolist()
    except RuntimeError:  # several devices
        places: dict[torch.device, list[int]] = {}
        for position, entry in enumerate(scalars):
            places.setdefault(entry.device, []).append(position)
        if len(places) == 1:  # dtypes without a common one
            return torch.stack([entry.double() for entry in scalars]).tolist()
        values = [math.nan] * len(scalars)
        for positions in places.values():
            for position, value in zip(positions, transfer([scalars[entry] for entry in positions]), strict=True):
                values[position] = value
        return values


def combine(norms: Iterable[float]) -> float:
    """The L2 norm of the whole from those of its parts; `math.hypot` scales: only the result can overflow."""
    return math.hypot(*norms)


def _scaled_norm(tensor: Tensor, norm: float) -> float:
    plain = values(tensor)
    if plain is None or not plain.numel():
        return norm
    largest = max(abs(bound.item()) for bound in torch.aminmax(plain))
    return tensor_norms([plain / largest])[0].item() * largest if 0 < largest < math.inf else norm


def _readable(tensor: Tensor) -> Tensor:
    """The tensor itself where the kernel takes it; its stored values otherwise, nothing where there are none."""
    if ordinary(tensor):
        return tensor.detach()
    plain = values(tensor)
    return torch.empty(0) if plain is None else plain
