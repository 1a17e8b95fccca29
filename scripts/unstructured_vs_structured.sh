#!/usr/bin/env bash
# Weight by weight (IMP) against whole units (Refill, RSST), the same share of weights in each round. Further flags go to
# all, e.g.: bash scripts/unstructured_vs_structured.sh --arch res20s --dataset cifar10 --data photos.npz --rate 0.4
# A ViT wants its units named: UNITS="--vit_structured --vit_prune_target both"
set -euo pipefail
python=$(bash "$(dirname "$0")/python.sh")
main="$(dirname "$0")/../main_imp_fillback.py"
"$python" "$main" --rate_mode round "$@" --struct imp
for struct in refill rsst; do
    # shellcheck disable=SC2086 (several words)
    "$python" "$main" --rate_mode round "$@" --struct "$struct" ${UNITS:-}
done
