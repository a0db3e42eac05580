"""What a model family tells the rest of the library about itself; knows no method."""

import copy
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from recon.errors import CapabilityMissing, ConfigError, WeightsError
from recon.models.folder import read_json, require_class, require_folder
from recon.models.weights import WeightStore, placed
from recon.types import Sample, State

Device = torch.device | str

Role = Literal[
    "attention_input",
    "attention_output",
    "feed_forward_up",
    "feed_forward_down",
    "modulation",
    "patch_embedding",
    "timestep_embedding",
    "output",
]

FloatingType = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class InputGroup:
    """Linears of a block that receive the same input tensor, and so share one input transform."""

    linears: tuple[str, ...]
    """Dotted names relative to the block, such as `attn1.to_q`."""
    role: Role
    """Where in the block the input stands."""


class ModelAdapter(ABC):
    """One network, read from a local folder, as a chain of blocks.

    Holds the network outside `nn.Module` registration: it is not a module, so that checkpoints,
    `.to()` and distributed code see only what a method learns. Every tensor of a `State` has the
    batch as axis 0, so states of equal shape may be concatenated and sliced there.

    Subclasses are named by dotted path in YAML. They set the class attributes below and implement
    the abstract methods; everything that only needs names, shapes and weights is done here.

    Args:
        folder: Local folder, as `save_pretrained` writes it. Nothing is read before it is needed.
        dtype: Floating type of the full-precision network. `auto`: float32 on a CPU, the type of
            the checkpoint elsewhere.

    Raises:
        ConfigError: dtype is not one of the four words.
    """

    network_class: ClassVar[str]
    """Class name that `config.json` must carry."""
    pipeline_classes: ClassVar[tuple[str, ...]] = ()
    """Class names that `model_index.json` may carry; empty: the folder has no such file."""
    subfolder: ClassVar[str] = ""
    """Folder of the network inside the given one."""
    example: ClassVar[str] = ""
    """A public checkpoint of the family, as `owner/name`, for error messages."""
    streamed: ClassVar[tuple[str, ...]]
    """Keys of State that every block replaces; all other keys are conditioning."""
    shared: ClassVar[tuple[str, ...]] = ()
    """Conditioning keys that follow from the sample's shape alone: a store may keep one copy of
    them for all samples of one shape, instead of one per sample."""

    def __init__(
        self,
        folder: str,
        dtype: FloatingType = "auto",
    ) -> None:
        if dtype != "auto" and dtype not in DTYPES:
            raise ConfigError(
                f"{type(self).__name__}.dtype is {dtype!r}, which is none of "
                f"{['auto', *DTYPES]}. Choose one of them."
            )
        self.folder = Path(folder).expanduser()
        self.network_folder = self.folder / self.subfolder
        """Folder that holds `config.json` and the weights of the network."""
        self.dtype = dtype
        self.keep_resident = False
        """Keep the weights of blocks once read on their device: for networks that fit."""
        self._resident: dict[tuple[str, str], dict[str, Tensor]] = {}

    # What the folder holds

    @classmethod
    def of_network_folder(
        cls,
        folder: str | Path,
        dtype: FloatingType = "auto",
        **arguments: Any,
    ) -> Self:
        """An adapter on a folder that holds the network alone, without a pipeline around it.

        Args:
            folder: Holds `config.json` and the weights.
            dtype: As for every adapter.
            **arguments: Further ones of the class, as `arguments` gives them.
        """
        adapter = cls(str(folder), dtype, **arguments)
        adapter.network_folder = adapter.folder
        return adapter

    def arguments(self) -> dict[str, Any]:
        """Arguments beside folder and dtype; an adapter keeps each under its own name."""
        names = inspect.signature(type(self)).parameters
        return {name: getattr(self, name) for name in names if name not in ("folder", "dtype")}

    @cached_property
    def weights(self) -> WeightStore:
        """The network's weights on disk."""
        return WeightStore(self.network_folder)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The network's `config.json`.

        Raises:
            ConfigError: The file is missing or is not JSON.
        """
        return read_json(self.network_folder / "config.json", type(self).__name__)

    def check(self) -> None:
        """Refuse a folder that is not of this family or whose weights are incomplete.

        Cheap things first: names and small files, then the headers of the weight files, then
        their names and shapes against the network built without memory. No weight is read.

        Raises:
            ConfigError: The folder or one of its description files is missing or of another class.
            CapabilityMissing: The blocks hold Linears that `input_groups` does not name.
            WeightsError: A weight file is missing, cut short, foreign or does not fit.
        """
        self.check_description()
        self.weights.check()
        self.weights.check_fits(self._stored_shapes())
        for name in self.block_names:
            self._check_groups(name)

    def check_description(self) -> None:
        """Refuse a folder that is not of this family, by its small files.

        Raises:
            ConfigError: The folder or one of its description files is missing or of another class.
        """
        name = type(self).__name__
        require_folder(self.folder, name, self.example)
        if self.pipeline_classes:
            index = self.folder / "model_index.json"
            require_class(index, read_json(index, name), self.pipeline_classes, name)
        require_class(self.network_folder / "config.json", self.config, (self.network_class,), name)

    def identity(self) -> dict[str, str]:
        """Class, weight fingerprint and geometry of the network: equal for equal teachers."""
        geometry = {k: v for k, v in self.config.items() if not k.startswith("_")}
        return {
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "weights": self.weights.fingerprint(),
            "geometry": json.dumps(geometry, sort_keys=True),
        }

    @property
    def stored_dtype(self) -> torch.dtype:
        """Floating type of most weights on disk; where there are none, bfloat16 as most are."""
        try:
            return self.weights.dtype()
        except WeightsError:
            return torch.bfloat16

    def compute_dtype(self, device: Device) -> torch.dtype:
        """Floating type of the full-precision network on a device."""
        if self.dtype != "auto":
            return DTYPES[self.dtype]
        on_cpu = torch.device(device).type == "cpu"
        return torch.float32 if on_cpu else self.weights.dtype()

    # Names and shapes, without memory

    @property
    @abstractmethod
    def block_names(self) -> tuple[str, ...]:
        """Dotted names of the blocks in the network, in call order; from the config alone."""

    @abstractmethod
    def input_groups(self, block_name: str) -> tuple[InputGroup, ...]:
        """Every Linear inside the block exactly once, grouped by input, in call order."""

    def linear_shapes(self, block_name: str) -> dict[str, tuple[int, int]]:
        """(out, in_) of every Linear inside the block, by name relative to the block.

        Raises:
            ConfigError: The network has no block of that name.
        """
        block = self.empty_block(block_name)
        return {
            name: (module.out_features, module.in_features)
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
        }

    def empty_block(self, name: str) -> nn.Module:
        """The block as `block` gives it, on the meta device; not to be changed.

        Raises:
            ConfigError: The network has no block of that name.
        """
        if name not in self.block_names:
            raise ConfigError(
                f"{name!r} is not a block of {self.network_class} in {self.folder}. Its "
                f"{len(self.block_names)} blocks are {self.block_names[0]} to "
                f"{self.block_names[-1]}."
            )
        return self._meta.get_submodule(name)

    @abstractmethod
    def empty_network(self) -> nn.Module:
        """A fresh network of the public class on the meta device, from the config alone."""

    # The network, block by block

    def block(self, name: str, device: Device) -> nn.Module:
        """The full-precision block, in eval mode, not requiring gradients.

        Read from the weight files at every call, unless `keep_resident` is set; then each call
        returns another module on the same weights, so modules in it may be replaced, but its
        weights must not be written to. Drop the block to release it.

        Raises:
            ConfigError: The network has no block of that name.
            WeightsError: The files lack some of the block's weights, or hold other shapes.
        """
        block = copy.deepcopy(self.empty_block(name))
        key = (name, str(torch.device(device)))
        weights = self._resident.get(key)
        if weights is None:
            weights = self._read_block(name, device)
        if self.keep_resident:
            self._resident[key] = weights
        self._assign(block, weights)
        return block.requires_grad_(False).eval()

    @abstractmethod
    def embed(self, sample: Sample, device: Device) -> State:
        """The state that enters the first block: streamed tensors and conditioning."""

    @abstractmethod
    def forward_block(self, block: nn.Module, state: State) -> State:
        """A new state: streamed tensors replaced by the block's, conditioning kept.

        Raises:
            CapabilityMissing: The block returns a structure this family does not know.
        """

    @abstractmethod
    def output(self, sample: Sample, state: State, device: Device) -> Tensor:
        """The network's output from the state that leaves the last block."""

    @abstractmethod
    def tokens(self, state: State) -> Tensor:
        """All streamed tokens [batch, tokens, channels], in the order attention sees them."""

    @abstractmethod
    def token_streams(self, state: State) -> dict[str, slice]:
        """Where each kind of token stands along the token axis of `tokens`."""

    @abstractmethod
    def network(self, device: Device) -> nn.Module:
        """The whole full-precision network of the public class, for sampling and evaluation."""

    @abstractmethod
    def network_from(self, weights: Mapping[str, Tensor], device: Device) -> nn.Module:
        """As `network`, from given weights; Linears that may be quantised may lack theirs.

        A Linear without a weight stays on the meta device, to be replaced by the caller.

        Raises:
            WeightsError: Other weights are missing, or some do not fit.
        """

    # Inputs of the configured size

    @abstractmethod
    def example_sample(self, rows: int, device: Device, dtype: torch.dtype) -> Sample:
        """Random numbers in the shape of a sample of the configured input size.

        Args:
            rows: Batch of the sample.
            device: Where it is made; on the meta device only its shapes are.
            dtype: Its floating type.
        """

    @abstractmethod
    def example_state(self, rows: int, device: Device, dtype: torch.dtype) -> State:
        """Random numbers in the shape of what `embed` makes of such a sample; reads no weights.

        Args:
            rows: Batch of the sample.
            device: Where it is made; on the meta device only its shapes are.
            dtype: Its floating type.
        """

    def stream_bytes(self, rows: int, device: Device) -> int:
        """Bytes of the streamed tensors of one sample, at the configured input size.

        Args:
            rows: Batch of the sample.
            device: Where the network runs; its floating type depends on it.
        """
        state = self.example_state(rows, "meta", self.compute_dtype(device))
        return sum(state[name].nbytes for name in self.streamed)

    # The network as others call and save it

    def call_arguments(self, sample: Sample, device: Device) -> dict[str, Any]:
        """What the public class is called with for a sample: tensors, or tuples of tensors.

        Default: the sample itself.
        """
        dtype = self.compute_dtype(device)
        return {name: placed(tensor, dtype, device) for name, tensor in sample.items()}

    def unsaved(self) -> str | None:
        """What the public class does otherwise than this network, whatever its files say.

        None: nothing, so that `save_pretrained` and `from_pretrained` give the network back.
        """
        return None

    def pipeline(self, device: Device, network: nn.Module | None = None) -> Any:
        """The stock pipeline around a network, the full-precision one if None, for sampling.

        Raises:
            CapabilityMissing: The family does not sample.
        """
        raise CapabilityMissing(
            f"{type(self).__name__} makes no pipeline, so nothing can be sampled from it. "
            f"Implement {type(self).__name__}.pipeline, or use a data module that does not sample."
        )

    # Inner parts

    @cached_property
    def _meta(self) -> nn.Module:
        return self.empty_network()

    def _stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor that the files must hold."""
        return {name: tuple(tensor.shape) for name, tensor in self._meta.state_dict().items()}

    def _read_block(self, name: str, device: Device) -> dict[str, Tensor]:
        """Weights of a block from the files, by their name in it."""
        return self.weights.load(name, self.compute_dtype(device), device)

    def _assign(
        self, module: nn.Module, weights: Mapping[str, Tensor], optional: Set[str] = frozenset()
    ) -> None:
        """Gives a module its weights, those named optional only if they are there."""
        try:
            missing, unexpected = module.load_state_dict(weights, strict=False, assign=True)
        except RuntimeError as error:  # shapes
            raise self._misfit(module, str(error)) from error
        lacking = sorted(set(missing) - optional)
        if lacking or unexpected:
            raise self._misfit(module, f"missing {lacking}, unexpected {unexpected}")

    def _misfit(self, module: nn.Module, reason: str) -> WeightsError:
        return WeightsError(
            f"The weights in {self.network_folder} do not fit {type(module).__name__} of "
            f"{self.network_class}: {reason}. Check that config.json and the weight files are of "
            "one checkpoint."
        )

    def _check_groups(self, block_name: str) -> None:
        named = sorted(n for group in self.input_groups(block_name) for n in group.linears)
        present = sorted(self.linear_shapes(block_name))
        if named != present:
            odd = sorted(set(named) ^ set(present))
            raise CapabilityMissing(
                f"{type(self).__name__}.input_groups names other Linears than {block_name} "
                f"holds: {odd}. The network is a variant this adapter does not know; add the "
                "Linears to their group in a subclass."
            )
