#!/usr/bin/env bash
# Make .venv and install a requirements file into it, unless that has been done for this very file.
# Usage: bash scripts/install.sh [requirements.txt]
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=${1:-requirements.txt}
stamp=.venv/.installed-$(basename "$requirements" .txt)
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: set PYTHON"; exit 1; }
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    echo "making .venv"
    rm -rf .venv
    if ! "$python" -m venv .venv; then
        # Some systems package pip apart from venv: take the pip that is there.
        "$python" -m venv --without-pip --clear .venv
        "$python" -m pip --python .venv/bin/python install --quiet pip
    fi
fi
if [ ! -f "$stamp" ] || [ "$requirements" -nt "$stamp" ] || [ requirements.txt -nt "$stamp" ]; then
    echo "installing $requirements (torch is large: this takes a few minutes the first time)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
    touch "$stamp"
fi
