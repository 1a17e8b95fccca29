"""`structured_tickets.shrink`: the network without its pruned units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from structured_tickets.base.errors import BadType, BadValue, UsageError, first_line
from structured_tickets.interface.architectures import descriptions
from structured_tickets.interface.foreign import image_shape, in_plain_words, plain_copy, undisturbed, unwrapped
from structured_tickets.interface.masks import Masks
from structured_tickets.interface.rebuild import Way, differ, kept_of, logits_of, shapes_of, smallest
from structured_tickets.interface.ticket import Ticket, set_modes, with_ticket
from structured_tickets.interface.units import require_same
from structured_tickets.networks.attention import with_separate_heads
from structured_tickets.pruning.masks import Mask, check_mask
from structured_tickets.shrinking.inserted_layers import INSERTED
from structured_tickets.shrinking.shrink import masks_by_parameter
from structured_tickets.unit_groups.kinds import STREAM

ANY_WAY = (Way(), Way(followed=True), Way(channel_units=STREAM))


def shrink(
    model: nn.Module,
    masks: Masks | Mapping[str, Tensor],
    example_image: Tensor | Sequence[int] | None = None,
) -> nn.Module:
    """Return a smaller copy of a network, without the units that the structure prunes.

    It computes what the network would with `masks.apply_`: first everything outside the structure is set to zero, then
    what is zero is removed. Both are run on two random images, and have to give the same logits up to rounding. The
    model is not changed. Parameters keep their names (where some of them are left), number type, device and
    `requires_grad`, and layers their mode; hooks are not taken over.

    Args:
        model: The network; its units may be doomed, faded out or zero already.
        masks: What `structured_tickets.regroup` returned; or masks as the documented functions return them, with keys
            "<layer>", "<layer>.weight" or "<layer>.weight_mask".
        example_image: As in `structured_tickets.units`: what the network is tried on, and will be saved with. Default:
            what `units` was given, or, for a mapping, what the network says.

    Returns:
        A network to use, train and save like any other. A transformer, a network of streams, and one of whose units its
        layers do not tell, are of the model's own class; other convolutional networks are a `torch.fx.GraphModule`,
        whose attributes and methods other than its layers are gone. Its attribute `structured_ticket` is for `save`.

    Raises:
        BadType: An argument is of the wrong type (a TypeError).
        BadValue: The masks are another network's or not 0 and 1; the network cannot be followed or copied, or would
            compute something else (a ValueError).
    """
    network = unwrapped(model)
    structure, shape, heads, ways_of_finding = _structure(network, masks, example_image)
    with undisturbed(network), in_plain_words():
        hard = plain_copy(network)
        ways, name = descriptions(network, shape), f"{type(network).__module__}.{type(network).__qualname__}"
        hard = with_separate_heads(hard) if heads else hard
        _apply(hard, structure)
        trains = {n: p.requires_grad for n, p in hard.named_parameters()}
        modes = {n: m.training for n, m in hard.named_modules()}
        small, logits, way = _shrunk(hard, structure, shape, ways_of_finding)
        for parameter, value in small.named_parameters():
            value.requires_grad_(trains.get(parameter, True))
        ticket = Ticket(name, ways, shapes_of(hard), kept_of(structure), shape, logits.shape[1], heads, way._asdict())
        small = with_ticket(small, ticket)
        set_modes(small, modes)
    return small


def _structure(
    network: nn.Module, masks: object, example: Tensor | Sequence[int] | None
) -> tuple[Mask, tuple[int, int, int], bool, tuple[Way, ...]]:
    """The structured mask by parameter name, and the shape of an image.

    Also whether torch's attention is replaced, and how units were found: in several ways, if that is not known.

    Raises:
        BadType: They are neither `Masks` nor a mapping of tensors.
        BadValue: They are those of another network.
    """
    if isinstance(masks, Masks):
        require_same(masks.units, network, "the masks")
        shape = masks.units.image if example is None else image_shape(example, network)
        return masks.pair.structure, shape, bool(masks.units.attention), (masks.units.way,)
    if not isinstance(masks, Mapping):
        raise BadType(f"masks is a {type(masks).__name__}, neither what regroup returns nor a mapping of masks")
    try:
        check_mask(masks, "masks")
        structure = masks_by_parameter(network, masks)
    except (TypeError, ValueError) as error:
        raise (BadType if isinstance(error, TypeError) else BadValue)(str(error)) from None
    return structure, image_shape(example, network), False, ANY_WAY


def _shrunk(
    hard: nn.Module, structure: Mask, shape: tuple[int, int, int], ways: Sequence[Way]
) -> tuple[nn.Module, Tensor, Way]:
    """Return the smaller network, its logits of two random images, and in which of the ways units were found.

    Of several ways, the first that leaves nothing to be put in its place; else the one that leaves the fewest weights.

    Raises:
        BadValue: It computes something else.
        UsageError: It cannot be made smaller.
    """
    found: list[tuple[nn.Module, Tensor, Way]] = []
    first: UsageError | None = None
    for way in ways:
        try:
            small = smallest(hard, structure, shape, way)
            found.append((small, _require_same_logits(hard, small, shape), way))
            if len(list(small.parameters())) <= len(list(hard.parameters())) and not _moves(small):
                break
        except UsageError as error:
            first = first or error
        except Exception as error:  # whatever the network's code raises while it is recorded
            name, reason = type(hard).__name__, first_line(error)
            first = first or BadValue(f"{name} cannot be made smaller ({type(error).__name__}: {reason})")
    if not found:
        assert first is not None
        raise first
    return min(found, key=lambda one: sum(p.numel() for p in one[0].parameters()))


def _moves(network: nn.Module) -> bool:
    return any(isinstance(layer, INSERTED) for layer in network.modules())


@torch.no_grad()
def _apply(network: nn.Module, structure: Mapping[str, Tensor]) -> None:
    parameters = dict(network.named_parameters())
    for name, mask in structure.items():
        parameters[name].mul_(mask.to(parameters[name].device))


def _require_same_logits(hard: nn.Module, small: nn.Module, shape: Sequence[int]) -> Tensor:
    """Logits of two random images.

    Raises:
        BadValue: Those of the two networks differ, or are not finite.
    """
    name = type(hard).__name__
    try:
        found, wanted = (logits_of(network, shape) for network in (small, hard))
    except Exception as error:  # whatever the network's code raises
        raise BadValue(f"{name} cannot be computed on images of shape {tuple(shape)}: {first_line(error)}") from error
    if not isinstance(wanted, Tensor) or wanted.ndim != 2:
        raise BadValue(f"{name} does not give logits [batch, classes]")
    if not bool(wanted.isfinite().all()):
        raise BadValue(f"{name} gives logits that are not finite numbers")
    if difference := differ(found, wanted):
        raise BadValue(f"{name} cannot be made smaller: without the pruned units its logits differ by {difference:.2g}")
    return wanted
