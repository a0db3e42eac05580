"""The safetensors files of one network folder, read lazily and checked without reading them."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recon.errors import WeightsError

STEMS = ("diffusion_pytorch_model", "model")
"""Names that diffusers and transformers give to weight files."""
LENGTH_BYTES = 8
"""A safetensors file starts with the length of its JSON header, little endian."""
FINGERPRINT_BYTES = 2**20
"""How much of each end of the data of a file enters the fingerprint."""
FLOATING = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
REMEDY = "Fetch the file again, completely"


@dataclass(frozen=True)
class _Header:
    raw: bytes
    tensors: Mapping[str, Mapping[str, Any]]

    @property
    def size(self) -> int:
        """Bytes the whole file must have."""
        data = max((int(entry["data_offsets"][1]) for entry in self.tensors.values()), default=0)
        return self.data_start + data

    @property
    def data_start(self) -> int:
        return LENGTH_BYTES + len(self.raw)


class WeightStore:
    """Weights of one network: one safetensors file, or shards with an index, or a variant.

    Files without a variant are preferred to `fp16` and other variants, a sharded set to a single
    file. Tensors are read when asked for, one by one, so that memory holds what was asked for.

    Args:
        folder: Folder that holds the files. Nothing is read before it is needed.
        rename: Gives the network's name of a stored tensor, None for one it has no place for;
            without it tensors keep their stored names. All names here are the network's.
    """

    def __init__(
        self, folder: str | Path, rename: Callable[[str], str | None] | None = None
    ) -> None:
        self.folder = Path(folder)
        self._rename = rename

    def check(self) -> None:
        """Refuse missing, cut or foreign files; reads headers only.

        Raises:
            WeightsError: No weight file, a file missing, cut short or not safetensors, or a tensor
                of the index in no file.
        """
        # Opening every header and joining them with the index meets every one of these cases.
        _ = self._places

    def check_fits(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse files that lack tensors of the network or hold them in other shapes.

        Args:
            shapes: Name and shape of every tensor the network loads.

        Raises:
            WeightsError: A tensor is missing or has another shape.
        """
        self._require(shapes)
        for name, shape in shapes.items():
            found = tuple(self._entry(name)["shape"])
            if found != shape:
                raise WeightsError(
                    f"{name} has the shape {list(found)} in {self._places[name]}, and "
                    f"{list(shape)} in the network of its config.json. Fetch both files from one "
                    "checkpoint."
                )

    def keys(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._places))

    def dtype(self) -> torch.dtype:
        """Floating type in which most of the numbers are stored; float32 if there are none."""
        bytes_of: Counter[str] = Counter()
        for name in self._places:
            entry = self._entry(name)
            if entry["dtype"] in FLOATING:
                start, end = entry["data_offsets"]
                bytes_of[entry["dtype"]] += end - start
        return FLOATING[bytes_of.most_common(1)[0][0]] if bytes_of else torch.float32

    def elements(self) -> int:
        """Numbers in all floating tensors."""
        entries = (self._entry(name) for name in self._places)
        return sum(math.prod(e["shape"]) for e in entries if e["dtype"] in FLOATING)

    @property
    def variant(self) -> str | None:
        """Variant of the files in use, such as `fp16`; None for the plain ones."""
        return self._layout[1]

    def load(
        self, prefix: str, dtype: torch.dtype, device: torch.device | str
    ) -> dict[str, Tensor]:
        """Tensors below a dotted prefix, by their name below it; `""` for all.

        Args:
            prefix: Dotted name of a module, without a trailing dot.
            dtype: Type for floating tensors; other tensors keep theirs.
            device: Where the tensors are put.

        Raises:
            WeightsError: No tensor has that prefix, or a file is damaged.
        """
        start = f"{prefix}." if prefix else ""
        names = [name for name in self.keys() if name.startswith(start)]
        if not names:
            raise WeightsError(
                f"{self.folder} holds no tensor below {prefix!r}; it has {len(self._places)} "
                "tensors. Check that config.json and the weight files are of one checkpoint."
            )
        loaded = self.load_names(names, dtype, device)
        return {name.removeprefix(start): tensor for name, tensor in loaded.items()}

    def load_names(
        self, names: Iterable[str], dtype: torch.dtype, device: torch.device | str
    ) -> dict[str, Tensor]:
        """Tensors by their full names; each is a copy that does not depend on the file.

        Raises:
            WeightsError: A tensor is missing, or a file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        by_file: dict[Path, list[str]] = {}
        names = list(names)
        self._require(names)
        for name in names:
            by_file.setdefault(self._places[name], []).append(name)
        loaded: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            try:
                with safe_open(str(file), framework="pt", device="cpu") as tensors:
                    for name in wanted:
                        stored = tensors.get_tensor(self._stored[name])
                        loaded[name] = placed(stored, dtype, device)
            except SafetensorError as error:
                raise WeightsError(f"{file} cannot be read: {error}. {REMEDY}.") from error
        return {name: loaded[name] for name in names}

    def fingerprint(self) -> str:
        """sha256 over name, size, header and both ends of the data of every file.

        Meant to tell checkpoints apart, fast: of each file the header (names, shapes, types) and
        the first and last MiB of the data are read, also if it has 10 GB. A change that keeps all
        of these, in the middle of the data, is not seen.
        """
        digest = hashlib.sha256()
        for file in sorted(self._layout[0]):
            header, size = self._headers[file], file.stat().st_size
            digest.update(f"{file.name}\0{size}\0".encode())
            digest.update(header.raw)
            with file.open("rb") as stream:
                stream.seek(header.data_start)
                digest.update(stream.read(FINGERPRINT_BYTES))
                stream.seek(max(header.data_start, size - FINGERPRINT_BYTES))
                digest.update(stream.read())
        return digest.hexdigest()

    @cached_property
    def _layout(self) -> tuple[tuple[Path, ...], str | None]:
        """Files in use and their variant."""
        index, variant = self._index_file
        if index is not None:
            shards = sorted(set(_read_index(index).values()))
            return tuple(self.folder / shard for shard in shards), variant
        files = sorted(self.folder.glob("*.safetensors"))
        plain = [file for file in files if "." not in file.stem]
        chosen = [file for file in plain if file.stem in STEMS] or plain or files
        if len(chosen) == 1:
            return (chosen[0],), chosen[0].stem.partition(".")[2] or None
        if chosen:
            raise WeightsError(
                f"{self.folder} holds {[file.name for file in chosen]} and no index that joins "
                f"them. Keep one of them, or add {STEMS[0]}.safetensors.index.json."
            )
        looked = ", ".join(f"{stem}.safetensors" for stem in STEMS)
        raise WeightsError(
            f"{self.folder} holds no safetensors file; looked for {looked}, their variants and "
            "*.safetensors.index.json. Download the folder completely; convert a pickled .bin "
            "checkpoint with save_pretrained(safe_serialization=True), recon does not unpickle."
        )

    @property
    def _index_file(self) -> tuple[Path | None, str | None]:
        """The index and its variant (`model.safetensors.index.fp16.json`: fp16), if any."""
        found: dict[str | None, Path] = {}
        for file in sorted(self.folder.glob("*.safetensors.index*.json")):
            variant = file.name.partition(".safetensors.index")[2].removesuffix(".json")
            found.setdefault(variant.removeprefix(".") or None, file)
        if None in found or not found:
            return found.get(None), None
        single = any((self.folder / f"{stem}.safetensors").exists() for stem in STEMS)
        variant = min(str(name) for name in found)
        return (None, None) if single else (found[variant], variant)

    @cached_property
    def _headers(self) -> dict[Path, _Header]:
        return {file: _read_header(file) for file in self._layout[0]}

    @cached_property
    def _places(self) -> dict[str, Path]:
        """File of every tensor."""
        return {name: self._files[stored] for name, stored in self._stored.items()}

    @cached_property
    def _stored(self) -> dict[str, str]:
        """Stored name of every tensor."""
        if self._rename is None:
            return {name: name for name in self._files}
        found: dict[str, str] = {}
        for stored in self._files:
            name = self._rename(stored)
            if name is not None and found.setdefault(name, stored) != stored:
                raise WeightsError(
                    f"{self.folder} holds {found[name]} and {stored}, which are both {name} of the "
                    "network. The files are of two releases of one checkpoint: keep one of them."
                )
        return found

    @cached_property
    def _files(self) -> dict[str, Path]:
        """File of every stored name."""
        held = {name: file for file, header in self._headers.items() for name in header.tensors}
        index, _ = self._index_file
        for name, shard in (_read_index(index) if index else {}).items():
            if held.get(name) != self.folder / shard:
                raise WeightsError(
                    f"{index} places {name} in {shard}, which does not hold it. The index and the "
                    f"shards are of different checkpoints. {REMEDY}."
                )
        return held

    def _entry(self, name: str) -> Mapping[str, Any]:
        return self._headers[self._places[name]].tensors[self._stored[name]]

    def _require(self, names: Iterable[str]) -> None:
        missing = sorted(set(names) - set(self._places))
        if missing:
            files = [file.name for file in self._layout[0]]
            raise WeightsError(
                f"{self.folder} lacks {len(missing)} tensors of the network, the first "
                f"{missing[0]!r}; its files are {files}. Check that config.json and the weight "
                "files are of one checkpoint, and fetch what is missing."
            )


def own_memory(module: nn.Module) -> nn.Module:
    """The module, every tensor of it copied to memory of its own.

    Loaders that map files leave weights at the addresses the file gives them. Products with a
    single row (a time embedding at batch 1) are rounded differently at addresses that are not
    aligned to 64 bytes: observed on a CPU, 5e-7. Memory that torch allocates is aligned, so with
    copies equal weights give equal bits, however they were loaded.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()
    return module


def placed(tensor: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A copy on the device; a floating tensor in the type, any other in its own."""
    # copy: a view of the mapped file would fail if the file were replaced during a long run, and
    # lies where the file has it: see own_memory.
    target = dtype if tensor.is_floating_point() else tensor.dtype
    return tensor.to(device=device, dtype=target, copy=True)


def _read_index(file: Path) -> dict[str, str]:
    try:
        return dict(json.loads(file.read_text())["weight_map"])
    except (UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{file} is not a safetensors index: {error!r}. {REMEDY}.") from error


def _read_header(file: Path) -> _Header:
    """The header of a file whose size agrees with it."""
    if not file.is_file():
        raise WeightsError(f"{file} is missing, though the index names it. {REMEDY}.")
    found = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(LENGTH_BYTES)
        length = int.from_bytes(start, "little")
        if start + stream.read(4) == b"version http":
            raise WeightsError(
                f"{file} is a git-lfs pointer of {found} bytes, not the weights. Run `git lfs "
                "pull` in the checkpoint, or download it with `hf download`."
            )
        stream.seek(LENGTH_BYTES)
        if found <= LENGTH_BYTES or stream.read(1) != b"{":
            raise WeightsError(f"{file} ({found} bytes) is not a safetensors file. {REMEDY}.")
        if LENGTH_BYTES + length > found:
            raise _cut_short(file, f"at least {LENGTH_BYTES + length}", found)
        stream.seek(LENGTH_BYTES)
        raw = stream.read(length)
    try:
        entries = dict(json.loads(raw))
        entries.pop("__metadata__", None)
        header = _Header(raw, entries)
        expected = header.size
    except (UnicodeDecodeError, ValueError, KeyError, TypeError, IndexError) as error:
        raise WeightsError(f"{file} is not a safetensors file: {error!r}. {REMEDY}.") from error
    if expected != found:
        raise _cut_short(file, str(expected), found)
    return header


def _cut_short(file: Path, expected: str, found: int) -> WeightsError:
    return WeightsError(
        f"{file} must have {expected} bytes by its header, and has {found}: it was cut short or "
        f"changed. {REMEDY}."
    )
