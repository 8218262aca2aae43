"""Light imports: what runs where TensorFlow and ScaNN are not installed, and what it says where not."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

import rqv2_jax
from rqv2_jax import optional
from rqv2_jax.errors import InputError

HEAVY = ("tensorflow", "tensorflow_datasets", "scann", "matplotlib", "ijson")
PACKAGE = pathlib.Path(rqv2_jax.__file__).parent
LIBRARIES = {"jax", "jaxlib", "flax", "optax", "orbax", "transformers", "tensorflow"}


def test_training_steps_encoding_and_bench_import_no_heavy_package():
    """In a process that has none of them: importing one would fail."""
    code = f"""
import sys
for name in {HEAVY}:
    sys.modules[name] = None
from rqv2_jax.data import batches
from rqv2_jax.recipe import pipeline, workdir
from rqv2_jax.retrieval import encode, index, rerank
from rqv2_jax.tools import benchmarks
from rqv2_jax.training import train
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


def test_one_module_alone_imports_a_private_name_of_jax():
    """`hosts`, for JAX's coordination service; test_hosts uses it in two processes."""
    private = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Import(names=names):
                    imported = [alias.name for alias in names]
                case ast.ImportFrom(module=str(module), names=names):
                    imported = [f"{module}.{alias.name}" for alias in names]
                case ast.Attribute():
                    # jax._src.distributed, and whatever else is reached without an import of its own.
                    imported = [ast.unparse(node)]
                case _:
                    continue
            for name in imported:
                root, *parts = name.split(".")
                if root in LIBRARIES and any(re.match(r"_[a-z]", part) for part in parts):
                    private.setdefault(path.name, set()).add(name)
    assert private == {"hosts.py": {"jax._src.distributed"}}
