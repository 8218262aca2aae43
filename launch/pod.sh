#!/usr/bin/env bash
# Trains and evaluates on a Cloud TPU slice: starts this repository on all its hosts, one process on each.
# Not run on such machines yet.
#
#   TPU=my-slice ZONE=us-west4-a CHIPS=32 FOLDER=/mnt/shared/rqv2_jax launch/pod.sh [--config... ...]
#
# Run it from anywhere with gcloud, again to continue where it stopped. Variables:
#   TPU      the slice's name; v5e:4x8, for one, has 8 hosts of 4 chips
#   ZONE     where it is
#   CHIPS    how many chips it has
#   FOLDER   this repository on a file system that all hosts have mounted, as workdir, data and weights are
#   CONFIG   the config file, with its preset             (configs/docstrings.py:quick)
#   WORKDIR  where results go, relative to FOLDER         (workdir/pod)
#   VENV     a virtual environment on each host's disk    (/tmp/rqv2_jax.venv)
#   PYTHON   the hosts' Python, 3.11, 3.12 or 3.13        (python3)
set -euo pipefail
: "${TPU:?give the name of the slice}" "${ZONE:?give its zone}" "${CHIPS:?give its number of chips}"
: "${FOLDER:?give the path of the repository on a file system that all hosts see}"
CONFIG="${CONFIG:-configs/docstrings.py:quick}"
WORKDIR="${WORKDIR:-workdir/pod}"
VENV="${VENV:-/tmp/rqv2_jax.venv}"
PYTHON="${PYTHON:-python3}"

command=("$VENV/bin/python" -m rqv2_jax.main --distributed --config "$CONFIG" --workdir "$WORKDIR"
  --config.mesh.data="$CHIPS" "$@")
# One line, so that whatever shell the hosts log in with can read it.
script="set -euo pipefail; VENV=$(printf %q "$VENV"); PYTHON=$(printf %q "$PYTHON")"
script+="; source $(printf %q "$FOLDER/launch/setup.sh"); set_up requirements-tpu.txt"
script+="; exec$(printf ' %q' "${command[@]}")"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="bash -c $(printf %q "$script")"
