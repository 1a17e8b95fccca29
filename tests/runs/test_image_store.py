"""Image files: decoded once, mapped or streamed, always the same images."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import tiny
from helpers.comparison import assert_same_runs
from helpers.interruptions import stopped_again_and_again
from helpers.programs import start
from PIL import Image
from torch.utils.data import get_worker_info

import main_imp_fillback
from structured_tickets.base.errors import DataError
from structured_tickets.data import decoded_images as image_store
from structured_tickets.data.catalog import IMAGE_STORES, load_splits
from structured_tickets.data.decoded_images import Decoding, LazyImages, open_images
from structured_tickets.data.fingerprint import fingerprint
from structured_tickets.data.loader import BatchLoader, make_loaders

STORES = [store for store in IMAGE_STORES if store != "auto"]


@pytest.fixture
def photos(tmp_path):
    noise = np.random.default_rng(0)
    for part, count in (("train", 15), ("test", 4)):
        for name in ("cat", "dog"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for k in range(count):
                Image.fromarray(noise.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{k}.png")
    return tmp_path


def loaders_of(photos, store, workers=2):
    splits = load_splits("imagefolder", photos, 8, workers, store)
    return make_loaders(splits, 4, torch.device("cpu"), flip=True, seed=3)


def test_every_store_gives_the_same_batches_statistics_and_fingerprint(photos):
    found = {}
    for store in STORES:
        loaders = loaders_of(photos, store)
        loaders[0].seek(1, 2, 1)
        batches = [batch for loader in loaders for batch in loader]
        statistics = load_splits("imagefolder", photos, 8, 2, store)
        found[store] = batches, loaders[0].fixed_batches(2), (statistics.mean, statistics.std), fingerprint(*loaders)
    batches, fixed, statistics, print_ = found["memory"]
    assert len(batches) == 6 + 1 + 2
    for store in ("mapped", "stream"):
        for ours, theirs in zip(found[store][0] + found[store][1], batches + fixed, strict=True):
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        assert found[store][2:] == (statistics, print_)


def test_a_run_takes_up_another_store_where_it_was(photos, tmp_path):
    words = {"dataset": "imagefolder", "data": photos, "save_dir": tmp_path / "run", "batch_size": 8, "criteria": "l1"}
    assert main_imp_fillback.main([*tiny(**words), "--image_store", "stream"]) == 0
    assert main_imp_fillback.main([*tiny(**words, pruning_times=3), "--image_store", "mapped"]) == 0


def test_files_are_decoded_once_and_again_when_one_changes(photos, monkeypatch):
    decoded = []
    real = image_store._decode
    monkeypatch.setattr(image_store, "_decode", lambda path, size: decoded.append(path) or real(path, size))
    load_splits("imagefolder", photos, 8, 2)
    assert len(decoded) == 38
    first = load_splits("imagefolder", photos, 8, 2)
    assert len(decoded) == 38
    changed = photos / "train" / "cat" / "3.png"
    Image.new("RGB", (8, 8), (200, 0, 0)).save(changed)
    second = load_splits("imagefolder", photos, 8, 2)
    assert len(decoded) == 38 + 30
    assert not torch.equal(first.train.sample(99), second.train.sample(99))
    assert len(list((photos / ".decoded").glob("*.*"))) == 2
    os.utime(changed, ns=(1, 1))
    load_splits("imagefolder", photos, 8, 2)
    assert len(decoded) == 38 + 60
    load_splits("imagefolder", photos, 16, 2)
    assert len(decoded) == 38 + 60 + 38


def test_pixels_that_change_behind_an_old_time_stamp_are_read_anew(photos):
    """As from archives that give all files one time: nobody can set the time of the change itself."""
    changed = photos / "train" / "cat" / "3.bmp"
    (photos / "train" / "cat" / "3.png").unlink()
    Image.new("RGB", (8, 8), (200, 0, 0)).save(changed)
    before, status = load_splits("imagefolder", photos, 8, 2), changed.stat()
    Image.new("RGB", (8, 8), (0, 200, 0)).save(changed)
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert changed.stat().st_size == status.st_size
    after = load_splits("imagefolder", photos, 8, 2)
    assert not torch.equal(before.train.sample(99), after.train.sample(99))


def test_a_cache_is_on_the_disk_before_it_has_its_name(photos, monkeypatch):
    """After a power failure a file that was only renamed has its length, and holds zeros."""
    noted, real = [], os.fsync

    def fsync(descriptor):
        noted.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    load_splits("imagefolder", photos, 8, 2, "mapped")
    assert [name.endswith(".tmp") for name in noted] == [True, False] * 2 and noted[1] == ".decoded"


@pytest.mark.parametrize("store", STORES)
def test_reading_images_draws_no_random_number(store, photos):
    """Dropout would drop other features where the images are kept elsewhere, and after a stop in an epoch."""
    loader, before = loaders_of(photos, store)[0], torch.get_rng_state()
    list(loader)
    loader.seek(0, 0, 3)
    list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_with_dropout_goes_on_bit_for_bit_wherever_the_images_are(photos, tmp_path, monkeypatch):
    net = tmp_path / "net.py"
    net.write_text(
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]\n"
        "    return nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(8, num_classes))\n"
    )
    words = {"dataset": "imagefolder", "data": photos, "arch": f"{net}:net", "batch_size": 8, "lr": 0.01}
    for store in ("memory", "mapped"):
        assert main_imp_fillback.main(tiny(tmp_path / store, **words, image_store=store)) == 0
    assert_same_runs(tmp_path / "memory", tmp_path / "mapped")
    command = lambda _: tiny(tmp_path / "broken", **words, image_store="mapped")  # noqa: E731
    assert stopped_again_and_again(monkeypatch, 2, command) >= 2
    assert_same_runs(tmp_path / "memory", tmp_path / "broken")


@pytest.mark.parametrize(
    "number, status, times",
    [
        (signal.SIGTERM, 143, 1),
        *(pytest.param(*case, 3, marks=pytest.mark.slow) for case in ((signal.SIGINT, 130), (signal.SIGTERM, 143))),
    ],
)
def test_a_signal_to_all_processes_ends_a_run_that_decodes_in_several(number, status, times, photos, tmp_path):
    """As torchrun, batch systems and `timeout` send it."""
    words = tiny(
        tmp_path / "run", dataset="imagefolder", data=photos, image_store="stream", workers=2, batch_size=4, epochs=200
    )
    for _ in range(times):
        process = start(words, own_group=True)
        for line in process.stderr:
            if " epoch " in line:
                break
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=100)
        assert process.returncode == status and "Traceback" not in errors, errors
        assert "the same command again to continue" in errors.splitlines()[-1]


def test_a_worker_that_dies_is_one_line(photos, tmp_path, monkeypatch, capsys):
    real = image_store._decode

    def dying(path, size):
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, size)

    monkeypatch.setattr(image_store, "_decode", dying)
    words = tiny(tmp_path / "run", dataset="imagefolder", data=photos, image_store="stream", workers=2, batch_size=4)
    assert main_imp_fillback.main(words) == 2
    assert "argument --workers: a process that decodes images has died (" in capsys.readouterr().err.splitlines()[-1]


def test_two_processes_may_decode_the_same_folder_at_once(photos, monkeypatch):
    """What one has made, and may be opening, the other does not take away."""
    reference = load_splits("imagefolder", photos, 8, 2).train.images
    made = sorted((photos / ".decoded").glob("*.*"))
    contents = [f.read_bytes() for f in made]
    for file in made:
        file.unlink()
    real, gone = image_store.decode_into, []

    def meanwhile(*arguments):
        for file, content in zip(made, contents, strict=True):
            file.write_bytes(content)
        real(*arguments)

    monkeypatch.setattr(image_store, "decode_into", meanwhile)
    monkeypatch.setattr(Path, "unlink", lambda self, **_: gone.append(self.name) if self.suffix == ".uint8" else None)
    assert torch.equal(load_splits("imagefolder", photos, 8, 2).train.images[:], reference[:])
    assert gone == []


def test_another_size_has_its_own_cache_and_a_torn_one_is_made_again(photos):
    paths = [str(p) for p in sorted((photos / "train" / "cat").iterdir())]
    wanted = open_images(paths, 8, photos, "train", Decoding())
    (file,) = (photos / ".decoded").glob("*.*")
    file.write_bytes(file.read_bytes()[:-1])
    for name, age in (("killed", 4000), ("at_work", 0)):
        other = photos / ".decoded" / f"train_8_{name}.99999.tmp"
        other.touch()
        os.utime(other, (time.time() - age,) * 2)
    assert torch.equal(open_images(paths, 8, photos, "train", Decoding()), wanted)
    assert open_images(paths, 12, photos, "train", Decoding()).shape == (15, 3, 12, 12)
    assert [p.name for p in (photos / ".decoded").glob("*.tmp")] == ["train_8_at_work.99999.tmp"]
    assert len(list((photos / ".decoded").glob("*.uint8"))) == 2


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("store", STORES)
def test_where_nothing_can_be_written_images_are_read_all_the_same(store, reason, photos, monkeypatch):
    wanted = load_splits("imagefolder", photos, 8, 2, "memory").test.images
    for file in (photos / ".decoded").glob("*.*"):
        file.unlink()

    def refuse(*_):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    images = load_splits("imagefolder", photos, 8, 2, store).test.images
    assert torch.equal(images[torch.arange(8)], wanted)
    assert isinstance(images, LazyImages) == (store != "memory")
    assert list((photos / ".decoded").glob("*.*")) == []


@pytest.mark.parametrize("store", STORES)
def test_a_damaged_file_is_named_whoever_reads_it(store, photos, capsys):
    (photos / "test" / "dog" / "2.png").write_bytes(b"nothing")
    if store == "stream":
        loader = BatchLoader(load_splits("imagefolder", photos, 8, 2, store).test, 4, torch.device("cpu"))
        with pytest.raises(DataError, match=r"^cannot read the image \S*2\.png[^\n]*$") as caught:
            list(loader)
        assert not multiprocessing.active_children() and caught.value, "an error that is kept keeps no worker"
    else:
        with pytest.raises(DataError, match=r"^cannot read the image \S*2\.png"):
            load_splits("imagefolder", photos, 8, 2, store)
        assert list((photos / ".decoded").glob("*.tmp")) == []


def test_auto_takes_memory_then_disk_then_neither(monkeypatch, tmp_path):
    monkeypatch.setattr(image_store, "_free_memory", lambda: 4 * 3072)
    for free, count, store in ((10**6, 1, "memory"), (10**6, 2, "mapped"), (6000, 2, "stream")):
        monkeypatch.setattr(image_store.shutil, "disk_usage", lambda _, free=free: type("", (), {"free": free}))
        assert image_store._chosen(count, 32, Path(tmp_path), "auto") == store
