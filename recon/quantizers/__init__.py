"""Quantisers as pure functions of tensors: grids, ranges, rounding, transforms and storage."""

from recon.quantizers.affine import (
    absmax_scale,
    codes,
    dequantize,
    fake_quantize,
    fake_quantize_tokens,
    round_ste,
    weight_range,
)
from recon.quantizers.gptq import gptq_codes
from recon.quantizers.packing import pack, unpack
from recon.quantizers.ranges import clip_rows, mse_clip_ratio
from recon.quantizers.spec import QuantSpec
from recon.quantizers.transforms import (
    KroneckerTransform,
    apply_kronecker,
    kronecker_split,
    smoothing_scale,
    transform_gram,
)

__all__ = [
    "KroneckerTransform",
    "QuantSpec",
    "absmax_scale",
    "apply_kronecker",
    "clip_rows",
    "codes",
    "dequantize",
    "fake_quantize",
    "fake_quantize_tokens",
    "gptq_codes",
    "kronecker_split",
    "mse_clip_ratio",
    "pack",
    "round_ste",
    "smoothing_scale",
    "transform_gram",
    "unpack",
    "weight_range",
]
