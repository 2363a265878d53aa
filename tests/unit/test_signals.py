"""Which signals ask a run to stop."""

import os
import signal

import pytest

from prx_post.engine.signals import StopSignals


@pytest.fixture
def hangups():
    """Restores what SIGHUP does, after a test has set it."""
    before = signal.getsignal(signal.SIGHUP)
    yield lambda handler: signal.signal(signal.SIGHUP, handler)
    signal.signal(signal.SIGHUP, before)


def test_a_lost_terminal_asks_to_stop(hangups):
    hangups(signal.SIG_DFL)
    with StopSignals() as signals:
        signals.note_only()
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received == signal.SIGHUP
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_under_nohup_a_lost_terminal_asks_for_nothing(hangups):
    hangups(signal.SIG_IGN)
    with StopSignals() as signals:
        signals.note_only()
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
