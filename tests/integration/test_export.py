"""Pipelines of checkpoints that a run saved on its way."""

import json

import pytest
from safetensors.torch import load_file

from prx_post.base.errors import PrxPostError
from prx_post.engine.checkpointing import DamagedCheckpoint
from prx_post.model.inference import Inference
from prx_post.stages import export
from tests.integration.test_sft import settings, weights
from tests.running import train_sft as train

SAVED = {"save_steps": 2, "max_steps": 4, "ema_decay": 0.5}


@pytest.fixture(scope="module")
def finished(image_folder, warm_cache, tmp_path_factory):
    run = tmp_path_factory.mktemp("exported") / "run"
    train(*settings(image_folder, warm_cache, run, **SAVED))
    return run


def exported(checkpoint, target):
    export.run(["--checkpoint", str(checkpoint), "--output_dir", str(target)])
    return target


def same(one, other):
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_a_checkpoint_becomes_the_pipeline_that_the_run_would_have_emitted(finished, tmp_path, capsys):
    last = exported(finished / "checkpoint-000004", tmp_path / "last")
    assert f"pipeline in {last}" in capsys.readouterr().out
    assert same(weights(last), weights(finished / "final"))
    first = exported(finished / "checkpoint-000002", tmp_path / "first")
    assert not same(weights(first), weights(last))
    assert Inference.read(first) == Inference(2, 5.0, 32, 64)
    card = (first / "README.md").read_text()
    assert "# run, step 2\n" in card
    assert "| optimizer steps | 2 |" in card


def test_a_run_means_its_newest_checkpoint(finished, tmp_path):
    assert same(weights(exported(finished, tmp_path / "new")), weights(finished / "final"))


def test_without_an_average_the_weights_themselves_are_exported(image_folder, warm_cache, tmp_path):
    train(*settings(image_folder, warm_cache, tmp_path / "run", **{**SAVED, "ema_decay": 0.0}))
    assert same(weights(exported(tmp_path / "run", tmp_path / "new")), weights(tmp_path / "run" / "final"))


def test_of_an_adapter_both_are_exported(image_folder, warm_cache, tmp_path):
    train(*settings(image_folder, warm_cache, tmp_path / "run", use_peft=True, lora_r=4, **SAVED))
    exported(tmp_path / "run", tmp_path / "new")
    assert same(weights(tmp_path / "new"), weights(tmp_path / "run" / "final"))
    name = "adapter_model.safetensors"
    assert same(load_file(tmp_path / "new-adapter" / name), load_file(tmp_path / "run" / "final-adapter" / name))


def test_what_cannot_be_exported_is_refused(finished, tmp_path):
    with pytest.raises(PrxPostError, match="is no checkpoint, nor a run with one"):
        exported(tmp_path, tmp_path / "new")
    with pytest.raises(PrxPostError, match="must be new or empty"):
        exported(finished, finished)
    damaged = tmp_path / "checkpoint-000002"
    damaged.mkdir()
    info = json.loads((finished / "checkpoint-000002" / "state.json").read_text())
    (damaged / "state.json").write_text(json.dumps(info))
    with pytest.raises(DamagedCheckpoint, match="is missing"):
        exported(damaged, tmp_path / "new")
    assert not (tmp_path / "new").exists()
