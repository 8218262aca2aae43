"""Arrays and folders on disk: kept while they are what they were, made again when they are not."""

import os

import numpy as np
import pytest

from rqv2_jax import artifacts


def computed(path, source="source"):
    """What `cached` returns, and how often it had to compute that."""
    calls = []

    def compute():
        calls.append(source)
        return {"x": np.arange(300), "y": np.ones((2, 3), np.float32)}

    found = artifacts.cached(path, source, compute)
    np.testing.assert_array_equal(found["x"], np.arange(300))
    np.testing.assert_array_equal(found["y"], np.ones((2, 3)))
    return len(calls)


def test_arrays_are_computed_once_for_a_source(tmp_path, capsys):
    path = tmp_path / "folder" / "a.npz"
    assert [computed(path), computed(path), computed(path, "other")] == [1, 0, 1]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("size", [0, 1, 100, 2000, -1])
def test_arrays_that_cannot_be_read_are_computed_again(tmp_path, capsys, size):
    path = tmp_path / "a.npz"
    computed(path)
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    assert [computed(path), computed(path)] == [1, 0]
    said = capsys.readouterr().out
    assert said.startswith(f"{path}: cannot be read (")
    assert said.endswith("); it is made again\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize("content", [b"\0" * 5000, b"not an archive", b"PK\x03\x04" + b"x" * 99])
def test_arrays_that_were_overwritten_are_computed_again(tmp_path, content):
    path = tmp_path / "a.npz"
    computed(path)
    path.write_bytes(content)
    assert [computed(path), computed(path)] == [1, 0]


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "a.npz"
    computed(path)
    content = bytearray(path.read_bytes())
    content[content.index(np.arange(300).tobytes()) + 40] ^= 1
    path.write_bytes(content)
    assert computed(path) == 1


def test_a_folder_that_has_lost_something_is_filled_again(tmp_path, capsys):
    folder, calls = tmp_path / "f", []

    def make():
        if not (folder / "made").is_file():
            calls.append(1)
            (folder / "deep").mkdir(parents=True, exist_ok=True)
            (folder / "deep" / "records").write_bytes(b"12345")
            (folder / "made").touch()
        return "made"

    def fill():
        assert artifacts.kept(folder, make) == "made"
        assert (folder / "deep" / "records").read_bytes() == b"12345"
        return len(calls)

    assert [fill(), fill()] == [1, 1]
    (folder / "more").touch()
    assert [fill(), fill()] == [1, 1]
    assert capsys.readouterr().out == ""
    (folder / "deep" / "records").write_bytes(b"12")
    assert [fill(), fill()] == [2, 2]
    assert "deep/records has 2 bytes in place of 5); it is made again" in capsys.readouterr().out
    (folder / "deep" / "records").unlink()
    assert fill() == 3
    (tmp_path / "f.sizes.json").write_text("{")
    assert fill() == 3


def test_a_small_file_appears_at_once(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "text"
    artifacts.write_text(path, "old")

    def fail(*args):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="no space left"):
            artifacts.write_text(path, "new")
    assert path.read_text() == "old"
    artifacts.write_text(path, "new")
    assert path.read_text() == "new"
