"""Parts of a page that needs no other file and no script. All texts are escaped."""

import html
import itertools
import string
from collections.abc import Iterable, Sequence
from typing import Any

PAGE = string.Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #f3f4f6; --line: #d5d9de;
  --grey: #5c6570; --good: #1a7f37; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #14171b; --soft: #1f242a;
  --line: #3a424c; --grey: #9aa4af; --good: #56c271; --bad: #f08a80; } }
body { margin: 0 auto; padding: 0 1rem 3rem; max-width: 68rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 1.5rem 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
nav a { margin-right: .9rem; white-space: nowrap; }
a { color: inherit; }
.verdict p { font-size: 1.1rem; margin: .5rem 0; }
.lack, .note { color: var(--grey); }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { color: var(--grey); font-weight: 600; }
th.word, td.word { text-align: left; }
tr.floor td { background: var(--soft); }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); }
figure { margin: 0; }
.figures svg { width: 100%; max-width: 30rem; height: auto; font-family: system-ui, sans-serif; }
.story { border-left: .2rem solid var(--line); padding-left: .8rem; margin: 1rem 0; }
.story.won { border-color: var(--good); }
.story.lost { border-color: var(--bad); }
.story p { margin: .15rem 0; }
.story .query { font-weight: 600; }
.story span { color: var(--grey); }
pre { overflow-x: auto; background: var(--soft); padding: .7rem; font-size: .8rem; }
code { overflow-wrap: anywhere; }
summary { cursor: pointer; }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


def text(words: Any) -> str:
    """Returns words as a page shows them, whatever they hold."""
    return html.escape(str(words))


def paragraph(words: str, kind: str = "") -> str:
    """Returns a paragraph of the class `kind`."""
    return f'<p class="{kind}">{text(words)}</p>' if kind else f"<p>{text(words)}</p>"


def lack(why: str) -> str:
    """Returns a line on what there is not."""
    return paragraph(f"{why[:1].upper()}{why[1:]}.", "lack")


def table(
    head: Sequence[str], rows: Iterable[Sequence[Any]], *, words: int, floors: int = 0
) -> str:
    """Returns a table that scrolls where it is too wide; `words` columns of text come first.

    The first `floors` rows are marked as floors.
    """

    def line(cells: Sequence[Any], tag: str) -> str:
        kinds = (' class="word"' if number < words else "" for number in range(len(cells)))
        return "".join(f"<{tag}{k}>{text(c)}</{tag}>" for k, c in zip(kinds, cells))

    marks = (' class="floor"' if number < floors else "" for number in itertools.count())
    body = "\n".join(f"<tr{mark}>{line(row, 'td')}</tr>" for mark, row in zip(marks, rows))
    return (
        f'<div class="scroll"><table>\n<thead><tr>{line(head, "th")}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def figures(drawn: list[str]) -> str:
    """Returns SVG elements beside each other, as many as the page is wide."""
    shown = "\n".join(f"<figure>{svg}</figure>" for svg in drawn)
    return f'<div class="figures">\n{shown}\n</div>'


def story(lines: list[tuple[str, str]], query: str, kind: str = "") -> str:
    """Returns a query with lines on it, each with a name in front; `kind` is "won", "lost" or ""."""
    said = "\n".join(f"<p><span>{text(name)}:</span> {text(words)}</p>" for name, words in lines)
    return f'<div class="story {kind}">\n<p class="query">{text(query)}</p>\n{said}\n</div>'
