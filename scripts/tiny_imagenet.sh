#!/usr/bin/env bash
# The experiments of the paper on Tiny-ImageNet, 64x64: teachers x losses, then students x teachers.
#   bash scripts/tiny_imagenet.sh                 and with all that bash scripts/cifar10.sh --help says
# As in the original: its nets, warm-up, 100 epochs, images per step. Otherwise: one process takes
# all 256 images of a step (it took 64 on each of four GPUs), and its own normalisation is that of
# the training images (it took ImageNet's).
set -euo pipefail

dataset=tiny_imagenet
teachers="tin_resnet110"
students="tin_resnet18 mobilenetv2"
recipe="--epochs 100 --scheduler warmupcosine --warmup 1000 --lr 0.1 --wd 1e-4 --train-batch-size 256"
source "$(dirname "${BASH_SOURCE[0]}")/grid.sh"
run_stages teaching learning
