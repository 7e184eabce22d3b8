#!/usr/bin/env bash
# Raise the accuracy of a network's worst group: waterbirds on land.
set -euo pipefail

case " $* " in
    *" --help "* | *" -h "*)
        cat <<'USAGE'
usage: edit_subpopulation.sh [--small] [options of coar make-edit, such as --compare]

A ResNet-50 that was fine-tuned on Waterbirds goes by the background: waterbirds on land are its worst group.
The filters that do the harm are found from 20 of them and 60 waterbirds on water; how many are ablated is
chosen on half of the other test images, and judged on the other half. --compare adds other ways of editing.
The edit is saved as runs/edit_subpopulation.json, or runs/edit_subpopulation_small.json.

Needs data/waterbirds with metadata.csv and the images, and the weights of a network of yours, with two
outputs, as data/waterbirds/resnet50.pt: see data/README.md. A GPU is a help. For CelebA, name
coar.tasks.group_images:make_celeba_task in a spec of your own.

--small: a small network that is trained on odd and even digits, in ten seconds; half a minute in all.
USAGE
        exit
        ;;
esac
name=edit_subpopulation options=()
for word in "$@"; do # --small may stand anywhere
    if [ "$word" = --small ]; then
        name=edit_subpopulation_small
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
