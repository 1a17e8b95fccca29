"""Knowledge distillation: the network also learns what a teacher says about the same images."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from structured_tickets.networks.precision import computing
from structured_tickets.networks.together import Together


@dataclass(frozen=True)
class Distillation:
    """Loss := (1 - alpha) * loss + alpha * teacher's loss.

    `kl`: T^2 * KL(teacher's probabilities, the network's own), both of logits / T, mean over the images (Hinton et al.
    2015, "Distilling the Knowledge in a Neural Network"; T^2 keeps the gradient's size). `hard`: cross entropy with the
    teacher's answer (Touvron et al. 2021, "Training data-efficient image transformers").

    Attributes:
        teacher: In evaluation mode, on the network's device; it is not trained.
        alpha: In [0, 1].
        temperature: T > 0.
        kind: A row of `teachers.KINDS`.
    """

    teacher: nn.Module
    alpha: float
    temperature: float
    kind: str

    def added_to(
        self,
        loss: Tensor,
        output: Tensor,
        images: Tensor,
        precision: torch.dtype,
        together: Together | None = None,
    ) -> Tensor:
        """Return the loss of a batch with the teacher's part in it.

        Args:
            output: The network's logits for the images, as the network saw them.
            together: Makes small operations of all layers of the teacher at once; None: each layer makes its own.
        """
        joint = nullcontext() if together is None else together.a_pass()
        with torch.no_grad(), computing(self.teacher, precision), joint:
            said = self.teacher(images)
        return (1 - self.alpha) * loss + self.alpha * self.loss(output.float(), said.float())

    def loss(self, output: Tensor, said: Tensor) -> Tensor:
        """Return the teacher's part alone, of two [images, classes] of logits."""
        if self.kind == "hard":
            return functional.cross_entropy(output, said.argmax(1))
        own, wanted = (functional.log_softmax(x / self.temperature, 1) for x in (output, said))
        return self.temperature**2 * functional.kl_div(own, wanted, reduction="batchmean", log_target=True)


def as_teacher(network: nn.Module) -> nn.Module:
    """Let a network answer only: evaluation mode, no gradients."""
    return network.requires_grad_(False).eval()
