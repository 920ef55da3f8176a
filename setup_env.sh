#!/usr/bin/env bash
# Set up the environment: conda environment `kd` where conda is installed, else .venv (uv or pip).
# Running it again takes seconds. Say KD_VENV=1 to get .venv in spite of conda.
# The build of torch depends on the NVIDIA driver and the GPUs: see utils/program/wheels.py.
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
    python=(conda run --name kd python)
    install=(conda run --no-capture-output --name kd python -m pip install)
    activate="conda activate kd"
else
    stamp=.venv/.kd_requirements
    activate="source .venv/bin/activate"
    python=(.venv/bin/python)
    if command -v uv >/dev/null; then
        [ -x .venv/bin/python ] || uv venv --python '>=3.11' .venv
        install=(uv pip install --python .venv/bin/python)
    else
        [ -x .venv/bin/python ] || python3 -m venv .venv
        install=(.venv/bin/python -m pip install --disable-pip-version-check)
    fi
fi

# Where torch's ordinary build does not suit: uv takes another one of the same release, pip has only
# the ordinary index and takes an older release.
if [ "${install[0]}" = uv ]; then
    index=$("${python[@]}" utils/program/wheels.py index)
    choice=(${index:+--torch-backend "$index"})
else
    release=$("${python[@]}" utils/program/wheels.py release)
    choice=()
    [ "$release" = torch ] || choice=("$release")
fi

# The stamp is a copy of what was installed, so changed requirements or another GPU install again.
wanted=$(cat requirements.txt; echo "# ${choice[*]}")
if [ "$wanted" != "$(cat "$stamp" 2>/dev/null)" ]; then
    echo "Installing requirements.txt; the CUDA build of torch is several GB and takes minutes."
    [ ${#choice[@]} -eq 0 ] || echo "For this machine's NVIDIA driver and GPUs: ${choice[*]}"
    "${install[@]}" -r requirements.txt "${choice[@]}"
    echo "$wanted" >"$stamp"
fi
echo "Ready. Activate it with: $activate"
