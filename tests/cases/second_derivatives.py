"""Derivatives within the step, by torch.autograd.grad and torch.func: the place is where the function was written."""

import torch
from nanzoo import Case, Loop, Truth
from torch import nn


def loop(model, batches, loss_of):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def train_step(batch):
        optimizer.zero_grad()
        loss = loss_of(*batch)
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step)


class Power(nn.Module):
    """Its first derivative is 0 at 0, its second infinite."""

    def forward(self, x):
        return x.abs() ** 1.5  # <origin> second_derivative


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.activation, self.head = nn.Linear(2, 8, bias=False), Power(), nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.activation(self.inner(x)))


def points(count, bad):
    batches = [(torch.randn(8, 2),) for _ in range(count)]
    batches[bad][0][3] = 0.0
    return batches


def build_field():
    """A physics-informed network: the residual holds the gradient, and training differentiates it."""
    model = nn.ModuleDict({"field": Field()})

    def loss_of(x):
        x = x.clone().requires_grad_()
        value = model["field"](x)
        slope = torch.autograd.grad(value.sum(), x, create_graph=True)[0]
        return (slope.square().sum(1) - 1).square().mean() + value.square().mean()

    return loop(model, points(8, 4), loss_of)


def build_function_gradient():
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss_of(x):
        def energy(point):
            return model(point).sum() + point.square().sum().sqrt()  # <origin> function_gradient

        slopes = torch.stack([torch.func.grad(energy)(point) for point in x])
        return (slopes.square().sum(1) - 1).square().mean()

    return loop(model, points(8, 5), loss_of)


def build_hessian():
    model = nn.Linear(2, 4, bias=False)

    def loss_of(x):
        def energy(point):
            return (model(point).abs() ** 1.5).sum()  # <origin> function_hessian

        return torch.stack([torch.func.hessian(energy)(point) for point in x]).square().mean()

    return loop(model, points(6, 3), loss_of)


PHYSICS = "https://github.com/pytorch/pytorch/issues/95180"
CASES = [
    Case(
        id="second_derivative",
        title="The second derivative of a power at 0, of a module's function",
        source=PHYSICS,
        truth=Truth(step=4, phase="backward", kind=("inf", "nan"), module=("field.activation",), op=("pow",)),
        build=build_field,
    ),
    Case(
        id="function_gradient",
        title="torch.func.grad of a root at 0",
        source="https://github.com/pytorch/pytorch/issues/2421",
        truth=Truth(step=5, phase="backward", kind=("inf", "nan"), module=("",), op=("sqrt",)),
        build=build_function_gradient,
    ),
    Case(
        id="function_hessian",
        title="torch.func.hessian of a power at 0",
        source=PHYSICS,
        truth=Truth(step=3, phase="backward", kind=("inf", "nan"), module=("",), op=("pow",)),
        build=build_hessian,
    ),
]
