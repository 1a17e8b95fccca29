"""Whole runs of networks as users write them: what is frozen rests, what is not asked for does not matter, no traceback."""

from __future__ import annotations

import copy
import csv
import json

import pytest
import torch
from helpers.commands import ROOT, run, tiny
from helpers.comparison import assert_same_runs
from helpers.interruptions import stopped_again_and_again

from structured_tickets.export.deployed import load
from structured_tickets.networks import build_model
from structured_tickets.networks.hosted import bare
from structured_tickets.programs import export
from structured_tickets.pruning.collect_evidence import collect_evidence
from structured_tickets.pruning.usable_units import usable_units
from structured_tickets.runs.folder import RunFolder
from structured_tickets.shrinking.cost import cost_of
from structured_tickets.unit_groups.find import features_of

FILE = ROOT / "tests" / "helpers" / "users_networks.py"
BOTH = {"vit_structured": True, "vit_prune_target": "both"}


def words(folder, factory, **settings):
    return tiny(folder, arch=f"{FILE}:{factory}", **settings)


def state(folder, number):
    return RunFolder.load(folder / f"{number}checkpoint.pth.tar")


def fades(**more):
    """A run of three rounds in which units fade out, so that it trains smaller networks."""
    squeezed = {"penalty": "decoupled", "RST_schedule": "x", "reg_horizon": "documents"}
    squeezed |= {"reg_granularity_prune": 0.05, "reg_upper_limit": 0.5}
    return {
        **squeezed,
        "reg_target": "unit",
        "fade_out": 0.9,
        "epochs": 3,
        "decreasing_lr": 9,
        "pruning_times": 3,
        **more,
    }


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize(
    "struct, more",
    [
        ("refill", {}),
        ("rsst", fades()),
        ("imp", {"optimizer": "adamw", "lr": 0.01}),
        ("refill", {"optimizer": "adamw", "lr": 0.01}),
    ],
)
def test_what_is_frozen_stays_as_it_is_bit_for_bit(struct, more, compact, tmp_path, capsys):
    assert run(*words(tmp_path / "run", "frozen", struct=struct, compact_training=str(compact).lower(), **more)) == 0
    error, first = capsys.readouterr().err, torch.load(tmp_path / "run" / "init.pth.tar", weights_only=True)
    assert "stays whole: stem.0, late.0: frozen (requires_grad=False)" in error
    assert ("Training a smaller network" in error) == (compact and struct != "imp")
    for number in range(more.get("pruning_times", 2)):
        reached = state(tmp_path / "run", number)
        frozen = [n for n in first if n.startswith(("stem.", "late."))]
        assert len(frozen) == 12 and all(torch.equal(reached.state_dict[n], first[n]) for n in frozen)
        rests = [n for n in first if n.startswith("one.1.") and "running" in n]
        assert all(torch.equal(reached.state_dict[n], first[n]) for n in rests), "at rest by the user's own train()"
        moves = [n for n in first if n.startswith(("one.0", "two.", "last."))]
        assert all(not torch.equal(reached.state_dict[n], first[n]) for n in moves)
        masked = () if reached.masks is None else reached.masks.structure
        assert not any(n.startswith(("stem.", "late.")) for n in masked)


def test_a_frozen_network_trains_the_same_at_its_real_size(tmp_path):
    for compact in ("true", "false"):
        assert run(*words(tmp_path / compact, "frozen", struct="refill", compact_training=compact, lr=0.02)) == 0
    ours, theirs = (state(tmp_path / compact, 1) for compact in ("true", "false"))
    assert ours.optimizer["state"].keys() == theirs.optimizer["state"].keys(), "none for what is frozen"
    for name, value in theirs.state_dict.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(ours.state_dict[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "factory, more",
    [("frozen", {"struct": "refill"}), pytest.param("idle", {"struct": "rsst", **fades()}, marks=pytest.mark.slow)],
)
def test_an_interrupted_run_goes_on_bit_for_bit(factory, more, tmp_path, monkeypatch):
    assert run(*words(tmp_path / "whole", factory, **more)) == 0
    assert stopped_again_and_again(monkeypatch, 5, lambda _: words(tmp_path / "broken", factory, **more)) >= 1
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize(
    "factory", ["shifted", "normalizes_features", "normalizes_images", "scales_images", "idle", "remembers"]
)
@pytest.mark.parametrize("struct", ["refill", pytest.param("imp", marks=pytest.mark.slow)])
def test_names_and_attributes_of_the_users_are_nobody_elses(factory, struct, tmp_path):
    assert run(*words(tmp_path / "run", factory, struct=struct, weight_decay=0.01)) == 0
    arch = ["--arch", f"{FILE}:{factory}"]
    assert export.main([str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--quiet", *arch]) == 0
    ticket = load(tmp_path / "out", arch[1])
    assert ticket(torch.rand(2, 3, 8, 8)).shape == (2, 10)
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(described["mean"]) == 3 and max(described["std"]) < 1


@pytest.mark.parametrize(
    "struct, criteria",
    [("imp", "magnitude"), ("snip", "magnitude"), pytest.param("omp", "saliency", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    "factory",
    [
        "deciding",
        "helped",
        "vit_that_shares",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("vit", "vit_of_torch", "lazy")),
    ],
)
def test_methods_that_prune_weights_need_no_units(factory, struct, criteria, tmp_path, capsys):
    settings = {"struct": struct, "criteria": criteria}
    assert run(*words(tmp_path / "run", factory, **settings), "--dry_run") == 0
    plan = capsys.readouterr().out
    assert ("layers that stay whole" in plan) and ("cannot be followed" in plan) == (factory == "deciding")
    assert run(*words(tmp_path / "run", factory, **settings)) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert ("nothing is removed, weights are pruned one by one: " in log) == (factory == "deciding")
    assert ("2 outputs while it trains. The first one is taken for the logits" in log) == (factory == "helped")
    out = ["--out", str(tmp_path / "out"), "--quiet", "--arch", f"{FILE}:{factory}"]
    assert export.main([str(tmp_path / "run"), *out]) == 0
    assert load(tmp_path / "out", f"{FILE}:{factory}")(torch.rand(2, 3, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("factory", ["vit", "looped", "pyramid", "vit_that_shares", "described"])
@pytest.mark.parametrize("struct", ["rsst", pytest.param("refill", marks=pytest.mark.slow)])
def test_units_that_only_following_features_removes_are_removed_in_runs_and_exports(factory, struct, tmp_path):
    heads = {"vit_structured": True, "vit_prune_target": "both", "mlp_prune_ratio": 0.5}
    settings = {"struct": struct, **({} if factory in ("pyramid", "described") else heads)}
    assert run(*words(tmp_path / "run", factory, **settings)) == 0
    reached = state(tmp_path / "run", 1)
    assert reached.followed == (factory != "described")
    row, arch = reached.rounds[-1], f"{FILE}:{factory}"
    assert any(0 < kept < units for kept, units in row["kept_units"].values())
    out = ["--out", str(tmp_path / "out"), "--quiet", "--arch", arch]
    assert export.main([str(tmp_path / "run"), *out]) == 0, "the compact network gives what the masked one does"
    cost = cost_of(load(tmp_path / "out", arch), {}, 8)
    assert (cost.macs, cost.parameters) == (row["macs"], row["parameters"]) and row["macs"] < reached.rounds[0]["macs"]


def test_a_run_whose_features_are_followed_goes_on_bit_for_bit(tmp_path, monkeypatch):
    settings = {"vit_structured": True, "vit_prune_target": "both", "struct": "rsst", "epochs": 2, "decreasing_lr": 9}
    assert run(*words(tmp_path / "whole", "vit", **settings)) == 0
    assert stopped_again_and_again(monkeypatch, 9, lambda _: words(tmp_path / "broken", "vit", **settings)) >= 1
    assert_same_runs(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("factory", ["vit_that_decides", "vit_of_torch_that_decides"])
def test_neurons_are_pruned_where_heads_have_to_stay(factory, tmp_path, capsys):
    assert run(*words(tmp_path / "heads", factory, vit_structured=True)) == 2
    assert "has no heads that can be pruned, only neurons. Choose mlp" in capsys.readouterr().err
    for struct, target in (("rsst", "mlp"), ("refill", "both")):
        folder = tmp_path / struct
        settings = {"struct": struct, "vit_structured": True, "vit_prune_target": target, "mlp_prune_ratio": 0.5}
        assert run(*words(folder, factory, **settings)) == 0
        log = (folder / "log.txt").read_text()
        assert "stays whole: blocks.0.attn" in log and ("has no heads that can be pruned, only neurons" in log) == (
            target == "both"
        )
        assert state(folder, 1).rounds[-1]["kept_units"]["neuron"] == [48, 96]
        out = ["--out", str(folder / "out"), "--quiet", "--arch", f"{FILE}:{factory}"]
        assert export.main([str(folder), *out]) == 0
        small = load(folder / "out", f"{FILE}:{factory}")
        assert small.get_submodule("blocks.0.mlp.fc1").out_features == 24


@pytest.mark.parametrize(
    "factory, settings, message",
    [
        ("frozen_backbone", {}, "has no layers that can be pruned. Frozen (requires_grad=False): "),
        ("frozen_backbone", {"struct": "imp"}, "has no layers that can be pruned. Frozen (requires_grad=False): "),
        ("all_frozen", {"struct": "imp"}, "are frozen (requires_grad=False). Leave some of them to be trained"),
        ("deciding", {}, "To prune its weights one by one instead, use --struct imp"),
        ("deciding", {"struct": "imp", "regroup": True}, "cannot be followed"),
        ("overwriting", {"struct": "imp"}, "cannot be trained: its backward pass fails (one of the variables needed"),
        (
            "vit_of_torch_that_decides",
            {"vit_structured": True},
            "has no heads that can be pruned, only neurons. Choose mlp",
        ),
    ],
)
def test_what_cannot_be_done_is_said_with_what_to_change(factory, settings, message, tmp_path, capsys):
    assert run(*words(tmp_path / "run", factory, **settings)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["permute", "reinit", "random_structure"])
def test_controls_of_a_network_without_units(kind, tmp_path, capsys):
    assert run(*words(tmp_path / "ticket", "deciding", struct="imp")) == 0
    control = {"struct": "imp", "control": kind, "control_of": tmp_path / "ticket"}
    assert run(*words(tmp_path / "control", "deciding", **control)) == 0
    assert run(*words(tmp_path / "narrow", "deciding", **{**control, "control": "small_dense"})) == 2
    assert "cannot be followed" in capsys.readouterr().err


@pytest.mark.parametrize("struct", ["refill", "rsst", "imp"])
@pytest.mark.parametrize(
    "factory",
    [
        "viewing",
        "video",
        "second_head",
        "noisy",
        "watched",
        "generating",
        "standardised",
        "recurrent",
        "scaled",
        "strict",
    ],
)
def test_what_people_write_goes_through_whole_runs(factory, struct, tmp_path, capsys):
    """Views of feature maps and weights, five axes, second heads, layers for training alone, hooks, made weights."""
    more = {"RST_schedule": "x", "penalty": "decoupled"} if struct == "rsst" else {}
    assert run(*words(tmp_path / "run", factory, struct=struct, **more)) == 0
    assert "Traceback" not in capsys.readouterr().err
    if struct == "imp":
        return
    out = ["--arch", f"{FILE}:{factory}", "--out", str(tmp_path / "out"), "--quiet"]
    assert export.main([str(tmp_path / "run"), *out]) == 0
    network = load(tmp_path / "out", f"{FILE}:{factory}")
    assert network.train()(torch.rand(4, 3, 8, 8)).shape == (4, 10)
    whole = build_model(f"{FILE}:{factory}", 10, 8)
    assert sum(p.numel() for p in network.parameters()) < sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("criterion", ["l1", "saliency"])
def test_units_of_a_layer_that_evaluation_does_not_call_count_for_nothing(criterion, tmp_path):
    torch.manual_seed(0)
    model = build_model(f"{FILE}:noisy", 10, 8)
    groups = {g.name: g for g in usable_units(model, 8, needed=True).groups}
    batch = torch.rand(4, 3, 8, 8), torch.arange(4)
    evidence = collect_evidence(model, list(groups.values()), model.state_dict(), {}, criterion, [batch])
    assert set(evidence.features) >= {"gate"} and not evidence.features["gate"].absolute.any()


def test_torchs_encoder_computes_in_any_precision(tmp_path):
    """Its own operation for a layer fails under autocast on a processor, and needs torch's own attention."""
    more = {"struct": "refill", "vit_structured": True, "criteria": "saliency", "precision": "bf16"}
    assert run(*words(tmp_path / "run", "padded", **more)) == 0
    rows = list(csv.DictReader((tmp_path / "run" / "summary.csv").open()))
    assert int(rows[-1]["parameters"]) < int(rows[0]["parameters"])


def test_hooks_and_memory_of_a_network_stay_the_users(tmp_path):
    """A hook that knows the network itself sees no tensors of the copies that are examined."""
    model = build_model(f"{FILE}:watched", 10, 8)
    model(torch.rand(2, 3, 8, 8))
    assert bare(model).seen["one"].grad_fn is not None
    assert copy.deepcopy(model).seen["one"].grad_fn is None
    usable_units(model, 8, needed=True)
    assert type(bare(model).seen["one"]) is torch.Tensor


def test_older_normalisations_of_weights_are_named(tmp_path, capsys):
    assert run(*words(tmp_path / "run", "spectral")) == 2
    assert "Use torch.nn.utils.parametrizations.spectral_norm instead" in capsys.readouterr().err


def test_a_constant_in_the_forward_pass_needs_no_other_way(tmp_path):
    model = build_model(f"{FILE}:scaled", 10, 8)
    assert usable_units(model, 8, needed=True).groups and features_of(model) is None


def test_what_is_kept_in_tables_within_tables_is_taken_back(tmp_path):
    model = build_model(f"{FILE}:strict", 10, 8)
    usable_units(model, 8, needed=True)
    assert all(type(value) is torch.Tensor for value in bare(model).seen["inside"]["one"])


@pytest.mark.parametrize("criterion", ["l1", "magnitude"])
def test_rows_of_transposed_convolutions_are_not_ranked_as_outputs(criterion, tmp_path):
    assert run(*words(tmp_path / "run", "upwards", struct="imp", criteria=criterion)) == 0
    groups = usable_units(build_model(f"{FILE}:upwards", 10, 8), 8, needed=False).groups
    assert not any(g.name.startswith(("up.", "wide.")) for g in groups if g.kind == "row")


def test_that_a_forward_pass_depends_on_values_is_said_in_one_line(tmp_path, capsys):
    """Experts that images choose: no layer tells units, and nothing of torch's own words is shown."""
    assert run(*words(tmp_path / "run", "routed")) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "its forward pass cannot be recorded" in line and line.endswith("use --struct imp")
    assert run(*words(tmp_path / "run", "routed", struct="imp")) == 0
