#!/usr/bin/env bash
# Heads and MLP neurons pruned together: RSST on a small ViT, three rounds of five epochs, as the documents have it.
# Further flags win, e.g.: bash scripts/run_head_mlp_test.sh --dataset cifar10 --data photos.npz --mlp_prune_ratio 0.4
set -euo pipefail
python=$(bash "$(dirname "$0")/python.sh")
exec "$python" "$(dirname "$0")/../main_imp_fillback.py" --dataset cifar100 --arch vit_tiny --struct rsst \
    --vit_structured --vit_prune_target both --criteria magnitude --rate 0.3 --mlp_prune_ratio 0.3 \
    --pruning_times 3 --epochs 5 --warmup 1 --decreasing_lr 4 "$@"
