"""What a run says to somebody who sees it for the first time."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.commands import ROOT, run, tiny
from helpers.interruptions import stopped_again_and_again
from torch import nn

import structured_tickets as st
from structured_tickets.base.text_tables import duration
from structured_tickets.runs.dry_run import numbered
from structured_tickets.runs.folder import RunFolder

BLOCK = "Total masks generated"


def test_equal_rounds_of_a_plan_are_one_line():
    assert numbered(["a", "b", "b", "b", "c"]) == ["      0  a", "    1-3  b", "      4  c"]
    assert numbered([]) == []


@pytest.mark.parametrize(
    "seconds, words",
    [
        (0.04, "0.0 s"),
        (9.95, "9.9 s"),
        (50, "50 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7199, "120 min"),
        (7200, "2.0 h"),
    ],
)
def test_durations_are_in_the_unit_that_fits(seconds, words):
    assert duration(seconds) == words


def test_a_plan_counts_evaluation(tmp_path, capsys):
    assert run(*tiny(tmp_path, dry_run=True, epochs=4, eval_every=2)) == 0
    found = re.search(
        r"([\d.]+) s per step, (\d+) steps per epoch, ([\d.]+) s per evaluation, 4 epochs per round: about ([\d.]+) s per",
        capsys.readouterr().out,
    )
    step, steps, judging, whole = map(float, found.groups())
    assert whole == pytest.approx(4 * steps * step + 2 * judging, abs=0.2 + 0.01 * steps)


def test_a_plan_downloads_nothing(tmp_path, monkeypatch, capsys):
    def refuse(*args, **words):
        raise AssertionError("a download was tried")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    words = {"dataset": "cifar10", "data": tmp_path, "arch": "res20s"}
    assert run(*tiny(tmp_path / "run", **words, dry_run=True)) == 3
    said = capsys.readouterr().err
    assert "A run would download it, --dry_run does not" in said and "cifar-10-python.tar.gz" in said
    assert run(*tiny(tmp_path / "run", **words)) == 3
    assert "the download failed (a download was tried)" in capsys.readouterr().err


def test_masks_that_no_round_uses_are_only_in_the_log(tmp_path, capsys):
    assert run(*tiny(tmp_path / "run", struct="refill", pruning_times=3)) == 0
    said, log = capsys.readouterr().err, (tmp_path / "run" / "log.txt").read_text()
    assert (said.count(BLOCK), log.count(BLOCK)) == (2, 3)
    assert said.count("Quasi-Structured Pruning]") == 2 and said.count("keeping ") == 2


@pytest.mark.parametrize("own", [False, True])
def test_a_run_ends_with_the_command_that_makes_its_network_small(own, tmp_path, capsys):
    arch = {"arch": f"{ROOT / 'examples' / 'my_model.py'}:net"} if own else {}
    assert run(*tiny(tmp_path / "run", struct="refill", **arch)) == 0
    end = capsys.readouterr().err.split("finished 2 rounds")[1]
    row = RunFolder.load(tmp_path / "run" / "1checkpoint.pth.tar").rounds[-1]
    assert re.search(rf"next: \S.*export.* {tmp_path / 'run'}{' --arch .*my_model.py:net' if own else ''}\n", end)
    assert f"writes it at its real size ({row['parameters']:,} parameters)" in end


def test_nothing_is_to_be_made_small_where_single_weights_were_pruned(tmp_path, capsys):
    assert run(*tiny(tmp_path / "run", struct="imp")) == 0
    assert "next: " not in capsys.readouterr().err


@pytest.mark.parametrize(
    "struct, does", [("refill", "hardly makes the network smaller"), ("rsst", "penalises nothing")]
)
@pytest.mark.parametrize("structured", [False, True])
def test_a_vit_whose_units_are_not_pruned_is_warned_of(struct, does, structured, tmp_path, capsys):
    words = {"arch": "vit_tiny", "struct": struct, "vit_structured": structured, "rate": 0.4, "dry_run": True}
    assert run(*tiny(tmp_path / "run", **words)) == 0
    said = capsys.readouterr().err
    assert (does in said) != structured
    assert ("Add --vit_structured --vit_prune_target both" in said) != structured


def test_a_round_that_continues_says_where(tmp_path, monkeypatch, capsys):
    words = {"struct": "refill", "epochs": 3, "batch_size": 32}
    assert stopped_again_and_again(monkeypatch, 5, lambda _: tiny(tmp_path / "run", **words)) >= 3
    said = capsys.readouterr().err
    places = re.findall(r"round (\d) continues at epoch (\d)(?:, step (\d))?: ", said)
    assert places and said.count("starts: ") == 2
    for state, epoch, step in places:
        done = rf"round {state}, {epoch} of 3 epochs" + (rf" and {step} steps? of the next" if step else "") + " done"
        assert re.search(done, said), done


@pytest.mark.parametrize("fc", [False, True])
def test_images_that_weights_may_have_seen_are_warned_of(fc, tmp_path, capsys):
    assert run(*tiny(tmp_path / "a", pruning_times=1)) == 0
    state = torch.load(tmp_path / "a" / "ticket.pth.tar", weights_only=True)["state_dict"]
    torch.save(state, tmp_path / "weights.pth")
    capsys.readouterr()
    words = {"prune_type": "pt", "pretrained": tmp_path / "weights.pth", "pruning_times": 1, "fc": fc}
    assert run(*tiny(tmp_path / "b", **words)) == 0
    found = re.search(r"warning: (\d+) training images are held out for validation. If", capsys.readouterr().err)
    assert bool(found) is fc


def test_another_default_is_named(tmp_path, capsys):
    assert run(*tiny(tmp_path / "run", pruning_times=1)) == 0
    assert run(*tiny(tmp_path / "run", pruning_times=1, momentum=0.5)) == 2
    assert "argument --momentum: the run in this folder used 0.9, not 0.5" in capsys.readouterr().err


def test_a_share_in_percent_gets_a_hint(tmp_path, capsys):
    assert run(*tiny(tmp_path / "run", rate=30)) == 2
    assert "--rate: '30' is not a number in [0, 1), such as 0.3 for 30%" in capsys.readouterr().err


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_penalty_that_was_too_weak_says_so_at_its_last_step(decoupled, recwarn):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.LazyLinear(2))
    images = torch.rand(4, 3, 8, 8)
    model(images)
    units = st.units(model, images[:1])
    masks = st.regroup(model, units, rate=0.5, criterion="magnitude", batches=[(images, torch.tensor([0, 1, 0, 1]))])
    penalty, optimizer = st.Penalty(model, masks, 40, decoupled=decoupled), torch.optim.SGD(model.parameters(), 0.01)
    for step in range(41):
        assert f"Penalty(step {step} of 40, lambda " in repr(penalty)
        assert not recwarn.list or step == 40
        optimizer.zero_grad()
        model(images).square().mean().backward()
        penalty.step()
        optimizer.step()
    said = [str(w.message) for w in recwarn.list]
    assert len(said) == (penalty.squeeze > 0.05) == (not decoupled)
    assert not said or re.match(r"\d+% of the doomed weights are left after 40 steps\. Removing them now", said[0])


@pytest.mark.parametrize("arch", ["a" * 300, f"{'a' * 300}.py:net", f"timm/{'a' * 240}", f"hf/{'a' * 240}", ""])
def test_a_name_that_no_file_can_have_is_refused(arch, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("--dataset=micro_digits", f"--arch={arch}") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: argument --arch: ") and "Errno" not in said and not list(tmp_path.iterdir())
