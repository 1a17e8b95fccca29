"""One run from beginning to end: train, prune, regroup, rewind, and again."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from structured_tickets.base.errors import Interrupted
from structured_tickets.base.randomness import random_states
from structured_tickets.base.text_tables import counted
from structured_tickets.base.weights import cloned_state
from structured_tickets.data.fingerprint import without_pixels
from structured_tickets.runs.begin import new_run, take_up
from structured_tickets.runs.checkpoint_schema import check_fits
from structured_tickets.runs.compared_run import ControlSource
from structured_tickets.runs.dense_store import DenseStore
from structured_tickets.runs.epochs import TrainedEpoch, epoch_row, judge_given, train_epoch
from structured_tickets.runs.folder import RunFolder
from structured_tickets.runs.judge import judge, warn_if_not_squeezed
from structured_tickets.runs.next_masks import next_masks
from structured_tickets.runs.outcome import final_network, how_to_export, result_of
from structured_tickets.runs.pictures import draw_kept_units
from structured_tickets.runs.reporter import Reporter, SilentReporter
from structured_tickets.runs.round import Round, seed_round, start_weights
from structured_tickets.runs.setup import Setup
from structured_tickets.runs.state import fields_of, packed_pair, state_from
from structured_tickets.runs.tables import rounds_table
from structured_tickets.settings.identity import can_share_round_0
from structured_tickets.training.rounds import epochs_of, step_of
from structured_tickets.training.stop import StopRequest
from structured_tickets.training.teachers import DENSE

log = logging.getLogger("rsst")


class Experiment:
    """One run: what it works with, its folder, and the state in which it is.

    Args:
        source: For a control, the run that it is compared with.
    """

    def __init__(self, setup: Setup, folder: RunFolder, source: ControlSource | None = None) -> None:
        args = setup.args
        self.setup, self.folder, self.source = setup, folder, source
        stored = args.dense_store and can_share_round_0(args)
        self.store = DenseStore(Path(args.dense_store)) if stored and setup.world.is_first else None
        self.run = new_run(setup)
        self.stop = StopRequest(setup.world)
        self.reporter: Reporter = SilentReporter()

    def carry_out(self) -> str:
        """Begin or continue the run and bring it to its end; returns the table of rounds."""
        self.begin()
        for state in range(len(self.run.rounds), self.setup.args.pruning_times):
            self.carry_out_round(state)
        return self.finish()

    def carry_out_round(self, state: int) -> None:
        """Rewind, train, then prune and regroup for the next round."""
        current = self.rewind(state)
        self.train(current)
        self.prune_and_regroup(current)
        current.close()

    def begin(self) -> None:
        """Continue the run in the folder, or begin one there; all processes go on from what the first one finds."""
        world, setup = self.setup.world, self.setup
        known_to_all = without_pixels(self.run.contents)  # each process keeps its images as its memory allows
        world.check_agreement("the images or labels", json.dumps([self.run.data, known_to_all]))
        if world.is_first:
            self.run, self.reporter = take_up(setup, self.run, self.folder, self.source, self.store)
        if world.size > 1:
            self.run = state_from(world.share(fields_of(self.run)))
            setup.args.penalty = self.run.args["penalty"]
        weights = self.run.state_dict or self.run.init_weight
        check_fits(weights, self.run.optimizer, setup.model, setup.optimizer(setup.model))

    def rewind(self, state: int) -> Round:
        """Set all weights to those that the round begins with, under its masks; or to where it was interrupted."""
        run, setup = self.run, self.setup
        fresh = run.state != state or not run.state_dict
        if fresh:
            run.start_weight = start_weights(setup, run, self.source) if state else {}
            run.state, run.epoch, run.step = state, epochs_of(setup.args, state).start, 0
            run.best_sa, run.faded = [-1.0, -1.0, -1.0], {}
            run.masks, run.loss_scale, run.average = run.following, {}, {}
        setup.model.load_state_dict(run.begun_with if fresh else run.state_dict)
        current = Round(setup, run, self.stop, self.reporter.progress, {} if fresh else run.optimizer)
        if fresh:
            run.doomed_norm = current.doomed_norm()
        seed_round(run, setup, fresh)
        current.check_agreement("start")
        begins = (run.epoch, run.step) == (current.epochs.start, 0)
        place, before = () if begins else (run.epoch, run.step), step_of(setup.args, state, current.epochs.start)
        self.reporter.round_starts(state, current.shares, current.size_in_words, before, place, current.is_given)
        return current

    def train(self, current: Round) -> None:
        """Train the round, or what is left of it, epoch by epoch."""
        run, args = self.run, self.setup.args
        for epoch in range(run.epoch, current.epochs.stop):
            rewind_here = args.prune_type == "rewind_lt" and epoch == args.rewind_epoch and run.step == 0
            if current.number == 0 and rewind_here:
                run.init_weight = cloned_state(self.setup.model)
            try:
                trained = judge_given(current) if current.is_given else train_epoch(current, run, self.folder, epoch)
            except Interrupted:
                self._save(current)
                raise
            self._close_epoch(current, epoch, trained)
            self.stop.obey(f"in round {current.number}, after epoch {epoch}")

    def _close_epoch(self, current: Round, epoch: int, trained: TrainedEpoch) -> None:
        """Evaluate the network, always after the last epoch of a round, and save the state of the run."""
        run, began = self.run, time.perf_counter()
        self._hold_faded_units(current, epoch)
        is_judged = (epoch + 1) % self.setup.args.eval_every == 0 or epoch + 1 == current.epochs.stop
        judged = current.accuracies() if is_judged else None
        row = epoch_row(current, epoch, trained, judged or (None, None), time.perf_counter() - began)
        run.history.append(row.plain())
        run.epoch, run.step, run.partial, run.reg_lambda = epoch + 1, 0, {}, row.reg_lambd
        better = judged is not None and judged[0] > run.best_sa[0]
        if judged and better:
            run.best_sa = [*judged, float(epoch)]
        # The best one first: the checkpoint already says that this epoch is the best.
        self._save(current, *([self.folder.best(run.state)] if better else []))
        self.reporter.epoch(run.history[-1])

    def _hold_faded_units(self, current: Round, epoch: int) -> None:
        run = self.run
        faded = {} if epoch + 1 == current.epochs.stop else current.faded_units(run.begun_with)
        if sum(map(len, faded.values())) > sum(map(len, run.faded.values())):
            run.faded = faded
            current.hold_faded_units(faded)
            units, doomed = sum(map(len, faded.values())), counted(current.doomed_units(), "doomed unit")
            words = "round %d epoch %3d: %s of %s faded out and held at zero from now on%s"
            log.info(words, run.state, epoch, f"{units:,}", doomed, current.size_in_words)

    def _save(self, current: Round, *copies: Path) -> None:
        """Write the state, as far as it has been written back, to these files and then to the round's checkpoint."""
        self.run.state_dict = cloned_state(self.setup.model)
        self.run.optimizer = current.trainee.optimizer_state()
        self.run.loss_scale = current.scale.state() if current.scale else {}
        self.run.average = current.averaged_state()
        self.run.other_rng = self.setup.world.gather(random_states())[1:]
        for path in (*copies, None):
            self.folder.save(self.run, path, current.held)

    def prune_and_regroup(self, current: Round) -> None:
        """Judge the round, then decide the masks of the next."""
        run, setup, state = self.run, self.setup, current.number
        current.check_agreement("end")
        if state == 0 and self.store is not None:
            self.store.leave(run, self.folder, setup.numerics)
        averaged = current.averaged_accuracies()
        hard = current.hardened_accuracies(averaged)
        squeeze = current.doomed_norm() / run.doomed_norm if run.doomed_norm else None
        warn_if_not_squeezed(state, squeeze, setup.args.penalty)
        if state == 0 and setup.args.distill == DENSE:
            run.dense_weight = cloned_state(setup.model)
        run.following = next_masks(setup, run, self.source, self.folder.progress(run), self.stop)
        self.folder.save_value(packed_pair(run.following), self.folder.masks(state))
        run.rounds.append(judge(setup, run, current.pair, hard, averaged, squeeze, run.following).plain())
        self._save(current)
        if setup.args.keep_checkpoints:
            self.folder.forget_rounds(state, setup.args.keep_checkpoints)
        if setup.world.is_first:
            self.folder.progress(run).forget()
        self.reporter.round(run.rounds[-1], run.rounds, last=state + 1 == setup.args.pruning_times)
        self.stop.obey(f"after round {state}")

    def finish(self) -> str:
        """Save the final network (the last round's weights, hardened); returns the table of rounds."""
        if not self.setup.world.is_first:
            return ""
        run, folder = self.run, self.folder
        last = run.rounds[-1]["round"]
        # The state may be that of a later round, interrupted when more rounds were wanted.
        ended = run if run.state == last else RunFolder.load(folder.checkpoint(last))
        folder.save_value(final_network(self.setup.model, ended), folder.ticket)
        draw_kept_units(run.rounds, folder.path)
        folder.write_result(result_of(run, is_control=self.source is not None))
        rounds = counted(len(run.rounds), "round")
        log.info("finished %s. Final network, at full size with its masks: %s", rounds, folder.ticket)
        if self.setup.rules.structured:
            log.info("%s", how_to_export(self.setup.args, folder.path, run.rounds[-1]))
        return rounds_table(run.rounds)

    def close(self) -> None:
        """Release trackers, signals and the folder."""
        self.reporter.close()
        self.stop.restore()
        self.folder.unlock()
