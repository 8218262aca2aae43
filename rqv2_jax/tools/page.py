"""The search page as HTML: a question's columns side by side, what moved, and its words marked.

Pure functions of an answer. All text goes through `html.escape`; style and script are files of their
own, `page.css` and `page.js`, so that a browser may be forbidden everything that stands in the page.
"""

import pathlib
from collections.abc import Callable, Iterator
from html import escape
from typing import NamedTuple

from rqv2_jax.retrieval.bm25 import WORD
from rqv2_jax.tools.questions import Answer, Column

FILES = {
    f"/{path.name}": (path, kind)
    for path, kind in (
        (pathlib.Path(__file__).with_name("page.css"), "text/css"),
        (pathlib.Path(__file__).with_name("page.js"), "text/javascript"),
    )
}
# Characters of a question, and of a passage on the page, at most.
LONGEST_QUESTION, LONGEST_TEXT = 2000, 4000
HEADS = {
    "retriever": "Retrieved",
    "reranker": "Re-ranked",
    "bm25": "BM25",
    "released": "Released model",
}
FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/page.css">
<script src="/page.js" defer></script>
</head>
<body>
<header>
<form action="/" role="search">
<input name="q" type="search" value="{question}" maxlength="{longest}" required autofocus
 aria-label="Question" placeholder="Ask a question" autocomplete="off" enterkeyhint="search">
<button>Search</button>
</form>
<p class="line">{line}</p>
{tabs}</header>
{main}
<footer>
<p>{about}</p>
<p class="keys"><kbd>/</kbd> question &ensp;<kbd>Enter</kbd> search &ensp;<kbd>↓</kbd> <kbd>↑</kbd> or
<kbd>j</kbd> <kbd>k</kbd> results &ensp;<kbd>←</kbd> <kbd>→</kbd> or <kbd>h</kbd> <kbd>l</kbd>
columns &ensp;<kbd>Esc</kbd> back to the question</p>
</footer>
</body>
</html>
"""


class About(NamedTuple):
    """What a page says of the workdir that it searches."""

    workdir: str
    passages: int
    state: str
    index_name: str


def start(about: About) -> str:
    """Returns the page on which nothing has been asked yet."""
    line = (
        "What the retriever finds, and what the re-ranker makes of it, beside BM25 and the released "
        "model."
    )
    return _page("", "Search", line, "", "", about)


def results(answer: Answer, about: About, stem: Callable[[str], str]) -> str:
    """Returns the page of an answer; words are marked whose stem is that of a word of the question."""
    stems = {stem(word) for word in WORD.findall(answer.question)} - {""}

    def mark(text: str) -> str:
        return "".join(
            f"<mark>{escape(part)}</mark>" if marked else escape(part)
            for part, marked in spans(text, lambda word: stem(word) in stems)
        )

    tabs = "".join(f'<a href="#{c.system}">{HEADS[c.system]}</a>' for c in answer.columns)
    columns = "".join(_column(answer, column, mark) for column in answer.columns)
    tabs, main = f'<nav aria-label="Columns">{tabs}</nav>\n', f"<main>\n{columns}</main>"
    title = f"{answer.question} - search"
    return _page(answer.question, title, _summary(answer), tabs, main, about)


def _page(question: str, title: str, line: str, tabs: str, main: str, about: About) -> str:
    """Returns a page with a question in its box; `tabs` and `main` are HTML, the others text."""
    workdir, passages, state, index = about
    how = {"exact": "exact search", "scann": "ScaNN"}[index]
    said = f"{passages:,} passages, models of state {state}, {how}: {workdir}"
    return FRAME.format(
        title=escape(title),
        question=escape(question),
        longest=LONGEST_QUESTION,
        line=escape(line),
        tabs=tabs,
        main=main,
        about=escape(said),
    )


def spans(text: str, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bool]]:
    """Yields the text in parts, the words that are `wanted` apart from what stands between them."""
    end = 0
    for word in WORD.finditer(text):
        if wanted(word[0]):
            if word.start() > end:
                yield text[end : word.start()], False
            yield word[0], True
            end = word.end()
    if end < len(text):
        yield text[end:], False


def moved(answer: Answer, system: str, row: int) -> tuple[str, str]:
    """Returns how a passage of a column stands in another one: a class of CSS, and the words for it.

    A retrieved passage is told its rank after re-ranking, a re-ranked one its rank before, and one that
    a floor found its rank after re-ranking.
    """
    retriever, reranker = answer.column("retriever"), answer.column("reranker")
    before, after = retriever.rank(row), reranker.rank(row)
    if system not in ("retriever", "reranker"):
        if after is None:
            return "none", f"not among the {len(retriever.rows)} retrieved"
        return "none", f"re-ranked {after}"
    if before is None or after is None or before == after:
        return "same", "same rank"
    sign, kind = ("▲", "up") if after < before else ("▼", "down")
    other = f"from {before}" if system == "reranker" else f"to {after}"
    return kind, f"{sign}\u00a0{abs(before - after)}, {other}"


def _summary(answer: Answer) -> str:
    """Returns a sentence on what the re-ranker changed."""
    retriever, reranker = answer.column("retriever"), answer.column("reranker")
    top = reranker.rows[: answer.shown]
    before = [retriever.rows.index(row) + 1 for row in top]
    changed = sum(rank != now for now, rank in enumerate(before, start=1))
    below = [rank for rank in before if rank > len(top)]
    line = f"The re-ranker moved {changed} of its first {len(top)}"
    if below:
        line += f"; {len(below)} came from below {len(top)}, from rank {max(below)} at most"
    return f"{line}. {answer.seconds:.2f} s."


def _column(answer: Answer, column: Column, mark: Callable[[str], str]) -> str:
    """Returns a column with its first passages."""
    top, other = column.rows[: answer.shown], answer.column("reranker").rows[: answer.shown]
    if column.missing:
        note, body = "", f'<p class="missing">{escape(column.missing)}</p>'
    else:
        hits = enumerate(zip(top, column.scores), start=1)
        items = (_hit(answer, column.system, rank, hit, mark) for rank, hit in hits)
        body = f"<ol>\n{''.join(items)}</ol>"
        note = f"{len(set(top) & set(other))} of {len(top)} among the re-ranked"
        if column.system == "reranker":
            scored = sum(score is not None for score in column.scores)
            note = f"first {scored} retrieved, scored anew"
    head = f'<div class="title"><h2>{HEADS[column.system]}</h2><p class="note">{note}</p></div>'
    return f'<section id="{column.system}">\n{head}\n{body}\n</section>\n'


def _hit(
    answer: Answer,
    system: str,
    rank: int,
    hit: tuple[int, float | None],
    mark: Callable[[str], str],
) -> str:
    """Returns one passage of a column."""
    row, score = hit
    kind, how = moved(answer, system, row)
    text = answer.texts[row]
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]} ..."
    said = "not scored" if score is None else f"{score:.3f}"
    return (
        f'<li tabindex="0" data-passage="{row}">\n'
        f'<p class="head"><b>{rank}</b> <span class="moved {kind}">{escape(how)}</span> '
        f'<span class="score">{said}</span></p>\n'
        f'<p class="text">{mark(text)}</p>\n'
        f'<p class="id">{escape(answer.ids[row])}</p>\n</li>\n'
    )
