"""Deep ConvNet: torchvision's ResNet without skip connections and downsampling branches (PAPER.md section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchvision.models.resnet import Bottleneck, ResNet


class PlainBottleneck(Bottleneck):  # type: ignore[misc] # torchvision has no types
    """Three convolutions, each with BatchNorm and ReLU, and no way round them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.downsample = None

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, 4 planes, H / stride, W / stride] from features [B, inplanes, H, W]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        out: Tensor = self.relu(self.bn3(self.conv3(x)))
        return out


def build(*, num_classes: int, blocks: Sequence[int] = (3, 4, 6, 3), width_per_group: int = 64) -> ResNet:
    """Deep ConvNet; by default the paper's: ResNet-50's convolutions, 22.8 M weights at 1,000 classes.

    Args:
        num_classes: Of the logits.
        blocks: Bottlenecks of each of the four stages.
        width_per_group: Channels of the narrow convolutions, as in torchvision: 64 is ResNet-50's.

    Raises:
        ValueError: not four stages of at least one block.
    """
    if len(blocks) != 4 or min(blocks) < 1:
        raise ValueError(
            f"blocks of plain_resnet is {list(blocks)}: it must be four numbers of at least 1; the paper takes "
            "[3, 4, 6, 3]"
        )
    return ResNet(PlainBottleneck, list(blocks), num_classes=num_classes, width_per_group=width_per_group)
