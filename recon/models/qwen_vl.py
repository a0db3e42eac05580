"""Qwen2-VL and Qwen2.5-VL: patches of any grid, merged in the tower; positions on three axes."""

from typing import Any, cast

from torch import Tensor, nn

from recon.models.adapter import Device
from recon.models.vlm import VisionLanguageAdapter
from recon.types import Sample


class Qwen2VL(VisionLanguageAdapter):
    """Qwen2VLForConditionalGeneration on pictures; videos are not read.

    `pixel_values` are [patches of all pictures, values], `image_grid_thw` [pictures, 3] says how
    they lie. Rotary positions of picture tokens count frame, row and column.
    """

    network_class = "Qwen2VLForConditionalGeneration"
    example = "Qwen/Qwen2-VL-7B-Instruct"
    picture_inputs = ("pixel_values", "image_grid_thw")

    def call_arguments(self, sample: Sample, device: Device) -> dict[str, Tensor]:
        """As the base, and which tokens are a picture's: without it positions would be a text's."""
        given = super().call_arguments(sample, device)
        return given | {"mm_token_type_ids": self.image_tokens(sample).int().to(device)}

    def _position_ids(self, base: nn.Module, sample: Sample, device: Device) -> Tensor | None:
        given = self.call_arguments(sample, device)
        if "image_grid_thw" not in given:
            return None
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw")
        positions, _ = cast(Any, base).get_rope_index(**{name: given[name] for name in names})
        return cast(Tensor, positions)


class Qwen25VL(Qwen2VL):
    """Qwen2_5_VLForConditionalGeneration: as Qwen2-VL, the tower with windows of attention."""

    network_class = "Qwen2_5_VLForConditionalGeneration"
    example = "Qwen/Qwen2.5-VL-7B-Instruct"
