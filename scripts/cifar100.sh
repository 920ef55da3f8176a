#!/usr/bin/env bash
# The experiments of the paper on CIFAR-100: teachers x losses, then students x teachers.
# Usage as scripts/cifar10.sh.
set -euo pipefail

dataset=cifar100
teachers="resnet56 wrn_40_2"
students="resnet8 wrn_40_1"
source "$(dirname "${BASH_SOURCE[0]}")/grid.sh"
