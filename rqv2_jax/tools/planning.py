"""The plan of a run: its steps for devices that are not there, the cheapest way in which they fit."""

import dataclasses
import pathlib
from collections.abc import Callable

import ml_collections
import numpy as np

from rqv2_jax import config as config_lib
from rqv2_jax import config_check
from rqv2_jax.errors import InputError
from rqv2_jax.models import attention, bert, random_model, released
from rqv2_jax.models.scoring import Models
from rqv2_jax.recipe import opening
from rqv2_jax.tools import plan_steps, workload
from rqv2_jax.tools.machines import Machine
from rqv2_jax.tools.plan_steps import Step, Target
from rqv2_jax.training import sharding


@dataclasses.dataclass(frozen=True)
class Plan:
    """Steps by name, the settings under which they fit, and the sizes that storage depends on."""

    steps: dict[str, Step]
    overlay: dict[str, object]
    hidden_size: int
    passage_length: int


def make(
    config: ml_collections.ConfigDict,
    machine: Machine,
    lengths: str,
    report: Callable[[str], None],
) -> Plan:
    """Compiles or counts every step of a run; `report` gets a line for each try.

    `lengths` of the inputs are those of `workload.draw_lengths`; with "msmarco" the least times hold
    for the tokens that are really computed.

    Raises:
      InputError: the config cannot be used, or a step fits in no way.
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
    overlay: dict[str, object] = {"mesh.data": config.mesh.data, "mesh.fsdp": fsdp}
    sizes = {"joint": config.joint.list_size, "reranker": config.reranker.list_size}
    if config.retriever.epochs > 0:
        sizes["retriever"] = 1
    drawn = {
        name: workload.draw_lengths(config, lengths, config[name].batch, size)
        for name, size in sizes.items()
    }
    steps = _training_steps(config, models, drawn, target)
    for name in ("joint", "reranker"):
        overlay |= {"model.remat": steps[name].remat, f"{name}.accumulate": steps[name].accumulate}
    for name in ("encode", "re-rank"):
        steps[name] = plan_steps.forward_step(config, models, name, drawn["joint"], target)
    tokens = min(steps[name].tokens for name in ("encode", "re-rank"))
    overlay["evaluate.batch_tokens"] = tokens
    return Plan(steps, overlay, models.retriever.hidden_size, config.data.passage_length)


def open_models(
    config: ml_collections.ConfigDict, machine: Machine, report: Callable[[str], None]
) -> tuple[ml_collections.ConfigDict, Models]:
    """Returns the resolved config and the models' shapes as the machine computes them.

    Without the weights the shape is that of BERT base.
    """
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
    return config, models.reshaped(unrolled=machine.devices[0].platform == "cpu")


def _bert_base(
    config: ml_collections.ConfigDict,
) -> tuple[ml_collections.ConfigDict, Models]:
    shape, layers = random_model.SHAPES["bert-base"]
    base = released.plain(
        pathlib.Path("BERT base"), num_layers=layers, longest=shape["max_positions"]
    )
    config, _ = opening.resolve(config, released.Sources(base, base, base))
    model = config.model
    if model.attention == "auto":
        model.attention = "plain"
    common = {**shape, **{name: model[name] for name in ("dtype", "remat", "attention")}}
    retriever, reranker = (
        bert.BertConfig(**common, num_layers=each.num_layers, dropout=each.dropout, unrolled=False)
        for each in (model, model.reranker)
    )
    how = model.pooling, model.similarity, model.scale
    return config, Models(retriever, reranker, *how, head="linear")


def _training_steps(
    config: ml_collections.ConfigDict, models: Models, drawn: dict, target: Target
) -> dict[str, Step]:
    """Returns the steps of all stages, under the first policy by which all of them fit.

    Raises:
      InputError: there is none.
    """
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
    config: ml_collections.ConfigDict,
    models: Models,
    name: str,
    drawn: dict[str, np.ndarray],
    remats: list[str],
    target: Target,
) -> Step | None:
    """Returns the cheapest step that fits: keeping all, fewer lists at once, computing again."""
    batch, shards = config[name].batch, target.mesh.shards
    lists = -(-batch // shards)
    whole = name == "retriever" or (name == "joint" and config.joint.in_batch_weight)
    for remat in remats:
        for accumulate in range(1, 2 if whole else lists + 1):
            wasteful = -(-batch // (shards * accumulate)) * accumulate > lists
            if batch % accumulate or wasteful:
                continue
            tried = config_lib.loads(config_lib.dumps(config))
            if name != "retriever":
                tried[name].accumulate = accumulate
            reshaped = models.reshaped(remat=remat)
            step = plan_steps.train_step(tried, reshaped, name, drawn, target)
            if step is not None:
                return step
    return None
