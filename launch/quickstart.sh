#!/usr/bin/env bash
# Sets up a virtual environment, then trains and evaluates on the embedded data.
#
#   launch/quickstart.sh [--config.group.key=value ...]
#
# Run it again to continue where it stopped. Variables (relative paths start at the repository's root):
#   WORKDIR  where checkpoints and results go             (workdir/quickstart)
#   VENV     the virtual environment                      (.venv)
#   PYTHON   the Python that makes it, 3.11, 3.12 or 3.13 (python3)
set -euo pipefail
WORKDIR="${WORKDIR:-workdir/quickstart}"
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

set_up requirements.txt
exec "$VENV/bin/python" -m rqv2_jax.main --config configs/docstrings.py:quick --workdir "$WORKDIR" "$@"
