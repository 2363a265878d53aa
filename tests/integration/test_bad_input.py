"""What a user gets wrong: one line, exit code 2, nothing overwritten, no model loaded where that can be helped."""

import json

import pytest

from prx_post.data.rows import DataError
from tests.integration.test_sft import settings
from tests.running import train_sft as train


def no_models(monkeypatch):
    from prx_post.model.checkpoint import PipelineFolder

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    for name in ("load_text_encoder", "load_vae", "load_transformer"):
        monkeypatch.setattr(PipelineFolder, name, refuse)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rat", "1"], "learning_rat on the command line is not a setting"),
        (["--max_steps", "many"], "max_steps: invalid int value: 'many'"),
        (["--model_name_or_path", "./nowhere"], "there is no such folder"),
        (["--width", "60"], "width is 60, but must be a multiple of 8"),
        (["--prompt_column", "caption"], "prompt_column is 'caption'"),
        (["--dataset_name", "./nothing"], "there is no such file or folder"),
    ],
)
def test_one_line_and_exit_code_two(prx_post, image_folder, tmp_path, flags, message):
    common = ["--model_name_or_path", "tiny", "--dataset_name", image_folder, "--height", 32, "--width", 64]
    result = prx_post("sft", *common, "--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache", *flags)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_what_can_be_known_early_is_said_before_a_model_loads(image_folder, tmp_path, warm_cache, monkeypatch):
    from prx_post.base.errors import PrxPostError
    from prx_post.engine import tracking

    no_models(monkeypatch)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard"])
    for changes, message in (
        ({"use_peft": True, "lora_target_modules": ["to_q"]}, "'to_q' is no linear layer"),
        ({"report_to": ["wandb"]}, "report_to is 'wandb', which is not installed here"),
        ({"output_dir": "/proc/run"}, "cannot be made"),
    ):
        with pytest.raises(PrxPostError, match=message):
            train(*settings(image_folder, warm_cache, **{"output_dir": tmp_path / "run", **changes}))


def test_processes_that_do_not_see_each_other_are_an_error(image_folder, tmp_path, warm_cache, monkeypatch):
    from prx_post.base.errors import PrxPostError

    no_models(monkeypatch)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PrxPostError, match="WORLD_SIZE is 2, but RANK is not set"):
        train(*settings(image_folder, warm_cache, tmp_path / "run"))


def test_an_output_dir_with_another_run_is_left_alone(image_folder, tmp_path, warm_cache, monkeypatch):
    from prx_post.base.errors import PrxPostError

    no_models(monkeypatch)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("precious")
    with pytest.raises(PrxPostError, match="must be new or empty because nothing is overwritten"):
        train(*settings(image_folder, warm_cache, tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.yaml"]
    assert (tmp_path / "run" / "config.yaml").read_text() == "precious"


def damaged_folder(image_folder, tmp_path, damage):
    import shutil

    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    damage(folder)
    return folder


def truncate(folder):
    path = folder / "00007.png"
    path.write_bytes(path.read_bytes()[:200])


def replace_prompt(folder, row, prompt):
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    lines[row] = json.dumps({**json.loads(lines[row]), "prompt": prompt})
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("cache", ["disk", "none"])
def test_an_unreadable_image_is_counted_named_and_left_out(image_folder, tmp_path, cache):
    folder = damaged_folder(image_folder, tmp_path, truncate)
    run = tmp_path / "run"
    train(*settings(folder, tmp_path / "cache", run, cache=cache, max_bad_fraction=0.05, max_steps=1))
    (bad,) = [json.loads(line) for line in (run / "bad_rows.jsonl").read_text().splitlines()]
    assert bad["row"] == 7
    assert bad["name"].endswith("00007.png")
    assert "47 of 48 images" in (run / "final" / "README.md").read_text()


@pytest.mark.parametrize("cache", ["disk", "none"])
def test_too_many_unreadable_images_stop_the_run_before_it_trains(image_folder, tmp_path, cache):
    folder = damaged_folder(image_folder, tmp_path, truncate)
    with pytest.raises(DataError, match=r"1 of 48 rows cannot be used, but max_bad_fraction is 0\.01.*00007\.png"):
        train(*settings(folder, tmp_path / "cache", tmp_path / "run", cache=cache))
    assert not (tmp_path / "run" / "final").exists()
    # the list it leaves does not stand in the way of the next try
    train(*settings(image_folder, tmp_path / "cache", tmp_path / "run", cache=cache, max_steps=1))


@pytest.mark.parametrize(
    ("prompt", "reason"), [("四百七十二", "prompt cleaning leaves nothing"), (" ", "caption is empty")]
)
def test_a_prompt_that_is_empty_or_cleaned_away_is_reported_not_trained_on(
    image_folder, tmp_path, prompt, reason, monkeypatch
):
    no_models(monkeypatch)
    folder = damaged_folder(image_folder, tmp_path, lambda f: replace_prompt(f, 3, prompt))
    with pytest.raises(DataError, match=reason):
        train(*settings(folder, tmp_path / "cache", tmp_path / "run"))
    (bad,) = [json.loads(line) for line in (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()]
    assert bad["row"] == 3


def test_a_chinese_prompt_is_kept_with_skip_text_cleaning(image_folder, tmp_path):
    folder = damaged_folder(image_folder, tmp_path, lambda f: replace_prompt(f, 3, "四百七十二"))
    train(*settings(folder, tmp_path / "cache", tmp_path / "run", skip_text_cleaning=True, max_steps=1))
    assert not (tmp_path / "run" / "bad_rows.jsonl").exists()


def test_a_full_disk_is_noticed_before_anything_is_encoded(image_folder, tmp_path, monkeypatch):
    import shutil

    from prx_post.base.errors import PrxPostError

    no_models(monkeypatch)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(PrxPostError, match="cache_dir is .* GiB free, but must have"):
        train(*settings(image_folder, tmp_path / "cache", tmp_path / "run"))


def test_a_loss_that_is_no_longer_finite_stops_the_run_and_emits_nothing(image_folder, warm_cache, tmp_path):
    from prx_post.base.errors import PrxPostError

    with pytest.raises(PrxPostError, match="not finite for 2 steps in a row .max_nonfinite_steps., the last of them 3"):
        train(
            *settings(
                image_folder, warm_cache, tmp_path / "run", learning_rate=1e30, max_steps=30, max_nonfinite_steps=2
            )
        )
    assert not (tmp_path / "run" / "final").exists()


def test_nothing_that_is_not_finite_is_emitted_and_the_last_checkpoint_is_named(
    image_folder, warm_cache, tmp_path, monkeypatch
):
    from prx_post.base.errors import PrxPostError
    from prx_post.engine.trainer import Trainer

    weights = Trainer.emitted_weights

    def poisoned(self):
        found = weights(self)
        found["img_in.weight"][0, 0] = float("inf")
        return found

    monkeypatch.setattr(Trainer, "emitted_weights", poisoned)
    with pytest.raises(
        PrxPostError, match=r"1 of 78 trained weights .* first img_in.weight.* the last checkpoint is checkpoint-000001"
    ):
        train(*settings(image_folder, warm_cache, tmp_path / "run", max_steps=1))
    assert not (tmp_path / "run" / "final").exists()


def test_a_checkpoint_that_is_not_finite_is_refused_instead_of_giving_black_images(base, tmp_path):
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    from prx_post.cli import main

    folder = tmp_path / "pipeline"
    shutil.copytree(base, folder)
    file = next((folder / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["img_in.weight"] = torch.full_like(tensors["img_in.weight"], torch.nan)
    save_file(tensors, file, metadata={"format": "pt"})
    common = ["--height", "32", "--width", "64", "--output_dir", str(tmp_path / "out")]
    assert main(["generate", "--model_name_or_path", str(folder), "--prompts", "12", *common]) == 2
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_checkpoint_of_an_earlier_layout_says_what_to_do(image_folder, warm_cache, tmp_path):
    from prx_post.base.errors import PrxPostError
    from prx_post.engine.checkpointing import _digest_of

    train(*settings(image_folder, warm_cache, tmp_path / "run", max_steps=1))
    (tmp_path / "run" / "final").rename(tmp_path / "final")
    path = tmp_path / "run" / "checkpoint-000001" / "state.json"
    info = json.loads(path.read_text())
    del info["sha256"]
    info["format"] = 2
    path.write_text(json.dumps({**info, "sha256": _digest_of(info)}))
    with pytest.raises(PrxPostError, match="has checkpoint format 2, but this prx-post resumes from format 3. Finish"):
        train(*settings(image_folder, warm_cache, tmp_path / "run", max_steps=2, resume_from_checkpoint="latest"))
