"""Operations at the edge of their domain: a zero, a one, an empty row."""

from __future__ import annotations

from stabilitykit.diagnose.rules.base import Evidence, Rule


def _zeros(evidence: Evidence, *names: str) -> int:
    return sum(evidence.inputs[name].zeros for name in names if name in evidence.inputs)


class LogOfZero(Rule):
    """The logarithm of zero is -Inf, of a negative number NaN: a probability underflowed, or a ratio lost its sign."""

    name = "log_domain"
    remedies = (
        "take the logarithm where the probabilities are made: torch.log_softmax(logits, -1), F.logsigmoid(x)",
        "bound the argument: torch.log(p.clamp_min(1e-12)) (torch.finfo(p.dtype).tiny for the dtype's own limit)",
        "for p * log(p): torch.special.xlogy(p, p), or torch.special.entr(p), which are 0 at 0",
    )

    def applies(self, evidence: Evidence) -> bool:
        return evidence.phase == "forward" and evidence.op in ("log", "log2", "log10", "log1p", "logit", "xlogy")


class DivisionByZero(Rule):
    """A denominator was exactly zero: x / 0 is Inf, and 0 / 0 is NaN."""

    name = "division_by_zero"
    remedies = (
        "bound the denominator away from zero: a / b.clamp_min(1e-8), or a / (b + eps) where b cannot be negative",
        "for normalising by a norm: torch.nn.functional.normalize(x, dim, eps=1e-8)",
        "where the empty case is legitimate: torch.where(b > 0, a / torch.where(b > 0, b, 1), 0), both guarded",
    )

    def applies(self, evidence: Evidence) -> bool:
        if evidence.phase not in ("forward", "backward"):
            return False
        by_zero = evidence.op in ("div", "true_divide", "remainder", "fmod") and _zeros(evidence, "other") > 0
        of_zero = evidence.op in ("reciprocal", "rsqrt") and _zeros(evidence, "self") > 0
        return by_zero or of_zero or (evidence.op == "div" and evidence.phase == "backward")

    def facts(self, evidence: Evidence) -> str:
        count = _zeros(evidence, "other") or _zeros(evidence, "self")
        return f"{count:,} of the denominators were 0." if count else ""


class GradientNormalisedByZero(Rule):
    """Clipping or normalising divided the gradients by their norm, and the norm was zero (0 / 0) or not finite."""

    name = "clip_by_zero_norm"
    remedies = (
        "torch.nn.utils.clip_grad_norm_(parameters, max_norm, error_if_nonfinite=True) guards both cases",
        "by hand: gradient.div_(norm.clamp_min(1e-6)), or skip parameters whose gradient is all zero",
    )

    def applies(self, evidence: Evidence) -> bool:
        return evidence.phase == "clip"


class DerivativeAtEdge(Rule):
    """The function is finite here but its derivative is not: sqrt, norm and fractional powers at 0, acos and asin at
    +-1, atanh at its ends.  Zero times that Inf is NaN, so masking the result afterwards, with torch.where say, does
    not help.
    """

    name = "derivative_at_edge"

    _EDGE = ("sqrt", "rsqrt", "pow", "acos", "asin", "acosh", "atanh", "linalg_vector_norm", "norm", "cdist", "std",
             "var",             "xlogy", "log", "div", "cdist_forward", "linalg_matrix_norm")  # fmt: skip

    def applies(self, evidence: Evidence) -> bool:
        return evidence.phase == "backward" and evidence.op in self._EDGE and not evidence.narrow

    def advise(self, evidence: Evidence) -> tuple[str, ...]:
        inside = {
            "sqrt": "torch.sqrt(x + 1e-12)",
            "pow": "x.clamp_min(1e-12).pow(exponent)",
            "acos": "torch.acos(x.clamp(-1 + 1e-7, 1 - 1e-7))",
            "asin": "torch.asin(x.clamp(-1 + 1e-7, 1 - 1e-7))",
            "atanh": "torch.atanh(x.clamp(-1 + 1e-7, 1 - 1e-7))",
            "std": "torch.sqrt(x.var(dim, correction=0) + 1e-8)",
            "div": "a / b.clamp_min(1e-8)",
        }.get(evidence.op, "torch.sqrt(x.pow(2).sum(dim) + 1e-12)")
        return (
            f"keep the argument inside the domain: {inside}",
            "guard the input, not the output: safe = torch.where(mask, x, 0.5); y = torch.where(mask, f(safe), 0)",
        )


class FullyMaskedSoftmax(Rule):
    """A softmax over a row in which every entry is -Inf is 0 / 0: a sequence in which every position is padding, or
    a mask applied the wrong way round.
    """

    name = "fully_masked_softmax"
    remedies = (
        "let such rows attend to something: mask[mask.all(-1)] = False, and zero their output afterwards",
        "mask with a large finite number: scores.masked_fill(mask, torch.finfo(scores.dtype).min)",
        "drop empty samples where the batch is collated",
    )

    def applies(self, evidence: Evidence) -> bool:
        operation = evidence.operation
        return operation is not None and "softmax" in operation.op and bool(operation.edges)


class EmptyReduction(Rule):
    """A mean over nothing is 0 / 0: every target was ignore_index, or a mask selected no element."""

    name = "empty_reduction"
    remedies = (
        "skip the term when nothing is selected: loss = terms.sum() / mask.sum().clamp_min(1)",
        "for cross_entropy with ignore_index: reduction='sum', divided by (labels != ignore_index).sum().clamp_min(1)",
    )

    def applies(self, evidence: Evidence) -> bool:
        empty = any(entry.numel == 0 for entry in evidence.inputs.values())
        ignoring = evidence.op in ("nll_loss_forward", "nll_loss2d_forward", "cross_entropy_loss")
        return evidence.phase == "forward" and evidence.kind == "nan" and (empty or ignoring)


class SingleSampleVariance(Rule):
    """The unbiased variance of a single value divides by n - 1 = 0: the last batch of an epoch held one sample."""

    name = "single_sample_variance"
    remedies = (
        "use the biased estimate: x.std(dim, correction=0)",
        "avoid the small batch: DataLoader(..., drop_last=True)",
    )

    def applies(self, evidence: Evidence) -> bool:
        return evidence.phase == "forward" and evidence.op in ("std", "var", "std_mean", "var_mean")


class OutsideDomain(Rule):
    """The argument lies outside the function's domain: rounding pushed a cosine past 1, or a radicand below 0."""

    name = "outside_domain"
    remedies = (
        "clamp to the domain: torch.acos(x.clamp(-1, 1)), torch.sqrt(x.clamp_min(0))",
        "keep it strictly inside where a gradient flows: clamp(-1 + 1e-7, 1 - 1e-7)",
    )

    def applies(self, evidence: Evidence) -> bool:
        names = ("acos", "asin", "atanh", "acosh", "sqrt", "rsqrt", "pow", "erfinv", "logit")
        return evidence.phase == "forward" and evidence.op in names and evidence.kind == "nan"


class Pole(Rule):
    """The function has a pole here: a negative power of 0, the atanh of 1, the lgamma of 0 are infinite."""

    name = "pole"
    remedies = ("keep the argument away from the pole: x.clamp_min(1e-6), or x.clamp(-1 + 1e-6, 1 - 1e-6) for atanh",)

    def applies(self, evidence: Evidence) -> bool:
        at_zero = evidence.op in ("pow", "lgamma", "digamma", "polygamma") and _zeros(evidence, "self") > 0
        at_one = evidence.op in ("atanh", "erfinv", "logit")
        return evidence.phase == "forward" and evidence.kind == "inf" and (at_zero or at_one)


RULES = (
    FullyMaskedSoftmax(),
    EmptyReduction(),
    SingleSampleVariance(),
    GradientNormalisedByZero(),
    DerivativeAtEdge(),
    LogOfZero(),
    DivisionByZero(),
    OutsideDomain(),
    Pole(),
)
