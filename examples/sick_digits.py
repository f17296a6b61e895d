"""Train a residual network on handwritten digits with two mistakes, and inspect it.

A block was left in evaluation mode, and the last block has the momentum of another framework. Then
the network is given digits that are brighter than those of its training. Writes the checkpoint, and
a picture of what was found with these digits.

    pip install ".[torch,tools]" scikit-learn
    python examples/sick_digits.py
    batchnorm inspect sick_digits.pt
"""

import digits
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

import batchnorm.torch

BRIGHTER = 0.25  # where 0 is black, and 1 white


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(*(Block(16) for _ in range(4)))
        self.output = nn.Linear(16, digits.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.conv(x)))
        return self.output(self.blocks(x).mean(dim=(2, 3)))


def trained(data: digits.Digits, options: object) -> Network:
    torch.manual_seed(options.seed)
    network = Network()
    network.blocks[-1].bn2.momentum = 0.9
    optimizer = torch.optim.SGD(network.parameters(), digits.LEARNING_RATE, digits.MOMENTUM)
    for epoch in range(1 if options.quick else options.epochs):
        network.train()
        network.blocks[1].eval()
        for images, labels in digits.batches(data, options.batch_size, options.seed, epoch):
            loss = F.cross_entropy(network(tensor(images)), torch.from_numpy(labels).long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.train()


def tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def main() -> None:
    options = digits.command_line(__doc__.splitlines()[0]).parse_args()
    data = digits.load(options.seed)
    network = trained(data, options)
    torch.save({"model": network.state_dict()}, "sick_digits.pt")
    brighter = np.array_split(data.test_images + np.float32(BRIGHTER), 9)
    report = batchnorm.torch.inspect(network, [tensor(each) for each in brighter])
    Console().print(report)
    report.figure().savefig("sick_digits.png")
    print("Checkpoint: sick_digits.pt. Picture: sick_digits.png")


if __name__ == "__main__":
    main()
