#!/usr/bin/env bash
# The experiments of the paper on CIFAR-100. Usage, and where it differs: as scripts/cifar10.sh.
set -euo pipefail

dataset=cifar100
teachers="resnet56_bottleneck resnet110_bottleneck"
students="resnet8 wrn_40_1 mobilenetv2 shufflenetv1 shufflenetv2_kdc"
recipe="--epochs 160 --lr 0.1 --wd 1e-4 --train-batch-size 128"
source "$(dirname "${BASH_SOURCE[0]}")/grid.sh"
run_stages teaching learning
