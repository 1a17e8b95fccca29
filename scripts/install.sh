#!/usr/bin/env bash
# Make .venv and install a requirements file into it, unless that has been done for this very file.
# Usage: bash scripts/install.sh [requirements.txt]
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=${1:-requirements.txt}
stamp=.venv/.installed-$(basename "$requirements" .txt)
python=${PYTHON:-python3}

if [ ! -x .venv/bin/python ]; then
    echo "making .venv"
    "$python" -m venv .venv
fi
if [ ! -f "$stamp" ] || [ "$requirements" -nt "$stamp" ] || [ requirements.txt -nt "$stamp" ]; then
    echo "installing $requirements (torch is large: this takes a few minutes the first time)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
    touch "$stamp"
fi
