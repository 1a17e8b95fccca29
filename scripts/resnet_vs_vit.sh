#!/usr/bin/env bash
# Channels of a ResNet against heads and neurons of a ViT. Further flags go to both, e.g.:
# bash scripts/resnet_vs_vit.sh --dataset cifar10 --data photos.npz --struct refill
set -euo pipefail
python=$(bash "$(dirname "$0")/python.sh")
main="$(dirname "$0")/../main_imp_fillback.py"
"$python" "$main" --rate 0.3 --rate_mode round "$@" --arch res20s
"$python" "$main" --rate 0.3 --rate_mode round --optimizer adamw --lr 1e-3 --weight_decay 0.05 "$@" \
    --arch vit_tiny --vit_structured --vit_prune_target both
