#!/usr/bin/env bash
# The experiments of the paper on CIFAR-10: teachers x losses, then students x teachers.
# Finished runs are skipped and broken ones resumed, so running it again repairs it.
#   bash scripts/cifar10.sh                       one run after the other
#   GPUS="0 1 2 3" bash scripts/cifar10.sh        one on each; SBATCH and others: see hypersearch.sh
#   SEEDS="1 2 3" T=4 bash scripts/cifar10.sh     several seeds, another temperature
#   bash scripts/cifar10.sh --epochs 2            anything behind goes to every command
#   bash scripts/cifar10.sh --print               print the commands instead, teachers first
# As in the original: its nets (its resnet56 and resnet110 are the bottleneck nets here), batch,
# rates, decay and weight decay (1e-4 in its scripts, 5e-4 on its page), gamma 3 and beta 1, T 2 and
# Lambda 0.9 for its smallest student. Otherwise: one T for all students (it tuned each, without
# saying on what), a tenth of the training images validates whatever the seed, the data set's own
# normalisation, MMCE as in its paper, and the best epoch by validation top-1.
set -euo pipefail

dataset=${CIFAR:-cifar10} # cifar100.sh sets it
teachers="resnet56_bottleneck resnet110_bottleneck"
students="resnet8 wrn_40_1 mobilenetv2 shufflenetv1 shufflenetv2_kdc"
recipe="--epochs 160 --lr 0.1 --wd 1e-4 --train-batch-size 128"
source "$(dirname "${BASH_SOURCE[0]}")/grid.sh"
run_stages teaching learning
