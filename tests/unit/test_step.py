"""A training step without arguments: the bits of the loop before it, and nothing in it that waits or is frozen."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from helpers.networks import MICRO
from helpers.reference_loop import reference_train
from helpers.steps import Case, assert_same, kernels_that_repeat_themselves, seen_in_steps, with_a_whole_recipe
from helpers.watchers import Numbers, waiting
from torch import nn

from structured_tickets.base.distributed import ALONE
from structured_tickets.base.errors import DivergedError, Interrupted
from structured_tickets.data.loader import BatchLoader
from structured_tickets.training import step as steps
from structured_tickets.training.epoch import hardened, train, validate_together
from structured_tickets.training.meter import Meter
from structured_tickets.training.optimization import LR_SCHEDULES, OPTIMIZERS, LearningRate
from structured_tickets.training.penalty.reg_pruner import add_products, add_products_without_reading
from structured_tickets.training.penalty.schedules import HORIZONS, SCHEDULES, Clock
from structured_tickets.training.tables import HandedIn, Resident, can_be_resident, numbers_of_steps

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
WAYS = [(False, False), (True, False), (True, True)]  # decoupled, blocks the gradient of the loss


CASES = [
    pytest.param(a, o, d, b, c, marks=[pytest.mark.slow] * (a not in ("micro_cnn", "micro_vit", "dropping")))
    for a in (*MICRO, "dropping", "res20s", "vit_tiny")
    for o in OPTIMIZERS
    for d in (False, True)
    for b in (False, True)
    for c in (False, True)
    if not (c and a == "dropping")
]


@pytest.mark.parametrize("arch, optimizer, decoupled, blocks, compact", CASES)
def test_three_epochs_have_the_bits_of_the_loop_with_python_numbers(arch, optimizer, decoupled, blocks, compact):
    """The last batch of each epoch is a short one."""
    make = partial(Case, arch, optimizer, decoupled, compact, block_loss_grad=blocks)
    ours, theirs = make(), make()
    assert (ours.model is not ours.whole) == compact and ours.pruner.doomed
    start = {k: v.clone() for k, v in ours.model.state_dict().items()}
    torch.manual_seed(7)
    our_sums = ours.train()
    torch.manual_seed(7)
    their_sums = theirs.train(reference_train)
    assert all(torch.equal(a, b) for a, b in zip(our_sums, their_sums, strict=True))
    assert_same(ours.values(), theirs.values())
    assert any(not torch.equal(v, ours.model.state_dict()[k]) for k, v in start.items())


@pytest.mark.parametrize("handed_in", [False, True])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("decoupled, blocks", WAYS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("arch", [*MICRO, "dropping"])
def test_nothing_in_a_step_waits(arch, optimizer, decoupled, blocks, device, handed_in, monkeypatch):
    case = Case(arch, optimizer, decoupled, device=device, block_loss_grad=blocks)
    if handed_in:
        monkeypatch.setattr("structured_tickets.training.epoch.can_be_resident", lambda *_: False)
    assert seen_in_steps(case, waiting) == [[]] * 6
    assert isinstance(next(iter(case.passer.recorder._kept.values()))[1].source, HandedIn if handed_in else Resident)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_in_an_evaluation_waits(device, monkeypatch):
    case, seen, real = Case(device=device), [], steps.Evaluation.once

    def once(step):
        with waiting() as found:
            real(step)
        seen.append(found)

    monkeypatch.setattr(steps.Evaluation, "once", once)
    validate_together(BatchLoader(case.data, 8, case.device), case.model, case.criterion, ALONE)
    assert seen == [[]] * 3


CULPRITS = {
    "a tensor of Python numbers": lambda x: torch.tensor([0.0, 1.0]),
    "new_tensor": lambda x: x.new_tensor(3),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool(x[0] > 0),
    "if": lambda x: 1 if x[0] > 0 else 0,
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "an index without axes": lambda x: x[torch.zeros((), dtype=torch.long)],
    "a mask as index": lambda x: x[x > 0],
    "assignment by a mask": lambda x: x.clone().__setitem__(x > 0, 1.0),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "masked_select": lambda x: x.masked_select(x > 0),
}


@pytest.mark.parametrize("what", CULPRITS)
def test_what_waits_is_caught(what):
    x = torch.ones(3)
    with waiting() as found:
        CULPRITS[what](x + 1)
    assert found
    with waiting() as found:
        x[torch.zeros(1, dtype=torch.long)]
    assert not found


def test_the_loop_before_it_waited_in_every_step():
    with waiting() as found:
        Case().train(reference_train, [0])
    assert found.count("lift_fresh.default") >= 3 and found.count("_local_scalar_dense.default") >= 3


@pytest.mark.parametrize("decoupled, blocks", WAYS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("arch", [*MICRO, "dropping"])
def test_no_number_of_a_step_is_frozen(arch, optimizer, decoupled, blocks):
    """Across the border of an epoch, where learning rate and lambda change most; the first step makes things."""
    case = Case(arch, optimizer, decoupled, images=32, block_loss_grad=blocks)
    _, *seen = (numbers.calls for numbers in seen_in_steps(case, Numbers))
    assert len(seen) == 7 and len(seen[0]) > 100
    assert all(calls == seen[0] for calls in seen)


@pytest.mark.parametrize("arch", MICRO)
def test_no_number_of_a_whole_recipe_is_frozen_and_nothing_waits(arch):
    case = with_a_whole_recipe(Case(arch, images=32))
    _, *seen = (numbers.calls for numbers in seen_in_steps(case, Numbers))
    assert len(seen) == 7 and len(seen[0]) > 500
    assert all(calls == seen[0] for calls in seen)
    for found in seen_in_steps(with_a_whole_recipe(Case(arch, images=32)), waiting):
        assert not found


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_loop_before_it_froze_two_numbers(optimizer):
    case, starts = Case(optimizer=optimizer, images=32), []
    real = case.criterion
    with Numbers() as numbers:
        case.criterion = lambda output, target: starts.append(len(numbers.calls)) or real(output, target)
        case.train(reference_train, [0])
    one, other = numbers.calls[starts[1] : starts[2]], numbers.calls[starts[2] : starts[3]]
    assert len(one) == len(other)
    different = {a[0] for a, b in zip(one, other, strict=True) if a != b}
    assert different == {"aten._foreach_addcmul_.Scalar", f"aten._fused_{optimizer}_.default"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_addresses_stay(optimizer, device):
    case = Case(optimizer=optimizer, device=device)
    test = BatchLoader(case.data, 8, case.device)
    case.train(epochs=[0])
    ((_, step),) = case.passer.recorder._kept.values()
    before = step.addresses()
    validate_together(test, case.model, case.criterion, ALONE, torch.float32, case.passer.recorder)
    structure = {n: torch.zeros_like(p) for n, p in case.whole.named_parameters() if p.ndim > 1}
    with hardened(case.whole, structure):
        validate_together(test, case.whole, case.criterion, ALONE)
    case.trainee.write_back()
    case.passer.stop = Stop(case.loader, at=1)
    with pytest.raises(Interrupted):
        case.train(epochs=[1])
    case.passer.stop = None
    case.passer.meter = None
    case.train(epochs=[1, 2])
    assert step.addresses() == before
    kept = [body for _, body in case.passer.recorder._kept.values()]
    assert [type(body) for body in kept] == [steps.Step, steps.Evaluation] and kept[0] is step


def test_a_network_whose_tensors_have_moved_gets_a_new_step():
    case = Case()
    case.train(epochs=[0])
    ((_, step),) = case.passer.recorder._kept.values()
    case.model.fc.weight.data = case.model.fc.weight.data.clone()
    case.train(epochs=[1])
    ((_, other),) = case.passer.recorder._kept.values()
    assert other is not step


class Stop:
    """A signal that comes after so many steps."""

    signal = None

    def __init__(self, loader, at):
        self.left = at

    def obey(self, where):
        self.left -= 1
        if self.left == 0:
            raise Interrupted(where, 15)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("end", ["epoch", "signal", "error"])
def test_the_optimizer_is_left_as_it_was(end, optimizer, device):
    """Its state is saved, and loaded by processes that make steps in another way."""
    case = Case(optimizer=optimizer, device=device)
    keys = [group.keys() for group in case.optimizer.param_groups]
    if end == "epoch":
        case.train(epochs=[0, 1])
    elif end == "signal":
        case.passer.stop = Stop(case.loader, at=2)
        with pytest.raises(Interrupted):
            case.train(epochs=[0])
    else:
        case.criterion = nn.NLLLoss(reduction="no such")
        with pytest.raises(ValueError, match="no such"):
            case.train(epochs=[0])
    wanted = {"epoch": case.passer.rate.at(1, 2), "signal": case.passer.rate.at(0, 1), "error": case.passer.rate.base}
    for group, before in zip(case.optimizer.param_groups, keys, strict=True):
        assert group.keys() == before and not group.get("capturable")
        assert type(group["lr"]) is float and group["lr"] == wanted[end]
    assert not hasattr(case.optimizer, "found_inf") and not hasattr(case.optimizer, "grad_scale")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_an_epoch_continues_at_every_step(at, optimizer, device):
    """With dropout; everything that a checkpoint holds goes through it."""
    through, first, second = (Case("dropping", optimizer, device=device, images=36) for _ in range(3))
    torch.manual_seed(3)
    (sums,) = through.train(epochs=[1])
    torch.manual_seed(3)
    first.passer.stop = Stop(first.loader, at=at)
    with pytest.raises(Interrupted):
        first.train(epochs=[1])
    random = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
    torch.manual_seed(99)
    second.model.load_state_dict(first.model.state_dict())
    second.trainee.load_optimizer_state(first.trainee.optimizer_state())
    reached = first.passer.meter.reached()
    assert reached["steps"] == at
    second.passer.meter = Meter.start(second.device, reached)
    torch.cuda.set_rng_state(random) if device == "cuda" else torch.set_rng_state(random)
    (ours,) = second.train(epochs=[1], start=at)
    assert torch.equal(ours, sums) and int(ours[2]) == 36
    assert_same(second.values(), through.values())


class Spoilt(nn.Module):
    """A loss that is not a number from one call on."""

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, output, target):
        self.calls += 1
        loss = nn.functional.cross_entropy(output, target)
        return loss * (math.nan if self.calls > self.at else 1.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_the_step_whose_loss_is_not_finite_changes_no_weight(at, optimizer, decoupled, device):
    """On a card, it is seen when the epoch ends; steps in between change nothing either."""
    case, other = (Case(optimizer=optimizer, decoupled=decoupled, device=device) for _ in range(2))
    case.criterion = Spoilt(at)
    with kernels_that_repeat_themselves(device):
        if at:
            other.passer.stop = Stop(other.loader, at=at)
            with pytest.raises(Interrupted):
                other.train(epochs=[0])
        with pytest.raises(DivergedError, match=rf"NaN or infinite in round 1, epoch 0, step {at + 1} of 3"):
            case.train(epochs=[0])
    weights = dict(other.model.named_parameters())
    for name, value in case.model.named_parameters():
        assert torch.equal(value, weights[name]), name
    state = {k: v for k, v in case.values().items() if "momentum" in k or "exp" in k or k.endswith(" step")}
    theirs = other.values()
    for name, value in state.items():
        assert torch.equal(value, theirs[name] if name in theirs else torch.zeros_like(value)), name


def test_an_optimizer_that_takes_only_numbers_gets_them():
    """As a script of the documents has it: torch's plain SGD, or one that is none of torch's."""
    results = []
    for fused in (True, False):
        case = Case()
        for group in case.optimizer.param_groups:
            group["fused"] = fused
        case.train(epochs=[0, 1])
        assert case.optimizer.param_groups[0]["lr"] == case.passer.rate.at(1, 2)
        results.append(case.values())
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name])
    plain, theirs = Case(), Case()
    for case in (plain, theirs):
        case.optimizer.param_groups[0]["fused"] = False
    plain.train()
    theirs.train(reference_train)
    assert_same(plain.values(), theirs.values())


def test_strengths_that_are_changed_one_by_one_apply():
    """`Pruner.reg` is a name of the documents; what is changed in it applies until lambda moves."""
    plain, changed, theirs = Case(reg_upper_limit=0.05), Case(reg_upper_limit=0.05), Case(reg_upper_limit=0.05)
    for case in (changed, theirs):  # lambda stands at its cap
        case.pruner.advance(2, 2, 3)
        for value in case.pruner.reg.values():
            value.mul_(3)
    plain.pruner.advance(2, 2, 3)
    for case, loop in ((plain, train), (changed, train), (theirs, reference_train)):
        case.args.reg_guard = False
        case.train(loop, epochs=[2])
    assert_same(changed.values(), theirs.values())
    assert not torch.equal(plain.model.fc.weight, changed.model.fc.weight) or plain.pruner.strength < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_card_adds_what_a_processor_adds(dtype):
    """There the host must not read lambda, so that it takes two operations."""
    shapes = [(50, 3, 3), (200, 7), (1,)]
    weights, targets = ([torch.randn(s, dtype=dtype) for s in shapes] for _ in range(2))
    masks = [(torch.rand(s) < 0.5).to(dtype) for s in shapes]
    for amount in (0.1234567891234, -3e-9, 0.0):
        value, results = torch.tensor(amount, dtype=torch.float64), []
        for add in (add_products, add_products_without_reading):
            results.append([t.clone() for t in targets])
            add(results[-1], masks, weights, value)
        results.append([t.clone() for t in targets])
        torch._foreach_addcmul_(results[-1], masks, weights, value=amount)
        assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(*results, strict=True))
    with waiting() as found:
        add_products_without_reading(targets, masks, weights, torch.tensor(0.1).requires_grad_(False))
    assert found == ["lift_fresh.default"], "of the test's own number alone"


@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_table_holds_the_schedules(schedule, horizon):
    class Penalty:
        clock = Clock(schedule, 0.7, 3, 4, horizon, guard=schedule == "x", upper_limit=0.6)

    for lr_schedule in LR_SCHEDULES:
        rate = LearningRate(0.2, 4, 5, 1, lr_schedule, (2, 3))
        for epoch in range(4):
            plain = numbers_of_steps(rate, Penalty, epoch, 5, None)
            paced = numbers_of_steps(rate, Penalty, epoch, 5, lambda lr: lr / 0.2)
            for i in range(5):
                strength = Penalty.clock.strength(epoch, i, 5)
                assert plain[i].tolist() == [rate.at(epoch, i), strength, 0.0]
                assert paced[i].tolist() == [rate.at(epoch, i), -(rate.at(epoch, i) / 0.2) * strength, 0.0]
    assert numbers_of_steps(None, None, 0, 2, None).tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("images, start", [(5, 0), (16, 0), (16, 1), (20, 0), (20, 1), (20, 2), (24, 2)])
def test_tables_hold_the_batches_of_the_loader(images, start, augment, device):
    case = Case(device=device, images=images)
    loader = BatchLoader(case.data, 8, case.device, augment=augment, flip=True, seed=4)
    source, at = Resident(loader), torch.zeros(1, dtype=torch.long, device=case.device)
    for epoch in (0, 1):
        loader.seek(2, epoch, start)
        assert can_be_resident(loader, case.device, start) and not can_be_resident(loader, case.device, start + 1)
        theirs = list(loader)
        loader.seek(2, epoch, start)
        ours = []
        for item in source.walk():
            source.take(item)
            ours.append(source.fetch(at.fill_(item)))
        assert len(ours) == len(theirs)
        for (image, label), (other, wanted) in zip(ours, theirs, strict=True):
            assert torch.equal(image, other) and torch.equal(label, wanted) and image.stride() == other.stride()


def test_only_a_loader_whose_batches_are_whole_and_on_the_device_is_resident():
    case = Case()
    assert can_be_resident(case.loader, case.device, 0)
    assert not can_be_resident(list(case.loader), case.device, 0)
    assert not can_be_resident(case.loader, torch.device("meta"), 0)
    case.loader.share = (0, 2)
    assert not can_be_resident(case.loader, case.device, 0)


def test_batches_that_are_handed_in_lie_where_a_recorded_step_looks_for_them():
    source, at = HandedIn([], fixed=True), torch.zeros(1)
    batches = [(torch.rand(4, 3), torch.arange(4)), (torch.rand(4, 3), torch.arange(4) + 1), (torch.rand(2, 3), at)]
    places = []
    for batch in batches:
        source.take(batch)
        found = source.fetch(at)
        assert all(torch.equal(a, b) for a, b in zip(found, batch, strict=True))
        places.append((source.whole, found[0].data_ptr()))
    assert places[0] == places[1] and places[0][0] and not places[2][0]
    assert places[0][1] not in [batch[0].data_ptr() for batch in batches]


def test_the_last_batch_of_a_loader_is_never_the_usual_one():
    """Not even where an epoch continues with it, so that it comes first."""

    class Loader(list):
        batch_size = 4

    source = HandedIn(Loader(), fixed=True)
    seen = []
    for size in (2, 4, 2, 4):
        source.take((torch.rand(size, 3), torch.arange(size)))
        seen.append(source.whole)
    assert seen == [False, True, False, True]
