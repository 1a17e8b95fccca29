"""A sweep as its files would be, made up: no training."""

from __future__ import annotations

import csv
import itertools
import json

import yaml

SETTINGS = {"struct": ("rsst", "refill"), "criteria": ("l1", "remain")}
SEEDS = (0, 1, 2)
DENSITIES = (100.0, 60.0, 36.0)
LAYERS = {"blocks.0.attn.qkv": 3, "blocks.1.attn.qkv": 3, "blocks.0.mlp.fc1": 384, "blocks.1.mlp.fc1": 384}


def accuracy(struct, criteria, seed, state) -> float:
    """RSST better than Refill by 2 points, give or take a little; criteria alike but for noise; pruning costs a point."""
    noise = ((seed * 7 + state * 3 + len(criteria)) % 5) / 10
    return 80.0 + 2 * (struct == "rsst" and state > 0) + 0.1 * seed - state + noise


def round_row(struct, criteria, seed, state):
    kept = {n: max(1, round(v * DENSITIES[state] / 100)) for n, v in LAYERS.items()}
    value = accuracy(struct, criteria, seed, state)
    hard = struct == "rsst" and state > 0
    return {
        "round": state,
        "step": 2 * state + 1,
        "density": DENSITIES[state],
        "kept_units": {"head": [kept["blocks.0.attn.qkv"] * 2, 6], "neuron": [kept["blocks.0.mlp.fc1"] * 2, 768]},
        "parameters": round(1e6 * DENSITIES[state] / 100),
        "macs": 4e7 * DENSITIES[state] / 100,
        "accuracy": 90.0,
        "val_accuracy": value + 1,
        "test_accuracy": value + 0.5 * hard,
        "hardened_val_accuracy": value + 1 if hard else None,
        "hardened_test_accuracy": value if hard else None,
        "squeeze_ratio": 0.02 if hard else None,
        "best_val_accuracy": value + 1,
        "test_at_best_val": value,
        "best_epoch": 1,
        "reg_lambd": 1.0 if hard else 0.0,
        "kept_per_layer": kept,
    }


def epoch_row(struct, state, epoch, value):
    return {
        "round": state,
        "prune_times": state,
        "epoch": epoch,
        "step": 2 * state + epoch,
        "loss": 2.0 - epoch,
        "accuracy": 80.0,
        "val_accuracy": value - 5 + 5 * epoch,
        "test_accuracy": value,
        "lr": 0.01,
        "reg_lambd": 0.5 * (epoch + 1) * (state > 0 and struct == "rsst"),
        "train_batch_time": 0.1,
        "seconds": 3.0,
    }


def write_run(folder, struct, criteria, seed, rounds=3):
    """A run of `rounds` rounds of two epochs, finished if there are three."""
    folder.mkdir(parents=True)
    args = {
        "struct": struct,
        "criteria": criteria,
        "seed": seed,
        "pruning_times": 3,
        "arch": "vit_tiny",
        "epochs": 2,
        "dataset": "digits",
        "image_size": 8,
        "save_dir": str(folder),
    }
    (folder / "args.yaml").write_text(yaml.safe_dump(args))
    command = ["main_imp_fillback.py", f"--struct={struct}", f"--criteria={criteria}", f"--seed={seed}"]
    environment = {"time": "2026-01-01T10:00:00", "command": command, "packages": {"torch": "2.9"}}
    (folder / "env.json").write_text(json.dumps(environment))
    rows = [round_row(struct, criteria, seed, state) for state in range(rounds)]
    epochs = [epoch_row(struct, s, e, accuracy(struct, criteria, seed, s)) for s in range(rounds) for e in range(2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in epochs))
    with (folder / "summary.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: json.dumps(v) if isinstance(v, dict) else v for k, v in row.items()} for row in rows)
    if rounds == 3:
        result = {"rounds": 3, "seconds": 12.0, "seconds_of_round_0": 6.0, "round_0_is_shared": True}
        (folder / "result.json").write_text(json.dumps(result))
    return args


def write_sweep(path, seeds=SEEDS, broken=()):
    """A sweep of all combinations; those in `broken` (struct, criteria, seed) have one round only, and a reason."""
    jobs, ends = [], {}
    for struct, criteria, seed in itertools.product(*SETTINGS.values(), seeds):
        name = f"{struct}_{criteria}_{seed}"
        failed = (struct, criteria, seed) in broken
        write_run(path / "runs" / name, struct, criteria, seed, 1 if failed else 3)
        jobs.append(
            {
                "name": name,
                "folder": f"runs/{name}",
                "dense": False,
                "rounds": 3,
                "after": [],
                "epochs": 2,
                "settings": {"struct": struct, "criteria": criteria, "seed": seed},
                "words": [],
            }
        )
        ends[name] = {"status": 4 if failed else 0, "reason": "loss is <not> finite" if failed else ""}
    record = {
        "command": ["sweep.py", "--grid", "struct=rsst,refill"],
        "axes": ["struct", "criteria", "seed"],
        "jobs": jobs,
    }
    (path / "sweep.json").write_text(json.dumps(record))
    (path / "outcomes.json").write_text(json.dumps(ends))
    return path
