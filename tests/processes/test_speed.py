"""What is done for speed changes no result."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from helpers.commands import ROOT, run, tiny
from helpers.networks import SMALL
from helpers.programs import start
from torch import nn
from torch.nn.functional import cross_entropy

from structured_tickets.__main__ import PROGRAMS
from structured_tickets.base.errors import UsageError
from structured_tickets.data import loader as batches
from structured_tickets.data.image_sets import ImageSet
from structured_tickets.data.loader import BatchLoader
from structured_tickets.networks import build_model
from structured_tickets.networks.kernels import frugal
from structured_tickets.networks.precision import computing
from structured_tickets.pruning import oneshot
from structured_tickets.pruning.collect_evidence import collect_evidence
from structured_tickets.runs.setup import choose_kernels, prepare_for_speed
from structured_tickets.training import forward
from structured_tickets.training.optimization import OPTIMIZERS
from structured_tickets.unit_groups.channels import channel_groups


def logits_and_gradients(model, images, labels):
    model.zero_grad()
    logits = model(images)
    cross_entropy(logits, labels).backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("arch", ["micro_vit", "vit_tiny", pytest.param("vit_small", marks=pytest.mark.slow)])
def test_the_class_token_alone_gives_the_logits_and_gradients_of_all_tokens(arch, images_and_labels):
    images, labels = images_and_labels
    model = build_model(arch, 10, 32).double()
    whole = logits_and_gradients(model, images.double(), labels)
    with frugal(model):
        lean = logits_and_gradients(model, images.double(), labels)
    for ours, theirs in zip(lean, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("arch", SMALL)
def test_training_is_frugal_and_leaves_the_model_whole(arch, images_and_labels):
    model = build_model(arch, 10, 32)
    seen = {}
    last = [m for n, m in model.named_modules() if n.endswith("mlp.fc1")][-1:]
    for module in last:
        module.register_forward_hook(lambda m, inputs, output: seen.update(tokens=output.shape[1]))
    with computing(model, torch.float32):
        model(images_and_labels[0])
    assert seen.get("tokens", 1) == 1
    model(images_and_labels[0])
    assert seen.get("tokens", 65) == 65


LIGHT = """
import sys
from {module} import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
heavy = {{"torch", "timm", "torchvision", "sklearn", "wandb", "numpy", "matplotlib"}} & sys.modules.keys()
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
SUB_COMMANDS = ([name, word] for name in PROGRAMS for word in ("--help", "--no_such_flag"))


@pytest.mark.parametrize(
    "module, words",
    [
        *(("main_imp_fillback", words) for words in (["--help"], ["--criterai", "l1"], ["--rate", "2"])),
        *(("structured_tickets.__main__", words) for words in ([], ["--help"], ["--version"], ["rnu"], *SUB_COMMANDS)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command_line_answers_without_waiting_for_torch(module, words):
    command = [sys.executable, "-c", LIGHT.format(module=module), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Small(nn.Module):
    """A convolution that criteria can look at."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.conv(self.conv1(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("flag, wanted", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
@pytest.mark.parametrize("struct", ["rsst", "admm"])
def test_every_product_of_a_run_is_in_its_number_type(struct, flag, wanted, tmp_path, monkeypatch):
    """Training, evaluation, hardened evaluation, and what ADMM trains between two rounds."""
    seen = []

    def noted(model, precision):
        seen.append(precision)
        return real(model, precision)

    real = computing
    for module in (forward, oneshot):
        monkeypatch.setattr(module, "computing", noted)
    assert run(*tiny(tmp_path, struct=struct, precision=flag, admm_epochs=1 if struct == "admm" else None)) == 0
    assert len(seen) > 12 and set(seen) == {wanted}


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_network_computes_the_same_and_shows_its_features(backend, monkeypatch):
    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: real(self, backend=backend))
    torch._dynamo.reset()
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
    model = Small()
    plain = logits_and_gradients(model, images, labels)
    prepare_for_speed(model, torch.float32, compiled=True)
    calls = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with computing(model, torch.float32):
        compiled = logits_and_gradients(model, images, labels)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > calls
    for ours, theirs in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    evidence = collect_evidence(model, channel_groups(model), state, {}, "saliency", [(images, labels)])
    assert evidence.features["conv"].saliency.shape == (4,)


def test_compiling_without_a_compiler_says_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="--compile"):
        prepare_for_speed(Small(), torch.float32, compiled=True)


@pytest.fixture
def kernels():
    yield
    choose_kernels(deterministic=False)


@pytest.mark.parametrize("wanted", [True, False])
def test_kernels_are_the_fastest_or_the_deterministic_ones_and_never_tf32(wanted, kernels, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    choose_kernels(wanted)
    assert torch.are_deterministic_algorithms_enabled() == wanted
    assert torch.backends.cudnn.benchmark != wanted
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32


def test_a_deterministic_run_is_the_run(tmp_path):
    """On a CPU the deterministic kernels are the ordinary ones, so the flag must change nothing there."""
    ends = []
    for flag in ({}, {"deterministic": True}):
        process = start(tiny(tmp_path / f"run{len(ends)}", pruning_times=1, **flag))
        assert process.wait() == 0, process.stderr.read()
        ends.append(torch.load(tmp_path / f"run{len(ends)}" / "0checkpoint.pth.tar", weights_only=True)["state_dict"])
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_fused_optimizer_steps_like_the_plain_one(name):
    torch.manual_seed(0)
    ours, theirs = (nn.Linear(5, 3) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    fused = OPTIMIZERS[name].build(ours, 0.1, 0.9, 0.01)
    assert all(group["fused"] for group in fused.param_groups)
    plain = OPTIMIZERS[name].build(theirs, 0.1, 0.9, 0.01)
    for group in plain.param_groups:
        group["fused"], group["foreach"] = False, False
    for _ in range(3):
        for optimizer, model in ((fused, ours), (plain, theirs)):
            optimizer.zero_grad()
            model(torch.ones(2, 5)).square().sum().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_images_too_large_for_the_device_come_over_batch_by_batch(monkeypatch):
    images, labels = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8), torch.arange(10)
    cpu = torch.device("cpu")
    kept = BatchLoader(ImageSet(images, labels), 4, cpu, augment=True, flip=True)
    moved = BatchLoader(ImageSet(images, labels), 4, cpu, augment=True, flip=True)
    moved.device = torch.device("cpu", 0)  # not the images' own device: they are fetched as from another one
    real, reads = batches._read, []
    monkeypatch.setattr(batches, "_read", lambda *words: reads.append(words) or real(*words))
    for ours, theirs in zip(moved, kept, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert len(reads) == 1
