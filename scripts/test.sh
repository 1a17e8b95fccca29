#!/usr/bin/env bash
# Install if needed, then linter, type checker and tests, side by side on all cores.
# Usage: bash scripts/test.sh [--all | --part K/N] [flags of pytest]
#   (nothing)   all tests but those marked slow: some minutes
#   --all       all tests
#   --part K/N  all but the slow ones, and part K (from 0) of N of the slow ones
set -euo pipefail
cd "$(dirname "$0")/.."
tier=fast
case "${1:-}" in
    --all) tier=all && shift ;;
    --part) tier=${2:?--part needs K/N, such as 0/5} && shift 2 ;;
esac
bash scripts/install.sh dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
types=$(mktemp)
trap 'rm -f "$types"' EXIT
.venv/bin/mypy . >"$types" 2>&1 &
checking=$!  # it takes one core for half a minute, in which pytest finds its tests
cores=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2)  # nproc obeys OMP_NUM_THREADS
export OMP_NUM_THREADS=1
unset PYTHONDONTWRITEBYTECODE # hundreds of processes start: each would compile the same files
# Neighbours share what is expensive to make: they stay in one worker until another has nothing left to do.
status=0
.venv/bin/python -m pytest -n "$cores" --dist worksteal --durations=30 --tier "$tier" "$@" || status=$?
wait "$checking" || status=$((status ? status : 1))
cat "$types"
exit "$status"
