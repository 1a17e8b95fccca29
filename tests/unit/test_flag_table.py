"""A flag is declared once: the parser, the checks, the identity of a run and sweeps read its entry in the table."""

from __future__ import annotations

import ast

import pytest
from helpers.commands import ROOT

from structured_tickets.base.errors import UsageError
from structured_tickets.settings import flag as kinds_of_scope
from structured_tickets.settings.argument_types import SHARE
from structured_tickets.settings.conditions import Condition
from structured_tickets.settings.flag import AFTER_ROUND_0, EVERY_ROUND, SWEEPS_OWN, WEIGHTS_FILE, Flag, Scope
from structured_tickets.settings.flag_table import FLAGS, GROUPS, PRESETS, scope_of
from structured_tickets.settings.flags import build_parser, parse_args
from structured_tickets.settings.identity import default_run_folder, identity_of, identity_of_round_0, settings_of
from structured_tickets.settings.words import words_of
from structured_tickets.sweeps.grid import Spec, check_axes, plan
from structured_tickets.training.rounds import CONTINUED

SCOPES = [s for s in vars(kinds_of_scope).values() if isinstance(s, Scope)]

# Runs of which each reads some flags.
BASES = {
    "rsst, channels": [],
    "rsst, heads": ["--arch=vit_tiny", "--vit_structured"],
    "rsst, neurons and blocks": ["--arch=vit_tiny", "--vit_structured", "--vit_prune_target=mlp,block"],
    "rsst, blocks alone": ["--arch=vit_tiny", "--vit_structured", "--vit_prune_target=block"],
    "rsst, weight by weight": ["--arch=vit_tiny"],
    "rsst, dead weights free, x": ["--rsst_dead=free", "--RST_schedule=x"],
    "refill by weights": ["--struct=refill", "--criteria=magnitude"],
    "imp": ["--struct=imp", "--lr_schedule=cosine"],
    "snip": ["--struct=snip"],
    "omp, a ViT": ["--arch=vit_tiny", "--struct=omp"],
    "random, regrouped": ["--struct=random", "--regroup"],
    "admm": ["--struct=admm"],
    "rewinds": ["--prune_type=rewind_lt", "--rewind_epoch=3"],
    "continues": ["--prune_type=lrr"],
    "is fine-tuned": ["--prune_type=finetune"],
    "is taught": ["--distill={file}"],
    "is averaged": ["--ema=0.9"],
    "adamw, a warm-up in steps": ["--optimizer=adamw", "--warmup_steps=9"],
    "a ViT that drops branches": ["--arch=vit_tiny", "--drop_path=0.2"],
    "a control": ["--control=reinit"],
    "a network with ImageNet weights": ["--arch=vit_small"],
    "pretrained": ["--vit_pretrained", "--pretrained={file}", "--arch=vit_small"],
}
# For flags without choices: other values than the default. Without an entry: NUMBERS.
VALUES = {
    "data": ["photos"],
    "arch": ["res56s"],
    "init": ["i.pth"],
    "pretrained": ["{file}"],
    "distill": ["{file}"],
    "pretrained_key": ["state_dict"],
    "control_of": ["there"],
    "save_dir": ["there"],
    "checkpoint": ["{file}"],
    "dense_store": ["store"],
    "exp_name": ["mine"],
    "wandb_group": ["ours"],
    "wandb_tags": ["a,b"],
    "image_size": ["64"],
    "decreasing_lr": ["1,2"],
    "config": ["{settings}"],
    "vit_prune_target": ["mlp", "head,block"],
    "compact_training": ["false"],
    "reg_guard": ["true"],
    "block_loss_grad": ["true"],
}
NUMBERS = ["0.5", "3"]


@pytest.fixture(autouse=True)
def _with_tensorboard(monkeypatch):
    monkeypatch.setattr("structured_tickets.settings.flag_rules.find_spec", lambda name: name)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "weights.pth").touch()
    (tmp_path / "args.yaml").write_text("{}")
    return tmp_path / "weights.pth"


def words_for(flag: Flag, file) -> list[str]:
    """The flag as a word of the command line, once for each value."""
    if flag.bare:
        return [f"--{flag.name}"]
    values = flag.choices or VALUES.get(flag.name, NUMBERS)
    return [f"--{flag.name}={value}".format(file=file, settings=file.with_name("args.yaml")) for value in values]


def runs_with(flag: Flag, file):
    """(arguments without the flag, arguments with it) of every run and value that go together."""
    for base in BASES.values():
        without = [word.format(file=file) for word in base if word.split("=")[0] != f"--{flag.name}"]
        for word in words_for(flag, file):
            try:
                yield parse_args(without), parse_args([*without, word])
            except UsageError:
                continue


def scopes_with(**what) -> list[str]:
    return [f.name for f in FLAGS.values() if all(getattr(f.scope, k) == v for k, v in what.items())]


def test_every_flag_of_the_parser_is_declared_once():
    declared = [flag.name for flags in GROUPS.values() for flag in flags]
    assert len(set(declared)) == len(declared)
    assert [a.dest for a in build_parser()._actions] == ["help", *declared] == ["help", *FLAGS]


@pytest.mark.parametrize("flag", FLAGS.values(), ids=FLAGS)
def test_every_flag_says_what_it_decides(flag):
    scope = flag.scope
    assert scope in SCOPES
    if scope.run:
        assert scope.sweep and scope.axis and scope.compared, "what tells runs apart tells sweeps apart"
    if scope.round_0:
        assert scope.run and scope.dense
    if scope.own:
        assert scope == SWEEPS_OWN


@pytest.mark.parametrize("flag", FLAGS.values(), ids=FLAGS)
def test_a_default_is_a_value_that_the_flag_takes(flag):
    assert getattr(build_parser().parse_args([]), flag.name) == flag.parsed_default
    if flag.derived is None:
        assert getattr(parse_args([]), flag.name) == flag.parsed_default
    if flag.choices:
        assert flag.default is None or flag.default in flag.choices


@pytest.mark.parametrize("name", scopes_with(run=True))
def test_runs_that_differ_in_a_flag_of_the_identity_have_different_folders(name, file):
    pairs = [(a, b) for a, b in runs_with(FLAGS[name], file) if getattr(a, name) != getattr(b, name)]
    assert pairs
    for one, other in pairs:
        assert identity_of(settings_of(one)) != identity_of(settings_of(other))
        assert default_run_folder(one) != default_run_folder(other)


@pytest.mark.parametrize(
    "name", [n for n in scopes_with(run=False) if n not in ("preset", "recipe")]
)  # which set other flags
def test_runs_that_differ_in_another_flag_have_the_same_folder(name, file):
    pairs = [(a, b) for a, b in runs_with(FLAGS[name], file) if getattr(a, name) != getattr(b, name)]
    assert pairs
    for one, other in pairs:
        assert default_run_folder(one) == default_run_folder(other)


@pytest.mark.parametrize("name", [n for n in FLAGS if FLAGS[n].scope in (AFTER_ROUND_0, EVERY_ROUND)])
def test_only_flags_that_round_0_reads_are_in_its_identity(name, file):
    pairs = [(a, b) for a, b in runs_with(FLAGS[name], file) if getattr(a, name) != getattr(b, name)]
    assert pairs
    for one, other in pairs:
        same = identity_of_round_0(one) == identity_of_round_0(other)
        types = {one.prune_type, other.prune_type}
        assert same == (FLAGS[name].scope == AFTER_ROUND_0 or (len(types) == 2 and types <= {"lt", *CONTINUED}))


def test_of_a_file_of_weights_its_contents_count_for_round_0(file):
    for name in scopes_with(run=True, round_0=False, dense=True):
        assert FLAGS[name].scope == WEIGHTS_FILE
        for one, other in runs_with(FLAGS[name], file):
            assert identity_of_round_0(one) == identity_of_round_0(other)


@pytest.mark.parametrize("name", [name for name, flag in FLAGS.items() if flag.read])
def test_a_flag_that_a_run_does_not_read_gets_a_warning(name, file):
    said = {True: set(), False: set()}
    for _, args in runs_with(FLAGS[name], file):
        about = [w for w in args.warnings if w.startswith(f"--{name} ") and FLAGS[name].read.where in w]
        said[FLAGS[name].read.holds(args)].add(len(about))
    assert said == {True: {0}, False: {1}}, "there are runs that read it, and runs that do not"


@pytest.mark.parametrize("name", [name for name, flag in FLAGS.items() if not flag.read])
def test_a_flag_that_every_run_reads_gets_none(name, file):
    for _, args in runs_with(FLAGS[name], file):
        assert not [w for w in args.warnings if w.startswith(f"--{name} has no effect")]


def test_a_preset_sets_flags_that_round_0_does_not_read():
    """So that the job which trains round 0 for others can do without it."""
    for flags in PRESETS.values():
        for name, value in flags.items():
            assert FLAGS[name].scope == AFTER_ROUND_0
            assert value in (FLAGS[name].choices or (True, False))


def test_a_flag_of_another_version_is_part_of_a_runs_identity():
    assert scope_of("not_yet") == EVERY_ROUND
    assert identity_of({"not_yet": 1, "verbose": True}) == {"not_yet": 1}


@pytest.mark.parametrize("name", FLAGS)
def test_a_sweep_asks_the_table(name, file):
    values = [word.partition("=")[2] or True for word in words_for(FLAGS[name], file)][:2]
    if FLAGS[name].scope.axis:
        check_axes(Spec(grids=({name: values},)))
    else:
        with pytest.raises(UsageError, match=f"--grid: {name} cannot differ"):
            check_axes(Spec(grids=({name: values},)))
    words = words_of({name: values[0]})
    if FLAGS[name].scope.own:
        with pytest.raises(UsageError, match=f"--{name}: not in a sweep"):
            check_axes(Spec(tuple(words)))
    assert (Spec(tuple(words)).digest() != Spec().digest()) == FLAGS[name].scope.sweep


def test_the_job_that_trains_round_0_for_others_has_only_flags_that_matter_there(tmp_path):
    flags = ["--dataset=digits", "--epochs=2", "--workers=1", "--wandb_tags=a", "--preset=as_documented", "--rate=0.3"]
    dense, *_ = plan(Spec(tuple(flags), ({"struct": ["rsst", "imp"]},)), tmp_path).jobs
    assert dense.dense
    assert dense.words[:3] == ("--dataset=digits", "--epochs=2", "--workers=1")
    kept = {word[2:].split("=")[0] for word in dense.words[:-5]}
    assert kept == {"dataset", "epochs", "workers"} and all(scope_of(name).dense for name in kept)


def test_a_new_flag_is_one_entry(monkeypatch):
    before = parse_args([])
    read = Condition(lambda a: a.struct == "imp", "with --struct imp")
    new = Flag("fancy", "something new", AFTER_ROUND_0, type=SHARE, default=0.1, read=read)
    monkeypatch.setitem(GROUPS, "pruning", (*GROUPS["pruning"], new))
    monkeypatch.setitem(FLAGS, "fancy", new)
    assert "something new (default: 0.1)" in build_parser().format_help()
    args = parse_args(["--fancy=0.3"])
    assert (parse_args([]).fancy, args.fancy) == (0.1, 0.3)
    assert [w for w in args.warnings if "--fancy" in w and "with --struct imp" in w]
    assert default_run_folder(parse_args([])) == default_run_folder(before) != default_run_folder(args)
    assert identity_of_round_0(args) == identity_of_round_0(before)
    with pytest.raises(UsageError, match=r"--fancy: '2' is not a number in \[0, 1\)"):
        parse_args(["--fancy=2"])
    check_axes(Spec(grids=({"fancy": ["0.1", "0.2"]},)))


def test_no_other_module_lists_flags():
    """Four names of flags side by side would be a list to keep in step with the table."""
    lists = {}
    for module in (ROOT / "structured_tickets").rglob("*.py"):
        if module.name in ("flag_table.py", "recipes.py"):
            continue
        for node in ast.walk(ast.parse(module.read_text())):
            parts = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
            # These are fields of checkpoints or columns of metrics, too.
            names = [
                p.value for p in parts if isinstance(p, ast.Constant) and p.value in FLAGS.keys() - {"step", "round_0"}
            ]
            if len(names) > 3:
                lists[f"{module.relative_to(ROOT)}:{node.lineno}"] = names
    assert lists == {}
