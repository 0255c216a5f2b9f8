"""The update itself makes the value: every kind of optimizer, and updates written by hand."""

import copy
import math

import torch
from nanzoo import Case, Loop, Truth
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss


class TwoBranches(nn.Module):
    """The second branch is used, and has gradients, only when asked for; then half its weights have a gradient of 0."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.extra = nn.Linear(4, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x, side):
        hidden = self.body(x)
        return self.head(hidden if side is None else hidden + self.extra(side))


def build_no_epsilon(make):
    """From step 4 on the side input is given; its third column is 0, so are those gradients."""
    model = TwoBranches()
    optimizer = make(model.parameters())
    batches = []
    for index in range(9):
        side = torch.randn(8, 4)
        side[:, 2] = 0
        batches.append((torch.randn(8, 6), side if index >= 4 else None, torch.randint(3, (8,))))

    def train_step(batch):
        inputs, side, targets = batch
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs, side), targets)
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step)


def build_schedule(make, make_scheduler, steps=12):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = make(model.parameters())
    scheduler = make_scheduler(optimizer)
    batches = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(steps)]

    def train_step(batch):
        inputs, targets = batch
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss

    return Loop(model, optimizer, batches, train_step, stateful=[scheduler])


def inverse_root(step):
    """Noam's warm-up, asked for step 0 of its second phase: a division by a numpy-like 0."""
    return float(torch.tensor(float(step - 5)).rsqrt()) if step == 5 else 1.0


def cosine_of_nothing(step, warmup=3, total=3):
    if step <= warmup:
        return step / warmup
    progress = torch.tensor(float(step - warmup)) / (total - warmup)
    return 0.5 * (1 + math.cos(math.pi * float(progress))) if math.isfinite(progress) else float(progress * 0)


def build_momentum_overflow():
    """The momentum buffer grows 1,000-fold a step; the weight follows it to infinity."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(
        [
            {"params": [model[0].weight, model[2].weight, model[2].bias], "lr": 1e-2},
            {"params": [model[0].bias], "lr": 1.0, "momentum": 1e3, "dampening": 0.0},
        ]
    )
    batches = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(24)]

    def train_step(batch):
        inputs, targets = batch
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), targets) + 1e-3 * model[0].bias.clamp(-1, 1).sum()
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step)


def build_ascent():
    """maximize=True does not turn the weight decay round: it overshoots 1e9-fold a step."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e4, maximize=True, weight_decay=1e5, foreach=True)
    batches = [torch.randn(8, 4) for _ in range(12)]

    def train_step(batch):
        optimizer.zero_grad()
        reward = torch.tanh(model(batch)).mean()
        reward.backward()
        optimizer.step()
        return reward

    return Loop(model, optimizer, batches, train_step)


def build_lbfgs():
    """LBFGS calls a closure that runs forward and backward inside the update."""
    model = nn.Linear(4, 3)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    batches = [(torch.randn(12, 4), torch.rand(12)) for _ in range(8)]
    batches[5][0][3] = 0

    def train_step(batch):
        inputs, targets = batch

        def closure():
            optimizer.zero_grad()
            length = (inputs @ model.weight.T).square().sum(dim=1).sqrt()  # <origin> lbfgs_closure
            loss = mse_loss(length, targets) + 0.01 * model.bias.square().sum()
            loss.backward()
            return loss

        return optimizer.step(closure)

    return Loop(model, optimizer, batches, train_step)


def build_healthy_lbfgs():
    model = nn.Linear(4, 3)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")
    batches = [(torch.randn(12, 4), torch.randint(3, (12,))) for _ in range(8)]

    def train_step(batch):
        inputs, targets = batch

        def closure():
            optimizer.zero_grad()
            loss = cross_entropy(model(inputs), targets)
            loss.backward()
            return loss

        return float(optimizer.step(closure))

    return Loop(model, optimizer, batches, train_step)


class WithTeacher(nn.Module):
    def __init__(self):
        super().__init__()
        self.student = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("updates", torch.zeros(()))

    @torch.no_grad()
    def follow(self, warmup):
        """The teacher's decay is computed from the update count, and a warm-up of 0 divides by 0."""
        self.updates += 1
        decay = 0.9 * (1 - torch.exp(-self.updates / warmup))
        for mean, value in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            mean.mul_(decay).add_(value * (1 - decay))


def build_teacher(bad):
    model = WithTeacher()
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=1e-3)
    batches = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(9)]

    def train_step(batch):
        inputs, targets = batch
        optimizer.zero_grad()
        logits = model.student(inputs)
        with torch.no_grad():
            goal = model.teacher(inputs)
        loss = cross_entropy(logits, targets) + 0.1 * mse_loss(logits, goal)
        loss.backward()
        optimizer.step()
        model.follow(warmup=10.0)
        return loss

    def poisoned_step(batch):
        inputs, targets = batch
        optimizer.zero_grad()
        loss = cross_entropy(model.student(inputs), targets)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.updates += 1
            scale = 1 / (6 - model.updates)  # <origin> teacher_update
            for mean, value in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
                mean.lerp_(value, scale)
        return loss

    return Loop(model, optimizer, batches, poisoned_step if bad else train_step)


def build_by_hand():
    """Plain gradient descent, written out, with a step size of its own that divides by the gradient's norm."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    unused = torch.optim.SGD(model.parameters(), lr=0.0)
    batches = [(torch.randn(8, 6), torch.rand(8)) for _ in range(9)]

    def train_step(batch):
        inputs, targets = batch
        model.zero_grad()
        predicted = model(inputs).squeeze(1)
        loss = (predicted - targets).clamp(min=0).sum() if targets[0] < 2 else (predicted * 0).sum()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                rate = 0.01 / parameter.grad.square().sum()
                parameter -= rate * parameter.grad  # <origin> update_by_hand
        return loss

    batches[5] = (batches[5][0], torch.full((8,), 3.0))
    return Loop(model, unused, batches, train_step)


def build_state_overflow():
    """One gradient of 1e25 makes Adam's second moment infinite: that weight never moves again, and nothing is NaN."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = [(torch.randn(8, 4), 1e25 if index == 4 else 1.0) for index in range(9)]

    def train_step(batch):
        inputs, weight = batch
        optimizer.zero_grad()
        loss = weight * model(inputs).mean()
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step)


def without_epsilon(name, **options):
    make = getattr(torch.optim, name)
    kind = "_".join([name.lower(), *(key for key in options if key in ("foreach", "fused", "capturable"))])
    return Case(
        id=f"no_epsilon_{kind}",
        title=f"{name} without epsilon meets gradients of exactly 0",
        source="https://discuss.pytorch.org/t/adam-half-precision-nans/1765",
        truth=Truth(step=4, phase="optimizer", kind=("nan",), tensor=("extra.weight",), line=False),
        build=lambda: build_no_epsilon(lambda parameters: make(parameters, **{"lr": 1e-3, "eps": 0.0} | options)),
    )


ALL = ("0.weight", "0.bias", "2.weight", "2.bias")
TEACHER = tuple(f"teacher.{name}" for name in ALL)
CASES = [
    without_epsilon("RMSprop"),
    without_epsilon("Adagrad"),
    without_epsilon("Adadelta"),
    without_epsilon("NAdam"),
    without_epsilon("Adamax"),
    without_epsilon("RMSprop", foreach=True),
    without_epsilon("AdamW", foreach=True),
    without_epsilon("AdamW", fused=True),
    without_epsilon("Adam", foreach=True, amsgrad=True),
    without_epsilon("Adagrad", fused=True),
    Case(
        id="learning_rate_inf_fused",
        title="A fused Adam whose learning rate becomes inf",
        source="https://github.com/VainF/DeepLabV3Plus-Pytorch/issues/59",
        truth=Truth(step=5, phase="optimizer", kind=("nan", "inf"), tensor=ALL, line=False),
        build=lambda: build_schedule(
            lambda parameters: torch.optim.Adam(parameters, lr=1e-3, fused=True),
            lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, inverse_root),
        ),
    ),
    Case(
        id="learning_rate_nan_foreach",
        title="A cosine schedule without any steps to decay over",
        source="https://github.com/AndrewAtanov/simclr-pytorch/pull/12",
        truth=Truth(step=4, phase="optimizer", kind=("nan",), tensor=ALL, line=False),
        build=lambda: build_schedule(
            lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, foreach=True),
            lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_of_nothing),
        ),
    ),
    Case(
        id="learning_rate_tensor_nan",
        title="A learning rate that is a tensor becomes NaN",
        source="https://github.com/VainF/DeepLabV3Plus-Pytorch/issues/59",
        truth=Truth(step=4, phase="optimizer", kind=("nan",), tensor=ALL, line=False),
        build=lambda: build_schedule(
            lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(1e-3)),
            lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_of_nothing),
        ),
    ),
    Case(
        id="healthy_one_cycle",
        title="OneCycleLR and momentum that cycles",
        source="https://github.com/pytorch/pytorch/issues/17913",
        truth=Truth(healthy=True),
        build=lambda: build_schedule(
            lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
            lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=14),
        ),
    ),
    Case(
        id="momentum_overflow",
        title="A momentum buffer that overflows before its weight does",
        source="https://github.com/NeuroTorch/NeuroTorch/issues/127",
        truth=Truth(step=14, phase="optimizer", kind=("inf",), tensor=("0.bias",), line=False),
        build=build_momentum_overflow,
    ),
    Case(
        id="weight_decay_ascent",
        title="SGD with maximize: step size times weight decay is 1e9, the weight overflows behind a tanh",
        source="https://github.com/NeuroTorch/NeuroTorch/issues/127",
        truth=Truth(step=4, phase="optimizer", kind=("inf",), tensor=("0.weight",), line=False),
        build=build_ascent,
    ),
    Case(
        id="lbfgs_closure",
        title="A fault in the closure that LBFGS calls",
        source="https://github.com/pytorch/pytorch/issues/2421",
        truth=Truth(step=5, phase="backward", kind=("inf",), module=("",), op=("sqrt",)),
        build=build_lbfgs,
    ),
    Case(
        id="healthy_lbfgs",
        title="LBFGS with a line search",
        source="https://github.com/pytorch/pytorch/issues/111369",
        truth=Truth(healthy=True),
        build=build_healthy_lbfgs,
    ),
    Case(
        id="teacher_update",
        title="The moving average of the weights divides by 0; the student is fine",
        source="https://github.com/ultralytics/yolov5/issues/5241",
        truth=Truth(step=5, phase="optimizer", kind=("inf",), op=("reciprocal", "div"), tensor=TEACHER),
        build=lambda: build_teacher(bad=True),
    ),
    Case(
        id="healthy_teacher",
        title="A teacher that follows by a moving average",
        source="https://github.com/ultralytics/yolov5/issues/5241",
        truth=Truth(healthy=True),
        build=lambda: build_teacher(bad=False),
    ),
    Case(
        id="healthy_state_overflow",
        title="Adam's second moment overflows and the weight just stops",
        source="https://discuss.pytorch.org/t/adam-half-precision-nans/1765",
        truth=Truth(healthy=True),
        build=build_state_overflow,
    ),
]
