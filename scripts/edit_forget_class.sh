#!/usr/bin/env bash
# Make a ResNet-56 forget a class by ablating at most 1.5 % of its filters.
set -euo pipefail

case " $* " in
    *" --help "* | *" -h "*)
        cat <<'USAGE'
usage: edit_forget_class.sh [--small] [options of coar make-edit, such as --compare]

A ResNet-56 tells ten classes, and is to forget automobiles. The filters to ablate, at most 1.5 %, are found
from 20 images of automobiles and 60 others; how many is chosen on half of the other images, and judged on
the other half. About a minute on two cores; --compare adds other ways of editing, and takes a few.
The edit is saved as runs/edit_forget_class.json, or runs/edit_forget_class_small.json.
For another class, write its number into specs/edit_forget_class.json.

Needs data/cifar10_jpeg.npz, or an .npz of your own under that name: see data/README.md.

--small: a ResNet-20 and 800 images that come along.
USAGE
        exit
        ;;
esac
name=edit_forget_class options=()
for word in "$@"; do # --small may stand anywhere
    if [ "$word" = --small ]; then
        name=edit_forget_class_small
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
