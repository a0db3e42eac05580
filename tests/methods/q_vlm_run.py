"""Q-VLM on a tiny network; run as a module it fits in several processes."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from recon.engine import ReconStrategy
from recon.engine.data import CalibrationData
from recon.methods.q_vlm import QVLM
from recon.quantizers.spec import QuantSpec
from recon.types import Sample
from tests.engine.tiny_run import FixedData, trainer_for
from tests.models.tiny_pictures import TinyPicturesAdapter, tiny_question

W4 = QuantSpec(num_bits=4, strategy="channel")
TOKEN = QuantSpec(num_bits=4, strategy="token", dynamic=True)


@dataclass
class Questions:
    """A calibration set in memory."""

    samples: list[Sample] = field(default_factory=lambda: [tiny_question(s) for s in range(4)])
    held_out: list[Sample] = field(default_factory=lambda: [tiny_question(s) for s in (8, 9)])
    fingerprint: str = "tiny questions"


class QuestionData(FixedData):
    """Hands out the same few questions."""

    def __init__(self) -> None:
        CalibrationData.__init__(self)
        self.calibration_set_ = Questions()  # type: ignore[assignment]


def method(teacher: Path, **changed: Any) -> QVLM:
    """Four layers, two candidates: a search of one layer takes 2 steps, of three 14."""
    settings: dict[str, Any] = {
        "weight": W4, "activation": TOKEN, "shrinks": (1.0, 0.7), "percentiles": (1.0, 0.98),
        "audited": 2, "steps": 4, "batch_size": 2, "threads": 1, "compile": False, **changed,
    }  # fmt: skip
    return QVLM(adapter=TinyPicturesAdapter(str(teacher)), **settings)


def fit(root: Path, module: QVLM, *callbacks: Callback, **settings: Any) -> Trainer:
    """One fit in `root`; `ckpt_path`, `every` and trainer settings by name."""
    checkpoint = settings.pop("ckpt_path", None)
    trainer = trainer_for(root, *callbacks, **{"every": 1000, **settings})
    trainer.fit(module, QuestionData(), ckpt_path=checkpoint)
    return trainer


if __name__ == "__main__":
    teacher, root, devices = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    fit(root, method(teacher), devices=devices, strategy=ReconStrategy())
