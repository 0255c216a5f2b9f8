"""Two networks, two optimizers, and gradients of gradients."""

import torch
from nanzoo import Case, Loop, Truth
from torch import nn


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.LeakyReLU(0.2))
        self.score = nn.Linear(16, 1)

    def forward(self, x):
        return self.score(self.body(x)).squeeze(1)


def generator():
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 4))


def pair():
    return nn.ModuleDict({"generator": generator(), "critic": Critic()})


def build_saturated():
    """The generator minimises log(1 - D): an overconfident critic makes D exactly 1."""
    model = pair()
    generate = torch.optim.Adam(model["generator"].parameters(), lr=1e-3)
    judge = torch.optim.Adam(model["critic"].parameters(), lr=1e-3)
    batches = [(torch.randn(8, 4), torch.randn(8, 3), 60.0 if index == 5 else 0.0) for index in range(9)]

    def train_step(batch):
        real, noise, bonus = batch
        fake = model["generator"](noise)
        judge.zero_grad()
        softplus = nn.functional.softplus
        loss = softplus(-model["critic"](real)).mean() + softplus(model["critic"](fake.detach())).mean()
        loss.backward()
        judge.step()
        generate.zero_grad()
        belief = torch.sigmoid(model["critic"](fake) + bonus)
        fooled = torch.log(1 - belief).mean()  # <origin> gan_log_saturated
        fooled.backward()
        generate.step()
        return {"critic": loss, "generator": fooled}

    return Loop(model, judge, batches, train_step, stateful=[generate])


def build_second_optimizer(both):
    """The generator's own optimizer is known as `stateful` alone, or as one of two: its step size is infinite once."""
    model = pair()
    judge = torch.optim.Adam(model["critic"].parameters(), lr=1e-3)
    generate = torch.optim.SGD(model["generator"].parameters(), lr=1e-3)
    batches = [(torch.randn(8, 4), torch.randn(8, 3)) for _ in range(9)]
    seen = torch.zeros(())

    def train_step(batch):
        real, noise = batch
        fake = model["generator"](noise)
        judge.zero_grad()
        loss = model["critic"](fake.detach()).mean() - model["critic"](real).mean()
        loss.backward()
        judge.step()
        seen.add_(1)
        generate.param_groups[0]["lr"] = float("inf") if int(seen) == 5 else 1e-3
        generate.zero_grad()
        (-model["critic"](fake).mean()).backward()
        generate.step()
        return loss

    optimizer = (judge, generate) if both else judge
    return Loop(model, optimizer, batches, train_step, stateful=[seen] if both else [seen, generate])


def build_generator_backward():
    """The generator's gradient alone is bad, and its optimizer is one the tool knows as `stateful` alone."""
    model = pair()
    judge = torch.optim.Adam(model["critic"].parameters(), lr=1e-3)
    generate = torch.optim.Adam(model["generator"].parameters(), lr=1e-3)
    batches = [(torch.randn(8, 4), torch.randn(8, 3)) for _ in range(9)]
    batches[4][1][3:5] = 0.5  # two equal noise vectors give two equal samples

    def train_step(batch):
        real, noise = batch
        fake = model["generator"](noise)
        judge.zero_grad()
        loss = model["critic"](fake.detach()).mean() - model["critic"](real).mean()
        loss.backward()
        judge.step()
        generate.zero_grad()
        apart = (fake[1:] - fake[:-1]).square().sum(dim=1)
        diversity = apart.sqrt().mean()  # <origin> gan_generator_backward
        (-model["critic"](fake).mean() - 0.1 * diversity).backward()
        generate.step()
        return loss

    return Loop(model, judge, batches, train_step, stateful=[generate])


class Bounded(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.score = nn.Linear(4, 16), nn.Linear(16, 1)

    def forward(self, x):
        return self.score(nn.functional.hardtanh(self.body(x))).squeeze(1)


def build_gradient_penalty():
    """Where every unit is saturated the critic's gradient is 0, and the root of its square has no derivative."""
    model = Bounded()
    with torch.no_grad():
        model.body.bias.fill_(0.05)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = [(torch.randn(8, 4), torch.randn(8, 4)) for _ in range(9)]
    for half in batches[6]:
        half[2] = torch.tensor([900.0, -1100.0, 1300.0, 700.0])

    def train_step(batch):
        real, fake = batch
        optimizer.zero_grad()
        between = (0.5 * real + 0.5 * fake).requires_grad_()
        gradient = torch.autograd.grad(model(between).sum(), between, create_graph=True)[0]
        slope = gradient.square().sum(dim=1).sqrt()  # <origin> gradient_penalty
        loss = model(fake).mean() - model(real).mean() + 10 * (slope - 1).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step)


class Potential(nn.Module):
    """An energy of pair distances; forces are its gradient."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, positions):
        difference = positions.unsqueeze(1) - positions.unsqueeze(0)
        upper = torch.ones(len(positions), len(positions)).triu(1).bool()
        distance = difference[upper].square().sum(-1).sqrt()  # <origin> force_matching
        return self.energy(distance.unsqueeze(1)).sum()


def build_force_matching():
    """Two atoms in one place: the forces, a gradient taken inside the step, are NaN, and so is the loss."""
    model = Potential()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = [(torch.randn(5, 3), torch.randn(5, 3)) for _ in range(8)]
    batches[4][0][3] = batches[4][0][1]

    def train_step(batch):
        positions, forces = batch
        positions = positions.clone().requires_grad_()
        optimizer.zero_grad()
        predicted = -torch.autograd.grad(model(positions), positions, create_graph=True)[0]
        loss = (predicted - forces).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return Loop(model, optimizer, batches, train_step)


def build_healthy():
    """Two optimizers, a gradient penalty with the norm's own derivative at 0, a penalty every other step."""
    model = pair()
    generate = torch.optim.RMSprop(model["generator"].parameters(), lr=1e-3)
    judge = torch.optim.RMSprop(model["critic"].parameters(), lr=1e-3)
    batches = [(torch.randn(8, 4), torch.randn(8, 3), index % 2) for index in range(10)]

    def train_step(batch):
        real, noise, penalised = batch
        fake = model["generator"](noise)
        judge.zero_grad()
        loss = model["critic"](fake.detach()).mean() - model["critic"](real).mean()
        if penalised:
            between = (0.0 * real).requires_grad_()
            gradient = torch.autograd.grad(model["critic"](between).sum(), between, create_graph=True)[0]
            loss = loss + ((0 * gradient).norm(2, dim=1) - 1).square().mean()
        loss.backward()
        judge.step()
        if not penalised:
            generate.zero_grad()
            (-model["critic"](fake).mean()).backward()
            generate.step()
        return

    return Loop(model, (judge, generate), batches, train_step)


PENALTY = "https://github.com/pytorch/pytorch/issues/2534"
GENERATOR = tuple(f"generator.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias"))
CASES = [
    Case(
        id="gan_log_saturated",
        title="log(1 - D) when the critic is certain",
        source="https://github.com/soumith/ganhacks/issues/36",
        truth=Truth(step=5, phase="forward", kind=("inf",), module=("",), op=("log",)),
        build=build_saturated,
    ),
    Case(
        id="gan_second_optimizer",
        title="The second of two optimizers makes the value",
        source="https://github.com/VainF/DeepLabV3Plus-Pytorch/issues/59",
        truth=Truth(step=4, phase="optimizer", kind=("inf",), tensor=GENERATOR, line=False),
        build=lambda: build_second_optimizer(both=True),
    ),
    Case(
        id="gan_stateful_optimizer",
        title="An optimizer that the tool knows as a stateful object alone makes the value",
        source="https://github.com/VainF/DeepLabV3Plus-Pytorch/issues/59",
        truth=Truth(step=4, phase="optimizer", kind=("inf",), tensor=GENERATOR, line=False),
        build=lambda: build_second_optimizer(both=False),
    ),
    Case(
        id="gan_generator_backward",
        title="A diversity term between two equal samples of the generator",
        source="https://github.com/pytorch/pytorch/issues/6648",
        truth=Truth(step=4, phase="backward", kind=("inf",), module=("",), op=("sqrt",)),
        build=build_generator_backward,
    ),
    Case(
        id="gradient_penalty",
        title="The root of a squared gradient that is 0, differentiated once more",
        source=PENALTY,
        truth=Truth(step=6, phase="backward", kind=("inf",), module=("",), op=("sqrt",)),
        build=build_gradient_penalty,
    ),
    Case(
        id="force_matching",
        title="Forces as a gradient inside the step: two atoms in one place",
        source="https://github.com/uw-ipd/tmol/pull/146",
        truth=Truth(step=4, phase="backward", kind=("inf",), module=("",), op=("sqrt",)),
        build=build_force_matching,
    ),
    Case(
        id="healthy_gan",
        title="Two optimizers that take turns, a penalty every other step",
        source=PENALTY,
        truth=Truth(healthy=True),
        build=build_healthy,
    ),
]
