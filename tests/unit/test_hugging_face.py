"""Networks of Hugging Face's transformers: built, pruned, exported, with weights of files as on the hub."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch
from helpers.commands import run, tiny

from structured_tickets.base.errors import DataError, UsageError
from structured_tickets.export.deployed import load
from structured_tickets.export.ticket import read_ticket
from structured_tickets.networks import build_model
from structured_tickets.networks.building import parse_arch
from structured_tickets.networks.hosted import bare
from structured_tickets.networks.pretrained import load_pretrained_weights
from structured_tickets.networks.registry import spec_of
from structured_tickets.programs import export
from structured_tickets.pruning.usable_units import usable_units
from structured_tickets.shrinking.cost import cost_of
from structured_tickets.unit_groups.unit import kinds

TRANSFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "patch_size": 4,
}
TABLE = {"use_relative_position_bias": True, "use_shared_relative_position_bias": False}
CONFIGS = {
    "vit": TRANSFORMER,
    "deit": TRANSFORMER,
    "beit": {**TRANSFORMER, **TABLE},
    "swin": {"embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4], "window_size": 2, "patch_size": 2},
    "convnext": {"depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2, "patch_size": 2},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
}
BOTH = ["head", "neuron"]
FOUND = {"vit": BOTH, "deit": BOTH, "beit": BOTH, "swin": BOTH, "convnext": ["neuron"], "resnet": ["channel"]}


@pytest.fixture(autouse=True)
def _needs_transformers(request):
    if "without" not in request.node.name:
        pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[hf]'")


@pytest.fixture
def folder(tmp_path):
    def written(kind, **more):
        path = tmp_path / kind
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps({"model_type": kind, **CONFIGS[kind], **more}))
        return path

    return written


def fast(*names):
    """The first ones always, the others in the slow tier."""
    return [names[0], *(pytest.param(n, marks=pytest.mark.slow) for n in names[1:])]


@pytest.mark.parametrize("kind", ["vit", "resnet", *fast("beit", "deit", "swin", "convnext")])
def test_units_of_every_type_are_found_and_can_go(kind, folder):
    model = build_model(f"hf/{folder(kind)}", 10, 8)
    assert type(bare(model)).__module__.startswith("transformers.") and bare(model).config.num_labels == 10
    assert model(torch.rand(2, 3, 8, 8)).shape == (2, 10)
    units = usable_units(model, 8, needed=True)
    assert kinds(units.groups) == FOUND[kind]
    heads = [g for g in units.groups if g.kind == "head"]
    if heads:
        assert len(heads) == {"swin": 3}.get(kind, 1) and spec_of(model).followed
        assert {s.layer.rpartition(".")[2] for s in heads[0].slices} == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    "kind, struct",
    [("vit", "rsst"), ("resnet", "refill"), *(pytest.param(k, "refill", marks=pytest.mark.slow) for k in CONFIGS)],
)
def test_a_run_is_exported_and_read_back(kind, struct, folder, tmp_path):
    settings = {"struct": struct, "arch": f"hf/{folder(kind)}"}
    if kind != "resnet":
        settings |= {"vit_structured": True, "mlp_prune_ratio": 0.5, "vit_prune_target": "both"}
        settings |= {"vit_prune_target": "mlp"} if kind == "convnext" else {}
    assert run(*tiny(tmp_path / "run", **settings)) == 0
    assert export.main([str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    small, ticket = load(tmp_path / "out"), read_ticket(tmp_path / "run")
    images, row = torch.rand(3, 3, 8, 8), ticket.run.rounds[-1]
    with torch.no_grad():
        torch.testing.assert_close(small(images), ticket.masked(images), rtol=1e-4, atol=1e-5)
    assert type(bare(small)) is type(bare(ticket.masked)) or kind == "resnet"
    cost = cost_of(small, {}, 8)
    assert (cost.macs, cost.parameters) == (row["macs"], row["parameters"])
    assert cost.macs < cost_of(ticket.masked, {}, 8).macs


def test_weight_by_weight_too(folder, tmp_path):
    assert run(*tiny(tmp_path / "run", struct="imp", arch=f"hf/{folder('vit')}")) == 0


@pytest.mark.parametrize("kind", ["vit", *fast("swin", "resnet", "deit", "beit", "convnext")])
def test_weights_as_on_the_hub_are_loaded(kind, folder, caplog):
    path = folder(kind)
    source = build_model(f"hf/{path}", 7, 8)
    bare(source).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    model = build_model(f"hf/{path}", 10, 8)
    with caplog.at_level("INFO"):
        said = load_pretrained_weights(model, spec_of(model), path / "model.safetensors")
    assert said == ((0.5,) * 3, (0.25,) * 3)
    own, theirs = model.state_dict(), source.state_dict()
    heads = {n for n in own if own[n].shape != theirs[n].shape}
    assert heads == {f"{spec_of(model).classifier}.{param}" for param in ("weight", "bias")}
    assert all(torch.equal(own[n], theirs[n]) for n in own.keys() - heads)
    assert "starts fresh: it has 7 classes in the file and 10 here" in caplog.text


def test_what_does_not_fit_is_an_error_and_a_pooler_is_named(folder, caplog):
    import safetensors.torch

    path = folder("vit")
    source = build_model(f"hf/{path}", 10, 8)
    bare(source).save_pretrained(path)
    file = path / "model.safetensors"
    found = safetensors.torch.load_file(file)
    safetensors.torch.save_file({**found, "vit.pooler.dense.weight": torch.zeros(2, 2)}, file)
    model = build_model(f"hf/{path}", 10, 8)
    load_pretrained_weights(model, spec_of(model), file)
    assert "not used, because the network has no such part: pooler.dense.weight" in caplog.text
    folder("vit", num_hidden_layers=2)
    deeper = build_model(f"hf/{path}", 10, 8)
    with pytest.raises(DataError, match=r"do not fit the model: missing .*vit"):
        load_pretrained_weights(deeper, spec_of(deeper), file)
    safetensors.torch.save_file(dict(bare(deeper).state_dict()), file)
    with pytest.raises(DataError, match="do not fit the model"):
        load_pretrained_weights(model, spec_of(model), file)
    larger = build_model(f"hf/{path}", 10, 16)
    with pytest.raises(
        DataError, match=r"do not fit the model: size mismatch for vit\.embeddings\.position_embeddings"
    ):
        load_pretrained_weights(larger, spec_of(larger), file)


@pytest.mark.parametrize(
    "name, size, message",
    [
        ("vitt", 32, r"there is no hf/vitt \(did you mean hf/vit,"),
        ("bert", 32, "there is no hf/bert"),
        ("vit", 8, "cuts images into patches of 16 pixels: --image_size 8 is too small"),
        ("swin", 32, "windows of 7 by 7 patches, more than its last maps have with --image_size 32: 224 or more"),
        ("some/where", 32, "neither a folder nor a model whose configuration was downloaded before"),
    ],
)
def test_refusals_say_what_to_do(name, size, message):
    with pytest.raises(UsageError, match=message):
        build_model(parse_arch(f"hf/{name}"), 10, size)


def test_a_folder_may_hold_anything(tmp_path):
    for text in ("{", "[]", '{"model_type": "bert"}', '{"model_type": "vit", "hidden_size": "a"}', '{"auto_map": {}}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UsageError, match="argument --arch: hf/"):
            build_model(parse_arch(f"hf/{tmp_path}"), 10, 32)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UsageError, match=r"has no config\.json"):
        build_model(f"hf/{tmp_path}", 10, 32)


def test_the_path_of_a_folder_becomes_absolute(folder, tmp_path, monkeypatch):
    folder("vit")
    monkeypatch.chdir(tmp_path)
    assert parse_arch("hf/vit") == f"hf/{tmp_path / 'vit'}" and parse_arch("hf/beit") == "hf/beit"


def test_without_transformers_the_command_that_installs_it_is_named(monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(importlib.sys.modules, "transformers", None)
    with pytest.raises(
        UsageError, match=r'needs the package transformers, which is not installed: pip install "\.\[hf\]"'
    ):
        build_model("hf/vit", 10, 32)
