"""`--distill`: the teacher's loss, who the teacher is, and that all else stays as it is."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.commands import run, tiny
from helpers.comparison import assert_same_runs, equal
from helpers.interruptions import stopped_again_and_again
from helpers.processes import together
from helpers.steps import Case, seen_in_steps
from helpers.watchers import Numbers, waiting
from torch import nn

from structured_tickets.runs.folder import RunFolder
from structured_tickets.settings.flags import parse_args
from structured_tickets.settings.identity import identity_of_round_0
from structured_tickets.training.distillation import Distillation, as_teacher
from structured_tickets.training.teachers import parts_of

DISTILLED = {"distill": "dense", "pruning_times": 2, "epochs": 2, "struct": "rsst", "criteria": "magnitude"}


class Says(nn.Module):
    """A teacher that always says the same."""

    def __init__(self, said):
        super().__init__()
        self.said = nn.Parameter(said)

    def forward(self, images):
        return self.said.expand(len(images), -1)


def test_the_softened_loss_by_hand():
    """Two classes, T = 2, logits 2 and 0 against 0 and 0: KL of (1/2, 1/2) to (e, 1) / (e + 1), times 4."""
    loss = Distillation(nn.Identity(), 0.9, 2.0, "kl").loss(torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2))
    own = torch.tensor([torch.e, 1.0]) / (torch.e + 1)
    assert float(loss) == pytest.approx(4 * float((0.5 * (0.5 / own).log()).sum()), rel=1e-6)
    same = torch.randn(5, 3)
    assert float(Distillation(nn.Identity(), 0.9, 4.0, "kl").loss(same, same + 7.0)) == pytest.approx(0, abs=1e-6)


def test_its_gradient_is_the_difference_of_the_softened_probabilities():
    """T^2 * KL(p, softmax(z / T)): T * (softmax(z / T) - p) / images."""
    torch.manual_seed(0)
    output, said = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4)
    Distillation(nn.Identity(), 1.0, 3.0, "kl").loss(output, said).backward()
    wanted = 3.0 * ((output / 3).softmax(1) - (said / 3).softmax(1)) / 6
    torch.testing.assert_close(output.grad, wanted)


def test_a_hard_teacher_is_a_label():
    output = torch.randn(4, 3)
    said = torch.tensor([[0.0, 2, 1], [3, 0, 0], [0, 0, 1], [0, 1, 0]])
    wanted = nn.functional.cross_entropy(output, torch.tensor([1, 0, 2, 1]))
    assert torch.equal(Distillation(nn.Identity(), 1.0, 3.0, "hard").loss(output, said), wanted)


def test_the_two_losses_are_weighed():
    teacher = as_teacher(Says(torch.tensor([[1.0, 0.0]])))
    given = Distillation(teacher, 0.25, 1.0, "hard")
    output, images = torch.tensor([[0.0, 0.0]]), torch.zeros(1, 3, 4, 4)
    wanted = 0.75 * 2.0 + 0.25 * float(torch.tensor(2.0).log())
    assert float(given.added_to(torch.tensor(2.0), output, images, torch.float32)) == pytest.approx(wanted)
    assert not teacher.training and not teacher.said.requires_grad


def taught(**words):
    case = Case(images=32, **words)
    case.passer.distillation = Distillation(as_teacher(Case(images=32).whole), 0.9, 4.0, "kl")
    return case


def test_a_step_with_a_teacher_neither_waits_nor_freezes_a_number():
    _, *seen = (numbers.calls for numbers in seen_in_steps(taught(), Numbers))
    assert len(seen) == 7 and all(calls == seen[0] for calls in seen)
    assert seen_in_steps(taught(), waiting) == seen_in_steps(Case(images=32), waiting)


def watched(monkeypatch):
    """What each call of a teacher got: (its weights, whether it trains, images, logits of the network)."""
    calls, real = [], Distillation.added_to

    def added_to(self, loss, output, images, precision, together=None):
        state = {k: v.clone() for k, v in self.teacher.state_dict().items()}
        calls.append((state, self.teacher.training, images.clone(), output))
        return real(self, loss, output, images, precision, together)

    monkeypatch.setattr(Distillation, "added_to", added_to)
    return calls


def test_the_dense_network_of_round_0_teaches_all_later_rounds(tmp_path, monkeypatch):
    calls = watched(monkeypatch)
    assert run(*tiny(tmp_path, **{**DISTILLED, "pruning_times": 3})) == 0
    dense = RunFolder.load(tmp_path / "0checkpoint.pth.tar").state_dict
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = len(calls) / sum(row["round"] > 0 for row in rows)
    assert steps == int(steps) > 1, "every step after round 0"
    assert all(equal(state, dense) and not training for state, training, *_ in calls)
    assert all(images.min() >= 0 and len(images) == len(output) for *_, images, output in calls)


def test_without_a_share_of_the_loss_it_changes_no_bit(tmp_path):
    for name, words in (("with", {"distill_alpha": 0.0}), ("without", {"distill": "none"})):
        assert run(*tiny(tmp_path / name, **{**DISTILLED, **words})) == 0
    ends = [RunFolder.load(tmp_path / name / "1checkpoint.pth.tar").state_dict for name in ("with", "without")]
    assert equal(*ends)


def test_a_file_teaches_round_0_too(finished_run, tmp_path, monkeypatch):
    file = finished_run(tmp_path / "dense", pruning_times=1, epochs=3) / "0checkpoint.pth.tar"
    calls = watched(monkeypatch)
    assert (
        run(*tiny(tmp_path / "taught", **{**DISTILLED, "pruning_times": 1, "distill": file, "distill_loss": "hard"}))
        == 0
    )
    weights = RunFolder.load(file).state_dict
    assert calls and all(torch.equal(calls[0][0][name], value) for name, value in weights.items())


def test_a_network_of_another_architecture_teaches(finished_run, tmp_path, monkeypatch):
    settings = {"arch": "micro_vit", "vit_structured": True, "optimizer": "adamw"}
    file = finished_run(tmp_path / "dense", pruning_times=1, **settings) / "0checkpoint.pth.tar"
    calls = watched(monkeypatch)
    assert run(*tiny(tmp_path / "taught", **{**DISTILLED, "distill": f"micro_vit@{file}"})) == 0
    assert "pos_embed" in calls[0][0] and calls[0][3].shape[1] == 10


def test_a_distilled_run_continues_at_every_step(tmp_path, monkeypatch):
    words = {**DISTILLED, "mixup": 0.8}
    assert run(*tiny(tmp_path / "through", **words)) == 0
    assert stopped_again_and_again(monkeypatch, 7, lambda turn: tiny(tmp_path / "parts", **words)) > 2
    assert_same_runs(tmp_path / "through", tmp_path / "parts")


def test_a_distilled_run_at_real_size_trains_the_same_network(tmp_path):
    words, ends = {**DISTILLED, "struct": "refill", "precision": "fp32"}, []
    for compact in ("true", "false"):
        assert run(*tiny(tmp_path / compact, compact_training=compact, **words)) == 0
        ends.append(RunFolder.load(tmp_path / compact / "1checkpoint.pth.tar").state_dict)
    for name, value in ends[0].items():
        if not name.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(value, ends[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_two_processes_are_taught_as_one(tmp_path):
    together(tiny(tmp_path / "two", precision="fp32", **DISTILLED))
    assert run(*tiny(tmp_path / "one", precision="fp32", **DISTILLED)) == 0
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("two", "one")
    ]
    for two, one in zip(*rows, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)


def test_a_control_has_the_same_teacher(tmp_path, monkeypatch):
    assert run(*tiny(tmp_path / "ticket", **DISTILLED)) == 0
    calls = watched(monkeypatch)
    words = {**DISTILLED, "control": "random_structure", "control_of": tmp_path / "ticket"}
    assert run(*tiny(tmp_path / "control", **words)) == 0
    dense = RunFolder.load(tmp_path / "ticket" / "0checkpoint.pth.tar").state_dict
    assert calls and all(equal(state, dense) for state, *_ in calls)


def test_round_0_is_shared_where_it_has_no_teacher(tmp_path):
    (tmp_path / "t.pth").touch()
    plain, dense, file = (
        identity_of_round_0(parse_args(["--pruning_times=2", *words]))
        for words in ([], ["--distill=dense", "--distill_alpha=0.5"], [f"--distill={tmp_path / 't.pth'}"])
    )
    assert dense == plain != file


@pytest.mark.parametrize(
    "words, said",
    [
        ({"distill": "no_such_file"}, "no such file"),
        ({"distill": "no_such_arch@file"}, "--distill"),
        ({"distill_alpha": 1.5, "distill": "dense"}, "--distill_alpha"),
        ({"distill_temperature": 0, "distill": "dense"}, "--distill_temperature"),
    ],
)
def test_what_makes_no_sense_is_refused(words, said, tmp_path, capsys):
    assert run(*tiny(tmp_path, **words)) == 2
    assert said in capsys.readouterr().err


def test_another_teacher_in_the_same_file_is_refused(finished_run, tmp_path, capsys):
    """By a run that continues, and by a control."""
    file = tmp_path / "t.pth"
    saved = torch.load(finished_run(tmp_path / "dense", pruning_times=1) / "0checkpoint.pth.tar", weights_only=True)[
        "state_dict"
    ]
    torch.save(saved, file)
    words = {**DISTILLED, "distill": file}
    assert run(*tiny(tmp_path / "run", **words)) == 0
    torch.save({k: v + 0.01 if k == "fc.bias" else v for k, v in saved.items()}, file)
    capsys.readouterr()
    assert run(*tiny(tmp_path / "run", **{**words, "pruning_times": 3})) == 2
    assert "--distill: the teacher's weights have changed since the run began" in capsys.readouterr().err
    control = {**words, "control": "random_structure", "control_of": tmp_path / "run"}
    assert run(*tiny(tmp_path / "control", **control)) == 2
    assert "had another teacher in this file" in capsys.readouterr().err
    torch.save(saved, file)
    assert run(*tiny(tmp_path / "run", **{**words, "pruning_times": 3})) == 0


@pytest.mark.parametrize(
    "text, parts",
    [
        ("t.pth", ("", "t.pth")),
        ("res18@t.pth", ("res18", "t.pth")),
        ("/data/me@host/t.pth", ("", "/data/me@host/t.pth")),
        ("res18@/data/me@host/t.pth", ("res18", "/data/me@host/t.pth")),
        ("/mine/net.py:small@/t.pth", ("/mine/net.py:small", "/t.pth")),
    ],
)
def test_an_at_in_the_name_of_a_folder_names_no_architecture(text, parts):
    assert parts_of(text) == parts


def test_a_teacher_of_other_classes_is_an_error(finished_run, tmp_path, capsys):
    saved = torch.load(finished_run(tmp_path / "dense", pruning_times=1) / "0checkpoint.pth.tar", weights_only=True)[
        "state_dict"
    ]
    torch.save({k: torch.cat([v, v]) if k.startswith("fc.") else v for k, v in saved.items()}, tmp_path / "t.pth")
    assert run(*tiny(tmp_path / "taught", **{**DISTILLED, "distill": tmp_path / "t.pth"})) != 0
    assert "do not fit the model" in capsys.readouterr().err
