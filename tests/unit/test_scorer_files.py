"""Where scorers' weights are looked for, and what is said of those that are missing, damaged, unsafe or wrong."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from prx_post.base.errors import PrxPostError
from prx_post.rewards import registry
from tests.scorer_checkpoints import CHECKPOINTS, WEIGHT_FILES
from tests.unit.test_scorers import PROMPTS, load, sample_images

NAMES = list(CHECKPOINTS)


@pytest.mark.parametrize(
    ("name", "file", "hub_id"),
    [
        ("clip_score", "model.safetensors or pytorch_model.bin", "openai/clip-vit-large-patch14"),
        ("pickscore", "model.safetensors or pytorch_model.bin", "yuvalkirstain/PickScore_v1"),
        ("hpsv2", "HPS_v2.1_compressed.pt", "xswu/HPSv2"),
        ("image_reward", "ImageReward.pt", "zai-org/ImageReward"),
        ("aesthetic", "aesthetic-model.pth or sac+logos+ava1-l14-linearMSE.pth", "trl-lib/ddpo-aesthetic-predictor"),
    ],
)
def test_missing_weights_are_named_with_how_to_fetch_them(name, file, hub_id, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for given in (None, str(tmp_path)):
        with pytest.raises(PrxPostError) as raised:
            registry.load(name, weights=given)
        message = str(raised.value)
        assert message.startswith(f"{name} needs {file} {f'of {hub_id}' if given is None else f'in {tmp_path}'}")
        assert message.endswith(f"`hf download {hub_id} {file.split()[0]}`, or say where it is by `{name}=PATH`.")
    with pytest.raises(PrxPostError, match="no such file or folder, and it is not a Hub id"):
        registry.load(name, weights="./nowhere")
    with pytest.raises(PrxPostError, match="of someone/else, which is not in the Hub's cache .* cannot be reached"):
        registry.load(name, weights="someone/else")


def test_a_missing_companion_is_named(copy_of, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, file, hub_id in (
        ("hpsv2", "vocab.json", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        ("image_reward", "vocab.txt", "google-bert/bert-base-uncased"),
    ):
        folder = copy_of(name)
        (folder / file).unlink()
        with pytest.raises(PrxPostError, match=f"{name} needs {file} of {hub_id}"):
            registry.load(name, weights=str(folder))


def in_hub_cache(cache, hub_id, folder, commit):
    """Put a folder's files where huggingface_hub would after a download."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)


def test_weights_in_the_hubs_cache_are_found_and_known_by_their_commit(checkpoints, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    processor = checkpoints / "pickscore" / "CLIP-ViT-H-14-laion2B-s32B-b79K"
    in_hub_cache(tmp_path, "yuvalkirstain/PickScore_v1", checkpoints / "pickscore", "a" * 40)
    in_hub_cache(tmp_path, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", processor, "b" * 40)
    reward = registry.load("pickscore", device="cpu")
    assert f"yuvalkirstain/PickScore_v1@{'a' * 12}" in reward.identity
    assert f"laion/CLIP-ViT-H-14-laion2B-s32B-b79K@{'b' * 12}" in reward.identity
    images = sample_images()
    assert torch.equal(reward(images, PROMPTS), load("pickscore", checkpoints)(images, PROMPTS))


def test_weights_may_be_a_file_and_change_the_identity_with_their_content(copy_of):
    folder = copy_of("hpsv2")
    by_file = registry.load(f"hpsv2={folder}/HPS_v2.1_compressed.pt", device="cpu")
    assert by_file.identity == registry.load("hpsv2", weights=str(folder), device="cpu").identity
    images = sample_images()
    before = by_file(images, PROMPTS)
    file = folder / "HPS_v2.1_compressed.pt"
    content = torch.load(file, weights_only=True)
    content["state_dict"]["text_projection"] *= torch.linspace(0.5, 1.5, 48)
    torch.save(content, file)
    changed = registry.load("hpsv2", weights=str(folder), device="cpu")
    assert changed.identity != by_file.identity
    assert not torch.allclose(changed(images, PROMPTS), before)


def test_pytorch_weights_serve_where_there_are_no_safetensors(copy_of, checkpoints):
    folder, images = copy_of("pickscore"), sample_images()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    reward = registry.load("pickscore", weights=str(folder), device="cpu")
    assert torch.equal(reward(images, PROMPTS), load("pickscore", checkpoints)(images, PROMPTS))


def change_tensors(path, change):
    content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    change(content.get("state_dict", content))
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("clip_score", "visual_projection.weight"),
        ("pickscore", "text_model.encoder.layers.1.self_attn.q_proj.bias"),
        ("hpsv2", "visual.transformer.resblocks.2.ln_2.bias"),
        ("image_reward", "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"),
        ("aesthetic", "layers.4.bias"),
    ],
)
def test_missing_unexpected_and_misshaped_weights_are_named(name, key, copy_of):
    folder = copy_of(name)
    file = folder / WEIGHT_FILES[name]
    change_tensors(file, lambda tensors: tensors.update({key: tensors[key][:-1].clone()}))
    with pytest.raises(PrxPostError, match=r"does not hold .*of another shape are \S+ \(.*\) for \("):
        registry.load(name, weights=str(folder), device="cpu")(sample_images(), PROMPTS)
    change_tensors(file, lambda tensors: tensors.pop(key))
    change_tensors(file, lambda tensors: tensors.update({"layers.99.stray": torch.zeros(1)}))
    with pytest.raises(PrxPostError, match="does not hold .*stray") as raised:
        registry.load(name, weights=str(folder), device="cpu")(sample_images(), PROMPTS)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["hpsv2", "image_reward", "aesthetic"])
def test_weights_of_another_model_are_refused(name, copy_of):
    folder = copy_of(name)
    torch.save({"weight": torch.zeros(2)}, folder / WEIGHT_FILES[name])
    with pytest.raises(PrxPostError, match="does not hold .*weight"):
        registry.load(name, weights=str(folder), device="cpu")(sample_images(), PROMPTS)
    torch.save([1, 2], folder / WEIGHT_FILES[name])
    with pytest.raises(PrxPostError, match="holds no dictionary of tensors"):
        registry.load(name, weights=str(folder), device="cpu")(sample_images(), PROMPTS)


class Arbitrary:
    """What a malicious or careless checkpoint may carry."""

    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


@pytest.mark.parametrize("name", ["hpsv2", "image_reward", "aesthetic"])
def test_a_pickle_of_more_than_tensors_is_refused_unread(name, copy_of):
    folder = copy_of(name)
    torch.save({"state_dict": Arbitrary()}, folder / WEIGHT_FILES[name])
    with pytest.raises(PrxPostError, match="not loaded because a pickle may run any code"):
        registry.load(name, weights=str(folder), device="cpu")(sample_images(), PROMPTS)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_cut_short_is_named(name, copy_of):
    folder = copy_of(name)
    file = folder / WEIGHT_FILES[name]
    whole = file.read_bytes()
    for kept in (len(whole) // 2, 0):
        file.write_bytes(whole[:kept])
        with pytest.raises(PrxPostError, match=f"{file.name} (cannot be read|is damaged)"):
            registry.load(name, weights=str(folder), device="cpu")(sample_images(), PROMPTS)


def test_side_files_that_are_damaged_are_named(copy_of):
    for name, file in (("clip_score", "config.json"), ("image_reward", "med_config.json"), ("hpsv2", "vocab.json")):
        folder = copy_of(name)
        for content, message in (("{", "is not valid JSON"), ("[]", "must hold a JSON object")):
            (folder / file).write_text(content)
            with pytest.raises(PrxPostError, match=f"{file} {message}"):
                registry.load(name, weights=str(folder), device="cpu")(sample_images(), PROMPTS)
    (folder.parent / "image_reward" / "med_config.json").write_text("{}")
    with pytest.raises(PrxPostError, match="has no 'vocab_size'"):
        registry.load("image_reward", weights=str(folder.parent / "image_reward"), device="cpu")(
            sample_images(), PROMPTS
        )


@pytest.mark.parametrize("name", ["hpsv2", "image_reward"])
def test_weights_stored_in_half_precision_are_computed_with_in_float32(name, copy_of):
    folder, images, single = copy_of(name), sample_images(), {}

    def halve(tensors):
        tensors.update({key: value.half() for key, value in tensors.items() if value.is_floating_point()})

    def back(tensors):
        tensors.update({key: value.float() for key, value in tensors.items() if value.is_floating_point()})

    for step, change in (("half", halve), ("float", back)):
        change_tensors(folder / WEIGHT_FILES[name], change)
        single[step] = registry.load(name, weights=str(folder), device="cpu")(images, PROMPTS)
    assert torch.equal(single["half"], single["float"])
