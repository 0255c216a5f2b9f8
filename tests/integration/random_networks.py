"""Random small networks and how they are trained: a recipe says all, and the same recipe builds the same run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from random_faults import FAULTS, Fault
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

ROWS, INPUTS, CLASSES, VOCABULARY = 6, 5, 4, 11
WIDTHS = (4, 8, 12)


@dataclass(frozen=True)
class Batch:
    """What a step is given; `bad` marks the rows that are to go bad, `mask` entries that may be hidden."""

    inputs: Tensor  # (rows, inputs), NaN where missing
    labels: Tensor
    bad: Tensor  # (rows, 1)
    mask: Tensor  # (rows, width of the widest layer), never a whole row
    tokens: Tensor

    def halves(self) -> tuple[Batch, Batch]:
        return self.part(slice(0, ROWS // 2)), self.part(slice(ROWS // 2, ROWS))

    def part(self, rows: slice) -> Batch:
        return Batch(self.inputs[rows], self.labels[rows], self.bad[rows], self.mask[rows], self.tokens[rows])


@dataclass(frozen=True)
class Stage:
    """One block: its layer, its width, and how it is called."""

    layer: str
    width: int
    call: str  # plain, residual, twice, checkpoint, reentrant


@dataclass(frozen=True)
class Recipe:
    """A training run with at most one fault."""

    stages: tuple[Stage, ...]
    optimizer: str = "sgd"
    loss: str = "squared"
    batch: str = "tuple"
    returned: str = "tensor"
    clip: str = "none"
    backwards: str = "one"
    habits: frozenset[str] = frozenset()
    seed: int = 0
    fault: str = ""
    place: str = "block"  # block, inner, loss
    position: int = 0
    through: str = "whole"
    step: int = 0
    row: int = 0

    @property
    def faulty(self) -> Fault | None:
        return FAULTS[self.fault] if self.fault else None

    @property
    def faulty_position(self) -> int:
        return self.position % len(self.stages)

    @property
    def module(self) -> str:
        """The module that the fault belongs to."""
        names = {"block": f"blocks.{self.faulty_position}", "inner": f"blocks.{self.faulty_position}.inner"}
        return names.get(self.place, "")


# Layers: (activations, batch) -> activations of the same shape.


class Wrapped(nn.Module):
    """A torch layer between two views."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor, Batch], Tensor]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, h: Tensor, batch: Batch) -> Tensor:
        return self.call(self.layer, h, batch)


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operand: Tensor) -> Tensor:
        return operand * 3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3


class RunningLeast(nn.Module):
    """Keeps the least value met so far in a buffer that starts at +Inf."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("least", torch.tensor(torch.inf))

    def forward(self, h: Tensor, batch: Batch) -> Tensor:
        self.least = torch.minimum(self.least, h.detach().min())
        return h - self.least.clamp(-1, 1)


def own(
    make: Callable[[int], nn.Module], call: Callable[[nn.Module, Tensor, Batch], Tensor]
) -> Callable[[int], nn.Module]:
    return lambda width: Wrapped(make(width), call)


def plain(make: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    return own(make, lambda layer, h, _: layer(h))


def functional(call: Callable[[Tensor, Batch], Tensor]) -> Callable[[int], nn.Module]:
    return own(lambda _: nn.Identity(), lambda _, h, batch: call(h, batch))


def hidden(h: Tensor, batch: Batch) -> Tensor:
    return batch.mask[:, : h.shape[1]]


def attend(layer: nn.Module, h: Tensor, batch: Batch) -> Tensor:
    tokens = h.view(len(h), -1, 4)
    return h + layer(tokens, tokens, tokens, need_weights=bool(h.shape[1] > 4))[0].reshape(h.shape)


def attend_masked(h: Tensor, batch: Batch) -> Tensor:
    mask = torch.zeros(len(h), len(h)).masked_fill(torch.ones(len(h), len(h)).triu(1) > 0, -torch.inf)
    return F.scaled_dot_product_attention(h[None], h[None], h[None], attn_mask=mask)[0]


def scores_masked(h: Tensor, batch: Batch) -> Tensor:
    return h * h.masked_fill(hidden(h, batch), -torch.inf).softmax(-1)


def logsumexp_masked(h: Tensor, batch: Batch) -> Tensor:
    return h - h.masked_fill(hidden(h, batch), -torch.inf).logsumexp(1, keepdim=True)


def in_place(h: Tensor, batch: Batch) -> Tensor:
    h = h * 1.0
    h[:, 0] += 1.0
    h[:, 1:].mul_(0.5)
    return h.add_(0.1)


def chunked(h: Tensor, batch: Batch) -> Tensor:
    first, second = h.chunk(2, 1)
    return torch.cat([second * first.sigmoid(), first], 1)


def counted(h: Tensor, batch: Batch) -> Tensor:
    with torch.no_grad():
        rare = h > 1e6
        _accuracy = (h * rare).sum() / rare.sum()  # 0 / 0: nobody uses it
    return h


def guarded(h: Tensor, batch: Batch) -> Tensor:
    none = hidden(h, batch)
    return torch.where(none, 0.0, h / torch.where(none, 1.0, 1.0 + h.detach().abs()))


def best_so_far(h: Tensor, batch: Batch) -> Tensor:
    best = torch.full_like(h[:, :1], -torch.inf)
    for column in h.split(1, 1):
        best = torch.maximum(best, column)
    return h - best


def clamped_overflow(h: Tensor, batch: Batch) -> Tensor:
    with torch.no_grad():
        weight = (h * 0 + 1e3).exp().clamp(max=2.0)  # an Inf that the clamp takes away
    return h * weight


LAYERS: Mapping[str, Callable[[int], nn.Module]] = {
    "linear": plain(lambda w: nn.Sequential(nn.Linear(w, w), nn.Tanh())),
    "relu": plain(lambda w: nn.Sequential(nn.Linear(w, w), nn.ReLU(inplace=True), nn.Linear(w, w, bias=False))),
    "gelu": plain(lambda w: nn.Sequential(nn.Linear(w, 2 * w), nn.GELU(), nn.Linear(2 * w, w))),
    "conv1d": own(lambda _: nn.Conv1d(1, 2, 3, padding=1), lambda layer, h, _: layer(h[:, None]).mean(1)),
    "conv2d": own(
        lambda _: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.SiLU(), nn.AvgPool2d((1, 1))),
        lambda layer, h, _: layer(h.view(len(h), 1, 2, -1)).amax(1).flatten(1),
    ),
    "layer_norm": plain(nn.LayerNorm),
    "batch_norm": plain(nn.BatchNorm1d),
    "group_norm": plain(lambda w: nn.GroupNorm(2, w)),
    "gru": own(lambda w: nn.GRUCell(w, w), lambda layer, h, _: layer(h, h.roll(1, 0))),
    "lstm": own(lambda w: nn.LSTMCell(w, w), lambda layer, h, _: sum(layer(h))),
    "recurrent": own(lambda _: nn.GRU(4, 4), lambda layer, h, _: layer(h.view(len(h), -1, 4))[0].reshape(h.shape)),
    "attention": own(lambda _: nn.MultiheadAttention(4, 2, batch_first=True), attend),
    "encoder": own(
        lambda _: nn.TransformerEncoderLayer(4, 2, 8, 0.1, batch_first=True),
        lambda layer, h, _: layer(h.view(len(h), -1, 4)).reshape(h.shape),
    ),
    "embedding": own(lambda w: nn.Embedding(VOCABULARY, w), lambda layer, h, batch: h + layer(batch.tokens)),
    "dropout": plain(lambda _: nn.Dropout(0.3)),
    "weight_norm": plain(lambda w: nn.utils.parametrizations.weight_norm(nn.Linear(w, w))),
    "attend_masked": functional(attend_masked),
    "scores_masked": functional(scores_masked),
    "logsumexp_masked": functional(logsumexp_masked),
    "in_place": functional(in_place),
    "chunked": functional(chunked),
    "counted": functional(counted),
    "guarded": functional(guarded),
    "best_so_far": functional(best_so_far),
    "clamped_overflow": functional(clamped_overflow),
    "running_least": lambda _: RunningLeast(),
    "pooled": functional(lambda h, _: h + F.max_pool1d(h[:, None], 2).repeat_interleave(2, -1)[:, 0]),
    "softmax": functional(lambda h, _: h.softmax(1) + h.log_softmax(0)),
    "maths": functional(lambda h, _: torch.sin(h) + (h.square() + 1).sqrt() - torch.log1p(h.abs()) + h.neg().sigmoid()),
    "bounded": functional(lambda h, _: h.clamp(-3, 3).exp() + torch.atan(h) + F.softplus(h)),
    "powers": functional(lambda h, _: (h.abs() + 0.5).pow(0.3) + h.tanh() ** 3),
    "views": functional(lambda h, _: h.view(len(h), 2, -1).transpose(1, 2).reshape(h.shape).flip(0).contiguous()),
    "strided": functional(lambda h, _: h.t().contiguous().t()[:, torch.arange(h.shape[1]).flip(0)]),
    "where": functional(lambda h, batch: torch.where(hidden(h, batch), h, h.neg() * 0.5)),
    "gather": functional(lambda h, _: h.gather(1, h.argsort(1)) + h.index_select(1, torch.arange(h.shape[1]).roll(1))),
    "scatter": functional(lambda h, batch: torch.zeros_like(h).index_add(0, batch.tokens % len(h), h)),
    "einsum": functional(lambda h, _: torch.einsum("bi,bj->bi", h, h.tanh()) / h.shape[1]),
    "product": functional(lambda h, _: torch.bmm(h[:, :, None], h[:, None].tanh()).mean(2)),
    "sums": functional(lambda h, _: h.cumsum(1) / h.shape[1] + h.std(1, keepdim=True) + h.norm(dim=1, keepdim=True)),
    "normalised": functional(lambda h, _: F.normalize(h, dim=1) + F.cosine_similarity(h, h.roll(1, 0))[:, None]),
    "custom": functional(lambda h, _: Tripled.apply(h)),
    "bfloat16": functional(lambda h, _: (h.bfloat16() * 0.5).float()),
    "detached": functional(lambda h, _: h + h.detach().tanh()),
}


class Inner(nn.Module):
    """A module whose only operation is the faulty one."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    def forward(self, h: Tensor, batch: Batch) -> Tensor:
        return go_wrong(self.recipe, h, batch)


class Block(nn.Module):
    def __init__(self, layer: nn.Module, recipe: Recipe | None = None) -> None:
        super().__init__()
        self.layer, self.recipe = layer, recipe
        self.inner = Inner(recipe) if recipe is not None and recipe.place == "inner" else None

    def forward(self, h: Tensor, batch: Batch) -> Tensor:
        h = self.layer(h, batch)
        if self.inner is not None:
            return self.inner(h, batch)
        return h if self.recipe is None else go_wrong(self.recipe, h, batch)


def go_wrong(recipe: Recipe, h: Tensor, batch: Batch) -> Tensor:
    """The faulty operation, on all of the activations or a part of them."""
    assert recipe.faulty is not None
    if recipe.through == "chunk":
        first, second = h.chunk(2, 1)
        return torch.cat([first, recipe.faulty.apply(second, batch.bad)], 1)
    if recipe.through == "slice":
        h = h.clone()
        h[:, :2] = recipe.faulty.apply(h[:, :2].clone(), batch.bad)
        return h
    if recipe.through == "strided":
        return recipe.faulty.apply(h.t().contiguous().t(), batch.bad)
    return recipe.faulty.apply(h, batch.bad)


class Network(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        widths = [recipe.stages[0].width, *(stage.width for stage in recipe.stages)]
        restricted = recipe.backwards in ("by_hand", "penalty")  # reentrant checkpoints take no torch.autograd.grad
        self.calls = ["checkpoint" if restricted and s.call == "reentrant" else s.call for s in recipe.stages]
        self.stem = nn.Linear(INPUTS, widths[0])
        self.adapters = nn.ModuleList(
            nn.Identity() if before == after else nn.Linear(before, after) for before, after in pairwise(widths)
        )
        at = recipe.faulty_position if recipe.fault and recipe.place in ("block", "inner") else -1
        self.blocks = nn.ModuleList(
            Block(LAYERS[stage.layer](stage.width), recipe if position == at else None)
            for position, stage in enumerate(recipe.stages)
        )
        self.head = nn.Linear(widths[-1], CLASSES)
        self.kept: list[Tensor] = []  # activations that a further term of the loss reads

    def forward(self, batch: Batch) -> Tensor:
        h = self.stem(batch.inputs.nan_to_num(0.0))
        self.kept.clear()
        for adapter, block, call in zip(self.adapters, self.blocks, self.calls, strict=True):
            h = called(block, adapter(h), batch, call)
            self.kept.append(h)
        return self.head(h)


def called(block: nn.Module, h: Tensor, batch: Batch, call: str) -> Tensor:
    if call == "residual":
        return h + block(h, batch)
    if call == "twice":
        return block(block(h, batch), batch)
    if call in ("checkpoint", "reentrant"):
        return checkpoint(block, h, batch, use_reentrant=call == "reentrant" and h.requires_grad)
    return block(h, batch)


OPTIMIZERS: Mapping[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "nesterov": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, nesterov=True, foreach=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "adamw_foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, foreach=True),
    "adamw_fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    "amsgrad": lambda parameters: torch.optim.Adam(parameters, lr=1e-3, amsgrad=True, foreach=False),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.5),
}


def squared(prediction: Tensor, labels: Tensor) -> Tensor:
    return (prediction - F.one_hot(labels, CLASSES)).square().mean()


LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared": squared,
    "cross_entropy": F.cross_entropy,
    "likelihood": lambda prediction, labels: F.nll_loss(prediction.log_softmax(1), labels),
    "binary": lambda prediction, labels: F.binary_cross_entropy_with_logits(
        prediction, F.one_hot(labels, CLASSES).float()
    ),
    "huber": lambda prediction, labels: F.smooth_l1_loss(prediction, F.one_hot(labels, CLASSES).float()),
}


class Training:
    """A recipe put to work.  `watched` is told after every backward, and before every update."""

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.model = Network(recipe)
        self.optimizer = OPTIMIZERS[recipe.optimizer](self.model.parameters())
        habits = recipe.habits
        self.scaler = torch.amp.GradScaler("cpu", init_scale=3e38, growth_interval=2) if "scaler" in habits else None
        self.teacher = copy.deepcopy(self.model) if "teacher" in habits else None
        if "frozen" in habits:
            self.model.stem.requires_grad_(False)
            self.model.blocks[0].requires_grad_(False)
        self.before_update: Callable[[Tensor], None] = lambda _loss: None
        self.batches = [self._batch(step) for step in range(max(recipe.step + 1, 3))]
        torch.manual_seed(recipe.seed + 1)

    def _batch(self, step: int) -> Batch:
        inputs, bad = torch.randn(ROWS, INPUTS), torch.zeros(ROWS, 1)
        if "markers" in self.recipe.habits:
            inputs[step % ROWS, 1:3] = torch.nan
        if step == self.recipe.step and self.recipe.fault:
            bad[self.recipe.row] = 1
        mask = torch.rand(ROWS, max(WIDTHS)) < 0.4
        mask[:, 0] = False
        return Batch(inputs, torch.randint(CLASSES, (ROWS,)), bad, mask, torch.randint(VOCABULARY, (ROWS,)))

    def given(self) -> Iterator[Any]:
        """The batches as a loader would hand them over."""
        for batch in self.batches:
            fields = vars(batch)
            structures = {"tuple": tuple(fields.values()), "dict": dict(fields), "list": [[*fields.values()], {}]}
            yield structures.get(self.recipe.batch, batch)

    @property
    def stateful(self) -> list[object]:
        """What a step changes beside model and optimizer."""
        return [entry for entry in (self.scaler, self.teacher) if entry is not None]

    def train_step(self, given: Any) -> Any:
        batch = self._unpacked(given)
        if "closure" in self.recipe.habits and self.scaler is None:
            loss = self.optimizer.step(lambda: self._gradients(batch))
        else:
            loss = self._gradients(batch)
            self._update()
        self._afterwards(batch)
        return {"tensor": loss, "float": loss.item(), "dict": {"loss": loss, "size": ROWS}, "none": None}[
            self.recipe.returned
        ]

    def _gradients(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad(set_to_none="keep_gradients" not in self.recipe.habits)
        loss = self._backward(batch)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        self._clip()
        self.before_update(loss)
        return loss

    def _update(self) -> None:
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()

    def _afterwards(self, batch: Batch) -> None:
        """What many steps do when the update is done: average the weights, measure something."""
        with torch.no_grad():
            if self.teacher is not None:
                pairs = zip(self.teacher.parameters(), self.model.parameters(), strict=True)
                for slow, fast in pairs:
                    slow.lerp_(fast, 0.1)
            if "metric" in self.recipe.habits:
                self.model.eval()
                none = self.model(batch).argmax(1) == CLASSES
                _recall = none.sum() / none.sum()  # 0 / 0: nobody uses it
                self.model.train()

    def _unpacked(self, given: Any) -> Batch:
        if isinstance(given, Mapping):
            return Batch(**given)
        if isinstance(given, Batch):
            return given
        return Batch(*(given[0] if isinstance(given, list) else given))

    def _backward(self, batch: Batch) -> Tensor:
        if self.recipe.backwards == "accumulated":
            losses = [self._loss(half) / 2 for half in batch.halves()]
            for loss in losses:
                self._scaled(loss).backward()
            return torch.stack([loss.detach() for loss in losses]).sum()
        loss = self._loss(batch)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if self.recipe.backwards == "two":
            self._scaled(loss).backward(retain_graph=True)
            self._scaled(sum(parameter.square().sum() for parameter in parameters) * 1e-4).backward()
        elif self.recipe.backwards == "by_hand":
            gradients = torch.autograd.grad(self._scaled(loss), parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
        elif self.recipe.backwards == "penalty":
            (slope,) = torch.autograd.grad(loss, self.model.head.weight, create_graph=True)
            loss = loss + 1e-3 * slope.square().sum()
            self._scaled(loss).backward()
        else:
            self._scaled(loss).backward()
        return loss

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    def _loss(self, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in self.recipe.habits):
            prediction = self.model(batch)
        if self.recipe.place == "loss" and self.recipe.fault:
            prediction = go_wrong(self.recipe, prediction, batch)
        loss = LOSSES[self.recipe.loss](prediction, batch.labels)
        if "activity" in self.recipe.habits:
            loss = loss + 1e-3 * sum(kept.mean() for kept in self.model.kept)
        if self.teacher is not None:
            with torch.no_grad():
                target = self.teacher(batch).tanh()
            loss = loss + 0.1 * (prediction - target).square().mean()
        return loss

    def _clip(self) -> None:
        parameters = list(self.model.parameters())
        if self.recipe.clip == "norm":
            nn.utils.clip_grad_norm_(parameters, 1.0)
        elif self.recipe.clip == "value":
            nn.utils.clip_grad_value_(parameters, 0.5)
        elif self.recipe.clip == "by_hand":
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(parameter.grad.norm().clamp_min(1.0))
