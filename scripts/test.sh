#!/usr/bin/env bash
# Set up the environment and pass the tests:  bash scripts/test.sh [arguments of pytest]
#   bash scripts/test.sh --cov --cov-report=term    says which lines they run, and takes longer
# KD_DATA (cifar10.npz, cifar100.npz, tiny-imagenet-200), KD_CHECKPOINTS (published teachers) and
# KD_ZOO (nets.json.gz) name folders of real data, which widen them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/usage.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

python -m ruff check .
python -m ruff format --check .
python -m pytest -n 2 --dist worksteal "$@"
