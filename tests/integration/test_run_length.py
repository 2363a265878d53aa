"""How long a run is, what it says of itself, and finished runs that are asked for more."""

import pytest
from accelerate import Accelerator
from safetensors.torch import load_file

from prx_post.base.errors import PrxPostError
from prx_post.engine import tracking
from tests.faults import numbers, weights
from tests.integration.test_sft import settings
from tests.running import train_sft as train


def test_a_finished_run_goes_on_if_more_steps_are_asked_for(image_folder, warm_cache, tmp_path, capsys):
    common = {"resume_from_checkpoint": "latest", "save_steps": 2, "lr_scheduler_type": "constant"}
    run, emitted = tmp_path / "run", "transformer/diffusion_pytorch_model.safetensors"
    train(*settings(image_folder, warm_cache, run, max_steps=2, **common))
    first = (run / "final" / emitted).read_bytes()
    train(*settings(image_folder, warm_cache, run, max_steps=2, **common))
    assert "has finished: there is nothing to do" in capsys.readouterr().out
    train(*settings(image_folder, warm_cache, run, max_steps=4, **common))
    assert "the run had finished; its pipeline is kept as final-000002\n" in capsys.readouterr().out
    assert (run / "final-000002" / emitted).read_bytes() == first
    train(*settings(image_folder, warm_cache, tmp_path / "whole", max_steps=4, **common))
    assert (run / "final" / emitted).read_bytes() == (tmp_path / "whole" / "final" / emitted).read_bytes()
    assert [line["step"] for line in numbers(run)] == [1, 2, 3, 4]


def test_what_a_finished_run_emitted_is_left_where_it_is_until_it_goes_on(image_folder, warm_cache, tmp_path):
    common = {"resume_from_checkpoint": "latest", "max_steps": 2}
    run = tmp_path / "run"
    train(*settings(image_folder, warm_cache, run, save_steps=2, **common))
    with pytest.raises(PrxPostError, match="optim is 'muon', but must be 'adamw'"):
        train(*settings(image_folder, warm_cache, run, **{**common, "max_steps": 4, "optim": "muon"}))
    assert (run / "final").is_dir()
    train(*settings(image_folder, warm_cache, tmp_path / "unsaved", save_steps=0, **common))
    with pytest.raises(PrxPostError, match="has finished with 2 and has no checkpoint to resume from"):
        train(*settings(image_folder, warm_cache, tmp_path / "unsaved", **{**common, "max_steps": 4}))


def test_a_resumed_run_goes_on_with_its_run_at_wandb(image_folder, warm_cache, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["wandb"])
    monkeypatch.setattr(
        Accelerator, "init_trackers", lambda self, project, config, init_kwargs: started.append((project, init_kwargs))
    )
    asked = {"report_to": ["wandb"], "project": "ours", "entity": "us", "resume_from_checkpoint": "latest"}
    for name, steps in (("run", 2), ("run", 4), ("other", 2)):
        train(*settings(image_folder, warm_cache, tmp_path / name, max_steps=steps, save_steps=2, **asked))
    (project, first), (_, again), (_, other) = started
    assert project == "ours"
    assert first["wandb"] == {"name": "run", "id": first["wandb"]["id"], "resume": "allow", "entity": "us"}
    assert again["wandb"]["id"] == first["wandb"]["id"]
    assert other["wandb"]["id"] != first["wandb"]["id"]


def test_epochs_say_how_many_steps_a_run_has_also_when_it_goes_on(image_folder, warm_cache, tmp_path, capsys):
    """Of 48 images in batches of 32: 1.5 steps each."""
    common = {"resume_from_checkpoint": "latest", "save_steps": 1, "lr_scheduler_type": "constant"}
    common |= {"per_device_train_batch_size": 32, "max_steps": 99}
    run = tmp_path / "run"
    train(*settings(image_folder, warm_cache, run, num_train_epochs=1, **common))
    said = capsys.readouterr().out
    assert "  steps   2, which is 1.33 epochs of 1.5 steps\n" in said
    assert [line["step"] for line in numbers(run)] == [1, 2]
    train(*settings(image_folder, warm_cache, run, num_train_epochs=1, **common))
    assert "has finished: there is nothing to do" in capsys.readouterr().out
    train(*settings(image_folder, warm_cache, run, num_train_epochs=2, **common))
    said = capsys.readouterr().out
    assert "the run had finished; its pipeline is kept as final-000002\n" in said
    assert "resuming with num_train_epochs 2.0; it was 1.0\n" in said
    assert [line["step"] for line in numbers(run)] == [1, 2, 3]


def test_a_run_says_what_it_is_about_to_do(image_folder, warm_cache, tmp_path, capsys):
    run = tmp_path / "run"
    lora = {"use_peft": True, "lora_r": 4, "gradient_accumulation_steps": 2, "report_to": ["tensorboard"]}
    train(*settings(image_folder, warm_cache, run, max_steps=2, per_device_train_batch_size=12, **lora))
    said = capsys.readouterr().out
    assert "  steps   2, which is 1 epoch of 2 steps\n" in said
    (adapter,) = (run / "final-adapter").glob("*.safetensors")
    trained, whole = (sum(v.numel() for v in tensors.values()) for tensors in (load_file(adapter), weights(run)))
    assert f"  trains  {trained:,} of {trained + whole:,} parameters\n" in said
    assert "  batch   24 in a step: 12 on each of 1 device, 2 times\n" in said
    assert f"  cache   {warm_cache}\n" in said
    assert f"  watch   tensorboard --logdir {run / 'logs'}\n" in said
