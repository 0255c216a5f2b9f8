"""Odd parameters, odd optimizers, odd ways to call torch: what a tool meets at its own edges."""

import copy
import warnings

import numpy as np
import torch
from nanzoo import Case, Loop, Truth
from torch import nn
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform
from torch.nn import functional as F

NAN, INF = float("nan"), float("inf")


def network(outputs=3):
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, outputs))


def loop(model, batches, loss_of, optimizer=None, **more):
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=1e-3)

    def train_step(batch):
        optimizer.zero_grad()
        loss = loss_of(*batch)
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step, **more)


def labelled(count):
    return [(torch.randn(6, 5), torch.randint(3, (6,))) for _ in range(count)]


class Actor(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.spread = nn.Linear(5, 2), nn.Parameter(torch.zeros(2))

    def forward(self, x, actions):
        policy = TransformedDistribution(Normal(self.mean(x), self.spread.exp()), TanhTransform())
        return -policy.log_prob(actions).mean()  # <origin> tanh_policy


def build_tanh_policy():
    """A stored action of exactly 1: its place before the tanh is infinite."""
    batches = [(torch.randn(6, 5), 0.9 * torch.rand(6, 2)) for _ in range(8)]
    batches[5][1][2, 0] = 1.0
    model = Actor()
    return loop(model, batches, lambda x, actions: model(x, actions))


def log_square(x: torch.Tensor) -> torch.Tensor:
    return torch.log(x * x)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecated, and in much code
    scripted = torch.jit.script(log_square)


class WithScript(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 3, bias=False)

    def forward(self, x):
        return scripted(self.body(x))  # <origin> scripted_function


def build_script():
    model = WithScript()
    batches = [(torch.randn(6, 5),) for _ in range(8)]
    batches[4][0][1] = 0
    return loop(model, batches, lambda x: model(x).mean())


class Length(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(5, 4, bias=False)

    def forward(self, x):
        return self.project(x).square().sum(dim=1).sqrt()  # <origin> anomaly_mode adam_closure


def zero_rows(count, bad):
    batches = [(torch.randn(6, 5),) for _ in range(count)]
    batches[bad][0][2] = 0
    return batches


def build_anomaly():
    """The loop runs under torch's own anomaly mode, which raises."""
    model = Length()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def train_step(batch):
        optimizer.zero_grad()
        with torch.autograd.set_detect_anomaly(True):
            loss = model(*batch).mean()
            loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, zero_rows(7, 4), train_step)


def build_closure(epsilon, bad):
    """Adam with a closure, as Lightning calls it: forward and backward happen within the update."""
    model = Length()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=epsilon)
    batches = zero_rows(8, 5) if bad else [(torch.randn(6, 5),) for _ in range(8)]
    if epsilon == 0.0:
        for (features,) in batches:
            features[:, 3] = 0

    def train_step(batch):
        def closure():
            optimizer.zero_grad()
            loss = model(*batch).mean()
            loss.backward()
            return loss

        return optimizer.step(closure)

    return Loop(model, optimizer, batches, train_step)


def build_hidden_backward():
    """A NaN gradient under a GradScaler, from a root at 0: the scaler skips that step, and nothing comes of it."""
    model = Length()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def train_step(batch):
        optimizer.zero_grad()
        loss = model(*batch).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss

    return Loop(model, optimizer, zero_rows(8, 5), train_step, stateful=[scaler])


def build_reptile():
    """Each step trains a deep copy of the model and moves towards it."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def train_step(batch):
        inputs, targets = batch
        inner = copy.deepcopy(model)
        fast = torch.optim.SGD(inner.parameters(), lr=0.05)
        for _ in range(2):
            fast.zero_grad()
            loss = F.cross_entropy(inner(inputs), targets)
            loss.backward()
            fast.step()
        optimizer.zero_grad()
        for slow, quick in zip(model.parameters(), inner.parameters(), strict=True):
            slow.grad = (slow - quick).detach()
        optimizer.step()
        return loss

    return Loop(model, optimizer, labelled(8), train_step)


def build_lazy():
    """Lazy layers: their parameters have no shape before the first batch."""
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyBatchNorm1d(), nn.LazyLinear(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return loop(model, labelled(6), lambda x, y: F.cross_entropy(model(x), y), optimizer)


def build_lazy_fault():
    """Lazy layers, trained for a while before the fault."""
    model = nn.Sequential(nn.LazyLinear(6, bias=False), nn.Tanh(), nn.LazyLinear(4, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def loss_of(x):
        return model(x).square().sum(1).sqrt().mean()  # <origin> lazy_layers

    return loop(model, zero_rows(8, 4), loss_of, optimizer)


class Odd(nn.Module):
    """Parameters and buffers of every kind."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 3)
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.number = nn.Parameter(torch.tensor(3), requires_grad=False)
        self.wide = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.narrow = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.shared = self.body.weight
        self.unused = nn.Parameter(torch.zeros(2))
        self.transposed = nn.Parameter(torch.randn(4, 3).t())
        self.register_buffer("flags", torch.ones(3, dtype=torch.bool))
        self.register_buffer("codes", torch.ones(3, dtype=torch.int8))
        self.register_buffer("nothing", None)
        self.register_buffer("rotation", torch.ones(3, dtype=torch.complex64))
        self.register_buffer("small", torch.ones(3, dtype=torch.float16))

    def forward(self, x):
        out = self.body(x) * self.wide.float() + self.narrow.float() * self.scalar
        out = out + (self.phase * self.rotation).abs() + self.transposed.sum(1) * self.flags
        return (out * self.codes + self.small.float() * self.number + self.empty.sum(), {"unused": None})


def build_odd():
    model = Odd()
    optimizer = torch.optim.SGD([entry for entry in model.parameters() if entry.requires_grad], lr=0.01)
    return loop(model, labelled(8), lambda x, y: F.cross_entropy(model(x)[0], y), optimizer)


class Warmed(torch.optim.Optimizer):
    """Keeps a count under a string key, lists and objects in its state, and divides by the count's distance to 6."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.01})
        self.state["count"] = 0
        self.state["past"] = []

    @torch.no_grad()
    def step(self, closure=None):
        self.state["count"] += 1
        self.state["past"].append(self.state["count"])
        remaining = torch.tensor(float(6 - len(self.state["past"])))
        rate = self.param_groups[0]["lr"] / remaining  # <origin> string_state
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(rate * parameter.grad)


def build_string_state():
    model = network()
    return loop(model, labelled(9), lambda x, y: F.cross_entropy(model(x), y), Warmed(model.parameters()))


def flatten(model):
    """All parameters become views of one flat tensor, and their gradients of another, as sharding libraries do."""
    parameters = list(model.parameters())
    flat = torch.cat([entry.detach().flatten() for entry in parameters])
    gradients = torch.zeros_like(flat)
    start = 0
    for entry in parameters:
        stop = start + entry.numel()
        entry.data = flat[start:stop].view_as(entry)
        entry.grad = gradients[start:stop].view_as(entry)
        start = stop
    return flat


def build_flat_weight():
    """A weight within the flat tensor is written from outside."""
    model = network()
    flatten(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def batches():
        for index, batch in enumerate(labelled(8)):
            if index == 5:
                with torch.no_grad():
                    model[2].weight[1, 1] = NAN
            yield batch

    def train_step(batch):
        inputs, targets = batch
        optimizer.zero_grad(set_to_none=False)
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches(), train_step)


def build_flat_update():
    """The learning rate of one parameter overflows it: its neighbours in the flat tensor stay finite."""
    model = network()
    flatten(model)
    groups = [{"params": [entry], "lr": 0.01} for entry in model.parameters()]
    optimizer = torch.optim.SGD(groups)
    batches = [(*entry, index) for index, entry in enumerate(labelled(8))]

    def train_step(batch):
        inputs, targets, index = batch
        optimizer.zero_grad(set_to_none=False)
        loss = 1e3 * F.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.param_groups[3]["lr"] = 3e38 if index == 4 else 1e-5
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step)


class Curved(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Linear(5, 4, bias=False)

    def forward(self, x):
        gram = self.factor(x)
        return -torch.logdet(gram.T @ gram)  # <origin> logdet_singular


def build_logdet():
    """A batch of zeros: the determinant is 0."""
    model = Curved()
    batches = [(torch.randn(6, 5),) for _ in range(8)]
    batches[5][0].zero_()
    return loop(model, batches, lambda x: model(x))


def build_numpy_number():
    """A weight computed with numpy from the loss's own value overflows."""
    model = network()
    batches = [(*entry, 1e4 if index == 5 else 1.0) for index, entry in enumerate(labelled(8))]

    def loss_of(x, y, sharpness):
        loss = F.cross_entropy(model(x), y)
        with np.errstate(over="ignore"):
            weight = float(np.exp(np.float64(loss.item() * sharpness)))
        return weight * loss  # <origin> numpy_weight

    return loop(model, batches, loss_of)


class Quantile(nn.Module):
    def forward(self, x):
        return torch.erfinv(2 * x - 1)  # <origin> quantile_of_one


def build_quantile():
    """A rank of exactly 1 has no normal quantile."""
    model = nn.Sequential(Quantile(), *network())
    batches = [(0.1 + 0.8 * torch.rand(6, 5), torch.randint(3, (6,))) for _ in range(8)]
    batches[6][0][3, 3] = 1.0
    return loop(model, batches, lambda x, y: F.cross_entropy(model(x), y))


class Generator(nn.Module):
    """A module that yields its blocks' outputs one by one, and gives them in a list of dicts."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(5, 5) for _ in range(3)])

    def pieces(self, x):
        for block in self.blocks:
            x = block(x)
            yield {"features": x, "energy": x.square().sum(1) + 1}

    def forward(self, x):
        return [*self.pieces(x)]


def build_generator():
    """The third block's energy is normalised outside of any module."""
    model = Generator()
    batches = [(torch.randn(6, 5), torch.rand(6)) for _ in range(8)]

    def loss_of(x, goal):
        energies = [piece["energy"] for piece in model(x)]
        if goal[0] > 1:
            energies[2] = energies[2] * 0
        share = energies[2] / energies[2].sum()  # <origin> outside_modules
        return (share - goal).square().mean() + energies[0].mean()

    batches[6][1].fill_(2.0)
    return loop(model, batches, loss_of)


CASES = [
    Case(
        id="tanh_policy",
        title="The log-probability of an action of exactly 1 under a squashed policy",
        source="https://github.com/Stable-Baselines-Team/stable-baselines3-contrib/issues/221",
        truth=Truth(step=5, phase="forward", kind=("inf",), module=("",), op=("atanh", "log1p", "log")),
        build=build_tanh_policy,
    ),
    Case(
        id="scripted_function",
        title="A TorchScript function takes the logarithm of 0",
        source="https://github.com/pytorch/pytorch/issues/6648",
        truth=Truth(step=4, phase="forward", kind=("inf",), module=("",), op=("log",)),
        build=build_script,
    ),
    Case(
        id="anomaly_mode",
        title="The loop runs under torch's anomaly mode",
        source="https://github.com/facebookresearch/mmf/issues/893",
        truth=Truth(step=4, phase="backward", kind=("inf",), module=("",), op=("sqrt",)),
        build=build_anomaly,
    ),
    Case(
        id="adam_closure",
        title="A fault in the backward of a closure given to Adam",
        source="https://github.com/pytorch/pytorch/issues/2421",
        truth=Truth(step=5, phase="backward", kind=("inf",), module=("",), op=("sqrt",)),
        build=lambda: build_closure(1e-8, bad=True),
    ),
    Case(
        id="adam_closure_no_epsilon",
        title="A fault in the update of an Adam with a closure",
        source="https://discuss.pytorch.org/t/adam-half-precision-nans/1765",
        truth=Truth(step=0, phase="optimizer", kind=("nan",), tensor=("project.weight",), line=False),
        build=lambda: build_closure(0.0, bad=False),
    ),
    Case(
        id="healthy_adam_closure",
        title="Adam with a closure",
        source="https://discuss.pytorch.org/t/adam-half-precision-nans/1765",
        truth=Truth(healthy=True),
        build=lambda: build_closure(1e-8, bad=False),
    ),
    Case(
        id="healthy_scaler_hides_backward",
        title="A GradScaler skips a step whose gradient is NaN",
        source="https://github.com/pytorch/pytorch/issues/40497",
        truth=Truth(healthy=True),
        build=build_hidden_backward,
    ),
    Case(
        id="healthy_reptile",
        title="A deep copy of the model is trained within the step",
        source="https://github.com/pytorch/pytorch/issues/40497",
        truth=Truth(healthy=True),
        build=build_reptile,
    ),
    Case(
        id="healthy_lazy_layers",
        title="Lazy layers",
        source="https://github.com/pytorch/pytorch/issues/40497",
        truth=Truth(healthy=True),
        build=build_lazy,
    ),
    Case(
        id="lazy_layers",
        title="A fault after lazy layers have got their shapes",
        source="https://github.com/pytorch/pytorch/issues/2421",
        truth=Truth(step=4, phase="backward", kind=("inf",), module=("",), op=("sqrt",)),
        build=build_lazy_fault,
    ),
    Case(
        id="healthy_odd_parameters",
        title="Parameters and buffers of every kind",
        source="https://github.com/pytorch/pytorch/issues/40497",
        truth=Truth(healthy=True),
        build=build_odd,
    ),
    Case(
        id="string_state",
        title="An optimizer with state under string keys divides by 0",
        source="https://github.com/kozistr/pytorch_optimizer/pull/431",
        truth=Truth(step=5, phase="optimizer", kind=("inf",), op=("div", "reciprocal", "mul")),
        build=build_string_state,
    ),
    Case(
        id="flat_weight",
        title="A weight that is a view of one flat tensor is written from outside",
        source="https://github.com/huggingface/transformers/issues/30953",
        truth=Truth(step=5, phase="weights", kind=("nan",), tensor=("2.weight",), line=False),
        build=build_flat_weight,
    ),
    Case(
        id="flat_update",
        title="One of many parameters in a flat tensor overflows in its update",
        source="https://github.com/NeuroTorch/NeuroTorch/issues/127",
        truth=Truth(step=4, phase="optimizer", kind=("inf",), tensor=("2.bias",), line=False),
        build=build_flat_update,
    ),
    Case(
        id="logdet_singular",
        title="The log-determinant of a singular matrix",
        source="https://github.com/pytorch/pytorch/issues/49886",
        truth=Truth(
            step=5,
            phase="forward",
            kind=("inf",),
            module=("",),
            op=("logdet", "slogdet", "linalg_slogdet", "_linalg_slogdet", "log"),
        ),
        build=build_logdet,
    ),
    Case(
        id="numpy_weight",
        title="A loss weight computed with numpy is inf",
        source="https://github.com/BiomedSciAI/causallib/issues/9",
        truth=Truth(step=5, phase="forward", kind=("inf",), module=("",), op=("mul",)),
        build=build_numpy_number,
    ),
    Case(
        id="quantile_of_one",
        title="The normal quantile of 1",
        source="https://github.com/NVIDIA/apex/issues/358",
        truth=Truth(step=6, phase="forward", kind=("inf",), module=("0",), op=("erfinv",)),
        build=build_quantile,
    ),
    Case(
        id="outside_modules",
        title="Outputs in a list of dicts, normalised outside of any module",
        source="https://github.com/pytorch/pytorch/issues/26098",
        truth=Truth(step=6, phase="forward", kind=("nan",), module=("",), op=("div",)),
        build=build_generator,
    ),
]
