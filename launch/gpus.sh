#!/usr/bin/env bash
# Sets up a virtual environment, then trains and evaluates on all NVIDIA GPUs of this machine.
# Not run on such a machine yet.
#
#   launch/gpus.sh [--config.group.key=value ...]
#
# Run it again to continue where it stopped. Variables (relative paths start at the repository's root):
#   CONFIG   the config file, with its preset             (configs/docstrings.py)
#   WORKDIR  where checkpoints and results go             (workdir/gpus)
#   GPUS     how many GPUs to use                         (all that nvidia-smi lists)
#   VENV     the virtual environment                      (.venv)
#   PYTHON   the Python that makes it, 3.11, 3.12 or 3.13 (python3)
set -euo pipefail
CONFIG="${CONFIG:-configs/docstrings.py}"
WORKDIR="${WORKDIR:-workdir/gpus}"
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
[ -n "${GPUS:-}" ] || GPUS="$(nvidia-smi --list-gpus | wc -l)" ||
  die "nvidia-smi lists no GPUs: install the driver, or give their number as GPUS=8"

set_up requirements-gpu.txt
exec "$VENV/bin/python" -m rqv2_jax.main --config "$CONFIG" --workdir "$WORKDIR" \
  --config.mesh.data="$GPUS" "$@"
