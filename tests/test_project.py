"""pyproject.toml against the requirement files and the tree."""

import importlib.metadata
import pathlib
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
# The requirement file of each list of ranges. libtpu comes with jax[tpu]; PyTorch has its own file.
FILES = {"": "requirements.txt"} | {name: f"requirements-{name}.txt" for name in EXTRAS}
BY_ANOTHER = {"tpu": {"libtpu"}}
TORCH = "requirements-torch.txt"
APART = {"bench": TORCH, "test": TORCH}


def requirements(name):
    """{line of a requirement file: its hashes}, without comments and included files."""
    text = (ROOT / name).read_text().replace(" \\\n", "")
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "-r "))]
    return {re.split(" +--hash=", x)[0]: re.split(" +--hash=", x)[1:] for x in lines}


def pins(name, direct=False):
    """{package: its pinned versions} of a requirement file, and of those that it includes.

    With `direct`, only what this file itself lists before what those pull in.
    """
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        if re.match(r"# What (those|that) pulls? in", line) and direct:
            break
        if line.startswith("-r ") and not direct:
            found |= pins(line.removeprefix("-r ").strip())
        elif line and not line.startswith(("#", "-r ", " ")):
            requirement = Requirement(line.removesuffix(" \\"))
            (pin,) = requirement.specifier
            assert pin.operator == "=="
            found.setdefault(canonicalize_name(requirement.name), []).append(pin.version)
    return found


def ranges(extra):
    given = EXTRAS[extra] if extra else PROJECT["project"]["dependencies"]
    return {canonicalize_name(r.name): r.specifier for r in map(Requirement, given)}


@pytest.mark.parametrize("extra", FILES)
def test_the_ranges_hold_every_pin_that_is_tested(extra):
    pinned = pins(FILES[extra]) | (pins(APART[extra]) if extra in APART else {})
    for name, specifier in ranges(extra).items():
        assert pinned[name], name
        assert all(version in specifier for version in pinned[name]), (name, pinned[name])
        assert specifier, f"{name} has no lower bound"


@pytest.mark.parametrize("extra", FILES)
def test_what_is_pinned_for_use_is_a_dependency(extra):
    pinned = set(pins(FILES[extra], direct=True)) - BY_ANOTHER.get(extra, set())
    assert pinned <= set(ranges(extra))


@pytest.mark.parametrize("path", sorted(ROOT.glob("requirements*.txt")), ids=lambda path: path.name)
def test_every_requirement_has_hashes_but_pytorch(path):
    for line, hashes in requirements(path.name).items():
        assert bool(hashes) == (path.name != TORCH), line
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", each) for each in hashes), line
        assert len(set(hashes)) == len(hashes), line


def pulled_in(requirement):
    """Names of what an installed package asks for here, with the extras that are asked of it."""
    for line in importlib.metadata.requires(requirement.name) or []:
        asked = Requirement(line)
        environments = [{"extra": extra} for extra in ("", *requirement.extras)]
        if asked.marker is None or any(map(asked.marker.evaluate, environments)):
            yield asked


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-test.txt"])
def test_what_a_pinned_package_pulls_in_is_pinned(name):
    """Files with hashes are installed without looking at what their packages ask for."""
    pinned = set(pins(name)) | (set(pins(TORCH)) if name != "requirements.txt" else set())
    todo = [Requirement(package) for package in pins(name)]
    seen = set()
    while todo:
        requirement = todo.pop()
        assert canonicalize_name(requirement.name) in pinned, requirement
        if str(requirement) not in seen and canonicalize_name(requirement.name) != "torch":
            todo += pulled_in(requirement)
        seen.add(str(requirement))


def test_what_the_wheel_takes_from_outside_the_package_lies_there_as_in_a_clone():
    """Configs find their data by a path from their own place."""
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    included = wheel["force-include"]
    assert wheel["packages"] == ["rqv2_jax"]
    assert all(target == f"rqv2_jax/{source}" for source, target in included.items())
    data = {path.name for path in (ROOT / "tests" / "fixtures").iterdir() if path.is_dir()}
    assert set(included) == {
        "configs",
        *(f"tests/fixtures/{name}" for name in data - {"__pycache__"}),
    }
    assert (ROOT / "rqv2_jax" / "py.typed").is_file()
