"""LLaVA 1.5 and its layout: a tower such as CLIP, a projector of two layers, a language model."""

from recon.models.vlm import VisionLanguageAdapter


class Llava(VisionLanguageAdapter):
    """LlavaForConditionalGeneration; every picture of one sample has the tower's size.

    `pixel_values` are [pictures, 3, height, width].
    """

    network_class = "LlavaForConditionalGeneration"
    example = "llava-hf/llava-1.5-7b-hf"
