"""auto-round's layout for diffusers: codes come back, scales are folded away, or it is refused."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from recon.errors import ExportError
from recon.export import exporting
from recon.export.auto_round import AutoRound
from recon.export.exporting import export
from recon.export.finished import Finished
from recon.export.format import Written
from recon.quantizers.spec import QuantSpec
from tests.export.conftest import Made
from tests.export.finished_run import FAMILIES, Recipe, bits, finished_run
from tests.export.test_export import leftovers, report

pytest.importorskip("auto_round")
# Importing auto-round takes many seconds.
pytestmark = [pytest.mark.usefixtures("shared_loader"), pytest.mark.slow]

FOLDABLE = ("attention_input", "attention_output", "feed_forward_up")
LAYOUTS = {
    "W4": Recipe(),
    "W4 in groups": Recipe(weight=bits(4, 32)),
    "W2 in groups": Recipe(weight=bits(2, 16)),
    "W3": Recipe(weight=bits(3)),
    "W5": Recipe(weight=bits(5)),
    "W8 of one step size": Recipe(weight=QuantSpec(num_bits=8, strategy="tensor")),
    "W4 but for modulation": Recipe(plain_roles=("modulation",)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_dit_comes_back(name: str, run_of: Made, tmp_path: Path) -> None:
    content = report(export(run_of("dit", LAYOUTS[name]), "auto-round", tmp_path / "out"))
    assert content["reload"]["difference"]["file"]["relative"] < 1e-3
    assert content["reload"]["difference"]["run"]["relative"] < 2e-3
    assert content["reload"]["dtype"] == "float16"


@pytest.mark.parametrize("name", ["W4", "W4 but for modulation"])
def test_channel_scales_of_dit_are_folded_away(name: str, run_of: Made, tmp_path: Path) -> None:
    recipe = Recipe(scaled=FOLDABLE, plain_roles=LAYOUTS[name].plain_roles)
    root = run_of("dit", recipe)
    content = report(export(root, "auto-round", tmp_path / "out"))
    assert content["reload"]["difference"]["run"]["relative"] < 5e-3
    (file,) = (tmp_path / "out" / "transformer").glob("*.safetensors")
    assert not any("norm1.norm." in name or "norm3." in name for name in load_file(file))


def test_a_bfloat16_teacher_comes_back_in_bfloat16(tmp_path: Path) -> None:
    family = FAMILIES["dit"]
    teacher = family.write(tmp_path / "teacher")
    (file,) = (teacher / "transformer").glob("*.safetensors")
    halved = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(halved, file, {"format": "pt"})
    root = finished_run(tmp_path / "run", teacher, family, Recipe(scaled=FOLDABLE))
    content = report(export(root, "auto-round"))
    assert content["reload"]["dtype"] == content["load_dtype"] == "bfloat16"


def test_step_sizes_that_are_not_the_runs_are_refused_and_removed(
    run_of: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(AutoRound):
        def write(self, finished: Finished, folder: Path) -> Written:
            written = super().write(finished, folder)
            (file,) = written.folder.glob("*.safetensors")
            tensors = load_file(file)
            for name, tensor in tensors.items():
                if name.endswith("scales"):
                    tensor.mul_(1.01)
            save_file(tensors, file, {"format": "pt"})
            return written

    monkeypatch.setitem(exporting.FORMATS, "auto-round", Broken())
    with pytest.raises(ExportError, match=r"the run's: weight of transf.* and 10 more"):
        export(run_of("dit", Recipe()), "auto-round", tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_configuration_and_bytes(run_of: Made, tmp_path: Path) -> None:
    root = run_of("cogvideox", Recipe(plain_roles=("modulation",)))
    content = report(export(root, "auto-round", tmp_path / "out"))
    file = tmp_path / "out" / "transformer" / "config.json"
    config = json.loads(file.read_text())["quantization_config"]
    assert (config["bits"], config["group_size"]) == (4, -1)
    assert config["block_name_to_quantize"] == "transformer_blocks"
    assert "transformer_blocks.0.norm1.linear" in config["extra_config"]
    assert "transformer_blocks.0.attn1.to_q" not in config["extra_config"]
    # Rows of 32 to 128 weights: a step size and a zero-point weigh much there.
    assert content["bytes"]["ratio"] < 0.30
