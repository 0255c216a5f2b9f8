"""What trips a tool that runs a step again: batches changed in place, errors, odd batches, odd updates."""

import torch
from nanzoo import Case, Loop, Truth
from torch import nn
from torch.distributions import Categorical, Normal
from torch.nn import functional as F

NAN, INF = float("nan"), float("inf")


def network(outputs=3):
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, outputs))


def loop(model, batches, loss_of, optimizer=None, **more):
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=1e-3)

    def train_step(batch):
        optimizer.zero_grad()
        loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step, **more)


def labelled(count):
    return [(torch.randn(6, 5), torch.randint(3, (6,))) for _ in range(count)]


def build_batch_in_place():
    """The step standardises its batch in place: by the time of a second run the batch itself is NaN."""
    model, batches = network(), labelled(9)
    batches[6][0][:, 2] = 1.0

    def loss_of(batch):
        features, targets = batch
        features.sub_(features.mean(dim=0))
        features.div_(features.std(dim=0))  # <origin> batch_in_place
        return F.cross_entropy(model(features), targets)

    return loop(model, batches, loss_of)


class Masked(nn.Module):
    """A NaN that marks missing values is replaced in the batch itself."""

    def forward(self, x):
        x[x.isnan()] = 0.0
        return x


def build_healthy_in_place():
    """Missing values are filled in in place; the loop goes over its batches twice."""
    model = nn.Sequential(Masked(), *network())
    batches = labelled(6)
    for features, _ in batches:
        features[torch.rand(6, 5) < 0.2] = NAN
    return loop(model, batches * 2, lambda batch: F.cross_entropy(model(batch[0]), batch[1]))


class Graph:
    """A batch that is an object of its own: no tuple, no mapping, no dataclass."""

    def __init__(self, x, y):
        self.x, self.y = x, y
        self.edges = torch.randint(6, (2, 9))

    def to(self, _device):
        return self


def build_object(value):
    model = network()
    batches = [Graph(*entry) for entry in labelled(8)]
    batches[5].x[2, 1] = value

    def loss_of(batch):
        batch = batch.to("cpu")
        messages = torch.zeros(6, 5).index_add(0, batch.edges[1], batch.x[batch.edges[0]])
        return F.cross_entropy(model(batch.x + 0.1 * messages), batch.y)

    return loop(model, batches, loss_of)


def build_views():
    """Batches are slices of one tensor: an inf in the one of step 4, a NaN only in the one of step 6."""
    model = network(1)
    table = torch.randn(54, 6)
    table[4 * 6 + 2, 1], table[6 * 6, 0] = INF, NAN
    batches = [(rows[:, :5], rows[:, 5]) for rows in table.split(6)]
    return loop(model, batches, lambda batch: F.mse_loss(model(batch[0]).squeeze(1), batch[1]))


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = network(3)

    def forward(self, x, temperature):
        return self.body(x) / temperature  # <origin> categorical_refuses multinomial_refuses assertion_of_the_user


def build_refused(how):
    """A temperature of 0 makes logits of inf; what comes next refuses them and raises."""
    model = Policy()
    batches = [(torch.randn(6, 5), torch.tensor(0.0 if index == 5 else 1.0)) for index in range(8)]

    def loss_of(batch):
        logits = model(*batch)
        if how == "categorical":
            policy = Categorical(logits=logits)
            return -policy.log_prob(policy.sample()).mean()
        if how == "multinomial":
            chosen = logits.detach().softmax(1).multinomial(1).squeeze(1)
            return F.cross_entropy(logits, chosen)
        loss = logits.logsumexp(1).mean()
        assert torch.isfinite(loss), "the loss is not finite"
        return loss

    return loop(model, batches, loss_of)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.spread = nn.Linear(5, 2), nn.Linear(5, 2)

    def forward(self, x):
        spread = torch.exp(self.spread(x))  # <origin> normal_refuses
        return Normal(self.mean(x), 0.1 + spread / spread.sum(dim=1, keepdim=True))


def build_normal():
    """An exp overflows; inf / inf is NaN, and the distribution refuses it as its scale."""
    model = Scale()
    batches = [(torch.randn(6, 5), torch.randn(6, 2)) for _ in range(8)]
    batches[4][0][1] *= 5e3
    return loop(model, batches, lambda batch: -model(batch[0]).log_prob(batch[1]).mean())


class Distance(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(5, 4, bias=False)

    def forward(self, x):
        return self.project(x).square().sum(1).sqrt()  # <origin> clip_refuses


def build_clip_refuses():
    """clip_grad_norm_(error_if_nonfinite=True) raises."""
    model = Distance()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = labelled(8)
    batches[5][0][1] = 0

    def train_step(batch):
        optimizer.zero_grad()
        loss = model(batch[0]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step)


def build_skipped_loss():
    """The loop leaves a batch out whose loss is NaN."""
    model = Policy()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = [(torch.randn(6, 5), torch.tensor(0.0 if index == 5 else 1.0)) for index in range(8)]

    def train_step(batch):
        optimizer.zero_grad()
        loss = model(*batch).logsumexp(1).mean()
        if not torch.isfinite(loss):
            return None
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step)


class Lars(torch.optim.Optimizer):
    """Layer-wise rates: the trust ratio divides by the gradient's norm."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                ratio = parameter.norm() / parameter.grad.norm()  # <origin> lars_trust_ratio
                parameter.add_(parameter.grad * ratio, alpha=-group["lr"])


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.side, self.head = nn.Linear(5, 8), nn.Linear(5, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x, open_):
        return self.head(self.body(x).tanh() + open_ * self.side(x))


def build_lars():
    """The gate is shut in one batch: the side branch's gradient is 0, not missing."""
    model = Gated()
    batches = [(*entry, 0.0 if index == 5 else 1.0) for index, entry in enumerate(labelled(8))]
    optimizer = Lars(model.parameters(), lr=1e-3)
    return loop(model, batches, lambda batch: F.cross_entropy(model(batch[0], batch[2]), batch[1]), optimizer)


def build_sam(bad):
    """Sharpness-aware minimisation: up along the gradient, a second backward, back, and the real update."""
    model = Gated()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    batches = [(*entry, 1.0) for entry in labelled(9)]
    if bad:
        batches[6] = (batches[6][0], torch.full((6,), -100), 1.0)  # no label: a gradient of 0

    def loss_of(batch):
        features, targets, open_ = batch
        each = F.cross_entropy(model(features, open_), targets, reduction="none", ignore_index=-100)
        return each.mean()

    def train_step(batch):
        optimizer.zero_grad()
        loss = loss_of(batch)
        loss.backward()
        with torch.no_grad():
            norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
            moves = [0.05 * parameter.grad / norm for parameter in model.parameters()]  # <origin> sharpness_aware
            torch._foreach_add_(list(model.parameters()), moves)
        optimizer.zero_grad()
        loss_of(batch).backward()
        with torch.no_grad():
            torch._foreach_sub_(list(model.parameters()), moves)
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step)


def build_in_backward(bad):
    """An optimizer for each parameter, stepped by a hook as soon as its gradient is there, and freed."""
    model = Gated()
    epsilon = 0.0 if bad else 1e-8
    optimizers = {p: torch.optim.Adam([p], lr=1e-3, eps=epsilon) for p in model.parameters()}

    def update(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    batches = [(*entry, 1.0) for entry in labelled(8)]
    batches[0][0][:, 3] = 0.0  # no gradient in this column, and no second moment

    def train_step(batch):
        features, targets, open_ = batch
        loss = F.cross_entropy(model(features, open_), targets)
        loss.backward()
        return loss

    return Loop(model, tuple(optimizers.values()), batches, train_step)


class Growing(nn.Module):
    """A head for every task, made when the task begins."""

    def __init__(self):
        super().__init__()
        self.body, self.heads = nn.Linear(5, 8), nn.ModuleList([nn.Linear(8, 3)])

    def forward(self, x, task):
        return self.heads[task](self.body(x).tanh())


def build_growing(bad):
    """From step 4 on there is a second head, whose learning rate overflows it."""
    model = Growing()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def grow():
        head = nn.Linear(8, 3)
        model.heads.append(head)
        optimizer.add_param_group({"params": list(head.parameters()), "lr": 1e38 if bad else 0.01})

    def batches():
        for index, entry in enumerate(labelled(9)):
            if index == 4:
                grow()
            yield (*entry, int(index >= 4))

    def loss_of(batch):
        logits = model(batch[0], batch[2])
        return (20 if bad and batch[2] else 1) * F.cross_entropy(logits, batch[1])

    return loop(model, batches(), loss_of, optimizer)


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))


def build_forward_hook():
    """A forward hook of the user's rescales an activation by its largest entry."""
    model = Hooked()

    def rescale(_module, _inputs, output):
        return output / output.abs().amax(dim=1, keepdim=True)  # <origin> forward_hook

    model.body.register_forward_hook(rescale)
    nn.init.zeros_(model.body.bias)
    batches = labelled(8)
    batches[0][0][3] = 0
    return loop(model, batches, lambda batch: F.cross_entropy(model(batch[0]), batch[1]))


class Tied(nn.Module):
    """One weight for input and output, and a step written with torch.func."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        hidden = self.embed(tokens)
        return self.out(hidden / hidden.std(dim=-1, keepdim=True))  # <origin> tied_functional


def build_functional():
    """functional_call with a changed copy of the parameters: an inner step, as in meta-learning."""
    model = Tied()
    batches = [(torch.randint(1, 7, (8,)), torch.randint(7, (8,))) for _ in range(8)]
    batches[5][0][2] = 0
    nn.init.constant_(model.embed.weight[0], 0.25)

    def loss_of(batch):
        tokens, targets = batch
        weights = dict(model.named_parameters())
        inner = F.cross_entropy(torch.func.functional_call(model, weights, (tokens,)), targets)
        (gradient,) = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
        moved = {name: value - 0.1 * gradient for name, value in weights.items()}
        return F.cross_entropy(torch.func.functional_call(model, moved, (tokens,)), targets)

    return loop(model, batches, loss_of, torch.optim.SGD([model.out.weight], lr=1e-12))


def build_per_sample():
    """Per-sample gradients with vmap and grad, clipped one by one: a sample whose gradient is 0."""
    model = nn.Linear(5, 3, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batches = labelled(8)
    batches[5][0][2] = 0

    def one(weight, x, y):
        return F.cross_entropy((weight @ x).unsqueeze(0), y.unsqueeze(0))

    def train_step(batch):
        features, targets = batch
        optimizer.zero_grad()
        gradients = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(model.weight, features, targets)
        norms = gradients.flatten(1).norm(dim=1)
        scaled = gradients / norms.view(-1, 1, 1)  # <origin> per_sample_gradients
        model.weight.grad = scaled.mean(dim=0).detach()
        optimizer.step()
        return

    return Loop(model, optimizer, batches, train_step)


class Length(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 4, bias=False)

    def forward(self, x):
        return self.body(x).square().sum(dim=1).sqrt()  # <origin> frozen_then_thawed


def build_thawed():
    """The whole body is frozen when the tool is attached, and trained from step 3 on."""
    model = nn.ModuleDict({"length": Length(), "scale": nn.Linear(1, 1)})
    model["length"].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def batches():
        for index, (features, _) in enumerate(labelled(9)):
            if index == 3:
                model["scale"].requires_grad_(False)
                model["length"].requires_grad_(True)
            if index == 6:
                features[1] = 0
            yield features

    return loop(model, batches(), lambda batch: model["scale"](model["length"](batch).unsqueeze(1)).mean(), optimizer)


def refused(identifier, title, how):
    source = "https://github.com/Stable-Baselines-Team/stable-baselines3-contrib/issues/221"
    truth = Truth(step=5, phase="forward", kind=("inf",), module=("",), op=("div",))
    return Case(id=identifier, title=title, source=source, truth=truth, build=lambda: build_refused(how))


def data(identifier, title, step, kind, build):
    source = "https://github.com/ratschlab/DeepSpot/issues/9"
    truth = Truth(step=step, phase="data", kind=(kind,), line=False)
    return Case(id=identifier, title=title, source=source, truth=truth, build=build)


SIDE = ("side.weight",)
CASES = [
    Case(
        id="batch_in_place",
        title="The step standardises its batch in place",
        source="https://github.com/mllam/neural-lam/issues/136",
        truth=Truth(step=6, phase="forward", kind=("nan",), module=("",), op=("div",)),
        build=build_batch_in_place,
    ),
    Case(
        id="healthy_batch_in_place",
        title="Missing values are filled in in the batch itself",
        source="https://github.com/janelia-cellmap/cellmap-segmentation-challenge/issues/162",
        truth=Truth(healthy=True),
        build=build_healthy_in_place,
    ),
    data("nan_in_object_batch", "A NaN in a batch that is a plain object", 5, "nan", lambda: build_object(NAN)),
    data("inf_in_object_batch", "An inf in a batch that is a plain object", 5, "inf", lambda: build_object(INF)),
    data("inf_in_view_of_table", "Batches that are slices of one tensor", 4, "inf", build_views),
    refused("categorical_refuses", "Categorical raises at logits that are inf", "categorical"),
    refused("multinomial_refuses", "multinomial raises at probabilities that are NaN", "multinomial"),
    refused("assertion_of_the_user", "The loop asserts that its loss is finite", "assertion"),
    Case(
        id="normal_refuses",
        title="A Normal distribution raises at a scale that is NaN",
        source="https://github.com/Stable-Baselines-Team/stable-baselines3-contrib/issues/221",
        truth=Truth(step=4, phase="forward", kind=("inf",), module=("",), op=("exp",)),
        build=build_normal,
    ),
    Case(
        id="clip_refuses",
        title="clip_grad_norm_ is asked to raise",
        source="https://github.com/cpnota/autonomous-learning-library/pull/255",
        truth=Truth(step=5, phase="backward", kind=("inf",), module=("",), op=("sqrt",)),
        build=build_clip_refuses,
    ),
    Case(
        id="healthy_skipped_loss",
        title="The loop leaves out a batch whose loss is not finite",
        source="https://github.com/facebookresearch/fairchem/pull/441",
        truth=Truth(healthy=True),
        build=build_skipped_loss,
    ),
    Case(
        id="lars_trust_ratio",
        title="An optimizer of the user's own divides by a gradient norm of 0",
        source="https://github.com/kozistr/pytorch_optimizer/pull/431",
        truth=Truth(step=5, phase="optimizer", kind=("inf",), op=("div",), tensor=SIDE),
        build=build_lars,
    ),
    Case(
        id="sharpness_aware",
        title="Sharpness-aware minimisation divides by a gradient norm of 0",
        source="https://github.com/google-deepmind/optax/pull/1743",
        truth=Truth(step=6, kind=("nan",), op=("div",)),
        build=lambda: build_sam(bad=True),
    ),
    Case(
        id="healthy_sharpness_aware",
        title="Sharpness-aware minimisation",
        source="https://github.com/google-deepmind/optax/pull/1743",
        truth=Truth(healthy=True),
        build=lambda: build_sam(bad=False),
    ),
    Case(
        id="optimizer_in_backward",
        title="Optimizers that step within backward, without epsilon",
        source="https://discuss.pytorch.org/t/adam-half-precision-nans/1765",
        truth=Truth(step=0, phase="optimizer", kind=("nan",), tensor=("body.weight", "side.weight"), line=False),
        build=lambda: build_in_backward(bad=True),
    ),
    Case(
        id="healthy_optimizer_in_backward",
        title="Optimizers that step within backward",
        source="https://discuss.pytorch.org/t/adam-half-precision-nans/1765",
        truth=Truth(healthy=True),
        build=lambda: build_in_backward(bad=False),
    ),
    Case(
        id="head_added_later",
        title="A head that is added at step 4 overflows in its first update",
        source="https://github.com/NeuroTorch/NeuroTorch/issues/127",
        truth=Truth(step=4, phase="optimizer", kind=("inf",), tensor=("heads.1.weight", "heads.1.bias"), line=False),
        build=lambda: build_growing(bad=True),
    ),
    Case(
        id="healthy_head_added_later",
        title="A head that is added at step 4",
        source="https://github.com/NeuroTorch/NeuroTorch/issues/127",
        truth=Truth(healthy=True),
        build=lambda: build_growing(bad=False),
    ),
    Case(
        id="forward_hook",
        title="A forward hook of the user's divides by 0",
        source="https://github.com/pytorch/pytorch/issues/2421",
        truth=Truth(step=0, phase="forward", kind=("nan",), module=("", "body"), op=("div",)),
        build=build_forward_hook,
    ),
    Case(
        id="tied_functional",
        title="functional_call with tied weights: a constant embedding has no deviation",
        source="https://github.com/mllam/neural-lam/issues/136",
        truth=Truth(step=5, phase="forward", kind=("inf", "nan"), module=("",), op=("div",)),
        build=build_functional,
    ),
    Case(
        id="per_sample_gradients",
        title="Per-sample gradients of vmap, each divided by its norm",
        source="https://github.com/ddkang/advex-uar/pull/7",
        truth=Truth(step=5, kind=("nan",), op=("div",)),
        build=build_per_sample,
    ),
    Case(
        id="frozen_then_thawed",
        title="A body that is frozen at first",
        source="https://github.com/pytorch/pytorch/issues/2421",
        truth=Truth(step=6, phase="backward", kind=("inf",), module=("length",), op=("sqrt",)),
        build=build_thawed,
    ),
]
