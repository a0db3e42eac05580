"""Loading networks of transformers, whatever release wrote their files."""

from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from recon.models.adapter import Device, ModelAdapter
from recon.models.skeleton import skeleton
from recon.models.vlm_parts import Parts, canonical, find_parts
from recon.models.weights import WeightStore, placed


class TransformersNetwork(ModelAdapter):
    """What adapters of transformers' classes share: names of tensors, tied heads, tables.

    Names are those of the installed transformers; files that another release wrote are read under
    them. A head that is tied to the embeddings is one tensor in memory, and in the files it may
    stand once or twice.
    """

    @cached_property
    def weights(self) -> WeightStore:
        """The network's weights on disk, under the names of the installed transformers."""
        return WeightStore(self.network_folder, self._network_name)

    def empty_network(self) -> nn.Module:
        """The public class on the meta device."""
        with torch.device("meta"):
            return self._built()

    def network(self, device: Device) -> nn.Module:
        """The whole network of the public class with its weights, in eval mode."""
        return self._network_of(self._loaded(self._meta.state_dict(), device), device)

    def network_from(self, weights: Mapping[str, Tensor], device: Device) -> nn.Module:
        """As `network`, from given weights, which are copied; Linears may lack theirs.

        Those are the Linears of blocks, and of the vision network if they may be quantised.

        Raises:
            WeightsError: Other weights are missing, or some do not fit.
        """
        dtype = self.compute_dtype(device)
        named = {self._network_name(name) or name: t for name, t in weights.items()}
        copied = {name: placed(tensor, dtype, device) for name, tensor in named.items()}
        return self._network_of(self._tied(copied), device)

    # Inner parts

    @property
    def _settings(self) -> Any:
        """The configuration, with the defaults of what config.json leaves out."""
        return self._meta.config

    @property
    def _text_settings(self) -> Any:
        return self._settings.get_text_config()

    @cached_property
    def _parts(self) -> Parts:
        return find_parts(self._meta)

    @cached_property
    def _names(self) -> dict[str, str]:
        """Network's name of every tensor by its canonical one."""
        return {canonical(name): name for name in self._meta.state_dict()}

    def _network_name(self, stored: str) -> str | None:
        return self._names.get(canonical(stored))

    def _stored_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super()._stored_shapes()
        return {name: shapes[name] for name in self._stored(shapes)}

    def _stored(self, names: Collection[str]) -> list[str]:
        """Those of `names` that the files must hold: a tied head need not be there twice."""
        head = f"{self._parts.head}.weight"
        lacks_head = self._ties_head and head not in self.weights.keys()  # noqa: SIM118
        return [name for name in names if name != head or not lacks_head]

    @property
    def _ties_head(self) -> bool:
        settings = (self._settings, self._text_settings)
        return any(getattr(part, "tie_word_embeddings", False) for part in settings)

    def _tied(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        head, table = (f"{part}.weight" for part in (self._parts.head, self._parts.embeddings))
        if self._ties_head and head not in weights and table in weights:
            return {**weights, head: weights[table]}
        return weights

    def _loaded(self, names: Collection[str], device: Device) -> dict[str, Tensor]:
        stored = self._stored(names)
        loaded = self.weights.load_names(stored, self.compute_dtype(device), device)
        return self._tied(loaded) if f"{self._parts.head}.weight" in names else loaded

    def _built(self) -> nn.Module:
        import transformers

        public = getattr(transformers, self.network_class)
        return cast(nn.Module, public(public.config_class.from_dict(dict(self.config))))

    def _built_real(self) -> nn.Module:
        """The public class, weights on the meta device, tables computed."""
        return skeleton(self._built)

    def _network_of(self, weights: Mapping[str, Tensor], device: Device) -> nn.Module:
        network = self._built_real()
        self._assign(network, weights, {f"{linear}.weight" for linear in self._quantizable()})
        self._move_tables(network, device)
        return network.requires_grad_(False).eval()

    def _quantizable(self) -> set[str]:
        """Full names of the Linears that may be quantised."""
        return {f"{b}.{linear}" for b in self.block_names for linear in self.linear_shapes(b)}

    @staticmethod
    def _move_tables(network: nn.Module, device: Device) -> None:
        # Not network.to(...): linears without a weight cannot be moved.
        for name, buffer in list(network.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(owner), leaf, buffer.to(device))
