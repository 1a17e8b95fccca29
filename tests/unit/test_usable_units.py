"""Which units a run can prune of a user's network; what stays whole, and what is said of it."""

from __future__ import annotations

import pytest
import torch
from helpers.commands import ROOT

from structured_tickets.base.errors import UsageError
from structured_tickets.export import deployed
from structured_tickets.networks import build_model, spec_of
from structured_tickets.networks.hosted import bare, put_normalize
from structured_tickets.networks.layers import Normalize
from structured_tickets.networks.registry import note_channel_units
from structured_tickets.pruning.removable_units import SHARED
from structured_tickets.pruning.usable_units import FROZEN, in_words, usable_units
from structured_tickets.shrinking.cost import cost_of
from structured_tickets.shrinking.kept_units import kept_units_of
from structured_tickets.shrinking.shrink import shrink
from structured_tickets.unit_groups.find import unit_groups
from structured_tickets.unit_groups.unit import kinds, masks_of_units, ranked_names

FILE = ROOT / "tests" / "helpers" / "users_networks.py"


def network(factory):
    torch.manual_seed(0)
    return build_model(factory if factory in ("res20s", "vit_tiny") else f"{FILE}:{factory}", 10, 8)


def removed(model, groups):
    """Half of the units dropped: the logits of the masked network, and of the smaller one."""
    draw = torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    kept = {g.name: torch.rand(g.units, generator=draw) < 0.5 for g in groups}
    masks = masks_of_units(groups, kept, parameters)
    small, images = shrink(model, masks, spread=0).network.eval(), torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].mul_(mask)
        return model.eval()(images), small(images), small


def test_features_are_followed_where_heads_cannot_be_removed_as_their_layers_tell():
    model = network("vit")
    found = usable_units(model, 8, needed=True)
    assert kinds(found.groups) == ["head", "neuron"] and spec_of(model).followed
    assert in_words(found.whole, found.remark) == []
    wanted, logits, small = removed(model, found.groups)
    torch.testing.assert_close(logits, wanted)
    assert small.get_submodule("blocks.0.attn.qkv").out_features < 72
    easy = network("kept_vit")
    assert kinds(usable_units(easy, 8, needed=True).groups) == ["head", "neuron"] and not spec_of(easy).followed


def test_features_are_followed_where_channels_cannot_be_removed_in_the_graph_of_modules():
    model = network("pyramid")
    found = usable_units(model, 8, needed=True)
    assert kinds(found.groups) == ["channel"] and spec_of(model).followed
    wanted, logits, _ = removed(model, found.groups)
    torch.testing.assert_close(logits, wanted)


def test_a_block_under_several_names_has_its_units_once():
    model = network("looped")
    found = usable_units(model, 8, needed=True)
    assert [(g.kind, g.name) for g in found.groups] == [("head", "blocks.0.attn.qkv"), ("neuron", "blocks.0.mlp.fc1")]
    assert not any(name.startswith("blocks") for name in found.whole)
    wanted, logits, _ = removed(model, found.groups)
    torch.testing.assert_close(logits, wanted)
    assert isinstance(model.get_submodule("blocks.2.attn.qkv").weight, torch.nn.Parameter)


def test_layers_may_have_the_names_of_those_that_are_inserted():
    model = network("placing")
    wanted, logits, _ = removed(model, usable_units(model, 8, needed=True).groups)
    torch.testing.assert_close(logits, wanted)


def test_logits_may_be_a_part_of_an_object():
    model = network("described")
    assert model(torch.rand(2, 3, 8, 8)).shape == (2, 10)
    assert kinds(usable_units(model, 8, needed=True).groups) == ["channel"]


def test_heads_that_cannot_be_removed_do_not_stop_neurons():
    model = network("vit_that_decides")
    found = usable_units(model, 8, needed=True)
    assert [(g.name, g.kind) for g in found.groups] == [
        ("blocks.0.attn.qkv.weight", "row"),
        ("blocks.0.attn.proj.weight", "row"),
        ("blocks.1.attn.qkv.weight", "row"),
        ("blocks.1.attn.proj.weight", "row"),
        ("blocks.0.mlp.fc1", "neuron"),
        ("blocks.1.mlp.fc1", "neuron"),
    ]
    assert "heads cannot be removed" in found.whole["blocks.0.attn.qkv"]
    assert "Keep the size of a head in an attribute" in found.whole["blocks.1.attn.proj"]
    assert [g.kind for g in unit_groups(model)] == ["neuron"] * 2, "nothing that looks for units finds them again"
    said = in_words(found.whole, found.remark)
    assert said == [
        f"stays whole: blocks.0.attn.proj, blocks.0.attn.qkv, blocks.1.attn.proj and 1 more: {found.whole['blocks.0.attn.qkv']}"
    ]


@torch.no_grad()
def test_a_head_that_stays_is_not_cut_where_all_its_weights_are_gone():
    model = network("vit_that_decides").eval()
    found = usable_units(model, 8, needed=True)
    parameters = dict(model.named_parameters())
    masks = masks_of_units(found.groups, {}, parameters)
    masks["blocks.0.attn.proj.weight"][:, :8] = 0
    masks["blocks.1.mlp.fc2.weight"][:, 5:] = 0
    small, images = shrink(model, masks, spread=0).network, torch.rand(2, 3, 8, 8)
    assert small.get_submodule("blocks.0.attn").num_heads == 3
    assert small.get_submodule("blocks.1.mlp.fc1").out_features == 5
    wanted = torch.func.functional_call(model, {n: parameters[n] * m for n, m in masks.items()}, (images,))
    torch.testing.assert_close(small(images), wanted)


def test_a_stream_of_which_the_forward_pass_holds_the_number_stays():
    model = network("counting")
    note_channel_units(model, "stream", (3, 8, 8))
    found = usable_units(model, 8, needed=True)
    assert [(g.name, g.units) for g in found.groups] == [("one.0", 12)]
    said = in_words(found.whole, found.remark)
    assert any("two.0" in s and "computes with the number of its channels" in s for s in said)
    wanted, got, small = removed(model, found.groups)
    torch.testing.assert_close(got, wanted)
    assert "structured_tickets" not in repr(small) and small.one[0].out_channels < 12 == small.two[0].out_channels
    assert [g.name for g in unit_groups(model)] == ["one.0"]  # noted, for whoever asks again


@pytest.mark.parametrize(
    "factory, units",
    [
        ("wide_head", {"channel": 12 + 64 + 40}),
        ("filtered_mlps", {"head": 6, "neuron": 96}),
    ],
)
@torch.no_grad()
def test_units_that_names_and_modules_do_not_tell_are_found_by_what_layers_compute(factory, units, tmp_path):
    model = network(factory).eval()
    put_normalize(model, Normalize((0.0,) * 3, (1.0,) * 3))
    found = usable_units(model, 8, needed=True)
    assert {k: sum(g.units for g in found.groups if g.kind == k) for k in kinds(found.groups)} == units
    parameters, images = dict(model.named_parameters()), torch.rand(2, 3, 8, 8)
    kept = {g.name: torch.arange(g.units) % 2 == 0 for g in found.groups}
    masks = masks_of_units(found.groups, kept, parameters)
    small = shrink(model, masks, spread=0).network.eval()
    assert cost_of(model, masks, 8).macs < 0.75 * cost_of(model, {}, 8).macs
    wanted = torch.func.functional_call(model, {n: parameters[n] * m for n, m in masks.items()}, (images,))
    torch.testing.assert_close(small(images), wanted, rtol=1e-4, atol=1e-5)
    config = {"arch": f"{FILE}:{factory}", "classes": [str(k) for k in range(10)], "image_size": 8}
    config["followed"] = spec_of(model).followed
    deployed.save(small, {**config, "kept": kept_units_of(model, masks)}, tmp_path)
    torch.testing.assert_close(deployed.load(tmp_path, config["arch"])(images), small(images), rtol=1e-4, atol=1e-5)


def test_torchs_own_attention_stays_and_is_named_where_nothing_can_be_followed():
    found = usable_units(network("vit_of_torch"), 8, needed=True)
    assert [(g.kind, g.units) for g in found.groups] == [("head", 3), ("head", 3), ("neuron", 48), ("neuron", 48)]
    assert not any("attn" in name for name in found.whole)
    found = usable_units(network("vit_of_torch_that_decides"), 8, needed=True)
    assert kinds(found.groups) == ["neuron"]
    assert {n for n, reason in found.whole.items() if "two linear layers qkv and proj" in reason} == {
        "blocks.0.attn.own",
        "blocks.1.attn.own",
    }


def test_layers_that_share_weights_are_pruned_once_or_stay():
    model = network("vit_that_shares")
    found = usable_units(model, 8, needed=False)
    assert [(g.kind, g.units) for g in found.groups] == [("head", 3), ("head", 3), ("neuron", 48)]
    assert not any("mlp" in name for name in found.whole)
    names = ranked_names(model, found.groups)
    assert len(names) == len(set(names)) and "blocks.0.mlp.fc1.weight" in names
    assert "blocks.1.mlp.fc1.weight" not in names
    wanted, logits, _ = removed(model, found.groups)
    torch.testing.assert_close(logits, wanted)
    model = network("vit_that_decides")
    one, other = (model.get_submodule(f"blocks.{k}.mlp") for k in (0, 1))
    other.fc1.weight, other.fc2.weight = one.fc1.weight, one.fc2.weight
    whole = usable_units(model, 8, needed=False).whole
    assert {whole[f"blocks.{k}.mlp.{layer}"] for k in (0, 1) for layer in ("fc1", "fc2")} == {SHARED}


def test_frozen_layers_and_what_is_pruned_with_them_are_left_out():
    model = network("frozen")
    found = usable_units(model, 8, needed=True)
    assert [g.name for g in found.groups] == ["one.0", "two.0", "last.0"]
    assert found.whole["stem.0"] == found.whole["late.0"] == FROZEN
    assert in_words(found.whole, found.remark) == [f"stays whole: late.0, stem.0: {FROZEN}"] or in_words(
        found.whole, found.remark
    ) == [f"stays whole: stem.0, late.0: {FROZEN}"]
    model.get_submodule("two.1").requires_grad_(False)
    found = usable_units(model, 8, needed=True)
    assert [g.name for g in found.groups] == ["one.0", "last.0"]
    assert found.whole["two.0"] == f"pruned together with two.1, which is {FROZEN}"


def test_units_that_nobody_needs_are_not_missed():
    model = network("deciding")
    with pytest.raises(
        UsageError, match=r"cannot be followed.*\. To prune its weights one by one instead, use --struct imp"
    ):
        usable_units(model, 8, needed=True)
    found = usable_units(model, 8, needed=False)
    assert [(g.name, g.kind, g.units) for g in found.groups] == [
        ("one.0.weight", "row", 12),
        ("two.0.weight", "row", 12),
    ]
    assert in_words(found.whole, found.remark)[-1].startswith(
        "nothing is removed, weights are pruned one by one: the ch"
    )
    assert found.whole == {
        "stem.0": "first layer (--conv1 prunes it, too)",
        "head": "classifier: its outputs are the logits",
    }
    helper = usable_units(network("helped"), 8, needed=False).whole["helper"]
    assert helper == "what it computes cannot be removed: no layer reads it, and it is no logit"
    assert unit_groups(model) == [] and not spec_of(model).has_units
    masks = {"one.0.weight": torch.zeros(12, 8, 3, 3)}
    dense, pruned = (cost_of(model, these, 8) for these in ({}, masks))
    assert dense == pruned, "nothing is removed"
    assert usable_units(model, 8, needed=False, stem=True).groups[0].name == "stem.0.weight"


def test_the_programs_own_networks_are_not_tried_out(monkeypatch):
    monkeypatch.setattr("structured_tickets.pruning.removable_units.check_units", None)
    for arch, spec in (("res20s", "channel"), ("vit_tiny", "head")):
        model = network(arch)
        found = usable_units(model, 8, needed=True)
        assert found.groups[0].kind == spec and spec_of(model) is model.spec
        assert in_words(found.whole, found.remark) == []


def test_what_a_network_freezes_when_it_is_told_to_train_is_frozen():
    found = usable_units(network("freezes_itself"), 8, needed=True)
    assert [g.name for g in found.groups] == ["two.0"] and found.whole["one.0"] == FROZEN


def test_a_layers_name_that_a_graph_of_modules_cannot_hold_stops_nothing():
    found = usable_units(network("named_graph"), 8, needed=True)
    assert kinds(found.groups) == ["channel"] and "graph.0" in {g.name for g in found.groups}


def test_looking_for_units_leaves_no_trace_on_the_network():
    model = network("remembers")
    before = {name: {**vars(layer)} for name, layer in bare(model).named_modules()}
    weights = {n: v.clone() for n, v in model.state_dict().items()}
    assert kinds(usable_units(model, 8, needed=True).groups) == ["channel"]
    assert {name: {**vars(layer)} for name, layer in bare(model).named_modules()} == before
    assert (bare(model).calls, bare(model).seen) == (0, {}) and not hasattr(bare(model), "last_features")
    assert all(torch.equal(v, weights[n]) for n, v in model.state_dict().items())
