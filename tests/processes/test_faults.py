"""What goes wrong on real machines, made to happen: a run survives it, or ends with one line, and continues."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from helpers.commands import tiny
from helpers.comparison import assert_same_runs
from helpers.faults import die_after
from helpers.images import few_images
from helpers.programs import start
from PIL import Image

import main_imp_fillback as program
from structured_tickets.base.errors import DataError, StorageError
from structured_tickets.base.untrusted_tensors import save_atomically
from structured_tickets.data.fingerprint import describe_data, is_record
from structured_tickets.data.image_sets import ImageSet
from structured_tickets.data.loader import BatchLoader
from structured_tickets.runs.folder import RunFolder, load_safely

# kill -9

KINDS = {
    "rsst": {"struct": "rsst", "epochs": 3, "keep_checkpoints": 1},
    "refill": {"struct": "refill", "epochs": 2, "pruning_times": 3, "criteria": "remain"},
    "admm": {"struct": "admm", "admm_epochs": 3, "epochs": 2, "regroup": True},
}


def is_writing(folder) -> bool:
    return next(folder.rglob("*checkpoint*.tmp"), None) is not None


def wait_until(process, condition, seconds=60.0) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None and not condition():
        time.sleep(0.0005)


def kill(process, folder, delay, when_writing) -> bool:
    """Kill it `delay` seconds after its first word, or when it writes a checkpoint after that; whether it was alive."""
    next((line for line in process.stderr if "round" in line), None)
    time.sleep(delay)
    if when_writing:
        wait_until(process, lambda: is_writing(folder))
    alive = process.poll() is None
    process.kill()
    process.wait()
    return alive


@pytest.mark.timeout(500)
@pytest.mark.parametrize("wanted", [6, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_killed_again_and_again_it_ends_bit_for_bit_the_same(kind, wanted, tmp_path):
    """Half of the kills come at any moment, half while a checkpoint is being written."""
    words, draw = KINDS[kind], random.Random(kind)
    began = time.monotonic()
    assert program.main(tiny(tmp_path / "whole", **words)) == 0
    length = time.monotonic() - began
    kills = writing = run = 0
    while kills < wanted or not (tmp_path / str(run) / "result.json").exists():
        folder = tmp_path / str(run)
        if (folder / "result.json").exists():
            run += 1
            continue
        process, when_writing = start(tiny(folder, **words)), kills % 2 == 1
        if kills < wanted:
            kills += kill(process, folder, draw.uniform(0, 0.3 * length), when_writing)
            writing += is_writing(folder)
        else:
            _, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors
    for k in range(run + 1):
        assert_same_runs(tmp_path / "whole", tmp_path / str(k))
        assert not list((tmp_path / str(k)).rglob("*.tmp"))
    print(f"{kind}: {kills} kills, {writing} of them while a checkpoint was written, {run + 1} runs compared")
    assert writing >= wanted // 5


# Damage


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory, finished_run):
    """A run that was killed in its second round, and the same run undisturbed."""
    home = tmp_path_factory.mktemp("broken_off")
    words = {"epochs": 3}
    finished_run(home / "whole", **words)
    assert start(tiny(home / "half", **words), before=partial(die_after, 1, 1)).wait(100) == -signal.SIGKILL
    return home, words


def flipped(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(8 * len(content))
    changed = bytearray(content)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


DAMAGE = {
    "truncated": lambda content, draw: content[: draw.randrange(1, len(content))],
    "empty": lambda content, draw: b"",
    "bit flipped": flipped,
    "zeroed": lambda content, draw: content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
    "of another kind": lambda content, draw: b"hello\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_after_a_damaged_newest_checkpoint_the_one_before_is_used(damage, broken_off, tmp_path, capsys):
    home, words = broken_off
    shutil.copytree(home / "half", tmp_path / "run")
    file = tmp_path / "run" / "1checkpoint.pth.tar"
    before = RunFolder.load(tmp_path / "run" / "previous.pth.tar")
    assert (before.state, before.epoch) == (1, RunFolder.load(file).epoch - 1), "an epoch is lost, not a round"
    content, draw = file.read_bytes(), random.Random(damage)
    while not _is_damaged(file):  # some bits mean nothing: a date, say
        file.write_bytes(DAMAGE[damage](content, draw))
    assert program.main(tiny(tmp_path / "run", **words)) == 0
    said = capsys.readouterr().err
    assert (
        said.count("Using the previous checkpoint instead") == 1
        and f"continuing the run in {tmp_path / 'run'}: round 1, " in said
    )
    assert_same_runs(home / "whole", tmp_path / "run")


def test_a_damaged_checkpoint_never_takes_the_place_of_the_good_one_before(broken_off, tmp_path, monkeypatch):
    home, words = broken_off
    shutil.copytree(home / "half", tmp_path / "run")
    (tmp_path / "run" / "1checkpoint.pth.tar").write_bytes(b"")
    good = (tmp_path / "run" / "previous.pth.tar").read_bytes()

    def full(value, path):
        raise StorageError(f"cannot write {path}")

    with monkeypatch.context() as patch:
        patch.setattr("structured_tickets.runs.folder.save_atomically", full)
        assert program.main(tiny(tmp_path / "run", **words)) == 5
    assert (tmp_path / "run" / "previous.pth.tar").read_bytes() == good
    assert program.main(tiny(tmp_path / "run", **words)) == 0
    assert_same_runs(home / "whole", tmp_path / "run")


def _is_damaged(file) -> bool:
    try:
        load_safely(file)
    except DataError:
        return True
    return False


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    """torch alone reads two thirds of them without a word."""
    value = {"a": torch.rand(300), "b": [1, 2.5, "x"], "c": {"d": torch.ones(3, dtype=torch.uint8)}}
    file, draw, noticed = tmp_path / "value.pt", random.Random(0), 0
    save_atomically(value, file)
    content = file.read_bytes()
    for _ in range(1000):
        file.write_bytes(flipped(content, draw))
        try:
            found = load_safely(file)
        except DataError as error:
            noticed += 1
            assert str(file) in str(error) and len(str(error).splitlines()) == 1
        else:
            assert torch.equal(found["a"], value["a"]) and torch.equal(found["c"]["d"], value["c"]["d"])
            assert found["b"] == value["b"]
    assert noticed > 600


def test_all_checkpoints_damaged_is_an_error(broken_off, tmp_path, capsys):
    home, words = broken_off
    shutil.copytree(home / "half", tmp_path / "run")
    for file in (tmp_path / "run").glob("*.pth.tar"):
        file.write_bytes(b"")
    assert program.main(tiny(tmp_path / "run", **words)) == 3
    assert "cannot read the checkpoint" in capsys.readouterr().err.splitlines()[-1]


def test_only_the_last_rounds_are_kept_where_that_is_wanted(tmp_path, monkeypatch):
    few_images(monkeypatch)
    words = {"pruning_times": 5, "rate": 0.2, "criteria": "remain"}
    assert program.main(tiny(tmp_path / "all", **words)) == 0
    assert program.main(tiny(tmp_path / "few", keep_checkpoints=2, **words)) == 0
    kept = sorted(p.name for p in (tmp_path / "few").glob("?checkpoint*"))
    assert kept == [f"{k}checkpoint.pth.tar" for k in (0, 3, 4)]
    assert len(list((tmp_path / "few").glob("*best*"))) == 3 and len(list((tmp_path / "few" / "masks").iterdir())) == 5
    assert (tmp_path / "few" / "summary.csv").read_text() == (tmp_path / "all" / "summary.csv").read_text()
    again = tiny(tmp_path / "few", keep_checkpoints=1, **{**words, "pruning_times": 6})
    assert program.main(again) == 0
    assert sorted(p.name[0] for p in (tmp_path / "few").glob("?checkpoint*")) == ["0", "5"]
    control = tiny(
        tmp_path / "control", control="permute", control_of=tmp_path / "few", **{**words, "pruning_times": 6}
    )
    assert program.main(control) == 0, "controls find what they need"


# Disk


@contextmanager
def small_disk(folder, kilobytes):
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    made = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here ({made.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def mounted_again(disk, option) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(disk)], check=True)


@pytest.mark.parametrize(
    "kilobytes", [pytest.param(k, marks=[pytest.mark.slow] * (k in (500, 1100))) for k in (64, 500, 800, 1100)]
)
def test_a_full_disk_ends_the_run_and_it_goes_on_when_there_is_room(kilobytes, broken_off, tmp_path, capsys):
    """At the first file, at a checkpoint, and twice at a round's best network."""
    home, words = broken_off
    with small_disk(tmp_path / "disk", kilobytes) as disk:
        assert program.main(tiny(disk / "run", **words)) == 5
        said = capsys.readouterr().err
        assert "No space left on device" in said.splitlines()[-1] and "Traceback" not in said
        for file in (disk / "run").rglob("*.tar"):
            load_safely(file)
        assert not list((disk / "run").rglob("*.tmp"))
        assert program.main(tiny(disk / "run", **words)) == 5, "still full"
        mounted_again(disk, "size=60m")
        assert program.main(tiny(disk / "run", **words)) == 0
        assert_same_runs(home / "whole", disk / "run")


def test_a_folder_that_becomes_read_only(broken_off, tmp_path, capsys):
    home, words = broken_off
    with small_disk(tmp_path / "disk", 60_000) as disk:
        shutil.copytree(home / "half", disk / "run")
        mounted_again(disk, "ro")
        for folder in (disk / "run", disk / "new"):
            assert program.main(tiny(folder, **words)) == 5
            said = capsys.readouterr().err
            assert "Read-only file system" in said and "Traceback" not in said
        mounted_again(disk, "rw")
        assert program.main(tiny(disk / "run", **words)) == 0
        assert_same_runs(home / "whole", disk / "run")


# Clock


def test_a_clock_that_is_set_back_changes_nothing(broken_off, tmp_path, monkeypatch):
    home, words = broken_off
    shutil.copytree(home / "half", tmp_path / "run")
    for file in (tmp_path / "run").rglob("*"):
        os.utime(file, (time.time() + 86400,) * 2)
    real, calls = time.time, []

    def backwards() -> float:
        calls.append(None)
        return real() - 3600 * len(calls)

    monkeypatch.setattr(time, "time", backwards)
    assert program.main(tiny(tmp_path / "run", **words)) == 0
    assert_same_runs(home / "whole", tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < r["seconds"] < 1000 and r["images_per_second"] > 0 for r in rows)


# Data


@pytest.fixture(scope="module")
def begun_on_photographs(tmp_path_factory):
    """A run of one round on an image folder of 2 x 3 classes, of files that all have the same size."""
    home = tmp_path_factory.mktemp("photographs")
    draw = torch.Generator().manual_seed(0)
    for part, count in (("train", 20), ("test", 4)):
        for name in ("cat", "dog", "frog"):
            folder = home / "data" / part / name
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=draw)
                Image.fromarray(pixels.numpy()).save(folder / f"{k}.bmp")
    words = {"dataset": "imagefolder", "pruning_times": 1, "batch_size": 16}
    assert program.main(tiny(home / "run", data=home / "data", **words)) == 0
    return home, words


def _paint(folder) -> None:
    file = folder / "test" / "dog" / "2.bmp"
    file.write_bytes(file.read_bytes()[:-1] + b"\x07")


def _move(folder) -> None:
    (folder / "test" / "cat" / "1.bmp").rename(folder / "test" / "frog" / "17.bmp")


CHANGES = {
    "one pixel": (_paint, "test images of class dog look different"),
    "a file is gone": (lambda f: (f / "test" / "cat" / "3.bmp").unlink(), "test images of class cat: 4 before, 3 now"),
    "another label": (_move, "test images of class cat: 4 before, 3 now; test images of class frog: 4 before, 5 now"),
    "another name": (lambda f: (f / "test" / "dog" / "3.bmp").rename(f / "test" / "dog" / "4.bmp"), "other names"),
    "nothing": (lambda f: os.utime(f / "test" / "cat" / "3.bmp", (1, 1)), ""),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("store", ["memory", "mapped"])
def test_data_that_have_changed_are_refused_and_the_difference_is_named(
    change, store, begun_on_photographs, tmp_path, capsys
):
    home, words = begun_on_photographs
    for name in ("run", "data"):
        shutil.copytree(home / name, tmp_path / name)
    act, message = CHANGES[change]
    act(tmp_path / "data")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.tar")}
    more = tiny(tmp_path / "run", data=tmp_path / "data", image_store=store, **{**words, "pruning_times": 2})
    assert program.main(more) == (2 if message else 0)
    if message:
        said = capsys.readouterr().err.splitlines()[-1]
        assert "argument --data: the images or labels have changed since the run began" in said and message in said
        assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.tar")} == before


def test_what_is_known_of_the_data_does_not_get_less(begun_on_photographs, tmp_path):
    home, words = begun_on_photographs
    shutil.copytree(home / "run", tmp_path / "run")
    for k, store in enumerate(("stream", "memory"), 2):
        more = tiny(tmp_path / "run", data=home / "data", image_store=store, **{**words, "pruning_times": k})
        assert program.main(more) == 0
        contents = RunFolder(tmp_path / "run").newest_run().contents
        assert all(row[2] for part in contents.values() for row in part["classes"].values())
    assert contents == RunFolder(home / "run").newest_run().contents


def test_classes_of_one_name_are_told_apart():
    labels = torch.tensor([1, 0, 2, 1, 2, 2])
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 8, 8).contiguous()
    loader = BatchLoader(ImageSet(images, labels), 2, torch.device("cpu"))
    record = describe_data([loader] * 3, ["a", "a"])["test"]["classes"]
    assert {name: row[0] for name, row in record.items()} == {"a (0)": 1, "a (1)": 2, " (2)": 3}
    assert len({row[2] for row in record.values()}) == 3
    assert is_record(describe_data([loader] * 3, ["a", "b"]))


# Numbers


@pytest.mark.parametrize("step", [pytest.param(k, marks=[pytest.mark.slow] * (k in (8, 36))) for k in (1, 8, 17, 36)])
def test_a_loss_that_is_not_finite_at_some_step(step, broken_off, tmp_path, monkeypatch, capsys):
    """Six steps an epoch, three epochs a round; the run goes on from the last epoch when the cause is gone."""
    home, words = broken_off
    real, calls = torch.nn.CrossEntropyLoss.forward, []

    def sometimes(self, output, target):
        calls.extend([None] * self.training * output.requires_grad)
        loss = real(self, output, target)
        return loss * float("nan") if len(calls) == step and output.requires_grad else loss

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.CrossEntropyLoss, "forward", sometimes)
        assert program.main(tiny(tmp_path, **words)) == 4
    round_, epoch = divmod((step - 1) // 6, 3)
    where = f"became NaN or infinite in round {round_}, epoch {epoch}, step {(step - 1) % 6 + 1} of 6"
    said = capsys.readouterr().err.splitlines()[-1]
    assert where in said and "Try " in said and "a lower --lr" in said
    assert (tmp_path / "diverged.pth.tar").exists()
    assert program.main(tiny(tmp_path, **words)) == 0
    assert_same_runs(home / "whole", tmp_path)


def test_memory_that_runs_out(broken_off, tmp_path, monkeypatch, capsys):
    """It is one line, and the run goes on from the last epoch when there is more of it."""
    home, words = broken_off
    real, calls = torch.nn.CrossEntropyLoss.forward, []

    def greedy(self, output, target):
        calls.append(None)
        return real(self, output if len(calls) != 20 else torch.empty(2**50), target)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.CrossEntropyLoss, "forward", greedy)
        assert program.main(tiny(tmp_path, **words)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--batch_size: not enough memory for" in line and "can't allocate memory" in line
    assert program.main(tiny(tmp_path, **words)) == 0
    assert_same_runs(home / "whole", tmp_path)


# Two at once


def test_a_second_process_refuses_and_the_lock_of_a_dead_one_is_taken_over(tmp_path):
    words = tiny(tmp_path / "run", epochs=200)
    first = start(words)
    wait = time.monotonic() + 100
    while not (tmp_path / "run" / "0checkpoint.pth.tar").exists() and time.monotonic() < wait:
        time.sleep(0.05)
    second = start(words)
    _, stderr = second.communicate(timeout=100)
    assert second.returncode == 2 and "another process is using" in stderr.splitlines()[-1]
    assert first.poll() is None
    first.kill()
    first.wait()
    assert (tmp_path / "run" / "lock").exists()
    third = start(words)
    time.sleep(0.1)
    assert _has_begun(third, tmp_path / "run")
    third.terminate()
    assert third.wait(100) == 143


def _has_begun(process, folder) -> bool:
    until = time.monotonic() + 100
    while time.monotonic() < until and process.poll() is None:
        if "continuing" in (folder / "log.txt").read_text():
            return True
        time.sleep(0.05)
    return False
