"""Masks of -inf, as every attention has them: harmless until a row of scores holds nothing else."""

import torch
from nanzoo import Case, Loop, Truth
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

NEG_INF = float("-inf")
SOFTMAX = ("softmax", "_softmax")


def classify(model, batches):
    """The usual loop: the batch without its last entry goes into the model, the last one holds the targets."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def train_step(batch):
        *inputs, targets = batch
        optimizer.zero_grad()
        loss = cross_entropy(model(*inputs), targets)
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step)


def token_batches(count, bad=None):
    batches = []
    for index in range(count):
        lengths = torch.randint(1, 7, (4,))
        if index == bad:
            lengths[2] = 0  # an empty sentence
        padding = torch.arange(6) >= lengths.unsqueeze(1)
        batches.append((torch.randn(4, 6, 8), padding, torch.randint(3, (4,))))
    return batches


class BuiltIn(nn.Module):
    def __init__(self, need_weights):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head, self.need_weights = nn.Linear(8, 3), need_weights

    def forward(self, x, padding):
        mixed, _ = self.attention(x, x, x, key_padding_mask=padding, need_weights=self.need_weights)  # <origin> mha
        return self.head(mixed.mean(dim=1))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x, padding):
        return self.head(self.layer(x, src_key_padding_mask=padding).mean(dim=1))


class Scores(nn.Module):
    """Attention by hand; `mask` is added to the scores."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, mask):
        scores = self.query(x) @ self.key(x).transpose(-2, -1) / 8**0.5
        scores = scores + mask
        weights = nn.functional.softmax(scores, dim=-1)  # <origin> mask_in_batch mask_in_buffer
        return weights @ self.value(x)


class FromBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = Scores(), nn.Linear(8, 3)

    def forward(self, x, mask):
        return self.head(self.attention(x, mask).mean(dim=1))


class CausalBuffer(nn.Module):
    """The causal mask is a buffer; a window of 0 leaves a row without any key."""

    def __init__(self):
        super().__init__()
        causal = torch.full((6, 6), NEG_INF).triu(1)
        self.register_buffer("causal", causal, persistent=False)
        self.attention, self.head = Scores(), nn.Linear(8, 3)

    def forward(self, x, padding):
        mask = self.causal + torch.zeros(padding.shape).masked_fill(padding, NEG_INF).unsqueeze(1)
        return self.head(self.attention(x, mask).mean(dim=1))


class TwoMasks(nn.Module):
    """Two masks of the most negative number, as many libraries write them: where both hold, their sum is -inf."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = Scores(), nn.Linear(8, 3)

    def forward(self, x, padding, irrelevant):
        lowest = torch.finfo(x.dtype).min
        by_padding = torch.zeros(padding.shape).masked_fill(padding, lowest)
        by_relevance = torch.zeros(padding.shape).masked_fill(irrelevant, lowest)
        mask = by_padding + by_relevance  # <origin> two_finfo_masks
        return self.head(self.attention(x, mask.unsqueeze(1)).mean(dim=1))


def build_mha(need_weights=True, bad=5):
    return classify(BuiltIn(need_weights), token_batches(9, bad))


def build_encoder():
    return classify(Encoder(), token_batches(9, 5))


def build_mask_in_batch():
    batches = []
    for x, padding, targets in token_batches(9, 6):
        mask = torch.zeros(4, 1, 6).masked_fill(padding.unsqueeze(1), NEG_INF)
        batches.append((x, mask, targets))
    return classify(FromBatch(), batches)


def build_mask_in_buffer():
    batches = token_batches(9)
    for index, (_, padding, _) in enumerate(batches):
        padding[:, 0] = index == 6  # left padding: the first query sees itself alone, and itself is padding
        padding[:, 1:] &= index != 6
    return classify(CausalBuffer(), batches)


def build_two_masks():
    batches = []
    for index, (x, padding, targets) in enumerate(token_batches(9)):
        padding[:, 0], padding[:, -1] = False, True
        irrelevant = torch.zeros_like(padding)
        irrelevant[:, -1] = True  # masked twice: -inf beside finite scores, which does no harm
        if index == 6:
            padding[1] = irrelevant[1] = True
        batches.append((x, padding, irrelevant, targets))
    return classify(TwoMasks(), batches)


class Causal(nn.Module):
    """Every usual way to write a causal mask, none of them a fault."""

    def __init__(self):
        super().__init__()
        self.register_buffer("float_mask", nn.Transformer.generate_square_subsequent_mask(6))
        self.register_buffer("hidden", torch.full((6, 6), NEG_INF).triu(1), persistent=False)
        self.attention, self.block, self.head = Scores(), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        above = torch.ones(6, 6, dtype=torch.bool).triu(1)
        first = self.attention(x, torch.zeros(6, 6).masked_fill(above, NEG_INF))
        second = self.attention(first, self.float_mask)
        third = self.block(second, second, second, attn_mask=self.hidden)[0]
        fourth = self.attention(third, torch.where(above, torch.tensor(NEG_INF), torch.tensor(0.0)))
        fifth = scaled_dot_product_attention(fourth, fourth, fourth, is_causal=True)
        sixth = scaled_dot_product_attention(fifth, fifth, fifth, attn_mask=self.float_mask)
        inplace = sixth @ sixth.transpose(-2, -1)
        inplace[:, above] = NEG_INF
        return self.head((inplace.softmax(-1) @ sixth).mean(dim=1))


def build_causal():
    return classify(Causal(), [(torch.randn(4, 6, 8), torch.randint(3, (4,))) for _ in range(10)])


MHA = "https://github.com/pytorch/pytorch/issues/41508"
CASES = [
    Case(
        id="mha",
        title="nn.MultiheadAttention with a sample that is all padding",
        source=MHA,
        truth=Truth(step=5, phase="forward", kind=("nan",), module=("attention",), op=SOFTMAX),
        build=build_mha,
    ),
    Case(
        id="healthy_mha_fused",
        title="The same without weights: the fused kernel gives a fully masked row zeros",
        source="https://github.com/pytorch/pytorch/issues/160064",
        truth=Truth(healthy=True),
        build=lambda: build_mha(need_weights=False),
    ),
    Case(
        id="healthy_encoder_padding",
        title="nn.TransformerEncoderLayer with a sample that is all padding: safe in today's torch",
        source="https://github.com/pytorch/pytorch/issues/24816",
        truth=Truth(healthy=True),
        build=build_encoder,
    ),
    Case(
        id="mask_in_batch",
        title="An additive mask comes with every batch; in one it leaves a row without keys",
        source="https://github.com/pytorch/pytorch/issues/103749",
        truth=Truth(step=6, phase="forward", kind=("nan",), module=("attention",), op=SOFTMAX),
        build=build_mask_in_batch,
    ),
    Case(
        id="mask_in_buffer",
        title="A causal mask in a module buffer meets left padding",
        source="https://github.com/pytorch/pytorch/issues/26098",
        truth=Truth(step=6, phase="forward", kind=("nan",), module=("attention",), op=SOFTMAX),
        build=build_mask_in_buffer,
    ),
    Case(
        id="two_finfo_masks",
        title="Two masks of finfo.min are added: their sum is -inf, for once in a whole row",
        source="https://github.com/NVIDIA-NeMo/Automodel/pull/2658",
        truth=Truth(step=6, phase="forward", kind=("inf",), module=("",), op=("add",)),
        build=build_two_masks,
    ),
    Case(
        id="healthy_causal_masks",
        title="Causal masks in every form",
        source="https://github.com/pytorch/pytorch/issues/103749",
        truth=Truth(healthy=True),
        build=build_causal,
    ),
]
