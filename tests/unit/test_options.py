"""The command line: documented flags and defaults, and one helpful line for every mistake."""

from __future__ import annotations

import pytest

import main_imp_fillback
from structured_tickets.base.errors import UsageError
from structured_tickets.networks import build_model
from structured_tickets.settings.flag_table import FLAGS, LAMBDA_FOLLOWS
from structured_tickets.settings.flags import build_parser, parse_args
from structured_tickets.settings.identity import (
    as_understood_now,
    default_run_folder,
    identity_of,
    settings_of,
    tracker_name,
)
from structured_tickets.settings.interpret import rules_from, warnings_of_fillback, warnings_of_lambda
from structured_tickets.unit_groups.find import unit_groups

DOCUMENTED = {
    "data": "data",
    "dataset": "cifar100",
    "arch": "res20s",
    "exp_name": None,
    "gpu": 0,
    "resume": False,
    "checkpoint": None,
    "batch_size": 128,
    "workers": 4,
    "lr": 0.01,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "epochs": 120,
    "warmup": 20,
    "print_freq": 200,
    "decreasing_lr": (91, 136),
    "pruning_times": 20,
    "rate": 0.2,
    "prune_type": "lt",
    "pretrained": None,
    "conv1": False,
    "fc": False,
    "rewind_epoch": 24,
    "struct": "rsst",
    "fillback_rate": 0.0,
    "block_loss_grad": False,
    "RST_schedule": "exp_custom_exponents",
    "reg_granularity_prune": 1.0,
    "criteria": "l1",
    "exponents": 4,
    "vit_structured": False,
    "vit_prune_target": "head",
    "sorting_mode": "layer-wise",
    "vit_pretrained": False,
}


def test_documented_flags_have_their_documented_defaults():
    args = vars(parse_args([]))
    assert {k: args[k] for k in DOCUMENTED} == DOCUMENTED


def test_every_flag_has_a_help_text_and_a_group():
    parser = build_parser()
    for action in parser._actions:
        assert action.help, action.option_strings
    titles = [g.title for g in parser._action_groups if g._group_actions]
    assert titles[1:] == [
        "start with these",
        "data",
        "model",
        "training (of each round)",
        "pruning",
        "one-shot pruners and controls",
        "ViT",
        "RSST",
        "output",
        "tracking",
    ]
    text = " ".join(parser.format_help().split())
    assert "(default: 0.01)" in text and "(default: that of the data set)" in text
    assert "None" not in text and "()" not in text


def test_the_help_begins_with_eight_flags_and_an_example_of_each():
    first = [flag for flag in FLAGS.values() if flag.example]
    assert [flag.name for flag in first] == list(FLAGS)[:8]
    assert list(FLAGS)[:8] == ["arch", "dataset", "data", "struct", "rate", "pruning_times", "epochs", "save_dir"]
    lines = [line.strip() for line in build_parser().format_help().splitlines()]
    assert lines.index("start with these:") < 10
    for flag in first:
        assert lines.count(f"example: {flag.example}") == 1
        args = vars(parse_args(flag.example.split()))
        assert args["explicit"] == [flag.name] and args[flag.name] != flag.parsed_default


def test_rounds_without_end_are_refused():
    with pytest.raises(UsageError, match="--pruning_times: '1000000' is not a whole number of at least 1 and at most"):
        parse_args(["--pruning_times", "1000000"])


def test_hyphens_stand_for_underscores():
    args = parse_args(["--vit-structured", "--arch=vit_tiny", "--vit-prune-target=both", "--mlp-prune-ratio", "0.4"])
    assert (args.vit_structured, args.vit_prune_target, args.mlp_prune_ratio) == (True, "both", 0.4)


@pytest.mark.parametrize("word", ["--ema", "--model", "--learning_rate", "--save_directory"])
def test_only_a_flag_of_nearly_the_same_name_is_suggested(word, capsys):
    assert main_imp_fillback.main([word, "1"]) == 2
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--criteria", "magnitud"], ["--criteria", "'magnitud'", "remain, magnitude", "did you mean magnitude?"]),
        (["--critera", "l1"], ["--critera", "did you mean --criteria?"]),
        (["--arch", "resnet20"], ["--arch", "'resnet20'", "res20s"]),
        (["--rate", "1"], ["--rate", "'1'", "[0, 1)"]),
        (["--rate", "-0.1"], ["--rate", "[0, 1)"]),
        (["--rate", "nan"], ["--rate", "[0, 1)"]),
        (["--mlp_prune_ratio", "2"], ["--mlp_prune_ratio", "[0, 1)"]),
        (["--epochs", "0"], ["--epochs", "'0'", "at least 1"]),
        (["--epochs", "ten"], ["--epochs", "'ten'"]),
        (["--lr", "0"], ["--lr", "above 0"]),
        (["--lr", "inf"], ["--lr", "above 0"]),
        (["--decreasing_lr", "9;13"], ["--decreasing_lr", "such as 91,136"]),
        (["--image_size", "30"], ["--image_size", "multiple of 4"]),
        (["--seed", "-1"], ["--seed"]),
        (["--block_loss_grad", "perhaps"], ["--block_loss_grad", "not true or false"]),
        (["--vit_structured"], ["--vit_structured", "res20s", "no attention heads"]),
        (["--vit_pretrained"], ["--vit_pretrained", "not a ViT"]),
        (["--vit_pretrained", "--arch", "vit_tiny"], ["--vit_pretrained", "vit_tiny"]),
        (["--prune_type", "pt"], ["--prune_type", "--pretrained FILE"]),
        (["--pretrained", "x.pth"], ["--pretrained"]),
        (["--pretrained", "nowhere.pth", "--prune_type", "pt"], ["--pretrained", "no such file", "nowhere.pth"]),
        (["--prune_type", "rewind_lt", "--epochs", "10"], ["--rewind_epoch", "epochs 0 to 9", "--epochs 10"]),
        (["--quiet", "--verbose"], ["--quiet"]),
        (["--repeated_augment", "65"], ["--repeated_augment", "one image in a batch of 128 images"]),
        (["--preset", "as_documente"], ["--preset", "did you mean as_documented?"]),
        (["--checkpoint", "none.tar"], ["--checkpoint", "no such file"]),
        (["--init", "x", "--vit_pretrained", "--arch", "vit_small"], ["--init", "pretrained"]),
        (["stray"], ["unrecognized arguments: stray", '" lists all flags']),
        (["--swa", "0.9"], ["unrecognized arguments: --swa 0.9. ", '" lists all flags']),
        (["--epoch", "9", "--swa", "1"], ["--epoch: did you mean --epochs?", '" lists all flags']),
    ],
)
def test_a_mistake_gets_one_line_and_status_2(words, parts, capsys):
    assert main_imp_fillback.main(words) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "Traceback" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "words, part",
    [
        (["--decreasing_lr", "91,136"], "no effect at 136: each round ends after 120 epochs (--epochs)"),
        (["--epochs", "1", "--decreasing_lr", "1"], "no effect at 1: each round ends after 1 epoch (--epochs)"),
        (["--epochs", "50"], "the learning rate does not fall within a round of 50 epochs: --decreasing_lr is 91,136"),
        (["--decreasing_lr", "5"], "no effect at 5: the warm-up ends at epoch 20"),
        (["--epochs", "5", "--decreasing_lr", "3"], "--warmup 20 takes up the whole round (--epochs 5)"),
        (["--lr", "0.5"], "may be unstable"),
        (["--penalty", "decoupled", "--reg_upper_limit", "2", "--reg_granularity_prune", "2"], "may be unstable"),
        (["--fillback_rate", "0.1"], "--fillback_rate has no effect in this run: it is only used with --struct refill"),
        (["--fc"], "--fc has no effect"),
        (
            ["--sorting_mode", "global"],
            "--sorting_mode has no effect in this run: it is only used with --vit_structured",
        ),
        (["--arch", "vit_tiny", "--vit_structured", "--mlp_prune_ratio", "0.3"], "--mlp_prune_ratio has no effect"),
        (["--struct", "refill", "--exponents", "2"], "--exponents has no effect"),
        (["--criteria", "magnitude", "--criteria_batches", "2"], "--criteria_batches has no effect"),
        (["--preset", "as_documented"], "almost no effect"),
        (
            ["--arch", "vit_tiny", "--vit_structured", "--rate", "0.3"],
            "--rate_mode target: rounds 1 to 19 all have the same density, because --rate is a share of the original "
            "network. For a network that becomes smaller in every round, use --rate_mode round",
        ),
        (["--rate_mode", "target", "--pruning_times", "3"], "rounds 1 to 2 all have the same density"),
    ],
)
def test_what_is_doubtful_gets_a_warning(words, part):
    assert any(part in w for w in parse_args(words).warnings)


def test_a_sound_command_gets_no_warning():
    words = ["--arch", "vit_tiny", "--vit_structured", "--decreasing_lr", "91", "--vit_prune_target", "both"]
    assert parse_args([*words, "--pruning_times", "2"]).warnings == []
    words += ["--rate_mode", "round"]
    assert parse_args(words).warnings == []
    assert (
        parse_args([*words, "--RST_schedule", "exp_custom", "--reg_granularity_prune", "0.01", "--lr", "0.5"]).warnings
        == []
    )


def test_the_preset_sets_the_documents_text_and_explicit_flags_win():
    args = parse_args(["--preset", "as_documented", "--rsst_dead", "zero"])
    assert (args.rank_weights, args.reg_horizon, args.reg_guard) == ("initial", "documents", True)
    assert args.rsst_dead == "zero"


def test_defaults_that_depend_on_other_flags():
    assert parse_args([]).rate_mode == "round"
    for arch in ("vit_tiny", "timm/vit_tiny_patch16_224"):
        assert parse_args(["--arch", arch, "--struct", "omp", "--regroup"]).rate_mode == "round"
    vit = parse_args(["--arch", "vit_tiny", "--vit_structured", "--rate", "0.3", "--dataset", "digits"])
    assert (vit.rate_mode, vit.mlp_prune_ratio, vit.image_size) == ("target", 0.3, 16)
    assert parse_args(["--optimizer", "adamw"]).penalty == "auto"
    assert parse_args(["--optimizer", "adamw", "--penalty", "gradient"]).penalty == "gradient"
    assert parse_args(["--optimizer", "sgd"]).penalty == parse_args(["--penalty", "auto"]).penalty == "auto"
    assert parse_args(["--preset", "as_documented"]).penalty == "gradient"


@pytest.mark.parametrize(
    "words, parts",
    [
        ([], []),
        (["--RST_schedule", "x^2"], []),
        (["--RST_schedule", "exp"], ["--RST_schedule exp: lambda is the same as with exp_custom in this run"]),
        (["--exponents", "1"], ["exp_custom_exponents: lambda is the same as with exp and exp_custom in this run"]),
        (
            ["--RST_schedule", "x", "--reg_horizon", "documents"],
            ["the same as with x^2, x^3 and exp in", "--reg_upper_limit 1 caps lambda for 100% of each round"],
        ),
        (["--reg_granularity_prune", "4"], []),
        (["--RST_schedule", "x", "--reg_granularity_prune", "4"], ["caps lambda for 75% of each round"]),
        (["--preset", "as_documented"], []),
    ],
)
def test_a_schedule_that_is_no_choice_gets_a_warning(words, parts):
    said = warnings_of_lambda(parse_args(words), 351)
    assert len(said) == len(parts) and all(part in text for part, text in zip(parts, said, strict=True)), said


FILLS = ["--arch", "vit_tiny", "--vit_structured", "--struct", "refill", "--rate", "0.3", "--fillback_rate"]


@pytest.mark.parametrize(
    "words, said",
    [
        (
            [*FILLS, "0.1"],
            "--fillback_rate 0.1 keeps no head that would be pruned without it: of 3 heads in a layer, it is less than "
            "one. Use --sorting_mode global, or omit the flag",
        ),
        (
            [*FILLS, "0.01", "--sorting_mode", "global"],
            "of 27 heads in the network, it is less than one. Omit the flag",
        ),
        ([*FILLS, "0.1", "--sorting_mode", "global"], None),
        ([*FILLS, "1"], None),
        ([*FILLS, "0.1", "--vit_prune_target", "mlp"], None),
        ([*FILLS, "0.1", "--vit_prune_target", "both"], "keeps no head"),
        ([*FILLS, "0.5"], "keeps no head"),
        ([*FILLS, "0.5", "--rate_mode", "round"], None),
        ([*FILLS, "0.5", "--rate_mode", "round", "--pruning_times", "2"], "keeps no head"),
        (["--struct", "refill", "--fillback_rate", "0.1"], None),
    ],
)
def test_a_fillback_of_less_than_a_unit_gets_a_warning(words, said):
    args = parse_args(words)
    groups = unit_groups(build_model(args.arch, 10, 32))
    found = warnings_of_fillback(rules_from(args, groups), groups, args.pruning_times)
    assert len(found) == (said is not None) and all(str(said) in text for text in found), found


def test_settings_of_before_are_understood_as_what_they_computed():
    before = settings_of(parse_args(["--RST_schedule", "x"]))
    assert as_understood_now(before) == before and before.pop(LAMBDA_FOLLOWS) == "progress"
    assert as_understood_now(before)["reg_horizon"] == "documents"
    for words in (["--RST_schedule", "exp_custom"], ["--struct", "refill", "--RST_schedule", "x"]):
        settings = settings_of(parse_args([*words]))
        assert as_understood_now(settings) == settings and LAMBDA_FOLLOWS not in settings
    literal = settings_of(parse_args(["--RST_schedule", "x", "--reg_horizon", "documents"]))
    assert identity_of(literal) == identity_of(as_understood_now(before)) != identity_of(before)
    preset = {"rank_weights": "initial", "rsst_dead": "free", "reg_horizon": "epoch", "reg_guard": True}
    ours = identity_of(settings_of(parse_args(["--preset", "as_documented"])))
    assert {k: ours[k] for k in preset} == preset, "what it was in 0.1"


def test_the_run_folder_is_named_by_what_is_computed():
    names = {
        default_run_folder(parse_args(w)) for w in ([], ["--rate", "0.3"], ["--seed", "1"], ["--struct", "refill"])
    }
    assert len(names) == 4
    same = [[], ["--verbose"], ["--wandb", "disabled"], ["--pruning_times", "3"], ["--rate_mode", "round"]]
    assert len({default_run_folder(parse_args(w)) for w in same}) == 1
    assert default_run_folder(parse_args([])).startswith("cifar100_rsst_output_res20s_l1_")


def test_an_experiment_of_another_name_is_another_run():
    plain, mine, yours = (default_run_folder(parse_args(w)) for w in ([], ["--exp_name=a b"], ["--exp_name=a/b"]))
    assert len({plain, mine, yours}) == 3 and "_seed0_a-b_" in mine and "_seed0_a-b_" in yours
    assert len(default_run_folder(parse_args(["--exp_name", "x" * 500]))) < 100


def test_identity_leaves_out_only_what_changes_no_result():
    settings = settings_of(parse_args([]))
    changed = {"rate": 0.3, "seed": 1, "epochs": 5, "struct": "refill", "precision": "fp32", "verbose": True}
    assert identity_of({**settings, **changed}).keys() >= changed.keys() - {"verbose"}
    assert "momentum" not in identity_of(settings), "defaults are left out: a new flag must not orphan older runs"


def test_tracker_names_are_the_documents():
    args = parse_args(["--arch", "vit_tiny", "--vit_structured", "--criteria", "magnitude", "--rate", "0.3"])
    assert tracker_name(args, "0116_1200") == (
        "rsst_vit_tiny_cifar100_sched_exp_custom_exponents_reg_1.0_exp4_crit_magnitude_rate_0.3_struct_head_0116_1200"
    )
    refill = parse_args(["--struct", "refill", "--fillback_rate", "0.1"])
    assert tracker_name(refill, "t") == "refill_res20s_cifar100_fill_0.1_crit_l1_rate_0.2_t"
    assert tracker_name(parse_args(["--exp_name", "mine"]), "t") == "mine"


def test_errors_are_raised_not_printed():
    with pytest.raises(UsageError):
        parse_args(["--lr", "x"])
