"""One round: the network under its masks, and what trains it."""

from __future__ import annotations

import copy
import gc
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from structured_tickets.base.randomness import mixed_seed, restore_random_states, seed_everything
from structured_tickets.base.weights import digest_of, in_place_of
from structured_tickets.data.mixing import Mixing
from structured_tickets.pruning.held import continued, doomed_whole, faded_units, held_masks
from structured_tickets.pruning.masks import MaskPair, as_current, as_refill
from structured_tickets.pruning.methods import CONTROLS
from structured_tickets.pruning.shares import Shares, shares
from structured_tickets.runs.compared_run import ControlSource
from structured_tickets.runs.judge import Accuracies
from structured_tickets.runs.setup import Setup, prepare_for_speed, search_for_convolutions
from structured_tickets.runs.state import RunState
from structured_tickets.training.averaging import Average
from structured_tickets.training.distillation import Distillation, as_teacher
from structured_tickets.training.epoch import Passer, ShowProgress, hardened
from structured_tickets.training.loss_scale import LossScale
from structured_tickets.training.penalty.expected import DECOUPLED, DIRECT
from structured_tickets.training.penalty.reg_pruner import Pruner
from structured_tickets.training.recording import recorder_for
from structured_tickets.training.rounds import CONTINUED, GIVEN, epochs_of
from structured_tickets.training.stop import StopRequest
from structured_tickets.training.teachers import DENSE
from structured_tickets.training.trainee import Trainee
from structured_tickets.unit_groups.unit import kept_units

PROBES = 2  # images that show which parameters the logits depend on


class Round:
    """One round: the network under its masks, with optimizer and penalty. Made when the round begins.

    Attributes:
        number: From 0.
        pair: The masks of the round; None in round 0.
        epochs: Its epochs, by their numbers in the schedule of its learning rate.
        held: What stays at zero, by parameter name.
        trainee: The network at its real size, with its optimizer.
        passer: What every training step is passed.
        scale: Of the loss, in float16; it stays when the network becomes smaller.
        pruner: RSST's penalty; None without one.
        average: Of the weights of `model`; None without one.
    """

    def __init__(
        self, setup: Setup, run: RunState, stop: StopRequest, progress: ShowProgress, optimizer: dict[str, Any]
    ) -> None:
        """Put the network, which has its weights, under the masks of the round.

        Args:
            optimizer: The optimizer's state to continue from; empty for a new one.
        """
        self.setup, self.number, self.pair = setup, run.state, _masks_of(setup, run)
        self.epochs = epochs_of(setup.args, run.state)
        self._stop, self._progress = stop, progress
        self.scale = LossScale(setup.device, run.loss_scale) if setup.precision == torch.float16 else None
        self.distillation = self._distillation(run)
        self._equip(run.faded, optimizer, run.average)

    def _distillation(self, run: RunState) -> Distillation | None:
        args, teacher = self.setup.args, self.setup.teacher
        if args.distill == DENSE and self.number:
            teacher = copy.deepcopy(self.setup.model)
            teacher.load_state_dict(run.dense_weight)
            as_teacher(teacher)
        if teacher is None or self.is_given:
            return None
        return Distillation(teacher, args.distill_alpha, args.distill_temperature, args.distill_loss)

    def _equip(self, faded: dict[str, list[int]], optimizer: dict[str, Any], average: dict[str, Tensor]) -> None:
        setup, args = self.setup, self.setup.args
        self.close()
        for old in (
            "trainee",
            "passer",
            "pruner",
            "average",
        ):  # before their successors need memory; networks are cycles
            vars(self).pop(old, None)
        gc.collect()
        if args.compile:
            torch.compiler.reset()  # it refuses to compile more than a few networks of one class
        search_for_convolutions(len(self.epochs) * len(setup.train_loader))
        self.held = held_masks(self.pair, setup.rules, setup.groups, faded)
        self.trainee = Trainee(
            setup.model,
            self.held,
            setup.optimizer,
            lambda model: prepare_for_speed(model, setup.precision, args.compile),
            args.compact_training,
        )
        if optimizer:
            self.trainee.load_optimizer_state(optimizer)
        self.average = self._average(average)
        self.passer = self._passer()
        squeezing = self.pair is not None and setup.rules.method.squeezes
        self.pruner = Pruner(self.trainee.model, args, self.passer) if squeezing else None

    def _average(self, values: dict[str, Tensor]) -> Average | None:
        """Return the average of the network that trains.

        Args:
            values: Those that the averages of the whole network have; empty at the round's start.
        """
        if not self.setup.args.ema or self.is_given:
            return None
        masked = {n: v * self.held[n].to(v.device) if n in self.held else v for n, v in values.items()}
        own = self.trainee.cut_state(masked) if masked else {}
        return Average(self.trainee.model, self.setup.args.ema, self.epochs.start, own)

    def _passer(self) -> Passer:
        setup, masks = self.setup, (self.pair.current, self.pair.refill) if self.pair else ({}, {})
        current, refill = map(self.trainee.cut, masks)
        probes = setup.train_loader.fixed_batches(1)[0][0][:PROBES]
        return Passer(
            setup.args,
            as_current(current),
            as_refill(refill),
            held=self.trainee.held,
            rate=setup.rate_of(self.number),
            stop=self._stop,
            progress=self._progress,
            decoupled=setup.args.penalty in (DECOUPLED, DIRECT),
            paced=setup.args.penalty != DIRECT,
            world=setup.world,
            network=setup.world.parallel(self.trainee.model, probes),
            precision=setup.precision,
            scale=self.scale,
            recorder=recorder_for(setup.device, setup.args.step, setup.world),
            mixing=self._mixing(),
            distillation=self.distillation,
            at_once=at_once(setup.args),
            average=self.average,
        )

    def _mixing(self) -> Mixing | None:
        args, loader = self.setup.args, self.setup.train_loader
        if not (args.mixup or args.cutmix):
            return None
        what = (args.mixup, args.cutmix, len(self.setup.classes), loader.image_size, args.seed, self.number)
        return Mixing(*what, loader.ahead)

    def close(self) -> None:
        """Give up what was recorded of the steps: at once, since graphs may not outlive each other."""
        if "passer" in vars(self) and self.passer.recorder is not None:
            self.passer.recorder.close()

    @property
    def is_given(self) -> bool:
        """True of a round 0 whose network is given: nothing is trained."""
        return self.number == 0 and self.setup.args.round_0 == GIVEN

    @property
    def model(self) -> nn.Module:
        """The network that trains, without what can be left out of it."""
        return self.trainee.model

    @property
    def strength(self) -> float:
        """Lambda at the last step; 0 without a penalty."""
        return self.pruner.strength if self.pruner else 0.0

    @property
    def shares(self) -> Shares:
        """Shares of the prunable weights that are zero, doomed and kept."""
        return shares(self.pair, self.setup.names, self.setup.rules)

    @property
    def size_in_words(self) -> str:
        """The end of a message about a network that trains at a smaller size; empty where nothing is left out."""
        share = self.trainee.share
        if share == 1:
            return ""
        return f". Training a smaller network, without the units that are zero: {100 * share:.1f}% of all parameters"

    def doomed_norm(self) -> float:
        """Return the norm of the doomed weights; 0 without any."""
        return self.pruner.doomed_norm() if self.pruner else 0.0

    def hold_faded_units(self, faded: dict[str, list[int]]) -> None:
        """Hold units at zero, and leave them out of the network, for the rest of the round."""
        strength = self.strength
        self._equip(faded, self.trainee.optimizer_state(), self.averaged_state())
        if self.pruner is not None:
            self.pruner.strength = strength

    def faded_units(self, initial: dict[str, Tensor]) -> dict[str, list[int]]:
        """Return the doomed units of which next to nothing is left, by unit group.

        Args:
            initial: The weights that the round began with.
        """
        setup, args = self.setup, self.setup.args
        if self.pruner is None or self.pair is None or args.rsst_dead != "zero" or not args.fade_out:
            return {}
        groups = [g for g in setup.groups if g.kind in setup.rules.targets]
        return setup.world.share(faded_units(groups, self.pair, setup.model.state_dict(), initial, args.fade_out))

    def doomed_units(self) -> int:
        """Return the number of units that the penalty shrinks in this round."""
        if self.pair is None:
            return 0
        doomed, structure = self.pair.doomed, self.pair.structure
        groups = [g for g in self.setup.groups if g.kind in self.setup.rules.targets]
        return sum(int((kept_units(g, doomed) & ~kept_units(g, structure)).sum()) for g in groups)

    def averaged_state(self) -> dict[str, Tensor]:
        """Return the averages of the whole network, by name in its state dict; empty without `--ema`."""
        return self.trainee.whole_state(self.average.state()) if self.average else {}

    def accuracies(self) -> tuple[float, float]:
        """Return validation and test accuracy, in percent: of the averaged weights with `--eval_ema`."""
        swapped = self.average.in_place() if self.average and self.setup.args.eval_ema else nullcontext()
        with swapped:
            return self.setup.accuracies(self.model, self.passer.recorder)

    def hardened_accuracies(self, averaged: Accuracies) -> Accuracies:
        """Return both with the structure applied; None without a penalty. The weights have been written back.

        Args:
            averaged: Those of the averaged weights.
        """
        if self.pruner is None or self.pair is None:
            return None, None
        if self.average and self.setup.args.eval_ema:
            return averaged
        with hardened(self.setup.model, self.pair.structure):
            return self.setup.accuracies(self.setup.model)

    def averaged_accuracies(self) -> Accuracies:
        """Return both of the averaged weights with the structure applied; None without `--ema`."""
        if self.average is None:
            return None, None
        whole, averaged = self.setup.model.state_dict(), self.averaged_state()
        structure = self.pair.structure if self.pair else {}
        with in_place_of(list(whole.values()), [averaged[n] for n in whole]), hardened(self.setup.model, structure):
            return self.setup.accuracies(self.setup.model)

    def check_agreement(self, when: str) -> None:
        """Compare masks, penalty and weights between the processes.

        Raises:
            RunError: They differ.
        """
        if self.setup.world.size == 1:
            return
        masks = {**as_current(self.pair.current), **as_refill(self.pair.refill)} if self.pair else {}
        penalty = torch.tensor([self.pruner.strength] if self.pruner else [], dtype=torch.float64)
        digest = digest_of({**self.setup.model.state_dict(), **masks, "penalty": penalty})
        self.setup.world.check_agreement(f"weights, masks or penalty at the {when} of round {self.number}", digest)


def at_once(args: Any) -> int:
    """Return how many images a forward pass takes at most; 0: a whole batch."""
    return args.batch_size if args.accumulate > 1 else 0


def _masks_of(setup: Setup, run: RunState) -> MaskPair | None:
    args = setup.args
    whole = setup.rules.method.squeezes and args.reg_target == "unit" and args.rsst_dead == "zero"
    if run.masks is not None and whole:
        return doomed_whole(setup.groups, run.masks, setup.rules.targets)
    return run.masks


def start_weights(setup: Setup, run: RunState, source: ControlSource | None) -> dict[str, Tensor]:
    """Return the weights that the round after `run.state` begins with where they are not the initial ones; else none.

    A control with initial weights of its own begins every round with them.
    """
    args = setup.args
    if args.prune_type not in CONTINUED or (source is not None and CONTROLS[args.control].fresh):
        return {}
    could_train = held_masks(_masks_of(setup, run), setup.rules, setup.groups, run.faded)
    zero = {n: torch.zeros_like(run.init_weight[n]) for n in could_train}
    return continued(run.state_dict, zero if args.refill_from == "zero" else run.init_weight, could_train)


def seed_round(run: RunState, setup: Setup, fresh: bool) -> None:
    """Restore or seed the random state of this rank. Each rank draws its own dropout masks.

    Args:
        fresh: The round begins; else it continues from `run`.
    """
    states, world = [run.rng, *run.other_rng], setup.world
    if not fresh and len(states) == world.size:
        restore_random_states(states[world.rank])
    else:
        place = () if fresh else (run.epoch, run.step)
        own = [world.rank] if world.rank else []
        seed_everything(mixed_seed(setup.args.seed, run.state, *place, *own))
