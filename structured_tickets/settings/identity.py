"""Which run a command is: the settings that decide what it computes, and names made of them."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from structured_tickets.settings.flag_rules import prunes_heads_or_neurons, prunes_units
from structured_tickets.settings.flags import build_parser

# Flags that do not change what a run computes (or, for pruning_times, only how far it goes).
NOT_IDENTITY = frozenset(
    {
        "data",
        "save_dir",
        "control_of",
        "exp_name",
        "resume",
        "checkpoint",
        "print_freq",
        "workers",
        "compile",
        "compact_training",
        "deterministic",
        "image_store",
        "gpu",
        "pruning_times",
        "dense_store",
        "keep_checkpoints",
        "dry_run",
        "wandb",
        "wandb_group",
        "wandb_tags",
        "tensorboard",
        "quiet",
        "verbose",
        "preset",
    }
)

# Flags that are read only after round 0. A flag that is missing here costs a sweep some time; a wrong one, its truth.
AFTER_ROUND_0 = frozenset(
    {
        "struct",
        "rate",
        "rate_mode",
        "criteria",
        "criteria_batches",
        "rank_weights",
        "fillback_rate",
        "min_units",
        "conv1",
        "regroup",
        "admm_epochs",
        "admm_rho",
        "control",
        "vit_structured",
        "vit_prune_target",
        "mlp_prune_ratio",
        "block_prune_ratio",
        "sorting_mode",
        "RST_schedule",
        "reg_granularity_prune",
        "exponents",
        "reg_horizon",
        "reg_guard",
        "reg_upper_limit",
        "penalty",
        "block_loss_grad",
        "rsst_dead",
        "reg_target",
        "fade_out",
    }
)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as plain values, for `args.yaml`, checkpoints and trackers."""
    plain = {k: v for k, v in vars(args).items() if k not in ("warnings", "explicit", "words")}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}


def identity_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what a run computes, as far as they are not the parser's defaults.

    So a flag that is added later does not make strangers of older runs.
    """
    defaults = settings_of(build_parser().parse_args([]))
    return {k: v for k, v in settings.items() if k not in NOT_IDENTITY and v != defaults.get(k)}


def identity_of_round_0(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that decide what round 0 computes, as far as they are not the parser's defaults.

    Files of initial weights are not among them: what they hold counts. Nor are the kernels' flags, see `numerics`.
    """
    unread = AFTER_ROUND_0 | {"init", "pretrained"}
    return {k: v for k, v in identity_of(settings_of(args)).items() if k not in unread}


def default_run_folder(args: argparse.Namespace) -> str:
    """`<dataset>_<struct>_output_<arch>_<...>_<hash>`: the same settings give the same folder, others another."""
    identity = identity_of(settings_of(args))
    if args.dataset == "imagefolder":
        identity["data"] = str(Path(args.data).resolve())
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    tied = (args.vit_structured or args.regroup) and prunes_heads_or_neurons(args)
    target = [args.vit_prune_target] if tied else []
    target += ["regroup"] if args.regroup else []
    criterion = [args.criteria] if prunes_units(args) or args.struct == "refill" else []
    control = [args.control] if args.control != "none" else []
    parts = [_short(args.arch), *target, *criterion, f"rate{args.rate:g}", *control, f"seed{args.seed}", digest]
    return f"{args.dataset}_{args.struct}_output_{'_'.join(parts)}"


def _short(arch: str) -> str:
    """A network's name without the folders of its file, fit for a file name."""
    return re.sub(r"[^\w.-]+", "-", Path(arch).name if ":" in arch else arch)


def tracker_name(args: argparse.Namespace, time_stamp: str) -> str:
    """The documents' run name for WandB."""
    if args.exp_name:
        return str(args.exp_name)
    parts = [args.struct, _short(args.arch), args.dataset]
    if args.struct == "rsst":
        parts += [f"sched_{args.RST_schedule}", f"reg_{args.reg_granularity_prune}"]
        parts += [f"exp{args.exponents:g}"] if args.RST_schedule == "exp_custom_exponents" else []
    elif args.struct == "refill":
        parts.append(f"fill_{args.fillback_rate}")
    parts += [f"crit_{args.criteria}", f"rate_{args.rate}"]
    parts += ["pretrained"] if args.pretrained or args.vit_pretrained else []
    parts += [f"struct_{args.vit_prune_target}"] if args.vit_structured else []
    parts += ["regroup"] if args.regroup else []
    parts += [args.control] if args.control != "none" else []
    return "_".join([*parts, time_stamp])
