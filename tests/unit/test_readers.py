import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prx_post.data.config import DataConfig
from prx_post.data.images import decode, image_size
from prx_post.data.readers import read_rows
from prx_post.data.rows import BadRow, DataError, report_bad_rows


def png(size=(8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (9, 9, 9)).save(buffer, format="PNG")
    return buffer.getvalue()


def folder_of(tmp_path, rows):
    folder = tmp_path / "images"
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w") as file:
        for name, prompt in rows:
            (folder / name).write_bytes(png())
            file.write(json.dumps({"file_name": name, "prompt": prompt}) + "\n")
    return folder


def test_an_image_folder_gives_bytes_and_prompts(tmp_path):
    rows = read_rows(DataConfig(dataset_name=str(folder_of(tmp_path, [("a.png", "one"), ("b.png", "two")]))))
    assert rows.prompts == ["one", "two"]
    assert rows.image_bytes(1) == png()
    assert image_size(rows.image_bytes(0)) == (6, 8)  # height, width
    assert rows.name(0).endswith("a.png")


def test_parquet_gives_the_same_from_a_file_and_from_its_folder(tmp_path):
    from prx_post.tiny.datasets import CaptionedImage, write_parquet

    path = tmp_path / "parquet" / "part.parquet"
    write_parquet(iter([CaptionedImage(Image.new("RGB", (8, 6)), 1, "one")]), path)
    for name in (path, path.parent):
        rows = read_rows(DataConfig(dataset_name=str(name)))
        assert rows.prompts == ["one"]
        assert decode(rows.image_bytes(0)).size == (8, 6)


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    folder = folder_of(tmp_path, [("a.png", "one")])
    with pytest.raises(DataError, match=r"prompt_column is 'caption', but .* has only the columns image, prompt"):
        read_rows(DataConfig(dataset_name=str(folder), prompt_column="caption"))


def test_a_column_that_holds_no_images_is_refused(tmp_path):
    path = tmp_path / "numbers.parquet"
    pq.write_table(pa.table({"image": [1, 2], "prompt": ["one", "two"]}), path)
    with pytest.raises(DataError, match="image_column is 'image', which does not hold images"):
        read_rows(DataConfig(dataset_name=str(path)))


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such", "a/b/c"])
def test_a_missing_folder_is_named(name):
    with pytest.raises(DataError, match="there is no such file or folder"):
        read_rows(DataConfig(dataset_name=name))


def test_a_file_that_is_no_parquet_and_an_empty_folder_are_refused(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with pytest.raises(DataError, match=r"must be a folder, a \.parquet file, a metadata\.jsonl or \.csv, or a Hub id"):
        read_rows(DataConfig(dataset_name=str(text)))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="is empty, but must have images or parquet files"):
        read_rows(DataConfig(dataset_name=str(empty)))


def test_an_empty_parquet_is_refused(tmp_path):
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"image": image, "prompt": pa.string()})
    pq.write_table(pa.table({"image": [], "prompt": []}, schema=schema), tmp_path / "none.parquet")
    with pytest.raises(DataError, match="no rows"):
        read_rows(DataConfig(dataset_name=str(tmp_path / "none.parquet")))


def test_a_parquet_folder_gives_the_split_asked_for_and_no_other(tmp_path):
    from prx_post.tiny.datasets import CaptionedImage, write_parquet

    for split in ("train", "test"):
        rows = [CaptionedImage(Image.new("RGB", (8, 6)), 1, split)]
        write_parquet(iter(rows), tmp_path / "sets" / f"{split}-00000-of-00001.parquet")
    for split in ("train", "test"):
        assert read_rows(DataConfig(dataset_name=str(tmp_path / "sets"), dataset_split=split)).prompts == [split]
    with pytest.raises(DataError, match="nonsense"):
        read_rows(DataConfig(dataset_name=str(tmp_path / "sets"), dataset_split="nonsense"))


@pytest.mark.parametrize("name", ["data/alchemist", "nobody/nothing", "nothing"])
def test_a_missing_local_folder_that_looks_like_a_hub_id_is_named_as_both(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    local = "there is no such file or folder in 'data', a local folder"  # so the Hub is not even asked
    both = "there is no such local file or folder, and the Hub did not give"
    with pytest.raises(DataError, match=local if name.startswith("data/") else both):
        read_rows(DataConfig(dataset_name=name))


def test_prompts_that_are_no_text_are_refused(tmp_path):
    folder = folder_of(tmp_path, [("a.png", 472)])
    with pytest.raises(DataError, match="prompt_column is 'prompt', which holds int64, but must hold text"):
        read_rows(DataConfig(dataset_name=str(folder)))


@pytest.mark.parametrize("data", [b"", b"no image", png()[:40]])
def test_bytes_that_are_no_whole_image_raise_oserror(data):
    with pytest.raises(OSError):  # noqa: PT011
        decode(data)


def test_bad_rows_are_written_down_and_stop_the_run_only_above_their_allowed_share(tmp_path, capsys):
    path = tmp_path / "bad_rows.jsonl"
    bad = [BadRow(3, "c.png", "not a readable image")]
    report_bad_rows(bad, total=100, max_bad_fraction=0.01, path=path)
    assert f"1 of 100 rows left out, listed in {path}" in capsys.readouterr().out
    assert json.loads(path.read_text()) == {"row": 3, "name": "c.png", "reason": "not a readable image"}
    with pytest.raises(DataError, match=r"1 of 99 rows .* max_bad_fraction is 0\.01.* c\.png: not a readable"):
        report_bad_rows(bad, total=99, max_bad_fraction=0.01, path=path)
    with pytest.raises(DataError, match="1 of 1 rows"):
        report_bad_rows(bad, total=1, max_bad_fraction=1.0, path=path)
    report_bad_rows([], total=100, max_bad_fraction=0.01, path=path)
    assert not path.exists()  # what an earlier try left is not this run's


def test_a_cache_folder_of_datasets_that_cannot_be_used_is_named(tmp_path, monkeypatch):
    import datasets

    datasets.Dataset.from_dict({"prompt": ["1"], "image": ["a.png"]}).to_parquet(str(tmp_path / "set.parquet"))
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(DataError, match=r"file/cache, where `datasets` keeps tables .* HF_DATASETS_CACHE"):
        read_rows(DataConfig(dataset_name=str(tmp_path / "set.parquet")))
