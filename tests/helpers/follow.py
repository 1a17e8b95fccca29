"""Started by torchrun: 50 training steps in float64 on a share of each batch; the first process writes the losses.

Arguments: network, images in a batch, file for the losses.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distributed import World
from models import build_model
from models.layers import Normalize
from training import Passer, train
from utils import digest_of

STEPS = 50


def main(arch: str, images: int, file: str) -> None:
    torch.set_num_threads(1)
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
    passer = Passer(type("Args", (), {"print_freq": 100}), world=world, network=network)
    for _ in range(STEPS):
        # Every third batch is smaller: of two images three processes have one that has none.
        count = 2 if _ % 3 == 2 else images
        whole = (torch.rand(count, 3, 8, 8, generator=draw, dtype=torch.float64),
                 torch.randint(0, 10, (count,), generator=draw))  # fmt: skip
        share = tuple(part.tensor_split(world.size)[world.rank] for part in whole)
        losses.append(train(0, [share], model, torch.nn.CrossEntropyLoss(), optimizer, 0, passer, None).mean_loss)
    world.check_agreement("weights", digest_of(model.state_dict()))
    if world.is_first:
        Path(file).write_text(json.dumps(losses))
    world.leave()


main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
