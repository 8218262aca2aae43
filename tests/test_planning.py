"""Compiled programs are read right, and plans follow from them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rqv2_jax import config as config_lib
from rqv2_jax import config_check, room
from rqv2_jax.data.packing import Block
from rqv2_jax.errors import InputError
from rqv2_jax.models import bert, released, weights
from rqv2_jax.models import files as model_files
from rqv2_jax.tools import hlo, machines, plan_steps, planning, workload
from rqv2_jax.training import sharding

ROWS, WIDTH, LAYERS = 24, 16, 5


def compiled(fn, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(fn).lower(*arguments).compile().as_text()


def layers(weights_LxWxW, x_RxW):
    """A loop over layers of one product each."""
    x_RxW, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_RxW, weights_LxWxW)
    return jnp.sum(x_RxW)


def test_a_loops_products_count_as_often_as_it_runs():
    shapes = (LAYERS, WIDTH, WIDTH), (ROWS, WIDTH)
    one = 2 * ROWS * WIDTH * WIDTH
    assert hlo.cost(compiled(layers, *shapes)).flops == LAYERS * one
    # Backwards there are two products more, but for the gradient of what nobody asked for.
    gradient = hlo.cost(compiled(jax.grad(layers), *shapes)).flops
    assert gradient in (3 * LAYERS * one, (3 * LAYERS - 1) * one)


def test_batched_products_are_counted():
    found = hlo.cost(compiled(lambda a, b: a @ b, (3, 4, 5, 7), (3, 4, 7, 6)))
    assert found.flops == 2 * 3 * 4 * 5 * 6 * 7


@pytest.mark.parametrize("times", [1, 3])
def test_collectives_of_a_loop_count_as_often_as_it_runs(times):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def each(x):
        def body(total, part):
            return total + jax.lax.psum(part, "data"), None

        return jax.lax.scan(body, jnp.zeros((1, 8)), jnp.stack([x * i for i in range(times)]))[0]

    f = jax.shard_map(each, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False)
    found = hlo.cost(compiled(f, (4, 8)))
    assert found.collectives == {"all-reduce": times}
    assert found.collective_bytes == {"all-reduce": times * 8 * 4}


# A TPU writes a matrix product as a convolution, here in a loop whose condition bears its count. The
# batch of the second is a window that meets itself once: stride and dilation pad with zeros.
TPU = """HloModule jit_f, is_scheduled=true

%body (t: (s32[], bf16[512,768])) -> (s32[], bf16[512,768]) {
  %t = (s32[]{:T(128)}, bf16[512,768]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %x = bf16[512,768]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %w = bf16[768,768]{1,0:T(8,128)(2,1)S(1)} constant({...})
  %c = bf16[512,768]{1,0} convolution(%x, %w), dim_labels=bf_io->bf, metadata={op_name="("}
  ROOT %out = (s32[]{:T(128)}, bf16[512,768]{1,0:T(8,128)(2,1)}) tuple(%i, %c)
}

%condition (t.1: (s32[], bf16[512,768])) -> pred[] {
  %t.1 = (s32[]{:T(128)}, bf16[512,768]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%t.1), index=0
  %limit = s32[]{:T(128)} constant(12)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (p: (s32[], bf16[512,768]), a: f32[6,32,8], b: f32[6,16,8]) -> f32[6,32,16] {
  %p = (s32[]{:T(128)}, bf16[512,768]{1,0:T(8,128)(2,1)}) parameter(0)
  %a = f32[6,32,8]{2,1,0:T(8,128)} parameter(1)
  %b = f32[6,16,8]{2,1,0:T(8,128)} parameter(2)
  %loop = (s32[]{:T(128)}, bf16[512,768]{1,0:T(8,128)(2,1)}) while(%p), condition=%condition, body=%body
  ROOT %r = f32[6,32,16]{2,1,0} convolution(%a, %b), WINDOW, dim_labels=0bf_0oi->0bf
}
""".replace("WINDOW", "window={size=6 stride=5 lhs_dilate=6}")


def test_products_of_a_tpu_are_counted():
    found = hlo.cost(TPU)
    assert found.flops == 12 * 2 * 512 * 768 * 768 + 2 * 6 * 32 * 16 * 8
    # In the loop x is read and c written, while w lies in the core's own memory; then a, b and r.
    assert found.bytes == 12 * 2 * 512 * 768 * 2 + 4 * 6 * (32 * 8 + 16 * 8 + 32 * 16)


def test_bytes_on_their_way_count_once():
    """What a TPU fetches while it computes names both ends, whole arrays among them."""
    row, own = "f32[8,128]{1,0:T(8,128)}", "f32[8,128]{1,0:T(8,128)S(1)}"
    before, after = TPU.rsplit("  ROOT", 1)
    lines = [
        f"%s = ((f32[80,128]{{1,0:T(8,128)}}), {own}, s32[]{{:S(2)}}) slice-start(%a)",
        f"%c = ({own}, {row}, u32[]{{:S(2)}}) copy-start(%a)",
        f"%d = ({row}, {row}, u32[]{{:S(2)}}) copy-start(%a)",
        f'%e = {row} custom-call(), custom_call_target="AllocateBuffer"',
    ]
    text = before + "".join(f"  {line}\n" for line in lines) + "  ROOT" + after
    # A slice and a copy into the core's memory, then a copy from main memory to main memory.
    assert hlo.cost(text).bytes - hlo.cost(TPU).bytes == (1 + 1 + 2) * 8 * 128 * 4


def test_a_loop_that_does_not_tell_its_count_is_refused():
    with pytest.raises(ValueError, match="loop loop does not say how often it runs"):
        hlo.cost(TPU.replace("s32[]{:T(128)} constant(12)", "s32[]{:T(128)} copy(%i.1)"))


def test_a_slice_moves_its_own_bytes_only():
    def take(table, i):
        return jax.lax.dynamic_slice_in_dim(table, i, 1) * 2.0

    arguments = jax.ShapeDtypeStruct((1000, 64), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    text = jax.jit(take).lower(*arguments).compile().as_text()
    assert hlo.cost(text).bytes < 1000 * 64


@pytest.fixture(scope="module")
def config(bert_folder):
    config = config_lib.default()
    config.data.update({"query_length": 16, "passage_length": 16, "pair_length": 32})
    config.data.update({"train_passage_length": 16, "train_pair_length": 32})
    config.model.update({"weights": str(bert_folder), "num_layers": 2})
    config.data.path = "nowhere"
    config.retriever.batch = 8
    config.reranker.update({"batch": 8, "list_size": 3})
    config.joint.update({"batch": 8, "list_size": 3})
    return config


def machine(memory):
    return machines.Machine("toy:2", jax.devices()[:2], memory, 1e9, 1e8, 1e7)


def target_of(memory, report):
    return plan_steps.Target(machine(memory), sharding.over(jax.devices()[:2], 2, 1), report)


def models_of(config):
    return planning.open_models(config, machine(1e12), print)[1]


@pytest.fixture(scope="module")
def roomy(config):
    lines = []
    return planning.make(config, machine(1e12), "full", report=lines.append), lines


def test_with_room_nothing_is_computed_again(roomy, config):
    plan, _ = roomy
    assert list(plan.steps) == ["joint", "reranker", "retriever", "encode", "re-rank"]
    joint = plan.steps["joint"]
    assert (joint.remat, joint.accumulate) == ("none", 1)
    expected = {"mesh.data": 2, "mesh.fsdp": 1, "model.remat": "none"}
    assert expected.items() <= plan.overlay.items()
    changed = config_lib.loads(config_lib.dumps(config))
    changed.update_from_flattened_dict(plan.overlay)
    config_check.check(changed)
    # All lists of a device's share: 4 queries, 12 passages, 12 pairs.
    assert joint.tokens == 4 * 16 + 12 * 16 + 12 * 32
    shape = models_of(config).retriever
    assert joint.formula == 3 * sum(
        workload.forward_flops(shape, np.full(*x)) for x in ((4, 16), (12, 16), (12, 32))
    )
    # Less than the formula: the last layer goes on with the first tokens alone.
    assert 0.5 < joint.cost.flops / joint.formula < 1
    # Every gradient is summed over the devices once, and next to nothing else is.
    assert joint.cost.collectives["all-reduce"] == 1
    sums = joint.cost.collective_bytes["all-reduce"]
    assert sums == pytest.approx(joint.gradients, rel=0.01)


def test_formula_counts_the_products_of_a_plain_encoder(config):
    models = models_of(config)
    shape = models.retriever
    mesh = sharding.over(jax.devices()[:1], 1, 1)
    params = plan_steps.abstract_params(models, ("retriever",), mesh)
    params = params["retriever"]["query"]

    def encode(params, tokens):
        encoder = bert.Encoder(shape)
        return encoder.apply({"params": params}, (Block(*[tokens] * 5),), deterministic=True)

    tokens = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.int32)
    text = jax.jit(encode).lower(params, tokens).compile().as_text()
    assert hlo.cost(text).flops == workload.forward_flops(shape, np.full(ROWS, WIDTH))


def test_with_less_room_the_cheapest_way_that_fits_is_taken(roomy, config):
    plan, _ = roomy
    needed = plan.steps["joint"].memory
    lines = []
    models = models_of(config)
    remats, target = list(bert.REMAT), target_of(needed - 1, lines.append)
    drawn = workload.draw_lengths(config, "full", 8, 3)
    joint = planning.cheapest(config, models, "joint", drawn, remats, target)
    assert "does not fit" in lines[0] or "not compiled" in lines[0]
    assert joint.memory < needed
    assert (joint.remat, joint.accumulate) != ("none", 1)
    # The same lists, whatever the parts.
    assert joint.tokens == plan.steps["joint"].tokens


def test_each_model_is_planned_with_its_own_shape(config, make_bert):
    """A teacher that is wider and deeper reads the pairs, and is as large as it is."""
    settings = {"hidden_size": 48, "intermediate_size": 96, "num_labels": 1}
    teacher, _ = make_bert(8, "BertForSequenceClassification", num_hidden_layers=3, **settings)
    own = config_lib.loads(config_lib.dumps(config))
    own.model.reranker.update({"weights": str(teacher), "num_layers": 3})
    models = models_of(own)
    drawn = workload.draw_lengths(own, "full", 8, 3)
    step = plan_steps.train_step(own, models, "joint", drawn, target_of(1e12, print))
    small = workload.forward_flops(models.retriever, np.full(16, 16))
    assert step.formula == 3 * (small + workload.forward_flops(models.reranker, np.full(12, 32)))
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    expected = 2 * size(
        weights.load_encoder(model_files.find_folder(own.model.weights), models.retriever)
    )
    head = released.read(teacher).head
    expected += size(weights.load_encoder(teacher, models.reranker))
    expected += size(weights.load_head(head, 48))
    assert step.gradients == 4 * expected


def test_lengths_like_msmarcos_cost_little_more_than_their_tokens(config):
    own = config_lib.loads(config_lib.dumps(config))
    own.data.update({"query_length": 32, "passage_length": 128, "pair_length": 144})
    own.data.update({"train_passage_length": 128, "train_pair_length": 144})
    own.joint.update({"batch": 16, "list_size": 8, "accumulate": 1})
    own.packing.blocks = 4
    drawn = workload.draw_lengths(own, "msmarco", 16, 8)
    assert abs(drawn["passages"].mean() - 79) < 2
    pairs = drawn["queries"] + drawn["passages"] - 1
    np.testing.assert_array_equal(drawn["pairs"], pairs.clip(max=144))
    models = models_of(own)
    shape = models.retriever
    step = plan_steps.train_step(own, models, "joint", drawn, target_of(1e12, print))
    # Of both devices, by step.
    real = sum(x.sum() for x in drawn.values()) / workload.DRAWN_STEPS
    assert real < 2 * step.tokens < 1.3 * real
    products = sum(workload.forward_flops(shape, x) for x in drawn.values())
    assert 2 * step.formula == pytest.approx(3 * products / workload.DRAWN_STEPS)
    encode = plan_steps.forward_step(own, models, "encode", drawn, target_of(1e12, print))
    each = workload.forward_flops(shape, drawn["passages"]) / drawn["passages"].size
    assert encode.formula == pytest.approx(encode.items / 2 * each, rel=0.05)
    assert encode.tokens < 1.15 * 79 * encode.items / 2


def test_gpus_are_counted(config, make_bert):
    """By the formulas alone, with the kernel's flat rows; nothing is compiled."""
    # With heads of 16 columns, which the kernel needs.
    folder, _ = make_bert(num_attention_heads=2)
    config = config_lib.loads(config_lib.dumps(config))
    config.model.weights = str(folder)
    lines, gpus = [], machines.machine("h100:2")
    assert (gpus.flops, gpus.bandwidth) == (989e12, 3350e9)
    assert gpus.memory == pytest.approx(0.98 * 80e9)
    plan = planning.make(config, gpus, "msmarco", report=lines.append)
    assert all(line.endswith("or more, counted, not compiled") for line in lines)
    joint = plan.steps["joint"]
    assert joint.cost.flops == joint.formula
    # Rows of whole multiples, for queries, passages and pairs.
    assert joint.tokens % 128 == 0
    assert joint.cost.collective_bytes["all-reduce"] == joint.gradients
    assert joint.compile_seconds == plan.steps["encode"].compile_seconds == 0
    text = planning.render(plan, gpus, "msmarco")
    assert "counted, as nothing can be compiled for GPUs that are not there" in text
    half = dataclasses.replace(gpus, memory=joint.memory - 1)
    fewer = planning.make(config, half, "msmarco", report=lines.append).steps["joint"]
    assert fewer.memory < joint.memory


def test_a_policy_that_a_later_stage_has_no_room_for_is_given_up(config):
    """Joint training could be done in parts that keep all, but a batch of one list has no parts."""
    own = config_lib.loads(config_lib.dumps(config))
    own.joint.batch = 8
    own.reranker.update({"batch": 1, "list_size": 512})
    gpus = machines.machine("h100:2")
    steps = planning.make(own, gpus, "full", report=lambda line: None).steps
    tight = dataclasses.replace(gpus, memory=steps["reranker"].memory - 1)
    assert steps["joint"].memory < tight.memory
    found = planning.make(own, tight, "full", report=lambda line: None).steps
    assert steps["joint"].remat == "none"
    assert {found[name].remat for name in ("joint", "reranker", "retriever")} == {"dots"}


def test_what_fits_in_no_way_is_one_line(config):
    with pytest.raises(InputError, match=r"config\.joint: its step fits in no way on toy:2; lower"):
        planning.make(config, machine(1e5), "full", report=lambda line: None)


def test_the_whole_run_adds_up(roomy, config):
    plan, _ = roomy
    own = config_lib.loads(config_lib.dumps(config))
    own.data.dataset = "dpr"
    sizes = planning.sizes(own, None, None)
    queries, passages = sizes.queries["train"], sizes.passages
    assert (passages, queries, sizes.queries["test"]) == planning.PUBLISHED["dpr"]
    text, faults = planning.render_run(own, plan, machine(1e12), sizes, None)
    assert not faults
    assert f"all of it, {queries:,} training queries, {passages:,} passages" in text
    steps = round(own.joint.epochs * queries / own.joint.batch)
    hours = steps * plan.steps["joint"].seconds(machine(1e12)) / 3600
    assert f"| joint | {steps:,} steps | {hours:.2f} |" in text
    vectors = passages * 32 * 4 / 2**30
    assert f"| vectors | {3 * vectors:.2f} |" in text
    assert "| all of it; there is: unknown |" in text
    # ScaNN takes no more than half of the host's memory, or what it is given.
    built = "| ScaNN while it is built, in parts if need be |"
    assert f"{built} {vectors * 4.6:.2f} |" in text
    small = dataclasses.replace(machine(1e12), host_memory=2**33)
    text, faults = planning.render_run(own, plan, small, sizes, 2**30)
    assert f"{built} {min(vectors * 4.6, 4):.2f} |" in text
    assert "and the disk has 1.00 GiB free; free some of it" in faults["disk"]
    half = config_lib.loads(config_lib.dumps(plan.config))
    half.encode.dtype, half.evaluate.scann.memory = "float16", 7.5
    halved = dataclasses.replace(plan, config=half)
    text, faults = planning.render_run(own, halved, small, sizes, 2**30)
    assert f"| vectors | {1.5 * vectors:.2f} |" in text
    assert f"{built} {min(vectors * 4.6, 7.5):.2f} |" in text
    own.data.dataset = "beir"
    with pytest.raises(InputError, match="give --queries and --passages"):
        planning.sizes(own, None, 7)
    sizes = planning.sizes(own, 50, 7)
    assert (sizes.passages, sizes.queries["train"], sizes.queries["test"]) == (7, 50, 5)
    assert (sizes.tokens, sizes.query_tokens) == (16, 16)


def test_no_step_is_faster_than_its_slowest_part():
    cost = hlo.Cost(flops=4e9, bytes=1e8)
    step = plan_steps.Step("joint", "none", 1, 0, 1, 1.0, 0, 0, cost, 0.0)
    assert step.seconds(machine(1.0)) == 4.0
    slow = dataclasses.replace(machine(1.0), bandwidth=1e7)
    assert step.seconds(slow) == 10.0
    cost.collective_bytes["all-reduce"] = 2e7
    assert math.isclose(step.seconds(slow), 12.0)


@pytest.mark.parametrize("topology", ["v5e", "v9:2x2", "cpu:two", "cpu:0", "v5e:4y8"])
def test_a_topology_that_is_none_is_one_line(topology):
    with pytest.raises(InputError, match=r"--topology is .*write one of v4, v5e"):
        machines.machine(topology)


def test_this_machine_can_be_planned_for():
    found = machines.machine("cpu:2")
    assert len(found.devices) == 2
    assert 2**30 < found.memory < 2**50
    assert 1e8 < found.flops < 1e14
    assert np.isfinite(found.bandwidth)
    assert found.host_memory == 2 * found.memory == room.host_memory()[0]


def test_training_is_planned_at_its_own_lengths(config):
    own = config_lib.loads(config_lib.dumps(config))
    own.data.update({"train_passage_length": 9, "train_pair_length": 12})
    for training, expected in ((True, (16, 9, 12)), (False, (16, 16, 32))):
        drawn = workload.draw_lengths(own, "full", 4, 3, training=training)
        longest = tuple(drawn[kind].max() for kind in ("queries", "passages", "pairs"))
        assert longest == expected
