"""Two functions that are wrapped by one monitor, a GAN's: each past step is run again by the one that did it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import stabilitykit as sk

QUIET = sk.MonitorConfig(report=False, compact=False, snapshot_every=50)


def test_a_step_of_the_discriminator_is_reached_through_those_of_the_generator(tmp_path: Path) -> None:
    generator, discriminator = nn.Linear(4, 4), nn.Linear(4, 1)
    model = nn.ModuleDict({"generator": generator, "discriminator": discriminator})
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (generator, discriminator)]
    calls: list[str] = []

    def generate(noise: Tensor) -> Tensor:
        calls.append("g")
        model.zero_grad()
        loss = softplus(-discriminator(generator(noise))).mean()
        loss.backward()
        optimizers[0].step()
        return loss

    def discriminate(batch: Tensor) -> Tensor:
        calls.append("d")
        model.zero_grad()
        fake = discriminator(generator(torch.randn(8, 4)).detach())
        loss = softplus(-discriminator(batch)).mean() + softplus(fake).mean()
        loss.backward()
        optimizers[1].step()
        return loss

    with sk.attach(model, optimizers, tmp_path / "run", config=QUIET, on_nonfinite="skip") as monitor:
        step_d, step_g = monitor.replayable(discriminate), monitor.replayable(generate)
        for _ in range(3):
            step_d(torch.randn(8, 4))
            step_g(torch.randn(8, 4))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        calls.clear()
        step_d(torch.full((8, 4), torch.nan))

    assert "".join(calls) == "d" + "dgdgdg" + "d"  # the fault, the way back to it, the step under the tracer
    assert all(map(torch.equal, before, model.parameters()))
    assert monitor.diagnosis is not None
    assert monitor.diagnosis.origin.proof == "replayed"
