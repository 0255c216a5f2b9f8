import pytest
import torch

from stabilitykit.errors import UsageError
from trainers.networks import NetworkConfig, build_network


@pytest.mark.parametrize(
    ("name", "shape", "num_classes", "thousands"),
    [
        ("resnet8", (3, 32, 32), 100, 84),
        ("mnistmlp", (1, 28, 28), 10, 90),
        ("reduced-resnet18", (3, 32, 32), 100, 1110),
        ("resnet18", (3, 32, 32), 100, 11220),
    ],
)
def test_a_network_has_the_size_it_is_known_for(
    name: str, shape: tuple[int, int, int], num_classes: int, thousands: int
) -> None:
    network = build_network(NetworkConfig(name=name), shape, num_classes)

    assert sum(entry.numel() for entry in network.parameters()) == pytest.approx(thousands * 1000, rel=0.02)


@pytest.mark.parametrize("name", ["resnet8", "mnistmlp"])
@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_every_variant_gives_a_logit_a_class(name: str, pool: int, norm: str) -> None:
    network = build_network(NetworkConfig(name=name, pool=pool, norm=norm), (1, 28, 28), 10)

    assert network(torch.rand(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("options", [{"name": "vgg"}, {"norm": "layer"}, {"pool": 3}])
def test_unknown_options_name_their_flag(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"^--\w+: got .*, expected "):
        NetworkConfig(**options)
