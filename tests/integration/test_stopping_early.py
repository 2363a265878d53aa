"""Stop signals while data are prepared: what was encoded is kept, and the exit code asks to be started again."""

import os
import signal
import time
from pathlib import Path

import pytest

from prx_post.data.cache import TensorCache
from tests.faults import sft_arguments
from tests.processes import Child, Processes, kill_group, run


def slow_encoding() -> None:
    """Every image takes a tenth of a second, and more than a few are never reached before a signal."""
    from prx_post.model.codec import LatentCodec

    encode = LatentCodec.encode

    def slowly(self, pixels):
        time.sleep(0.1)
        if "FIRST_ENCODED" in os.environ:
            Path(os.environ["FIRST_ENCODED"]).touch()
        return encode(self, pixels)

    LatentCodec.encode = slowly


def encoding_images(cache: Path) -> bool:
    """Prompts are encoded first, and written when all of them are."""
    return any((cache / "embeddings").rglob("*.safetensors"))


def wait_until(condition, timeout_s: float = 100) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def encoded(cache: Path) -> int:
    return sum(len(TensorCache(folder)._shard_of) for folder in (cache / "latents").iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_during_encoding_keeps_what_was_encoded_and_asks_to_be_run_again(number, image_folder, tmp_path):
    cache = tmp_path / "cache"
    call = sft_arguments(image_folder, cache, tmp_path / "run", max_steps=1)
    child = Child(call, tmp_path / "log", slow_encoding)
    try:
        wait_until(lambda: encoding_images(cache))
        time.sleep(0.5)
        child.send_signal(number)
        assert child.wait(timeout=60) == 75, (tmp_path / "log").read_text()[-2000:]
    finally:
        kill_group(child)
    output = (tmp_path / "log").read_text()
    assert f"error: stopped by {number.name} while data were prepared; what was encoded is kept." in output
    assert "Traceback" not in output
    assert 1 <= encoded(cache) < 48
    before = encoded(cache)
    run(1, call)
    assert encoded(cache) == 48
    assert before < 48


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_to_the_whole_group_reaches_workers_too_and_harms_nothing(number, image_folder, tmp_path):
    cache = tmp_path / "cache"
    call = sft_arguments(image_folder, cache, tmp_path / "run", max_steps=1, dataloader_num_workers=2)
    first = tmp_path / "first"
    child = Child(call, tmp_path / "log", slow_encoding, FIRST_ENCODED=str(first))
    try:
        wait_until(first.exists)
        time.sleep(0.5)
        os.killpg(child.pid, number)
        assert child.wait(timeout=100) == 75, (tmp_path / "log").read_text()[-2000:]
    finally:
        kill_group(child)
    output = (tmp_path / "log").read_text()
    assert f"error: stopped by {number.name} while data were prepared; what was encoded is kept." in output
    assert "Traceback" not in output
    assert 1 <= encoded(cache) < 48


def test_a_signal_to_both_ranks_during_encoding_ends_both(image_folder, tmp_path):
    cache = tmp_path / "cache"
    ranks = Processes(2, sft_arguments(image_folder, cache, tmp_path / "run", max_steps=1), slow_encoding)
    wait_until(lambda: encoding_images(cache))
    time.sleep(0.5)
    for rank in ranks.ranks:
        rank.send_signal(signal.SIGTERM)
    assert [rank.returncode for rank in ranks.wait(timeout_s=60)] == [75, 75]
    assert encoded(cache) >= 2
