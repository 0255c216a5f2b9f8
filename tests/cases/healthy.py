"""No fault in any of them: an inf or a NaN that is meant, or that comes to nothing."""

import torch
from nanzoo import Case, Loop, Truth
from torch import nn
from torch.distributions import Categorical
from torch.nn import functional as F

INF, NAN = float("inf"), float("nan")


def network(outputs=4):
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, outputs))


def loop(model, batches, loss_of, give=lambda loss: loss):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def train_step(batch):
        optimizer.zero_grad()
        loss = loss_of(*batch)
        loss.backward()
        optimizer.step()
        return give(loss)

    return Loop(model, optimizer, batches, train_step)


def labelled(count=10):
    return [(torch.randn(8, 6), torch.randint(4, (8,))) for _ in range(count)]


def build_illegal_actions():
    """Illegal actions have logits of -inf; Categorical's log-probabilities and entropy are fine."""
    model = network()
    batches = [(torch.randn(8, 6), torch.rand(8, 4) < 0.4, torch.randn(8)) for _ in range(10)]
    for _, illegal, _ in batches:
        illegal[:, 0] = False
        illegal[0, 1:] = True  # a single legal action

    def loss_of(x, illegal, advantage):
        policy = Categorical(logits=model(x).masked_fill(illegal, -INF))
        actions = policy.sample()
        return -(policy.log_prob(actions) * advantage).mean() - 0.01 * policy.entropy().mean()

    return loop(model, batches, loss_of)


def build_top_k():
    """Top-k and nucleus filtering for a sample drawn in the step; the student learns from it."""
    model = network(12)
    batches = [(torch.randn(8, 6),) for _ in range(10)]

    def loss_of(x):
        logits = model(x)
        with torch.no_grad():
            kept = logits.masked_fill(logits < logits.topk(3).values[:, -1:], -INF)
            ordered, order = kept.sort(descending=True)
            beyond = ordered.softmax(-1).cumsum(-1) > 0.9
            beyond[:, 1:] = beyond[:, :-1].clone()
            beyond[:, 0] = False
            kept = kept.scatter(1, order, ordered.masked_fill(beyond, -INF))
            sample = kept.softmax(-1).multinomial(1).squeeze(1)
        return F.cross_entropy(logits, sample) + F.cross_entropy(kept + 0 * logits.clamp(-9, 9), sample)

    return loop(model, batches, loss_of)


def build_where():
    """The unused branch of torch.where is NaN; its input was made safe first, so its gradient is finite."""
    model = network(1)
    batches = [(torch.randn(8, 6), torch.rand(8)) for _ in range(10)]

    def loss_of(x, y):
        out = model(x).squeeze(1)
        positive = out > 0
        with torch.no_grad():
            shown = torch.where(positive, out.log(), NAN)
        safe = torch.where(positive, out, 1.0)
        logs = torch.where(positive, safe.log(), out)
        return F.mse_loss(logs, y) + 0 * torch.nan_to_num(shown).sum()

    return loop(model, batches, loss_of)


def build_boolean_index():
    """Entries are filled with NaN to mark them, then left out by a boolean index."""
    model = network()
    batches = labelled()

    def loss_of(x, y):
        logits = model(x)
        marked = logits.masked_fill((y == 3).unsqueeze(1), NAN)
        kept = ~marked.isnan().any(dim=1)
        return F.cross_entropy(marked[kept], y[kept])

    return loop(model, batches, loss_of)


def build_clamped():
    """An inf is clamped, a negative inf goes through a ReLU, a 1 / 0 through atan, an exp through 1 / (1 + x)."""
    model = network(1)
    batches = [(torch.randn(8, 6), torch.rand(8).round()) for _ in range(10)]

    def loss_of(x, y):
        out = model(x).squeeze(1)
        weight = (1 / y).clamp(max=5.0)
        bonus = torch.relu(torch.log(y))
        angle = torch.atan(1 / y)
        share = 1 / (1 + torch.exp(200 * y))
        return ((weight + bonus + angle + share) * (out - y).square()).mean()

    return loop(model, batches, loss_of)


def build_mixed_returns(give):
    model = network()
    return loop(model, labelled(), lambda x, y: F.cross_entropy(model(x), y), give)


class Lazy(nn.Module):
    """A cache of NaN that is filled row by row as rows are needed."""

    def __init__(self):
        super().__init__()
        self.register_buffer("cache", torch.full((16, 6), NAN))
        self.embed, self.head = nn.Embedding(16, 6), nn.Linear(6, 4)

    def forward(self, ids):
        missing = self.cache[ids].isnan().any(dim=1)
        self.cache[ids[missing]] = torch.sin(ids[missing].float()).unsqueeze(1).expand(-1, 6)
        return self.head(self.embed(ids) + self.cache[ids])


def build_lazy():
    model = Lazy()
    batches = [(torch.randint(16, (8,)), torch.randint(4, (8,))) for _ in range(10)]
    return loop(model, batches, lambda ids, y: F.cross_entropy(model(ids), y))


def build_padding_rows():
    """Padding rows of the batch are NaN; the sequence is packed, so that nothing reads them."""
    model = nn.ModuleDict({"rnn": nn.LSTM(3, 5, batch_first=True), "head": nn.Linear(5, 2)})
    batches = []
    for _ in range(8):
        x, lengths = torch.randn(4, 6, 3), torch.tensor([6, 4, 3, 1])
        x[torch.arange(6) >= lengths.unsqueeze(1)] = NAN
        batches.append((x, lengths, torch.randint(2, (4,))))

    def loss_of(x, lengths, y):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        _, (last, _) = model["rnn"](packed)
        return F.cross_entropy(model["head"](last[0]), y)

    return loop(model, batches, loss_of)


def build_scatter():
    """A scatter maximum that starts at -inf; empty segments are put to 0 afterwards."""
    model = nn.ModuleDict({"body": nn.Linear(6, 3), "head": nn.Linear(3, 2)})
    batches = [(torch.randn(8, 6), torch.randint(4, (8,)), torch.randint(2, (5,))) for _ in range(10)]

    def loss_of(x, segment, y):
        hidden = model["body"](x)
        top = torch.full((5, 3), -INF).scatter_reduce(0, segment.unsqueeze(1).expand(-1, 3), hidden, "amax")
        top = torch.where(top.isinf(), torch.zeros(()), top)  # segment 4 never has a member
        return F.cross_entropy(model["head"](top), y)

    return loop(model, batches, loss_of)


def build_forward_algorithm():
    """A forward algorithm in log space with forbidden transitions of -inf."""
    model = nn.ModuleDict({"emit": nn.Linear(6, 4)})
    allowed = (torch.eye(4) + torch.eye(4).roll(1, dims=1)).log()  # stay, or go on to the next state
    start = torch.tensor([0.0, -INF, 0.0, -INF])  # so that every state has a predecessor
    batches = [(torch.randn(5, 8, 6),) for _ in range(8)]

    def loss_of(x):
        emissions = model["emit"](x).log_softmax(-1)
        alpha = start + emissions[0]
        for emission in emissions[1:]:
            alpha = torch.logsumexp(alpha.unsqueeze(2) + allowed, dim=1) + emission
        return -torch.logsumexp(alpha, dim=1).mean()

    return loop(model, batches, loss_of)


def build_scaled_loss():
    """A GradScaler that was not told of, with bare autocast; the returned loss is scaled and now and then inf."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=2)
    batches = labelled(14)

    def train_step(batch):
        inputs, targets = batch
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast("cpu", dtype=torch.float16):
            logits = model(inputs)
            loss = F.cross_entropy(logits, targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.float().item(), float(scaler.get_scale())

    return Loop(model, optimizer, batches, train_step)


def build_evaluation_inside():
    """Every third step also evaluates on a set without positives: a precision of 0 / 0, a logged inf."""
    model = network(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = [(torch.randn(8, 6), torch.rand(8).round(), index % 3 == 0) for index in range(10)]

    def train_step(batch):
        x, y, evaluate = batch
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(model(x).squeeze(1), y)
        loss.backward()
        optimizer.step()
        result = {"loss": loss}
        if evaluate:
            model.eval()
            with torch.inference_mode():
                predicted = model(x).squeeze(1) > 50
                result["precision"] = (predicted & (y > 0)).sum() / predicted.sum()
                result["ratio"] = loss / predicted.sum()
            model.train()
        return result

    return Loop(model, optimizer, batches, train_step)


def build_beam():
    """Best scores start at -inf, and a masked maximum may stay there until it is replaced."""
    model = network()
    batches = labelled()

    def loss_of(x, y):
        logits = model(x)
        rivals = logits.scatter(1, y.unsqueeze(1), -INF)
        margin = logits.gather(1, y.unsqueeze(1)).squeeze(1) - rivals.amax(dim=1)
        return F.softplus(-margin).mean()

    return loop(model, batches, loss_of)


def healthy(identifier, title, source, build):
    return Case(id=f"healthy_{identifier}", title=title, source=source, truth=Truth(healthy=True), build=build)


MASKS = "https://github.com/Stable-Baselines-Team/stable-baselines3-contrib/pull/302"
MARKERS = "https://github.com/janelia-cellmap/cellmap-segmentation-challenge/issues/162"
SCALER = "https://github.com/pytorch/pytorch/issues/40497"
CASES = [
    healthy("illegal_actions", "Illegal actions with logits of -inf", MASKS, build_illegal_actions),
    healthy("top_k", "Top-k filtering with -inf", MASKS, build_top_k),
    healthy("where", "The unused branch of torch.where is NaN, its input is not", MARKERS, build_where),
    healthy("boolean_index", "NaN filled in, then indexed away", MARKERS, build_boolean_index),
    healthy("clamped", "inf that is clamped, cut off or inverted", MARKERS, build_clamped),
    healthy("returns_float", "The step returns a float", SCALER, lambda: build_mixed_returns(float)),
    healthy("returns_none", "The step returns None", SCALER, lambda: build_mixed_returns(lambda loss: None)),
    healthy(
        "returns_mixed",
        "The step returns a loss, a text and an inf that is no loss",
        SCALER,
        lambda: build_mixed_returns(lambda loss: {"loss": loss, "note": "fine", "best": INF, "none": None}),
    ),
    healthy(
        "lazy_cache",
        "A cache of NaN, filled row by row",
        "https://github.com/NVIDIA/Megatron-LM/issues/6253",
        build_lazy,
    ),
    healthy("packed_padding", "NaN in padding that a packed sequence leaves out", MARKERS, build_padding_rows),
    healthy("scatter_maximum", "A scatter maximum that starts at -inf", MASKS, build_scatter),
    healthy("forbidden_transitions", "A forward algorithm with transitions of -inf", MASKS, build_forward_algorithm),
    healthy("half_loss", "A float16 loss under a GradScaler nobody told of", SCALER, build_scaled_loss),
    healthy("evaluation_inside", "An evaluation within the step, 0 / 0", SCALER, build_evaluation_inside),
    healthy("margin", "Rivals masked with -inf before a maximum", MASKS, build_beam),
]
