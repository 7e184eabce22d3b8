#!/usr/bin/env bash
# How well attributions predict ablations, beside the methods that COAR was compared with: ResNet-50 on ImageNet.
set -euo pipefail

case " $* " in
    *" --help "* | *" -h "*)
        cat <<'USAGE'
usage: evaluate_imagenet_resnet50.sh [--small] [RUN] [options of coar run, such as --workers 2]

Correlations of predicted with true margins at 7.5, 6.25 and 5 % of the filters ablated (fitted at 5 %), with
the linear ceiling at 5 %; beside leave-one-out (22,720 ablations, a quarter of the study), gradient x parameter,
neuron conductance, internal influence, and gate gradients. Needs what estimate_imagenet_resnet50.sh needs;
the attributions of each method take 4.5 GB, up to four times that of memory while they are made, and the sums
of gate gradients 36 GB or more.

--small: an untrained small ResNet, which exercises the code; its numbers mean nothing.

RUN is the folder of the study (default runs/imagenet_resnet50, or runs/imagenet_resnet50_small), which
estimate_imagenet_resnet50.sh makes first if it is not there. evaluation.png and evaluation.csv are written into it.
Stop it at any time; the same command goes on from there.
USAGE
        exit
        ;;
esac
exec "$(dirname "$0")/evaluate.sh" imagenet_resnet50 "0.075 0.0625 0.05" \
    "leave-one-out gradient-x-parameter neuron-conductance internal-influence gate-gradients" "$@"
