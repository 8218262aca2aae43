"""Runs every command in a fenced block of README.md and docs/, as typed, from the repository's root.

  python .ci/documented.py [--ran COMMAND ...] [--minutes N] [FILE ...]

A fence without a language, or with sh or bash, holds commands, one a line (a backslash continues it); a
fence of python is a script, or examples with >>>, which doctest runs; one of text holds no command, one
of mermaid is a drawing.
A comment on the line above a fence changes how its commands are run, or says why they cannot be:

  <!-- run: NAME=value; flags=--steps=1; again=60 -->
  <!-- no-run: needs a TPU -->

NAME=value sets a variable; flags are appended to the commands of this repository, to make them small;
again runs each command a second time, which must end within so many seconds. Of commands that cannot
be run the shell's syntax, names of programs and files, and flags are checked. Prints a table of all
commands, and exits 1 if one failed, was not run without a reason, or is wrong.
"""

import argparse
import itertools
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

FENCE = re.compile(r"\s*(`{3,}|~{3,})\s*([^\s`]*)[^`]*$")
COMMENT = re.compile(r"\s*<!--\s*(run|no-run):\s*(.*?)\s*-->\s*$")
VARIABLES = r"(\w+=\S* +)*"
# What takes the flags of a fence, and what may not stand in a fence of text.
OURS = re.compile(rf"{VARIABLES}(python -m rqv2_jax\.|launch/\w+\.sh)")
COMMAND = re.compile(rf"\s*(\$ |{VARIABLES}(python3? -|pip install|bash |source |launch/\w+\.sh))")
# As in a virtual environment that is active: its programs come first.
PATH = os.pathsep.join(
    [f"{pathlib.Path(os.environ.get('VENV', '.venv')).absolute()}/bin", os.environ["PATH"]]
)
# Starts a program of the package as usual, but for its work.
PARSE = """
import runpy, sys
from rqv2_jax import program
sys.argv, run = sys.argv[1:], program.run
program.run = lambda main, doc, **checks: run(lambda *_: None, doc, **checks)
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


class Fence(NamedTuple):
    """A fenced block; `rule` is "run", "no-run" or empty, `said` what the comment says after it."""

    place: str
    language: str
    text: str
    rule: str = ""
    said: str = ""


class Row(NamedTuple):
    """What became of a command, and whether that fails the whole."""

    place: str
    command: str
    outcome: str
    wrong: bool = True
    seconds: float = 0.0


def fences(path: pathlib.Path) -> Iterator[Fence]:
    """Gives the fenced blocks of a Markdown file; one that is never closed reaches to the end."""
    lines = iter(enumerate(path.read_text().splitlines(), start=1))
    before = ""
    for number, line in lines:
        opened = FENCE.match(line)
        if opened:
            closing = re.compile(rf"\s*{opened[1]}{opened[1][0]}*\s*$")
            body = []
            for _, other in lines:
                if closing.match(other):
                    break
                body.append(other)
            comment = COMMENT.match(before)
            said = comment.groups() if comment else ()
            yield Fence(f"{path}:{number}", opened[2], "\n".join(body), *said)
        elif "```" in line or "~~~" in line:
            yield Fence(f"{path}:{number}", "fence that does not start its line", "")
        before = line


def commands(text: str) -> list[str]:
    """Returns the commands of a fence without remarks, one for each line that holds one."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [re.sub(r"\s+#\s.*$", "", x).strip() for x in lines if shlex.split(x, comments=True)]


def fault(command: str) -> str:
    """Returns what is found wrong with a command that cannot be run here, or nothing."""
    words = shlex.split(command)
    names = [word.split("=")[0] for word in itertools.takewhile(re.compile(r"\w+=").match, words)]
    program, *rest = words[len(names) :]
    files = [file for flag, file in itertools.pairwise(rest) if flag == "-r"]
    ours = program.startswith("launch/")
    missing = [f for f in files + [program] * ours if not pathlib.Path(f).is_file()]
    if missing:
        return f"there is no file {missing[0]}"
    if ours:
        script = pathlib.Path(program).read_text()
        unknown = [name for name in names if not re.search(rf"\b{name}\b", script)]
        return f"{program} knows no variable {unknown[0]}" if unknown else ""
    if program == "python" and rest[0] == "-m" and rest[1].startswith("rqv2_jax."):
        # The flag file may be one that another command would have written.
        rest = [word for word in rest[1:] if not word.startswith("--flagfile")]
        done = subprocess.run([sys.executable, "-c", PARSE, *rest], capture_output=True, text=True)
        return (done.stderr.strip() or "fails").splitlines()[-1] if done.returncode else ""
    return "" if shutil.which(program, path=PATH) else f"there is no program {program}"


def checked(fence: Fence) -> Iterator[Row]:
    """Gives what can be said of the commands of a fence that are not run."""
    if not fence.said:
        yield Row(fence.place, "", "no-run gives no reason")
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
    for checker in (["bash", "-n"], [str(shellcheck), "--shell=bash", "-"]):
        done = subprocess.run(checker, input=f"{fence.text}\n", capture_output=True, text=True)
        if done.returncode:
            print(done.stdout + done.stderr, flush=True)
            yield Row(fence.place, "", f"{checker[0]} finds fault, see above")
            return
    for command in commands(fence.text):
        wrong = fault(command)
        yield Row(fence.place, command, wrong or f"not run: {fence.said}", bool(wrong))


def execute(arguments: list[str], variables: dict[str, str], seconds: float) -> str:
    """Runs a program, its output into ours; returns what went wrong, or nothing."""
    process = subprocess.Popen(
        arguments,
        env={**os.environ, "PATH": PATH, **variables},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        code = process.wait(timeout=seconds)
        return f"FAILED, exit status {code}" if code else ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"FAILED, stopped after {seconds:.0f} s"


def run(fence: Fence, ran: list[str], until: float) -> Iterator[Row]:
    """Runs the commands of a fence, giving what became of each; those of `ran` have been run before."""
    parts = (part.strip() for part in fence.said.split(";"))
    variables = dict(part.split("=", 1) for part in parts if part)
    flags, again = variables.pop("flags", ""), variables.pop("again", None)
    if fence.language == "python":
        todo = [("the script", ["python", "-c", fence.text])]
    else:
        lines = [
            c if c in ran or not OURS.match(c) else f"{c} {flags}" for c in commands(fence.text)
        ]
        todo = [(line.strip(), ["bash", "-euo", "pipefail", "-c", line]) for line in lines]
    for line, arguments in todo:
        if line in ran:
            yield Row(fence.place, line, "ran before", wrong=False)
            continue
        for limit in [math.inf] if again is None else [math.inf, float(again)]:
            left = min(until - time.monotonic(), limit)
            if left <= 0:
                yield Row(fence.place, line, "NOT RUN, for want of time")
                break
            print(f"\n== {fence.place}: {line}", flush=True)
            started = time.monotonic()
            wrong = execute(arguments, variables, left)
            outcome = wrong or ("ran" if limit == math.inf else "ran again")
            yield Row(fence.place, line, outcome, bool(wrong), time.monotonic() - started)


def every(path: pathlib.Path, ran: list[str], until: float) -> Iterator[Row]:
    """Gives a row for every command of a file; all examples with >>> are one command."""
    doctested = False
    for fence in fences(path):
        examples = fence.language == "python" and fence.text.lstrip().startswith(">>>")
        if examples and not doctested:
            fence = fence._replace(
                language="sh", text=f"python -m doctest {shlex.quote(str(path))}"
            )
        if examples and doctested:
            continue
        doctested |= examples
        if fence.language == "text":
            hidden = [line.strip() for line in fence.text.splitlines() if COMMAND.match(line)]
            yield from (Row(fence.place, x, "NOT RUN, in a fence of text") for x in hidden)
        elif fence.language == "mermaid":
            continue
        elif fence.language not in ("", "sh", "bash", "python"):
            yield Row(fence.place, "", f"NOT RUN, {fence.language}: use text, sh or python")
        else:
            yield from checked(fence) if fence.rule == "no-run" else run(fence, ran, until)


def table(rows: list[Row]) -> str:
    """Returns the rows as text, the wrong ones last."""
    lines = ["", "seconds  place, command, outcome"]
    for row in sorted(rows, key=lambda row: row.wrong):
        lines.append(f"{row.seconds:7.0f}  {row.place}  {row.command or '(fence)'}")
        lines.append(f"{'':9}{row.outcome}")
    wrong = sum(row.wrong for row in rows)
    ran = sum(row.outcome.startswith("ran") for row in rows)
    lines.append(f"{ran} ran, {len(rows) - ran - wrong} not run for a reason, {wrong} wrong")
    return "\n".join(lines)


def main() -> int:
    """Runs the commands of the files, or of README.md and docs/, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ran", action="append", default=[], help="a command that has been run")
    parser.add_argument("--minutes", type=float, default=60, help="for all commands together")
    parser.add_argument("files", nargs="*", type=pathlib.Path)
    given = parser.parse_args()
    until = time.monotonic() + 60 * given.minutes
    files = given.files or [pathlib.Path("README.md"), *sorted(pathlib.Path("docs").glob("*.md"))]
    rows = [row for path in files for row in every(path, given.ran, until)]
    print(table(rows), flush=True)
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
