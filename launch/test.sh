#!/usr/bin/env bash
# Sets up a virtual environment, then lints, checks types and tests.
#
#   launch/test.sh                       the default suite
#   launch/test.sh -m slow               the slow tests
#   launch/test.sh -k metrics -x         any arguments of pytest's
#
# VENV and PYTHON as in launch/quickstart.sh.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

set_up requirements-test.txt requirements-torch.txt
"$VENV/bin/python" -m ruff check .
"$VENV/bin/python" -m ruff format --check .
"$VENV/bin/python" -m mypy
# Most of a test's time is compiling, which one core does. A file's tests share what its fixtures train.
exec "$VENV/bin/python" -m pytest -n 2 --dist loadfile "$@"
