"""Losses and normalisations at the edge of their domain: the forward pass makes the value."""

import math

import torch
from nanzoo import Case, Loop, Truth
from torch import nn
from torch.nn import functional as F

NEG_INF = float("-inf")
CROSS_ENTROPY = ("cross_entropy", "cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss_forward")


def network(outputs=3):
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, outputs))


def loop(model, batches, loss_of, optimizer=None):
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=1e-3)

    def train_step(batch):
        optimizer.zero_grad()
        loss = loss_of(*batch)
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step)


def inputs(count, rows=8):
    return [torch.randn(rows, 6) for _ in range(count)]


class BinaryLoss(nn.Module):
    def forward(self, scores, targets):
        belief = scores.sigmoid()
        return -(targets * belief.log() + (1 - targets) * (1 - belief).log()).mean()  # <origin> binary_by_hand


def build_binary(by_hand):
    """A score of 200: the sigmoid is exactly 1. nn.BCELoss bounds its logarithm; the formula by hand does not."""
    model = nn.ModuleDict({"net": network(1), "loss": BinaryLoss() if by_hand else nn.BCELoss()})
    batches = [(x, torch.rand(8).round()) for x in inputs(9)]
    batches[5][0][2], batches[5][1][2] = 1.0, 0.0

    def loss_of(x, targets):
        scores = model["net"](x).squeeze(1)
        scores = torch.where(x[:, 0] == 1.0, scores + 200, scores)
        return model["loss"](scores, targets) if by_hand else model["loss"](scores.sigmoid(), targets)

    return loop(model, batches, loss_of)


def build_divergence(by_hand):
    """A soft target of exactly 0: F.kl_div takes 0 * log(0) as 0."""
    model = network()
    batches = [(x, torch.rand(8, 3).softmax(1)) for x in inputs(8)]
    batches[4][1][5] = torch.tensor([0.5, 0.5, 0.0])

    def loss_of(x, goal):
        logs = model(x).log_softmax(1)
        if not by_hand:
            return F.kl_div(logs, goal, reduction="batchmean")
        goal_logs = goal.log()  # <origin> divergence_by_hand
        return (goal * (goal_logs - logs)).sum(1).mean()

    return loop(model, batches, loss_of)


class GaussianHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.mean, self.deviation = nn.Linear(6, 8), nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, x):
        hidden = self.body(x).tanh()
        return self.mean(hidden).squeeze(1), self.deviation(hidden).relu().squeeze(1)


def build_gaussian():
    """The variance goes through a ReLU and is exactly 0 for one row; eps was set to 0."""
    model = GaussianHead()
    criterion = nn.GaussianNLLLoss(eps=0.0)
    model.criterion = criterion
    nn.init.constant_(model.deviation.bias, 3.0)
    batches = [(x, torch.randn(8), torch.zeros(8)) for x in inputs(8)]
    batches[5][2][1] = 1.0

    def loss_of(x, targets, quiet):
        mean, variance = model(x)
        return criterion(mean, targets, variance * (1 - quiet))  # <origin> gaussian_nll

    return loop(model, batches, loss_of)


def build_poisson():
    """The rate is exp of the output."""
    model = network(1)
    model.add_module("criterion", nn.PoissonNLLLoss(log_input=True))
    batches = [(x, torch.rand(8)) for x in inputs(8)]
    batches[5][0][3] *= 1e4
    nn.init.constant_(model[0].bias, 0.1)

    def loss_of(x, targets):
        rate = x.mean(1) + model[2](model[1](model[0](x))).squeeze(1)
        return model.criterion(rate.abs(), targets)  # <origin> poisson_rate

    return loop(model, batches, loss_of)


def build_softplus_inverse():
    """log(expm1(x)) without the guard for large x."""
    model = network(1)
    batches = [(x, torch.rand(8) + 0.5) for x in inputs(8)]
    batches[3][1][2] = 200.0

    def loss_of(x, targets):
        grown = torch.expm1(targets)  # <origin> softplus_inverse
        return F.mse_loss(model(x).squeeze(1), grown.log())

    return loop(model, batches, loss_of)


def build_logit():
    """The logit of a label that is exactly 1."""
    model = network(1)
    batches = [(x, 0.1 + 0.8 * torch.rand(8)) for x in inputs(8)]
    batches[6][1][0] = 1.0

    def loss_of(x, shares):
        goal = torch.logit(shares)  # <origin> logit_of_one
        return F.smooth_l1_loss(model(x).squeeze(1), goal)

    return loop(model, batches, loss_of)


def build_masked_target():
    """Classes that cannot be are masked with -inf, in every batch; in one batch the target is such a class."""
    model = network(4)
    batches = [(x, torch.rand(8, 4) < 0.3, torch.zeros(8, dtype=torch.long)) for x in inputs(9)]
    for index, (_, masked, targets) in enumerate(batches):
        targets.copy_(torch.randint(4, (8,)))
        masked[torch.arange(8), targets] = False
        if index == 6:
            masked[3, targets[3]], masked[3, (targets[3] + 1) % 4] = True, False

    def loss_of(x, masked, targets):
        logits = model(x).masked_fill(masked, NEG_INF)
        return F.cross_entropy(logits, targets)  # <origin> masked_target

    return loop(model, batches, loss_of)


def build_smoothing():
    """Label smoothing gives every class a share, the masked one too: 0.025 * inf."""
    model = network(4)
    batches = [(x, torch.randint(3, (8,)), index == 4) for index, x in enumerate(inputs(8))]

    def loss_of(x, targets, masked):
        logits = model(x)
        if masked:
            logits[:, 3] = NEG_INF
        return F.cross_entropy(logits, targets, label_smoothing=0.1)  # <origin> smoothed_mask

    return loop(model, batches, loss_of)


def build_ctc(zero_infinity):
    """A transcript longer than its recording: the loss is inf, or 0 where one asks for that."""
    model = nn.ModuleDict({"net": nn.Linear(6, 5), "criterion": nn.CTCLoss(zero_infinity=zero_infinity)})
    batches = [(torch.randn(8, 2, 6), torch.randint(1, 5, (2, 3)), torch.tensor([8, 8])) for _ in range(8)]
    batches[5] = (batches[5][0], torch.ones(2, 3, dtype=torch.long), torch.tensor([8, 3]))

    def loss_of(x, targets, lengths):
        logs = model["net"](x).log_softmax(2)
        return model["criterion"](logs, targets, lengths, torch.tensor([3, 3]))  # <origin> ctc_infinite

    return loop(model, batches, loss_of)


class LogSumExp(nn.Module):
    """By hand, with the usual subtraction of the maximum."""

    def forward(self, scores):
        top = scores.amax(dim=1, keepdim=True)
        shifted = scores - top  # <origin> logsumexp_by_hand
        return shifted.exp().sum(dim=1).log() + top.squeeze(1)


def build_logsumexp():
    model = nn.ModuleDict({"net": network(4), "pool": LogSumExp()})
    batches = [(x, torch.rand(8, 4) < 0.3) for x in inputs(9)]
    for index, (_, absent) in enumerate(batches):
        absent[:, 0] = False
        absent[2] |= index == 5

    def loss_of(x, absent):
        return model["pool"](model["net"](x).masked_fill(absent, NEG_INF)).clamp(min=-30).mean()

    return loop(model, batches, loss_of)


class RowUnit(nn.Module):
    def forward(self, x):
        return x / x.norm(dim=1, keepdim=True)  # <origin> unit_rows


def build_unit_rows(by_hand):
    """A row of zeros: by hand 0 / 0; F.normalize, cosine_similarity, pairwise_distance, cdist, norm are all safe."""
    model = nn.ModuleDict({"embed": nn.Linear(6, 5, bias=False), "unit": RowUnit()})
    batches = [(x, y) for x, y in zip(inputs(9), inputs(9), strict=True)]
    batches[6][0][4] = batches[6][1][4] = 0

    def loss_of(x, y):
        left, right = model["embed"](x), model["embed"](y)
        if by_hand:
            return (model["unit"](left) * right).sum(1).mean()
        near = F.cosine_similarity(left, right).mean() + F.normalize(left).sum(1).mean()
        far = torch.cdist(left, right).mean() + F.pairwise_distance(left, right).mean()
        return near + far + left.norm(dim=1).mean() + F.triplet_margin_loss(left, right, left.roll(1, 0))

    return loop(model, batches, loss_of, torch.optim.SGD(model.parameters(), lr=1e-14))


def build_zero_epsilon(make_norm, rows=8):
    """One sample's features are all alike; the normalisation has no epsilon."""
    model = nn.Sequential(make_norm(), nn.Flatten(), nn.Linear(12, 3))
    batches = [(torch.randn(rows, 4, 3), torch.randint(3, (rows,))) for _ in range(8)]
    batches[5][0][2] = 1.5

    def loss_of(x, targets):
        return F.cross_entropy(model(x), targets)  # <origin> layer_norm_no_epsilon group_norm_no_epsilon

    return loop(model, batches, loss_of)


class RMSNorm(nn.Module):
    def forward(self, x):
        scale = x.square().mean(-1, keepdim=True).rsqrt()  # <origin> rms_norm
        return x * scale


def build_rms():
    model = nn.Sequential(nn.Embedding(20, 8, padding_idx=0), RMSNorm(), nn.Flatten(), nn.Linear(32, 3))
    batches = [(torch.randint(1, 20, (4, 4)), torch.randint(3, (4,))) for _ in range(8)]
    batches[6][0][1, 2] = 0  # padding: an embedding of zeros

    def loss_of(tokens, targets):
        return F.cross_entropy(model(tokens), targets)

    return loop(model, batches, loss_of)


class WeightNormed(nn.Module):
    def __init__(self, parametrize):
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3, bias=False)
        nn.init.zeros_(self.head.weight)  # as one does with a last layer
        self.head = parametrize(self.head)

    def forward(self, x):
        return self.head(self.body(x).tanh())  # <origin> weight_norm weight_norm_old spectral_norm


def build_parametrized(parametrize):
    model = WeightNormed(parametrize)
    return loop(model, [(x, torch.randint(3, (8,))) for x in inputs(6)], lambda x, y: F.cross_entropy(model(x), y))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(4, 4, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(4, 2)
        with torch.no_grad():
            self.rnn.weight_hh_l0.copy_(3 * torch.eye(4))

    def forward(self, x):
        _, last = self.rnn(x)  # <origin> rnn_overflow
        return self.head(torch.log1p(last[0]))


def build_recurrent():
    """A hidden state that triples at each time step: fine over 20 of them, not over 120."""
    model = Recurrent()
    batches = [(torch.rand(3, 120 if index == 5 else 20, 4), torch.randint(2, (3,))) for index in range(8)]
    return loop(
        model,
        batches,
        lambda x, y: F.cross_entropy(model(x), y),
        torch.optim.SGD(model.parameters(), lr=1e-14),
    )


class Temperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(6, 4), nn.Linear(6, 4)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, image, text):
        image, text = F.normalize(self.image(image)), F.normalize(self.text(text))
        scale = self.logit_scale.exp()  # <origin> logit_scale
        return scale * image @ text.T


def build_temperature():
    """A step size far too large for the temperature's logarithm, and labels that are wrong: it grows by 8 a step."""
    model = Temperature()
    optimizer = torch.optim.SGD(model.parameters(), lr=8.0)
    batches = [(x, x + 0.1 * torch.randn(8, 6)) for x in inputs(16)]

    def train_step(batch):
        optimizer.zero_grad()
        logits = model(*batch)
        loss = -F.cross_entropy(logits, torch.arange(8).roll(1))
        loss.backward()
        nn.utils.clip_grad_value_(model.image.parameters(), 1e-6)
        nn.utils.clip_grad_value_(model.text.parameters(), 1e-6)
        model.logit_scale.grad.sign_()
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step)


class Demodulated(nn.Module):
    """StyleGAN2's convolution: a style of zeros leaves nothing to normalise by."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2, 3, 3))
        self.upsample = nn.ConvTranspose2d(3, 2, 2, stride=2)

    def forward(self, x, style):
        weight = self.weight * style.view(-1, 1, 1, 1)
        demodulation = weight.square().sum(dim=(0, 2, 3), keepdim=True).rsqrt()  # <origin> demodulation
        return self.upsample(F.conv_transpose2d(x, weight * demodulation, padding=1).relu().repeat(1, 2, 1, 1)[:, :3])


def build_demodulation():
    model = Demodulated()
    batches = [(torch.randn(2, 3, 4, 4), torch.rand(3) + 0.5) for _ in range(8)]
    batches[5][1].zero_()
    return loop(model, batches, lambda x, style: model(x, style).square().mean())


class Spectrum(nn.Module):
    def forward(self, wave):
        magnitude = torch.fft.rfft(wave).abs()
        return magnitude.log()  # <origin> log_spectrum


def build_spectrum():
    """A stretch of silence: the logarithm of a magnitude of 0."""
    model = nn.ModuleDict({"filter": nn.Conv1d(1, 1, 3, padding=1, bias=False), "spectrum": Spectrum()})
    batches = [(torch.randn(4, 1, 16), torch.randn(4, 1, 9)) for _ in range(8)]
    batches[4][0][2] = 0

    def loss_of(wave, goal):
        return F.l1_loss(model["spectrum"](model["filter"](wave)), goal)

    return loop(model, batches, loss_of)


class Brain(nn.Module):
    """bfloat16 has float32's range, so what overflows is not a half-precision product but a true exponential."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 4, dtype=torch.bfloat16)

    def forward(self, x):
        hidden = self.body(x.bfloat16())
        energy = torch.exp(hidden)  # <origin> bfloat16_exp
        return energy / energy.sum(dim=1, keepdim=True)


def build_bfloat16():
    model = Brain()
    batches = [(x, torch.rand(8, 4)) for x in inputs(8)]
    batches[5][0][1] *= 500
    return loop(model, batches, lambda x, y: F.mse_loss(model(x).float(), y))


WEIGHT_NORM = ("_weight_norm_interface", "weight_norm", "div", "mul")
CASES = [
    Case(
        id="binary_by_hand",
        title="Binary cross-entropy by hand, at a sigmoid of exactly 1",
        source="https://github.com/NVIDIA/apex/issues/358",
        truth=Truth(step=5, phase="forward", kind=("inf",), module=("loss",), op=("log",)),
        build=lambda: build_binary(by_hand=True),
    ),
    Case(
        id="healthy_binary",
        title="nn.BCELoss at a sigmoid of exactly 1: its logarithm is bounded",
        source="https://github.com/soumith/ganhacks/issues/67",
        truth=Truth(healthy=True),
        build=lambda: build_binary(by_hand=False),
    ),
    Case(
        id="divergence_by_hand",
        title="A divergence by hand takes the logarithm of a target of 0",
        source="https://github.com/harvardnlp/annotated-transformer/issues/109",
        truth=Truth(step=4, phase="forward", kind=("inf",), module=("",), op=("log",)),
        build=lambda: build_divergence(by_hand=True),
    ),
    Case(
        id="healthy_divergence",
        title="F.kl_div with a target of 0",
        source="https://github.com/harvardnlp/annotated-transformer/issues/109",
        truth=Truth(healthy=True),
        build=lambda: build_divergence(by_hand=False),
    ),
    Case(
        id="gaussian_nll",
        title="A Gaussian likelihood with a variance of 0",
        source="https://github.com/hardmaru/WorldModelsExperiments/issues/3",
        truth=Truth(step=5, phase="forward", kind=("inf",), module=("criterion",), op=("log", "gaussian_nll_loss")),
        build=build_gaussian,
    ),
    Case(
        id="poisson_rate",
        title="A Poisson likelihood whose log rate is too large",
        source="https://github.com/vanderschaarlab/synthcity/issues/331",
        truth=Truth(step=5, phase="forward", kind=("inf",), module=("criterion",), op=("exp", "poisson_nll_loss")),
        build=build_poisson,
    ),
    Case(
        id="softplus_inverse",
        title="The inverse of softplus of a large target",
        source="https://github.com/vanderschaarlab/synthcity/issues/331",
        truth=Truth(step=3, phase="forward", kind=("inf",), module=("",), op=("expm1",)),
        build=build_softplus_inverse,
    ),
    Case(
        id="logit_of_one",
        title="The logit of a share of exactly 1",
        source="https://github.com/NVIDIA/apex/issues/358",
        truth=Truth(step=6, phase="forward", kind=("inf",), module=("",), op=("logit",)),
        build=build_logit,
    ),
    Case(
        id="masked_target",
        title="The target is a class that was masked with -inf",
        source="https://github.com/google-deepmind/optax/issues/896",
        truth=Truth(step=6, phase="forward", kind=("inf",), module=("",), op=CROSS_ENTROPY),
        build=build_masked_target,
    ),
    Case(
        id="smoothed_mask",
        title="Label smoothing over a class that was masked with -inf",
        source="https://github.com/facebookresearch/pytext/pull/1698",
        truth=Truth(
            step=4,
            phase="forward",
            kind=("inf",),
            module=("",),
            op=(*CROSS_ENTROPY, "log_softmax", "sum", "mean", "neg", "div", "mul", "add"),
        ),
        build=build_smoothing,
    ),
    Case(
        id="ctc_infinite",
        title="A transcript that does not fit its recording",
        source="https://github.com/pytorch/pytorch/issues/14335",
        truth=Truth(step=5, phase="forward", kind=("inf",), module=("criterion",), op=("ctc_loss", "_ctc_loss")),
        build=lambda: build_ctc(zero_infinity=False),
    ),
    Case(
        id="healthy_ctc",
        title="The same with zero_infinity",
        source="https://github.com/wenet-e2e/wenet/pull/2299",
        truth=Truth(healthy=True),
        build=lambda: build_ctc(zero_infinity=True),
    ),
    Case(
        id="logsumexp_by_hand",
        title="A logsumexp by hand over a row of nothing but -inf",
        source="https://github.com/allenai/allennlp/issues/890",
        truth=Truth(step=5, phase="forward", kind=("nan",), module=("pool",), op=("sub",)),
        build=build_logsumexp,
    ),
    Case(
        id="unit_rows",
        title="A row of zeros divided by its norm",
        source="https://github.com/FlyingGiraffe/vnn/pull/4",
        truth=Truth(step=6, phase="forward", kind=("nan",), module=("unit",), op=("div",)),
        build=lambda: build_unit_rows(by_hand=True),
    ),
    Case(
        id="healthy_zero_vectors",
        title="torch's own norms, distances and similarities at a zero vector",
        source="https://github.com/pytorch/pytorch/issues/184575",
        truth=Truth(healthy=True),
        build=lambda: build_unit_rows(by_hand=False),
    ),
    Case(
        id="layer_norm_no_epsilon",
        title="LayerNorm without epsilon over a constant row",
        source="https://github.com/pytorch/pytorch/issues/41527",
        truth=Truth(step=5, phase="forward", kind=("nan",), module=("0",), op=("layer_norm", "native_layer_norm")),
        build=lambda: build_zero_epsilon(lambda: nn.LayerNorm((4, 3), eps=0.0)),
    ),
    Case(
        id="group_norm_no_epsilon",
        title="GroupNorm without epsilon over a constant sample",
        source="https://github.com/pytorch/pytorch/issues/41527",
        truth=Truth(step=5, phase="forward", kind=("nan",), module=("0",), op=("group_norm", "native_group_norm")),
        build=lambda: build_zero_epsilon(lambda: nn.GroupNorm(2, 4, eps=0.0)),
    ),
    Case(
        id="rms_norm",
        title="A root mean square of 0, at a padding token's embedding",
        source="https://github.com/huggingface/diffusers/pull/13316",
        truth=Truth(step=6, phase="forward", kind=("inf",), module=("1",), op=("rsqrt",)),
        build=build_rms,
    ),
    Case(
        id="weight_norm",
        title="weight_norm of a layer that starts at 0",
        source="https://github.com/pytorch/pytorch/issues/19126",
        truth=Truth(
            step=0,
            phase="forward",
            kind=("nan",),
            module=("head", "head.parametrizations.weight", "head.parametrizations.weight.0"),
            op=WEIGHT_NORM,
        ),
        build=lambda: build_parametrized(nn.utils.parametrizations.weight_norm),
    ),
    Case(
        id="spectral_norm",
        title="spectral_norm of a layer that starts at 0",
        source="https://github.com/pytorch/pytorch/issues/19126",
        truth=Truth(
            step=0,
            phase="forward",
            kind=("nan",),
            module=("head", "head.parametrizations.weight", "head.parametrizations.weight.0"),
            op=("div",),
        ),
        build=lambda: build_parametrized(nn.utils.parametrizations.spectral_norm),
    ),
    Case(
        id="rnn_overflow",
        title="A ReLU RNN over a long sequence",
        source="https://github.com/keras-team/keras/issues/2194",
        truth=Truth(
            step=5,
            phase="forward",
            kind=("inf",),
            module=("rnn",),
            op=("rnn_relu", "linear", "addmm", "mm", "matmul", "add", "relu", "t"),
        ),
        build=build_recurrent,
    ),
    Case(
        id="logit_scale",
        title="A learned temperature without a bound",
        source="https://github.com/openai/CLIP/issues/46",
        truth=Truth(step=11, phase="forward", kind=("inf",), module=("",), op=("exp",)),
        build=build_temperature,
    ),
    Case(
        id="demodulation",
        title="Weights demodulated by a style of zeros, in a transposed convolution",
        source="https://github.com/KohakuBlueleaf/LyCORIS/pull/166",
        truth=Truth(step=5, phase="forward", kind=("inf",), module=("",), op=("rsqrt",)),
        build=build_demodulation,
    ),
    Case(
        id="log_spectrum",
        title="The log magnitude of silence",
        source="https://github.com/pytorch/audio/pull/1013",
        truth=Truth(step=4, phase="forward", kind=("inf",), module=("spectrum",), op=("log",)),
        build=build_spectrum,
    ),
    Case(
        id="bfloat16_exp",
        title="An exponential in a bfloat16 model",
        source="https://github.com/vanderschaarlab/synthcity/issues/331",
        truth=Truth(step=5, phase="forward", kind=("inf",), module=("",), op=("exp",)),
        build=build_bfloat16,
    ),
]
