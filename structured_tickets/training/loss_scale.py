"""Loss scaling, without which small gradients are zero in float16 (Micikevicius et al. 2018, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

FIRST, LEAST = 2.0**16, 2.0**-14
GROWTH, BACKOFF = 2.0, 0.5
INTERVAL = 2000  # steps without an overflow, after which the scale grows


class LossScale:
    """The factor of the loss, which falls when a gradient overflows, and grows again; nothing in it waits.

    The rules and their numbers are those of `torch.amp.GradScaler`, whose operations it uses. That class reads the
    result on the host unless a fused optimizer handles it, and knows nothing of a penalty between gradient and step.

    Attributes:
        scale: float32 [].
        calm: int32 []: steps since it has last changed.
        found: float32 []: 1 if a gradient of the last step was not finite, so that the step has to be left out.
    """

    def __init__(self, device: torch.device, state: Mapping[str, float] | None = None) -> None:
        before = state or {"scale": FIRST, "calm": 0}
        self.scale = torch.full((), before["scale"], dtype=torch.float32, device=device)
        self.calm = torch.full((), int(before["calm"]), dtype=torch.int32, device=device)
        self.found = torch.zeros((), dtype=torch.float32, device=device)

    def scaled(self, loss: Tensor) -> Tensor:
        """Return the loss to take gradients of."""
        return loss * self.scale

    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """Divide gradients by the scale, in place, and look whether they are finite."""
        self.found.zero_()
        inverse = self.scale.reciprocal()  # exact: the scale is a power of two
        torch._amp_foreach_non_finite_check_and_unscale_(list(gradients), self.found, inverse)

    def update(self) -> None:
        """Set the scale of the next step."""
        torch._amp_update_scale_(self.scale, self.calm, self.found, GROWTH, BACKOFF, INTERVAL)

    def is_exhausted(self) -> bool:
        """Return whether gradients overflow at every scale, so that nothing is learned; the host waits."""
        return float(self.scale) < LEAST

    def state(self) -> dict[str, float]:
        """Return what another one continues from."""
        return {"scale": float(self.scale), "calm": int(self.calm)}


def is_state(value: object) -> bool:
    """Return whether a value can be the state of a loss scale: none, or a positive number and a count."""
    if value == {}:
        return True
    if not isinstance(value, dict) or {*value} != {"scale", "calm"}:
        return False
    scale, calm = value["scale"], value["calm"]
    numbers = isinstance(scale, float) and type(calm) is int
    return numbers and 0 < scale <= torch.finfo(torch.float32).max and 0 <= calm <= INTERVAL
