#!/usr/bin/env bash
# Sets up a virtual environment, then trains and evaluates on the NVIDIA GPUs of several Slurm nodes, one
# process on each node. Not run on such machines yet.
#
#   sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=32 launch/slurm.sh [--config.group.key=value ...]
#
# Submit it from the repository's root, which all nodes see, as they do workdir, data and weights; again to
# continue where it stopped. Variables (relative paths start at the repository's root):
#   CONFIG   the config file, with its preset             (configs/docstrings.py:quick)
#   WORKDIR  where checkpoints and results go             (workdir/slurm)
#   GPUS     GPUs of a node                               (as given to sbatch)
#   VENV     the virtual environment                      (.venv)
#   PYTHON   the Python that makes it, 3.11, 3.12 or 3.13 (python3)
# And XLA's flags, as in launch/gpus.sh: DETERMINISTIC, AUTOTUNE, LATENCY_HIDING, COMMAND_BUFFERS, TRITON_GEMM.
#SBATCH --job-name=rqv2_jax
#SBATCH --ntasks-per-node=1
#SBATCH --output=slurm-%j.out
set -euo pipefail
CONFIG="${CONFIG:-configs/docstrings.py:quick}"
WORKDIR="${WORKDIR:-workdir/slurm}"
# Slurm runs a copy of this file from elsewhere.
cd "${SLURM_SUBMIT_DIR:?submit this file with sbatch}"
[ -f launch/setup.sh ] || {
  echo "error: $PWD is not the repository's root: go there and submit launch/slurm.sh again" >&2
  exit 1
}
# shellcheck source=launch/setup.sh
source launch/setup.sh
GPUS="${GPUS:-${SLURM_GPUS_PER_NODE:-}}"
# Slurm may name the type before the number, as in a100:8.
GPUS="${GPUS##*:}"
[ -n "$GPUS" ] || die "the number of GPUs is not known: give --gpus-per-node to sbatch, or set GPUS"

set_up requirements-gpu.txt
XLA_FLAGS="$(xla_flags)"
export XLA_FLAGS
# Without this JAX would take one GPU for each task.
JAX_LOCAL_DEVICE_IDS="$(seq -s, 0 "$((GPUS - 1))")"
export JAX_LOCAL_DEVICE_IDS
exec srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  "$VENV/bin/python" -m rqv2_jax.main --distributed --config "$CONFIG" --workdir "$WORKDIR" \
  --config.mesh.data="$((SLURM_JOB_NUM_NODES * GPUS))" "$@"
