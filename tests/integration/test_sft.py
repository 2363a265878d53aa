"""`prx-post sft` on the embedded base, a few steps at a time."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from prx_post.base.errors import PrxPostError
from prx_post.base.ranks import ALONE
from prx_post.data.config import DataConfig
from prx_post.data.encoders import Encoders
from prx_post.model.checkpoint import PipelineFolder, load
from prx_post.model.config import EMBEDDED, ModelConfig
from prx_post.model.inference import Inference
from prx_post.stages.sft.config import SFTConfig
from prx_post.stages.sft.objective import FlowMatchingObjective
from tests.conftest import numbered_images
from tests.integration.test_generate import lines_of_card
from tests.running import train_sft as train

STEPS = 4


def settings(dataset, cache_dir, output_dir, **changes):
    values = {
        "model_name_or_path": "tiny",
        "dataset_name": str(dataset),
        "height": 32,
        "width": 64,
        "cache_dir": str(cache_dir),
        "output_dir": str(output_dir),
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "sample_steps": 0,
        "report_to": [],
        "num_inference_steps": 2,
        **changes,
    }

    def part(kind):
        return kind(**{k: v for k, v in values.items() if k in kind.__dataclass_fields__})

    return part(ModelConfig), part(DataConfig), part(SFTConfig)


def losses(output_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def test_training_lowers_the_loss_on_its_own_data_and_emits_the_average(image_folder, warm_cache, tmp_path):
    train(*settings(image_folder, warm_cache, tmp_path / "run", max_steps=40, ema_decay=0.5, timestep_std=0.1))
    curve = losses(tmp_path / "run")
    assert sum(curve[-10:]) < 0.9 * sum(curve[:10])
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert "| Stage | sft |" in card
    assert "num_inference_steps=2" in card
    assert Inference.read(tmp_path / "run" / "final") == Inference(2, 5.0, 32, 64, skip_text_cleaning=False)
    moved = weights(tmp_path / "run" / "final")
    start = load("tiny").transformer.state_dict()
    assert moved.keys() == start.keys()
    assert all((moved[k] != start[k]).any() for k in moved)


def test_what_is_emitted_is_the_average_of_the_weights(image_folder, warm_cache, tmp_path, monkeypatch):
    from prx_post.engine.ema import EMA

    kept = []
    original = EMA.update
    monkeypatch.setattr(EMA, "update", lambda self, step: (original(self, step), kept.append(self))[0])
    train(*settings(image_folder, warm_cache, tmp_path / "run"))
    emitted = weights(tmp_path / "run" / "final")
    names = [name for name, _ in load("tiny").transformer.named_parameters()]
    ema = kept[-1]
    assert all(torch.equal(emitted[name], average) for name, average in zip(names, ema.averages, strict=True))
    assert any(not torch.equal(p, average) for p, average in zip(ema._parameters, ema.averages, strict=True))


def test_losses_are_bit_identical_with_the_cache_and_without(image_folder, warm_cache, tmp_path):
    train(*settings(image_folder, warm_cache, tmp_path / "disk", cache="disk"))
    train(*settings(image_folder, warm_cache, tmp_path / "none", cache="none"))
    assert losses(tmp_path / "disk") == losses(tmp_path / "none")
    first, second = weights(tmp_path / "disk" / "final"), weights(tmp_path / "none" / "final")
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_a_second_run_loads_neither_text_encoder_nor_vae(image_folder, tmp_path, monkeypatch):
    loads = []
    for name in ("load_text_encoder", "load_vae"):
        original = getattr(PipelineFolder, name)

        def counted(self, *args, _name=name, _original=original, **kwargs):
            loads.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(PipelineFolder, name, counted)
    train(*settings(image_folder, tmp_path / "cache", tmp_path / "first"))
    assert sorted(loads) == ["load_text_encoder", "load_vae"]
    loads.clear()
    train(*settings(image_folder, tmp_path / "cache", tmp_path / "second"))
    assert loads == []
    assert losses(tmp_path / "first") == losses(tmp_path / "second")


def test_the_cache_is_keyed_by_content(image_folder, tmp_path):
    """A copy of the data under another name is a hit; another image, prompt or size is a miss."""
    cache = tmp_path / "cache"
    train(*settings(image_folder, cache, tmp_path / "one", max_steps=1))
    shards = set(cache.rglob("*.safetensors"))
    shutil.copytree(image_folder, tmp_path / "copy")
    train(*settings(tmp_path / "copy", cache, tmp_path / "two", max_steps=1))
    assert set(cache.rglob("*.safetensors")) == shards
    train(*settings(tmp_path / "copy", cache, tmp_path / "three", max_steps=1, height=32, width=72))
    assert {p.parent.parent.name for p in set(cache.rglob("*.safetensors")) - shards} == {"latents"}


def test_one_batch_of_sixteen_equals_two_of_eight_accumulated(image_folder, warm_cache, tmp_path):
    common = {"max_grad_norm": 0.0, "ema_decay": 0.0}
    train(*settings(image_folder, warm_cache, tmp_path / "one", per_device_train_batch_size=16, **common))
    train(
        *settings(
            image_folder,
            warm_cache,
            tmp_path / "two",
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            **common,
        )
    )
    # The same samples, noise and timesteps in two halves: sums in another order, fp32 rounding only
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-4)


def test_the_options_reach_the_objective_and_the_source(image_folder, warm_cache, tmp_path, monkeypatch):
    """What each does is tested on numbers by hand: tests/unit/test_sft_objective.py."""
    from prx_post.stages.sft import stage as sft

    seen = {}
    made, drawn = sft.FlowMatchingObjective, sft.SFT.latent_source

    def objective(policy, rate, **options):
        seen["objective"] = options
        return made(policy, rate, **options)

    def source(self, run, data, **options):
        seen["source"] = {"arrange": options["arrange"], **options["randomness"].keywords}
        return drawn(self, run, data, **options)

    monkeypatch.setattr(sft, "FlowMatchingObjective", objective)
    monkeypatch.setattr(sft.SFT, "latent_source", source)
    changes = {"loss_weighting": "min_snr", "contrastive_weight": 0.05, "immiscible": True, "timestep_shift": 3.0}
    train(*settings(image_folder, warm_cache, tmp_path / "run", max_steps=1, optim="muon", **changes))
    assert seen["objective"] == {"min_snr_gamma": 5.0, "contrastive_weight": 0.05}
    assert seen["source"] == {
        **{"arrange": sft.immiscible, "mean": 0.0, "std": 1.0, "shift": 3.0, "uniform_fraction": 0.1}
    }
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "run" / "final").values())


def test_bf16_computes_the_blocks_in_bfloat16_and_keeps_the_weights_in_fp32(
    image_folder, warm_cache, tmp_path, monkeypatch
):
    from diffusers import PRXTransformer2DModel

    seen = set()
    forward = PRXTransformer2DModel.forward

    def spy(self, *args, **kwargs):
        hook = self.blocks[0].attention.img_qkv_proj.register_forward_hook(
            lambda module, given, output: seen.add((module.weight.dtype, output.dtype))
        )
        try:
            return forward(self, *args, **kwargs)
        finally:
            hook.remove()

    monkeypatch.setattr(PRXTransformer2DModel, "forward", spy)
    train(*settings(image_folder, warm_cache, tmp_path / "run", max_steps=1, bf16=True))
    assert seen == {(torch.float32, torch.bfloat16)}


def test_lora_goes_with_bf16_and_gradient_checkpointing(image_folder, warm_cache, tmp_path):
    changes = {"use_peft": True, "lora_r": 4, "bf16": True, "gradient_checkpointing": True, "ema_decay": 0.0}
    train(*settings(image_folder, warm_cache, tmp_path / "run", **changes))
    emitted, start = weights(tmp_path / "run" / "final"), load("tiny").transformer.state_dict()
    assert sum(not torch.equal(emitted[k], start[k]) for k in emitted) == 36
    front = yaml.safe_load((tmp_path / "run" / "final-adapter" / "README.md").read_text().split("---")[1])
    assert front["library_name"] == "peft"


def test_blocks_are_compiled_when_asked_and_give_the_same_losses(image_folder, warm_cache, tmp_path, monkeypatch):
    """With the eager backend: the graph is captured, but nothing is built, which takes a minute on a CPU."""
    compiled = []
    original = torch.nn.Module.compile

    def eager(self, *args, **kwargs):
        compiled.append(type(self).__name__)
        original(self, *args, backend="eager", **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    train(*settings(image_folder, warm_cache, tmp_path / "run", torch_compile=True))
    assert compiled == ["PRXBlock"] * 6
    monkeypatch.undo()
    train(*settings(image_folder, warm_cache, tmp_path / "plain"))
    # prompts are padded further, so softmax sums run over more (masked) terms
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    assert weights(tmp_path / "run" / "final").keys() == weights(tmp_path / "plain" / "final").keys()


def test_gradient_checkpointing_changes_memory_not_numbers(image_folder, warm_cache, tmp_path):
    for name, on in (("off", False), ("on", True)):
        train(*settings(image_folder, warm_cache, tmp_path / name, gradient_checkpointing=on))
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), rel=1e-6)


def test_lora_emits_the_merged_pipeline_and_the_adapter(image_folder, warm_cache, tmp_path):
    from peft import PeftModel

    train(*settings(image_folder, warm_cache, tmp_path / "run", use_peft=True, lora_r=4))
    base_weights = load("tiny").transformer.state_dict()
    merged = weights(tmp_path / "run" / "final")
    assert merged.keys() == base_weights.keys()
    changed = {k for k in merged if not torch.equal(merged[k], base_weights[k])}
    assert len(changed) == 36  # six projections in six blocks
    adapter = PeftModel.from_pretrained(load("tiny").transformer, tmp_path / "run" / "final-adapter")
    again = adapter.merge_and_unload().state_dict()
    assert all(torch.allclose(again[k], merged[k], atol=1e-6) for k in merged)


def test_training_may_start_from_an_adapter_and_the_card_of_the_next_one_loads_both(image_folder, warm_cache, tmp_path):
    lora = {"use_peft": True, "lora_r": 4, "learning_rate": 1e-2}
    train(*settings(image_folder, warm_cache, tmp_path / "one", **lora))
    first = tmp_path / "one" / "final-adapter"
    for name, source in (("merged", {"model_name_or_path": str(tmp_path / "one")}), ("apart", {"adapter": str(first)})):
        train(*settings(image_folder, warm_cache, tmp_path / name, **source))
    merged, apart = weights(tmp_path / "merged" / "final"), weights(tmp_path / "apart" / "final")
    assert all(torch.allclose(merged[k], apart[k], atol=1e-6) for k in merged)
    train(*settings(image_folder, warm_cache, tmp_path / "two", adapter=str(first), **lora))
    lines = lines_of_card(tmp_path / "two" / "final-adapter").replace('"tiny"', repr(str(EMBEDDED / "base")))
    whole = tmp_path / "whole"
    check = "import sys\nassert 'prx_post' not in sys.modules"
    save = f"pipe.transformer.merge_and_unload().save_pretrained({str(whole)!r})"
    script = f"{lines}\n{check}\n{save}"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again, emitted = load_file(whole / "diffusion_pytorch_model.safetensors"), weights(tmp_path / "two" / "final")
    assert all(torch.allclose(again[k], emitted[k], atol=1e-6) for k in emitted)
    with pytest.raises(PrxPostError, match="adapter is 'nowhere', but must be a folder with adapter_config.json"):
        train(*settings(image_folder, warm_cache, tmp_path / "three", adapter="nowhere"))


def test_the_velocity_loss_equals_a_calculation_by_hand(base):
    """A transformer that always answers 0: the loss is the mean square of noise - x0."""

    class Silent(torch.nn.Module):
        def forward(self, hidden_states, **kwargs):
            self.asked = hidden_states, kwargs["timestep"]
            return (torch.zeros_like(hidden_states),)

    silent = Silent()
    x0, noise = torch.full((2, 1, 1, 2), 3.0), torch.tensor([[[[1.0, 2.0]]], [[[5.0, 3.0]]]])
    given = {"latents": x0, "noise": noise, "t": torch.tensor([0.5, 0.25]), "prompt_embeds": None, "prompt_mask": None}
    loss, _ = FlowMatchingObjective(silent, 1.0)(given)
    # velocities noise - x0 are -2, -1, 2, 0: (4 + 1 + 4 + 0) / 4
    assert loss.item() == pytest.approx(2.25)
    x_t, t = silent.asked
    # 0.5·3 + 0.5·1, 0.5·3 + 0.5·2 and 0.75·3 + 0.25·5, 0.75·3 + 0.25·3
    assert x_t.flatten().tolist() == [2.0, 2.5, 3.5, 3.0]
    assert t.tolist() == [0.5, 0.25]


def test_caption_dropout_trains_on_the_encoded_empty_prompt(image_folder, warm_cache, tmp_path, base):
    from prx_post.stages.sft import stage as sft

    seen = []

    class Spy(FlowMatchingObjective):
        def forward(self, batch):
            seen.append(batch["prompt_embeds"].clone())
            return super().forward(batch)

    original, sft.FlowMatchingObjective = sft.FlowMatchingObjective, Spy
    try:
        train(*settings(image_folder, warm_cache, tmp_path / "run", max_steps=1, caption_dropout=1.0))
    finally:
        sft.FlowMatchingObjective = original
    from diffusers import PRXPipeline

    pipe = PRXPipeline.from_pretrained(base)
    null, mask, _, _ = pipe.encode_prompt("", device=torch.device("cpu"), do_classifier_free_guidance=False)
    expected = null[0, mask[0]]
    assert expected.abs().sum() > 0
    assert all(torch.equal(row, expected) for row in seen[0])


def test_sample_grids_come_at_the_start_on_the_way_and_at_the_end(image_folder, warm_cache, tmp_path):
    from PIL import Image

    changes = {"sample_steps": 2, "sample_prompts": ["472", "81", "306"], "sample_seeds": [0, 1]}
    train(*settings(image_folder, warm_cache, tmp_path / "run", max_steps=3, report_to=["tensorboard"], **changes))
    grids = sorted((tmp_path / "run" / "samples").glob("*.png"))
    assert [g.name for g in grids] == ["grid-000000.png", "grid-000002.png", "grid-000003.png"]
    with Image.open(grids[1]) as sheet:
        assert sheet.text["title"] == "step 2"
        assert sheet.text["columns"] == "seed 0, seed 1"
        assert sheet.text["rows"] == "472; 81; 306"
        assert sheet.height > 3 * 32
    assert list((tmp_path / "run" / "logs").rglob("events.out.tfevents.*"))


def test_torch_compile_pads_prompts_to_one_length(image_folder, warm_cache, tmp_path):
    """Compilation itself takes a minute on a CPU and is left to GPUs; its batches must have one shape."""

    from types import SimpleNamespace

    from prx_post.data.scan import Sample
    from prx_post.stages.base import Encoded
    from prx_post.stages.sft.stage import SFT

    stage = SFT(*settings(image_folder, warm_cache, tmp_path / "run", torch_compile=True))
    encoders = Encoders(stage.pipeline, stage.cleaner, torch.device("cpu"), torch.float32)
    data = Encoded([Sample(0, "1", (32, 64), "a", "b")], None, None, encoders, str, "")
    run = SimpleNamespace(global_batch_size=8, ranks=ALONE)
    assert stage.source(run, data, None).pad_length == 24


def test_aspect_buckets_are_the_pipelines_own(base, tmp_path, warm_cache):
    """With default_sample_size 256 and no fixed size, images go where PRXPipeline's binning would put them."""
    from diffusers.image_processor import PixArtImageProcessor
    from diffusers.pipelines.prx.pipeline_prx import ASPECT_RATIO_BINS

    from prx_post.data.buckets import Buckets
    from prx_post.model.checkpoint import inspect

    folder = tmp_path / "pipeline"
    shutil.copytree(base, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "default_sample_size": 256}))
    buckets = Buckets(inspect(folder), None, None)
    for size in [(100, 100), (300, 100), (100, 300), (640, 480), (1080, 1920)]:
        assert buckets(*size) == PixArtImageProcessor.classify_height_width_bin(*size, ratios=ASPECT_RATIO_BINS[256])
    assert buckets(100, 100) == (256, 256)
    assert buckets(100, 300) == (160, 352)
    with pytest.raises(PrxPostError, match="default_sample_size of 64 .* Set height and width"):
        Buckets(inspect(base), None, None)


def test_several_buckets_train_in_one_run(base, tmp_path, warm_cache):
    from prx_post.tiny.datasets import write_folder

    folder = tmp_path / "pipeline"
    shutil.copytree(base, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "default_sample_size": 256}))
    images = numbered_images(list(range(20, 24)))
    for image, size in zip(images, [(64, 64), (64, 64), (30, 64), (64, 30)], strict=True):
        object.__setattr__(image, "image", image.image.resize(size))
    write_folder(images, tmp_path / "images")
    changes = {"model_name_or_path": str(folder), "height": None, "width": None, "per_device_train_batch_size": 2}
    train(*settings(tmp_path / "images", warm_cache, tmp_path / "run", max_steps=6, **changes))
    assert len(losses(tmp_path / "run")) == 6


def test_a_dc_ae_checkpoint_is_fine_tuned_by_the_same_code(dc_ae_pipeline, image_folder, warm_cache, tmp_path):
    train(*settings(image_folder, warm_cache, tmp_path / "run", model_name_or_path=str(dc_ae_pipeline)))
    assert load(str(tmp_path / "run" / "final")).pipeline.variant == "dc-ae"
