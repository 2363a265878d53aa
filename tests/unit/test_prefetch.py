"""Reading ahead changes nothing but when a batch is made."""

import threading

import pytest

from prx_post.base.errors import PrxPostError
from prx_post.engine.prefetch import DEPTH, Prefetched
from tests.training import ListSource, config, trainer

STEPS = [[(float(step), 0.0)] for step in range(8)]


class Recorded(ListSource):
    """Notes in which thread and for which step it was asked; fails at one of them."""

    def __init__(self, fails_at: int | None = None, error: BaseException | None = None) -> None:
        super().__init__(STEPS)
        self.asked: list[tuple[str, int]] = []
        self.fails_at, self.error = fails_at, error

    def batches(self, step):
        self.asked.append((threading.current_thread().name, step))
        if step == self.fails_at and self.error is not None:
            raise self.error
        return super().batches(step)


def values(source, step):
    return [batch["x"].item() for batch in source.batches(step)]


def test_batches_come_in_order_and_are_made_on_another_thread():
    source = Recorded()
    with Prefetched(source, last_step=8) as ahead:
        assert [values(ahead, step) for step in range(8)] == [[float(step)] for step in range(8)]
    assert [step for _, step in source.asked] == list(range(8))
    assert {name for name, _ in source.asked} == {"prefetch"}


def test_no_more_is_read_ahead_than_the_depth():
    source = Recorded()
    with Prefetched(source, last_step=8) as ahead:
        values(ahead, 0)
    assert 1 <= len(source.asked) <= DEPTH + 2


def test_another_step_than_the_next_is_made_anew():
    with Prefetched(Recorded(), last_step=8) as ahead:
        assert values(ahead, 0) == [0.0]
        assert values(ahead, 5) == [5.0]
        assert values(ahead, 6) == [6.0]
        assert values(ahead, 2) == [2.0]


def test_an_error_comes_in_the_step_it_belongs_to():
    with Prefetched(Recorded(fails_at=2, error=PrxPostError("the disk is gone")), last_step=8) as ahead:
        assert values(ahead, 0) == [0.0]
        assert values(ahead, 1) == [1.0]
        with pytest.raises(PrxPostError, match="the disk is gone"):
            values(ahead, 2)


def test_a_thread_that_dies_without_a_word_is_an_error_and_not_a_wait_for_ever(monkeypatch):
    monkeypatch.setattr(Prefetched, "_run", lambda self, first, stop: None)
    with Prefetched(Recorded(), last_step=8) as ahead, pytest.raises(RuntimeError, match="prefetching thread has died"):
        values(ahead, 0)


def test_an_online_source_is_not_read_ahead():
    source = Recorded()
    source.online = True
    with pytest.raises(ValueError, match="cannot be read ahead"):
        Prefetched(source, last_step=8)


def test_a_run_whose_thread_fails_stops_with_its_cause_and_its_state_saved(tmp_path):
    from prx_post.engine.checkpointing import checkpoints

    source = Recorded(fails_at=3, error=PrxPostError("cache file x is corrupt"))
    trained = trainer(config(tmp_path, 8), STEPS, source=source)
    with pytest.raises(PrxPostError, match="cache file x is corrupt"):
        trained.fit()
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-000003"]
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
