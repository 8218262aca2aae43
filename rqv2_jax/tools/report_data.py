"""What a workdir holds for its report, as plain data; what it lacks is told by a line."""

import dataclasses
import functools
import json
import pathlib
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from rqv2_jax import config_check
from rqv2_jax.data import denoise, tokens
from rqv2_jax.errors import DAMAGE, InputError, one_line
from rqv2_jax.recipe import budget, results
from rqv2_jax.recipe.opening import in_training
from rqv2_jax.recipe.run import Run
from rqv2_jax.recipe.texts import texts_of
from rqv2_jax.recipe.workdir import begun, finished
from rqv2_jax.tools import figures, outputs, report_queries
from rqv2_jax.tools.report_queries import Differences, Measured, Side

# Queries won and lost, candidates that denoising has dropped, and characters of a text.
STORIES, REJECTED, CHARACTERS = 20, 10, 400

Curves = dict[str, list[tuple[int, float]]]
T = TypeVar("T")


class Lack(NamedTuple):
    """A line on why a run has no such thing."""

    why: str


class Cut(NamedTuple):
    """What a length leaves of texts: shares of their tokens and of the texts that it cuts."""

    use: str
    setting: str
    length: int
    tokens: float
    texts: float


class Denoised(NamedTuple):
    """What denoising keeps and drops: counts, as text too, and some candidates with their texts."""

    counts: dict[str, Any]
    text: str
    rejected: list[dict[str, Any]]


class Story(NamedTuple):
    """A query that one model answers better than another, in words.

    Ranks are those of the first relevant passage, 0 where none is ranked; `reranked` is the rank after
    re-ranking, None where this query is not re-ranked. `first` is the passage that the worse of the two
    ranks first.
    """

    query: str
    before: int
    after: int
    reranked: int | None
    relevant: str
    first: str


class Stories(NamedTuple):
    """Queries won and lost, the largest differences first, and how many are won, equal and lost."""

    won: list[Story]
    lost: list[Story]
    counts: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Record:
    """What a report shows of one run; `stages` has the state of each training stage in words."""

    workdir: str
    stages: dict[str, str]
    results: dict[str, Any] | Lack
    measured: Measured | Lack
    curves: dict[str, Curves]
    denoised: Denoised | Lack
    cuts: list[Cut] | Lack
    seconds: dict[str, float] | Lack
    environment: dict[str, Any] | Lack


@dataclasses.dataclass(frozen=True)
class Report:
    """One run, or two on the same queries: `differences` is the first less the second, by model."""

    records: list[Record]
    stories: Stories | Lack
    differences: Differences | Lack


def or_lack(read: Callable[[], T]) -> T | Lack:
    """Returns `read()`, or the line of the InputError that it raises."""
    try:
        return read()
    except InputError as e:
        return Lack(" ".join(str(e).split()))


def collect(run: Run, against: Run | None = None) -> Report:
    """Reads the workdir of a run, and that of another to compare it with; computes no scores."""
    runs = [run] if against is None else [run, against]
    stores = [or_lack(functools.partial(_store, each)) for each in runs]
    records = [_record(each, store) for each, store in zip(runs, stores)]
    sides = [(r, s, x.measured) for r, s, x in zip(runs, stores, records)]
    stories = or_lack(lambda: _stories(sides))
    differences: Differences | Lack = Lack("there is one run")
    if against is not None:
        differences = or_lack(lambda: report_queries.differences(*(_have(m) for *_, m in sides)))
    return Report(records, stories, differences)


def _have(found: T | Lack) -> T:
    """Returns what was found; raises InputError with the line of a Lack."""
    if isinstance(found, Lack):
        raise InputError(found.why)
    return found


def _store(run: Run) -> tokens.Store:
    return tokens.open_store(run.workdir / "data" / "tokens")


def _json(path: pathlib.Path, without: str) -> Any:
    """Reads a JSON file; raises InputError, if it is not there with the line `without`."""
    if not path.is_file():
        raise InputError(without)
    try:
        return json.loads(path.read_text())
    except DAMAGE as e:
        raise InputError(f"{path}: cannot be read ({one_line(e)})") from e


def _record(run: Run, store: tokens.Store | Lack) -> Record:
    workdir = run.workdir
    stages = {stage: _state(run, stage) for stage in config_check.STAGES}
    # Joint training comes last.
    not_yet = f"the run has not been evaluated; joint training: {stages['joint']}"
    report = or_lack(lambda: _json(workdir / "results.json", not_yet))
    seconds = budget.took(workdir)
    return Record(
        workdir=str(workdir),
        stages=stages,
        results=report,
        measured=or_lack(lambda: report_queries.measure(run, _have(store), _have(report))),
        curves={stage: figures.curves(workdir / stage) for stage in config_check.STAGES},
        denoised=or_lack(lambda: _denoised(run)),
        cuts=or_lack(lambda: _cuts(run, _have(store))),
        seconds=seconds or Lack("the workdir has no record of seconds, took.json"),
        environment=or_lack(
            lambda: _json(workdir / "environment.json", "the workdir has no environment.json")
        ),
    )


def _state(run: Run, stage: str) -> str:
    if run.config[stage].epochs == 0:
        return "not asked for"
    folder = run.workdir / stage
    return "finished" if finished(folder) else "not finished" if begun(folder) else "not begun"


def _denoised(run: Run) -> Denoised:
    """Returns counts and examples of denoising; scores are read, not computed."""
    if not begun(run.workdir / "joint"):
        raise InputError("joint training has not begun, so no lists have been denoised")
    counts, rejected = outputs.denoise_report(run, "", REJECTED)
    told = [
        {**each, **{name: _short(each[name]) for name in ("query", "labelled", "candidate")}}
        for each in rejected
    ]
    return Denoised(counts, denoise.render(counts), told)


def _cuts(run: Run, store: tokens.Store) -> list[Cut]:
    cuts = []
    inputs = {"search": run.inputs, "training": in_training(run.inputs, run.config.data)}
    for use, read_as in inputs.items():
        for setting, (read_N, whole_N) in results.lengths_by(read_as, store).items():
            share = 1 - float(read_N.sum() / whole_N.sum())
            longer = float((whole_N > read_N).mean())
            cuts.append(Cut(use, setting, getattr(read_as, setting), share, longer))
    return cuts


def _stories(sides: list[tuple[Run, tokens.Store | Lack, Measured | Lack]]) -> Stories:
    """Returns the queries that the first run's retriever wins and loses.

    Against the second run's or, if there is one run, against the model it starts from.
    """
    (run, run_store, measured), (other, other_store, other_measured) = sides[0], sides[-1]
    store = _have(run_store)
    before = Side(_have(other_measured), "zero_shot" if len(sides) == 1 else "joint")
    after = Side(_have(measured), "joint")
    if not (before.measured.found and after.measured.found):
        raise InputError("the test split has no labels, so no passage is known to be relevant")
    won, lost, counts = report_queries.won_and_lost(before, after, STORIES)
    # The label of the highest relevance comes last, and stays.
    labels_3xN = store.splits["test"].qrels_3xN
    query_N, passage_N, _ = labels_3xN[:, labels_3xN[2].argsort(kind="stable")].tolist()
    best = dict(zip(query_N, passage_N))
    relevant = {b: best[int(after.measured.rows_Q[b])] for _, b in (*won, *lost)}
    first_won = {a: int(before.first_Q[a]) for a, _ in won}
    first_lost = {b: int(after.first_Q[b]) for _, b in lost}
    texts = texts_of(run, store.fingerprint)
    asked = [query.text for query in texts.queries("test")]
    after_texts = texts.shown({*relevant.values(), *first_lost.values()} - {-1})
    before_texts = texts_of(other, _have(other_store).fingerprint).shown(
        {*first_won.values()} - {-1}
    )

    def story(a: int, b: int, first: str) -> Story:
        reranked = int(after.measured.found["joint", "reranker"].rank_Q[b])
        return Story(
            query=_short(asked[after.measured.rows_Q[b]]),
            before=int(before.rank_Q[a]),
            after=int(after.rank_Q[b]),
            reranked=None if reranked < 0 else reranked,
            relevant=_short(after_texts[relevant[b]]),
            first=_short(first),
        )

    return Stories(
        [story(a, b, before_texts.get(first_won[a], "")) for a, b in won],
        [story(a, b, after_texts.get(first_lost[b], "")) for a, b in lost],
        counts,
    )


def _short(text: str) -> str:
    return textwrap.shorten(text, CHARACTERS, placeholder=" ...")
