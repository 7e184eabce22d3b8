#!/usr/bin/env bash
# Component attributions as published: ResNet-50 on ImageNet.
set -euo pipefail

case " $* " in
    *" --help "* | *" -h "*)
        cat <<'USAGE'
usage: estimate_imagenet_resnet50.sh [--small] [RUN] [options of coar run, such as --workers 2]

22,720 filters of torchvision's ResNet-50, the 50,000 validation images of ImageNet, 100,000 ablations of
5 % of the filters. Needs the images in data/imagenet/val/CLASS/ (image-net.org) and, for the weights,
internet or a "checkpoint" in the spec. Decoded images take 7.5 GB in runs/decoded,
the statistics of the fit 8 GB of memory.

--small: an untrained small ResNet, which exercises the code; its numbers mean nothing.

RUN is the folder of the study (default runs/imagenet_resnet50, or runs/imagenet_resnet50_small).
Stop it at any time; the same command goes on from there.
USAGE
        exit
        ;;
esac
exec "$(dirname "$0")/estimate.sh" imagenet_resnet50 "$@"
