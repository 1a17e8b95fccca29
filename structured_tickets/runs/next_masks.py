"""The masks of the next round: ranked, pruned and regrouped; or, for a control, made from another run's."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from torch import Tensor

from structured_tickets.base.console import ONLY_IN_THE_FILE
from structured_tickets.base.weights import cloned_state
from structured_tickets.pruning.controls import controlled
from structured_tickets.pruning.decide import decide
from structured_tickets.pruning.masks import MaskPair
from structured_tickets.pruning.oneshot import Admm
from structured_tickets.pruning.regroup_text import banner, kind_lines, ratio_labels, summary
from structured_tickets.runs.compared_run import ControlSource
from structured_tickets.runs.folder import Progress
from structured_tickets.runs.setup import Setup
from structured_tickets.runs.state import RunState
from structured_tickets.training.rounds import CONTINUED
from structured_tickets.training.stop import StopRequest

log = logging.getLogger("rsst")


def next_masks(
    setup: Setup, run: RunState, source: ControlSource | None, progress: Progress, stop: StopRequest
) -> MaskPair:
    """Return the masks for the round after `run.state`, whose weights the model has. The first process decides for all.

    Args:
        source: For a control, the run that it is compared with.
        progress: Where ADMM, which trains for some time, keeps its state.
    """
    world, pair = setup.world, MaskPair({}, {})
    if world.is_first:
        with stop.alone():
            pair = (
                control_masks(setup, source, run.state, run.masks) if source else _regrouped(setup, run, progress, stop)
            )
    return MaskPair(**world.share({"current": pair.current, "refill": pair.refill}))


def control_masks(setup: Setup, source: ControlSource, state: int, own: MaskPair | None) -> MaskPair:
    """Return the masks of a control for the round after `state`, which it has trained under masks of its `own`."""
    targets = setup.rules.targets if setup.rules.structured else ()
    return controlled(
        setup.args.control,
        source.masks(state),
        setup.model,
        setup.groups,
        targets,
        seed=setup.args.seed,
        state=state,
        image_size=setup.image_size,
        within=own if setup.args.prune_type in CONTINUED else None,
    )


def _regrouped(setup: Setup, run: RunState, progress: Progress, stop: StopRequest) -> MaskPair:
    """Rank and prune by the method, regroup into whole units."""
    trained = cloned_state(setup.model)
    if run.state == 0 and setup.rules.method.ranks == "dense":
        run.dense_weight = trained
    rules, args = setup.rules, setup.args
    where = ONLY_IN_THE_FILE if run.state + 1 >= args.pruning_times else None  # no round of this run uses the masks
    if rules.structured:
        hard = not rules.method.squeezes
        log.info("%s", banner(rules.targets, args.criteria, ratio_labels(rules.ratios), hard), extra=where)
    ranked = _ranked(run, trained, rules.method.ranks, args.rank_weights)
    pair = decide(
        setup.model,
        setup.groups,
        rules,
        run.state,
        previous=run.masks,
        ranked=ranked,
        trained=ranked if rules.method.one_shot else trained,
        admm=_admm(setup, run, progress, stop),
        seed=args.seed,
        batches=setup.train_loader.fixed_batches(args.criteria_batches),
    )
    if rules.structured:
        log.info("%s", kind_lines(setup.groups, pair, rules.targets), extra=where)
    level = logging.INFO if rules.structured else logging.DEBUG
    log.log(level, "%s", summary(setup.groups, pair.refill), extra=where)
    return pair


def _ranked(run: RunState, trained: dict[str, Tensor], ranks: str, rank_weights: str) -> dict[str, Tensor]:
    """Return the weights that the method ranks (see `Method.ranks`)."""
    if ranks == "trained":
        return run.init_weight if rank_weights == "initial" else trained
    return run.init_weight if ranks == "initial" else run.dense_weight


def _admm(setup: Setup, run: RunState, progress: Progress, stop: StopRequest) -> Admm:
    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        loader = setup.train_loader.whole().in_parts()
        loader.seek(run.state, setup.args.epochs + epoch)
        for batch in loader:
            stop.obey(f"while ADMM trained after round {run.state}")
            yield batch

    args = setup.args
    saved = progress.load, progress.save
    return Admm(
        setup.optimizer, batches, args.admm_epochs, args.admm_rho, *saved, setup.precision, freeze_bn=args.freeze_bn
    )
