"""Whether a run fits on a disk and in a host's memory: tables for people, and a line for each fault."""

from typing import NamedTuple

from ml_collections import ConfigDict

from rqv2_jax.models.scoring import Models
from rqv2_jax.recipe import memory, needs
from rqv2_jax.recipe.memory import Host
from rqv2_jax.recipe.needs import Sizes
from rqv2_jax.room import GIB


class Room(NamedTuple):
    """The free bytes of a disk, and a host's bytes of memory; None where they are not known."""

    disk: float | None
    memory: float | None


def compare(
    config: ConfigDict, models: Models, sizes: Sizes, host: Host, room: Room
) -> tuple[str, dict[str, str]]:
    """Returns tables of what a run needs at most, and by "disk" and "memory" what is too small."""
    disk, held = needs.disk(config, models, sizes), memory.parts_of(config, models, sizes, host)
    written, (peak, _) = sum(part.most for part in disk), memory.peak(held, "most")
    faults = {}
    if room.disk is not None:
        faults["disk"] = needs.short_of_disk(disk, room.disk, "most")
    if room.memory is not None:
        faults["memory"] = memory.short_of_memory(held, room.memory, "most")
    lines = [
        *needs.render("disk", disk),
        _total("all of it", written, room.disk),
        *needs.render("memory of the first host", held),
        _total("at the worst moment", peak, room.memory),
    ]
    return "\n".join(lines), {where: line for where, line in faults.items() if line}


def _total(what: str, needed: float, there: float | None) -> str:
    known = "unknown" if there is None else f"{there / GIB:.2f}"
    return f"| {what}; there is: {known} | {needed / GIB:.2f} |"
