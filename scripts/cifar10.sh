#!/usr/bin/env bash
# The experiments of the paper on CIFAR-10: teachers x losses, then students x teachers.
# Finished runs are skipped and broken ones resumed, so running it again repairs it.
#   bash scripts/cifar10.sh                       one run after the other
#   GPUS="0 1 2 3" bash scripts/cifar10.sh        one on each; "0 0": two on one
#   SEEDS="1 2 3" bash scripts/cifar10.sh         several seeds
#   bash scripts/cifar10.sh --epochs 2            anything behind goes to every command
#   bash scripts/cifar10.sh --print               print the commands instead, teachers first
set -euo pipefail

dataset=cifar10
teachers="resnet56 resnet110"
students="resnet8 resnet20"
source "$(dirname "${BASH_SOURCE[0]}")/grid.sh"
