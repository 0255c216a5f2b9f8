import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stabilitykit.errors import UsageError
from stabilitykit.guards import GradientClip, gradient_norm


def with_gradients(*gradients: torch.Tensor) -> list[torch.Tensor]:
    parameters = [nn.Parameter(torch.zeros_like(entry)) for entry in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return parameters


def test_s11_the_norm_of_huge_finite_gradients_is_finite_and_clipping_keeps_their_direction() -> None:
    parameters = with_gradients(torch.full((4,), 1e25), torch.full((5,), -1e25))
    clip = GradientClip(1.0)

    norm = clip(parameters)

    assert norm == pytest.approx(3e25)
    assert parameters[0].grad.tolist() == pytest.approx([1 / 3] * 4)
    assert parameters[1].grad.tolist() == pytest.approx([-1 / 3] * 5)
    assert clip.num_acted == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_s11_gradients_that_are_not_finite_are_left_as_they_are_and_announced(bad: float) -> None:
    events = []
    parameters = with_gradients(torch.tensor([1.0, bad]), torch.tensor([2.0]))

    norm = GradientClip(1.0, on_event=lambda kind, message, **data: events.append(data))(parameters)

    assert not math.isfinite(norm)
    assert parameters[0].grad[0] == 1.0
    assert parameters[1].grad.tolist() == [2.0]
    assert events[0]["severity"] == "warning"


def test_s12_what_comes_back_is_the_norm_before_clipping_and_the_clip_rate_is_known() -> None:
    clip = GradientClip(1.0)

    norms = [clip(with_gradients(torch.tensor([3.0, 4.0]))), clip(with_gradients(torch.tensor([0.3, 0.4])))]

    assert norms == pytest.approx([5.0, 0.5])
    assert clip.num_acted / clip.num_steps == 0.5


def test_small_gradients_pass_bit_for_bit_and_nothing_is_said() -> None:
    gradient = torch.randn(10) * 0.01
    parameters = with_gradients(gradient)

    GradientClip(1.0, on_event=pytest.fail)(parameters)

    assert torch.equal(parameters[0].grad, gradient)


def test_tiny_gradients_have_a_norm_that_float32_squares_would_lose() -> None:
    assert gradient_norm([torch.tensor([3e-30, 4e-30])]) == pytest.approx(5e-30)
    assert gradient_norm([torch.tensor([300.0, 400.0], dtype=torch.float16) * 100]) == pytest.approx(5e4, rel=1e-3)
    assert gradient_norm([]) == 0


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20), st.floats(0.1, 10))
def test_clipping_is_the_definition(values: list[float], max_norm: float) -> None:
    norm = math.sqrt(sum(value * value for value in values))
    parameters = with_gradients(torch.tensor(values))

    GradientClip(max_norm)(parameters)

    scale = min(1.0, max_norm / norm) if norm else 1.0
    assert parameters[0].grad.tolist() == pytest.approx([value * scale for value in values], rel=1e-5, abs=1e-30)


def test_zero_measures_and_never_clips() -> None:
    parameters = with_gradients(torch.tensor([3.0, 4.0]))

    assert GradientClip(0.0)(parameters) == 5.0
    assert parameters[0].grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("max_norm", [-1.0, math.inf, math.nan])
def test_an_impossible_norm_is_refused(max_norm: float) -> None:
    with pytest.raises(UsageError, match=r"GradientClip: got max_norm=.*, expected"):
        GradientClip(max_norm)
