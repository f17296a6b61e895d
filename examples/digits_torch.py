"""Train a small network on handwritten digits in PyTorch, in one process or in several.

Several processes share each batch: by SyncBatchNorm they normalize as one, and by
DistributedDataParallel they descend as one, so that their losses are those of one process.

    pip install ".[torch]" rich scikit-learn
    python examples/digits_torch.py --processes 2
"""

import argparse
import datetime
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise

import digits
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import batchnorm.torch

OURS = "batchnorm.torch.BatchNorm2d"
TIMEOUT = datetime.timedelta(minutes=1)


class Network(nn.Module):
    """Three convolutions, each normalized, the mean over the image, and a linear layer."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        super().__init__()
        # A bias would do nothing: the normalization that follows subtracts it with the mean.
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels_in, channels, kernel_size=3, padding=1, bias=False)
            for channels_in, channels in pairwise((1, *digits.CHANNELS))
        )
        self.normalizations = nn.ModuleList(
            batchnorm.torch.BatchNorm2d(channels, activation="relu") for channels in digits.CHANNELS
        )
        self.output = nn.Linear(digits.CHANNELS[-1], digits.CLASSES)
        # Not strict, since a new normalization keeps its own weights: scale 1 and bias 0.
        tensors = {name: channels_second(weight) for name, weight in weights.items()}
        self.load_state_dict(tensors, strict=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images
        for index, convolution in enumerate(self.convolutions):
            if index > 0:
                x = F.max_pool2d(x, kernel_size=2)
            x = self.normalizations[index](convolution(x))
        return self.output(x.mean(dim=(2, 3)))


class Training:
    """A network, what trains it, and how that went; of several processes, in one of them."""

    def __init__(self, weights: dict[str, np.ndarray], rank: int, processes: int) -> None:
        self.rank, self.processes = rank, processes
        self.network: nn.Module = Network(weights)
        if processes > 1:
            batchnorm.torch.convert(self.network, sync=True)
            self.network = DistributedDataParallel(self.network)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), digits.LEARNING_RATE, digits.MOMENTUM
        )
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.accuracy = 0.0

    def step(self, images: np.ndarray, labels: np.ndarray) -> None:
        start = time.perf_counter()
        mine = slice(self.rank, None, self.processes)
        outputs = self.network(channels_second(images[mine]))
        targets = torch.from_numpy(labels[mine]).long()
        # This process's part of the mean over the whole batch.
        loss = F.cross_entropy(outputs, targets, reduction="sum") / len(labels)
        self.optimizer.zero_grad()
        # The gradients of all parts are to be added up; DistributedDataParallel takes their mean.
        (loss * self.processes).backward()
        self.optimizer.step()
        loss = loss.detach()
        if self.processes > 1:
            dist.all_reduce(loss)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    @torch.no_grad()
    def test(self, data: digits.Digits) -> None:
        self.network.eval()  # Normalizes by the running statistics, each digit for itself.
        outputs = self.network(channels_second(data.test_images))
        self.network.train()  # Normalizes by the batch's statistics, and moves the running ones.
        self.accuracy = float(np.mean(outputs.argmax(1).numpy() == data.test_labels))


def channels_second(array: np.ndarray) -> torch.Tensor:
    """(N, H, W, C) as PyTorch has it, (N, C, H, W)."""
    if array.ndim == 4:
        array = np.ascontiguousarray(np.moveaxis(array, -1, 1))
    return torch.from_numpy(array)


def run(options: argparse.Namespace) -> list[float]:
    """Train, in one process or in several that are started for it; the losses."""
    processes = options.processes
    if processes == 1:
        return train(0, options)
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool,
    ):
        trained = [
            pool.submit(train_with_others, rank, options, folder) for rank in range(processes)
        ]
        losses, *_ = [each.result() for each in trained]
    return losses


def train_with_others(rank: int, options: argparse.Namespace, folder: str) -> list[float]:
    # Together the processes have as many threads as one of them would have had.
    threads = max(1, torch.get_num_threads() // options.processes)
    torch.set_num_threads(threads)
    batchnorm.set_num_threads(threads)
    store = dist.FileStore(f"{folder}/store", options.processes)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=options.processes, timeout=TIMEOUT
    )
    losses = train(rank, options)
    dist.barrier()
    dist.destroy_process_group()
    return losses


def train(rank: int, options: argparse.Namespace) -> list[float]:
    training = Training(digits.initial_weights(options.seed), rank, options.processes)
    digits.train({OURS: training}, digits.load(options.seed), options, shown=rank == 0)
    return training.losses


def main() -> None:
    parser = digits.command_line(__doc__.splitlines()[0])
    parser.add_argument(
        "--processes",
        type=digits.integer_within(1),
        default=1,
        metavar="N",
        help="how many processes share each batch (default: %(default)s)",
    )
    run(parser.parse_args())


if __name__ == "__main__":
    main()
