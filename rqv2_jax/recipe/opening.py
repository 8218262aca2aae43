"""Models, tokenizer and inputs of a config, which its model folders fill in where it leaves them open.

The config overrides the folders. What it overrides, and what of a folder is left unused, is a note. A
config or a folder that cannot be used raises InputError.
"""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import ml_collections

from rqv2_jax import config as config_lib
from rqv2_jax import config_check
from rqv2_jax.data import tokenise
from rqv2_jax.data.inputs import Inputs
from rqv2_jax.errors import InputError
from rqv2_jax.models import attention, bert, released, sbert, weights
from rqv2_jax.models import scoring as models_lib

# The scale that sentence-transformers trains cosines with.
COSINE_SCALE = 20.0


class Opened(NamedTuple):
    """A config that says all in full, its model folders, its models without params, and notes."""

    config: ml_collections.ConfigDict
    sources: released.Sources
    models: models_lib.Models
    notes: list[str]


def open_models(config: ml_collections.ConfigDict) -> Opened:
    """Reads the model folders of a config, and fills in from them what it leaves open."""
    config_check.check(config)
    sources = released.find(config.model.weights, config.model.reranker.weights)
    query, passage, reranker = sources
    head = reranker.head
    if isinstance(head, str):
        raise InputError(
            f"{head}; give a folder with a re-ranker, or an encoder without a head, as "
            "config.model.reranker.weights"
        )
    if config.reranker.epochs == 0 and head is None:
        raise InputError(
            "config.reranker.epochs is 0, but config.model.weights has no trained re-ranker; give a "
            "folder that rqv2_jax.export has written, name a cross-encoder as "
            "config.model.reranker.weights, or train one"
        )
    config, notes = resolve(config, sources)
    _check_towers(config.model.towers, query, passage)
    config_check.check(config)
    shape, passage_shape = (
        _read_shape(config.model, config.model, source.folder) for source in (query, passage)
    )
    if passage_shape != shape:
        raise InputError(
            f"{passage.folder / 'config.json'}: describes another encoder than that of {query.folder}; "
            "both towers must have one shape"
        )
    reranker_shape = _read_shape(config.model, config.model.reranker, reranker.folder)
    separate = config.model.passage_format == "title_sep_text"
    _check_inputs(config.data, query.folder, shape, ("query", "passage"), separate)
    _check_inputs(config.data, reranker.folder, reranker_shape, ("pair",), True)
    backend, sizes = jax.default_backend(), (shape.head_size, reranker_shape.head_size)
    config.model.attention = attention.implementation(config.model.attention, backend, sizes)
    if isinstance(query.head, sbert.Head):
        notes.append(f"{query.folder}: is a re-ranker; the retriever starts from its encoder alone")
    notes += _left_unused(sources, head)
    models = models_lib.Models(
        retriever=shape,
        reranker=reranker_shape,
        towers=config.model.towers,
        pooling=config.model.pooling,
        similarity=config.model.similarity,
        scale=config.model.scale,
        head="linear" if head is None else head.form,
        reranker_pooling=config.model.reranker.pooling,
    ).reshaped(attention=config.model.attention)
    return Opened(config, sources, models, list(dict.fromkeys(notes)))


def _check_towers(towers: str, query: released.Released, passage: released.Released) -> None:
    """Raises InputError unless the two towers' folders describe one retriever."""
    if towers == "shared" and query.folder != passage.folder:
        raise InputError(
            f"config.model.towers is 'shared', but {query.folder} and {passage.folder} are two models; "
            "leave it out, or give one folder as config.model.weights"
        )
    for key in ("pooling", "similarity", "passage_format"):
        said = [getattr(tower, key) for tower in (query, passage)]
        if said[0] != said[1]:
            raise InputError(
                f"{passage.folder}: has {key} {said[1]!r}, but {query.folder} has {said[0]!r}; give "
                "the two towers of one model"
            )


def _left_unused(sources: released.Sources, head: sbert.Head | None) -> list[str]:
    """Returns a note for each folder with tensors that neither model reads."""
    notes = []
    for folder in dict.fromkeys(source.folder for source in sources):
        names = weights.unused(folder, head)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        if names:
            notes.append(f"{folder}: tensors left unused: {', '.join(names[:3])}{more}")
    return notes


def _check_inputs(
    data: ml_collections.ConfigDict,
    folder: pathlib.Path,
    shape: bert.BertConfig,
    kinds: tuple[str, ...],
    types: bool,
):
    """Raises InputError unless a model has a position, and if asked for a type, for every token."""
    names = [f"{kind}_length" for kind in kinds]
    names += [f"train_{name}" for name in names if f"train_{name}" in data]
    longest, path = max(data[name] for name in names), folder / "config.json"
    if longest > shape.max_positions:
        raise InputError(
            f"config.data asks for inputs of {longest} tokens, but {path} has {shape.max_positions} "
            f"positions; lower {', '.join(name for name in names if data[name] == longest)}"
        )
    if types and shape.type_vocab_size < 2:
        what = "config.model.passage_format title_sep_text" if len(kinds) > 1 else "a re-ranker"
        raise InputError(
            f"{path}: type_vocab_size is {shape.type_vocab_size}, and {what} needs 2; use "
            "title_text, or another model"
        )


def _open_tokenizer(opened: Opened) -> tokenise.Tokenizer:
    """Reads the retriever's tokenizer, with the re-ranker's beside it where that is another."""
    query, passage, reranker = opened.sources
    models, model = opened.models, opened.config.model
    tokenizer = _load_tokenizer(query, models.retriever)
    other = tokenizer
    if passage.folder != query.folder:
        other = _load_tokenizer(passage, models.retriever)
    if other.fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"{passage.folder}: has another tokenizer than {query.folder}; give both towers the same"
        )
    for key in ("query_prompt", "passage_prompt"):
        if not tokenizer.can_begin_with(_prompt(model[key])):
            raise InputError(
                f"config.model.{key}: {model[key]!r} would run into the text's first word; end it "
                "with a space"
            )
    if reranker.folder in (query.folder, passage.folder):
        return tokenizer
    return tokenizer.beside(_load_tokenizer(reranker, models.reranker))


def _load_tokenizer(source: released.Released, shape: bert.BertConfig) -> tokenise.Tokenizer:
    """Reads the tokenizer of a model folder, which must lower-case if the folder says so."""
    tokenizer = tokenise.load_tokenizer(source.folder, shape.vocab_size)
    if source.lower and tokenizer.encode(["A"]) != tokenizer.encode(["a"]):
        raise InputError(
            f"{source.folder / 'sentence_bert_config.json'}: do_lower_case is true, but the tokenizer "
            "tells upper and lower case apart, which is not understood; save the model with a "
            "tokenizer that lower-cases"
        )
    return tokenizer


def _prompt(setting: str) -> str:
    return "" if setting == config_lib.NO_PROMPT else setting


def open_inputs(config: ml_collections.ConfigDict) -> tuple[Opened, tokenise.Tokenizer, Inputs]:
    """Opens the models of a config with their tokenizer, and how they read its tokens."""
    opened = open_models(config)
    tokenizer, data, model = _open_tokenizer(opened), opened.config.data, opened.config.model
    pairs = tokenizer.pairs or tokenizer
    inputs = Inputs(
        cls=tokenizer.cls,
        sep=tokenizer.sep,
        pair_cls=pairs.cls,
        pair_sep=pairs.sep,
        titles=data.titles,
        passage_format=model.passage_format,
        query_prompt=tuple(tokenizer.encode([_prompt(model.query_prompt)])[0]),
        passage_prompt=tuple(tokenizer.encode([_prompt(model.passage_prompt)])[0]),
        query_length=data.query_length,
        passage_length=data.passage_length,
        pair_length=data.pair_length,
    )
    for kind, name in (("query", ""), ("passage", ""), ("passage", "train_")):
        prompt, length = getattr(inputs, f"{kind}_prompt"), data[f"{name}{kind}_length"]
        if len(prompt) + 8 > length and prompt:
            raise InputError(
                f"config.model.{kind}_prompt has {len(prompt)} tokens, which leaves no room for the "
                f"text in {length}; raise config.data.{name}{kind}_length"
            )
    return opened, tokenizer, inputs


def in_training(inputs: Inputs, data: ml_collections.ConfigDict) -> Inputs:
    """Returns the inputs as training batches hold them, which may be shorter."""
    return dataclasses.replace(
        inputs, passage_length=data.train_passage_length, pair_length=data.train_pair_length
    )


def _read_shape(
    model: ml_collections.ConfigDict, own: ml_collections.ConfigDict, folder: pathlib.Path
) -> bert.BertConfig:
    """Returns a folder's encoder; `own` is the part of `config.model` for it; layers are in a loop."""
    return released.read_config(
        folder,
        num_layers=own.num_layers,
        dropout=own.dropout,
        dtype=model.dtype,
        remat=model.remat,
        attention=model.attention,
        unrolled=False,
    )


def resolve(
    config: ml_collections.ConfigDict, sources: released.Sources
) -> tuple[ml_collections.ConfigDict, list[str]]:
    """Returns a copy of the config with what it left to the folders, and notes for people.

    Resolving what is resolved changes nothing. Each setting that overrides a folder has a note.
    """
    resolved, notes = config_lib.loads(config_lib.dumps(config)), []
    query, passage, reranker = sources
    model = resolved.model

    def choose(section: str, key: str, left_open: Any, said: Any, source: released.Released):
        name, group = f"{section}.{key}", resolved[section]
        if group[key] == left_open:
            group[key] = said
            if said not in config_check.CHOICES.get(name, (said,)):
                raise InputError(
                    f"{source.folder}: {key} {said!r} is not understood; choose one of "
                    f"{config_check.CHOICES[name][1:]} by --config.{name}, or another model"
                )
        elif group[key] != said:
            notes.append(f"config.{name} is {group[key]!r}, where {source.folder} has {said!r}")

    for key in ("pooling", "similarity", "passage_format"):
        choose("model", key, "", getattr(query, key), query)
    for key, source in (("query_prompt", query), ("passage_prompt", passage)):
        choose("model", key, "", getattr(source, key) or config_lib.NO_PROMPT, source)
    one = passage.folder == query.folder
    choose("model", "towers", "", query.towers if one else "separate", query)
    choose("model", "scale", 0.0, COSINE_SCALE if model.similarity == "cosine" else 1.0, query)
    given = model.num_layers
    choose("model", "num_layers", 0, query.num_layers, query)
    for kind, source in (("query", query), ("passage", passage), ("pair", reranker)):
        key, least = f"{kind}_length", config_check.SHORTEST[kind]
        if resolved.data[key] == 0 and source.longest < least:
            raise InputError(
                f"{source.longest_from} is {source.longest}, and a {kind} needs {least} tokens or "
                f"more; restore the model's file, or set config.data.{key}"
            )
        choose("data", key, 0, source.longest, source)
    for kind in ("passage", "pair"):
        trained = f"train_{kind}_length"
        resolved.data[trained] = resolved.data[trained] or resolved.data[f"{kind}_length"]
    own = model.reranker
    own.weights = own.weights or model.weights
    own.num_layers = own.num_layers or given or reranker.num_layers
    if own.num_layers != reranker.num_layers and reranker.folder != query.folder:
        notes.append(
            f"config.model.reranker.num_layers is {own.num_layers}, where {reranker.folder} has "
            f"{reranker.num_layers!r}"
        )
    if own.dropout < 0:
        own.dropout = model.dropout
    _choose_pooling(own, reranker, notes)
    described = [*query.notes, *passage.notes, *reranker.notes]
    return resolved, list(dict.fromkeys([*described, *notes]))


def _choose_pooling(
    own: ml_collections.ConfigDict, source: released.Released, notes: list[str]
) -> None:
    """Fills in how a re-ranker's states are pooled: a new head reads what the encoder was made for."""
    head = source.head if isinstance(source.head, sbert.Head) else None
    said = source.pooling if head is None else head.pooling
    if said not in config_check.CHOICES["model.reranker.pooling"]:
        # A retriever's that is not understood is no re-ranker's.
        said = "cls"
    own.pooling = own.pooling or said
    if head is not None and own.pooling != said:
        where = (
            f"config.model.reranker.pooling is {own.pooling!r}, where {source.folder} has {said!r}"
        )
        if head.form == "pooler":
            raise InputError(f"{where}, and its score cannot read another; leave it out")
        notes.append(where)
