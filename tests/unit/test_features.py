"""Encoders of a metric, on tiny random models saved as the published ones are, against transformers' own."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from prx_post.base.errors import ConfigError, PrxPostError
from prx_post.evaluation.features import MetricSpec, encode, open_encoder

CPU = torch.device("cpu")


def images(count, seed=0):
    rng = np.random.default_rng(seed)
    sizes = [(40 + 8 * i, 64) for i in range(count)]
    return [Image.fromarray(rng.integers(0, 256, size=(*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    torch.manual_seed(0)
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**layers, "image_size": 28, "patch_size": 14}
    config = transformers.CLIPConfig(text_config={**layers, "vocab_size": 64}, vision_config=vision, projection_dim=24)
    folder = tmp_path_factory.mktemp("clip")
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    folder = tmp_path_factory.mktemp("dino")
    transformers.Dinov2WithRegistersModel(config).save_pretrained(folder)
    return folder


def test_clip_features_are_the_normalised_image_embeddings_of_the_full_model(clip_folder):
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    processor = transformers.CLIPImageProcessorPil(size={"height": 28, "width": 28}, do_center_crop=False)
    pixels = processor(images(5), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.get_image_features(pixels)
    expected = getattr(expected, "pooler_output", expected)
    expected = expected / expected.norm(dim=-1, keepdim=True)
    found = open_encoder(str(clip_folder), CPU, "float32", 2)(images(5))
    assert found.shape == (5, 24)
    assert np.abs(found - expected.numpy()).max() < 2e-6


def test_dino_features_are_the_normalised_class_token(dino_folder):
    model = transformers.Dinov2WithRegistersModel.from_pretrained(dino_folder).eval()
    processor = transformers.BitImageProcessorPil(
        size={"height": 28, "width": 28},
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    pixels = processor(images(3), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixels).pooler_output  # the class token after the last norm
    expected = expected / expected.norm(dim=-1, keepdim=True)
    found = open_encoder(str(dino_folder), CPU, "float32", 16)(images(3))
    assert np.abs(found - expected.numpy()).max() < 2e-6


def test_features_do_not_depend_on_the_batch(clip_folder):
    one, many = (open_encoder(str(clip_folder), CPU, "float32", size) for size in (1, 8))
    assert np.abs(one(images(5)) - many(images(5))).max() < 1e-6
    assert np.abs(encode(many, iter(images(5)), chunk=2) - many(images(5))).max() < 1e-6


def test_an_encoder_that_is_missing_or_of_another_kind_is_named(tmp_path, clip_folder):
    with pytest.raises(PrxPostError, match="is no folder, and could not be fetched"):
        open_encoder("nobody/nothing", CPU, "float32", 1)
    with pytest.raises(PrxPostError, match="has no config.json"):
        open_encoder(str(tmp_path), CPU, "float32", 1)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(PrxPostError, match=r"has no \*\.safetensors"):
        open_encoder(str(tmp_path), CPU, "float32", 1)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(PrxPostError, match="'bert', but must be one of clip"):
        open_encoder(str(tmp_path), CPU, "float32", 1)


def test_each_metric_has_its_usual_encoder_and_takes_another():
    assert MetricSpec.parse("cmmd").encoder == "openai/clip-vit-large-patch14-336"
    assert MetricSpec.parse("dino_mmd=my/dino") == MetricSpec("dino_mmd", "my/dino")


@pytest.mark.parametrize("text", ["edge_energy=inception", "fid=pixels"])
def test_what_is_measured_on_pixels_has_no_encoder_and_is_none(text):
    with pytest.raises(ConfigError, match="Leave the encoder out, or name another"):
        MetricSpec.parse(text)


def test_pixel_statistics_of_stripes_and_of_grey():
    """Stripes of black and white differ by 255 across and not down; grey has no edge, and one tone."""
    stripes = np.zeros((8, 9, 3), np.uint8)
    stripes[:, ::2] = 255
    images = [Image.fromarray(stripes), Image.fromarray(np.full((4, 4, 3), 90, np.uint8))]
    assert MetricSpec.parse("edge_energy").encoder == "pixels"
    found = open_encoder("pixels", CPU, "float32", 1)(images)
    black = 4 / 9
    bits = -(black * np.log2(black) + (1 - black) * np.log2(1 - black))
    np.testing.assert_allclose(found, [[127.5, bits], [0, 0]], rtol=1e-6)


def test_inception_weights_that_are_missing_or_others_are_named(tmp_path, monkeypatch):
    for module in ("torchvision", "torch_fidelity"):
        pytest.importorskip(module, reason="extra fid")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(PrxPostError, match="weights-inception-2015-12-05-6726825d.pth, which is not there"):
        open_encoder("inception", CPU, "float32", 1)
    path = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    path.parent.mkdir(parents=True)
    torch.save({}, path)
    with pytest.raises(PrxPostError, match="is not the published file"):
        open_encoder("inception", CPU, "float32", 1)(images(1))


def test_without_torchvision_inception_is_a_clear_error():
    try:
        import torchvision  # noqa: F401
    except ImportError:
        with pytest.raises(PrxPostError, match=r"prx-post\[fid\]"):
            open_encoder("inception", CPU, "float32", 1)
    else:
        pytest.skip("torchvision is installed")


def test_weights_that_do_not_fit_their_configuration_are_refused(tmp_path, dino_folder):
    import shutil

    folder = shutil.copytree(dino_folder, tmp_path / "dino")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(PrxPostError, match="no weights that fit"):
        open_encoder(str(folder), CPU, "float32", 1)(images(1))
