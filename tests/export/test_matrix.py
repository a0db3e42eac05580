"""Embedded teachers x formats x bits: each cell is loaded by others, or refused as documented."""

from pathlib import Path

import pytest

from recon.errors import ExportError
from recon.export import exporting
from recon.export.exporting import export
from tests.export.conftest import Made
from tests.export.finished_run import Recipe, bits, token
from tests.export.test_export import leftovers, report

pytest.importorskip("torchao")
pytest.importorskip("compressed_tensors")
pytest.importorskip("auto_round")
pytestmark = [
    pytest.mark.usefixtures("shared_loader"),
    pytest.mark.slow,  # whole pipelines are written, loaded and run, a hundred times
]

WEIGHTS = {
    "W8": Recipe(weight=bits(8)),
    "W4": Recipe(),
    "W4 in groups": Recipe(weight=bits(4, 32)),
    "W3": Recipe(weight=bits(3)),
}
INTEGER = {
    "W8A8": Recipe(weight=bits(8), activation=token(8)),
    "W4A8": Recipe(activation=token(8)),
}
FEWER = {"W4A6": Recipe(activation=token(6)), "W4A4": Recipe(activation=token(4))}
TRANSFORMED = {
    # What S²Q-VDiT leaves: learned rotations, scales and shares of a token's range.
    "W4A4 rotated": Recipe(
        activation=token(4), scaled=("attention_input",), rotated=True, clip_logit=4.0
    ),
    # What Q-VLM leaves: shares of a token's range.
    "W4A4 clipped": Recipe(activation=token(4), clip_logit=4.0),
}
RECIPES = {**WEIGHTS, **INTEGER, **FEWER, **TRANSFORMED}
HOLDS = {
    ("diffusers", "native"): RECIPES,
    ("diffusers", "bf16"): RECIPES,
    ("diffusers", "torchao"): {**WEIGHTS, **INTEGER},
    ("diffusers", "auto-round"): WEIGHTS,
    ("diffusers", "compressed-tensors"): {},
    ("transformers", "native"): RECIPES,
    ("transformers", "bf16"): RECIPES,
    ("transformers", "torchao"): {},
    ("transformers", "auto-round"): {},
    ("transformers", "compressed-tensors"): {**WEIGHTS, **INTEGER, **FEWER},
}
"""What each format holds of a library's networks: the README's table, cell by cell."""
EXACT = ("native", "compressed-tensors")
"""Formats that compute what `recon.load` does, bit for bit."""
LARGEST = 0.3
"""Of bfloat16's bytes, at four bits and no more."""


def test_every_format_is_in_the_matrix() -> None:
    assert {form for _, form in HOLDS} == set(exporting.FORMATS)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("form", exporting.FORMATS)
@pytest.mark.parametrize("teacher", ["video", "image", "vlm"])
def test_a_cell_is_loaded_or_refused(
    teacher: str, form: str, name: str, run_of: Made, tmp_path: Path
) -> None:
    root = run_of(teacher, RECIPES[name])
    library = "transformers" if teacher == "vlm" else "diffusers"
    if name not in HOLDS[library, form]:
        with pytest.raises(ExportError, match="hold it: native, "):
            export(root, form, tmp_path / "out")
        assert leftovers(tmp_path) == []
        return
    content = report(export(root, form, tmp_path / "out"))
    found = content["reload"]["difference"]["run"]
    if form in EXACT:
        assert found["largest"] == 0.0
    else:
        assert found["relative"] < max(1e-2, content["reload"]["activation_noise"])
    if name == "W4" and form in ("native", "auto-round", "compressed-tensors"):
        assert content["bytes"]["ratio"] < LARGEST
