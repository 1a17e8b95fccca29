"""The identity of a run: the settings that decide what it computes, and names made of them."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from structured_tickets.networks import runs_a_file
from structured_tickets.settings.conditions import penalty_before, prunes_transformer_units, prunes_units
from structured_tickets.settings.flag_table import FLAGS, LAMBDA_FOLLOWS, PENALTY_CHOSEN, scope_of
from structured_tickets.training.penalty.schedules import SCHEDULES
from structured_tickets.training.rounds import CONTINUED, GIVEN
from structured_tickets.training.teachers import DENSE

LONGEST_NAME = 32  # characters of --exp_name in a folder's name; the hash tells the rest
LONGEST_ARCH = 150  # of --arch; file systems take 255 in all


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as plain values, for `args.yaml`, checkpoints and trackers."""
    settings = {k: plain(v) for k, v in vars(args).items() if k not in ("warnings", "explicit", "named", "words")}
    return settings | ({LAMBDA_FOLLOWS: "progress"} if _had_another_lambda(settings) else {})


def as_understood_now(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a run has written, in today's meaning.

    Until 0.2, four schedules followed the documents' letter whatever `--reg_horizon` was: what such a run computed is
    what `--reg_horizon documents` computes now.
    """
    before = _had_another_lambda(settings) and LAMBDA_FOLLOWS not in settings
    return {**settings, "reg_horizon": "documents"} if before else dict(settings)


def _had_another_lambda(settings: Mapping[str, Any]) -> bool:
    return _has_literal_lambda(settings) and settings.get("reg_horizon") != "documents"


def _has_literal_lambda(settings: Mapping[str, Any]) -> bool:
    schedule = SCHEDULES.get(settings.get("RST_schedule", ""))
    return settings.get("struct") == "rsst" and schedule is not None and schedule.literal is not None


def is_penalty_chosen(settings: Mapping[str, Any]) -> bool:
    """Return whether nobody had named the `penalty` of a run; of one before 0.2, whether it is the usual one."""
    args = argparse.Namespace(optimizer=settings.get("optimizer", "sgd"))
    return bool(settings.get(PENALTY_CHOSEN, settings.get("penalty") == penalty_before(args)))


def plain(value: Any) -> Any:
    """A flag's value as JSON and YAML know it: a tuple becomes a list."""
    return list(value) if isinstance(value, tuple) else value


def identity_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what a run computes, as far as they are not the parser's defaults.

    So a flag that is added later does not make strangers of older runs.
    """
    if settings.get("reg_horizon") == "documents" and not _has_literal_lambda(settings):
        settings = {**settings, "reg_horizon": "epoch"}  # the same thing under its older name
    return {k: v for k, v in settings.items() if scope_of(k).run and v != default_of(k)}


def default_of(name: str) -> Any:
    """Return the value of a flag that nobody gives, as JSON and YAML know it; None if there is no such flag."""
    return plain(FLAGS[name].parsed_default) if name in FLAGS else None


def identity_of_round_0(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that decide what round 0 computes, as far as they are not the parser's defaults.

    Files of initial weights are not among them: what they hold counts. Nor are the kernels' flags, see `numerics`.
    """
    settings = settings_of(args)
    if args.prune_type in CONTINUED:  # from round 1 on it differs from the default
        settings["prune_type"] = default_of("prune_type")
    if args.distill == DENSE:  # from round 1 on there is a teacher
        settings |= {name: default_of(name) for name in settings if name.startswith("distill")}
    return {k: v for k, v in identity_of(settings).items() if scope_of(k).round_0}


def can_share_round_0(args: argparse.Namespace) -> bool:
    """Return whether other runs may have trained the round 0 of this one.

    What a user's file depends on is not known, and a network that is given has not to be trained.
    """
    return not runs_a_file(args.arch) and args.round_0 != GIVEN


def default_run_folder(args: argparse.Namespace) -> str:
    """`<dataset>_<struct>_output_<arch>_<...>_<hash>`: the same settings give the same folder, others another."""
    identity = identity_of(settings_of(args))
    if args.dataset == "imagefolder":
        identity["data"] = str(Path(args.data).resolve())
    identity |= _penalty_in_a_name(args)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    tied = (args.vit_structured or args.regroup) and prunes_transformer_units(args)
    target = [args.vit_prune_target] if tied else []
    target += ["regroup"] if args.regroup else []
    criterion = [args.criteria] if prunes_units(args) or args.struct == "refill" else []
    control = [args.control] if args.control != "none" else []
    name = [_fit(args.exp_name)[:LONGEST_NAME]] if args.exp_name else []
    parts = [_short(args.arch), *target, *criterion, f"rate{args.rate:g}", *control, f"seed{args.seed}", *name, digest]
    return f"{args.dataset}_{args.struct}_output_{'_'.join(parts)}"


def _penalty_in_a_name(args: argparse.Namespace) -> dict[str, str]:
    """Return what a folder's name says of `--penalty`: one that is to be chosen has the name that it had before."""
    before = penalty_before(args)
    if args.penalty == "auto" or vars(args).get(PENALTY_CHOSEN):
        return {"penalty": before}
    return {"penalty": f"{before}, as given"} if args.penalty == before and "penalty" in args.named else {}


def _short(arch: str) -> str:
    """A network's name without the folders of its file, fit for a file name."""
    return _fit(Path(arch).name if ":" in arch else arch)[:LONGEST_ARCH]


def _fit(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text)


def tracker_name(args: argparse.Namespace, time_stamp: str) -> str:
    """The documents' run name for WandB."""
    if args.exp_name:
        return str(args.exp_name)
    parts = [args.struct, _short(args.arch), args.dataset]
    if args.struct == "rsst":
        parts += [f"sched_{args.RST_schedule}", f"reg_{args.reg_granularity_prune}"]
        parts += [f"exp{args.exponents:g}"] if SCHEDULES[args.RST_schedule].reads_exponents else []
    elif args.struct == "refill":
        parts.append(f"fill_{args.fillback_rate}")
    parts += [f"crit_{args.criteria}", f"rate_{args.rate}"]
    parts += ["pretrained"] if args.pretrained or args.vit_pretrained else []
    parts += [f"struct_{args.vit_prune_target}"] if args.vit_structured else []
    parts += ["regroup"] if args.regroup else []
    parts += [args.control] if args.control != "none" else []
    return "_".join([*parts, time_stamp])
