"""Named recipes, and settings that come from the file of another run: `--recipe`, `--config`."""

from __future__ import annotations

import pytest
import yaml
from helpers.commands import ROOT, run, tiny
from helpers.comparison import assert_same_runs

from structured_tickets.base.errors import UsageError
from structured_tickets.reports.collection import collect
from structured_tickets.settings.flag_table import FLAGS
from structured_tickets.settings.flags import parse_args
from structured_tickets.settings.identity import default_run_folder, identity_of, settings_of
from structured_tickets.settings.recipes import RECIPES
from structured_tickets.sweeps.grid import Spec, plan


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_stands_for_its_flags_and_given_ones_win(name):
    arch = ["--arch=vit_tiny"] if name == "vit" else []
    flags = RECIPES[name].flags
    words = [f"--{k}" if v is True else f"--{k}={v}" for k, v in flags.items()]
    by_name, one_by_one = parse_args([*arch, f"--recipe={name}"]), parse_args([*arch, *words])
    assert identity_of(settings_of(by_name)) == identity_of(settings_of(one_by_one))
    assert default_run_folder(by_name) == default_run_folder(one_by_one)
    assert by_name.warnings == one_by_one.warnings == []
    assert parse_args([*arch, "--lr=0.07", f"--recipe={name}", "--epochs=21"]).lr == 0.07
    assert all(FLAGS[k].scope.dense for k in flags), "the job that trains round 0 for others is given the name"


def test_the_documents_recipe_is_the_default():
    assert RECIPES["documents"].flags == {}
    assert default_run_folder(parse_args(["--recipe=documents"])) == default_run_folder(parse_args([]))


def test_recipes_are_documented_with_all_their_flags():
    text = (ROOT / "docs" / "methods.md").read_text()
    for name, recipe in RECIPES.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |") and "--epochs" in line]
        for flag, value in recipe.flags.items():
            word = (
                f"--{flag}"
                if value is True
                else f"--{flag} {value:g}"
                if isinstance(value, float)
                else f"--{flag} {value}"
            )
            assert word in row, (name, word)


def test_a_recipe_is_an_axis_of_a_sweep_and_round_0_has_its_own(tmp_path):
    planned = plan(
        Spec(("--dataset=digits", "--epochs=4"), ({"recipe": ["fast", "cnn"], "struct": ["rsst", "refill"]},)), tmp_path
    )
    dense = [job for job in planned.jobs if job.dense]
    assert len(dense) == 2 and {w for job in dense for w in job.words if w.startswith("--recipe")} == {
        "--recipe=fast",
        "--recipe=cnn",
    }


def settings_file(path, **settings):
    path.write_text(yaml.safe_dump(settings))
    return f"--config={path}"


def test_a_run_is_repeated_from_its_folder(tmp_path):
    words = {
        "struct": "refill",
        "criteria": "magnitude",
        "epochs": 2,
        "recipe": "fast",
        "warmup": 1,
        "lr_schedule": "cosine",
    }
    assert run(*tiny(tmp_path / "first", **words)) == 0
    assert run(f"--config={tmp_path / 'first' / 'args.yaml'}", f"--save_dir={tmp_path / 'again'}") == 0
    assert_same_runs(tmp_path / "first", tmp_path / "again")
    assert yaml.safe_load((tmp_path / "again" / "args.yaml").read_text())["recipe"] == "fast"


def test_what_is_given_wins_over_a_recipe_and_that_over_a_file(tmp_path):
    config = settings_file(
        tmp_path / "a.yaml", lr=0.3, epochs=7, weight_decay=0.5, decreasing_lr=[3, 5], nesterov=False
    )
    args = parse_args([config, "--recipe=fast", "--epochs=9"])
    assert (args.lr, args.epochs, args.weight_decay, args.decreasing_lr, args.nesterov) == (0.1, 9, 5e-4, (3, 5), True)
    assert parse_args([config]).lr == 0.3
    documents = parse_args([config, "--recipe=documents"])
    assert (documents.lr, documents.weight_decay, documents.nesterov) == (0.01, 1e-4, False)
    assert "lr" not in parse_args([config]).explicit


def test_where_a_run_lay_is_not_repeated_and_a_penalty_that_nobody_chose_is_chosen_anew(tmp_path):
    written = {"save_dir": "there", "dry_run": True, "checkpoint": None, "config": "x", "quiet": True, "seed": 3}
    args = parse_args([settings_file(tmp_path / "a.yaml", **written)])
    assert (args.save_dir, args.dry_run, args.quiet, args.seed) == (None, False, False, 3)
    chosen = settings_file(tmp_path / "b.yaml", penalty="direct", penalty_chosen=True)
    assert parse_args([chosen]).penalty == "auto"
    named = settings_file(tmp_path / "c.yaml", penalty="direct", penalty_chosen=False)
    assert parse_args([named]).penalty == "direct"


@pytest.mark.parametrize(
    "text, message",
    [
        ("lr: 0.1\nepoch: 3\n", "argument --config: no such flag: epoch (did you mean epochs?)"),
        ("[1, 2]", "does not hold settings"),
        ("lr: [", "cannot read"),
        ("lr: !!python/object/apply:os.system ['true']", "cannot read"),
        ("lr: -1", "argument --lr: '-1' is not"),
        ("nesterov: perhaps", "argument --config: nesterov is true or false"),
        ("arch: res21s", "argument --arch"),
    ],
)
def test_a_file_that_is_no_settings_is_refused(text, message, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        parse_args([f"--config={tmp_path / 'a.yaml'}"])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"argument --config: cannot read .*none\.yaml"):
        parse_args([f"--config={tmp_path / 'none.yaml'}"])


def test_a_report_names_the_recipe_and_not_its_flags(tmp_path):
    for name in ("documents", "fast"):
        words = {"recipe": name, "epochs": 1, "warmup": 0, "pruning_times": 1}
        assert run(*tiny(tmp_path / name, **words)) == 0
    assert list(collect(tmp_path).axes) == ["recipe"]
