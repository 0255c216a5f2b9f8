"""Operations that are well-behaved until a row is marked as bad: each makes its NaN or Inf on the line marked `origin`.

A fault takes activations (rows, width) and a column of 0 and 1 that says which rows are to go bad, and gives
activations of the same shape.  What prepares the operands stands on lines of its own and stays finite.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Fault:
    """A faulty operation and what a diagnosis has to say of it."""

    name: str
    apply: Function
    phase: str
    kinds: str  # "nan", "inf", or "nan inf" where the gradient that arrives decides
    op: str
    line: int
    rowwise: bool  # exactly the marked rows go bad

    @property
    def code(self) -> str:
        """The text of the origin's line."""
        lines, first = inspect.getsourcelines(self.apply)
        return lines[self.line - first].strip()


FAULTS: dict[str, Fault] = {}


def fault(phase: str, kinds: str, op: str, *, rowwise: bool = True) -> Callable[[Function], Function]:
    def register(function: Function) -> Function:
        lines, first = inspect.getsourcelines(function)
        line = first + next(number for number, text in enumerate(lines) if "# origin" in text)
        FAULTS[function.__name__] = Fault(function.__name__, function, phase, kinds, op, line, rowwise)
        return function

    return register


def positive(x: Tensor) -> Tensor:
    """Between 1 and 3."""
    return x.tanh() + 2


# In forward.


@fault("forward", "inf", "div")
def divided_by_zero(x: Tensor, bad: Tensor) -> Tensor:
    safe, rest = positive(x), 1 - bad
    return safe / rest  # origin


@fault("forward", "inf", "div")
def divided_by_zero_in_place(x: Tensor, bad: Tensor) -> Tensor:
    safe, rest = positive(x), 1 - bad
    safe.div_(rest)  # origin
    return safe


@fault("forward", "nan", "div")
def zero_by_zero(x: Tensor, bad: Tensor) -> Tensor:
    rest = 1 - bad
    nothing = positive(x) * rest
    return nothing / rest  # origin


@fault("forward", "inf", "reciprocal")
def reciprocal_of_zero(x: Tensor, bad: Tensor) -> Tensor:
    nothing = positive(x) * (1 - bad)
    return nothing.reciprocal()  # origin


@fault("forward", "inf", "rsqrt")
def reciprocal_root_of_zero(x: Tensor, bad: Tensor) -> Tensor:
    nothing = positive(x) * (1 - bad)
    return nothing.rsqrt()  # origin


@fault("forward", "nan", "log")
def log_of_a_negative(x: Tensor, bad: Tensor) -> Tensor:
    signed = positive(x) - 5 * bad
    return signed.log()  # origin


@fault("forward", "inf", "log")
def log_of_zero(x: Tensor, bad: Tensor) -> Tensor:
    nothing = positive(x) * (1 - bad)
    return torch.log(nothing)  # origin


@fault("forward", "inf", "log1p")
def log1p_of_minus_one(x: Tensor, bad: Tensor) -> Tensor:
    shifted = positive(x) * (1 - bad) - bad
    return torch.log1p(shifted)  # origin


@fault("forward", "inf", "exp")
def exp_of_a_large_number(x: Tensor, bad: Tensor) -> Tensor:
    large = x.tanh() + 200 * bad
    return large.exp()  # origin


@fault("forward", "inf", "sinh")
def sinh_of_a_large_number(x: Tensor, bad: Tensor) -> Tensor:
    large = x.tanh() + 200 * bad
    return torch.sinh(large)  # origin


@fault("forward", "nan", "sub")
def infinity_minus_infinity(x: Tensor, bad: Tensor) -> Tensor:
    masked = x.masked_fill(bad > 0, -torch.inf)
    largest = masked.amax(1, keepdim=True)
    return masked - largest  # origin


@fault("forward", "nan", "softmax")
def softmax_of_nothing(x: Tensor, bad: Tensor) -> Tensor:
    masked = x.masked_fill(bad > 0, -torch.inf)
    return masked.softmax(-1)  # origin


@fault("forward", "nan", "log_softmax")
def log_softmax_of_nothing(x: Tensor, bad: Tensor) -> Tensor:
    masked = x.masked_fill(bad > 0, -torch.inf)
    return F.log_softmax(masked, -1)  # origin


@fault("forward", "nan", "sqrt")
def root_of_a_negative(x: Tensor, bad: Tensor) -> Tensor:
    signed = positive(x) - 5 * bad
    return signed.sqrt()  # origin


@fault("forward", "nan", "acos")
def acos_out_of_its_domain(x: Tensor, bad: Tensor) -> Tensor:
    cosine = 0.9 * x.tanh() + 3 * bad
    return torch.acos(cosine)  # origin


@fault("forward", "inf", "atanh")
def atanh_of_one(x: Tensor, bad: Tensor) -> Tensor:
    inside = 0.9 * x.tanh() * (1 - bad) + bad
    return torch.atanh(inside)  # origin


@fault("forward", "nan", "pow")
def root_by_power_of_a_negative(x: Tensor, bad: Tensor) -> Tensor:
    signed = positive(x) - 5 * bad
    return signed**0.3  # origin


@fault("forward", "inf", "pow")
def negative_power_of_zero(x: Tensor, bad: Tensor) -> Tensor:
    nothing = positive(x) * (1 - bad)
    return nothing.pow(-1.5)  # origin


@fault("forward", "nan", "mean", rowwise=False)
def mean_of_nothing(x: Tensor, bad: Tensor) -> Tensor:
    chosen = x[(bad.sum() == 0).expand(len(x))]
    return x + chosen.mean()  # origin


@fault("forward", "nan", "var", rowwise=False)
def variance_of_one(x: Tensor, bad: Tensor) -> Tensor:
    few = x[: 1 if bad.any() else 2]
    return x + few.var(0)  # origin


@fault("forward", "nan", "native_layer_norm")
def layer_norm_without_eps(x: Tensor, bad: Tensor) -> Tensor:
    flat = x * (1 - bad)
    flat = flat + torch.linspace(1, 2, x.shape[1]) * (1 - bad)
    return F.layer_norm(flat, flat.shape[1:], eps=0.0)  # origin


@fault("forward", "nan", "div")
def normalised_without_eps(x: Tensor, bad: Tensor) -> Tensor:
    direction = positive(x) * (1 - bad)
    return F.normalize(direction, eps=0.0)  # origin


@fault("forward", "inf", "mul")
def product_too_large(x: Tensor, bad: Tensor) -> Tensor:
    large = positive(x) * (1 + 1e25 * bad)
    return large * large  # origin


@fault("forward", "inf", "mm", rowwise=False)
def matrix_product_too_large(x: Tensor, bad: Tensor) -> Tensor:
    large = positive(x) * (1 + 1e25 * bad)
    return x + large.mm(large.t()).mean(1, keepdim=True)  # origin


@fault("forward", "inf", "to_copy")
def cast_to_half(x: Tensor, bad: Tensor) -> Tensor:
    large = positive(x) * (1 + 1e5 * bad)
    narrow = large.half()  # origin
    return narrow.float()


@fault("forward", "inf", "mm", rowwise=False)
def matrix_product_in_half(x: Tensor, bad: Tensor) -> Tensor:
    narrow = (positive(x) * (1 + 300 * bad)).half()
    scores = narrow @ narrow.t()  # origin
    return x + scores.float().mean(1, keepdim=True)


@fault("forward", "inf", "addcdiv")
def fused_division(x: Tensor, bad: Tensor) -> Tensor:
    safe, rest = positive(x), 1 - bad
    return torch.addcdiv(x, safe, rest)  # origin


@fault("forward", "inf", "log")
def in_an_own_forward(x: Tensor, bad: Tensor) -> Tensor:
    class Logarithm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, operand: Tensor) -> Tensor:
            ctx.save_for_backward(operand)
            return operand.log()  # origin

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            (operand,) = ctx.saved_tensors
            return gradient / operand.clamp_min(1e-3)

    return Logarithm.apply(positive(x) * (1 - bad))


# In backward only: forward is finite, or its Inf is masked away.


@fault("backward", "nan inf", "sqrt")
def derivative_of_root_at_zero(x: Tensor, bad: Tensor) -> Tensor:
    nothing = positive(x) * (1 - bad)
    return nothing.sqrt()  # origin


@fault("backward", "nan inf", "sqrt")
def derivative_of_norm_at_zero(x: Tensor, bad: Tensor) -> Tensor:
    squares = (positive(x) * (1 - bad)).square().sum(1, keepdim=True)
    length = squares.sqrt()  # origin
    return x + length


@fault("backward", "nan inf", "pow")
def derivative_of_power_at_zero(x: Tensor, bad: Tensor) -> Tensor:
    nothing = positive(x) * (1 - bad)
    return nothing ** (1 / 3)  # origin


@fault("backward", "nan inf", "acos")
def derivative_of_acos_at_one(x: Tensor, bad: Tensor) -> Tensor:
    cosine = 0.9 * x.tanh() * (1 - bad) + bad
    return torch.acos(cosine)  # origin


@fault("backward", "nan inf", "acosh")
def derivative_of_acosh_at_one(x: Tensor, bad: Tensor) -> Tensor:
    outside = positive(x) * (1 - bad) + 1
    return torch.acosh(outside)  # origin


@fault("backward", "nan", "hypot")
def derivative_of_hypotenuse_at_zero(x: Tensor, bad: Tensor) -> Tensor:
    height, width = positive(x) * (1 - bad), x.tanh() * (1 - bad)
    return torch.hypot(height, width)  # origin


@fault("backward", "nan", "log")
def masked_after_the_log(x: Tensor, bad: Tensor) -> Tensor:
    nothing = positive(x) * (1 - bad)
    logarithm = nothing.log()  # origin
    return torch.where(bad > 0, torch.zeros_like(x), logarithm)


@fault("backward", "nan", "div")
def masked_after_the_division(x: Tensor, bad: Tensor) -> Tensor:
    safe, rest = positive(x), 1 - bad
    ratio = safe / rest  # origin
    return ratio.masked_fill(bad > 0, 0.0)


@fault("forward", "inf", "exp")
def masked_after_the_exponential(x: Tensor, bad: Tensor) -> Tensor:
    large = x.tanh() + 200 * bad
    exponential = large.exp()  # origin
    return torch.where(bad > 0, torch.zeros_like(x), exponential)


@fault("backward", "inf", "mul")
def gradient_too_large(x: Tensor, bad: Tensor) -> Tensor:
    nothing = x.tanh() * (1 - bad)
    once = nothing * (1 + 1e37 * bad)  # origin
    return once * (1 + 1e12 * bad)  # the layers after it may have made the gradient 1e10 already


@fault("backward", "nan inf", "div")
def in_an_own_backward(x: Tensor, bad: Tensor) -> Tensor:
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, operand: Tensor, divisor: Tensor) -> Tensor:
            ctx.save_for_backward(divisor)
            return operand.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
            (divisor,) = ctx.saved_tensors
            return gradient / divisor, None  # origin

    return Straight.apply(x, 1 - bad)


@fault("backward", "nan inf", "div")
def in_a_tensor_hook(x: Tensor, bad: Tensor) -> Tensor:
    hooked = x * 1.0
    divisor = (1 - bad).to(x.dtype)

    def rescale(gradient: Tensor) -> Tensor:
        return gradient / divisor  # origin

    if hooked.requires_grad:
        hooked.register_hook(rescale)
    return hooked


@fault("backward", "nan inf", "linalg_eigh", rowwise=False)
def equal_eigenvalues(x: Tensor, bad: Tensor) -> Tensor:
    spread = torch.diag(torch.arange(1.0, 4.0) * (1 - bad.max())) + 0.0 * x[:3, :1].mul(x[:3, :1].t()).mean()
    vectors = torch.linalg.eigh(spread).eigenvectors  # origin
    return x + vectors.sum()
