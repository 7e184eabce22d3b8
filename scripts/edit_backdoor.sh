#!/usr/bin/env bash
# Close the backdoor of a ResNet-20 by ablating at most 1 % of its filters.
set -euo pipefail

case " $* " in
    *" --help "* | *" -h "*)
        cat <<'USAGE'
usage: edit_backdoor.sh [--small] [options of coar make-edit, such as --compare]

A ResNet-20 takes whatever carries a small blue square for an airplane. From ten test images with and
without the square, the filters to ablate are found, tried on half of the other images, and judged on the
other half. Under a minute on two cores; --compare adds other ways of editing, and takes a few.
The edit is saved as runs/edit_backdoor.json, or runs/edit_backdoor_small.json.

Needs cifar10_jpeg.npz, or an .npz of your own under that name, in a data folder: see data/README.md.

--small: 300 images that come along.
USAGE
        exit
        ;;
esac
name=edit_backdoor options=()
for word in "$@"; do # --small may stand anywhere
    if [ "$word" = --small ]; then
        name=edit_backdoor_small
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
