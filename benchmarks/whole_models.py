"""Time forward and backward of whole models: as they are, after `convert`, and after `fuse`.

Convolutions are the most of such a step. What normalization takes of it is what a step is shorter
by in a copy of the model that has none.
"""

import copy
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise

import measure
import numpy as np
import torch
from measure import FIRST, LAST, Work
from torch import Tensor, nn

import batchnorm
import batchnorm.torch


class BasicBlock(nn.Module):
    """Of ResNet-18 and 34, He et al. (2015)."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential()
        if before != channels:
            conv = nn.Conv2d(before, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.downsample(x)
        return self.relu(y)


class InvertedResidual(nn.Module):
    """Of MobileNetV2, Sandler et al. (2018)."""

    def __init__(self, before: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = expansion * before
        layers = [] if expansion == 1 else conv_norm(before, width, 1)
        layers += conv_norm(width, width, 3, stride, groups=width)
        layers += conv_norm(width, channels, 1)[:2]
        self.conv = nn.Sequential(*layers)
        self.has_residual = stride == 1 and before == channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.has_residual else self.conv(x)


def conv_norm(
    before: int, channels: int, size: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    conv = nn.Conv2d(before, channels, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(channels), nn.ReLU6(inplace=True)]


def resnet18() -> nn.Module:
    conv = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
    layers: list[nn.Module] = [
        conv,
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    ]
    before = 64
    for channels in (64, 128, 256, 512):
        for stride in (1 if channels == before else 2, 1):
            layers.append(BasicBlock(before, channels, stride))
            before = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def mobilenet_v2() -> nn.Module:
    layers, before = conv_norm(3, 32, 3, 2), 32
    for expansion, channels, times, stride in (
        *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
        *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    ):
        for number in range(times):
            block = InvertedResidual(before, channels, 1 if number else stride, expansion)
            layers.append(block)
            before = channels
    layers += conv_norm(before, 1280, 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))


MODELS = {"ResNet-18": resnet18, "MobileNetV2, with relu6": mobilenet_v2}


def without_normalization(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return model


def calls(model: nn.Module, shape: tuple[int, ...], layout: str) -> measure.Calls:
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    memory_format = torch.channels_last if layout == LAST else torch.contiguous_format
    x = torch.from_numpy(images).contiguous(memory_format=memory_format)

    def timed(change: Callable[[nn.Module], nn.Module]) -> Callable[[], object]:
        changed = change(copy.deepcopy(model)).to(memory_format=memory_format)
        parameters = list(changed.parameters())
        return lambda: torch.autograd.grad(changed(x).square().mean(), parameters)

    return {
        "fuse": timed(lambda model: batchnorm.torch.fuse(batchnorm.torch.convert(model))),
        "convert": timed(batchnorm.torch.convert),
        "torch.nn": timed(lambda model: model),
        "no normalization": timed(without_normalization),
        **measure.copies_of(images),
    }


def parts(found: list[measure.Result]) -> str:
    """What part of a step is normalization, by what it is shorter by without."""
    shares = defaultdict(list)
    for each, without in pairwise(found):
        if without.side == "no normalization":
            shares[each.call].append(1 - without.ratio / each.ratio)
    return ", ".join(
        f"{' or '.join(f'{share:.0%}' for share in of_layouts)} of a {call}"
        for call, of_layouts in shares.items()
    )


def main() -> None:
    arguments = measure.options(__doc__)
    torch.set_num_threads(measure.THREADS)
    found = []
    shape = (2, 3, 32, 32) if arguments.quick else (8, 3, 96, 96)
    for name, model_of in MODELS.items():
        torch.manual_seed(0)
        model = model_of()
        for layout in (LAST, FIRST):
            sides = calls(model, shape, layout)
            found += measure.results(
                *("Whole models", Work(shape), layout, f"step of {name}", sides),
                quick=arguments.quick,
                seconds=20,
            )
    title = (
        f"PyTorch {torch.__version__}, float32: forward and backward. In ResNet-18, fuse makes 17 "
        "of 20 normalizations one with a relu, 8 of these with an addition; in MobileNetV2 none, "
        "since relu6 is no activation of ours. The rest is convolutions for the most part: with "
        f"torch.nn's layers, normalization takes {parts(found)}. {batchnorm.native_status()}"
    )
    measure.show(found, title, arguments.json)


if __name__ == "__main__":
    main()
