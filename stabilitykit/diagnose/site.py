"""Which line of the user's code an operation belongs to."""

from __future__ import annotations

import linecache
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import FrameType

import torch

_TORCH = os.path.dirname(torch.__file__) + os.sep  # noqa: PTH120 - compared with co_filename as it is, on a hot path
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep  # noqa: PTH120
_NOT_THE_USERS = (_OURS, "<frozen", "<string")  # a notebook's cells start with "<ipython"
ENGINE = "_engine_run_backward"  # what every backward in torch.autograd calls
_SCALER = os.path.join("torch", "amp", "grad_scaler.py")  # noqa: PTH118
_RECOMPUTE = os.path.join("torch", "utils", "checkpoint.py")  # noqa: PTH118


@dataclass(frozen=True, slots=True)
class Site:
    """A source line; falsy where none is known."""

    file: str = ""
    line: int = 0
    function: str = ""

    def __bool__(self) -> bool:
        return self.line > 0

    @property
    def code(self) -> str:
        """The line's text, stripped."""
        return linecache.getline(self.file, self.line).strip() if self else ""

    @property
    def shown(self) -> str:
        """The path as reports print it: relative to the working directory where the file lies below it."""
        return _relative(self.file, str(Path.cwd())) if self else ""


NOWHERE = Site()


@dataclass(frozen=True, slots=True)
class Caller:
    """What the Python stack says of an operation: the user's innermost line, and whether autograd's engine is below it.

    `in_backward_code` is True for user code that the engine called: a custom Function's backward or a tensor hook.
    `recomputed` is True for a forward that activation checkpointing runs again, `scaling` for what a GradScaler does to
    the loss: an Inf made there is what it skips for.
    """

    site: Site
    in_backward_code: bool
    recomputed: bool
    scaling: bool = False


def find_caller(depth: int = 1) -> Caller:
    """Walk out from the caller `depth` frames up to the first frame that is neither torch's nor ours."""
    frame: FrameType | None = sys._getframe(depth)
    recomputed = scaling = False
    while frame is not None:
        code = frame.f_code
        file = code.co_filename
        if code.co_name == ENGINE:
            return Caller(_user_site(frame), in_backward_code=False, recomputed=recomputed)
        if file.startswith(_TORCH):
            recomputed = recomputed or file.endswith(_RECOMPUTE)
            scaling = scaling or (code.co_name == "scale" and file.endswith(_SCALER))
        elif not file.startswith(_NOT_THE_USERS):
            site = Site(file, frame.f_lineno, code.co_name)
            return Caller(site, _below_engine(frame), recomputed or _recomputing(frame), scaling)
        frame = frame.f_back
    return Caller(NOWHERE, in_backward_code=False, recomputed=recomputed)


def user_lines(depth: int = 1) -> list[tuple[str, int]]:
    """Every line of the user's code that led here, innermost first."""
    frame: FrameType | None = sys._getframe(depth)
    lines = []
    while frame is not None:
        if not frame.f_code.co_filename.startswith((_TORCH, *_NOT_THE_USERS)):
            lines.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return lines


def _user_site(frame: FrameType | None) -> Site:
    while frame is not None:
        if not frame.f_code.co_filename.startswith((_TORCH, *_NOT_THE_USERS)):
            return Site(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        frame = frame.f_back
    return NOWHERE


def _below_engine(frame: FrameType | None) -> bool:
    if torch._C._current_graph_task_id() == -1:  # spares the walk in forward
        return False
    while frame is not None:
        if frame.f_code.co_name == ENGINE:
            return True
        frame = frame.f_back
    return False


def _recomputing(frame: FrameType | None) -> bool:
    """Whether checkpoint's own code lies between the engine and this frame."""
    if torch._C._current_graph_task_id() == -1:
        return False
    while frame is not None and frame.f_code.co_name != ENGINE:
        if frame.f_code.co_filename.endswith(_RECOMPUTE):
            return True
        frame = frame.f_back
    return False


@lru_cache(maxsize=1024)
def _relative(file: str, folder: str) -> str:
    path = Path(file)
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else file
