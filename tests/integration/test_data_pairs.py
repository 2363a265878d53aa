"""Preference pairs from tables as Pick-a-Pic v2 and HPDv2 are laid out."""

import hashlib
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prx_post.base.errors import ConfigError, PrxPostError
from prx_post.recipes.pairs import PairsConfig, run
from tests.misbehaving import encoded_image

A, B, C, D = (encoded_image("JPEG", seed=i) for i in range(4))


def pick_a_pic(path, rows):
    """Rows (caption, jpg_0, jpg_1, label_0, label_1, has_label) with the types of the real set."""
    columns = ["caption", "jpg_0", "jpg_1", "label_0", "label_1", "has_label"]
    types = [pa.string(), pa.binary(), pa.binary(), pa.float64(), pa.float64(), pa.bool_()]
    table = pa.table([pa.array(c, t) for c, t in zip(zip(*rows, strict=True), types, strict=True)], columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.append_column("model_0", pa.array(["x"] * len(rows))), path, row_group_size=2)
    return path


def pick_config(source, output_dir, **changes) -> PairsConfig:
    return PairsConfig(
        source=str(source),
        output_dir=str(output_dir),
        prompt_column="caption",
        image_columns=["jpg_0", "jpg_1"],
        score_columns=["label_0", "label_1"],
        labelled_column="has_label",
        **changes,
    )


def hpd_config(source, output_dir, columns=("file_path", "human_preference"), **changes) -> PairsConfig:
    return PairsConfig(
        source=str(source),
        output_dir=str(output_dir),
        image_columns=[columns[0]],
        score_columns=[columns[1]],
        **changes,
    )


def pairs_in(folder):
    """(prompt, chosen bytes, rejected bytes) of every pair, as `datasets` reads the folder."""
    table = datasets.load_dataset("parquet", data_dir=str(folder), split="train")
    assert table.features["chosen"] == datasets.Image()
    assert table[0]["rejected"].size == (40, 30)
    for column in ("chosen", "rejected"):
        table = table.cast_column(column, datasets.Image(decode=False))
    return [(row["prompt"], row["chosen"]["bytes"], row["rejected"]["bytes"]) for row in table]


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_pick_a_pic_gives_chosen_and_rejected_with_their_bytes(tmp_path, capsys):
    rows = [
        ("first wins", A, B, 1.0, 0.0, True),
        ("second wins", A, B, 0.0, 1.0, True),
        ("tie", A, B, 0.5, 0.5, True),
        ("unlabelled", A, B, 0.0, 0.0, False),
        ("broken", A, B[:300], 1.0, 0.0, True),
        ("", A, B, 1.0, 0.0, True),
    ]
    source = pick_a_pic(tmp_path / "source" / "data" / "train-00000.parquet", rows)
    for name in (source, tmp_path / "source"):
        out = tmp_path / f"out-{name.name}"
        run(pick_config(name, out))
        assert pairs_in(out) == [("first wins", A, B), ("second wins", B, A)]
        assert manifest(out)["counts"] == {
            "rows": 6,
            "pairs": 2,
            "ties": 1,
            "rows without a label": 1,
            "images that cannot be used": 1,
            "rows without a prompt or a score for each image": 1,
        }
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert [(d["row"], d["reason"].split(":")[0]) for d in dropped] == [(4, "image 1"), (5, "no prompt")]
    (shard,) = manifest(out)["shards"]
    assert shard["sha256"] == hashlib.sha256((out / shard["file"]).read_bytes()).hexdigest()
    assert "2 pairs in 1 shards" in capsys.readouterr().out


def test_hpd_v2_training_rows_give_the_preferred_image_as_chosen(tmp_path):
    (tmp_path / "train").mkdir()
    for name, data in (("1.jpg", A), ("2.jpg", B)):
        (tmp_path / "train" / name).write_bytes(data)
    entries = [
        {"human_preference": [0, 1], "prompt": "two", "file_path": ["1.jpg", "2.jpg"]},
        {"human_preference": [1, 0], "prompt": "one", "file_path": ["1.jpg", "2.jpg"]},
        {"human_preference": [1, 0], "prompt": "lost", "file_path": ["1.jpg", "3.jpg"]},
        {"human_preference": [1, 0], "prompt": "out", "file_path": ["1.jpg", "../secret.jpg"]},
    ]
    (tmp_path / "secret.jpg").write_bytes(C)
    (tmp_path / "train.json").write_text(json.dumps(entries))
    run(hpd_config(tmp_path / "train.json", tmp_path / "out", image_dir=str(tmp_path / "train")))
    assert pairs_in(tmp_path / "out") == [("two", B, A), ("one", A, B)]
    assert "leads out of image_dir" in (tmp_path / "out" / "dropped.jsonl").read_text()


def test_ranks_give_a_pair_for_every_two_that_differ_the_lower_rank_chosen(tmp_path):
    (tmp_path / "test").mkdir()
    names = []
    for i, data in enumerate((A, B, C, D)):
        (tmp_path / "test" / f"{i}.jpg").write_bytes(data)
        names.append(f"{i}.jpg")
    entry = {"prompt": "p", "image_path": names, "rank": [3, 1, 3, 2], "raw_annotations": []}
    (tmp_path / "test.json").write_text(json.dumps([entry]))
    columns = ("image_path", "rank")
    common = {"image_dir": str(tmp_path / "test"), "higher_is_better": False}
    run(hpd_config(tmp_path / "test.json", tmp_path / "all", columns, **common))
    # B (1) beats D (2), which beats A and C (3 each, a tie)
    assert set(pairs_in(tmp_path / "all")) == {("p", *couple) for couple in ((B, D), (B, A), (B, C), (D, A), (D, C))}
    assert manifest(tmp_path / "all")["counts"]["ties"] == 1
    run(hpd_config(tmp_path / "test.json", tmp_path / "extremes", columns, pairs_per_row="best_worst", **common))
    ((_, best, worst),) = pairs_in(tmp_path / "extremes")
    assert best == B
    assert worst in (A, C)


def test_shards_are_cut_by_size_and_rows_can_be_limited(tmp_path):
    source = pick_a_pic(tmp_path / "s.parquet", [(f"p{i}", A, B, 1.0, 0.0, True) for i in range(6)])
    config = pick_config(source, tmp_path / "out", max_rows=5)
    config.shard_mb = 0  # below one pair: a shard each
    run(config)
    shards = manifest(tmp_path / "out")["shards"]
    assert [(s["file"], s["pairs"]) for s in shards] == [(f"train-0000{i}.parquet", 1) for i in range(5)]
    assert [prompt for prompt, *_ in pairs_in(tmp_path / "out")] == ["p0", "p1", "p2", "p3", "p4"]


def test_a_run_that_broke_off_leaves_no_folder_and_the_next_one_starts_clean(tmp_path, monkeypatch):
    import errno

    from prx_post.recipes import pairs

    source = pick_a_pic(tmp_path / "s.parquet", [("p", A, B, 1.0, 0.0, True)] * 3)
    leftover = tmp_path / ".out.prx-post-partial"
    leftover.mkdir()
    (leftover / "train-00007.parquet").write_bytes(b"half a shard of a killed run")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pairs.pq.ParquetWriter, "write_table", full)
        with pytest.raises(PrxPostError, match="out cannot be written: No space left on device"):
            run(pick_config(source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert not leftover.exists()
    leftover.mkdir()
    (leftover / "train-00007.parquet").write_bytes(b"half a shard of a killed run")
    run(pick_config(source, tmp_path / "out"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "dropped.jsonl",
        "manifest.json",
        "train-00000.parquet",
    ]
    assert not leftover.exists()
    with pytest.raises(PrxPostError, match="must be new or empty"):
        run(pick_config(source, tmp_path / "out"))


def test_mistakes_are_named_before_anything_is_written(tmp_path):
    source = pick_a_pic(tmp_path / "s.parquet", [("p", A, B, 0.5, 0.5, True)])
    with pytest.raises(PrxPostError, match="gives no pair: 1 rows, 1 ties"):
        run(pick_config(source, tmp_path / "out"))
    with pytest.raises(PrxPostError, match="column 'jpg_9' is not in .* which has caption, jpg_0"):
        run(hpd_config(source, tmp_path / "out", ("jpg_9", "label_0"), prompt_column="caption"))
    with pytest.raises(ConfigError, match="must be as many as image_columns because there are 2 image_columns"):
        PairsConfig(source="s", output_dir="o", image_columns=["a", "b"], score_columns=["c"])
    assert not (tmp_path / "out").exists()
