"""The Vision Transformer (Dosovitskiy et al. 2021): timm's, behind a normalisation layer."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models import vision_transformer
from torch import Tensor, nn


class VisionTransformer(vision_transformer.VisionTransformer):
    """timm's network behind a normalisation layer; images [batch, 3, size, size] in [0, 1] -> logits.

    Args:
        norm_eps: What the LayerNorms add to the variance; timm's ImageNet weights are made for 1e-6.

    Attributes:
        class_token_only: Leave out what the classifier never reads: the last block's other tokens after its keys and
            values. The logits and gradients are the same up to rounding. Off unless `frugal` turns it on, since
            criteria and counters look at every token of every layer.
    """

    def __init__(
        self,
        num_classes: int,
        img_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            num_classes=num_classes,
            norm_layer=partial(nn.LayerNorm, eps=norm_eps),
        )
        # timm starts the class token near zero; the documents' networks start it like the position embedding.
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.normalize: nn.Module = nn.Identity()
        self.class_token_only = False

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = self.normalize(x)
        if not self.class_token_only:
            return super().forward(x)
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        return self.forward_head(self.norm(_class_token_after(last, x)))


def _class_token_after(block: Any, x: Tensor) -> Tensor:
    """A block's output for the first token alone: [batch, tokens, dim] -> [batch, 1, dim]."""
    x = x[:, :1] + block.drop_path1(_first_of(block.attn, block.norm1(x)))
    return x + block.drop_path2(block.mlp(block.norm2(x)))


def _first_of(attention: Any, x: Tensor) -> Tensor:
    """Return the output of attention for the first token: [batch, tokens, dim] -> [batch, 1, dim]."""
    if not hasattr(attention, "qkv"):  # a branch without heads asks nothing of the other tokens
        return attention(x[:, :1])
    batch, tokens, _ = x.shape
    shape = (batch, tokens, 3, attention.num_heads, attention.head_dim)
    query, key, value = attention.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (query[:, :, :1] * attention.scale @ key.transpose(-2, -1)).softmax(dim=-1)
    return attention.proj((weights @ value).transpose(1, 2).reshape(batch, 1, -1))
