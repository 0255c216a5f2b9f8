"""What people use today, as nanzoo adapters: a loss check, anomaly mode, transformers' DebugUnderflowOverflow."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from nanzoo import Adapter, Loop, Verdict


class LossCheck(Adapter):
    """`if not torch.isfinite(loss): stop`: the step is all it can say."""

    found: Verdict | None = None

    def step(self, index: int, batch: Any) -> Any:
        loss = self.loop.train_step(batch)
        if self.found is None and isinstance(loss, torch.Tensor) and not bool(torch.isfinite(loss).all()):
            self.found = Verdict(healthy=False, step=index, kind="nan" if bool(loss.isnan().any()) else "inf")
        return loss

    def verdict(self) -> Verdict:
        return self.found or Verdict(healthy=True)


class DetectAnomaly(Adapter):
    """`torch.autograd.detect_anomaly`: the backward node that returned NaN, and the forward line it printed."""

    found: Verdict | None = None

    def step(self, index: int, batch: Any) -> Any:
        with warnings.catch_warnings(record=True) as caught, torch.autograd.detect_anomaly(check_nan=True):
            warnings.simplefilter("always")
            self._caught = caught
            return self.loop.train_step(batch)

    def failed(self, index: int, error: BaseException) -> None:
        node = re.search(r"Function '(\w+?)Backward\d*'", str(error))
        if node is None:
            return
        trace = "\n".join(str(entry.message) for entry in self._caught)
        places = re.findall(r'File "([^"]+)", line (\d+)', trace)
        own = [(file, int(line)) for file, line in places if f"{Path('torch') / 'nn'}" not in file]
        file, line = own[-1] if own else (None, None)
        self.found = Verdict(False, index, "backward", "nan", op=node[1].lower(), file=file, line=line)

    def verdict(self) -> Verdict:
        return self.found or Verdict(healthy=True)


class DebugUnderflowOverflow(Adapter):
    """transformers' debug tool: the first module whose weights, inputs or outputs are not finite; it raises."""

    found: Verdict | None = None

    def attach(self, loop: Loop, run_dir: Path) -> None:
        from transformers.debug_utils import DebugUnderflowOverflow as Tool

        super().attach(loop, run_dir)
        self.tool = Tool(loop.model)

    def failed(self, index: int, error: BaseException) -> None:
        if "inf/nan" not in str(error):
            return
        frames = "\n".join(self.tool.frames[-1:])
        module = re.search(r"^\s*(\S*)\s+\S+$", frames, re.MULTILINE)
        kind = "nan" if "nan" in frames else "inf"
        self.found = Verdict(False, index, "forward", kind, module=module[1] if module else None)

    def verdict(self) -> Verdict:
        return self.found or Verdict(healthy=True)
