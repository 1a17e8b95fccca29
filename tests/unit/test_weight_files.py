"""Files of weights as trainers write them: found wherever they are, without running code, and what is taken is said."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import enum
import json
import logging
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from helpers.commands import run, tiny
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

from structured_tickets.base.errors import DataError
from structured_tickets.base.stand_ins import may_stand_in
from structured_tickets.networks import ModelSpec, build_model
from structured_tickets.networks.pretrained import load_initial_weights, load_pretrained_weights
from structured_tickets.networks.registry import spec_of
from structured_tickets.runs.folder import RunFolder

SPEC = ModelSpec("own", "stem", "head")


class Net(nn.Module):
    """Two convolutions with BatchNorm, a part of it nested."""

    def __init__(self, classes=10):
        super().__init__()
        self.normalize = nn.Identity()
        self.stem, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU())
        self.head = nn.Linear(6, classes)
        self.spec = SPEC

    def forward(self, x):
        return self.head(self.body(self.norm(self.stem(self.normalize(x)))).mean((2, 3)))


class Config(dict):
    """Settings as many trainers have them: a dictionary with attributes."""


class Names(list):
    pass


Pair = collections.namedtuple("Pair", "a b")


class Phase(enum.Enum):
    LAST = 3


@dataclasses.dataclass
class Settings:
    lr: float = 0.1
    inner: Config = dataclasses.field(default_factory=lambda: Config(a=1))


class Slotted:
    __slots__ = ("a",)

    def __init__(self):
        self.a = torch.ones(1)


def named(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


@pytest.fixture
def state():
    torch.manual_seed(1)
    net = Net()
    net.norm.running_mean.normal_()
    return net.state_dict()


@pytest.fixture
def said(caplog, monkeypatch):
    """What was logged, as text."""
    monkeypatch.setattr(logging.getLogger("rsst"), "handlers", [caplog.handler])
    monkeypatch.setattr(logging.getLogger("rsst"), "propagate", False)
    monkeypatch.setattr(logging.getLogger("rsst"), "level", logging.INFO)
    return lambda: "\n".join(f"{r.levelname} {r.getMessage()}" for r in caplog.records)


# What a file holds -> what the log says of the place.
PLACES = {
    "plain": (lambda s: s, "top level of the file"),
    "key net": (lambda s: {"net": named("module.", s), "acc": 91.2}, "key net, prefix module. taken off"),
    "key model_state_dict": (lambda s: {"model_state_dict": s, "loss": 0.3}, "key model_state_dict"),
    "key weights": (lambda s: {"weights": s}, "key weights"),
    "key of somebody's own": (lambda s: {"my network": s}, "key my network"),
    "keys within keys": (lambda s: {"ckpt": {"model": {"state_dict": s}}}, "key ckpt.model.state_dict"),
    "in a list": (lambda s: {"models": [s]}, "key models.0"),
    "in a namespace": (lambda s: argparse.Namespace(model=s), "key model"),
    "compiled": (lambda s: named("_orig_mod.", s), "prefix _orig_mod. taken off"),
    "compiled and parallel": (lambda s: {"model": named("module._orig_mod.", s)}, "prefix module._orig_mod. taken off"),
    "lightning": (lambda s: {"state_dict": named("model.", s), "hparams": {"lr": 1}}, "prefix model. taken off"),
    "four wrappers": (
        lambda s: named("_orig_mod.module.model.backbone.", s),
        "prefix _orig_mod.module.model.backbone.",
    ),
    "nested by layer": (
        lambda s: {
            "net": {"stem": {k[5:]: v for k, v in s.items() if k.startswith("stem.")}}
            | {k: v for k, v in s.items() if not k.startswith("stem.")}
        },
        "key net",
    ),
    "with an optimizer": (
        lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": s["stem.weight"]}}}},
        "key model",
    ),
    "averaged alone": (lambda s: {"state_dict_ema": s}, "key state_dict_ema"),
    "parameters": (lambda s: {k: nn.Parameter(v, v.is_floating_point()) for k, v in s.items()}, "top level"),
    "numpy beside": (lambda s: {"model": s, "best": np.float64(1), "h": np.arange(3), "i": np.int64(2)}, "key model"),
    "paths and dates": (lambda s: {"model": s, "at": datetime.datetime.now(), "in": pathlib.Path("x")}, "key model"),
    "default dict": (
        lambda s: {"m": s, "log": collections.defaultdict(list, a=[1]), "d": collections.deque([1])},
        "key m",
    ),
    "simple namespace": (lambda s: {"m": s, "args": types.SimpleNamespace(a=argparse.Namespace(b=1))}, "key m"),
    "classes of the trainer": (lambda s: {"m": s, "c": Config(a=[Settings()]), "n": Names("ab"), "p": Phase}, "key m"),
    "objects with slots": (lambda s: {"m": s, "s": Slotted(), "o": torch.optim.SGD([torch.ones(1)], 0.1)}, "key m"),
    "tuples with names": (
        lambda s: {"m": s, "t": [Pair(1, 2), Phase.LAST, complex(1), slice(1), {1}, b"a", type(None), ...]},
        "key m",
    ),
    "kinds of torch": (lambda s: {"m": s, "x": [torch.device("cpu"), torch.Size([1]), torch.float16]}, "key m"),
    "without counted batches": (lambda s: {k: v for k, v in s.items() if "num_batches" not in k}, "top level"),
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kind", PLACES)
def test_the_weights_are_found_and_it_is_said_where(kind, old, state, said, tmp_path):
    content, where = PLACES[kind]
    torch.save(content(state), tmp_path / "w.pth", _use_new_zipfile_serialization=not old)
    for load in (
        lambda net: load_initial_weights(net, tmp_path / "w.pth"),
        lambda net: load_pretrained_weights(net, SPEC, tmp_path / "w.pth", with_classifier=True),
    ):
        net = Net()
        load(net)
        assert all(torch.equal(net.state_dict()[name], value) for name, value in state.items())
    assert said().count(where) == 2 and "more than once" not in said()


def test_a_part_that_is_called_like_a_wrapper_is_a_part(state, tmp_path):
    def wrapped():
        return nn.ModuleDict({"module": Net(), "model": nn.Linear(2, 2)})

    source, net = wrapped(), wrapped()
    torch.save({"state_dict": source.state_dict()}, tmp_path / "w.pth")
    load_pretrained_weights(net, ModelSpec("own", "", ""), tmp_path / "w.pth")
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in source.state_dict().items())


def test_safetensors_are_read_for_every_flag(state, tmp_path, said):
    save_file(named("module.", state), tmp_path / "w.safetensors")
    net = Net()
    load_initial_weights(net, tmp_path / "w.safetensors")
    assert torch.equal(net.head.weight, state["head.weight"]) and "prefix module. taken off" in said()


def test_what_was_not_read_is_named(state, said, tmp_path):
    torch.save({"model": state, "best": np.float64(1), "c": Config(a=1)}, tmp_path / "w.pth")
    load_initial_weights(Net(), tmp_path / "w.pth")
    (line,) = [t for t in said().splitlines() if "left unread, because only tensors are loaded" in t]
    assert "multiarray.scalar" in line and f"{__name__}.Config" in line


AVERAGED = {
    ("state_dict", "state_dict_ema"): (lambda a, b: {"state_dict_ema": b, "state_dict": a}),
    ("teacher", "student"): (lambda a, b: {"student": named("module.", b), "teacher": a}),
    ("model", "model_ema.module"): (lambda a, b: {"model_ema": named("module.", b), "model": a}),
    ("online", "ema_model"): (lambda a, b: {**named("online.", a), **named("ema_model.", b), "step": torch.ones(1)}),
    ("encoder_q", "encoder_k"): (lambda a, b: {"m": {**named("encoder_q.", a), **named("encoder_k.", b)}}),
    ("model_state", "swa"): (
        lambda a, b: {"swa": named("module.", b) | {"n_averaged": torch.ones(1)}, "model_state": a}
    ),
}


@pytest.mark.parametrize("first, second", AVERAGED)
def test_of_plain_and_averaged_weights_one_is_taken_and_the_other_can_be(first, second, state, said, tmp_path):
    others = {k: v * 0.5 if v.is_floating_point() else v for k, v in state.items()}
    torch.save(AVERAGED[first, second](state, others), tmp_path / "w.pth")
    net = Net()
    load_initial_weights(net, tmp_path / "w.pth")
    assert torch.equal(net.stem.weight, state["stem.weight"])
    (line,) = [t for t in said().splitlines() if "more than once" in t]
    assert line.startswith("WARNING") and first in line.split("For the others")[0]
    key = line.rpartition("--pretrained_key ")[2]
    assert second in key
    for wanted in (key, second.split(".")[0]):
        load_pretrained_weights(net, SPEC, tmp_path / "w.pth", key=wanted)
        assert torch.equal(net.stem.weight, others["stem.weight"])
    assert said().count("more than once") == 1, "who names a key has chosen"
    with pytest.raises(DataError, match=rf"--pretrained_key: .*w.pth has no weights .* under nothing.*{first}"):
        load_initial_weights(net, tmp_path / "w.pth", "nothing")


def test_tensors_of_other_parts_are_named_and_left(state, said, tmp_path):
    extra = {"aux_head.weight": torch.ones(2, 6), "head_dist.weight": torch.ones(10, 6)}
    torch.save(state | extra, tmp_path / "w.pth")
    load_pretrained_weights(Net(), SPEC, tmp_path / "w.pth")
    assert "WARNING" in said() and "no such part: aux_head.weight, head_dist.weight" in said()
    torch.save({"m": named("backbone.", state) | {"projector.0.weight": torch.ones(1)}}, tmp_path / "w.pth")
    load_initial_weights(Net(), tmp_path / "w.pth")
    assert "no such part: m.projector.0.weight" in said()


def test_a_network_in_torchs_older_format_is_refused_too(state, tmp_path):
    torch.save({"net": Net()}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(DataError, match=r"holds a network as an object.*\.state_dict\(\), 'weights.pth'\)"):
        load_initial_weights(Net(), tmp_path / "w.pth")
    torch.save({"m": state, "loss": nn.CrossEntropyLoss()}, tmp_path / "w.pth")  # beside weights it is no matter
    load_initial_weights(Net(), tmp_path / "w.pth")


def test_counters_of_other_tools_are_no_part_of_a_network(state, said, tmp_path):
    torch.save(state | {"stem.total_ops": torch.ones(1), "body.0.total_params": torch.ones(1)}, tmp_path / "w.pth")
    for load in (load_initial_weights, lambda net, file: load_pretrained_weights(net, SPEC, file)):
        load(Net(), tmp_path / "w.pth")
    assert said().count("no such part: stem.total_ops, body.0.total_params") == 2


def test_arrays_are_no_weights(state, tmp_path):
    torch.save({"model": {k: v.numpy() for k, v in state.items()}}, tmp_path / "w.pth")
    with pytest.raises(DataError, match=r"no state dict, only arrays of NumPy\. Save a dictionary of tensors"):
        load_initial_weights(Net(), tmp_path / "w.pth")


def test_a_newer_pickle_is_refused_with_a_way_out(state, tmp_path):
    torch.save(state, tmp_path / "w.pth", pickle_protocol=4)
    with pytest.raises(DataError, match=r"Save it again by torch\.save, without pickle_protocol"):
        load_initial_weights(Net(), tmp_path / "w.pth")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("body.0.weight"), r"missing \['body.0.weight'\], unexpected \[\]"),
        (lambda s: s.update({"body.3.weight": torch.ones(1)}), r"missing \[\], unexpected \['body.3.weight'\]"),
        (lambda s: s.update({"stem.weight": torch.ones(4, 3, 5, 5)}), "size mismatch for stem.weight"),
    ],
)
def test_weights_of_another_network_are_refused_by_name(change, message, state, tmp_path):
    state = dict(state)
    change(state)
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    with pytest.raises(DataError, match=f"w.pth do not fit the model: .*{message}"):
        load_pretrained_weights(Net(), SPEC, tmp_path / "w.pth")
    with pytest.raises(DataError, match=r"these weights belong to another network \(first difference: (body|stem)"):
        load_initial_weights(Net(), tmp_path / "w.pth")


def test_another_number_of_classes_is_said(state, said, tmp_path):
    torch.save({"state_dict": Net(1000).state_dict()}, tmp_path / "w.pth")
    net = Net()
    fresh = net.head.weight.clone()
    load_pretrained_weights(net, SPEC, tmp_path / "w.pth")
    assert torch.equal(net.head.weight, fresh)
    assert "the classifier head starts fresh: it has 1,000 classes in the file and 10 here" in said()
    with pytest.raises(DataError, match="size mismatch for head"):
        load_pretrained_weights(net, SPEC, tmp_path / "w.pth", with_classifier=True)
    with pytest.raises(DataError, match=r"its classifier head has 1,000 classes, not 10\. To start with a fresh"):
        load_initial_weights(net, tmp_path / "w.pth")
    torch.save(state, tmp_path / "w.pth")
    load_pretrained_weights(net, SPEC, tmp_path / "w.pth")
    assert "the classifier head starts fresh. To take it from the file, add --fc" in said()
    torch.save({k: v for k, v in state.items() if "head" not in k}, tmp_path / "w.pth")
    load_pretrained_weights(net, SPEC, tmp_path / "w.pth")
    assert "the classifier head starts fresh: there is none in the file" in said()


def test_a_second_classifier_starts_fresh_too_where_its_classes_are_others(state, said, tmp_path):
    def with_two(classes):
        net = Net(classes)
        net.head_dist = nn.Linear(6, classes)
        return net

    torch.save(with_two(1000).state_dict(), tmp_path / "w.pth")
    load_pretrained_weights(with_two(10), SPEC, tmp_path / "w.pth")
    assert "the classifier head_dist starts fresh: it has 1,000 classes in the file and 10 here" in said()


def test_half_precision_is_converted(state, said, tmp_path):
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "w.pth")
    net = Net()
    load_initial_weights(net, tmp_path / "w.pth")
    assert net.stem.weight.dtype == torch.float32 and torch.allclose(net.stem.weight, state["stem.weight"], atol=1e-3)
    assert "converted from float16" in said()


def test_weights_that_torch_has_masked_are_taken_masked(state, tmp_path):
    masked = Net()
    masked.load_state_dict(state)
    prune.l1_unstructured(masked.stem, "weight", 0.5)
    torch.save({"state_dict": masked.state_dict()}, tmp_path / "w.pth")
    net = Net()
    load_initial_weights(net, tmp_path / "w.pth")
    assert torch.equal(net.stem.weight, masked.stem.weight) and not net.stem.weight.all()


@pytest.mark.parametrize("inside", [(), ("model",), ("ema", 0)])
def test_a_whole_network_is_refused_with_the_line_that_makes_a_state_dict_of_it(inside, state, tmp_path, monkeypatch):
    content = net = Net()
    for key in reversed(inside):
        content = [content] if key == 0 else {key: content, "epoch": 3}
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(DataError, match=r"holds a whole network \(.*\.Net\)") as caught:
        load_initial_weights(Net(), tmp_path / "w.pth")
    line = str(caught.value).rpartition("imported: ")[2]
    monkeypatch.chdir(tmp_path)
    exec(line)
    twin = Net()
    load_initial_weights(twin, tmp_path / "weights.pth")
    assert torch.equal(twin.stem.weight, net.stem.weight)


class Call:
    """Calls something when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def mark(path):
    pathlib.Path(path).touch()
    return 1


@pytest.mark.parametrize("function", [eval, exec, getattr, __import__, subprocess.check_output, open, mark])
def test_no_function_of_a_file_is_called(function, state, tmp_path):
    trace = tmp_path / "ran"
    call = {
        eval: (f"open({str(trace)!r}, 'w')",),
        exec: (f"open({str(trace)!r}, 'w')",),
        getattr: ("x", "upper"),
        __import__: ("antigravity",),
        subprocess.check_output: (["touch", str(trace)],),
        open: (str(trace), "w"),
        mark: (str(trace),),
    }[function]
    torch.save({"state_dict": state, "x": Call(function, *call)}, tmp_path / "w.pth")
    if function is mark:  # of a module that no one imports for it
        load_initial_weights(Net(), tmp_path / "w.pth")
    else:
        with pytest.raises(DataError, match=r"which could run code\. The file was not loaded"):
            load_initial_weights(Net(), tmp_path / "w.pth")
    assert not trace.exists() and "antigravity" not in sys.modules


def test_nothing_of_python_stands_in_but_plain_values():
    for name in ("os.system", "builtins.eval", "builtins.getattr", "importlib.import_module", "operator.attrgetter"):
        assert not may_stand_in(name)
    for name in ("argparse.Namespace", "collections.defaultdict", "numpy.dtype", "mmengine.config.ConfigDict"):
        assert may_stand_in(name)


def test_a_file_that_repeats_itself_is_read_in_a_moment(tmp_path):
    inner = {"a": 1}
    for _ in range(60):
        inner = {str(k): inner for k in range(10)}
    torch.save({"x": inner, ".".join("a" * 100_000): torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(DataError, match="these weights belong to another network"):
        load_initial_weights(Net(), tmp_path / "w.pth")


# ---- normalisation


def wanted(file, arch=None):
    model = build_model(arch, 10, 32) if arch else Net()
    return load_pretrained_weights(model, spec_of(model), file)


HALVES = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def test_normalisation_is_what_the_file_says(state, said, tmp_path):
    torch.save(state, tmp_path / "model.pth")
    assert wanted(tmp_path / "model.pth") is None
    assert "WARNING" in said() and "does not say how its images were normalised" in said()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in HALVES)
    torch.save(state | {"normalize.mean": mean, "normalize.std": std}, tmp_path / "model.pth")
    assert wanted(tmp_path / "model.pth") == HALVES
    said_so = {"mean": list(HALVES[0]), "std": HALVES[1]}
    for beside in (said_so, argparse.Namespace(**said_so), {"data": [said_so]}):
        torch.save({"model": state, "args": beside}, tmp_path / "model.pth")
        assert wanted(tmp_path / "model.pth") == HALVES
    assert "normalised by mean (0.500, 0.500, 0.500) and standard deviation (0.250, 0.250, 0.250)" in said()


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", {"architecture": "x", "pretrained_cfg": {"mean": HALVES[0], "std": HALVES[1]}}),
        ("preprocessor_config.json", {"image_mean": HALVES[0], "image_std": HALVES[1]}),
    ],
)
def test_normalisation_is_what_the_hubs_file_beside_it_says(name, content, state, tmp_path):
    save_file(dict(state), tmp_path / "model.safetensors")
    (tmp_path / name).write_text(json.dumps(content))
    assert wanted(tmp_path / "model.safetensors") == HALVES
    for nonsense in ("[", '{"mean": 3, "std": [1]}', '{"mean": [1, 2, 3], "std": [0, 0, 0]}', '{"image_mean": null}'):
        (tmp_path / name).write_text(nonsense)
        assert wanted(tmp_path / "model.safetensors") is None


@pytest.mark.parametrize(
    "arch, statistics",
    [
        ("timm/test_resnet", (0.5, 0.5)),
        ("torchvision/squeezenet1_1", (0.485, 0.229)),
        ("vit_small", (0.5, 0.5)),
    ],
)
def test_normalisation_is_what_the_librarys_weights_want(arch, statistics, tmp_path):
    torch.save(build_model(arch, 10, 32).state_dict(), tmp_path / "w.pth")
    found = wanted(tmp_path / "w.pth", arch)
    assert found is not None and (found[0][0], found[1][0]) == statistics


# ---- whole runs


def test_a_run_takes_the_weights_the_key_and_the_normalisation(tmp_path, capsys):
    net = build_model("micro_cnn", 10, 8)
    state = net.state_dict()
    other = {k: v * 0.5 if v.is_floating_point() else v for k, v in state.items()}
    torch.save({"model": state, "ema": other, "mean": HALVES[0], "std": HALVES[1]}, tmp_path / "w.pth")
    words = {"pruning_times": 1, "prune_type": "pt", "pretrained": tmp_path / "w.pth"}
    assert run(*tiny(tmp_path / "a", **words)) == 0
    assert run(*tiny(tmp_path / "b", **words, pretrained_key="ema")) == 0
    a, b = (RunFolder.load(tmp_path / name / "0checkpoint.pth.tar").init_weight for name in "ab")
    assert torch.equal(a["conv1.weight"], state["conv1.weight"])
    assert torch.equal(b["conv1.weight"], other["conv1.weight"])
    assert a["normalize.mean"].flatten().tolist() == [0.5] * 3 and a["normalize.std"].flatten().tolist() == [0.25] * 3
    assert "(key model)" in (tmp_path / "a" / "log.txt").read_text()
    capsys.readouterr()
    assert run(*tiny(tmp_path / "a", **words, pretrained_key="ema")) == 2, "it is another run"
    assert "--pretrained_key" in capsys.readouterr().err
    assert run(*tiny(tmp_path / "c", pruning_times=1, init=tmp_path / "w.pth", pretrained_key="ema")) == 0
    c = RunFolder.load(tmp_path / "c" / "0checkpoint.pth.tar").init_weight
    assert torch.equal(c["fc.weight"], other["fc.weight"]) and c["normalize.mean"].flatten().tolist() != [0.5] * 3
    assert run(*tiny(tmp_path / "d", pruning_times=1, init=tmp_path / "new.pth", pretrained_key="ema")) == 0
    assert "--pretrained_key has no effect: there was no file" in capsys.readouterr().err


def test_what_a_run_leaves_can_start_another(tmp_path):
    assert run(*tiny(tmp_path / "a", struct="refill")) == 0
    ticket = RunFolder.load(tmp_path / "a" / "1checkpoint.pth.tar")
    assert run(*tiny(tmp_path / "b", pruning_times=1, init=tmp_path / "a" / "ticket.pth.tar")) == 0
    weights = RunFolder.load(tmp_path / "b" / "0checkpoint.pth.tar").init_weight
    assert torch.equal(weights["fc.weight"], ticket.state_dict["fc.weight"])
