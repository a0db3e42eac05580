"""Idefics3 and SmolVLM: a SigLIP tower, pixel shuffle and one projection."""

from recon.models.vlm import VisionLanguageAdapter


class Idefics3(VisionLanguageAdapter):
    """Idefics3ForConditionalGeneration; a large picture enters as several tiles.

    `pixel_values` are [1, tiles, 3, height, width], `pixel_attention_mask` [1, tiles, height,
    width] is False where a tile was filled up.
    """

    network_class = "Idefics3ForConditionalGeneration"
    example = "HuggingFaceM4/Idefics3-8B-Llama3"
    picture_inputs = ("pixel_values", "pixel_attention_mask")


class SmolVLM(Idefics3):
    """SmolVLMForConditionalGeneration: the same parts under another class."""

    network_class = "SmolVLMForConditionalGeneration"
    example = "HuggingFaceTB/SmolVLM2-2.2B-Instruct"
