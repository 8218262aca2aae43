"""Hashes of the requirement files: how they are written, and that launch/setup.sh checks them."""

import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def program(tmp_path, monkeypatch):
    """.ci/hashes.py in a folder of its own, with a lock that knows a few packages."""
    spec = importlib.util.spec_from_file_location("hashes", ROOT / ".ci" / "hashes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hashes.py"])
    return module


def entry(*names, **more):
    """A package of uv's lock whose wheels have the hashes H0, H1, ... in that order."""
    wheels = [
        {"url": f"https://host/{name}", "hashes": {"sha256": f"H{n}"}}
        for n, name in enumerate(names)
    ]
    return {"wheels": wheels, "sdist": {"hashes": {"sha256": "SOURCE"}}, **more}


def written(*hashes):
    return "".join(f" \\\n    --hash=sha256:{each}" for each in hashes)


def test_only_files_that_pip_may_choose_are_taken(program):
    files = (
        "a-1-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        "a-1-cp312-cp312-manylinux_2_28_x86_64.whl",
        "a-1-cp313-cp313-manylinux1_x86_64.whl",
        "a-1-cp310-cp310-manylinux1_x86_64.whl",
        "a-1-cp313-cp313t-manylinux1_x86_64.whl",
        "a-1-cp311-cp311-musllinux_1_2_x86_64.whl",
        "a-1-cp311-cp311-manylinux_2_28_aarch64.whl",
        "a-1-cp311-cp311-macosx_11_0_arm64.whl",
    )
    locked = {("a", "1"): entry(*files)}
    assert program.hashed("A==1", locked) == "A==1" + written("H0", "H1", "H2")
    older = 'A==1 ; python_version < "3.12"'
    assert program.hashed(older, locked) == older + written("H0")
    assert program.hashed("# A==1", locked) == "# A==1"


def test_wheels_for_several_pythons_are_taken_once_and_the_source_for_want_of_a_wheel(program):
    locked = {
        ("a", "1"): entry("a-1-cp39-abi3-manylinux2014_x86_64.whl"),
        ("b", "1"): entry("b-1-py2.py3-none-any.whl"),
        ("c", "1"): entry("c-1-cp311-cp311-manylinux2014_x86_64.whl"),
        ("d", "1"): entry(),
    }
    assert [program.hashed(f"{name}==1", locked) for name in "abcd"] == [
        "a==1" + written("H0"),
        "b==1" + written("H0"),
        "c==1" + written("H0", "SOURCE"),
        "d==1" + written("SOURCE"),
    ]


def test_a_file_keeps_its_comments_and_a_stale_hash_or_an_unpinned_package_is_told_of(
    program, tmp_path, monkeypatch, capsys
):
    pinned = {("a", "1"): entry("a-1-py3-none-any.whl")}
    other = {("b", "2"): entry(marker="sys_platform == 'win32'")}
    monkeypatch.setattr(program, "lock", lambda _, *flags: pinned | other)
    file = tmp_path / "requirements.txt"
    file.write_text("# Why a.\na==1 \\\n    --hash=sha256:STALE\n\n# The end.\n")
    monkeypatch.setattr(sys, "argv", ["hashes.py", "--check"])
    assert program.main() == 1
    assert capsys.readouterr().out == "requirements.txt: hashes differ from the index's\n"
    assert "STALE" in file.read_text()
    monkeypatch.setattr(sys, "argv", ["hashes.py"])
    assert program.main() == 0
    assert file.read_text() == f"# Why a.\na==1{written('H0')}\n\n# The end.\n"
    pulled = {
        ("b", "2"): entry(marker="python_version > '3.12'"),
        ("c", "3"): entry(marker="sys_platform == 'win32'"),
    }
    monkeypatch.setattr(
        program, "lock", lambda _, *flags: pinned if "--no-deps" in flags else pinned | pulled
    )
    assert program.main() == 1
    assert capsys.readouterr().out.strip() == "requirements.txt: b is pulled in and not pinned"


def wheel(folder, name, text=""):
    """Writes a package of one module and returns its hash."""
    path = folder / f"{name}-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", text)
        archive.writestr(
            f"{name}-1.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n"
        )
        archive.writestr(
            f"{name}-1.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{name}-1.dist-info/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def set_up(tmp_path):
    """`set_up()`: runs launch/setup.sh over three packages; its status, output, modules and stamp."""
    clone, wheels = tmp_path / "clone", tmp_path / "wheels"
    wheels.mkdir()
    (clone / "launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "setup.sh", clone / "launch")
    for name, file in (("rq_a", "requirements.txt"), ("rq_b", "requirements-models.txt")):
        hashed = f"{name}==1 \\\n    --hash=sha256:{wheel(wheels, name)}\n"
        (clone / file).write_text(f"# {name}\n{hashed}")
    wheel(wheels, "rq_c")
    (clone / "requirements-others.txt").write_text("rq_c==1\n")
    python = clone / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)

    def run():
        # pip writes to a folder of its own, and sees no index and no settings but these.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")} | {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(wheels),
            "PIP_TARGET": str(tmp_path / "installed"),
        }
        environment.pop("VENV", None)
        script = ". launch/setup.sh; set_up requirements.txt requirements-others.txt"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=clone,
            env=environment,
            capture_output=True,
            text=True,
        )
        modules = sorted(path.stem for path in (tmp_path / "installed").glob("rq_*.py"))
        stamped = (clone / ".venv" / ".installed-requirements.txt").exists()
        return done.returncode, done.stdout + done.stderr, modules, stamped

    return run


def test_set_up_installs_what_has_its_hash_and_what_is_listed_without(set_up):
    status, said, modules, stamped = set_up()
    assert status == 0, said
    assert modules == ["rq_a", "rq_b", "rq_c"]
    assert stamped
    assert set_up()[:2] == (0, "")


@pytest.mark.parametrize("name", ["rq_a", "rq_b"])
def test_set_up_installs_nothing_if_a_package_is_another_than_was_pinned(set_up, tmp_path, name):
    wheel(tmp_path / "wheels", name, "altered = True\n")
    status, said, modules, stamped = set_up()
    assert status == 1
    assert "error: pip could not install requirements.txt" in said
    assert "DO NOT MATCH" in said
    assert modules == []
    assert not stamped
