"""The finished run whose ticket a control run is compared with: its dense round and its masks are taken from there."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from structured_tickets.base.errors import DataError, UsageError
from structured_tickets.base.randomness import mixed_seed, random_states, restore_random_states, seed_everything
from structured_tickets.base.text_tables import counted
from structured_tickets.base.untrusted_tensors import as_state_dict, load_tensors
from structured_tickets.networks import build_model
from structured_tickets.networks.hosted import of_the_data
from structured_tickets.pruning.controls import CONTROL_STREAM
from structured_tickets.pruning.masks import MaskPair
from structured_tickets.pruning.methods import CONTROLS
from structured_tickets.runs.checkpoint_schema import check_shapes
from structured_tickets.runs.folder import RunFolder
from structured_tickets.runs.read import own_folder
from structured_tickets.runs.same_run import check_same_data, check_same_teacher
from structured_tickets.runs.state import RunState, unpacked
from structured_tickets.settings.flag_table import PENALTY_CHOSEN
from structured_tickets.settings.identity import identity_of, settings_of


class ControlSource:
    """A run with the same settings but for `--control`.

    Attributes:
        dense: Its state when round 0 had ended.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        """Find the run in `--control_of`, or in the folder that its settings would have.

        Raises:
            UsageError: There is none, it is another run, or it has too few rounds.
        """
        ticket = argparse.Namespace(**{**vars(args), "control": "none", "control_of": None})
        path = Path(args.control_of or own_folder(ticket))
        first = "first run the same command without --control, or give its run folder with --control_of"
        if not path.is_dir():
            raise UsageError(f"argument --control: the run to compare with does not exist ({path}); {first}")
        self.folder = RunFolder(path)
        newest = self.folder.newest_run()
        if newest is None or len(newest.rounds) < args.pruning_times:
            rounds = len(newest.rounds) if newest else 0
            raise UsageError(
                f"argument --control: {path} has finished {rounds} of {counted(args.pruning_times, 'round')}; {first}"
            )
        ours, theirs = identity_of(settings_of(ticket)), identity_of(newest.args)
        different = sorted(k for k in (ours.keys() | theirs.keys()) - {"exp_name"} if ours.get(k) != theirs.get(k))
        if vars(args).get(PENALTY_CHOSEN):  # it follows from the others
            different = [k for k in different if k != "penalty"] or different
        if different:
            flags = ", ".join(f"--{k}" for k in different)
            raise UsageError(f"argument --control: the run in {path} has another {flags}. Only --control may differ")
        self.dense: RunState = RunFolder.load(self.folder.checkpoint(0))
        self.args = args

    def begin(self, run: RunState, names: Sequence[str], image_size: int) -> RunState:
        """`run`, which has not begun, after the dense round: with the ticket, or the weights that the control asks for.

        Args:
            names: The prunable weights.

        Raises:
            UsageError: The data are others, or the network always begins with the same weights.
        """
        check_same_data(
            self.dense, run.data, run.contents, f"the run in {self.folder.path} was on other images or labels"
        )
        check_same_teacher(self.dense, run, f"the run in {self.folder.path} had another teacher in this file")
        own = {k: getattr(run, k) for k in ("args", "tracker_id", "classes", "sources")}
        begun = replace(self.dense, **own)
        if CONTROLS[self.args.control].fresh:
            drawn, of_data = self._new_weights(len(run.classes), image_size)
            if same := [n for n in names if torch.equal(drawn[n], self.dense.init_weight[n])]:
                raise UsageError(
                    f"argument --control: {self.args.arch} has fixed initial weights ({same[0]}) and cannot be "
                    "re-initialised"
                )
            weights = {n: v for n, v in drawn.items() if n not in of_data}
            begun.init_weight = {n: weights.get(n, value).clone() for n, value in run.init_weight.items()}
        return begun

    def _new_weights(self, classes: int, image_size: int) -> tuple[dict[str, Tensor], frozenset[str]]:
        """Return a state dict with other weights, and which of its names are the data set's."""
        before = random_states()
        seed_everything(mixed_seed(self.args.seed, CONTROL_STREAM))
        model = build_model(self.args.arch, classes, image_size)
        restore_random_states(before)
        return model.state_dict(), of_the_data(model)

    def masks(self, state: int) -> MaskPair:
        """Return the masks that the run decided when round `state` had ended.

        Raises:
            DataError: The file cannot be read, or does not hold the masks of this network.
        """
        file = self.folder.masks(state)
        found = load_tensors(file, f"argument --control: cannot read the masks {file}")
        try:
            current, refill = (as_state_dict(found[name], "") for name in ("current", "refill"))
            pair = MaskPair(unpacked(current), unpacked(refill))
            check_shapes(self.dense.state_dict, {}, [pair])
        except (DataError, LookupError, TypeError, ValueError) as error:
            raise DataError(f"argument --control: {file} does not hold the masks of a round ({error})") from error
        return pair
