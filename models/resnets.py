"""The documents' import path of the ResNets for small images: see `structured_tickets.networks.resnets`."""

from structured_tickets.networks.resnets import resnet20, resnet56, wide_resnet32

__all__ = ["resnet20", "resnet56", "wide_resnet32"]
