"""A scan is remembered by the data, and by nothing that they have no part in."""

import json
import os

import pytest
import torch
from PIL import Image

from prx_post.base.ranks import ALONE
from prx_post.data.buckets import Buckets
from prx_post.data.config import DataConfig
from prx_post.data.encoders import Encoders
from prx_post.data.readers import read_rows
from prx_post.data.rows import ImageColumn
from prx_post.data.scan_memory import scanned
from prx_post.model.checkpoint import open_pipeline
from prx_post.model.text import PromptCleaner
from tests.pairing import number_pairs

PIPELINE = open_pipeline("tiny")


@pytest.fixture
def folder(tmp_path):
    """Three images, of which one is broken, with a caption each."""
    place = tmp_path / "set"
    place.mkdir()
    for i in range(3):
        Image.new("RGB", (64, 32), (i, 0, 0)).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(f"{i} {i}")
    (place / "1.png").write_bytes(b"no image")
    return place


@pytest.fixture
def reads(monkeypatch):
    """Places of the images that are read."""
    found, image_bytes = [], ImageColumn.image_bytes
    monkeypatch.setattr(ImageColumn, "image_bytes", lambda self, row: found.append(row) or image_bytes(self, row))
    return found


def scan(folder, cache, size=(32, 64), skip_text_cleaning=False, decode_all=False):
    rows = read_rows(DataConfig(dataset_name=str(folder)))
    cleaner = PromptCleaner(skip_text_cleaning)
    encoders = Encoders(PIPELINE, cleaner, torch.device("cpu"), torch.float32)
    return scanned(rows, Buckets(PIPELINE, *size), encoders, decode_all, cache, ALONE)


def test_the_second_scan_reads_no_image_and_finds_the_same(folder, tmp_path, reads):
    first = scan(folder, tmp_path / "cache")
    assert reads == [0, 1, 2]
    samples, bad = first
    assert [sample.row for sample in samples] == [0, 2]
    assert [(row.row, row.name) for row in bad] == [(1, str(folder / "1.png"))]
    assert scan(folder, tmp_path / "cache") == first
    assert reads == [0, 1, 2]


def change_an_image(folder):
    Image.new("RGB", (64, 32), (9, 9, 9)).save(folder / "1.png")


def touch_an_image(folder):
    os.utime(folder / "2.png", ns=(1, 1))


def change_a_caption(folder):
    (folder / "0.txt").write_text("4")


def add_an_image(folder):
    Image.new("RGB", (64, 32)).save(folder / "3.png")
    (folder / "3.txt").write_text("3")


def remove_an_image(folder):
    (folder / "2.png").unlink()


@pytest.mark.parametrize(
    "change",
    [change_an_image, touch_an_image, change_a_caption, add_an_image, remove_an_image],
    ids=lambda f: f.__name__,
)
def test_changed_data_are_scanned_again(folder, tmp_path, reads, change):
    scan(folder, tmp_path / "cache")
    change(folder)
    reads.clear()
    found = scan(folder, tmp_path / "cache")
    assert reads
    assert found == scan(folder, tmp_path / "another cache")


@pytest.mark.parametrize("setting", [{"size": (32, 32)}, {"skip_text_cleaning": True}, {"decode_all": True}], ids=str)
def test_another_setting_is_another_scan(folder, tmp_path, reads, setting):
    scan(folder, tmp_path / "cache")
    reads.clear()
    scan(folder, tmp_path / "cache", **setting)
    assert reads == [0, 1, 2]


def test_a_damaged_memory_is_said_and_made_anew(folder, tmp_path, reads, capsys):
    first = scan(folder, tmp_path / "cache")
    (file,) = (tmp_path / "cache" / "scans").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    reads.clear()
    assert scan(folder, tmp_path / "cache") == first
    assert reads == [0, 1, 2]
    assert f"warning: {file} is damaged" in capsys.readouterr().out


def parquet(folder, image, name=None):
    import datasets

    path = folder / "set.parquet"
    cells = [{"bytes": image, "path": name}, {"bytes": image, "path": None}]
    columns = {"image": datasets.Image(), "prompt": datasets.Value("string")}
    table = datasets.Dataset.from_dict({"image": cells, "prompt": ["1", "2"]}, features=datasets.Features(columns))
    table.to_parquet(str(path))
    return path


def test_images_in_cells_are_remembered_until_their_file_changes(tmp_path, reads):
    a, b = number_pairs(2)
    path = parquet(tmp_path, a.chosen)
    first = scan(path, tmp_path / "cache")
    reads.clear()
    assert scan(path, tmp_path / "cache") == first
    assert not reads
    parquet(tmp_path, b.chosen)
    second = scan(path, tmp_path / "cache")
    assert reads == [0, 1]
    assert second[0][0].image_key != first[0][0].image_key


def test_names_of_images_in_cells_are_known_without_reading_them(tmp_path, reads):
    (pair,) = number_pairs(1)
    rows = read_rows(DataConfig(dataset_name=str(parquet(tmp_path, pair.chosen, "a.png"))))
    assert [rows.name(row) for row in range(2)] == ["a.png", "row 1"]
    assert not reads


def scan_table(folder, rows, cache):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return scan(folder, cache)


def test_a_caption_that_says_none_is_another_than_none_and_places_count(folder, tmp_path):
    first = {"file_name": "0.png", "prompt": "one"}
    for earlier, later in (
        ([first, {"file_name": "2.png", "prompt": None}], [first, {"file_name": "2.png", "prompt": "None"}]),
        ([{**first, "prompt": "a"}, {"prompt": "b"}], [{"prompt": "a"}, {**first, "prompt": "b"}]),
    ):
        scan_table(folder, earlier, tmp_path / "cache")
        found = scan_table(folder, later, tmp_path / "cache")
        assert found == scan(folder, tmp_path / "another cache")
