"""Reports: numbers that are right, files that others can read, and a page that works in a real browser."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
import torch
from helpers.commands import ROOT, run, tiny
from helpers.report_data import DENSITIES, SEEDS, accuracy, epoch_row, write_run, write_sweep

from structured_tickets.base.atomic_files import lock
from structured_tickets.base.measured_time import MeasuredTime
from structured_tickets.base.text_tables import counted
from structured_tickets.programs import report
from structured_tickets.reports import latency, style
from structured_tickets.reports.collection import collect
from structured_tickets.reports.comparisons import (
    Comparison,
    adjusted,
    against_dense,
    among,
    best_by_validation,
    cell_by_cell,
    lead,
    main_effects,
    not_compared,
    with_test,
)
from structured_tickets.reports.figures import accuracy_figures, cost_figure, kept_figure, penalty_figures, roles_of
from structured_tickets.reports.page import FIGURE_FILES, TABLE_FILES
from structured_tickets.reports.runs import short_names, worded
from structured_tickets.reports.sentences import weak_penalties
from structured_tickets.reports.sweep_tables import Table, groups_table, runs_table, spread
from structured_tickets.runs.read import read_metrics, read_rounds
from structured_tickets.runs.rows import EMA

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def draw_no_png(patch):
    patch.setattr("structured_tickets.reports.page.as_png", lambda figure: b"")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report of a made-up sweep, one of whose runs has failed."""
    path = write_sweep(tmp_path_factory.mktemp("sweep") / "a <sweep>", broken=[("refill", "remain", 2)])
    with pytest.MonkeyPatch.context() as patch:
        draw_no_png(patch)
        assert report.main([str(path), "--latency", "false"]) == 0
    return path / "report"


@pytest.fixture
def without_png(monkeypatch):
    """Figures are drawn as the page needs them, but not once more as the files besides, where only the text matters."""
    draw_no_png(monkeypatch)


def made_up(*differences, p=math.nan, adjusted=math.nan, densities=(50.0, 50.0)):
    low, high = (min(differences) - 1, max(differences) + 1) if len(differences) > 1 else (math.nan, math.nan)
    return Comparison("one", "other", "last round", tuple(differences), densities, p, low, high, adjusted)


# What is said


def test_a_paired_test_is_scipys():
    from scipy import stats  # which takes longer to import than the test

    ones, others = [81.0, 82.5, 80.0, 83.0], [80.2, 80.1, 79.9, 81.0]
    found = with_test(made_up(*(a - b for a, b in zip(ones, others, strict=True))))
    wanted = stats.ttest_rel(ones, others)
    interval = wanted.confidence_interval(0.95)
    assert found.p == pytest.approx(wanted.pvalue)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_a_paired_test_by_hand():
    """Differences 1, 2, 3: t = 2 / (1 / sqrt(3)), two degrees of freedom: p = 1 - t / sqrt(t^2 + 2)."""
    t = 2 * math.sqrt(3)
    found = with_test(made_up(1.0, 2.0, 3.0))
    assert found.p == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert (found.low, found.high) == (
        pytest.approx(2 - 4.30265 / math.sqrt(3), abs=1e-4),
        pytest.approx(2 + 4.30265 / math.sqrt(3), abs=1e-4),
    )


def test_holms_method_by_hand(monkeypatch):
    values = iter([0.01, 0.04, 0.03])
    monkeypatch.setattr(
        "structured_tickets.reports.comparisons.with_test", lambda c: made_up(*c.differences, p=next(values))
    )
    assert [c.adjusted for c in adjusted([made_up(1.0, 2.0)] * 3)] == [0.03, 0.06, 0.06]


@pytest.mark.parametrize(
    "comparison, said",
    [
        (
            made_up(1.0, 2.0, 3.0, adjusted=0.01),
            "one is better than other with 3 seeds: by +2.00 points (95% interval +0.00 to +4.00, adjusted p = 0.01); last round.",
        ),
        (
            made_up(-1.0, -2.0, -3.0, adjusted=0.0001),
            "other is better than one with 3 seeds: by +2.00 points (95% interval +0.00 to +4.00, adjusted p < 0.001); last round.",
        ),
        (
            made_up(1.0, -1.0, 3.0, adjusted=0.4),
            "No difference can be seen between one and other with 3 seeds: +1.00 points (95% interval −2.00 to +4.00, adjusted p = 0.4); "
            "last round.",
        ),
        (made_up(1.5), "One seed says nothing about the difference between one and other: +1.50 points; last round."),
        (
            made_up(1.5, densities=(50.0, 30.0)),
            "One seed says nothing about the difference between one and other: +1.50 points; "
            "last round. They differ in density, too: one has 50.0%, other 30.0%.",
        ),
    ],
)
def test_plain_sentences(comparison, said):
    assert comparison.sentence == said


def test_differences_without_spread_are_no_proof():
    same, always = adjusted([made_up(0.0, 0.0, 0.0), made_up(1.0, 1.0, 1.0)])
    assert same.p == 1 and not same.is_seen
    assert math.isnan(always.p) and not always.is_seen
    assert always.sentence.startswith(
        "one and other differ by +1.00 points in each of 3 seeds, which leaves nothing to test"
    )


def test_effects_are_paired_over_seeds_and_averaged_over_the_rest(tmp_path):
    collection = collect(write_sweep(tmp_path / "s"))
    effects = {(c.first, c.second): c for c in main_effects(collection)}
    found = effects["struct=rsst", "struct=refill"]
    mean = {
        s: [statistics.fmean(accuracy(s, c, seed, 2) for c in ("l1", "remain")) for seed in SEEDS]
        for s in ("rsst", "refill")
    }
    assert found.differences == pytest.approx([a - b for a, b in zip(mean["rsst"], mean["refill"], strict=True)])
    assert set(effects) == {("struct=rsst", "struct=refill"), ("criteria=l1", "criteria=remain")}
    cells = cell_by_cell(collection, "struct")
    assert [(c.first, c.second, c.where) for c in cells] == [
        ("rsst", "refill", "criteria=l1"),
        ("rsst", "refill", "criteria=remain"),
    ]
    dense = against_dense(collection)
    wanted = [accuracy("rsst", "l1", s, 2) - accuracy("rsst", "l1", s, 0) for s in SEEDS]
    assert dense[0].differences == pytest.approx(wanted) and dense[0].densities == (DENSITIES[2], 100.0)


def test_a_seed_that_one_side_lacks_is_in_no_pair(tmp_path):
    collection = collect(write_sweep(tmp_path / "s", broken=[("refill", "l1", 1)]))
    by_cell = {c.where: c.seeds for c in cell_by_cell(collection, "struct")}
    assert by_cell == {"criteria=l1": 2, "criteria=remain": 3}
    assert {c.seeds for c in main_effects(collection)} == {2}


def test_a_setting_that_lacks_most_seeds_is_left_out_of_means(tmp_path):
    collection = collect(write_sweep(tmp_path / "s", broken=[("refill", "l1", 1), ("refill", "l1", 2)]))
    found = main_effects(collection)[0]
    assert found.seeds == 3 and found.where == (
        "last round, criteria=remain, without criteria=l1 (a value or a seed is missing there)"
    )
    wanted = [accuracy("rsst", "remain", s, 2) - accuracy("refill", "remain", s, 2) for s in SEEDS]
    assert found.differences == pytest.approx(wanted)


def test_a_flag_that_one_side_does_not_read_is_averaged(tmp_path):
    """RSST with two schedules against Refill, which has none."""
    path = write_sweep(tmp_path / "s")
    record = json.loads((path / "sweep.json").read_text())
    record["axes"] = ["struct", "RST_schedule", "seed"]
    for each in record["jobs"]:
        criterion = each["settings"].pop("criteria")
        if each["settings"]["struct"] == "rsst":
            each["settings"]["RST_schedule"] = {"l1": "x", "remain": "x^2"}[criterion]
    record["jobs"] = [j for j in record["jobs"] if j["name"].startswith("rsst") or "l1" in j["name"]]
    (path / "sweep.json").write_text(json.dumps(record))
    found = {(c.first, c.second): c for c in main_effects(collect(path))}
    wanted = [
        statistics.fmean(accuracy("rsst", c, s, 2) for c in ("l1", "remain")) - accuracy("refill", "l1", s, 2)
        for s in SEEDS
    ]
    assert found["struct=rsst", "struct=refill"].differences == pytest.approx(wanted)
    assert ("RST_schedule=x", "RST_schedule=x^2") in found


def test_settings_that_follow_others_are_no_axes(tmp_path):
    for k, rate in enumerate((0.2, 0.3)):
        folder = tmp_path / str(k)
        args = {**write_run(folder, "rsst", "l1", 0), "rate": rate, "mlp_prune_ratio": rate}
        (folder / "args.yaml").write_text(json.dumps(args))
        (folder / "env.json").write_text(json.dumps({"command": ["main_imp_fillback.py", f"--rate={rate}"]}))
    assert collect(tmp_path).axes == ["rate"]


def write_folder(path, *runs):
    """Runs without a sweep: (settings, what env.json holds besides)."""
    for k, (settings, environment) in enumerate(runs):
        folder = path / str(k)
        args = {**write_run(folder, "rsst", "l1", settings.get("seed", 0)), **settings}
        (folder / "args.yaml").write_text(json.dumps(args))
        (folder / "env.json").write_text(json.dumps({"command": ["notebook.py"], **environment}))
    return path


def test_settings_that_no_command_names_are_told_apart(tmp_path):
    path = write_folder(
        tmp_path, *(({"rate": r, "mlp_prune_ratio": r, "seed": s}, {}) for r in (0.1, 0.6) for s in (0, 1))
    )
    collection = collect(path)
    assert collection.axes == ["rate"] and [len(g.runs) for g in collection.groups] == [2, 2]
    seeds = write_folder(tmp_path / "b", ({"rate": 0.1, "seed": 0}, {}), ({"rate": 0.6, "seed": 1}, {}))
    assert len(collect(seeds).groups) == 2, "nothing follows from a seed"


@pytest.mark.usefixtures("without_png")
@pytest.mark.parametrize(
    "key, name",
    [
        ("data", "images"),
        pytest.param("network", "network", marks=pytest.mark.slow),
    ],
)
def test_runs_that_saw_other_images_or_trained_another_network_are_told_apart(key, name, tmp_path):
    path = write_sweep(tmp_path / "s")
    for folder in path.glob("runs/*"):
        value = "a" * 16 if folder.name.endswith("2") else "b" * 16
        environment = json.loads((folder / "env.json").read_text()) | {key: value}
        (folder / "env.json").write_text(json.dumps(environment))
    collection = collect(path)
    assert collection.axes == ["struct", "criteria", name]
    assert sorted(len(g.runs) for g in collection.groups) == [1] * 4 + [2] * 4
    (note,) = collection.notes
    assert f"{name}=aaaaaaaa and bbbbbbbb are told apart" in note
    assert report.main([str(path), "--latency", "false"]) == 0
    assert note.replace("'", "&#39;") in (path / "report" / "index.html").read_text()


def test_image_folders_of_older_runs_are_told_apart_by_their_place(tmp_path):
    photos = [({"dataset": "imagefolder", "data": d, "seed": s}, {}) for d in ("one", "other") for s in (0, 1)]
    assert [g.settings for g in collect(write_folder(tmp_path, *photos)).groups] == [
        {"images": "one"},
        {"images": "other"},
    ]


def test_the_same_run_twice_is_one_seed(tmp_path):
    collection = collect(write_folder(tmp_path, *(({"seed": s}, {}) for s in (0, 1, 0, 0))))
    assert [r.seed for r in collection.groups[0].runs] == [0, 1]
    assert collection.notes == ["Left out, since another run has the same settings and seed: 2, 3."]
    assert len(collection.runs) == 4


def test_only_the_rounds_that_the_sweep_wants_count(tmp_path):
    path = write_sweep(tmp_path / "s")
    record = json.loads((path / "sweep.json").read_text())
    for job in record["jobs"]:
        job["rounds"] = 2
    (path / "sweep.json").write_text(json.dumps(record))
    collection = collect(path)
    assert {len(r.rounds) for r in collection.runs} == {2} and all(r.finished for r in collection.runs)
    assert {c.densities[0] for c in against_dense(collection)} == {DENSITIES[1]}
    assert all(row[2] < 2 for row in groups_table(collection).rows)


@pytest.mark.usefixtures("without_png")
def test_a_broken_seed_hides_no_round_of_the_others(tmp_path, recwarn):
    path = write_sweep(tmp_path / "s", broken=[("rsst", "l1", 0)])
    table = groups_table(collect(path))
    rows = [r for r in table.rows if r[:2] == ["rsst", "l1"]]
    assert [(r[2], r[-1]) for r in rows] == [(0, 3), (1, 2), (2, 2)]
    assert report.main([str(path), "--latency", "false"]) == 0
    whole = write_sweep(tmp_path / "none", broken=[("rsst", c, s) for c in ("l1", "remain") for s in SEEDS])
    assert report.main([str(whole), "--latency", "false"]) == 0
    assert not recwarn.list


@pytest.mark.usefixtures("without_png")
def test_the_best_is_one_of_those_with_the_most_seeds_and_the_page_says_how_many(tmp_path):
    path = write_sweep(tmp_path / "s", broken=[("rsst", c, s) for c in ("l1", "remain") for s in (0, 1)])
    best = best_by_validation(collect(path))
    assert best.group.settings["struct"] == "refill" and len(best.rows) == 3
    assert report.main([str(path), "--latency", "false"]) == 0
    text = (path / "report" / "index.html").read_text()
    assert "(3 seeds) with 36.0% of the prunable weights" in text
    assert "is the best by validation accuracy in its last round of the settings with 3 seeds: it reaches" in text
    assert among(collect(write_sweep(tmp_path / "whole"))) == ""


def test_the_lead_of_the_best_is_compared_with_the_scatter(tmp_path):
    """Three seeds of l1 and of remain whose means differ by less than the seeds of either."""
    path = write_sweep(tmp_path / "s")
    means = {c: [accuracy("rsst", c, s, 2) + 1 for s in SEEDS] for c in ("l1", "remain")}
    scatter = max(map(statistics.stdev, means.values()))
    ahead = statistics.fmean(means["remain"]) - statistics.fmean(means["l1"])
    first, second = ("remain", "l1") if ahead > 0 else ("l1", "remain")
    assert best_by_validation(collect(path)).group.title == f"struct=rsst criteria={first}" and abs(ahead) < scatter
    said = (
        f"{abs(ahead):.2f} points of validation accuracy ahead of struct=rsst criteria={second}: within the scatter of "
    )
    assert lead(collect(path)) == f"{said}the seeds (± {scatter:.2f})"
    for file in path.glob(f"runs/rsst_{second}_*/args.yaml"):
        (file.parent / "result.json").unlink()
    assert "ahead of struct=refill" in lead(collect(path)) and ": more than the scatter" in lead(collect(path))
    one = write_folder(tmp_path / "one", ({"struct": "rsst"}, {}), ({"struct": "refill"}, {}))
    assert lead(collect(one)).endswith("struct=refill, with one seed each: nothing is known of the scatter")
    assert lead(collect(one / "0")) == ""


def test_a_search_is_judged_within_its_limits(tmp_path):
    """Every round is worse than the one before, so that without limits the dense one would be best."""
    path = write_sweep(tmp_path / "s")
    record = json.loads((path / "sweep.json").read_text())
    for limits, state in (({"density": 60, "macs": None}, 1), ({"density": None, "macs": 15.0}, 2)):
        (path / "sweep.json").write_text(json.dumps({**record, "limits": limits}))
        best = best_by_validation(collect(path))
        assert {r["round"] for r in best.rows} == {state}
        assert best.where == f"round {state}, its best within the limits"
    (path / "sweep.json").write_text(json.dumps({**record, "limits": {"density": 1, "macs": None}}))
    assert best_by_validation(collect(path)) is None


def test_values_that_are_never_alone_different_are_said(tmp_path):
    path = write_sweep(tmp_path / "s")
    record = json.loads((path / "sweep.json").read_text())
    record["jobs"] = [
        j
        for j in record["jobs"]
        if j["settings"]["criteria"] == {"rsst": "l1", "refill": "remain"}[j["settings"]["struct"]]
    ]
    (path / "sweep.json").write_text(json.dumps(record))
    assert not_compared(collect(path)) == [
        "Not compared, since no two settings differ in one of them alone: struct, criteria."
    ]
    some = write_folder(
        tmp_path / "u", *(({"struct": s, "lr": lr}, {}) for s, lr in (("rsst", 0.1), ("rsst", 0.2), ("refill", 0.3)))
    )
    assert not_compared(collect(some)) == [
        "Not compared, since no two settings differ in one of them alone: struct, lr (0.1 and 0.3, 0.2 and 0.3)."
    ]
    assert not_compared(collect(write_sweep(tmp_path / "t"))) == []


def test_seeds_that_cells_share_are_compared_in_all_of_them(tmp_path):
    """Cells with seeds 0 to 2, and 1 to 3: two seeds in both are more than three in one."""
    broken = [("refill", "l1", 3), ("refill", "remain", 0)]
    found = main_effects(collect(write_sweep(tmp_path / "s", (0, 1, 2, 3), broken)))[0]
    assert found.seeds == 2 and "without" not in found.where


def test_unlike_runs_are_named_by_few_of_their_settings(tmp_path):
    unlike = (
        {"arch": f"/home/me/networks/{n}.py:Net", "pretrained": f"/data/{n}.pth", "lr": n, "epochs": n} for n in (1, 2)
    )
    command = {"command": ["main_imp_fillback.py", "--arch=a", "--pretrained=b", "--lr=1", "--epochs=1"]}
    collection = collect(write_folder(tmp_path, *((settings, command) for settings in unlike)))
    assert [g.title for g in collection.groups] == ["arch=1.py:Net", "arch=2.py:Net"]
    assert groups_table(collection).rows[0][0] == "/home/me/networks/1.py:Net" and len(collection.axes) == 4, (
        "tables have all of them"
    )


def test_a_number_is_the_same_word_however_it_is_written(tmp_path):
    runs = (({"exponents": e, "seed": s}, {}) for e, s in ((4, 0), (4.0, 1), (2.5, 0)))
    assert [g.title for g in collect(write_folder(tmp_path, *runs)).groups] == ["exponents=4", "exponents=2.5"]
    assert worded([0, 1.0, 2.5]) == "0,1,2.5" and worded(True) == "True" and worded(math.inf) == "inf"


def test_cells_without_a_value_are_a_dash():
    table = Table("t", "c", ["a", "b"], [[None, math.nan]])
    assert table.markdown().splitlines()[-1] == "| – | – |" and "None" not in table.latex()


def test_a_run_that_is_at_work_is_said_to_be(tmp_path):
    write_run(tmp_path / "run", "rsst", "l1", 0, rounds=1)
    (before,) = collect(tmp_path / "run").runs
    held = lock(tmp_path / "run" / "lock")
    (during,) = collect(tmp_path / "run").runs
    held.close()
    assert before.reason.startswith("interrupted") and during.reason == "running"


def test_labels_of_figures_may_hold_anything():
    from matplotlib.figure import Figure

    svg = style.for_page(style.as_svg(Figure()), 'a "b" <c> \\d', "x")
    assert ET.fromstring(svg).get("aria-label") == 'a "b" <c> \\d'


def test_what_is_chosen_is_chosen_by_validation(tmp_path):
    path = write_sweep(tmp_path / "s")
    for file in path.glob("runs/refill_l1_*/summary.csv"):
        rows = list(csv.DictReader(io.StringIO(file.read_text())))
        rows[-1] |= {"val_accuracy": "99.0", "test_accuracy": "10.0"}
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    best = best_by_validation(collect(path))
    assert best.group.title == "struct=refill criteria=l1" and best.rows[0]["test_accuracy"] == 10.0


def test_hardened_accuracy_is_what_counts(tmp_path):
    table = groups_table(collect(write_sweep(tmp_path / "s")))
    row = next(r for r in table.rows if r[:3] == ["rsst", "l1", 2])
    values = [accuracy("rsst", "l1", s, 2) for s in SEEDS]
    assert row[table.head.index("test %")] == spread(values)
    assert row[table.head.index("test % soft")] == spread([v + 0.5 for v in values])


def test_weak_penalties_are_said(tmp_path):
    path = write_sweep(tmp_path / "s")
    assert weak_penalties(collect(path)) == []
    file = path / "runs" / "rsst_l1_0" / "summary.csv"
    file.write_text(file.read_text().replace(",0.02,", ",0.2,"))
    (said,) = weak_penalties(collect(path))
    assert said.startswith("In 1 of 6 RSST runs the penalty was weak: more than 5%")


def test_failed_runs_are_in_the_table_of_runs(tmp_path):
    table = runs_table(collect(write_sweep(tmp_path / "s", broken=[("refill", "l1", 1)])))
    states = [row[table.head.index("state")] for row in table.rows]
    assert len(states) == 12 and states.count("finished") == 11 and "loss is <not> finite" in states


def test_intervals_are_named_as_such(made):
    (head, *_) = csv.reader((made / "tables" / "effects.csv").open())
    assert head[3:6] == ["difference", "95% interval from", "95% interval to"]


def test_tables_as_files(made):
    rows = list(csv.reader((made / "tables" / "rounds.csv").open()))
    assert len(rows) == 1 + 11 * 3 + 1
    markdown = (made / "tables" / "summary.md").read_text().splitlines()
    assert {line.count("|") for line in markdown} == {markdown[0].count("|")}
    table = Table("x", "A table", ["a_b", "n"], [["50 % & more", 1.5], ["x|y", 2.0]])
    assert table.latex().splitlines()[1:-1] == [
        "\\begin{tabular}{lr}",
        "\\toprule",
        "a\\_b & n \\\\",
        "\\midrule",
        "50 \\% \\& more & 1.50 \\\\",
        "x|y & 2.00 \\\\",
        "\\bottomrule",
    ]
    assert "| x\\|y | 2.00 |" in table.markdown()


# What is drawn and written


def test_figures_are_pictures(made):
    pictures = sorted((made / "figures").glob("*.svg"))
    assert {p.stem for p in pictures} >= {
        "accuracy_density_0",
        "accuracy_density_1",
        "accuracy_macs_0",
        "lambda",
        "squeeze",
        "cost",
        "kept_0",
        "training_3",
    }
    for path in pictures:
        assert ET.fromstring(path.read_text()).tag.endswith("svg")


@pytest.mark.usefixtures("without_png")
def test_the_same_runs_give_the_same_page(made, tmp_path):
    assert report.main([str(made.parent), "--latency", "false", "--out", str(tmp_path)]) == 0
    for path in made.rglob("*.svg"):
        assert path.read_text() == (tmp_path / path.relative_to(made)).read_text()
    assert (made / "index.html").read_text() == (tmp_path / "index.html").read_text()


class Balanced(html.parser.HTMLParser):
    """Complains of tags that are not closed, and of what would be fetched."""

    VOID = ("meta", "input", "br", "link", "img")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.fetched = [], [], []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        for name in ("src", "href", "xlink:href"):
            if not found.get(name, "#").startswith("#"):
                self.fetched.append(found[name])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()


def test_the_page_is_whole_and_needs_nothing_else(made):
    text = (made / "index.html").read_text()
    parser = Balanced()
    parser.feed(text)
    assert parser.open == [] and parser.fetched == []
    assert len(parser.ids) == len(set(parser.ids)), "ids are unique, or figures would use each other's markers"
    for reference in re.findall(r'(?:href="#|url\(#)([^")]+)', text):
        assert reference in parser.ids, reference
    assert "a &lt;sweep&gt;" in text and "loss is &lt;not&gt; finite" in text
    assert "12 runs, 11 finished; 3 seeds, 4 settings" in text
    for colour in style.COLOURS:
        assert text.count(colour) <= 1, "figures take the page's colours"


def drawn_accuracies(path, seeds=SEEDS):
    """The first accuracy figure of a made-up sweep in which every network takes 10 ms, and repeats scatter to one side."""
    return next(accuracy_figures(collect(write_sweep(path, seeds)), "a", "ms", lambda *_: MeasuredTime(10, 9, 14)))


def test_nothing_that_is_drawn_lies_outside_the_axes(tmp_path):
    (axes,) = drawn_accuracies(tmp_path / "s").figure.axes
    low, high = axes.get_ylim()
    ys = [y for line in axes.lines for y in line.get_ydata()]
    bands = [p.get_paths()[0].get_extents() for p in axes.collections if p.__class__.__name__.startswith("Fill")]
    assert len(bands) == 2, "of three seeds a band is the standard deviation"
    assert low < min(*ys, *(band.y0 for band in bands)) and max(*ys, *(band.y1 for band in bands)) < high
    soft = statistics.fmean(accuracy("rsst", "l1", s, 1) + 0.5 for s in SEEDS)
    assert soft in [pytest.approx(y) for y in ys], "rings, too"


def test_two_seeds_have_no_band(tmp_path):
    (axes,) = drawn_accuracies(tmp_path / "s", (0, 1)).figure.axes
    assert not [p for p in axes.collections if p.__class__.__name__.startswith("Fill")]
    ends = [accuracy("rsst", "l1", s, 2) for s in (0, 1)]
    bars = [sorted(segment[:, 1]) for lines in axes.collections for segment in getattr(lines, "get_segments", list)()]
    assert sorted(ends) in [pytest.approx(bar) for bar in bars]


def test_bars_of_times_reach_as_far_both_ways(tmp_path):
    (axes,) = drawn_accuracies(tmp_path / "s").figure.axes
    ends = {tuple(segment[:, 0]) for c in axes.containers for lines in c.lines[2] for segment in lines.get_segments()}
    assert ends == {(6.0, 14.0)}


def test_dashes_can_be_told_apart_in_the_legend(tmp_path):
    (legend,) = drawn_accuracies(tmp_path / "s").figure.legends
    assert legend.numpoints == 2 and legend.handlelength > 4, "markers at the ends, dashes between"


def test_each_setting_has_a_name_in_the_figure_of_costs(tmp_path):
    (axes,) = cost_figure(collect(write_sweep(tmp_path / "s"))).figure.axes
    names = axes.get_legend_handles_labels()[1]
    assert names == [f"struct={s} criteria={c}" for s in ("rsst", "refill") for c in ("l1", "remain")]
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == 4


def test_epochs_are_whole_and_equal_dots_stand_side_by_side(tmp_path):
    strength, left = penalty_figures(collect(write_sweep(tmp_path / "s")))
    assert strength.name == "lambda" and all(t == int(t) for t in strength.figure.axes[0].get_xticks())
    one, other = (line.get_xdata() for line in left.figure.axes[0].lines[:2])
    assert other[0] - one[0] == pytest.approx(0.2) and (one[0] + other[0]) / 2 == pytest.approx(1)


@pytest.mark.usefixtures("without_png")
def test_nothing_is_drawn_of_doomed_weights_if_none_are_left(tmp_path):
    path = write_sweep(tmp_path / "s")
    for file in path.glob("runs/*/summary.csv"):
        file.write_text(file.read_text().replace(",0.02,", ",0.0,", 1).replace(",0.02,", ",0.00001,"))
    assert [drawn.name for drawn in penalty_figures(collect(path))] == ["lambda"]
    assert report.main([str(path), "--latency", "false"]) == 0
    assert "Less than 0.01% of their norm was left after any round" in (path / "report" / "index.html").read_text()


def test_colours_of_kept_units_have_a_key(tmp_path):
    group = collect(write_sweep(tmp_path / "s")).groups[0]
    key = kept_figure(group, "0").figure.axes[-1]
    assert [t.get_text() for t in key.get_xticklabels()] == ["0%", "50%", "100%"]
    assert key.get_xlabel() == "share of the dense network's units"


def test_short_names_tell_settings_apart():
    nets = [{"arch": f"/home/me/net.py:{n}", "lr": lr, "epochs": 2} for n, lr in (("A", 1), ("A", 2), ("B", 2))]
    assert short_names(nets) == ["arch=net.py:A lr=1", "arch=net.py:A lr=2", "arch=net.py:B lr=2"]
    assert short_names([{"arch": "/a/net.py:A"}, {"arch": "/b/net.py:A"}]) == ["arch=/a/net.py:A", "arch=/b/net.py:A"]
    assert short_names([{"struct": "rsst", "x": 1}, {"struct": "rsst", "x": 2}, {"struct": "refill"}]) == [
        "struct=rsst x=1",
        "struct=rsst x=2",
        "struct=refill",
    ]
    assert short_names([{}]) == [""] and short_names([]) == []


def test_methods_share_a_panel_and_rates_a_colour():
    roles = roles_of(["struct", "criteria", "rate"])
    assert (roles.colour, roles.panel, roles.dash) == (["struct"], ["criteria"], ["rate"])
    roles = roles_of(["arch", "control"])
    assert (roles.colour, roles.panel, roles.dash) == (["control"], ["arch"], [])
    assert roles_of([]).colour == []


@pytest.mark.usefixtures("without_png")
def test_a_single_run_and_a_folder_of_runs(tmp_path):
    write_run(tmp_path / "runs" / "one", "rsst", "l1", 0)
    write_run(tmp_path / "runs" / "two", "refill", "l1", 0)
    assert report.main([str(tmp_path / "runs" / "one"), "--latency", "false"]) == 0
    text = (tmp_path / "runs" / "one" / "report" / "index.html").read_text()
    assert "In its last round the run reaches" in text and "One seed says nothing" in text
    collection = collect(tmp_path / "runs")
    assert collection.axes == ["struct"] and [g.title for g in collection.groups] == ["struct=rsst", "struct=refill"]
    assert report.main([str(tmp_path / "runs"), "--latency", "false"]) == 0


def test_seeds_of_one_setting(tmp_path):
    """With the figures as PNG files, which the other tests leave out."""
    for seed in SEEDS:
        write_run(tmp_path / str(seed), "rsst", "l1", seed)
    assert report.main([str(tmp_path), "--latency", "false"]) == 0
    collection = collect(tmp_path)
    assert collection.axes == [] and len(collection.groups) == 1 and len(collection.groups[0].runs) == 3
    assert "3 seeds" in (tmp_path / "report" / "index.html").read_text()
    drawn = {s: sorted((tmp_path / "report" / "figures").glob(f"*.{s}")) for s in ("svg", "png")}
    assert drawn["png"] and [p.stem for p in drawn["png"]] == [p.stem for p in drawn["svg"]]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in drawn["png"])


@pytest.mark.usefixtures("without_png")
def test_several_folders_are_compared(tmp_path, monkeypatch, capsys):
    for name, struct in (("one", "rsst"), ("other", "refill"), ("third", "imp")):
        write_run(tmp_path / name, struct, "l1", 0)
    monkeypatch.chdir(tmp_path)
    assert report.main(["one", "other", "--latency", "false"]) == 0
    page = tmp_path / capsys.readouterr().out.strip()
    assert re.fullmatch(r"report_output_[0-9a-f]{8}", page.parent.name)
    text = page.read_text()
    assert (
        "<title>one, other</title>" in text and "between struct=rsst and struct=refill" in text and "=imp" not in text
    )
    assert report.main(["other", str(tmp_path / "one"), "--latency", "false"]) == 0
    assert tmp_path / capsys.readouterr().out.strip() == page, "the same folders in another order"
    assert report.main(["one", "one/", "--latency", "false"]) == 0
    assert capsys.readouterr().out.strip() == "one/report/index.html"
    assert report.main(["one", "nowhere"]) == 3
    assert "nowhere holds neither a run nor a sweep" in capsys.readouterr().err


def test_sweeps_and_runs_are_put_together_each_run_once(tmp_path):
    sweep = write_sweep(tmp_path / "s", broken=[("refill", "l1", 1)])
    write_run(tmp_path / "more" / "rsst_l1_0", "imp", "l1", 0)
    collection = collect(sweep, sweep / "runs" / "rsst_l1_0", tmp_path / "more")
    assert len(collection.runs) == 13 and sorted(collection.axes) == ["criteria", "struct"]
    names = {run.name for run in collection.runs}
    assert len(names) == 13 and {"s/runs/rsst_l1_0", "more/rsst_l1_0"} < names
    assert {run.reason for run in collection.runs} == {"", "loss is <not> finite"}


def test_a_folder_without_runs_is_refused_before_anything_slow_is_imported(tmp_path):
    code = (
        "import sys\nfor name in ('torch', 'matplotlib', 'scipy', 'jinja2'):\n    sys.modules[name] = None\n"
        "from structured_tickets.programs.report import main\nsys.exit(main(sys.argv[1:]))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 3 and ended.stderr == f"error: {tmp_path} holds neither a run nor a sweep\n"


def test_runs_that_lie_deeper_are_named(tmp_path, capsys):
    write_sweep(tmp_path / "s", (0,))
    assert report.main([str(tmp_path)]) == 3
    inner = [str(tmp_path / "s" / "runs" / f"{s}_{c}_0") for s in ("refill", "rsst") for c in ("l1", "remain")]
    said = f"error: {tmp_path} holds neither a run nor a sweep. Its runs: {', '.join(inner[:3])} and 1 more\n"
    assert capsys.readouterr().err == said


@pytest.mark.usefixtures("without_png")
def test_pictures_that_are_no_more_made_are_removed_and_those_of_others_kept(tmp_path):
    write_run(tmp_path / "one", "rsst", "l1", 0)
    folder = tmp_path / "one" / "report"
    (folder / "figures").mkdir(parents=True)
    (folder / "tables").mkdir()
    old = [folder / "figures" / n for n in ("accuracy_latency.svg", "kept_7.png")] + [folder / "tables" / "effects.tex"]
    own = [folder / "figures" / n for n in ("cost_mine.svg", "kept_7.pdf", "notes.txt")] + [folder / "cost.png"]
    link = folder / "figures" / "kept_8.png"
    link.symlink_to(own[0])
    for file in (*old, *own):
        file.touch()
    assert report.main([str(tmp_path / "one"), "--latency", "false"]) == 0
    assert not any(file.exists() for file in old) and all(file.exists() for file in (*own, link))


def test_all_that_a_report_writes_would_be_removed(made):
    written = [p.name for p in (made / "figures").iterdir()], [p.name for p in (made / "tables").iterdir()]
    for names, pattern in zip(written, (FIGURE_FILES, TABLE_FILES), strict=True):
        assert names and all(pattern.fullmatch(name) for name in names)


def test_each_network_of_a_user_is_meant_by_one_arch():
    one, other = "/old/net.py:Net", "/old/vit.py:Vit"
    assert latency.confirmed(["res20s", one, other], []) == {}
    assert latency.confirmed([one, other, one], [one]) == {one: one}
    assert latency.confirmed([one, other], ["/new/net.py:Net", other]) == {one: "/new/net.py:Net", other: other}
    assert latency.confirmed([one], ["/new/renamed.py:Net"]) == {one: "/new/renamed.py:Net"}
    assert latency.confirmed([one, other], ["/new/renamed.py:Net"]) == {}, "it could be either"
    assert latency.confirmed(["/a/net.py:Net", "/b/net.py:Net"], ["/b/net.py:Net"]) == {
        "/b/net.py:Net": "/b/net.py:Net"
    }


@pytest.mark.usefixtures("without_png")
def test_networks_of_a_user_are_named_once_each_and_not_run(tmp_path, capsys):
    for k, (name, seed) in enumerate((n, s) for n in ("a", "b") for s in (0, 1)):
        args = write_run(tmp_path / str(k), "rsst", "l1", seed)
        (tmp_path / str(k) / "args.yaml").write_text(json.dumps({**args, "arch": f"{tmp_path}/{name}.py:Net"}))
        for state in range(3):
            (tmp_path / str(k) / f"{state}checkpoint.pth.tar").touch()
    assert report.main([str(tmp_path)]) == 0
    said = "warning: no latency of a network from your file, whose code would be run. Confirm with --arch"
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == [f"{said} {tmp_path}/{name}.py:Net" for name in ("a", "b")]
    (tmp_path / "a.py").touch()
    assert report.main([str(tmp_path), "--arch", f"{tmp_path}/a.py:Net"]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 + 3 and warnings[0].endswith("b.py:Net"), (
        "files that hold no checkpoint are another matter"
    )


@pytest.mark.parametrize(
    "file, content, said",
    [
        ("args.yaml", "a: [\n", "cannot read"),
        ("summary.csv", "round\nx\n", "cannot read"),
        ("metrics.jsonl", "{\n", "cannot read"),
        ("result.json", "{", "cannot read"),
        ("sweep.json", "{", "cannot read"),
        ("summary.csv", "", "has finished a round"),
        ("args.yaml", None, "holds neither a run nor a sweep"),
    ],
)
def test_what_cannot_be_reported_is_named(file, content, said, tmp_path, capsys):
    write_run(tmp_path / "run", "rsst", "l1", 0)
    path = tmp_path / "run" / file
    path.unlink() if content is None else path.write_text(content)
    assert report.main([str(tmp_path / "run")]) == 3
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_rows_that_are_being_written_are_left_out(tmp_path):
    row = epoch_row("rsst", 0, 0, 50.0)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + '\n{"epo')
    assert read_metrics(tmp_path) == [row]


@pytest.mark.usefixtures("without_png")
def test_a_real_run_is_read_as_it_was_written_and_measured_once(tmp_path, monkeypatch):
    for struct in ("rsst", "refill"):
        assert run(*tiny(tmp_path / struct, struct=struct)) == 0
    rows = read_rounds(tmp_path / "rsst")
    saved = torch.load(tmp_path / "rsst" / "1checkpoint.pth.tar", weights_only=True)["rounds"]
    assert rows == [{k: v for k, v in row.items() if k not in EMA} for row in saved], "there are no averaged weights"
    measured = []
    real = latency._measure
    monkeypatch.setattr(latency, "_measure", lambda places, archs: measured.append(len(places)) or real(places, archs))
    for _ in range(2):
        assert report.main([str(tmp_path)]) == 0
    shapes = {latency._shape(r, k) for r in collect(tmp_path).runs for k in range(2)}
    assert measured == [len(shapes)], "the dense network once for both, and nothing the second time"
    kept = json.loads((tmp_path / "report" / "latency.json").read_text())["milliseconds"]
    assert all(0 < low <= median <= high for median, low, high in kept.values())
    assert (tmp_path / "report" / "figures" / "accuracy_latency.svg").exists()
    page = (tmp_path / "report" / "index.html").read_text()
    section = re.search(r'<h2 id="curves">(.*?)<h2 ', page, re.DOTALL)
    assert section and section[1].count("<figure>") == 3, "one curve each: side by side"
    assert "repeats scatter" in section[1] or "Horizontal bars hold the middle half" in section[1]


@pytest.mark.usefixtures("without_png")
def test_rounds_without_a_checkpoint_are_named_once(tmp_path, capsys):
    for struct in ("rsst", "refill"):
        assert run(*tiny(tmp_path / struct, struct=struct, pruning_times=3, keep_checkpoints=1)) == 0
    capsys.readouterr()
    assert report.main([str(tmp_path)]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    shapes = {latency._shape(r, 1) for r in collect(tmp_path).runs}
    assert warnings == [f"warning: no latency of {counted(len(shapes), 'network')}, whose checkpoints are not kept"]


# In a browser


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def opened(browser, made):
    """Open the page under some conditions; errors and requests are collected."""
    contexts, seen = [], []

    def open_page(**conditions):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **conditions})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("console", lambda message: seen.append(message.text) if message.type in ("error", "warning") else None)
        page.on("request", lambda request: None if request.url.startswith("file:") else seen.append(request.url))
        page.goto((made / "index.html").as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert seen == []


def column(page, table, name):
    k = page.locator(f"#{table} thead th").all_inner_texts().index(name)
    return [row.split("\t")[k] for row in page.locator(f"#{table} tbody tr:not([hidden])").all_inner_texts()]


@pytest.mark.slow
def test_the_runs_can_be_sorted(opened):
    page = opened()
    for name, read in (("test %", float), ("seed", float), ("struct", str)):
        button = page.locator("#runs thead button", has_text=name).first
        button.click()
        assert column(page, "runs", name) == sorted(column(page, "runs", name), key=read)
        button.click()
        assert column(page, "runs", name) == sorted(column(page, "runs", name), key=read, reverse=True)
        assert page.locator("#runs th[aria-sort=descending]").count() == 1


@pytest.mark.slow
def test_the_runs_can_be_filtered(opened):
    page = opened()
    box = page.locator("input[data-filters=runs]")
    box.fill("REFILL remain")
    assert column(page, "runs", "struct") == ["refill"] * 3
    assert page.locator("#runs-count").inner_text() == "3 of 12"
    box.fill("finite")
    assert len(column(page, "runs", "struct")) == 1
    box.fill("")
    assert len(column(page, "runs", "struct")) == 12


@pytest.mark.slow
def test_it_can_be_read_on_a_phone(opened):
    page = opened(viewport={"width": 390, "height": 844}, is_mobile=True, device_scale_factor=2, has_touch=True)
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for box in page.locator("figure svg").evaluate_all("all => all.map(e => e.getBoundingClientRect().width)"):
        assert 300 <= box <= 390


@pytest.mark.slow
def test_figures_are_side_by_side_on_a_desk(opened):
    page = opened(viewport={"width": 1280, "height": 900})
    grids = page.locator("main > .figures").evaluate_all(
        "all => all.map(e => [...e.children].map(f => Math.round(f.getBoundingClientRect().top)))"
    )
    shared = [len(tops) for tops in grids if len(tops) > 1 and len(set(tops)) == 1]
    assert shared, "a row of several figures"


@pytest.mark.slow
def test_it_is_dark_where_the_reader_wants_it(opened):
    def luminance(page, selector, value):
        colour = page.locator(selector).first.evaluate(f"e => getComputedStyle(e).{value}")
        channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for scheme in ("light", "dark"):
        page = opened(color_scheme=scheme)
        paper = luminance(page, "body", "backgroundColor")
        assert paper > 0.9 if scheme == "light" else paper < 0.05
        for selector, value in (("body", "color"), (".note", "color"), ("a", "color"), ("figure svg text", "fill")):
            ink = luminance(page, selector, value)
            contrast = (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)
            assert contrast >= 4.5, (scheme, selector, contrast)


@pytest.mark.slow
def test_a_screenshot_shows_the_curves(opened, tmp_path):
    """Each series' colour is really there, in a figure that is not blank."""
    from PIL import Image

    page = opened()
    page.locator("main .figures figure svg").first.screenshot(path=str(tmp_path / "figure.png"))
    picture = Image.open(tmp_path / "figure.png").convert("RGB")
    colours = {c for _, c in picture.getcolors(picture.size[0] * picture.size[1])}
    for wanted in style.COLOURS[:2]:
        assert tuple(int(wanted[k : k + 2], 16) for k in (1, 3, 5)) in colours
