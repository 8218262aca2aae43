"""A tiny collection, the settings that run the whole recipe on it, and how tests start commands."""

import json
import pathlib
import subprocess
import sys

import numpy as np
from conftest import WORDS

from rqv2_jax import config as config_lib
from rqv2_jax.training import train
from rqv2_jax.training.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parent.parent


def write_beir(folder, *, passages=48, seed=0):
    """A collection in which a query repeats words of its one relevant passage."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, 12)) for _ in range(passages)]
    (folder / "qrels").mkdir(parents=True)
    corpus = [
        {"_id": f"p{i}", "title": " ".join(text.split()[:2]), "text": text}
        for i, text in enumerate(texts)
    ]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(p) + "\n" for p in corpus))
    queries = []
    for split, rows in (("train", range(32)), ("dev", range(32, 40)), ("test", range(40, 48))):
        lines = ["query-id\tcorpus-id\tscore"]
        for i in rows:
            text = " ".join(rng.permutation(texts[i].split())[:5])
            queries.append({"_id": f"q{i}", "text": text})
            lines.append(f"q{i}\tp{i}\t1")
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    (folder / "queries.jsonl").write_text("".join(json.dumps(q) + "\n" for q in queries))
    return folder


def tiny_config(data, bert_folder):
    config = config_lib.default()
    config.data.path = str(data)
    config.data.update({"query_length": 16, "passage_length": 16, "pair_length": 32})
    config.model.update({"weights": str(bert_folder), "num_layers": 1, "pooling": "mean"})
    for stage, list_size in (("retriever", None), ("reranker", 4), ("joint", 4)):
        config[stage].update(
            {"epochs": 1.5, "batch": 8, "learning_rate": 1e-3, "log_every": 2}
            | {"evaluate_every": 3, "save_every": 2}
        )
        if list_size:
            config[stage].list_size = list_size
    # So that the last state differs from the one before, whatever so few dev queries say.
    config.joint.keep = "last"
    config.mine.depth = 8
    config.mine.negative_below = 0.5
    config.dev.update({"queries": 8, "depth": 6, "pool": 20})
    config.evaluate.update({"batch_tokens": 512, "retrieve_depth": 20, "rerank_depth": 6})
    config.evaluate.released.most_passages = 0
    return config


def run_program(module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def last_joint_params(run):
    """The params of both models after the last joint step, whether they are the best or not."""
    params = {model: run.initial(model) for model in ("retriever", "reranker")}
    rates = {} if run.config.joint.train_reranker else {"reranker": 0.0}
    optimizer = train.make_optimizer(run.config.optimizer, run.config.joint, 6, rates)
    checkpoints = Checkpoints(run.workdir / "joint")
    state = checkpoints.restore_last(lambda: train.state_shapes(params, optimizer, run.sharding))
    checkpoints.close()
    assert int(state.step) == 6
    return state.params


def _leaves(tree):
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in _leaves(tree[key])]
    return [tree]
