"""The model card of an emitted pipeline."""

from dataclasses import dataclass, field
from typing import Any

import yaml

TEMPLATE = """\
{front_matter}
# {title}

{summary}

| | |
|---|---|
| Stage | {stage} |
| Base | {base} |
| Data | {data} |
| Recommended steps | {steps} |
| Recommended guidance | {guidance} |
| Size | {size} |
| Stored as | {dtype} |

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder", dtype=torch.{dtype})
image = pipe("{example}", num_inference_steps={steps}, guidance_scale={guidance}{size_arguments}).images[0]
```

## Metrics

{metrics}

## Configuration

```yaml
{config}```
"""

ADAPTER_TEMPLATE = """\
{front_matter}
# {title}

A LoRA adapter for the transformer of {whole_base}, trained with prx-post ({stage}). The pipeline beside it, `final/`,
has it merged already.

```python
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel

pipe = DiffusionPipeline.from_pretrained("{base}")
{merged}pipe.transformer = PeftModel.from_pretrained(pipe.transformer, "path/to/this/folder")
```
"""


@dataclass
class ModelCard:
    title: str
    stage: str
    base: str
    base_is_on_hub: bool
    data: str
    num_inference_steps: int
    guidance_scale: float
    dtype: str
    height: int | None = None
    width: int | None = None
    skip_text_cleaning: bool = False
    base_adapter: str | None = None
    """A LoRA adapter that the base had merged."""
    licence: str | None = None
    """The base's; post-training does not change it."""
    example: str = "A front-facing portrait of a lion in the golden savanna at sunset"
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    def _front_matter(self, library: str) -> str:
        front: dict[str, Any] = {
            "library_name": library,
            "pipeline_tag": "text-to-image",
            "tags": ["prx", "prx-post", self.stage],
        }
        if self.licence:
            front["license"] = self.licence
        if self.base_is_on_hub:
            front["base_model"] = self.base
        return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n"

    def render_adapter(self) -> str:
        """README.md of the adapter's folder."""
        front_matter = self._front_matter("peft")
        merged = f'pipe.transformer = PeftModel.from_pretrained(pipe.transformer, "{self.base_adapter}")'
        return ADAPTER_TEMPLATE.format(
            front_matter=front_matter,
            title=self.title,
            base=self.base,
            whole_base=self.whole_base,
            merged=f"{merged}.merge_and_unload()\n" if self.base_adapter else "",
            stage=self.stage,
        )

    @property
    def whole_base(self) -> str:
        return f"{self.base} with the adapter {self.base_adapter} merged" if self.base_adapter else self.base

    def render(self) -> str:
        """README.md of the pipeline's folder."""
        arguments = f", height={self.height}, width={self.width}, use_resolution_binning=False" if self.height else ""
        arguments += ", skip_text_cleaning=True" if self.skip_text_cleaning else ""
        rows = [f"| {name} | {value} |" for name, value in self.metrics.items()]
        return TEMPLATE.format(
            front_matter=self._front_matter("diffusers"),
            title=self.title,
            summary=f"A PRX text-to-image pipeline, post-trained with prx-post ({self.stage}).",
            stage=self.stage,
            base=self.whole_base,
            data=self.data,
            steps=self.num_inference_steps,
            guidance=self.guidance_scale,
            size=f"{self.width}×{self.height}" if self.height else "the base's aspect buckets",
            dtype=self.dtype,
            example=self.example.replace('"', '\\"'),
            size_arguments=arguments,
            metrics="\n".join(["| | |", "|---|---|", *rows]) if rows else "None were measured in this run.",
            config=yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True),
        )
