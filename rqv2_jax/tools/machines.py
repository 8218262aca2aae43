"""Chips, GPUs and topologies that steps are compiled or counted for, and measurements of this one."""

import dataclasses
import importlib.util
import re
import resource
import time
from collections.abc import Callable

import jax
import numpy as np

from rqv2_jax.errors import InputError, one_line
from rqv2_jax.room import GIB, host_memory

# What makers state for one chip: bytes of main memory, bfloat16 operations a second, bytes a second
# of main memory and of the links to other chips.
CHIPS = {
    "v4": (32 * GIB, 275e12, 1228e9, 300e9),
    "v5e": (16 * GIB, 197e12, 819e9, 200e9),
    "v5p": (95 * GIB, 459e12, 2765e9, 600e9),
    "v6e": (32 * GIB, 918e12, 1640e9, 448e9),
}
# Bytes of memory of the host of four chips, as Google Cloud rents them; hosts of fewer chips have less.
HOSTS = {"v4": 407e9, "v5e": 192e9, "v5p": 448e9, "v6e": 720e9}
GPUS = {
    "h100": (80e9, 989e12, 3350e9, 900e9),
    "h200": (141e9, 989e12, 4800e9, 900e9),
    "a100": (80e9, 312e12, 2039e9, 600e9),
    "l4": (24e9, 121e12, 300e9, 64e9),
}
USABLE = 0.98  # of a chip's memory; the rest is the runtime's


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices to compile for; rates are per device and second, `memory` in bytes."""

    topology: str
    devices: list
    memory: float
    flops: float
    bandwidth: float
    links: float
    # Bytes of memory of the host of the first devices, where it is known.
    host_memory: float | None = dataclasses.field(default=None, kw_only=True)
    # Nothing can be compiled for GPUs that are not there: formulas count their steps.
    counted: bool = dataclasses.field(default=False, kw_only=True)


def machine(topology: str) -> Machine:
    """Returns the devices of a topology such as `v5e:4x8`, `h100:8` or `cpu:8`."""
    kind, _, shape = topology.partition(":")
    number = re.fullmatch(r"[1-9]\d*", shape)
    if kind in GPUS and number:
        memory, *rates = GPUS[kind]
        # The host's devices take their places, so that arrays can be laid out.
        return Machine(topology, jax.devices()[: int(shape)], USABLE * memory, *rates, counted=True)
    if kind == "cpu" and number:
        count = int(shape)
        memory, _ = host_memory()
        large = np.ones(2**26, np.float32)
        copied_in = min(seconds(lambda: np.copyto(np.empty_like(large), large), 4))
        bandwidth = 2 * large.nbytes / copied_in
        each = (x / count for x in (memory, peak("float32"), bandwidth, bandwidth))
        return Machine(topology, jax.devices()[:count], *each, host_memory=memory)
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise InputError(
            f"--topology is {topology!r}; write one of {', '.join(CHIPS)} with a shape, as v5e:4x8 or "
            f"v4:2x2x2; or one of {', '.join(GPUS)}, cpu with a number, as h100:8"
        )
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        if importlib.util.find_spec("libtpu") is None:
            raise InputError(
                "--topology: libtpu is not installed; pip install -r requirements-tpu.txt"
            ) from None
        raise InputError(
            f"--topology {topology}: libtpu does not know it ({one_line(error)})"
        ) from None
    memory, *rates = CHIPS[kind]
    on_host = HOSTS[kind] * min(len(devices), 4) / 4
    return Machine(topology, devices, USABLE * memory, *rates, host_memory=on_host)


def peak(dtype: str) -> float:
    """Measures operations a second of matrix products on one device, best of 5.

    The products are 2,048 x 2,048 on a CPU. Elsewhere they are 8,192 x 8,192 and several in a row,
    because a small one takes less time than its start. The factors are random: some chips are faster
    on constant ones.
    """
    size, times = (2048, 1) if jax.default_backend() == "cpu" else (8192, 8)
    x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    product = jax.jit(lambda x: jax.lax.fori_loop(0, times, lambda _, y: (x @ y) * size**-0.5, x))
    return times * 2 * size**3 / min(seconds(lambda: product(x).block_until_ready(), 6)[1:])


def seconds(work: Callable, times: int) -> list[float]:
    """Returns the seconds of each of a number of calls."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return taken


def in_turn(
    ours: Callable, theirs: Callable | None, rounds: int
) -> tuple[list[float], list[float]]:
    """Returns the seconds of rounds of ours and, by turns, of theirs; each has had one round before."""
    our_seconds, their_seconds = [], []
    for _ in range(rounds):
        our_seconds += seconds(ours, 1)
        if theirs is not None:
            their_seconds += seconds(theirs, 1)
    return our_seconds, their_seconds


def against(name: str, what: str, theirs: list[float], ours: list[float]) -> dict:
    """Returns the median of a rival's seconds, and how many times ours it is."""
    median = float(np.median(theirs))
    return {f"{name}_{what}": median, f"{name}_ratio": median / float(np.median(ours))}


def peak_memory() -> float:
    """Returns the most GiB that the device has held if it counts them, else this whole process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None:
        return stats["peak_bytes_in_use"] / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def shares_of_peak(dtype: str, rate: float) -> dict:
    """Returns a device's FLOPs a second over the measured peak, and over the maker's if known."""
    best, names = peak(dtype), re.split(r"[\s-]+", jax.devices()[0].device_kind.lower())
    shares = {"peak_gflop_per_second": best / 1e9, "share_of_peak": rate / best}
    chip = next((name for name in names if name in GPUS), None)
    if chip is not None and dtype == "bfloat16":
        shares["share_of_makers_peak"] = rate / GPUS[chip][1]
    return shares
