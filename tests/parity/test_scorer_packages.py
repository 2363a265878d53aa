"""HPSv2 against the hpsv2 package and open_clip, where they are importable (both need torchvision), random weights."""

import gzip
import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prx_post.rewards import registry
from prx_post.rewards.scorers.clip import byte_pair_tokens
from prx_post.rewards.scorers.hpsv2 import cleaned

VOCABULARY_SIZE = 49408
SIZES = [(40, 28), (28, 28), (61, 83), (57, 28), (300, 200), (29, 31)]
PROMPTS = [
    "a photo of a red cat, sitting on the roof",
    "Two DOGS &amp; 3 cats;  it's 10:45!",
    "schÃ¶ne  Grüße\tan die Straße, naïve café",
    "日本語のテキスト 🫠 emoji",
    "word " * 100,
    "x",
]


def package_file(package: str, *parts: str) -> Path | None:
    """A file inside an installed package; None if either is not there. The package is not imported."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.submodule_search_locations[0]).joinpath(*parts) if spec else None
    return path if path and path.is_file() else None


@pytest.fixture(scope="module")
def byte_pairs(tmp_path_factory):
    """vocab.json and merges.txt as on the Hub, from the list of byte pairs inside open_clip."""
    path = package_file("open_clip", "bpe_simple_vocab_16e6.txt.gz")
    if path is None:
        pytest.skip("open_clip is not installed")
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    merges = lines[1 : VOCABULARY_SIZE - 512 - 2 + 1]  # after a heading; 512 letters and 2 special tokens need none
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    entries = [*letters, *(f"{c}</w>" for c in letters), *(merge.replace(" ", "") for merge in merges)]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    assert len(entries) == VOCABULARY_SIZE
    folder = tmp_path_factory.mktemp("byte-pairs")
    (folder / "vocab.json").write_text(json.dumps({entry: i for i, entry in enumerate(entries)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return folder


def sample_images():
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)) for _ in SIZES]
    return [image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(noise, SIZES, strict=True)]


def until_the_end(row: list[int]) -> list[int]:
    return row[: row.index(VOCABULARY_SIZE - 1) + 1]


def test_tokens_are_open_clips(byte_pairs):
    open_clip = pytest.importorskip("open_clip")
    tokens = byte_pair_tokens([byte_pairs / "vocab.json", byte_pairs / "merges.txt"], 77, split_special_tokens=True)
    rng = random.Random(0)
    alphabet = "abcdefghij  XYZ0123456789,.!?'\"-_&;éüßñ日本🫠\t\n<|>"
    odd = ["".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(2000)]
    prompts = [*PROMPTS, *(prompt for prompt in odd if cleaned(prompt))]
    theirs = open_clip.tokenizer.tokenize(prompts).tolist()
    ours = tokens([cleaned(prompt) for prompt in prompts]).tolist()
    assert [until_the_end(row) for row in ours] == [until_the_end(row) for row in theirs]


def randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embedding" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
            elif name != "logit_scale":
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_hpsv2_is_the_packages_score(byte_pairs, tmp_path):
    if package_file("hpsv2", "src", "open_clip", "bpe_simple_vocab_16e6.txt.gz") is None:
        pytest.skip("hpsv2 is not installed, or without its list of byte pairs (its wheel lacks it; open_clip has it)")
    model_module = pytest.importorskip("hpsv2.src.open_clip.model")
    from hpsv2.src.open_clip.tokenizer import tokenize
    from hpsv2.src.open_clip.transform import image_transform

    vision = model_module.CLIPVisionCfg(layers=3, width=160, head_width=80, patch_size=14, image_size=28)
    text = model_module.CLIPTextCfg(77, VOCABULARY_SIZE, width=128, heads=2, layers=2)
    model = model_module.CLIP(48, vision, text, output_dict=True).eval()
    randomise(model)
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).symlink_to(byte_pairs / name)

    # The package fails on an image whose longer side is the model's and whose other is not: it forgets to pad it.
    images = [image for image in sample_images() if max(image.size) != 28 or image.size == (28, 28)]
    prompts = PROMPTS[: len(images)]
    transform = image_transform(28, is_train=False, resize_longest_max=True)
    with torch.no_grad():
        out = model(torch.stack([transform(image) for image in images]), tokenize(prompts))
    expected = (out["image_features"] * out["text_features"]).sum(-1)
    scores = registry.load("hpsv2", weights=str(tmp_path), device="cpu")(images, prompts)
    assert expected.std() > 0.02
    # Fused attention and one product of heads against torch.nn.MultiheadAttention: fp32 rounding of unit vectors.
    torch.testing.assert_close(scores, expected, rtol=0, atol=2e-6)
