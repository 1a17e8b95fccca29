"""The finished run whose ticket a control run is compared with: its dense round and its masks are taken from there."""

from __future__ import annotations

import argparse
from pathlib import Path

from errors import UsageError
from masks import MaskPair
from options import default_run_folder, identity_of, settings_of
from run_state import RunFolder, RunState, load_safely, unpacked


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
        path = Path(args.control_of or default_run_folder(ticket))
        first = "run the same command without --control first, or name its folder by --control_of"
        if not path.is_dir():
            raise UsageError(f"argument --control: {path}, the run to compare with, is not there: {first}")
        self.folder = RunFolder(path)
        newest = self.folder.newest_run()
        if newest is None or len(newest.rounds) < args.pruning_times:
            rounds = len(newest.rounds) if newest else 0
            raise UsageError(f"argument --control: {path} has {rounds} of {args.pruning_times} rounds: {first}")
        ours, theirs = identity_of(settings_of(ticket)), identity_of(newest.args)
        different = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        if different:
            flags = ", ".join(f"--{k}" for k in different)
            raise UsageError(f"argument --control: the run in {path} has another {flags}; only --control may differ")
        self.dense: RunState = RunFolder.load(self.folder.checkpoint(0))

    def masks(self, state: int) -> MaskPair:
        """What the run decided when round `state` had ended."""
        found = unpacked(load_safely(self.folder.masks(state)))
        return MaskPair(found["current"], found["refill"])
