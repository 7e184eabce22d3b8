#!/usr/bin/env bash
# Component attributions as published: ViT-B/16 on ImageNet.
set -euo pipefail

case " $* " in
    *" --help "* | *" -h "*)
        cat <<'USAGE'
usage: estimate_imagenet_vit.sh [--small] [RUN] [options of coar run, such as --workers 2]

82,944 neurons of torchvision's ViT-B/16, every tenth of the 50,000 validation images of ImageNet, 100,000
ablations of 5 % of the neurons. Needs the images in data/imagenet/val/CLASS/ (image-net.org) and, for the
weights, internet or a "checkpoint" in the spec. Decoded images take 0.8 GB in runs/decoded,
the statistics of the fit 110 GB of memory.

--small: an untrained small ViT, which exercises the code; its numbers mean nothing.

RUN is the folder of the study (default runs/imagenet_vit_b_16, or runs/imagenet_vit_b_16_small).
Stop it at any time; the same command goes on from there.
USAGE
        exit
        ;;
esac
exec "$(dirname "$0")/estimate.sh" imagenet_vit_b_16 "$@"
