"""Native and bf16, and what every format shares: refusals, folders, the reload check."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from recon.engine.native import read_native
from recon.errors import CalibrationError, CheckpointMismatch, ExportError
from recon.export import exporting, reload
from recon.export.bf16 import Bf16
from recon.export.exporting import export
from recon.export.finished import Finished
from recon.export.format import Written
from recon.export.layer import merged_weight, weights_only
from recon.export.native import NativeFormat
from recon.quantizers.spec import QuantSpec
from tests.export.conftest import Made
from tests.export.finished_run import (
    ASYMMETRIC8,
    FAMILIES,
    TOKEN8,
    Recipe,
    bits,
    finished_run,
)

pytestmark = pytest.mark.usefixtures("shared_loader")

EVERYTHING = Recipe(
    activation=TOKEN8, scaled=("attention_input", "feed_forward_down"), rotated=True, clip_logit=4.0
)

START, WRITE = reload.start, Bf16.write


def report(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "export.json").read_text())
    return content


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize(
    "recipe",
    [EVERYTHING, Recipe(weight=bits(3, 16), activation=ASYMMETRIC8, scaled=("attention_output",))],
    ids=["rotated, clipped", "static"],
)
def test_merging_gives_the_weight_that_the_layer_without_quantiser_applies(
    recipe: Recipe, run_of: Made
) -> None:
    for layer in Finished.open(run_of("dit", recipe)).layers.values():
        merged = merged_weight(layer).float()
        weights_only(layer)
        assert torch.allclose(layer(torch.eye(layer.in_features)).T, merged, atol=1e-5)


@pytest.mark.parametrize("family", ["dit", "cogvideox"])
def test_native_and_bf16_hold_every_transform(family: str, run_of: Made, tmp_path: Path) -> None:
    root = run_of(family, EVERYTHING)
    native = report(export(root, "native", tmp_path / "native"))
    assert native["reload"]["difference"]["run"]["largest"] == 0.0
    assert native["reload"]["quantized_layers"] == len(read_native(root).manifest["layers"])
    plain = report(export(root, "bf16", tmp_path / "bf16"))
    assert plain["reload"]["difference"]["file"]["largest"] == 0.0
    assert 0 < plain["reload"]["difference"]["run"]["relative"] < 1e-2
    assert plain["bytes"]["ratio"] == 1
    assert "activations are not quantised" in plain["notes"][0]
    names = leftovers(tmp_path / "bf16")
    assert names == ["README.md", "export.json", "model_index.json", "transformer", "verify"]


def test_quantised_attention_is_held_by_native_alone_and_by_weights(
    run_of: Made, tmp_path: Path
) -> None:
    root = run_of("dit", Recipe(activation=TOKEN8, quantize_attention=True))
    native = report(export(root, "native", tmp_path / "native"))
    assert native["reload"]["difference"]["run"]["largest"] == 0.0
    plain = report(export(root, "bf16", tmp_path / "bf16"))
    assert plain["reload"]["difference"]["run"]["relative"] < 1e-2
    with pytest.raises(ExportError, match=r"products of 2 attentions are quantised") as refused:
        export(root, "torchao", tmp_path / "torchao")
    assert "hold it: native, bf16 (weights only)" in str(refused.value)
    unquantised = run_of("dit", Recipe(activation=TOKEN8))
    ways = [report(export(r, "native", tmp_path / n)) for n, r in (("a", root), ("b", unquantised))]
    noises = [way["reload"]["activation_noise"] for way in ways]
    assert noises[0] > noises[1]  # the products count as activations


def test_stem_and_head_are_held_by_native_and_as_plain_weights(
    run_of: Made, tmp_path: Path
) -> None:
    root = run_of("dit", Recipe(activation=TOKEN8, stem_and_head=bits(8)))
    native = report(export(root, "native", tmp_path / "native"))
    assert native["reload"]["difference"]["run"]["largest"] == 0.0
    assert native["reload"]["quantized_layers"] == 2 * 7 + 5
    assert native["bits"] == {"weight": [4, 8], "activation": [8]}
    plain = report(export(root, "bf16", tmp_path / "bf16"))
    assert plain["reload"]["difference"]["file"]["largest"] == 0.0
    assert plain["reload"]["difference"]["run"]["relative"] < 1e-2
    assert plain["bytes"]["ratio"] == 1
    for name in ("torchao", "auto-round"):
        reason = r"pos_embed\.proj is a quantised convolution and 2 linears are equal to one"
        with pytest.raises(ExportError, match=reason) as refused:
            export(root, name, tmp_path / name)
        assert "hold it: native, bf16 (weights only)" in str(refused.value)


def test_zero_points_of_weights_are_held_by_native_and_as_plain_weights(
    run_of: Made, tmp_path: Path
) -> None:
    root = run_of("dit", Recipe(weight=QuantSpec(num_bits=4, symmetric=False)))
    native = report(export(root, "native", tmp_path / "native"))
    assert native["reload"]["difference"]["run"]["largest"] == 0.0
    plain = report(export(root, "bf16", tmp_path / "bf16"))
    assert 0 < plain["reload"]["difference"]["run"]["relative"] < 1e-2
    for name in ("torchao", "auto-round"):
        with pytest.raises(ExportError, match="has a zero-point for each row") as refused:
            export(root, name, tmp_path / name)
        assert "hold it: native, bf16 (weights only)" in str(refused.value)


def test_a_run_that_shares_its_calibration_set_is_checked_on_it(
    own_run: Path, tmp_path: Path
) -> None:
    shutil.move(own_run / "calibration", tmp_path / "shared")
    settings = {"data": {"init_args": {"folder": str(tmp_path / "shared")}}}
    (own_run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert report(export(own_run, "bf16"))["reload"]["calls"] == 2


def _scaled(folder: Path) -> None:
    """Multiplies a stored weight that stands for no quantised one by 1.01."""
    (file,) = folder.rglob("diffusion_pytorch_model.safetensors")
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name == "proj_out_2.weight":
            tensor.mul_(1.01)
    save_file(tensors, file, {"format": "pt"})


def test_a_file_that_is_not_what_was_written_is_refused_and_removed(
    run_of: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Bf16):
        def write(self, finished: Finished, folder: Path) -> Written:
            written = super().write(finished, folder)
            _scaled(folder)
            return written

    monkeypatch.setitem(exporting.FORMATS, "bf16", Broken())
    with pytest.raises(ExportError, match=r"differ from what was written by .* 0\.00e\+00 is"):
        export(run_of("dit", Recipe()), "bf16", tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_weights_that_are_not_the_runs_are_refused_and_removed(
    run_of: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("bf16", "layer"):
        monkeypatch.setattr(
            f"recon.export.{module}.merged_weight", lambda layer: merged_weight(layer) * 1.03
        )
    with pytest.raises(ExportError, match=r"differ from recon\.load by"):
        export(run_of("dit", Recipe()), "bf16", tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_a_layer_left_in_full_precision_is_refused_and_removed(
    run_of: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(NativeFormat):
        def write(self, finished: Finished, folder: Path) -> Written:
            written = super().write(finished, folder)
            manifest = json.loads((folder / "manifest.json").read_text())
            name, facts = manifest["layers"].popitem()
            network = load_file(folder / "network.safetensors")
            network[f"{name}.weight"] = torch.zeros(facts["out_features"], facts["in_features"])
            save_file(network, folder / "network.safetensors")
            manifest["files"] = {"config.json": manifest["files"]["config.json"]}
            (folder / "manifest.json").write_text(json.dumps(manifest))
            return written

    monkeypatch.setitem(exporting.FORMATS, "native", Broken())
    with pytest.raises(ExportError, match=r"loaded with 13 quantised layers, and 14 were written"):
        export(run_of("dit", Recipe()), "native", tmp_path / "out")
    assert leftovers(tmp_path) == []


def _unreadable(form: Bf16, finished: Finished, folder: Path) -> Written:
    written = WRITE(form, finished, folder)
    (folder / "transformer" / "config.json").write_text("{")
    return written


def test_what_does_not_load_is_refused_with_what_the_loader_said(
    run_of: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bf16, "write", _unreadable)
    with pytest.raises(ExportError, match=r"diffusers cannot load and run it(.|\n)*config\.json"):
        export(run_of("dit", Recipe()), "bf16", tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_a_folder_is_never_overwritten_without_force(run_of: Made, tmp_path: Path) -> None:
    root, out = run_of("dit", Recipe()), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    for force in (False, True):
        with pytest.raises(ExportError, match=r"out exists and is n"):
            export(root, "native", out, force=force)
    assert leftovers(out) == ["mine.txt"]
    (out / "mine.txt").unlink()
    export(root, "native", out)
    (out / "stale").touch()
    with pytest.raises(ExportError, match="--force to replace it"):
        export(root, "native", out)
    assert "stale" in leftovers(out)
    export(root, "native", out, force=True)
    assert "stale" not in leftovers(out)
    assert leftovers(tmp_path) == ["out"]


@pytest.fixture
def own_run(run_of: Made, tmp_path: Path) -> Path:
    """A run that a test may change."""
    return shutil.copytree(run_of("dit", Recipe()), tmp_path / "run")


def test_a_run_that_did_not_finish(own_run: Path) -> None:
    (own_run / "summary.json").unlink()
    with pytest.raises(CheckpointMismatch, match="the run was stopped while it wrote"):
        export(own_run, "native")
    shutil.rmtree(own_run / "quantized")
    with pytest.raises(CheckpointMismatch, match="holds no finished result"):
        export(own_run, "native")
    assert not (own_run / "exports").exists()


def test_parts_of_another_run(own_run: Path, run_of: Made, tmp_path: Path) -> None:
    other = run_of("cogvideox", Recipe())
    shutil.rmtree(own_run / "calibration")
    with pytest.raises(CalibrationError, match="is not a folder"):
        export(own_run, "native")
    shutil.copytree(other / "calibration", own_run / "calibration")
    details = json.loads((own_run / "calibration" / "calibration.json").read_text())
    details["fingerprint"]["seed"] = 7
    (own_run / "calibration" / "calibration.json").write_text(json.dumps(details))
    with pytest.raises(CheckpointMismatch, match=r"made with calibration (.|\n)*different runs"):
        export(own_run, "native")
    assert not (own_run / "exports").exists()


def test_a_teacher_that_was_changed_since(own_run: Path, tmp_path: Path) -> None:
    summary = json.loads((own_run / "summary.json").read_text())
    teacher = shutil.copytree(summary["teacher"], tmp_path / "teacher")
    file = teacher / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).add_(1)
    save_file(tensors, file)
    (own_run / "summary.json").write_text(json.dumps({"teacher": str(teacher)}))
    with pytest.raises(CheckpointMismatch, match=r"made with teacher\.weights"):
        export(own_run, "bf16")


def test_a_teacher_that_is_gone_leaves_the_network_alone(own_run: Path) -> None:
    (own_run / "summary.json").write_text(json.dumps({"teacher": str(own_run / "nowhere")}))
    content = report(export(own_run, "bf16"))
    assert not content["whole_pipeline"]
    assert any("nowhere is not there" in note for note in content["notes"])
    assert "transformer" in (own_run / "exports" / "bf16" / "README.md").read_text()


def test_every_byte_of_the_folder_is_counted(own_run: Path) -> None:
    for form in ("native", "bf16"):
        out = export(own_run, form)
        files = [file for file in out.rglob("*") if file.is_file()]
        assert report(out)["bytes"]["folder"] == sum(file.stat().st_size for file in files)
    assert {"README.md", "export.json"} <= {file.name for file in files}


def test_an_unknown_format(own_run: Path) -> None:
    with pytest.raises(ExportError, match="'gguf', which is none of native, "):
        export(own_run, "gguf")


def test_a_disk_without_room_is_refused_before_anything_is_written(
    own_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(own_run)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ExportError, match=r"needs about [\d,]+ bytes and .* has 1,000 free"):
        export(own_run, "bf16")
    assert not (own_run / "exports").exists()


def test_a_disk_that_fills_up_leaves_nothing(
    own_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Finished, "copy_parts", full)
    with pytest.raises(ExportError, match=r"The disk of .* is full"):
        export(own_run, "bf16")
    assert leftovers(own_run / "exports") == []


def test_a_network_that_the_public_class_would_change_is_native_only(
    run_of: Made, tmp_path: Path
) -> None:
    root = run_of("dit", Recipe(adapter={"downscale_freq_shift": 0}))
    with pytest.raises(ExportError, match=r"downscale_freq_shift is 0(.|\n)*hold it: native\."):
        export(root, "bf16", tmp_path / "out")
    export(root, "native", tmp_path / "native")


def test_an_epsilon_of_ones_own_is_written_to_the_configuration(
    run_of: Made, tmp_path: Path
) -> None:
    root = run_of("dit", Recipe(adapter={"norm3_eps": 1e-2}))
    export(root, "bf16", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert config["norm_eps"] == 1e-2


@pytest.mark.slow  # two processes that import torch and diffusers
def test_each_export_is_loaded_by_a_process_of_its_own(
    run_of: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reload, "start", START)
    root = run_of("dit", Recipe())
    content = report(export(root, "bf16", tmp_path / "out"))
    assert content["reload"]["difference"]["file"]["largest"] == 0.0
    monkeypatch.setattr(Bf16, "write", _unreadable)
    with pytest.raises(ExportError, match=r"diffusers cannot load and run it(.|\n)*config\.json"):
        export(root, "bf16", tmp_path / "other")


def test_nothing_of_the_export_imports_the_optional_libraries() -> None:
    import subprocess
    import sys

    code = (
        "import sys, recon.export.exporting, recon.cli.export; "
        "print({'torchao', 'compressed_tensors', 'auto_round'} & set(sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "set()"


def test_a_plain_linear_is_not_taken_for_a_quantised_one() -> None:
    from recon.export.fresh import is_quantized

    assert not is_quantized(nn.Linear(2, 2))


@pytest.mark.slow  # samples two pictures
def test_the_stock_pipeline_samples_from_an_export(tmp_path: Path) -> None:
    from diffusers import DiTPipeline

    family = FAMILIES["dit"]
    # The pipeline takes class 1000 for the null class, whatever the network has.
    teacher = family.write(tmp_path / "teacher", pipeline=True, classes=1000)
    root = finished_run(tmp_path / "run", teacher, family, Recipe())
    out = export(root, "bf16")
    assert (
        'DiTPipeline.from_pretrained("FOLDER", torch_dtype=torch.bfloat16)'
        in (out / "README.md").read_text()
    )
    pipeline = DiTPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(class_labels=[1, 2], num_inference_steps=2).images
    assert [picture.size for picture in pictures] == [(16, 16), (16, 16)]
