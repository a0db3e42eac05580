"""InternVL as transformers lays it out (repositories with the suffix -hf)."""

from recon.models.vlm import VisionLanguageAdapter


class InternVL(VisionLanguageAdapter):
    """InternVLForConditionalGeneration; a large picture enters as several tiles.

    `pixel_values` are [tiles, 3, height, width].
    """

    network_class = "InternVLForConditionalGeneration"
    example = "OpenGVLab/InternVL3-8B-hf"
