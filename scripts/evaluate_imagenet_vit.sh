#!/usr/bin/env bash
# How well attributions predict ablations, beside the methods that COAR was compared with: ViT-B/16 on ImageNet.
set -euo pipefail

case " $* " in
    *" --help "* | *" -h "*)
        cat <<'USAGE'
usage: evaluate_imagenet_vit.sh [--small] [RUN] [options of coar run, such as --workers 2]

Correlations of predicted with true margins at 7.5, 6.25 and 5 % of the neurons ablated (fitted at 5 %), with
the linear ceiling at 5 %; beside gradient x parameter, neuron conductance, internal influence, and gate
gradients. Leave-one-out costs 82,944 ablations, nearly the study again: `coar baseline RUN leave-one-out`
adds it to the next evaluation. Needs what estimate_imagenet_vit.sh needs; the attributions of each method
take 1.7 GB, up to four times that of memory while they are made, and the sums of gate gradients 13 GB or more.

--small: an untrained small ViT, which exercises the code; its numbers mean nothing.

RUN is the folder of the study (default runs/imagenet_vit_b_16, or runs/imagenet_vit_b_16_small), which
estimate_imagenet_vit.sh makes first if it is not there. evaluation.png and evaluation.csv are written into it.
Stop it at any time; the same command goes on from there.
USAGE
        exit
        ;;
esac
exec "$(dirname "$0")/evaluate.sh" imagenet_vit_b_16 "0.075 0.0625 0.05" \
    "gradient-x-parameter neuron-conductance internal-influence gate-gradients" "$@"
