"""Vision-language models of transformers as a chain of decoder layers over text and pictures."""

from functools import cached_property, partial
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from recon.errors import CapabilityMissing, ConfigError
from recon.models.adapter import Device, InputGroup
from recon.models.answering import AnsweringPipeline
from recon.models.transformers_network import TransformersNetwork
from recon.models.vlm_parts import layer_groups, vision_layers
from recon.types import Sample, State


class VisionLanguageAdapter(TransformersNetwork):
    """A `...ForConditionalGeneration` class of transformers; subclasses name it.

    A sample is one unpadded conversation: `input_ids` [1, tokens], in which placeholders stand for
    what the vision tower sees, the family's `picture_inputs` if there are pictures, and `labels`
    [1, tokens], the tokens of the answer and -100 elsewhere. Whatever axis 0 of a picture input
    counts, it belongs to the one conversation.

    A state holds the stream `hidden_states` [1, tokens, channels], the rotary tables `rotary_cos`
    and `rotary_sin` [1, tokens, head channels], and `attention_mask` where the public class makes
    one. Vision tower, projector, embeddings, final norm and head stay in full precision here; they
    are loaded once per device, blocks when asked for. What is outside the decoder layers is run by
    the public class itself, so that a chain of blocks gives its logits bit for bit.

    Args:
        folder: As for every adapter.
        dtype: As for every adapter.
        max_tokens: Longest calibration sample; longer ones are refused, and streams are budgeted
            for it. The model's context is the limit where it is shorter, and of what is only asked.

    Raises:
        ConfigError: max_tokens is below 1, or as every adapter.
    """

    streamed = ("hidden_states",)
    picture_inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)
    """What the vision tower takes, the pixels first; other keys of a processor are dropped."""

    def __init__(
        self,
        folder: str,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        *,
        max_tokens: int = 2048,
    ) -> None:
        super().__init__(folder, dtype)
        if max_tokens < 1:
            raise ConfigError(
                f"{type(self).__name__}.max_tokens is {max_tokens}; a sample has one token at "
                "least. Use the longest sample you calibrate on, 2048 for instance."
            )
        self.max_tokens = max_tokens

    @cached_property
    def _shells(self) -> dict[str, nn.Module]:
        """Networks without decoder layers, by device."""
        return {}

    # What the folder holds

    def check_description(self) -> None:
        """As for every adapter; and the configuration must describe a vision tower.

        Raises:
            ConfigError: As said.
            CapabilityMissing: The network lacks a part, named with what was looked for; or its
                layers attend in different ways.
        """
        super().check_description()
        if not self.config.get("vision_config"):
            raise ConfigError(
                f"{self.network_folder / 'config.json'} has no vision_config: a model without a "
                f"vision tower, which {type(self).__name__} cannot show pictures to. Use the "
                "config.json saved with the weights."
            )
        _ = self._parts
        kinds = sorted(set(getattr(self._text_settings, "layer_types", None) or ()))
        if len(kinds) > 1:
            raise CapabilityMissing(
                f"The decoder layers in {self.network_folder / 'config.json'} are of the kinds "
                f"{kinds}, each with a mask of its own; a state carries one mask. Set layer_types "
                "of its text_config to one kind (use_sliding_window: false), or write an adapter "
                "that carries both."
            )

    # Names and shapes, without memory

    @property
    def block_names(self) -> tuple[str, ...]:
        """The decoder layers, such as `model.language_model.layers.0`."""
        layers = self._meta.get_submodule(self._parts.layers)
        return tuple(f"{self._parts.layers}.{name}" for name, _ in layers.named_children())

    def input_groups(self, block_name: str) -> tuple[InputGroup, ...]:
        """Four inputs: of query, key and value; of the output; of gate and up; of down."""
        return layer_groups(self.linear_shapes(block_name))

    @property
    def token_limit(self) -> int:
        """Tokens a sample may have: `max_tokens`, or the context where that is shorter."""
        return min(self.max_tokens, self.context)

    @property
    def context(self) -> int:
        """Tokens the network was made for."""
        return int(self._text_settings.max_position_embeddings)

    def example_sample(self, rows: int, device: Device, dtype: torch.dtype) -> Sample:
        """A text of the greatest length, without a picture."""
        ids = torch.zeros(rows, self.token_limit, dtype=torch.long, device=device)
        return {"input_ids": ids, "labels": ids.clone()}

    def example_state(self, rows: int, device: Device, dtype: torch.dtype) -> State:
        """The stream of the longest sample, and its rotary tables."""
        text, drawn = self._text_settings, partial(torch.randn, device=device, dtype=dtype)
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        table = drawn(rows, self.token_limit, head)
        return {
            "hidden_states": drawn(rows, self.token_limit, text.hidden_size),
            "rotary_cos": table,
            "rotary_sin": table.clone(),
        }

    # The network, block by block

    def check_sample(self, sample: Sample) -> None:
        """Refuse a sample the streams or the network cannot take, without running anything.

        Raises:
            ConfigError: It is longer than the limit, or as `check_pictures`.
        """
        rows, tokens = sample["input_ids"].shape
        if rows != 1 or tokens > self.token_limit:
            raise ConfigError(
                f"input_ids are [{rows}, {tokens}]; {type(self).__name__} takes one conversation "
                f"of at most {self.token_limit} tokens (max_tokens {self.max_tokens}, context "
                f"{self.context}). Shorten the text, make pictures "
                "smaller, or raise max_tokens up to the context."
            )
        self.check_pictures(sample)

    def check_pictures(self, sample: Sample) -> None:
        """Refuse a sample whose text and pictures do not go together, whatever its length.

        Raises:
            ConfigError: It has pictures without placeholders or placeholders without pictures.
        """
        placeholders = int(self.image_tokens(sample).sum())
        if bool(placeholders) != (self.picture_inputs[0] in sample):
            raise ConfigError(
                f"The sample has {placeholders} placeholders for pictures and "
                f"{'no ' if placeholders else ''}{self.picture_inputs[0]}. Give the processor as "
                "many pictures as the text has places for."
            )

    @torch.no_grad()
    def embed(self, sample: Sample, device: Device) -> State:
        """Text and pictures as the stream that enters the first decoder layer.

        Raises:
            ConfigError: As `check_sample` and `embed_features`.
        """
        self.check_sample(sample)
        features = None
        if self.picture_inputs[0] in sample:
            features = self.vision_output(self._base(self._shell(device)), sample)
        return self.embed_features(sample, features, device)

    def forward_block(self, block: nn.Module, state: State) -> State:
        """A new state: the stream replaced, the conditioning kept.

        Raises:
            CapabilityMissing: The layer does not return a tensor of the shape it got.
        """
        stream = state["hidden_states"]
        returned = block(
            stream,
            attention_mask=state.get("attention_mask"),
            position_embeddings=(state["rotary_cos"], state["rotary_sin"]),
        )
        if not isinstance(returned, Tensor) or returned.shape != stream.shape:
            found = list(returned.shape) if isinstance(returned, Tensor) else "no tensor"
            raise CapabilityMissing(
                f"{type(block).__name__} returned a {type(returned).__name__} ({found}); "
                f"{type(self).__name__} reads one tensor of {list(stream.shape)}. Write an adapter "
                "whose forward_block reads this structure."
            )
        return {**state, "hidden_states": returned}

    def output(self, sample: Sample, state: State, device: Device) -> Tensor:
        """Logits [1, tokens, vocabulary]."""
        shell = self._shell(device)
        language_model = shell.get_submodule(self._parts.language_model)
        # Without layers it is the final norm.
        normed = language_model(inputs_embeds=state["hidden_states"], use_cache=False)
        return cast(Tensor, shell.get_submodule(self._parts.head)(normed.last_hidden_state))

    def tokens(self, state: State) -> Tensor:
        """Text and picture tokens in their order: [1, tokens, channels]."""
        return state["hidden_states"]

    def token_streams(self, state: State) -> dict[str, slice]:
        """`text`: all tokens; pictures lie in between, where `image_tokens` says."""
        return {"text": slice(0, state["hidden_states"].shape[1])}

    def filled(self, state: State, tokens: int) -> State:
        """Zeros behind the last token, which none before them reads.

        Raises:
            ConfigError: The public class makes masks, which say of which tokens.
        """
        if "attention_mask" in state:
            raise ConfigError(
                f"The layers of {type(self).__name__} take a mask of each sample's own, so that "
                "samples of unequal lengths cannot run together. Set model.micro_batch to 1."
            )
        more = tokens - state["hidden_states"].shape[1]
        return {name: functional.pad(each, (0, 0, 0, more)) for name, each in state.items()}

    # Pictures

    def image_tokens(self, sample: Sample) -> Tensor:
        """Bool [1, tokens]: True at the placeholders."""
        return sample["input_ids"] == self._settings.image_token_id

    @property
    def vision_name(self) -> str:
        """The base model."""
        return self._parts.base

    def vision_network(self, device: Device) -> nn.Module:
        """The base model without its language model: vision tower and projector."""
        network = self._built_real()
        network.set_submodule(self._parts.language_model, nn.Module())
        base = self._base(network)
        start = f"{self._parts.base}."
        stored = self._loaded([start + name for name in base.state_dict()], device)
        self._assign(base, {name.removeprefix(start): t for name, t in stored.items()})
        return base.to(torch.device(device)).requires_grad_(False).eval()

    def vision_groups(self) -> tuple[InputGroup, ...]:
        """Linears of the tower's layers; projector and patch embedding stay as they are.

        Layers behind the one whose output the model takes (LLaVA: the last) do not reach the
        features and are left out. Source: Q-VLM leaves the projector in full precision.

        Raises:
            CapabilityMissing: A layer holds Linears without a known role.
        """
        return tuple(
            group
            for prefix, layer in self._vision_layers()
            for group in layer_groups(
                (n for n, m in layer.named_modules() if isinstance(m, nn.Linear)), prefix=prefix
            )
        )

    def vision_norms(self) -> tuple[str, ...]:
        """Norms of the same layers."""
        return tuple(
            prefix + name
            for prefix, layer in self._vision_layers()
            for name, module in layer.named_modules()
            if type(module).__name__.endswith("Norm")
            and next(module.parameters(recurse=False), None) is not None
        )

    def vision_output(self, network: nn.Module, sample: Sample) -> Tensor:
        """Features [image tokens, channels], all pictures one after the other."""
        given = {name: sample[name] for name in self.picture_inputs if name in sample}
        target = next(network.parameters())
        seen = cast(Any, network).get_image_features(
            **{name: self._moved(tensor, target) for name, tensor in given.items()},
            return_dict=True,
        )
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in seen.pooler_output])

    def embed_features(self, sample: Sample, features: Tensor | None, device: Device) -> State:
        """The state that enters the first decoder layer, with these features at the placeholders.

        Raises:
            ConfigError: There are not as many features as placeholders.
            CapabilityMissing: The language model calls its layers in a way not known here.
        """
        shell = self._shell(device)
        places = self.image_tokens(sample).to(device)
        count = 0 if features is None else len(features)
        if count != int(places.sum()):
            raise ConfigError(
                f"The pictures make {count} features and the text has {int(places.sum())} "
                "placeholders for them. Give the processor as many pictures as the text has places "
                "for, and the processor saved with the weights."
            )
        ids = sample["input_ids"].to(device)
        stream = cast(Tensor, shell.get_submodule(self._parts.embeddings)(ids))
        if features is not None:
            stream = stream.masked_scatter(places[..., None], features.to(stream))
        catcher = _Catcher()
        # A list of one layer, which hands back what it got: the rest of the class runs as always.
        shell.set_submodule(self._parts.layers, nn.ModuleList([catcher]))
        try:
            shell.get_submodule(self._parts.language_model)(
                inputs_embeds=stream,
                position_ids=self._position_ids(self._base(shell), sample, device),
                use_cache=False,
            )
        finally:
            shell.set_submodule(self._parts.layers, nn.ModuleList())
        return catcher.state

    def call_arguments(self, sample: Sample, device: Device) -> dict[str, Tensor]:
        """What the public class is called with for a sample; the labels are not."""
        names = ("input_ids", *(name for name in self.picture_inputs if name in sample))
        return {name: sample[name].to(device) for name in names}

    def pipeline(self, device: Device, network: nn.Module | None = None) -> AnsweringPipeline:
        """Answers of a network.

        Args:
            device: Where to answer.
            network: Of the public class, quantised or not; the full-precision one if None.
        """
        asked = self.network(device) if network is None else network
        return AnsweringPipeline(asked, self.call_arguments, self.folder, device)

    # Inner parts

    def _quantizable(self) -> set[str]:
        named = (name for group in self.vision_groups() for name in group.linears)
        return super()._quantizable() | {f"{self.vision_name}.{name}" for name in named}

    def _shell(self, device: Device) -> nn.Module:
        """Everything but the decoder layers, with its weights."""
        key = str(torch.device(device))
        if key not in self._shells:
            shell = self._built_real()
            shell.set_submodule(self._parts.layers, nn.ModuleList())
            self._assign(shell, self._loaded(shell.state_dict(), device))
            self._move_tables(shell, device)
            self._shells[key] = shell.requires_grad_(False).eval()
        return self._shells[key]

    def _base(self, network: nn.Module) -> nn.Module:
        return network.get_submodule(self._parts.base)

    def _vision_layers(self) -> list[tuple[str, nn.Module]]:
        """Layers of the tower that reach the features, without weights; name in front of parts."""
        tower = self._meta.get_submodule(self._parts.vision_tower)
        layers = vision_layers(tower)
        prefix = f"{self._parts.vision_tower.removeprefix(f'{self._parts.base}.')}.{layers}"
        used = list(cast(nn.ModuleList, tower.get_submodule(layers)))[: self._vision_depth(tower)]
        return [(f"{prefix}.{index}.", layer) for index, layer in enumerate(used)]

    def _vision_depth(self, tower: nn.Module) -> int | None:
        """How many of the tower's layers the features come through; None: all."""
        taken = getattr(self._settings, "vision_feature_layer", None)
        if taken is None:
            return None
        count = len(cast(nn.ModuleList, tower.get_submodule(vision_layers(tower))))
        # Hidden state 0 is what enters the first layer, -1 what leaves the last.
        places = [taken] if isinstance(taken, int) else list(taken)
        return max(place if place >= 0 else count + 1 + place for place in places)

    def _position_ids(self, base: nn.Module, sample: Sample, device: Device) -> Tensor | None:
        """Positions of the tokens; None: one after the other."""
        return None

    @staticmethod
    def _moved(tensor: Tensor, target: Tensor) -> Tensor:
        return tensor.to(target) if tensor.is_floating_point() else tensor.to(target.device)


class _Catcher(nn.Module):
    """Stands for all decoder layers and keeps what the first one is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.state: State = {}

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **unused: Any,
    ) -> Tensor:
        if position_embeddings is None or any(len(t) != 1 for t in position_embeddings):
            raise CapabilityMissing(
                "The language model does not hand rotary tables [1, tokens, head channels] to its "
                "layers. Write an adapter whose embed_features catches what they take."
            )
        cos, sin = position_embeddings
        self.state = {"hidden_states": hidden_states, "rotary_cos": cos, "rotary_sin": sin}
        if attention_mask is not None:
            self.state["attention_mask"] = attention_mask
        return hidden_states
