"""Light imports: what runs where TensorFlow and ScaNN are not installed, and what it says where not."""

import subprocess
import sys

import pytest

from rqv2_jax import optional
from rqv2_jax.errors import InputError

HEAVY = ("tensorflow", "tensorflow_datasets", "scann", "matplotlib", "ijson")


def test_training_steps_encoding_and_bench_import_no_heavy_package():
    """In a process that has none of them: importing one would fail."""
    code = f"""
import sys
for name in {HEAVY}:
    sys.modules[name] = None
from rqv2_jax.recipe import pipeline, workdir
from rqv2_jax.tools import accelerator_checks, benchmarks
from rqv2_jax.training import train
from rqv2_jax.data import batches
from rqv2_jax.retrieval import encode, index, rerank
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_package_that_is_missing_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "scann", None)
    with pytest.raises(InputError, match="an index by ScaNN needs the package scann, which is not"):
        optional.load("scann", "an index by ScaNN")


def test_an_error_inside_a_package_stays_itself(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError):
        optional.load("broken_package", "a test")
