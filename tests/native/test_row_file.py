"""The file behind a bank larger than memory: copies in the order asked for, errors, closing, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from dre_fast.ops import native

if native.why_not("host"):
    pytest.skip(f"needs the compiled host part: {native.why_not('host')}", allow_module_level=True)

from dre_fast._host import RowFile

ROWS, WIDTH, CACHED = 1000, 64, 100


def made(folder: Path, rows: int = ROWS, threads: int = 3) -> tuple[RowFile, np.ndarray, np.ndarray]:
    """A file of random rows: itself, its content, its ring."""
    file = RowFile(str(folder), rows, WIDTH, CACHED, threads)
    content = file.map().reshape(rows, WIDTH)
    content[:] = np.random.default_rng(0).integers(0, 256, content.shape)
    return file, content, file.ring().reshape(CACHED, WIDTH)


def test_rows_go_both_ways(tmp_path: Path) -> None:
    file, content, ring = made(tmp_path)
    file.wait(file.read(10, 20, 50, []))
    assert np.array_equal(ring[50:70], content[10:30])
    ring[:3] = np.arange(3)[:, None] + 1
    file.wait(file.write([0, 1, 2], [999, 5, 6], []))
    assert content[[999, 5, 6], 0].tolist() == [1, 2, 3]
    assert list(tmp_path.iterdir()) == []  # the file has no name
    found = file.statistics()
    assert (found["reads"], found["writes"]) == (1, 1)
    assert (found["bytes_read"], found["bytes_written"]) == (20 * WIDTH, 3 * WIDTH)
    file.close()


def test_a_job_waits_for_those_before_it(tmp_path: Path) -> None:
    file, _, ring = made(tmp_path, threads=4)
    for value in range(200):  # each read must see the write before it, each write the read before that
        ring[:CACHED] = value % 251
        away = file.write(list(range(50)), list(range(50)), [])
        file.wait(file.read(0, 50, 50, [away]))
        assert (ring[50:] == value % 251).all()
    file.close()


def test_ranges_are_checked_before_anything_is_copied(tmp_path: Path) -> None:
    file, _, _ = made(tmp_path)
    for first, rows, at in (
        (990, 11, 0),
        (-1, 1, 0),
        (0, 101, 0),
        (0, 10, 91),
        (0, -1, 0),
        (2**62, 2**62, 0),
    ):
        with pytest.raises(IndexError, match="lie outside"):
            file.read(first, rows, at, [])
    with pytest.raises(IndexError, match="of the file"):
        file.write([0], [ROWS], [])
    with pytest.raises(ValueError, match="one length"):
        file.write([0, 1], [0], [])
    file.close()


def test_an_error_reaches_who_waits_and_all_that_depends_on_it(tmp_path: Path) -> None:
    file, _, ring = made(tmp_path)
    before = ring.copy()
    os.ftruncate(file.fileno(), 500 * WIDTH)
    good, bad = file.read(0, 10, 0, []), file.read(600, 10, 20, [])
    after = file.read(0, 10, 40, [bad])
    later = file.read(0, 10, 60, [after])
    file.wait(good)
    for job in (bad, after, later, later):  # told as often as asked
        with pytest.raises(OSError, match="cut short"):
            file.wait(job)
    assert np.array_equal(ring[20:], before[20:])  # what depends on it was not read
    file.close()


def test_a_file_grows(tmp_path: Path) -> None:
    file, content, ring = made(tmp_path)
    file.resize(ROWS + 10)
    grown = file.map().reshape(-1, WIDTH)
    assert file.rows == len(grown) == ROWS + 10
    assert np.array_equal(grown[:ROWS], content)
    assert not grown[ROWS:].any()
    file.wait(file.read(ROWS, 10, 0, []))
    assert not ring[:10].any()
    file.close()


def test_a_folder_that_is_not_there_or_full_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="making a row file"):
        RowFile(str(tmp_path / "no"), 1, 1, 1, 1)
    with pytest.raises(OSError, match="reserving"):
        RowFile(str(tmp_path), 1 << 50, 1 << 10, 1, 1)
    with pytest.raises(ValueError, match="must not be negative"):
        RowFile(str(tmp_path), -1, 1, 1, 1)


def test_closing_ends_threads_and_drops_what_has_not_begun(tmp_path: Path) -> None:
    before = threading.active_count(), len(os.listdir("/proc/self/task"))
    file, _, ring = made(tmp_path)
    jobs = [file.read(0, CACHED, 0, []) for _ in range(500)]
    file.close()
    file.close()
    assert (threading.active_count(), len(os.listdir("/proc/self/task"))) == before
    with pytest.raises(RuntimeError, match="closed"):
        file.read(0, 1, 0, [])
    for job in jobs:  # some may have run; none is left waiting
        with suppress(RuntimeError):
            assert file.done(job)
    del file
    assert ring.shape == (CACHED, WIDTH)
    ring[:] = 1  # the memory lives as long as the array


def test_memory_outlives_the_file(tmp_path: Path) -> None:
    file, content, _ = made(tmp_path)
    expected = content.copy()
    descriptors = len(os.listdir("/proc/self/fd"))
    file.close()
    del file
    assert len(os.listdir("/proc/self/fd")) == descriptors - 1
    assert np.array_equal(content, expected)


def test_several_threads_may_call(tmp_path: Path) -> None:
    file, content, ring = made(tmp_path)
    wrong = []

    def work(part: int) -> None:
        for i in range(100):
            first = (part * 131 + i * 17) % (ROWS - 20)
            file.wait(file.read(first, 20, part * 20, []))
            if not np.array_equal(ring[part * 20 : part * 20 + 20], content[first : first + 20]):
                wrong.append(part)

    threads = [threading.Thread(target=work, args=(part,)) for part in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert file.statistics()["reads"] == 500
    file.close()


def test_ctrl_c_ends_a_wait(tmp_path: Path) -> None:
    """A wait for a job that takes long lets go on SIGINT with KeyboardInterrupt, and the process ends cleanly."""
    code = (
        "import signal, sys, numpy as np\n"
        "from dre_fast._host import RowFile\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background begin with it ignored\n"
        "file = RowFile(sys.argv[1], 1 << 20, 1 << 10, 1 << 18, 1)\n"
        "jobs = [file.read(0, 1 << 18, 0, []) for _ in range(2000)]\n"
        "print('waiting', flush=True)\n"
        "try:\n"
        "    file.wait(jobs[-1])\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert out == "interrupted\n", err
    assert process.returncode == 0


def test_a_forked_child_cannot_use_it_and_ends(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from dre_fast._host import RowFile\n"
        "file = RowFile(sys.argv[1], 1000, 64, 100, 4)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    try:\n"
        "        file.read(0, 1, 0, [])\n"
        "    except RuntimeError as error:\n"
        "        del file\n"
        "        os._exit(7 if 'fork' in str(error) else 1)\n"
        "    os._exit(2)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
        "file.wait(file.read(0, 1, 0, []))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=30)
