"""The journal against its promises: nothing torn, nothing twice, nothing changed unnoticed."""

import io
import json
import math
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from colddiff.journal import Difference, Journal, Record, read_records

LINE = b'{"step":%d,"timestamp_ms":7,"metrics":{"loss":0.5}}\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "journal.jsonl"


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_records_come_back_with_their_time(path):
    before = time.time_ns() // 10**6
    with Journal.open(path) as journal:
        journal.append(1, {"loss": 0.1, "speed/images": 3})
        journal.append(2, {"loss": 0.2})
    records, end = read_records(path)
    assert [record.metrics for record in records] == [
        {"loss": 0.1, "speed/images": 3.0},
        {"loss": 0.2},
    ]
    assert [record.step for record in records] == [1, 2]
    assert all(before <= r.timestamp_ms <= time.time_ns() // 10**6 for r in records)
    assert end == path.stat().st_size
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.1 + 0.2, 1.7976931348623157e308]
)
def test_every_float_survives_bit_for_bit(path, value):
    with Journal.open(path) as journal:
        journal.append(0, {"x": value})
    restored = read_records(path)[0][0].metrics["x"]
    assert struct.pack("<d", restored) == struct.pack("<d", value)
    with Journal.open(path) as journal:
        journal.append(0, {"x": value})
        assert journal.differences == []
    assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    "tail", [LINE[:-1] % 3, LINE[:20], b"\0" * 50, b'{"step": 3}\n', b"\xff\n"]
)
def test_torn_last_line_is_dropped(path, caplog, tail):
    write(path, LINE % 1 + LINE % 2 + tail)
    assert read_records(path)[1] == len(LINE % 1 + LINE % 2)
    with Journal.open(path) as journal:
        assert "dropped a torn last line" in caplog.text
        journal.append(3, {"loss": 0.25})
    assert [record.step for record in read_records(path)[0]] == [1, 2, 3]
    assert path.read_bytes().startswith(LINE % 1 + LINE % 2 + b'{"step":3,')


@pytest.mark.parametrize(
    "bad", [b"garbage\n", LINE[:20] + b"\n", b"[]\n", b"\n", b'{"step":1.5}\n']
)
def test_corrupt_middle_line_is_refused(path, bad):
    content = LINE % 1 + bad + LINE % 3
    write(path, content)
    for reading in (Journal.open, read_records):
        with pytest.raises(ValueError, match=r"journal\.jsonl: line 2 \(byte \d+\) is corrupt"):
            reading(path)
    with pytest.raises(ValueError, match="line 2"):
        read_records(path, len(LINE % 1))
    assert path.read_bytes() == content


def test_replay_compares_and_never_duplicates(path, caplog):
    with Journal.open(path) as journal:
        for step in (1, 2, 3):
            journal.append(step, {"loss": step / 7, "speed/images": 10.0, "system/cpu": 50.0})
    before = path.read_bytes()
    with Journal.open(path) as journal:
        journal.append(2, {"loss": 2 / 7, "speed/images": 99.0, "system/cpu": 1.0})
        assert journal.differences == []
        journal.append(3, {"loss": math.nextafter(3 / 7, 1)})
        assert journal.differences == [Difference(3, "loss", 3 / 7, math.nextafter(3 / 7, 1))]
        assert "step 3 repeated with loss" in caplog.text
        assert path.read_bytes() == before
        journal.append(3, {"loss": 3 / 7, "validation/rmse": 0.5})
        journal.append(4, {"loss": 4 / 7})
    assert path.read_bytes().startswith(before)
    records = read_records(path)[0][3:]
    assert [(r.step, r.metrics) for r in records] == [
        (3, {"validation/rmse": 0.5}),
        (4, {"loss": 4 / 7}),
    ]


@pytest.mark.parametrize(("first", "second"), [(0.0, -0.0), (math.nan, 1.0), (1.0, math.nan)])
def test_replay_compares_bits(path, first, second):
    with Journal.open(path) as journal:
        journal.append(0, {"x": first})
        journal.append(0, {"x": second})
        assert len(journal.differences) == 1


def test_reading_on_from_an_offset(path):
    write(path, b"".join(LINE % step for step in range(5)))
    records, offset = read_records(path, limit=2)
    assert [record.step for record in records] == [0, 1]
    records, offset = read_records(path, offset, limit=2)
    assert [record.step for record in records] == [2, 3]
    last = LINE % 5
    with path.open("ab") as file:
        file.write(last[:10])
        file.flush()
        records, offset = read_records(path, offset)
        assert records == [Record(4, 7, {"loss": 0.5})]
        assert read_records(path, offset) == ([], offset)
        file.write(last[10:])
    assert [record.step for record in read_records(path, offset)[0]] == [5]


def test_bad_steps_are_refused(path):
    with Journal.open(path) as journal:
        with pytest.raises(ValueError, match="step = -1 is not allowed"):
            journal.append(-1, {"loss": 1.0})
        with pytest.raises(TypeError):
            journal.append(1.5, {"loss": 1.0})
    assert path.read_bytes() == b""


def test_full_disk_leaves_the_journal_whole(path, monkeypatch):
    write_all = os.write
    with Journal.open(path) as journal:
        journal.append(1, {"loss": 1.0})
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda file, data: write_all(file, data[:9]))
            with pytest.raises(OSError, match="No space left"):
                journal.append(2, {"loss": 2.0})
        assert path.read_bytes() == before
        journal.append(2, {"loss": 2.0})
        assert journal.differences == []
    assert [record.step for record in read_records(path)[0]] == [1, 2]


def test_closing_twice(path):
    journal = Journal.open(path)
    journal.append(0, {"x": 1.0})
    journal.sync()
    journal.close()
    journal.close()


def test_kill_at_any_moment_leaves_whole_lines(path):
    program = (
        "import sys, pathlib\n"
        "from colddiff.journal import Journal\n"
        "journal = Journal.open(pathlib.Path(sys.argv[1]))\n"
        "for step in range(10**9): journal.append(step, {'x': step / 3, 'y': float(step)})\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], cwd=Path(__file__).parents[1]
    )
    while not path.exists() or path.stat().st_size < 50_000:
        time.sleep(0.01)
    process.kill()
    process.wait()
    lines = path.read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(len(steps)))
    with Journal.open(path) as journal:
        for step in steps:
            journal.append(step, {"x": step / 3, "y": float(step)})
        assert journal.differences == []
    assert path.read_text().splitlines() == lines


def test_a_line_that_is_being_written_is_left_for_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader may see half a line, and the rest of it a moment after."""
    whole = b'{"step":1,"timestamp_ms":5,"metrics":{"loss":0.5}}\n'
    torn = b'{"step":2,"timestamp_ms":6,"met'

    class Growing(io.BytesIO):
        def __next__(self) -> bytes:
            line = super().__next__()
            if line == torn:  # by now the writer has written on
                end = self.tell()
                self.seek(0, io.SEEK_END)
                self.write(b'rics":{"loss":0.25}}\n')
                self.seek(end)
            return line

    monkeypatch.setattr(Path, "open", lambda *_, **__: Growing(whole + torn))
    records, offset = read_records(path)
    assert [record.step for record in records] == [1]
    assert offset == len(whole)
