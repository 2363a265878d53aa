"""Settings of the anchor. Imports nothing heavy."""

from dataclasses import dataclass

from prx_post.base.settings import doc, require


@dataclass
class AnchorConfig:
    """A distillation that is trained along, so that what is rewarded stays what was distilled."""

    anchor_config: str | None = doc(
        "YAML file of a distillation, such as that of the student which is aligned: its losses, on its data and at its "
        "noise levels, are trained along; null: none are.",
        None,
        resume="fixed",
    )
    anchor_weight: float = doc("Weight of that loss, beside the stage's own.", 1.0, above=0)
    anchor_batch_size: int | None = doc(
        "Samples of that which each process takes in an optimizer step; null: per_device_train_batch_size.",
        None,
        above=0,
        resume="fixed",
    )

    def check_anchor(self) -> None:
        """Raise ConfigError for settings of an anchor that there is not."""
        for name, default in (("anchor_weight", 1.0), ("anchor_batch_size", None)):
            value, reason = getattr(self, name), "anchor_config is null"
            ok = self.anchor_config is not None or value == default
            require(ok, name, value, f"{default!r}", reason, "Leave it out, or set anchor_config")

    def check_zero(self, stage: int, offload: bool) -> None:
        """Raise ConfigError for split weights, of which a distillation knows nothing."""
        reason, ok = "a distillation is trained along, which needs whole weights", stage < 3
        require(ok or self.anchor_config is None, "deepspeed", "zero3", "zero1 or zero2", reason, "Set it")
