"""Whole fits whose device is not the host's: nothing of one is taken for the other's."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from recon.calibration.memory import MemoryBudget
from recon.engine import Reconstruction
from recon.engine.checkpoints import written
from recon.methods.gptq import GPTQ
from recon.methods.ptq4dit import PTQ4DiT
from recon.methods.rtn import RoundToNearest
from recon.methods.smoothquant import SmoothQuant
from recon.methods.visual_encoder_tuning import VisualEncoderTuning
from recon.models.cogvideox import CogVideoX
from recon.models.dit import DiT
from recon.quantizers.spec import QuantSpec
from tests.engine.elsewhere import DEVICE, run_elsewhere
from tests.engine.test_resume import Stop, adaround, s2q
from tests.engine.tiny_run import Interruption, fit, write_samples
from tests.methods import visual_encoder_run as asked
from tests.models.tiny import tiny_image_sample, write_tiny_cogvideox, write_tiny_dit
from tests.models.tiny_vlm import write_tiny_vlm

Made = Callable[..., Reconstruction]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with run_elsewhere(monkeypatch):
        yield


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("video")
    teacher = write_tiny_cogvideox(root / "teacher", rotary=True, layers=2)
    return teacher, write_samples(root / "set", teacher)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("images")
    teacher = write_tiny_dit(root / "teacher")
    draw = partial(tiny_image_sample, batch=2)
    return teacher, write_samples(root / "set", teacher, family=DiT, draw=draw)


def plain(kind: type[Reconstruction]) -> Made:
    return lambda teacher, **changed: kind(
        adapter=CogVideoX(str(teacher)), threads=1, compile=False, **changed
    )


def ptq4dit(teacher: Path, **changed: Any) -> Reconstruction:
    """Everything that the faithful configuration quantises, on fixed ranges."""
    return PTQ4DiT(
        adapter=DiT(str(teacher)), steps=4, lr=0.02, threads=1, compile=False,
        stem_and_head="weight", quantize_attention=True, batch_size=2, micro_batch=2,
        weight=QuantSpec(num_bits=4, symmetric=False),
        activation=QuantSpec(num_bits=8, strategy="tensor", symmetric=False), **changed,
    )  # fmt: skip


def stopped_and_continued(made: Made, teacher: Path, samples: Path, root: Path) -> None:
    with pytest.raises(Interruption):
        fit(root, made(teacher), samples, Stop("on_train_batch_end", 6))
    fit(root, made(teacher), samples, ckpt_path=str(written(root)[0]))
    assert (root / "summary.json").is_file()


@pytest.mark.usefixtures("device")
def test_what_stands_on_both_sides_is_refused() -> None:
    there = torch.ones(3).to(DEVICE)
    assert there.device == torch.zeros(2, device=DEVICE).device == DEVICE
    assert (2 * there + there.sum()).cpu().tolist() == [5, 5, 5]
    with pytest.raises(AssertionError, match="meets tensors of the host"):
        there + torch.ones(3)


@pytest.mark.slow  # every operation passes through Python
@pytest.mark.parametrize("made", [s2q, adaround])
@pytest.mark.parametrize("ram", ["auto", 0])
@pytest.mark.usefixtures("device")
def test_video_fits_stop_and_go_on(
    made: Made, ram: str | int, video: tuple[Path, Path], tmp_path: Path
) -> None:
    stopped_and_continued(partial(made, memory=MemoryBudget(device=0, ram=ram)), *video, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [RoundToNearest, SmoothQuant, GPTQ])
@pytest.mark.usefixtures("device")
def test_baselines_end(
    kind: type[Reconstruction], video: tuple[Path, Path], tmp_path: Path
) -> None:
    teacher, samples = video
    fit(tmp_path, plain(kind)(teacher), samples)
    assert (tmp_path / "summary.json").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("device")
def test_an_image_fit_with_stem_head_and_attention_stops_and_goes_on(
    images: tuple[Path, Path], tmp_path: Path
) -> None:
    stopped_and_continued(ptq4dit, *images, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("device")
def test_a_fit_on_questions_with_its_encoder_stops_and_goes_on(tmp_path: Path) -> None:
    teacher = write_tiny_vlm(tmp_path / "teacher", "llava")
    made = partial(
        asked.method, teacher, veo=VisualEncoderTuning(), rounding="signround",
        partition_by="entropy", audited=1, steps=4, image_weight="mbq",
    )  # fmt: skip
    with pytest.raises(Interruption):
        asked.fit(tmp_path / "run", made(), Stop("on_train_batch_end", 24), every=2)
    checkpoint = str(written(tmp_path / "run")[0])
    asked.fit(tmp_path / "run", made(), ckpt_path=checkpoint)
    assert (tmp_path / "run" / "summary.json").is_file()
