"""Networks by name: small residual networks with BatchNorm, and Mammoth's two-layer MLP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu

from stabilitykit.errors import UsageError

Norm = Literal["batch", "group"]
Shape = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Which network.

    Attributes:
        name: one of NETWORKS.
        norm: `batch`, or `group` which knows no batch statistics and so none of their failures.
        pool: average-pool the input by this factor first: 2 makes 14x14 of 28x28 at a quarter of the cost.
    """

    name: str = "resnet8"
    norm: Norm = "batch"
    pool: int = 1

    def __post_init__(self) -> None:
        if self.name not in NETWORKS:
            raise UsageError(f"--backbone: got {self.name!r}, expected one of {', '.join(NETWORKS)}")
        if self.norm not in get_args(Norm):
            raise UsageError(f"--norm: got {self.norm!r}, expected batch or group")
        if self.pool not in (1, 2, 4):
            raise UsageError(f"--pool: got {self.pool}, expected 1, 2 or 4")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = norm(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H/stride, W/stride)."""
        out = relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return relu(out + self.shortcut(x))


class Network(nn.Module):
    """A vector of features and a linear classifier on it: what causal scores ask of a network."""

    classifier: nn.Linear

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the vector the classifier sees."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Logits of all classes, seen or not."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


class ResNet(Network):
    """A residual network for small images: 3x3 stem without max-pooling, one stage a width, linear classifier."""

    def __init__(
        self, in_channels: int, num_classes: int, *, width: int, blocks: tuple[int, ...], norm: Norm, pool: int
    ) -> None:
        super().__init__()
        layer = nn.BatchNorm2d if norm == "batch" else _group_norm
        self.pool = pool
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = layer(width)
        stages, channels = [], width
        for stage, count in enumerate(blocks):
            outputs = width * 2**stage
            strides = [1 if stage == 0 else 2] + [1] * (count - 1)
            stages.append(
                nn.Sequential(
                    *(
                        BasicBlock(channels if block == 0 else outputs, outputs, stride, layer)
                        for block, stride in enumerate(strides)
                    )
                )
            )
            channels = outputs
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(channels, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the vector the classifier sees."""
        x = avg_pool2d(x, self.pool) if self.pool > 1 else x
        x = relu(self.bn1(self.conv1(x)))
        pooled: Tensor = self.stages(x).mean(dim=(2, 3))
        return pooled


class MnistMlp(Network):
    """Mammoth's MNISTMLP: 784-100-100-classes, Xavier weights, zero biases."""

    def __init__(self, num_inputs: int, num_classes: int, *, pool: int) -> None:
        super().__init__()
        self.pool = pool
        self.fc1 = nn.Linear(num_inputs // pool**2, 100)
        self.fc2 = nn.Linear(100, 100)
        self.classifier = nn.Linear(100, num_classes)
        for layer in (self.fc1, self.fc2, self.classifier):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the vector the classifier sees."""
        x = avg_pool2d(x, self.pool) if self.pool > 1 else x
        return relu(self.fc2(relu(self.fc1(x.flatten(1)))))


class ConvNet(Network):
    """Three 3x3 convolutions of stride 2, each with a norm: the smallest network that has BatchNorm."""

    def __init__(self, in_channels: int, num_classes: int, *, width: int, norm: Norm, pool: int) -> None:
        super().__init__()
        layer = nn.BatchNorm2d if norm == "batch" else _group_norm
        self.pool = pool
        self.conv1, self.bn1 = nn.Conv2d(in_channels, width, 3, 2, 1, bias=False), layer(width)
        self.conv2, self.bn2 = nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False), layer(2 * width)
        self.conv3, self.bn3 = nn.Conv2d(2 * width, 4 * width, 3, 2, 1, bias=False), layer(4 * width)
        self.classifier = nn.Linear(4 * width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the vector the classifier sees."""
        x = avg_pool2d(x, self.pool) if self.pool > 1 else x
        x = relu(self.bn1(self.conv1(x)))
        x = relu(self.bn2(self.conv2(x)))
        x = relu(self.bn3(self.conv3(x)))
        return x.mean(dim=(2, 3))


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(min(4, channels), channels)


def _residual(width: int, blocks: tuple[int, ...]) -> Callable[[NetworkConfig, Shape, int], Network]:
    def build(config: NetworkConfig, shape: Shape, num_classes: int) -> Network:
        return ResNet(shape[0], num_classes, width=width, blocks=blocks, norm=config.norm, pool=config.pool)

    return build


def _mlp(config: NetworkConfig, shape: Shape, num_classes: int) -> Network:
    return MnistMlp(shape[0] * shape[1] * shape[2], num_classes, pool=config.pool)


def _convnet(config: NetworkConfig, shape: Shape, num_classes: int) -> Network:
    return ConvNet(shape[0], num_classes, width=12, norm=config.norm, pool=config.pool)


NETWORKS: Mapping[str, Callable[[NetworkConfig, Shape, int], Network]] = {
    "resnet8": _residual(16, (1, 1, 1)),
    "reduced-resnet18": _residual(20, (2, 2, 2, 2)),
    "resnet18": _residual(64, (2, 2, 2, 2)),
    "convnet": _convnet,
    "mnistmlp": _mlp,
}


def build_network(config: NetworkConfig, shape: Shape, num_classes: int) -> Network:
    """The named network for images of `shape` (C, H, W)."""
    return NETWORKS[config.name](config, shape, num_classes)
