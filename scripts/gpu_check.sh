#!/usr/bin/env bash
# Try everything that needs a CUDA card, in at most 8 minutes: tests, whole runs, benchmarks. Needs no network.
# Usage: bash scripts/gpu_check.sh [--device cpu] [--out DIR] [--data CIFAR10.npz] [--mps]
#   --device cpu  smaller, to see that all parts run; those that need a card say "no card"
#   --out DIR     folder for logs, summary.md and summary.json (default: gpu_check)
#   --data FILE   CIFAR-10 as docs/data.md describes it, for the whole runs (default: handwritten digits)
#   --mps         try several runs at once with NVIDIA's MPS, too; its daemon is started for that, and ended
# Each part has its own log and its own time limit. One that fails does not stop the others.
set -uo pipefail
cd "$(dirname "$0")/.."
device=cuda out=gpu_check data= mps=
while [ $# -gt 0 ]; do
    case "$1" in
        --device) device=${2:?} && shift 2 ;;
        --out) out=${2:?} && shift 2 ;;
        --data) data=${2:?} && shift 2 ;;
        --mps) mps=--mps && shift ;;
        *) echo "gpu_check.sh: unknown argument $1" >&2 && exit 2 ;;
    esac
done
python=$(scripts/python.sh)
mkdir -p "$out" || exit 5
out=$(cd "$out" && pwd)
rm -rf "$out"/*.log "$out"/*.json "$out"/runs "$out"/parts.tsv "$out"/summary.md
export CUBLAS_WORKSPACE_CONFIG=:4096:8 WANDB_MODE=disabled PYTHONPATH=. # bits that repeat themselves; no network
# Many processes at once: with a thread for each core, each of them would wait for all others.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-4}

cards=$("$python" -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)' 2>"$out/start.log")
[ "$device" = cpu ] && cards=0
if [ "$device" = cuda ] && [ "${cards:-0}" = 0 ]; then
    echo "gpu_check.sh: torch finds no CUDA card (see $out/start.log). Everything else: --device cpu" >&2
    exit 2
fi
slower=1
[ "$device" = cpu ] && slower=10

# Compiling takes minutes, and what is compiled is kept in a folder: it begins here, for the benchmark to find it there.
export TORCHINDUCTOR_CACHE_DIR=$out/compiled
ahead=
if [ "$cards" -gt 0 ]; then
    compile=("$python" -m benchmarks.gpu --parts compiled --steps 2 --seconds 0.1 --limit_size 256 --compile_limit 300)
    timeout -k 10 300 bash -c 'for arch in res20s vit_tiny; do for whose in theirs all; do
        "$@" --arch "$arch" --compiled "$whose"; done; done' compile "${compile[@]}" >"$out/compile_ahead.log" 2>&1 &
    ahead=$!
    disown
fi

part() { # name, time limit on a card in seconds, cards that it needs, command
    local name=$1 limit=$2 needed=$3 began=$SECONDS status
    shift 3
    if [ "$cards" -lt "$needed" ]; then
        status="no card"
        [ "$cards" -gt 0 ] && status="$cards card, needs $needed"
    elif [[ " $* " == *" pytest "* ]] && ! "$python" -c 'import pytest' 2>/dev/null; then
        status="no pytest"
    else
        timeout -k 10 $((limit * slower)) "$@" >"$out/$name.log" 2>&1
        status=$?
    fi
    printf '%s\t%s\t%s\t%s\t%s\n' "$name" "$status" $((SECONDS - began)) $((limit * slower)) "$*" >>"$out/parts.tsv"
    echo "$name: ${status/#0/ok}, $((SECONDS - began)) s"
}
workers=()
"$python" -c 'import xdist' 2>/dev/null && [ "$(nproc)" -ge 8 ] && workers=(-n 3 --dist worksteal)
tests() { # name, time limit, tests
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" 1 "$python" -m pytest -p no:cacheprovider -m cuda ${workers[@]+"${workers[@]}"} "$@"
}
run() { # name, flags of the runner
    local name=$1
    shift
    part "run_$name" 75 0 "$python" main_imp_fillback.py --device "$device" --save_dir "$out/runs/$name" "${images[@]}" "$@"
}

# On a card with room for all of them, what only has to be right runs at once; what is timed runs alone. The limits add up
# to 480 seconds then.
room=0
[ "$cards" -gt 0 ] && room=$("$python" -c 'import torch; print(int(torch.cuda.mem_get_info()[1] > 24e9))')
next() { # wait for the part before, unless there is room for the next one beside it
    [ "$room" = 1 ] || wait
}
part machine 40 0 "$python" -m structured_tickets doctor &
next
tests eager 75 tests/unit/test_step.py &
next
tests recorded 75 tests/unit/test_on_cuda.py -k "bits or agree or wait or waits or recorded" &
next
tests rest 75 tests/unit/test_on_cuda.py -k "not bits and not agree and not wait and not waits and not recorded" &
next

images=(--dataset digits --image_size 8 --epochs 3 --batch_size 32)
[ -n "$data" ] && images=(--dataset cifar10 --data "$data" --epochs 2)
[ "$device" = cpu ] && images+=(--epochs 1)
images+=(--pruning_times 3 --warmup 1 --lr_schedule cosine --criteria magnitude --rate_mode round)
vit=(--arch vit_tiny --vit_structured --vit_prune_target both --optimizer adamw --lr 1e-3 --weight_decay 0.05)
run refill_res20s --arch res20s --struct refill --rate 0.4 --lr 0.05 &
next
run rsst_res20s --arch res20s --struct rsst --rate 0.4 --lr 0.05 &
next
run refill_vit_tiny "${vit[@]}" --struct refill --rate 0.3 &
next
run rsst_vit_tiny "${vit[@]}" --struct rsst --rate 0.3 &
wait
part export 35 0 "$python" export.py "$out/runs/refill_res20s"
part processes 40 2 "$python" -m torch.distributed.run --standalone --nproc_per_node "$cards" main_imp_fillback.py \
    --device "$device" --save_dir "$out/runs/processes" "${images[@]}" --arch res20s --struct refill

[ -n "$ahead" ] && kill "$ahead" 2>/dev/null
if [ "$device" = cpu ]; then
    sizes=(--arch res20s --wide_arch res20s --batch_size 4 --large_batch_size 8 --steps 2 --seconds 0.2 --compiled none
        --limit_size 256 --jobs 1 2)
else
    sizes=(--batch_size 128 --large_batch_size 512 2048 --steps 32 --seconds 0.5 --compile_limit 220
        --jobs 1 8 ${mps:+"$mps"})
fi
part benchmarks 330 0 "$python" -m benchmarks.gpu --device "$device" --json "$out/benchmarks.json" "${sizes[@]}"
"$python" -m benchmarks.gpu_summary "$out"
