"""Off a terminal, as here, long work says how far it has come."""

import pytest

from prx_post.base import progress
from prx_post.base.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which a test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_plain_line_a_minute(clock, capsys):
    for seconds, item in enumerate(Progress(range(1200), desc="encoding images", unit="image", disable=None)):
        clock[0] = float(seconds)
        assert item == seconds
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == "encoding images: 61 of 1,200 images"
    assert len(lines) == 19
    assert printed.err == ""


def test_what_is_counted_by_hand_and_without_an_end(clock, capsys):
    with Progress(desc="fetching", unit="URL", disable=None) as bar:
        clock[0] = 61.0
        bar.update(5)
        bar.update(5)
    assert capsys.readouterr().out == "fetching: 5 URLs\n"


def test_other_processes_say_nothing(clock, capsys):
    for _ in Progress(range(3), desc="encoding", disable=True):
        clock[0] += 100.0
    printed = capsys.readouterr()
    assert printed.out + printed.err == ""
