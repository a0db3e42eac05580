"""DiT of diffusers, class-conditional images: DiT-XL/2 at 256² and 512², and its class."""

import copy
import inspect
import json
from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any, Literal, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from recon.errors import CapabilityMissing, ConfigError, WeightsError
from recon.layers.tree import shared_copy
from recon.models import dit_folding
from recon.models.adapter import Device, InputGroup, ModelAdapter
from recon.models.attention import Product, set_product
from recon.models.dit_parts import (
    BLOCKS,
    EMBEDDER,
    GROUPS,
    HEAD,
    PATCHES,
    TIMESTEP_LINEARS,
    CarriedConditioning,
    Embedding,
    Injector,
)
from recon.models.folder import numbered_blocks, read_json
from recon.models.image_pipeline import (
    ImagePipeline,
    Sampler,
    check_classes,
    check_steps,
    checked_vae,
)
from recon.models.weights import placed
from recon.types import Sample, State

FIRST_CLASS = "Transformer2DModel"
"""Class name in the configuration of facebook/DiT-XL-2-256 and -512, which are older than the
class that diffusers loads them with today."""


class DiT(ModelAdapter):
    """DiTTransformer2DModel as a chain of blocks over image tokens.

    A sample is one call of the transformer: `hidden_states` [batch, channels, height, width]
    (square latents), `timestep` [batch], `class_labels` [batch] (whole numbers; the class after
    the last one is the null class). Guidance is a batch of 2, conditional first.

    A state holds the stream `hidden_states` [batch, tokens, channels] and `conditioning` [batch,
    embedders, channels], the sum of the embedded timestep and class. diffusers gives every block
    an embedder of its own and ignores what is passed to it. The published checkpoints hold 28
    equal copies: then there is one embedder here and blocks have none. Training in diffusers lets
    the copies drift apart: then each block gets what its own embedder makes, computed beforehand
    as well. The files decide (`shares_conditioning`).

    The defaults are those of diffusers. Published numbers of DiT were made with other ones:
    downscale_freq_shift 0, norm3_eps 1e-6, sampler ddpm, guided_channels 3, and for PTQ4DiT the
    VAE stabilityai/sd-vae-ft-mse.

    Args:
        folder: As for every adapter.
        dtype: As for every adapter.
        downscale_freq_shift: The frequencies of the timestep embedding are exp(-ln 1e4 · i / (128
            - shift)). diffusers has 1 in its code; DiT was trained with 0. No configuration file
            holds it: a network saved by save_pretrained loses it.
        norm3_eps: Epsilon of the norm before the feed-forward layers. None: `norm_eps` of
            config.json, 1e-5 if that has none; DiT was trained with 1e-6.
        sampler: `ddim` or `ddpm`, as ImagePipeline explains.
        guided_channels: How many of the latent's channels guidance is applied to, the first ones.
            None: all, as diffusers does; the code of DiT guides 3 of its 4.
        vae: Folder of an AutoencoderKL to decode with instead of the pipeline's own.

    Raises:
        ConfigError: An argument is out of its range.
    """

    network_class = "DiTTransformer2DModel"
    pipeline_classes = ("DiTPipeline",)
    subfolder = "transformer"
    example = "facebook/DiT-XL-2-256"
    streamed = ("hidden_states",)

    def __init__(
        self,
        folder: str,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        *,
        downscale_freq_shift: Literal[0, 1] = 1,
        norm3_eps: float | None = None,
        sampler: Sampler = "ddim",
        guided_channels: int | None = None,
        vae: str | None = None,
    ) -> None:
        super().__init__(folder, dtype)
        if downscale_freq_shift not in (0, 1):
            raise ConfigError(
                f"DiT.downscale_freq_shift is {downscale_freq_shift!r}; it must be 1 (diffusers) "
                "or 0 (the original DiT). Choose one of them."
            )
        if norm3_eps is not None and not 0 < norm3_eps < 1:
            raise ConfigError(
                f"DiT.norm3_eps is {norm3_eps!r}; it must lie between 0 and 1. Use 1e-6 for the "
                "original DiT, or null for the value of config.json."
            )
        self.downscale_freq_shift = downscale_freq_shift
        self.norm3_eps = norm3_eps
        self.sampler: Sampler = sampler
        self.guided_channels = guided_channels
        self.vae = vae

    @cached_property
    def _ends(self) -> dict[str, nn.Module]:
        """Networks of which the blocks are their embedders alone, one or all, by device."""
        return {}

    @cached_property
    def _pipelines(self) -> WeakValueDictionary[str, ImagePipeline]:
        """A pipeline in use elsewhere, by device: it must not live longer for being here."""
        return WeakValueDictionary()

    # What the folder holds

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The network's `config.json`, in the words of DiTTransformer2DModel.

        The first published files name the class Transformer2DModel and hold its further keys,
        which mean nothing here.

        Raises:
            ConfigError: The file is missing or is not JSON.
        """
        config = read_json(self.network_folder / "config.json", type(self).__name__)
        if config.get("_class_name") != FIRST_CLASS:
            return config
        from diffusers import DiTTransformer2DModel

        known = inspect.signature(DiTTransformer2DModel.__init__).parameters
        kept = {key: value for key, value in config.items() if key in known}
        return {**kept, "_class_name": self.network_class}

    def identity(self) -> dict[str, str]:
        """As for every adapter, and the switches that change the network or what it is shown."""
        switches = ("downscale_freq_shift", "norm3_eps", "sampler", "guided_channels")
        protocol = {name: getattr(self, name) for name in switches}
        return {**super().identity(), "protocol": json.dumps(protocol, sort_keys=True)}

    @cached_property
    def shares_conditioning(self) -> bool:
        """Whether the embedders of all blocks hold the same numbers.

        Reads the embedders from the files, two tensors at a time: 0.3 GB for DiT-XL/2 in float32.

        Raises:
            WeightsError: The files lack a tensor of an embedder, or are damaged.
        """
        first, *others = (f"{block}.{EMBEDDER}." for block in self.block_names)
        for leaf in self._meta.get_submodule(first[:-1]).state_dict():
            expected = self._stored(first + leaf)
            if not all(torch.equal(self._stored(other + leaf), expected) for other in others):
                return False
        return True

    def class_names(self) -> dict[str, int]:
        """Number of each class by the name that `model_index.json` gives it.

        A name that several classes have is replaced by the number, in digits.

        Raises:
            ConfigError: The file is missing, is not JSON, or names no classes.
        """
        index = self.folder / "model_index.json"
        entries = read_json(index, type(self).__name__).get("id2label") or {}
        if not entries:
            raise ConfigError(
                f"{index} has no id2label, so the classes have no names. Add it, a number for each "
                'name: {"0": "tench", ...}.'
            )
        names = list(entries.values())
        return {
            name if names.count(name) == 1 else str(number): int(number)
            for number, name in entries.items()
        }

    def check_sampling(self, steps: int) -> None:
        """Refuse what `pipeline` would stumble over: steps that the sampler cannot take, the VAE.

        Of the VAE's weights the headers are read.

        Raises:
            ConfigError: The number of steps; or a description is missing or of another class.
            WeightsError: The VAE's weights are missing or damaged.
        """
        checked_vae(self.folder, self.vae)
        file = self.folder / "scheduler" / "scheduler_config.json"
        known = read_json(file, type(self).__name__).get("num_train_timesteps", 1000)
        check_steps(steps, self.sampler, known)

    def sampling_settings(self) -> dict[str, Any]:
        """Sampler, and the channels that guidance is applied to."""
        return {"sampler": self.sampler, "guided_channels": self.guided_channels}

    def check_description(self) -> None:
        """As for every adapter; and blocks must take their conditioning from a class."""
        super().check_description()
        norm = self.config.get("norm_type", "ada_norm_zero")
        classes = self.config.get("num_embeds_ada_norm", 1000)
        if norm != "ada_norm_zero" or not isinstance(classes, int) or classes < 1:
            raise ConfigError(
                f"norm_type is {norm!r} and num_embeds_ada_norm is {classes!r} in "
                f"{self.network_folder / 'config.json'}; DiT reads ada_norm_zero with at least one "
                "class, whose blocks take shift, scale and gate from timestep and class. Use the "
                "adapter of the family that the other norm belongs to (ada_norm_single: PixArt)."
            )

    # Names and shapes, without memory

    @property
    def block_names(self) -> tuple[str, ...]:
        """`transformer_blocks.0` and so on.

        Raises:
            ConfigError: num_layers of config.json is missing or below 1.
        """
        return numbered_blocks(self.config, self.network_folder, BLOCKS)

    def input_groups(self, block_name: str) -> tuple[InputGroup, ...]:
        """The five inputs of a block: the same in every block."""
        return GROUPS

    def empty_network(self) -> nn.Module:
        """A DiTTransformer2DModel on the meta device."""
        with torch.device("meta"):
            return self._built(self.config)

    def empty_block(self, name: str) -> nn.Module:
        """As for every adapter, without an embedder of its own."""
        block = shared_copy(super().empty_block(name))
        block.set_submodule(EMBEDDER, CarriedConditioning())
        return block

    def example_sample(self, rows: int, device: Device, dtype: torch.dtype) -> Sample:
        """Latents of the size of config.json, of the first class."""
        size = self._settings.sample_size
        shape = (rows, self._settings.in_channels, size, size)
        return {
            "hidden_states": torch.randn(shape, device=device, dtype=dtype),
            "timestep": torch.full((rows,), 500, device=device),
            "class_labels": torch.zeros(rows, dtype=torch.long, device=device),
        }

    def example_state(self, rows: int, device: Device, dtype: torch.dtype) -> State:
        """Tokens of the size of config.json, and one embedder's conditioning."""
        config = self._settings
        tokens = (config.sample_size // config.patch_size) ** 2
        width = config.num_attention_heads * config.attention_head_dim
        drawn = partial(torch.randn, device=device, dtype=dtype)
        return {
            "hidden_states": drawn(rows, tokens, width),
            "conditioning": drawn(rows, 1, width),
        }

    # The network, block by block

    def block(self, name: str, device: Device) -> nn.Module:
        """As for every adapter; the block takes its conditioning from the state.

        Raises:
            ConfigError: The network has no block of that name.
            WeightsError: The files lack some of the block's weights, or hold other shapes.
        """
        block = super().block(name, device)
        position = 0 if self.shares_conditioning else self.block_names.index(name)
        embedder = block.get_submodule(EMBEDDER)
        embedder.register_buffer("position", torch.tensor([position], device=device), False)
        return block

    @torch.no_grad()
    def embed(self, sample: Sample, device: Device) -> State:
        """Stream and conditioning that enter the first block.

        Raises:
            ConfigError: A class label is out of range, or the latents are not square or not whole
                patches.
        """
        return self.embed_with(self._ends_on(device), sample, device)

    @torch.no_grad()
    def embed_with(self, ends: nn.Module, sample: Sample, device: Device) -> State:
        """As `embed`, through patch embedding and embedders of `ends`.

        Raises:
            ConfigError: As `embed`.
        """
        check_classes(sample["class_labels"], self._settings.num_embeds_ada_norm)
        self._check_latents(sample["hidden_states"])
        timestep, labels = sample["timestep"].to(device), sample["class_labels"].to(device)
        latents = sample["hidden_states"].to(device, self.compute_dtype(device))
        stream = ends.get_submodule("pos_embed")(latents)
        embedded = [
            block.get_submodule(EMBEDDER)(timestep, labels, hidden_dtype=stream.dtype)
            for block in ends.get_submodule(BLOCKS).children()
        ]
        # contiguous: the stream is a transposed view, whose rows could not be sliced cheaply
        return {"hidden_states": stream.contiguous(), "conditioning": torch.stack(embedded, dim=1)}

    def forward_block(self, block: nn.Module, state: State) -> State:
        """A new state: the stream replaced, the conditioning kept.

        Raises:
            CapabilityMissing: The block does not return a tensor of the shape it got.
        """
        stream = state["hidden_states"]
        # What a stock block is given as timestep goes to its embedder, and nowhere else.
        returned = block(hidden_states=stream, timestep=state["conditioning"], class_labels=None)
        if not isinstance(returned, Tensor) or returned.shape != stream.shape:
            found = list(returned.shape) if isinstance(returned, Tensor) else "no tensor"
            raise CapabilityMissing(
                f"{type(block).__name__} returned a {type(returned).__name__} ({found}); DiT reads "
                f"one tensor of {list(stream.shape)}. Write an adapter whose forward_block reads "
                "this structure."
            )
        return {**state, "hidden_states": returned}

    def output(self, sample: Sample, state: State, device: Device) -> Tensor:
        """Prediction of the network, [batch, out channels, height, width].

        With a learned variance there are twice as many channels as the latents have: noise, then
        the interpolation coefficients of the variance.
        """
        return self.output_with(self._ends_on(device), sample, state, device)

    def output_with(self, ends: nn.Module, sample: Sample, state: State, device: Device) -> Tensor:
        """As `output`, through the output layer of `ends`."""
        embedders = ends.get_submodule(BLOCKS)
        ends.set_submodule(BLOCKS, nn.ModuleList([Injector(state)]))
        try:
            (output,) = ends(
                hidden_states=sample["hidden_states"].to(device, self.compute_dtype(device)),
                return_dict=False,
            )
        finally:
            # The module holds a state, which must not be kept alive.
            ends.set_submodule(BLOCKS, embedders)
        return cast(Tensor, output)

    def tokens(self, state: State) -> Tensor:
        """Image tokens, row by row: [batch, tokens, channels]."""
        return state["hidden_states"]

    def token_streams(self, state: State) -> dict[str, slice]:
        """`image`: all tokens."""
        return {"image": slice(0, state["hidden_states"].shape[1])}

    def attention_tokens(self, state: State) -> Tensor:
        """All True: an image has no padding."""
        stream = state["hidden_states"]
        return stream.new_ones(stream.shape[:2], dtype=torch.bool)

    def attentions(self, block_name: str) -> tuple[str, ...]:
        """The block's one self-attention."""
        return ("attn1",)

    def replace_attention(self, module: nn.Module, name: str, product: Product | None) -> None:
        """Lets `product` compute the products of one attention, in place.

        Raises:
            CapabilityMissing: The attention is of a variant this adapter does not know.
        """
        set_product(module.get_submodule(name), product)

    # Stem and head

    def stem_groups(self) -> tuple[InputGroup, ...]:
        """The patch convolution, and both layers of each embedder of timesteps that differs.

        The first layers of all embedders see the same frequencies.
        """
        firsts, seconds = (
            tuple(f"{block}.{layer}" for block in self._embedding_blocks)
            for layer in TIMESTEP_LINEARS
        )
        return (
            InputGroup((PATCHES,), "patch_embedding"),
            InputGroup(firsts, "timestep_embedding"),
            *(InputGroup((second,), "timestep_embedding") for second in seconds),
        )

    def head_groups(self) -> tuple[InputGroup, ...]:
        """The last modulation, and the projection to patches."""
        return HEAD

    def copies(self) -> dict[str, str]:
        """The embedders' linears of all blocks but the first, where all embedders are equal."""
        first, *others = self.block_names
        if len(self._embedding_blocks) > 1:
            return {}
        return {f"{b}.{layer}": f"{first}.{layer}" for b in others for layer in TIMESTEP_LINEARS}

    def ends(self, device: Device) -> nn.Module:
        """A DiTTransformer2DModel of which the blocks are their embedders alone."""
        return shared_copy(self._ends_on(device))

    # Whole networks

    def network(self, device: Device) -> nn.Module:
        """The whole DiTTransformer2DModel with its weights, in eval mode.

        Its embedders stay as many as the public class has, also where they are equal: tied, they
        could not be saved by save_pretrained. They are 10 % of DiT-XL/2.
        """
        names = self._meta.state_dict().keys()
        weights = self.weights.load_names(names, self.compute_dtype(device), device)
        return self._network_of(weights, device)

    def network_from(self, weights: Mapping[str, Tensor], device: Device) -> nn.Module:
        """As `network`, from given weights, which are copied.

        Linears of blocks, stem and head may lack theirs.

        Raises:
            WeightsError: Other weights are missing, or some do not fit.
        """
        dtype = self.compute_dtype(device)
        return self._network_of({n: placed(t, dtype, device) for n, t in weights.items()}, device)

    def pipeline(self, device: Device, network: nn.Module | None = None) -> ImagePipeline:
        """Sampling around a network; pipelines in use at the same time share the VAE.

        Args:
            device: Where to sample.
            network: A DiTTransformer2DModel, quantised or not; the full-precision one if None.

        Raises:
            ConfigError: sampler or guided_channels do not suit the network, or a description in
                the folder is missing or of another class.
            WeightsError: The VAE's weights are missing or damaged.
        """
        key = str(torch.device(device))
        made = ImagePipeline(
            self.folder,
            self.network(device) if network is None else network,
            dtype=self.compute_dtype(device),
            device=device,
            sampler=self.sampler,
            guided_channels=self.guided_channels,
            vae=self.vae,
            beside=self._pipelines.get(key),
        )
        self._pipelines[key] = made
        return made

    def unsaved(self) -> str | None:
        """The frequencies of the timestep embedding, unless they are those of diffusers."""
        if self.downscale_freq_shift == 1:
            return None
        return (
            f"DiT.downscale_freq_shift is {self.downscale_freq_shift}, which no configuration file "
            "holds: DiTTransformer2DModel always computes with 1. For a result that diffusers can "
            "load, fit with downscale_freq_shift 1"
        )

    # Folding, as `dit_folding` explains

    def foldable(self, block_name: str) -> tuple[str, ...]:
        """See `dit_folding.FOLDABLE`."""
        return dit_folding.FOLDABLE

    def fold(self, block: nn.Module, scales: Mapping[str, Tensor]) -> None:
        """See `dit_folding.fold`."""
        dit_folding.fold(block, scales)

    def fold_within_class(self, block: nn.Module, scales: Mapping[str, Tensor]) -> None:
        """See `dit_folding.fold_within_class`."""
        dit_folding.fold_within_class(block, scales)

    # Inner parts

    @property
    def _settings(self) -> Any:
        """The configuration, with the defaults of what config.json leaves out."""
        return self._meta.config

    def _stored(self, name: str) -> Tensor:
        # float64 holds every stored type without loss: the comparison is of what is in the files.
        return self.weights.load_names([name], torch.float64, "cpu")[name]

    def _check_latents(self, latents: Tensor) -> None:
        height, width = latents.shape[-2:]
        patch = self._settings.patch_size
        if height != width or height % patch:
            raise ConfigError(
                f"hidden_states are {height} x {width}; DiTTransformer2DModel puts tokens back "
                f"into a square of whole patches of {patch} and would scramble or cut these. Give "
                "latents with equal sides that the patch divides."
            )

    def _built(self, config: Mapping[str, Any]) -> nn.Module:
        from diffusers import DiTTransformer2DModel

        changed = {} if self.norm3_eps is None else {"norm_eps": self.norm3_eps}
        network = DiTTransformer2DModel.from_config({**config, **changed})
        for block in network.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = self.downscale_freq_shift
        return cast(nn.Module, network)

    def _read_block(self, name: str, device: Device) -> dict[str, Tensor]:
        start = f"{name}."
        held = [
            key
            for key in self.weights.keys()  # noqa: SIM118
            if key.startswith(start) and not key.startswith(f"{start}{EMBEDDER}.")
        ]
        loaded = self.weights.load_names(held, self.compute_dtype(device), device)
        return {key.removeprefix(start): tensor for key, tensor in loaded.items()}

    def _network_of(self, weights: Mapping[str, Tensor], device: Device) -> nn.Module:
        network = self.empty_network()
        optional = {
            f"{block}.{linear}.weight"
            for block in self.block_names
            for linear in self.linear_shapes(block)
        }
        embedding = {f"{b}.{layer}.weight" for b in self.block_names for layer in TIMESTEP_LINEARS}
        outside = {f"{layer}.weight" for group in HEAD for layer in group.linears}
        optional |= {*embedding, *outside, f"{PATCHES}.weight"}
        self._assign(network, weights, optional)
        # The position table is computed, not stored.
        for name, buffer in self._blockless().named_buffers():
            owner, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(owner), leaf, buffer.to(device))
        return network.requires_grad_(False).eval()

    def _blockless(self) -> nn.Module:
        """Patch embedding and head, with numbers that are still to be replaced."""
        # They must not move the caller's random state.
        with torch.random.fork_rng(devices=[]):
            return self._built({**self.config, "num_layers": 0})

    def _ends_on(self, device: Device) -> nn.Module:
        """Patch embedding, embedders and head with their weights; the rest is left out."""
        key = str(torch.device(device))
        if key not in self._ends:
            ends = self._blockless()
            names = ends.state_dict().keys()
            self._assign(ends, self.weights.load_names(names, self.compute_dtype(device), device))
            embedders = [self._embedder(f"{b}.{EMBEDDER}", device) for b in self._embedding_blocks]
            ends.set_submodule(BLOCKS, nn.ModuleList(Embedding(one) for one in embedders))
            self._ends[key] = ends.to(torch.device(device)).requires_grad_(False).eval()
        return self._ends[key]

    @property
    def _embedding_blocks(self) -> tuple[str, ...]:
        """The blocks whose embedders are used: the first, or all where they differ.

        Without weights to look at they are taken to be equal, as the published ones are.
        """
        try:
            shared = self.shares_conditioning
        except WeightsError:
            shared = True
        return self.block_names[:1] if shared else self.block_names

    def _embedder(self, name: str, device: Device) -> nn.Module:
        embedder = copy.deepcopy(self._meta.get_submodule(name))
        self._assign(embedder, self.weights.load(name, self.compute_dtype(device), device))
        # eval: in training it would replace a tenth of the classes by the null class
        return embedder.requires_grad_(False).eval()
