"""compressed-tensors for transformers: bit for bit what `recon.load` computes, or refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from recon.errors import ExportError
from recon.export import compressed_tensors, exporting
from recon.export.compressed_tensors import CompressedTensors, quantization_config
from recon.export.exporting import export
from recon.export.finished import Finished
from recon.export.format import Written
from recon.quantizers.spec import QuantSpec
from tests.export.conftest import Made
from tests.export.finished_run import ASYMMETRIC8, STATIC8, TOKEN8, Recipe, bits, token
from tests.export.test_export import leftovers, report

library = pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.usefixtures("shared_loader")

EXACT = {
    "W4": Recipe(),
    "W4 in groups": Recipe(weight=bits(4, 16)),
    "W3 in groups": Recipe(weight=bits(3, 16)),
    "W8 of one step size": Recipe(weight=QuantSpec(num_bits=8, strategy="tensor")),
    "W8A8": Recipe(weight=bits(8), activation=TOKEN8),
    "W4A8 in groups": Recipe(weight=bits(4, 16), activation=TOKEN8),
    "W4A6": Recipe(activation=token(6)),
    "W4A4": Recipe(activation=token(4)),
    "W4A4 but for the output": Recipe(activation=token(4), plain_roles=("attention_output",)),
    "W4A8 fixed": Recipe(activation=STATIC8),
}


@pytest.mark.parametrize("name", EXACT)
def test_llava_comes_back_bit_for_bit(name: str, run_of: Made, tmp_path: Path) -> None:
    recipe = EXACT[name]
    root = run_of("llava", recipe)
    content = report(export(root, "compressed-tensors", tmp_path / "out"))
    assert content["reload"]["difference"]["run"]["largest"] == 0.0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    whole = recipe.weight.num_bits == 8 and recipe.activation is not None
    assert config["format"] == ("int-quantized" if whole else "pack-quantized")
    assert config["ignore"][:2] == ["re:.*vision_tower.*", "re:.*multi_modal_projector.*"]
    simulated = recipe.activation is not None and not whole
    assert ("simulation (threads" in content["runs_as"][0]) == simulated


@pytest.mark.parametrize("name", ["W4 in groups", "W4A4"])
def test_qwen2_vl_comes_back_bit_for_bit(name: str, run_of: Made, tmp_path: Path) -> None:
    root = run_of("qwen2_vl", EXACT[name])
    content = report(export(root, "compressed-tensors", tmp_path / "out"))
    assert content["reload"]["difference"]["run"]["largest"] == 0.0


def test_zero_points_come_back_up_to_ties(run_of: Made, tmp_path: Path) -> None:
    root = run_of("llava", Recipe(activation=ASYMMETRIC8))
    found = report(export(root, "compressed-tensors", tmp_path / "out"))["reload"]
    assert found["difference"]["run"]["relative"] < 0.1 * found["activation_noise"]


@pytest.mark.parametrize("family", ["llava"])
def test_native_and_bf16_of_a_vision_language_model(
    family: str, run_of: Made, tmp_path: Path
) -> None:
    root = run_of(family, Recipe(activation=token(4), rotated=True, clip_logit=4.0))
    native = report(export(root, "native", tmp_path / "native"))
    assert native["reload"]["difference"]["run"]["largest"] == 0.0
    plain = report(export(root, "bf16", tmp_path / "bf16"))
    assert plain["reload"]["difference"]["file"]["largest"] == 0.0
    assert (
        "LlavaForConditionalGeneration.from_pretrained"
        in (tmp_path / "bf16" / "README.md").read_text()
    )


MISFITS = {
    "clipped": (Recipe(activation=TOKEN8, clip_logit=4.0), "share of their range"),
    "rotated": (Recipe(rotated=True), "by a learned rotation"),
    "scaled": (Recipe(scaled=("attention_input",)), "each channel of its input by a factor"),
    "qmax": (
        Recipe(activation=QuantSpec(num_bits=4, strategy="token", dynamic=True)),
        r"divides a token's range by 7 .* where loaders divide by 7\.5",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_it_cannot_hold_is_refused_with_what_can(
    name: str, run_of: Made, tmp_path: Path
) -> None:
    recipe, reason = MISFITS[name]
    with pytest.raises(ExportError, match=reason) as refused:
        export(run_of("llava", recipe), "compressed-tensors", tmp_path / "out")
    assert str(refused.value).endswith("hold it: native, bf16 (weights only).")
    assert leftovers(tmp_path) == []


def test_diffusers_does_not_load_it(run_of: Made, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="DiTTransformer2DModel is a class of diffusers"):
        export(run_of("dit", Recipe()), "compressed-tensors", tmp_path / "out")


def test_step_sizes_that_are_not_the_runs_are_refused_and_removed(
    run_of: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(CompressedTensors):
        def write(self, finished: Finished, folder: Path) -> Written:
            written = super().write(finished, folder)
            tensors = load_file(folder / "model.safetensors")
            for name, tensor in tensors.items():
                if name.endswith("weight_scale"):
                    tensor.mul_(1.01)
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            return written

    monkeypatch.setitem(exporting.FORMATS, "compressed-tensors", Broken())
    with pytest.raises(ExportError, match="other numbers than the run's: weight of"):
        export(run_of("llava", Recipe()), "compressed-tensors", tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_a_layer_left_in_full_precision_is_refused_and_removed(
    run_of: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_less(schemes: dict[str, object], linears: tuple[str, ...]) -> dict[str, object]:
        config = quantization_config(schemes, linears)  # type: ignore[arg-type]
        config["ignore"].append(next(iter(schemes)))
        return config

    monkeypatch.setattr(compressed_tensors, "quantization_config", one_less)
    with pytest.raises(ExportError, match=r"with 13 quantised layers, and 14 were written"):
        export(run_of("llava", Recipe()), "compressed-tensors", tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_the_library_reads_the_configuration_and_agrees_on_every_packed_weight(
    run_of: Made, tmp_path: Path
) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization import QuantizationConfig

    from recon.export.layer import codes

    root = run_of("llava", Recipe(weight=bits(3, 16)))
    export(root, "compressed-tensors", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = QuantizationConfig(**config).config_groups.values()
    assert (group.weights.num_bits, group.weights.group_size) == (3, 16)
    held = load_file(tmp_path / "out" / "model.safetensors")
    for name, layer in Finished.open(root).layers.items():
        suffix = re.sub(r".*layers\.", "layers.", name)
        (key,) = (k for k in held if k.endswith(f"{suffix}.weight_packed"))
        shape = torch.Size(held[key.replace("_packed", "_shape")].tolist())
        assert torch.equal(unpack_from_int32(held[key], 3, shape), codes(layer))


def test_layers_of_different_bits_get_a_group_each() -> None:
    schemes = {
        "m.a": compressed_tensors._Scheme(bits(4), None),
        "m.b": compressed_tensors._Scheme(bits(8), TOKEN8),
    }
    config = quantization_config(schemes, ["m.a", "m.b", "head"])
    assert config["format"] == "mixed-precision"
    assert [g["targets"] for g in config["config_groups"].values()] == [["m.a"], ["m.b"]]
    assert [g["format"] for g in config["config_groups"].values()] == [
        "pack-quantized",
        "int-quantized",
    ]
    assert config["ignore"] == ["head"]
