"""The length of each round, and the part of a learning rate's schedule that it goes through."""

from __future__ import annotations

from typing import Any

from structured_tickets.training.optimization import LearningRate

GIVEN, FINETUNE = "given", "finetune"
CONTINUED = ("lrr", FINETUNE)  # rows of `--prune_type` whose rounds go on with the weights just trained


def epochs_of(args: Any, state: int) -> range:
    """Return the epochs of a round, by their numbers in the schedule of its learning rate.

    A round 0 that is given has one: a pass over the training images in which nothing is learnt.

    Args:
        args: Settings; what they do not say, as a script of the documents, is the default.
        state: Number of the round.
    """
    if state == 0:
        return range(1 if getattr(args, "round_0", "train") == GIVEN else args.epochs)
    if getattr(args, "prune_type", "lt") == FINETUNE:
        return range(args.finetune_epochs or args.epochs)
    return range(args.epochs - (getattr(args, "tail_epochs", None) or args.epochs), args.epochs)


def step_of(args: Any, state: int, epoch: int) -> int:
    """Return the number of an epoch in its run, by which curves are drawn."""
    later = (args.prune_type == FINETUNE and args.finetune_epochs) or args.epochs
    return epoch if state == 0 else args.epochs + (state - 1) * later + epoch


def learning_rate_of(args: Any, state: int, steps: int) -> LearningRate:
    """Return the learning rate of a round with so many steps in an epoch.

    Fine-tuning goes through the same schedule in its own number of epochs, from its own rate, without a warm-up.
    """
    if state == 0 or args.prune_type != FINETUNE:
        schedule = args.lr_schedule, args.decreasing_lr, args.warmup_steps
        return LearningRate(args.lr, args.epochs, steps, args.warmup, *schedule)
    epochs = len(epochs_of(args, state))
    milestones = [max(min(m, 1), round(epochs * m / args.epochs)) for m in args.decreasing_lr]
    return LearningRate(args.finetune_lr or args.lr / 10, epochs, steps, 0, args.lr_schedule, milestones)
