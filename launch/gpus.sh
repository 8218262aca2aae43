#!/usr/bin/env bash
# Sets up a virtual environment, then trains and evaluates on all NVIDIA GPUs of this machine.
# Not run on such a machine yet.
#
#   launch/gpus.sh [--config.group.key=value ...]
#
# Run it again to continue where it stopped. Variables (relative paths start at the repository's root):
#   CONFIG   the config file, with its preset             (configs/docstrings.py:quick)
#   WORKDIR  where checkpoints and results go             (workdir/gpus)
#   GPUS     how many GPUs to use                         (all that nvidia-smi lists)
#   VENV     the virtual environment                      (.venv)
#   PYTHON   the Python that makes it, 3.11, 3.12 or 3.13 (python3)
# And XLA's flags, all at XLA's defaults and none measured here (docs/accelerators.md):
#   DETERMINISTIC    1: a step taken again gives the same bits (0)
#   AUTOTUNE         0, off, to 5: how carefully the kernels of products are chosen
#   LATENCY_HIDING   true or false: gradients are reduced while others are computed
#   COMMAND_BUFFERS  kinds of operations launched as CUDA graphs, as FUSION,CUBLAS; empty: none
#   TRITON_GEMM      true or false: products by XLA's own kernels where they are faster
set -euo pipefail
CONFIG="${CONFIG:-configs/docstrings.py:quick}"
WORKDIR="${WORKDIR:-workdir/gpus}"
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
[ -n "${GPUS:-}" ] || GPUS="$(nvidia-smi --list-gpus | wc -l)" ||
  die "nvidia-smi lists no GPUs: install the driver, or give their number as GPUS=8"

set_up requirements-gpu.txt
XLA_FLAGS="$(xla_flags)"
export XLA_FLAGS
exec "$VENV/bin/python" -m rqv2_jax.main --config "$CONFIG" --workdir "$WORKDIR" \
  --config.mesh.data="$GPUS" "$@"
