"""Image files as people have them: each is trained on as it looks in a viewer, or named in one line with status 3."""

from __future__ import annotations

import io
import logging
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers.commands import tiny
from helpers.programs import start
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

import main_imp_fillback
from structured_tickets.base.errors import DataError, UsageError
from structured_tickets.data.catalog import load_splits
from structured_tickets.data.decoded_images import read_image
from structured_tickets.data.folder_sets import SUFFIXES
from structured_tickets.data.image_sets import resized
from structured_tickets.runs.setup import setup_model_dataset

NOISE = np.random.default_rng(0)
STORES = ("memory", "stream")


def noise(height=9, width=11) -> Image.Image:
    return Image.fromarray(NOISE.integers(0, 256, (height, width, 3), np.uint8))


def content(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def seen(data: bytes) -> np.ndarray:
    """What the network is given of a file: [height, width, 3]."""
    return read_image(io.BytesIO(data), "x").permute(1, 2, 0).numpy()


@pytest.fixture
def photos(tmp_path):
    """Two classes, of each six images to train on and one to test."""
    for part, count in (("train", 6), ("test", 1)):
        for name in ("cat", "dog"):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for k in range(count):
                noise().save(tmp_path / "photos" / part / name / f"{k}.png")
    return tmp_path / "photos"


def run_on(photos, store="memory", **more) -> int:
    words = tiny(
        photos.parent / "run", dataset="imagefolder", data=photos, image_store=store, pruning_times=1, workers=1, **more
    )
    return main_imp_fillback.main(words)


# Pixels


def test_sixteen_bits_become_eight():
    values = np.array([[0, 257, 257 * 100, 65535]], np.uint16)
    wanted = np.array([0, 1, 100, 255])[None, :, None].repeat(3, 2)
    for data in (
        content(Image.fromarray(values)),
        content(Image.fromarray(values), "TIFF"),
        b"P5 4 1 65535\n" + values.astype(">u2").tobytes(),
        big_endian_tiff(values),
    ):
        assert (seen(data) == wanted).all()


def test_sixteen_bits_are_white_where_they_are_transparent_or_say_so():
    """As PIL itself does it for eight bits."""
    values = np.array([[0, 257, 257 * 100, 65535]], np.uint16)
    grey = seen(content(Image.fromarray(values), transparency=257))[0, :, 0]
    assert grey.tolist() == [0, 255, 100, 255]
    inverted = bytearray(content(Image.fromarray(values), "TIFF"))
    place = inverted.index(struct.pack("<HHI", 262, 3, 1))
    inverted[place + 8 : place + 10] = struct.pack("<H", 0)  # WhiteIsZero
    assert seen(bytes(inverted))[0, :, 0].tolist() == [255, 254, 155, 0]


def test_a_class_without_an_image_to_train_on_is_named(tmp_path, caplog):
    for part, counts in (("train", (10, 1, 20)), ("test", (1, 1, 1))):
        for name, count in zip("abc", counts, strict=True):
            (tmp_path / part / name).mkdir(parents=True)
            for k in range(count):
                noise().save(tmp_path / part / name / f"{k}.png")
    splits = load_splits("imagefolder", tmp_path, 8, 1, "memory")
    lost = sorted({0, 1, 2} - set(splits.train.labels.tolist()))
    assert lost == [1], "the split is fixed"
    assert "no training images left for b: all of them were held out for validation. Add more images" in caplog.text


def big_endian_tiff(values: np.ndarray) -> bytes:
    """An uncompressed grey TIFF in the byte order that microscopes and Macs write."""
    height, width = values.shape
    pixels = values.astype(">u2").tobytes()
    tags = [
        (256, width),
        (257, height),
        (258, 16),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, height),
        (279, len(pixels)),
    ]
    rows = b"".join(struct.pack(">HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    return struct.pack(">2sHI", b"MM", 42, 8 + len(pixels)) + pixels + struct.pack(">H", len(tags)) + rows + bytes(4)


@pytest.mark.parametrize("values", [np.int32, np.float32])
def test_32_bits_say_not_what_is_white(values, photos, capsys):
    Image.fromarray(np.ones((9, 9), values)).save(photos / "train" / "cat" / "1.tif")
    assert run_on(photos) == 3
    assert "1.tif: its pixels have 32 bits, of an unknown range. Expected: 8 or 16 bits" in capsys.readouterr().err


def test_transparent_is_white():
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[..., 0], pixels[0, :, 3] = 200, (0, 51, 255)
    wanted = [[255, 255, 255], [244, 204, 204], [200, 0, 0]]
    image = Image.fromarray(pixels)
    assert seen(content(image))[0].tolist() == wanted
    assert abs(seen(content(image, "WEBP", lossless=True))[0].astype(int) - wanted).max() <= 1
    assert seen(content(Image.fromarray(pixels[..., [0, 3]])))[0].tolist() == [[255] * 3, [244] * 3, [200] * 3]
    opaque = pixels[..., :3].copy()
    opaque[0, 2] = 7
    colours = Image.fromarray(opaque)
    assert seen(content(colours, transparency=(200, 0, 0)))[0].tolist() == [[255] * 3, [255] * 3, [7] * 3]
    for kind in ("PNG", "GIF"):
        palette = Image.fromarray(np.array([[0, 1, 1]], np.uint8), "P")
        palette.putpalette([200, 0, 0, 0, 0, 200])
        assert seen(content(palette, kind, transparency=0))[0].tolist() == [[255] * 3, [0, 0, 200], [0, 0, 200]]
        assert seen(content(palette, kind))[0].tolist() == [[200, 0, 0], [0, 0, 200], [0, 0, 200]]


def test_grey_one_bit_and_ink_look_as_they_do_in_a_viewer():
    grey = np.array([[0, 90, 255]], np.uint8)
    assert (seen(content(Image.fromarray(grey))) == grey[..., None]).all()
    assert (seen(content(Image.fromarray(grey).convert("1", dither=0))) == [[[0] * 3, [0] * 3, [255] * 3]]).all()
    for ink, colour in (((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 0, 255), (0, 0, 0)), ((0, 0, 0, 0), (255, 255, 255))):
        printed = seen(content(Image.new("CMYK", (8, 8), ink), "JPEG"))
        assert abs(printed.astype(int) - colour).max() <= 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_pictures_are_upright(kind):
    image = Image.fromarray(np.kron(NOISE.integers(0, 256, (2, 3, 3)), np.ones((8, 8, 1))).astype(np.uint8))
    for orientation in range(10):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        data = content(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
        with Image.open(io.BytesIO(data)) as file:
            wanted = np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
        assert wanted.shape[:2] == ((24, 16) if 5 <= orientation <= 8 else (16, 24))
        assert (seen(data) == wanted).all()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_is_no_damaged_picture():
    image = noise()
    for exif in (b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(9)):
        assert seen(content(image, "JPEG", exif=exif)).shape == (9, 11, 3)


def test_an_animation_is_its_first_picture():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        data = content(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert seen(data)[2, 2].tolist() == [255, 0, 0]


IMAGES = [
    content(noise().convert(mode), kind)
    for mode, kinds in (
        ("RGB", "PNG JPEG WEBP TIFF BMP"),
        ("RGBA", "PNG WEBP"),
        ("P", "GIF PNG"),
        ("CMYK", "JPEG TIFF"),
    )
    for kind in kinds.split()
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(IMAGES),
    st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3), st.integers(0, 3)), min_size=1),
)
def test_a_damaged_image_is_refused_or_read(data, edits):
    for place, new, gone in edits:
        data = data[:place] + new + data[place + gone :]
    try:
        image = read_image(io.BytesIO(data), "the name", 8)
    except DataError as error:
        assert str(error).startswith("cannot read the image the name: ") and "\n" not in str(error)
    else:
        assert image.shape == (3, 8, 8) and image.dtype == torch.uint8


# Files that are trained on


def odd(folder: Path) -> None:
    """Into a class: one of each kind of image that is fine."""
    noise().convert("L").save(folder / "grey.png")
    noise().convert("RGBA").save(folder / "transparent.png")
    noise().convert("CMYK").save(folder / "ink.jpg")
    noise().convert("P").save(folder / "palette.gif")
    noise(1, 1).save(folder / "point.png")
    noise(1, 300).save(folder / "line.png")
    Image.fromarray(NOISE.integers(0, 65536, (9, 9)).astype(np.uint16)).save(folder / "deep.png")
    (folder / "a JPEG called.png").write_bytes(content(noise(), "JPEG"))
    (folder / "SHOUTED.JPG").write_bytes(content(noise(), "JPEG"))
    (folder / "naïve 猫\nof two lines.png").write_bytes(content(noise()))
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")).write_bytes(content(noise()))
    (folder / "._0.png").write_bytes(b"\0\5\x16\7what a Mac notes")
    (folder / ".hidden.png").write_bytes(b"nothing")
    (folder / "Thumbs.db").write_bytes(b"what Windows notes")
    (folder / "boxes.txt").write_text("0.png 0 0 3 3")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "0-checkpoint.png").write_bytes(b"nothing")
    (folder / "more").mkdir()
    noise().save(folder / "more" / "below.png")
    (folder / "linked.png").symlink_to(folder / "grey.png")
    (folder / "linked").symlink_to(folder.parent / "dog")


@pytest.mark.parametrize("store", STORES)
def test_odd_images_and_names_are_trained_on(store, photos, capsys):
    odd(photos / "train" / "cat")
    (photos / "train" / ".DS_Store").write_bytes(b"what a Mac notes")
    (photos / "train" / ".cache").mkdir()
    (photos / "test" / "dog").rename(photos / "test" / "naïve\ndog \udce9")
    (photos / "train" / "dog").rename(photos / "train" / "naïve\ndog \udce9")
    (photos / "train" / "cat" / "linked").unlink()
    (photos / "train" / "cat" / "linked").symlink_to(photos / "train" / "naïve\ndog \udce9")
    assert run_on(photos, store) == 0
    assert "not read" not in capsys.readouterr().err
    splits = load_splits("imagefolder", photos, 8)
    assert len(splits.classes) == 2 and len(splits.train) + len(splits.val) == 12 + 13 + 6


def test_what_is_not_read_is_said(photos, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("rsst"), "handlers", [caplog.handler])
    for name in ("cat/a.heic", "cat/b.npy", "cat/no_suffix", "loose.png"):
        (photos / "train" / name).write_bytes(b"something")
    (photos / "train" / "README.txt").write_text("about them")
    load_splits("imagefolder", photos, 8)
    (said,) = [r.getMessage() for r in caplog.records if "ignored files" in r.getMessage()]
    assert said == (
        f"{photos}/train: ignored files (unknown suffix, or outside a class folder): loose.png, a.heic, b.npy, no_suffix"
    )


def test_every_suffix_is_read(photos):
    kinds = {".jpg": "JPEG", ".tif": "TIFF", ".pgm": "PPM"}
    for suffix in SUFFIXES:
        noise().save(photos / "train" / "cat" / f"of{suffix}", kinds.get(suffix, Image.registered_extensions()[suffix]))
    splits = load_splits("imagefolder", photos, 8)
    assert len(splits.train) + len(splits.val) == 12 + len(SUFFIXES)


def test_class_names_that_are_numbers_with_gaps_are_names(photos):
    for part in ("train", "test"):
        (photos / part / "cat").rename(photos / part / "3")
        (photos / part / "dog").rename(photos / part / "10")
    splits = load_splits("imagefolder", photos, 8)
    assert splits.classes == ("10", "3") and splits.train.labels.unique().tolist() == [0, 1]
    assert run_on(photos) == 0


@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_labels_with_gaps_are_named(kind, tmp_path, capsys):
    labels = np.array([k for k in range(10) if k != 7] * 2)
    images = NOISE.integers(0, 256, (len(labels), 32, 32, 3), np.uint8)
    if kind == "npz":
        np.savez(tmp_path / "cifar10.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    else:
        encoded = [{"bytes": content(Image.fromarray(image))} for image in images]
        table = pyarrow.table({"img": encoded, "label": labels})
        for part in ("train", "test"):
            pyarrow.parquet.write_table(table, tmp_path / f"{part}-00000-of-00001.parquet")
    assert main_imp_fillback.main(tiny(tmp_path / "run", dataset="cifar10", data=tmp_path)) == 3
    line = capsys.readouterr().err
    assert "has no images of horse. Expected: images of each of 10 classes" in line and line.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_large_photograph_is_read_without_a_word(photos):
    """PIL would warn: more than 89 million pixels."""
    Image.new("1", (9500, 9500)).save(photos / "train" / "cat" / "large.png")
    words = tiny(photos.parent / "run", dataset="imagefolder", data=photos, pruning_times=1, quiet=True)
    process = start(words)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0 and "ecompression" not in stderr and "PIL" not in stderr, stderr


# Files that are refused


def a_bomb() -> bytes:
    """A PNG of 68 bytes that says it has 10,000 million pixels."""
    head = b"IHDR" + struct.pack(">2I5B", 100_000, 100_000, 8, 2, 0, 0, 0)
    rest = [b"IDAT" + zlib.compress(b"\0"), b"IEND"]
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (head, *rest)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def replaced_by(data: bytes, name: str = "1.png"):
    def spoil(photos: Path) -> None:
        (photos / "train" / "cat" / "1.png").unlink()
        (photos / "train" / "cat" / name).write_bytes(data)

    return spoil


def pipe(photos: Path) -> None:
    os.mkfifo(photos / "train" / "cat" / "pipe.png")


def link_to_itself(photos: Path) -> None:
    (photos / "train" / "cat" / "loop.png").symlink_to("loop.png")


def circle(photos: Path) -> None:
    (photos / "train" / "cat" / "circle").symlink_to(photos)


def circle_of_two(photos: Path) -> None:
    for one, other in (("cat", "dog"), ("dog", "cat")):
        (photos / "train" / one / "circle").symlink_to(photos / "train" / other)


def empty_class(photos: Path) -> None:
    (photos / "train" / "fox").mkdir()
    (photos / "train" / "fox" / "notes.txt").write_text("none yet")


def without_dogs(photos: Path) -> None:
    for part in ("train", "test"):
        (photos / part / "dog").rename(photos / f"{part}_dogs")


def one_image(photos: Path) -> None:
    for part in ("train", "test"):
        shutil.rmtree(photos / part / "dog")
    for file in (photos / "train").glob("*/[1-9].png"):
        file.unlink()


def two_images(photos: Path) -> None:
    for file in (photos / "train").glob("*/[1-9].png"):
        file.unlink()


def unsorted(photos: Path) -> None:
    for file in [*(photos / "train").glob("*/*.png")]:
        file.rename(photos / "train" / f"{file.parent.name}_{file.name}")
    for folder in ("cat", "dog"):
        (photos / "train" / folder).rmdir()


REFUSED = {
    "a truncated JPEG": (
        replaced_by(content(noise(90, 90), "JPEG")[:-1500], "1.jpg"),
        "cat/1.jpg: image file is truncated",
    ),
    "a text": (replaced_by(b"not an image", "1.jpg"), "cannot read the image {}/train/cat/1.jpg: no known format"),
    "an empty file": (replaced_by(b""), "cat/1.png: no known format"),
    "a bomb": (replaced_by(a_bomb()), "cat/1.png: Image size (10000000000 pixels) exceeds limit of 178956970 pixels"),
    "a name of two lines": (replaced_by(b"x", "a\nb.png"), r"cat/a\nb.png: no known format"),
    "a pipe": (pipe, "cannot read the image {}/train/cat/pipe.png: it is not a regular file"),
    "a link to itself": (link_to_itself, "cat/loop.png: Too many levels of symbolic links"),
    "a circle of links": (circle, "{}/train/cat/circle is a link to a folder that holds it"),
    "a circle of two links": (circle_of_two, "{}/train/cat/circle/circle is a link to a folder that holds it"),
    "an empty class": (empty_class, "no image files for fox in {}/train (accepted: .jpg, .jpeg, "),
    "one class": (without_dogs, "{}/train has only one class, cat. At least two are needed"),
    "one image": (one_image, "{}/train has only one class, cat"),
    "two images": (two_images, "not enough training images (2): a tenth of them is held out for validation"),
    "no classes": (
        unsorted,
        "{}/train has no class folders; expected: train/<class>/<images> and test/<class>/<images>",
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_trained_on_is_named_in_one_line(kind, store, photos, capsys):
    spoil, said = REFUSED[kind]
    spoil(photos)
    assert run_on(photos, store, quiet=True) == 3
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert line.startswith("error: ") and said.format(photos) in line


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable to root")
@pytest.mark.parametrize("what", ["cat/1.png", "cat"])
def test_what_may_not_be_read_is_named(what, photos, capsys):
    (photos / "train" / what).chmod(0)
    try:
        assert run_on(photos) == 3
        assert f"{photos}/train/{what}: " in capsys.readouterr().err
    finally:
        (photos / "train" / what).chmod(0o700)


def test_a_folder_that_cannot_be_listed_is_named(photos, monkeypatch, capsys):
    real = os.scandir

    def refuse(path):
        if str(path).endswith("train/cat"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert run_on(photos) == 3
    assert f"cannot read the folder {photos}/train/cat: Permission denied" in capsys.readouterr().err


# Sizes and batches


def test_images_that_no_memory_holds_are_refused():
    with pytest.raises(
        UsageError, match=r"--image_size: 1,000,000 images of 16384 x 16384 pixels take 805,306.4 GB of memory"
    ):
        resized(torch.zeros(1, 3, 1, 1, dtype=torch.uint8).expand(1_000_000, -1, -1, -1), 16384)


def test_a_batch_of_one_pixel_is_refused_before_the_run(photos, capsys):
    for k in range(2):
        (photos / "train" / "cat" / f"{k}.png").unlink()
    words = {"arch": "mobilenet", "image_size": 8}
    assert run_on(photos, batch_size=8, quiet=True, **words) == 2
    line = capsys.readouterr().err
    assert (
        "argument --batch_size: 9 training images in batches of 8 leave one image in the last batch" in line
        and line.count("\n") == 1
    )
    assert run_on(photos, batch_size=7, lr=1e-4, **words) == 0  # at a rate at which so few pixels do not diverge


def test_looking_at_the_last_batch_draws_no_random_number(photos):
    from structured_tickets.settings.flags import parse_args

    drawn = []
    for batch_size in (10, 4):  # of 11 images
        words = tiny(
            photos / "run", dataset="imagefolder", data=photos, arch="mobilenet", image_size=32, batch_size=batch_size
        )
        setup_model_dataset(parse_args(words))
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
