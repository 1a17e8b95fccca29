"""The place that each channel of a rearranged tensor had before."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from structured_tickets.unit_groups.operations import CONCATENATIONS
from structured_tickets.unit_groups.tracing import OTHER, ChannelTags, new_tags


class ChannelOrigins(ChannelTags):
    """Follow channels through rearrangements; after every other operation they get new tags.

    So do those after concatenation and padding, through which removed channels are followed otherwise.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.tagged: list[tuple[fx.Node, int]] = []
        self.run_on_image()

    def tags_of(self, node: fx.Node, called: Any, tags: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        channels = called.out_channels if isinstance(called, nn.Conv2d) else tags.shape[1]
        return self.passed_on(node, tags if tags.ndim != 4 else torch.empty(1, channels, 1, 1))

    def passed_on(self, node: fx.Node, tags: Tensor) -> Tensor:
        if tags.ndim != 4:
            return torch.full_like(tags, OTHER)
        fresh = new_tags(tags.shape[1], len(self.tagged) + 1)
        self.tagged += [(node, k) for k in range(tags.shape[1])]
        return fresh

    def rearranged(self, node: fx.Node, called: Any, value: Any) -> Any:
        return self.passed_on(node, value) if called in CONCATENATIONS or called is F.pad else value

    def origin(self, node: fx.Node) -> tuple[fx.Node, Tensor] | None:
        """Return the node whose channels these are, and which of them (int64); None if there is no single one."""
        tags = self.env.get(node)
        if not isinstance(tags, Tensor) or tags.ndim != 4 or not bool((tags > 0).all()):
            return None
        pairs = [self.tagged[int(t) - 1] for t in tags.flatten()]
        nodes = {source for source, _ in pairs}
        return (nodes.pop(), torch.tensor([k for _, k in pairs])) if len(nodes) == 1 else None
