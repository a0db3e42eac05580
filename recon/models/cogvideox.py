"""CogVideoX text-to-video: 2B (position table), 5B (rotary), 1.5 (patches over frames)."""

import json
from collections.abc import Iterable, Mapping
from functools import cached_property, partial
from math import prod
from typing import Any, NoReturn, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from recon.errors import CapabilityMissing
from recon.models.adapter import Device, FloatingType, InputGroup, ModelAdapter
from recon.models.folder import numbered_blocks
from recon.models.video_pipeline import VideoPipeline
from recon.models.video_size import VideoSize, spatial_factor, video_size
from recon.models.weights import placed
from recon.types import Sample, State

BLOCKS = "transformer_blocks"

GROUPS = (
    InputGroup(("norm1.linear",), "modulation"),
    InputGroup(("attn1.to_q", "attn1.to_k", "attn1.to_v"), "attention_input"),
    InputGroup(("attn1.to_out.0",), "attention_output"),
    InputGroup(("norm2.linear",), "modulation"),
    InputGroup(("ff.net.0.proj",), "feed_forward_up"),
    InputGroup(("ff.net.2",), "feed_forward_down"),
)
"""Linears of a CogVideoXBlock in call order. norm1 and norm2 each apply their own SiLU to the
time embedding: equal numbers, two tensors, two groups.

Source: S²Q-VDiT; the layers follow from its reported sizes (10.375 to 2.633 GiB on 5B)."""


class CogVideoX(ModelAdapter):
    """CogVideoX as a chain of blocks over text and video tokens.

    A sample is one call of the transformer: `hidden_states` [batch, frames, channels, height,
    width] (latents), `encoder_hidden_states` [batch, text tokens, channels], `timestep` [batch].
    Guidance is a batch of 2, unconditional first.

    A state holds the streams `hidden_states` [batch, video tokens, channels] and
    `encoder_hidden_states` [batch, text tokens, channels], the time embedding `temb` [batch,
    channels], and for rotary models `rotary_cos`, `rotary_sin` [batch, video tokens, head
    channels], which follow from the latent shape.

    Embedders and head are loaded once per device (small); blocks when asked for.

    What is sampled in calibration and evaluation, and what plans count, has one size. It is part of
    the identity where an argument sets it.

    Args:
        folder: As for every adapter.
        dtype: As for every adapter.
        frames: Of a video; None: sample_frames of config.json.
        height: Of a frame, in pixels; None: what sample_height of config.json comes to.
        width: As height.
    """

    network_class = "CogVideoXTransformer3DModel"
    pipeline_classes = ("CogVideoXPipeline",)
    subfolder = "transformer"
    example = "zai-org/CogVideoX-2b"
    streamed = ("hidden_states", "encoder_hidden_states")
    shared = ("rotary_cos", "rotary_sin")

    def __init__(
        self,
        folder: str,
        dtype: FloatingType = "auto",
        *,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        super().__init__(folder, dtype)
        self.frames, self.height, self.width = frames, height, width

    @cached_property
    def _shells(self) -> dict[str, nn.Module]:
        """Networks without blocks, by device."""
        return {}

    @cached_property
    def _pipelines(self) -> WeakValueDictionary[str, VideoPipeline]:
        """A pipeline in use elsewhere, by device: it must not live longer for being here."""
        return WeakValueDictionary()

    @cached_property
    def _rotary_tables(self) -> dict[tuple[tuple[int, ...], str], tuple[Tensor, Tensor]]:
        """Rotary cosines and sines, by (frames, height, width) of the latents and device."""
        return {}

    # What the folder holds, and what is sampled from it

    @property
    def _given(self) -> dict[str, int]:
        """The numbers of the size that arguments set."""
        numbers = {"frames": self.frames, "height": self.height, "width": self.width}
        return {name: number for name, number in numbers.items() if number is not None}

    def arguments(self) -> dict[str, Any]:
        """As for every adapter, without numbers of the size that are not set."""
        unset = {"frames", "height", "width"} - self._given.keys()
        return {name: v for name, v in super().arguments().items() if name not in unset}

    def identity(self) -> dict[str, str]:
        """As for every adapter, and the numbers of the size that arguments set, if any."""
        size = {"size": json.dumps(self._given, sort_keys=True)} if self._given else {}
        return {**super().identity(), **size}

    def check_description(self) -> None:
        """As for every adapter; and the size must be one that can be sampled.

        Raises:
            ConfigError: As for every adapter, and as `size`.
        """
        super().check_description()
        _ = self.size

    @cached_property
    def size(self) -> VideoSize:
        """What is sampled: the arguments, or else what config.json says.

        Raises:
            ConfigError: VAE, patches or positions of the network do not allow an argument, or
                config.json holds no size to sample and none is given.
        """
        return video_size(self._settings, self._pixels, self._given)

    @cached_property
    def _pixels(self) -> int:
        """Pixels of a frame in one of the latents, to each side."""
        return spatial_factor(self.folder, type(self).__name__)

    @property
    def block_names(self) -> tuple[str, ...]:
        """`transformer_blocks.0` and so on.

        Raises:
            ConfigError: num_layers of config.json is missing or below 1.
        """
        return numbered_blocks(self.config, self.network_folder, BLOCKS)

    def input_groups(self, block_name: str) -> tuple[InputGroup, ...]:
        """The six inputs of a block: the same in every block."""
        return GROUPS

    def empty_network(self) -> nn.Module:
        """A CogVideoXTransformer3DModel on the meta device."""
        with torch.device("meta"):
            return self._built(self.config)

    def network(self, device: Device) -> nn.Module:
        """The whole CogVideoXTransformer3DModel with its weights, in eval mode."""
        names = self._meta.state_dict().keys()
        weights = self.weights.load_names(names, self.compute_dtype(device), device)
        return self._network_of(weights, device)

    def network_from(self, weights: Mapping[str, Tensor], device: Device) -> nn.Module:
        """As `network`, from given weights, which are copied; Linears of blocks may lack theirs.

        Raises:
            WeightsError: Other weights are missing, or some do not fit.
        """
        dtype = self.compute_dtype(device)
        return self._network_of({n: placed(t, dtype, device) for n, t in weights.items()}, device)

    def _network_of(self, weights: Mapping[str, Tensor], device: Device) -> nn.Module:
        network = self.empty_network()
        optional = {
            f"{block}.{linear}.weight"
            for block in self.block_names
            for linear in self.linear_shapes(block)
        }
        self._assign(network, weights, optional)
        # The position table is computed, and stored only where it was learned.
        for name, buffer in self._blockless().named_buffers():
            if name not in weights:
                owner, _, leaf = name.rpartition(".")
                setattr(network.get_submodule(owner), leaf, buffer.to(device))
        return network.requires_grad_(False).eval()

    def example_sample(self, rows: int, device: Device, dtype: torch.dtype) -> Sample:
        """Latents and text of `size`."""
        config = self._settings
        frames, height, width = self._latent_size
        drawn = partial(torch.randn, device=device, dtype=dtype)
        text = (rows, config.max_text_seq_length, config.text_embed_dim)
        return {
            "hidden_states": drawn(rows, frames, config.in_channels, height, width),
            "encoder_hidden_states": drawn(text),
            "timestep": torch.full((rows,), 500, device=device),
        }

    def example_state(self, rows: int, device: Device, dtype: torch.dtype) -> State:
        """Both streams of `size`, and what conditions them."""
        config = self._settings
        frames, height, width = self._latent_size
        video = frames // (config.patch_size_t or 1)
        video *= (height // config.patch_size) * (width // config.patch_size)
        channels = config.num_attention_heads * config.attention_head_dim
        drawn = partial(torch.randn, device=device, dtype=dtype)
        state = {
            "hidden_states": drawn(rows, video, channels),
            "encoder_hidden_states": drawn(rows, config.max_text_seq_length, channels),
            "temb": drawn(rows, config.time_embed_dim),
        }
        if config.use_rotary_positional_embeddings:
            table = torch.randn(video, config.attention_head_dim, device=device)
            state |= dict.fromkeys(self.shared, table.expand(rows, -1, -1))
        return state

    @property
    def _latent_size(self) -> tuple[int, int, int]:
        """Frames, height and width of the latents of `size`."""
        config, size = self._settings, self.size
        frames = (size.frames - 1) // config.temporal_compression_ratio + 1
        # The pipeline pads frames up to whole patches.
        frames += -frames % (config.patch_size_t or 1)
        return frames, size.height // self._pixels, size.width // self._pixels

    @property
    def _settings(self) -> Any:
        """The configuration, with the defaults of what config.json leaves out."""
        return self._meta.config

    @torch.no_grad()
    def embed(self, sample: Sample, device: Device) -> State:
        """Streams and conditioning that enter the first block."""
        catcher = _Catcher()
        try:
            self._call_shell(catcher, sample, device)
        except _StreamsReachedError as reached:
            state = reached.state
        if self._settings.use_rotary_positional_embeddings:
            cos, sin = self.rotary(tuple(sample["hidden_states"].shape), device)
            batch = sample["hidden_states"].shape[0]
            state["rotary_cos"] = cos.expand(batch, -1, -1)
            state["rotary_sin"] = sin.expand(batch, -1, -1)
        return state

    def forward_block(self, block: nn.Module, state: State) -> State:
        """A new state: both streams replaced, conditioning kept.

        Raises:
            CapabilityMissing: The block does not return (video, text) of the shapes it got.
        """
        rotary = None
        if "rotary_cos" in state:
            # Equal for all rows of a batch: they have one latent shape.
            rotary = (state["rotary_cos"][0], state["rotary_sin"][0])
        returned = block(
            hidden_states=state["hidden_states"],
            encoder_hidden_states=state["encoder_hidden_states"],
            temb=state["temb"],
            image_rotary_emb=rotary,
        )
        expected = tuple(state[key].shape for key in self.streamed)
        if not isinstance(returned, tuple) or _shapes(returned) != expected:
            raise CapabilityMissing(
                f"{type(block).__name__} returned {_structure(returned)}; CogVideoX reads a tuple "
                f"of two tensors (video, text) of {[list(shape) for shape in expected]}. Write "
                "an adapter whose forward_block reads this structure."
            )
        return {**state, **dict(zip(self.streamed, returned, strict=True))}

    def output(self, sample: Sample, state: State, device: Device) -> Tensor:
        """Prediction of the network, [batch, frames, channels, height, width]."""
        injector = _Injector(state["hidden_states"], state["encoder_hidden_states"])
        return self._call_shell(injector, sample, device)

    def tokens(self, state: State) -> Tensor:
        """Text tokens, then video tokens: [batch, tokens, channels]."""
        return torch.cat([state["encoder_hidden_states"], state["hidden_states"]], dim=1)

    def token_streams(self, state: State) -> dict[str, slice]:
        """`text` and `video`, along the token axis of `tokens`."""
        text, video = (state[key].shape[1] for key in ("encoder_hidden_states", "hidden_states"))
        return {"text": slice(0, text), "video": slice(text, text + video)}

    def attention_tokens(self, state: State) -> Tensor:
        """All True: CogVideoX attends to the padding of a text as to any token."""
        streams = [state[key] for key in self.streamed]
        count = sum(stream.shape[1] for stream in streams)
        return streams[0].new_ones((streams[0].shape[0], count), dtype=torch.bool)

    def token_grid(self, sample: Sample) -> tuple[slice, tuple[int, int, int]]:
        """The video tokens, a patch of the latents each."""
        config, text = self._settings, sample["encoder_hidden_states"].shape[1]
        _, frames, _, height, width = sample["hidden_states"].shape
        rows, columns = height // config.patch_size, width // config.patch_size
        grid = (frames // (config.patch_size_t or 1), rows, columns)
        return slice(text, text + prod(grid)), grid

    def call_arguments(self, sample: Sample, device: Device) -> dict[str, Any]:
        """The sample, and the rotary table that the pipeline computes for its shape."""
        given = super().call_arguments(sample, device)
        if self._settings.use_rotary_positional_embeddings:
            cos, sin = self.rotary(tuple(sample["hidden_states"].shape), device)
            given["image_rotary_emb"] = (cos[0], sin[0])
        return given

    def pipeline(self, device: Device, network: nn.Module | None = None) -> VideoPipeline:
        """The stock pipeline around a network, for videos of `size`.

        Pipelines that are in use at the same time share text encoder, tokenizer and VAE.

        Args:
            device: Where to sample.
            network: A CogVideoXTransformer3DModel, quantised or not; the full-precision one if
                None.

        Raises:
            ConfigError: As `size`, and as VideoPipeline.
            WeightsError: As VideoPipeline.
        """
        key = str(torch.device(device))
        made = VideoPipeline(
            self.folder,
            self.network(device) if network is None else network,
            dtype=self.compute_dtype(device),
            device=device,
            size=self.size,
            beside=self._pipelines.get(key),
        )
        self._pipelines[key] = made
        return made

    def rotary(self, shape: tuple[int, ...], device: Device) -> tuple[Tensor, Tensor]:
        """Cosines and sines [1, video tokens, head channels], as the stock pipeline computes them.

        Args:
            shape: Of the latents, [batch, frames, channels, height, width].
            device: Where they are computed: its rounding is the pipeline's on that device.

        Source: diffusers 0.42, CogVideoXPipeline._prepare_rotary_positional_embeddings.
        """
        _, frames, _, height, width = shape
        key = ((frames, height, width), str(torch.device(device)))
        if key not in self._rotary_tables:
            cos, sin = self._computed_rotary(frames, height, width, device)
            self._rotary_tables[key] = (cos[None], sin[None])
        return self._rotary_tables[key]

    def _computed_rotary(
        self, frames: int, height: int, width: int, device: Device
    ) -> tuple[Tensor, Tensor]:
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        config = self._settings
        patch, patch_frames = config.patch_size, config.patch_size_t
        grid = (height // patch, width // patch)
        base = (config.sample_height // patch, config.sample_width // patch)
        arguments: dict[str, Any] = {
            "embed_dim": config.attention_head_dim,
            "grid_size": grid,
            "device": torch.device(device),
        }
        if patch_frames is None:
            arguments["crops_coords"] = get_resize_crop_region_for_grid(grid, base[1], base[0])
            arguments["temporal_size"] = frames
        else:
            arguments["crops_coords"] = None
            arguments["temporal_size"] = (frames + patch_frames - 1) // patch_frames
            arguments["grid_type"] = "slice"
            arguments["max_size"] = base
        return cast(tuple[Tensor, Tensor], get_3d_rotary_pos_embed(**arguments))

    @staticmethod
    def _take_buffers(network: nn.Module, shell: nn.Module) -> None:
        for name, buffer in shell.named_buffers():
            owner, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(owner), leaf, buffer.clone())

    def _built(self, config: Any) -> nn.Module:
        from diffusers import CogVideoXTransformer3DModel

        return cast(nn.Module, CogVideoXTransformer3DModel.from_config(dict(config)))

    def _blockless(self) -> nn.Module:
        """Embedders and head, with numbers that are still to be replaced."""
        # They must not move the caller's random state.
        with torch.random.fork_rng(devices=[]):
            return self._built({**self.config, "num_layers": 0})

    def _shell(self, device: Device) -> nn.Module:
        """Embedders and head with their weights; the blocks are left out."""
        key = str(torch.device(device))
        if key not in self._shells:
            shell = self._blockless()
            names = shell.state_dict().keys()
            self._assign(shell, self.weights.load_names(names, self.compute_dtype(device), device))
            self._shells[key] = shell.to(torch.device(device)).requires_grad_(False).eval()
        return self._shells[key]

    def _call_shell(self, blocks: nn.Module, sample: Sample, device: Device) -> Tensor:
        """The stock forward with one module in place of all blocks."""
        shell, dtype = self._shell(device), self.compute_dtype(device)
        shell.set_submodule(BLOCKS, nn.ModuleList([blocks]))
        try:
            (output,) = shell(
                hidden_states=sample["hidden_states"].to(device, dtype),
                encoder_hidden_states=sample["encoder_hidden_states"].to(device, dtype),
                timestep=sample["timestep"].to(device),
                return_dict=False,
            )
        finally:
            # The module holds a state; the shell must not keep it alive.
            shell.set_submodule(BLOCKS, nn.ModuleList())
        return cast(Tensor, output)


class _StreamsReachedError(Exception):
    """Carries the state out of the stock forward; private, so that it hides no real error."""

    def __init__(self, state: State) -> None:
        super().__init__("the streams reached the first block")
        self.state = state


class _Catcher(nn.Module):
    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, **unused: Any
    ) -> NoReturn:
        raise _StreamsReachedError(
            {
                # Both are views of one tensor: a copy frees each with its own state.
                "hidden_states": hidden_states.contiguous(),
                "encoder_hidden_states": encoder_hidden_states.contiguous(),
                "temb": temb,
            }
        )


class _Injector(nn.Module):
    def __init__(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> None:
        super().__init__()
        self.streams = (hidden_states, encoder_hidden_states)

    def forward(self, **unused: Any) -> tuple[Tensor, Tensor]:
        return self.streams


def _shapes(values: Iterable[object]) -> tuple[object, ...]:
    return tuple(value.shape if isinstance(value, Tensor) else None for value in values)


def _structure(value: object) -> str:
    """A nested value in words, tensors by their shape."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, dict):
        return f"a dict with keys {sorted(map(str, value))}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of ({', '.join(_structure(item) for item in value)})"
    return f"a {type(value).__name__}"
