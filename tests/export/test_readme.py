"""The lines of README.md that load a result, run as they stand there."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recon.cli import main
from tests.cli.command import REPOSITORY
from tests.export.conftest import Made
from tests.export.finished_run import TOKEN8, W4, Recipe

LINES = [
    block
    for block in re.findall(
        r"^```python\n(.*?)^```$",
        (REPOSITORY / "README.md").read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    if "from_pretrained" in block
]
RUNS = {
    "s2q_vdit": ("video", Recipe(weight=W4, activation=TOKEN8, rotated=True), None),
    "ptq4dit": ("image", Recipe(weight=W4, activation=TOKEN8), "torchao"),
    "q_vlm_w4a16": ("vlm", Recipe(weight=W4, activation=None), "compressed-tensors"),
}
"""A run of the kind the page speaks of, by its name there, and the format it is exported in."""


@pytest.mark.slow  # it exports, and loads through two libraries
@pytest.mark.usefixtures("shared_loader")
def test_results_load_as_the_page_says(
    run_of: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "recon").symlink_to(REPOSITORY / "recon")
    monkeypatch.chdir(tmp_path)
    for name, (family, recipe, form) in RUNS.items():
        shutil.copytree(run_of(family, recipe), tmp_path / "runs" / name)
        if form is not None:
            main(["export", "--run", f"runs/{name}", "--format", form])
    assert len(LINES) == 2
    named: dict[str, object] = {}
    for block in LINES:
        exec(block, named)
    found = {name: type(named[name]).__name__ for name in ("pipeline", "images", "answers")}
    assert found == {
        "pipeline": "CogVideoXPipeline",
        "images": "DiTPipeline",
        "answers": "LlavaForConditionalGeneration",
    }
    images: Any = named["images"]
    pictures = images(class_labels=[1, 2], num_inference_steps=2, output_type="np").images
    assert np.isfinite(pictures).all()
