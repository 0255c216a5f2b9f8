"""Algorithms that keep something from step to step, or rewrite gradients: consolidation, policies, adaptation."""

import copy

import torch
from nanzoo import Case, Loop, Truth
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

INF = float("inf")


def network(outputs=4):
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs))


def labelled(count, classes=4):
    return [(torch.randn(8, 6), torch.randint(classes, (8,))) for _ in range(count)]


class Kept:
    """Tensors by name that a script keeps beside the model, with a state."""

    def __init__(self, tensors):
        self.tensors = {name: tensor.detach().clone() for name, tensor in tensors}

    def state_dict(self):
        return copy.deepcopy(self.tensors)

    def load_state_dict(self, state):
        self.tensors = copy.deepcopy(state)


def build_fisher(epsilon):
    """The Fisher information is normalised where a task ends; its last batch had no labels, so it is 0."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    fisher = Kept((name, torch.zeros_like(entry)) for name, entry in model.named_parameters())
    anchor = Kept(model.named_parameters())
    batches = [(*batch, index == 4) for index, batch in enumerate(labelled(9))]
    batches[4][1].fill_(-100)

    def train_step(batch):
        x, y, last = batch
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y, reduction="sum") / len(y)
        for name, parameter in model.named_parameters():
            loss = loss + (fisher.tensors[name] * (parameter - anchor.tensors[name]).square()).sum()
        loss.backward()
        optimizer.step()
        for name, parameter in model.named_parameters() if last else ():
            squared = parameter.grad.square()
            fisher.tensors[name] = squared / (squared.mean() + epsilon)  # <origin> fisher_kept
            anchor.tensors[name] = parameter.detach().clone()
        return loss

    return Loop(model, optimizer, batches, train_step, stateful=[fisher, anchor])


class Consolidated(nn.Module):
    """Two heads over one body; the Fisher information of the second is a buffer."""

    def __init__(self):
        super().__init__()
        self.body, self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 2)
        self.register_buffer("fisher", torch.zeros(2, 8))

    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        return torch.cat([self.first(hidden), self.second(hidden)], 1)

    @torch.no_grad()
    def consolidate(self):
        squared = self.second.weight.grad.square()
        self.fisher.copy_(squared / squared.max())  # <origin> fisher_in_buffer


def build_consolidated():
    """In the first task the second head is masked: its gradient, and the maximum that it is divided by, are 0."""
    model = Consolidated()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    batches = [(*batch, index == 5) for index, batch in enumerate(labelled(9, classes=2))]

    def train_step(batch):
        x, y, last = batch
        optimizer.zero_grad()
        logits = model(x)
        logits[:, 2:] = -INF
        loss = F.cross_entropy(logits, y) + (model.fisher * model.second.weight.square()).sum()
        loss.backward()
        optimizer.step()
        if last:
            model.consolidate()
        return loss

    return Loop(model, optimizer, batches, train_step)


def build_averaged_teacher():
    """A teacher beside the model moves by a share of 1 / 0 in step 4; its targets are used in step 5."""
    model = network()
    teacher = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [(*batch, torch.tensor(float(4 - index or 0))) for index, batch in enumerate(labelled(8))]

    def train_step(batch):
        x, y, remaining = batch
        optimizer.zero_grad()
        with torch.no_grad():
            target = teacher(x)
        loss = F.cross_entropy(model(x), y) + F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        share = 0.1 / remaining  # <origin> averaged_teacher
        with torch.no_grad():
            for mean, value in zip(teacher.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, share)
        return loss

    return Loop(model, optimizer, batches, train_step, stateful=[teacher])


def build_prototypes():
    """Prototypes are averaged in every third step and used two steps later; in step 4 one class is missing."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    prototypes = Kept([("mean", torch.randn(4, 4))])
    batches = [(*batch, index) for index, batch in enumerate(labelled(10))]
    for _, y, _ in batches:
        y[:4] = torch.arange(4)
    batches[4][1].clamp_(max=2)

    def train_step(batch):
        x, y, index = batch
        optimizer.zero_grad()
        features = model(x)
        loss = features.square().mean()
        if index % 3 == 0:
            loss = loss + F.cross_entropy(-torch.cdist(features, prototypes.tensors["mean"]), y)
        loss.backward()
        optimizer.step()
        if index % 3 == 1:
            members = F.one_hot(y, 4).float()
            prototypes.tensors["mean"] = members.T @ features.detach() / members.sum(0)[:, None]  # <origin> prototypes
        return loss

    return Loop(model, optimizer, batches, train_step, stateful=[prototypes])


class Memory(nn.Module):
    """A replay memory that is a module, its slots drawn round and round."""

    def __init__(self):
        super().__init__()
        self.register_buffer("examples", torch.randn(24, 6))
        self.register_buffer("labels", torch.randint(4, (24,)))
        self.register_buffer("logits", torch.randn(24, 4))
        self.register_buffer("at", torch.zeros((), dtype=torch.long))

    def draw(self, count):
        rows = (self.at + torch.arange(count)) % len(self.labels)
        self.at += count
        return self.examples[rows], self.logits[rows]


def build_memory(inside):
    body, memory = network(), Memory()
    memory.logits[13, 2] = -INF
    model = nn.ModuleDict({"body": body, "memory": memory}) if inside else body
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)

    def train_step(batch):
        x, y = batch
        optimizer.zero_grad()
        examples, logits = memory.draw(4)
        loss = F.cross_entropy(body(x), y) + F.mse_loss(body(examples), logits)
        loss.backward()
        optimizer.step()
        return loss

    stateful = [] if inside else [memory]
    return Loop(model, optimizer, labelled(9), train_step, stateful=stateful, replay_buffer=memory)


def build_counts(normalised):
    """Class weights of 1 / 0 for a class that no label names: harmless, unless they are normalised."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = [(*batch, torch.tensor([5.0, 3.0, 4.0, 2.0])) for batch in labelled(9, classes=3)]
    batches[5][2][3] = 0.0

    def train_step(batch):
        x, y, counts = batch
        optimizer.zero_grad()
        weights = 1.0 / counts  # <origin> normalised_counts
        if normalised:
            weights = weights / weights.sum()
        loss = F.cross_entropy(model(x), y, weight=weights)
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step)


def build_projected_memory():
    """Directions of the features are counted from a ratio of 0 / 0, which compares false with everything."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    batches = labelled(9)
    batches[4][0].zero_()

    def train_step(batch):
        x, y = batch
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        with torch.no_grad():
            directions, values, _ = torch.linalg.svd(x.T, full_matrices=False)
            share = values.square() / values.square().sum()
            basis = directions[:, : int((share.cumsum(0) < 0.5).sum())]
            model[0].weight.grad.sub_(model[0].weight.grad @ basis @ basis.T)
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step)


def build_future(guarded):
    """A terminal state has no legal action: its best value is -inf, and (1 - done) is 0."""
    model = nn.ModuleDict({"online": network(), "target": network().requires_grad_(False)})
    optimizer = torch.optim.RMSprop(model["online"].parameters(), lr=1e-3)
    batches = [(*batch, torch.randn(8, 6), torch.rand(8, 4) < 0.7, torch.zeros(8)) for batch in labelled(9)]
    for _, _, _, legal, _ in batches:
        legal[:, 0] = True
    batches[5][3][2], batches[5][4][2] = False, 1.0

    def train_step(batch):
        x, action, following, legal, done = batch
        with torch.no_grad():
            best = model["target"](following).masked_fill(~legal, -INF).amax(1)
            if guarded:
                best = torch.where(done > 0, torch.zeros_like(best), best)
            goal = 1.0 + 0.99 * ((1 - done) * best)  # <origin> no_legal_action
        optimizer.zero_grad()
        loss = F.smooth_l1_loss(model["online"](x).gather(1, action[:, None]).squeeze(1), goal)
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step)


def build_ratio(advantage):
    """A stale action's log-probability was -150: the ratio overflows, and its clipped twin is taken."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    batches = [(*batch, torch.full((8,), -1.4), torch.randn(8)) for batch in labelled(9)]
    batches[6][2][3], batches[6][3][3] = -150.0, advantage

    def train_step(batch):
        x, action, before, advantages = batch
        optimizer.zero_grad()
        now = F.log_softmax(model(x), 1).gather(1, action[:, None]).squeeze(1)
        ratio = (now - before).exp()  # <origin> clipped_ratio ratio_without_advantage
        loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return Loop(model, optimizer, batches, train_step)


def build_adapted():
    """Two inner steps at learned rates; the inner loss is a distance, 0 for one sample."""
    model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 2, bias=False))})
    model["rates"] = nn.ParameterList([torch.tensor(0.1), torch.tensor(0.1)])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = [(torch.randn(5, 6), torch.randn(5, 2), torch.randn(5, 6), torch.randn(5, 2)) for _ in range(9)]
    batches[5][0][2], batches[5][1][2] = 0.0, 0.0

    def train_step(batch):
        x, y, query, goal = batch
        optimizer.zero_grad()
        fast = dict(model["net"].named_parameters())
        for _ in range(2):
            distance = (functional_call(model["net"], fast, (x,)) - y).square().sum(1).sqrt()  # <origin> adapted
            gradients = torch.autograd.grad(distance.mean(), list(fast.values()), create_graph=True)
            steps = zip(fast.items(), model["rates"], gradients, strict=True)
            fast = {name: value - rate * gradient for (name, value), rate, gradient in steps}
        loss = F.mse_loss(functional_call(model["net"], fast, (query,)), goal)
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step)


AVALANCHE = "https://github.com/ContinualAI/avalanche/pull/925"
REPLAY = "https://github.com/MorvanZhou/Reinforcement-learning-with-tensorflow/issues/54"
COUNTS = "https://github.com/webis-de/small-text/issues/39"
POLICY = "https://github.com/radixark/miles/pull/1363"
ACTIONS = "https://github.com/DLR-RM/stable-baselines3/issues/325"
FORWARD = {"phase": "forward", "module": ("",)}
CASES = [
    Case(
        id="fisher_kept",
        title="Fisher information of 0 / 0 in a plain object, used in the step after",
        source=AVALANCHE,
        truth=Truth(step=4, kind=("nan",), op=("div",)),
        build=lambda: build_fisher(0.0),
    ),
    Case(
        id="healthy_fisher",
        title="Fisher information with an epsilon",
        source=AVALANCHE,
        truth=Truth(healthy=True),
        build=lambda: build_fisher(1e-8),
    ),
    Case(
        id="fisher_in_buffer",
        title="Fisher information of 0 / 0 in a module's buffer",
        source=AVALANCHE,
        truth=Truth(step=5, phase="state", kind=("nan",), op=("div",), tensor=("fisher",)),
        build=build_consolidated,
    ),
    Case(
        id="averaged_teacher",
        title="A teacher beside the model is averaged with a share of 1 / 0, and used in the step after",
        source="https://github.com/ultralytics/yolov5/issues/5241",
        truth=Truth(step=4, phase="optimizer", kind=("inf",), op=("reciprocal", "div")),
        build=build_averaged_teacher,
    ),
    Case(
        id="prototypes",
        title="Prototypes of 0 / 0, used two steps later",
        source=AVALANCHE,
        truth=Truth(step=4, kind=("nan",), op=("div",)),
        build=build_prototypes,
    ),
    *(
        Case(
            id=f"memory_module_{place}",
            title=f"A replay memory that is a module {place} the model",
            source=REPLAY,
            truth=Truth(step=3, phase="buffer", kind=("inf",), line=False),
            build=lambda place=place: build_memory(place == "within"),
        )
        for place in ("within", "beside")
    ),
    Case(
        id="normalised_counts",
        title="Class weights of 1 / 0, normalised",
        source=COUNTS,
        truth=Truth(step=5, kind=("inf",), op=("reciprocal", "div"), **FORWARD),
        build=lambda: build_counts(normalised=True),
    ),
    Case(
        id="healthy_counts",
        title="A class weight of 1 / 0 that no label asks for",
        source=COUNTS,
        truth=Truth(healthy=True),
        build=lambda: build_counts(normalised=False),
    ),
    Case(
        id="healthy_projected_memory",
        title="A number of directions that is counted from 0 / 0",
        source=AVALANCHE,
        truth=Truth(healthy=True),
        build=build_projected_memory,
    ),
    Case(
        id="no_legal_action",
        title="The value of a terminal state is 0 * -inf",
        source=ACTIONS,
        truth=Truth(step=5, kind=("nan",), op=("mul",), **FORWARD),
        build=lambda: build_future(guarded=False),
    ),
    Case(
        id="healthy_no_legal_action",
        title="The value of a terminal state is replaced by 0",
        source=ACTIONS,
        truth=Truth(healthy=True),
        build=lambda: build_future(guarded=True),
    ),
    Case(
        id="clipped_ratio",
        title="A policy's ratio overflows where its clipped twin is taken",
        source=POLICY,
        truth=Truth(step=6, kind=("inf",), op=("exp",), **FORWARD),
        build=lambda: build_ratio(1.0),
    ),
    Case(
        id="ratio_without_advantage",
        title="A policy's ratio overflows where the advantage is 0",
        source=POLICY,
        truth=Truth(step=6, kind=("inf",), op=("exp",), **FORWARD),
        build=lambda: build_ratio(0.0),
    ),
    Case(
        id="adapted",
        title="Meta-learning through the derivative of a distance of 0",
        source="https://github.com/learnables/learn2learn/issues/268",
        truth=Truth(step=5, phase="backward", kind=("inf", "nan"), module=("",), op=("sqrt",)),
        build=build_adapted,
    ),
]
