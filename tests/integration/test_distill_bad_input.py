"""What a user of `prx-post distill` gets wrong: said early, and nothing is made or lost."""

import dataclasses
import json
import shutil

import pytest

from prx_post.base.errors import ConfigError, PrxPostError
from prx_post.model.checkpoint import open_pipeline
from prx_post.stages.compatibility import check_fit
from prx_post.stages.distill.pipelines import student_scheduler
from tests.distilling import settings
from tests.integration.test_bad_input import no_models
from tests.running import train_distill as train


def test_what_does_not_fit_is_said_before_a_model_loads(prompts_file, dc_ae_pipeline, tmp_path, monkeypatch):
    no_models(monkeypatch)
    (tmp_path / "empty.jsonl").write_text("")
    for changes, message in (
        ({"teacher_model_name_or_path": str(dc_ae_pipeline)}, "transformer with .* but the teacher .* must understand"),
        ({"method": ["ladd"], "head_blocks": [6]}, r"head_blocks is \[6\], but must be below 6"),
        ({"prompts_file": str(tmp_path / "none.jsonl")}, "prompts_file is .* there is no such file"),
        ({"prompts_file": str(tmp_path / "empty.jsonl")}, "has no prompts"),
        ({"width": 60}, "width is 60, but must be a multiple of 8"),
        ({"eval_steps": 2, "eval_prompts_file": "nowhere"}, "eval_prompts_file is 'nowhere'"),
    ):
        with pytest.raises(PrxPostError, match=message):
            train(
                *settings(**{"prompts": prompts_file, "cache_dir": tmp_path, "output_dir": tmp_path / "run"} | changes)
            )
        assert not (tmp_path / "run").exists()


def test_teacher_and_student_of_different_vaes_do_not_fit():
    tiny = open_pipeline("tiny")
    other = dataclasses.replace(tiny, configs={**tiny.configs, "vae": {**tiny.configs["vae"], "scaling_factor": 9.0}})
    with pytest.raises(PrxPostError, match="vae with scaling_factor"):
        check_fit(tiny, other, "teacher")


def test_defaults_that_a_file_leaves_out_are_no_difference():
    """As between checkpoints that were saved by an older and a newer diffusers."""
    tiny = open_pipeline("tiny")
    shorter = {k: v for k, v in tiny.configs["transformer"].items() if k not in ("resolution_embeds", "theta")}
    check_fit(tiny, dataclasses.replace(tiny, configs={**tiny.configs, "transformer": shorter}), "teacher")
    changed = dataclasses.replace(tiny, configs={**tiny.configs, "transformer": {**shorter, "theta": 5}})
    with pytest.raises(PrxPostError, match="transformer with theta 10000, but the teacher tiny has 5"):
        check_fit(tiny, changed, "teacher")


def test_a_teacher_with_another_text_encoder_is_refused(prompts_file, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(open_pipeline("tiny").path, other)
    file = other / "tokenizer" / "tokenizer_config.json"
    file.write_text(file.read_text() + "\n")
    changes = {"teacher_model_name_or_path": str(other)}
    with pytest.raises(PrxPostError, match="has another tokenizer than the teacher"):
        train(*settings(prompts_file, tmp_path / "cache", tmp_path / "run", **changes))
    assert not (tmp_path / "cache" / "teacher-latents").exists()


def test_a_share_of_real_images_that_no_batch_can_hold_is_an_error(prompts_file, image_folder, tmp_path):
    changes = {"real_fraction": 0.1, "dataset_name": str(image_folder)}
    with pytest.raises(ConfigError, match="real_fraction is 0.1, but must be enough .* a step takes 4 samples"):
        train(*settings(prompts_file, tmp_path / "cache", tmp_path / "run", **changes))


def test_a_misspelt_folder_of_real_images_is_found_before_anything_is_made(prompts_file, tmp_path, monkeypatch):
    no_models(monkeypatch)
    changes = {"real_fraction": 0.5, "dataset_name": "./nothing"}
    with pytest.raises(PrxPostError, match="dataset_name is './nothing'"):
        train(*settings(prompts_file, tmp_path / "cache", tmp_path / "run", **changes))


def test_a_scheduler_that_cannot_give_the_steps_is_an_error(tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(open_pipeline("tiny").path, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_dynamic_shifting": True}))
    config = settings(tmp_path, tmp_path, tmp_path)[2]
    with pytest.raises(ConfigError, match="num_inference_steps is 4, but the teacher's scheduler cannot give it"):
        student_scheduler(open_pipeline(str(folder)), config)


def test_a_teacher_without_guidance_is_warned_about(prompts_file, warm_cache, tmp_path, capsys):
    train(*settings(prompts_file, warm_cache, tmp_path / "run", teacher_guidance_scale=1.0, max_steps=1))
    assert "warning: teacher_guidance_scale is 1" in capsys.readouterr().out


def test_a_run_is_not_resumed_with_other_heads(prompts_file, warm_cache, tmp_path):
    common = {"method": ["ladd"], "save_steps": 2, "max_steps": 2}
    train(*settings(prompts_file, warm_cache, tmp_path / "run", head_blocks=[1], **common))
    shutil.rmtree(tmp_path / "run" / "final")
    changes = {**common, "head_blocks": [2], "resume_from_checkpoint": "latest", "max_steps": 3}
    with pytest.raises(PrxPostError, match=r"head_blocks is \[2\], but must be \[1\]"):
        train(*settings(prompts_file, warm_cache, tmp_path / "run", **changes))
