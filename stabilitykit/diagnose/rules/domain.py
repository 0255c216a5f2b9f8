"""Operations at the edge of their domain: a zero, a one, an empty row."""

from __future__ import annotations

import math

from stabilitykit.diagnose.graph import Operation
from stabilitykit.diagnose.rules.base import Evidence, Rule


def _zeros(evidence: Evidence, *names: str) -> int:
    return sum(evidence.inputs[name].zeros for name in names if name in evidence.inputs)


class MaskedTooLate(Rule):
    """The loss never saw the value, but backward did.  A result that does not count gets the gradient 0 (torch.where,
    masked_fill or a clamp discards it: a mask that came too late; a minimum does not pick it, a factor is 0, what
    follows is flat), and 0 times the infinite derivative (or value) of what was discarded is NaN.
    """

    name = "where_trap"
    remedies = (
        "choose before the function: safe = torch.where(mask, x, 1.0); y = torch.where(mask, f(safe), 0.0)",
        "keep the argument inside the domain before the function is applied: f(x.clamp_min(1e-12))",
    )

    def applies(self, evidence: Evidence) -> bool:
        if not evidence.loss_was_finite or not evidence.finding.symptom.role.startswith("gradient"):
            return False
        if evidence.phase == "forward":  # an Inf that never reached the loss
            turned = next((link for link in evidence.finding.path if link.output.nan), None)
            return turned is not None and _met_zero(turned) and evidence.op != "to_copy"
        if evidence.phase != "backward" or not _same_node(evidence):
            return False
        spread = evidence.finding.path[:3]  # the derivative is Inf, and its product with the gradient 0 is NaN
        return any(link.output.nan and not _any_nan(link) and _met_zero(link) for link in spread)


def _any_nan(operation: Operation) -> bool:
    return any(edge.nan for edge in operation.edges)


def _met_zero(operation: Operation) -> bool:
    """Whether an operation divided 0 by 0, or took an Inf together with a 0."""
    if not operation.edges:
        return operation.kernel == "div" and all(entry.zeros for entry in operation.inputs if not entry.value)
    infinite = {edge.argument for edge in operation.edges}
    return any(entry.zeros for entry in operation.inputs if entry.name not in infinite)


def _same_node(evidence: Evidence) -> bool:
    """Whether the NaN arose within the derivative of the origin's own function, and not further down."""
    path = evidence.finding.path
    turned = next((link for link in path[:3] if link.output.nan), None)
    if turned is None or (turned is path[0] and turned.op == turned.kernel):  # a backward of the user's own
        return False
    return turned.node == path[0].node and turned.site == path[0].site and not turned.own_backward


class LogOfZero(Rule):
    """The logarithm of zero is -Inf, of a negative number NaN: a probability underflowed, or a ratio lost its sign."""

    name = "log_domain"
    remedies = (
        "take the logarithm where the probabilities are made: torch.log_softmax(logits, -1), F.logsigmoid(x)",
        "bound the argument: torch.log(p.clamp_min(1e-12)) (torch.finfo(p.dtype).tiny for the dtype's own limit)",
        "for p * log(p): p * p.clamp_min(1e-12).log(); torch.special.entr and xlogy have no finite derivative at 0",
    )

    def applies(self, evidence: Evidence) -> bool:
        return evidence.computed and evidence.op in ("log", "log2", "log10", "log1p", "xlogy")

    def facts(self, evidence: Evidence) -> str:
        given = evidence.inputs.get("other" if evidence.op == "xlogy" else "self")
        if given is None or given.dtype.startswith("complex"):
            return ""
        span = f"The argument ranges from {given.min:.4g} to {given.max:.4g}"
        return (
            f"{span}, and log1p is -Inf at -1."
            if evidence.op == "log1p"
            else f"{span}, {given.zeros:,} of it exactly 0."
        )


class DivisionByZero(Rule):
    """A denominator was exactly zero: x / 0 is Inf, and 0 / 0 is NaN."""

    name = "division_by_zero"
    remedies = (
        "bound the denominator away from zero: a / b.clamp_min(1e-8), or a / (b + eps) where b cannot be negative",
        "for normalising by a norm: torch.nn.functional.normalize(x, dim, eps=1e-8)",
        "where the empty case is legitimate: torch.where(b > 0, a / torch.where(b > 0, b, 1), 0), both guarded",
    )

    def applies(self, evidence: Evidence) -> bool:
        if evidence.operation is None:
            return False
        divides = evidence.op in ("div", "true_divide", "remainder", "fmod")
        by_zero = divides and (_zeros(evidence, "other") > 0 or evidence.numbers.get("other") == 0)
        of_zero = evidence.op in ("reciprocal", "rsqrt") and _zeros(evidence, "self") > 0
        zero_by_zero = divides and evidence.kind == "nan" and evidence.computed  # of finite numbers there is no other
        derivative = evidence.op == "div" and evidence.phase == "backward" and evidence.kind == "nan"
        direction = evidence.op == "weight_norm_interface" and evidence.kind == "nan"  # of a row of zeros
        return by_zero or of_zero or zero_by_zero or derivative or direction

    def facts(self, evidence: Evidence) -> str:
        count = _zeros(evidence, "other" if "other" in evidence.inputs else "self")
        return f"{count:,} of the denominators {'was' if count == 1 else 'were'} 0." if count else ""


class GradientNormalisedByZero(Rule):
    """Code between backward and the update divided by zero: by a norm of the gradients, a product of two of them, the
    number of samples.
    """

    name = "clip_by_zero_norm"
    remedies = (
        "torch.nn.utils.clip_grad_norm_(parameters, max_norm, error_if_nonfinite=True) guards both cases",
        "by hand: gradient.div_(norm.clamp_min(1e-6)), or skip parameters whose gradient is all zero",
    )

    def applies(self, evidence: Evidence) -> bool:
        return evidence.phase == "clip" and evidence.op in ("div", "true_divide", "reciprocal", "rsqrt")


class DerivativeAtEdge(Rule):
    """The function is finite here but its derivative is not: sqrt, norm and fractional powers at 0, acos and asin at
    +-1, acosh at 1, the angle of a complex number close to 0.  Zero times that Inf is NaN, so masking the result
    afterwards, with torch.where say, does not help.
    """

    name = "derivative_at_edge"

    _EDGE = (
        "hypot", "sqrt", "rsqrt", "pow", "acos", "asin", "acosh", "atanh", "linalg_vector_norm", "norm", "cdist", "std",
        "var", "xlogy", "log", "cdist_forward", "linalg_matrix_norm", "angle", "atan2", "special_entr",
    )  # fmt: skip

    def applies(self, evidence: Evidence) -> bool:
        edge = evidence.phase == "backward" and not evidence.computed
        return edge and evidence.op in self._EDGE and not evidence.narrow

    def advise(self, evidence: Evidence) -> tuple[str, ...]:
        inside = {
            "sqrt": "torch.sqrt(x + 1e-12)",
            "pow": "x.clamp_min(1e-12).pow(exponent)",
            "acos": "torch.acos(x.clamp(-1 + 1e-7, 1 - 1e-7))",
            "asin": "torch.asin(x.clamp(-1 + 1e-7, 1 - 1e-7))",
            "atanh": "torch.atanh(x.clamp(-1 + 1e-7, 1 - 1e-7))",
            "std": "torch.sqrt(x.var(dim, correction=0) + 1e-8)",
            "log": "x.clamp_min(1e-12).log()",
            "acosh": "torch.acosh(x.clamp_min(1 + 1e-7))",
            "linalg_vector_norm": "torch.sqrt(x.pow(2).sum(dim) + 1e-12)",
            "cdist_forward": "torch.sqrt((a.unsqueeze(1) - b).pow(2).sum(-1) + 1e-12)",
        }.get(evidence.op)
        return (
            "keep the argument strictly inside the domain" + (f": {inside}" if inside else ""),
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
    """A mean over nothing is 0 / 0: every target was ignore_index, or of a class whose weight is 0, or a mask selected
    no element.
    """

    name = "empty_reduction"
    remedies = (
        "skip the term when nothing is selected: loss = terms.sum() / mask.sum().clamp_min(1)",
        "for cross_entropy with ignore_index: reduction='sum', divided by (labels != ignore_index).sum().clamp_min(1)",
    )

    def applies(self, evidence: Evidence) -> bool:
        empty = any(entry.numel == 0 for entry in evidence.inputs.values())
        ignoring = evidence.op in ("nll_loss_forward", "nll_loss2d_forward", "cross_entropy_loss")
        return evidence.computed and evidence.kind == "nan" and (empty or ignoring)


class SingleSampleVariance(Rule):
    """The unbiased variance of a single value divides by n - 1 = 0: the last batch of an epoch held one sample."""

    name = "single_sample_variance"
    remedies = (
        "use the biased estimate: x.std(dim, correction=0)",
        "avoid the small batch: DataLoader(..., drop_last=True)",
    )

    def applies(self, evidence: Evidence) -> bool:
        return evidence.computed and evidence.op in ("std", "var", "std_mean", "var_mean")


class OutsideDomain(Rule):
    """The argument lies outside the function's domain: rounding pushed a cosine past 1, or a radicand below 0."""

    name = "outside_domain"
    remedies = (
        "clamp to the domain: torch.acos(x.clamp(-1, 1)), torch.sqrt(x.clamp_min(0))",
        "keep it strictly inside where a gradient flows: clamp(-1 + 1e-7, 1 - 1e-7)",
    )

    def applies(self, evidence: Evidence) -> bool:
        names = ("acos", "asin", "atanh", "acosh", "sqrt", "rsqrt", "pow", "erfinv", "logit")
        return evidence.computed and evidence.op in names and evidence.kind == "nan"

    def advise(self, evidence: Evidence) -> tuple[str, ...]:
        state = "look at the optimizer's state: a second moment may be below 0, by rounding (centered=True) or loaded"
        return (*self.remedies, state) if evidence.phase == "optimizer" else self.remedies


class Pole(Rule):
    """The function has a pole here: a negative power of 0, the atanh of 1, the lgamma of 0 are infinite."""

    name = "pole"
    remedies = ("keep the argument away from the pole: x.clamp_min(1e-6), or x.clamp(-1 + 1e-6, 1 - 1e-6) for atanh",)

    def applies(self, evidence: Evidence) -> bool:
        at_zero = evidence.op in ("pow", "lgamma", "digamma", "polygamma") and _zeros(evidence, "self") > 0
        at_one = evidence.op in ("atanh", "erfinv", "logit")
        return evidence.computed and evidence.kind == "inf" and (at_zero or at_one)


class InfinityArithmetic(Rule):
    """Inf - Inf, 0 * Inf and Inf / Inf are NaN: an Inf that was meant, a mask's, met another Inf or a zero."""

    name = "inf_arithmetic"
    remedies = (
        "mask with a large finite number: scores.masked_fill(mask, torch.finfo(scores.dtype).min)",
        "apply the mask last, with masked_fill or torch.where, and do no arithmetic with it",
    )

    def applies(self, evidence: Evidence) -> bool:
        infinite = any(entry.posinf or entry.neginf for entry in evidence.inputs.values())
        infinite = infinite or any(math.isinf(number) for number in evidence.numbers.values())
        return evidence.operation is not None and evidence.kind == "nan" and infinite


class PlacedInfinity(Rule):
    """An Inf that was placed on purpose (a mask's fill, a start value, a constant in a module buffer) got through: a
    maximum or minimum had nothing else to choose from, or arithmetic turned its sign.
    """

    name = "placed_infinity"
    remedies = (
        "leave out what holds nothing else before it is used: torch.where(x.isfinite(), x, 0.0)",
        "place a large finite number: torch.finfo(x.dtype).min for -Inf, torch.finfo(x.dtype).max for Inf",
    )

    def applies(self, evidence: Evidence) -> bool:
        return evidence.kind == "inf" and evidence.operation is not None and bool(evidence.operation.edges)


class SingularMatrix(Rule):
    """A matrix was singular, or close to it: a pivot or a diagonal entry of a triangular factor was 0, and to solve or
    to invert divides by it.
    """

    name = "singular_matrix"
    remedies = (
        "add a jitter to the diagonal: a + 1e-6 * torch.eye(n)",
        "look at the info that an _ex function returns; torch.linalg.inv, solve and cholesky raise instead",
    )

    _SOLVING = (
        "linalg_inv", "linalg_solve", "triangular_solve", "cholesky", "linalg_cholesky", "linalg_qr", "linalg_lu",
        "linalg_slogdet", "linalg_det", "lu_", "logdet",
    )  # fmt: skip

    def applies(self, evidence: Evidence) -> bool:
        return evidence.phase in ("forward", "backward") and evidence.op.startswith(self._SOLVING)


class ImpossibleTarget(Rule):
    """The CTC loss of a target that is longer than its input, repeats included, is infinite: no alignment exists."""

    name = "impossible_target"
    remedies = (
        "leave such samples out of the loss: torch.nn.functional.ctc_loss(..., zero_infinity=True)",
        "drop them where the batch is made: target_length <= input_length",
    )

    def applies(self, evidence: Evidence) -> bool:
        return evidence.op == "ctc_loss"


class NormalisedConstant(Rule):
    """A normalisation layer divided by the deviation of values that are all the same, and its eps is zero or lost in
    the dtype.
    """

    name = "normalised_constant"
    remedies = ("give the layer an epsilon: eps=1e-5 (1e-3 in float16)",)

    def applies(self, evidence: Evidence) -> bool:
        names = ("native_layer_norm", "native_batch_norm", "native_group_norm", "cudnn_batch_norm", "rms_norm")
        constant = evidence.kind == "nan" and evidence.largest < 1e9  # beyond, its square may not fit
        return evidence.op in names and constant and evidence.phase in ("forward", "backward")


class EqualEigenvalues(Rule):
    """The derivative of eigenvectors or singular vectors divides by differences of their values: two were equal."""

    name = "equal_eigenvalues"
    remedies = (
        "use the values alone where they are enough: torch.linalg.eigvalsh, torch.linalg.svdvals",
        "tell them apart: add a small, distinct jitter to the diagonal before the decomposition",
    )

    def applies(self, evidence: Evidence) -> bool:
        return evidence.phase == "backward" and evidence.op.startswith(("linalg_eigh", "linalg_eig", "linalg_svd"))


RULES = (
    FullyMaskedSoftmax(),
    InfinityArithmetic(),
    PlacedInfinity(),
    SingularMatrix(),
    ImpossibleTarget(),
    NormalisedConstant(),
    EqualEigenvalues(),
    MaskedTooLate(),
    EmptyReduction(),
    SingleSampleVariance(),
    GradientNormalisedByZero(),
    DerivativeAtEdge(),
    LogOfZero(),
    DivisionByZero(),
    OutsideDomain(),
    Pole(),
)
