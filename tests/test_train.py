"""Losses on real models against PyTorch, the optimizer, the loop, and resuming bit for bit."""

import contextlib
import os
import signal
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from conftest import B1, COSINE, SCALE
from ml_collections import ConfigDict
from safetensors.torch import save_file

from rqv2_jax import config as config_lib
from rqv2_jax import stopping
from rqv2_jax.config import LOSSES
from rqv2_jax.errors import InputError
from rqv2_jax.models import losses, weights
from rqv2_jax.models.scoring import retriever_scores
from rqv2_jax.training import sharding as sharding_lib
from rqv2_jax.training import stages, train

KEY = jax.random.key(0, impl="rbg")


def torch_states(model, ragged):
    """transformers' state of the first token of every sequence, each read on its own."""
    starts = np.cumsum(ragged.lengths_N)[:-1]
    first = []
    for tokens, types in zip(*(np.split(x, starts) for x in (ragged.tokens, ragged.types))):
        ids = {"input_ids": torch.tensor(tokens)[None], "token_type_ids": torch.tensor(types)[None]}
        first.append(model(**ids).last_hidden_state[0, 0])
    return torch.stack(first)


def torch_loss(world, name, batch):
    """The loss of the first 8 lists as the paper writes it, and the gradients in our layout."""
    models, cosine = world.torch_models, name.endswith(COSINE)
    name = name.removesuffix(COSINE)
    for model in models.values():
        model.zero_grad(set_to_none=True)
    head = {
        key: torch.tensor(np.array(value), requires_grad=True)
        for key, value in world.params["reranker"]["head"].items()
    }
    lists = world.batches(models=("retriever",), in_batch=False, shards=1).lists
    queries_B, passages_BxP = lists.query_rows_L[:8], lists.passages_LxP[:8]
    texts = world.store.splits["train"].texts
    inputs = world.inputs
    where_BxP = torch.tensor(batch["where"].reshape(8, -1))

    def retriever():
        queries_BxD = torch_states(models["query"], inputs.queries(texts, queries_B))
        passages_NxD = torch_states(
            models["passage"], inputs.passages(world.store, passages_BxP.reshape(-1))
        )
        if cosine:
            queries_BxD, passages_NxD = F.normalize(queries_BxD), F.normalize(passages_NxD)
            # The scale is part of every score.
            queries_BxD = SCALE * queries_BxD
        return queries_BxD, passages_NxD

    def reranker():
        repeated = queries_B.repeat(3)
        pairs = inputs.pairs(world.store, texts, repeated, passages_BxP.reshape(-1))
        scores = torch_states(models["encoder"], pairs) @ head["kernel"] + head["bias"]
        return scores.reshape(8, 3).masked_fill(~where_BxP, -torch.inf)

    def first_is_positive(scores_BxP):
        return F.cross_entropy(scores_BxP, torch.zeros(8, dtype=torch.long))

    def in_batch(queries_BxD, passages_NxD):
        scores_BxN = queries_BxD @ passages_NxD.T
        relevant = {tuple(pair) for pair in world.store.splits["train"].qrels_3xN[:2].T.tolist()}
        for b, n in np.ndindex(8, 24):
            if n != 3 * b and (queries_B[b], passages_BxP.reshape(-1)[n]) in relevant:
                scores_BxN[b, n] = -torch.inf
        return F.cross_entropy(scores_BxN, torch.arange(8) * 3)

    if name == "retriever":
        loss = in_batch(*retriever())
    elif name == "reranker":
        loss = first_is_positive(reranker())
    elif name == "pointwise":
        scores_N = reranker()[where_BxP]
        labels_N = torch.tensor([1.0, 0.0, 0.0]).repeat(8, 1)[where_BxP]
        loss = F.binary_cross_entropy_with_logits(scores_N, labels_N)
    else:
        queries_BxD, passages_NxD = retriever()
        dots_BxP = (queries_BxD[:, None] * passages_NxD.reshape(8, 3, -1)).sum(-1)
        student = dots_BxP.masked_fill(~where_BxP, -torch.inf).log_softmax(-1)
        scores_BxP = reranker()
        teacher = scores_BxP.log_softmax(-1)
        student_N, teacher_N = student[where_BxP], teacher[where_BxP]
        if name == "official_code":
            kl = (teacher_N.detach().exp() * (teacher_N.detach() - student_N)).mean()
        else:
            kl = (student_N.exp() * (student_N - teacher_N)).sum()
        loss = kl + first_is_positive(scores_BxP)
        if name == "in batch":
            loss = loss - 0.5 * kl + 0.7 * in_batch(queries_BxD, passages_NxD)
    loss.backward()
    return loss.item(), head


def gradients_of(model, config, folder):
    """A torch model's gradients in our layout, by the way its weights take."""
    folder.mkdir()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    save_file(named, folder / "model.safetensors")
    return weights.load_encoder(folder, config)


def test_the_shapes_of_a_state_are_those_of_one_that_is_made(world):
    config, sharding = config_lib.default(), sharding_lib.make(2, 2)
    params = {"reranker": world.params["reranker"]}
    optimizer = train.make_optimizer(config.optimizer, config.joint, 9, {"reranker": 1.0})
    shapes = train.state_shapes(params, optimizer, sharding)
    state = train.init_state(params, optimizer, sharding)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    for shape, made in zip(jax.tree.leaves(shapes), jax.tree.leaves(state)):
        assert (shape.shape, shape.dtype) == (made.shape, made.dtype)
        assert shape.sharding.is_equivalent_to(made.sharding, made.ndim)


@pytest.mark.parametrize("name", ["retriever", "official_code", "in batch"])
def test_one_encoder_for_both_sides_gets_the_gradients_of_both(world, name):
    loss_fn, models, in_batch = world.loss(name)
    batch = world.batches(models=models, in_batch=in_batch, shards=1).make(0)
    step = jax.jit(sharding_lib.make(1, 1).value_and_grad(loss_fn))
    encoder = world.params["retriever"]["query"]
    params = {model: world.params[model] for model in models}
    (two, _), apart = step(
        params | {"retriever": {"query": encoder, "passage": encoder}}, batch, jax.random.key(0)
    )
    (one, _), together = step(params | {"retriever": {"both": encoder}}, batch, jax.random.key(0))
    assert float(one) == float(two)
    apart = apart["retriever"]
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(apart["query"])) > 1e-3
    for ours, query, passage in zip(
        *map(jax.tree.leaves, (together["retriever"]["both"], apart["query"], apart["passage"]))
    ):
        expected = query + passage
        atol = 1e-5 * max(1, np.abs(expected).max())
        np.testing.assert_allclose(ours, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("layout", [{"max_blocks": 12}, {"flat": True}])
@pytest.mark.parametrize("name", ["retriever", "paper"])
def test_packed_batches_give_the_gradients_of_padded_ones(world, name, layout):
    loss_fn, models, in_batch = world.loss(name)
    sharding = sharding_lib.make(1, 1)
    step = jax.jit(sharding.value_and_grad(loss_fn))
    params = {model: world.params[model] for model in models}
    found = []
    for chosen in ({}, layout):
        batches = world.batches(models=models, in_batch=in_batch, shards=1, **chosen)
        found.append(step(params, batches.make(0), jax.random.key(0)))
    kinds = {"max_blocks": lambda x: len(x) > 1, "flat": lambda x: x[0].slots > 1}
    assert any(kinds[next(iter(layout))](shapes) for shapes in batches.shapes.values())
    ((plain, _), plain_grads), ((packed, _), packed_grads) = found
    assert float(packed) == pytest.approx(float(plain), rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(packed_grads), jax.tree.leaves(plain_grads)):
        atol = 1e-5 * max(1, np.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "name",
    [
        *("retriever", "reranker", "pointwise", "paper", "official_code", "in batch"),
        *(f"{name}{COSINE}" for name in ("retriever", "paper", "in batch")),
    ],
)
def test_loss_and_gradients_are_those_of_pytorch(world, first_batch, first_step, name, tmp_path):
    ours = first_step(name, 1, 1)
    loss, head = torch_loss(world, name, first_batch(name, 1))
    assert float(ours.terms["loss"]) == pytest.approx(loss, rel=1e-4)
    theirs = {}
    towers = {tower: (world.torch_models[tower], tmp_path / tower) for tower in world.torch_models}
    if "retriever" in ours.gradients:
        theirs["retriever"] = {
            tower: gradients_of(towers[tower][0], world.models.retriever, towers[tower][1])
            for tower in ("query", "passage")
        }
    if "reranker" in ours.gradients:
        theirs["reranker"] = {
            "encoder": gradients_of(
                towers["encoder"][0], world.models.retriever, tmp_path / "encoder"
            ),
            "head": {key: value.grad.numpy() for key, value in head.items()},
        }
    assert jax.tree.structure(theirs) == jax.tree.structure(ours.gradients)
    squares = 0.0
    for (path, gradient), expected in zip(
        jax.tree_util.tree_leaves_with_path(ours.gradients), jax.tree.leaves(theirs)
    ):
        rounding = 1e-4 * np.abs(expected).max() + 1e-5
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=rounding, err_msg=where)
        squares += np.square(expected, dtype=np.float64).sum()
    assert float(ours.terms["gradient_norm"]) == pytest.approx(squares**0.5, rel=1e-4)


def test_without_teacher_gradient_the_reranker_learns_from_labels_alone(first_step):
    alone = first_step("reranker", 1, 1).gradients["reranker"]
    cut = first_step("official_code", 1, 1).gradients["reranker"]
    through = first_step("paper", 1, 1).gradients["reranker"]
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(cut)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert np.abs(alone["head"]["kernel"] - through["head"]["kernel"]).max() > 0.01


@pytest.fixture(scope="module")
def joint(world):
    """A joint step with dropout on two devices, and all that a run of it needs."""
    sharding = sharding_lib.make(2, 1)
    models = world.models.reshaped(dropout=0.1)
    loss_fn, names, _ = world.loss("paper", models)
    settings = ConfigDict(
        {"weight_decay": 0.01, "clip_norm": 1.0, "clip": "together", "b1": 0.9, "b2": 0.999}
    )
    stage = ConfigDict(
        {
            "batch": 4,
            "learning_rate": 2e-3,
            "schedule": "linear",
            "warmup_steps": 2,
            "log_every": 1,
            "evaluate_every": 3,
            "save_every": 3,
        }
    )
    optimizer = train.make_optimizer(settings, stage, 60, {})
    batches = world.batches(models=names, in_batch=False, shards=2, batch=4)
    return SimpleNamespace(
        sharding=sharding,
        stage=stage,
        batches=batches,
        step=train.make_step(loss_fn, optimizer, sharding),
        start=lambda: train.init_state(world.params, optimizer, sharding),
        stream=lambda first: map(sharding.put_batch, batches.stream(first)),
    )


def test_resuming_gives_the_same_bits(joint):
    """A run from the state saved at step 3 ends with the params of the run that was not stopped."""

    def run(state):
        saved, logged = {}, {}
        hooks = train.Hooks(
            evaluate=lambda step, params: None,
            save=lambda step, state: saved.update({step: jax.tree.map(np.array, state)}),
            log=lambda step, terms: logged.update({step: terms["loss"]}),
        )
        total = joint.batches.steps
        assert total == 8
        end = train.train(
            state,
            step_fn=joint.step,
            batches=joint.stream,
            dropout_key=KEY,
            total_steps=total,
            stage=joint.stage,
            hooks=hooks,
            name="joint",
        )
        return jax.device_get(end), saved, logged

    end, saved, logged = run(joint.start())
    assert set(saved) == {3, 6, 8}
    places = jax.tree.map(lambda x: x.sharding, joint.start())
    again, saved_again, logged_again = run(jax.device_put(saved[3], places))
    assert set(saved_again) == {6, 8}
    assert logged_again == {step: loss for step, loss in logged.items() if step > 3}
    for tree, other in ((end, again), (end, saved[8]), (saved[6], saved_again[6])):
        for leaf, expected in zip(jax.tree.leaves(tree), jax.tree.leaves(other)):
            np.testing.assert_array_equal(leaf, expected)
    assert int(end.step) == 8


def test_dropout_is_a_function_of_key_and_step(joint):
    batch = next(joint.stream(0))

    def loss(step, key):
        state = joint.start()
        state = state._replace(step=jax.device_put(jnp.int32(step), state.step.sharding))
        return float(joint.step(state, batch, key)[1]["loss"])

    assert loss(0, KEY) == loss(0, KEY)
    assert len({loss(0, KEY), loss(1, KEY), loss(2, KEY), loss(0, jax.random.split(KEY)[0])}) == 4


def test_with_dropout_a_step_taken_twice_gives_the_same_bits(joint):
    batch = next(joint.stream(0))
    # The first step of the warm-up moves nothing.
    saved = jax.device_get(joint.step(joint.start(), batch, KEY)[0])
    places = jax.tree.map(lambda x: x.sharding, joint.start())

    def after(key):
        return jax.device_get(joint.step(jax.device_put(saved, places), batch, key)[0])

    first, again, other = (after(key) for key in (KEY, KEY, jax.random.split(KEY)[0]))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    for state in (saved, other):
        same = jax.tree.map(np.array_equal, first.params, state.params)
        assert not any(jax.tree.leaves(same["retriever"]["query"]["layers"]))


def test_joint_training_teaches_both_models(world, stepper):
    """On one batch, over and over, the labels teach the re-ranker and the re-ranker the retriever."""
    step, start, batch = stepper("paper", 1, 1)

    @jax.jit
    def retriever_cross_entropy(params):
        lists = jax.tree.map(lambda x: x[0], batch)
        vectors = (
            world.models.vectors(params[tower], lists[kind])
            for tower, kind in (("query", "queries"), ("passage", "passages"))
        )
        scores_BxP = retriever_scores(*vectors)
        return losses.listwise(scores_BxP, lists["positive"], where_BxP=lists["where"])

    state, history = start(), []
    before = float(retriever_cross_entropy(state.params["retriever"]))
    for _ in range(30):
        state, terms = step(state, batch, KEY)
        history.append(jax.device_get(terms))
    after = float(retriever_cross_entropy(state.params["retriever"]))
    first, last = history[0], history[-1]
    assert last["supervised"] < 0.75 * first["supervised"]
    assert last["kl"] < 0.1 * first["kl"]
    assert after < 0.95 * before
    assert last["loss"] < 0.3 * first["loss"]


def leaves(tree):
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize(
    ("name", "still", "moving"),
    [("no kl", "retriever", "reranker"), ("static", "reranker", "retriever")],
)
def test_a_model_without_a_teacher_stays_at_its_start(
    world, first_batch, optimizer_settings, stage_settings, name, still, moving
):
    """Without KL nothing reaches the retriever, and in static distillation nothing the re-ranker."""
    sharding = sharding_lib.make(1, 1)
    # A frozen model does not even decay; the one that is merely without a gradient does.
    frozen = name == "static"
    decay = 0.3 if frozen else 0.0
    settings = ConfigDict({**optimizer_settings, "weight_decay": decay})
    optimizer = train.make_optimizer(settings, stage_settings(), 10, {still: 0.0} if frozen else {})
    step = train.make_step(world.loss(name)[0], optimizer, sharding)
    state = train.init_state(world.params, optimizer, sharding)
    batch = sharding.put_batch(first_batch(name, 1))
    for _ in range(3):
        state, _ = step(state, batch, KEY)
    start, end = leaves(world.params[still]), leaves(state.params[still])
    for path, leaf in end.items():
        np.testing.assert_array_equal(leaf, start[path], err_msg=path)
    start, end = leaves(world.params[moving]), leaves(state.params[moving])
    moved = [np.abs(end[path] - start[path]).max() > 1e-3 for path in end if "kernel" in path]
    assert all(moved)
    moments = {path for path in leaves(state.opt_state) if f"'{still}'" in path}
    assert bool(moments) != frozen


def test_static_distillation_gives_the_reranker_no_gradient(first_step):
    static = first_step("static", 1, 1)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(static.gradients["reranker"]))
    dynamic = first_step("paper", 1, 1)
    for leaf, expected in zip(
        jax.tree.leaves(static.gradients["retriever"]),
        jax.tree.leaves(dynamic.gradients["retriever"]),
    ):
        np.testing.assert_allclose(leaf, expected, rtol=1e-3, atol=1e-5)


def small_params():
    rng = np.random.default_rng(0)
    return {
        "layers": {
            "dense": {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)},
            "norm": {"scale": rng.normal(size=4), "bias": rng.normal(size=4)},
        },
        "word": {"embedding": rng.normal(size=(5, 2))},
    }


@pytest.mark.parametrize("multiple", [1.0, 2.5])
@pytest.mark.parametrize("clip_norm", [1.0, 1e6])
@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "rates"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1]),
        ("constant", 3, [0, 1 / 3, 2 / 3, 1, 1, 1]),
        ("linear", 0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("linear", 2, [0, 1 / 2, 1, 3 / 4, 2 / 4, 1 / 4]),
    ],
)
def test_optimizer_is_adamw_of_pytorch(
    stage_settings, clip_norm, multiple, schedule, warmup_steps, rates
):
    """Whose groups have a learning rate each, where one part of the params has a multiple of it."""
    peak = 0.05
    norm = {"clip_norm": clip_norm, "clip": "together"}
    settings = ConfigDict({"weight_decay": 0.3, "b1": 0.8, "b2": 0.95, **norm})
    stage = stage_settings(learning_rate=peak, schedule=schedule, warmup_steps=warmup_steps)
    multiples = {"layers": 1.0, "word": multiple}
    optimizer = train.make_optimizer(settings, stage, len(rates), {"word": multiple})
    params = jax.tree.map(jnp.asarray, small_params())
    state = optimizer.init(params)

    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(small_params()))
    tensors = [torch.tensor(leaf, requires_grad=True) for leaf in leaves]
    decayed = [path[-1].key in ("kernel", "embedding") for path in paths]
    groups = [
        {
            "params": [tensor],
            "weight_decay": 0.3 if decays else 0.0,
            "multiple": multiples[path[0].key],
        }
        for path, tensor, decays in zip(paths, tensors, decayed)
    ]
    reference = torch.optim.AdamW(groups, lr=peak, betas=(0.8, 0.95), eps=1e-8)

    rng = np.random.default_rng(1)
    for step, rate in enumerate(rates):
        # Norms from far above the clip to below it, so that clipping changes their proportions.
        gradients = [rng.normal(size=leaf.shape) * 10.0 ** (1 - step) for leaf in leaves]
        tree = jax.tree.unflatten(
            jax.tree.structure(params), [jnp.asarray(g, jnp.float32) for g in gradients]
        )
        updates, state = optimizer.update(tree, state, params)
        params = optax.apply_updates(params, updates)
        for tensor, gradient in zip(tensors, gradients):
            tensor.grad = torch.tensor(gradient)
        torch.nn.utils.clip_grad_norm_(tensors, clip_norm)
        for group in reference.param_groups:
            group["lr"] = peak * rate * group["multiple"]
        reference.step()
        for path, leaf, tensor in zip(paths, jax.tree.leaves(params), tensors):
            np.testing.assert_allclose(
                leaf, tensor.detach(), rtol=1e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path)
            )


def test_biases_and_norms_of_both_models_do_not_decay(world, optimizer_settings, stage_settings):
    optimizer = train.make_optimizer(optimizer_settings, stage_settings(), 10, {})
    nothing = jax.tree.map(np.zeros_like, world.params)
    ones = jax.tree.map(np.ones_like, world.params)
    updates, _ = jax.jit(optimizer.update)(nothing, optimizer.init(ones), ones)
    expected = -1e-3 * optimizer_settings.weight_decay
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = jax.tree_util.keystr(path)
        kept = "bias" in name or "norm" in name
        np.testing.assert_allclose(update, 0 if kept else expected, rtol=1e-5, err_msg=name)


@pytest.fixture
def toy(optimizer_settings, stage_settings):
    """A step that compiles at once: params learn to be the batch's mean."""

    def loss_fn(params, batch, key, gather):
        loss = jnp.mean((gather(batch) - params["w"]) ** 2)
        return loss, {"loss": loss}

    sharding = sharding_lib.make(4, 2)
    optimizer = train.make_optimizer(optimizer_settings, stage_settings(learning_rate=0.1), 10, {})
    return SimpleNamespace(
        step=train.make_step(loss_fn, optimizer, sharding),
        state=train.init_state({"w": np.zeros(8, np.float32)}, optimizer, sharding),
        batch=sharding.put_batch(np.ones((8, 1, 8), np.float32)),
    )


def test_step_donates_the_state_and_keeps_its_sharding(toy):
    old = toy.state
    places = jax.tree.map(lambda x: x.sharding, old)
    new, terms = toy.step(old, toy.batch, KEY)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert not toy.batch.is_deleted()
    assert int(new.step) == 1
    for leaf, place in zip(jax.tree.leaves(new), jax.tree.leaves(places)):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    assert float(terms["gradient_norm"]) == pytest.approx(8**0.5 * 2 / 8)
    compiled = toy.step._cache_size()
    toy.step(new, toy.batch, KEY)
    assert toy.step._cache_size() == compiled


class Term:
    """A number the device is still working on: whoever reads it first waits a second."""

    def __init__(self, recorder, value):
        self.recorder, self.value, self.done = recorder, value, False

    def block_until_ready(self):
        self.recorder.clock += not self.done
        self.done = True
        return self

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.block_until_ready().value, dtype)


class Recorder:
    """Runs `train` on steps that compute nothing, and records what is called in which order."""

    def __init__(self):
        self.events, self.logged, self.clock = [], {}, 0
        self.wrong_at, self.wrong = -1, np.nan
        self.hooks = train.Hooks(
            evaluate=self.evaluate,
            save=lambda step, state: self.events.append(f"save {step} {int(state.step)}"),
            log=self.log,
        )

    def evaluate(self, step, params):
        self.clock += 100
        self.events.append(f"evaluate {step} {params}")

    def log(self, step, terms):
        self.events.append(f"log {step}")
        self.logged[step] = terms

    def step(self, state, batch, key):
        assert key == "key"
        self.events.append(f"step {batch}")
        kl = np.float32(self.wrong if batch == self.wrong_at else -batch)
        terms = {"loss": Term(self, 10.0 * batch), "kl": kl}
        return train.TrainState(state.step + 1, f"params {batch + 1}", None), terms

    def batches(self, first):
        for step in range(first, 10_000):
            self.events.append(f"batch {step}")
            yield step

    def run(self, first, total, stage):
        state = train.TrainState(jnp.int32(first), f"params {first}", None)
        return train.train(
            state,
            step_fn=self.step,
            batches=self.batches,
            dropout_key="key",
            total_steps=total,
            stage=stage,
            hooks=self.hooks,
            name="test",
        )


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def every_two(stage_settings):
    return stage_settings(evaluate_every=2, save_every=2, log_every=2)


def test_order_of_the_loop(recorder, every_two):
    """Evaluate, save, draw a batch, step; terms are read once the next step is under way."""
    end = recorder.run(0, 5, every_two)
    assert int(end.step) == 5
    assert recorder.events == [
        "evaluate 0 params 0",
        *("batch 0", "step 0", "batch 1", "step 1"),
        *("evaluate 2 params 2", "save 2 2"),
        *("batch 2", "step 2", "log 2", "batch 3", "step 3"),
        *("evaluate 4 params 4", "save 4 4"),
        *("batch 4", "step 4", "log 4", "log 5"),
        *("evaluate 5 params 5", "save 5 5"),
    ]


def test_logged_terms_are_means_over_the_steps_since_the_last_log(recorder, every_two):
    recorder.run(0, 5, every_two)
    for step, mean in ((2, 0.5), (4, 2.5), (5, 4)):
        terms = recorder.logged[step]
        assert terms["loss"] == 10 * mean
        assert terms["kl"] == -mean
        assert all(type(value) is float for value in terms.values())
        assert terms.keys() == {"loss", "kl", "lists_per_second"}


@pytest.mark.parametrize("log_every", [1, 2, 4, 100])
def test_rate_is_that_of_the_devices_without_evaluation(
    recorder, stage_settings, log_every, monkeypatch
):
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: recorder.clock))
    recorder.run(0, 9, stage_settings(log_every=log_every, evaluate_every=2))
    assert list(recorder.logged) == [*range(log_every, 9, log_every), 9]
    for terms in recorder.logged.values():
        assert terms["lists_per_second"] == pytest.approx(8)


def test_loop_goes_on_from_the_state(recorder, every_two):
    recorder.run(2, 4, every_two)
    assert recorder.events == [
        "evaluate 2 params 2",
        *("batch 2", "step 2", "batch 3", "step 3", "log 4"),
        *("evaluate 4 params 4", "save 4 4"),
    ]


@pytest.fixture
def signals():
    """Signals as programs take them, for one test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stopping.install()
    yield
    # What a test has caught waits for nobody.
    stopping.install()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "raised"),
    [(signal.SIGTERM, stopping.Terminated), (signal.SIGINT, KeyboardInterrupt)],
)
def test_a_signal_in_a_step_waits_for_its_end_and_saves(
    recorder, stage_settings, signals, monkeypatch, number, raised
):
    step = recorder.step

    def interrupted(state, batch, key):
        if batch == 2:
            os.kill(os.getpid(), number)
            recorder.events.append("signal")
        return step(state, batch, key)

    monkeypatch.setattr(recorder, "step", interrupted)
    with pytest.raises(raised) as error:
        recorder.run(0, 5, stage_settings(evaluate_every=9, save_every=9, log_every=9))
    assert error.type is raised
    assert recorder.events[-5:] == ["step 1", "batch 2", "signal", "step 2", "save 3 3"]


def test_a_signal_while_dev_is_measured_saves_the_steps_before(
    recorder, stage_settings, signals, monkeypatch
):
    evaluate = recorder.evaluate

    def interrupted(step, params):
        evaluate(step, params)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    recorder.hooks = recorder.hooks._replace(evaluate=interrupted)
    with pytest.raises(stopping.Terminated):
        recorder.run(0, 5, stage_settings(evaluate_every=2, save_every=9, log_every=9))
    assert recorder.events[-3:] == ["step 1", "evaluate 2 params 2", "save 2 2"]


def test_a_signal_whose_exception_was_dropped_ends_the_next_step(
    recorder, stage_settings, signals, monkeypatch
):
    evaluate = recorder.evaluate

    def interrupted(step, params):
        evaluate(step, params)
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)

    recorder.hooks = recorder.hooks._replace(evaluate=interrupted)
    with pytest.raises(stopping.Terminated):
        recorder.run(0, 5, stage_settings(evaluate_every=9, save_every=9, log_every=9))
    assert recorder.events[-3:] == ["batch 0", "step 0", "save 1 1"]


def test_a_signal_after_a_number_that_is_not_finite_saves_nothing(
    recorder, stage_settings, signals, monkeypatch
):
    recorder.wrong_at, batches = 1, recorder.batches

    def interrupted(first):
        for step in batches(first):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield step

    monkeypatch.setattr(recorder, "batches", interrupted)
    with pytest.raises(InputError, match="step 2: kl is nan"):
        recorder.run(0, 5, stage_settings(evaluate_every=9, save_every=9, log_every=9))
    assert not any(event.startswith("save") for event in recorder.events)


def test_a_state_is_saved_after_ten_minutes(recorder, stage_settings, monkeypatch):
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: recorder.clock))
    # A step takes a second, measuring dev 100.
    recorder.run(0, 1500, stage_settings(evaluate_every=700, save_every=10**6, log_every=10**6))
    saved = [int(event.split()[1]) for event in recorder.events if event.startswith("save")]
    assert saved == [501, 1002, 1500]


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("wrong_at", range(9))
def test_nothing_is_saved_after_a_number_that_is_not_finite(
    recorder, stage_settings, wrong_at, wrong
):
    recorder.wrong_at, recorder.wrong = wrong_at, wrong
    with pytest.raises(
        InputError, match=rf"^test, step {wrong_at + 1}: kl is {wrong:g};"
    ) as raised:
        recorder.run(0, 9, stage_settings(evaluate_every=3, save_every=2, log_every=4))
    assert "loss" not in str(raised.value)
    steps, saved, measured, logged = (
        [int(event.split()[1]) for event in recorder.events if event.startswith(name)]
        for name in ("step", "save", "evaluate", "log")
    )
    assert all(step <= wrong_at for step in (*saved, *measured, *logged))
    assert saved == list(range(2, wrong_at + 1, 2))
    # It stops at once, not at the next line of the log.
    assert len(steps) <= wrong_at + 2


def test_finished_run_does_nothing(recorder, every_two):
    end = recorder.run(4, 4, every_two)
    assert end.params == "params 4"
    assert recorder.events == []


def by_hand(models, params, batch, key):
    """The joint loss "in batch" of four parts, read one by one and joined."""
    read = []
    for number in range(4):
        part = jax.tree.map(lambda x: x[number], batch)  # noqa: B023
        # The first shard, and in it the parts by their number.
        keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 0), number), 3)
        towers = (("query", "queries", keys[0]), ("passage", "passages", keys[1]))
        vectors = [models.vectors(params["retriever"][t], part[kind], k) for t, kind, k in towers]
        read.append((*vectors, models.reranker_scores(params["reranker"], part["pairs"], keys[2])))
    queries_BxD, passages_NxD, pairs_N = map(jnp.concatenate, zip(*read))
    labels = {
        name: jnp.concatenate(batch[name])
        for name in ("positive", "where", "in_batch_positive", "in_batch_where")
    }
    retriever_BxP = retriever_scores(queries_BxD, passages_NxD)
    _, terms = losses.joint_distillation(
        retriever_BxP,
        pairs_N.reshape(retriever_BxP.shape),
        labels["positive"],
        where_BxP=labels["where"],
        **LOSSES["paper"],
    )
    in_batch = losses.listwise(
        queries_BxD @ passages_NxD.T,
        labels["in_batch_positive"],
        where_BxP=labels["in_batch_where"],
    )
    return 0.5 * terms["kl"] + terms["supervised"] + 0.7 * in_batch


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_parts_with_in_batch_negatives_give_the_gradients_of_the_whole_batch(
    world, first_batch, dropout
):
    """Each part is read twice, and has the same dropout both times."""
    models, sharding = world.models.reshaped(dropout=dropout), sharding_lib.make(1, 1)
    batch = first_batch("in batch", 1, 4)
    loss_fn, *_ = world.loss("in batch", models, 4)
    step = jax.jit(sharding.value_and_grad(loss_fn, by_part=True))
    (loss, _), grads = step(world.params, batch, KEY)
    if dropout:
        alike = partial(by_hand, models, batch=batch, key=KEY)
        expected, theirs = jax.jit(jax.value_and_grad(alike))(world.params)
    else:
        whole, *_ = world.loss("in batch", models)
        step = jax.jit(sharding.value_and_grad(whole))
        (expected, _), theirs = step(world.params, first_batch("in batch", 1), KEY)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    difference = jax.tree.map(lambda a, b: a - b, grads, theirs)
    # Sums of float32 in another order.
    assert float(optax.tree.norm(difference)) < 5e-6 * float(optax.tree.norm(theirs))


@pytest.mark.parametrize("clip", ["together", "apart"])
def test_models_are_clipped_together_or_each_alone(optimizer_settings, stage_settings, clip):
    settings = ConfigDict({**optimizer_settings, "clip_norm": 1.0, "clip": clip})
    optimizer = train.make_optimizer(settings, stage_settings(), 10, {})
    grads = {"retriever": {"kernel": jnp.array([6.0, 8.0])}, "reranker": {"kernel": jnp.array(0.5)}}
    _, state = optimizer.update(grads, optimizer.init(grads), grads)
    (moments,) = optax.tree.get_all_with_path(state, "mu")
    clipped = jax.tree.map(lambda mu: mu / (1 - B1), moments[1])
    norm = {"together": (10**2 + 0.5**2) ** 0.5, "apart": 10.0}[clip]
    np.testing.assert_allclose(clipped["retriever"]["kernel"], [6 / norm, 8 / norm], rtol=1e-5)
    kept = 0.5 / norm if clip == "together" else 0.5
    np.testing.assert_allclose(clipped["reranker"]["kernel"], kept, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "weight", "asked", "parts", "by_part"),
    [
        ("retriever", 0.0, 0, 1, False),
        ("retriever", 0.0, 4, 4, True),
        ("reranker", 0.0, 4, 4, False),
        ("joint", 0.0, 4, 4, False),
        ("joint", 0.5, 4, 4, True),
        ("joint", 0.5, 0, 1, False),
    ],
)
def test_parts_share_a_loss_where_negatives_are_in_batch(
    world, name, weight, asked, parts, by_part
):
    config = config_lib.default()
    config.joint.in_batch_weight, config[name].accumulate = weight, asked
    stage = stages.make_stage(config, world.models, name)
    assert (stage.accumulate, stage.by_part) == (parts, by_part)
