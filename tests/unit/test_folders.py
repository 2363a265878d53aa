"""Data sets as people have them: names that look like splits, paths that look like patterns, files of other kinds."""

import io
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prx_post.data.config import DataConfig
from prx_post.data.images import decode
from prx_post.data.readers import read_rows
from prx_post.data.rows import DataError


def picture(seed=0, size=(16, 8)):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def image_folder(folder, names):
    """A metadata.jsonl and pictures, captioned by their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(i))
    lines = [json.dumps({"file_name": name, "prompt": f"a picture {name}"}) for name in names]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def parquet(path, captions, column="prompt", kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": picture(i), "path": None} for i in range(len(captions))]
    image = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"image": image, column: pa.array(captions, kind or pa.string())}), path)
    return path


def prompts(folder, **settings):
    return read_rows(DataConfig(dataset_name=str(folder), **settings)).prompts


@pytest.mark.parametrize(
    "names",
    [
        ["train_station.png", "b.png", "c.png"],
        ["a.png", "test shot.png", "val.png", "dev-1.png"],
        ["validation.png", "eval_3.png", "train.png"],
        ["train/a.png", "boats/b.png"],
        ["2024 training day/a.png", "eval/b.png", "c.png"],
    ],
)
def test_a_name_of_a_picture_makes_no_split(tmp_path, names):
    assert prompts(image_folder(tmp_path / "set", names)) == [f"a picture {name}" for name in names]


@pytest.mark.parametrize(
    "folders", [("boat", "train", "plane"), ("eval", "photos"), ("my test set", "validation"), ("dev", "dev2")]
)
def test_a_name_of_a_folder_makes_no_split(tmp_path, folders):
    for name in folders:
        image_folder(tmp_path / name, ["a.png", "b.png"])
    assert len(prompts(tmp_path)) == 2 * len(folders)


@pytest.mark.parametrize(
    "names",
    [
        ("night-train.parquet", "boats.parquet"),
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("validation/a.parquet", "a.parquet"),
    ],
)
def test_a_name_of_a_parquet_file_makes_no_split(tmp_path, names):
    for name in names:
        parquet(tmp_path / name, [name])
    assert sorted(prompts(tmp_path)) == sorted(names)


def test_a_split_that_is_asked_for_is_of_those_names(tmp_path):
    for name in ("train-00000-of-00001.parquet", "test/a.parquet", "tests.parquet"):
        parquet(tmp_path / name, [name])
    assert prompts(tmp_path, dataset_split="train") == ["train-00000-of-00001.parquet"]
    assert prompts(tmp_path, dataset_split="test") == ["test/a.parquet"]
    with pytest.raises(DataError, match="dataset_split is 'dev', but no file or folder in .* is called so"):
        prompts(tmp_path, dataset_split="dev")


def test_a_split_is_of_folders_not_of_what_pictures_are_called(tmp_path):
    for name in ("a.png", "train_station.png", "train.png"):
        (tmp_path / name).write_bytes(picture())
        (tmp_path / name).with_suffix(".txt").write_text(name)
    assert len(prompts(tmp_path, dataset_split="train")) == 3  # saved configurations of earlier versions ask for it
    with pytest.raises(DataError, match="dataset_split is 'a', but no file or folder"):
        prompts(tmp_path, dataset_split="a")


def test_a_table_may_name_images_of_several_splits(tmp_path):
    folder = image_folder(tmp_path / "set", ["train/a.png", "test/a.png", "test/b.png"])
    assert prompts(folder, dataset_split="test") == ["a picture test/a.png", "a picture test/b.png"]
    assert prompts(folder, dataset_split="train") == ["a picture train/a.png"]
    assert len(prompts(folder)) == 3


def test_a_split_may_be_a_link(tmp_path):
    for part in ("p1", "p2"):
        image_folder(tmp_path / "set" / "all" / part, [f"{part}.png"])
    for split, part in (("train", "p1"), ("val", "p2")):
        (tmp_path / "set" / split).symlink_to(tmp_path / "set" / "all" / part)
        assert prompts(tmp_path / "set", dataset_split=split) == [f"a picture {part}.png"]
    assert len(prompts(tmp_path / "set")) == 2


def test_a_set_without_splits_is_all_train(tmp_path):
    assert len(prompts(image_folder(tmp_path / "set", ["a.png", "b.png"]), dataset_split="train")) == 2


def test_links_are_followed_once(tmp_path):
    elsewhere = image_folder(tmp_path / "elsewhere", ["a.png", "b.png"])
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(elsewhere)
    (tmp_path / "set" / "back").symlink_to(tmp_path / "set")
    assert len(prompts(tmp_path / "set")) == 2


@pytest.mark.parametrize("name", ["set[12]", "set*", "set?", "{set1,set2}", "set[!1]"])
@pytest.mark.parametrize("kind", ["images", "parquet"])
def test_a_path_is_no_pattern(tmp_path, name, kind):
    for own, count in (("set1", 3), ("set2", 4), (name, 2)):
        captions = [f"{own} {i}" for i in range(count)]
        if kind == "parquet":
            parquet(tmp_path / own / "part.parquet", captions)
        else:
            image_folder(tmp_path / own, [f"{i}.png" for i in range(count)])
    assert len(prompts(tmp_path / name)) == 2


@pytest.mark.parametrize("name", ["part[0-9].parquet", "part*.parquet"])
def test_a_file_is_no_pattern(tmp_path, name):
    parquet(tmp_path / "part1.parquet", ["wrong"])
    assert prompts(parquet(tmp_path / name, ["right"])) == ["right"]


@pytest.mark.parametrize("other", ["notes.txt", "_SUCCESS", "LICENSE", "README.md", "stray.png", ".part.crc", "a.json"])
def test_files_of_other_kinds_beside_parquet_are_left_alone(tmp_path, other):
    folder = tmp_path / "pq_notes.txt"
    parquet(folder / "part.parquet", ["one", "two"])
    (folder / other).write_bytes(b"hello")
    assert prompts(folder) == ["one", "two"]


@pytest.mark.parametrize("column", ["image", "file_name"])
def test_pictures_beside_a_parquet_of_their_paths_are_found(tmp_path, column):
    for folder, seed in (("one", 1), ("two", 2)):
        (tmp_path / folder / "pictures").mkdir(parents=True)
        (tmp_path / folder / "pictures" / "a.png").write_bytes(picture(seed))
        table = pa.table({column: ["pictures/a.png", "pictures/b.png"], "prompt": [f"{folder} a", f"{folder} b"]})
        pq.write_table(table, tmp_path / folder / "table.parquet")
    rows = read_rows(DataConfig(dataset_name=str(tmp_path)))
    assert [rows.image_bytes(i) for i in (0, 2)] == [picture(1), picture(2)]
    assert rows.name(2) == str(tmp_path / "two" / "pictures" / "a.png")
    with pytest.raises(OSError, match="No such file"):
        rows.image_bytes(3)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_every_kind_of_text_is_text(tmp_path, kind):
    assert prompts(parquet(tmp_path / "a.parquet", ["one", "zwei"], kind=kind)) == ["one", "zwei"]


@pytest.mark.parametrize(
    "captions", [["007", "008", "010"], ["None", "NA", "null", "nan"], ["1e5", "True", " spaced ", "0x10"]]
)
def test_cells_of_a_csv_are_text_as_written(tmp_path, captions):
    for i in range(len(captions)):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    lines = ["file_name,prompt", *(f"{i}.png,{caption}" for i, caption in enumerate(captions))]
    (tmp_path / "metadata.csv").write_text("\ufeff" + "\r\n".join(lines))
    assert prompts(tmp_path) == captions


def test_cells_of_a_csv_hold_quotes_commas_and_line_ends(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "metadata.csv").write_text('file_name,prompt\na.png,"a ""red"" cube,\non a table"\n')
    assert prompts(tmp_path) == ['a "red" cube,\non a table']


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,prompt\na.png,one,two\n", r"metadata\.csv, line 2 has 3 cells, but must have 2"),
        ("name,prompt\na.png,one\n", r"metadata\.csv has the columns name, prompt, but must have file_name"),
        ('file_name,prompt\na.png,"one\n', r"metadata\.csv, line 2 is no CSV: unexpected end of data"),
        ("", r"metadata\.csv has the columns of nothing, but must have file_name"),
    ],
)
def test_a_csv_that_is_none_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        prompts(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"file_name": "a.png", "prompt": "caf\xe9"}', "line 2 is not UTF-8"),
        (b"{'file_name': 'a.png'}", "line 2 is no JSON: Expecting property name"),
        (b'["a.png", "one"]', "line 2 is no JSON object"),
        (b'{"file_name": 7, "prompt": "one"}', "line 2: file_name is 7, but must be a path"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line, message):
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "prompt": "one"}\n' + line)
    with pytest.raises(DataError, match=rf"metadata\.jsonl, {message}"):
        prompts(tmp_path)


def test_a_row_without_a_file_is_a_bad_row_of_its_own(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "metadata.csv").write_text("file_name,text\n,hello\na.png,world\n")
    rows = read_rows(DataConfig(dataset_name=str(tmp_path)))
    assert rows.prompts == ["hello", "world"]
    with pytest.raises(OSError, match="the cell is empty"):
        rows.image_bytes(0)
    assert rows.image_bytes(1) == picture()


def test_a_column_called_image_beside_file_name_is_left_alone(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    row = {"file_name": "a.png", "image": "https://example.org/a.png", "text": "hello"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    assert read_rows(DataConfig(dataset_name=str(tmp_path))).image_bytes(0) == picture()


def test_text_files_beside_images_are_their_captions(tmp_path):
    for name, caption in (("a.PNG", " a red cube\n"), ("sub/b.png", "\ufeffzwei")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture())
        path.with_suffix(".TXT").write_text(caption)
    (tmp_path / "c.png").write_bytes(picture())
    (tmp_path / "readme.txt").write_text("about these")
    rows = read_rows(DataConfig(dataset_name=str(tmp_path)))
    assert rows.prompts == ["a red cube", None, "zwei"]
    assert rows.notes == ["1 text without an image (such as readme.txt)"]


def test_images_that_no_table_names_are_counted(tmp_path):
    folder = image_folder(tmp_path / "set", ["a.png", "sub/b.png"])
    (folder / "sub" / "d.png").write_bytes(picture())
    (folder / "c.png").write_bytes(picture())
    assert read_rows(DataConfig(dataset_name=str(folder))).notes == ["2 images without a caption (such as c.png)"]


def test_two_tables_of_one_folder_are_refused(tmp_path):
    folder = image_folder(tmp_path / "set", ["a.png"])
    (folder / "metadata.csv").write_text("file_name,prompt\na.png,one\n")
    with pytest.raises(DataError, match=r"has both metadata\.csv and metadata\.jsonl\. Remove one"):
        prompts(folder)


def test_a_table_itself_may_be_named(tmp_path):
    folder = image_folder(tmp_path / "set", ["a.png"])
    assert prompts(folder / "metadata.jsonl") == ["a picture a.png"]


@pytest.mark.parametrize("column", ["prompt", "text", "caption"])
def test_the_caption_column_is_found(tmp_path, column):
    assert prompts(parquet(tmp_path / "a.parquet", ["one"], column)) == ["one"]


def test_the_caption_column_is_asked_for_if_none_has_a_known_name(tmp_path):
    path = parquet(tmp_path / "a.parquet", ["one"], "description")
    with pytest.raises(DataError, match=r"has the columns image, description, none of .* prompt, text, caption\. Set"):
        prompts(path)
    assert prompts(path, prompt_column="description") == ["one"]


def test_prompt_is_taken_before_text(tmp_path):
    path = parquet(tmp_path / "a.parquet", ["one"])
    table = pq.read_table(path)
    pq.write_table(table.append_column("text", pa.array(["other"])), path)
    assert prompts(path) == ["one"]


@pytest.mark.parametrize("split", [None, "train", "test"])
def test_a_saved_set_is_read(tmp_path, split):
    captions = {"train": ["one", "two"], "test": ["three"]}
    sets = {
        name: datasets.Dataset.from_dict(
            {"image": [{"bytes": picture(i), "path": None} for i in range(len(texts))], "caption": texts}
        ).cast_column("image", datasets.Image())
        for name, texts in captions.items()
    }
    if split is None:
        sets["train"].save_to_disk(tmp_path / "set")
    else:
        datasets.DatasetDict(sets).save_to_disk(tmp_path / "set")
    rows = read_rows(DataConfig(dataset_name=str(tmp_path / "set"), dataset_split=split))
    assert rows.prompts == captions[split or "train"]
    assert decode(rows.image_bytes(0)).size == (16, 8)


def test_a_split_that_a_saved_set_lacks_is_refused(tmp_path):
    one = datasets.Dataset.from_dict({"image": [{"bytes": picture(), "path": None}], "prompt": ["one"]})
    one.save_to_disk(tmp_path / "one")
    with pytest.raises(DataError, match="dataset_split is 'dev', but .* is a set without splits"):
        prompts(tmp_path / "one", dataset_split="dev")
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match="dataset_split is 'dev', but .* has train, test"):
        prompts(tmp_path / "set", dataset_split="dev")


def test_archives_are_refused_with_what_unpacks_them(tmp_path):
    (tmp_path / "00000.tar").write_bytes(b"")
    for name in (tmp_path, tmp_path / "00000.tar"):
        with pytest.raises(DataError, match=r"00000\.tar is an archive.* tar -xf .*00000\.tar -C .*/00000$"):
            prompts(name)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "is empty, but must have images or parquet"),
        (["a.doc"], r"has files ending in \.doc, but must have images"),
        (["a.png", "a.json"], r"Captions are read from metadata\.jsonl, which this writes: prx-post data image-folder"),
        (["a.png", "captions.csv"], r"captions\.csv is not read: if it has the captions, call it metadata\.csv"),
        (["a.png", "b.jpg"], "has images, but no caption: neither a text file beside each"),
    ],
)
def test_a_folder_without_captions_says_what_it_has(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_bytes(picture())
    with pytest.raises(DataError, match=message):
        prompts(tmp_path)


@pytest.mark.parametrize("name", ["my pictures", "pictures/", "set.parquet", "data/set.parquet", "C:\\pictures", "äh"])
def test_what_can_be_no_hub_id_is_a_missing_path_at_once(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prx_post.data.hub._look_up", lambda name: pytest.fail("the Hub was asked"))
    with pytest.raises(DataError, match="there is no such file or folder. Check the path"):
        prompts(name)
