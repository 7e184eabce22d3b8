#!/usr/bin/env bash
# Installs the Debian packages that the tests marked `system` need, and nothing that is there already.
# Everything else that coar needs comes from the package index (see Makefile).
set -euo pipefail

missing=()
need() { # need PACKAGE COMMAND...: the package is missing unless the command succeeds
    if "${@:2}" >/dev/null 2>&1; then
        echo "$1: already there"
    else
        missing+=("$1")
    fi
}

need mount command -v mount                            # a full disk is tested on a tiny tmpfs
need python3-venv "${PYTHON:-python3}" -c "import ensurepip, venv"  # Debian's python3 comes without

if [ ${#missing[@]} -eq 0 ]; then
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "error: not a Debian system; install the equivalent of: ${missing[*]}" >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "error: only root can install them; ask for: apt-get install ${missing[*]}" >&2
    exit 1
fi
echo "installing: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -y -q --no-install-recommends "${missing[@]}"
