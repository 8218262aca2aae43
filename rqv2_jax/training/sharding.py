"""The mesh and every sharding.

The mesh has two axes: lists are split over both, `data` and `fsdp`; params and optimizer state are
split over `fsdp` alone, each leaf along its largest dimension that divides. In a step a shard gathers
the params, computes its own lists' scores, and gathers all scores, so that it sees the loss of the
global batch; one reduction of the gradients ends the step. A device with several parts of the batch
computes one after the other, so memory is that of one part, and adds up their gradients. The devices
may be those of several hosts, each of which makes its own devices' parts of every batch.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rqv2_jax.errors import InputError

AXES = ("data", "fsdp")

Tree = Any  # of arrays: params, a state or a batch


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A mesh of `data * fsdp` devices, with one shard of the batch on each."""

    mesh: Mesh

    @property
    def shards(self) -> int:
        """Returns the number of devices."""
        return self.mesh.size

    @property
    def batch(self) -> NamedSharding:
        """Returns the sharding of arrays whose leading axis counts shards, or parts of shards."""
        return NamedSharding(self.mesh, P(AXES))

    def put_params(self, params: Tree) -> Tree:
        """Puts params or a state on the devices, split over `fsdp`; every host gives the same."""
        shardings = self.of_params(params)
        if self.batch.is_fully_addressable:
            return jax.device_put(params, shardings)
        return jax.tree.map(_put, params, shardings)

    def of_params(self, params: Tree) -> Tree:
        """Returns the sharding of every leaf."""
        return jax.tree.map(lambda x: NamedSharding(self.mesh, self._spec(x)), params)

    def put_batch(self, batch: Tree) -> Tree:
        """Puts a batch on the devices; every leaf holds the parts that `own_parts` names."""
        return jax.make_array_from_process_local_data(self.batch, batch)

    def own_parts(self, parts: int) -> list[int]:
        """Returns the parts of a batch that lie on this process's devices, in ascending order."""
        places, own = self.batch.devices_indices_map((parts,)), self.batch.addressable_devices
        return sorted(part for device in own for part in range(parts)[places[device][0]])

    def _spec(self, leaf: Any) -> P:
        parts = self.mesh.shape["fsdp"]
        sizes = [(size, -i) for i, size in enumerate(leaf.shape) if size % parts == 0]
        if parts == 1 or not sizes:
            return P()
        return P(*(None for _ in range(-max(sizes)[1])), "fsdp")

    def _shard_map(self, fn: Callable, in_specs: Any, out_specs: Any) -> Callable:
        specs = {"in_specs": in_specs, "out_specs": out_specs}
        return jax.shard_map(fn, mesh=self.mesh, **specs, check_vma=False)

    def value_and_grad(self, loss_fn: Callable, *, by_part: bool = False) -> Callable:
        """Differentiates `loss_fn(params, batch, key, gather) -> (loss, terms)` over all shards.

        The batch's leading axis counts parts, one for each shard or the same number for all.
        `loss_fn` gets full params, one part of the batch and a key of its own. It must pass its
        scores through `gather` (which joins the shards along axis 0) before the loss, so that every
        shard returns the same loss: that of the same part of all shards. If `by_part`, it gets all
        parts of the shard at once, and returns the loss of the global batch.

        Returns:
          `f(params, batch, key) -> ((loss, terms), grads)`, means over the parts of a shard; grads
          sharded as the params.
        """
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

        def f(params: Tree, batch: Tree, key: jax.Array) -> tuple:
            specs = jax.tree.map(self._spec, params)

            def local(params: Tree, batch: Tree, key: jax.Array) -> tuple:
                key = jax.random.fold_in(key, jax.lax.axis_index(AXES))
                params = _gather_params(params, specs)

                if by_part:
                    value, grads = grad_fn(params, batch, key, gather_shards)
                    return value, jax.tree.map(self._reduce, grads, specs)

                def part(number: int | jax.Array, batch: Tree) -> tuple:
                    return grad_fn(params, batch, jax.random.fold_in(key, number), gather_shards)

                value, grads = _mean_over_parts(part, batch)
                return value, jax.tree.map(self._reduce, grads, specs)

            return self._shard_map(local, (specs, P(AXES), P()), (P(), specs))(params, batch, key)

        return f

    def _reduce(self, grad: jax.Array, spec: P) -> jax.Array:
        # The transpose of `gather` sums over shards what every shard computed from the same loss, so
        # the mean over shards is the gradient of that loss.
        if not spec:
            return jax.lax.pmean(grad, AXES)
        axis = len(spec) - 1
        grad = jax.lax.psum_scatter(grad, "fsdp", scatter_dimension=axis, tiled=True)
        return jax.lax.pmean(grad, "data") / self.mesh.shape["fsdp"]

    def per_shard(self, fn: Callable) -> Callable:
        """Compiles `fn(params, batch) -> [n, ...]` for every shard; results are joined along axis 0.

        On several hosts every process gets all of them.
        """
        everywhere = not self.batch.is_fully_addressable

        @jax.jit
        def f(params: Tree, batch: Tree) -> jax.Array:
            specs = jax.tree.map(self._spec, params)

            def local(params: Tree, batch: Tree) -> jax.Array:
                result = fn(_gather_params(params, specs), jax.tree.map(lambda x: x[0], batch))
                return gather_shards(result) if everywhere else result

            out_specs = P() if everywhere else P(AXES)
            return self._shard_map(local, (specs, P(AXES)), out_specs)(params, batch)

        return f


gather_shards = partial(jax.lax.all_gather, axis_name=AXES, axis=0, tiled=True)


def _gather_params(params: Tree, specs: Any) -> Tree:
    """Joins the parts of every leaf that lie on the devices of `fsdp`."""

    def gather(leaf: jax.Array, spec: P) -> jax.Array:
        if not spec:
            return leaf
        return jax.lax.all_gather(leaf, "fsdp", axis=len(spec) - 1, tiled=True)

    return jax.tree.map(gather, params, specs)


def _mean_over_parts(part: Callable, batch: Tree) -> tuple:
    """Returns the mean of `part(number, batch)` over the parts of a shard, one after the other."""
    parts = len(jax.tree.leaves(batch)[0])
    first = jax.tree.map(lambda x: x[0], batch)
    if parts == 1:
        return part(0, first)
    shapes = jax.eval_shape(part, 0, first)
    total, _ = jax.lax.scan(
        lambda total, x: (jax.tree.map(jnp.add, total, part(*x)), None),
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
        (jnp.arange(parts), batch),
    )
    return jax.tree.map(lambda x: x / parts, total)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """Does what `jax.device_put` does, which would send the leaf between hosts to compare it."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    values = np.asarray(leaf)
    return jax.make_array_from_callback(values.shape, sharding, values.__getitem__)


def make(data: int, fsdp: int) -> Sharding:
    """Returns a mesh over the first `data * fsdp` devices; on several hosts it must use all.

    Raises InputError if there are not that many devices, or a host would be left out.
    """
    devices = jax.devices()
    if jax.process_count() > 1 and data * fsdp != len(devices):
        raise InputError(
            f"config.mesh asks for {data} x {fsdp} devices, but {jax.process_count()} processes have "
            f"{len(devices)}, which must all be used; give --config.mesh.data={len(devices)}"
        )
    if data * fsdp > len(devices):
        raise InputError(
            f"config.mesh asks for {data} x {fsdp} devices, but there are {len(devices)}; "
            "lower config.mesh.data or config.mesh.fsdp"
        )
    return over(devices[: data * fsdp], data, fsdp)


def over(devices: Sequence[jax.Device], data: int, fsdp: int) -> Sharding:
    """Returns a mesh over these `data * fsdp` devices."""
    types = (AxisType.Auto,) * 2
    return Sharding(jax.make_mesh((data, fsdp), AXES, axis_types=types, devices=devices))
