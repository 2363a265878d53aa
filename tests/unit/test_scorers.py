"""The scorers against independent computations, on small random checkpoints of the published formats."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from prx_post.base.errors import PrxPostError
from prx_post.rewards import registry
from prx_post.rewards.scorers import weights
from prx_post.rewards.scorers.clip import byte_pair_tokens
from prx_post.rewards.scorers.hpsv2 import cleaned
from prx_post.rewards.scorers.pixels import centre_square, normalised, padded_square, unit_range
from tests import scorer_references
from tests.scorer_checkpoints import CHECKPOINTS

NAMES = list(CHECKPOINTS)
PROMPTS = ["a red cat", "a blue cat, 2 dogs", "A photo", "a red cat", "blue"]
FP32 = {"rtol": 2e-4, "atol": 2e-5}
"""Between two orders of fp32 sums in networks of a few layers; a wrong layer moves scores by tenths."""


def sample_images(sizes=((40, 28), (28, 28), (61, 83), (28, 57), (300, 200))):
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)) for _ in sizes]
    return [image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(noise, sizes, strict=True)]


def load(name, checkpoints, **placement):
    return registry.load(name, weights=str(checkpoints / name), device="cpu", **placement)


def clip_pixels_by_hand(image):
    """Shorter side to 28 by PIL, the middle cut out rounding down, 0..1, normalised."""
    width, height = image.size
    short = min(width, height)
    image = image.resize((int(width * 28 / short), int(height * 28 / short)), Image.Resampling.BICUBIC)
    left, top = (image.width - 28) // 2, (image.height - 28) // 2
    pixels = np.asarray(image.crop((left, top, left + 28, top + 28)), dtype=np.float64) / 255
    pixels = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    return torch.from_numpy(pixels.transpose(2, 0, 1)).float()


def transformers_cosines(folder, tokenizer_folder, images, prompts):
    """CLIPModel.forward's logits by transformers' own loading, divided by their scale; and the scale."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    tokens = tokenizer(list(prompts), padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        out = model(**tokens, pixel_values=torch.stack([clip_pixels_by_hand(image) for image in images]))
    scale = model.logit_scale.exp().item()
    return out.logits_per_image.diagonal() / scale, scale


def test_clip_score_is_100_times_the_positive_part_of_the_cosine_of_transformers_own_forward(checkpoints):
    folder, images = checkpoints / "clip_score", sample_images()
    cosines, _ = transformers_cosines(folder, folder, images, PROMPTS)
    assert cosines.min() < 0 < cosines.max()
    torch.testing.assert_close(load("clip_score", checkpoints)(images, PROMPTS), 100 * cosines.clamp_min(0), **FP32)


def test_pickscore_is_the_logit_of_transformers_own_forward(checkpoints):
    folder, images = checkpoints / "pickscore", sample_images()
    cosines, scale = transformers_cosines(folder, folder / "CLIP-ViT-H-14-laion2B-s32B-b79K", images, PROMPTS)
    assert scale == pytest.approx(100)
    torch.testing.assert_close(load("pickscore", checkpoints)(images, PROMPTS), scale * cosines, **FP32)


def hps_pixels_by_hand(image):
    """Longer side to 28 by torch's antialiased bicubic, in the middle of a black square, normalised."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    scale = 28 / max(image.size)
    size = (round(image.height * scale), round(image.width * scale))
    square = torch.zeros(3, 28, 28)
    top, left = (28 - size[0]) // 2, (28 - size[1]) // 2
    resized = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)[0]
    square[:, top : top + size[0], left : left + size[1]] = resized if scale != 1 else pixels[0]
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return (square - mean[:, None, None]) / std[:, None, None]


def byte_pair_ids(folder, words):
    """Ids of words given as their pieces, between the start and end token."""
    vocabulary = json.loads((folder / "vocab.json").read_text())
    return [vocabulary[piece] for piece in ("<|startoftext|>", *words, "<|endoftext|>")]


def test_hpsv2_is_the_cosine_of_open_clips_towers_written_out(checkpoints):
    folder, images = checkpoints / "hpsv2", sample_images()
    state = torch.load(folder / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    pieces = {
        "a red cat": ["a</w>", "red</w>", "cat</w>"],
        "a blue cat, 2 dogs": ["a</w>", "blue</w>", "cat</w>", ",</w>", "2</w>", "d", "o", "g", "s</w>"],
        "A photo": ["a</w>", "p", "h", "o", "t", "o</w>"],
        "blue": ["blue</w>"],
    }
    expected = [
        scorer_references.hps(state, hps_pixels_by_hand(image), byte_pair_ids(folder, pieces[prompt]))
        for image, prompt in zip(images, PROMPTS, strict=True)
    ]
    assert np.std(expected) > 0.02
    torch.testing.assert_close(load("hpsv2", checkpoints)(images, PROMPTS), torch.tensor(expected), **FP32)


def test_image_reward_is_blips_cross_attending_encoder_written_out(checkpoints):
    folder, images = checkpoints / "image_reward", sample_images(((28, 28), (40, 28), (28, 57), (300, 200), (34, 28)))
    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    # Words' places in vocab.txt: [UNK] 1, [CLS] 2, [SEP] 3, a 5, red 6, blue 7, cat 8, dog 9, ##s 10, photo 11, "," 12
    tokens = {
        "a red cat": [2, 5, 6, 8, 3],
        "a blue cat, 2 dogs": [2, 5, 7, 8, 12, 13, 9, 10, 3],
        "A photo": [2, 5, 11, 3],
        "[ENC] blue": [2, 15, 7, 3],  # [DEC] and [ENC] stand behind the 14 words
    }
    prompts = [*PROMPTS[:4], "[ENC] blue"]
    # These widths leave an even number of columns over, so both ways of rounding cut out the same middle.
    expected = [
        scorer_references.image_reward(state, clip_pixels_by_hand(image), tokens[prompt])
        for image, prompt in zip(images, prompts, strict=True)
    ]
    assert np.std(expected) > 0.02
    torch.testing.assert_close(load("image_reward", checkpoints)(images, prompts), torch.tensor(expected), **FP32)


def test_aesthetic_is_laions_head_in_numpy_on_transformers_unit_embedding(checkpoints):
    from transformers import CLIPModel

    folder, images = checkpoints / "aesthetic", sample_images()
    model = CLIPModel.from_pretrained(folder / "clip-vit-large-patch14").eval()
    with torch.no_grad():
        pixels = torch.stack([clip_pixels_by_hand(image) for image in images])
        x = model.get_image_features(pixels).pooler_output.double().numpy()
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    head = torch.load(folder / "aesthetic-model.pth", weights_only=True)
    for i in (0, 2, 4, 6, 7):
        x = x @ head[f"layers.{i}.weight"].double().numpy().T + head[f"layers.{i}.bias"].double().numpy()
    scores = load("aesthetic", checkpoints)(images, [""] * len(images))  # the prompt plays no part
    torch.testing.assert_close(scores, torch.from_numpy(x[:, 0]).float(), **FP32)


def test_jpeg_compressibility_is_minus_the_size_in_kilobytes():
    images = [Image.new("RGB", (64, 64)), *sample_images(((64, 64), (128, 128))), Image.new("L", (64, 64))]
    expected = []
    for image in images:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=95)
        expected.append(-len(buffer.getvalue()) / 1000)
    scores = registry.load("jpeg_compressibility")(images, [""] * 4)
    assert scores.tolist() == pytest.approx(expected)
    assert scores[0] > scores[1] > scores[2]
    assert scores[0] == pytest.approx(scores[3].item(), abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_score_does_not_depend_on_its_batch_and_keeps_its_place(name, checkpoints):
    images = sample_images()
    together = load(name, checkpoints)(images, PROMPTS)
    assert together.dtype == torch.float32
    assert together.shape == (5,)
    torch.testing.assert_close(load(name, checkpoints, batch_size=2)(images, PROMPTS), together, **FP32)
    one_by_one = load(name, checkpoints, batch_size=1)
    torch.testing.assert_close(one_by_one(images, PROMPTS), together, **FP32)
    torch.testing.assert_close(one_by_one(images[::-1], PROMPTS[::-1]), together.flip(0), **FP32)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_close_to_float32_and_has_another_identity(name, checkpoints):
    images = sample_images()
    exact, rounded = load(name, checkpoints), load(name, checkpoints, dtype="bfloat16")
    scores = exact(images, PROMPTS)
    # 8 bits of mantissa through a few random layers: a hundredth or so of a unit vector, times the score's own scale.
    unit = {"clip_score": 100, "pickscore": 100, "hpsv2": 1, "image_reward": 1, "aesthetic": 1}[name]
    torch.testing.assert_close(rounded(images, PROMPTS), scores, rtol=0, atol=0.03 * unit)
    assert not torch.equal(rounded(images, PROMPTS), scores)
    assert rounded.identity != exact.identity


@pytest.mark.parametrize("name", NAMES)
def test_images_of_every_mode_score_as_their_rgb(name, checkpoints):
    (image,) = sample_images(((40, 30),))
    images = [image.convert("L"), image.convert("RGBA"), image.convert("P")]
    reward = load(name, checkpoints)
    torch.testing.assert_close(
        reward(images, ["a cat"] * 3), reward([i.convert("RGB") for i in images], ["a cat"] * 3), rtol=0, atol=0
    )


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_loaded_before_the_first_call_and_once_after_it(name, checkpoints, monkeypatch):
    read = []

    def counted(path, *args, original=weights.read_tensors):
        read.append(path)
        return original(path, *args)

    for module in ("clip", "hpsv2", "image_reward", "aesthetic"):
        monkeypatch.setattr(f"prx_post.rewards.scorers.{module}.read_tensors", counted)
    reward = load(name, checkpoints)
    reward.check(PROMPTS)
    assert reward.identity
    assert read == []
    reward(sample_images(), PROMPTS)
    loaded = len(read)
    reward(sample_images(), PROMPTS)
    assert len(read) == loaded == len(set(read)) > 0


def test_a_repeated_prompt_is_embedded_once_a_call(checkpoints, monkeypatch):
    from prx_post.rewards.scorers.clip import CLIP

    embedded = []

    def counted(self, prompts, original=CLIP.embed_texts):
        embedded.extend(prompts)
        return original(self, prompts)

    monkeypatch.setattr(CLIP, "embed_texts", counted)
    load("hpsv2", checkpoints, batch_size=2)(sample_images(), PROMPTS)
    assert embedded == ["a red cat", "a blue cat, 2 dogs", "A photo", "blue"]


@pytest.mark.parametrize("name", NAMES)
def test_counts_and_empty_calls_are_checked(name, checkpoints):
    reward = load(name, checkpoints)
    with pytest.raises(PrxPostError, match="got 5 images, but must get as many as prompts"):
        reward(sample_images(), PROMPTS[:2])
    assert reward([], []).shape == (0,)


@pytest.mark.parametrize("name", ["clip_score", "pickscore", "hpsv2", "image_reward"])
def test_an_empty_prompt_is_refused(name, checkpoints):
    with pytest.raises(PrxPostError, match=f"prompt 1 is empty, so {name} has nothing"):
        load(name, checkpoints).check(["a cat", " \n"])


def test_prompts_longer_than_the_model_reads_are_cut_and_the_end_token_kept(checkpoints):
    folder = checkpoints / "hpsv2"
    tokens = byte_pair_tokens([folder / "vocab.json", folder / "merges.txt"], 77)
    (row,) = tokens(["cat " * 200]).tolist()
    assert row == byte_pair_ids(folder, ["cat</w>"] * 75)
    for name in NAMES:
        images = sample_images()[:1]
        reward = load(name, checkpoints)
        assert torch.equal(reward(images, ["cat " * 200]), reward(images, ["cat " * 300]))


def test_hpsv2_cleans_prompts_as_open_clip_and_reads_special_tokens_as_text(checkpoints):
    assert cleaned("  A&amp;amp;B\n\tschÃ¶n ") == "a&b schön"
    assert cleaned("a &amp;lt; b <c>") == "a < b <c>"  # twice, also where ftfy leaves what looks like HTML alone
    reward, images = load("hpsv2", checkpoints), sample_images()[:1] * 2
    same = reward(images, ["RED &amp;\n cat", "red & cat"])
    assert same[0] == pytest.approx(same[1].item(), abs=1e-6)  # rows of a batch may differ in the last bit
    # Read as the end token, it would hide what follows: the two prompts would score alike.
    hidden = reward(images, ["red <|endoftext|> cat", "red <|endoftext|> blue"])
    assert abs(hidden[0] - hidden[1]) > 1e-4


def ramp(width, height):
    """Column x has red x, row y has green y."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, :, 0], pixels[:, :, 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("width", "left"), [(28, 0), (29, 0), (30, 1), (31, 2), (33, 2), (35, 4)])
def test_the_centre_is_cut_out_rounding_halves_to_even(width, left):
    # round(0.5) = 0, round(1.5) = 2, round(2.5) = 2, round(3.5) = 4; the shorter side is 28 already: no resizing
    square = centre_square(ramp(width, 28), 28) * 255
    assert square[0, 0].round().tolist() == list(range(left, left + 28))
    assert square[1, :, 0].round().tolist() == list(range(28))


def test_the_longer_side_fits_and_the_rest_is_black():
    white = unit_range(Image.new("RGB", (56, 26), "white"))[None]
    square = padded_square(white, 28)[0]  # 28 × 13: of 15 rows 7 above and 8 below
    assert square.shape == (3, 28, 28)
    assert (square.mean(2) > 0.99).nonzero()[:, 1].unique().tolist() == list(range(7, 20))
    assert square[:, :7].abs().max() == square[:, 20:].abs().max() == 0
    square = padded_square(unit_range(ramp(13, 28))[None], 28)[0] * 255  # fits as it is
    assert square[0, 0].round().tolist() == [0] * 7 + list(range(13)) + [0] * 8
    # (0 - 0.48145466) / 0.26862954 and (0 - 0.4578275) / 0.26130258
    black = normalised(torch.zeros(3, 1, 1)).flatten()
    assert black.tolist()[:2] == pytest.approx([-1.7922625, -1.7520971])


def test_placements_that_cannot_be_are_refused_before_anything_loads(checkpoints):
    for placement, message in (
        ({"dtype": "float16"}, "dtype is 'float16', but must be one of float32, bfloat16"),
        ({"batch_size": 0}, "batch_size is 0, but must be above 0"),
        ({"device": "warp"}, "device is 'warp', but must be one of torch's"),
        ({"device": "cuda:99"}, "device is 'cuda:99', but this process sees"),
    ):
        with pytest.raises(PrxPostError, match=message):
            registry.load("hpsv2", weights=str(checkpoints / "hpsv2"), **placement)


def test_mps_says_why_it_is_not_there():
    with pytest.raises(PrxPostError, match="there is no mps because its weights are published as a pickle"):
        registry.load("mps")
    with pytest.raises(PrxPostError, match="there is no mps because"):
        registry.load("mps=/somewhere.pth")
    with pytest.raises(PrxPostError, match="jpeg_compressibility takes no weights"):
        registry.load("jpeg_compressibility=/somewhere")
