"""The tensors of a model by name, without a walk over its modules at every step."""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_

from torch import Tensor, nn


class ModelTensors:
    """Parameters and module buffers of a model, as `named_parameters` and `named_buffers` give them.

    Those walk over all modules, at 3 us a module. Here the walk is made again only when a module it has met holds
    another parameter, buffer or child, or under another name: nothing else can join or leave a model.

    Args:
        model: the network; its modules may come and go.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules: list[nn.Module] = []
        self._held: list[object] = []
        self._parameters: Mapping[str, Tensor] = {}
        self._buffers: Mapping[str, Tensor] = {}

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """By name, each once."""
        self._look()
        return self._parameters

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """By name, each once; persistent or not."""
        self._look()
        return self._buffers

    def _look(self) -> None:
        held = _held_by(self._modules)
        if self._modules and len(held) == len(self._held) and all(map(is_, held, self._held)):
            return
        self._modules = list(self._model.modules())
        self._held = _held_by(self._modules)
        self._parameters = dict(self._model.named_parameters())
        self._buffers = dict(self._model.named_buffers())


def _held_by(modules: list[nn.Module]) -> list[object]:
    """Names and values of all that the modules hold themselves."""
    held: list[object] = []
    for module in modules:
        for entries in (module._parameters, module._buffers, module._modules):
            if entries:
                held += entries.keys()
                held += entries.values()
    return held
