"""What children of the forkserver find imported: everything a stage imports on its way, none of it started."""

import datasets.packaged_modules
import deepspeed
import diffusers.image_processor
import diffusers.pipelines.prx.pipeline_prx
import ftfy
import onnxruntime
import peft
import rapidocr
import scipy.optimize
import tensorboard.summary
import torch._dynamo
import transformers.models.gemma.tokenization_gemma
import transformers.models.t5gemma.modeling_t5gemma
import trl
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, PRXTransformer2DModel
from transformers import GemmaTokenizerFast
