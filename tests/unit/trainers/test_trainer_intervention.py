import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trainers.importance import effective_share, head_influence, ranked
from trainers.intervention import Intervention, Samples, functional_copy
from trainers.irm import irm_penalty
from trainers.networks import NetworkConfig, build_network

SHAPE, NUM_CLASSES = (1, 8, 8), 4


def make_network() -> nn.Module:
    torch.manual_seed(0)
    network = build_network(NetworkConfig(name="resnet8"), SHAPE, NUM_CLASSES).double()
    network(torch.randn(16, *SHAPE, dtype=torch.float64))  # statistics of its own for BatchNorm
    return network


def draw(count: int, seed: int) -> Samples:
    draws = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, *SHAPE, dtype=torch.float64, generator=draws)
    return Samples(inputs, torch.randint(NUM_CLASSES, (count,), generator=draws))


def gradient(network: nn.Module, samples: Samples, prefix: str = "") -> Tensor:
    twin = copy.deepcopy(network).eval()
    entries = [entry for name, entry in twin.named_parameters() if name.startswith(prefix)]
    found = torch.autograd.grad(cross_entropy(twin(samples.inputs), samples.labels), entries)
    return torch.cat([entry.flatten() for entry in found])


def effects(network: nn.Module, lr: float, **options: object) -> Tensor:
    twin = copy.deepcopy(network).eval()
    return Intervention(twin, network, step=draw(8, 1), probes=draw(6, 2), lr=lr, **options).effects(draw(5, 3))


def test_the_effect_of_an_intervention_becomes_the_influence_as_the_step_goes_to_zero() -> None:
    network = make_network()
    probes, candidates = draw(6, 2), draw(5, 3)
    singles = [Samples(candidates.inputs[row : row + 1], candidates.labels[row : row + 1]) for row in range(5)]
    influence = -torch.stack([gradient(network, probes) @ gradient(network, single) for single in singles])

    errors = [float((effects(network, lr) / lr - influence).abs().max()) for lr in (1e-3, 1e-4, 1e-5)]

    assert errors[2] < 1e-3 * float(influence.abs().max())
    assert errors[0] > 5 * errors[1] > 25 * errors[2]


def test_the_effect_on_the_classifier_alone_becomes_the_closed_form_of_mode_four() -> None:
    network = make_network().eval()
    samples = draw(7, 4)
    with torch.no_grad():
        features = network.features(samples.inputs)
        closed = head_influence(features, network.classifier(features), samples.labels)

    found = []
    for row in range(7):
        others = [other for other in range(7) if other != row]
        intervention = Intervention(
            copy.deepcopy(network),
            network,
            step=draw(8, 1),
            probes=Samples(samples.inputs[others], samples.labels[others]),
            lr=1e-6,
            trained="classifier.",
        )
        found.append(intervention.effect(Samples(samples.inputs[[row]], samples.labels[[row]])) / 1e-6)

    assert torch.allclose(torch.stack(found), closed, rtol=1e-3, atol=1e-5)


def test_mode_four_is_the_product_of_gradients_without_the_sample_itself() -> None:
    network = make_network().eval()
    samples = draw(6, 5)
    with torch.no_grad():
        features = network.features(samples.inputs)
        closed = head_influence(features, network.classifier(features), samples.labels)

    per_sample = torch.stack(
        [gradient(network, Samples(samples.inputs[[r]], samples.labels[[r]]), "classifier.") for r in range(6)]
    )
    products = per_sample @ per_sample.T
    naive = -(products.sum(1) - products.diag()) / 5

    assert torch.allclose(closed, naive)


def test_two_micro_steps_are_two_steps_of_plain_descent() -> None:
    network = make_network()
    step, probes, candidates = draw(8, 1), draw(6, 2), draw(1, 3)

    def loss_after(with_candidate: bool) -> Tensor:
        twin = copy.deepcopy(network).eval()
        for _ in range(2):
            loss = cross_entropy(twin(step.inputs), step.labels)
            if with_candidate:
                loss = loss + cross_entropy(twin(candidates.inputs), candidates.labels)
            found = torch.autograd.grad(loss, list(twin.parameters()))
            with torch.no_grad():
                for parameter, change in zip(twin.parameters(), found, strict=True):
                    parameter -= 0.01 * change
        return cross_entropy(twin(probes.inputs), probes.labels).detach()

    twin = copy.deepcopy(network).eval()
    intervention = Intervention(twin, network, step=step, probes=probes, lr=0.01, micro_steps=2)

    assert torch.allclose(intervention.effects(candidates), loss_after(True) - loss_after(False))


def test_an_intervention_leaves_the_live_network_as_it_was_even_when_it_fails() -> None:
    network = make_network().train()
    state, random_state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    twin = copy.deepcopy(network).eval()

    effects(network, 0.1)
    with pytest.raises(IndexError):
        Intervention(twin, network, step=draw(8, 1), probes=Samples(draw(2, 2).inputs, torch.tensor([0, 99])), lr=0.1)

    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
    assert all(module.training for module in network.modules())
    assert all(entry.grad is None for entry in network.parameters())
    assert torch.equal(random_state, torch.get_rng_state())


def test_a_functional_copy_shares_no_memory_with_the_network() -> None:
    network = make_network()

    parameters, buffers = functional_copy(network)

    assert set(parameters) | set(buffers) == set(network.state_dict())
    for name, value in network.state_dict().items():
        copied = (parameters | buffers)[name]
        assert torch.equal(copied, value)
        assert copied.data_ptr() != value.data_ptr()


def test_ranks_are_even_whatever_the_scale() -> None:
    assert ranked(torch.tensor([3.0, -1e30, 1e30])).tolist() == [0.5, 0.0, 1.0]
    assert ranked(torch.tensor([4.0])).tolist() == [0.0]


def test_the_effective_share_is_one_for_even_draws_and_one_slot_for_a_certain_one() -> None:
    assert effective_share(torch.full((8,), 0.125)) == pytest.approx(1)
    assert effective_share(torch.tensor([1.0, 0, 0, 0])) == pytest.approx(0.25)


def test_the_irm_penalty_is_the_squared_derivative_for_a_dummy_scale_on_the_logits() -> None:
    torch.manual_seed(0)
    environments = [(torch.randn(n, 3, requires_grad=True), torch.randint(3, (n,))) for n in (5, 2)]

    penalty = irm_penalty(environments)

    expected = torch.zeros(())
    for logits, labels in environments:
        scale = torch.ones((), requires_grad=True)
        (slope,) = torch.autograd.grad(cross_entropy(scale * logits, labels), scale, create_graph=True)
        expected = expected + slope.square()
    assert torch.allclose(penalty, expected)
    logits = environments[0][0]
    assert torch.allclose(
        torch.autograd.grad(penalty, logits, retain_graph=True)[0], torch.autograd.grad(expected, logits)[0], atol=1e-6
    )
