"""MDS shards. All but the first two tests need mosaicml-streaming, and are skipped without it."""

import io
import json
import sys

import pytest
from PIL import Image

from prx_post.data.config import DataConfig
from prx_post.data.images import decode
from prx_post.data.readers import read_rows
from prx_post.data.rows import DataError
from tests.misbehaving import encoded_image


def write(folder, columns, samples, **settings):
    streaming = pytest.importorskip("streaming", exc_type=ImportError)
    with streaming.MDSWriter(out=str(folder), columns=columns, **settings) as writer:
        for sample in samples:
            writer.write(sample)
    return folder


def rows_of(folder, **settings):
    return read_rows(DataConfig(dataset_name=str(folder), **settings))


def test_shards_without_the_library_say_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "index.json").write_text(json.dumps({"version": 2, "shards": []}))
    monkeypatch.setitem(sys.modules, "streaming", None)  # importing it fails, installed or not
    with pytest.raises(DataError, match=r"holds MDS shards, which need mosaicml-streaming.*prx-post\[mds\]"):
        rows_of(tmp_path)


def test_an_index_json_of_something_else_does_not_make_an_image_folder_mds(tmp_path):
    (tmp_path / "index.json").write_text("[1, 2]")
    (tmp_path / "a.png").write_bytes(encoded_image("PNG"))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "prompt": "one"}\n')
    assert rows_of(tmp_path).prompts == ["one"]


@pytest.mark.parametrize("split", ["", "train"])
def test_encoded_images_keep_their_bytes_over_several_shards(tmp_path, split):
    images = [encoded_image("PNG", seed=i) for i in range(5)]
    columns = {"prompt": "str", "image": "bytes", "score": "float32"}
    samples = [{"prompt": f"é {i}", "image": data, "score": 0.5} for i, data in enumerate(images)]
    write(tmp_path / "set" / split, columns, samples, size_limit=10_000)
    assert len(list((tmp_path / "set" / split).glob("*.mds"))) > 1
    rows = rows_of(tmp_path / "set")
    assert len(rows) == 5
    assert rows.prompts == [f"é {i}" for i in range(5)]
    assert [rows.image_bytes(i) for i in range(5)] == images
    assert rows.name(4).startswith("shard.0000")


@pytest.mark.parametrize("encoding", ["jpeg", "png", "pil"])
def test_images_of_every_encoding_show_what_was_written(tmp_path, encoding):
    image = Image.open(io.BytesIO(encoded_image("PNG")))
    write(tmp_path / "set", {"image": encoding, "prompt": "str"}, [{"image": image.copy(), "prompt": "one"}])
    shown = decode(rows_of(tmp_path / "set").image_bytes(0))
    assert shown.size == (40, 30)
    if encoding != "jpeg":
        assert shown.tobytes() == image.convert("RGB").tobytes()


def test_a_pickled_column_is_never_decoded(tmp_path, monkeypatch):
    import pickle

    columns = {"image": "bytes", "prompt": "str", "extra": "pkl"}
    write(tmp_path / "set", columns, [{"image": encoded_image(), "prompt": "one", "extra": {"a": 1}}])

    def refuse(*args):
        raise AssertionError("it was unpickled")

    monkeypatch.setattr(pickle, "loads", refuse)
    assert rows_of(tmp_path / "set").image_bytes(0) == encoded_image()
    with pytest.raises(DataError, match=r"prompt_column is 'extra', but must be a column of str; .* extra \(pkl\)"):
        rows_of(tmp_path / "set", prompt_column="extra")


def test_columns_and_damage_are_named(tmp_path):
    folder = write(tmp_path / "set", {"image": "bytes", "prompt": "str"}, [{"image": encoded_image(), "prompt": "one"}])
    with pytest.raises(DataError, match=r"image_column is 'jpg', but must be a column of bytes or jpeg or png or pil"):
        rows_of(folder, image_column="jpg")
    shard = folder / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"shard.00000.mds has \d+ bytes, but must have \d+"):
        rows_of(folder)
    shard.unlink()
    with pytest.raises(DataError, match="is in the index, but not in the folder. Fetch all of the data set"):
        rows_of(folder)


def test_compressed_shards_are_to_be_unpacked_first(tmp_path):
    columns = {"image": "bytes", "prompt": "str"}
    folder = write(tmp_path / "set", columns, [{"image": encoded_image(), "prompt": "one"}], compression="zstd")
    with pytest.raises(DataError, match=r"is in the index, but not in the folder. Unpack it \(zstd\)"):
        rows_of(folder)
