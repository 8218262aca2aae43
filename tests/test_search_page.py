"""Questions over a finished run: the prompt, JSON, the page and its server, in a real browser too."""

import contextlib
import html.parser
import json
import os
import pathlib
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import browser as chromium
import pytest
from tiny_run import ROOT, run_program

from rqv2_jax.errors import InputError
from rqv2_jax.ranking import trec
from rqv2_jax.recipe.claim import open_workdir
from rqv2_jax.tools import page, questions, server
from rqv2_jax.tools.page import About
from rqv2_jax.tools.questions import Answer, Column

HOSTILE = "\"><script>alert(1)</script> & 'river' </title>"


@pytest.fixture(scope="module")
def asked(finished):
    """{id: text} of the test queries."""
    data = pathlib.Path(finished[0].data.path)
    queries = map(json.loads, (data / "queries.jsonl").open())
    return {q["_id"]: q["text"] for q in queries if int(q["_id"][1:]) >= 40}


@pytest.fixture(scope="module")
def served(finished):
    """All columns over the finished run, the released model's vectors made."""
    run = open_workdir(finished[1])
    how = {"state": "joint", "index_name": "exact", "shown": 8, "encoded": True}
    return server.open_served(run, **how)


@pytest.fixture
def serving(served):
    """`serving(served) -> Server` in threads of this process."""
    started = []

    def start(what=served, seconds=60):
        made = server.Server("127.0.0.1", 0, seconds)
        thread = threading.Thread(target=made.serve, args=(what,))
        thread.start()
        started.append((made, thread))
        return made

    yield start
    for made, thread in started:
        made.shutdown()
        thread.join()
        made.server_close()


def fetch(made, path, method="GET", **headers):
    """(status, headers, text) of a reply."""
    request = urllib.request.Request(made.url + path, method=method, headers=headers)
    try:
        reply = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as e:
        reply = e
    with reply:
        return reply.status, reply.headers, reply.read().decode()


def an_answer(question="river stones", text="a river of stone", **columns):
    """An answer about three passages, the second of the retriever's being the re-ranker's first."""
    found = {
        "retriever": Column("retriever", (0, 1, 2), (3.0, 2.0, 1.0)),
        "reranker": Column("reranker", (1, 0, 2), (0.5, -1.0, None)),
        **columns,
    }
    texts = {row: f"{text} {row}" for row in range(9)}
    ids = {row: f"p{row}" for row in texts}
    return Answer(question, tuple(found.values()), 9, 3, ids, texts, 0.1)


ABOUT = About("a/workdir", 9, "joint", "exact")


class Reader(html.parser.HTMLParser):
    """The tags of a page, its text, and the text in each <mark>."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.marked, self.scripts = [], "", [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "mark":
            self.marked.append("")

    def handle_data(self, data):
        self.text += data
        if self.tags and self.tags[-1][0] == "mark" and not self.marked[-1]:
            self.marked[-1] = data


def test_columns_are_what_the_evaluation_found(finished, served, asked):
    config, workdir = finished
    runs = {
        "retriever": "joint.retriever.exact",
        "reranker": "joint.reranker.exact",
        "bm25": "bm25.bm25.bm25",
    }
    for name, question in asked.items():
        answer = served.answers(question)
        assert [column.system for column in answer.columns] == [*runs, "released"]
        for system, file in runs.items():
            expected = trec.read_run(workdir / "runs" / f"test.{file}.trec")[name]
            column, store_ids = answer.column(system), answer.ids
            ids = [store_ids[row] for row in column.rows[:8]]
            assert ids == [passage for passage, _ in expected[:8]]
            scored = [(a, b) for a, (_, b) in zip(column.scores, expected) if a is not None]
            assert scored == [(pytest.approx(b, rel=1e-4, abs=1e-5), b) for _, b in scored]
        depth = config.evaluate.rerank_depth
        assert [x is None for x in answer.column("reranker").scores] == [False] * depth + [
            True
        ] * 14
        assert len(answer.column("released").rows) == config.evaluate.retrieve_depth


def test_the_released_column_is_the_starting_model_as_its_folder_has_it(finished, served, asked):
    """By transformers: all its layers, whole texts and [CLS], where the config has others."""
    import torch
    import transformers

    config, _ = finished
    folder = config.model.weights
    model = transformers.AutoModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    data = pathlib.Path(config.data.path)
    corpus = list(map(json.loads, (data / "corpus.jsonl").open()))

    def vectors(*texts):
        with torch.no_grad():
            encoded = tokenizer(*texts, return_tensors="pt", padding=True)
            return model(**encoded).last_hidden_state[:, 0].numpy()

    question = asked["q41"]
    passages = vectors([p["title"] for p in corpus], [p["text"] for p in corpus])
    scores = passages @ vectors([question])[0]
    column = served.answers(question).column("released")
    assert column.rows == tuple(scores.argsort()[::-1][:20].tolist())
    assert column.scores == pytest.approx(scores[list(column.rows)].tolist(), rel=1e-4)


def test_a_floor_that_is_not_there_says_why(finished, tmp_path):
    workdir = tmp_path / "workdir"
    shutil.copytree(finished[1], workdir)
    shutil.rmtree(workdir / "vectors" / "released", ignore_errors=True)
    run = open_workdir(workdir)
    run.config.evaluate.bm25.most_passages = 47
    how = {"state": "joint", "index_name": "exact", "shown": 3, "encoded": False}
    answer = questions.open_compared(run, **how)("river")
    command = f"python -m rqv2_jax.search --workdir {workdir} --serve --encode_released"
    assert command in answer.column("released").missing
    assert "48 passages are more than config.evaluate.bm25.most_passages, 47" in (
        answer.column("bm25").missing
    )
    assert not (workdir / "vectors" / "released").exists()
    shown = page.results(answer, ABOUT, str.lower)
    assert command in shown


def test_what_moved_is_told_from_both_sides():
    answer = an_answer(
        bm25=Column("bm25", (2, 5), (9.0, 8.0)), released=Column("released", (), (), "gone")
    )
    told = {
        (system, row): page.moved(answer, system, row)
        for system, row in (
            *(("retriever", 0), ("retriever", 1), ("retriever", 2)),
            *(("reranker", 0), ("reranker", 1), ("bm25", 2), ("bm25", 5)),
        )
    }
    assert told == {
        ("retriever", 0): ("down", "▼\u00a01, to 2"),
        ("retriever", 1): ("up", "▲\u00a01, to 1"),
        ("retriever", 2): ("same", "same rank"),
        ("reranker", 0): ("down", "▼\u00a01, from 1"),
        ("reranker", 1): ("up", "▲\u00a01, from 2"),
        ("bm25", 2): ("none", "re-ranked 3"),
        ("bm25", 5): ("none", "not among the 3 retrieved"),
    }
    text = Reader(page.results(answer, ABOUT, str.lower)).text
    assert "The re-ranker moved 2 of its first 3." in text
    assert "gone" in text
    deep = an_answer(reranker=Column("reranker", (2, 0, 1), (3.0, 2.0, 1.0)))
    deep = Answer(**{**vars(deep), "shown": 1})
    assert "moved 1 of its first 1; 1 came from below 1, from rank 3 at most" in (
        Reader(page.results(deep, ABOUT, str.lower)).text
    )


def test_words_are_marked_by_their_stems_and_stop_words_are_not(served):
    answer = an_answer("How do the Rivers run?", "A river, running; the driver RIVERS")
    marked = Reader(page.results(answer, ABOUT, served.stem)).marked
    assert marked[:3] == ["river", "running", "RIVERS"]
    parts = list(page.spans("a river, river", "river".__eq__))
    assert parts == [("a ", False), ("river", True), (", ", False), ("river", True)]
    assert list(page.spans("", "river".__eq__)) == []


def test_hostile_text_is_inert_wherever_it_stands(served):
    """In the question, a passage, its id, the reason of an empty column, and the workdir's name."""
    answer = an_answer(HOSTILE, HOSTILE, bm25=Column("bm25", missing=HOSTILE))
    answer = Answer(**{**vars(answer), "ids": dict.fromkeys(answer.ids, HOSTILE)})
    about = ABOUT._replace(workdir=HOSTILE)
    made = page.results(answer, about, served.stem)
    read, plain = Reader(made), Reader(page.results(an_answer(), ABOUT, served.stem))
    kinds = {tag for tag, _ in read.tags}
    assert kinds - {tag for tag, _ in plain.tags} <= {"mark"}
    assert [a.get("src") for tag, a in read.tags if tag == "script"] == ["/page.js"]
    assert next(a["value"] for tag, a in read.tags if tag == "input") == HOSTILE
    assert read.text.count("<script>alert(1)</script>") == 1 + 6 + 6 + 1 + 1
    # Nor is there an attribute that runs or styles anything.
    assert not [
        name for _, a in read.tags for name in a if name.startswith("on") or name == "style"
    ]


def test_the_server_answers_by_the_models(serving, served, asked):
    made = serving()
    question = asked["q42"]
    status, headers, text = fetch(made, f"?q={urllib.parse.quote_plus(question)}")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    answer = served.answers(question)
    scores = [
        "not scored" if score is None else f"{score:.3f}"
        for column in answer.columns
        for score in column.scores[:8]
    ]
    assert re.findall(r'class="score">([^<]*)<', text) == scores
    found = [column.rows[:8] for column in answer.columns]
    assert re.findall(r'data-passage="(\d+)"', text) == [str(row) for rows in found for row in rows]
    status, _, text = fetch(made, f"?q={urllib.parse.quote_plus(HOSTILE)}")
    assert status == 200
    assert "<script>alert" not in text
    for empty in ("", "?q=", "?q=%20+", "?other=1"):
        status, _, text = fetch(made, empty)
        assert status == 200
        assert "<section" not in text


def test_every_reply_forbids_what_is_not_the_pages_own(serving):
    made = serving()
    for path, method in (
        ("", "GET"),
        ("page.js", "GET"),
        ("page.css", "GET"),
        ("x", "GET"),
        ("", "POST"),
    ):
        _, headers, _ = fetch(made, path, method)
        policy = dict(
            x.strip().split(" ", 1) for x in headers["Content-Security-Policy"].split(";")
        )
        assert policy == {
            "default-src": "'none'",
            "style-src": "'self'",
            "script-src": "'self'",
            "form-action": "'self'",
            "img-src": "data:",
            "base-uri": "'none'",
            "frame-ancestors": "'none'",
        }
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert "Python" not in headers["Server"]


@pytest.mark.parametrize(
    ("path", "method", "headers", "status", "line"),
    [
        (
            "?q=" + "a" * 2001,
            "GET",
            {},
            414,
            "the question has 2,001 characters; 2,000 are allowed",
        ),
        ("?q=" + "a" * 70000, "GET", {}, 414, "URI Too Long"),
        ("nowhere", "GET", {}, 404, "there is no such page"),
        ("../search.py", "GET", {}, 404, "there is no such page"),
        ("?" + "&".join("abcdefghi"), "GET", {}, 400, "the address cannot be read"),
        ("?q=river", "POST", {}, 405, "only GET is answered here"),
        ("?q=river", "DELETE", {}, 405, "only GET is answered here"),
        ("?q=river", "BREW", {}, 501, "Unsupported method"),
        ("?q=river", "GET", {"Host": "elsewhere.example:80"}, 421, "only this machine's own names"),
        ("?q=river", "GET", {"Host": "[::1"}, 421, "only this machine's own names"),
    ],
)
def test_a_request_that_is_refused_gets_a_status_and_one_line(
    serving, path, method, headers, status, line
):
    given, replied, text = fetch(serving(), path, method, **headers)
    assert given == status
    assert replied["Content-Type"] == "text/plain; charset=utf-8"
    assert line in text
    assert text.count("\n") == 1
    assert (replied["Allow"] == "GET") == (status == 405)


def test_an_answer_that_takes_too_long_is_told_and_the_next_one_comes(serving, served):
    go = threading.Event()
    asked = []

    def slow(question):
        asked.append(question)
        go.wait(30)
        return served.answers(question)

    made = serving(served._replace(answers=slow), seconds=0.3)
    # The second waits for the first, and is given up before its turn.
    for question in ("first", "second"):
        status, _, text = fetch(made, f"?q={question}")
        assert status == 503
        assert text.startswith("no answer within 0 s")
    made.seconds = 30
    go.set()
    assert fetch(made, "?q=third")[0] == 200
    assert asked == ["first", "third"]


def test_an_answer_that_fails_is_told_in_one_line(serving, served, capfd):
    def fails(question):
        raise InputError("the texts\nhave changed") if question == "known" else ValueError("secret")

    made = serving(served._replace(answers=fails))
    assert fetch(made, "?q=known")[::2] == (500, "the texts have changed\n")
    assert fetch(made, "?q=other")[::2] == (500, "the search failed; its terminal says how\n")
    assert "ValueError: secret" in capfd.readouterr().err


def test_a_client_that_says_nothing_is_let_go(serving, monkeypatch):
    monkeypatch.setattr(server, "SPARE_SECONDS", 0.2)
    made = serving(seconds=0.3)
    with socket.create_connection(made.server_address, timeout=20) as client:
        started = time.monotonic()
        # Slowly, but never silent.
        with contextlib.suppress(OSError):
            while time.monotonic() - started < 20:
                client.sendall(b"G")
                time.sleep(0.1)
    assert time.monotonic() - started < 10
    assert fetch(made, "")[0] == 200


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = run_program("rqv2_jax.search", f"--workdir={tmp_path}", "--serve", f"--port={port}")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"error: --host 127.0.0.1 --port {port}: cannot be served on")
    assert ended.stderr.count("\n") == 1


def start(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "rqv2_jax.search", *arguments], cwd=ROOT, text=True, **options
    )


def test_serving_ends_by_ctrl_c_with_130(finished):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start(f"--workdir={finished[1]}", "--serve", "--port=0", "--shown=2", **pipes)
    try:
        line = next(line for line in process.stdout if line.startswith("http"))
        url = line.split()[0]
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url)
        with urllib.request.urlopen(f"{url}?q=river", timeout=60) as reply:
            assert reply.read().decode().count("<li ") == 8
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_questions_by_a_pipe_are_answered_as_one_question_is(finished, asked):
    """By the same text, and as JSON with what the evaluation found; remarks go elsewhere."""
    workdir = finished[1]
    (workdir / "joint" / "finished.txt").unlink()
    try:
        one = run_program("rqv2_jax.search", f"--workdir={workdir}", "--shown=3", asked["q41"])
        lines = f'{asked["q40"]}\n\n  {asked["q41"]}  \n"<b>" caf\xe9\n'.encode("latin-1")
        many, as_json = (
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "rqv2_jax.search",
                    f"--workdir={workdir}",
                    "--shown=3",
                    *flag,
                ],
                cwd=ROOT,
                input=lines,
                capture_output=True,
            )
            for flag in ([], ["--json"])
        )
    finally:
        (workdir / "joint" / "finished.txt").touch()
    assert (one.returncode, many.returncode, as_json.returncode) == (0, 0, 0)
    remark, _, alone = one.stdout.partition("\n")
    assert "is not finished" in remark
    parts = many.stdout.decode().split("question: ")
    assert len(parts) == 4
    assert parts[2] == f"{asked['q41']}\n{alone}\n"
    answers = [json.loads(line) for line in as_json.stdout.decode().splitlines()]
    assert [answer["query"] for answer in answers] == [
        asked["q40"],
        asked["q41"],
        '"<b>" caf\ufffd',
    ]
    assert "is not finished" in as_json.stderr.decode()
    runs = (
        trec.read_run(workdir / "runs" / f"test.joint.{model}.exact.trec")["q41"]
        for model in ("reranker", "retriever")
    )
    reranker, retriever = runs
    hits = answers[1]["hits"]
    assert [(hit["reranker_rank"], hit["id"]) for hit in hits] == [
        (rank, passage) for rank, (passage, _) in enumerate(reranker[:3], start=1)
    ]
    by_retriever = {passage: (rank, score) for rank, (passage, score) in enumerate(retriever, 1)}
    data = pathlib.Path(finished[0].data.path)
    corpus = {p["_id"]: p for p in map(json.loads, (data / "corpus.jsonl").open())}
    for hit, (_, score) in zip(hits, reranker):
        rank, other = by_retriever[hit["id"]]
        assert hit["reranker_score"] == pytest.approx(score, rel=1e-4, abs=1e-5)
        assert hit["retriever_score"] == pytest.approx(other, rel=1e-4, abs=1e-5)
        assert hit["retriever_rank"] == rank
        assert hit["text"] == f"{corpus[hit['id']]['title']}: {corpus[hit['id']]['text']}"


def test_json_has_no_score_where_nothing_was_re_ranked():
    hits = json.loads(questions.as_json(an_answer()))["hits"]
    assert [hit["reranker_score"] for hit in hits] == [0.5, -1.0, None]
    assert [hit["retriever_rank"] for hit in hits] == [2, 1, 3]


def test_a_terminal_is_asked_again_and_again(finished, asked):
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "dumb"}
    process = start(
        *(f"--workdir={finished[1]}", "--shown=1"),
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=environment,
    )
    os.close(theirs)
    shown = ""

    def until(count):
        nonlocal shown
        while shown.count("question> ") < count:
            shown += os.read(ours, 4096).decode()

    for number, name in enumerate(("q40", "q41"), start=1):
        until(number)
        os.write(ours, f"{asked[name]}\n".encode())
    until(3)
    os.write(ours, b"\x04")
    process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0
    assert shown.count("rank  re-ranker  retriever  passage") == 2


def test_who_reads_only_the_first_answer_is_no_error(tmp_path):
    """As `| head` does."""
    script = (
        "import sys; from rqv2_jax.tools import prompt\n"
        "prompt.answer(map(str, range(10**5)), lambda question: question * 99, sys.stdout)"
    )
    command = f'"{sys.executable}" -c "$0" | head -1'
    ended = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command, script], cwd=ROOT, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "0" * 99 + "\n", "")


# size: one visit, as a person makes it
@pytest.mark.skipif(not chromium.PROGRAM, reason=chromium.MISSING)
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_a_browser_searches_by_the_keyboard(serving, asked, tmp_path, width, height):
    made, question = serving(), asked["q43"]
    focused = "document.activeElement.closest('section li') ? [document.activeElement"
    focused += ".closest('section').id, [...document.activeElement.parentElement.children]"
    focused += ".indexOf(document.activeElement)] : document.activeElement.name"
    with chromium.opened(tmp_path / "profile") as seen:
        seen.sized(width, height)
        seen.opens(made.url)
        assert seen.value(focused) == "q"
        before = seen.loaded
        seen.types(question)
        seen.presses("Enter")
        seen.waits_for_load(before)
        assert seen.value("document.querySelector('input').value") == question
        assert seen.value("[...document.querySelectorAll('section')].map(s => s.id)") == [
            *("retriever", "reranker", "bm25", "released")
        ]
        assert seen.value("document.querySelectorAll('section li').length") == 32
        assert seen.value("document.querySelectorAll('mark').length") > 0
        # Nothing sticks out of the window.
        assert seen.value("document.documentElement.scrollWidth") <= width
        steps = [
            ("ArrowDown", ["reranker", 0]),
            ("ArrowDown", ["reranker", 1]),
            ("j", ["reranker", 2]),
            ("k", ["reranker", 1]),
            ("ArrowLeft", ["retriever", 1]),
            ("l", ["reranker", 1]),
            ("ArrowRight", ["bm25", 1]),
            ("Escape", "q"),
            ("ArrowDown", ["reranker", 0]),
            ("ArrowUp", "q"),
        ]
        for key, place in steps:
            seen.presses(key)
            assert seen.value(focused) == place, key
            if isinstance(place, list):
                # What has the focus is in the window, and stands out in every column that has it.
                inside = (
                    "r.left >= 0 && r.right <= innerWidth + 1 && r.top >= 0 && r.top < innerHeight"
                )
                assert seen.value(
                    f"(r => {inside})(document.activeElement.getBoundingClientRect())"
                )
                same = "document.querySelectorAll('li.same').length"
                assert seen.value(same) == seen.value(
                    "document.querySelectorAll(`li[data-passage='"
                    "${document.activeElement.dataset.passage}']`).length"
                )
        # Letters are letters in the box.
        seen.presses("j")
        assert seen.value("document.querySelector('input').value") == f"{question}j"
        seen.presses("ArrowDown", "/", "k")
        assert seen.value("document.querySelector('input').value") == "k"
        assert not seen.errors
        assert {urllib.parse.urlsplit(url)[:2] for url in seen.requested if url != "data:,"} == {
            ("http", made.url.split("/")[2])
        }
        # Nor could a page that was tampered with.
        tried = "addEventListener('securitypolicyviolation', () => done('stopped'));"
        tried += "const image = document.createElement('img'); image.onload = () => done('loaded');"
        tried += "image.src = 'http://127.0.0.1:9/x'"
        assert seen.value(f"new Promise(done => {{{tried}}})") == "stopped"
