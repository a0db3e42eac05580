"""What Q-VLM refuses, in seconds and before anything is written."""

from typing import TYPE_CHECKING

from recon.engine import vision
from recon.engine.assembly import linear
from recon.errors import ConfigError
from recon.models.capabilities import SeesPictures
from recon.quantizers.affine import check_group_size

if TYPE_CHECKING:
    from recon.methods.q_vlm import QVLM


def check_numbers(method: "QVLM", largest: int) -> None:
    """Refuses numbers out of range; `largest` layers of a block are the most.

    Raises:
        ConfigError: Naming key, value and rule.
    """
    limits: tuple[tuple[str, float, float, float | None], ...] = (
        ("audited", method.audited, 0, None),
        ("largest", method.largest, 1, largest),
        ("sweeps", method.sweeps, 1, None),
        ("range_tokens", method.range_tokens, 1, None),
        ("steps", method.steps, 1, None),
        ("price", method.price, 0, None),
        ("image_weight", 1 if method.image_weight == "mbq" else method.image_weight, 0, None),
    )
    for name, value, least, most in limits:
        if value < least or (most is not None and value > most):
            rule = f"at least {least}" if most is None else f"in [{least}, {most}]"
            raise ConfigError(f"model.{name} must be {rule}, got {value}.")
    quantile = method.threshold_quantile
    if quantile is not None and not 0 <= quantile <= 1:
        raise ConfigError(f"model.threshold_quantile must lie in [0, 1], got {quantile}.")
    for name, values, least in (
        ("shrinks", method.shrinks, 0.0),
        ("percentiles", method.percentiles, 0.5),
    ):
        if not values or not all(least < value <= 1 for value in values):
            raise ConfigError(
                f"model.{name} must be shares in ({least}, 1], at least one, got {values}."
            )


def check_settings(method: "QVLM") -> None:
    """Refuses what the network, or another setting, leaves nothing to do for.

    Raises:
        ReconError: Naming key, value, rule and remedy.
    """
    spec = method.activation
    if method.grid == "percentile" and (spec is None or spec.strategy == "token"):
        raise ConfigError(
            "model.grid is percentile, but ranges of tokens are taken at run time and have no "
            "percentiles. Set model.grid: shrink, or model.activation.strategy: channel."
        )
    if method.proxy == "ded" and not method.has_choice:
        raise ConfigError(
            "model.proxy is ded, what a joint search saves, but there is nothing to search: "
            f"model.activation is {spec}, candidates are {method.shares}. Set model.proxy: "
            "entropy, or quantise activations and give more candidates."
        )
    if method.image_weight != 1:
        setting = f"model.image_weight is {method.image_weight}"
        vision.sees_pictures(method.adapter, setting, "set it to 1")
    if method.quantize_vision or method.veo.enabled:
        asked = "quantize_vision" if method.quantize_vision else "veo.enabled"
        setting = f"model.{asked} is true"
        _check_encoder(method, vision.sees_pictures(method.adapter, setting, "set it to false"))


def _check_encoder(method: "QVLM", adapter: SeesPictures) -> None:
    if method.quantize_vision:
        empty = method.adapter.empty_network()
        for name in (name for names in vision.full_groups(adapter) for name in names):
            check_group_size(linear(empty, name).in_features, method.weight)
    there = {
        "act_ranges": method.quantize_vision and method.activation is not None,
        "norms": bool(adapter.vision_norms()),
        "weight_scales": method.quantize_vision,
        "rounding": method.quantize_vision,
        "weights": True,
    }
    if method.veo.enabled and not any(there[part] for part in method.veo.params):
        raise ConfigError(
            f"model.veo is to tune {', '.join(method.veo.params)}, and the visual encoder has "
            f"none: model.quantize_vision is {str(method.quantize_vision).lower()}, and it has "
            f"{len(adapter.vision_norms())} norms. Set quantize_vision: true, or add norms or "
            "weights to veo.params."
        )
