"""A run: a config made concrete, and the params that its models have in every state."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import ml_collections
import tqdm

from rqv2_jax import config as config_lib
from rqv2_jax.data import files, tokenise
from rqv2_jax.data.inputs import Inputs
from rqv2_jax.errors import InputError
from rqv2_jax.models import files as model_files
from rqv2_jax.models import released, sbert, weights
from rqv2_jax.models import scoring as models_lib
from rqv2_jax.recipe import opening
from rqv2_jax.recipe.workdir import begun
from rqv2_jax.retrieval.stream import Forward, make_forward
from rqv2_jax.training import sharding as sharding_lib
from rqv2_jax.training.checkpoint import best_step, restore_best

# What both models are: as they start; after the retriever's, the re-ranker's, the joint training.
STATES = ("zero_shot", "retriever", "reranker", "joint")


@dataclasses.dataclass(frozen=True)
class Run:
    """A config made concrete: its workdir, its models without their params, and their inputs.

    `config` holds in full what the given one left to the model folders, which `sources` describe.
    With `force` it goes on where disk or memory look too small.
    Methods raise InputError for a stage that has not been run, and for a re-ranker in a state before
    its training.
    """

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    sources: released.Sources
    models: models_lib.Models
    tokenizer: tokenise.Tokenizer
    inputs: Inputs
    sharding: sharding_lib.Sharding
    forward: Forward
    force: bool = False

    def initial(self, model: str) -> dict[str, Any]:
        """Returns the params of one model before any training, on the devices."""
        query, passage, reranker = (source.folder for source in self.sources)
        if model == "retriever":
            folders = {"query": query, "passage": passage, "both": query}
            params = {
                name: weights.load_encoder(folders[name], self.models.retriever)
                for name in models_lib.TOWERS[self.models.towers]
            }
            return self.sharding.put_params(params)
        config, source = self.models.reranker, self.sources.reranker
        encoder, head = weights.load_encoder(reranker, config), source.head
        if not isinstance(head, sbert.Head):
            key = jax.random.key(self.config.seed)
            # A model made for single texts has never used the second type, and reads worse with it.
            single = source.passage_format == "title_text"
            params = models_lib.init_reranker(encoder, config, key, one_type=single)
        else:
            params = {"encoder": encoder, "head": weights.load_head(head, config.hidden_size)}
        return self.sharding.put_params(params)

    @property
    def new_reranker(self) -> bool:
        """Says whether the re-ranker's head begins with random weights."""
        return not isinstance(self.sources.reranker.head, sbert.Head)

    def trained_by(self, *, state: str, model: str) -> str:
        """Returns the stage whose params a model has in a state; "zero_shot" for none."""
        if state == "joint":
            return "joint"
        if model == "reranker" and state != "reranker":
            raise InputError(f"state {state!r} has no re-ranker; choose 'reranker' or 'joint'")
        return model if state != "zero_shot" and self.config[model].epochs > 0 else "zero_shot"

    def kept_by(self, *, state: str, model: str) -> str:
        """Returns the stage whose checkpoint has a model's params in a state; "zero_shot" for none.

        Where joint training kept its start, that is an earlier one.
        """
        stage = self.trained_by(state=state, model=model)
        if stage == "joint" and best_step(self.workdir / stage, model) == 0:
            return self.trained_by(state="reranker", model=model)
        return stage

    @functools.cached_property
    def weights_hash(self) -> str:
        """Returns the hash of the weight files that all models start from."""
        folders = [source.folder for source in self.sources]
        head = self.sources.reranker.head
        if isinstance(head, sbert.Head) and head.folder not in folders:
            folders.append(head.folder)
        tensors = [file for folder in folders for file in model_files.tensor_files(folder)]
        return files.content_hash(tensors)

    def origin(self, *, state: str, model: str) -> str:
        """Names the params of one model in a state: stage, best step and the name of its training.

        The name changes if the stage is trained again, or if another step becomes the best.
        """
        stage = self.kept_by(state=state, model=model)
        if stage == "zero_shot":
            return f"zero_shot {self.weights_hash}"
        folder = self.workdir / stage
        return f"{stage} {best_step(folder, model)} {' '.join(begun(folder))}"

    def params(self, *, state: str, model: str) -> dict[str, Any]:
        """Returns the params of one model in a state, on the devices."""
        stage = self.kept_by(state=state, model=model)
        initial = self.initial(model)
        if stage == "zero_shot":
            return initial
        return restore_best(self.workdir / stage, model, initial)


def open_run(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, *, quiet: bool = False
) -> Run:
    """Checks the config, the model folders and the devices; prints, unless `quiet`, what it overrides.

    Unless JAX has been given a folder for what it compiles, that becomes `.compiled` beside the
    workdir, so that a program is compiled only once. Raises InputError for what cannot be used.
    """
    (config, sources, models, notes), tokenizer, inputs = opening.open_inputs(config)
    # Options become attributes when they are defined, which mypy does not see.
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        compiled = workdir.resolve().parent / ".compiled"
        jax.config.update("jax_compilation_cache_dir", str(compiled))
    # A rolled loop stacks all activations kept for the gradient; copying them costs a CPU a quarter of
    # the step, a GPU an eighth and a TPU next to nothing.
    models = models.reshaped(unrolled=jax.default_backend() != "tpu")
    sharding = sharding_lib.make(config.mesh.data, config.mesh.fsdp)
    sizes = {"batch_tokens": config.evaluate.batch_tokens, "max_blocks": config.packing.blocks}
    forward = make_forward(models, inputs, sharding, **sizes)
    for note in () if quiet else notes:
        tqdm.tqdm.write(f"model: {note}")
    return Run(config, workdir, sources, models, tokenizer, inputs, sharding, forward)


def as_released(run: Run) -> Run:
    """Returns the run with its starting retriever as the model folder describes it."""
    for source in run.sources:
        model_files.check_there(source.folder)
    config = config_lib.loads(config_lib.dumps(run.config))
    config.data.update({"query_length": 0, "passage_length": 0, "pair_length": 0})
    left_open = ("pooling", "similarity", "query_prompt", "passage_prompt", "passage_format")
    config.model.update(dict.fromkeys(left_open, "") | {"num_layers": 0, "scale": 0.0})
    return open_run(config, run.workdir, quiet=True)
