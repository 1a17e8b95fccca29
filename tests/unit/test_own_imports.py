"""A user's file imports the modules beside it, at any time, and no module of the program is replaced."""

from __future__ import annotations

import sys

import pytest
import torch

import utils as the_programs_utils
from structured_tickets.networks import build_model
from structured_tickets.networks.hosted import bare

NET = """
from torch import nn
{at_the_top}
class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem, self.mid, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Linear(12, classes)
    def forward(self, x):
        {in_forward}
        return answer() * self.head(self.mid(self.stem(x).relu()).relu().mean((2, 3)))
def net(num_classes):
    return Net(num_classes)
"""
ANSWER = "def answer():\n    return {}\n"


def written(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


LAYOUTS = {
    "a module with a name of the program": ("net.py", "from utils import answer", {"utils.py": ANSWER.format(2)}),
    "a module that imports another": (
        "net.py",
        "from models import answer",
        {"models/__init__.py": "from errors import answer\n", "errors.py": ANSWER.format(2)},
    ),
    "a package, by attributes": (
        "net.py",
        "import models.blocks\nanswer = models.blocks.answer",
        {
            "models/__init__.py": "",
            "models/blocks.py": "from .deeper import answer\n",
            "models/deeper.py": ANSWER.format(2),
        },
    ),
    "relative": (
        "package/net.py",
        "from .utils import answer",
        {"package/__init__.py": "", "package/utils.py": ANSWER.format(2)},
    ),
    "relative, from above": (
        "package/inner/net.py",
        "from ..utils import answer",
        {"package/__init__.py": "", "package/inner/__init__.py": "", "package/utils.py": ANSWER.format(2)},
    ),
    "beside, in a package": (
        "package/net.py",
        "from utils import answer",
        {"package/__init__.py": "", "package/utils.py": ANSWER.format(2)},
    ),
    "a folder that is no package": (
        "net.py",
        "from parts_of_mine.one import answer",
        {"parts_of_mine/one.py": ANSWER.format(2)},
    ),
    "everything": ("net.py", "from utils import *", {"utils.py": ANSWER.format(2)}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("late", [False, True])
@torch.no_grad()
def test_the_modules_beside_the_file_are_found(layout, late, tmp_path):
    file, statement, files = LAYOUTS[layout]
    if late and "*" in statement:
        pytest.skip("Python does not allow this in a function")
    words = {"at_the_top": "" if late else statement, "in_forward": statement.replace("\n", "; ") if late else "pass"}
    written(tmp_path, {**files, file: NET.format(**words)})
    before, path = sys.modules["utils"], list(sys.path)
    model, images = build_model(f"{tmp_path / file}:net", 10, 8), torch.rand(2, 3, 8, 8)
    network = bare(model)
    plain = network.head(network.mid(network.stem(images).relu()).relu().mean((2, 3)))
    torch.testing.assert_close(model(images), 2 * plain)
    assert sys.modules["utils"] is before is the_programs_utils and sys.path == path


@torch.no_grad()
def test_a_file_that_has_changed_is_read_again_with_what_it_imports(tmp_path):
    images = torch.ones(1, 3, 8, 8)
    found = []
    for factor in (2, 3000):  # of another length: within a second, Python tells files apart by their size
        written(
            tmp_path,
            {
                "utils.py": ANSWER.format(factor),
                "net.py": NET.format(at_the_top="from utils import answer", in_forward="pass"),
            },
        )
        torch.manual_seed(0)
        found.append(build_model(f"{tmp_path / 'net.py'}:net", 10, 8)(images))
    torch.testing.assert_close(1500 * found[0], found[1])


def test_the_program_itself_is_not_loaded_twice(tmp_path):
    written(
        tmp_path,
        {
            "structured_tickets/__init__.py": "raise ImportError('another copy')\n",
            "net.py": NET.format(
                at_the_top="from structured_tickets.networks.layers import Normalize", in_forward="answer = int"
            ),
        },
    )
    build_model(f"{tmp_path / 'net.py'}:net", 10, 8)
