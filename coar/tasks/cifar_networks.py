"""Networks for images of 32 x 32 pixels: the CIFAR ResNets, a wide ResNet of nine layers, a small ViT.

| function | components | from |
|---|---|---|
| `resnet20`, `resnet32`, `resnet56` | 688, 1,136, 2,032 filters | He et al. 2015, section 4.2 |
| `resnet8` | 240 filters | the same with one block per stage |
| `PublishedCifarResNet` | 2,304 filters | the CIFAR-10 set-up of COAR (arXiv:2404.11534) |
| `small_vit` | Linear neurons, attention heads | torchvision's own `VisionTransformer` |

He et al. 2015 is arXiv:1512.03385.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from coar.errors import MissingDependencyError, SettingError, install_hint

NUM_CLASSES = 10
STAGE_WIDTHS = (16, 32, 64)
PUBLISHED_WIDTH, PUBLISHED_BLOCKS = 256, 4


class BasicBlock(nn.Module):
    """Two convolutions around which the input goes unchanged; no parameters where the shape changes.

    Where the block halves the image, the shortcut takes every second pixel; where it adds channels,
    the shortcut fills them with zeros (He et al., option A).
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs, height, width] -> [batch, outputs, height / stride, width / stride]."""
        hidden = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(hidden)) + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1 and self.added == 0:
            return x
        before = self.added // 2
        thinned = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(thinned, (0, 0, 0, 0, before, self.added - before))


class CifarResNet(nn.Module):
    """The CIFAR ResNet of 6 n + 2 layers: a 3 x 3 stem, three stages of n blocks with 16, 32, 64 filters.

    Args:
        blocks_per_stage: n; the network has 16 + 224 n filters in 6 n + 1 convolutions.
    """

    def __init__(self, blocks_per_stage: int) -> None:
        super().__init__()
        if blocks_per_stage < 1:
            raise SettingError("a stage needs blocks", expected="at least 1", got=blocks_per_stage)
        narrow, middle, wide = STAGE_WIDTHS
        self.conv = _conv3x3(3, narrow)
        self.bn = nn.BatchNorm2d(narrow)
        self.stage1 = _stage(narrow, narrow, blocks_per_stage, stride=1)
        self.stage2 = _stage(narrow, middle, blocks_per_stage, stride=2)
        self.stage3 = _stage(middle, wide, blocks_per_stage, stride=2)
        self.classifier = nn.Linear(wide, NUM_CLASSES)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3, 32, 32] -> logits [batch, 10]."""
        hidden = functional.relu(self.bn(self.conv(x)))
        hidden = self.stage3(self.stage2(self.stage1(hidden)))
        return self.classifier(hidden.mean(dim=(2, 3)))


def resnet8() -> CifarResNet:
    """ResNet-8: 240 filters, 0.08 million parameters."""
    return CifarResNet(1)


def resnet20() -> CifarResNet:
    """ResNet-20: 688 filters, 0.27 million parameters."""
    return CifarResNet(3)


def resnet32() -> CifarResNet:
    """ResNet-32: 1,136 filters, 0.46 million parameters."""
    return CifarResNet(5)


def resnet56() -> CifarResNet:
    """ResNet-56: 2,032 filters, 0.86 million parameters."""
    return CifarResNet(9)


class PublishedCifarResNet(nn.Module):
    """The network of COAR's CIFAR-10 set-up: nine convolutions of 256 filters, never strided.

    A stem and four blocks work at the full 32 x 32 pixels; average pooling by 8 leaves 4 x 4 of
    them for the classifier. About 4.7 billion multiplications per image.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = _conv3x3(3, PUBLISHED_WIDTH)
        self.bn1 = nn.BatchNorm2d(PUBLISHED_WIDTH)
        self.blocks = _stage(PUBLISHED_WIDTH, PUBLISHED_WIDTH, PUBLISHED_BLOCKS, stride=1)
        self.classifier = nn.Linear(PUBLISHED_WIDTH * 4 * 4, NUM_CLASSES)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3, 32, 32] -> logits [batch, 10]."""
        hidden = self.blocks(functional.relu(self.bn1(self.conv1(x))))
        return self.classifier(functional.avg_pool2d(hidden, 8).flatten(1))


def small_vit() -> nn.Module:
    """A vision transformer of six layers and four heads, 64 patches of 4 x 4 pixels (torchvision's class).

    Raises:
        MissingDependencyError: torchvision is not installed.
    """
    try:
        from torchvision.models import VisionTransformer
    except ImportError as error:
        raise MissingDependencyError(
            "the small ViT is torchvision's class",
            expected="torchvision installed",
            got=str(error),
            todo=install_hint("vision"),
        ) from error
    return VisionTransformer(
        image_size=32,
        patch_size=4,
        num_layers=6,
        num_heads=4,
        hidden_dim=128,
        mlp_dim=256,
        num_classes=NUM_CLASSES,
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet8": resnet8,
    "resnet20": resnet20,
    "resnet20_backdoor": resnet20,  # other training images: see coar.tasks.backdoor
    "resnet32": resnet32,
    "resnet56": resnet56,
    "vit": small_vit,
    "published": PublishedCifarResNet,
}


def build_network(name: str) -> nn.Module:
    """An untrained network by name, made without touching torch's global generator.

    >>> sum(parameter.numel() for parameter in build_network("resnet20").parameters())
    269722
    """
    if name not in NETWORKS:
        raise SettingError("unknown network", expected=f"one of: {', '.join(NETWORKS)}", got=repr(name))
    with torch.random.fork_rng(devices=[]):
        return NETWORKS[name]()


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
