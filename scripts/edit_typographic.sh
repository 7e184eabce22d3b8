#!/usr/bin/env bash
# Make CLIP look at an image rather than read what is written on it.
set -euo pipefail

case " $* " in
    *" --help "* | *" -h "*)
        cat <<'USAGE'
usage: edit_typographic.sh [--small] [options of coar make-edit, such as --compare]

CLIP (ViT-B/16) classifies images by prompts, and believes a card with the name of a wrong class. From 20
images with such a card and 60 without, the MLP neurons and attention heads to ablate are found; how many is
chosen on half of the other images, and judged on the other half. --compare adds other ways of editing.
The edit is saved as runs/edit_typographic.json, or runs/edit_typographic_small.json.

Needs data/typographic/CLASS/IMAGE, a folder of images per class, named as the class; cards are written on
copies. The model openai/clip-vit-base-patch16 comes from the Hugging Face hub, or name a folder that
save_pretrained wrote as "model" in specs/edit_typographic.json. A GPU is a help.

--small: a small dual encoder that is trained on digits and words beside them, in ten seconds; half a
minute in all.
USAGE
        exit
        ;;
esac
name=edit_typographic options=()
for word in "$@"; do # --small may stand anywhere
    if [ "$word" = --small ]; then
        name=edit_typographic_small
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
