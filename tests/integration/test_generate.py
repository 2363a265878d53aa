import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from prx_post import generate
from prx_post.base.errors import PrxPostError
from prx_post.model import lora
from prx_post.model.card import ModelCard
from prx_post.model.checkpoint import emit, load
from prx_post.model.config import ModelConfig
from prx_post.model.inference import Inference
from prx_post.model.merging import merge
from prx_post.tiny import BASE

COMMON = ["--model_name_or_path", "tiny", "--height", "32", "--width", "64", "--num_inference_steps", "4"]


def test_every_prompt_is_drawn_with_every_seed_and_says_so_in_its_metadata(prx_post, tmp_path):
    out = tmp_path / "out"
    result = prx_post(
        *("generate", *COMMON, "--prompts", "472", "eighty-one", "--seeds", 0, 7, "--guidance_scale", 2.5),
        *("--batch_size", 3, "--output_dir", out),
        check=True,
    )
    assert "4 images in" in result.stdout
    images = [Image.open(p) for p in sorted(out.glob("*.png"))]
    assert [(i.text["prompt"], i.text["seed"]) for i in images] == [
        ("472", "0"),
        ("472", "7"),
        ("eighty-one", "0"),
        ("eighty-one", "7"),
    ]
    assert images[0].size == (64, 32)
    assert images[0].text["guidance_scale"] == "2.5"
    assert images[0].text["num_inference_steps"] == "4"
    assert images[0].text["checkpoint"] == "tiny"


def test_the_batch_size_does_not_change_the_images(tmp_path):
    for size in (1, 4):
        flags = ["--prompts", "472", "81", "--seeds", "0", "1", "--batch_size", str(size)]
        generate.run([*COMMON, *flags, "--output_dir", str(tmp_path / str(size))])
    for name in ("00000.png", "00003.png"):
        one, four = (np.asarray(Image.open(tmp_path / size / name)).astype(int) for size in ("1", "4"))
        assert np.abs(one - four).max() <= 1  # rounding of matrix products of another shape


def test_bfloat16_draws_nearly_the_same_image(tmp_path):
    for dtype in ("float32", "bfloat16"):
        generate.run([*COMMON, "--prompts", "472", "--dtype", dtype, "--output_dir", str(tmp_path / dtype)])
    full, half = (np.asarray(Image.open(tmp_path / d / "00000.png")).astype(int) for d in ("float32", "bfloat16"))
    assert not np.array_equal(full, half)
    assert np.abs(full - half).mean() < 8  # of 255: three digits of mantissa through four guided steps


def test_prompts_come_from_a_file_too(tmp_path):
    (tmp_path / "prompts.txt").write_text("472\n\nninety\n")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "trois"}) + "\n")
    for name, count in (("prompts.txt", 2), ("prompts.jsonl", 1)):
        out = tmp_path / name.replace(".", "-")
        generate.run([*COMMON, "--prompts_file", str(tmp_path / name), "--output_dir", str(out)])
        assert len(list(out.glob("*.png"))) == count


def test_a_line_that_is_no_prompt_is_named(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "1"}\n{"text": 3}\n')
    with pytest.raises(PrxPostError, match=r"p\.jsonl, line 2 is no prompt"):
        generate.run([*COMMON, "--prompts_file", str(tmp_path / "p.jsonl"), "--output_dir", str(tmp_path / "out")])


def test_images_made_earlier_are_left_alone(tmp_path):
    (tmp_path / "00000.png").write_bytes(b"mine")
    with pytest.raises(PrxPostError, match="must be new or empty"):
        generate.run([*COMMON, "--prompts", "472", "--output_dir", str(tmp_path)])
    assert (tmp_path / "00000.png").read_bytes() == b"mine"


def test_a_prompt_that_cleaning_empties_is_warned_about(tmp_path, capsys):
    generate.run([*COMMON, "--prompts", "四百", "--output_dir", str(tmp_path / "out")])
    assert "prompt cleaning leaves nothing of '四百'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "prompts is empty"),
        (["--prompts_file", "none.txt"], "there is no such file"),
        (["--prompts", "a", "--seeds"], "seeds"),
        (["--prompts", "a", "--guidance_scale", "0"], "guidance_scale is 0.0, but must be 1 or more"),
        (["--prompts", "a", "--height", "30"], "height is 30, but must be a multiple of 8"),
        (["--prompts", "a", "--width", "0"], "width is 0, but must be above 0"),
        (["--prompts", "a", "--dtype", "float16"], "dtype is 'float16', but must be one of float32, bfloat16"),
    ],
)
def test_bad_input_is_refused(tmp_path, flags, message):
    with pytest.raises(PrxPostError, match=message):
        generate.run([*COMMON, "--output_dir", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def emitted(folder):
    """A run's folder whose pipeline is the embedded one, to be sampled in its own way."""
    checkpoint = load("tiny")
    checkpoint.inference = Inference(3, 1.0, 32, 96, skip_text_cleaning=True)
    emit(checkpoint, folder / "final")
    return folder


def test_a_checkpoint_is_sampled_as_it_says_unless_something_else_is_asked_for(tmp_path, capsys):
    given = ["--model_name_or_path", str(emitted(tmp_path / "run")), "--prompts", "472"]  # a run means its pipeline
    generate.run([*given, "--output_dir", str(tmp_path / "own")])
    assert "96x32, 3 steps, guidance 1, light text cleaning (from the checkpoint)\n" in capsys.readouterr().out
    image = Image.open(tmp_path / "own" / "00000.png")
    named = ("num_inference_steps", "guidance_scale", "height", "width", "skip_text_cleaning")
    assert [image.text[name] for name in named] == ["3", "1.0", "32", "96", "True"]
    asked = ["--num_inference_steps", "2", "--height", "32", "--width", "64", "--skip_text_cleaning", "false"]
    generate.run([*given, *asked, "--output_dir", str(tmp_path / "asked")])
    assert "64x32, 2 steps, guidance 1 (guidance from the checkpoint)\n" in capsys.readouterr().out
    spelt_out = ["--num_inference_steps", "3", "--guidance_scale", "1", "--height", "32", "--width", "96"]
    generate.run([*given, *spelt_out, "--skip_text_cleaning", "true", "--output_dir", str(tmp_path / "same")])
    assert np.array_equal(*(np.asarray(Image.open(tmp_path / name / "00000.png")) for name in ("own", "same")))


def test_the_embedded_pipeline_knows_its_size_and_guidance(tmp_path, capsys):
    generate.run(["--model_name_or_path", "tiny", "--prompts", "472", "--output_dir", str(tmp_path / "out")])
    assert "64x32, 28 steps, guidance 4 (from the checkpoint)\n" in capsys.readouterr().out


def test_what_is_emitted_from_a_checkpoint_keeps_its_settings(tmp_path):
    run = emitted(tmp_path / "run")
    emit(load(str(run)), tmp_path / "again")
    assert Inference.read(tmp_path / "again") == Inference(3, 1.0, 32, 96, skip_text_cleaning=True)


def an_adapter(folder):
    """Trained, if by nothing but chance. Returns the transformer with it merged."""
    network = lora.attach(load("tiny").transformer, ModelConfig(model_name_or_path="tiny", use_peft=True, lora_r=4))
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    card = ModelCard("an adapter", "sft", str(BASE), False, "nothing", 4, 1.0, "float32")
    lora.save_adapter(network, folder, card.render_adapter())
    return merge(network)


def test_an_adapter_is_drawn_with_as_if_it_were_merged(tmp_path):
    checkpoint = load("tiny")
    checkpoint.transformer = an_adapter(tmp_path / "adapter")
    emit(checkpoint, tmp_path / "merged")
    for name, given in (("one", ["tiny", "--adapter", str(tmp_path / "adapter")]), ("two", [str(tmp_path / "merged")])):
        drawn = ["--prompts", "472", "--num_inference_steps", "2", "--output_dir", str(tmp_path / name)]
        generate.run(["--model_name_or_path", *given, *drawn])
    one, two = (np.asarray(Image.open(tmp_path / name / "00000.png")).astype(int) for name in ("one", "two"))
    assert np.abs(one - two).max() <= 1
    assert Image.open(tmp_path / "one" / "00000.png").text["adapter"] == str(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "must be a folder with adapter_config.json"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "must be a folder with adapter_config.json"),
        (lambda folder: edit(folder, {"target_modules": ["to_q"]}), "for 'to_q', no linear layer of tiny"),
        (lambda folder: edit(folder, {"r": 8}), "whose weights do not fit"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "which cannot be read"),
        (lambda folder: (folder / "adapter_model.safetensors").write_text("version"), "which cannot be read"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, damage, message):
    an_adapter(tmp_path / "adapter")
    damage(tmp_path / "adapter")
    given = ["--adapter", str(tmp_path / "adapter"), "--prompts", "472", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(PrxPostError, match=message):
        generate.run(["--model_name_or_path", "tiny", *given])


def edit(folder, changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def lines_of_card(adapter):
    card = (adapter / "README.md").read_text()
    return card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(adapter))


def test_the_lines_of_an_adapters_card_load_it_without_prx_post(tmp_path):
    merged = an_adapter(tmp_path / "adapter")
    lines = lines_of_card(tmp_path / "adapter")
    weight = "base_model.model.blocks.0.attention.img_qkv_proj"
    check = f"""
import sys
assert not any(name.split(".")[0] == "prx_post" for name in sys.modules)
layer = pipe.transformer.get_submodule({weight!r})
torch.save(layer.base_layer.weight + layer.get_delta_weight("default"), {str(tmp_path / "weight.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", lines + check], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    own = merged.get_submodule(weight.removeprefix("base_model.model.")).weight
    assert torch.allclose(torch.load(tmp_path / "weight.pt"), own, atol=1e-6)


def test_an_adapter_is_not_merged_twice(tmp_path):
    checkpoint = load("tiny")
    checkpoint.transformer = an_adapter(tmp_path / "run" / "final-adapter")
    emit(checkpoint, tmp_path / "run" / "final")
    given = [
        "--adapter",
        str(tmp_path / "run" / "final-adapter"),
        "--prompts",
        "472",
        "--output_dir",
        str(tmp_path / "o"),
    ]
    with pytest.raises(PrxPostError, match="has it merged already"):
        generate.run(["--model_name_or_path", str(tmp_path / "run"), *given])
