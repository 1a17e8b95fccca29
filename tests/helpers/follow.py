"""One of several processes: 50 training steps in float64 on a share of each batch; the first one writes the losses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from structured_tickets.base.distributed import World
from structured_tickets.base.weights import digest_of
from structured_tickets.data.loader import even_sizes
from structured_tickets.networks import build_model
from structured_tickets.networks.layers import Normalize
from structured_tickets.training.epoch import Passer, train

STEPS = 50


def follow(arch: str, images: int, file: str, at_once: int = 0) -> None:
    """The whole life of a process.

    Args:
        images: In a batch.
        file: For the losses.
        at_once: See `Passer`.
    """
    torch.Tensor.float = lambda self: self  # logits stay in float64
    world = World.join()
    torch.manual_seed(0)
    model = build_model(arch, 10, 8)
    model.normalize = Normalize((0.0,) * 3, (1.0,) * 3)
    model.double()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    draw = torch.Generator().manual_seed(1)
    losses = []
    network = world.parallel(model, torch.rand(2, 3, 8, 8, dtype=torch.float64))
    passer = Passer(type("Args", (), {"print_freq": 100}), world=world, network=network, at_once=at_once)
    for _ in range(STEPS):
        # Every third batch is smaller: of two images three processes have one that has none.
        count = 2 if _ % 3 == 2 else images
        whole = (
            torch.rand(count, 3, 8, 8, generator=draw, dtype=torch.float64),
            torch.randint(0, 10, (count,), generator=draw),
        )
        sizes = even_sizes(count, at_once or count)
        share = tuple(
            torch.cat([part.tensor_split(world.size)[world.rank] for part in values.split(sizes)]) for values in whole
        )
        losses.append(train(0, [share], model, torch.nn.CrossEntropyLoss(), optimizer, 0, passer, None).mean_loss)
    world.check_agreement("weights", digest_of(model.state_dict()))
    if world.is_first:
        Path(file).write_text(json.dumps(losses))
    world.leave()
    sys.exit(0)
