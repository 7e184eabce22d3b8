#!/usr/bin/env bash
# Runs tests/test_interop_ffcv.py against the real FFCV, which is compiled into an environment of its own.
#   scripts/check_ffcv.sh [PYTEST_ARGS...]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

if ! pkg-config --exists opencv4 libturbojpeg; then
    echo "error: FFCV is built from source; it needs a C++ compiler and, on Debian and Ubuntu:" >&2
    echo "  apt-get install --no-install-recommends g++ pkg-config libopencv-dev libturbojpeg0-dev" >&2
    exit 1
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder"
# What is installed beside $python is seen from there, and not installed again.
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$folder/outer"
mv "$folder/outer" "$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check ffcv==1.0.2 pillow
COAR_REQUIRE=ffcv "$folder/bin/python" -m pytest -p no:cacheprovider tests/test_interop_ffcv.py "$@"
