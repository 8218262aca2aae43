"""How commands start and fail."""

import os
import subprocess
import sys

import pytest
from tiny_run import ROOT, run_program

from rqv2_jax import program

FAILURES = """
import os, signal, threading, time
from rqv2_jax import program

def by_the_system():
    with open("/dev/full", "w") as file:
        file.write("x")

def by_orbax():
    threading.Thread(target=time.sleep, args=(60,)).start()
    raise ValueError("RESOURCE_EXHAUSTED: writing to file 20:\\nNo space left on device [code='28']")

def otherwise():
    raise ValueError("a defect")

def at_a_signal(name):
    os.kill(os.getpid(), getattr(signal, name))
    time.sleep(60)

def terminated():
    at_a_signal("SIGTERM")

def interrupted():
    at_a_signal("SIGINT")

program.run({}, "")
"""


def run_failure(name):
    command = [sys.executable, "-c", FAILURES.format(name)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("where", ["by_the_system", "by_orbax"])
def test_a_full_disk_ends_in_one_line_at_once(where):
    ended = run_failure(where)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: the disk is full (")
    assert ended.stderr.count("\n") == 1
    assert "No space left on device" in ended.stderr
    assert "same command again" in ended.stderr


def test_a_defect_keeps_its_traceback():
    ended = run_failure("otherwise")
    assert ended.returncode == 1
    assert ended.stderr.startswith("Traceback")
    assert ended.stderr.endswith("ValueError: a defect\n")


@pytest.mark.parametrize(("name", "status"), [("terminated", 75), ("interrupted", 130)])
def test_a_signal_ends_in_one_line_that_says_what_to_do(name, status):
    ended = run_failure(name)
    assert ended.returncode == status
    assert ended.stderr == f"\n{name}; the same command resumes\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.joint.epoch=3"], "no such setting: 'epoch'"),
        (["--config.joint.epochs=many"], "could not convert string to float: 'many'"),
        (["--config.seed=-1"], "config.seed is -1"),
        (["surplus"], "unexpected argument 'surplus'"),
        (["--confg=x"], "Unknown command line flag 'confg'"),
        (["--config.data.path=/nowhere"], "/nowhere: no such folder"),
    ],
)
def test_wrong_command_lines_end_in_one_line_and_a_failure(tmp_path, arguments, message):
    base = ["--config=configs/beir.py", f"--workdir={tmp_path / 'w'}", "--config.data.path=x"]
    ended = run_program("rqv2_jax.main", *base, *arguments)
    assert ended.returncode in (1, 2)
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in ended.stderr


def test_a_flag_file_changes_the_config(tmp_path):
    file = tmp_path / "machine.flags"
    file.write_text("--config.mesh.data=2\n--config.seed=-2\n")
    base = ["--config=configs/beir.py", f"--workdir={tmp_path / 'w'}", "--config.data.path=x"]
    ended = run_program("rqv2_jax.main", *base, f"--flagfile={file}")
    assert ended.returncode == 1
    assert "error: config.seed is -2; it must lie in" in ended.stderr
    ended = run_program("rqv2_jax.main", *base, "--flagfile=/nowhere")
    assert ended.returncode == 2
    assert "error: ERROR:: Unable to open flagfile" in ended.stderr


def test_help_shows_an_example():
    ended = run_program("rqv2_jax.main", "--help")
    assert ended.returncode == 0
    assert "python -m rqv2_jax.main --config" in ended.stdout


@pytest.mark.parametrize(
    ("linux", "before", "after"),
    [
        ("always [madvise] never", None, "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.a=2", "glibc.a=2:glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", None),
        ("[always] madvise never", None, None),
        ("always madvise [never]", None, None),
        (None, None, None),
    ],
)
def test_a_command_starts_anew_with_large_pages_where_it_has_to_ask(
    tmp_path, monkeypatch, linux, before, after
):
    if linux:
        (tmp_path / "enabled").write_text(f"{linux}\n")
    monkeypatch.setattr(program, "LARGE_PAGES", tmp_path / "enabled")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if before:
        monkeypatch.setenv("GLIBC_TUNABLES", before)
    started = []
    monkeypatch.setattr(os, "execve", lambda *given: started.append(given))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "rqv2_jax.main", "--help"])
    monkeypatch.setattr(sys, "argv", ["main.py", "--help"])
    program.run(lambda: None, "")
    if after is None:
        assert not started
        return
    ((name, arguments, environment),) = started
    assert name == sys.executable
    assert arguments == [sys.executable, "-m", "rqv2_jax.main", "--help"]
    assert environment["GLIBC_TUNABLES"] == after
    assert environment["PATH"] == os.environ["PATH"]


def test_the_process_that_starts_anew_keeps_its_number_and_its_arguments():
    said = "print(os.getpid(), os.environ.get('GLIBC_TUNABLES'), x)"
    code = (
        f"import os; from rqv2_jax import program; program.run(lambda x: {said}, '', arguments=1)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", code, "a b"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, text=True, env=environment) as started:
        out = started.communicate()[0]
    asks = program.LARGE_PAGES.exists() and "[madvise]" in program.LARGE_PAGES.read_text()
    assert out == f"{started.pid} {'glibc.malloc.hugetlb=1' if asks else None} a b\n"
