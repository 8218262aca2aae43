"""What tests share: eight devices on one CPU, tiny BERT folders, and a tiny world to train on."""

import dataclasses
import os
import pathlib
import shutil
import string
from functools import partial

import numpy as np
import pytest

# Read when jax and tensorflow are first imported, so set before any test module is. Compiling takes
# most of the time of these tests, and half as long where little is optimised.
XLA_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{XLA_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The same programs are compiled by many tests, and by the programs that tests start.
COMPILED = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "compiled"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

# Other words are spelled letter by letter.
WORDS = [
    *("river", "stone", "engine", "garden", "winter", "copper", "letter", "market", "signal"),
    *("forest", "bridge", "silver", "doctor", "island", "planet", "orange", "mirror", "castle"),
]
VOCAB = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *string.ascii_lowercase,
    *string.digits,
    *string.punctuation,
    *(f"##{c}" for c in string.ascii_lowercase + string.digits),
    *WORDS,
]


@pytest.fixture(scope="session")
def make_bert(tmp_path_factory):
    """`make(seed=0, name="BertModel", **config) -> (folder, model)`: a random tiny model, saved.

    `model` is transformers' own, in evaluation mode; the folder has a WordPiece tokenizer beside it.
    No weight stands at 0 or 1, so that a weight that is left out or taken for another is seen.
    """
    import torch
    import transformers

    def make(seed=0, name="BertModel", **overrides):
        settings = {
            "vocab_size": len(VOCAB),
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 192,
            **overrides,
        }
        family = "Ernie" if name.startswith("Ernie") else "Bert"
        config = getattr(transformers, f"{family}Config")(**settings)
        model = getattr(transformers, name)(config).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                noise = torch.randn(weight.shape, generator=generator)
                if key.endswith("LayerNorm.weight"):
                    weight.copy_(1 + 0.1 * noise)
                elif key.endswith("bias"):
                    weight.copy_(0.1 * noise)
                else:
                    weight.copy_(noise * (1.0 if "embeddings" in key else weight.shape[-1] ** -0.5))
        folder = tmp_path_factory.mktemp("bert")
        model.save_pretrained(folder, safe_serialization=True)
        vocab = {token: i for i, token in enumerate(VOCAB)}
        transformers.BertTokenizer(vocab=vocab).save_pretrained(folder)
        return folder, model

    return make


@pytest.fixture(scope="session")
def bert_folder(make_bert):
    """A tiny BERT in the layout of a Hugging Face folder, with its tokenizer."""
    return make_bert()[0]


@pytest.fixture(scope="session")
def trained(tmp_path_factory, bert_folder):
    """(config, folder) of one run of the whole recipe on a tiny collection; only read.

    In folder/data lies the collection, in folder/workdir the run. All processes of a test session share
    it: the first that asks trains, the others wait.
    """
    import filelock
    from tiny_run import tiny_config, write_beir

    from rqv2_jax import config as config_lib
    from rqv2_jax.recipe import pipeline

    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = base / "trained", base / "trained" / "config.json"
    with filelock.FileLock(base / "trained.lock"):
        if not done.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            config = tiny_config(write_beir(folder / "data"), bert_folder)
            pipeline.main(config, folder / "workdir")
            done.write_text(config_lib.dumps(config))
    return config_lib.loads(done.read_text()), folder


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory):
    """(config, workdir) of a finished run, a copy for each test file; the data lies beside it."""
    from rqv2_jax import config as config_lib

    config, folder = trained
    own = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(folder, own)
    # As if it had been trained here.
    resolved = own / "workdir" / "config.json"
    configs = [config_lib.loads(text) for text in (config_lib.dumps(config), resolved.read_text())]
    for each in configs:
        each.data.path = str(own / "data")
    resolved.write_text(config_lib.dumps(configs[1]))
    return configs[0], own / "workdir"


# Joint losses of the paper's preset with these settings changed.
JOINT = {
    "in batch": {"kl_weight": 0.5, "in_batch_weight": 0.7},
    "static": {"train_reranker": False},
    "no kl": {"kl_weight": 0.0},
}


# Of a loss's name; and the scale that the cosine has there.
COSINE, SCALE = ", cosine", 20.0


@dataclasses.dataclass(frozen=True)
class World:
    """A tiny problem: passages, queries and lists as tokens; both models and their torch twins."""

    store: object
    inputs: object
    lists: object
    models: object  # without dropout
    params: dict  # keyed by model; all three encoders differ
    torch_models: dict  # "query", "passage", "encoder": transformers' BertModel
    folders: dict

    def batches(self, *, models, in_batch, shards, accumulate=1, batch=8, max_blocks=1, flat=False):
        from rqv2_jax.data.batches import BatchLayout, ListBatches

        return ListBatches(
            self.store,
            self.store.splits["train"],
            self.inputs,
            self.lists,
            BatchLayout(batch, shards, accumulate, range(shards * accumulate), max_blocks, flat),
            models=models,
            in_batch=in_batch,
        )

    def loss(self, name, models=None, accumulate=1):
        """(loss_fn, models it trains, in_batch) of "retriever", "reranker", "pointwise" or a joint one.

        A joint loss is a preset of LOSSES, or one of JOINT, which changes other settings. With
        ", cosine" behind its name the retriever compares by that, scaled.
        """
        from rqv2_jax import config
        from rqv2_jax.training import stages

        models = models or self.models
        if name.endswith(COSINE):
            models = dataclasses.replace(models, similarity="cosine", scale=SCALE)
            name = name.removesuffix(COSINE)
        if name == "retriever":
            loss_fn = partial(stages.retriever_loss, models, accumulate > 1)
            return loss_fn, ("retriever",), True
        if name in ("reranker", "pointwise"):
            kind = "listwise" if name == "reranker" else name
            return partial(stages.reranker_loss, models, {"loss": kind}), ("reranker",), False
        settings = {"kl_weight": 1.0, "in_batch_weight": 0.0, "train_reranker": True}
        settings |= {"loss": config.LOSSES.get(name, config.LOSSES["paper"])} | JOINT.get(name, {})
        in_batch = settings["in_batch_weight"] > 0
        settings["by_part"] = in_batch and accumulate > 1
        settings["averaged"] = 1 if in_batch else accumulate
        loss_fn = partial(stages.joint_loss, models, settings)
        return loss_fn, ("retriever", "reranker"), in_batch


@pytest.fixture(scope="session")
def world(make_bert):
    import jax
    from shapes import models_of, read_shape

    from rqv2_jax.data.inputs import Inputs
    from rqv2_jax.data.lists import Lists, Provenance
    from rqv2_jax.data.tokens import Queries, Store, Texts
    from rqv2_jax.models import scoring as models_lib
    from rqv2_jax.models import weights

    made = {
        tower: make_bert(seed, num_hidden_layers=1)
        for seed, tower in enumerate(("query", "passage", "encoder"))
    }
    config = read_shape(made["query"][0], 1, dropout=0.0)
    encoders = {tower: weights.load_encoder(made[tower][0], config) for tower in made}
    params = {
        "retriever": {tower: encoders[tower] for tower in ("query", "passage")},
        "reranker": models_lib.init_reranker(encoders["encoder"], config, jax.random.key(5)),
    }
    head = params["reranker"]["head"]
    params["reranker"]["head"] = {"kernel": head["kernel"] * 20, "bias": head["bias"] + 0.5}
    # In numpy, which no step can donate.
    params = jax.device_get(params)

    rng = np.random.default_rng(0)

    def texts(count, shortest, longest):
        lengths = rng.integers(shortest, longest + 1, count)
        tokens = rng.integers(5, len(VOCAB), lengths.sum()).astype(np.uint16)
        return Texts(tokens, np.concatenate([[0], np.cumsum(lengths)]))

    num_passages, num_queries, num_lists, size = 24, 16, 32, 3
    # Queries have one or two relevant passages, and the second is in other queries' lists.
    positives = [(q, q) for q in range(num_queries)] + [(q, q + 1) for q in range(0, 8, 2)]
    qrels = np.array([(q, p, 1) for q, p in sorted(positives)]).T
    queries = Queries(texts(num_queries, 2, 5), [str(i) for i in range(num_queries)], qrels)
    query_rows = np.concatenate([rng.permutation(num_queries) for _ in range(2)])[:num_lists]
    query_rows[:8] = range(8)
    negatives = [
        rng.permutation(np.setdiff1d(np.arange(num_passages), qrels[1, qrels[0] == q]))[: size - 1]
        for q in query_rows
    ]
    provenance = np.full((num_lists, size), Provenance.UNDENOISED_NEGATIVE)
    provenance[:, 0] = Provenance.LABELLED_POSITIVE
    return World(
        store=Store(
            titles=texts(num_passages, 0, 2),
            texts=texts(num_passages, 3, 12),
            passage_ids=[str(i) for i in range(num_passages)],
            splits={"train": queries},
            fingerprint="tiny",
        ),
        inputs=Inputs(
            cls=2,
            sep=3,
            pair_cls=2,
            pair_sep=3,
            titles=True,
            passage_format="title_sep_text",
            query_prompt=(),
            passage_prompt=(),
            query_length=8,
            passage_length=16,
            pair_length=16,
        ),
        lists=Lists(query_rows, np.column_stack([query_rows, np.array(negatives)]), provenance),
        models=models_of(config),
        params=params,
        torch_models={tower: model for tower, (_, model) in made.items()},
        folders={tower: folder for tower, (folder, _) in made.items()},
    )


@dataclasses.dataclass(frozen=True)
class FirstStep:
    """What one training step from `world.params` did on a mesh, in numpy."""

    terms: dict
    gradients: dict
    params: dict
    before: dict


B1 = 0.9


@pytest.fixture(scope="session")
def optimizer_settings():
    from ml_collections import ConfigDict

    return ConfigDict(
        {"weight_decay": 0.01, "clip_norm": 1e9, "clip": "together", "b1": B1, "b2": 0.999}
    )


@pytest.fixture(scope="session")
def stage_settings():
    """`settings(**changes)` of a training stage."""
    from ml_collections import ConfigDict

    def settings(**changes):
        defaults = {
            "batch": 8,
            "learning_rate": 1e-3,
            "schedule": "constant",
            "warmup_steps": 0,
            "log_every": 1,
            "evaluate_every": 100,
            "save_every": 100,
        }
        return ConfigDict({**defaults, **changes})

    return settings


@pytest.fixture(scope="session")
def first_batch(world):
    """`batch(name, shards, accumulate=1)`: a loss's first, a passage of some lists left out."""

    def batch(name, shards, accumulate=1):
        from rqv2_jax.data.batches import slots

        _, models, in_batch = world.loss(name)
        made = world.batches(
            models=models, in_batch=in_batch, shards=shards, accumulate=accumulate
        ).make(0)
        if not name.startswith("retriever"):
            where = made["where"].copy()
            for row, passage in ((1, 1), (4, 2), (6, 2)):
                where[slots(8, shards, accumulate) == row, passage] = False
            made["where"] = where
        return made

    return batch


@pytest.fixture(scope="session")
def stepper(world, first_batch, optimizer_settings, stage_settings):
    """`stepper(name, data, fsdp, accumulate=1) -> (step, start, batch)`: of a loss on a mesh.

    Compiled once.
    """
    from rqv2_jax.training import sharding as sharding_lib
    from rqv2_jax.training import train

    made = {}

    def make(name, data, fsdp, accumulate=1):
        if (name, data, fsdp, accumulate) not in made:
            sharding = sharding_lib.make(data, fsdp)
            loss_fn, models, in_batch = world.loss(name, accumulate=accumulate)
            by_part = in_batch and accumulate > 1
            optimizer = train.make_optimizer(optimizer_settings, stage_settings(), 10, {})
            params = {model: world.params[model] for model in models}
            made[name, data, fsdp, accumulate] = (
                train.make_step(loss_fn, optimizer, sharding, by_part=by_part),
                lambda: train.init_state(params, optimizer, sharding),
                sharding.put_batch(first_batch(name, sharding.shards, accumulate)),
            )
        return made[name, data, fsdp, accumulate]

    return make


@pytest.fixture(scope="session")
def first_step(stepper):
    """`first_step(name, data, fsdp, accumulate=1)`: what the first step did, taken once."""
    import jax
    import optax

    taken = {}

    def take(*case):
        if case not in taken:
            step, start, batch = stepper(*case)
            before = jax.device_get(start().params)
            after, terms = jax.device_get(step(start(), batch, jax.random.key(0)))
            # Adam's first moment after one step, undone: the gradient itself.
            (moments,) = optax.tree.get_all_with_path(after.opt_state, "mu")
            gradients = jax.tree.map(lambda mu: mu / (1 - B1), moments[1])
            taken[case] = FirstStep(terms, gradients, after.params, before)
        return taken[case]

    return take
