"""Settings of a method that cannot work, each refused with key, value, rule and remedy."""

from typing import TYPE_CHECKING

from recon.engine import attention
from recon.errors import ConfigError
from recon.quantizers.spec import MAX_BITS, MIN_BITS

if TYPE_CHECKING:
    from recon.engine.reconstruction import Reconstruction


def check_grids(module: "Reconstruction") -> None:
    """Ranges and zero-points only where the method finds them.

    Raises:
        ConfigError: The method does not, or they are not of each output channel.
    """
    allowed = module.activation_strategies
    found = module.activation.strategy if module.activation else "token"
    if module.weight.strategy == "token" or found not in allowed:
        raise ConfigError(
            f"Weights take strategy channel or group, got {module.weight.strategy}; activations "
            f"of {type(module).__name__} take {' or '.join(allowed)} (token with dynamic: true), "
            f"got {found}. Change model.weight or model.activation."
        )
    for grid in (module.weight, module.outside_weight or module.weight):
        if grid.symmetric:
            continue
        if not module.asymmetric_weights:
            raise ConfigError(
                f"model.weight.symmetric is false, but {type(module).__name__} finds no "
                "zero-points of weights. Set it to true, or use PTQ4DiT."
            )
        if grid.strategy != "channel":
            raise ConfigError(
                f"symmetric is false with strategy {grid.strategy}, but weights have a "
                "zero-point for each output channel. Set strategy: channel."
            )


def check_numbers(module: "Reconstruction") -> None:
    """Batches and threads are at least 1.

    Raises:
        ConfigError: One is not.
    """
    for name in ("batch_size", "micro_batch"):
        if getattr(module, name) < 1:
            raise ConfigError(f"model.{name} must be at least 1, got {getattr(module, name)}.")
    if module.threads is not None and module.threads < 1:
        raise ConfigError(f"model.threads must be at least 1 or null, got {module.threads}.")


def check_attention(module: "Reconstruction") -> None:
    """Quantised products of attention need bits, a grid, and a family that lets them be replaced.

    Raises:
        ConfigError: Bits are out of range, or there is no grid.
        CapabilityMissing: The family does not let them be replaced.
    """
    if not module.quantize_attention:
        return
    if not MIN_BITS <= module.softmax_bits <= MAX_BITS:
        raise ConfigError(
            f"model.softmax_bits must lie in [{MIN_BITS}, {MAX_BITS}], got {module.softmax_bits}. "
            "The papers' value is 8."
        )
    if module.activation is None:
        raise ConfigError(
            "model.quantize_attention is true, but model.activation is null: query, key and value "
            "take the grid of the inputs. Set model.activation, or quantize_attention: false."
        )
    attention.replaceable(module.adapter)
