#!/usr/bin/env bash
# Print the Python that the other scripts run: $PYTHON, else that of an environment that is active, else that of .venv,
# which scripts/install.sh makes, else python.
set -euo pipefail
own="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin/python"
if [ -z "${PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$own" ]; then PYTHON=$own; fi
echo "${PYTHON:-python}"
