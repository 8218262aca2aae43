#!/usr/bin/env bash
# Sets up a virtual environment, then runs the paper's ablations on one dataset and draws the figures.
#
#   launch/ablations.sh docstrings [--seeds=3] [--config.group.key=value ...]
#   launch/ablations.sh FOLDER     [...]       a folder in BEIR layout
#
# Run it again to continue where it stopped. Variables (relative paths start at the repository's root):
#   WORKDIR  where everything goes                        (workdir/ablations/<dataset>)
#   PRESET   "shallow": half as deep, in half the time     (none)
#   VENV     the virtual environment                      (.venv)
#   PYTHON   the Python that makes it, 3.11, 3.12 or 3.13 (python3)
set -euo pipefail
# A relative folder starts where the user stands.
[ "${1:-docstrings}" = docstrings ] || [ ! -d "$1" ] || set -- "$(cd "$1" && pwd)" "${@:2}"
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
[ $# -gt 0 ] || die "no dataset: launch/ablations.sh docstrings, or the path of a folder in BEIR layout"
dataset="$1"
shift

name="$(basename "$dataset")"
if [ "$dataset" = docstrings ]; then
  config=(--config "configs/ablations.py:docstrings${PRESET:+,$PRESET}")
elif [ -d "$dataset" ]; then
  config=(--config "configs/ablations.py:beir${PRESET:+,$PRESET}" "--config.data.path=$dataset")
  if [ -d "$dataset/qrels_sparse" ] && [ -d "$dataset/qrels_full" ]; then
    config+=(--config.data.train_qrels=qrels_sparse --config.data.eval_qrels=qrels_full)
  fi
else
  die "$dataset: no such folder; give docstrings, or the path of a folder in BEIR layout"
fi
WORKDIR="${WORKDIR:-workdir/ablations/$name${PRESET:+.$PRESET}}"

set_up requirements.txt
"$VENV/bin/python" -m rqv2_jax.ablations "${config[@]}" --workdir "$WORKDIR" "$@"
exec "$VENV/bin/python" -m rqv2_jax.report --workdir "$WORKDIR"
