"""The mesh and every sharding.

Two mesh axes: lists are split over both, `data` and `fsdp`; params and optimizer state are split over
`fsdp` alone, each leaf along its largest dimension that divides. A step gathers the params it needs,
computes its own lists' scores, gathers those few numbers, and sees the loss of the global batch; one
reduction of the gradients ends the step. Where a device has several parts of the batch, it computes
one after the other, which bounds memory by one part, and adds up their gradients. The devices may be
those of several hosts, each of which makes its own devices' parts of every batch.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rqv2_jax.errors import InputError

AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A mesh of `data * fsdp` devices; `shards` of the batch lie one on each."""

    mesh: Mesh

    @property
    def shards(self) -> int:
        """How many parts a batch is split into."""
        return self.mesh.size

    @property
    def batch(self) -> NamedSharding:
        """Of arrays whose leading axis counts shards, or parts of shards."""
        return NamedSharding(self.mesh, P(AXES))

    def put_params(self, params):
        """Params (or any state) on the devices, each leaf split over `fsdp` where it divides.

        On several hosts every process gives the same values.
        """
        shardings = self.of_params(params)
        if self.batch.is_fully_addressable:
            return jax.device_put(params, shardings)
        return jax.tree.map(_put, params, shardings)

    def of_params(self, params):
        """The sharding of every leaf."""
        return jax.tree.map(lambda x: NamedSharding(self.mesh, self._spec(x)), params)

    def put_batch(self, batch):
        """A batch on the devices; every leaf holds the parts that `own_parts` names."""
        if self.batch.is_fully_addressable:
            return jax.device_put(batch, self.batch)

        def put(leaf):
            parts = len(leaf) * self.shards // len(self.batch.addressable_devices)
            own = self.own_parts(parts)
            return jax.make_array_from_callback(
                (parts, *leaf.shape[1:]),
                self.batch,
                lambda index: leaf[np.searchsorted(own, range(parts)[index[0]])],
            )

        return jax.tree.map(put, batch)

    def own_parts(self, parts: int) -> list[int]:
        """Which of a batch's parts lie on this process's devices, in ascending order."""
        slices = self.batch.addressable_devices_indices_map((parts,)).values()
        return sorted(part for (own,) in slices for part in range(parts)[own])

    def _spec(self, leaf) -> P:
        parts = self.mesh.shape["fsdp"]
        sizes = [(size, -i) for i, size in enumerate(leaf.shape) if size % parts == 0]
        if parts == 1 or not sizes:
            return P()
        return P(*(None for _ in range(-max(sizes)[1])), "fsdp")

    def _gather_params(self, params):
        def gather(leaf, spec):
            if not spec:
                return leaf
            return jax.lax.all_gather(leaf, "fsdp", axis=len(spec) - 1, tiled=True)

        return lambda local: jax.tree.map(gather, local, jax.tree.map(self._spec, params))

    def value_and_grad(self, loss_fn):
        """`loss_fn(params, batch, key, gather) -> (loss, terms)` over all shards, with gradients.

        The batch's leading axis counts parts, one for each shard or the same number for all.
        `loss_fn` gets full params, one part of the batch and a key of its own. It must pass its
        scores through `gather` (which joins the shards along axis 0) before the loss, so that every
        shard returns the same loss: that of the same part of all shards.

        Returns:
          `f(params, batch, key) -> ((loss, terms), grads)`, means over the parts of a shard; grads
          sharded as the params.
        """

        def f(params, batch, key):
            specs = jax.tree.map(self._spec, params)
            gather_params = self._gather_params(params)

            def local(params, batch, key):
                key = jax.random.fold_in(key, jax.lax.axis_index(AXES))
                params = gather_params(params)
                parts = len(jax.tree.leaves(batch)[0])

                def part(number, batch):
                    part_key = jax.random.fold_in(key, number)
                    return jax.value_and_grad(loss_fn, has_aux=True)(
                        params, batch, part_key, gather_shards
                    )

                first = jax.tree.map(lambda x: x[0], batch)
                if parts == 1:
                    value, grads = part(0, first)
                else:
                    shapes = jax.eval_shape(part, 0, first)
                    total, _ = jax.lax.scan(
                        lambda total, x: (jax.tree.map(jnp.add, total, part(*x)), None),
                        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
                        (jnp.arange(parts), batch),
                    )
                    value, grads = jax.tree.map(lambda x: x / parts, total)

                def reduce(grad, spec):
                    # The transpose of `gather` sums over shards what every shard computed from the
                    # same loss, so the mean over shards is the gradient of that loss.
                    if not spec:
                        return jax.lax.pmean(grad, AXES)
                    grad = jax.lax.psum_scatter(
                        grad, "fsdp", scatter_dimension=len(spec) - 1, tiled=True
                    )
                    return jax.lax.pmean(grad, "data") / self.mesh.shape["fsdp"]

                return value, jax.tree.map(reduce, grads, specs)

            return jax.shard_map(
                local,
                mesh=self.mesh,
                in_specs=(specs, P(AXES), P()),
                out_specs=(P(), specs),
                check_vma=False,
            )(params, batch, key)

        return f

    def per_shard(self, fn):
        """`fn(params, batch) -> [n, ...]` on every shard; the results joined along axis 0, jitted.

        On several hosts every process gets all of them.
        """
        everywhere = not self.batch.is_fully_addressable

        @jax.jit
        def f(params, batch):
            gather_params = self._gather_params(params)

            def local(params, batch):
                result = fn(gather_params(params), jax.tree.map(lambda x: x[0], batch))
                return gather_shards(result) if everywhere else result

            return jax.shard_map(
                local,
                mesh=self.mesh,
                in_specs=(jax.tree.map(self._spec, params), P(AXES)),
                out_specs=P() if everywhere else P(AXES),
                check_vma=False,
            )(params, batch)

        return f


gather_shards = partial(jax.lax.all_gather, axis_name=AXES, axis=0, tiled=True)


def _put(leaf, sharding: NamedSharding):
    """As `jax.device_put`, which would send the whole leaf between hosts to compare it."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    values = np.asarray(leaf)
    return jax.make_array_from_callback(values.shape, sharding, values.__getitem__)


def make(data: int, fsdp: int) -> Sharding:
    """A mesh over the first `data * fsdp` devices; over all of them where there are several hosts.

    Raises:
      InputError: there are not that many devices, or a host would be left out.
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


def over(devices, data: int, fsdp: int) -> Sharding:
    """A mesh over these `data * fsdp` devices."""
    return Sharding(
        jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)
    )
