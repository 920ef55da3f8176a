#!/usr/bin/env bash
# The experiments of the paper on CIFAR-100: teachers x losses, then students x teachers.
#   bash scripts/cifar100.sh                      and with all that bash scripts/cifar10.sh --help says
CIFAR=cifar100 source "$(dirname "${BASH_SOURCE[0]}")/cifar10.sh"
