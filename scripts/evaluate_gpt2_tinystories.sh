#!/usr/bin/env bash
# How well attributions predict ablations, beside the methods that COAR was compared with: GPT-2 on TinyStories.
set -euo pipefail

case " $* " in
    *" --help "* | *" -h "*)
        cat <<'USAGE'
usage: evaluate_gpt2_tinystories.sh [--small] [RUN] [options of coar run, such as --workers 2]

Correlations of predicted with true margins at 3.75, 3.125 and 2.5 % of the components ablated (fitted at
2.5 %), with the linear ceiling at 2.5 %; beside gradient x parameter, neuron conductance, internal influence,
and gate gradients. Leave-one-out costs 64,512 ablations, two thirds of the study: `coar baseline RUN
leave-one-out` adds it to the next evaluation. Needs what estimate_gpt2_tinystories.sh needs.

--small: a small GPT-2 over characters and 30 passages of Shakespeare that come along; two or three minutes.

RUN is the folder of the study (default runs/gpt2_tinystories, or runs/gpt2_tinystories_small), which
estimate_gpt2_tinystories.sh makes first if it is not there. evaluation.png and evaluation.csv are written into it.
Stop it at any time; the same command goes on from there.
USAGE
        exit
        ;;
esac
exec "$(dirname "$0")/evaluate.sh" gpt2_tinystories "0.0375 0.03125 0.025" \
    "gradient-x-parameter neuron-conductance internal-influence gate-gradients" "$@"
