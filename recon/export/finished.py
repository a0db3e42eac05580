"""A finished run, opened to be exported."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from recon.calibration.artefact import CalibrationSet
from recon.engine.native import Native, read_native
from recon.errors import CheckpointMismatch
from recon.layers.quant_linear import QuantLinear
from recon.models.adapter import FloatingType, ModelAdapter
from recon.types import Sample

CHECKED_SAMPLES = 2
"""Held-out samples that an export is run on."""


@dataclass(frozen=True)
class Finished:
    """What exporting needs of a run: its result, its teacher's other parts, held-out samples.

    Args:
        root: The run folder.
        native: Its `quantized` folder, with a float32 network.
    """

    root: Path
    native: Native

    @classmethod
    def open(cls, root: Path) -> "Finished":
        """A run that ended, whose parts belong together.

        Raises:
            CheckpointMismatch: The run did not finish, is damaged, or holds parts of another run.
            CalibrationError: Its calibration set is missing or damaged.
        """
        if not (root / "quantized" / "manifest.json").is_file():
            raise CheckpointMismatch(
                f"{root} holds no finished result: quantized/manifest.json is missing. Give the "
                "folder of a run that ended; `recon fit --run FOLDER` continues one that did not."
            )
        # Half precision rounds differently from loader to loader; float32 tells faults apart.
        finished = cls(root, read_native(root, "float32"))
        finished._refuse_foreign()
        return finished

    def _refuse_foreign(self) -> None:
        saved = self.native.manifest["fingerprint"]
        found = {"calibration": self.calibration.fingerprint}
        if self.teacher.is_dir():
            identity = self.teacher_adapter().identity()
            found |= {f"teacher.{key}": value for key, value in identity.items()}
        for field, value in found.items():
            if saved.get(field) != value:
                raise CheckpointMismatch(
                    f"The result in {self.native.folder} was made with {field} "
                    f"{saved.get(field)!r}, but the run folder and its teacher {self.teacher} have "
                    f"{value!r}: they belong to different runs. Put back what the run was made of, "
                    "or fit again."
                )

    @cached_property
    def teacher(self) -> Path:
        """Folder of the full-precision pipeline, which may be gone since.

        Raises:
            CheckpointMismatch: The run has no summary.
        """
        path = self.root / "summary.json"
        if not path.is_file():
            raise CheckpointMismatch(
                f"{path} is missing: the run was stopped while it wrote its results. "
                f"`recon fit --run {self.root}` writes them again."
            )
        return Path(json.loads(path.read_text())["teacher"])

    def teacher_adapter(self, dtype: FloatingType = "auto") -> ModelAdapter:
        """The adapter of the run on the full-precision pipeline.

        Args:
            dtype: Floating type of the network, a word of `ModelAdapter`.
        """
        adapter = self.native.adapter
        return type(adapter)(str(self.teacher), dtype, **adapter.arguments())

    @cached_property
    def data_settings(self) -> dict[str, Any]:
        """Arguments of the run's data module, of its config.yaml; empty where there is none."""
        config = self.root / "config.yaml"
        if not config.is_file():
            return {}
        arguments: dict[str, Any] = yaml.safe_load(config.read_text())["data"]["init_args"]
        return arguments

    @cached_property
    def calibration(self) -> CalibrationSet:
        """The set the run was calibrated on, in its folder or where `data.folder` says."""
        own = self.root / "calibration"
        return CalibrationSet.load(own if own.is_dir() else self.data_settings.get("folder") or own)

    @property
    def layers(self) -> dict[str, QuantLinear]:
        """The closed layers by full dotted name, each time anew."""
        return self.native.layers()

    @property
    def samples(self) -> Sequence[Sample]:
        """The held-out samples an export is run on."""
        return self.calibration.held_out[:CHECKED_SAMPLES]

    @cached_property
    def empty(self) -> nn.Module:
        """The public class on the meta device."""
        return self.native.adapter.empty_network()

    @property
    def library(self) -> str:
        """Who has the public class: diffusers or transformers."""
        return type(self.empty).__module__.partition(".")[0]

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """Every Linear of the public class, by full dotted name."""
        return tuple(n for n, m in self.empty.named_modules() if isinstance(m, nn.Linear))

    # The rest of the pipeline

    @cached_property
    def parts(self) -> tuple[Path, ...]:
        """Files and folders of the teacher beside its network; none where the teacher is gone."""
        if not self.teacher.is_dir():
            return ()
        inside = self.native.adapter.subfolder
        if not inside:
            return tuple(sorted(p for p in self.teacher.iterdir() if p.is_file() and _small(p)))
        index = self.teacher / "model_index.json"
        named = [self.teacher / name for name in _components(index) if name != inside]
        return (index, *(path for path in named if path.is_dir()))

    def copy_parts(self, folder: Path) -> None:
        """Puts `parts` into the folder of an export."""
        for part in self.parts:
            if part.is_dir():
                shutil.copytree(part, folder / part.name)
            else:
                shutil.copyfile(part, folder / part.name)

    @property
    def describing(self) -> dict[str, Any]:
        """Method and bits, for export.json."""
        manifest = self.native.manifest
        grids = {
            side: [facts[side] for facts in manifest["layers"].values()]
            for side in ("weight", "activation")
        }
        return {
            "method": manifest["method"],
            "bits": {
                side: sorted({16 if spec is None else int(spec["num_bits"]) for spec in specs})
                for side, specs in grids.items()
            },
            "run_error": manifest["error"],
        }


def _components(index: Path) -> list[str]:
    if not index.is_file():
        return []
    content = json.loads(index.read_text())
    return [name for name, value in content.items() if isinstance(value, list)]


def _small(file: Path) -> bool:
    """Whether a file beside a network of transformers belongs to its processor."""
    weights = (".safetensors", ".bin", ".index.json", ".gguf", ".pth", ".md")
    return not file.name.startswith(".") and (
        file.name != "config.json" and not file.name.endswith(weights)
    )
