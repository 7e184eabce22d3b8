#!/usr/bin/env bash
# Rewrites requirements.txt: what a full install ([all], dev and bench) resolves to today on CPython 3.11
# and 64-bit Linux, without ffcv and without the CUDA packages that torch brings along by itself.
# Needs Python >= 3.11 and a package index; changes nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3}" -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check uv

# --no-config and no find-links: the pins must not depend on what this machine keeps in a folder.
env -u UV_FIND_LINKS -u UV_CONSTRAINT -u UV_OVERRIDE "$scratch/venv/bin/uv" pip compile --quiet --no-config \
    --extra all --extra dev --extra bench \
    --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --no-header --no-annotate pyproject.toml --output-file "$scratch/all.txt"

# A local version (torch==2.x+cpu) exists on no public index.
if grep '+' "$scratch/all.txt"; then
    echo "error: these pins are local builds; resolve against the plain package index" >&2
    exit 1
fi

{
    cat <<'HEADER'
# Made by scripts/freeze_requirements.sh; do not edit. What `pip install torch-coar[all,dev,bench]` resolved to
# on CPython 3.11 and Linux. `make` uses it as constraints: pins without a say in what is installed. Left out,
# since torch pins them itself on the machines that need them: the CUDA packages (nvidia-*, cuda-*, triton).
HEADER
    grep -Ev '^(nvidia-|cuda-|triton==)' "$scratch/all.txt"
} > "$scratch/requirements.txt"
mv "$scratch/requirements.txt" requirements.txt
echo "requirements.txt: $(grep -c == requirements.txt) pins"
