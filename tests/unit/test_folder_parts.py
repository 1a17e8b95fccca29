"""Folders of images as people have them: every part is used, or the message names what is there and what to do."""

from __future__ import annotations

import logging
import shutil

import pytest
from helpers.commands import run, tiny
from helpers.images import write_image

from structured_tickets.base.errors import DataError
from structured_tickets.data.catalog import load_splits


@pytest.fixture
def said(caplog, monkeypatch):
    """The warnings, as text."""
    logger = logging.getLogger("rsst")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)
    return lambda: "\n".join(r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)


def fill(root, *parts, classes=("cat", "dog"), count=6):
    """Different images in each class of each part."""
    for part in parts:
        for name in classes:
            for k in range(count):
                write_image(root / part / name / f"{k}.png")
    return root


def sizes(root):
    splits = load_splits("imagefolder", root, 8)
    return [len(s) for s in (splits.train, splits.val, splits.test)]


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val", "dev"])
def test_a_folder_for_validation_is_used_and_nothing_is_held_out(val, said, tmp_path):
    fill(tmp_path, "train", "test", count=5)
    assert sizes(tmp_path) == [9, 1, 10]
    fill(tmp_path, val, count=3)
    assert sizes(tmp_path) == [10, 6, 10] and said() == ""


@pytest.mark.parametrize("train, test", [("Train", "Test"), ("training", "testing"), ("TRAIN", "test")])
def test_parts_are_known_by_their_usual_names(train, test, tmp_path):
    assert sizes(fill(tmp_path, train, test)) == [11, 1, 12]


def test_a_run_validates_on_the_folder_and_continues_only_with_it(tmp_path, capsys):
    photos = fill(tmp_path / "photos", "train", "valid", "test")
    words = tiny(tmp_path / "run", dataset="imagefolder", data=photos, batch_size=4)
    assert run(*words, "--pruning_times", 1) == 0
    assert "valid: 12 images for validation, none of train is held out" in capsys.readouterr().err
    shutil.rmtree(photos / "valid")
    assert run(*words) == 2
    assert "validation images of class cat: 6 before, 1 now" in capsys.readouterr().err


REFUSED = {
    "no test": (
        ("train", "val"),
        ["holds train, val, but no folder test", "val is for validation", "rename it to test"],
    ),
    "no test, valid": (("train", "valid"), ["valid is for validation. To test on it, rename it"]),
    "train alone": (("train",), ["holds train, but no folder test", "Put images that are not in train there"]),
    "test alone": (("test",), ["no folder train"]),
    "classes alone": (
        (".",),
        ["holds cat, dog, but no folder train and no folder test", "divide their images between train/<class>/ and"],
    ),
    "in another folder": (
        ("set/Train", "set/test"),
        ["holds set, but no folder train", "set has them: use --data", "/set"],
    ),
    "two folders deep": (("a/set/train", "a/set/test"), ["set has them: use --data", "/a/set"]),
    "twice": (("train", "Training", "test"), ["has Training and train, and one folder has to be train"]),
    "train within train": (
        ("train/train", "test/test"),
        ["train holds only the folder train. Move its class folders up"],
    ),
    "test within test": (("train", "test/test"), ["test holds only the folder test"]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_there_and_what_to_do_is_named(kind, tmp_path):
    parts, wanted = REFUSED[kind]
    fill(tmp_path, *parts, count=2)
    with pytest.raises(DataError) as caught:
        load_splits("imagefolder", tmp_path, 8)
    assert all(text in str(caught.value) for text in wanted), str(caught.value)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_archive_has_to_be_unpacked(tmp_path):
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"photos.zip is a file\. Unpack it"):
        load_splits("imagefolder", tmp_path / "photos.zip", 8)


def test_classes_that_differ_in_capitals_are_named(said, tmp_path):
    fill(tmp_path, "train", classes=("Cat", "Dog"))
    fill(tmp_path, "test", classes=("cat", "Dog"))
    with pytest.raises(DataError, match=r"test has classes that .*train lacks: cat\. train has Cat: the names"):
        load_splits("imagefolder", tmp_path, 8)
    assert said() == ""


def test_classes_of_the_validation_images_are_those_of_the_training_images(said, tmp_path):
    fill(tmp_path, "train", "val", "test")
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "fox")
    with pytest.raises(DataError, match=r"val has classes that .*train lacks: fox$"):
        load_splits("imagefolder", tmp_path, 8)
    shutil.rmtree(tmp_path / "val" / "fox")
    assert sizes(tmp_path) == [12, 6, 12]
    assert "val has no images of dog" in said()


def test_classes_within_classes_are_pointed_out(said, tmp_path):
    fill(tmp_path, "train/animals", "test/animals")
    fill(tmp_path, "train/plants", "test/plants", classes=("oak", "fir"))
    assert load_splits("imagefolder", tmp_path, 8).classes == ("animals", "plants")
    (line,) = said().splitlines()
    assert "the classes are animals, plants, and their images lie in folders below (animals/cat, animals/dog" in line


def test_a_folder_of_images_in_each_class_is_nothing_special(said, tmp_path):
    for name in ("cat", "dog"):
        for part in ("train", "test"):
            for k in range(6):
                write_image(tmp_path / part / name / "images" / f"{part}{k}.png")
    assert sizes(tmp_path) == [11, 1, 12] and said() == ""


def test_what_systems_leave_in_folders_is_no_class(said, tmp_path):
    fill(tmp_path, "train", "test")
    for junk in ("__MACOSX", "@eaDir", ".ipynb_checkpoints", "train/__MACOSX", "train/cat/@eaDir", "train/.cache"):
        (tmp_path / junk).mkdir()
    (tmp_path / "train/cat/@eaDir/0.png").write_bytes(b"a thumbnail of a kind of its own")
    (tmp_path / "train/dog/._0.png").write_bytes(b"\0\5\x16\7")
    assert sizes(tmp_path) == [11, 1, 12] and said() == ""


def test_images_beside_the_parts_are_pointed_out(said, tmp_path):
    fill(tmp_path, "train", "test", "extra")
    (tmp_path / "notes").mkdir()
    assert sizes(tmp_path) == [11, 1, 12]
    assert said() == f"{tmp_path}: ignored folders of images: extra"


def test_images_that_are_in_two_parts_are_pointed_out(said, tmp_path):
    fill(tmp_path, "train", "val", "test")
    shutil.copy(tmp_path / "train/cat/0.png", tmp_path / "test/cat/other_name.png")
    shutil.copy(tmp_path / "train/dog/1.png", tmp_path / "val/dog/1.png")
    sizes(tmp_path)
    assert "images of test are in train too, so its accuracy is too high: test/cat/other_name.png" in said()
    assert "images of val are in train too, so its accuracy is too high: val/dog/1.png" in said()
