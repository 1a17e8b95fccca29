"""Vision Transformers for small images (Dosovitskiy et al. 2021): patches of 4 pixels, class token, timm's layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.registry import MODELS, register_model

if TYPE_CHECKING:
    from models.vision_transformer import VisionTransformer


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
    from models.vision_transformer import VisionTransformer

    model = VisionTransformer(num_classes, img_size, 4, embed_dim, depth, num_heads, mlp_ratio)
    if pretrained:
        from models.pretrained import load_pretrained_weights

        load_pretrained_weights(model, MODELS[name].spec)
    return model
