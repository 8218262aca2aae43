"""The program that runs what README.md and docs/ show."""

import importlib.util
import itertools
import os
import pathlib
import shlex
import subprocess
import sys

import pytest

from rqv2_jax.data.readers import beir

ROOT = pathlib.Path(__file__).parent.parent
PROGRAM = ROOT / ".ci" / "documented.py"


def load():
    spec = importlib.util.spec_from_file_location("documented", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def document(tmp_path):
    """`document(text, *flags) -> (exit status, output)` of the program on such a README.md."""

    def run(text, *flags):
        (tmp_path / "README.md").write_text(text)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "VENV": str(tmp_path / "venv")}
        done = subprocess.run(
            [sys.executable, PROGRAM, *flags],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def test_commands_run_as_typed_in_the_order_of_the_document(document, tmp_path):
    status, output = document(
        "```\necho one >>log    # a remark\nA=two; echo $A \\\n   three >>log\n```\n"
        "text\n~~~sh\n\n# only a remark\necho four >>log\n~~~\n"
    )
    assert status == 0, output
    assert (tmp_path / "log").read_text() == "one\ntwo three\nfour\n"
    assert "3 ran, 0 not run for a reason, 0 wrong" in output


def test_a_command_that_fails_is_reported_and_the_rest_still_runs(document, tmp_path):
    status, output = document("```\nsh -c 'exit 3'\nfalse | true\n```\n```\ntouch after\n```\n")
    assert status == 1
    assert "sh -c 'exit 3'\n         FAILED, exit status 3" in output
    assert "false | true\n         FAILED, exit status 1" in output
    assert (tmp_path / "after").exists()
    assert "1 ran, 0 not run for a reason, 2 wrong" in output


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("```yaml\nlaunch: it\n```\n", "NOT RUN, yaml"),
        ("```text\nA=1 python -m rqv2_jax.main\n```\n", "NOT RUN, in a fence of text"),
        ("- ```\n  true\n  ```\n", "NOT RUN, fence that does not start its line"),
        ("<!-- no-run: -->\n```\ntrue\n```\n", "no-run gives no reason"),
    ],
)
def test_an_unmarked_command_that_is_not_run_fails(document, text, reason):
    status, output = document(text)
    assert status == 1
    assert reason in output


def test_a_drawing_holds_no_command(document):
    status, output = document("```mermaid\nflowchart TD\n  a --> b\n```\n```\ntrue\n```\n")
    assert status == 0, output
    assert "1 ran, 0 not run for a reason, 0 wrong" in output


def test_commands_left_when_time_is_up_fail(document):
    status, output = document("```\ntrue\n```\n", "--minutes=0")
    assert status == 1
    assert "NOT RUN, for want of time" in output


def test_a_command_is_stopped_with_what_it_started_when_time_is_up(document, tmp_path):
    status, output = document("```\nsh -c 'sleep 3; touch late' | cat\n```\n", "--minutes=0.01")
    assert status == 1
    assert "FAILED, stopped after 1 s" in output
    assert not (tmp_path / "late").exists()


def test_again_runs_a_command_twice_and_limits_the_second_time(document, tmp_path):
    text = (
        "<!-- run: again=1 -->\n```\nif [ -e log ]; then sleep {}; else echo once >log; fi\n```\n"
    )
    status, output = document(text.format(0))
    assert status == 0
    assert "2 ran" in output
    (tmp_path / "log").unlink()
    status, output = document(text.format(5))
    assert status == 1
    assert "FAILED, stopped after 1 s" in output


def test_variables_and_flags_of_a_comment_reach_only_what_takes_them(document, tmp_path):
    script = tmp_path / "launch" / "it.sh"
    script.parent.mkdir()
    script.write_text('echo "$SIZE $*" >>log\n')
    script.chmod(0o755)
    status, output = document(
        "<!-- run: SIZE=small; flags=--a=1 --b='2 3' -->\n"
        "```\nlaunch/it.sh here   # a remark\necho other >>log\n```\n"
    )
    assert status == 0, output
    assert (tmp_path / "log").read_text() == "small here --a=1 --b=2 3\nother\n"


def test_what_ran_before_is_not_run_again(document, tmp_path):
    status, output = document("```\ntouch it   # a remark\n```\n", "--ran", "touch it")
    assert status == 0
    assert not (tmp_path / "it").exists()
    assert "ran before" in output


def test_python_runs_as_a_script_and_examples_run_by_doctest(document, monkeypatch):
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable), prepend=os.pathsep)
    assert document("```python\nassert 1 + 1 == 2\n```\n")[0] == 0
    assert document("```python\nassert 1 + 1 == 3\n```\n")[0] == 1
    examples = "```python\n>>> a = 1\n\n```\ntext\n```python\n>>> a\n{}\n\n```\n"
    status, output = document(examples.format(1))
    assert status == 0
    assert "1 ran, 0 not run for a reason, 0 wrong" in output
    assert document(examples.format(2))[0] == 1


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("python -m rqv2_jax.search --workdir w --indeks scann 'a question'", "indeks"),
        ("python -m rqv2_jax.search --workdir w --index scan 'a question'", "--index"),
        ("python -m rqv2_jax.search --workdir w 'a question' another", "'another'"),
        ("python -m rqv2_jax.serach --workdir w 'a question'", "serach"),
        ("python -m rqv2_jax.main --workdir w", "--config is missing"),
        ("python -m rqv2_jax.main --config {}/configs/nq.py --workdir w --config.joint.lr=1", "lr"),
        ("pip install -r requirements-tpus.txt", "no file requirements-tpus.txt"),
        ("launch/pods.sh", "no file launch/pods.sh"),
        ("gcloudy ssh", "no program gcloudy"),
        ("if true; then", "bash finds fault"),
        ("cat $UNQUOTED", "shellcheck"),
    ],
)
def test_what_is_wrong_in_a_command_that_is_not_run_is_found(document, command, reason):
    text = f"<!-- no-run: needs a pod -->\n```\n{command.format(ROOT)}\n```\n"
    status, output = document(text)
    assert status == 1, output
    assert reason in output
    assert "0 not run for a reason, 1 wrong" in output


def test_a_variable_that_a_script_does_not_know_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    fault = load().fault
    assert fault("TPU=a ZONE=b launch/pod.sh --config.seed=1") == ""
    assert "knows no variable ZONES" in fault("TPU=a ZONES=b launch/pod.sh")


def test_commands_of_our_documents_that_are_not_run_are_right(monkeypatch):
    monkeypatch.chdir(ROOT)
    module = load()
    paths = [pathlib.Path("README.md"), *sorted(pathlib.Path("docs").glob("*.md"))]
    fences = [fence for path in paths for fence in module.fences(path)]
    rows = [r for f in fences if f.rule == "no-run" for r in module.checked(f)]
    assert rows
    assert not [row for row in rows if row.wrong]


def test_the_tutorials_first_command_makes_a_folder_of_the_sample(tmp_path, monkeypatch):
    """Of questions.csv as .ci/samples.py writes it; what the tutorial shows is what is printed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    subprocess.run([sys.executable, ROOT / ".ci" / "samples.py"], check=True)
    tutorial = load().fences(ROOT / "docs" / "tutorial.md")
    command, shown = itertools.islice((fence.text for fence in tutorial), 2)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert shown.strip() == done.stdout.partition("\n\nwhat to run next:")[0].strip()
    texts = beir.beir(tmp_path / "questions", train_qrels="qrels", eval_qrels="qrels")
    assert set(texts.splits) == {"train", "dev", "test"}
