"""Between backward and update: clipping, unscaling, averaging, noise; and what only looks like it."""

import torch
from nanzoo import Case, Loop, Truth
from torch import nn
from torch.nn.functional import cross_entropy

CLIP = {"phase": "clip"}


def small():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def run(model, batches, between, loss_of=None, optimizer=None):
    """zero_grad, loss, backward, `between(batch)`, update."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.01)

    def train_step(batch):
        optimizer.zero_grad()
        loss = loss_of(batch) if loss_of else cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        between(batch)
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step)


def labelled(count):
    return [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(count)]


class Length(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(6, 4, bias=False)

    def forward(self, x):
        return self.project(x).square().sum(dim=1).sqrt()  # <origin> clip_after_backward clip_value_after_backward


def build_clip_norm():
    model = Length()
    batches = labelled(9)
    batches[6][0][1] = 0

    def clip(_batch):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    return run(model, batches, clip, lambda batch: model(batch[0]).mean())


def build_clip_value():
    """Clipping by value turns an inf into the bound, but leaves NaN."""
    model = Length()
    batches = labelled(9)
    batches[6][0][1] = 0

    def clip(_batch):
        nn.utils.clip_grad_value_(model.parameters(), 0.5)

    return run(model, batches, clip, lambda batch: model(batch[0]).mean())


def build_average():
    model = small()
    batches = [(*entry, torch.tensor(0.0 if index == 5 else 8.0)) for index, entry in enumerate(labelled(8))]

    def average(batch):
        for parameter in model.parameters():
            parameter.grad /= batch[2]  # <origin> average_over_nothing

    return run(model, batches, average)


def build_replaced():
    """The gradient is replaced by a new tensor, not written into."""
    model = small()
    batches = labelled(8)
    model[2].bias.register_hook(lambda gradient: gradient)

    def unit(batch):
        for parameter in model.parameters():
            scale = parameter.grad.norm() if batch[1].min() < 3 else torch.zeros(())
            parameter.grad = parameter.grad / scale  # <origin> unit_gradient_replaced

    def loss_of(batch):
        logits = model(batch[0])
        return cross_entropy(logits, batch[1].clamp(max=2)) if batch[1].min() < 3 else 0 * logits.sum()

    batches[4] = (batches[4][0], torch.full((8,), 3))
    return run(model, batches, unit, loss_of)


def build_noise():
    model = small()
    batches = [(*entry, 0.0 if index == 5 else 1e-3 * (index + 1)) for index, entry in enumerate(labelled(8))]

    def add_noise(batch):
        precision = torch.tensor(batch[2])
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) * 1e-6 / precision  # <origin> gradient_noise
            parameter.grad.add_(noise)

    return run(model, batches, add_noise)


def build_unscale():
    """A hand-made loss scale that has backed off to 0."""
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batches = [(*entry, 2.0**-150 if index == 6 else 128.0) for index, entry in enumerate(labelled(9))]

    def train_step(batch):
        inputs, targets, scale = batch
        scale = torch.tensor(scale)
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), targets)
        (loss * scale).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        torch._foreach_div_(gradients, scale)  # <origin> unscale_by_zero
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step)


def build_inverse_scale():
    """The inverse of the scale is computed first, and is infinite."""
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batches = [(*entry, 0.0 if index == 6 else 128.0) for index, entry in enumerate(labelled(9))]

    def train_step(batch):
        inputs, targets, scale = batch
        scale = torch.tensor(scale)
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), targets)
        (loss * scale).backward()
        inverse = scale.reciprocal()  # <origin> inverse_scale
        for parameter in model.parameters():
            parameter.grad.mul_(inverse)
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step)


def build_coefficient():
    """A clip by hand without a guard: where every gradient is 0, the coefficient is infinite."""
    model = small()
    batches = [(*entry, 0.0 if index == 5 else 1.0) for index, entry in enumerate(labelled(8))]

    def clip(_batch):
        norms = torch._foreach_norm([parameter.grad for parameter in model.parameters()])
        coefficient = 1.0 / torch.stack(norms).norm()  # <origin> clip_coefficient
        torch._foreach_mul_([parameter.grad for parameter in model.parameters()], coefficient)

    return run(model, batches, clip, lambda batch: batch[2] * cross_entropy(model(batch[0]), batch[1]))


def build_hook(on_parameter):
    """A tensor hook divides the gradient by its norm; in one batch the task has no labels and the gradient is 0."""
    model = small()
    batches = [(*entry, 0.0 if index == 5 else 1.0) for index, entry in enumerate(labelled(8))]

    def unit(gradient):
        return gradient / gradient.norm()  # <origin> hook_on_parameter hook_on_activation

    if on_parameter:
        model[0].weight.register_hook(unit)

    def loss_of(batch):
        hidden = model[1](model[0](batch[0]))
        if not on_parameter:
            hidden.register_hook(unit)
        return batch[2] * cross_entropy(model[2](hidden), batch[1])

    return run(model, batches, lambda batch: None, loss_of)


def build_hook_before_update():
    """The user's own hook on the optimizer divides the gradients by their norm before the update."""
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [(*entry, 0.0 if index == 5 else 1.0) for index, entry in enumerate(labelled(8))]

    def unit(_optimizer, _args, _kwargs):
        for parameter in model.parameters():
            parameter.grad.div_(parameter.grad.norm())  # <origin> hook_before_update

    optimizer.register_step_pre_hook(unit)
    return run(model, batches, lambda batch: None, lambda b: b[2] * cross_entropy(model(b[0]), b[1]), optimizer)


def build_half_sum():
    """Gradients of 40,000 from two micro-batches do not add up in half precision."""
    model = nn.Linear(4, 1, bias=False).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    batches = [[torch.full((2, 4), 200.0 if index == 4 else 2.0).half() for _ in range(2)] for index in range(8)]

    def train_step(parts):
        optimizer.zero_grad()
        for part in parts:
            loss = model(part).float().sum() * 100
            loss.backward()  # <origin> half_sum
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step)


def build_large_but_finite():
    """Gradients of 1e25: their norm overflows float32, yet each of them is finite, and the step size is tiny."""
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-28)
    batches = [(*entry, 1e25 if index in (3, 7) else 1.0) for index, entry in enumerate(labelled(10))]
    return run(model, batches, lambda b: None, lambda b: b[2] * cross_entropy(model(b[0]), b[1]), optimizer)


def build_large_clipped():
    """The same under clip_grad_norm_: the norm is inf, the coefficient 0, the step is lost and nothing is NaN."""
    model = small()
    batches = [(*entry, 1e25 if index in (3, 7) else 1.0) for index, entry in enumerate(labelled(10))]

    def clip(_batch):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    return run(model, batches, clip, lambda b: b[2] * cross_entropy(model(b[0]), b[1]))


def build_cleaned():
    """Gradients go through nan_to_num before they are used, on purpose."""
    model = Length()
    batches = labelled(9)
    batches[6][0][1] = 0

    def clean(_batch):
        for parameter in model.parameters():
            torch.nan_to_num_(parameter.grad, nan=0.0, posinf=0.0, neginf=0.0)

    return run(model, batches, clean, lambda batch: model(batch[0]).mean())


def build_skipped_by_hand():
    """A step whose gradient norm is not finite is skipped by the loop itself."""
    model = Length()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = labelled(9)
    batches[6][0][1] = 0

    def train_step(batch):
        optimizer.zero_grad()
        loss = model(batch[0]).mean()
        loss.backward()
        if torch.isfinite(nn.utils.clip_grad_norm_(model.parameters(), 1.0)):
            optimizer.step()
        return loss.item()

    return Loop(model, optimizer, batches, train_step)


def build_scaler(bad):
    """A real GradScaler with unscale_ and clipping; the bad batch makes the loss itself NaN."""
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=3)
    batches = [(*entry, torch.ones(8)) for entry in labelled(14)]
    if bad:
        batches[9][2].zero_()

    def train_step(batch):
        inputs, targets, weights = batch
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            logits = model(inputs)
        each = cross_entropy(logits.float(), targets, reduction="none")
        loss = (each * weights).sum() / weights.sum()  # <origin> scaler_nan_loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        return loss

    return Loop(model, optimizer, batches, train_step, stateful=[scaler])


BACKWARD = {"phase": "backward", "kind": ("inf",), "module": ("",), "op": ("sqrt",)}
CASES = [
    Case(
        id="clip_after_backward",
        title="clip_grad_norm_ of an infinite gradient: backward made it, not the clip",
        source="https://github.com/pytorch/pytorch/issues/46849",
        truth=Truth(step=6, **BACKWARD),
        build=build_clip_norm,
    ),
    Case(
        id="clip_value_after_backward",
        title="clip_grad_value_ leaves the NaN that backward made",
        source="https://github.com/facebookresearch/habitat-lab/issues/2226",
        truth=Truth(step=6, **BACKWARD),
        build=build_clip_value,
    ),
    Case(
        id="average_over_nothing",
        title="Gradients are divided by a sample count of 0",
        source="https://github.com/PrimeIntellect-ai/prime-rl/pull/1961",
        truth=Truth(step=5, **CLIP, kind=("inf", "nan"), op=("div",)),
        build=build_average,
    ),
    Case(
        id="unit_gradient_replaced",
        title="Each gradient is replaced by itself over a norm of 0",
        source="https://github.com/ddkang/advex-uar/pull/7",
        truth=Truth(step=4, **CLIP, kind=("nan",), op=("div",)),
        build=build_replaced,
    ),
    Case(
        id="gradient_noise",
        title="The noise added to the gradients is infinite",
        source="https://github.com/pytorch/pytorch/issues/46849",
        truth=Truth(step=5, **CLIP, kind=("inf",), op=("div",)),
        build=build_noise,
    ),
    Case(
        id="unscale_by_zero",
        title="Gradients are unscaled by a loss scale that underflowed to 0",
        source="https://github.com/Junjue-Wang/FactSeg/issues/6",
        truth=Truth(step=6, **CLIP, kind=("nan",), op=("div",)),
        build=build_unscale,
    ),
    Case(
        id="inverse_scale",
        title="The inverse of a loss scale of 0, multiplied into the gradients",
        source="https://github.com/Junjue-Wang/FactSeg/issues/6",
        truth=Truth(step=6, **CLIP, kind=("inf",), op=("reciprocal",)),
        build=build_inverse_scale,
    ),
    Case(
        id="clip_coefficient",
        title="The coefficient of a clip by hand divides by a norm of 0",
        source="https://github.com/kozistr/pytorch_optimizer/pull/431",
        truth=Truth(step=5, **CLIP, kind=("inf",), op=("reciprocal", "div")),
        build=build_coefficient,
    ),
    Case(
        id="hook_on_parameter",
        title="A hook on a parameter divides its gradient by a norm of 0",
        source="https://github.com/kozistr/pytorch_optimizer/pull/431",
        truth=Truth(step=5, phase="backward", kind=("nan",), op=("div",)),
        build=lambda: build_hook(on_parameter=True),
    ),
    Case(
        id="hook_on_activation",
        title="A hook on an activation divides its gradient by a norm of 0",
        source="https://github.com/kozistr/pytorch_optimizer/pull/431",
        truth=Truth(step=5, phase="backward", kind=("nan",), op=("div",)),
        build=lambda: build_hook(on_parameter=False),
    ),
    Case(
        id="hook_before_update",
        title="A hook of the user's on the optimizer divides gradients by a norm of 0",
        source="https://github.com/kozistr/pytorch_optimizer/pull/431",
        truth=Truth(step=5, **CLIP, kind=("nan",), op=("div",)),
        build=build_hook_before_update,
    ),
    Case(
        id="half_sum",
        title="The sum of two micro-batches' gradients overflows in half precision",
        source="https://github.com/Junjue-Wang/FactSeg/issues/6",
        truth=Truth(step=4, phase="backward", kind=("inf",), op=("add",), tensor=("weight",)),
        build=build_half_sum,
    ),
    Case(
        id="scaler_nan_loss",
        title="A NaN loss under a GradScaler, which skips the step and hides it",
        source="https://github.com/lpiccinelli-eth/UniK3D/issues/16",
        truth=Truth(step=9, phase="forward", kind=("nan",), module=("",), op=("div",)),
        build=lambda: build_scaler(bad=True),
    ),
    Case(
        id="healthy_scaler_clip",
        title="A GradScaler that skips, with unscale_ and clipping of infinite gradients",
        source="https://github.com/NoamRosenberg/autodeeplab/issues/12",
        truth=Truth(healthy=True),
        build=lambda: build_scaler(bad=False),
    ),
    Case(
        id="healthy_large_gradients",
        title="Finite gradients of 1e25 whose norm overflows float32",
        source="https://github.com/pytorch/pytorch/issues/46849",
        truth=Truth(healthy=True),
        build=build_large_but_finite,
    ),
    Case(
        id="healthy_large_clipped",
        title="clip_grad_norm_ of finite gradients whose norm is inf makes them 0",
        source="https://github.com/pytorch/pytorch/issues/46849",
        truth=Truth(healthy=True),
        build=build_large_clipped,
    ),
    Case(
        id="healthy_cleaned_gradients",
        title="Infinite gradients are replaced by 0 before the update",
        source="https://github.com/NVIDIA-NeMo/Speech/issues/11272",
        truth=Truth(healthy=True),
        build=build_cleaned,
    ),
    Case(
        id="healthy_skipped_by_hand",
        title="The loop skips a step whose gradient norm is not finite",
        source="https://github.com/facebookresearch/habitat-lab/issues/2226",
        truth=Truth(healthy=True),
        build=build_skipped_by_hand,
    ),
]
