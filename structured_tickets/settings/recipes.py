"""Named sets of flags that belong together: how a network is trained. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """A row of `RECIPES`.

    Attributes:
        summary: What it is for.
        flags: Values by the flag's name; flags that are given on the command line win.
    """

    summary: str
    flags: dict[str, Any] = field(default_factory=dict)


# Accuracies that they have reached: docs/results.md.
RECIPES = {
    "documents": Recipe("the documents' own, which is every flag's default"),
    "cnn": Recipe(
        "a convolutional network, trained long",
        {
            "epochs": 200,
            "lr": 0.1,
            "nesterov": True,
            "weight_decay": 5e-4,
            "no_decay_on_bias_and_norm": True,
            "lr_schedule": "cosine",
            "warmup": 5,
            "label_smoothing": 0.1,
            "auto_augment": "trivial",
            "cutmix": 1.0,
        },
    ),
    "vit": Recipe(
        "a Vision Transformer from nothing, trained long",
        {
            "epochs": 300,
            "optimizer": "adamw",
            "lr": 1e-3,
            "weight_decay": 0.05,
            "lr_schedule": "cosine",
            "warmup": 10,
            "label_smoothing": 0.1,
            "auto_augment": "cifar",
            "mixup": 1.0,
            "cutmix": 1.0,
            "random_erasing": 0.25,
            "drop_path": 0.1,
            "clip_grad": 1.0,
        },
    ),
    "fast": Recipe(
        "a convolutional network in few epochs",
        {
            "epochs": 16,
            "lr": 0.1,
            "nesterov": True,
            "weight_decay": 5e-4,
            "no_decay_on_bias_and_norm": True,
            "lr_schedule": "onecycle",
            "warmup": 4,
            "label_smoothing": 0.1,
        },
    ),
}
