"""Vision Transformers for small images (Dosovitskiy et al. 2021): patches of 4 pixels, class token, timm's layers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import timm.models
from timm.models import vision_transformer
from torch import Tensor, nn

from errors import DataError
from models.registry import MODELS, ModelSpec, register_model

log = logging.getLogger("rsst.models")


class VisionTransformer(vision_transformer.VisionTransformer):
    """timm's network behind a normalisation layer; images [batch, 3, size, size] in [0, 1] -> logits.

    Attributes:
        class_token_only: Leave out what the classifier never reads: the last block's other tokens after its keys and
            values. The logits and gradients are the same up to rounding. Off unless `frugal` turns it on, since
            criteria and counters look at every token of every layer.
    """

    def __init__(
        self, num_classes: int, img_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int,
        mlp_ratio: float,
    ) -> None:  # fmt: skip
        super().__init__(
            img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads,
            mlp_ratio=mlp_ratio, num_classes=num_classes, norm_layer=_layer_norm,
        )  # fmt: skip
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
    attention = block.attn
    batch, tokens, _ = x.shape
    shape = (batch, tokens, 3, attention.num_heads, attention.head_dim)
    query, key, value = attention.qkv(block.norm1(x)).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
    weights = (query[:, :, :1] * attention.scale @ key.transpose(-2, -1)).softmax(dim=-1)
    x = x[:, :1] + attention.proj((weights @ value).transpose(1, 2).reshape(batch, 1, -1))
    return x + block.mlp(block.norm2(x))


@contextmanager
def frugal(model: nn.Module) -> Iterator[None]:
    """For a while, a ViT of this module computes no more than its logits need; other networks do as ever."""
    able = isinstance(model, VisionTransformer)
    if able:
        model.class_token_only = True  # type: ignore[assignment]
    try:
        yield
    finally:
        if able:
            model.class_token_only = False  # type: ignore[assignment]


def _layer_norm(dim: int, **kwargs: object) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=1e-5, **kwargs)  # type: ignore[arg-type]


@register_model("vit_tiny", stem="patch_embed.proj", classifier="head", family="vit")
def vit_tiny(num_classes: int = 100, img_size: int = 32, pretrained: bool = False) -> VisionTransformer:
    """ViT-Tiny for 32 pixels: width 192, 9 blocks, 3 heads, MLP 384; 2.7 million weights."""
    return _build("vit_tiny", pretrained, num_classes, img_size, embed_dim=192, depth=9, num_heads=3, mlp_ratio=2)


@register_model(
    "vit_small", stem="patch_embed.proj", classifier="head", family="vit",
    pretrained="vit_small_patch16_224.augreg_in21k_ft_in1k",
)  # fmt: skip
def vit_small(num_classes: int = 100, img_size: int = 32, pretrained: bool = False) -> VisionTransformer:
    """ViT-Small: width 384, 12 blocks, 6 heads, MLP 1,536; 21 million weights."""
    return _build("vit_small", pretrained, num_classes, img_size, embed_dim=384, depth=12, num_heads=6, mlp_ratio=4)


@register_model(
    "vit_base", stem="patch_embed.proj", classifier="head", family="vit",
    pretrained="vit_base_patch16_224.augreg_in21k_ft_in1k",
)  # fmt: skip
def vit_base(num_classes: int = 100, img_size: int = 32, pretrained: bool = False) -> VisionTransformer:
    """ViT-Base: width 768, 12 blocks, 12 heads, MLP 3,072; 85 million weights."""
    return _build("vit_base", pretrained, num_classes, img_size, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4)


def _build(
    name: str, pretrained: bool, num_classes: int, img_size: int, *, embed_dim: int, depth: int, num_heads: int,
    mlp_ratio: float,
) -> VisionTransformer:  # fmt: skip
    model = VisionTransformer(num_classes, img_size, 4, embed_dim, depth, num_heads, mlp_ratio)
    if pretrained:
        load_pretrained_weights(model, MODELS[name].spec)
    return model


def load_pretrained_weights(
    model: nn.Module, spec: ModelSpec, file: str | Path | None = None, with_classifier: bool = False
) -> None:
    """Load ImageNet weights, or those of a file, into `model`; by default its classifier stays as it was.

    Patch and position embeddings are resampled to the model's patch and image size by timm.

    Args:
        spec: The model's row: the timm model to fetch when no file is given, and the classifier's name.
        file: A local checkpoint (`.safetensors`, `.pth`), read without unpickling code.
        with_classifier: Load the classifier too; its classes must then be the model's.

    Raises:
        DataError: No weights can be had, or they do not fit the model.
    """
    if file is not None:
        source, weights = str(file), _weights_from_file(file)
    elif spec.pretrained is not None:
        source, weights = spec.pretrained, _weights_from_timm(spec.pretrained)
    else:
        raise DataError("no ImageNet weights are published for this model; give a local file by --pretrained FILE")
    own = ("normalize.",) if with_classifier else ("normalize.", f"{spec.classifier}.")
    weights = {k: v for k, v in weights.items() if not k.startswith(own)}
    try:
        if isinstance(model, vision_transformer.VisionTransformer):
            weights = vision_transformer.checkpoint_filter_fn(weights, model)
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except (RuntimeError, KeyError) as error:
        raise DataError(
            f"the weights of {source} do not fit the model: {str(error).splitlines()[-1].strip()}"
        ) from error
    left = [k for k in missing if not k.startswith(own)]
    if left or unexpected:
        raise DataError(
            f"the weights of {source} do not fit the model: missing {left[:3]}, unexpected {unexpected[:3]}"
        )
    log.info("loaded %d tensors from %s", len(weights), source)


def _weights_from_file(file: str | Path) -> dict[str, Tensor]:
    if not Path(file).is_file():
        raise DataError(f"no such weights file: {file}")
    try:
        return dict(timm.models.load_state_dict(str(file), use_ema=False, weights_only=True))
    except Exception as error:  # timm and torch raise a wide family for a file that is not a checkpoint
        raise DataError(f"cannot read weights from {file}: {str(error).splitlines()[0]}") from error


def _weights_from_timm(timm_name: str) -> dict[str, Tensor]:
    try:
        return {k: v.clone() for k, v in timm.create_model(timm_name, pretrained=True).state_dict().items()}
    except Exception as error:  # the hub client's errors share no base class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"cannot fetch ImageNet weights {timm_name} ({reason}); download them elsewhere and give the file "
            f"by --pretrained FILE"
        ) from error


def set_fused_attention(model: nn.Module, fused: bool) -> None:
    """Choose the attention kernel of a ViT; other networks are left alone."""
    for module in model.modules():
        if isinstance(getattr(module, "fused_attn", None), bool):
            module.fused_attn = fused  # type: ignore[assignment]
