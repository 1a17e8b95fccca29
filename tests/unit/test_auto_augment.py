"""TrivialAugment, RandAugment, AutoAugment and repeated augmentation: `--auto_augment`, `--repeated_augment`."""

from __future__ import annotations

from collections import Counter

import numpy
import pytest
import torch
from helpers.commands import run, tiny
from helpers.comparison import assert_same_runs
from helpers.interruptions import stopped_again_and_again
from helpers.watchers import waiting
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode
from torchvision.transforms.autoaugment import _apply_op

from structured_tickets.data import auto_augment
from structured_tickets.data.auto_augment import NUMBER, OPERATIONS, SIGNED, augmented, drawn, strengths
from structured_tickets.data.image_sets import ImageSet
from structured_tickets.data.loader import BatchLoader, repeated
from structured_tickets.data.policies import POLICIES, slots_of
from structured_tickets.settings.flags import parse_args

DRAWING = [policy for policy in POLICIES if slots_of(policy)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images():
    """Smooth ones, one of a single colour, one of two, and noise."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(6, 3, 4, 4, generator=draw) * 255
    smooth = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear").to(torch.uint8)
    flat = torch.full((1, 3, 32, 32), 77, dtype=torch.uint8)
    halves = flat.clone()
    halves[..., :16] = 200
    noise = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=draw)
    return torch.cat([smooth, flat, halves, noise])


@pytest.mark.parametrize("policy", DRAWING)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_torchvisions(name, policy, images):
    """One level of 256 off at most, which is rounding; and where a source lies between two pixels, the other one."""
    values = strengths(policy, 32).get(name, numpy.zeros(31))[::4]
    for value in {sign * float(v) for v in values for sign in ((1, -1) if name in SIGNED else (1,))}:
        operations = torch.full((len(images), 1), NUMBER[name])
        ours = augmented(images, operations, torch.full((len(images), 1), value))
        theirs = torch.stack([_apply_op(one, name, value, InterpolationMode.NEAREST, None) for one in images])
        far = ((ours.int() - theirs.int()).abs() > 1).float().mean()
        assert far <= (0.01 if name.startswith("Shear") else 0), (name, value, far)


def test_strengths_are_torchvisions():
    from torchvision.transforms import RandAugment, TrivialAugmentWide

    theirs = {
        "trivial": TrivialAugmentWide()._augmentation_space(31),
        "rand": RandAugment()._augmentation_space(31, (40, 40)),
        "cifar": AutoAugment(AutoAugmentPolicy.CIFAR10)._augmentation_space(10, (40, 40)),
    }
    for policy, space in theirs.items():
        ours = strengths(policy, 40)
        assert {name for name, (values, _) in space.items() if values.ndim} == set(ours)
        for name, values in ours.items():
            assert values == pytest.approx(space[name][0].numpy(), abs=1e-4), (policy, name)
            assert space[name][1] == (name in SIGNED)


@pytest.mark.parametrize("policy", DRAWING)
def test_what_is_drawn(policy):
    operations, amounts = drawn(policy, 6000, 32, 0, 1, 2)
    assert operations.shape == amounts.shape == (6000, slots_of(policy))
    again, other = drawn(policy, 6000, 32, 0, 1, 2), drawn(policy, 6000, 32, 0, 1, 3)
    assert torch.equal(operations, again[0]) and torch.equal(amounts, again[1])
    assert not torch.equal(operations, other[0])
    share = Counter(OPERATIONS[k] for k in operations.flatten().tolist())
    signs = amounts[torch.isin(operations, torch.tensor([NUMBER[n] for n in SIGNED])) & (amounts != 0)].sign()
    assert abs(float(signs.mean())) < 0.05
    assert (amounts[~torch.isin(operations, torch.tensor([NUMBER[n] for n in SIGNED]))] >= 0).all()
    if policy == "cifar":
        rows = AutoAugment(AutoAugmentPolicy.CIFAR10).policies
        wanted = Counter()
        for row in rows:
            for name, chance, _ in row:
                wanted[name] += chance / len(rows) / 2
        for name, chance in wanted.items():
            assert share[name] / operations.numel() == pytest.approx(chance, abs=0.015), name
    else:
        assert "Invert" not in share and len(share) == 14
        assert all(0.055 < count / operations.numel() < 0.09 for count in share.values())
    levels = {n: len(set(amounts[operations == NUMBER[n]].abs().tolist())) for n in ("Rotate", "Color")}
    assert levels == ({"Rotate": 31, "Color": 31} if policy == "trivial" else levels)
    assert policy != "rand" or set(levels.values()) == {1}


def test_images_of_a_batch_go_through_operations_of_their_own_in_their_order(images):
    operations = torch.tensor([[NUMBER["Rotate"], NUMBER["Invert"]], [NUMBER["Invert"], NUMBER["Rotate"]]])
    amounts = torch.tensor([[30.0, 0.0], [0.0, 30.0]])
    pair = images[:1].repeat(2, 1, 1, 1)
    both = augmented(pair, operations, amounts)
    for k in range(2):
        one = images[:1]
        for slot in range(2):
            one = augmented(one, operations[k : k + 1, slot : slot + 1], amounts[k : k + 1, slot : slot + 1])
        assert torch.equal(both[k : k + 1], one)
    assert not torch.equal(both[0], both[1]), "a corner that is black before is white afterwards"


def test_nothing_waits_for_the_device(images):
    operations, amounts = drawn("rand", len(images), 32, 0, 0, 0)
    with waiting() as found:
        augmented(images, operations, amounts)
    assert not found


def loader(policy, images, **more):
    labels = torch.arange(len(images))
    return BatchLoader(ImageSet(images, labels), 4, CPU, augment=True, flip=True, policy=policy, **more)


@pytest.mark.parametrize("policy", DRAWING)
def test_a_loader_augments_and_continues_in_the_middle(policy, images):
    ours, plain = loader(policy, images), loader("none", images)
    whole, before = list(ours), list(plain)
    assert [torch.equal(a[1], b[1]) for a, b in zip(whole, before, strict=True)] == [True] * 3, "the same order"
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(whole, before, strict=True))
    ours.seek(0, 0, 2)
    (last,) = list(ours)
    assert torch.equal(last[0], whole[2][0])
    assert ours.unchanged().slots == 0 and whole[0][0].min() >= 0 and whole[0][0].max() <= 1


def test_repeated_images_share_a_batch_and_are_no_neighbours():
    order = torch.arange(100, 120)
    found = repeated(order, 8, 3)
    assert len(found) == 20 and repeated(order, 8, 1) is order
    assert found.tolist() == [*[100, 101, 102] * 2, 100, 101, *[103, 104, 105] * 2, 103, 104, *[106, 107] * 2]


def test_repetitions_are_augmented_anew(images):
    ours = loader("trivial", images, repeats=2)
    seen = [(x, y) for x, y in ours]
    assert sum(len(y) for _, y in seen) == len(images)
    for x, y in seen[:2]:
        assert y[:2].tolist() == y[2:].tolist() and not torch.equal(x[:2], x[2:])


def test_a_run_that_is_stopped_in_the_middle_goes_on(tmp_path, monkeypatch):
    words = {"auto_augment": "cifar", "repeated_augment": 2, "epochs": 3, "random_erasing": 0.3}
    assert run(*tiny(tmp_path / "through", **words)) == 0
    assert stopped_again_and_again(monkeypatch, 7, lambda turn: tiny(tmp_path / "parts", **words)) > 1
    assert_same_runs(tmp_path / "through", tmp_path / "parts")


def test_the_flags():
    args = parse_args(["--auto_augment=rand", "--repeated_augment=3"])
    assert (args.auto_augment, args.repeated_augment) == ("rand", 3)
    assert auto_augment.slots_of("rand") == 2
