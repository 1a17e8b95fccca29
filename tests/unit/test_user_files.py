"""Networks from a user's file: what lies beside the file is imported under any name, and nothing else is disturbed."""

from __future__ import annotations

import copy
import json
import sys
import types

import pytest
import torch
from helpers.commands import run, tiny

from structured_tickets.base.errors import UsageError
from structured_tickets.networks import build_model, sources_of
from structured_tickets.networks.user_files import imported
from structured_tickets.networks.user_files import sources_of as sources_of_file
from structured_tickets.programs import export
from structured_tickets.runs.folder import RunFolder

# A network of two convolutions; `{first}` comes before its class, `{pooled}` makes features of maps.
NETWORK = """
from torch import nn
{first}
class Net(nn.Module):
    def __init__(self, num_classes, width=8):
        super().__init__()
        self.stem, self.mid = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 16, 3, padding=1)
        self.head = nn.Linear(16, num_classes)
    def forward(self, x):
        x = self.mid(self.stem(x).relu()).relu()
        {pooled}
        return self.head(x)
def net(num_classes):
    return Net(num_classes)
"""
MEAN = {"utils.py": "def pooled(x):\n    return x.mean((2, 3))\n"}
POOLED = "def pooled(x):\n    return x.{how}((2, 3))\n"


def written(folder, name="net.py", first="", pooled="x = x.mean((2, 3))", helpers=None):
    """A user's folder: the network's file, and others by their path. Returns its `--arch`."""
    for path, text in {name: NETWORK.format(first=first, pooled=pooled), **(helpers or {})}.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return f"{folder / name}:net"


@pytest.fixture(autouse=True)
def _users_modules_go_with_their_folder(tmp_path):
    """Tests that come after have a `utils` of their own."""
    yield
    places = {
        name: [vars(module).get("__file__") or "", *(vars(module).get("__path__") or ())]
        for name, module in list(sys.modules.items())
    }
    for name in [n for n, found in places.items() if any(str(place).startswith(str(tmp_path)) for place in found)]:
        sys.modules.pop(name, None)


@pytest.fixture
def taken(monkeypatch):
    """Modules of the names that users take too, as this program's root has them."""
    found = {name: types.ModuleType(name) for name in ("utils", "models", "errors", "models.blocks")}
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))

WAYS = {
    "a module": ("from utils import pooled", "x = pooled(x)", {"utils.py": POOLED}),
    "a package": (
        "from models.blocks import pooled",
        "x = pooled(x)",
        {"models/blocks.py": POOLED, "models/__init__.py": ""},
    ),
    "a folder without __init__": ("import models.blocks", "x = models.blocks.pooled(x)", {"models/blocks.py": POOLED}),
    "a module of a module": (
        "from errors import pooled",
        "x = pooled(x)",
        {"errors.py": "from utils import *", "utils.py": POOLED},
    ),
    "in the forward pass": ("", "from utils import pooled; x = pooled(x)", {"utils.py": POOLED}),
    "a module, in the forward pass": ("", "import utils; x = utils.pooled(x)", {"utils.py": POOLED}),
    "a package, in the forward pass": ("", "import models.blocks as b; x = b.pooled(x)", {"models/blocks.py": POOLED}),
    "by importlib": ("import importlib\nu = importlib.import_module('utils')", "x = u.pooled(x)", {"utils.py": POOLED}),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_has_its_own_modules_whatever_else_has_their_names(way, taken, tmp_path):
    first, pooled, helpers = WAYS[way]
    before, search = dict(taken), list(sys.path)
    pairs = []
    for how in ("mean", "amax"):  # two folders with modules of the same names
        files = {path: text.format(how=how) for path, text in helpers.items()}
        arch = written(tmp_path / how, first=first, pooled=pooled, helpers=files)
        model, plain = (
            build_model(a, 10, 8) for a in (arch, written(tmp_path / f"{how}_", pooled=f"x = x.{how}((2, 3))"))
        )
        plain.load_state_dict(model.state_dict())
        pairs.append((model, plain))
    for model, plain in pairs:
        torch.testing.assert_close(model(IMAGES), plain(IMAGES))
        torch.testing.assert_close(copy.deepcopy(model)(IMAGES), plain(IMAGES))
    assert all(sys.modules[name] is module for name, module in before.items())
    assert sys.path == search and not any("user_files" in type(f).__module__ for f in sys.meta_path)


@pytest.mark.parametrize("init", [True, False])
def test_relative_imports_are_those_of_the_package_that_the_folder_is(init, taken, tmp_path):
    helpers = {"nets/common.py": POOLED.format(how="mean"), "nets/small/blocks.py": "from ..common import pooled\n"}
    if init:
        helpers |= {"nets/__init__.py": "", "nets/small/__init__.py": "from . import blocks\n"}
    first = "from .blocks import pooled" if init else "from .blocks import pooled\nfrom ..common import pooled"
    arch = written(tmp_path, "nets/small/net.py", first=first, pooled="x = pooled(x)", helpers=helpers)
    assert build_model(arch, 10, 8)(IMAGES).shape == (2, 10)
    assert "nets/small/net.py" in sources_of(arch) and "nets/common.py" in sources_of(arch)


def test_a_project_around_the_folder_is_searched_too(taken, tmp_path, monkeypatch):
    helpers = {"models/__init__.py": "", "models/blocks.py": POOLED.format(how="mean"), "utils.py": "x = 1\n"}
    helpers |= {"timm/setup.py": "raise SystemExit\n"}  # a clone of a library
    first = "from models.blocks import pooled\nfrom utils import x\nfrom timm import create_model"
    arch = written(tmp_path, "models/net.py", first=first, pooled="x = pooled(x)", helpers=helpers)
    assert build_model(arch, 10, 8)(IMAGES).shape == (2, 10)
    (tmp_path / "models/__init__.py").unlink()
    (tmp_path / "models/net.py").write_text(
        (tmp_path / "models/net.py").read_text().replace("from models.blocks", "from blocks")
    )
    with pytest.raises(UsageError, match="cannot import name 'x' from 'utils'"):
        build_model(arch, 10, 8)
    monkeypatch.chdir(tmp_path)
    assert build_model(arch, 10, 8)(IMAGES).shape == (2, 10)
    assert set(sources_of(arch)) == {"net.py", "blocks.py", "../utils.py"}


def test_a_relative_import_in_the_forward_pass_is_found(tmp_path):
    helpers = {"lazily/__init__.py": "", "lazily/blocks.py": POOLED.format(how="mean")}
    arch = written(tmp_path, "lazily/net.py", pooled="from .blocks import pooled; x = pooled(x)", helpers=helpers)
    assert build_model(arch, 10, 8)(IMAGES).shape == (2, 10)


def test_what_python_has_loaded_stays_pythons(tmp_path):
    arch = written(tmp_path, first="import json\nassert json.dumps", helpers={"json.py": "raise SystemExit\n"})
    build_model(arch, 10, 8)
    assert sys.modules["json"] is json


def test_a_module_that_the_program_around_has_imported_is_the_same_for_the_network(tmp_path, monkeypatch):
    arch = written(
        tmp_path,
        first="import notes_of_mine\nnotes_of_mine.seen.append(1)",
        helpers={"notes_of_mine.py": "seen = []\n"},
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import notes_of_mine  # type: ignore[import-not-found]

    build_model(arch, 10, 8)
    assert notes_of_mine.seen == [1]
    del sys.modules["notes_of_mine"]


def test_a_helper_that_has_changed_is_imported_anew_and_others_are_not(tmp_path):
    arch = written(tmp_path, first="from utils import pooled", pooled="x = pooled(x)", helpers=MEAN)
    first = build_model(arch, 10, 8)
    with imported(tmp_path / "net.py") as module:
        before = sys.modules[module.Net.forward.__globals__["pooled"].__module__]
    with imported(tmp_path / "net.py") as module:
        assert sys.modules["utils"] is before
    known = sources_of(arch)
    (tmp_path / "utils.py").write_text(POOLED.format(how="amax"))
    second = build_model(arch, 10, 8)
    second.load_state_dict(first.state_dict())
    assert not torch.allclose(first(IMAGES), second(IMAGES))
    assert known["net.py"] == sources_of(arch)["net.py"] and known["utils.py"] != sources_of(arch)["utils.py"]


def test_modules_that_the_program_around_has_imported_stay_when_the_file_changes(tmp_path, monkeypatch):
    arch = written(tmp_path, first="import notes_of_mine", helpers={"notes_of_mine.py": "seen = []\n"})
    monkeypatch.syspath_prepend(str(tmp_path))
    import notes_of_mine

    build_model(arch, 10, 8)
    (tmp_path / "net.py").write_text((tmp_path / "net.py").read_text() + "# a note\n")
    build_model(arch, 10, 8)
    assert sys.modules.pop("notes_of_mine") is notes_of_mine


def test_sources_are_known_of_what_was_imported_here(tmp_path):
    (tmp_path / "never.py").write_text("x = 1")
    (tmp_path / "wrong.py").write_text("x = (")
    assert sources_of_file(tmp_path / "never.py") == {} == sources_of_file(tmp_path / "wrong.py")
    assert sources_of("res20s") == {} == sources_of("timm/resnet18")


@pytest.mark.parametrize(
    "text, said",
    [
        ("from .nowhere import x\n", "ModuleNotFoundError"),
        ("from ..............above import x\n", "cannot be built"),
        ("import nowhere_at_all\n", "No module named 'nowhere_at_all'"),
    ],
)
def test_a_module_that_is_missing_is_named(text, said, tmp_path, capsys):
    (tmp_path / "net.py").write_text(text)
    assert run(*tiny(tmp_path / "run", arch=f"{tmp_path / 'net.py'}:net")) == 2
    assert said in capsys.readouterr().err


def test_a_module_that_is_missing_in_the_forward_pass_is_no_matter_of_the_images_size(tmp_path, capsys):
    arch = written(tmp_path, pooled="import nowhere_at_all")
    assert run(*tiny(tmp_path / "run", arch=arch)) == 2
    error = capsys.readouterr().err
    assert "cannot be run: No module named 'nowhere_at_all'" in error and "--image_size" not in error


def test_a_run_whose_code_was_edited_says_so_when_it_continues(tmp_path, capsys):
    arch = written(tmp_path, first="from utils import pooled", pooled="x = pooled(x)", helpers=MEAN)
    words = tiny(tmp_path / "run", arch=arch, struct="refill")
    assert run(*words, "--pruning_times", 1) == 0
    began = RunFolder.load(tmp_path / "run" / "0checkpoint.pth.tar").sources
    assert set(began) == {"net.py", "utils.py"}
    assert json.loads((tmp_path / "run" / "env.json").read_text())["sources"] == began
    capsys.readouterr()
    assert run(*words) == 0
    assert "code of the network" not in capsys.readouterr().err
    (tmp_path / "utils.py").write_text(POOLED.format(how="mean") + "\n# a note\n")
    assert run(*words, "--pruning_times", 3) == 0
    error = capsys.readouterr().err
    assert "warning: the code of the network has changed since the run began: utils.py. The rest" in error
    assert RunFolder.load(tmp_path / "run" / "2checkpoint.pth.tar").sources == began
    assert export.main([str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--arch", arch]) == 0
    assert "has changed since the run began: utils.py. The exported network" in capsys.readouterr().err


def test_a_control_says_that_its_network_is_not_the_tickets(tmp_path, capsys):
    arch = written(tmp_path)
    words = {"arch": arch, "struct": "refill"}
    assert run(*tiny(tmp_path / "ticket", **words)) == 0
    (tmp_path / "net.py").write_text((tmp_path / "net.py").read_text() + "# a note\n")
    assert run(*tiny(tmp_path / "control", **words, control="reinit", control_of=tmp_path / "ticket")) == 0
    assert "has changed since the run began: net.py. The control" in capsys.readouterr().err
    assert run(*tiny(tmp_path / "control", **words, control="reinit", control_of=tmp_path / "ticket")) == 0
    assert "The rest of the run" not in capsys.readouterr().err
