"""Free disk, and the memory of this host within the limits of its control groups."""

import os
import pathlib
import shutil

GIB = 2**30

# Where the kernel keeps a control group's limit, its use, and what of that files take: version 2, 1.
GROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "file"),
    "memory": (
        *("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        "total_cache",
    ),
}


def free_disk(folder: pathlib.Path) -> int:
    """Returns the free bytes of the disk that a folder, made or not yet, lies on."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def host_memory(root: pathlib.Path = pathlib.Path("/")) -> tuple[float, float]:
    """Returns this host's memory, and what of it this process may take, its present share included.

    Both within the limits of the control groups that the process is in (a container, a batch job).
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    read = {name: 1024 * int(value.split()[0]) for name, value in (x.split(":") for x in lines)}
    total, available = float(read["MemTotal"]), float(read["MemAvailable"])
    for limit, used in _limits(root):
        total, available = min(total, limit), min(available, limit - used)
    resident = int((root / "proc/self/statm").read_text().split()[1])
    return total, available + resident * os.sysconf("SC_PAGE_SIZE")


def _limits(root: pathlib.Path) -> list[tuple[float, float]]:
    """Returns limit and use of every control group of this process that has a limit."""
    found = []
    path = root / "proc/self/cgroup"
    for line in path.read_text().splitlines() if path.is_file() else ():
        _, kinds, group = line.split(":", 2)
        kind = "memory" if "memory" in kinds.split(",") else kinds
        if kind not in GROUPS:
            continue
        base, limit, used, cached = GROUPS[kind]
        inner = pathlib.PurePath(group.lstrip("/"))
        # A container may see its own group as the topmost one.
        for folder in (root / base / each for each in (inner, *inner.parents)):
            try:
                most = float((folder / limit).read_text().replace("max", "inf"))
                stat = dict(x.split() for x in (folder / "memory.stat").read_text().splitlines())
                # The kernel gives up what it keeps of files before it kills a process.
                held = float((folder / used).read_text()) - float(stat[cached])
            except (OSError, KeyError, ValueError):
                continue
            found.append((most, held))
    return found
