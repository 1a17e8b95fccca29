"""One run from beginning to end: train, judge, decide the next masks, rewind, and again."""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, optim

from batches import Loaders, mixed_seed
from console import log_to_file
from control_source import ControlSource
from counting import cost_of
from data_record import completed, describe_data, fingerprint, without_pixels
from dense_store import DenseStore, address_of
from distributed import ALONE, World, has_batchnorm, is_about_peers, lost
from environment import describe_environment, numerics
from errors import DivergedError, Interrupted, UsageError
from masks import MaskPair, by_parameter, count_ones, current_key, pruning_state, refill_key
from methods import CONTROLS, METHODS, SQUEEZE_GOAL
from models import MODELS, runs_a_file
from network_check import check_units
from oneshot_pruners import Admm
from optimization import OPTIMIZERS, LearningRate
from options import default_run_folder, identity_of, identity_of_round_0, settings_of, tracker_name
from permute_masks import controlled
from pictures import draw_kept_units
from plan import describe_plan, expected_squeeze
from reg_pruner_files.reg_pruner import Pruner
from reg_pruner_files.schedules import clock_from
from regroup_report import banner, ratio_labels, summary
from reporter import Reporter, SilentReporter, rounds_table
from rounds import decide, doomed_whole, faded_units, held_masks, kept_per_group, kept_per_kind, shares
from rules import RoundRules, kinds_of
from run_state import (
    Progress,
    Row,
    RunFolder,
    RunState,
    check_same_run,
    packed,
    random_states,
    restore_random_states,
    save_atomically,
)
from tensor_files import check_fits
from tracker import Sink, TensorBoard, Tracker, Trackers
from trainee import Trainee
from training import Meter, Passer, StopRequest, hardened, train, validate_together
from unit_groups import unit_groups
from units import UnitGroup, kinds, ranked_names
from utils import cloned_state, digest_of, load_initial_weights, prepare_for_speed, seed_everything, setup_model_dataset

log = logging.getLogger("rsst")

PROBES = 2  # images that show which parameters the logits depend on


def run(args: argparse.Namespace) -> str:
    """Plan, or carry out, the experiment that the arguments describe; returns the plan, or the table of rounds."""
    world = World.join()
    try:
        return _run_in(world, args)
    finally:
        world.leave()


def _run_in(world: World, args: argparse.Namespace) -> str:
    check_world(args, world)
    if args.gpu >= 0 and world.size > 1:
        if "gpu" in args.explicit and args.gpu != world.local_rank:
            args.warnings.append("--gpu is not read: under torchrun each process has its own GPU")
        args.gpu = world.local_rank
    model, *loaders = setup_model_dataset(args)
    for loader in loaders:
        loader.share = (world.rank, world.size)
    groups = groups_for(args, model, loaders[0].image_size)
    source = None if args.control == "none" or not world.is_first else ControlSource(args)
    if args.dry_run:
        if not world.is_first:
            return ""
        tell_warnings(args)
        step = one_step(copy.deepcopy(model), loaders[0].whole(), args)
        rules = rules_from(args, groups)
        return describe_plan(model, groups, rules, loaders[0], args.pruning_times, args.epochs, step)
    path = args.save_dir or (Path(args.checkpoint).parent if args.checkpoint else default_run_folder(args))
    folder = RunFolder(path, writes=world.is_first)
    experiment = Experiment(args, model, (loaders[0], loaders[1], loaders[2]), groups, folder, source, world)
    try:
        experiment.open()
        for state in range(experiment.next_state, args.pruning_times):
            experiment.train_round(state)
            experiment.close_round(state)
        return experiment.finish()
    except RuntimeError as error:
        if world.size > 1 and is_about_peers(error):
            log.debug("what was under way", exc_info=error)
            raise lost(error) from error
        raise
    finally:
        experiment.close()


def check_world(args: argparse.Namespace, world: World) -> None:
    """Raises: UsageError, if the run cannot be shared out."""
    if world.size > args.batch_size:
        raise UsageError(f"argument --batch_size: {args.batch_size} images are too few for {world.size} processes")
    if world.size > 1 and args.compile:
        raise UsageError("argument --compile: not with several processes")


def tell_warnings(args: argparse.Namespace) -> None:
    for warning in args.warnings:
        log.warning("%s", warning)


def groups_for(args: argparse.Namespace, model: nn.Module, image_size: int) -> list[UnitGroup]:
    """The unit groups that the arguments ask for.

    Raises:
        UsageError: The network has none, or not the kinds that are to be pruned.
    """
    groups = unit_groups(model, args.conv1, "block" in kinds_of(args.vit_prune_target))
    found, rules = kinds(groups), rules_from(args, groups)
    if not groups:
        raise UsageError(f"argument --arch: {args.arch} has no layers that can be pruned here")
    if args.vit_structured and "channel" in found:
        raise UsageError(f"argument --vit_structured: {args.arch} has no heads; choose a ViT or leave the flag out")
    missing = [kind for kind in rules.targets if rules.structured and kind not in found]
    if missing:
        raise UsageError(f"argument --vit_prune_target: {args.arch} has no {missing[0]}s that are known, only "
                         f"{', '.join(f'{kind}s' for kind in found)}")  # fmt: skip
    if args.arch not in MODELS:
        check_units(model, groups, image_size)
    return groups


def rules_from(args: argparse.Namespace, groups: Sequence[UnitGroup]) -> RoundRules:
    """The pruning rules that the arguments ask for."""
    names = ("struct", "rate", "rate_mode", "criteria", "mlp_prune_ratio", "block_prune_ratio", "sorting_mode",
             "fillback_rate", "min_units", "rsst_dead", "reg_target", "criteria_batches")  # fmt: skip
    is_cnn = "channel" in kinds(groups)
    structured = args.regroup or (METHODS[args.struct].regroups and (args.vit_structured or is_cnn))
    targets = ("channel",) if is_cnn else kinds_of(args.vit_prune_target)
    return RoundRules(**{n: getattr(args, n) for n in names}, structured=structured, targets=targets)


def seconds_of(history: Iterable[Row]) -> float:
    """What epochs took, evaluation included; epochs written before this was measured count as nothing."""
    return sum(row.get("seconds", 0.0) for row in history)


def new_optimizer(args: argparse.Namespace, model: nn.Module) -> optim.Optimizer:
    return OPTIMIZERS[args.optimizer].build(model, args.lr, args.momentum, args.weight_decay)


def one_step(model: nn.Module, loader: object, args: argparse.Namespace) -> Callable[[], None]:
    """A function that makes one training step, the way a round makes them."""
    optimizer = new_optimizer(args, model)
    passer, criterion = Passer(args), nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    batch = next(iter(loader))  # type: ignore[call-overload]

    def step() -> None:
        train(0, [batch], model, criterion, optimizer, 0, passer, None)

    return step


class Experiment:
    """One run: a model, its data, its folder, and the state in which it is."""

    def __init__(
        self, args: argparse.Namespace, model: nn.Module, loaders: Loaders, groups: list[UnitGroup], folder: RunFolder,
        source: ControlSource | None = None, world: World = ALONE,
    ) -> None:  # fmt: skip
        self.args, self.model, self.groups, self.folder, self.world = args, model, groups, folder, world
        self.train_loader, self.val_loader, self.test_loader = loaders
        self.names = ranked_names(model, groups)
        self.rules = rules_from(args, groups)
        self.control = CONTROLS[args.control]
        self.source = source
        self.criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
        self.device = next(model.parameters()).device
        self.precision: torch.dtype = vars(model).get("precision", torch.float32)
        self.rate = LearningRate(
            args.lr, args.epochs, len(self.train_loader), args.warmup, args.lr_schedule, args.decreasing_lr
        )
        self.stop = StopRequest(world)
        known = not runs_a_file(args.arch)  # nobody knows what a user's file depends on
        self.store = DenseStore(Path(args.dense_store)) if args.dense_store and known and world.is_first else None
        self.tracker = Trackers()
        classes = list(getattr(model, "classes", ()))
        self.run = RunState(settings_of(args), fingerprint(*loaders), classes=classes, processes=world.size,
                            contents=describe_data(loaders, classes))  # fmt: skip
        self.reporter: Reporter = SilentReporter()

    def open(self) -> None:
        """Take up the run in the folder, or begin one there; all processes go on from what the first one finds."""
        known_to_all = without_pixels(self.run.contents)  # each process keeps its images as its memory allows
        self.world.check_agreement("the images or labels", json.dumps([self.run.data, known_to_all]))
        if self.world.is_first:
            self._take_up()
        self.run = RunState(**self.world.share(vars(self.run)))
        weights, fresh = self.run.state_dict or self.run.init_weight, new_optimizer(self.args, self.model)
        check_fits(weights, self.run.optimizer, self.model, fresh)

    def _take_up(self) -> None:
        if self.args.resume and not self.args.checkpoint and not self.folder.candidates():
            raise UsageError(f"argument --resume: {self.folder.path} holds no run to continue")
        wanted = self.args.checkpoint if not self.folder.candidates() else None
        given = RunFolder.load(Path(wanted)) if wanted else None  # before anything is made
        self.folder.lock()
        found = self.folder.newest_run()
        if found is None:
            self.folder.refuse_foreign_results()
            found = given
        elif self.args.checkpoint:
            log.warning("--checkpoint is not read: %s holds a run, which continues", self.folder.path)
        log_to_file(self.folder.path / "log.txt")
        tell_warnings(self.args)
        precision = str(self.precision).removeprefix("torch.")
        if found is None:
            self.run.precision = precision
            self._choose_initial_weights()
            if self.source is not None:
                self._begin_as_a_control(self.source)
            elif self.store is not None:
                self._share_round_0(self.store, self._numerics)
        else:
            check_same_run(found, identity_of(self.run.args), identity_of(found.args), self.run.data,
                           self.run.contents)  # fmt: skip
            contents = completed(self.run.contents, found.contents)
            self.run = replace(found, args=self.run.args, contents=contents)
            if self.run.round_0.get("numerics", self._numerics) != self._numerics:
                self.run.round_0 = {**self.run.round_0, "numerics": {}}  # part of it was computed otherwise
            log.info("continuing %s: round %d, %d epochs done", self.folder.path, found.state, found.epoch)
            if found.precision != precision:
                log.warning("the run began in %s and goes on in %s", found.precision, precision)
            if found.processes != self.world.size:
                log.warning("the run began with %d processes and goes on with %d: the last digits will differ",
                            found.processes, self.world.size)  # fmt: skip
        if self.next_state < self.args.pruning_times:
            self._warn_if_the_penalty_is_weak()
            self.folder.write_settings(self.run.args)
            self.folder.write_environment(describe_environment(self.device, precision))
            self.tracker = self._trackers()
        self.reporter = Reporter(self.folder.path, self.tracker, self.args.quiet)
        self.reporter.restore(self.run.history, self.run.rounds)
        if found is None:
            self.reporter.track(self.run.history)  # another run's round 0
        weights = sum(self.run.init_weight[n].numel() for n in self.names)
        log.info("%s on %s in %s: %d prunable layers, %d weights; run folder %s", self.args.arch, self.device,
                 precision, len(self.names), weights, self.folder.path)  # fmt: skip
        if self.world.size > 1:
            log.info("%d processes share batches of %d images%s", self.world.size, self.args.batch_size,
                     "; BatchNorm sees whole batches" * has_batchnorm(self.model))  # fmt: skip

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
                log.warning("the penalty is weak for so short a round: alone it leaves %.0f %% of doomed weights; "
                            "train longer, raise --lr, or try --penalty decoupled", 100 * left)  # fmt: skip

    def _choose_initial_weights(self) -> None:
        file = Path(self.args.init) if self.args.init else self.folder.path / "init.pth.tar"
        if self.args.init and file.exists():
            load_initial_weights(self.model, file)
            log.info("initial weights from %s", file)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_atomically(cloned_state(self.model), file)
        self.run.init_weight = cloned_state(self.model)

    def _begin_as_a_control(self, source: ControlSource) -> None:
        self.run = source.begin(self.run, self.names, self.train_loader.image_size)
        self._set_following(self._controlled(0))
        log.info("control %s: round 0 is that of %s", self.args.control, source.folder.path)
        self.folder.save(self.run)

    def _share_round_0(self, store: DenseStore, numbers: dict[str, Any]) -> None:
        """Take round 0 from the store, or note where to leave it."""
        address = address_of(
            {
                "settings": identity_of_round_0(self.args),
                "data": [self.run.data, self.run.contents],
                "numerics": numbers,
            },
            self.run.init_weight,
        )
        found = store.fetch(address, self.folder)
        about = {"address": address, "numerics": numbers, "shared": found is not None}
        if found is None:
            self.run.round_0 = about
            return
        own = {k: getattr(self.run, k) for k in ("args", "tracker_id", "classes", "contents")}
        self.run = replace(found, **own, round_0=about)
        restore_random_states(found.rng)
        self.folder.save(self.run)
        log.info("round 0 is taken from %s: %.0f s of training saved", store.entry(address).path,
                 seconds_of(self.run.history))  # fmt: skip

    def _leave_round_0(self, store: DenseStore) -> None:
        """Put round 0, which has just ended, where other runs find it."""
        about = self.run.round_0
        if about and not about["shared"] and about["numerics"] == self._numerics:
            seconds = seconds_of(self.run.history)
            store.put(about["address"], self.folder, {"seconds": seconds, "settings": self.run.args, **about})

    def _controlled(self, state: int) -> MaskPair:
        assert self.source is not None
        targets = self.rules.targets if self.rules.structured else ()
        return controlled(self.args.control, self.source.masks(state), self.model, self.groups, targets,
                          seed=self.args.seed, state=state, image_size=self.train_loader.image_size)  # fmt: skip

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
        self._begin(state)
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

    def _begin(self, state: int) -> None:
        """Model, masks, penalty and optimizer as they are at the start of the round, or where it was broken off."""
        run, args = self.run, self.args
        fresh = run.state != state or not run.state_dict
        if fresh:
            run.state, run.epoch, run.step, run.best_sa, run.faded = state, 0, 0, [-1.0, -1.0, -1.0], {}
            run.current_mask, run.refill_mask = run.following.get("current", {}), run.following.get("refill", {})
        self.pair = MaskPair(run.current_mask, run.refill_mask) if state else None
        if self.pair is not None and self.rules.method.squeezes and args.reg_target == "unit":
            self.pair = doomed_whole(self.groups, self.pair, self.rules.targets)
        self.model.load_state_dict(run.init_weight if fresh else run.state_dict)
        self._equip({} if fresh else run.optimizer)
        if fresh:
            run.doomed_norm = self.pruner.doomed_norm() if self.pruner else 0.0
        self._seed(fresh)
        self._check_agreement("begins with")
        part = shares(self.pair, self.names, self.rules)
        log.info("round %d: %.2f %% of the prunable weights are zero, %.2f %% being squeezed, %.2f %% kept by the "
                 "structure%s", state, part.zero, part.squeezed, part.kept, self._size_in_words())  # fmt: skip
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
            self.model, self.held, lambda model: new_optimizer(args, model),
            lambda model: prepare_for_speed(model, self.precision, args.compile), args.compact_training,
        )  # fmt: skip
        if optimizer:
            self.trainee.load_optimizer_state(optimizer)
        masks = (self.pair.current, self.pair.refill) if self.pair else ({}, {})
        current, refill = (self.trainee.cut(by_parameter(m)) for m in masks)
        self.passer = Passer(
            args, {current_key(n): m for n, m in current.items()}, {refill_key(n): m for n, m in refill.items()},
            held=self.trainee.held, rate=self.rate, stop=self.stop, reporter=self.reporter,
            decoupled=args.penalty == "decoupled", world=self.world,
            network=self.world.parallel(self.trainee.model, self.train_loader.fixed_batches(1)[0][0][:PROBES]),
        )  # fmt: skip
        squeezing = self.pair is not None and self.rules.method.squeezes
        self.pruner = Pruner(self.trainee.model, args, self.passer) if squeezing else None

    def _size_in_words(self) -> str:
        share = self.trainee.share
        return "" if share == 1 else f"; the network trains at its real size, {100 * share:.1f} % of the parameters"

    def _let_faded_units_go(self, epoch: int) -> None:
        """Hold at zero, and leave out of the network, the doomed units of which next to nothing is left."""
        run, share = self.run, self.args.fade_out
        if self.pruner is None or self.pair is None or share == 0 or epoch + 1 == self.args.epochs:
            return
        weights = self.model.state_dict()
        faded = self.world.share(faded_units([g for g in self.groups if g.kind in self.rules.targets], self.pair,
                                             weights, run.init_weight, share))  # fmt: skip
        if sum(map(len, faded.values())) > sum(map(len, run.faded.values())):
            state, strength = self.trainee.optimizer_state(), self.pruner.strength
            run.faded = faded
            self._equip(state)
            self.pruner.strength = strength
            log.info("round %d epoch %3d: %d units have faded out%s", run.state, epoch, sum(map(len, faded.values())),
                     self._size_in_words())  # fmt: skip

    def _close_epoch(self, epoch: int, meter: Meter, seconds_per_step: float, seconds: float) -> None:
        run, began = self.run, time.perf_counter()
        if broken := self.trainee.held.broken():
            raise AssertionError(f"weights held at zero have moved: {broken[:3]}")
        self.trainee.write_back()
        self._let_faded_units_go(epoch)
        loaders, model = (self.val_loader, self.test_loader), self.trainee.model
        val, test = (validate_together(loader, model, self.criterion, self.world) for loader in loaders)
        run.reg_lambda = self.pruner.strength if self.pruner else 0.0
        run.history.append({
            "round": run.state, "prune_times": run.state, "epoch": epoch, "step": run.state * self.args.epochs + epoch,
            "loss": meter.mean_loss, "accuracy": meter.accuracy, "val_accuracy": val, "test_accuracy": test,
            "lr": self.rate.at(epoch, len(self.train_loader) - 1), "reg_lambd": run.reg_lambda,
            "train_batch_time": seconds_per_step, "images_per_second": meter.seen / meter.steps / seconds_per_step,
            "seconds": seconds + time.perf_counter() - began,
        })  # fmt: skip
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
            self._leave_round_0(self.store)
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
        ranked = {"trained": run.init_weight if args.rank_weights == "initial" else trained,
                  "initial": run.init_weight, "dense": run.dense_weight}[method.ranks]  # fmt: skip
        admm = Admm(lambda model: new_optimizer(args, model), self._admm_batches, args.admm_epochs, args.admm_rho,
                    self.progress.load, self.progress.save)  # fmt: skip
        previous = MaskPair(run.current_mask, run.refill_mask) if state else None
        return decide(
            self.model, self.groups, self.rules, state, previous=previous, ranked=ranked,
            trained=ranked if method.one_shot else trained, admm=admm, seed=args.seed,
            batches=self.train_loader.fixed_batches(args.criteria_batches),
        )  # fmt: skip

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
            "round": state, "step": last["step"], "density": shares(self.pair, self.names, self.rules).kept,
            "kept_units": kept_per_kind(self.groups, self.pair), "parameters": cost.parameters, "macs": cost.macs,
            "accuracy": last["accuracy"], "val_accuracy": last["val_accuracy"], "test_accuracy": last["test_accuracy"],
            "hardened_val_accuracy": None, "hardened_test_accuracy": None, "squeeze_ratio": None,
            "best_val_accuracy": run.best_sa[0], "test_at_best_val": run.best_sa[1], "best_epoch": int(run.best_sa[2]),
            "reg_lambd": run.reg_lambda,
            "kept_per_layer": {name: kept for name, (kept, _) in kept_per_group(self.groups, self.pair).items()},
        }  # fmt: skip
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
                "raise --lr or --reg_granularity_prune", state, 100 * ratio, 100 * SQUEEZE_GOAL,
            )  # fmt: skip

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
        self.folder.write_result({"rounds": len(run.rounds), "seconds": seconds_of(run.history) - others,
                                  "seconds_of_round_0": first, "round_0_is_shared": shared,
                                  "round_0_address": run.round_0.get("address", "")})  # fmt: skip
        log.info("finished: %d rounds; the ticket is %s", len(run.rounds), self.folder.ticket)
        return rounds_table(run.rounds)

    def close(self) -> None:
        """Let trackers and signals go."""
        self.tracker.finish()
        self.stop.restore()
        self.folder.unlock()
