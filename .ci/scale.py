"""A corpus of a million passages through the whole program, killed on the way: time, memory, disk.

  python .ci/scale.py FOLDER [--passages 1000000] [--kills 3]

Writes made-up texts in BEIR layout to FOLDER/data, runs `rqv2_jax.main` on them in FOLDER/workdir with
one layer of the starting model, ends it by SIGKILL as soon as tokens, vectors and candidates are being
made, gives the same command again each time, asks `rqv2_jax.search` one question at the end, and prints
a line of JSON for each start: seconds, and the most memory in GiB, its own and with mapped files.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np

QUERIES = {"train": 2000, "dev": 200, "test": 500}
WORDS, PASSAGE, QUERY = 30_000, (15, 45), (3, 9)
# What lies in the workdir when the moment to kill has come.
MOMENTS = ("data/tokens*/**/*", "vectors/**/*", "lists/*")
FLAGS = (
    "--config.model.num_layers=1",
    "--config.model.reranker.num_layers=1",
    "--config.data.passage_length=64",
    "--config.data.train_passage_length=64",
    "--config.data.pair_length=96",
    "--config.data.train_pair_length=96",
    "--config.budget=0",
    "--config.retriever.most_lists=1280",
    "--config.reranker.most_lists=320",
    "--config.joint.most_lists=320",
    "--config.evaluate.rerank_queries=100",
    "--config.evaluate.indexes=('exact', 'scann')",
)


def write(folder: pathlib.Path, passages: int):
    """Writes invented passages, and for each query a few words of the passage that answers it."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnoprstuvw"))
    words = ["".join(rng.choice(letters, size)) for size in rng.integers(3, 9, WORDS)]
    (folder / "qrels").mkdir(parents=True)
    asked = rng.choice(passages, sum(QUERIES.values()), replace=False)
    splits = np.repeat(list(QUERIES), list(QUERIES.values()))
    split_of = dict(zip(asked.tolist(), splits.tolist()))
    with (
        open(folder / "corpus.jsonl", "w") as corpus,
        open(folder / "queries.jsonl", "w") as queries,
    ):
        qrels = {split: ["query-id\tcorpus-id\tscore"] for split in QUERIES}
        for row in range(passages):
            drawn = WORDS * rng.random(rng.integers(*PASSAGE)) ** 3
            text = [words[word] for word in drawn.astype(int)]
            corpus.write(json.dumps({"_id": f"p{row}", "title": "", "text": " ".join(text)}) + "\n")
            if row in split_of:
                rare = np.argsort(-drawn)[: rng.integers(*QUERY)]
                question = " ".join(text[word] for word in rare)
                queries.write(json.dumps({"_id": f"q{row}", "text": question}) + "\n")
                qrels[split_of[row]].append(f"q{row}\tp{row}\t1")
    for split, lines in qrels.items():
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")


def memory(process: int) -> tuple[float, float]:
    """Returns the GiB that a process holds: its own, and with the pages of files that it maps."""
    try:
        lines = pathlib.Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0, 0.0
    fields = dict(line.split(":", 1) for line in lines)
    own, whole = (int(fields.get(key, "0 kB").split()[0]) for key in ("RssAnon", "VmRSS"))
    return own / 2**20, whole / 2**20


def watched(command: list[str], name: str, until: str | None, workdir: pathlib.Path) -> int:
    """Runs a command, kills it once a new file matches `until`; prints a line, returns its status."""
    before = set(workdir.glob(until)) if until else set()
    started, most, written = time.monotonic(), (0.0, 0.0), 0.0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            most = tuple(map(max, most, memory(process.pid)))
            if until and set(workdir.glob(until)) - before:
                written = written or time.monotonic()
                # In the middle of what comes after the first file, not at once.
                if time.monotonic() - written > 5:
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.2)
    line = {
        "start": name,
        "ended": process.returncode,
        "seconds": round(time.monotonic() - started),
        "own_gib": round(most[0], 2),
        "with_files_gib": round(most[1], 2),
    }
    print(json.dumps(line), flush=True)
    return process.returncode


def main():
    """Runs all of it in one folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--kills", type=int, default=len(MOMENTS))
    given = parser.parse_args()
    data, workdir = given.folder / "data", given.folder / "workdir"
    if not data.exists():
        write(data, given.passages)
    program = [sys.executable, "-m", "rqv2_jax.main", "--config", "configs/beir.py"]
    run = [*program, f"--config.data.path={data}", f"--workdir={workdir}", *FLAGS]
    for number, moment in enumerate(MOMENTS[: given.kills]):
        if watched(run, f"killed at {moment.split('/')[0]}", moment, workdir) != -signal.SIGKILL:
            sys.exit(f"start {number} was not killed at {moment}")
    if watched(run, "to the end", None, workdir):
        sys.exit(1)
    question = [sys.executable, "-m", "rqv2_jax.search", f"--workdir={workdir}"]
    if watched([*question, "abcde fghij"], "one question", None, workdir):
        sys.exit(1)
    for part in sorted(workdir.iterdir()):
        size = sum(f.stat().st_size for f in part.rglob("*") if f.is_file())
        print(json.dumps({"part": part.name, "disk_gib": round(size / 2**30, 3)}), flush=True)
    print(json.dumps({"cores": os.cpu_count(), "passages": given.passages}))


if __name__ == "__main__":
    main()
