"""A network small enough for searches in tests: decoder layers over text and one picture."""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from recon.models.adapter import Device, InputGroup, ModelAdapter
from recon.types import Sample, State

WIDTH, WORDS, PIXELS, PICTURE = 16, 32, 12, 4
IMAGE = 31
"""Token that stands for a place of a picture."""
GROUPS = (
    InputGroup(("q", "k", "v"), "attention_input"),
    InputGroup(("out",), "attention_output"),
    InputGroup(("up",), "feed_forward_up"),
    InputGroup(("down",), "feed_forward_down"),
)
VISION = (InputGroup(("first",), "feed_forward_up"), InputGroup(("second",), "feed_forward_down"))


class Layer(nn.Module):
    """Causal attention of one head, then a feed-forward network, both behind norms."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.before(x)
        q, k, v = self.q(hidden), self.k(hidden), self.v(hidden)
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(functional.gelu(self.up(self.between(x))))


class Vision(nn.Module):
    """Patches to features."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(PIXELS)
        self.first, self.second = nn.Linear(PIXELS, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.second(functional.gelu(self.first(self.norm(pixels))))


class TinyPictures(nn.Module):
    """All of it; called with a sample it gives logits in a tuple, as diffusers' networks."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.vision = Vision()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(WIDTH, WORDS)

    def embed(self, sample: Sample, features: Tensor | None) -> Tensor:
        hidden = self.words(sample["input_ids"])
        if features is not None:
            mask = (sample["input_ids"] == IMAGE).unsqueeze(-1).expand_as(hidden)
            hidden = hidden.masked_scatter(mask, features.to(hidden.dtype))
        return hidden

    def forward(self, **sample: Any) -> tuple[Tensor]:
        features = self.vision(sample["pixel_values"]) if "pixel_values" in sample else None
        hidden = self.embed(sample, features)
        for layer in self.layers:
            hidden = layer(hidden)
        return (self.head(hidden),)


class TinyPicturesAdapter(ModelAdapter):
    """Implements `SeesPictures`."""

    network_class = "TinyPictures"
    streamed = ("hidden_states",)

    @property
    def block_names(self) -> tuple[str, ...]:
        return tuple(f"layers.{number}" for number in range(self.config["layers"]))

    def input_groups(self, block_name: str) -> tuple[InputGroup, ...]:
        return GROUPS

    def empty_network(self) -> nn.Module:
        with torch.device("meta"):
            return TinyPictures(self.config["layers"])

    @cached_property
    def _whole(self) -> TinyPictures:
        return self.network("cpu")

    def network(self, device: Device) -> TinyPictures:
        names = self._meta.state_dict().keys()
        return self.network_from(self.weights.load_names(names, torch.float32, device), device)

    def network_from(self, weights: Mapping[str, Tensor], device: Device) -> TinyPictures:
        network = self.empty_network()
        optional = {f"{b}.{n}.weight" for b in self.block_names for n in self.linear_shapes(b)}
        optional |= {f"vision.{name}.weight" for group in VISION for name in group.linears}
        self._assign(network, weights, optional)
        assert isinstance(network, TinyPictures)
        return network.requires_grad_(False).eval()

    def example_sample(self, rows: int, device: Device, dtype: torch.dtype) -> Sample:
        return {"input_ids": torch.zeros(rows, 16, dtype=torch.long, device=device)}

    def example_state(self, rows: int, device: Device, dtype: torch.dtype) -> State:
        return {"hidden_states": torch.randn(rows, 16, WIDTH, device=device, dtype=dtype)}

    @torch.no_grad()
    def embed(self, sample: Sample, device: Device) -> State:
        pixels = sample.get("pixel_values")
        features = None if pixels is None else self.vision_output(self._whole.vision, sample)
        return self.embed_features(sample, features, device)

    def forward_block(self, block: nn.Module, state: State) -> State:
        return {**state, "hidden_states": block(state["hidden_states"])}

    def output(self, sample: Sample, state: State, device: Device) -> Tensor:
        return self._whole.head(state["hidden_states"])

    def tokens(self, state: State) -> Tensor:
        return state["hidden_states"]

    def token_streams(self, state: State) -> dict[str, slice]:
        return {"text": slice(0, state["hidden_states"].shape[1])}

    # SeesPictures

    def image_tokens(self, sample: Sample) -> Tensor:
        return sample["input_ids"] == IMAGE

    @property
    def vision_name(self) -> str:
        return "vision"

    def vision_network(self, device: Device) -> nn.Module:
        return self.network(device).vision

    def vision_groups(self) -> tuple[InputGroup, ...]:
        return VISION

    def vision_norms(self) -> tuple[str, ...]:
        return ("norm",)

    def vision_output(self, network: nn.Module, sample: Sample) -> Tensor:
        return network(sample["pixel_values"]).flatten(0, 1)

    def embed_features(self, sample: Sample, features: Tensor | None, device: Device) -> State:
        return {"hidden_states": self._whole.embed(sample, features)}


def write_tiny_pictures(folder: Path, layers: int = 4, seed: int = 0) -> Path:
    """A folder with random weights, some channels of the norms larger than others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TinyPictures(layers)
        for name, parameter in network.named_parameters():
            if name.endswith(("before.weight", "between.weight")):
                parameter.data.mul_(torch.randn(WIDTH).exp())
    folder.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": "TinyPictures", "layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(network.state_dict(), folder / "model.safetensors")
    return folder


def tiny_question(seed: int) -> Sample:
    """Text around a picture, or text alone for every fourth seed; each of its own length."""
    generator = torch.Generator().manual_seed(seed)
    length = 4 + seed % 3
    ids = torch.randint(0, IMAGE, (1, length), generator=generator)
    labels = ids.clone()
    labels[:, :-2] = -100
    sample = {"timestep": torch.zeros(1)}
    if seed % 4 == 3:
        return {**sample, "input_ids": ids, "labels": labels}
    places = torch.full((1, PICTURE), IMAGE)
    return {
        **sample,
        "input_ids": torch.cat([ids[:, :2], places, ids[:, 2:]], dim=1),
        "labels": torch.cat([labels[:, :2], torch.full((1, PICTURE), -100), labels[:, 2:]], dim=1),
        "pixel_values": torch.randn(1, PICTURE, PIXELS, generator=generator),
    }
