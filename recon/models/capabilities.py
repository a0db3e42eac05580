"""What methods may ask of a model family beyond `ModelAdapter`, one protocol each; knows no method.

Whoever needs one refuses an adapter without it, and names what is missing (`missing_attributes`).
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from recon.models.adapter import Device, InputGroup
from recon.models.attention import Product
from recon.types import Sample, State


@runtime_checkable
class ExposesAttention(Protocol):
    """Each block attends over all its tokens in one scaled-dot-product call.

    The call has as many keys as queries, in the order of `ModelAdapter.tokens`; a block may make
    further calls (cross-attention) whose keys are other tokens. Needed by methods that weight
    tokens by the attention they receive.
    """

    def attention_tokens(self, state: State) -> Tensor:
        """Bool [batch, tokens]: True where a token is real, False where it is padding."""
        ...


@runtime_checkable
class RunsLeftToRight(Protocol):
    """No token of a block reads a later one, so that samples of unequal lengths can run together.

    Needed to micro-batch samples that have lengths of their own, such as conversations.
    """

    def filled(self, state: State, tokens: int) -> State:
        """The state with filling behind its last token, `tokens` in all.

        Raises:
            ConfigError: The state cannot be filled.
        """
        ...


@runtime_checkable
class LaysOutTokens(Protocol):
    """The tokens of one stream stand on a grid over frames, height and width."""

    def token_grid(self, sample: Sample) -> tuple[slice, tuple[int, int, int]]:
        """Which of `ModelAdapter.tokens` they are, and frames, rows and columns of their grid.

        They are in the grid's order, columns fastest.
        """
        ...


@runtime_checkable
class FoldsScales(Protocol):
    """Channel scales that the layers in front of a linear can take over, at no cost when run.

    Folding multiplies the input of a linear by a scale; whoever asks for it divides the linear's
    columns by the same scale, and the block computes what it did.
    """

    def foldable(self, block_name: str) -> tuple[str, ...]:
        """Linears whose input can be scaled by what produces it, in call order.

        Each is the first of its `InputGroup` and stands for all of it.
        """
        ...

    def fold(self, block: nn.Module, scales: Mapping[str, Tensor]) -> None:
        """Changes the producers in `block` so that each named input comes out scaled.

        Producers are replaced, not written to: tensors shared with a teacher keep their numbers.
        Nothing else in the block changes; the linears that are named are the caller's to divide.

        Args:
            block: As `ModelAdapter.block` gives it, its linears quantised or not.
            scales: Of some names of `foldable`, each [channels of that input], positive.

        Raises:
            CapabilityMissing: A name is not foldable, or a producer cannot take a scale.
            ConfigError: A scale has another shape than the input has channels.
            NumericsError: A scale is not positive and finite.
        """
        ...

    def fold_within_class(self, block: nn.Module, scales: Mapping[str, Tensor]) -> None:
        """As `fold`, so that the public class can hold what comes out, tensor by tensor."""
        ...


@runtime_checkable
class ReplacesAttention(Protocol):
    """softmax(QKᵀ)V of a block can be computed by a module of ours, quantised or watching."""

    def attentions(self, block_name: str) -> tuple[str, ...]:
        """Names of the block's attention modules relative to it, in call order."""
        ...

    def replace_attention(self, module: nn.Module, name: str, product: Product | None) -> None:
        """Lets `product` compute the products of one attention, in place.

        Args:
            module: A block as `ModelAdapter.block` gives it, or a whole network.
            name: Of the attention inside `module`.
            product: Gets query, key and value [batch, heads, tokens, channels] after everything
                that the family does to them, the query unscaled. None: the family's own kernel.

        Raises:
            CapabilityMissing: The attention is of a variant this adapter does not know.
        """
        ...


@runtime_checkable
class ExposesEnds(Protocol):
    """Linears before the first block (the stem) and behind the last (the head) can be replaced.

    Names are full ones, in the whole network. A convolution over patches side by side counts as a
    linear. Needed by methods that quantise more than the blocks.
    """

    def stem_groups(self) -> tuple[InputGroup, ...]:
        """Linears that make what enters the first block, by input, producers before consumers."""
        ...

    def head_groups(self) -> tuple[InputGroup, ...]:
        """Linears that make the output of what leaves the last block, in the same order."""
        ...

    def copies(self) -> Mapping[str, str]:
        """Linears of the public class that are equal to one of those: that one's name, by theirs.

        They are quantised as it is, and kept once.
        """
        ...

    def ends(self, device: Device) -> nn.Module:
        """Fresh modules of stem and head, full precision, eval, in a tree with their full names.

        Modules in it may be replaced; weights are shared and must not be written to.
        """
        ...

    def embed_with(self, ends: nn.Module, sample: Sample, device: Device) -> State:
        """As `ModelAdapter.embed`, through the stem in `ends`."""
        ...

    def output_with(self, ends: nn.Module, sample: Sample, state: State, device: Device) -> Tensor:
        """As `ModelAdapter.output`, through the head in `ends`."""
        ...


@runtime_checkable
class SamplesClasses(Protocol):
    """Images are sampled of classes that the folder names.

    Needed by calibration sets of images.
    """

    def class_names(self) -> Mapping[str, int]:
        """Number of each class by its name."""
        ...

    def check_sampling(self, steps: int) -> None:
        """Refuses what sampling would stumble over, without running anything.

        Raises:
            ConfigError: The sampler cannot take that many steps.
            WeightsError: Weights that sampling needs are missing or damaged.
        """
        ...

    def sampling_settings(self) -> Mapping[str, Any]:
        """What samples depend on beside the network, the steps, the guidance and the noise."""
        ...


@runtime_checkable
class SeesPictures(Protocol):
    """Pictures enter the token stream as features that a vision network of its own makes.

    Needed by methods that quantise or tune that network, or weight its tokens.
    """

    def image_tokens(self, sample: Sample) -> Tensor:
        """Bool [1, tokens]: True where a token stands for a picture."""
        ...

    @property
    def vision_name(self) -> str:
        """Dotted name, in the whole network, of the module whose parts `vision_network` has."""
        ...

    def vision_network(self, device: Device) -> nn.Module:
        """A fresh full-precision vision tower with its projector, eval, without gradients.

        Each call reads weights of its own, which may be written to.
        """
        ...

    def vision_groups(self) -> tuple[InputGroup, ...]:
        """Linears of `vision_network` that may be quantised, each once, by input, in call order.

        Names are relative to that module.
        """
        ...

    def vision_norms(self) -> tuple[str, ...]:
        """Norms with weights between those linears, by name in `vision_network`."""
        ...

    def vision_output(self, network: nn.Module, sample: Sample) -> Tensor:
        """Features [image tokens, channels] as they are inserted; differentiable.

        Args:
            network: As `vision_network` gives it, its linears quantised or not.
            sample: One with pictures.
        """
        ...

    def embed_features(self, sample: Sample, features: Tensor | None, device: Device) -> State:
        """The state that enters the first block with these features; differentiable in them.

        Args:
            sample: What `ModelAdapter.embed` takes.
            features: As `vision_output` gives them; None for a sample without pictures.
            device: Where the state goes.

        Raises:
            ConfigError: The features are not as many as the sample has tokens for.
        """
        ...


def missing_attributes(value: object, protocol: type) -> tuple[str, ...]:
    """Names that the protocol asks for and the value lacks, sorted; empty if it conforms."""
    names = (name for name in vars(protocol) if not name.startswith("_"))
    asked = set(names) | set(getattr(protocol, "__annotations__", ()))
    return tuple(sorted(name for name in asked if not hasattr(value, name)))
