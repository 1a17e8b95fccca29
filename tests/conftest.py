"""What holds for every test: which ones run, and in what surroundings."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from helpers import networks  # noqa: F401 (registers the networks and the data of the tests)
from helpers.finished import finished_run as trained_once
from helpers.programs import end_all
from helpers.tiers import chosen, tier

from structured_tickets.runs import launch  # noqa: F401 (all of the program, see pytest_collection_finish)

pytest_plugins = ["helpers.data_files"]
os.environ["WANDB_MODE"] = "disabled"
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--tier",
        default="all",
        type=tier,
        metavar="fast|all|K/N",
        help="which tests: all but slow ones; all; all but slow ones and part K of N of the slow ones",
    )


def pytest_collection_modifyitems(config, items):
    items[:], left_out = chosen(items, *config.getoption("tier"))
    config.hook.pytest_deselected(items=left_out)
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish():
    """What is there by now stays: runs, which look for garbage in every round, need not go through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _nothing_to_collect():
    """The same of what the tests before have imported and kept."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    """Drawing takes longer than a tiny run; tests of pictures are marked."""
    if "pictures" not in request.keywords:
        monkeypatch.setattr("structured_tickets.runs.experiment.draw_kept_units", lambda *_: None)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_program_is_left():
    yield
    end_all()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A folder that all workers of this session see."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"


@pytest.fixture(scope="session")
def finished_run(shared_folder):
    """`finished_run(copy, **settings)`: see `helpers.finished`."""
    return lambda copy, **settings: trained_once(shared_folder / "finished", copy, **settings)


@pytest.fixture
def images_and_labels():
    return torch.rand(8, 3, 32, 32), torch.randint(0, 10, (8,))
