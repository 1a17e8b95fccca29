"""Mixup, CutMix and random erasing: what is drawn, and what it does to images and labels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.commands import run, tiny
from helpers.comparison import assert_same_runs
from helpers.interruptions import stopped_again_and_again
from helpers.steps import Case, seen_in_steps
from helpers.watchers import Numbers, waiting
from torch import nn

from structured_tickets.data.image_sets import ImageSet
from structured_tickets.data.loader import BatchLoader, even_sizes
from structured_tickets.data.mixing import BOTTOM, LEFT, RIGHT, SHARE, TOP, WEIGHT, Mixing, boxes_to_erase, erased
from structured_tickets.runs.folder import RunFolder

BOTH = {"mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.25}


def mixing(mixup=0.0, cutmix=0.0, classes=4, size=8, seed=0, state=0):
    return Mixing(mixup, cutmix, classes, size, seed, state)


def test_mixup_by_hand():
    images = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    numbers = torch.tensor([0.75, 0, 0, 0, 0, 0.75])
    mixed, labels, shares = mixing(1.0, classes=3, size=2).mixed(images, torch.tensor([0, 1, 2]), numbers)
    assert mixed[:, 0, 0, 0].tolist() == [0.75 * 1 + 0.25 * 4, 0.75 * 2 + 0.25 * 1, 0.75 * 4 + 0.25 * 2]
    assert shares.tolist() == [[0.75, 0, 0.25], [0.25, 0.75, 0], [0, 0.25, 0.75]]
    assert labels.tolist() == [0, 1, 2]
    numbers = torch.tensor([0.25, 0, 0, 0, 0, 0.25])
    assert mixing(1.0, classes=3, size=2).mixed(images, torch.tensor([0, 1, 2]), numbers)[1].tolist() == [2, 0, 1]


def test_cutmix_by_hand():
    """A box of rows 0 and 1, columns 1 to 3, of 16 pixels: 6 are the other's."""
    images = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    numbers = torch.tensor([1.0, 0, 1, 2, 4, 10 / 16], dtype=torch.float64)
    mixed, _, shares = mixing(cutmix=1.0, classes=2, size=4).mixed(images, torch.tensor([0, 1]), numbers)
    assert mixed[0, 2].tolist() == [[0, 1, 1, 1], [0, 1, 1, 1], [0] * 4, [0] * 4]
    assert torch.equal(mixed[1], 1 - mixed[0])
    assert shares.tolist() == [[10 / 16, 6 / 16], [6 / 16, 10 / 16]]


def test_the_loss_of_mixed_labels_is_the_mixture_of_the_losses():
    torch.manual_seed(0)
    output, labels = torch.randn(5, 4), torch.randint(0, 4, (5,))
    _, _, shares = mixing(1.0).mixed(torch.rand(5, 3, 8, 8), labels, torch.tensor([0.3, 0, 0, 0, 0, 0.3]))
    for smoothing in (0.0, 0.1):
        loss = nn.CrossEntropyLoss(label_smoothing=smoothing)
        wanted = 0.3 * loss(output, labels) + 0.7 * loss(output, labels.roll(1))
        torch.testing.assert_close(loss(output, shares), wanted)


@pytest.mark.parametrize(
    "alphas, kinds", [((0.5, 0.0), {"mixup"}), ((0.0, 1.0), {"cutmix"}), ((0.5, 1.0), {"mixup", "cutmix"})]
)
def test_what_is_drawn_for_a_batch(alphas, kinds):
    numbers = mixing(*alphas, size=32).drawn(3, 4000)
    height, width = numbers[:, BOTTOM] - numbers[:, TOP], numbers[:, RIGHT] - numbers[:, LEFT]
    cut = numbers[:, WEIGHT] == 1
    assert {"cutmix" if c else "mixup" for c in cut.tolist()} == kinds
    assert (numbers[:, TOP : RIGHT + 1] >= 0).all() and (numbers[:, TOP : RIGHT + 1] <= 32).all()
    torch.testing.assert_close(numbers[cut, SHARE], 1 - height[cut] * width[cut] / 32**2)
    assert torch.equal(numbers[~cut, SHARE], numbers[~cut, WEIGHT]) and (height[~cut] == 0).all()
    if len(kinds) == 2:
        assert 0.45 < cut.double().mean() < 0.55
    if "mixup" in kinds:  # mean and variance of Beta(a, a)
        drawn = numbers[~cut, WEIGHT]
        assert abs(float(drawn.mean()) - 0.5) < 0.02 and abs(float(drawn.var()) - 1 / (4 * (2 * 0.5 + 1))) < 0.01


def test_an_epoch_draws_what_it_draws_again():
    one = mixing(1.0, 1.0)
    assert torch.equal(one.drawn(2, 9), one.drawn(2, 9))
    others = [one.drawn(3, 9), mixing(1.0, 1.0, seed=1).drawn(2, 9), mixing(1.0, 1.0, state=1).drawn(2, 9)]
    assert not any(torch.equal(one.drawn(2, 9), other) for other in others)


def test_boxes_have_the_areas_and_shapes_of_the_paper():
    boxes = boxes_to_erase(20000, 0.25, 32, 0, 1, 2)
    sides = (boxes[:, 2:] - boxes[:, :2]).double()
    has = sides.prod(1) > 0
    assert 0.24 < has.double().mean() < 0.26
    area, aspect = sides[has].prod(1) / 32**2, sides[has, 0] / sides[has, 1]
    assert area.min() > 0.01 and area.max() < 0.35 and abs(float(area.mean()) - 0.175) < 0.02
    assert aspect.min() > 0.25 and aspect.max() < 4 and abs(float(aspect.log().mean())) < 0.03
    assert boxes.min() == 0 and boxes.max() == 32
    assert boxes_to_erase(9, 0.0, 32, 0, 1, 2).sum() == 0
    assert not torch.equal(boxes, boxes_to_erase(20000, 0.25, 32, 0, 1, 3))


def test_erasing_by_hand():
    images = torch.ones(2, 3, 4, 4, dtype=torch.uint8)
    out = erased(images, torch.tensor([[1, 0, 3, 2], [0, 0, 0, 0]]))
    assert out[0, 1].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]]
    assert torch.equal(out[1], images[1]) and out.dtype == torch.uint8


def test_a_loader_erases_training_images_only_and_the_same_ones_everywhere():
    """Also from the middle of an epoch, and by the tables of a step."""
    data = ImageSet(torch.full((40, 3, 8, 8), 200, dtype=torch.uint8), torch.arange(40) % 4)
    cpu = torch.device("cpu")
    loader = BatchLoader(data, 8, cpu, augment=True, erasing=0.5)
    plain = BatchLoader(data, 8, cpu, augment=True)
    loader.seek(1, 2), plain.seek(1, 2)
    both = list(zip(loader, plain, strict=True))
    black = torch.cat([(a == 0).sum((1, 2, 3)) - (b == 0).sum((1, 2, 3)) for (a, _), (b, _) in both])
    assert 8 < int((black > 0).sum()) < 32 and (black >= 0).all()
    assert all(torch.equal(y, z) for (_, y), (_, z) in both)
    loader.seek(1, 2, 3)
    assert torch.equal(next(iter(loader))[0], both[3][0][0])
    assert (BatchLoader(data, 8, cpu, erasing=0.5).unchanged().drawn().boxes == 0).all()


def mixed_case(**words):
    case = Case(images=32, **words)
    case.passer.mixing = Mixing(1.0, 1.0, 10, 8, 0, 1)
    case.loader.erasing = 0.5
    return case


def test_a_mixed_step_neither_waits_nor_freezes_a_number():
    case = mixed_case()
    _, *seen = (numbers.calls for numbers in seen_in_steps(case, Numbers))
    assert len(seen) == 7 and all(calls == seen[0] for calls in seen)
    with_waiting = [list(found) for found in seen_in_steps(mixed_case(), waiting)]
    usual = [list(found) for found in seen_in_steps(Case(images=32), waiting)]
    assert with_waiting == usual


def test_the_sums_of_a_mixed_epoch_are_those_of_its_batches():
    """Loss by the shares, correct by the label with the larger one."""
    case = mixed_case()
    case.loader.seek(1, 0)
    batches, numbers = list(case.loader), case.passer.mixing.drawn(0, 4)
    case.optimizer.step = lambda: None
    case.pruner = None
    case.model.train()
    twin = nn.CrossEntropyLoss()
    loss = correct = 0.0
    for (images, labels), row in zip(batches, numbers, strict=True):
        mixed, label, shares = case.passer.mixing.mixed(images, labels, row)
        output = case.model(mixed)
        loss += float(twin(output, shares).double()) * len(labels)
        correct += int((output.argmax(1) == label).sum())
    (sums,) = case.train(epochs=[0])
    assert sums.tolist() == pytest.approx([loss, correct, 32], rel=1e-5)


def test_a_mixed_run_continues_at_every_step(tmp_path, monkeypatch):
    words = {**BOTH, "struct": "rsst", "epochs": 2}
    assert run(*tiny(tmp_path / "through", **words)) == 0
    assert stopped_again_and_again(monkeypatch, 7, lambda turn: tiny(tmp_path / "parts", **words)) > 2
    assert_same_runs(tmp_path / "through", tmp_path / "parts")


def test_a_mixed_run_at_real_size_trains_the_same_network(tmp_path):
    words = {**BOTH, "struct": "refill", "criteria": "magnitude", "precision": "fp32"}
    ends = []
    for compact in ("true", "false"):
        assert run(*tiny(tmp_path / compact, compact_training=compact, **words)) == 0
        ends.append(RunFolder.load(tmp_path / compact / "1checkpoint.pth.tar").state_dict)
    for name, value in ends[0].items():
        if not name.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(value, ends[1][name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("processes", [2, 3, 5])
def test_shares_of_a_batch_are_mixed_as_the_whole_one(processes, parts):
    """Also those of a last batch that has fewer images, fewer parts, or none for a process."""
    images, labels = torch.randint(0, 256, (25, 3, 8, 8), dtype=torch.uint8), torch.arange(25)
    options = {"augment": True, "flip": True, "seed": 3, "parts": parts, "erasing": 0.5}
    loader = BatchLoader(ImageSet(images, labels), 12 // parts, torch.device("cpu"), **options)
    whole, alone = list(loader), mixing(1.0, 1.0, classes=25)
    numbers = alone.drawn(0, len(whole))
    wanted = [alone.mixed(*batch, row) for batch, row in zip(whole, numbers, strict=True)]
    found = []
    for rank in range(processes):
        loader.share, loader.ahead = (rank, processes), parts
        together = replace(alone, ahead=parts)
        mine = []
        for (own, targets), batch, row in zip(loader, whole, numbers, strict=True):
            sizes = [n // processes + (rank < n % processes) for n in even_sizes(len(batch[1]), 12 // parts)]
            assert len(own) == len(targets) == parts + sum(sizes)
            mine.append([value.split(sizes) for value in together.mixed(own, targets, row, sizes)])
        found.append(mine)
    assert len(whole[-1][1]) == 1, "less than there are processes"
    for i, batch in enumerate(wanted):
        for k, value in enumerate(batch):
            count = len(found[0][i][k])
            assert torch.equal(torch.cat([mine[i][k][part] for part in range(count) for mine in found]), value)


def test_numpy_draws_what_it_drew_when_this_was_written():
    """A change would make other runs of the same seed."""
    numbers = mixing(1.0, 1.0, size=32).drawn(0, 2)
    assert numbers[0].tolist() == [1, 11, 4, 29, 22, 0.68359375]
    assert numbers[1].tolist() == pytest.approx([0.4722545, 0, 0, 0, 0, 0.4722545], abs=1e-6)
