"""Named recipes, and settings that come from the file of another run: `--recipe`, `--config`."""

from __future__ import annotations

import pytest
import yaml
from helpers.commands import ROOT, run, tiny
from helpers.comparison import assert_same_runs

from structured_tickets.base.errors import UsageError
from structured_tickets.programs import sweep
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


def test_a_search_among_recipes_needs_one_number_of_epochs(tmp_path, capsys):
    words = ["--grid", "recipe=fast,cnn", "--search", "--macs", "1", "--dataset=digits", "--out", str(tmp_path / "out")]
    assert sweep.main(words) == 2
    assert "rounds of 16, 200 epochs. Give one number by --epochs" in capsys.readouterr().err
    assert not (tmp_path / "out" / "runs").exists()


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


def test_what_follows_from_other_flags_follows_from_those_that_are_given(tmp_path):
    vit = ["--arch=vit_tiny", "--vit_structured", "--rate=0.3", "--dataset=cifar10"]
    config = settings_file(tmp_path / "a.yaml", **settings_of(parse_args(vit)))
    again, other = parse_args([config]), parse_args([config, "--rate=0.6", "--dataset=tiny-imagenet"])
    assert default_run_folder(again) == default_run_folder(parse_args(vit))
    assert (again.mlp_prune_ratio, other.mlp_prune_ratio, other.image_size) == (0.3, 0.6, 64)
    assert other.rate_mode == parse_args(vit).rate_mode
    own = settings_file(tmp_path / "b.yaml", **settings_of(parse_args([*vit, "--mlp_prune_ratio=0.5"])))
    assert parse_args([own, "--rate=0.6"]).mlp_prune_ratio == 0.5


def test_a_switch_is_turned_off_again(tmp_path):
    assert not parse_args(["--recipe=cnn", "--nesterov=false"]).nesterov
    assert parse_args(["--nesterov=true"]).nesterov and "nesterov" in parse_args(["--nesterov=false"]).explicit
    config = settings_file(tmp_path / "a.yaml", vit_structured=True, arch="vit_tiny")
    assert not parse_args([config, "--vit_structured=false", "--arch=res20s"]).vit_structured
    with pytest.raises(UsageError, match="--nesterov"):
        parse_args(["--nesterov=perhaps"])
    grid = {"nesterov": [True, False]}
    jobs = plan(Spec(("--recipe=cnn", "--dataset=digits"), (grid,)), tmp_path).jobs
    assert {parse_args(job.words).nesterov for job in jobs if not job.dense} == {True, False}


def test_a_file_may_name_a_recipe_and_a_preset(tmp_path):
    config = settings_file(tmp_path / "a.yaml", recipe="vit", arch="vit_tiny", epochs=40)
    args = parse_args([config])
    assert (args.recipe, args.optimizer, args.epochs, args.drop_path) == ("vit", "adamw", 40, 0.1)
    assert parse_args([config, "--recipe=documents"]).optimizer == "sgd"
    assert parse_args([settings_file(tmp_path / "b.yaml", preset="as_documented")]).rsst_dead == "free"


def test_only_a_file_that_a_run_has_written_has_the_meaning_of_its_time(tmp_path):
    config = settings_file(tmp_path / "a.yaml", RST_schedule="x^2")
    assert default_run_folder(parse_args([config])) == default_run_folder(parse_args(["--RST_schedule=x^2"]))
    before = settings_file(tmp_path / "b.yaml", RST_schedule="x^2", struct="rsst", save_dir=None)
    assert parse_args([before]).reg_horizon == "documents"


@pytest.mark.parametrize("penalty", ["gradient", "decoupled", "direct", "auto"])
def test_a_repeated_run_has_the_folder_of_the_first(penalty, tmp_path):
    words = ["--dataset=digits", f"--penalty={penalty}", "--epochs=3"]
    first = parse_args(words)
    written = {**settings_of(first), "penalty_chosen": penalty == "auto"}
    assert default_run_folder(parse_args([settings_file(tmp_path / "a.yaml", **written)])) == default_run_folder(first)


def test_a_sweep_from_the_file_of_a_control_has_its_tickets(tmp_path):
    written = settings_of(parse_args(["--dataset=digits", "--control=random_structure", "--epochs=2"]))
    config = settings_file(tmp_path / "a.yaml", **written)
    jobs = plan(Spec((config,), ({"seed": [0, 1]},)), tmp_path).jobs
    names = {job.name for job in jobs}
    assert all(set(job.after) <= names for job in jobs)
    assert (
        sorted(parse_args(job.words).control for job in jobs if not job.dense)
        == ["none"] * 2 + ["random_structure"] * 2
    )


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


def test_runs_with_the_same_flags_are_the_same_by_whatever_name(tmp_path):
    flags = {"epochs": 1, "warmup": 0, "pruning_times": 1}
    for seed, own in enumerate(({"recipe": "documents"}, {})):
        assert run(*tiny(tmp_path / str(seed), **flags, **own, seed=seed)) == 0
    found = collect(tmp_path)
    assert list(found.axes) == [] and len(found.groups) == 1
