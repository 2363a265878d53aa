import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prx_post.base.errors import PrxPostError
from prx_post.model.checkpoint import CheckpointError, emit, inspect, load, open_pipeline

OUTSIDER = """
import sys, torch
from diffusers import DiffusionPipeline
assert not any(name.startswith("prx_post") for name in sys.modules)
for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("472", height=32, width=64, num_inference_steps=4, guidance_scale=2.0, use_resolution_binning=False,
                 generator=torch.Generator().manual_seed(0)).images[0]
    assert not any(name.startswith("prx_post") for name in sys.modules)
    image.save(folder + ".png")
"""


def load_as_an_outsider(*folders: Path) -> None:
    """In a process that knows diffusers alone; an image of each is in `<folder>.png`."""
    command = [sys.executable, "-c", OUTSIDER, *map(str, folders)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folders[0].parent, timeout=300)
    assert result.returncode == 0, result.stderr


def digests(folder: Path, *components: str) -> dict[str, str]:
    files = [p for c in components for p in sorted((folder / c).rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def changed(checkpoint):
    """Stands for training: every weight of the transformer moves."""
    with torch.no_grad():
        for parameter in checkpoint.transformer.parameters():
            parameter.add_(1e-3)
    return checkpoint


def test_untouched_components_are_bit_exact_through_two_generations(base, tmp_path):
    first = emit(changed(load(str(base))), tmp_path / "first")
    second = emit(load(str(first)), tmp_path / "second")
    untouched = ("text_encoder", "tokenizer", "vae", "scheduler")
    assert digests(base, *untouched) == digests(first, *untouched) == digests(second, *untouched)
    assert json.loads((base / "model_index.json").read_text()) == json.loads((first / "model_index.json").read_text())
    # and so is the transformer, once it is stored as fp32
    assert digests(first, "transformer", "model_index.json") == digests(second, "transformer", "model_index.json")


def test_a_process_without_prx_post_loads_what_we_emit_and_generates(base, dc_ae_pipeline, tmp_path):
    emitted = []
    for dtype in ("float32", "bfloat16"):
        first = emit(changed(load(str(base))), tmp_path / f"first-{dtype}", dtype)
        emitted += [first, emit(load(str(first)), tmp_path / f"second-{dtype}", dtype)]
    load_as_an_outsider(*emitted, emit(load(str(dc_ae_pipeline)), tmp_path / "dc-ae"))
    for dtype in ("float32", "bfloat16"):
        assert (tmp_path / f"first-{dtype}.png").read_bytes() == (tmp_path / f"second-{dtype}.png").read_bytes()


def test_bfloat16_halves_the_file_and_leaves_the_masters_alone(base, tmp_path):
    checkpoint = changed(load(str(base)))
    before = {name: p.clone() for name, p in checkpoint.transformer.named_parameters()}
    weights = "transformer/diffusion_pytorch_model.safetensors"
    full = (emit(checkpoint, tmp_path / "full") / weights).stat().st_size
    half = (emit(checkpoint, tmp_path / "half", "bfloat16") / weights).stat().st_size
    assert half / full == pytest.approx(0.5, abs=0.01)
    assert checkpoint.transformer.dtype == torch.float32
    assert all(torch.equal(p, before[name]) for name, p in checkpoint.transformer.named_parameters())
    # rounding to 8 bits of mantissa moves a weight by at most 2^-9 of itself
    rounded = dict(load(str(tmp_path / "half")).transformer.named_parameters())
    assert all(((rounded[n] - p).abs() <= p.abs() * 2**-8).all() for n, p in before.items())


def test_the_dc_ae_variant_goes_through_too(dc_ae_pipeline, tmp_path):
    checkpoint = load(str(dc_ae_pipeline))
    assert checkpoint.pipeline.variant == "dc-ae"
    assert checkpoint.pipeline.latent_shape(32, 64) == (8, 8, 16)
    emitted = emit(checkpoint, tmp_path / "emitted")
    assert digests(dc_ae_pipeline, "vae") == digests(emitted, "vae")
    assert inspect(emitted).variant == "dc-ae"


def test_nothing_is_overwritten_and_nothing_half_written_is_left(base, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="nothing is overwritten"):
        emit(load(str(base)), tmp_path / "taken")
    assert [p.name for p in tmp_path.rglob("*")] == ["taken", "notes.txt"]


def test_a_failure_while_emitting_leaves_nothing_behind(base, tmp_path, monkeypatch):
    checkpoint = load(str(base))

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(checkpoint.transformer), "save_pretrained", full_disk)
    with pytest.raises(CheckpointError, match="cannot be written: .*No space left"):
        emit(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def broken(base, tmp_path, how) -> Path:
    folder = tmp_path / "broken"
    shutil.copytree(base, folder)
    how(folder)
    return folder


def edit_json(name, **changes):
    def how(folder):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return how


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), r"has no model_index\.json"),
        (lambda f: (f / "model_index.json").write_text("{"), r"model_index\.json is not valid JSON"),
        (edit_json("model_index.json", _class_name="FluxPipeline"), "is a FluxPipeline, but must be a PRXPipeline"),
        (edit_json("model_index.json", _class_name="PRXPixelPipeline"), "only latent PRX pipelines"),
        (edit_json("model_index.json", vae=["diffusers", "VQModel"]), "vae is VQModel, but must be AutoencoderKL or"),
        (lambda f: shutil.rmtree(f / "scheduler"), r"has no scheduler/scheduler_config\.json"),
        (lambda f: shutil.rmtree(f / "tokenizer"), r"has no tokenizer/tokenizer_config\.json"),
        (lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(), r"vae has no \*\.safetensors weights"),
        (edit_json("tokenizer/tokenizer_config.json", model_max_length=int(1e30)), "no usable model_max_length"),
        (edit_json("transformer/config.json", in_channels=16), "transformer takes 16 channels, but the vae makes 4"),
        (edit_json("transformer/config.json", context_in_dim=2304), "text of width 2304, but text_encoder makes 128"),
    ],
)
def test_a_folder_that_is_no_prx_pipeline_is_refused_with_the_component_named(base, tmp_path, how, message):
    with pytest.raises(CheckpointError, match=message):
        inspect(broken(base, tmp_path, how))


def test_a_text_encoder_saved_by_transformers_alone_is_explained(base, tmp_path):
    folder = broken(base, tmp_path, lambda f: None)
    encoder = inspect(folder).load_text_encoder()
    encoder.save_pretrained(folder / "text_encoder")
    with pytest.raises(CheckpointError, match="describes an encoder alone"):
        inspect(folder)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "nowhere", "a/b/c"])
def test_a_missing_checkpoint_is_named(name):
    with pytest.raises(CheckpointError, match="there is no such folder"):
        open_pipeline(name)


def test_sizes_must_divide_and_the_error_offers_some_that_do(base):
    pipeline = inspect(base)
    assert pipeline.size_multiple == 8
    with pytest.raises(PrxPostError, match=r"width is 60, but must be a multiple of 8 .* Use 56 or 64"):
        pipeline.check_size(32, 60)


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_truncated_weights_are_named_in_one_line(base, tmp_path, component):
    folder = tmp_path / "pipeline"
    shutil.copytree(base, folder)
    (weights,) = (folder / component).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=f"{component} has weights that cannot be read.* Copy the checkpoint"):
        getattr(inspect(folder), f"load_{component}")()
