"""Batches on the device: augmentation of whole batches, and loaders that can be taken up anywhere."""

from __future__ import annotations

import copy
import math
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from structured_tickets.base.device_memory import free_bytes
from structured_tickets.base.errors import DataError, MachineError, first_line
from structured_tickets.base.randomness import mixed_seed
from structured_tickets.data import auto_augment
from structured_tickets.data.decoded_images import LazyImages
from structured_tickets.data.image_sets import SPLIT_SEED, ImageSet, Splits
from structured_tickets.data.mixing import boxes_to_erase, erased
from structured_tickets.data.policies import NONE, slots_of

WORKER_DIED = "DataLoader worker"  # torch's words; there is no class for it
DEVICE_SHARE = 0.25  # of the memory that is free on the device, for one image set


def crop_and_flip(images: Tensor, offsets: Tensor, mirrored: Tensor, padding: int) -> Tensor:
    """Shift each image inside a border of zeros, and mirror some.

    Args:
        images: [batch, channels, size, size].
        offsets: int64 [batch, 2]: row and column of the crop's corner in the padded image, in [0, 2 * padding].
        mirrored: bool [batch], or integers, 0 or 1.

    Returns:
        [batch, channels, size, size] of the same type, in channels-last memory.
    """
    size = images.shape[-1]
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    row, column = (offsets.unsqueeze(2) + torch.arange(size, device=images.device)).unbind(1)
    to_the_other_end = torch.arange(size - 1, -size, -2, device=images.device)
    column = column + mirrored.unsqueeze(1) * to_the_other_end
    which = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[which, :, row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)


def even_sizes(count: int, most: int) -> list[int]:
    """Return how many images go into each of the fewest parts of at most `most`, which are as equal as can be."""
    parts = max(1, -(-count // most))
    return [count // parts + (k < count % parts) for k in range(parts)]


def repeated(order: Tensor, size: int, times: int) -> Tensor:
    """Return positions of as many images, each of the first ones so often in its batch (Hoffer et al. 2020).

    An image and its repetitions are not neighbours, so that mixup does not mix an image with itself.

    Args:
        order: int64 [images]; size: images of a batch.
    """
    if times == 1:
        return order
    batches, first = [], 0
    for left in range(len(order), 0, -size):
        own = min(size, left)
        different = -(-own // times)
        batches.append(order[first : first + different].repeat(times)[:own])
        first += different
    return torch.cat(batches)


@dataclass(frozen=True)
class Drawn:
    """The random choices of an epoch, made before it begins, on the CPU.

    Attributes:
        order: int64 [images]: positions in the image set.
        corners: int64 [images, 2]: row and column of each crop, in the order in which the images come.
        mirrored: [images], in the same order: bool, or integers, 0 or 1.
        boxes: int64 [images, 4]: see `boxes_to_erase`; all of them empty without random erasing.
        operations: int64 [images, slots]; amounts: float32 [images, slots]: see `auto_augment.drawn`.
    """

    order: Tensor
    corners: Tensor
    mirrored: Tensor
    boxes: Tensor
    operations: Tensor
    amounts: Tensor


class BatchLoader:
    """Iterates over an image set in batches of (float images in [0, 1], labels) on a device.

    What it yields is a function of (seed, round, epoch) alone, so that an interrupted epoch can be taken up anywhere.
    Images that fit are kept on the device; of others each batch comes over while the one before is computed on.

    Args:
        augment: Shuffle, and draw crops (padding an eighth of the side, 4 pixels at 32) and, if `flip`, mirrorings.
        erasing: With `augment`, the share of the images that lose a box.
        policy: With `augment`, a row of `POLICIES`.
        repeats: With `augment`, how often an image comes in its batch, each time augmented anew; so an epoch has only
            one in so many of the images.
        parts: Parts of a batch that are computed on one after another, where that is a matter of memory.

    Attributes:
        batch_size: Images of a batch, all parts of it.
        share: (k, n): of every batch, only the k-th of n parts, which are as equal as can be.
        ahead: Images of a batch that come before those of this share, with augmentation: for each part the one that is
            before the share in the whole batch, as mixing needs it; of a last batch with fewer parts, any.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        device: torch.device,
        *,
        augment: bool = False,
        flip: bool = False,
        seed: int = 0,
        erasing: float = 0.0,
        policy: str = NONE,
        repeats: int = 1,
        parts: int = 1,
    ) -> None:
        images = data.images.to(device) if isinstance(data.images, Tensor) and _fits(data.images, device) else None
        self.data = replace(data, images=data.images if images is None else images, labels=data.labels.to(device))
        self.device = device
        self.batch_size, self.parts = batch_size * parts, parts
        self.augment, self.flip, self.seed, self.erasing = augment, flip, seed, erasing
        self.policy, self.repeats = policy, repeats
        self.place = (0, 0)
        self.start = 0
        self.share = (0, 1)
        self.ahead = 0

    def __len__(self) -> int:
        return math.ceil(len(self.data) / self.batch_size)

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return self.data.images.shape[-1]

    def seek(self, state: int, epoch: int, start: int = 0) -> None:
        """Say which epoch of which round comes next, and the batch to begin with; the batch applies once."""
        self.place, self.start = (state, epoch), start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        start, self.start = self.start * self.batch_size, 0
        yield from self._augmented(start) if self.augment else self._plain(torch.arange(start, len(self.data)))

    def whole(self) -> BatchLoader:
        """The same loader, for whole batches."""
        loader = copy.copy(self)
        loader.share, loader.ahead = (0, 1), 0
        return loader

    def unchanged(self) -> BatchLoader:
        """The same images, in their own order, without crops and mirrorings."""
        loader = copy.copy(self)
        loader.augment = loader.flip = False
        loader.start = 0
        return loader.in_parts()

    def in_parts(self) -> BatchLoader:
        """The same loader, which takes each part of a batch for a batch."""
        loader = copy.copy(self)
        loader.batch_size, loader.parts = self.batch_size // self.parts, 1
        return loader

    def _parts(self, order: Tensor, ahead: int = 0) -> list[Tensor]:
        """This share of each batch of `order`; of each part of it, where it is computed on in parts."""
        k, n = self.share
        most, shares = self.batch_size // self.parts, []
        for batch in order.split(self.batch_size):
            parts = torch.arange(len(batch)).split(even_sizes(len(batch), most))
            own = [part.tensor_split(n)[k] for part in parts]
            before = [int(part[0]) - 1 if len(part) else -1 for part in own]
            first = torch.tensor((before + [-1] * ahead)[:ahead], dtype=torch.long)
            shares.append(batch[torch.cat([first, *own])])
        return shares

    def _plain(self, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        parts = self._parts(order)
        (labels,) = self._handed_out(parts, self.data.labels)
        for images, targets in zip(self._fetched(parts), labels, strict=True):
            yield images / 255, targets

    def _handed_out(self, parts: Sequence[Tensor], *values: Tensor) -> list[tuple[Tensor, ...]]:
        """The values at these positions, batch by batch, on the device.

        One transfer an epoch: a small one in each step would make the host wait for the device.
        """
        sizes = [len(part) for part in parts]
        where = torch.cat(list(parts)) if parts else torch.empty(0, dtype=torch.long)
        return [v[where.to(v.device)].to(self.device).split(sizes) for v in values]

    @property
    def padding(self) -> int:
        """Border of zeros in which crops are shifted, in pixels."""
        return self.image_size // 8

    @property
    def is_resident(self) -> bool:
        """True if all images lie on the device, and every batch is this process's own."""
        images = self.data.images
        return isinstance(images, Tensor) and images.device == self.device and self.share == (0, 1)

    def drawn(self) -> Drawn:
        """Return what the epoch that `seek` named draws; without augmentation, the images in their own order."""
        n = len(self.data)
        if not self.augment:
            nowhere = [torch.zeros(n, k, dtype=torch.long) for k in (2, 4, 0)]
            kept = torch.zeros(n, dtype=torch.bool)
            return Drawn(torch.arange(n), nowhere[0], kept, nowhere[1], nowhere[2], torch.zeros(n, 0))
        draw = torch.Generator().manual_seed(mixed_seed(self.seed, *self.place))
        order = torch.randperm(n, generator=draw)
        corners = torch.randint(0, 2 * self.padding + 1, (n, 2), generator=draw)
        mirrored = (torch.rand(n, generator=draw) < 0.5) & self.flip
        where = (self.image_size, self.seed, *self.place)
        boxes, changes = boxes_to_erase(n, self.erasing, *where), auto_augment.drawn(self.policy, n, *where)
        return Drawn(repeated(order, self.batch_size, self.repeats), corners, mirrored, boxes, *changes)

    @property
    def slots(self) -> int:
        """Operations of the policy that an image goes through."""
        return slots_of(self.policy) if self.augment else 0

    def _augmented(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = self.drawn()
        places = self._parts(torch.arange(start, len(self.data)), self.ahead)
        which = [epoch.order[part] for part in places]
        (labels,) = self._handed_out(which, self.data.labels)
        values = [getattr(epoch, entry.name) for entry in fields(Drawn)[1:]]
        for part, images, targets, *drawn in zip(
            which, self._fetched(which), labels, *self._handed_out(places, *values), strict=True
        ):
            yield self.finished(images, Drawn(part, *drawn)), targets

    @property
    def uses(self) -> list[str]:
        """Names of what `Drawn` has that batches depend on."""
        names = ["order"]
        if self.augment:
            names += ["corners", "mirrored", *["boxes"] * bool(self.erasing)]
            names += ["operations", "amounts"] * bool(self.slots)
        return names

    def finished(self, images: Tensor, drawn: Drawn) -> Tensor:
        """Return uint8 images [batch, 3, size, size] as float images in [0, 1], augmented where the loader does that.

        Args:
            drawn: What has been drawn for these images; what the loader does not use may be anything.
        """
        if self.augment:
            images = crop_and_flip(images, drawn.corners, drawn.mirrored, self.padding)
        if self.slots:
            images = auto_augment.augmented(images, drawn.operations, drawn.amounts)
            images = images.contiguous(memory_format=torch.channels_last)
        if self.augment and self.erasing:
            images = erased(images, drawn.boxes)
        return images / 255

    def _fetched(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """The uint8 images at these positions, batch by batch, on the device."""
        images = self.data.images
        if isinstance(images, Tensor) and images.device == self.device:
            (positions,) = self._handed_out(parts, torch.arange(len(images)))
            return (images[which] for which in positions)
        source = (
            images if isinstance(images, LazyImages) else LazyImages(images.__getitem__, torch.arange(len(images)), 0)
        )
        return _ahead(batch.to(self.device, non_blocking=True) for batch in _read(source, parts, self.device))

    def fixed_batches(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """The first `count` batches of a fixed permutation, part by part, without augmentation."""
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(SPLIT_SEED))
        return list(self.whole().in_parts()._plain(order[: count * self.batch_size]))


def _fits(images: Tensor, device: torch.device) -> bool:
    """Return whether the device has memory to spare for the images."""
    return device.type != "cuda" or images.numel() < DEVICE_SHARE * free_bytes(device)


def _read(images: LazyImages, parts: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Batches on the host, read by the images' own workers, in memory that a device can copy from by itself.

    Raises:
        DataError: A file cannot be read; the message names it.
        MachineError: A worker has died.
    """
    workers = min(images.workers, len(parts), os.cpu_count() or 1)
    loader: DataLoader[Tensor] = DataLoader(
        images,
        batch_sampler=[part.tolist() for part in parts],
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_stopping_to_the_first,
        generator=torch.Generator(),  # it draws, even without need: from the network's dropout, if nothing is given
    )
    batches: Iterator[Tensor] | None = None
    failure: DataError | MachineError
    try:
        with _unheard(signal.SIGTERM):  # by workers, from their first moment
            batches = iter(loader)
        yield from batches
        return
    except DataError as error:  # from a worker process it comes with that process's traceback
        failure = DataError(str(error).strip().rpartition("errors.DataError: ")[2])
        error.__traceback__ = None
    except RuntimeError as error:
        if WORKER_DIED not in str(error):
            raise
        failure = MachineError(
            f"argument --workers: a process that decodes images has died ({first_line(error)}). "
            "Fewer workers need less memory"
        )
        error.__traceback__ = None
    # The workers end when nothing refers to their iterator any more. A caller may keep the error, so neither its
    # frames nor those of torch's error, which are a cycle, may hold the iterator.
    batches = None
    raise failure


def _leave_stopping_to_the_first(worker: int) -> None:
    """A signal that all processes get (of torchrun, of a batch system) must not end those that the last step needs."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _unheard(number: int) -> Iterator[None]:
    """Block a signal inside the context. Processes started meanwhile inherit the block and never receive it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _as_it_is(batch: Any) -> Any:
    return batch


def _ahead(batches: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same batches, each asked for before the one ahead of it is used up."""
    waiting = next(batches, None)
    while waiting is not None:
        current, waiting = waiting, next(batches, None)
        yield current


Loaders = tuple[BatchLoader, BatchLoader, BatchLoader]


def make_loaders(
    splits: Splits,
    batch_size: int,
    device: torch.device,
    flip: bool,
    seed: int = 0,
    **more: Any,
) -> Loaders:
    """Train (augmented), validation and test loaders; `more`: of the first, see `BatchLoader`."""
    train = BatchLoader(splits.train, batch_size, device, augment=True, flip=flip, seed=seed, **more)
    return train, BatchLoader(splits.val, batch_size, device), BatchLoader(splits.test, batch_size, device)
