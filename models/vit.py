"""The documents' import path of the Vision Transformers: see `structured_tickets.networks.vit`."""

from structured_tickets.networks.vit import (
    vit_base,
    vit_base_imagenet,
    vit_large_imagenet,
    vit_small,
    vit_small_imagenet,
    vit_tiny,
)

__all__ = ["vit_base", "vit_base_imagenet", "vit_large_imagenet", "vit_small", "vit_small_imagenet", "vit_tiny"]
