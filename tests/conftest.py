"""Shared pieces: the embedded base, small data sets, a pipeline with random weights of each variant."""

import json
import os
import subprocess
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from prx_post.tiny import BASE
from prx_post.tiny.datasets import CaptionedImage, write_folder

SLOW = (
    *("test_processes.py", "test_plan_memory.py", "test_faults.py", "test_golden.py", "test_references.py"),
    *("test_distill_processes.py", "test_dpo.py", "test_online_source.py", "test_distill.py", "test_eval.py"),
)
"""Files that take minutes: begun first, so that no worker is left alone with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW))


@pytest.fixture(autouse=True, scope="session")
def _quiet_home(tmp_path_factory):
    """No test reads or writes the user's caches; what DeepSpeed compiles is shared by the workers of one run alone."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    os.environ["TORCH_EXTENSIONS_DIR"] = str(shared / "torch_extensions")
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf"))
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """Accelerate keeps the precision of the first run of a process, and DeepSpeed wants a launcher's variables even
    alone, by which the next run would take itself for one of several; every test starts anew.
    """
    from tests.processes import LAUNCHERS_OWN

    absent = [name for name in LAUNCHERS_OWN if name not in os.environ]
    yield
    for name in absent:
        os.environ.pop(name, None)
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def base() -> Path:
    return BASE


def numbered_images(numbers: list[int], seed: int = 0) -> list[CaptionedImage]:
    import numpy as np

    from prx_post.tiny.handwriting import write_number

    rng = np.random.default_rng(seed)
    return [CaptionedImage(write_number(n, "generator", rng), n, str(n)) for n in numbers]


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """48 captioned images as an image folder."""
    folder = tmp_path_factory.mktemp("data") / "images"
    write_folder(numbered_images(list(range(100, 148))), folder)
    return folder


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory) -> Path:
    """Seven prompts to distil on."""
    from tests.distilling import PROMPTS

    path = tmp_path_factory.mktemp("prompts") / "train.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    return path


@pytest.fixture(scope="session")
def warm_cache(tmp_path_factory) -> Path:
    """A cache folder that tests may share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def prx_post(tmp_path_factory):
    """Run the command line in a process of its own; returns its CompletedProcess."""
    from tests.processes import Child

    def run(*args: object, check: bool = False) -> subprocess.CompletedProcess:
        folder = tmp_path_factory.mktemp("command")
        out, err = folder / "out", folder / "err"
        code = Child([*args], out, errors=err, **os.environ).wait(timeout=600)
        result = subprocess.CompletedProcess(args, code, out.read_text(), err.read_text())
        if check:
            assert result.returncode == 0, result.stderr
        return result

    return run


@pytest.fixture(scope="session")
def dc_ae_pipeline(tmp_path_factory) -> Path:
    """A PRX pipeline of the DC-AE variant with random weights: factor 4, no shift, patch 1."""
    import shutil

    from diffusers import AutoencoderDC, PRXTransformer2DModel

    folder = tmp_path_factory.mktemp("dc-ae") / "pipeline"
    shutil.copytree(BASE, folder)
    torch.manual_seed(0)
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16, 32),
        decoder_block_out_channels=(8, 16, 32),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        scaling_factor=0.7,
    )
    transformer = PRXTransformer2DModel(
        in_channels=8, patch_size=1, context_in_dim=128, hidden_size=32, num_heads=2, depth=2, axes_dim=[8, 8]
    )
    randomise_modulation(transformer)
    for name, model in (("vae", vae), ("transformer", transformer)):
        shutil.rmtree(folder / name)
        model.save_pretrained(folder / name)
    index = json.loads((folder / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderDC"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def randomise_modulation(transformer: torch.nn.Module) -> None:
    """A fresh PRX is the identity in every block, because its modulation is zero: tests would compare equals."""
    for name, parameter in transformer.named_parameters():
        if "modulation" in name:
            torch.nn.init.normal_(parameter, std=0.05)
