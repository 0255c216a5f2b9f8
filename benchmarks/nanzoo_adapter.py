"""nanzoo's adapter for stabilitykit, on the public API alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanzoo import Adapter, Loop, Verdict

import stabilitykit as sk

CONFIG = {"report": False, "compact": False}  # judged is what the monitor says, not how it is drawn


class StabilityKit(Adapter):
    """Attach, wrap the step, and hand on the diagnosis."""

    def attach(self, loop: Loop, run_dir: Path) -> None:
        self.monitor = sk.attach(
            loop.model,
            loop.optimizer,
            run_dir=run_dir / "run",
            config=sk.MonitorConfig(**CONFIG),
            stateful=loop.stateful,
            replay_buffer=loop.replay_buffer,
        )
        self.train_step = self.monitor.replayable(loop.train_step)

    def step(self, index: int, batch: Any) -> Any:
        return self.train_step(batch)

    def verdict(self) -> Verdict:
        self.monitor.close()
        diagnosis = self.monitor.diagnosis
        if diagnosis is None:
            return Verdict(healthy=True)
        origin = diagnosis.origin
        return Verdict(
            healthy=False,
            step=origin.step,
            phase=origin.phase,
            kind=origin.kind,
            module=origin.module,
            op=origin.op or None,
            tensor=origin.tensor or None,
            file=origin.file or None,
            line=origin.line,
            note=diagnosis.cause,
        )
