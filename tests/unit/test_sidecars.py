import json

import pytest

from prx_post.base.errors import PrxPostError
from prx_post.data.config import DataConfig
from prx_post.data.readers import read_rows
from prx_post.recipes.sidecars import SidecarConfig, run
from tests.misbehaving import encoded_image


def folder_with(tmp_path, files):
    folder = tmp_path / "images"
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def config(folder, **changes) -> SidecarConfig:
    return SidecarConfig(image_dir=str(folder), **{"max_bad_fraction": 1.0, **changes})


def test_captions_beside_images_become_an_image_folder(tmp_path):
    files = {
        "a.jpg": encoded_image("JPEG", seed=1),
        "a.txt": "\ufeff a red cube\n",
        "sub/b.PNG": encoded_image("PNG", seed=2),
        "sub/b.json": json.dumps({"caption": "ein blauer Ball, groß"}),
        "c.webp": encoded_image("WEBP", seed=3),
        "c.caption": "kept",
        "c.json": json.dumps({"caption": "not read: .caption comes first"}),
    }
    folder = folder_with(tmp_path, files)
    run(config(folder, max_bad_fraction=0.0))
    rows = read_rows(DataConfig(dataset_name=str(folder)))
    found = {rows.prompts[i]: rows.image_bytes(i) for i in range(len(rows))}
    assert found == {
        "a red cube": files["a.jpg"],
        "ein blauer Ball, groß": files["sub/b.PNG"],
        "kept": files["c.webp"],
    }


def test_every_problem_is_named_and_the_rest_can_be_read(tmp_path, capsys):
    good = encoded_image()
    files = {
        "good.jpg": good,
        "good.txt": "good",
        "uncaptioned.jpg": good,
        "empty.jpg": good,
        "empty.txt": " \n",
        "latin.jpg": good,
        "latin.txt": "café".encode("latin-1"),
        "broken.jpg": good[:300],
        "broken.txt": "broken",
        "field.jpg": good,
        "field.json": '{"text": "x"}',
        "half.jpg": good,
        "half.json": '{"caption": "half a face: \\ud83d"}',
        "alone.txt": "no image",
        ".hidden/x.jpg": good,
        "notes.md": "no caption file",
    }
    folder = folder_with(tmp_path, files)
    run(config(folder))
    problems = [json.loads(line) for line in (folder / "caption_problems.jsonl").read_text().splitlines()]
    assert {p["file"]: p["problem"] for p in problems} == {
        "uncaptioned.jpg": "an image without a caption",
        "empty.jpg": "the caption is empty",
        "latin.jpg": "the caption is not UTF-8",
        "broken.jpg": "the image cannot be decoded",
        "field.jpg": "the caption's JSON holds no 'caption'",
        "half.jpg": "the caption is not UTF-8",
        "alone.txt": "a caption without an image",
    }
    printed = capsys.readouterr().out
    assert "2  the caption is not UTF-8, such as half.jpg" in printed
    assert "1 of 7 images are in" in printed
    assert read_rows(DataConfig(dataset_name=str(folder))).prompts == ["good"]


def test_too_many_problems_write_no_metadata(tmp_path):
    folder = folder_with(tmp_path, {"a.jpg": encoded_image(), "a.txt": "a", "b.jpg": encoded_image()})
    with pytest.raises(PrxPostError, match=r"1 of 2 images cannot be used, but max_bad_fraction is 0\.4"):
        run(config(folder, max_bad_fraction=0.4))
    assert not (folder / "metadata.jsonl").exists()


def test_metadata_that_is_there_is_replaced_only_when_asked(tmp_path):
    folder = folder_with(tmp_path, {"a.jpg": encoded_image(), "a.txt": "new", "metadata.jsonl": "precious"})
    with pytest.raises(PrxPostError, match="is there already. Move it away, or set overwrite: true"):
        run(config(folder))
    assert (folder / "metadata.jsonl").read_text() == "precious"
    run(config(folder, overwrite=True))
    assert json.loads((folder / "metadata.jsonl").read_text()) == {"file_name": "a.jpg", "prompt": "new"}
    assert not list(folder.glob(".*"))


def test_a_missing_or_empty_folder_is_named(tmp_path):
    with pytest.raises(PrxPostError, match="there is no such folder"):
        run(config(tmp_path / "none"))
    with pytest.raises(PrxPostError, match="holds no image"):
        run(config(tmp_path))


def test_extensions_match_in_either_case(tmp_path, capsys):
    files = {
        "A.JPG": encoded_image("JPEG", seed=1),
        "A.TXT": "one",
        "b.jpg": encoded_image("JPEG", seed=2),
        "b.Txt": "two",
    }
    folder = folder_with(tmp_path, files)
    run(config(folder, caption_extensions=[".TXT"]))
    assert read_rows(DataConfig(dataset_name=str(folder))).prompts == ["one", "two"]
    assert "without" not in capsys.readouterr().out
