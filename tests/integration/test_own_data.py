"""Data sets as people have them, through `prx-post sft`: trained on is all of it, with its captions as written."""

import io
import json
import struct

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.conftest import numbered_images
from tests.integration.test_sft import settings
from tests.running import train_sft as train

COUNT = 12


@pytest.fixture(scope="module")
def images():
    """Twelve images of 64×32, as PNG files."""
    return [png(image.image) for image in numbered_images(list(range(10, 10 + COUNT)))]


def png(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def put(folder, names, images, captions=None, suffix=".txt"):
    """Images, each with its caption in a file beside it."""
    for i, (name, image) in enumerate(zip(names, images, strict=True)):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
        path.with_suffix(suffix).write_text(captions[i] if captions else str(10 + i), encoding="utf-8")
    return folder


def numbered(ending=".png"):
    return [f"{i:05d}{ending}" for i in range(COUNT)]


def trained_on(dataset, warm_cache, tmp_path, **changes):
    """Prompts of a run's samples.jsonl, in its order."""
    train(*settings(dataset, warm_cache, tmp_path / "run", max_steps=1, **changes))
    return [json.loads(line)["prompt"] for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("special", ["train_station.png", "a test shot.png", "eval.png", "dev-board.png"])
def test_a_name_of_an_image_makes_no_split(images, warm_cache, tmp_path, special):
    names = [*numbered()[:-1], special]
    assert len(trained_on(put(tmp_path / "set", names, images), warm_cache, tmp_path)) == COUNT


@pytest.mark.parametrize("folders", [("boat", "train", "plane"), ("val", "2024 training day", "x"), ("test", "a", "b")])
def test_a_name_of_a_folder_makes_no_split(images, warm_cache, tmp_path, folders):
    for k, name in enumerate(folders):
        folder = tmp_path / "set" / name
        folder.mkdir(parents=True)
        lines = []
        for i in range(4 * k, 4 * k + 4):
            (folder / f"{i}.png").write_bytes(images[i])
            lines.append(json.dumps({"file_name": f"{i}.png", "prompt": str(10 + i)}) + "\n")
        (folder / "metadata.jsonl").write_text("".join(lines))
    assert sorted(trained_on(tmp_path / "set", warm_cache, tmp_path)) == [str(10 + i) for i in range(COUNT)]


@pytest.mark.parametrize(("name", "neighbour"), [("set[12]", "set1"), ("a*", "ab"), ("what?", "whatx")])
def test_a_path_is_never_a_pattern(images, warm_cache, tmp_path, name, neighbour):
    put(tmp_path / neighbour, numbered()[:3], images[:3], ["other"] * 3)
    found = trained_on(put(tmp_path / name, numbered(), images), warm_cache, tmp_path)
    assert found == [str(10 + i) for i in range(COUNT)]


@pytest.mark.parametrize(("folder", "other"), [("pqx_notes.txt", "notes.txt"), ("set", "_SUCCESS"), ("set", "a.png")])
def test_other_files_beside_parquet_are_ignored(images, warm_cache, tmp_path, folder, other):
    (tmp_path / folder).mkdir()
    cells = [{"bytes": image, "path": None} for image in images]
    table = datasets.Dataset.from_dict({"image": cells, "prompt": [str(i) for i in range(COUNT)]})
    table.cast_column("image", datasets.Image(decode=False)).to_parquet(str(tmp_path / folder / "part-0.parquet"))
    (tmp_path / folder / other).write_bytes(images[0] if other.endswith(".png") else b"about this set\n")
    assert len(trained_on(tmp_path / folder, warm_cache, tmp_path)) == COUNT


@pytest.mark.parametrize(
    "captions",
    [
        [f"{i:03d}" for i in range(7, 7 + COUNT)],
        [*("None", "NA", "null", "nan"), *(str(i) for i in range(COUNT - 4))],
        [f"{i}.0" for i in range(COUNT)],
        ["True", "False", *(f"0{i}" for i in range(COUNT - 2))],
    ],
    ids=["zeros", "nothing", "decimals", "mixed"],
)
def test_cells_of_a_csv_are_text_as_written(images, warm_cache, tmp_path, captions):
    folder = tmp_path / "set"
    folder.mkdir()
    for name, image in zip(numbered(), images, strict=True):
        (folder / name).write_bytes(image)
    rows = [f"{name},{caption}\n" for name, caption in zip(numbered(), captions, strict=True)]
    (folder / "metadata.csv").write_text("file_name,prompt\n" + "".join(rows))
    assert trained_on(folder, warm_cache, tmp_path) == captions


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("kind", ["TIFF", "JPEG", "PNG", "WEBP"])
def test_a_turned_image_is_trained_at_the_size_that_is_seen(warm_cache, tmp_path, capsys, kind, orientation):
    """Stored 32 wide and 64 high, it is 64 wide: one that is taken as it is stored would be enlarged."""
    folder = tmp_path / "set"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.full((64, 32, 3), 200, np.uint8))
    for i in range(2):
        stored.save(folder / f"{i}.{kind.lower()}", kind, exif=exif.tobytes() if kind != "TIFF" else exif)
        (folder / f"{i}.txt").write_text(f"1{i}")
    assert len(trained_on(folder, warm_cache, tmp_path)) == 2
    assert f"{folder}: 2 images, all 64x32\n" in capsys.readouterr().out


def float_tiff(values):
    buffer = io.BytesIO()
    Image.fromarray(values.astype(np.float32), "F").save(buffer, "TIFF")
    return buffer.getvalue()


def test_images_of_floats_are_scaled_and_those_of_no_known_range_are_bad_rows(warm_cache, tmp_path):
    ramp = np.linspace(0, 1, 32 * 64).reshape(32, 64)
    files = [float_tiff(ramp), float_tiff(ramp[::-1] / 2), float_tiff(1e6 * ramp - 3)]
    folder = put(tmp_path / "set", [f"{i}.tif" for i in range(3)], files)
    assert len(trained_on(folder, warm_cache, tmp_path, max_bad_fraction=0.5)) == 2
    (bad,) = (json.loads(line) for line in (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines())
    assert bad["name"].endswith("2.tif")


def test_strange_captions_are_kept_cut_or_listed_and_all_of_it_is_said(images, warm_cache, tmp_path, capsys):
    captions = [
        *("a\x00b 12", "line1\nline2 12", "😀 12", "https://x.example/a.jpg 12", "中文", "\u200b"),
        *("word " * 3000, '"12"', "12", "x" * 50, "#tag 12", "&amp; 12"),
    ]
    folder = put(tmp_path / "set", numbered(), images, captions)
    found = trained_on(folder, warm_cache, tmp_path, max_bad_fraction=0.5)
    bad = [json.loads(line) for line in (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()]
    assert len(found) + len(bad) == COUNT
    assert [(row["row"], "empty" in row["reason"]) for row in bad] == [(4, False), (5, True)]
    said = capsys.readouterr().out
    assert "10 of 12 images, all 64x32" in said
    assert "longer than 24 tokens and cut there" in said


@pytest.mark.parametrize("suffix", [".TXT", ".Txt", ".caption"])
def test_captions_beside_images_are_found_in_any_case(images, warm_cache, tmp_path, suffix):
    folder = put(tmp_path / "set", numbered(".PNG"), images, suffix=suffix)
    assert len(trained_on(folder, warm_cache, tmp_path)) == COUNT


def test_a_broken_header_in_the_middle_is_one_bad_row(images, warm_cache, tmp_path):
    broken = struct.pack(">8sI", b"\x89PNG\r\n\x1a\n", 13)
    folder = put(tmp_path / "set", numbered(), [*images[:5], broken, *images[6:]])
    assert len(trained_on(folder, warm_cache, tmp_path, max_bad_fraction=0.1)) == COUNT - 1
