"""A tree of state in one file, replaced whole or not at all: tensors as safetensors, the rest as JSON in its header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from stabilitykit.errors import RunFolderError
from stabilitykit.record.folder import replace_file

VERSION = 1
NAME = "checkpoint.safetensors"
KIND = "$"  # key of a JSON object that stands for something JSON has no word for


def write_checkpoint(run_dir: Path, state: dict[str, Any]) -> None:
    """Make `state` the run's checkpoint.  Floats and tensors come back bit for bit.

    Args:
        run_dir: the run folder.
        state: dicts (of any hashable plain keys), lists, tuples, tensors, NumPy arrays, numbers, strings, None.

    Raises:
        OSError: it could not be written; the checkpoint before it is still there.
        TypeError: something that only a pickle could hold.
    """
    tensors: dict[str, Tensor] = {}
    body = json.dumps({"version": VERSION, "state": pack(state, tensors)})
    replace_file(run_dir, run_dir / NAME, save(tensors, {"trainer": body}))


def read_checkpoint(run_dir: Path) -> dict[str, Any]:
    """The run's checkpoint.

    Raises:
        RunFolderError: there is none, it is damaged, or another version wrote it.
    """
    path = run_dir / NAME
    try:
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        body = json.loads(header["__metadata__"]["trainer"])
        tensors = load(content)
    except FileNotFoundError as error:
        raise RunFolderError(
            f"--resume: no {NAME} in {run_dir}, expected a run's folder; start the run anew"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunFolderError(f"--resume: {path}: {error!r}, expected a checkpoint; start the run anew") from error
    if body["version"] != VERSION:
        raise RunFolderError(f"--resume: {path} has version {body['version']}, expected {VERSION}; start the run anew")
    state: dict[str, Any] = unpack(body["state"], tensors)
    return state


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON can hold it; tensors go into `tensors` under numbers."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().contiguous().clone()  # storage may be shared, which the format refuses
        return {KIND: "tensor", "name": name}
    if isinstance(value, np.ndarray):
        return {KIND: "array", "dtype": value.dtype.str, "items": value.tolist()}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value) and KIND not in value:
            return {key: pack(entry, tensors) for key, entry in value.items()}
        pairs = [[pack(key, tensors), pack(entry, tensors)] for key, entry in value.items()]
        return {KIND: "dict", "items": pairs}
    if type(value) in (list, tuple):
        items = [pack(entry, tensors) for entry in value]
        return items if isinstance(value, list) else {KIND: "tuple", "items": items}
    raise TypeError(f"checkpoint: got a {type(value).__name__}, expected tensors, numbers, strings and containers")


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `pack` was given."""
    if isinstance(value, list):
        return [unpack(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(KIND)
    if kind is None:
        return {key: unpack(entry, tensors) for key, entry in value.items()}
    if kind == "tensor":
        return tensors[value["name"]]
    if kind == "array":
        return np.array(value["items"], dtype=value["dtype"])
    if kind == "tuple":
        return tuple(unpack(entry, tensors) for entry in value["items"])
    return {unpack(key, tensors): unpack(entry, tensors) for key, entry in value["items"]}
