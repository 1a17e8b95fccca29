#!/usr/bin/env bash
# Make .venv and install this checkout into it, editable, unless that has been done since its requirements changed.
# Usage: bash scripts/install.sh [dev]
#   (nothing)   what the programs need
#   dev         also linters, test tools and all optional parts
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:-}
case "$extra" in "" | dev) ;; *) echo "usage: bash scripts/install.sh [dev]" >&2 && exit 2 ;; esac
python=${PYTHON:-python3}
installed="$PWD $(cat requirements.txt pyproject.toml | cksum)"  # an editable install is of one folder

holds() { [ "$(cat ".venv/.installed-$1" 2>/dev/null)" = "$installed" ]; }

if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: set PYTHON"; exit 1; }
    echo "making .venv"
    rm -rf .venv
    if ! "$python" -m venv .venv; then
        # Some systems package pip apart from venv: take the pip that is there.
        "$python" -m venv --without-pip --clear .venv
        "$python" -m pip --python .venv/bin/python install --quiet pip
    fi
fi
if holds dev || holds "${extra:-default}"; then exit 0; fi
echo "installing what ${extra:+development and }the programs need (torch is large: this takes a few minutes the first time)"
install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile "$@"; } # all of it is compiled below, on all cores
install "pip>=22.3" "setuptools>=77.0.3" # what builds the package: it need not be fetched for that again and again
install --no-build-isolation -e ".${extra:+[$extra]}"
# Where Python may not write what it compiles, each start of a program would compile torch again (5 s).
env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true # some files are templates
echo "$installed" >".venv/.installed-${extra:-default}"
