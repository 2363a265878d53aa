"""What children of the forkserver find imported: everything a stage imports on its way, none of it started.

The server swallows an ImportError of what it preloads, and children would be slow without a word: see
test_preloaded.py.
"""

import importlib

MODULES = (
    "datasets.packaged_modules",
    "deepspeed",
    "diffusers.image_processor",
    "diffusers.pipelines.prx.pipeline_prx",
    "ftfy",
    "mlxtend.data",
    "num2words",
    "onnxruntime",
    "peft",
    "rapidocr",
    "scipy.optimize",
    "torch._dynamo",
    "transformers.models.gemma.tokenization_gemma",
    "transformers.models.t5gemma.modeling_t5gemma",
    "trl.scripts.utils",
    "trl.cli.accelerate_config",
    "prx_post.engine.launch",
    "prx_post.stages.run",
    "prx_post.stages.distill.ahead",
    "prx_post.stages.sft.stage",
    "prx_post.evaluation.evaluate",
    "prx_post.planning.plan",
)
NAMES = {"diffusers": ("AutoencoderKL", "FlowMatchEulerDiscreteScheduler", "PRXTransformer2DModel")}
"""Attributes of lazy packages, which load when they are asked for."""

for module in MODULES:
    importlib.import_module(module)
for module, names in NAMES.items():
    for name in names:
        getattr(importlib.import_module(module), name)
