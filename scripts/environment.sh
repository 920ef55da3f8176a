# Sourced by the other scripts, from the repository's root: set up where needed, then activate.
bash setup_env.sh >&2
if command -v conda >/dev/null && [ -z "${KD_VENV:-}" ]; then
    eval "$(conda shell.bash hook)"
    conda activate kd
else
    source .venv/bin/activate
fi
