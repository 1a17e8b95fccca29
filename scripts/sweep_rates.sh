#!/usr/bin/env bash
# The same run at each rate (RATES="0.2 0.5" chooses others). Further flags go to all of them, e.g.:
# bash scripts/sweep_rates.sh --arch vit_tiny --struct rsst --vit_structured
set -euo pipefail
python=$(bash "$(dirname "$0")/python.sh")
for rate in ${RATES:-0.2 0.3 0.4 0.5}; do
    "$python" "$(dirname "$0")/../main_imp_fillback.py" "$@" --rate "$rate"
done
