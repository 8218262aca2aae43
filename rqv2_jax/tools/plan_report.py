"""Plans as text for people: the steps per device, the time and the storage of the whole run."""

import ml_collections

from rqv2_jax.data.lists import training_lists
from rqv2_jax.errors import InputError
from rqv2_jax.tools.machines import GIB, Machine
from rqv2_jax.tools.planning import Plan

# Memory ScaNN takes as a multiple of the vectors', measured with 400,000 and 1,000,000 of 384 dimensions.
SCANN_BUILT, SCANN_KEPT = 4.3, 1.1
# Bytes of memory for each candidate while lists are drawn, measured with 2,000 queries of 1,000: four
# arrays of candidates, and what `lists.draw` makes of them.
DRAWN = 74

# Passages and training queries of the published data.
PUBLISHED = {"msmarco": (8_841_823, 502_939), "dpr": (21_015_324, 58_880)}


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
    config: ml_collections.ConfigDict, queries: int | None, passages: int | None
) -> tuple[int, int]:
    """Returns the numbers of training queries and passages: given, or those of published data.

    Raises:
      InputError: they are neither given nor known.
    """
    known = PUBLISHED.get(config.data.dataset, (None, None))
    passages, queries = passages or known[0], queries or known[1]
    if queries is None or passages is None:
        raise InputError(
            f"{config.data.dataset}: how large it is is not known; give --queries and --passages"
        )
    return queries, passages


def render_run(
    config: ml_collections.ConfigDict, plan: Plan, machine: Machine, queries: int, passages: int
) -> str:
    """Returns the least time of every stage, and disk and memory, as tables in Markdown.

    Args:
      queries, passages: the numbers to train on and to search.
    """
    mined = min(queries, config.mine.queries)
    scored = min(mined, config.mine.scored_queries) if config.joint.denoised_share else 0
    work = [
        (name, round(training_lists(config[name], count) / config[name].batch), "steps", name)
        for name, count in (("retriever", queries), ("reranker", mined), ("joint", mined))
        if name in plan.steps
    ]
    warmed_up = 1 + ("retriever" in plan.steps)
    pairs = scored * config.mine.scored_depth
    for what, items, step in (
        ("encode all passages, once for each retriever", (warmed_up + 1) * passages, "encode"),
        ("score candidates", pairs, "re-rank"),
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
    vectors = passages * plan.hidden_size * 4
    stored = {
        "token store, disk, at most": passages * plan.passage_length * 2 + passages * 16,
        "vectors, disk, each retriever": vectors,
        "candidates, disk": mined * config.mine.depth * 16,
        "candidates, memory of every host while lists are drawn": mined * config.mine.depth * DRAWN,
    }
    if "scann" in config.evaluate.indexes:
        stored["ScaNN, memory of the first host while it is built"] = vectors * SCANN_BUILT
        stored["ScaNN, memory of the first host afterwards"] = vectors * SCANN_KEPT
    lines += ["", "| what | GiB |", "|---|---|"]
    lines += [f"| {what} | {size / GIB:.1f} |" for what, size in stored.items()]
    return "\n".join(lines)
