"""The record of a run's images and labels, by which it recognises them, or names the difference."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from structured_tickets.data.decoded_images import LazyImages
from structured_tickets.data.image_sets import ImageSet
from structured_tickets.data.loader import BatchLoader

PARTS = ("training", "validation", "test")
# Bytes of images of which every pixel is hashed; of larger sets a sample is, and the files' names and sizes.
MOST_BYTES = 2**31
FEW = 3  # differences that are named

Record = dict[str, Any]


def fingerprint(*loaders: BatchLoader) -> str:
    """A hash of the images and labels: of all pixels, or of a sample and the files' names and sizes."""
    digest = hashlib.sha256()
    for loader in loaders:
        digest.update(loader.data.digest())
    return digest.hexdigest()[:16]


def describe_data(loaders: Sequence[BatchLoader], classes: Sequence[str]) -> Record:
    """Part -> number of images, hash of the files' names, and for each class its number of images and two hashes.

    The hashes of a class are those of the places that its images have in the part, and of their pixels ("" where
    reading all of them would take too long).
    """
    return {part: _describe_part(loader.data, classes) for part, loader in zip(PARTS, loaders, strict=True)}


def _describe_part(data: ImageSet, classes: Sequence[str]) -> Record:
    found: Record = {}
    labels = data.labels.cpu()
    readable = data.images.numel() if isinstance(data.images, Tensor) else _bytes_at_hand(data.images)
    values, counts = labels.sort().values.unique_consecutive(return_counts=True)
    places_of = labels.argsort(stable=True).split(counts.tolist())
    for label, places in zip(values.tolist(), places_of, strict=True):
        name = _name_of(label, classes)
        pixels = _pixels(data, places) if 0 < readable <= MOST_BYTES else ""
        found[name] = [len(places), _hash(places), pixels]
    return {"images": len(data), "files": data.origin, "classes": found}


def _name_of(label: int, classes: Sequence[str]) -> str:
    name = classes[label] if label < len(classes) else ""
    return name if name and classes.count(name) == 1 else f"{name} ({label})"


def _bytes_at_hand(images: LazyImages) -> int:
    """Bytes of images that are decoded already; 0 if they are not."""
    return 0 if images.workers else images.shape.numel()


def _pixels(data: ImageSet, places: Tensor) -> str:
    digest = hashlib.sha256()
    for some in places.split(1024):
        digest.update(_bytes(data.images[some.to(data.labels.device)]))
    return digest.hexdigest()[:16]


def _hash(values: Tensor) -> str:
    return hashlib.sha256(_bytes(values)).hexdigest()[:16]


def _bytes(values: Tensor) -> bytes:
    return values.cpu().numpy().tobytes()


def difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the difference between two descriptions in words; empty if nothing is, or one of them is empty."""
    if not then or not now:
        return ""
    found = [text for part in PARTS for text in _differences(part, then[part], now[part])]
    more = f"; and {len(found) - FEW} more" if len(found) > FEW else ""
    return "; ".join(found[:FEW]) + more


def _differences(part: str, then: Record, now: Record) -> list[str]:
    found, ours = [], now["classes"]
    for name, (count, _, pixels) in then["classes"].items():
        here, _, seen = ours.get(name, (0, "", ""))
        if count != here:
            found.append(f"{part} images of class {name}: {count:,} before, {here:,} now")
        elif pixels and seen and pixels != seen:
            found.append(f"{part} images of class {name} look different")
    found += [f"{part} images of class {n}: 0 before, {ours[n][0]:,} now" for n in ours if n not in then["classes"]]
    moved = [name for name, (_, places, _) in then["classes"].items() if places != ours.get(name, (0, "", ""))[1]]
    if not found and moved:
        found.append(f"{part} images of class {moved[0]} are in a different order")
    if not found and then["files"] != now["files"]:
        found.append(f"{part} images: files have other names or sizes")
    return found


def without_pixels(record: Record) -> Record:
    """Return the part of a record that does not depend on whether the images are decoded already."""
    return {
        part: {**about, "classes": {name: row[:2] for name, row in about["classes"].items()}}
        for part, about in record.items()
    }


def completed(now: Record, then: Mapping[str, Any]) -> Record:
    """`now`, with hashes of pixels from `then` where it has none. The two do not differ."""
    for part, about in then.items():
        for name, row in about["classes"].items():
            ours = now[part]["classes"][name]
            ours[2] = ours[2] or row[2]
    return now


def is_record(value: Any) -> bool:
    """Return whether a value can be such a description, or none."""
    if value == {}:
        return True
    return isinstance(value, dict) and all(_is_part(value.get(part)) for part in PARTS)


def _is_part(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("images"), int):
        return False
    classes = value.get("classes")
    rows = classes.values() if isinstance(classes, dict) else [None]
    return isinstance(value.get("files"), str) and all(
        isinstance(row, list | tuple) and [type(v) for v in row] == [int, str, str] for row in rows
    )
