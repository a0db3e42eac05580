"""torchao for diffusers: every kind of tensor reloaded, every misfit refused."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional

from recon.engine.native import read_native
from recon.errors import ExportError
from recon.export import exporting
from recon.export.exporting import export
from recon.export.finished import Finished
from recon.export.format import Written
from recon.export.layer import channel_scale, codes, static_range
from recon.export.public import plain_linear
from recon.export.torchao import TorchAo, _tensor
from recon.quantizers.spec import QuantSpec
from tests.export.conftest import Made
from tests.export.finished_run import ASYMMETRIC8, STATIC8, TOKEN8, Recipe, bits, token
from tests.export.test_export import leftovers, report

pytest.importorskip("torchao")
pytestmark = pytest.mark.usefixtures("shared_loader")

EVERY_INPUT = ("attention_input", "attention_output", "feed_forward_up", "feed_forward_down")
TENSORS = {
    "W4": Recipe(),
    "W3 in groups": Recipe(weight=bits(3, 16)),
    "W8 of one step size": Recipe(weight=QuantSpec(num_bits=8, strategy="tensor")),
    "W4 scaled": Recipe(scaled=EVERY_INPUT),
    "W8A8": Recipe(weight=bits(8), activation=TOKEN8),
    "W4A8 scaled": Recipe(activation=TOKEN8, scaled=EVERY_INPUT),
    "W4A8 but for modulation": Recipe(activation=TOKEN8, plain_roles=("modulation",)),
    "W4A8 fixed": Recipe(activation=STATIC8),
    "W4A8 fixed, with zero-points, scaled": Recipe(activation=ASYMMETRIC8, scaled=EVERY_INPUT),
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("family", ["dit", "cogvideox"])
def test_what_is_written_comes_back(family: str, name: str, run_of: Made, tmp_path: Path) -> None:
    content = report(export(run_of(family, TENSORS[name]), "torchao", tmp_path / "out"))
    found = content["reload"]["difference"]
    assert found["file"]["largest"] == 0.0
    integer = TENSORS[name].activation is not None
    if not integer and not TENSORS[name].scaled:
        assert found["run"]["largest"] == 0.0
    elif not integer:
        assert found["run"]["relative"] < 1e-6
    else:
        # Codes at ties: less than another rounding of the activations would do.
        assert found["run"]["relative"] < content["reload"]["activation_noise"]
    kinds = {name.rpartition(" ")[2] for name in content["reload"]["layer_classes"]}
    plain = {"W4 scaled": {"Int8Tensor", "IntxUnpackedToInt8Tensor"}}  # modulation has no scale
    weights = plain.get(name, {"IntxUnpackedToInt8Tensor"})
    assert kinds == ({"Int8Tensor"} if integer else weights)
    assert all(("int8 matrix products" in line) == integer for line in content["runs_as"])


MISFITS = {
    "clipped": (Recipe(activation=TOKEN8, clip_logit=4.0), r"share of their range \(0\.982"),
    "rotated": (Recipe(activation=TOKEN8, rotated=True), "by a learned rotation"),
    "A4": (Recipe(activation=token(4)), "its input to 4 bits; integer products take 8"),
    "groups": (Recipe(weight=bits(4, 16), activation=TOKEN8), "a step size for each 16 inputs"),
    "qmax": (
        Recipe(activation=QuantSpec(num_bits=8, strategy="token", dynamic=True)),
        "scale_denominator half_range",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_it_cannot_hold_is_refused_with_what_can(
    name: str, run_of: Made, tmp_path: Path
) -> None:
    recipe, reason = MISFITS[name]
    with pytest.raises(ExportError, match=reason) as refused:
        export(run_of("dit", recipe), "torchao", tmp_path / "out")
    assert str(refused.value).endswith("hold it: native, bf16 (weights only).")
    assert "9 more layers do alike" not in str(refused.value)
    assert leftovers(tmp_path) == []


def test_learned_integers_are_what_the_file_holds(run_of: Made, tmp_path: Path) -> None:
    root = run_of("dit", Recipe(activation=STATIC8))
    export(root, "torchao", tmp_path / "out")
    (file,) = (tmp_path / "out" / "transformer").glob("*.safetensors")
    held = load_file(file)
    for name, layer in read_native(root).layers().items():
        assert torch.equal(held[f"{name}._weight_qdata"], codes(layer))
        fixed = static_range(layer)
        assert fixed is not None
        step = held[f"{name}._weight_act_quant_scale"]
        assert step.item() == fixed.step.item()
        # As many axes as the layer's input: adaLN sees [batch, channels], the others tokens too.
        assert step.ndim == (2 if name.endswith("norm1.linear") else 3)


def test_a_layer_computes_what_ours_does_with_the_quotient_taken_by_the_reciprocal(
    run_of: Made,
) -> None:
    recipe = Recipe(activation=TOKEN8, scaled=("attention_input",))
    layer = Finished.open(run_of("dit", recipe)).layers["transformer_blocks.0.attn1.to_q"]
    tokens = torch.randn(2, 64, layer.in_features, generator=torch.Generator().manual_seed(0))
    scale = channel_scale(layer)
    assert scale is not None
    hidden = tokens * scale
    step = hidden.abs().amax(-1, keepdim=True) / 127.5
    on_grid = (hidden * (1 / step)).round().clamp(-128, 127) * step
    found = plain_linear(_tensor(layer, 3), None)(tokens)
    expected = functional.linear(on_grid, layer.quantized_weight())
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_step_sizes_that_are_not_the_runs_are_refused_and_removed(
    run_of: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(TorchAo):
        def write(self, finished: Finished, folder: Path) -> Written:
            written = super().write(finished, folder)
            (file,) = written.folder.glob("*.safetensors")
            with safe_open(file, "pt") as opened:
                header = opened.metadata()
            tensors = load_file(file)
            for name, tensor in tensors.items():
                if name.endswith("_weight_scale"):
                    tensor.mul_(1.01)
            save_file(tensors, file, header)
            return written

    monkeypatch.setitem(exporting.FORMATS, "torchao", Broken())
    with pytest.raises(ExportError, match=r"other numbers than the run's: weight of transf"):
        export(run_of("dit", TENSORS["W8A8"]), "torchao", tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_without_the_library_it_says_what_to_install(
    run_of: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recon.export.format.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"needs torchao, accelerate.*recon-ptq\[export\]"):
        export(run_of("dit", Recipe()), "torchao", tmp_path / "out")
