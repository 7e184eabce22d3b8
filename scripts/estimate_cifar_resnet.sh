#!/usr/bin/env bash
# Component attributions as published: ResNet on CIFAR-10.
set -euo pipefail

case " $* " in
    *" --help "* | *" -h "*)
        cat <<'USAGE'
usage: estimate_cifar_resnet.sh [--small] [RUN] [options of coar run, such as --workers 2]

All 2,304 filters of a ResNet, 10,000 test images of CIFAR-10, 50,000 ablations of 10 % of the filters
(the paper's fraction; the released script has 5 %). Needs CIFAR-10 in data/, see data/README.md, and a
trained network of this architecture (PublishedCifarResNet in coar/tasks/cifar_networks.py), which does not
come with this package, in data/models/cifar_resnet.safetensors.

--small: a ResNet-20 (688 filters) and 100 images that come along, 400 ablations; a minute or two.

RUN is the folder of the study (default runs/cifar_resnet, or runs/cifar_resnet_small).
Stop it at any time; the same command goes on from there.
USAGE
        exit
        ;;
esac
exec "$(dirname "$0")/estimate.sh" cifar_resnet "$@"
