#!/usr/bin/env bash
# The experiments of the paper on CIFAR-100. Usage, and where it differs: as scripts/cifar10.sh.
CIFAR=cifar100 source "$(dirname "${BASH_SOURCE[0]}")/cifar10.sh"
