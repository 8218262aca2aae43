"""The launch scripts: which flags XLA gets, and that the installed jaxlib knows them."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# XLA's own names, of which a mistyped one ends the process.
ALL = {
    "DETERMINISTIC": "1",
    "AUTOTUNE": "4",
    "LATENCY_HIDING": "true",
    "COMMAND_BUFFERS": "FUSION,CUBLAS",
    "TRITON_GEMM": "false",
}


@pytest.fixture
def launch(tmp_path):
    """`launch(**variables)`: the XLA_FLAGS that launch/gpus.sh gives the program, in a list."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\n[ "$1" = --version ] || echo "$XLA_FLAGS"\n')
    python.chmod(0o755)
    # As set_up leaves it when everything is installed.
    stamp = f"cat requirements*.txt | sha256sum >'{tmp_path}/.installed-requirements-gpu.txt'"
    subprocess.run(["bash", "-c", stamp], cwd=ROOT, check=True)

    def run(**variables):
        environment = {k: v for k, v in os.environ.items() if k not in {*ALL, "XLA_FLAGS"}}
        environment |= {"VENV": str(tmp_path), "GPUS": "2"} | variables
        done = subprocess.run(
            ["launch/gpus.sh"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.split()

    return run


def starts(flags):
    """Whether JAX starts with these flags, and what it says."""
    done = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)},
        capture_output=True,
        text=True,
    )
    return done.returncode == 0, done.stderr


def test_xla_has_its_defaults_where_nothing_is_asked_for(launch):
    assert launch() == []


def test_every_variable_sets_a_flag_that_the_installed_jaxlib_knows(launch):
    flags = launch(**ALL)
    assert [flag.partition("=")[2] for flag in flags] == [
        "true",
        "4",
        "true",
        "FUSION,CUBLAS",
        "false",
    ]
    assert starts(flags)[0], starts(flags)[1]
    # Which a wrong name would be seen by.
    started, said = starts([flag.replace("=", "s=") for flag in flags])
    assert not started
    assert all(f"{flag.partition('=')[0]}s=" in said for flag in flags)


def test_flags_of_the_users_own_come_last_and_no_command_buffers_can_be_asked_for(launch):
    flags = launch(AUTOTUNE="0", COMMAND_BUFFERS="", XLA_FLAGS="--xla_gpu_autotune_level=3")
    assert flags == [
        "--xla_gpu_autotune_level=0",
        "--xla_gpu_enable_command_buffer=",
        "--xla_gpu_autotune_level=3",
    ]
