"""The examples of the Python interface run as they are, on few images."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from helpers.commands import ROOT
from torchvision.transforms.functional import to_pil_image

import structured_tickets as st

FEW = ["--epochs", "1", "--images", "64", "--batch_size", "32"]


@pytest.fixture
def example(monkeypatch):
    """`example(name)`: the module, with few forward passes to measure."""

    def load(name):
        monkeypatch.syspath_prepend(str(ROOT / "examples"))
        monkeypatch.setattr(importlib.import_module("own_loop"), "REPEATS", 2)
        return importlib.import_module(name)

    yield load
    for name in ("own_loop", "lightning_or_trainer"):
        sys.modules.pop(name, None)


def rows(text):
    """Network -> accuracy, parameters, latency."""
    lines = [line for line in text.splitlines() if line.endswith(" ms")]
    return {line[:28].strip(): line[28:].replace("%", "").replace(",", "").split() for line in lines}


def test_a_training_loop_of_ones_own(example, tmp_path, capsys):
    example("own_loop").main([*FEW, "--out", str(tmp_path / "ticket")])
    printed = capsys.readouterr()
    found = rows(printed.out)
    assert list(found) == ["dense", "RSST, before hardening", "hardened", "shrunk", "shrunk, read back"]
    assert found["hardened"][0] == found["shrunk"][0] == found["shrunk, read back"][0]
    assert found["dense"][1] == found["hardened"][1] == "11181642"
    assert int(found["shrunk"][1]) == int(found["shrunk, read back"][1]) < 0.5 * 11181642
    assert "% of the prunable weights are kept; " in printed.out and not printed.err
    small = st.load(tmp_path / "ticket")
    assert sum(p.numel() for p in small.parameters()) == int(found["shrunk"][1])


def test_images_of_ones_own_in_folders(example, tmp_path):
    for part in ("train", "test"):
        for name in ("cats", "dogs", "eels"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for k in range(2):
                to_pil_image(torch.rand(3, 40, 50)).save(folder / f"{k}.png")
    module = example("own_loop")
    args = module.parser().parse_args(["--data", str(tmp_path), "--batch_size", "3"])
    train, test, classes = module.loaders(args)
    assert classes == 3 and len(train) == 2 and next(iter(test))[0].shape == (6, 3, 32, 32)


def test_the_same_with_lightning(example, tmp_path, capsys, monkeypatch):
    pytest.importorskip(
        "pytorch_lightning", reason="pip install pytorch-lightning for examples/lightning_or_trainer.py"
    )
    module = example("lightning_or_trainer")
    monkeypatch.chdir(tmp_path)
    module.main([*FEW, "--out", str(tmp_path / "ticket")])
    found = rows(capsys.readouterr().out)
    assert list(found) == ["dense", "RSST, before hardening", "shrunk", "shrunk, read back"]
    assert found["shrunk"][:2] == found["shrunk, read back"][:2]
    assert int(found["shrunk"][1]) < 0.5 * int(found["dense"][1])
    assert [p.name for p in tmp_path.iterdir()] == ["ticket"]


def test_lightning_goes_on_from_a_checkpoint_with_the_same_masks_and_penalty(example, tmp_path):
    """Two epochs at once, or one, a checkpoint, and the other: the same weights."""
    pl = pytest.importorskip("pytorch_lightning", reason="pip install pytorch-lightning")
    module = example("lightning_or_trainer")
    images, labels = torch.rand(16, 3, 32, 32), torch.arange(16) % 4
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 8)

    def network():
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 8, 3)]
        flat = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 4)]
        return module.Classifier(torch.nn.Sequential(*layers, *flat), 0.01)

    def fit(classifier, stop_after=None, **more):
        fade_out = module.FadeOut(0.5, "magnitude", (3, 32, 32))
        callbacks = [fade_out, *([StopAfter(stop_after)] if stop_after else [])]
        trainer = module.trainer(2, *callbacks)
        trainer.fit(classifier, batches, **more)
        return trainer, fade_out

    class StopAfter(pl.Callback):
        def __init__(self, epochs):
            self.epochs = epochs

        def on_train_epoch_end(self, trainer, _):
            trainer.should_stop = trainer.current_epoch + 1 >= self.epochs

    whole, halves = network(), network()
    _, wanted = fit(whole)
    trainer, _ = fit(halves, stop_after=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = network()
    _, found = fit(again, ckpt_path=tmp_path / "last.ckpt")
    assert str(found.masks) == str(wanted.masks) and found.penalty.state_dict() == wanted.penalty.state_dict()
    for one, other in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)
