"""Masks that come too late, noise at the edge of its range, half precision, and batches of every kind of tensor."""

import torch
from nanzoo import Case, Loop, Truth
from torch import nn
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


class Ratio(nn.Module):
    """The untaken branch is finite or not in forward, which does not matter; its derivative is 0 / 0."""

    def forward(self, x, count):
        share = x / count  # <origin> where_division masked_division
        return torch.where(count > 0, share, 0.0)


class MaskedRatio(nn.Module):
    def forward(self, x, count):
        share = x / count  # <origin> masked_division
        return share.masked_fill(count == 0, 0.0)


def build_ratio(ratio):
    model = nn.ModuleDict({"body": network(2), "ratio": ratio})
    batches = [(torch.randn(6, 5), torch.randint(1, 4, (6, 1)).float()) for _ in range(8)]
    batches[5][1][3] = 0
    return loop(model, batches, lambda x, count: model["ratio"](model["body"](x), count).square().mean())


class MaskedLog(nn.Module):
    def forward(self, x):
        logs = x.log()  # <origin> where_log
        return torch.where(x > 0, logs, 0.0)


def build_where_log():
    """The logarithm of an embedding that is 0, masked afterwards."""
    model = nn.ModuleDict({"body": nn.Linear(5, 3, bias=False), "log": MaskedLog()})
    batches = [(torch.rand(6, 5),) for _ in range(8)]
    batches[4][0][2] = 0
    return loop(model, batches, lambda x: model["log"](model["body"](x).abs()).mean())


class Softplus(nn.Module):
    """By hand: exp of what is large is inf, and where takes the other branch; its derivative is 0 * inf."""

    def forward(self, x):
        grown = torch.exp(x)  # <origin> where_softplus
        return torch.where(x > 30, x, torch.log1p(grown))


def build_where_softplus():
    model = nn.ModuleDict({"body": nn.Linear(5, 3), "softplus": Softplus()})
    batches = [(torch.randn(6, 5),) for _ in range(8)]
    batches[5][0][1] *= 1e3
    return loop(model, batches, lambda x: model["softplus"](model["body"](x)).mean())


class AttentionEntropy(nn.Module):
    """Masked positions have a weight of 0, and 0 * log(0) is NaN."""

    def forward(self, scores, padding):
        weights = scores.masked_fill(padding, -INF).softmax(-1)
        logs = weights.log()  # <origin> attention_entropy
        return -(weights * logs).sum(-1)


def build_attention_entropy():
    model = nn.ModuleDict({"body": network(4), "entropy": AttentionEntropy()})
    batches = [(torch.randn(6, 5), torch.zeros(6, 4, dtype=torch.bool)) for _ in range(8)]
    batches[5][1][2, 3] = True
    return loop(model, batches, lambda x, padding: model["entropy"](model["body"](x), padding).mean())


def build_masked_bce():
    """Labels that are not asked for are masked with -inf before a loss with logits, which cannot take it."""
    model = network(4)
    batches = [(torch.randn(6, 5), torch.rand(6, 4).round(), index == 5) for index in range(8)]
    batches[5][1][2, 1] = 0.0

    def loss_of(x, y, masked):
        logits = model(x)
        if masked:
            logits = logits.index_put((torch.tensor([2]), torch.tensor([1])), torch.tensor(-INF))
        return F.binary_cross_entropy_with_logits(logits, y)  # <origin> masked_bce

    return loop(model, batches, loss_of)


class Gumbel(nn.Module):
    """Noise of -log(-log(u)), where bfloat16's u is now and then exactly 0."""

    def forward(self, logits):
        uniform = torch.rand(logits.shape, dtype=torch.bfloat16)
        noise = -torch.log(-torch.log(uniform))  # then the noise is -inf, and that choice is not taken
        return (logits + noise).softmax(-1)


class BoxMuller(nn.Module):
    """Normal noise from two uniform draws; a radius of sqrt(-2 log(0)) is infinite."""

    def forward(self, x):
        uniform, angle = torch.rand(2, *x.shape, dtype=torch.bfloat16)
        logs = uniform.log()  # <origin> box_muller
        return x + (-2 * logs).sqrt() * torch.cos(6.2832 * angle)


def build_gumbel():
    model = nn.ModuleDict({"body": network(4), "gumbel": Gumbel()})
    batches = [(torch.randn(8, 5), torch.rand(8, 4)) for _ in range(40)]

    def loss_of(x, y):
        return (model["gumbel"](model["body"](x)) - y).square().mean()

    return loop(model, batches, loss_of)


def build_box_muller():
    model = nn.Sequential(nn.Linear(5, 8), BoxMuller(), nn.Linear(8, 3))
    batches = [(torch.randn(8, 5), torch.randint(3, (8,))) for _ in range(40)]
    return loop(model, batches, lambda x, y: F.cross_entropy(model(x), y))


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.extra = nn.Linear(5, 1), nn.Linear(5, 1, bias=False)

    def forward(self, x, strength):
        return self.body(x) if strength is None else self.body(x) + strength * self.extra(x)


def build_half_adam():
    """Adam's epsilon of 1e-8 is 0 in float16, and so are the squares of the new branch's small gradients."""
    model = Optional().half()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = [(torch.randn(8, 5).half(), None if index < 4 else 1e-4) for index in range(8)]
    return loop(model, batches, lambda x, strength: model(x, strength).float().mean(), optimizer)


class HalfBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.down(self.up(x).square())  # <origin> half_square


def build_half_forward():
    """Squared ReLU-like activations in float16: 300 squared is past 65504."""
    model = HalfBlock().half()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    batches = [(torch.randn(8, 5).half(), torch.randint(3, (8,))) for _ in range(8)]
    batches[5][0][2] *= 400
    return loop(model, batches, lambda x, y: F.cross_entropy(model(x).float(), y), optimizer)


class Criterion(nn.Module):
    """Not part of the model, and with a module made on the fly."""

    def forward(self, predicted, goal):
        scaled = nn.Softplus()(predicted)
        return (scaled / goal).log().mean()  # <origin> criterion_outside


def build_criterion():
    model, criterion = network(1), Criterion()
    batches = [(torch.randn(6, 5), torch.rand(6, 1) + 0.5) for _ in range(8)]
    batches[6][1][2] = 0
    return loop(model, batches, lambda x, y: criterion(model(x), y))


class Carried:
    """A hidden state handed from step to step."""

    def __init__(self):
        self.hidden = torch.zeros(1, 4, 6)

    def state_dict(self):
        return {"hidden": self.hidden}

    def load_state_dict(self, state):
        self.hidden = state["hidden"]


def build_carried():
    """Truncated backpropagation: the hidden state grows from step to step, by a factor, until its square overflows."""
    model = nn.ModuleDict({"cell": nn.GRU(3, 6, batch_first=True), "head": nn.Linear(6, 2)})
    carried = Carried()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batches = [(torch.randn(4, 5, 3), torch.randint(2, (4,))) for _ in range(14)]
    trace = torch.ones(4, 6)

    class Trace:
        value = trace

        def state_dict(self):
            return {"value": self.value}

        def load_state_dict(self, state):
            self.value = state["value"]

    memory = Trace()

    def train_step(batch):
        x, y = batch
        optimizer.zero_grad()
        out, hidden = model["cell"](x, carried.hidden)
        memory.value = memory.value.square() * 3  # <origin> carried_state
        loss = F.cross_entropy(model["head"](out[:, -1] + 1 / memory.value), y)
        if not torch.isfinite(memory.value).all():
            loss = loss + 0 * memory.value.sum()
        loss.backward()
        optimizer.step()
        carried.hidden = hidden.detach()
        return loss

    return Loop(model, optimizer, batches, train_step, stateful=[carried, memory])


def build_tensor_kinds():
    """Batches with sparse, nested, complex, empty, half and inference-mode tensors, and things that are none."""
    model = nn.ModuleDict({"body": nn.Linear(5, 3), "mix": nn.Linear(3, 3)})
    with torch.inference_mode():
        goals = [torch.randn(6, 3) for _ in range(8)]
    batches = []
    for goal in goals:
        dense = torch.randn(6, 6) * (torch.rand(6, 6) < 0.3)
        kinds = {
            "sparse": dense.to_sparse(),
            "rows": dense.to_sparse_csr(),
            "nested": torch.nested.nested_tensor([torch.randn(2, 5), torch.randn(4, 5)], layout=torch.jagged),
            "complex": torch.fft.rfft(torch.randn(6, 5)),
            "empty": torch.zeros(0, 5),
            "half": torch.full((3,), -INF, dtype=torch.float16),
            "flags": torch.rand(6) < 0.5,
            "name": "a name",
            "nothing": None,
            "numbers": [1, 2.5, INF],
            "meta": torch.empty(3, device="meta"),
            "permuted": torch.randn(5, 6).t(),
            "expanded": torch.randn(1, 5).expand(6, 5),
        }
        batches.append((kinds, goal))

    def loss_of(kinds, goal):
        rows = torch.cat(list(kinds["nested"].unbind())) + kinds["permuted"] + kinds["expanded"]
        hidden = torch.sparse.mm(kinds["sparse"], model["body"](rows)) + kinds["rows"] @ model["mix"](goal.clone())
        phase = torch.view_as_real(kinds["complex"]).sum(-1) * kinds["flags"].unsqueeze(1)
        return (hidden + phase - goal.clone()).square().mean() + model["body"](kinds["empty"]).sum()

    return loop(model, batches, loss_of)


def build_complex_weights():
    """A complex layer and its conjugate gradients."""
    model = nn.Linear(5, 3, dtype=torch.complex64)
    batches = [(torch.randn(6, 5, dtype=torch.complex64), torch.randn(6, 3)) for _ in range(8)]
    return loop(model, batches, lambda x, y: (model(x).abs() - y).square().mean())


def build_complex_bad():
    """A complex layer whose output is normalised by its magnitude: 0 / 0."""
    model = nn.Linear(5, 3, bias=False, dtype=torch.complex64)
    batches = [(torch.randn(6, 5, dtype=torch.complex64),) for _ in range(8)]
    batches[5][0][2] = 0

    def loss_of(x):
        out = model(x)
        unit = out / out.abs()  # <origin> complex_unit
        return unit.real.mean()

    return loop(model, batches, loss_of)


def build_inference_teacher():
    """A teacher under inference_mode makes the targets; one of its temperatures is 0."""
    model = nn.ModuleDict({"student": network(3), "teacher": network(3)})
    model["teacher"].requires_grad_(False)
    optimizer = torch.optim.Adam(model["student"].parameters(), lr=1e-3)
    batches = [(torch.randn(6, 5), 0.0 if index == 5 else 2.0) for index in range(8)]

    def loss_of(x, temperature):
        with torch.inference_mode():
            sharp = model["teacher"](x) / torch.tensor(temperature)  # <origin> inference_teacher
            goal = sharp.softmax(-1)
        return F.kl_div(model["student"](x).log_softmax(-1), goal.clone(), reduction="batchmean")

    return loop(model, batches, loss_of, optimizer)


def build_clipped_weights():
    """Weights clamped after each update, a buffer of integer counts, an update every second step."""
    model = network(1)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
    batches = [(torch.randn(6, 5), index % 2) for index in range(10)]

    def train_step(batch):
        x, update = batch
        loss = model(x).mean()
        loss.backward()
        if update:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.data.clamp_(-0.1, 0.1)
        return loss

    return Loop(model, optimizer, batches, train_step)


def build_outside_parameter():
    """Loss weights learned beside the model, in the same optimizer: exp(-s) overflows."""
    model = network(2)
    spread = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([{"params": model.parameters()}, {"params": [spread], "lr": 60.0}], lr=0.01)
    batches = [(torch.randn(6, 5),) for _ in range(12)]

    def train_step(batch):
        (x,) = batch
        optimizer.zero_grad()
        errors = model(x).square().mean(0) + 1
        precision = torch.exp(-spread)  # <origin> outside_parameter
        loss = (precision * errors.detach()).clamp(max=1e3).sum() + spread.sum()
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step)


def backward(identifier, title, step, module, op, build):
    source = "https://github.com/pytorch/pytorch/issues/16317"
    truth = Truth(step=step, phase="backward", kind=("nan",), module=(module,), op=(op,))
    return Case(id=identifier, title=title, source=source, truth=truth, build=build)


def healthy(identifier, title, source, build):
    return Case(id=f"healthy_{identifier}", title=title, source=source, truth=Truth(healthy=True), build=build)


CASES = [
    backward(
        "where_division",
        "x / 0 in the branch torch.where does not take",
        5,
        "ratio",
        "div",
        lambda: build_ratio(Ratio()),
    ),
    backward(
        "masked_division", "x / 0, filled with 0 afterwards", 5, "ratio", "div", lambda: build_ratio(MaskedRatio())
    ),
    backward("where_log", "log(0) in the branch torch.where does not take", 4, "log", "log", build_where_log),
    Case(
        id="where_softplus",
        title="exp overflows in the branch torch.where does not take, and its derivative multiplies by it",
        source="https://github.com/pytorch/pytorch/issues/68425",
        truth=Truth(step=5, phase="forward", kind=("inf",), module=("softplus",), op=("exp",)),
        build=build_where_softplus,
    ),
    Case(
        id="attention_entropy",
        title="The entropy of attention weights, some of which are masked",
        source="https://github.com/soumith/ganhacks/issues/36",
        truth=Truth(step=5, phase="forward", kind=("inf",), module=("entropy",), op=("log",)),
        build=build_attention_entropy,
    ),
    Case(
        id="masked_bce",
        title="A binary loss with a logit masked with -inf",
        source="https://github.com/google-deepmind/optax/issues/896",
        truth=Truth(
            step=5,
            phase="forward",
            kind=("nan", "inf"),
            module=("",),
            op=("binary_cross_entropy_with_logits", "sub", "mul", "add", "log_sigmoid_forward", "log_sigmoid"),
        ),
        build=build_masked_bce,
    ),
    healthy(
        "gumbel_noise",
        "Gumbel noise from a uniform draw of exactly 0",
        "https://github.com/pytorch/pytorch/issues/22442",
        build_gumbel,
    ),
    Case(
        id="box_muller",
        title="Normal noise from a uniform draw of exactly 0",
        source="https://github.com/pytorch/pytorch/issues/22442",
        truth=Truth(step=3, phase="forward", kind=("inf",), module=("1",), op=("log",)),
        build=build_box_muller,
    ),
    Case(
        id="half_adam",
        title="A float16 model under Adam",
        source="https://discuss.pytorch.org/t/adam-half-precision-nans/1765",
        truth=Truth(step=4, phase="optimizer", kind=("nan", "inf"), tensor=("extra.weight",), line=False),
        build=build_half_adam,
    ),
    Case(
        id="half_square",
        title="A square overflows in a float16 model",
        source="https://github.com/huggingface/transformers/pull/17437",
        truth=Truth(step=5, phase="forward", kind=("inf",), module=("",), op=("square", "pow")),
        build=build_half_forward,
    ),
    Case(
        id="criterion_outside",
        title="A criterion that is no part of the model",
        source="https://github.com/NVIDIA/apex/issues/358",
        truth=Truth(step=6, phase="forward", kind=("inf",), module=("",), op=("div",)),
        build=build_criterion,
    ),
    Case(
        id="carried_state",
        title="A state handed from step to step overflows",
        source="https://github.com/keras-team/keras/issues/2194",
        truth=Truth(step=6, phase="forward", kind=("inf",), module=("",), op=("mul", "square", "pow")),
        build=build_carried,
    ),
    healthy(
        "tensor_kinds",
        "Batches of every kind of tensor",
        "https://github.com/pytorch/pytorch/issues/40497",
        build_tensor_kinds,
    ),
    healthy("complex_weights", "Complex weights", "https://github.com/NEGU93/cvnn/issues/12", build_complex_weights),
    Case(
        id="complex_unit",
        title="A complex number of 0 over its magnitude",
        source="https://github.com/NEGU93/cvnn/issues/12",
        truth=Truth(step=5, phase="forward", kind=("nan",), module=("",), op=("div",)),
        build=build_complex_bad,
    ),
    Case(
        id="inference_teacher",
        title="A teacher under inference_mode with a temperature of 0",
        source="https://github.com/AberHu/Knowledge-Distillation-Zoo/issues/13",
        truth=Truth(step=5, phase="forward", kind=("inf",), module=("",), op=("div",)),
        build=build_inference_teacher,
    ),
    healthy(
        "clamped_weights",
        "Weights clamped through .data",
        "https://github.com/pytorch/pytorch/issues/2534",
        build_clipped_weights,
    ),
    Case(
        id="outside_parameter",
        title="A learned loss weight that is no part of the model",
        source="https://github.com/vanderschaarlab/synthcity/issues/331",
        truth=Truth(step=3, phase="forward", kind=("inf",), module=("",), op=("exp",)),
        build=build_outside_parameter,
    ),
]
