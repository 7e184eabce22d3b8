#!/usr/bin/env bash
# How well attributions predict ablations, beside the methods that COAR was compared with: ResNet on CIFAR-10.
set -euo pipefail

case " $* " in
    *" --help "* | *" -h "*)
        cat <<'USAGE'
usage: evaluate_cifar_resnet.sh [--small] [RUN] [options of coar run, such as --workers 2]

Correlations of predicted with true margins at 15, 12.5 and 10 % of the filters ablated (fitted at 10 %), as
published, with the linear ceiling at 10 %; beside leave-one-out (2,304 ablations), gradient x parameter,
neuron conductance, internal influence, and gate gradients. Needs what estimate_cifar_resnet.sh needs.

--small: a ResNet-20 and 100 images that come along; two or three minutes.

RUN is the folder of the study (default runs/cifar_resnet, or runs/cifar_resnet_small), which
estimate_cifar_resnet.sh makes first if it is not there. evaluation.png and evaluation.csv are written into it.
Stop it at any time; the same command goes on from there.
USAGE
        exit
        ;;
esac
exec "$(dirname "$0")/evaluate.sh" cifar_resnet "0.15 0.125 0.10" \
    "leave-one-out gradient-x-parameter neuron-conductance internal-influence gate-gradients" "$@"
