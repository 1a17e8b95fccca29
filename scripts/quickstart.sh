#!/usr/bin/env bash
# From nothing to a finished experiment: installs, then finds a structured ticket in a ViT by RSST on handwritten digits.
# Further flags go to the program, e.g.: bash scripts/quickstart.sh --struct refill
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
echo "RSST on 1,797 handwritten digits, three rounds of 20 epochs: one to three minutes on two CPU cores"
exec .venv/bin/python main_imp_fillback.py --dataset digits --image_size 8 --arch vit_tiny --struct rsst \
    --vit_structured --vit_prune_target both --rate 0.3 --rate_mode round --criteria magnitude --pruning_times 3 \
    --epochs 20 --batch_size 64 --optimizer adamw --lr 1e-3 --weight_decay 0.05 --warmup 2 --lr_schedule cosine "$@"
