"""The embedded data: documentation of the installed Python packages, from all-MiniLM-L6-v2."""

from rqv2_jax import config as config_lib


def get_config(preset: str = "core"):
    """Presets: core, full."""
    config = config_lib.default()
    config.data.dataset = "docstrings"
    config.data.preset = preset
    config.model.pooling = "mean"
    return config
