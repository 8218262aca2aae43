"""A training step gives the same on every mesh; params and batches lie where they should."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rqv2_jax.errors import InputError
from rqv2_jax.training import sharding as sharding_lib
from rqv2_jax.training import train


def named_leaves(tree):
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        *itertools.product(("retriever", "reranker", "paper"), ((2, 1), (4, 2), (1, 4))),
        # Differs from "paper" only in what comes after the scores.
        ("official_code", (4, 2)),
        # The same in parts.
        ("paper", (1, 1, 4)),
        ("paper", (2, 2, 2)),
        ("reranker", (2, 1, 2)),
        # Eight lists over devices that do not divide them.
        *itertools.product(("retriever", "paper"), ((3, 1),)),
        ("paper", (3, 1, 2)),
        # In parts that share one loss.
        ("retriever", (1, 1, 4)),
        ("in batch", (1, 1, 4)),
        ("in batch", (2, 2, 2)),
        ("retriever", (3, 1, 2)),
    ],
    ids=lambda x: x if isinstance(x, str) else "x".join(map(str, x)),
)
def test_every_mesh_takes_the_same_step(first_step, stage_settings, name, mesh):
    one, many = first_step(name, 1, 1), first_step(name, *mesh)
    assert one.terms.keys() == many.terms.keys()
    for key, value in one.terms.items():
        assert float(many.terms[key]) == pytest.approx(float(value), rel=1e-4), key
    expected, before = named_leaves(one.gradients), named_leaves(one.before)
    learning_rate = stage_settings().learning_rate
    for key, gradient in named_leaves(many.gradients).items():
        rounding = 1e-4 * np.abs(expected[key]).max() + 5e-6
        np.testing.assert_allclose(gradient, expected[key], rtol=0, atol=rounding, err_msg=key)
        # Adam's first step goes by the sign of the gradient: where that is rounding, so is it.
        certain = np.abs(expected[key]) > 10 * rounding
        after, on_one = named_leaves(many.params)[key], named_leaves(one.params)[key]
        np.testing.assert_allclose(after[certain], on_one[certain], rtol=0, atol=1e-5, err_msg=key)
        assert np.abs(after - before[key]).max() < 1.2 * learning_rate


def value_and_grad(sharding, params, batch, loss_fn, key=None):
    on_mesh = jax.jit(sharding.value_and_grad(loss_fn))
    key = jax.random.key(0) if key is None else key
    return on_mesh(sharding.put_params(params), sharding.put_batch(batch), key)


def toy():
    """A loss in which every row depends on all rows of the global batch, and params of all shapes."""
    rng = np.random.default_rng(0)
    params = {
        "matrix": rng.normal(size=(6, 4)),
        "tall": rng.normal(size=(8, 3)),
        "odd": rng.normal(size=(5, 3)),
        "vector": rng.normal(size=(4,)),
        "scalar": rng.normal(size=()),
    }
    params = jax.tree.map(np.float32, params)

    def loss_fn(params, batch, key, gather):
        hidden = jnp.tanh(batch["x"] @ params["matrix"] + params["vector"])
        scores = gather(hidden @ params["tall"].reshape(4, 6) @ params["odd"].reshape(-1)[:6])
        scores = scores * params["scalar"]
        loss = jax.nn.logsumexp(scores) - jnp.vdot(scores, gather(batch["y"]))
        return loss, {"loss": loss, "highest": scores.max()}

    batch = {
        "x": rng.normal(size=(24, 6)).astype(np.float32),
        "y": rng.normal(size=24).astype(np.float32),
    }
    return params, batch, loss_fn


@pytest.mark.parametrize(
    "mesh", [(1, 1), (8, 1), (2, 4), (3, 2), (1, 8)], ids="{0[0]}x{0[1]}".format
)
def test_gradients_are_those_of_the_global_loss(mesh):
    params, batch, loss_fn = toy()
    (loss, terms), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        params, batch, None, lambda x: x
    )
    sharding = sharding_lib.make(*mesh)
    shards = jax.tree.map(lambda x: x.reshape(sharding.shards, -1, *x.shape[1:]), batch)
    (found, found_terms), found_grads = value_and_grad(sharding, params, shards, loss_fn)
    assert float(found) == pytest.approx(float(loss), rel=1e-5)
    assert float(found_terms["highest"]) == pytest.approx(float(terms["highest"]), rel=1e-5)
    for key, grad in grads.items():
        np.testing.assert_allclose(found_grads[key], grad, rtol=1e-4, atol=1e-5, err_msg=key)
        assert found_grads[key].sharding.is_equivalent_to(
            sharding.of_params(params)[key], grad.ndim
        )


def test_shards_have_keys_of_their_own():
    sharding = sharding_lib.make(4, 2)

    def loss_fn(params, batch, key, gather):
        drawn = gather(jax.random.normal(key, (1,)))
        return params["w"].sum(), {"drawn": drawn}

    params, batch = {"w": np.ones(8, np.float32)}, np.zeros((8, 1), np.float32)
    (_, terms), _ = value_and_grad(sharding, params, batch, loss_fn)
    (_, again), _ = value_and_grad(sharding, params, batch, loss_fn)
    assert len(set(terms["drawn"].tolist())) == 8
    np.testing.assert_array_equal(terms["drawn"], again["drawn"])


def test_params_and_optimizer_state_are_split_over_fsdp(world, optimizer_settings, stage_settings):
    sharding = sharding_lib.make(2, 4)
    optimizer = train.make_optimizer(optimizer_settings, stage_settings(), 10, {})
    state = train.init_state(world.params, optimizer, sharding)
    whole = 0
    for key, leaf in named_leaves((state.params, state.opt_state)).items():
        divides = any(size % 4 == 0 for size in leaf.shape)
        pieces = {shard.data.size for shard in leaf.addressable_shards}
        assert pieces == {leaf.size // 4 if divides else leaf.size}, key
        # As many copies of each piece as the mesh is long in its other axis.
        places = {str(shard.index) for shard in leaf.addressable_shards}
        assert len(places) == (4 if divides else 1)
        whole += 0 if divides else leaf.size
    assert whole < 100


def test_leaves_are_split_along_their_largest_dimension_that_divides():
    leaves = {
        "largest": ((4, 12, 8), (4, 3, 8)),
        "largest that divides": ((4, 13, 8), (4, 13, 2)),
        "first of equals": ((8, 8), (2, 8)),
        "none": ((3, 5), (3, 5)),
        "scalar": ((), ()),
    }
    params = {name: np.zeros(shape, np.float32) for name, (shape, _) in leaves.items()}
    on_devices = sharding_lib.make(1, 4).put_params(params)
    for name, (_, local) in leaves.items():
        assert on_devices[name].addressable_shards[0].data.shape == local, name


def test_batches_are_split_over_all_devices():
    sharding = sharding_lib.make(4, 2)
    assert sharding.shards == 8
    batch = sharding.put_batch({"x": np.arange(8 * 3).reshape(8, 3)})["x"]
    rows = {shard.device: np.asarray(shard.data) for shard in batch.addressable_shards}
    for number, device in enumerate(sharding.mesh.devices.reshape(-1)):
        np.testing.assert_array_equal(rows[device], [[3 * number, 3 * number + 1, 3 * number + 2]])


@pytest.mark.parametrize("mesh", [(4, 2), (1, 3), (1, 1)], ids="{0[0]}x{0[1]}".format)
def test_per_shard_keeps_the_order(mesh):
    sharding = sharding_lib.make(*mesh)
    params = {"w": np.arange(24, dtype=np.float32).reshape(2, 12)}
    batch = np.arange(24 * 2, dtype=np.float32).reshape(sharding.shards, -1, 2)
    scores = sharding.per_shard(lambda params, rows: rows @ params["w"])(
        sharding.put_params(params), sharding.put_batch(batch)
    )
    np.testing.assert_array_equal(scores, batch.reshape(24, 2) @ params["w"])


def test_meshes_need_their_devices():
    assert sharding_lib.make(2, 2).mesh.devices.tolist() == [
        jax.devices()[:2],
        jax.devices()[2:4],
    ]
    for mesh in ((9, 1), (1, 9), (3, 3)):
        with pytest.raises(InputError, match=f"{mesh[0]} x {mesh[1]} devices, but there are 8"):
            sharding_lib.make(*mesh)
