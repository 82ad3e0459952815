"""Image processor and tokenizer of a DenseCLIP model in one."""

from transformers import ProcessorMixin


class DenseCLIPProcessor(ProcessorMixin):
    """
    The image processor and the tokenizer of a saved model, as `AutoProcessor` gives them.

    Args:
        image_processor ([`DenseCLIPImageProcessor`]): for `images=`.
        tokenizer (`PreTrainedTokenizerBase`): for `text=`.
    """

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        super().__init__(image_processor, tokenizer, **kwargs)

    def post_process_semantic_segmentation(self, *args, **kwargs):
        """[`DenseCLIPImageProcessor.post_process_semantic_segmentation`]."""
        return self.image_processor.post_process_semantic_segmentation(*args, **kwargs)


__all__ = ["DenseCLIPProcessor"]
