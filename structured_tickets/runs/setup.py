"""From settings to what a run works with: a model, loaders, units and a device."""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim

from structured_tickets.base.console import log_warnings
from structured_tickets.base.distributed import ALONE, World
from structured_tickets.base.environment import has_cpp_compiler, numerics
from structured_tickets.base.errors import MachineError, UsageError
from structured_tickets.base.modes import set_mode
from structured_tickets.base.randomness import seed_everything
from structured_tickets.base.text_tables import counted
from structured_tickets.data.catalog import DATASETS, load_splits
from structured_tickets.data.image_sets import Splits
from structured_tickets.data.loader import BatchLoader, Loaders, make_loaders
from structured_tickets.data.policies import NONE as UNCHANGED
from structured_tickets.networks import build_model, runs_a_file, spec_of
from structured_tickets.networks.fixed_start import starts_the_same
from structured_tickets.networks.hosted import put_normalize
from structured_tickets.networks.input_statistics import Statistics
from structured_tickets.networks.kernels import set_fused_attention
from structured_tickets.networks.layers import Normalize, channels_side_by_side
from structured_tickets.networks.precision import precision_of
from structured_tickets.networks.pretrained import WHERE_IT_FITS, load_pretrained_weights
from structured_tickets.networks.registry import note_channel_units
from structured_tickets.pruning.rules import RoundRules
from structured_tickets.settings.conditions import channel_units_of
from structured_tickets.settings.interpret import (
    loss_from,
    optimizer_from,
    rules_from,
    settle_penalty,
    units_from,
    warnings_for,
    warnings_of_fillback,
    warnings_of_lambda,
    warnings_of_warmup,
)
from structured_tickets.training.distillation import as_teacher
from structured_tickets.training.epoch import validate_together
from structured_tickets.training.optimization import LearningRate
from structured_tickets.training.recording import Recorder, check_step
from structured_tickets.training.rounds import GIVEN, learning_rate_of
from structured_tickets.training.teachers import DENSE, NONE, parts_of
from structured_tickets.unit_groups.unit import UnitGroup, ranked_names

SEARCH_PAYS = 5000  # steps with one network
UNTESTED = "--device mps: this program has never been tried on Apple's GPUs. Compare a short run with --device cpu"


def choose_device(gpu: int, kind: str = "auto") -> torch.device:
    """The CUDA device of that number; the CPU if `gpu` is negative or there is no CUDA.

    Args:
        kind: "cpu", "cuda" or "mps" for a device of this kind only; "auto" for the one above.

    Raises:
        MachineError: There is no such device.
    """
    if kind == "mps":
        if not torch.backends.mps.is_available():
            raise MachineError("argument --device: no mps device. It needs an Apple computer, and torch for macOS")
        return torch.device("mps")
    if kind == "cuda" and gpu < 0:
        raise MachineError("argument --gpu: must be at least 0 with --device cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise MachineError("argument --device: torch finds no CUDA device on this machine. Use --device auto")
    if kind == "cpu" or gpu < 0 or not torch.cuda.is_available():
        return torch.device("cpu")
    if gpu >= torch.cuda.device_count():
        raise MachineError(
            f"argument --gpu: no CUDA device {gpu}. This machine has "
            f"{counted(torch.cuda.device_count(), 'CUDA device')}, numbered from 0"
        )
    return torch.device("cuda", gpu)


@dataclass(frozen=True)
class Setup:
    """Network, images, units and rules of a run, the same in all rounds.

    Attributes:
        args: The settings.
        model: The whole network, with the normalisation of the images in place, on its device.
        loaders: Of the training, validation and test images.
        classes: Names of the classes, in the order of the logits.
        precision: Number type of matrix products.
        groups: Units of the network.
        world: The processes that train together.
        whole: Layer that stays whole -> the reason.
        remark: Why the network has no units; empty if it has.
        teacher: The network of `--distill FILE`.
    """

    args: argparse.Namespace
    model: nn.Module
    loaders: Loaders
    classes: tuple[str, ...]
    precision: torch.dtype
    groups: list[UnitGroup]
    world: World = ALONE
    whole: Mapping[str, str] = field(default_factory=dict)
    remark: str = ""
    teacher: nn.Module | None = None

    @cached_property
    def names(self) -> list[str]:
        """The prunable weights, by parameter name."""
        return ranked_names(self.model, self.groups)

    @cached_property
    def rules(self) -> RoundRules:
        """The pruning rules of the run."""
        return rules_from(self.args, self.groups)

    def rate_of(self, state: int) -> LearningRate:
        """The learning rate of a round, by step."""
        return learning_rate_of(self.args, state, len(self.train_loader))

    @cached_property
    def criterion(self) -> nn.Module:
        """The loss."""
        return loss_from(self.args)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def train_loader(self) -> BatchLoader:
        return self.loaders[0]

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return self.train_loader.image_size

    @property
    def numerics(self) -> dict[str, Any]:
        """All that the last digits of results depend on here."""
        others = {"processes": self.world.size} if self.world.size > 1 else {}
        return numerics(self.device) | {"precision": str(self.precision), "compiled": self.args.compile} | others

    def optimizer(self, model: nn.Module) -> optim.Optimizer:
        """Return a new optimizer of a network."""
        return optimizer_from(self.args, model)

    def accuracies(self, model: nn.Module, recorder: Recorder | None = None) -> tuple[float, float]:
        """Return a network's validation and test accuracy, in percent, over the images of all processes.

        Args:
            recorder: See `validate_together`.
        """
        common = (model, self.criterion, self.world, self.precision, recorder)
        val, test = (validate_together(loader, *common) for loader in self.loaders[1:])
        return val, test


def set_up(args: argparse.Namespace, world: World = ALONE) -> Setup:
    """Load the network, the images and the units that the arguments ask for; add warnings about them to the arguments.

    Raises:
        DataError: Data or weights are missing or unreadable.
        UsageError: The device, the network, its units, the images' size and the batches do not go together.
    """
    model, loaders, classes, precision, said = _loaded(args)
    check_step(next(model.parameters()).device, args.step, world)
    for loader in loaders:
        loader.share = (world.rank, world.size)
    if world.size > 1 and (args.mixup or args.cutmix):
        loaders[0].ahead = loaders[0].parts
    note_channel_units(model, channel_units_of(vars(args)), (3, loaders[0].image_size, loaders[0].image_size))
    units = units_from(args, model, loaders[0].image_size)
    teacher = load_teacher(args, model, len(classes), loaders[0].image_size, precision)
    setup = Setup(args, model, loaders, classes, precision, units.groups, world, units.whole, units.remark, teacher)
    settle_penalty(args, setup.rules, setup.rate_of(1))
    args.warnings += [*said, *warnings_for(setup.rules, model, units.groups)]
    args.warnings += warnings_of_warmup(args, len(setup.train_loader))
    args.warnings += warnings_of_fillback(setup.rules, units.groups, args.pruning_times)
    if setup.rules.method.squeezes and setup.rules.structured:
        args.warnings += warnings_of_lambda(args, len(setup.train_loader))
    return setup


def setup_model_dataset(args: Any) -> tuple[nn.Module, Any, Any, Any]:
    """Build the model (`model.normalize` set) and the train, validation and test loaders.

    Reads `arch`, `dataset`, `data`, `batch_size` and, where given, `image_size`, `seed`, `device`, `gpu`, `workers`,
    `image_store`, `precision`, `compile`, `deterministic`, `vit_pretrained`, `pretrained` and `pretrained_key`.

    Raises:
        DataError: Data or weights are missing or unreadable.
        UsageError: The device, the network, the images' size and the batches do not go together.
    """
    model, loaders, _, _, said = _loaded(args)
    log_warnings(said)
    return model, *loaders


def _loaded(args: Any) -> tuple[nn.Module, Loaders, tuple[str, ...], torch.dtype, list[str]]:
    """Network, loaders, names of the classes, number type, and sentences that warn about the network."""
    settings = vars(args)
    choose_kernels(settings.get("deterministic", False))
    device = choose_device(settings.get("gpu", 0), settings.get("device", "auto"))
    source = DATASETS[args.dataset]
    size = settings.get("image_size") or source.image_size
    splits = load_splits(
        args.dataset,
        Path(args.data),
        size,
        settings.get("workers", 4),
        settings.get("image_store", "auto"),
        download=not settings.get("dry_run", False),
    )
    seed = settings.get("seed") or 0
    seed_everything(seed)
    model = build_model(args.arch, len(splits.classes), size)
    said = _warnings_of_a_fixed_start(model, settings, len(splits.classes), size, seed)
    said += [UNTESTED] if device.type == "mps" else []
    wanted = load_start_weights(model, settings)
    said += _warnings_of_images_seen(settings, splits)
    put_normalize(model, Normalize(*(wanted or (splits.mean, splits.std))))
    if settings.get("drop_path"):
        from structured_tickets.networks.stochastic_depth import drop_branches  # loads timm and torchvision

        drop_branches(model, settings["drop_path"])
    parts = settings.get("accumulate", 1)
    _check_last_batch(model, len(splits.train), args.batch_size * (parts if args.batch_size > 1 else 1), size)
    precision, remark = precision_of(model, settings.get("precision", "auto"), device, size)
    said += [remark] if remark else []
    model.to(device)
    prepare_for_speed(model, precision, settings.get("compile", False))
    recipe = {
        "erasing": settings.get("random_erasing", 0.0),
        "policy": settings.get("auto_augment", UNCHANGED),
        "repeats": settings.get("repeated_augment", 1),
        "parts": parts,
    }
    loaders = make_loaders(splits, args.batch_size, device, source.flip, seed, **recipe)
    return model, loaders, tuple(splits.classes), precision, said


def _warnings_of_images_seen(settings: dict[str, Any], splits: Splits) -> list[str]:
    """A sentence if weights come with a classifier, so that they may have been trained on the images held out here."""
    with_classifier = settings.get("fc") or settings.get("round_0") == GIVEN
    if not (settings.get("pretrained") and with_classifier and splits.held_out):
        return []
    return [
        f"{counted(len(splits.val), 'training image')} are held out for validation. If the weights of --pretrained "
        "were trained on them, too, val is too high: give a data set with validation images of its own (a folder val)"
    ]


def _warnings_of_a_fixed_start(
    model: nn.Module, settings: dict[str, Any], classes: int, size: int, seed: int
) -> list[str]:
    """A sentence if a user's network, just built, is the same for every seed, and no file is to give its weights."""
    arch, file = settings["arch"], settings.get("init")
    if not runs_a_file(arch) or (file and Path(file).exists()):
        return []
    reason = starts_the_same(model, lambda: build_model(arch, classes, size), seed)
    if not reason:
        return []
    return [
        f"--seed does not change the initial weights of {Path(arch).name}: {reason}. Runs with other seeds start from "
        "the same weights and differ only in their batches. Leave the seed to --seed"
    ]


def _check_last_batch(model: nn.Module, images: int, batch_size: int, image_size: int) -> None:
    """Refuse a last batch of one image where BatchNorm sees one pixel of it, and so has nothing to average over.

    Raises:
        UsageError: It does.
    """
    if (images - 1) % batch_size:
        return
    trial = copy.deepcopy(model)
    set_mode(trial, True)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            trial(torch.zeros(1, 3, image_size, image_size))
        except ValueError as error:
            raise UsageError(
                f"argument --batch_size: {counted(images, 'training image')} in batches of {batch_size} leave one "
                f"image in the last batch, which is too little for BatchNorm at --image_size {image_size}. Change "
                "--batch_size or --image_size"
            ) from error


def load_start_weights(model: nn.Module, settings: dict[str, Any]) -> Statistics | None:
    """Put pretrained weights in place where the settings ask for them.

    The classifier stays fresh unless `fc`; of a network whose round 0 is given it is loaded where the classes fit.

    Returns:
        Mean and standard deviation of the images that the weights want; None where they want none in particular.
    """
    file, given = settings.get("pretrained"), settings.get("round_0") == GIVEN
    from_file = given or settings.get("prune_type") == "pt"
    if not (settings.get("vit_pretrained") or (from_file and file)):
        return None
    classifier = settings.get("fc", False) or (WHERE_IT_FITS if given else False)
    return load_pretrained_weights(model, spec_of(model), file, classifier, settings.get("pretrained_key"))


def load_teacher(
    args: argparse.Namespace, model: nn.Module, classes: int, size: int, precision: torch.dtype
) -> nn.Module | None:
    """Return the network of `--distill FILE`, which sees the same images as `model`; None without one.

    Raises:
        DataError: The file cannot be read, or holds weights of another network or of other classes.
    """
    if args.distill in (NONE, DENSE):
        return None
    arch, file = parts_of(args.distill)
    teacher = build_model(arch or args.arch, classes, size)
    wanted = load_pretrained_weights(teacher, spec_of(teacher), file, with_classifier=True)
    own = next(layer for layer in model.modules() if isinstance(layer, Normalize))
    put_normalize(teacher, Normalize(*wanted) if wanted else copy.deepcopy(own).cpu())
    device = next(model.parameters()).device
    prepare_for_speed(teacher.to(device), precision)
    return as_teacher(teacher)


def choose_kernels(deterministic: bool) -> None:
    """Set torch's global choices of kernel: the fastest, or only those that give the same bits every time.

    fp32 means fp32: TF32, which keeps 10 bits of mantissa, stays off. For less there is `--precision bf16`.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    if deterministic != torch.are_deterministic_algorithms_enabled():  # the call imports torch's compiler
        torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def search_for_convolutions(steps: int) -> None:
    """Let cuDNN try the kernels of each convolution, where a network trains for so many steps that it pays.

    Else it takes the one that it thinks best. Reproducible kernels are not searched for. The number is that of an H100:
    for `res20s` in bfloat16 the search took 2.1 s, once for every network, and saved 0.4 ms in every step.
    """
    torch.backends.cudnn.benchmark = steps >= SEARCH_PAYS and not torch.are_deterministic_algorithms_enabled()


def prepare_for_speed(model: nn.Module, precision: torch.dtype, compiled: bool = False) -> None:
    """Choose memory layouts and kernels that do not change what is computed.

    On CPUs the fused attention kernel is the faster one in float32 only; its backward is slow in bfloat16.

    Args:
        precision: Number type of matrix products.
        compiled: Let torch.compile make one kernel out of many, when the model is first called.

    Raises:
        UsageError: `compiled`, on a CPU, without a C++ compiler.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    set_fused_attention(model, fused=not (on_cpu and precision == torch.bfloat16))
    channels_side_by_side(model)
    if compiled:
        if on_cpu and not has_cpp_compiler():
            raise UsageError("argument --compile: needs a C++ compiler, but none was found (g++, clang++ or CXX)")
        model.compile()
