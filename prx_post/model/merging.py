"""LoRA adapters folded into a transformer's weights, by peft."""

from pathlib import Path
from typing import Any

from prx_post.base.errors import PrxPostError


def merge_adapter(transformer: Any, folder: Path) -> Any:
    """The transformer with a saved adapter folded into its weights. Raises PrxPostError if their shapes differ."""
    from peft import PeftModel

    try:
        return merge(PeftModel.from_pretrained(transformer, folder))
    except RuntimeError as error:
        raise PrxPostError(
            f"adapter is {str(folder)!r}, whose weights do not fit: {' '.join(str(error).split())[:300]}"
        ) from error


def merge(peft_model: Any) -> Any:
    """Fold the adapter into the weights and return the plain transformer. The adapter is gone afterwards."""
    return peft_model.merge_and_unload()
