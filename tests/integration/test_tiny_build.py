"""The recipe of the embedded weights, with a handful of steps in place of thousands."""

import json

import pytest
import torch

from prx_post.base.errors import PrxPostError
from prx_post.model.checkpoint import load
from prx_post.tiny import datasets
from prx_post.tiny.make import build as recipe


@pytest.fixture
def short(monkeypatch):
    for name in ("JUDGE_STEPS", "LANGUAGE_STEPS", "AUTOENCODER_STEPS", "PRETRAIN_STEPS"):
        monkeypatch.setattr(recipe, name, 2)
    monkeypatch.setattr(datasets, "PRETRAIN_SIZE", 64)
    settings = recipe.pretraining_config

    def brief(run, seed):
        config = settings(run, seed)
        config.sample_steps, config.warmup_steps, config.per_device_train_batch_size = 0, 0, 8
        return config

    monkeypatch.setattr(recipe, "pretraining_config", brief)


def test_a_build_makes_a_pipeline_and_a_judge_and_goes_on_where_it_was_broken_off(short, tmp_path, monkeypatch):
    folder = tmp_path / "build"
    with monkeypatch.context() as broken:
        broken.setattr(recipe, "run", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            recipe.build(folder, seed=0)
    judged = (folder / "judge.safetensors").stat().st_mtime_ns

    base = recipe.build(folder, seed=0)
    checkpoint = load(str(base))
    assert (folder / "judge.safetensors").stat().st_mtime_ns == judged
    assert sum(p.numel() for p in checkpoint.transformer.parameters()) == 2_320_208
    assert checkpoint.pipeline.variant == "flux-kl"
    assert checkpoint.pipeline.load_text_encoder().dtype == torch.float32
    assert json.loads((folder / "build.json").read_text())["seed"] == 0

    with pytest.raises(PrxPostError, match="holds a finished build"):
        recipe.build(folder, seed=0)


def test_a_folder_with_something_else_or_of_another_seed_is_left_alone(short, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(PrxPostError, match="must be new or empty"):
        recipe.build(tmp_path / "notes")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "build.json").write_text('{"seed": 7}')
    with pytest.raises(PrxPostError, match="with other settings"):
        recipe.build(tmp_path / "other", seed=0)
    assert [p.name for p in (tmp_path / "notes").iterdir()] == ["a.txt"]
