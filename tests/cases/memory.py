"""One piece of memory written by several operations, state put in from outside, modules that are no plain Python."""

import torch
from nanzoo import Case, Loop, Truth
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

NAN, INF = float("nan"), float("inf")


def network(outputs=3):
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, outputs))


def labelled(count):
    return [(torch.randn(6, 5), torch.randint(3, (6,))) for _ in range(count)]


def loop(model, batches, loss_of, optimizer=None, **more):
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=1e-3)

    def train_step(batch):
        optimizer.zero_grad()
        loss = loss_of(*batch)
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step, **more)


class PerLength(nn.Module):
    """Scores per token; an empty hypothesis has none.  The padding token is then forbidden, in place."""

    def forward(self, scores, lengths):
        scaled = scores / lengths  # <origin> mask_over_division
        scaled[:, 0] = -INF
        return scaled.log_softmax(-1)


def build_mask_over_division():
    model = nn.ModuleDict({"body": network(4), "scale": PerLength()})
    batches = [(torch.randn(6, 5), torch.randint(1, 4, (6,)), torch.ones(6, 1)) for _ in range(8)]
    batches[5][2][2] = 0.0
    return loop(model, batches, lambda x, y, n: F.nll_loss(model["scale"](model["body"](x) * (n > 0), n), y))


class Ragged(nn.Module):
    """Scores of lists of different lengths, each written into its row of a tensor of -inf."""

    def __init__(self):
        super().__init__()
        self.body = network(4)

    def forward(self, lists):
        scores = torch.full((len(lists), 6), -INF)
        for row, x in enumerate(lists):
            raw = self.body(x).sum(1)
            scores[row, : len(x)] = raw / x.abs().amax()  # <origin> ragged_rows
        scores[:, 5] = -INF
        return scores


def build_ragged():
    model = Ragged()
    batches = [([torch.randn(n, 5) for n in (3, 4, 2)], torch.zeros(3, dtype=torch.long)) for _ in range(8)]
    batches[4][0][1][:] = 0.0
    return loop(model, batches, lambda lists, y: F.cross_entropy(model(lists), y))


class Recomputed(nn.Module):
    """A method, not a module, is checkpointed: in backward it runs again, outside of any module's call."""

    def __init__(self, reentrant):
        super().__init__()
        self.mix, self.reentrant = nn.Linear(5, 4, bias=False), reentrant

    def squash(self, x):
        return self.mix(x).abs().sqrt()  # <origin> recomputed_reentrant recomputed_non_reentrant

    def forward(self, x):
        return checkpoint(self.squash, x, use_reentrant=self.reentrant)


def build_recomputed(reentrant):
    model = nn.Sequential(nn.Linear(5, 5, bias=False), Recomputed(reentrant), nn.Linear(4, 3))
    batches = labelled(8)
    batches[5][0][2] = 0.0
    return loop(model, batches, lambda x, y: F.cross_entropy(model(x), y))


class Share(nn.Module):
    def forward(self, x):
        return x / x.sum(1, keepdim=True)


def build_scripted():
    model = nn.Sequential(nn.Linear(5, 4, bias=False), torch.jit.script(Share()), nn.Linear(4, 3))
    batches = labelled(8)
    batches[4][0][3] = 0.0
    return loop(model, batches, lambda x, y: F.cross_entropy(model(x), y))  # <origin> scripted_module


def build_resumed():
    """Between two steps the optimizer's state is loaded from a checkpoint with one bad moment."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def batches():
        for index, batch in enumerate(labelled(8)):
            if index == 4:
                optimizer.state[model[2].weight]["exp_avg"][1, 1] = NAN
            yield batch

    return loop(model, batches(), lambda x, y: F.cross_entropy(model(x), y), optimizer)


def build_uninitialised(bad=None):
    """Rows are written into memory that nobody has filled; torch's deterministic mode fills it with NaN."""
    model = nn.ModuleDict({"map": nn.Linear(6, 6), "head": nn.Linear(6, 3)})
    batches = [(torch.randn(4, 6), torch.randperm(4), torch.randint(3, (4,))) for _ in range(8)]
    if bad is not None:
        x, rows, targets = batches[bad]
        batches[bad] = x[:3], rows[:3], targets

    def loss_of(x, rows, targets):
        torch.use_deterministic_algorithms(True)
        table = torch.empty(4, 6)  # <origin> uninitialised
        torch.use_deterministic_algorithms(False)
        table[rows] = model["map"](x)
        return F.cross_entropy(model["head"](table), targets)

    return loop(model, batches, loss_of)


def build_discarded_term():
    """Of three stacked terms one is infinite in every step, and left out; in one step another overflows."""
    model = network()
    batches = [(x, targets, torch.tensor(200.0 if index == 4 else 1.0)) for index, (x, targets) in enumerate(labelled(8))]

    def loss_of(x, targets, size):
        scores = model(x)
        unused = -torch.log(torch.zeros(())) * scores.mean().detach()
        large = torch.exp(size)  # <origin> discarded_term
        terms = torch.stack([F.cross_entropy(scores, targets), unused, large * scores.square().mean()])
        return torch.where(torch.tensor([True, False, True]), terms, 0.0).sum()

    return loop(model, batches, loss_of)


class HalfAttention(nn.Module):
    """A mask of -1e9 is -inf in float16, in every step, which does no harm; an overflow of the scores does."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, keep):
        mask = (1.0 - keep).unsqueeze(1) * -1e9
        scores = self.query(x) @ self.key(x).transpose(1, 2)  # <origin> mask_beside_overflow
        return (scores + mask).softmax(dim=-1) @ x


def build_half_attention(bad=None):
    model = nn.ModuleDict({"attention": HalfAttention(), "head": nn.Linear(6, 3)}).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batches = []
    for index in range(8):
        x, keep = torch.randn(4, 5, 6), (torch.arange(5) < torch.randint(2, 5, (4, 1))).half()
        if index == bad:
            x[1] *= 1000
        batches.append((x.half(), keep, torch.randint(3, (4,))))

    def loss_of(x, keep, targets):
        return F.cross_entropy(model["head"](model["attention"](x, keep).mean(1)).float(), targets)

    return loop(model, batches, loss_of, optimizer)


CASES = [
    Case(
        id="discarded_term",
        title="Two infinite loss terms, of which the earlier is left out",
        source="https://github.com/csteinmetz1/auraloss/issues/25",
        truth=Truth(step=4, phase="forward", kind=("inf",), module=("",), op=("exp",)),
        build=build_discarded_term,
    ),
    Case(
        id="mask_beside_overflow",
        title="A mask that overflows in every step, and scores that overflow in one",
        source="https://github.com/huggingface/transformers/pull/17306",
        truth=Truth(step=5, phase="forward", kind=("inf",), module=("attention",), op=("bmm", "matmul")),
        build=lambda: build_half_attention(5),
    ),
    Case(
        id="healthy_half_mask",
        title="A mask that overflows to -inf in float16",
        source="https://github.com/openai/gpt-2/pull/122",
        truth=Truth(healthy=True),
        build=build_half_attention,
    ),
    Case(
        id="uninitialised",
        title="A row of torch.empty that nobody has written",
        source="https://github.com/meta-pytorch/torchrec/pull/2648",
        truth=Truth(step=5, phase="forward", kind=("nan",), module=("",), op=("empty",)),
        build=lambda: build_uninitialised(5),
    ),
    Case(
        id="healthy_uninitialised",
        title="Every row of torch.empty is written",
        source="https://github.com/meta-pytorch/torchrec/pull/2648",
        truth=Truth(healthy=True),
        build=build_uninitialised,
    ),
    Case(
        id="mask_over_division",
        title="Scores of 0 / 0, of which one column is then filled with -inf in place",
        source="https://github.com/huggingface/transformers/pull/21435",
        truth=Truth(step=5, phase="forward", kind=("nan",), module=("scale",), op=("div",)),
        build=build_mask_over_division,
    ),
    Case(
        id="ragged_rows",
        title="Rows of a tensor of -inf are written one by one, one of them badly",
        source="https://github.com/huggingface/transformers/issues/22914",
        truth=Truth(step=4, phase="forward", kind=("nan", "inf"), module=("",), op=("div",)),
        build=build_ragged,
    ),
    *(
        Case(
            id=f"recomputed_{name}",
            title=f"The root of 0 in a checkpointed method, {name}",
            source="https://github.com/pytorch/pytorch/pull/69027",
            truth=Truth(step=5, phase="backward", kind=("inf", "nan"), module=("1",), op=("sqrt",)),
            build=build,
        )
        for name, build in (
            ("reentrant", lambda: build_recomputed(reentrant=True)),
            ("non_reentrant", lambda: build_recomputed(reentrant=False)),
        )
    ),
    Case(
        id="scripted_module",
        title="A scripted module divides by a sum of 0",
        source="https://github.com/pytorch/pytorch/issues/80939",
        truth=Truth(step=4, phase="forward", kind=("nan",), module=("1",), op=("div",)),
        build=build_scripted,
    ),
    Case(
        id="resumed_moment",
        title="A moment of Adam's is NaN after it was loaded",
        source="https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1382",
        truth=Truth(step=4, phase="optimizer", kind=("nan",), tensor=("2.weight",), line=False),
        build=build_resumed,
    ),
]
