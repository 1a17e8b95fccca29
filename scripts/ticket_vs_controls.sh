#!/usr/bin/env bash
# A ticket, then each of its controls. Further flags go to all of them, e.g.:
# bash scripts/ticket_vs_controls.sh --arch res20s --struct rsst --rate 0.4 --pruning_times 3
set -euo pipefail
python=$(bash "$(dirname "$0")/python.sh")
for control in none reinit random_structure permute small_dense; do
    "$python" "$(dirname "$0")/../main_imp_fillback.py" "$@" --control "$control"
done
