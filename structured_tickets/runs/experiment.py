"""One run from beginning to end: train, judge, decide the next masks, rewind, and again."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structured_tickets.base.console import log_to_file, log_warnings
from structured_tickets.base.distributed import ALONE, World, has_batchnorm
from structured_tickets.base.environment import describe_environment, numerics
from structured_tickets.base.errors import DivergedError, Interrupted
from structured_tickets.base.randomness import mixed_seed, random_states, restore_random_states, seed_everything
from structured_tickets.base.weights import cloned_state, digest_of, network_digest
from structured_tickets.data.fingerprint import describe_data, fingerprint, without_pixels
from structured_tickets.data.loader import Loaders
from structured_tickets.networks import runs_a_file
from structured_tickets.networks.precision import name_of
from structured_tickets.pruning.controls import controlled
from structured_tickets.pruning.decide import (
    decide,
    doomed_whole,
    faded_units,
    held_masks,
    kept_per_group,
    kept_per_kind,
    shares,
)
from structured_tickets.pruning.masks import MaskPair, by_parameter, count_ones, current_key, pruning_state, refill_key
from structured_tickets.pruning.methods import CONTROLS, SQUEEZE_GOAL
from structured_tickets.pruning.oneshot import Admm
from structured_tickets.pruning.regroup_text import banner, ratio_labels, summary
from structured_tickets.runs.begin import choose_initial_weights, continued, find_run
from structured_tickets.runs.checkpoint_schema import check_fits
from structured_tickets.runs.compared_run import ControlSource
from structured_tickets.runs.dense_store import DenseStore
from structured_tickets.runs.dry_run import expected_squeeze
from structured_tickets.runs.folder import Progress, RunFolder
from structured_tickets.runs.pictures import draw_kept_units
from structured_tickets.runs.reporter import Reporter, SilentReporter, rounds_table
from structured_tickets.runs.setup import prepare_for_speed
from structured_tickets.runs.state import Row, RunState, packed, seconds_of
from structured_tickets.runs.trackers import Sink, TensorBoard, Tracker, Trackers
from structured_tickets.settings.identity import identity_of_round_0, settings_of, tracker_name
from structured_tickets.settings.interpret import learning_rate_from, loss_from, optimizer_from, rules_from
from structured_tickets.shrinking.cost import cost_of
from structured_tickets.training.epoch import Passer, hardened, train, validate_together
from structured_tickets.training.meter import Meter
from structured_tickets.training.optimization import OPTIMIZERS
from structured_tickets.training.penalty.reg_pruner import Pruner
from structured_tickets.training.penalty.schedules import clock_from
from structured_tickets.training.stop import StopRequest
from structured_tickets.training.trainee import Trainee
from structured_tickets.unit_groups.unit import UnitGroup, ranked_names

log = logging.getLogger("rsst")

PROBES = 2  # images that show which parameters the logits depend on


class Experiment:
    """One run: a model, its data, its folder, and the state in which it is."""

    def __init__(
        self,
        args: argparse.Namespace,
        model: nn.Module,
        loaders: Loaders,
        groups: list[UnitGroup],
        folder: RunFolder,
        source: ControlSource | None = None,
        world: World = ALONE,
    ) -> None:
        self.args, self.model, self.groups, self.folder, self.world = args, model, groups, folder, world
        self.train_loader, self.val_loader, self.test_loader = loaders
        self.names = ranked_names(model, groups)
        self.rules = rules_from(args, groups)
        self.control = CONTROLS[args.control]
        self.source = source
        self.criterion = loss_from(args)
        self.device = next(model.parameters()).device
        self.precision: torch.dtype = vars(model).get("precision", torch.float32)
        self.rate = learning_rate_from(args, len(self.train_loader))
        self.stop = StopRequest(world)
        known = not runs_a_file(args.arch)  # nobody knows what a user's file depends on
        self.store = DenseStore(Path(args.dense_store)) if args.dense_store and known and world.is_first else None
        self.tracker = Trackers()
        classes = list(getattr(model, "classes", ()))
        self.run = RunState(
            settings_of(args),
            fingerprint(*loaders),
            classes=classes,
            processes=world.size,
            contents=describe_data(loaders, classes),
            precision=name_of(self.precision),
        )
        self.reporter: Reporter = SilentReporter()

    def carry_out(self) -> str:
        """Take the run up and bring it to its end; returns the table of rounds."""
        self.open()
        for state in range(self.next_state, self.args.pruning_times):
            self.train_round(state)
            self.close_round(state)
        return self.finish()

    def open(self) -> None:
        """Take up the run in the folder, or begin one there; all processes go on from what the first one finds."""
        known_to_all = without_pixels(self.run.contents)  # each process keeps its images as its memory allows
        self.world.check_agreement("the images or labels", json.dumps([self.run.data, known_to_all]))
        if self.world.is_first:
            self._take_up()
        self.run = RunState(**self.world.share(vars(self.run)))
        weights, fresh = self.run.state_dict or self.run.init_weight, optimizer_from(self.args, self.model)
        check_fits(weights, self.run.optimizer, self.model, fresh)

    def _take_up(self) -> None:
        found = find_run(self.args, self.folder, self.run)
        log_to_file(self.folder.path / "log.txt")
        log_warnings(self.args.warnings)
        if found is None:
            self._begin()
        else:
            self.run = continued(self.run, found, self._numerics)
            log.info("continuing %s: round %d, %d epochs done", self.folder.path, found.state, found.epoch)
        if self.next_state < self.args.pruning_times:
            self._warn_if_the_penalty_is_weak()
            self.folder.write_settings(self.run.args)
            environment = describe_environment(self.args.words, self.device, name_of(self.precision))
            known = {"data": self.run.data, "network": network_digest(self.model)}
            self.folder.write_environment(environment | known)
            self.tracker = self._trackers()
        self.reporter = Reporter(self.folder.path, self.tracker, self.args.quiet)
        self.reporter.restore(self.run.history, self.run.rounds)
        if found is None:
            self.reporter.track(self.run.history)  # another run's round 0
        weights = sum(self.run.init_weight[n].numel() for n in self.names)
        log.info(
            "%s on %s in %s: %d prunable layers, %d weights; run folder %s",
            self.args.arch,
            self.device,
            name_of(self.precision),
            len(self.names),
            weights,
            self.folder.path,
        )
        if self.world.size > 1:
            log.info(
                "%d processes share batches of %d images%s",
                self.world.size,
                self.args.batch_size,
                "; BatchNorm sees whole batches" * has_batchnorm(self.model),
            )

    def _begin(self) -> None:
        """A new run; where it is a control, or another has trained its round 0, that is behind it."""
        choose_initial_weights(self.model, self.args.init, self.folder)
        self.run.init_weight = cloned_state(self.model)
        if self.source is not None:
            self.run = self.source.begin(self.run, self.names, self.train_loader.image_size)
            self._set_following(self._controlled(0))
            log.info("control %s: round 0 is that of %s", self.args.control, self.source.folder.path)
            self.folder.save(self.run)
        elif self.store is not None:
            self.run = self.store.take(self.run, self.folder, identity_of_round_0(self.args), self._numerics)

    def _trackers(self) -> Trackers:
        args, run, path = self.args, self.run, self.folder.path
        name = tracker_name(args, datetime.now().strftime("%m%d_%H%M"))
        sinks: list[Sink] = [
            Tracker(args.wandb, path, name, run.args, run.tracker_id, args.wandb_group, args.wandb_tags)
        ]
        if args.tensorboard:
            step = run.state * args.epochs + run.epoch if run.history else 0
            sinks.append(TensorBoard(path / "tensorboard", step))
        return Trackers(sinks)

    def _warn_if_the_penalty_is_weak(self) -> None:
        args = self.args
        decoupled = args.penalty == "decoupled"
        squeezes = self.rules.method.squeezes and self.rules.structured and self.control.masks != "narrow"
        if squeezes and (decoupled or not OPTIMIZERS[args.optimizer].adaptive):
            left = expected_squeeze(clock_from(args), self.rate, args.momentum, decoupled)
            if left > SQUEEZE_GOAL:
                log.warning(
                    "the penalty is weak for so short a round: alone it leaves %.0f %% of doomed weights; "
                    "train longer, raise --lr, or try --penalty decoupled",
                    100 * left,
                )

    def _controlled(self, state: int) -> MaskPair:
        assert self.source is not None
        targets = self.rules.targets if self.rules.structured else ()
        return controlled(
            self.args.control,
            self.source.masks(state),
            self.model,
            self.groups,
            targets,
            seed=self.args.seed,
            state=state,
            image_size=self.train_loader.image_size,
        )

    @property
    def _numerics(self) -> dict[str, Any]:
        others = {"processes": self.world.size} if self.world.size > 1 else {}
        return numerics(self.device) | {"precision": str(self.precision), "compiled": self.args.compile} | others

    @property
    def progress(self) -> Progress:
        """Of what happens between this round and the next."""
        return self.folder.progress(self.run)

    @property
    def next_state(self) -> int:
        """The round to train next, or to go on with."""
        return len(self.run.rounds)

    def train_round(self, state: int) -> None:
        """Train round `state` from its ticket, or from where it was broken off."""
        self._begin_round(state)
        run, args = self.run, self.args
        for epoch in range(run.epoch, args.epochs):
            if state == 0 and args.prune_type == "rewind_lt" and epoch == args.rewind_epoch and run.step == 0:
                run.init_weight = cloned_state(self.model)
            self.train_loader.seek(state, epoch, run.step)
            passer, model, optimizer = self.passer, self.trainee.model, self.trainee.optimizer
            passer.meter = Meter.start(self.device, run.partial) if run.step else None
            began, first, before = time.perf_counter(), run.step, run.partial.get("seconds", 0.0)
            try:
                meter = train(state, self.train_loader, model, self.criterion, optimizer, epoch, passer, self.pruner)
            except Interrupted:
                assert passer.meter is not None
                run.epoch, run.step, run.partial = epoch, passer.meter.steps, passer.meter.reached()
                run.partial["seconds"] = before + time.perf_counter() - began
                self.trainee.write_back()
                self._save()
                raise
            except DivergedError as error:
                self.trainee.write_back()
                self.folder.save_value({"state_dict": cloned_state(self.model)}, self.folder.diverged)
                raise DivergedError(f"{error}; its weights are in {self.folder.diverged}") from error
            trained = time.perf_counter() - began
            self._close_epoch(epoch, meter, trained / (meter.steps - first), before + trained)
            self.stop.obey(f"after round {state}, epoch {epoch}")

    def _begin_round(self, state: int) -> None:
        """Model, masks, penalty and optimizer as they are at the start of the round, or where it was broken off."""
        run, args = self.run, self.args
        fresh = run.state != state or not run.state_dict
        if fresh:
            run.state, run.epoch, run.step, run.best_sa, run.faded = state, 0, 0, [-1.0, -1.0, -1.0], {}
            run.current_mask, run.refill_mask = run.following.get("current", {}), run.following.get("refill", {})
        self.pair = MaskPair(run.current_mask, run.refill_mask) if state else None
        whole = self.rules.method.squeezes and args.reg_target == "unit" and args.rsst_dead == "zero"
        if self.pair is not None and whole:
            self.pair = doomed_whole(self.groups, self.pair, self.rules.targets)
        self.model.load_state_dict(run.init_weight if fresh else run.state_dict)
        self._equip({} if fresh else run.optimizer)
        if fresh:
            run.doomed_norm = self.pruner.doomed_norm() if self.pruner else 0.0
        self._seed(fresh)
        self._check_agreement("begins with")
        part = shares(self.pair, self.names, self.rules)
        log.info(
            "round %d: %.2f %% of the prunable weights are zero, %.2f %% being squeezed, %.2f %% kept by the "
            "structure%s",
            state,
            part.zero,
            part.squeezed,
            part.kept,
            self._size_in_words(),
        )
        self.tracker.log({"remain_weight": 100 - part.zero, "prune_times": state, "step": state * args.epochs})

    def _seed(self, fresh: bool) -> None:
        """Every process draws by itself what a network draws (dropout)."""
        run, rank = self.run, self.world.rank
        states = [run.rng, *run.other_rng]
        if not fresh and len(states) == self.world.size:
            restore_random_states(states[rank])
        else:
            place = () if fresh else (run.epoch, run.step)
            seed_everything(mixed_seed(self.args.seed, run.state, *place, *([rank] if rank else [])))

    def _check_agreement(self, when: str) -> None:
        """Raises: RunError, unless masks, penalty and weights are the same in all processes."""
        if self.world.size == 1:
            return
        masks = {**self.pair.current, **self.pair.refill} if self.pair else {}
        penalty = torch.tensor([self.pruner.strength] if self.pruner else [], dtype=torch.float64)
        digest = digest_of({**self.model.state_dict(), **masks, "penalty": penalty})
        self.world.check_agreement(f"what round {self.run.state} {when}", digest)

    def _equip(self, optimizer: dict[str, Any]) -> None:
        """What trains the model under its masks; `optimizer` is a state to go on from, or empty."""
        run, args = self.run, self.args
        for old in ("trainee", "passer", "pruner"):  # before their successors need memory; networks are cycles
            vars(self).pop(old, None)
        gc.collect()
        if args.compile:
            torch.compiler.reset()  # it refuses to compile more than a few networks of one class
        self.held = held_masks(self.pair, self.rules, self.groups, run.faded)
        self.trainee = Trainee(
            self.model,
            self.held,
            lambda model: optimizer_from(args, model),
            lambda model: prepare_for_speed(model, self.precision, args.compile),
            args.compact_training,
        )
        if optimizer:
            self.trainee.load_optimizer_state(optimizer)
        masks = (self.pair.current, self.pair.refill) if self.pair else ({}, {})
        current, refill = (self.trainee.cut(by_parameter(m)) for m in masks)
        self.passer = Passer(
            args,
            {current_key(n): m for n, m in current.items()},
            {refill_key(n): m for n, m in refill.items()},
            held=self.trainee.held,
            rate=self.rate,
            stop=self.stop,
            progress=self.reporter.progress,
            decoupled=args.penalty == "decoupled",
            world=self.world,
            network=self.world.parallel(self.trainee.model, self.train_loader.fixed_batches(1)[0][0][:PROBES]),
        )
        squeezing = self.pair is not None and self.rules.method.squeezes
        self.pruner = Pruner(self.trainee.model, args, self.passer) if squeezing else None

    def _size_in_words(self) -> str:
        share = self.trainee.share
        return "" if share == 1 else f"; the network trains at its real size, {100 * share:.1f} % of the parameters"

    def _let_faded_units_go(self, epoch: int) -> None:
        """Hold at zero, and leave out of the network, the doomed units of which next to nothing is left."""
        run, share = self.run, self.args.fade_out if self.args.rsst_dead == "zero" else 0
        if self.pruner is None or self.pair is None or share == 0 or epoch + 1 == self.args.epochs:
            return
        weights = self.model.state_dict()
        faded = self.world.share(
            faded_units(
                [g for g in self.groups if g.kind in self.rules.targets], self.pair, weights, run.init_weight, share
            )
        )
        if sum(map(len, faded.values())) > sum(map(len, run.faded.values())):
            state, strength = self.trainee.optimizer_state(), self.pruner.strength
            run.faded = faded
            self._equip(state)
            self.pruner.strength = strength
            log.info(
                "round %d epoch %3d: %d units have faded out%s",
                run.state,
                epoch,
                sum(map(len, faded.values())),
                self._size_in_words(),
            )

    def _close_epoch(self, epoch: int, meter: Meter, seconds_per_step: float, seconds: float) -> None:
        run, began = self.run, time.perf_counter()
        if broken := self.trainee.held.broken():
            raise AssertionError(f"weights held at zero have moved: {broken[:3]}")
        self.trainee.write_back()
        self._let_faded_units_go(epoch)
        loaders, model = (self.val_loader, self.test_loader), self.trainee.model
        val, test = (validate_together(loader, model, self.criterion, self.world) for loader in loaders)
        run.reg_lambda = self.pruner.strength if self.pruner else 0.0
        run.history.append(
            {
                "round": run.state,
                "prune_times": run.state,
                "epoch": epoch,
                "step": run.state * self.args.epochs + epoch,
                "loss": meter.mean_loss,
                "accuracy": meter.accuracy,
                "val_accuracy": val,
                "test_accuracy": test,
                "lr": self.rate.at(epoch, len(self.train_loader) - 1),
                "reg_lambd": run.reg_lambda,
                "train_batch_time": seconds_per_step,
                "images_per_second": meter.seen / meter.steps / seconds_per_step,
                "seconds": seconds + time.perf_counter() - began,
            }
        )
        run.epoch, run.step, run.partial = epoch + 1, 0, {}
        better = val > run.best_sa[0]
        if better:
            run.best_sa = [val, test, float(epoch)]
        # The best one first: the checkpoint already says that this epoch is the best.
        self._save(*([self.folder.best(run.state)] if better else []))
        self.reporter.epoch(run.history[-1])

    def _save(self, *copies: Path) -> None:
        """Write the state, as far as it has been written back, to these files and then to the round's checkpoint."""
        self.run.state_dict, self.run.optimizer = cloned_state(self.model), self.trainee.optimizer_state()
        self.run.other_rng = self.world.gather(random_states())[1:]
        for path in (*copies, None):
            self.folder.save(self.run, path, self.held)

    def close_round(self, state: int) -> None:
        """Judge the round, then decide the masks of the next."""
        run = self.run
        self._check_agreement("has come to")
        if state == 0 and self.store is not None:
            self.store.leave(run, self.folder, self._numerics)
        row, trained = self._judge(state), cloned_state(self.model)
        if self.rules.structured:
            ratios = ratio_labels(self.rules.ratios)
            hard = not self.rules.method.squeezes
            log.debug("%s", banner(self.rules.targets, self.args.criteria, ratios, hard))
        following = self._decided(state, trained)
        log.debug("%s", summary(self.groups, following.refill))
        left = count_ones(by_parameter(following.current), self.names)
        row["remain_weight_after"] = 100 * left / sum(trained[n].numel() for n in self.names)
        self._set_following(following)
        self.folder.save_value(packed(run.following), self.folder.masks(state))
        run.rounds.append(row)
        self._save()
        if self.args.keep_checkpoints:
            self.folder.forget_rounds(state, self.args.keep_checkpoints)
        if self.world.is_first:
            self.progress.forget()
        self.reporter.round(row, run.rounds)
        self.stop.obey(f"after round {state}")

    def _set_following(self, pair: MaskPair) -> None:
        self.run.following = {"current": pair.current, "refill": pair.refill}

    def _decided(self, state: int, trained: dict[str, Tensor]) -> MaskPair:
        """The masks of the next round, which the first process decides for all."""
        pair = MaskPair({}, {})
        if self.world.is_first:
            with self.stop.alone():
                pair = self._controlled(state) if self.source else self._regrouped(state, trained)
        masks = self.world.share({"current": pair.current, "refill": pair.refill})
        return MaskPair(masks["current"], masks["refill"])

    def _regrouped(self, state: int, trained: dict[str, Tensor]) -> MaskPair:
        run, args, method = self.run, self.args, self.rules.method
        if state == 0 and method.ranks == "dense":
            run.dense_weight = trained
        ranked = {
            "trained": run.init_weight if args.rank_weights == "initial" else trained,
            "initial": run.init_weight,
            "dense": run.dense_weight,
        }[method.ranks]
        admm = Admm(
            lambda model: optimizer_from(args, model),
            self._admm_batches,
            args.admm_epochs,
            args.admm_rho,
            self.progress.load,
            self.progress.save,
        )
        previous = MaskPair(run.current_mask, run.refill_mask) if state else None
        return decide(
            self.model,
            self.groups,
            self.rules,
            state,
            previous=previous,
            ranked=ranked,
            trained=ranked if method.one_shot else trained,
            admm=admm,
            seed=args.seed,
            batches=self.train_loader.fixed_batches(args.criteria_batches),
        )

    def _admm_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        loader = self.train_loader.whole()
        loader.seek(self.run.state, self.args.epochs + epoch)
        for batch in loader:
            self.stop.obey(f"while ADMM trained after round {self.run.state}")
            yield batch

    def _judge(self, state: int) -> Row:
        """The row of a finished round."""
        run, last = self.run, self.run.history[-1]
        structure = self.pair.structure if self.pair else {}
        cost = cost_of(self.model, self.groups, structure, self.train_loader.image_size)
        row: Row = {
            "round": state,
            "step": last["step"],
            "density": shares(self.pair, self.names, self.rules).kept,
            "kept_units": kept_per_kind(self.groups, self.pair),
            "parameters": cost.parameters,
            "macs": cost.macs,
            "accuracy": last["accuracy"],
            "val_accuracy": last["val_accuracy"],
            "test_accuracy": last["test_accuracy"],
            "hardened_val_accuracy": None,
            "hardened_test_accuracy": None,
            "squeeze_ratio": None,
            "best_val_accuracy": run.best_sa[0],
            "test_at_best_val": run.best_sa[1],
            "best_epoch": int(run.best_sa[2]),
            "reg_lambd": run.reg_lambda,
            "kept_per_layer": {name: kept for name, (kept, _) in kept_per_group(self.groups, self.pair).items()},
        }
        if self.pruner is not None:
            with hardened(self.model, structure):
                for part, loader in (("val", self.val_loader), ("test", self.test_loader)):
                    row[f"hardened_{part}_accuracy"] = validate_together(loader, self.model, self.criterion, self.world)
            if run.doomed_norm:
                row["squeeze_ratio"] = self.pruner.doomed_norm() / run.doomed_norm
                self._warn_if_not_squeezed(state, row["squeeze_ratio"])
        return row

    def _warn_if_not_squeezed(self, state: int, ratio: float) -> None:
        if ratio > SQUEEZE_GOAL:
            log.warning(
                "round %d: the doomed weights kept %.0f %% of their norm (goal: at most %.0f %%); train longer, or "
                "raise --lr or --reg_granularity_prune",
                state,
                100 * ratio,
                100 * SQUEEZE_GOAL,
            )

    def finish(self) -> str:
        """Save the ticket (the last round's weights, hardened); returns the table of rounds."""
        if not self.world.is_first:
            return ""
        last = self.run.rounds[-1]["round"]
        # The state may be that of a later round, broken off when more rounds were wanted.
        run = self.run if self.run.state == last else RunFolder.load(self.folder.checkpoint(last))
        structure = MaskPair(run.current_mask, run.refill_mask).structure if run.current_mask else {}
        hard = {n: v * structure[n] if n in structure else v for n, v in run.state_dict.items()}
        ticket = {
            "arch": self.args.arch,
            "round": run.state,
            "state_dict": pruning_state(hard, structure),
            "args": run.args,
        }
        self.folder.save_value(ticket, self.folder.ticket)
        draw_kept_units(run.rounds, self.folder.path)
        shared, first = bool(run.round_0.get("shared")), seconds_of(r for r in run.history if r["round"] == 0)
        others = first if shared or self.source else 0.0
        self.folder.write_result(
            {
                "rounds": len(run.rounds),
                "seconds": seconds_of(run.history) - others,
                "seconds_of_round_0": first,
                "round_0_is_shared": shared,
                "round_0_address": run.round_0.get("address", ""),
            }
        )
        log.info("finished: %d rounds; the ticket is %s", len(run.rounds), self.folder.ticket)
        return rounds_table(run.rounds)

    def close(self) -> None:
        """Let trackers and signals go."""
        self.tracker.finish()
        self.stop.restore()
        self.folder.unlock()
