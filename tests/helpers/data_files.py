"""Data sets in the layouts of their publishers, small, that tests make."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import struct
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torchvision.datasets
from PIL import Image

from helpers.images import noise, write_image


@pytest.fixture
def offline(monkeypatch):
    """No network; the list holds what was asked for."""
    asked = []

    def no_network(request, *args, **kwargs):
        asked.append(request.full_url)
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    return asked


@pytest.fixture
def tiny_imagenet(tmp_path):
    """The official archive, unpacked: two classes of ten images, and four to test."""
    folder = tmp_path / "tiny-imagenet-200"
    for name in ("n01", "n02"):
        for i in range(10):
            write_image(folder / "train" / name / "images" / f"{name}_{i}.JPEG", 64, 64)
        (folder / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t1\t1\n")
    for i in range(4):
        write_image(folder / "val" / "images" / f"val_{i}.JPEG", 64, 64)
    rows = [f"val_{i}.JPEG\tn0{2 - i % 2}\t0\t0\t1\t1\n" for i in range(4)]
    (folder / "val" / "val_annotations.txt").write_text("".join(rows))
    (folder / "wnids.txt").write_text("n02\nn01\n")
    (folder / "words.txt").write_text("n01\tcat\nn02\tdog\nn03\temu\n")
    return folder


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


def cifar_files(root, monkeypatch, name):
    """A tiny CIFAR in torchvision's layout, with its checksums told to torchvision's own check."""
    source = getattr(torchvision.datasets, name)
    fine = name == "CIFAR100"
    folder = root / source.base_folder
    folder.mkdir(parents=True)
    lists = {}
    for which in ("train_list", "test_list"):
        entries = []
        for file, _ in getattr(source, which):
            data = np.random.default_rng(len(file)).integers(0, 255, (20, 3072), dtype=np.uint8)
            labels = [k % (100 if fine else 10) for k in range(20)]
            (folder / file).write_bytes(pickle.dumps({"data": data, "fine_labels" if fine else "labels": labels}))
            entries.append([file, md5(folder / file)])
        lists[which] = entries
    meta = dict(source.meta)
    (folder / meta["filename"]).write_bytes(pickle.dumps({meta["key"]: [str(k) for k in range(100 if fine else 10)]}))
    meta["md5"] = md5(folder / meta["filename"])
    for key, value in {**lists, "meta": meta}.items():
        monkeypatch.setattr(source, key, value)
    return folder, source


def idx(array: np.ndarray) -> bytes:
    """An array of bytes as MNIST's files have it."""
    return struct.pack(f">{array.ndim + 1}i", 0x0800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """Forty training and ten test pictures as the four archives, of which torchvision is told the checksums."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 10)):
        for kind, array in (("images-idx3", noise(count, 28, 28)), ("labels-idx1", np.arange(count) % 10)):
            (raw / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
    names = [name for name, _ in torchvision.datasets.FashionMNIST.resources]
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "resources", [(n, md5(raw / n)) for n in names])
    return tmp_path


def encoded(pixels, format_) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format_)
    return buffer.getvalue()


def parquet_shard(file, labels, image="img", label="label", names=None, images=None) -> None:
    """A file as the hub has it: PNG images in a struct, and, if there are names, what `datasets` says about them."""
    files = images or [{"bytes": encoded(noise(32, 32, 3), "PNG"), "path": f"{k}.png"} for k in range(len(labels))]
    table = pyarrow.table({image: files, label: labels})
    if names:
        features = {label: {"names": list(names), "_type": "ClassLabel"}, image: {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, file)
