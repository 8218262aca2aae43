"""pyproject.toml against the requirement files and the tree."""

import pathlib
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
# The requirement file of each list of ranges. libtpu comes with jax[tpu].
FILES = {"": "requirements.txt"} | {name: f"requirements-{name}.txt" for name in EXTRAS}
BY_ANOTHER = {"tpu": {"libtpu"}}


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
        elif line and not line.startswith(("#", "-r ")):
            requirement = Requirement(line)
            (pin,) = requirement.specifier
            assert pin.operator == "=="
            found.setdefault(canonicalize_name(requirement.name), []).append(pin.version)
    return found


def ranges(extra):
    given = EXTRAS[extra] if extra else PROJECT["project"]["dependencies"]
    return {canonicalize_name(r.name): r.specifier for r in map(Requirement, given)}


@pytest.mark.parametrize("extra", FILES)
def test_the_ranges_hold_every_pin_that_is_tested(extra):
    pinned = pins(FILES[extra])
    for name, specifier in ranges(extra).items():
        assert pinned[name], name
        assert all(version in specifier for version in pinned[name]), (name, pinned[name])
        assert specifier, f"{name} has no lower bound"


@pytest.mark.parametrize("extra", FILES)
def test_what_is_pinned_for_use_is_a_dependency(extra):
    pinned = set(pins(FILES[extra], direct=True)) - BY_ANOTHER.get(extra, set())
    assert pinned <= set(ranges(extra))


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
