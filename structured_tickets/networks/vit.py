"""Vision Transformers (Dosovitskiy et al. 2021): class token, timm's layers.

`vit_tiny`, `vit_small` and `vit_base` are for small images (patches of 4 pixels), those named `_imagenet` have timm's
patches of 16 pixels, so that its ImageNet weights fit as they are. The stem is the same at every size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from structured_tickets.networks.registry import MODELS, register_model, require_size

if TYPE_CHECKING:
    from structured_tickets.networks.vision_transformer import VisionTransformer


@register_model("vit_tiny", stem="patch_embed.proj", classifier="head", family="vit")
def vit_tiny(num_classes: int = 100, img_size: int = 32, pretrained: bool = False) -> VisionTransformer:
    """ViT-Tiny for 32 pixels: width 192, 9 blocks, 3 heads, MLP 384; 2.7 million weights."""
    return _build("vit_tiny", pretrained, num_classes, img_size, embed_dim=192, depth=9, num_heads=3, mlp_ratio=2)


@register_model(
    "vit_small",
    stem="patch_embed.proj",
    classifier="head",
    family="vit",
    pretrained="vit_small_patch16_224.augreg_in21k_ft_in1k",
)
def vit_small(num_classes: int = 100, img_size: int = 32, pretrained: bool = False) -> VisionTransformer:
    """ViT-Small: width 384, 12 blocks, 6 heads, MLP 1,536; 21 million weights."""
    return _build("vit_small", pretrained, num_classes, img_size, embed_dim=384, depth=12, num_heads=6, mlp_ratio=4)


@register_model(
    "vit_base",
    stem="patch_embed.proj",
    classifier="head",
    family="vit",
    pretrained="vit_base_patch16_224.augreg_in21k_ft_in1k",
)
def vit_base(num_classes: int = 100, img_size: int = 32, pretrained: bool = False) -> VisionTransformer:
    """ViT-Base: width 768, 12 blocks, 12 heads, MLP 3,072; 85 million weights."""
    return _build("vit_base", pretrained, num_classes, img_size, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4)


@register_model(
    "vit_small_imagenet",
    stem="patch_embed.proj",
    classifier="head",
    family="vit",
    pretrained="vit_small_patch16_224.augreg_in21k_ft_in1k",
)
def vit_small_imagenet(num_classes: int = 1000, img_size: int = 224, pretrained: bool = False) -> VisionTransformer:
    """ViT-Small/16: width 384, 12 blocks, 6 heads, MLP 1,536; 22 million weights."""
    return _build_imagenet("vit_small_imagenet", pretrained, num_classes, img_size, 384, 12, 6)


@register_model(
    "vit_base_imagenet",
    stem="patch_embed.proj",
    classifier="head",
    family="vit",
    pretrained="vit_base_patch16_224.augreg_in21k_ft_in1k",
)
def vit_base_imagenet(num_classes: int = 1000, img_size: int = 224, pretrained: bool = False) -> VisionTransformer:
    """ViT-Base/16: width 768, 12 blocks, 12 heads, MLP 3,072; 86 million weights."""
    return _build_imagenet("vit_base_imagenet", pretrained, num_classes, img_size, 768, 12, 12)


@register_model(
    "vit_large_imagenet",
    stem="patch_embed.proj",
    classifier="head",
    family="vit",
    pretrained="vit_large_patch16_224.augreg_in21k_ft_in1k",
)
def vit_large_imagenet(num_classes: int = 1000, img_size: int = 224, pretrained: bool = False) -> VisionTransformer:
    """ViT-Large/16: width 1,024, 24 blocks, 16 heads, MLP 4,096; 304 million weights."""
    return _build_imagenet("vit_large_imagenet", pretrained, num_classes, img_size, 1024, 24, 16)


def _build_imagenet(
    name: str, pretrained: bool, num_classes: int, img_size: int, embed_dim: int, depth: int, num_heads: int
) -> VisionTransformer:
    require_size(name, img_size, multiple_of=16)
    return _build(
        name,
        pretrained,
        num_classes,
        img_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=4,
        patch_size=16,
        norm_eps=1e-6,
    )


def _build(
    name: str,
    pretrained: bool,
    num_classes: int,
    img_size: int,
    *,
    embed_dim: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float,
    patch_size: int = 4,
    norm_eps: float = 1e-5,
) -> VisionTransformer:
    from structured_tickets.networks.vision_transformer import VisionTransformer

    model = VisionTransformer(num_classes, img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, norm_eps)
    if pretrained:
        from structured_tickets.networks.pretrained import load_pretrained_weights

        load_pretrained_weights(model, MODELS[name].spec)
    return model
