#!/usr/bin/env bash
# Fix one error of a ResNet-56 by ablating at most 1 % of its filters.
set -euo pipefail

case " $* " in
    *" --help "* | *" -h "*)
        cat <<'USAGE'
usage: edit_error.sh [--small] [options of coar make-edit, such as --compare]

A ResNet-56 takes an automobile for a truck: image 203 of the test images. The filters that do the harm are
found from its margin and those of 100 other images; how many of them are ablated, at most 1 %, is chosen
on half of the other images, and judged on the other half. About a minute on two cores; --compare adds other
ways of editing, and takes a few. The edit is saved as runs/edit_error.json, or runs/edit_error_small.json.
For another image, write its id into specs/edit_error.json.

Needs data/cifar10_jpeg.npz, or an .npz of your own under that name: see data/README.md.

--small: a ResNet-20 and 400 images that come along.
USAGE
        exit
        ;;
esac
name=edit_error options=()
for word in "$@"; do # --small may stand anywhere
    if [ "$word" = --small ]; then
        name=edit_error_small
    else
        options+=("$word")
    fi
done

cd "$(dirname "$0")/.." # where specs look for data/
PATH=$PWD/.venv/bin:$PATH
if ! command -v coar > /dev/null; then
    echo "error: there is no command coar: run \`make install\` first, or activate the environment that has it" >&2
    exit 1
fi
mkdir -p runs
coar make-edit "specs/$name.json" --save-to "runs/$name.json" ${options[@]+"${options[@]}"}
