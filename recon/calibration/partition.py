"""Where a chain of layers is cut into blocks, given how much each pair of neighbours depends.

Source: Q-VLM (arXiv 2410.08119), equation 7 and section 3.2. A block is the range of its layers.
"""

from collections.abc import Sequence

from recon.calibration.dependency import span
from recon.errors import ConfigError


def fixed_partition(layers: int, size: int) -> list[range]:
    """Blocks of `size` layers, the last one with what is left.

    Raises:
        ConfigError: size is below 1.
    """
    _check_size(size)
    return [range(first, min(first + size, layers)) for first in range(0, layers, size)]


def greedy_partition(dependency: Sequence[float], threshold: float, largest: int) -> list[range]:
    """Joins the next layer while the block's dependency exceeds its number of pairs · threshold.

    Args:
        dependency: Of each layer and the next one; one less than there are layers.
        threshold: h0, of one pair.
        largest: Layers of a block, at most.

    Raises:
        ConfigError: largest is below 1.

    Source: Q-VLM, eq. 7.
    """
    _check_size(largest)
    layers = len(dependency) + 1
    blocks, first = [], 0
    while first < layers:
        last = first
        while (
            last + 1 < layers
            and last + 1 - first < largest
            and span(dependency, first, last + 1) > (last + 1 - first) * threshold
        ):
            last += 1
        blocks.append(range(first, last + 1))
        first = last + 1
    return blocks


def optimal_partition(
    dependency: Sequence[float],
    threshold: float,
    largest: int,
    *,
    candidates: int = 5,
    price: float = 0.0,
) -> list[range]:
    """The blocks with the largest gain: what their pairs exceed the threshold by, less their cost.

    A block of b layers costs price · (candidates^b - candidates · b): the combinations its joint
    search tries, less those of layer-wise searches. Of equal gains, shorter last blocks win.
    Dynamic programming over the ends of blocks, O(layers · largest).

    Args:
        dependency: Of each layer and the next one; one less than there are layers.
        threshold: h0, of one pair.
        largest: Layers of a block, at most.
        candidates: Values tried per layer.
        price: κ, in dependency per combination, not negative; 0 maximises what the greedy rule
            goes for.

    Raises:
        ConfigError: largest is below 1 or price is negative.

    Source: ours; the paper has no optimum.
    """
    _check_size(largest)
    if price < 0:
        raise ConfigError(f"A combination's price must not be negative, got {price}. Use 0.")
    layers = len(dependency) + 1
    gains, starts = [0.0], [0]
    for end in range(1, layers + 1):
        best, start = float("-inf"), end - 1
        for size in range(1, min(largest, end) + 1):
            pairs = span(dependency, end - size, end - 1) - (size - 1) * threshold
            gain = gains[end - size] + pairs - price * (candidates**size - candidates * size)
            if gain > best:
                best, start = gain, end - size
        gains.append(best)
        starts.append(start)
    blocks, end = [], layers
    while end > 0:
        blocks.append(range(starts[end], end))
        end = starts[end]
    return blocks[::-1]


def _check_size(size: int) -> None:
    if size < 1:
        raise ConfigError(f"A block has at least 1 layer, got {size}. Use 3, as the paper does.")
