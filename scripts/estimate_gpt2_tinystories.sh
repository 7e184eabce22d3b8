#!/usr/bin/env bash
# Component attributions as published: GPT-2 on TinyStories.
set -euo pipefail

case " $* " in
    *" --help "* | *" -h "*)
        cat <<'USAGE'
usage: estimate_gpt2_tinystories.sh [--small] [RUN] [options of coar run, such as --workers 2]

64,512 components of GPT-2 (rows of its weights: what each layer reads), the last 500 stories of the
validation split of TinyStories, 100,000 ablations of 2.5 % of them. Needs internet, or local folders as
"model" and "data" in the spec. The fit holds 67 GB of statistics in memory.

--small: a small GPT-2 over characters and 30 passages of Shakespeare that come along, 300 ablations;
a minute or two.

RUN is the folder of the study (default runs/gpt2_tinystories, or runs/gpt2_tinystories_small).
Stop it at any time; the same command goes on from there.
USAGE
        exit
        ;;
esac
exec "$(dirname "$0")/estimate.sh" gpt2_tinystories "$@"
