"""Where --config finds its file: in the current folder first, then among the shipped ones."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(params=["a clone", "installed"])
def package_at(request, tmp_path):
    """The folder to import the package from: this clone, or a folder laid out as the wheel does."""
    if request.param == "a clone":
        return ROOT
    installed = tmp_path / "site packages"
    shutil.copytree(ROOT / "rqv2_jax", installed / "rqv2_jax")
    shutil.copytree(ROOT / "configs", installed / "rqv2_jax" / "configs")
    # Another package's: not ours.
    (installed / "configs").mkdir()
    (installed / "configs" / "beir.py").write_text("raise ValueError('not ours')\n")
    return installed


def error(package_at, folder, config):
    """Starts a command in `folder` with a setting that no config has; returns its error line."""
    command = [sys.executable, "-m", "rqv2_jax.main", f"--config={config}", "--workdir=w"]
    command.append("--config.nothing=1")
    environment = {**os.environ, "PYTHONPATH": str(package_at)}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2
    return ended.stderr.splitlines()[-1]


def test_a_shipped_config_is_found_from_any_folder_and_a_users_own_comes_first(
    package_at, tmp_path
):
    folder = tmp_path / "elsewhere"
    (folder / "configs").mkdir(parents=True)
    read = "no such setting: 'nothing'"
    for name in ("configs/beir.py", "beir.py:paper"):
        assert read in error(package_at, folder, name)
    for name in ("configs/beirs.py", "/configs/beir.py"):
        assert "Failed loading config file" in error(package_at, folder, name)
    (folder / "configs" / "beir.py").write_text("raise ValueError('of the user')\n")
    assert error(package_at, folder, "configs/beir.py").endswith("of the user")
    assert read in error(package_at, folder, "beir.py")
