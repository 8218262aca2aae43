"""Two processes with two devices each do what one with four does."""

import concurrent.futures
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import WORDS
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util import tensor_util
from tiny_run import ROOT, _leaves, last_joint_params, run_program, tiny_config, write_beir

from rqv2_jax import config as config_lib
from rqv2_jax import hosts, stopping
from rqv2_jax.data import tokens
from rqv2_jax.recipe import pipeline
from rqv2_jax.recipe.claim import open_workdir
from rqv2_jax.recipe.run import open_run
from rqv2_jax.retrieval import encode

PROCESSES, DEVICES = 2, 2


def start(*arguments, **settings):
    """The processes of a run with these arguments of Python's."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    # A process that a busy machine lets wait is not lost.
    timeouts = ("collective_timeout", "collective_call_terminate_timeout")
    flags = (
        *(
            f"--xla_force_host_platform_device_count={DEVICES}",
            "--xla_backend_optimization_level=0",
        ),
        *(f"--xla_cpu_{name}_seconds=600" for name in timeouts),
    )
    shared = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": " ".join(flags),
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(PROCESSES),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-u", *arguments],
            cwd=ROOT,
            env={**shared, "JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **settings,
        )
        for number in range(PROCESSES)
    ]


def run(processes):
    """(exit code, standard output, standard error) of each process."""
    try:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            ended = list(pool.map(lambda process: process.communicate(timeout=600), processes))
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *said) for process, said in zip(processes, ended)]


def finish(processes):
    """(standard output, standard error) of each process, all of which must end well."""
    ended = run(processes)
    for code, _, errors in ended:
        assert code == 0, errors[-3000:]
    return [said for _, *said in ended]


ROOMS = """
import json, pathlib, sys
from rqv2_jax import hosts

hosts.start()
import jax, numpy as np
from jax.sharding import PartitionSpec
from rqv2_jax import artifacts
from rqv2_jax.errors import InputError
from rqv2_jax.training import sharding

folder, me = pathlib.Path(sys.argv[1]), jax.process_index()
said = {"first": hosts.first()}


def error(call):
    try:
        call()
    except Exception as e:
        return f"{type(e).__name__}: {e}"


said["from first"] = [hosts.from_first(lambda: x) for x in ([me, "a"], 0.1 + me, None)]
said["failed"] = error(lambda: hosts.from_first(lambda: 1 / me))
said["same"] = error(lambda: hosts.check_same("lists", np.arange(3), np.ones(2)))
said["differ"] = error(lambda: hosts.check_same("lists", np.arange(3), np.full(2, me)))
said["spans"] = [list(hosts.span(total)) for total in (0, 1, 2, 5)]
said["gathered"] = [each.tolist() for each in hosts.gather(np.full(2, me))]

path, calls = folder / "a.npz", []


def compute():
    calls.append(me)
    return {"x": np.array([me + 7])} if hosts.first() else {}


said["cached"] = [artifacts.cached(path, s, compute)["x"].tolist() for s in ("b", "b", "c")]
said["calls"] = len(calls)
artifacts.write_text(folder / "text", f"of {me}")

devices = jax.devices()
mixed = sharding.over([devices[i] for i in (0, 2, 1, 3)], 2, 2)
assert [d.process_index for d in mixed.mesh.devices.reshape(-1)] == [0, 1, 0, 1]
own = said["own"] = mixed.own_parts(8)
whole = np.arange(8 * 3 * 2, dtype=np.float32).reshape(8, 3, 2)
batch = mixed.put_batch({"x": whole[own]})["x"]
said["lie"] = all(np.array_equal(x.data, whole[x.index]) for x in batch.addressable_shards)
params = {"w": np.arange(24, dtype=np.float32).reshape(2, 12), "odd": np.float32(3)}
put = mixed.put_params(mixed.put_params(params))
said["whole"] = all(
    isinstance(hosts.whole(tree)[name], np.ndarray) and np.array_equal(hosts.whole(tree)[name], each)
    for tree in (params, put)
    for name, each in params.items()
)
said["spec"] = put["w"].sharding.spec == PartitionSpec(None, "fsdp")
own = mixed.own_parts(4)
scores = mixed.per_shard(lambda p, rows: rows @ p["w"] + p["odd"])(
    put, mixed.put_batch(whole[:4][own])
)
expected = whole[:4].reshape(12, 2) @ params["w"] + 3
said["scores"] = float(np.abs(np.asarray(scores) - expected).max())
said["mesh"] = error(lambda: sharding.make(2, 1))
print("printed")
(folder / f"{me}.json").write_text(json.dumps(said))
"""


def test_rooms_of_two_processes(tmp_path):
    ended = finish(start("-c", ROOMS, str(tmp_path)))
    first, other = (json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2))
    assert (first.pop("first"), other.pop("first")) == (True, False)
    # Gloo, not ours to silence, tells of its connections.
    assert ["printed" in out for out, _ in ended] == [True, False]
    assert first.pop("failed") == "ZeroDivisionError: division by zero"
    assert other.pop("failed").startswith("InputError: the first process has failed")
    assert first.pop("differ") is None
    assert other.pop("differ").startswith("InputError: lists of this process differ")
    assert (first.pop("spans"), other.pop("spans")) == (
        [[], [], [0], [0, 1]],
        [[], [0], [1], [2, 3, 4]],
    )
    assert (first.pop("own"), other.pop("own")) == ([0, 1, 4, 5], [2, 3, 6, 7])
    for said in (first, other):
        assert said.pop("from first") == [[0, "a"], 0.1, None]
        assert said.pop("same") is None
        assert said.pop("gathered") == [[0, 0], [1, 1]]
        assert said.pop("whole")
        # All get what the first has made, and nobody makes what is there.
        assert (said.pop("cached"), said.pop("calls")) == ([[7], [7], [7]], 2)
        assert said.pop("lie")
        assert said.pop("spec")
        assert said.pop("scores") == pytest.approx(0, abs=1e-4)
        assert "2 processes have 4, which must all be used" in said.pop("mesh")
        assert not said
    assert (tmp_path / "text").read_text() == "of 0"


@pytest.mark.slow
def test_what_the_first_cannot_do_ends_all(tmp_path):
    config = ("--config=configs/beir.py", "--config.data.path=/nowhere", "--config.mesh.data=4")
    ended = run(
        start("-m", "rqv2_jax.main", "--distributed", *config, f"--workdir={tmp_path / 'w'}")
    )
    for (code, _, errors), message in zip(ended, ("/nowhere: no such folder", "the first process")):
        (line,) = (line for line in errors.splitlines() if line.startswith("error: "))
        assert (code, message in line) == (1, True), line
    assert (tmp_path / "w" / "config.json").is_file()


FAILING = """
import sys, time
from rqv2_jax import hosts, program
from rqv2_jax.errors import InputError


def main():
    with hosts.joined(True):
        import jax, numpy as np

        hosts.gather(np.zeros(2))
        print("waits", file=sys.stderr)
        if jax.process_index() == int(sys.argv[1]):
            time.sleep(1)
            raise {"own": InputError("it is odd"), "other": ZeroDivisionError()}[sys.argv[2]]
        {"barrier": hosts.barrier, "collective": lambda: hosts.gather(np.zeros(2))}[sys.argv[3]]()


try:
    main()
except InputError as e:
    program._fail(e, 1)
"""


@pytest.mark.parametrize(
    ("number", "error", "waiting"),
    [
        (1, "own", "collective"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((0, "own", "barrier"), (0, "other", "collective"), (1, "other", "barrier"))
        ),
    ],
)
def test_where_one_fails_all_end_within_seconds(number, error, waiting):
    processes = start("-c", FAILING, str(number), error, waiting)
    for process in processes:
        for line in process.stderr:
            if line == "waits\n":
                break
    began = time.monotonic()
    ended = run(processes)
    # Three seconds of it are the process's that lets the others end first.
    assert time.monotonic() - began < 20
    assert [code for code, *_ in ended] == [1, 1]
    own = {"own": "error: it is odd\n", "other": "ZeroDivisionError\n"}[error]
    assert own in ended[number][2]
    who = ["the first process", "process 1"][number]
    said = {"own": "it is odd", "other": "ZeroDivisionError"}[error]
    assert f"error: {who} has failed: {said}\n" in ended[1 - number][2]


OWN_PARTS = """
import json, pathlib, sys
from rqv2_jax import hosts

hosts.start()
import jax, numpy as np
from rqv2_jax import artifacts, config
from rqv2_jax.data import tokens
from rqv2_jax.models.scoring import tower
from rqv2_jax.recipe.run import open_run
from rqv2_jax.retrieval import encode, index

encode.PASSAGES_PER_SHARD, index.PASSAGES_PER_TILE = 10, 4
folder = pathlib.Path(sys.argv[1])
written, read, replace = [], [], artifacts.replace


def watched(path, save):
    written.append(path.name)
    replace(path, save)


class Shard:
    def __init__(self, number, vectors):
        self.number, self.vectors = number, vectors

    def __len__(self):
        return len(self.vectors)

    def __getitem__(self, rows):
        read.extend(range(10 * self.number, 10 * self.number + len(self))[rows])
        return self.vectors[rows]


artifacts.replace = watched
run = open_run(config.loads((folder / "config.json").read_text()), folder / "w", quiet=True)
assert run.sharding.mesh.shape["fsdp"] == 4
texts = run.tokenizer.texts(json.loads((folder / "texts.json").read_text()))
ids = [str(number) for number in range(len(texts))]
store = tokens.Store(run.tokenizer.texts([""] * len(texts)), texts, ids, {}, "")
towers = run.initial("retriever")
encoded = run.forward, tower(towers, "passage"), store, folder / "v", "a", "float16"
shards = encode.corpus(*encoded)
queries = encode.queries(run.forward, tower(towers, "query"), texts, np.arange(8))
said = {"first": written[:]}
rows, scores = index.exact(queries, [Shard(*each) for each in enumerate(shards)], 7)
said["read"] = read
hosts.from_first(lambda: [(folder / "v" / f"0000{n}.npy").unlink() for n in (1, 2, 4)] and 0)
written.clear()
encode.corpus(*encoded)
said["again"] = written
for count, depth in ((10, 6), (1, 3)):
    ones = np.ones((count, 2), np.float32)
    said[f"ties of {count}"] = index.exact(ones[:1], [ones], depth)[0].tolist()
me = jax.process_index()
(folder / f"{me}.json").write_text(json.dumps(said))
np.savez(folder / f"{me}.npz", rows=rows, scores=scores, queries=queries)
"""


def test_each_process_encodes_writes_and_searches_its_own_part(bert_folder, tmp_path):
    config = tiny_config("not read", bert_folder)
    run = open_run(config_lib.loads(config_lib.dumps(config)), tmp_path / "alone", quiet=True)
    config.mesh.fsdp = PROCESSES * DEVICES
    (tmp_path / "config.json").write_text(config_lib.dumps(config))
    rng = np.random.default_rng(0)
    strings = [" ".join(rng.choice(WORDS, 12)) for _ in range(48)]
    (tmp_path / "texts.json").write_text(json.dumps(strings))
    finish(start("-c", OWN_PARTS, str(tmp_path)))
    first, other = (json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2))
    names = [f"0000{n}.npy" for n in range(5)]
    assert (first["first"], other["first"]) == (names[:2], names[2:])
    assert (first["again"], other["again"]) == (names[1:2], [names[2], names[4]])
    assert first["read"] + other["read"] == list(range(48))
    assert 20 <= len(first["read"]) <= 28
    shards = [np.load(path) for path in sorted((tmp_path / "v").glob("*.npy"))]
    vectors = np.concatenate(shards, dtype=np.float32)
    texts, untitled = run.tokenizer.texts(strings), run.tokenizer.texts([""] * 48)
    store = tokens.Store(untitled, texts, [str(number) for number in range(48)], {}, "")
    passage = run.initial("retriever")["passage"]
    alone = encode.passages(run.forward, passage, store, np.arange(48))
    np.testing.assert_allclose(vectors, alone, rtol=2e-3, atol=2e-3)
    for number, said in enumerate((first, other)):
        with np.load(tmp_path / f"{number}.npz") as found:
            expected = found["queries"] @ vectors.T
            np.testing.assert_array_equal(found["rows"], np.argsort(-expected, axis=1)[:, :7])
            best = np.take_along_axis(expected, found["rows"], axis=1)
            np.testing.assert_allclose(found["scores"], best, rtol=1e-5, atol=1e-5)
        # As one process has them.
        assert (said["ties of 10"], said["ties of 1"]) == ([[0, 1, 2, 3, 4, 5]], [[0]])


def test_without_others_there_is_one_share_and_nobody_to_ask():
    assert (hosts.count(), list(hosts.span(3))) == (1, [0, 1, 2])
    own = np.arange(2)
    assert hosts.gather(own)[0] is own
    np.testing.assert_array_equal(hosts.whole({"w": jax.numpy.arange(2)})["w"], own)
    asked = object()
    assert hosts.from_first(lambda: asked) is asked
    hosts.check_same("lists", np.arange(3))


def test_distributed_alone_says_what_it_misses(tmp_path):
    arguments = ["--config=configs/beir.py", f"--workdir={tmp_path / 'w'}", "--distributed"]
    ended = run_program("rqv2_jax.main", *arguments, "--config.data.path=x")
    assert ended.returncode == 1
    (line,) = (x for x in ended.stderr.splitlines() if x.startswith("error: "))
    assert "set JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID" in line


@pytest.fixture(scope="module")
def alone(tmp_path_factory, bert_folder):
    """A config for four devices, its file, and the workdir of a run in one process."""
    folder = tmp_path_factory.mktemp("hosts")
    config = tiny_config(write_beir(folder / "data"), bert_folder)
    # Params lie in pieces on the devices of both processes.
    config.mesh.fsdp = PROCESSES * DEVICES
    file = folder / "config.py"
    file.write_text(
        "from rqv2_jax import config\n"
        f"def get_config():\n    return config.loads({config_lib.dumps(config)!r})\n"
    )
    pipeline.main(config, folder / "alone")
    return file, folder / "alone"


def command(file, workdir):
    return ("-m", "rqv2_jax.main", "--distributed", f"--config={file}", f"--workdir={workdir}")


def joint(workdir):
    """All params after the last joint step, end to end."""
    leaves = _leaves(last_joint_params(open_workdir(workdir)))
    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in leaves])


def scalars(folder):
    """What training logged but its speed, by name and step; only one process may have."""
    (file,) = folder.glob("events.out.tfevents.*")
    return {
        (value.tag, event.step): float(tensor_util.make_ndarray(value.tensor))
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
        if value.tag != "lists_per_second"
    }


@pytest.fixture(scope="module")
def together(alone):
    """The workdir of the same run in two processes."""
    file, folder = alone
    workdir = folder.parent / "together"
    (said, bars), (silent, errors) = finish(start(*command(file, workdir)))
    for line in ("prepare: ", "  joint 6/6", "results: "):
        assert (line in said, line in silent) == (True, False)
    assert ("step" in bars, "step" in errors) == (True, False)
    return workdir


@pytest.mark.slow
def test_two_processes_end_where_one_does(alone, together):
    _, one = alone
    for name in ("train.retrieved", "dev.retrieved"):
        with np.load(one / f"lists/{name}.npz") as a, np.load(together / f"lists/{name}.npz") as b:
            np.testing.assert_array_equal(a["passages"], b["passages"])
            np.testing.assert_allclose(a["scores"], b["scores"], atol=0.05)
    runs = [open_workdir(workdir) for workdir in (one, together)]
    for each in runs:
        pipeline.export_lists(each, each.workdir.with_suffix(".tsv"))
    assert one.with_suffix(".tsv").read_text() == together.with_suffix(".tsv").read_text()
    for stage in ("retriever", "reranker", "joint"):
        steps = [[p.name for p in (w / stage / "last").iterdir()] for w in (one, together)]
        assert steps == [["6"], ["6"]]
        expected, logged = (scalars(w / stage) for w in (one, together))
        assert ("loss", 6) in logged
        assert logged == pytest.approx(expected, rel=1e-4)
    # A gradient that is nearly nothing has a sign by rounding, by which Adam goes at first: few are.
    assert np.mean(np.abs(joint(one) - joint(together)) > 1e-5) < 0.01
    ended = run_program("rqv2_jax.evaluate", f"--workdir={one}", "--split=dev")
    assert ended.returncode == 0, ended.stderr[-3000:]
    arguments = ("--distributed", f"--workdir={together}", "--split=dev")
    (table, _), (silent, _) = finish(start("-m", "rqv2_jax.evaluate", *arguments))
    assert ("8 dev queries" in table, "dev queries" in silent) == (True, False)
    for name in ("results.json", "eval/test.json", "eval/dev.json"):
        reports = [json.loads((w / name).read_text())["rows"] for w in (one, together)]
        expected, found = ([row.pop("metrics") for row in rows] for rows in reports)
        assert reports[0] == reports[1]
        assert found == [pytest.approx(each, abs=1e-6) for each in expected]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_in_joint_training_both_resume(alone, together, number):
    """By SIGKILL, or by SIGTERM to the second alone, after which both save the same step."""
    file, _ = alone
    workdir = together.parent / number.name
    shutil.copytree(together, workdir)
    for name in ("joint", "runs", "eval", "vectors/joint", "index/joint"):
        shutil.rmtree(workdir / name)
    processes = start(*command(file, workdir))
    seen = False
    for line in processes[0].stdout:
        if re.match(r"  joint 2/" if number == signal.SIGTERM else r"  joint 4/", line):
            seen = True
            break
    assert seen
    if number == signal.SIGTERM:
        processes[1].send_signal(number)
        assert [process.wait() for process in processes] == [stopping.AGAIN] * PROCESSES
    for process in processes:
        process.send_signal(number)
        process.wait()
    saved = {int(p.name) for p in (workdir / "joint/last").glob("[0-9]")}
    if number == signal.SIGKILL:
        assert saved in ({2}, {2, 4})
    assert max(saved) in (2, 3, 4, 5)
    finish(start(*command(file, workdir)))
    np.testing.assert_array_equal(joint(together), joint(workdir))
    assert (workdir / "results.json").read_text() == (together / "results.json").read_text()
