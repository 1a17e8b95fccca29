#!/usr/bin/env bash
# Install if needed, then linter, type checker and all tests, side by side on all cores. Further flags go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh requirements-dev.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy .
cores=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2)  # nproc obeys OMP_NUM_THREADS
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -n "$cores" "$@"
