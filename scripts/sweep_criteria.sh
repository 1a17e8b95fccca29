#!/usr/bin/env bash
# The same run by each criterion. Further flags go to all of them, e.g.:
# bash scripts/sweep_criteria.sh --arch vit_tiny --struct rsst --vit_structured --rate 0.3
set -euo pipefail
python=$(bash "$(dirname "$0")/python.sh")
for criterion in remain magnitude l1 l2 saliency; do
    "$python" "$(dirname "$0")/../main_imp_fillback.py" "$@" --criteria "$criterion"
done
