"""Self-attention in the form in which heads can be told apart, for networks that have torch's own."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

RENAMED = {"in_proj_": "qkv.", "out_proj.": "proj."}


class SelfAttention(nn.Module):
    """The computation of `nn.MultiheadAttention` on one sequence, by two linear layers `qkv` and `proj`.

    Torch's keeps the input projection as a bare parameter, to which no hook can listen, and its heads in a number that
    has to divide the width. State dicts of the original load too.

    Args:
        original: Batch first, with as many features in keys and values as in queries; its weights are taken over.
    """

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        width = original.embed_dim
        self.num_heads, self.head_dim = original.num_heads, original.head_dim
        self.fused_attn = True
        self.dropout = original.dropout
        self.qkv = nn.Linear(width, 3 * width, bias=original.in_proj_bias is not None)
        self.proj = nn.Linear(width, width, bias=original.out_proj.bias is not None)
        self.register_load_state_dict_pre_hook(_renamed)
        self.to(original.out_proj.weight)
        self.load_state_dict(original.state_dict())
        self.train(original.training)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, **kwargs: object
    ) -> tuple[Tensor, None]:
        """[batch, tokens, width], three times the same -> the same shape, and no weights."""
        if kwargs or need_weights or not query is key is value:
            raise TypeError("attention of one sequence to itself, without masks, is all that is known here")
        batch, tokens, _ = query.shape
        qkv = self.qkv(query).view(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        rate = self.dropout if self.training else 0.0
        if self.fused_attn:
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=rate)
        else:
            weights = (q * self.head_dim**-0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
            mixed = F.dropout(weights, rate, self.training) @ v
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, -1)), None


def _renamed(module: nn.Module, state: dict[str, Any], prefix: str, *others: object) -> None:
    for old, new in RENAMED.items():
        for key in [k for k in state if k.startswith(prefix + old)]:
            state[prefix + new + key.removeprefix(prefix + old)] = state.pop(key)


def with_separate_heads(model: nn.Module) -> nn.Module:
    """The model, with `SelfAttention` wherever it had torch's attention of a sequence to itself, batch first."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.MultiheadAttention) and module.batch_first and module.in_proj_weight is not None:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, SelfAttention(module))
    return model
