#!/usr/bin/env bash
# Set up the environment: conda environment `kd` where conda is installed, else .venv (uv or pip).
# Running it again takes seconds. Say KD_VENV=1 to get .venv in spite of conda.
set -euo pipefail
case ${1:-} in
    "") ;;
    --help | -h) sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0"; exit ;;
    *) echo "setup_env.sh: error: $1: it takes no words; --help says more" >&2; exit 2 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")"

if command -v conda >/dev/null && [ -z "${KD_VENV:-}" ]; then
    conda env list | grep -qE '^kd[[:space:]]' || conda create --yes --name kd python=3.11
    stamp="$(conda run --name kd python -c 'import sys; print(sys.prefix)')/.kd_requirements"
    install=(conda run --no-capture-output --name kd python -m pip install)
    activate="conda activate kd"
else
    stamp=.venv/.kd_requirements
    activate="source .venv/bin/activate"
    if command -v uv >/dev/null; then
        [ -x .venv/bin/python ] || uv venv --python '>=3.11' .venv
        install=(uv pip install --python .venv/bin/python)
    else
        [ -x .venv/bin/python ] || python3 -m venv .venv
        install=(.venv/bin/python -m pip install --disable-pip-version-check)
    fi
fi

# The stamp is a copy of what was installed, so a changed requirements.txt installs again.
if ! cmp --silent requirements.txt "$stamp"; then
    echo "Installing requirements.txt; the CUDA build of torch is several GB and takes minutes."
    "${install[@]}" -r requirements.txt
    cp requirements.txt "$stamp"
fi
echo "Ready. Activate it with: $activate"
