"""The plan of a run: its steps for devices that are not there, the cheapest way in which they fit."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rqv2_jax import config as config_lib
from rqv2_jax import config_check
from rqv2_jax.data.lists import training_lists
from rqv2_jax.errors import InputError
from rqv2_jax.models import attention, bert, random_model, released
from rqv2_jax.models.scoring import Models
from rqv2_jax.recipe import memory, needs, opening
from rqv2_jax.room import GIB
from rqv2_jax.tools import fits, plan_steps, workload
from rqv2_jax.tools.machines import Machine
from rqv2_jax.tools.plan_steps import Step, Target
from rqv2_jax.tools.workload import Lengths
from rqv2_jax.training import sharding

# Passages, training queries and test queries of the published data.
PUBLISHED = {"msmarco": (8_841_823, 502_939, 6_980), "dpr": (21_015_324, 58_880, 3_610)}
# Of other data this share of the training queries are taken to be test queries.
TEST_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Plan:
    """Steps by name, the settings under which they fit; the resolved config and its models."""

    steps: dict[str, Step]
    overlay: dict[str, Any]
    config: ConfigDict
    models: Models


def make(config: ConfigDict, machine: Machine, lengths: str, report: Callable[[str], None]) -> Plan:
    """Compiles or counts every step of a run; `report` gets a line for each try.

    `lengths` of the inputs are those of `workload.draw_lengths`; with "msmarco" the least times hold
    for the tokens that are really computed. Raises InputError if the config cannot be used, or a step
    fits in no way.
    """
    config = config_lib.loads(config_lib.dumps(config))
    # No data is read here.
    config.data.path = config.data.path or "DIR"
    config_check.check(config)
    fsdp = config.mesh.fsdp
    if len(machine.devices) % fsdp:
        raise InputError(
            f"config.mesh.fsdp is {fsdp}, which does not divide {len(machine.devices)} devices"
        )
    config.mesh.data = len(machine.devices) // fsdp
    mesh = sharding.over(machine.devices, config.mesh.data, fsdp)
    config, models = open_models(config, machine, report)
    target = Target(machine, mesh, report)
    overlay = {"mesh.data": config.mesh.data, "mesh.fsdp": fsdp}
    sizes = {"joint": config.joint.list_size, "reranker": config.reranker.list_size}
    if config.retriever.epochs > 0:
        sizes["retriever"] = 1
    drawn = {
        name: workload.draw_lengths(config, lengths, config[name].batch, size)
        for name, size in sizes.items()
    }
    steps = _training_steps(config, models, drawn, target)
    for name in drawn:
        overlay |= {"model.remat": steps[name].remat, f"{name}.accumulate": steps[name].accumulate}
    lists = config.joint.batch, sizes["joint"]
    searched = workload.draw_lengths(config, lengths, *lists, training=False)
    for name in ("encode", "re-rank"):
        steps[name] = plan_steps.forward_step(config, models, name, searched, target)
    tokens = min(steps[name].tokens for name in ("encode", "re-rank"))
    overlay["evaluate.batch_tokens"] = tokens
    return Plan(steps, overlay, config, models)


def open_models(
    config: ConfigDict, machine: Machine, report: Callable[[str], None]
) -> tuple[ConfigDict, Models]:
    """Returns the resolved config and the models' shapes, those of BERT base without the weights."""
    asked = config.model.attention
    try:
        opened = opening.open_models(config)
        config, models = opened.config, opened.models
    except InputError as error:
        report(f"planned with the shape of BERT base, because {error}")
        config, models = _bert_base(config)
    if asked == "auto" and machine.counted:
        sizes = models.retriever.head_size, models.reranker.head_size
        models = models.reshaped(attention=attention.implementation(asked, "gpu", sizes))
    cpu = machine.devices[0].platform == "cpu"
    if config.model.products == "auto" and (machine.counted or not cpu):
        # Not by this machine's kind of CPU.
        config.model.products = "float32"
    return config, models.reshaped(unrolled=cpu)


def _bert_base(config: ConfigDict) -> tuple[ConfigDict, Models]:
    shape: dict[str, Any] = random_model.BASE
    base = released.Released(Path("BERT base"), num_layers=12, longest=shape["max_positions"])
    config, _ = opening.resolve(config, released.Sources(base, base, base))
    model = config.model
    if model.attention == "auto":
        model.attention = "plain"
    common = {**shape, **{name: model[name] for name in ("dtype", "remat", "attention")}}
    retriever, reranker = (
        bert.BertConfig(**common, num_layers=each.num_layers, dropout=each.dropout, unrolled=False)
        for each in (model, model.reranker)
    )
    how = model.towers, model.pooling, model.similarity, model.scale
    pooling = model.reranker.pooling
    return config, Models(retriever, reranker, *how, head="linear", reranker_pooling=pooling)


def _training_steps(
    config: ConfigDict, models: Models, drawn: dict[str, Lengths], target: Target
) -> dict[str, Step]:
    """Returns the steps of all stages, under the first policy by which all of them fit."""
    remats = list(bert.REMAT)
    while remats:
        steps, left = {}, remats
        for name in drawn:
            step = cheapest(config, models, name, drawn[name], left, target)
            if step is None:
                break
            steps[name], left = step, [step.remat]
        else:
            return steps
        # The policy that the first stages took keeps too much for this one.
        remats = remats[remats.index(left[0]) + 1 :] if steps else []
    raise InputError(
        f"config.{name}: its step fits in no way on {target.machine.topology}; lower its batch or "
        "list_size, raise config.mesh.fsdp, or take more chips"
    )


def cheapest(
    config: ConfigDict, models: Models, name: str, drawn: Lengths, remats: list[str], target: Target
) -> Step | None:
    """Returns the cheapest step that fits: keeping all, fewer lists at once, computing again."""
    batch, shards = config[name].batch, target.mesh.shards
    lists = -(-batch // shards)
    for remat in remats:
        for accumulate in range(1, lists + 1):
            wasteful = -(-batch // (shards * accumulate)) * accumulate > lists
            if batch % accumulate or wasteful:
                continue
            tried = config_lib.loads(config_lib.dumps(config))
            tried[name].accumulate = accumulate
            reshaped = models.reshaped(remat=remat)
            step = plan_steps.train_step(tried, reshaped, name, drawn, target)
            if step is not None:
                return step
    return None


def render(plan: Plan, machine: Machine, lengths: str) -> str:
    """Returns the steps as a table in Markdown, per device; `lengths` as in `planning.make`."""
    long = {"full": "every input at its full length", "msmarco": "inputs as long as MS MARCO's"}
    lines = [
        f"\n{machine.topology}: {len(machine.devices)} devices with {machine.memory / GIB:.1f} GiB and "
        f"{machine.flops / 1e12:.3g} TFLOP/s each; {long[lengths]}",
        *["counted, as nothing can be compiled for GPUs that are not there"] * machine.counted,
        "",
        "| step | rematerialised | parts | memory, GiB | TFLOP, model | compiled / model "
        "| collectives | reduced / gradients | no faster than, s | compiled in, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for step in plan.steps.values():
        collectives = ", ".join(f"{n} {kind}" for kind, n in sorted(step.cost.collectives.items()))
        sums = sum(step.cost.collective_bytes[kind] for kind in ("all-reduce", "reduce-scatter"))
        reduced = f"{sums / step.gradients:.2f}" if step.gradients else ""
        lines.append(
            f"| {step.name} | {step.remat} | {step.accumulate} | {step.memory / GIB:.2f} "
            f"| {step.formula / 1e12:.3g} | {step.cost.flops / step.formula:.2f} | {collectives} "
            f"| {reduced} | {step.seconds(machine):.3g} | {step.compile_seconds:.0f} |"
        )
    return "\n".join(lines)


def sizes(
    config: ConfigDict, queries: int | None, passages: int | None, lengths: str = "full"
) -> needs.Sizes:
    """Returns the sizes of the texts, of which numbers are given, or known of published data.

    `lengths` as in `make`. A query has one label; a text as many tokens as the models read of it.
    """
    known = PUBLISHED.get(config.data.dataset, (None, None, None))
    passages, queries = passages or known[0], queries or known[1]
    if queries is None or passages is None:
        raise InputError(
            f"{config.data.dataset}: how large it is is not known; give --queries and --passages"
        )
    of_split = {"train": queries, "dev": min(config.dev.queries, queries)}
    of_split["test"] = known[2] or round(TEST_SHARE * queries)
    drawn = workload.draw_lengths(config, lengths, 64, 1, training=False)
    passage, query = (float(drawn[kind].mean()) for kind in ("passages", "queries"))
    return needs.Sizes(passages, passage, of_split, query, of_split)


def render_run(
    config: ConfigDict, plan: Plan, machine: Machine, sizes: needs.Sizes, disk: float | None
) -> tuple[str, dict[str, str]]:
    """Returns the least time of every stage, and disk and memory, as tables in Markdown.

    And what is too small, as `fits.compare` does; `disk` has so many bytes free, None if not known.
    """
    queries, passages = sizes.queries["train"], sizes.passages
    mined = min(queries, config.mine.queries)
    scored = min(mined, config.mine.scored_queries) if config.joint.denoised_share else 0
    work = [
        (name, round(training_lists(config[name], count) / config[name].batch), "steps", name)
        for name, count in (("retriever", queries), ("reranker", mined), ("joint", mined))
        if name in plan.steps
    ]
    retrievers = 2 + ("retriever" in plan.steps)
    for what, items, step in (
        ("encode all passages, once for each retriever", retrievers * passages, "encode"),
        ("score candidates", scored * config.mine.scored_depth, "re-rank"),
    ):
        work.append((what, -(-items // plan.steps[step].items), "batches", step))
    lines = ["", "| stage | work | no faster than, hours |", "|---|---|---|"]
    total = 0.0
    for what, count, unit, step in work:
        hours = count * plan.steps[step].seconds(machine) / 3600
        total += hours
        lines.append(f"| {what} | {count:,} {unit} | {hours:.2f} |")
    lines.append(
        f"| all of it, {queries:,} training queries, {passages:,} passages | | {total:.2f} |"
    )
    cpu = machine.devices[0].platform == "cpu" and not machine.counted
    trained = [step.memory for name, step in plan.steps.items() if name in needs.MODELS]
    count = len(machine.devices)
    total = machine.host_memory or math.inf
    host = memory.Host(cpu, count, max(trained) * count if cpu else 0.0, total)
    room = fits.Room(disk, machine.host_memory)
    stored, faults = fits.compare(plan.config, plan.models, sizes, host, room)
    return "\n".join([*lines, stored]), faults
