"""A file that is put into `models/` is a network of `--arch`, as document 004 describes it."""

from __future__ import annotations

import pytest
import torch
from helpers.commands import ROOT, run, tiny
from helpers.custom_model import CUSTOM_MODEL

from structured_tickets.networks import MODELS, build_model, parse_arch
from structured_tickets.programs import export
from structured_tickets.settings.flags import parse_args

DECORATED = (
    CUSTOM_MODEL
    + """
from structured_tickets.networks import register_model

@register_model("my_model", stem="conv1", classifier="fc", family="cnn")
def any_name(num_classes):
    return MyCustomModel(num_classes)
"""
)
BLOCK = "\nclass Block:\n    def __init__(self, width):\n        pass\n"
SAME_NAME = (
    CUSTOM_MODEL.replace("MyCustomModel", "MyModel")
    + "\nclass Other:\n    def __init__(self, num_classes):\n        pass\n"
)
FACTORY = CUSTOM_MODEL + "\ndef net(num_classes):\n    return MyCustomModel(num_classes)\n"


@pytest.fixture
def dropped(tmp_path, monkeypatch):
    """`dropped(text)` puts a text into models/my_model.py of the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()

    def put(text, name="my_model"):
        (tmp_path / "models" / f"{name}.py").write_text(text)
        return tmp_path / "models" / f"{name}.py"

    yield put
    MODELS.pop("my_model", None)


@pytest.mark.parametrize(
    "text, maker",
    [
        (CUSTOM_MODEL, "MyCustomModel"),
        (CUSTOM_MODEL + BLOCK, "MyCustomModel"),
        (SAME_NAME, "MyModel"),
        (FACTORY, "net"),
        (DECORATED, "any_name"),
    ],
    ids=["a class", "beside a block", "called as the file", "a function", "decorated"],
)
def test_a_file_is_found_by_its_name(text, maker, dropped):
    file = dropped(text)
    for _ in range(2):  # a decorated function registers itself when the file is run, and that is no other network
        assert parse_arch("my_model") == f"{file}:{maker}"
        assert build_model(parse_arch("my_model"), 7, 8)(torch.rand(2, 3, 8, 8)).shape == (2, 7)


@pytest.mark.parametrize(
    "text, said",
    [
        ("import torch\n", "my_model.py has no function or class that takes num_classes. Add one"),
        (
            CUSTOM_MODEL + CUSTOM_MODEL.replace("MyCustomModel", "Two"),
            r"several networks \(MyCustomModel, Two\). Choose one of them",
        ),
        ("class (", "my_model.py cannot be read as Python"),
    ],
)
def test_a_file_without_one_network_says_what_to_write(text, said, dropped):
    dropped(text)
    with pytest.raises(ValueError, match=said):
        parse_arch("my_model")


def test_own_networks_and_the_documents_import_paths_are_no_files_of_a_user(dropped, monkeypatch):
    dropped(CUSTOM_MODEL, "res20s")
    assert parse_arch("res20s") == "res20s"
    monkeypatch.chdir(ROOT)
    for name in ("vit", "resnets", "no_such"):
        with pytest.raises(ValueError, match=r"is not one of .* the name of a file in models/"):
            parse_arch(name)


def test_a_whole_run_of_a_dropped_file(dropped, tmp_path):
    file = dropped(DECORATED)
    assert run(*tiny(tmp_path / "run", arch="my_model")) == 0
    assert parse_args(["--arch", "my_model"]).arch == f"{file}:any_name"
    assert run(*tiny(tmp_path / "run", arch="my_model", pruning_times=3)) == 0, "it continues"
    assert export.main([str(tmp_path / "run"), "--arch", "my_model", "--quiet"]) == 0, "the name confirms the file"
