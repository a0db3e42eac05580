"""Pictures of the attention that tokens receive: which numbers, and that no kill loses one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recon.calibration.artefact import CalibrationSet
from recon.calibration.attention import AttentionColumnSums
from recon.callbacks.checkpoints import StepCheckpoint
from recon.callbacks.salience import FILE, TokenSalience
from recon.engine.checkpoints import written
from recon.methods.rtn import RoundToNearest
from recon.methods.s2q_vdit import S2QVDiT, SparseTokenDistillation
from recon.models.cogvideox import CogVideoX
from tests.engine.test_resume import Stop
from tests.engine.tiny_run import Interruption, fit, write_samples
from tests.models.tiny import write_tiny_cogvideox


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_cogvideox(tmp_path_factory.mktemp("teacher"), layers=2)


@pytest.fixture(scope="module")
def samples(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_samples(tmp_path_factory.mktemp("data") / "calibration", teacher)


def method(teacher: Path, **changed: Any) -> S2QVDiT:
    return S2QVDiT(adapter=CogVideoX(str(teacher)), epochs=1, threads=1, compile=False, **changed)


@pytest.fixture(scope="module")
def whole(teacher: Path, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    fit(root, method(teacher), samples, TokenSalience())
    return root


@torch.no_grad()
def test_a_picture_is_the_mean_share_of_attention_by_frame_row_and_column(
    whole: Path, teacher: Path, samples: Path
) -> None:
    pictures = load_file(whole / FILE)
    assert set(pictures) == {"unit=000", "unit=001"}
    adapter, chosen = CogVideoX(str(teacher)), CalibrationSet.load(samples).samples
    block, expected = adapter.block(adapter.block_names[0], "cpu"), []
    for index in range(len(chosen)):
        state = adapter.embed(chosen[index], "cpu")
        text, video = (state[k].shape[1] for k in ("encoder_hidden_states", "hidden_states"))
        with AttentionColumnSums(text + video) as attention:
            adapter.forward_block(block, state)
        shares = attention.sums()
        expected.append((shares / shares.mean(1, keepdim=True))[:, text:].mean(0))
    _, frames, _, height, width = chosen[0]["hidden_states"].shape
    picture = torch.stack(expected).mean(0).reshape(frames, height // 2, width // 2)
    torch.testing.assert_close(pictures["unit=000"], picture)
    assert picture.std() > 0


def test_a_run_that_was_stopped_and_continued_has_the_same_pictures(
    whole: Path, teacher: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / FILE).write_bytes(b"of another attempt")
    with monkeypatch.context() as killed:
        killed.setattr(StepCheckpoint, "on_exception", lambda *arguments: None)
        stop = Stop("on_train_batch_start", 6)  # inside the second unit
        with pytest.raises(Interruption):
            fit(tmp_path, method(teacher), samples, stop, TokenSalience(), every=3)
    assert set(load_file(tmp_path / FILE)) == {"unit=000"}
    checkpoint = str(written(tmp_path)[0])
    fit(tmp_path, method(teacher), samples, TokenSalience(), ckpt_path=checkpoint)
    assert (tmp_path / FILE).read_bytes() == (whole / FILE).read_bytes()


def test_a_method_that_records_no_attention_leaves_no_picture(
    teacher: Path, samples: Path, tmp_path: Path
) -> None:
    equal = method(teacher, std=SparseTokenDistillation(lambda_min=1.0))
    nearest = RoundToNearest(adapter=CogVideoX(str(teacher)), threads=1, compile=False)
    for name, module in (("equal", equal), ("nearest", nearest)):
        fit(tmp_path / name, module, samples, TokenSalience())
        assert (tmp_path / name / "summary.json").exists()
        assert not (tmp_path / name / FILE).exists()
