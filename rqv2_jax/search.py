"""Searches the passages of a workdir: its retriever finds, its re-ranker orders the first of them.

With a question, prints the best passages with both models' scores. Without one, asks for questions on a
terminal, or reads them from standard input, one a line, and loads nothing anew between them. With
--json every answer is one line of JSON. With --serve, a page in the browser shows retrieved and
re-ranked passages side by side, beside those of BM25 and of the released model; Ctrl-C ends it. With
--topics, writes the hits of each query of the file (`qid <tab> text`, TREC topics or BEIR's
queries.jsonl), which needs no labels, as a TREC run file. Data or weights that have moved since are
given as --data, --weights, --reranker_weights.

Examples:
  python -m rqv2_jax.search --workdir workdir/quickstart "sort an array"
  python -m rqv2_jax.search --workdir workdir/quickstart --serve
  python -m rqv2_jax.search --workdir workdir/quickstart --json <questions.txt >answers.jsonl
  python -m rqv2_jax.search --workdir workdir/msmarco --topics msmarco-test2020-queries.tsv \\
      --to run.trec --index scann
"""

import contextlib
import pathlib
import sys
from typing import Any

from absl import flags

from rqv2_jax import program
from rqv2_jax.errors import InputError

program.define_workdir()
flags.DEFINE_string("topics", None, "With --to: file of queries, in place of a question.")
flags.DEFINE_string("to", None, "With --topics: the run file to write.")
_STATE = flags.DEFINE_enum(
    "state", "joint", ["reranker", "joint"], "Models: both warmed up, or joint."
)
_INDEX = flags.DEFINE_enum("index", "exact", ["exact", "scann"], "How passages are searched.")
_SHOWN = flags.DEFINE_integer("shown", 10, "Passages shown for a question, at most.", 1)
_JSON = flags.DEFINE_bool("json", False, "Answer each question by one line of JSON.")
_SERVE = flags.DEFINE_bool("serve", False, "Serve a search page.")
_HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "With --serve: the address to serve on; 0.0.0.0 is open to other machines."
)
_PORT = flags.DEFINE_integer("port", 8765, "With --serve: the port; 0 is any.", 0, 65535)
_SECONDS = flags.DEFINE_integer(
    "seconds", 60, "With --serve: for an answer, those before it included.", 1
)
_ENCODE_RELEASED = flags.DEFINE_bool(
    "encode_released",
    False,
    "With --serve: encode the passages by the released model, if the workdir lacks such vectors.",
)


def main(*question: str) -> None:
    """Answers questions in the terminal or on a page, or writes the run of the topics."""
    topics = flags.FLAGS.topics
    _check(question, topics)
    to = program.file_to_write("to")
    if _SERVE.value:
        _serve()
    elif to is not None:
        from rqv2_jax.recipe.texts import open_store
        from rqv2_jax.tools import outputs

        with program.opened(reads=_is_made) as run:
            how = open_store(run), pathlib.Path(topics), to, _STATE.value, _INDEX.value
            print(*outputs.write_run(run, *how), sep="\n")
    else:
        # What a terminal of another encoding gives.
        _answer("".join(question).encode(errors="replace").decode())


def _check(question: tuple[str, ...], topics: str | None) -> None:
    """Raises InputError for flags that do not go together, and for an empty question."""
    if (topics is None) != (flags.FLAGS.to is None):
        raise InputError("--topics and --to go together; --help shows an example")
    if (topics is not None) + bool(question) + _SERVE.value > 1:
        raise InputError(
            "give one of a question, --topics FILE, and --serve; --help shows an example"
        )
    if _JSON.value and (topics or _SERVE.value):
        raise InputError("--json answers questions; give it with neither --topics nor --serve")
    for flag in (_HOST, _PORT, _SECONDS, _ENCODE_RELEASED):
        if flags.FLAGS[flag.name].present and not _SERVE.value:
            raise InputError(f"--{flag.name} is for the page; give --serve, too")
    if question and not question[0].strip():
        raise InputError("the question is empty; --help shows an example")


def _is_made(run: Any) -> bool:
    """Says whether the workdir holds all that is searched, so that it is only read."""
    evaluated = (run.workdir / "results.json").is_file()
    return evaluated and _INDEX.value in run.config.evaluate.indexes


def _answer(question: str) -> None:
    """Prints the answer of a question, or of those that are typed or piped in."""
    from rqv2_jax.tools import prompt
    from rqv2_jax.tools import questions as questions_lib

    asked, out = iter([question]) if question else prompt.questions(), sys.stdout
    piped = not question and not sys.stdin.isatty()

    def respond(question: str) -> str:
        answer = answers(question)
        if _JSON.value:
            return questions_lib.as_json(answer)
        text = questions_lib.as_text(answer)
        return f"question: {question}\n{text}\n" if piped else text

    # Remarks on the workdir would stand between the lines of JSON.
    remarks = contextlib.redirect_stdout(sys.stderr) if _JSON.value else contextlib.nullcontext()
    with remarks, program.opened(reads=_is_made) as run:
        answers = questions_lib.open_answers(run, **_how())
        prompt.answer(asked, respond, out)


def _serve() -> None:
    """Serves the page until a signal ends it."""
    from rqv2_jax.tools import server as server_lib

    encoded = _ENCODE_RELEASED.value

    def reads(run: Any) -> bool:
        return _is_made(run) and not encoded

    # The port comes first: loading may take minutes.
    with (
        server_lib.Server(_HOST.value, _PORT.value, _SECONDS.value) as server,
        program.opened(reads=reads) as run,
    ):
        served = server_lib.open_served(run, **_how(), encoded=encoded)
        if not server.local:
            print("all who can reach this machine can search; there is no password")
        print(f"{server.url}   Ctrl-C ends it", flush=True)
        server.serve(served)


def _how() -> dict[str, Any]:
    return {"state": _STATE.value, "index_name": _INDEX.value, "shown": _SHOWN.value}


if __name__ == "__main__":
    program.run(main, __doc__, required=("workdir",), arguments=1)
