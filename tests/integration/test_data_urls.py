"""`prx-post data` with a list of URLs, against a server on the loopback interface."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from prx_post.base.errors import PrxPostError
from prx_post.data.config import DataConfig
from prx_post.data.readers import read_rows
from prx_post.recipes import url_list
from prx_post.recipes.url_list import UrlListConfig, run
from tests.misbehaving import Server, encoded_image, response, sends


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv(url_list.TEST_SWITCH, "1")
    server = Server()
    yield server
    server.close()


def write_table(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("img_key", "url", "prompt"), *rows])
    return path


def config(table, folder, **changes) -> UrlListConfig:
    columns = {"key_column": "img_key", "url_column": "url", "prompt_column": "prompt"}
    quick = {"backoff_s": 0.01, "read_timeout_s": 1.0, "total_timeout_s": 2.0, "max_lost_fraction": 1.0}
    return UrlListConfig(source=str(table), output_dir=str(folder), **{**columns, **quick, **changes})


def manifest(folder) -> dict[str, dict]:
    """The entries by key, without a last line that is unfinished."""
    *lines, _ = (folder / "manifest.jsonl").read_text().split("\n")
    return {entry["key"]: entry for entry in map(json.loads, lines)}


def contents(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_the_result_is_an_image_folder_and_the_manifest_says_what_became_of_each_row(server, tmp_path, capsys):
    server.handlers |= {
        "/a": sends(response(encoded_image("JPEG", seed=1))),
        "/b": sends(response(encoded_image("PNG", seed=2))),
        "/html": sends(response(b"<html>gone</html>", Content_Type="image/jpeg")),
    }
    rows = [
        ("a", server.url("/a"), "a red cube, on a table"),
        ("../b/é", server.url("/b"), "two\nlines"),
        ("c", server.url("/none"), "lost"),
        ("d", server.url("/html"), "lost"),
        ("e", "file:///etc/passwd", "refused"),
        ("f", server.url("/a"), ""),
        ("a", server.url("/b"), "the same key"),
    ]
    folder = tmp_path / "out"
    run(config(write_table(tmp_path / "list.csv", rows), folder))

    read = read_rows(DataConfig(dataset_name=str(folder)))
    assert read.prompts == ["a red cube, on a table", "two\nlines"]
    assert [read.image_bytes(0), read.image_bytes(1)] == [encoded_image("JPEG", seed=1), encoded_image("PNG", seed=2)]

    found = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [(e["key"], e["status"], e["reason"]) for e in found] == [
        ("a", "ok", None),
        ("../b/é", "ok", None),
        ("c", "failed", "HTTP 404"),
        ("d", "failed", "no usable image: no image format that Pillow knows"),
        ("e", "failed", "refused: file scheme; only http and https are read"),
        ("f", "skipped", "no prompt"),
        ("a", "skipped", "the key of an earlier row"),
    ]
    assert (found[0]["width"], found[0]["height"], found[0]["bytes"]) == (40, 30, len(encoded_image("JPEG", seed=1)))
    assert found[1]["file_name"].endswith(".png")
    assert sorted(p.suffix for p in folder.iterdir()) == [".jpg", ".jsonl", ".jsonl", ".png"]
    printed = capsys.readouterr().out
    assert "2 images" in printed
    assert "3 of 5 lost (60.0%)" in printed
    assert "     1  HTTP 404" in printed
    assert "2 rows skipped" in printed


def test_keys_that_differ_in_case_alone_or_hold_odd_characters_get_files_of_their_own():
    taken: set[str] = set()
    stems = [url_list._safe_stem(key, taken) for key in ("a", "A", "a/b", "a_b", "..", "x" * 300, "manifest", "é")]
    assert len({stem.lower() for stem in stems}) == 8
    assert stems[0] == "a"
    assert stems[3] == "a_b"
    assert all(len(stem) < 120 and "/" not in stem and not stem.startswith(".") for stem in stems)


def test_a_second_run_fetches_nothing_that_is_settled(server, tmp_path):
    server.handlers |= {"/a": sends(response(encoded_image())), "/b": sends(response(b"", "500 Error"))}
    rows = [("a", server.url("/a"), "one"), ("b", server.url("/b"), "two"), ("c", server.url("/c"), "three")]
    settings = config(write_table(tmp_path / "list.csv", rows), tmp_path / "out", max_attempts=2)
    run(settings)
    assert server.hits == {"/a": 1, "/b": 2, "/c": 1}
    server.handlers["/b"] = sends(response(encoded_image(seed=2)))
    server.handlers["/c"] = sends(response(encoded_image(seed=3)))
    run(settings)
    assert server.hits == {"/a": 1, "/b": 3, "/c": 1}  # what may come back was tried, what is gone was not
    assert manifest(tmp_path / "out")["b"]["status"] == "ok"
    settings.retry_failed = True
    run(settings)
    assert server.hits == {"/a": 1, "/b": 3, "/c": 2}
    assert len(read_rows(DataConfig(dataset_name=str(tmp_path / "out")))) == 3


def test_a_shorter_list_and_rows_with_the_same_key_lose_nothing_of_what_was_fetched(server, tmp_path):
    server.handlers |= {f"/{name}": sends(response(encoded_image(seed=i))) for i, name in enumerate("abc")}
    rows = [*((name, server.url(f"/{name}"), name) for name in "abc"), ("a", server.url("/b"), "the key of the first")]
    table = write_table(tmp_path / "list.csv", rows)
    run(config(table, tmp_path / "out"))
    whole = contents(tmp_path / "out")
    run(config(table, tmp_path / "out", max_rows=1))
    assert read_rows(DataConfig(dataset_name=str(tmp_path / "out"))).prompts == ["a"]
    run(config(table, tmp_path / "out"))
    assert server.hits == {"/a": 1, "/b": 1, "/c": 1}
    assert contents(tmp_path / "out") == whole


def test_transient_failures_are_tried_again_after_the_pause_that_the_server_asked_for(server, tmp_path, monkeypatch):
    server.handlers |= {
        "/busy": sends(response(b"", "429 Too Many", Retry_After="1"), response(encoded_image())),
        "/twice": sends(response(b"", "500 Error"), response(b"", "500 Error"), response(encoded_image())),
        "/cut": sends(response(encoded_image()[:99], length=500), response(encoded_image())),
        "/later": sends(response(b"", "503 Unavailable", Retry_After="3600")),
    }
    rows = [(path[1:], server.url(path), path) for path in server.handlers]
    start = time.monotonic()
    run(config(write_table(tmp_path / "list.csv", rows), tmp_path / "out"))
    assert time.monotonic() - start >= 1
    found = manifest(tmp_path / "out")
    attempts = {key: (entry["status"], entry["attempts"]) for key, entry in found.items()}
    assert attempts == {"busy": ("ok", 2), "twice": ("ok", 3), "cut": ("ok", 2), "later": ("failed", 1)}
    assert not found["later"]["permanent"]


def test_a_url_of_several_rows_is_fetched_once(server, tmp_path):
    server.handlers["/a"] = sends(response(encoded_image()))
    table = write_table(tmp_path / "list.csv", [("a", server.url("/a"), "one"), ("b", server.url("/a"), "two")])
    run(config(table, tmp_path / "out"))
    write_table(table, [("a", server.url("/a"), "one"), ("b", server.url("/a"), "two"), ("c", server.url("/a"), "3")])
    run(config(table, tmp_path / "out"))
    assert server.hits == {"/a": 1}
    rows = read_rows(DataConfig(dataset_name=str(tmp_path / "out")))
    assert rows.prompts == ["one", "two", "3"]
    assert {rows.image_bytes(i) for i in range(3)} == {encoded_image()}


def test_a_damaged_or_missing_file_is_named_and_fetched_again(server, tmp_path, capsys):
    server.handlers |= {f"/{name}": sends(response(encoded_image(seed=i))) for i, name in enumerate("abc")}
    rows = [(name, server.url(f"/{name}"), name) for name in "abc"]
    settings = config(write_table(tmp_path / "list.csv", rows), tmp_path / "out")
    run(settings)
    whole = contents(tmp_path / "out")
    flipped = bytearray(whole["a.jpg"])
    flipped[-9] ^= 1
    (tmp_path / "out" / "a.jpg").write_bytes(flipped)
    (tmp_path / "out" / "b.jpg").unlink()

    settings.verify = True
    with pytest.raises(PrxPostError, match="2 of 3 images are damaged or missing"):
        run(settings)
    printed = capsys.readouterr().out
    assert "a.jpg is not the file that was fetched" in printed
    assert "b.jpg cannot be read: No such file" in printed
    assert server.hits.total() == 3  # looking is not fetching

    settings.verify = False
    run(settings)
    assert "a.jpg is not the file that was fetched; it is fetched again" in capsys.readouterr().out
    assert server.hits == {"/a": 2, "/b": 2, "/c": 1}
    assert contents(tmp_path / "out") == whole
    settings.verify = True
    run(settings)
    assert "3 images" in capsys.readouterr().out


def test_a_damaged_file_that_cannot_be_fetched_again_is_not_left_among_the_images(server, tmp_path):
    server.handlers |= {
        "/a": sends(response(encoded_image())),
        "/b": sends(response(encoded_image(seed=1)), response(b"", "410 Gone")),
    }
    table = write_table(tmp_path / "list.csv", [(name, server.url(f"/{name}"), name) for name in "ab"])
    run(config(table, tmp_path / "out"))
    (tmp_path / "out" / "b.jpg").write_bytes(b"damaged")
    run(config(table, tmp_path / "out"))
    assert sorted(contents(tmp_path / "out")) == ["a.jpg", "manifest.jsonl", "metadata.jsonl"]
    assert read_rows(DataConfig(dataset_name=str(tmp_path / "out"))).prompts == ["a"]
    assert manifest(tmp_path / "out")["b"]["reason"] == "HTTP 410"


def test_too_many_lost_rows_are_an_error_that_keeps_the_images(server, tmp_path):
    server.handlers["/a"] = sends(response(encoded_image()))
    table = write_table(tmp_path / "list.csv", [("a", server.url("/a"), "one"), ("b", server.url("/b"), "two")])
    with pytest.raises(PrxPostError, match=r"1 of 2 rows are lost, but max_lost_fraction is 0\.4"):
        run(config(table, tmp_path / "out", max_lost_fraction=0.4))
    assert len(read_rows(DataConfig(dataset_name=str(tmp_path / "out")))) == 1


def test_loopback_is_refused_without_the_tests_switch(server, tmp_path, monkeypatch):
    monkeypatch.delenv(url_list.TEST_SWITCH)
    table = write_table(tmp_path / "list.csv", [("a", server.url("/a"), "one")])
    with pytest.raises(PrxPostError, match=r"none of 1 rows gave an image; .*manifest.jsonl says why"):
        run(config(table, tmp_path / "out"))
    assert manifest(tmp_path / "out")["a"]["reason"] == "refused: 127.0.0.1 is at 127.0.0.1, which is not public"
    assert not server.hits


def test_a_full_disk_ends_the_run_and_leaves_no_half_written_file(server, tmp_path, monkeypatch):
    import errno

    from prx_post.base import files

    server.handlers["/a"] = sends(response(encoded_image()))
    table = write_table(tmp_path / "list.csv", [("a", server.url("/a"), "one")])

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(PrxPostError, match="a.jpg cannot be written: No space left on device. Free some space"):
        run(config(table, tmp_path / "out"))
    assert contents(tmp_path / "out") == {"manifest.jsonl": b""}
    monkeypatch.undo()
    monkeypatch.setenv(url_list.TEST_SWITCH, "1")
    run(config(table, tmp_path / "out"))
    assert manifest(tmp_path / "out")["a"]["status"] == "ok"


def test_a_folder_with_something_else_in_it_and_one_in_use_are_left_alone(server, tmp_path):
    from prx_post.base.files import FolderLock

    server.handlers["/a"] = sends(response(encoded_image()))
    table = write_table(tmp_path / "list.csv", [("a", server.url("/a"), "one")])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.jpg").write_bytes(b"precious")
    with pytest.raises(PrxPostError, match="must be new, empty or of an earlier run"):
        run(config(table, tmp_path / "mine"))
    assert contents(tmp_path / "mine") == {"a.jpg": b"precious"}
    run(config(table, tmp_path / "out"))
    with FolderLock(tmp_path / "out"), pytest.raises(PrxPostError, match="another run writes there"):
        run(config(table, tmp_path / "out"))


def test_a_killed_run_continues_to_the_same_folder_as_an_unbroken_one(server, tmp_path):
    names = [f"k{i:02d}" for i in range(24)]
    for i, name in enumerate(names):
        body = response(b"", "404 Not Found") if i % 5 == 4 else response(encoded_image(seed=i))
        server.handlers[f"/{name}"] = slow(sends(body), 0.05)
    table = write_table(tmp_path / "list.csv", [(name, server.url(f"/{name}"), f"prompt {name}") for name in names])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"kind: images-from-urls\nsource: {table}\nkey_column: img_key\nnum_workers: 2\nper_host: 2\n"
        "max_lost_fraction: 0.5\nbackoff_s: 0.01\n"
    )
    command = [sys.executable, "-m", "prx_post.cli", "data", str(recipe), "--output_dir"]
    subprocess.run([*command, str(tmp_path / "whole")], env=dict(os.environ), check=True, capture_output=True)
    whole = contents(tmp_path / "whole")
    assert len(whole) == 20 + 2

    broken, already = tmp_path / "broken", server.hits.total()
    for lines in (3, 11):
        process = subprocess.Popen([*command, str(broken)], env=dict(os.environ), stderr=subprocess.DEVNULL)
        while not (broken / "manifest.jsonl").exists() or (broken / "manifest.jsonl").read_bytes().count(b"\n") < lines:
            assert process.poll() is None
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert lines <= len(manifest(broken)) < len(names)  # it was cut short, and what was done is on record
        assert not (broken / "metadata.jsonl").exists()  # what is unfinished cannot be mistaken for a data set
    with (broken / "manifest.jsonl").open("a") as file:
        file.write('{"key": "k23", "ur')  # a line that was being written
    (broken / ".k19.jpg.partial").write_bytes(b"half an image, of a row that is a 404 now")
    subprocess.run([*command, str(broken)], env=dict(os.environ), check=True, capture_output=True)
    assert contents(broken) == whole
    assert server.hits.total() - already <= 24 + 2 * 2  # at most what the killed runs' two workers had in hand


def slow(handler, seconds):
    def handle(connection):
        time.sleep(seconds)
        handler(connection)

    return handle


def test_the_command_lists_recipes_and_names_mistakes(prx_post, tmp_path):
    listed = prx_post("data", check=True).stdout
    assert "alchemist" in listed
    assert "yandex/alchemist" in listed
    for args, message in (
        (["alchemst"], "'alchemst' is no recipe and no file. Did you mean alchemist?"),
        (["alchemist", "--output_dri", "x"], "Did you mean output_dir?"),
        (["alchemist", "--source", "./none.csv"], "source is './none.csv', but there is no such file or folder"),
        (["alchemist", "--max_attempts", "0"], "max_attempts is 0, but must be above 0"),
        (["alchemist", "--config", "x.yaml"], "--config is not for recipes"),
        (["alchemist", "--kind", "prompt-list"], "kind is 'prompt-list', but must stay 'images-from-urls'"),
    ):
        result = prx_post("data", *args)
        assert result.returncode == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr
    (tmp_path / "recipe.yaml").write_text("kind: images\n")
    assert "must be one of images-from-urls" in prx_post("data", tmp_path / "recipe.yaml").stderr
