"""`prx-post reward-serve` as a command: how it starts and stops, and what it refuses to start with."""

import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from prx_post.cli import main
from prx_post.rewards.service.client import connect
from tests.reward_serving import TOKEN, noise

SLOW_REWARD = """
import pathlib, time
folder = pathlib.Path(__file__).parent

def widths(images, prompts):
    (folder / "inside").touch()
    while not (folder / "go on").exists():
        time.sleep(0.01)
    return [float(image.width) for image in images]
"""


def start_server(*args: object) -> tuple[subprocess.Popen, str]:
    """A server's process and the URL that it printed."""
    command = [sys.executable, "-m", "prx_post.cli", "reward-serve", *map(str, args)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    if not line.startswith("serving "):
        process.kill()
        pytest.fail(f"{line}{process.communicate()[1]}")
    return process, line.split()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_server_after_what_it_accepted(tmp_path, number, monkeypatch):
    (tmp_path / "slow.py").write_text(SLOW_REWARD)
    (tmp_path / "serve.yaml").write_text(
        f"rewards: {tmp_path}/slow.py:widths\nport: 0\nnum_threads: 1\nbatch_size: 1\n"
    )
    monkeypatch.setenv("PRX_POST_REWARD_TOKEN", TOKEN)
    process, url = start_server("--config", tmp_path / "serve.yaml")
    try:
        remote = connect(f"{url}/widths")
        with ThreadPoolExecutor(1) as client:
            scores = client.submit(remote, [noise(0), noise(1)], ["a", "b"])
            while not (tmp_path / "inside").exists():
                assert process.poll() is None
            process.send_signal(number)
            with pytest.raises(OSError, match="refused"):  # noqa: PT012  # as soon as the signal has been seen
                while True:
                    socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))).close()
            (tmp_path / "go on").touch()
            assert scores.result().tolist() == [12.0, 12.0]
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output, errors) == (0, "", "")
    finally:
        process.kill()
        process.communicate()


def error_of(capsys, *args: object) -> str:
    """The one line that a command which must fail prints."""
    assert main(["reward-serve", *map(str, args)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--rewards", "ocr", "--host", "0.0.0.0"], "host is '0.0.0.0', but must be a loopback address"),
        (["--rewards", "ocr", "--host", "::"], "host is '::', but must be a loopback address"),
        (["--rewards", "ocr", "--host", "no such host"], "host is 'no such host', which cannot be resolved"),
        (["--rewards", "ocrx"], "Did you mean 'ocr'"),
        (["--rewards", "ocr,nowhere.py:score", "--port", 0], "there is no file nowhere.py"),
        (["--port", 0], "rewards is [], but must be set"),
        (["--rewards", "ocr,ocr"], "but must be distinctly named"),
        (["--rewards", "ocr", "ocr_exact", "--reward_weights", 1], "reward_weights is [1.0], but must be 2 numbers"),
        (["--rewards", "http://h:1"], "rewards is 'h:1', but must be letters"),
        (["--rewards", "ocr", "--device", "gpu"], "device is 'gpu', which torch does not know"),
        (["--rewards", "ocr", "--max_images", 600], "max_queued_images is 512, but must be at least max_images"),
        (["--rewards", "ocr", "--batch_size", 0], "batch_size is 0, but must be above 0"),
        (["--rewards", "ocr", "--token_file", "nowhere"], "token_file is 'nowhere', which cannot be read"),
        (["--rewards", "ocr", "--port", 70000], "port is 70000, but must be 0 to 65535"),
    ],
)
def test_settings_that_cannot_work_are_one_line_before_anything_is_served(capsys, args, message):
    assert message in error_of(capsys, *args)


def test_a_port_that_is_taken_is_known_before_a_reward_loads(capsys, monkeypatch):
    monkeypatch.setattr("prx_post.rewards.service.server.load_rewards", lambda _: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in error_of(
            capsys, "--rewards", "ocr", "--port", port
        )


def test_a_token_that_can_be_guessed_is_refused_and_never_shown(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PRX_POST_REWARD_TOKEN", "hunter2")
    line = error_of(capsys, "--rewards", "ocr")
    assert "must have at least 16 characters" in line
    assert "hunter2" not in line
    (tmp_path / "token").write_text("hunter 2 and some more\n")
    assert "ASCII and without spaces" in error_of(capsys, "--rewards", "ocr", "--token_file", tmp_path / "token")


def test_what_is_not_installed_is_named_with_its_extra(capsys, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "uvicorn" else found(name, *rest)
    )
    assert "pip install 'prx-post[serve]'" in error_of(capsys, "--rewards", "ocr")


def test_the_server_starts_on_other_addresses_with_a_token(tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    (tmp_path / "mine.py").write_text("def widths(images, prompts):\n    return [float(i.width) for i in images]\n")
    rewards = f"{tmp_path}/mine.py:widths,twice={tmp_path}/mine.py:widths"
    settings = ["--host", "0.0.0.0", "--port", 0, "--token_file", tmp_path / "token", "--reward_weights", 1, 2]
    process, url = start_server("--rewards", rewards, *settings)
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("PRX_POST_REWARD_TOKEN", TOKEN)
            port = url.rpartition(":")[2]
            assert connect(f"http://127.0.0.1:{port}/sum")([noise(0)], ["a"]).tolist() == [36.0]  # 12 + 2 · 12
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert TOKEN not in url + errors
