"""`prx-post dpo` on a few pairs: it learns to prefer, resumes to the bit, and every reference gives the same losses."""

import math
import shutil

import pytest

from prx_post.cli import main
from tests.faults import differences, numbers
from tests.pairing import dpo_arguments, number_pairs, write_pairs
from tests.processes import free_port, run

LORA = {"use_peft": "true", "lora_r": 4, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(number_pairs(24), tmp_path_factory.mktemp("pairs") / "set")


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_it_begins_at_log_2_and_learns_to_prefer_the_chosen_images(pairs, warm_cache, tmp_path, changes):
    call = dpo_arguments(pairs, warm_cache, tmp_path / "run", max_steps=20, save_steps=0, **changes)
    assert main(call) == 0
    first, *_, last = numbers(tmp_path / "run")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert first["margin"] == pytest.approx(0, abs=1e-2)
    assert last["loss"] < 0.9 * math.log(2)
    assert last["accuracy"] > 0.6
    assert last["win_change"] < last["lose_change"]
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert "| Stage | dpo |" in card
    assert "24 of 24 preference pairs" in card


@pytest.mark.parametrize("changes", [{}, {**LORA, "lora_dropout": 0.2}], ids=["full", "lora"])
def test_a_resumed_run_is_bit_identical(pairs, warm_cache, tmp_path, changes):
    assert main(dpo_arguments(pairs, warm_cache, tmp_path / "whole", **changes)) == 0
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-000002", broken / "checkpoint-000002")
    for name in ("metrics.jsonl", "samples.jsonl"):
        shutil.copy(tmp_path / "whole" / name, broken / name)
    assert main(dpo_arguments(pairs, warm_cache, broken, **changes)) == 0
    assert differences(broken, tmp_path / "whole") == []


@pytest.fixture(scope="module")
def of_one(pairs, warm_cache, tmp_path_factory):
    """Losses and gradient norms of one process."""
    folder = tmp_path_factory.mktemp("one")
    for name, changes in (("full", {}), ("lora", LORA)):
        assert main(dpo_arguments(pairs, warm_cache, folder / name, **changes)) == 0
    return {name: numbers(folder / name) for name in ("full", "lora")}


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *(("ddp", "full"), ("ddp", "lora"), ("zero1", "full"), ("zero2", "full"), ("zero2", "lora")),
        *(("zero3", "full"), ("zero3", "lora")),
    ],
)
def test_two_processes_compute_what_one_does(pairs, warm_cache, tmp_path, of_one, mode, kind):
    changes = {**(LORA if kind == "lora" else {}), "per_device_train_batch_size": 4}
    changes |= {"deepspeed": mode} if mode != "ddp" else {}
    run(2, dpo_arguments(pairs, warm_cache, tmp_path / "run", **changes))
    ours, theirs = numbers(tmp_path / "run"), of_one[kind]
    for name in ("loss", "grad_norm", "margin"):
        # β multiplies differences of errors by 250, and with them their rounding of 1e-7
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=1e-3, abs=1e-3)


def test_the_documented_command_for_zero_2(pairs, warm_cache, tmp_path, of_one, prx_post):
    """`prx-post dpo --config FILE --accelerate_config zero2 --num_processes 2`"""
    call = dpo_arguments(pairs, warm_cache, tmp_path / "run", per_device_train_batch_size=4)
    values = {**dict(zip(call[1::2], call[2::2], strict=True)), "--report_to": "[]"}
    config = tmp_path / "dpo.yaml"
    config.write_text("".join(f"{name.removeprefix('--')}: {value}\n" for name, value in values.items()))
    flags = ["--accelerate_config", "zero2", "--num_processes", "2", "--main_process_port", free_port()]
    prx_post("dpo", "--config", config, *flags, check=True)
    ours, theirs = numbers(tmp_path / "run"), of_one["full"]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-3, abs=1e-3)
    assert (tmp_path / "run" / "final" / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0}, "beta is 0.0, but must be above 0"),
        ({"beta": -1}, "beta is -1.0, but must be above 0"),
        ({"loss_type": "kl"}, "loss_type is 'kl', but must be one of sigmoid, hinge, ipo"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5, but must be below 0.5"),
        (
            {"label_smoothing": 0.1, "loss_type": "ipo"},
            "label_smoothing is 0.1, but must be 0.0 because loss_type is 'ipo', which does not use it",
        ),
        ({"dataset_name": "nowhere/at/all"}, "there is no such file or folder"),
        ({"height": "null"}, "height"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(pairs, tmp_path, capsys, changes, message):
    assert main(dpo_arguments(pairs, tmp_path / "cache", tmp_path / "run", **changes)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_parquet_that_is_cut_off_is_named(pairs, tmp_path, capsys):
    folder = tmp_path / "set"
    shutil.copytree(pairs, folder)
    (shard,) = folder.glob("*.parquet")
    shard.write_bytes(shard.read_bytes()[:-200])
    assert main(dpo_arguments(folder, tmp_path / "cache", tmp_path / "run")) == 2
    assert "could not be read" in capsys.readouterr().err


def test_it_is_planned_with_its_reference(pairs, tmp_path, capsys):
    """A frozen copy of every weight; none where the adapter is switched off."""
    for changes, weights in (
        ({}, "fp32, 0.009 GiB of other networks"),
        ({"use_peft": "true"}, "fp32, the frozen ones"),
    ):
        call = dpo_arguments(pairs, tmp_path / "cache", tmp_path / "run", **changes)
        assert main(["plan", "--stage", *call]) == 0
        assert weights in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
