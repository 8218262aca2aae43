"""Writes small files where the documented commands expect the reader's own, into the current folder.

  python .ci/samples.py

FOLDER in BEIR layout, questions with their answers as a CSV file, queries and labels as TREC publishes
them, labels, and runs of other systems, all from the invented towns in tests/fixtures/msmarco.
"""

import csv
import gzip
import json
import pathlib
import re

SOURCE = pathlib.Path("tests/fixtures/msmarco")


def rows(name: str) -> list[list[str]]:
    """Returns the fields of a gzipped file of the fixtures, line by line."""
    with gzip.open(SOURCE / f"{name}.gz", "rt") as file:
        return [line.rstrip("\n").split("\t") for line in file]


def write(path: str, lines: list[str]):
    """Writes a text file, with its folder."""
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_text("".join(f"{line}\n" for line in lines))


def ranking(queries: dict[str, str], passages: dict[str, str], name: str) -> list[str]:
    """Returns the lines of a TREC run: 100 passages of each query, by the words that both have."""
    words = {passage: set(re.findall(r"\w+", text.lower())) for passage, text in passages.items()}
    lines = []
    for query, text in queries.items():
        asked = set(re.findall(r"\w+", text.lower()))
        scores = {passage: len(asked & own) for passage, own in words.items()}
        best = sorted(scores, key=lambda passage: (-scores[passage], passage))[:100]
        lines += [f"{query} Q0 {p} {rank} {scores[p]} {name}" for rank, p in enumerate(best, 1)]
    return lines


def main():
    """Writes all of them."""
    titles, texts = dict(rows("para.title.txt")), dict(rows("collection.tsv"))
    train, test = dict(rows("queries.train.tsv")), dict(rows("queries.dev.small.tsv"))
    labels = {
        "train": [(q, p) for q, _, p, _ in rows("qrels.train.tsv") if int(q) % 10],
        "dev": [(q, p) for q, _, p, _ in rows("qrels.train.tsv") if not int(q) % 10],
        "test": [(q, p) for q, _, p, _ in rows("qrels.dev.small.tsv")],
    }
    corpus = [{"_id": p, "title": titles[p], "text": text} for p, text in texts.items()]
    asked = [{"_id": q, "text": text} for q, text in (train | test).items()]
    write("FOLDER/corpus.jsonl", [json.dumps(passage) for passage in corpus])
    write("FOLDER/queries.jsonl", [json.dumps(query) for query in asked])
    for split, pairs in labels.items():
        judged = ["query-id\tcorpus-id\tscore", *(f"{q}\t{p}\t1" for q, p in pairs)]
        write(f"FOLDER/qrels/{split}.tsv", judged)
        if split == "test":
            write("qrels/test.tsv", judged)
    with open("questions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "title", "answer"])
        for query, passage in (pair for pairs in labels.values() for pair in pairs):
            writer.writerow([(train | test)[query], titles[passage], texts[passage]])
    topics = [f"{query}\t{text}" for query, text in test.items()]
    write("msmarco-test2019-queries.tsv", topics)
    write("msmarco-test2020-queries.tsv", topics)
    graded = {pair: 2 for pair in labels["test"]}
    for query in test:
        for passage in list(texts)[:3]:
            graded.setdefault((query, passage), 1)
    write("2019qrels-pass.txt", [f"{q} 0 {p} {level}" for (q, p), level in graded.items()])
    whole = {passage: f"{titles[passage]} {text}" for passage, text in texts.items()}
    write("anserini.trec", ranking(test, whole, "words"))
    write("A.trec", ranking(test, whole, "words"))
    write("B.trec", ranking(test, titles, "titles"))


if __name__ == "__main__":
    main()
