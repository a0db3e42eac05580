"""What finished runs are compared by: rows of numbers from their json files."""

from collections.abc import Mapping
from typing import Any

ROWS: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("method", "summary.json", ("method",), ""),
    ("weight bits", "summary.json", ("bits", "weight"), "d"),
    ("activation bits", "summary.json", ("bits", "activation"), "d"),
    ("error, round to nearest", "summary.json", ("error", "round_to_nearest"), ".4e"),
    ("error, reconstructed", "summary.json", ("error", "reconstructed"), ".4e"),
    ("seconds", "summary.json", ("seconds", "total"), ".0f"),
    ("bytes of quantised linears", "summary.json", ("size_bytes", "quantized"), ",d"),
    ("paired PSNR, dB", "test.json", ("paired", "psnr"), ".2f"),
    (
        "paired PSNR, dB, round to nearest",
        "test.json",
        ("paired_round_to_nearest", "psnr"),
        ".2f",
    ),
    ("paired SSIM", "test.json", ("paired", "ssim"), ".4f"),
    ("oracle, all right, teacher", "test.json", ("full_precision", "all"), ".3f"),
    ("oracle, all right, quantised", "test.json", ("quantized", "all"), ".3f"),
    ("FID, teacher", "test.json", ("full_precision", "fid"), ".3f"),
    ("FID, quantised", "test.json", ("quantized", "fid"), ".3f"),
    ("KID, teacher", "test.json", ("full_precision", "kid"), ".4f"),
    ("KID, quantised", "test.json", ("quantized", "kid"), ".4f"),
    ("precision, quantised", "test.json", ("quantized", "precision"), ".3f"),
    ("recall, quantised", "test.json", ("quantized", "recall"), ".3f"),
)
"""Label, file, keys inside it and format of each row."""


def inside(content: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """The value under nested keys; None where one of them is missing."""
    value: Any = content
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
