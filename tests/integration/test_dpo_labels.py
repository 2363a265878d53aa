"""`prx-post dpo --loss_type kto`: images that are labelled good or bad one by one."""

import datasets
import pytest

from prx_post.cli import main
from tests.faults import numbers
from tests.pairing import dpo_arguments, number_pairs
from tests.processes import run

KTO = {"loss_type": "kto", "max_steps": 12, "save_steps": 0}


def write(folder, labels, images=None):
    """Images of right numbers (even rows) and wrong ones, with these labels."""
    pairs = number_pairs(len(labels) // 2)
    images = images or [data for pair in pairs for data in (pair.chosen, pair.rejected)]
    rows = {
        "prompt": [pair.prompt for pair in pairs for _ in range(2)],
        "completion": [{"bytes": data, "path": None} for data in images],
        "label": labels,
    }
    folder.mkdir()
    features = {"prompt": datasets.Value("string"), "completion": datasets.Image()}
    features["label"] = datasets.Dataset.from_dict({"label": labels}).features["label"]
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(str(folder / "train.parquet"))
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return write(tmp_path_factory.mktemp("labelled") / "set", [True, False] * 12)


def test_it_learns_to_tell_good_images_from_bad(labelled, warm_cache, tmp_path):
    assert main(dpo_arguments(labelled, warm_cache, tmp_path / "run", **KTO)) == 0
    first, *_, last = numbers(tmp_path / "run")
    assert first["loss"] == pytest.approx(0.5, abs=1e-3)
    assert last["loss"] < 0.48
    assert last["accuracy"] > 0.6
    assert last["margin"] > 0
    assert "12 good and 12 bad images" in (tmp_path / "run" / "final" / "README.md").read_text()


def test_labels_exchanged_are_learned_the_other_way_round(labelled, warm_cache, tmp_path):
    """The good images' error grows."""
    other = write(tmp_path / "set", [False, True] * 12)
    for name, folder in (("right", labelled), ("wrong", other)):
        assert main(dpo_arguments(folder, warm_cache, tmp_path / name, **KTO)) == 0
    from prx_post.model.checkpoint import load

    right, wrong, start = (load(p).transformer for p in (f"{tmp_path}/right/final", f"{tmp_path}/wrong/final", "tiny"))
    moves = [
        sum(float(((p - s) * (q - s)).sum()) for p, q, s in zip(*(n.parameters() for n in nets), strict=True))
        for nets in [(right, wrong, start)]
    ]
    assert moves[0] < 0


@pytest.mark.parametrize("mode", ["ddp", "zero2"])
def test_two_processes_have_one_reference_point(labelled, warm_cache, tmp_path, mode):
    changes = {**KTO, "max_steps": 6, "undesirable_weight": 0.01}  # so that errors fall on the whole
    assert main(dpo_arguments(labelled, warm_cache, tmp_path / "one", **changes)) == 0
    changes |= {"deepspeed": mode} if mode != "ddp" else {}
    run(2, dpo_arguments(labelled, warm_cache, tmp_path / "two", **changes, per_device_train_batch_size=4))
    ours, theirs = numbers(tmp_path / "two"), numbers(tmp_path / "one")
    assert max(line["reference_point"] for line in theirs) > 0
    for name in ("loss", "grad_norm", "reference_point"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=2e-3, abs=2e-3)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 2], "label_column is 'label', which holds 2 in row 1, but must hold true or false (or 1 or 0)"),
        (["good", "bad"], "which holds 'good' in row 0"),
        ([None, True], "which holds None in row 0"),
        ([True, True], "which is True in all 2 rows"),
    ],
)
def test_labels_outside_the_set_are_refused(warm_cache, tmp_path, capsys, labels, message):
    folder = write(tmp_path / "set", labels)
    assert main(dpo_arguments(folder, warm_cache, tmp_path / "run", **KTO)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_labels_as_text_or_numbers_are_understood(tmp_path):
    from prx_post.data.config import PreferenceConfig
    from prx_post.data.labels import read_labelled

    for i, labels in enumerate(([1, 0], ["True", "false"], [1.0, 0.0])):
        rows = read_labelled(PreferenceConfig(dataset_name=str(write(tmp_path / f"{i}", labels))))
        assert rows.labels == [True, False]


def test_an_image_that_cannot_be_read_is_bad_and_listed(warm_cache, tmp_path, capsys):
    (good,) = number_pairs(1)
    folder = write(tmp_path / "set", [True, False], [good.chosen, b"no image"])
    assert main(dpo_arguments(folder, warm_cache, tmp_path / "run", **KTO)) == 2
    assert "1 of 2 rows cannot be used" in capsys.readouterr().err
    assert (tmp_path / "run" / "bad_rows.jsonl").is_file()


def test_a_class_label_is_read_by_its_name(warm_cache, tmp_path, capsys):
    """Its number depends on the order of the names: here good images have 0."""
    folder = write(tmp_path / "set", [True, False])
    path = folder / "train.parquet"
    rows = datasets.load_dataset("parquet", data_files=str(path), split="train")
    for i, names in enumerate((["true", "false"], ["chosen", "rejected"])):
        labelled = rows.remove_columns("label").add_column("label", [0, 1])
        features = labelled.features.copy()
        features["label"] = datasets.ClassLabel(names=names)
        other = tmp_path / f"{i}"
        other.mkdir()
        labelled.cast(features).to_parquet(str(other / "train.parquet"))
    from prx_post.data.config import PreferenceConfig
    from prx_post.data.labels import read_labelled

    assert read_labelled(PreferenceConfig(dataset_name=str(tmp_path / "0"))).labels == [True, False]
    assert main(dpo_arguments(tmp_path / "1", warm_cache, tmp_path / "run", **KTO)) == 2
    assert "which holds 'chosen' in row 0" in capsys.readouterr().err


def test_a_run_is_not_resumed_with_other_labels(labelled, warm_cache, tmp_path, capsys):
    changes = {**KTO, "max_steps": 2, "save_steps": 1}
    assert main(dpo_arguments(labelled, warm_cache, tmp_path / "run", **changes)) == 0
    other = write(tmp_path / "set", [False, True] * 12)
    (tmp_path / "run" / "final").rename(tmp_path / "final")
    assert main(dpo_arguments(other, warm_cache, tmp_path / "run", **{**changes, "max_steps": 4})) == 2
    assert "what is told of them (labels, seeds, scores) differs" in capsys.readouterr().err


def test_kto_needs_more_than_one_image_at_a_time(labelled, warm_cache, tmp_path, capsys):
    call = dpo_arguments(labelled, warm_cache, tmp_path / "run", **KTO, per_device_train_batch_size=1)
    assert main(call) == 2
    assert "per_device_train_batch_size is 1, but must be 2 or more, of all processes" in capsys.readouterr().err
