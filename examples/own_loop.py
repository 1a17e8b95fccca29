"""A ResNet-18 in a training loop of one's own: trained dense, regrouped, faded out by RSST, shrunk, saved and loaded.

    pip install .                                 # in the folder of this project
    python examples/own_loop.py                   # handwritten digits, enlarged to 32 pixels
    python examples/own_loop.py --data photos     # your own: photos/train/CLASS/*.jpg and photos/test/CLASS/*.jpg

What makes a smaller network of the dense one is in `faded` and in `main`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from sklearn.datasets import load_digits
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision import transforms

import structured_tickets as st

SIDE = 32  # pixels
REPEATS = 30  # forward passes of each network


def digits() -> tuple[Dataset, Dataset, int]:
    """Return 1,438 training and 359 test images of handwritten digits, and the number of classes."""
    found = load_digits()
    images = F.interpolate(torch.tensor(found.images / 16).float().unsqueeze(1), SIDE, mode="bilinear")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    data, test = TensorDataset(images.expand(-1, 3, -1, -1), torch.tensor(found.target)), len(order) // 5
    return Subset(data, order[test:].tolist()), Subset(data, order[:test].tolist()), 10


def photos(folder: Path) -> tuple[Dataset, Dataset, int]:
    """Return the images in the folders train and test of another, one folder for each class, and their number."""
    scaled = transforms.Compose([transforms.Resize(SIDE), transforms.CenterCrop(SIDE), transforms.ToTensor()])
    train, test = (torchvision.datasets.ImageFolder(str(folder / part), scaled) for part in ("train", "test"))
    return train, test, len(train.classes)


def loaders(args: argparse.Namespace) -> tuple[DataLoader, DataLoader, int]:
    """Return batches of training and test images, and the number of classes."""
    train, test, classes = photos(args.data) if args.data else digits()
    parts: list[Any] = [Subset(part, range(min(args.images or len(part), len(part)))) for part in (train, test)]  # type: ignore[arg-type]
    return DataLoader(parts[0], args.batch_size, shuffle=True, drop_last=True), DataLoader(parts[1], 256), classes


def trained(model: nn.Module, loader: DataLoader, epochs: int, lr: float, penalty: st.Penalty | None = None) -> None:
    """Train by AdamW with a cosine; RSST's penalty comes between `backward` and the step of the optimizer."""
    optimizer = optim.AdamW(model.parameters(), lr)
    schedule = optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            if penalty is not None:
                penalty.step()
            optimizer.step()
            schedule.step()


def faded(model: nn.Module, loader: DataLoader, args: argparse.Namespace) -> tuple[st.Masks, st.Penalty]:
    """Find the units, decide which stay, and train on while the others fade out."""
    units = st.units(model, next(iter(loader))[0])
    masks = st.regroup(model, units, args.rate, args.criterion, batches=loader)
    # Of the schedules this is the strongest one for training as short as this.
    penalty = st.Penalty(model, masks, steps=len(loader) * args.epochs, schedule="exp_custom")
    trained(model, loader, args.epochs, args.lr, penalty)
    return masks, penalty


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    """Return the share of right answers, in percent."""
    model.eval()
    right = [model(images).argmax(1) == labels for images, labels in loader]
    return 100 * float(torch.cat(right).float().mean())


@torch.no_grad()
def latencies(networks: Sequence[nn.Module], image: Tensor) -> list[float]:
    """Return the median time of each network for one image, in milliseconds; they take turns."""
    times: list[list[float]] = [[] for _ in networks]
    for network in networks:
        network.eval()
    for _ in range(REPEATS + 2):  # the first two warm up
        for network, own in zip(networks, times, strict=True):
            began = time.perf_counter()
            network(image)
            own.append(time.perf_counter() - began)
    return [1e3 * statistics.median(own[2:]) for own in times]


def table(networks: dict[str, nn.Module], loader: DataLoader) -> str:
    """Return one line for each network: accuracy, parameters and latency."""
    image = next(iter(loader))[0][:1]
    lines = [f"{'network':<28}{'test accuracy':>14}{'parameters':>13}{'latency':>11}"]
    for (name, network), milliseconds in zip(networks.items(), latencies(list(networks.values()), image), strict=True):
        parameters = sum(p.numel() for p in network.parameters())
        lines.append(f"{name:<28}{accuracy(network, loader):>13.2f}%{parameters:>13,}{milliseconds:>8.2f} ms")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Return the command line of the examples."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--data", type=Path, help="folder with train/CLASS and test/CLASS (default: digits)")
    words.add_argument("--epochs", type=int, default=4, help="epochs of dense training, and of RSST (default: 4)")
    words.add_argument("--images", type=int, help="use at most so many images of each part")
    words.add_argument("--rate", type=float, default=0.5, help="share of the weights to prune (default: 0.5)")
    words.add_argument("--criterion", default="magnitude", help="score of a channel (default: magnitude)")
    words.add_argument("--lr", type=float, default=1e-3)
    words.add_argument("--batch_size", type=int, default=64)
    words.add_argument("--out", type=Path, help="folder for the small network (default: a temporary one)")
    return words


def main(argv: Sequence[str] | None = None) -> None:
    """Train, make smaller, compare."""
    args = parser().parse_args(argv)
    torch.manual_seed(0)
    train, test, classes = loaders(args)
    model = torchvision.models.resnet18(num_classes=classes)
    trained(model, train, args.epochs, args.lr)
    dense = copy.deepcopy(model)

    masks, penalty = faded(model, train, args)
    small = st.shrink(model, masks)
    hardened = copy.deepcopy(model)
    masks.apply_(hardened)
    with tempfile.TemporaryDirectory() as temporary:
        st.save(small, args.out or temporary)
        loaded = st.load(args.out or temporary)

    left = f"{100 * penalty.squeeze:.2g}% of the norm of the doomed weights is left"
    print(f"{100 * masks.density:.1f}% of the prunable weights are kept; {left}")
    rows = {
        "dense": dense,
        "RSST, before hardening": model,
        "hardened": hardened,
        "shrunk": small,
        "shrunk, read back": loaded,
    }
    print(table(rows, test))


if __name__ == "__main__":
    main()
