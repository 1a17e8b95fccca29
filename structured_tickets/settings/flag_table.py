"""Every flag of the runner. A new one is an entry here: parser, checks, identity, sweeps and reports read the table."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

from structured_tickets.base.environment import numbers_at_once
from structured_tickets.data.catalog import DATASETS, IMAGE_STORES
from structured_tickets.data.policies import NONE as UNCHANGED
from structured_tickets.data.policies import POLICIES
from structured_tickets.networks import MODELS
from structured_tickets.pruning.criteria import CRITERIA, CRITERIA_BATCHES
from structured_tickets.pruning.methods import CONTROLS, METHODS
from structured_tickets.pruning.rules import SORTING_MODES, kinds_of
from structured_tickets.settings.argument_types import (
    CLOSED_SHARE,
    COUNT,
    GPU,
    LIMIT,
    NATURAL,
    NONNEGATIVE,
    PARALLEL,
    POSITIVE,
    ROUNDS,
    SEED,
    SHARE,
    SIZE,
    architecture,
    count,
    lanes,
    milestones,
    path_text,
    prune_targets,
    resolved_path,
    rounds_to_keep,
    teacher,
    truth,
    word_list,
)
from structured_tickets.settings.conditions import (
    WHERE_UNITS_SHRINK,
    WITH_ADMM,
    WITH_FINETUNING,
    WITH_RSST,
    WITH_SGD,
    WITH_TEACHER,
    Condition,
    counts_units_by_layer,
    penalty_of_flags,
    prunes_channels,
    prunes_kind,
    prunes_transformer_units,
    prunes_units,
    reads_batches,
)
from structured_tickets.settings.flag import (
    AFTER_ROUND_0,
    EVERY_ROUND,
    IMAGES,
    LABEL,
    LAST_DIGITS,
    LENGTH,
    MACHINE,
    NOTHING,
    SETTINGS,
    SWEEPS_OWN,
    WEIGHTS_FILE,
    Flag,
    Scope,
)
from structured_tickets.settings.recipes import RECIPES
from structured_tickets.training.optimization import LR_SCHEDULES, OPTIMIZERS, STEPS
from structured_tickets.training.penalty.expected import WAYS
from structured_tickets.training.penalty.schedules import HORIZONS, SCHEDULES
from structured_tickets.training.rounds import CONTINUED, GIVEN
from structured_tickets.training.teachers import KINDS as TEACHERS_LOSSES
from structured_tickets.training.teachers import NONE
from structured_tickets.unit_groups.kinds import CHANNEL_UNITS, FILTER

# Name of a preset -> its flags, which must be among those that round 0 does not read.
PRESETS: dict[str, dict[str, Any]] = {
    "as_documented": {
        "rank_weights": "initial",
        "rsst_dead": "free",
        "reg_horizon": "documents",
        "reg_guard": True,
    },
}


def _rows(table: Iterable[tuple[str, str]]) -> str:
    return "; ".join(f"{name}: {summary}" for name, summary in table).replace("%", "%%")


def _lanes_of(args: argparse.Namespace) -> int:
    return numbers_at_once(-1 if args.device == "cpu" else args.gpu)


_WITH_EXPONENTS = " or ".join(name for name, schedule in SCHEDULES.items() if schedule.reads_exponents)

DATA = (
    Flag(
        "data",
        "folder of the data set (for CIFAR also an .npz file)",
        IMAGES,
        type=path_text,
        default="data",
        metavar="DIR",
        example="--data photos",
    ),
    Flag(
        "dataset",
        _rows((name, source.summary) for name, source in DATASETS.items()),
        EVERY_ROUND,
        default="cifar100",
        choices=DATASETS,
        example="--dataset digits",
    ),
    Flag(
        "image_size",
        "side of the images, in pixels (default: that of the data set)",
        EVERY_ROUND,
        type=SIZE,
        metavar="PIXELS",
        derived=lambda a: DATASETS[a.dataset].image_size,
    ),
    Flag(
        "image_store", "image files: " + _rows(IMAGE_STORES.items()), LAST_DIGITS, default="auto", choices=IMAGE_STORES
    ),
    Flag(
        "workers", "number of threads or processes that decode image files", MACHINE, type=count(0, PARALLEL), default=4
    ),
)

MODEL = (
    Flag(
        "arch",
        f"network: {', '.join(MODELS)}, timm/NAME, torchvision/NAME, hf/NAME or hf/FOLDER (transformers). Your own: "
        "FILE.py:FACTORY, called with num_classes (and img_size, if it takes it), or NAME for models/NAME.py",
        EVERY_ROUND,
        type=architecture,
        default="res20s",
        metavar="NAME",
        example="--arch vit_tiny",
    ),
    Flag(
        "init",
        "initial weights: loaded if the file exists, else written there (default: the run folder)",
        WEIGHTS_FILE,
        type=resolved_path,
        metavar="FILE",
    ),
    Flag(
        "pretrained",
        "weights file for --round_0 given, --prune_type pt or --vit_pretrained (.safetensors, .pth)",
        WEIGHTS_FILE,
        type=resolved_path,
        metavar="FILE",
    ),
    Flag(
        "pretrained_key",
        "keys, with dots between, under which the weights are in the file of --pretrained or --init, if it holds "
        "several (plain and averaged, teacher and student)",
        WEIGHTS_FILE,
        metavar="KEY",
        read=Condition(lambda a: bool(a.pretrained or a.init), "with --pretrained or --init"),
    ),
    Flag(
        "fc",
        "with --prune_type pt: load the classifier from the file, too (without this flag it starts fresh; with "
        "--round_0 given, the classifier is loaded where the classes fit)",
        EVERY_ROUND,
        bare=True,
        read=Condition(lambda a: a.prune_type == "pt" or a.vit_pretrained, "with --prune_type pt or --vit_pretrained"),
    ),
)

TRAINING = (
    Flag("epochs", "epochs per round", EVERY_ROUND, type=COUNT, default=120, example="--epochs 20"),
    Flag(
        "eval_every",
        "judge the network on validation and test images after every so many epochs, and after the last of each round",
        EVERY_ROUND,
        type=COUNT,
        default=1,
        metavar="EPOCHS",
    ),
    Flag("batch_size", "images per batch, summed over all processes", EVERY_ROUND, type=COUNT, default=128),
    Flag(
        "optimizer",
        "optimizer; adamw is recommended for a ViT trained from scratch",
        EVERY_ROUND,
        default="sgd",
        choices=OPTIMIZERS,
    ),
    Flag("lr", "learning rate after the warm-up", EVERY_ROUND, type=POSITIVE, default=0.01),
    Flag("momentum", "momentum of SGD, beta 1 of AdamW", EVERY_ROUND, type=SHARE, default=0.9),
    Flag("weight_decay", "weight decay (AdamW: decoupled)", EVERY_ROUND, type=NONNEGATIVE, default=1e-4),
    Flag(
        "mixup",
        "alpha of mixup: each image is added to another one of its batch, by weights from Beta(alpha, alpha); 0: never",
        EVERY_ROUND,
        type=NONNEGATIVE,
        default=0.0,
    ),
    Flag(
        "cutmix",
        "alpha of CutMix: a box of another image of its batch is put into each image; with --mixup, one of the two",
        EVERY_ROUND,
        type=NONNEGATIVE,
        default=0.0,
    ),
    Flag(
        "auto_augment",
        "what happens to training images besides crops and mirrorings; " + _rows(POLICIES.items()),
        EVERY_ROUND,
        default=UNCHANGED,
        choices=POLICIES,
    ),
    Flag(
        "repeated_augment",
        "how often an image comes in a batch, each time augmented anew: an epoch is as long, with fewer images",
        EVERY_ROUND,
        type=COUNT,
        default=1,
    ),
    Flag(
        "random_erasing",
        "share of the training images that lose a box of 2 to 33 percent of their area",
        EVERY_ROUND,
        type=CLOSED_SHARE,
        default=0.0,
    ),
    Flag(
        "distill",
        "teacher of each round; none; dense: the network of round 0; FILE: weights of the same architecture, or of "
        "another: ARCH@FILE",
        EVERY_ROUND,
        type=teacher,
        default=NONE,
        metavar="TEACHER",
    ),
    Flag(
        "distill_alpha",
        "share of the loss that is the teacher's",
        EVERY_ROUND,
        type=CLOSED_SHARE,
        default=0.9,
        read=WITH_TEACHER,
    ),
    Flag(
        "distill_temperature",
        "temperature that softens the probabilities of teacher and network",
        EVERY_ROUND,
        type=POSITIVE,
        default=4.0,
        read=Condition(lambda a: a.distill != NONE and a.distill_loss == "kl", "with --distill and --distill_loss kl"),
    ),
    Flag(
        "distill_loss",
        _rows(TEACHERS_LOSSES.items()),
        EVERY_ROUND,
        default="kl",
        choices=TEACHERS_LOSSES,
        read=WITH_TEACHER,
    ),
    Flag(
        "nesterov",
        "Nesterov's momentum",
        EVERY_ROUND,
        bare=True,
        read=WITH_SGD,
    ),
    Flag(
        "no_decay_on_bias_and_norm",
        "no weight decay on biases, weights of normalisations and embeddings (adamw never has it)",
        EVERY_ROUND,
        bare=True,
        read=WITH_SGD,
    ),
    Flag(
        "clip_grad",
        "largest norm of the gradient of the loss over all weights; a longer one is scaled down to it (default: none)",
        EVERY_ROUND,
        type=POSITIVE,
        default=None,
    ),
    Flag(
        "drop_path",
        "chance that a branch of the last block is left out for an image, less in earlier blocks (stochastic depth; "
        "only for this program's ViTs and ResNets)",
        EVERY_ROUND,
        type=SHARE,
        default=0.0,
    ),
    Flag(
        "ema",
        "decay of a moving average of the weights, which is judged and saved beside them; 0: none",
        EVERY_ROUND,
        type=SHARE,
        default=0.0,
    ),
    Flag(
        "eval_ema",
        "judge, choose and export the averaged weights",
        EVERY_ROUND,
        bare=True,
        read=Condition(lambda a: a.ema > 0, "with --ema"),
    ),
    Flag(
        "accumulate",
        "batches whose gradients are added up to one step: as a batch that is so many times as large",
        EVERY_ROUND,
        type=COUNT,
        default=1,
    ),
    Flag(
        "warmup",
        "epochs of warm-up",
        EVERY_ROUND,
        type=NATURAL,
        default=20,
        read=Condition(lambda a: a.warmup_steps is None, "without --warmup_steps"),
    ),
    Flag("warmup_steps", "steps of warm-up, in place of --warmup", EVERY_ROUND, type=NATURAL, default=None),
    Flag(
        "lr_schedule",
        "multistep: multiply by 0.1 at each epoch of --decreasing_lr; cosine, linear: decay to 0; onecycle: rise in "
        "the warm-up and fall afterwards, both along a cosine",
        EVERY_ROUND,
        default="multistep",
        choices=LR_SCHEDULES,
    ),
    Flag(
        "decreasing_lr",
        "epochs at which --lr_schedule multistep lowers the learning rate",
        EVERY_ROUND,
        type=milestones,
        default="91,136",
        metavar="EPOCHS",
        read=Condition(lambda a: a.lr_schedule == "multistep", "with --lr_schedule multistep"),
    ),
    Flag("label_smoothing", "share of the label spread over all classes", EVERY_ROUND, type=SHARE, default=0.0),
    Flag("seed", "seed of all random numbers", EVERY_ROUND, type=SEED, default=0),
    Flag(
        "device",
        "where to compute; auto: the CUDA device of --gpu if there is one, else the CPU; mps: Apple's GPU (untested)",
        MACHINE,
        default="auto",
        choices=("auto", "cpu", "cuda", "mps"),
    ),
    Flag(
        "gpu",
        "number of the CUDA device; -1: CPU. Without CUDA the CPU is used; under torchrun each process uses its own "
        "GPU",
        MACHINE,
        type=GPU,
        default=0,
    ),
    Flag(
        "precision",
        "number type of matrix products and convolutions; fp16: with loss scaling; auto: bf16 if the processor "
        "supports it, else fp16 on a GPU with tensor cores, else fp32 (TF32 is never used)",
        EVERY_ROUND,
        default="auto",
        choices=("auto", "fp32", "bf16", "fp16"),
    ),
    Flag(
        "compact_training",
        "skip units that are held at zero: less time and memory, same results up to rounding",
        LAST_DIGITS,
        type=truth,
        default=True,
    ),
    Flag(
        "compile",
        "compile the network with torch.compile: some minutes at the start, then faster steps. With --compact_training "
        "it is compiled again whenever the network becomes smaller",
        LAST_DIGITS,
        bare=True,
    ),
    Flag(
        "step",
        _rows(STEPS.items()) + ". Same results up to rounding, and the same bits with --deterministic",
        LAST_DIGITS,
        default="auto",
        choices=STEPS,
    ),
    Flag(
        "deterministic",
        "use only kernels with bit-identical results (slower on CUDA; no effect on a CPU)",
        LAST_DIGITS,
        bare=True,
    ),
)

PRUNING = (
    Flag(
        "struct",
        _rows((name, method.summary) for name, method in METHODS.items())
        + ". refill and rsst prune whole units; the others prune single weights unless --regroup is given",
        AFTER_ROUND_0,
        default="rsst",
        choices=METHODS,
        example="--struct refill",
    ),
    Flag(
        "pruning_times",
        "number of rounds, including the dense round 0",
        LENGTH,
        type=ROUNDS,
        default=20,
        metavar="ROUNDS",
        example="--pruning_times 3",
    ),
    Flag(
        "rate",
        "share to prune: of the weights (global L1) and of the heads; see --rate_mode",
        AFTER_ROUND_0,
        type=SHARE,
        default=0.2,
        example="--rate 0.3",
    ),
    Flag(
        "rate_mode",
        "round: --rate is a share of what is still kept; target: a share of the original network (default: target with "
        "--vit_structured, else round)",
        AFTER_ROUND_0,
        choices=("round", "target"),
        derived=lambda a: "target" if a.vit_structured else "round",
    ),
    Flag(
        "prune_type",
        "weights that each round starts from; lt: initial; pt: pretrained; rewind_lt: those of round 0, epoch "
        "--rewind_epoch; lrr: those that the round before has trained (learning-rate rewinding); finetune: the same, "
        "with --finetune_epochs and --finetune_lr",
        EVERY_ROUND,
        default="lt",
        choices=("lt", "pt", "rewind_lt", *CONTINUED),
    ),
    Flag(
        "finetune_epochs",
        "epochs of each round after round 0 (default: as many as --epochs)",
        AFTER_ROUND_0,
        type=COUNT,
        default=None,
        read=WITH_FINETUNING,
    ),
    Flag(
        "finetune_lr",
        "their learning rate, which goes through the same schedule without warm-up (default: a tenth of --lr)",
        AFTER_ROUND_0,
        type=POSITIVE,
        default=None,
        read=WITH_FINETUNING,
    ),
    Flag(
        "round_0",
        "train: round 0 trains the dense network; given: it only judges the network of --pretrained",
        EVERY_ROUND,
        default="train",
        choices=("train", GIVEN),
    ),
    Flag(
        "freeze_bn",
        "leave the running statistics of BatchNorm as they are in all training, and normalise by them",
        EVERY_ROUND,
        bare=True,
    ),
    Flag(
        "refill_from",
        "with lrr and finetune: what a weight starts with that was held at zero and is restored; initial: its initial "
        "value",
        AFTER_ROUND_0,
        default="initial",
        choices=("initial", "zero"),
        read=Condition(lambda a: a.prune_type in CONTINUED, "with --prune_type lrr or finetune"),
    ),
    Flag(
        "rewind_epoch",
        "epoch of round 0 that rewind_lt returns to",
        EVERY_ROUND,
        type=NATURAL,
        default=24,
        read=Condition(lambda a: a.prune_type == "rewind_lt", "with --prune_type rewind_lt"),
    ),
    Flag(
        "tail_epochs",
        "train each round after round 0 with the last so many epochs of the schedule only (default: with all)",
        AFTER_ROUND_0,
        type=COUNT,
        default=None,
    ),
    Flag(
        "criteria",
        _rows((name, criterion.summary) for name, criterion in CRITERIA.items())
        + ". With --regroup, remain unless another is given",
        AFTER_ROUND_0,
        default="l1",
        choices=CRITERIA,
        # rank units by how many of their weights the pruner kept
        derived=lambda a: "remain" if a.regroup and not METHODS[a.struct].regroups else a.criteria,
        read=Condition(lambda a: prunes_units(a) or a.struct == "refill", "when whole units are pruned (--regroup)"),
    ),
    Flag(
        "criteria_batches",
        "number of training batches read by feature-map criteria, SNIP and GraSP (always the same batches)",
        AFTER_ROUND_0,
        type=COUNT,
        default=CRITERIA_BATCHES,
        read=Condition(reads_batches, "with --criteria l1, l2 or saliency, or with --struct snip or grasp"),
    ),
    Flag(
        "rank_weights",
        "weights that global L1 ranks",
        AFTER_ROUND_0,
        default="trained",
        choices=("trained", "initial"),
        read=Condition(lambda a: METHODS[a.struct].pruner == "l1", "with --struct refill, rsst or imp"),
    ),
    Flag(
        "fillback_rate",
        "share of the units to be pruned that is kept after all (not used by rsst)",
        AFTER_ROUND_0,
        type=CLOSED_SHARE,
        default=0.0,
        read=Condition(
            lambda a: a.struct == "refill" or (a.struct != "rsst" and a.regroup),
            "with --struct refill, or with --regroup",
        ),
    ),
    Flag(
        "min_units",
        "minimum number of units kept in each layer",
        AFTER_ROUND_0,
        type=NATURAL,
        default=0,
        read=Condition(
            counts_units_by_layer,
            "when channels, heads or neurons are pruned (--regroup; for a ViT with refill or rsst: --vit_structured)",
        ),
    ),
    Flag(
        "channel_units",
        "of a CNN: " + _rows(CHANNEL_UNITS.items()),
        AFTER_ROUND_0,
        default=FILTER,
        choices=CHANNEL_UNITS,
        read=Condition(prunes_channels, "when channels of a CNN are pruned (--regroup with element-wise methods)"),
    ),
    Flag(
        "round_units",
        "keep a multiple of so many channels, neurons or features of heads (1, 8, 16) in each layer; "
        "auto: as many as the processor computes at once",
        AFTER_ROUND_0,
        type=lanes,
        default="1",
        metavar="N",
        derived=lambda a: _lanes_of(a) if a.round_units == "auto" else a.round_units,
        read=Condition(
            counts_units_by_layer,
            "when channels, heads or neurons are pruned (--regroup; for a ViT with refill or rsst: --vit_structured)",
        ),
    ),
    Flag(
        "conv1",
        "prune the stem too (first convolution; of a ViT the patch embedding, weight by weight)",
        AFTER_ROUND_0,
        bare=True,
    ),
    Flag(
        "preset",
        "; ".join(f"{name}: " + " ".join(f"{k}={v}" for k, v in flags.items()) for name, flags in PRESETS.items()),
        NOTHING,
        choices=PRESETS,
    ),
    Flag(
        "recipe",
        "flags of training that belong together, and may be given otherwise beside it; "
        + _rows((name, recipe.summary) for name, recipe in RECIPES.items()),
        LABEL,
        choices=RECIPES,
    ),
    Flag(
        "config",
        "settings that another run has written (args.yaml), or a file like it; flags that are given win",
        SETTINGS,
        metavar="FILE",
    ),
)

COMPARISONS = (
    Flag(
        "regroup",
        "regroup the mask of any method into whole units",
        AFTER_ROUND_0,
        bare=True,
        read=Condition(
            lambda a: not METHODS[a.struct].regroups, "with element-wise methods (refill and rsst always regroup)"
        ),
    ),
    Flag("admm_epochs", "epochs of ADMM before each mask", AFTER_ROUND_0, type=COUNT, default=20, read=WITH_ADMM),
    Flag(
        "admm_rho",
        "strength with which ADMM pulls towards the sparse network",
        AFTER_ROUND_0,
        type=NONNEGATIVE,
        default=0.01,
        read=WITH_ADMM,
    ),
    Flag(
        "control",
        "what to train instead of the ticket; " + _rows((name, control.summary) for name, control in CONTROLS.items()),
        AFTER_ROUND_0,
        default="none",
        choices=CONTROLS,
    ),
    Flag(
        "control_of",
        "run folder of the finished run that --control is compared with (default: that of the same command without "
        "--control)",
        SWEEPS_OWN,
        type=resolved_path,
        metavar="DIR",
        read=Condition(lambda a: a.control != "none", "with --control"),
    ),
)

VIT = (
    Flag(
        "vit_structured",
        "prune whole heads and neurons (without this flag ViTs are pruned weight by weight)",
        AFTER_ROUND_0,
        bare=True,
        read=Condition(lambda a: METHODS[a.struct].regroups, "with --struct refill or rsst (else: --regroup)"),
    ),
    Flag(
        "vit_prune_target",
        "units to prune: head, mlp, both, block (whole attention and MLP branches), or several with commas",
        AFTER_ROUND_0,
        type=prune_targets,
        default="head",
        metavar="UNITS",
        read=Condition(prunes_transformer_units, "with --vit_structured or --regroup"),
    ),
    Flag(
        "mlp_prune_ratio",
        "share of neurons to prune (default: --rate)",
        AFTER_ROUND_0,
        type=SHARE,
        derived=lambda a: a.rate,
        read=Condition(
            lambda a: prunes_kind(a, "neuron"), "with --vit_structured or --regroup, and --vit_prune_target mlp or both"
        ),
    ),
    Flag(
        "block_prune_ratio",
        "share of blocks to prune (default: --rate)",
        AFTER_ROUND_0,
        type=SHARE,
        # set only if blocks are pruned, so that the identity of older runs stays the same
        derived=lambda a: a.rate if "block" in kinds_of(a.vit_prune_target) else None,
        read=Condition(
            lambda a: prunes_kind(a, "block"), "with --vit_structured or --regroup, and --vit_prune_target block"
        ),
    ),
    Flag(
        "sorting_mode",
        "rank units within each block, or all units of the network together",
        AFTER_ROUND_0,
        default="layer-wise",
        choices=SORTING_MODES,
        read=Condition(
            lambda a: prunes_kind(a, "head", "neuron"), "with --vit_structured or --regroup, for heads and neurons"
        ),
    ),
    Flag("vit_pretrained", "start from ImageNet weights (timm, or the file of --pretrained)", EVERY_ROUND, bare=True),
)

RSST = (
    Flag(
        "RST_schedule",
        "how lambda grows with the progress p of --reg_horizon; "
        + _rows((name, schedule.summary) for name, schedule in SCHEDULES.items()),
        AFTER_ROUND_0,
        default="exp_custom_exponents",
        choices=SCHEDULES,
        read=WITH_RSST,
    ),
    Flag(
        "reg_granularity_prune",
        "delta in the formulas of --RST_schedule: lambda at the end of a round",
        AFTER_ROUND_0,
        type=POSITIVE,
        default=1.0,
        read=WITH_RSST,
    ),
    Flag(
        "exponents",
        f"power in {_WITH_EXPONENTS}",
        AFTER_ROUND_0,
        type=POSITIVE,
        default=4.0,
        read=Condition(
            lambda a: a.struct == "rsst" and SCHEDULES[a.RST_schedule].reads_exponents,
            f"with --struct rsst --RST_schedule {_WITH_EXPONENTS}",
        ),
    ),
    Flag(
        "reg_horizon",
        _rows(HORIZONS.items()),
        AFTER_ROUND_0,
        default="state",
        choices=HORIZONS,
        read=WITH_RSST,
    ),
    Flag(
        "reg_guard",
        "raise lambda only while delta * batch index < 1 (with the default delta: only at the first batch of each "
        "epoch)",
        AFTER_ROUND_0,
        type=truth,
        default=False,
        read=WITH_RSST,
    ),
    Flag("reg_upper_limit", "cap on lambda; inf for none", AFTER_ROUND_0, type=LIMIT, default=1.0, read=WITH_RSST),
    Flag(
        "penalty",
        _rows(WAYS.items()) + "; auto: the first of these that would leave at most 5%% of a doomed weight (adamw: not "
        "the gradient)",
        AFTER_ROUND_0,
        default="auto",
        choices=("auto", *WAYS),
        derived=penalty_of_flags,
        read=WITH_RSST,
    ),
    Flag(
        "block_loss_grad",
        "update doomed weights by the penalty only, without the loss gradient",
        AFTER_ROUND_0,
        type=truth,
        default=False,
        read=WITH_RSST,
    ),
    Flag(
        "rsst_dead",
        "dead weights (pruned by both masks); zero: held at zero; free: trained like the others",
        AFTER_ROUND_0,
        default="zero",
        choices=("zero", "free"),
        read=WITH_RSST,
    ),
    Flag(
        "reg_target",
        "weight: penalise only doomed weights; unit: penalise whole pruned units, including weights in them that L1 "
        "had pruned, which are restored",
        AFTER_ROUND_0,
        default="weight",
        choices=("weight", "unit"),
        read=WHERE_UNITS_SHRINK,
    ),
    Flag(
        "fade_out",
        "after each epoch, set a doomed unit to zero if the root mean square of its weights is at most this share of "
        "its layer's at the start of the round; 0: never",
        AFTER_ROUND_0,
        type=SHARE,
        default=0.01,
        metavar="SHARE",
        read=WHERE_UNITS_SHRINK,
    ),
)

OUTPUT = (
    Flag(
        "save_dir",
        "run folder (default: named after the settings)",
        SWEEPS_OWN,
        type=path_text,
        metavar="DIR",
        example="--save_dir my_run",
    ),
    Flag(
        "resume",
        "fail if the run folder holds no run to continue (a run in the folder is continued without this flag, too)",
        SWEEPS_OWN,
        bare=True,
    ),
    Flag(
        "checkpoint",
        "continue from this checkpoint if the run folder holds none",
        SWEEPS_OWN,
        type=path_text,
        metavar="FILE",
    ),
    Flag(
        "dense_store",
        "folder that shares round 0 between runs with the same model, data, seed and training flags: reuse it if it is "
        "there, else train and save it. Results are bit-identical. Not for networks from your own file",
        SWEEPS_OWN,
        type=resolved_path,
        metavar="DIR",
    ),
    Flag(
        "keep_checkpoints",
        "save disk space: keep checkpoints of the last ROUNDS rounds and of round 0 only. Masks and metrics are always "
        "kept (default: keep all)",
        MACHINE,
        type=rounds_to_keep,
        metavar="ROUNDS",
    ),
    Flag("print_freq", "number of batches between log lines", MACHINE, type=COUNT, default=200, metavar="BATCHES"),
    Flag("dry_run", "print the plan and train nothing", SWEEPS_OWN, bare=True),
    Flag("quiet", "print only warnings and the final table", SWEEPS_OWN, bare=True),
    Flag(
        "verbose",
        "print the decision for every layer in every round; the run's log.txt always has it",
        SWEEPS_OWN,
        bare=True,
    ),
)

TRACKING = (
    Flag(
        "wandb",
        "auto: upload if an API key is configured, else local files only",
        NOTHING,
        default="auto",
        choices=("auto", "online", "offline", "disabled"),
    ),
    Flag(
        "exp_name",
        "name of the run at WandB, and part of the run folder's name (default: made from the settings)",
        AFTER_ROUND_0,
        metavar="NAME",
    ),
    Flag("wandb_group", "group of the run at WandB (in a sweep: the name of the sweep)", SWEEPS_OWN, metavar="NAME"),
    Flag("wandb_tags", "tags of the run at WandB", NOTHING, type=word_list, default=(), metavar="TAG,..."),
    Flag("tensorboard", "also write TensorBoard event files, in tensorboard/ of the run folder", NOTHING, bare=True),
)

# What one sets first, in the order of the help text.
FIRST = ("arch", "dataset", "data", "struct", "rate", "pruning_times", "epochs", "save_dir")


def _grouped(groups: Mapping[str, tuple[Flag, ...]]) -> dict[str, tuple[Flag, ...]]:
    """Return the groups of the help text, with the flags that most runs set before all others."""
    flags = {flag.name: flag for group in groups.values() for flag in group}
    others = {title: tuple(f for f in group if f.name not in FIRST) for title, group in groups.items()}
    return {"start with these": tuple(flags[name] for name in FIRST), **others}


# Heading of the help text -> its flags.
GROUPS = _grouped(
    {
        "data": DATA,
        "model": MODEL,
        "training (of each round)": TRAINING,
        "pruning": PRUNING,
        "one-shot pruners and controls": COMPARISONS,
        "ViT": VIT,
        "RSST": RSST,
        "output": OUTPUT,
        "tracking": TRACKING,
    }
)
FLAGS: dict[str, Flag] = {flag.name: flag for flags in GROUPS.values() for flag in flags}


# Written among the settings of a run, no flags. The meaning of four schedules since 0.2: runs without it had another.
LAMBDA_FOLLOWS = "lambda_follows"
# Whether `penalty` was chosen for the run, whose command did not name one. Runs before 0.2 do not say it.
PENALTY_CHOSEN = "penalty_chosen"


def scope_of(name: str) -> Scope:
    """Return what a flag decides. One that is not in the table, as in an older checkpoint, may decide anything."""
    if name in (LAMBDA_FOLLOWS, PENALTY_CHOSEN):
        return NOTHING
    return FLAGS[name].scope if name in FLAGS else EVERY_ROUND
