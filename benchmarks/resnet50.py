"""ResNet-50 with torch.nn's layers, and with ours, activation and residual fused by hand."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm.torch


class Bottleneck(nn.Module):
    """He et al. (2015), but with the stride in the 3 × 3 convolution ("v1.5")."""

    norm: type[nn.Module] = nn.BatchNorm2d

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = 4 * width
        self.conv1 = nn.Conv2d(before, width, 1, bias=False)
        self.bn1 = self.norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = self.norm(width)
        self.conv3 = nn.Conv2d(width, after, 1, bias=False)
        self.bn3 = self.norm(after)
        self.downsample = nn.Sequential()
        if before != after:
            conv = nn.Conv2d(before, after, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, self.norm(after))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        y += self.downsample(x)
        return F.relu(y, inplace=True)


class FusedBottleneck(Bottleneck):
    norm = batchnorm.torch.BatchNorm2d

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x), activation="relu")
        y = self.bn2(self.conv2(y), activation="relu")
        return self.bn3(self.conv3(y), residual=self.downsample(x), activation="relu")


class ResNet50(nn.Module):
    """For images of 224 × 224 in 1000 classes."""

    block: type[Bottleneck] = Bottleneck

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = self.block.norm(64)
        layers, before = [], 64
        for width, number, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for i in range(number):
                layers.append(self.block(before, width, 1 if i else stride))
                before = 4 * width
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(before, 1000)

    def stem(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)), inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(F.max_pool2d(self.stem(x), 3, stride=2, padding=1))
        return self.head(y.mean((2, 3)))


class FusedResNet50(ResNet50):
    """With the same parameters by the same names."""

    block = FusedBottleneck

    def stem(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x), activation="relu")


TORCH_NN, CONVERTED, FUSED = "torch.nn", "convert", "fused by hand"
MODELS: dict[str, Callable[[], nn.Module]] = {
    TORCH_NN: ResNet50,
    CONVERTED: lambda: batchnorm.torch.convert(ResNet50()),
    FUSED: FusedResNet50,
}


def training_step(
    name: str, images: Tensor, labels: Tensor, *, compiled: bool = False
) -> Callable[[], Tensor]:
    """A step of stochastic gradient descent in bfloat16 autocast, whose loss it returns."""
    torch.manual_seed(0)
    model = MODELS[name]().to(images.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    run = torch.compile(model, dynamic=False) if compiled else model

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16):
            loss = F.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
