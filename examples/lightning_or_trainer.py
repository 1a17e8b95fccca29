"""The same as `own_loop.py` with Lightning: RSST as a callback.

    pip install pytorch-lightning
    python examples/lightning_or_trainer.py

Lightning and not Hugging Face's Trainer, since it is the lighter of the two to install beside torch: 10 packages of
5 MB (pytorch-lightning 2.6) against 11 of 19 MB (transformers 5.24 and accelerate). In the Trainer the same three
calls go into a `TrainerCallback`: `regroup` and `Penalty` into `on_train_begin`, `step` into
`on_pre_optimizer_step`.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import torchvision
from own_loop import loaders, parser, table
from torch import Tensor, nn, optim

import structured_tickets as st


class FadeOut(pl.Callback):
    """RSST: find the units when training begins, decide which stay, and let the others fade out until it ends.

    The masks and the state of the penalty are part of Lightning's checkpoints, so that training can be continued.

    Args:
        rate: Share of the weights to prune, in [0, 1).
        criterion: Score of a unit: see `structured_tickets.regroup`.
        image: An image, or its shape.
    """

    masks: st.Masks
    penalty: st.Penalty

    def __init__(self, rate: float, criterion: str, image: Tensor | Sequence[int]) -> None:
        self.rate, self.criterion, self.image = rate, criterion, image
        self._restored: dict[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Prune: by the weights at the start of training, or as the checkpoint says from which it goes on."""
        units = st.units(module.network, self.image)
        if self._restored:
            self.masks = st.Masks.from_state_dict(units, self._restored["masks"])
        else:
            self.masks = st.regroup(module.network, units, self.rate, self.criterion, batches=trainer.train_dataloader)
        steps = int(trainer.estimated_stepping_batches)
        self.penalty = st.Penalty(module.network, self.masks, steps, schedule="exp_custom")
        if self._restored:
            self.penalty.load_state_dict(self._restored["penalty"])

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: optim.Optimizer) -> None:
        """Apply the penalty to gradients that Lightning has accumulated and unscaled."""
        self.penalty.step()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint has to hold."""
        return {"masks": self.masks.state_dict(), "penalty": self.penalty.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what a checkpoint holds until training begins."""
        self._restored = state_dict


class Classifier(pl.LightningModule):
    """A network with its loss and optimizer.

    Args:
        network: Images -> logits.
        lr: Learning rate of AdamW.
    """

    def __init__(self, network: nn.Module, lr: float) -> None:
        super().__init__()
        self.network, self.lr = network, lr

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Return the loss."""
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> Any:
        """Return AdamW with a cosine over all steps."""
        optimizer = optim.AdamW(self.parameters(), self.lr)
        schedule = optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trainer(epochs: int, *callbacks: pl.Callback) -> pl.Trainer:
    """Return a quiet trainer on the CPU that writes no files."""
    off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    return pl.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), **dict.fromkeys(off, False))


def main(argv: Sequence[str] | None = None) -> None:
    """Train, make smaller, compare."""
    args = parser().parse_args(argv)
    torch.manual_seed(0)
    train, test, classes = loaders(args)
    module = Classifier(torchvision.models.resnet18(num_classes=classes), args.lr)
    fade_out = FadeOut(args.rate, args.criterion, next(iter(train))[0])
    trainer(args.epochs).fit(module, train)
    dense = copy.deepcopy(module.network)
    trainer(args.epochs, fade_out).fit(module, train)
    small = st.shrink(module.network, fade_out.masks)
    with tempfile.TemporaryDirectory() as temporary:
        st.save(small, args.out or temporary)
        loaded = st.load(args.out or temporary)
    print(f"{100 * fade_out.masks.density:.1f}% of the prunable weights are kept")
    rows = {"dense": dense, "RSST, before hardening": module.network, "shrunk": small, "shrunk, read back": loaded}
    print(table(rows, test))


if __name__ == "__main__":
    main()
