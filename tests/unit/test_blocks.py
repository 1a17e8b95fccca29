"""Whole attention and MLP branches as units: depth is pruned like width."""

from __future__ import annotations

import pytest
import torch
from helpers.commands import tiny

import main_imp_fillback
from structured_tickets.export.ticket import export
from structured_tickets.networks.vision_transformer import VisionTransformer
from structured_tickets.pruning.collect_evidence import collect_evidence
from structured_tickets.pruning.criteria import CRITERIA
from structured_tickets.pruning.decide import decide
from structured_tickets.pruning.regroup import score_units
from structured_tickets.pruning.rules import RoundRules, kinds_of
from structured_tickets.pruning.shares import kept_per_group, kept_per_kind
from structured_tickets.runs.folder import RunFolder
from structured_tickets.settings.flags import parse_args
from structured_tickets.settings.identity import identity_of, settings_of
from structured_tickets.shrinking.cost import cost_of
from structured_tickets.shrinking.inserted_layers import Constant
from structured_tickets.shrinking.shrink import shrink
from structured_tickets.unit_groups.find import unit_groups

IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
BATCHES = [(IMAGES, torch.arange(4))]
BRANCHES = [f"blocks.{k}.{branch}" for k in range(3) for branch in ("attn", "mlp")]


def network(mlp_ratio=2):
    torch.manual_seed(0)
    return VisionTransformer(10, 16, 4, 24, 3, 2, mlp_ratio).eval()


def blocks_of(model):
    return [g for g in unit_groups(model, blocks=True) if g.kind == "block"]


def decided(model, targets, **settings):
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    settings = {"struct": "refill", "rate": 0.5, "rate_mode": "target", "criteria": "magnitude", **settings}
    rules = RoundRules(**settings, targets=kinds_of(targets), mlp_prune_ratio=0.25, block_prune_ratio=0.34)
    groups = unit_groups(model, blocks=True)
    pair = decide(model, groups, rules, 0, ranked=weights, trained=weights, previous=None, batches=BATCHES)
    return groups, pair


def scores(model, criterion):
    groups = blocks_of(model)
    weights = model.state_dict()
    masks = {f"{n}_mask": torch.ones_like(v) for n, v in weights.items()}
    return score_units(groups, collect_evidence(model, groups, weights, masks, criterion, BATCHES), criterion)


def test_a_block_owns_all_weights_of_its_branch():
    model = network()
    groups = blocks_of(model)
    assert [g.name for g in groups] == BRANCHES and all(g.units == 1 for g in groups)
    assert [s.layer for s in groups[0].slices] == ["blocks.0.attn.proj", "blocks.0.attn.qkv"]
    owned = {s.name for g in groups for s in g.slices}
    assert owned == {s.name for g in unit_groups(model) for s in g.slices}
    assert not any(g.kind == "block" for g in unit_groups(model))


@pytest.mark.parametrize("criterion", CRITERIA)
@torch.no_grad()
def test_every_criterion_sees_which_branch_speaks_loudest(criterion):
    model = network()
    for branch in BRANCHES:
        last = model.get_submodule(branch + (".proj" if "attn" in branch else ".fc2"))
        saved = last.weight.clone()
        last.weight.mul_(30)
        last.bias.zero_()
        with torch.enable_grad():
            found = scores(model, criterion)
        last.weight.copy_(saved)
        if criterion == "remain":
            assert all(float(score) == 1 for score in found.values())
        else:
            assert max(found, key=lambda name: float(found[name])) == branch


@torch.no_grad()
def test_a_large_branch_does_not_win_by_its_size():
    model = network(mlp_ratio=8)
    for group in blocks_of(model):
        model.get_parameter(group.root.name).fill_(0.1)
    assert {round(float(s), 6) for s in scores(model, "magnitude").values()} == {0.1}


@pytest.mark.parametrize("targets", ["block", "head,block", "head,mlp,block"])
@pytest.mark.parametrize("struct", ["refill", "rsst"])
@torch.no_grad()
def test_the_structure_is_what_no_unit_drops(targets, struct):
    model = network()
    groups, pair = decided(model, targets, struct=struct)
    kept = kept_per_group(groups, pair)
    gone = [name for name in BRANCHES if kept[name] == (0, 1)]
    assert kept_per_kind(groups, pair)["block"] == [3, 6] and len(gone) == 3
    for name, mask in pair.structure.items():
        branch = name.rsplit(".", 2)[0]
        assert bool(mask.any()) == (branch not in gone)
    layers = {n: c for n, c in kept.items() if n.endswith(("qkv", "fc1"))}
    for name, (left, of) in layers.items():
        wanted = (
            of if name.endswith("qkv") and "head" not in targets else of // 2 if name.endswith("qkv") else of * 3 // 4
        )
        if name.endswith("fc1") and "mlp" not in targets:
            wanted = of
        assert left == (0 if name.rpartition(".")[0] in gone else wanted), name
    if "mlp" not in targets:  # a block that stays is refilled whole
        for block in (g for g in groups if g.kind == "block" and g.name.endswith("mlp") and g.name not in gone):
            assert all(bool(pair.structure[part.name].all()) for part in block.slices)
    state = {n: v * pair.structure[n] if n in pair.structure else v for n, v in model.state_dict().items()}
    small = shrink(model, pair.structure).network
    assert sum(isinstance(m, Constant) for m in small.modules()) == 3
    assert (small(IMAGES) - torch.func.functional_call(model, state, (IMAGES,))).abs().max() <= 1e-5
    if targets == "head,mlp,block":
        assert cost_of(model, pair.structure, 16).parameters == sum(p.numel() for p in small.parameters())


def test_the_largest_share_leaves_one_block():
    model = network()
    rules = RoundRules("refill", 0.99, "target", "magnitude", targets=("block",), block_prune_ratio=0.99, min_units=3)
    weights = model.state_dict()
    groups = unit_groups(model, blocks=True)
    pair = decide(model, groups, rules, 0, ranked=weights, trained=weights, previous=None, batches=[])
    assert kept_per_kind(groups, pair)["block"] == [1, 6]


@pytest.mark.parametrize(
    "text, canonical, kinds",
    [
        ("both", "both", ("head", "neuron")),
        ("mlp,head", "both", ("head", "neuron")),
        ("block", "block", ("block",)),
        ("block,head", "head,block", ("head", "block")),
        ("block,both", "head,mlp,block", ("head", "neuron", "block")),
    ],
)
def test_targets_can_be_listed(text, canonical, kinds):
    words = ["--arch", "vit_tiny", "--vit_structured", "--vit_prune_target", text, "--rate", "0.3"]
    args = parse_args(words)
    assert args.vit_prune_target == canonical and kinds_of(canonical) == kinds
    assert args.block_prune_ratio == (0.3 if "block" in kinds else None)
    assert "block_prune_ratio" not in identity_of(settings_of(parse_args(["--rate", "0.3"])))


@pytest.mark.parametrize(
    "words, flag",
    [
        (["--vit_prune_target", "block", "--min_units", "2"], "min_units"),
        (["--fade_out", "0"], "fade_out"),
        (["--vit_prune_target", "block", "--sorting_mode", "global"], "sorting_mode"),
        (["--block_prune_ratio", "0.2"], "block_prune_ratio"),
    ],
)
def test_flags_that_blocks_do_not_read_are_named(words, flag):
    plain = ["--arch", "vit_tiny", *words] if flag == "fade_out" else ["--arch", "vit_tiny", "--vit_structured", *words]
    assert any(w.startswith(f"--{flag} has no effect") for w in parse_args(plain).warnings)


def test_a_misspelt_target_is_named(capsys):
    assert main_imp_fillback.main(["--arch", "vit_tiny", "--vit_structured", "--vit_prune_target", "head,blok"]) == 2
    assert "'blok' is not one of head, mlp, both, block (did you mean block?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arch, kept",
    [
        ("micro_vit", (4, 2, 1)),
        pytest.param("vit_tiny", (18, 12, 8), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("struct", ["refill", "rsst"])
def test_a_run_drops_blocks_round_by_round(struct, arch, kept, tmp_path, capsys):
    words = {
        "arch": arch,
        "vit_structured": True,
        "vit_prune_target": "head,mlp,block",
        "rate": 0.3,
        "rate_mode": "round",
        "criteria": "l1",
        "pruning_times": 3,
        "struct": struct,
    }
    assert main_imp_fillback.main([*tiny(tmp_path, **words), "--verbose"]) == 0
    run = RunFolder.load(tmp_path / "2checkpoint.pth.tar")
    assert [row["kept_units"]["block"] for row in run.rounds] == [[k, kept[0]] for k in kept]
    assert run.rounds[2]["macs"] < 0.5 * run.rounds[0]["macs"]
    said = capsys.readouterr()
    assert "Part 3: Block Pruning (Block-level Structured)" in said.err
    assert f" {kept[2]}/{kept[0]} " in said.out
    structure = run.masks.structure
    assert (
        sum(not structure[n].any() for n in structure if n.endswith(("proj.weight", "fc2.weight"))) == kept[0] - kept[2]
    )
    assert "compact" in export(tmp_path)
