#!/usr/bin/env bash
# Make a GPT-2 forget a word by ablating at most 30 of its 2,064 neurons and heads.
set -euo pipefail

case " $* " in
    *" --help "* | *" -h "*)
        cat <<'USAGE'
usage: edit_language.sh [--small] [options of coar make-edit, such as --compare]

A small GPT-2 has read Shakespeare letter by letter. From places where the word "thou" comes next, and from
passages of everything else, the neurons and heads to ablate are found, tried on half of the other passages,
and judged on the other half. The loss elsewhere may rise by 0.9 %. A few minutes on two cores; --compare adds
other ways of editing, and takes several times as long.
The edit is saved as runs/edit_language.json, or runs/edit_language_small.json.

Needs tinyshakespeare.txt in a data folder: see data/README.md. Another word, or a GPT-2 of transformers with
a text of yours: change word, model and data in a copy of specs/edit_language.json.

--small: 200 passages that come along.
USAGE
        exit
        ;;
esac
name=edit_language options=()
for word in "$@"; do # --small may stand anywhere
    if [ "$word" = --small ]; then
        name=edit_language_small
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
