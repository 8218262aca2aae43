"""Packages that only some work needs, imported when that work begins.

Training steps, encoding, re-ranking and exact search need none of them.
"""

import importlib
import os
import types

from rqv2_jax.errors import InputError


def load(name: str, work: str) -> types.ModuleType:
    """Returns the module `name`; raises InputError if a package is missing that `work` needs."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        raise InputError(
            f"{work} needs the package {e.name}, which is not installed; "
            "pip install -r requirements.txt"
        ) from e


def tensorflow(work: str) -> types.ModuleType:
    """Returns TensorFlow with its start-up messages off and accelerators hidden, which JAX uses."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    module = load("tensorflow", work)
    module.config.set_visible_devices([], "GPU")
    return module
