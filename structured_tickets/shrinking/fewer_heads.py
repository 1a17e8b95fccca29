"""Torch's own attention with fewer heads than its width has room for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structured_tickets.shrinking.cuts import Cuts

PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class FewerHeads(nn.MultiheadAttention):
    """`nn.MultiheadAttention` of which heads were removed: torch's wants their number times their size to be the width.

    It takes the same arguments, and gives the same. A mask for each head may have those that were removed.

    Attributes:
        kept_heads: Numbers that its heads had.
        heads_before: How many there were.
    """

    kept_heads: tuple[int, ...]
    heads_before: int

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `nn.MultiheadAttention.forward`; means of weights are over the heads that are left."""
        one, first = query.dim() == 2, self.batch_first or query.dim() == 2
        inputs = [t.unsqueeze(0) if one else t if first else t.transpose(0, 1) for t in (query, key, value)]
        q, k, v = (self._in_heads(t) for t in self._projected(inputs, same=query is key is value))
        mask = self._mask(q, k, attn_mask, key_padding_mask)
        rate = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), rate, self.training)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, rate)
        found = F.linear(mixed.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        found = found if first else found.transpose(0, 1)
        return (found.squeeze(0), None if weights is None else weights.squeeze(0)) if one else (found, weights)

    def _projected(self, inputs: list[Tensor], same: bool) -> list[Tensor]:
        """Queries, keys and values: [batch, tokens, heads * head_dim] each."""
        bias = self.in_proj_bias
        if self.in_proj_weight is not None and same:
            return list(F.linear(inputs[0], self.in_proj_weight, bias).chunk(3, -1))
        packed = self.in_proj_weight
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if packed is None else packed.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]

    def _in_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(self, q: Tensor, k: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """Numbers to add to the products of queries and keys, to be expanded to [batch, heads, queries, keys]."""
        added = []
        if mask is not None:
            mask = _added(mask, q)
            if mask.dim() == 3:  # [batch * heads, queries, keys], with the heads before or those that are left
                mask = mask.unflatten(0, (len(q), -1))
                mask = mask[:, list(self.kept_heads)] if mask.shape[1] == self.heads_before else mask
            added.append(mask)
        if padding is not None:
            added.append(_added(padding, q).view(-1, 1, 1, k.shape[-2]))
        return added[0] + added[1] if len(added) == 2 else added[0] if added else None


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as numbers to add: minus infinity where it is true."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def let_attention_have_fewer_heads(small: nn.Module, cuts: Cuts) -> None:
    """Make torch's attention whose projections were cut compute with the heads that they are left with, in place.

    Args:
        cuts: What was cut.

    Raises:
        ValueError: Something else than whole heads was cut.
    """
    for name, module in small.named_modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        kept = [cuts[key][0] for p in PROJECTIONS if 0 in cuts.get(key := f"{name}.{p}" if name else p, {})]
        if kept:
            _narrow(module, kept[0])
    _without_nested_tensors(m for m in small.modules() if any(isinstance(a, FewerHeads) for a in m.modules()))


def _without_nested_tensors(modules: Iterable[nn.Module]) -> None:
    """Let torch's encoders give their layers tensors of one shape: only torch's own attention takes others."""
    for module in modules:
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _narrow(module: Any, kept: Tensor) -> None:
    size, before = module.head_dim, module.embed_dim // module.head_dim
    heads = (kept[kept < module.embed_dim] // size).unique()
    left = module.out_proj.weight.shape[1]
    if len(heads) * size != left or module.bias_k is not None or module.add_zero_attn:
        raise ValueError("other parts of attention than whole heads were cut")
    module.__class__ = FewerHeads
    module.heads_before, module.kept_heads, module.num_heads = before, tuple(heads.tolist()), len(heads)
    module.out_proj.in_features = left
    module._qkv_same_embed_dim = False  # else torch's encoder layers compute the whole in one operation of their own


class _Noting(FewerHeads):
    """Hands its projections over before it goes on with what it gets for them."""

    note: Callable[[list[Tensor]], list[Tensor]]

    def _projected(self, inputs: list[Tensor], same: bool) -> list[Tensor]:
        return self.note(super()._projected(inputs, same))


@contextmanager
def projections_noted(
    network: nn.Module,
    layers: Sequence[nn.MultiheadAttention],
    note: Callable[[nn.Module, list[Tensor]], list[Tensor]],
) -> Iterator[None]:
    """While it lasts, torch's attention hands over its queries, keys and values, which no hook can listen to.

    Args:
        layers: Attention layers of the network.
        note: Called with a layer and [batch, tokens, heads * size of a head] of each; what it returns is used on.
    """
    encoders = [m for m in network.modules() if isinstance(m, nn.TransformerEncoder)] if layers else []
    before = [(m, type(m), dict(vars(m))) for m in (*layers, *encoders)]
    _without_nested_tensors(encoders)
    for layer in layers:
        heads = layer.num_heads
        more = {"heads_before": heads, "kept_heads": tuple(range(heads)), "note": functools.partial(note, layer)}
        vars(layer).update({**more, **vars(layer), "_qkv_same_embed_dim": False})
        layer.__class__ = _Noting
    try:
        yield
    finally:
        for module, kind, attributes in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
