"""Q-VLM with its visual encoder on a tiny LLaVA; run as a module it fits in several processes."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from recon.engine import ReconStrategy
from recon.engine.data import CalibrationData
from recon.methods.q_vlm import QVLM
from recon.methods.visual_encoder_tuning import VisualEncoderTuning
from recon.models.llava import Llava
from recon.types import Sample
from tests.engine.tiny_run import FixedData, trainer_for
from tests.methods.q_vlm_run import TOKEN, W4
from tests.models.tiny_vlm import tiny_vlm_sample

TUNED = VisualEncoderTuning(enabled=True, epochs=3, lr=1e-3, weight_lr=1e-4)
"""Six steps, two an epoch."""


def asked(pictures: int, seed: int) -> Sample:
    """A question of its own length, with an answer of two tokens."""
    return tiny_vlm_sample("llava", pictures, words=7 + seed, seed=seed)


@dataclass
class Asked:
    """Four calibration samples and two held-out ones with so many pictures each."""

    pictures: tuple[int, ...] = (1, 1, 2, 0, 1, 1)
    fingerprint: str = "tiny llava"

    @property
    def samples(self) -> list[Sample]:
        return [asked(count, seed) for seed, count in enumerate(self.pictures[:4])]

    @property
    def held_out(self) -> list[Sample]:
        # Those of calibration again: three epochs on random answers teach nothing about others.
        return [asked(count, seed) for seed, count in enumerate(self.pictures[4:])]


class AskedData(FixedData):
    """Hands out the same few questions."""

    def __init__(self, *pictures: int) -> None:
        CalibrationData.__init__(self)
        self.calibration_set_ = Asked(pictures) if pictures else Asked()  # type: ignore[assignment]


def method(teacher: Path, **changed: Any) -> QVLM:
    """Both decoder layers in one unit, two candidates, no survey, nothing learned behind it."""
    settings: dict[str, Any] = {
        "weight": W4, "activation": TOKEN, "shrinks": (1.0, 0.7), "partition_by": "fixed",
        "audited": 0, "rounding": "none", "batch_size": 2, "threads": 1, "compile": False,
        "quantize_vision": True, "veo": TUNED, **changed,
    }  # fmt: skip
    return QVLM(adapter=Llava(str(teacher)), **settings)


def fit(root: Path, module: QVLM, *callbacks: Callback, **settings: Any) -> Trainer:
    """One fit in `root`; `pictures`, `ckpt_path`, `every` and trainer settings by name."""
    checkpoint, pictures = settings.pop("ckpt_path", None), settings.pop("pictures", ())
    trainer = trainer_for(root, *callbacks, **{"every": 1000, **settings})
    trainer.fit(module, AskedData(*pictures), ckpt_path=checkpoint)
    return trainer


def result_bytes(root: Path) -> list[bytes]:
    """Codes and ranges, and every tensor that is not quantised."""
    names = ("quantized.safetensors", "network.safetensors")
    return [(root / "quantized" / name).read_bytes() for name in names]


if __name__ == "__main__":
    teacher, root, devices = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    # With two processes, the second one has texts alone.
    texts = (1, 0, 2, 0, 1, 0)
    fit(root, method(teacher), pictures=texts, devices=devices, strategy=ReconStrategy())
