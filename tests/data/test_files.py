from __future__ import annotations

import numpy as np
import pytest

from dre_fast import progress as progress_module
from dre_fast.data.files import atomic_path, check_writable, write_text_atomic
from dre_fast.progress import progress


def test_a_successful_write_replaces_the_file(tmp_path):
    target = tmp_path / "new" / "a.txt"
    write_text_atomic(target, "one\n")
    write_text_atomic(target, "two\n")
    assert target.read_bytes() == b"two\n"
    assert [p.name for p in target.parent.iterdir()] == ["a.txt"]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    target = tmp_path / "a.txt"
    write_text_atomic(target, "old")

    def write_half() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("new")
            assert temporary.parent == tmp_path
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_half()
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_the_temporary_name_keeps_the_suffix(tmp_path):
    with atomic_path(tmp_path / "a.npy") as temporary:
        np.save(temporary, np.arange(3))
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2]


def test_a_body_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a.txt"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_progress_passes_everything_through_and_stays_silent_in_a_pipe(capsys, monkeypatch):
    monkeypatch.delenv("DRE_FAST_PROGRESS", raising=False)
    assert list(progress(iter(range(4)), "counting")) == [0, 1, 2, 3]
    assert capsys.readouterr().err == ""


def test_progress_draws_on_request(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setenv("DRE_FAST_PROGRESS", "1")
    assert list(progress(range(4), "counting", unit="slide")) == [0, 1, 2, 3]
    assert "counting" in capsys.readouterr().err
    monkeypatch.setenv("DRE_FAST_PROGRESS", "0")
    assert not progress_module.enabled()


def test_check_writable_makes_nothing(tmp_path):
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for there in ("file", "link"):
        with pytest.raises(ValueError, match=f"{there} is no folder"):
            check_writable(tmp_path / there / "b")
