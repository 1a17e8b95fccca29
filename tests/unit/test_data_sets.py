"""The data sets, on small files that the tests make: what is read from them, and how each fault is named."""

from __future__ import annotations

import importlib
import io
import logging
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers.commands import ROOT, tiny
from helpers.data_files import cifar_files, encoded, idx, md5, parquet_shard
from helpers.images import noise, write_image
from PIL import Image

import main_imp_fillback
from structured_tickets.base.errors import DataError
from structured_tickets.data import catalog as dataset
from structured_tickets.data.catalog import DATASETS, load_splits
from structured_tickets.data.image_sets import CIFAR10_CLASSES, channel_statistics, split_indices

NOISE = np.random.default_rng(0)
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)


def refused(name, data, sentence) -> None:
    """Loading fails with one line that matches the sentence."""
    with pytest.raises(DataError, match=sentence) as caught:
        load_splits(name, data)
    assert "\n" not in str(caught.value)


# ---- split and statistics


@pytest.mark.parametrize("n", [10, 1437, 50000])
def test_validation_is_disjoint_fixed_and_a_tenth(n):
    rest, held_out = split_indices(n)
    assert len(held_out) == round(n * 0.1) and len(rest) + len(held_out) == n
    assert torch.equal(torch.cat([rest, held_out]).sort().values, torch.arange(n))
    assert torch.equal(held_out, split_indices(n)[1])


def test_statistics_are_those_of_the_pixels():
    images = torch.randint(0, 256, (9, 3, 4, 4), dtype=torch.uint8)
    mean, std = channel_statistics(images)
    pixels = images.double().div(255).transpose(0, 1).flatten(1)
    assert mean == pytest.approx(pixels.mean(1).tolist())
    assert std == pytest.approx(pixels.std(1, unbiased=False).tolist())
    assert channel_statistics(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))[1] == (1, 1, 1)


@pytest.mark.parametrize("name", DATASETS)
def test_every_row_has_its_reader(name, tmp_path):
    load = DATASETS[name].load
    closure = dict(zip(load.__code__.co_freevars, load.__closure__ or (), strict=True))
    if "module" not in closure:
        return  # a function of its own
    module = importlib.import_module(closure["module"].cell_contents)
    assert callable(getattr(module, f"read_{closure['name'].cell_contents}"))


# ---- digits


def test_train_validation_and_test_digits_are_disjoint():
    import sklearn.datasets

    splits = load_splits("digits", "unused", 8)
    sizes = [len(s) for s in (splits.train, splits.val, splits.test)]
    assert sum(sizes) == 1797 and sizes == [1294, 144, 359]
    pictures = [{bytes(i.numpy().tobytes()) for i in s.images} for s in (splits.train, splits.val, splits.test)]
    whole = sklearn.datasets.load_digits().images
    duplicates = len(whole) - len(np.unique(whole.reshape(len(whole), -1), axis=0))
    assert sum(len(p) for p in pictures) >= 1797 - duplicates
    assert not pictures[0] & pictures[2] and not pictures[0] & pictures[1] and not pictures[1] & pictures[2]
    assert len(torch.cat([splits.train.labels, splits.test.labels]).unique()) == 10


# ---- imagefolder


@pytest.fixture
def photos(tmp_path):
    for part, count in (("train", 10), ("test", 3)):
        for name in ("cat", "dog", "emu"):
            for i in range(count):
                write_image(tmp_path / "photos" / part / name / f"{i}.png", height=20 + i)
    return tmp_path / "photos"


def test_an_image_folder_is_split_resized_and_labelled(photos):
    splits = load_splits("imagefolder", photos, 16)
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [27, 3, 9]
    assert splits.train.images.shape[1:] == (3, 16, 16) and splits.train.images.dtype == torch.uint8
    assert splits.classes == ("cat", "dog", "emu")
    assert splits.test.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    everything = torch.cat([splits.train.labels, splits.val.labels])
    assert everything.bincount().tolist() == [10, 10, 10]


def test_wrong_image_folders_are_named(photos, tmp_path):
    refused(
        "imagefolder",
        tmp_path / "nothing",
        "nothing does not exist; expected: .* in the folder given by --data",
    )
    (photos / "train" / "cat" / "0.png").write_bytes(b"not an image")
    refused("imagefolder", photos, r"cannot read the image .*cat/0\.png: no known format$")
    (photos / "train" / "cat" / "0.png").unlink()
    (photos / "train" / "cat" / "1.png").rename(photos / "whole.png")
    (photos / "train" / "cat" / "1.png").write_bytes((photos / "whole.png").read_bytes()[:700])
    refused("imagefolder", photos, r"cannot read the image .*cat/1\.png: .*truncated")
    (photos / "train" / "cat" / "1.png").unlink()
    (photos / "train" / "cat" / "0.png").symlink_to(tmp_path / "gone.png")
    refused("imagefolder", photos, r"cannot read the image .*cat/0\.png: No such file")
    (photos / "train" / "cat" / "0.png").unlink()
    (photos / "train" / "fox").mkdir()
    refused("imagefolder", photos, r"no image files for fox")
    (photos / "train" / "fox").rmdir()
    (photos / "test" / "dog").rename(photos / "test" / "yak")
    refused("imagefolder", photos, r"photos/test has classes that .*photos/train lacks: yak$")


def test_an_own_folder_without_test_images_of_a_class_is_read_with_a_warning(photos, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("rsst"), "propagate", True)
    (photos / "test" / "dog").rename(photos / "dog")
    splits = load_splits("imagefolder", photos, 8)
    assert splits.test.labels.tolist() == [0] * 3 + [2] * 3 and len(splits.classes) == 3
    assert "photos/test has no images of dog, so the test accuracy does not cover them" in caplog.text
    (photos / "test" / "dog").mkdir()
    refused("imagefolder", photos, "no image files for dog")


def test_the_program_runs_on_an_image_folder(photos, tmp_path):
    words = tiny(tmp_path / "run", dataset="imagefolder", data=photos, image_size=16, batch_size=8)
    assert main_imp_fillback.main([str(w) for w in words]) == 0
    assert main_imp_fillback.main(["--dataset", "imagefolder", "--data", str(tmp_path)]) == 3


# ---- tiny-imagenet


def test_tiny_imagenet_in_its_official_layout(tiny_imagenet, tmp_path):
    train, held_out, test = dataset.tiny_imagenet_dataloaders(4, str(tmp_path))
    assert (len(train.data), len(held_out.data), len(test.data)) == (18, 2, 4)
    assert test.data.labels.tolist() == [1, 0, 1, 0]
    assert test.data.images.shape[-1] == 64
    assert load_splits("tiny-imagenet", tiny_imagenet).test.labels.tolist() == [1, 0, 1, 0]
    assert load_splits("tiny-imagenet", tmp_path).mean == (0.4802, 0.4481, 0.3975)


@pytest.mark.parametrize("below", ["", "images"])
def test_tiny_imagenet_with_a_sorted_validation_folder_is_the_same(below, tiny_imagenet, tmp_path):
    official = load_splits("tiny-imagenet", tmp_path).test
    val = tiny_imagenet / "val"
    for i in range(4):
        target = val / f"n0{2 - i % 2}" / below / f"val_{i}.JPEG"
        target.parent.mkdir(parents=True, exist_ok=True)
        (val / "images" / f"val_{i}.JPEG").rename(target)
    (val / "images").rmdir()  # scripts that sort it leave val_annotations.txt where it is
    sorted_ = load_splits("tiny-imagenet", tmp_path).test
    assert sorted_.labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(sorted_.images, official.images[torch.tensor([1, 3, 0, 2])])


def test_a_packed_tiny_imagenet_is_to_be_unpacked(tmp_path):
    (tmp_path / "tiny-imagenet-200.zip").write_bytes(b"PK")
    sentence = r"tiny-imagenet-200\.zip is still packed. Unpack it"
    refused("tiny-imagenet", tmp_path, sentence)
    refused("tiny-imagenet", tmp_path / "tiny-imagenet-200.zip", sentence)
    refused("tiny-imagenet", tmp_path / "nothing", "nothing/train does not exist")


def test_faults_of_tiny_imagenet_are_named(tiny_imagenet, tmp_path):
    val = tiny_imagenet / "val"
    rows = (val / "val_annotations.txt").read_text()

    def with_rows(text, sentence):
        (val / "val_annotations.txt").write_text(text)
        refused("tiny-imagenet", tmp_path, sentence)

    with_rows(rows + "val_9.JPEG\tn01\n", r"val/images has no val_9\.JPEG, which val_annotations\.txt lists")
    with_rows(
        rows + "val_3.JPEG n01\n", r"val_annotations\.txt has the line 'val_3.JPEG n01'. Expected: <file><tab><class>"
    )
    with_rows(rows + "val_0.JPEG\tn09\n", r"val has classes that .*train lacks: n09$")
    with_rows(rows.replace("n01", "n02"), r"val has no images of n01. Expected: images of each of 2 classes")
    (val / "val_annotations.txt").write_bytes(b"\xff\xfe")
    refused("tiny-imagenet", tmp_path, r"cannot read .*val_annotations\.txt: .*utf-8")
    (val / "val_annotations.txt").unlink()
    refused("tiny-imagenet", tmp_path, r"val/images is not sorted by class and .*val_annotations\.txt is missing")
    (val / "val_annotations.txt").write_text(rows)
    (tiny_imagenet / "wnids.txt").write_text("n01\nn02\nn03\n")
    refused("tiny-imagenet", tmp_path, r"train has no folder of n03, which wnids\.txt lists")


# ---- imagenet


@pytest.fixture
def imagenet(tmp_path):
    for part, count in (("train", 10), ("val", 2)):
        for name in ("n01", "n02"):
            for i in range(count):
                write_image(tmp_path / part / name / f"{name}_{i}.JPEG", 40 + i, 50)
    return tmp_path


def test_imagenet_has_its_statistics_and_val_is_the_test_set(imagenet):
    splits = load_splits("imagenet", imagenet)
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [18, 2, 4]
    assert splits.train.images.shape[1:] == (3, 224, 224)
    assert (splits.mean, splits.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert splits.classes == ("n01", "n02") and splits.test.labels.tolist() == [0, 0, 1, 1]
    assert [len(loader.data) for loader in dataset.imagenet_dataloaders(4, str(imagenet))] == [18, 2, 4]


def test_imagenet_as_kaggle_packs_it(imagenet):
    inner = imagenet / "ILSVRC" / "Data" / "CLS-LOC"
    inner.mkdir(parents=True)
    for part in ("train", "val"):
        (imagenet / part).rename(inner / part)
    assert len(load_splits("imagenet", imagenet, 32).test) == 4


def test_faults_of_imagenet_are_named(imagenet):
    (imagenet / "val" / "n02").rename(imagenet / "n02")
    refused("imagenet", imagenet, r"val has no images of n02. Expected: images of each of 2 classes")
    (imagenet / "n02").rename(imagenet / "val" / "n03")
    refused("imagenet", imagenet, r"val has no images of n02")
    (imagenet / "val" / "n03").rename(imagenet / "val" / "n02")
    write_image(imagenet / "val" / "n04" / "0.JPEG")
    refused("imagenet", imagenet, r"val has classes that .*train lacks: n04")
    write_image(imagenet / "val" / "ILSVRC2012_val_00000001.JPEG")
    flat = (
        r"every image in .*val must be in a class folder \(.*val/<class>/\), but ILSVRC2012_val_00000001\.JPEG is not"
    )
    refused("imagenet", imagenet, flat)
    refused("imagenet", imagenet / "val", r"val/train does not exist")


# ---- torchvision's layouts


@pytest.mark.parametrize("name, source, classes", [("cifar10", "CIFAR10", 10), ("cifar100", "CIFAR100", 100)])
def test_cifar_from_a_local_folder(name, source, classes, tmp_path, monkeypatch):
    cifar_files(tmp_path, monkeypatch, source)
    splits = load_splits(name, tmp_path)
    total = 100 if name == "cifar10" else 20
    assert (len(splits.train), len(splits.val), len(splits.test)) == (total * 9 // 10, total // 10, 20)
    assert len(splits.classes) == classes
    loaders = getattr(dataset, f"{name}_dataloaders")(8, str(tmp_path))
    images, labels = next(iter(loaders[0]))
    assert images.shape == (8, 3, 32, 32) and float(images.min()) >= 0 and float(images.max()) <= 1
    assert labels.dtype == torch.int64


def test_cifar_from_a_local_archive(tmp_path, monkeypatch):
    folder, source = cifar_files(tmp_path / "made", monkeypatch, "CIFAR10")
    (tmp_path / "data").mkdir()
    archive = tmp_path / "data" / source.filename
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, source.base_folder)
    monkeypatch.setattr(source, "tgz_md5", md5(archive))
    assert len(load_splits("cifar10", tmp_path / "data").test) == 20


def test_a_broken_archive_without_network_says_what_to_put_where(tmp_path, offline):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"broken")
    refused("cifar10", tmp_path, r"Expected: .*cifar-10-python\.tar\.gz \(md5 c58f3010")
    assert main_imp_fillback.main(["--dataset", "cifar10", "--data", str(tmp_path)]) == 3


def test_labels_that_torchvision_does_not_check_are_checked(tmp_path, monkeypatch):
    folder, source = cifar_files(tmp_path, monkeypatch, "CIFAR10")
    (folder / "test_batch").write_bytes(pickle.dumps({"data": noise(20, 3072), "labels": [10] * 20}))
    monkeypatch.setattr(source, "test_list", [["test_batch", md5(folder / "test_batch")]])
    refused("cifar10", tmp_path, r"test labels of CIFAR10 under .* has values from 10 to 10. Expected: 0 to 9")


def test_fashion_mnist_becomes_colour_images_with_statistics_of_its_own(fashion, offline):
    splits = load_splits("fashionmnist", fashion)
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [36, 4, 10]
    images = splits.train.images
    assert images.shape[1:] == (3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    assert (splits.mean, splits.std) == channel_statistics(images)
    assert splits.classes[:2] == ("T-shirt/top", "Trouser") and splits.test.labels.tolist() == list(range(10))
    assert DATASETS["fashionmnist"].flip and offline == []
    assert [len(loader.data) for loader in dataset.fashionmnist_dataloaders(4, str(fashion))] == [36, 4, 10]
    unpacked = fashion / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte"
    small = torch.from_numpy(np.frombuffer(unpacked.read_bytes(), np.uint8, offset=16).reshape(10, 28, 28).copy())
    assert torch.equal(load_splits("fashionmnist", fashion, 28).test.images[:, 1], small)


def test_faults_of_fashion_mnist_are_named(fashion, tmp_path, offline):
    where = r"Expected: in .*FashionMNIST/raw the files train-images-idx3-ubyte\.gz \(md5 [0-9a-f]{32}\), .*t10k"
    refused("fashionmnist", tmp_path / "nothing", r"FashionMNIST: no complete copy under .*no network.*" + where)
    load_splits("fashionmnist", fashion)
    images = fashion / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    content = images.read_bytes()
    asked = len(offline)
    images.write_bytes(content[:-1])
    refused("fashionmnist", fashion, r"FashionMNIST under .* is damaged \(.*\). Replace it. Expected: in ")
    images.write_bytes(idx(noise(39, 28, 28)))
    refused("fashionmnist", fashion, r"training labels of FashionMNIST .* is int64 \[40\]. Expected: 39 whole numbers")
    assert len(offline) == asked


# ---- cifar as npz


def labels_of(count, classes=10):
    return np.arange(count) % classes


def plain_arrays(classes=10) -> dict[str, np.ndarray]:
    """The arrays of a small set: two training images of each class, one to test."""
    n = classes
    return {
        "x_train": noise(2 * n, 32, 32, 3),
        "y_train": labels_of(2 * n, n).reshape(-1, 1),
        "x_test": noise(n, 32, 32, 3),
        "y_test": labels_of(n, n).astype(np.uint8),
    }


def packed_arrays() -> dict[str, np.ndarray]:
    """The same as files in one array of bytes; training and test images take turns."""
    files = [encoded(noise(32, 32, 3), "JPEG") for _ in range(40)]
    return {
        "jpeg": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
        "labels": (np.arange(40) // 2 % 10).astype(np.uint8),
        "split": (np.arange(40) % 2).astype(np.uint8),
        "classes": np.array([f"class {k}" for k in range(10)]),
    }


@pytest.mark.parametrize("name, classes", [("cifar10", 10), ("cifar100", 100)])
@pytest.mark.parametrize("named", [True, False])
def test_cifar_from_an_npz_of_arrays(name, classes, named, tmp_path, offline):
    arrays = plain_arrays(classes)
    np.savez(tmp_path / f"{name}.npz", **arrays)
    splits = load_splits(name, tmp_path / f"{name}.npz" if named else tmp_path)
    rest, held_out = split_indices(2 * classes)
    pixels = torch.from_numpy(arrays["x_train"]).permute(0, 3, 1, 2)
    assert torch.equal(splits.train.images, pixels[rest]) and torch.equal(splits.val.images, pixels[held_out])
    assert torch.equal(splits.train.labels, rest % classes) and splits.test.labels.tolist() == list(range(classes))
    assert splits.test.labels.dtype == torch.int64
    assert splits.classes == (CIFAR10_CLASSES if name == "cifar10" else tuple(str(k) for k in range(100)))
    assert splits.mean == (CIFAR10_MEAN if name == "cifar10" else (0.5071, 0.4866, 0.4409))
    assert load_splits(name, tmp_path, 16).test.images.shape == (classes, 3, 16, 16)
    assert offline == []


def test_cifar_from_an_npz_of_packed_files(tmp_path):
    arrays = packed_arrays()
    np.savez_compressed(tmp_path / "some name.npz", **arrays)
    splits = load_splits("cifar10", tmp_path / "some name.npz")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (18, 2, 20)
    assert splits.test.labels.tolist() == [k % 10 for k in range(20)] and splits.classes[3] == "class 3"
    content = arrays["jpeg"][arrays["offsets"][3] : arrays["offsets"][4]].tobytes()
    pixels = np.array(Image.open(io.BytesIO(content)))
    assert torch.equal(splits.test.images[1], torch.from_numpy(pixels).permute(2, 0, 1))


def test_a_local_file_wins_over_torchvisions_layout(tmp_path, monkeypatch):
    cifar_files(tmp_path, monkeypatch, "CIFAR10")
    np.savez(tmp_path / "cifar100.npz", **plain_arrays(100))
    assert len(load_splits("cifar10", tmp_path).train) == 90
    np.savez(tmp_path / "cifar10.npz", **plain_arrays())
    assert len(load_splits("cifar10", tmp_path).train) == 18


class Trap:
    """What a pickle must not be able to do."""

    def __reduce__(self):
        return Path.touch, (Path("trapped"),)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (
            {"y_test": None},
            r"cifar10\.npz has no y_test. Expected: x_train, y_train, x_test, y_test, or jpeg, offsets",
        ),
        (
            {"x_train": np.zeros((20, 3, 32, 32), np.uint8)},
            r"x_train is uint8 \[20, 3, 32, 32\]. Expected: uint8 \[n, 32, 32, 3\]",
        ),
        ({"x_test": np.zeros((10, 32, 32, 3))}, r"x_test is float64 \[10, 32, 32, 3\]. Expected: uint8"),
        ({"y_train": labels_of(19)}, r"y_train is int64 \[19\]. Expected: 20 whole numbers, one per image"),
        ({"y_train": labels_of(20) / 2}, r"y_train is float64 \[20\]. Expected: 20 whole numbers"),
        ({"y_train": np.eye(10)[labels_of(20)]}, r"y_train is float64 \[20, 10\]. Expected: 20 whole numbers"),
        ({"y_train": labels_of(20) + 1}, r"y_train has values from 1 to 10. Expected: 0 to 9"),
        ({"y_test": labels_of(10) - 1}, r"y_test has values from -1 to 8. Expected: 0 to 9"),
        (
            {"y_test": labels_of(10, 9)},
            r"the test set of .*cifar10\.npz has no images of truck. Expected: images of each of 10 classes",
        ),
        ({"y_train": labels_of(20, 4)}, r"training set .* has no images of deer, dog, frog, horse, ship and 1 more"),
        (
            {"x_train": np.zeros((0, 32, 32, 3), np.uint8), "y_train": labels_of(0)},
            r"training set .* has no images of airplane",
        ),
        ({"classes": np.array(["cat", "dog"])}, r"cifar10\.npz names 2 classes, but cifar10 has 10"),
        ({"classes": np.arange(10)}, r"classes is int64 \[10\]. Expected: 10 names"),
        ({"classes": np.array([Trap()] * 10)}, r"cannot read .*cifar10\.npz as npz: Object arrays cannot be loaded"),
    ],
)
def test_faults_of_arrays_are_named(changes, sentence, tmp_path, monkeypatch, offline):
    monkeypatch.chdir(tmp_path)
    arrays = {name: array for name, array in {**plain_arrays(), **changes}.items() if array is not None}
    np.savez(tmp_path / "cifar10.npz", **arrays)
    refused("cifar10", tmp_path, sentence)
    assert offline == [] and not Path("trapped").exists()


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"split": None}, r"has no split. Expected: x_train"),
        ({"jpeg": np.zeros(9)}, r"jpeg is float64 \[9\]. Expected: uint8 \[bytes\]"),
        (
            {"jpeg": np.zeros(9, np.uint8)},
            r"offsets is int64 \[41\]. Expected: n \+ 1 ascending positions in the 9 bytes of jpeg",
        ),
        ({"offsets": np.array([0, 9, 8])}, r"offsets is int64 \[3\]. Expected: n \+ 1 ascending"),
        ({"offsets": np.array([], int)}, r"offsets is int64 \[0\]"),
        ({"offsets": np.array([0.0, 8.0])}, r"offsets is float64 \[2\]"),
        ({"labels": labels_of(39)}, r"labels is int64 \[39\]. Expected: 40 whole numbers"),
        ({"split": np.full(40, 2)}, r"split has values from 2 to 2. Expected: 0 to 1"),
        (
            {"split": np.zeros(40, int)},
            r"test set .* has no images of class 0, class 1, class 2, class 3, class 4 and 5 more",
        ),
    ],
)
def test_faults_of_packed_files_are_named(changes, sentence, tmp_path):
    arrays = {name: array for name, array in {**packed_arrays(), **changes}.items() if array is not None}
    np.savez(tmp_path / "cifar10.npz", **arrays)
    refused("cifar10", tmp_path, sentence)


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"nothing", r"cannot read the image 3 of .*cifar10\.npz: no known format$"),
        (encoded(noise(32, 32, 3), "JPEG")[:-400], r"cannot read the image 3 of .*cifar10\.npz: .*truncated"),
        (encoded(noise(32, 48, 3), "PNG"), r"image 3 of .*cifar10\.npz has 48x32 pixels. Expected: 32x32"),
    ],
)
def test_a_bad_image_in_a_packed_file_is_named(content, sentence, tmp_path):
    arrays = packed_arrays()
    bounds = arrays["offsets"].tolist()
    files = [arrays["jpeg"][bounds[k] : bounds[k + 1]].tobytes() for k in range(40)]
    files[3] = content
    arrays.update(jpeg=np.frombuffer(b"".join(files), np.uint8), offsets=np.cumsum([0, *map(len, files)]))
    np.savez(tmp_path / "cifar10.npz", **arrays)
    refused("cifar10", tmp_path, sentence)


def test_damaged_and_missing_npz_files_are_named_and_nothing_is_downloaded(tmp_path, offline):
    file = tmp_path / "cifar10.npz"
    np.savez_compressed(file, **plain_arrays())
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b"", pickle.dumps(Trap())):
        file.write_bytes(damaged)
        refused("cifar10", tmp_path, r"cifar10\.npz is no npz file, or was cut short$")
    torn = bytearray(content)
    torn[200:5000] = bytes(4800)
    file.write_bytes(torn)
    refused("cifar10", tmp_path, r"cannot read .*cifar10\.npz as npz: ")
    refused("cifar10", tmp_path / "gone.npz", r"there is no file .*gone\.npz$")
    (tmp_path / "cifar.tar.gz").write_bytes(b"")
    refused(
        "cifar10", tmp_path / "cifar.tar.gz", r"cifar\.tar\.gz is one file, but not npz. --data takes an \.npz file"
    )
    assert offline == []


def test_the_program_runs_on_an_npz_file_and_refuses_a_broken_one(tmp_path, capsys):
    file = tmp_path / "cifar10.npz"
    np.savez(file, **plain_arrays())
    words = {"dataset": "cifar10", "data": file, "image_size": 8, "batch_size": 8, "pruning_times": 1}
    assert main_imp_fillback.main(tiny(tmp_path / "run", **words)) == 0
    file.write_bytes(file.read_bytes()[:-100])
    assert main_imp_fillback.main(tiny(tmp_path / "broken", **words)) == 3
    assert "cifar10.npz is no npz file, or was cut short" in capsys.readouterr().err


def test_the_shared_file_has_the_layout_that_is_read():
    """Its arrays are looked at, its first images decoded: all 60,000 take seconds. Needs ../shared."""
    from structured_tickets.data import table_sets as image_tables

    file = ROOT.parent / "shared" / "data" / "cifar10_jpeg.npz"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    arrays = image_tables._arrays(file)
    assert {name: len(arrays[name]) for name in ("offsets", "labels", "split", "classes")} == {
        "offsets": 60_001,
        "labels": 60_000,
        "split": 60_000,
        "classes": 10,
    }
    first = {**arrays, **{name: arrays[name][:200] for name in ("labels", "split")}, "offsets": arrays["offsets"][:201]}
    train, test = image_tables._packed_parts(file, first, 10)
    assert len(train[0]) + len(test[0]) == 200 and train[0].shape[1:] == (3, 32, 32)
    assert tuple(arrays["classes"]) == CIFAR10_CLASSES


# ---- cifar as parquet


@pytest.mark.parametrize(
    "folder, train, test",
    [
        ("plain_text", ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], "test-00000-of-00001.parquet"),
        ("", ["train-0.parquet", "train-1.parquet"], "test-0.parquet"),
        ("data", ["train.parquet"], "test.parquet"),
    ],
)
def test_cifar10_from_parquet(folder, train, test, tmp_path, offline):
    for file in train:
        parquet_shard(tmp_path / folder / file, labels_of(20))
    parquet_shard(tmp_path / folder / test, labels_of(10), image="image")
    splits = load_splits("cifar10", tmp_path)
    n = 20 * len(train)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (n * 9 // 10, n // 10, 10)
    assert splits.classes == CIFAR10_CLASSES and splits.mean == CIFAR10_MEAN
    row = pyarrow.parquet.read_table(tmp_path / folder / test).column("image")[4].as_py()
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(row["bytes"])))).permute(2, 0, 1)
    assert torch.equal(splits.test.images[4], pixels) and splits.test.labels.tolist() == list(range(10))
    assert len(load_splits("cifar10", tmp_path / folder).test) == 10
    assert offline == []


@pytest.mark.parametrize("label, names", [("fine_label", [f"class {k}" for k in range(100)]), ("label", None)])
def test_cifar100_from_parquet(label, names, tmp_path):
    for part in ("train", "test"):
        file = tmp_path / "cifar100" / f"{part}-00000-of-00001.parquet"
        parquet_shard(file, labels_of(100, 100), label=label, names=names)
    splits = load_splits("cifar100", tmp_path)
    assert splits.classes == tuple(names or [str(k) for k in range(100)])
    assert splits.test.labels.tolist() == list(range(100)) and len(splits.val) == 10


def test_parquet_files_that_name_the_classes_differently_are_refused(tmp_path):
    names = [f"c{k}" for k in range(10)]
    for part, own in (("train", names), ("test", names[::-1])):
        parquet_shard(tmp_path / f"{part}-00000-of-00001.parquet", labels_of(20), names=own)
    with pytest.raises(DataError, match=r"test-00000-of-00001.parquet calls class 0 c9, and the files before it c0"):
        load_splits("cifar10", tmp_path, 8)


@pytest.fixture
def parquet(tmp_path):
    for part in ("train", "test"):
        parquet_shard(tmp_path / f"{part}-00000-of-00001.parquet", labels_of(20))
    return tmp_path


def test_faults_of_parquet_files_are_named(parquet, offline):
    file = parquet / "test-00000-of-00001.parquet"
    whole = file.read_bytes()
    good = [{"bytes": encoded(noise(32, 32, 3), "PNG"), "path": None} for _ in range(10)]
    faults = [
        ({"labels": labels_of(20) + 1}, r"test-.*parquet: label has values from 1 to 10. Expected: 0 to 9"),
        ({"labels": [None, *range(9)]}, r"test-.*parquet: label is float64 \[10\]. Expected: 10 whole numbers"),
        ({"labels": list("abcdefghij")}, r"test-.*parquet: label is object \[10\]. Expected: 10 whole numbers"),
        ({"labels": labels_of(10), "image": "photo"}, r"has no column img or image, only photo, label"),
        ({"labels": labels_of(10), "label": "y"}, r"test-.*parquet has no column label, only img, y"),
        ({"labels": labels_of(10, 9)}, r"the test set of .* has no images of truck"),
        ({"labels": labels_of(10), "names": ["cat", "dog"]}, r"test-.*parquet names 2 classes, but cifar10 has 10"),
        (
            {"labels": labels_of(10), "images": [*good[:9], {"bytes": None, "path": "a.png"}]},
            r"img of row 9 has no bytes",
        ),
        (
            {"labels": labels_of(10), "images": list(range(10))},
            r"img of row 0 has no bytes. Expected: \{bytes, path\}",
        ),
        (
            {"labels": labels_of(10), "images": [*good[:9], {"bytes": b"?"}]},
            r"cannot read the image 9 of .*test-.*parquet",
        ),
    ]
    for contents, sentence in faults:
        parquet_shard(file, **contents)
        refused("cifar10", parquet, sentence)
    torn = bytearray(whole)
    torn[100:2000] = bytes(1900)
    for damaged in (whole[: len(whole) // 2], b"", bytes(torn)):
        file.write_bytes(damaged)
        refused("cifar10", parquet, r"cannot read .*test-00000-of-00001\.parquet")
    assert offline == []


def test_parquet_files_that_are_missing_are_named(parquet, offline):
    (parquet / "test-00000-of-00001.parquet").rename(parquet / "test-00000-of-00002.parquet")
    refused("cifar10", parquet, r"has 1 file test-\*\.parquet. Expected: 2")
    (parquet / "test-00000-of-00002.parquet").unlink()
    refused("cifar10", parquet, r"has no test-\*\.parquet. Expected: train-\*\.parquet and test-\*\.parquet")
    refused("cifar10", parquet / "train-00000-of-00001.parquet", r"is one file, but not npz. --data takes")
    assert offline == []


def test_without_pyarrow_the_command_that_installs_it_is_named(parquet, monkeypatch):
    monkeypatch.setitem(importlib.sys.modules, "pyarrow.parquet", None)
    refused("cifar10", parquet, r"pyarrow, which is not installed: pip install pyarrow$")
