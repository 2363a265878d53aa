"""Remake the embedded world's weights: judge, tokenizer and text encoder, autoencoder, then the base by pretraining.

Each part is skipped if its files are there, so an interrupted build resumes where it stopped. Seeded; tens of minutes
on two cores. The base is pretrained by the same code as any fine-tuning run, from a transformer with fresh weights.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PRXTransformer2DModel

from prx_post import __version__
from prx_post.base.errors import PrxPostError
from prx_post.base.files import make_folder, require_empty
from prx_post.data.config import DataConfig
from prx_post.model.card import ModelCard
from prx_post.model.checkpoint import emit, load
from prx_post.model.config import ModelConfig
from prx_post.model.inference import Inference
from prx_post.model.text import save_text_encoder
from prx_post.stages.run import run
from prx_post.stages.sft.config import SFTConfig
from prx_post.tiny.datasets import PRETRAIN_SIZE, PRETRAIN_WRONG_CAPTIONS, pretraining_images, write_parquet
from prx_post.tiny.handwriting import HEIGHT, WIDTH
from prx_post.tiny.make import autoencoder, judge, language

JUDGE_STEPS, LANGUAGE_STEPS, AUTOENCODER_STEPS = 3000, 1200, 3000
PRETRAIN_STEPS = 2200
GUIDANCE, STEPS = 4.0, 28
"""What the base wants at inference, chosen on validation numbers: see weights/README.md."""
STORED_AS = "bfloat16"


def new_transformer(seed: int) -> PRXTransformer2DModel:
    """2.3M parameters; 32 image tokens for a 32×64 image."""
    torch.manual_seed(seed)
    return PRXTransformer2DModel(
        in_channels=4,
        patch_size=2,
        context_in_dim=language.TEXT_WIDTH,
        hidden_size=128,
        mlp_ratio=3.5,
        num_heads=4,
        depth=6,
        axes_dim=[16, 16],
    )


def build(folder: Path, seed: int = 0) -> Path:
    """Make `folder/base` (a PRX pipeline) and `folder/judge.safetensors`. Returns the pipeline's folder."""
    _claim(folder, seed)
    curves = folder / "curves.jsonl"

    def log(line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)
        with curves.open("a") as file:
            file.write(json.dumps(line) + "\n")

    if not (folder / "judge.safetensors").exists():
        judge.save_judge(judge.train_judge(JUDGE_STEPS, 64, seed, log), folder / "judge.safetensors")
    start = folder / "untrained"
    if not (start / "model_index.json").exists():
        _build_untrained(start, seed, log)
    data = folder / "pretrain.parquet"
    if not data.exists():
        write_parquet(pretraining_images(seed), data)
    pretraining = folder / "pretraining"
    if not (pretraining / "final").exists():
        shutil.rmtree(pretraining, ignore_errors=True)
        model = ModelConfig(model_name_or_path=str(start))
        images = DataConfig(dataset_name=str(data), height=HEIGHT, width=WIDTH, cache_dir=str(folder / "cache"))
        run("sft", (model, images, pretraining_config(pretraining, seed)))
    checkpoint = load(str(pretraining / "final"))
    card = base_card()
    checkpoint.card = card.render()
    checkpoint.inference = Inference(card.num_inference_steps, card.guidance_scale, HEIGHT, WIDTH)
    return emit(checkpoint, folder / "base", STORED_AS)


def _claim(folder: Path, seed: int) -> None:
    """Mark `folder` as a build of this seed; raises PrxPostError if it is anything else or finished."""
    mark = folder / "build.json"
    wanted = {"seed": seed, "pretrain_steps": PRETRAIN_STEPS, "wrong_captions": PRETRAIN_WRONG_CAPTIONS}
    if not mark.exists():
        make_folder(require_empty(str(folder)))
        mark.write_text(json.dumps(wanted))
    if json.loads(mark.read_text()) != wanted or (folder / "base").exists():
        raise PrxPostError(f"{folder} holds a finished build, or one with other settings. Choose another output_dir.")


def pretraining_config(output_dir: Path, seed: int) -> SFTConfig:
    return SFTConfig(
        output_dir=str(output_dir),
        max_steps=PRETRAIN_STEPS,
        per_device_train_batch_size=64,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=200,
        weight_decay=0.01,
        adam_beta2=0.99,
        ema_decay=0.998,
        logging_steps=50,
        report_to=[],
        sample_steps=1000,
        sample_prompts=["472", "eighty-one", "trois cent six", "neunhundertfünf"],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        seed=seed,
    )


def _build_untrained(folder: Path, seed: int, log: Any) -> None:
    """A complete pipeline whose transformer has fresh weights."""
    partial = folder.with_name("untrained.partial")
    if not (partial / "tokenizer").exists():
        tokenizer = language.train_tokenizer()
        reader = language.train_language_model(tokenizer, LANGUAGE_STEPS, 128, seed, log)
        save_text_encoder(reader.get_encoder(), partial / "text_encoder")
        tokenizer.save_pretrained(partial / "tokenizer")
    if not (partial / "vae").exists():
        vae = autoencoder.train_autoencoder(AUTOENCODER_STEPS, 16, seed, log)
        vae.to(torch.bfloat16).save_pretrained(partial / "vae")
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0).save_pretrained(partial / "scheduler")
    new_transformer(seed).save_pretrained(partial / "transformer")
    index = {
        "_class_name": "PRXPipeline",
        "_diffusers_version": "0.42.1",
        "default_sample_size": 64,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["prx", "T5GemmaEncoder"],
        "tokenizer": ["transformers", "GemmaTokenizerFast"],
        "transformer": ["diffusers", "PRXTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    partial.rename(folder)


def base_card() -> ModelCard:
    return ModelCard(
        title="prx-post-tiny-base",
        stage="pretraining",
        base="fresh weights",
        base_is_on_hub=False,
        licence="apache-2.0",
        data=f"{PRETRAIN_SIZE} images of handwritten numbers, {PRETRAIN_WRONG_CAPTIONS:.0%} with a wrong caption",
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        dtype=STORED_AS,
        height=HEIGHT,
        width=WIDTH,
        example="four hundred and seventy-two",
        config={"prx_post": __version__, "command": "prx-post tiny build"},
    )
