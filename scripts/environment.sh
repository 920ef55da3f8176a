# Sourced by the other scripts: set up where needed, then activate.
source "$(dirname "${BASH_SOURCE[0]}")/usage.sh"
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$repository/setup_env.sh" >&2
if command -v conda >/dev/null && [ -z "${KD_VENV:-}" ]; then
    eval "$(conda shell.bash hook)"
    conda activate kd
else
    source "$repository/.venv/bin/activate"
fi
