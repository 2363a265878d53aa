"""Aspect buckets: at which height and width an image is trained."""

from prx_post.base.errors import PrxPostError
from prx_post.model.checkpoint import PipelineFolder

Size = tuple[int, int]


class Buckets:
    """One fixed size, or the pipeline's own aspect-ratio bins for its default_sample_size.

    Raises:
        PrxPostError: the size does not fit the model, or there are no bins for this checkpoint and no size was given.
    """

    def __init__(self, pipeline: PipelineFolder, height: int | None, width: int | None) -> None:
        from diffusers.pipelines.prx.pipeline_prx import ASPECT_RATIO_BINS

        self.fixed: Size | None = None
        if height is not None and width is not None:
            pipeline.check_size(height, width)
            self.fixed = (height, width)
            return
        sample_size = pipeline.default_sample_size
        if sample_size not in ASPECT_RATIO_BINS:
            raise PrxPostError(
                f"height is null, but must be set because {pipeline.source} has a default_sample_size of {sample_size} "
                f"and aspect buckets exist for {', '.join(map(str, ASPECT_RATIO_BINS))} only. Set height and width."
            )
        self.ratios = ASPECT_RATIO_BINS[sample_size]
        for bin_height, bin_width in self.ratios.values():
            pipeline.check_size(int(bin_height), int(bin_width))

    @property
    def largest(self) -> Size:
        """The one with the most pixels."""
        if self.fixed is not None:
            return self.fixed
        sizes = [(int(height), int(width)) for height, width in self.ratios.values()]
        return max(sizes, key=lambda size: size[0] * size[1])

    def __call__(self, height: int, width: int) -> Size:
        """The (height, width) at which an image of this size is trained: what the pipeline would generate for it."""
        from diffusers.image_processor import PixArtImageProcessor

        if self.fixed is not None:
            return self.fixed
        return PixArtImageProcessor.classify_height_width_bin(height, width, ratios=self.ratios)
