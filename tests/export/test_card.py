"""The lines that an export's card prints, run as they stand there: a stock pipeline samples."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recon.export.exporting import export
from recon.zoo.video_teacher import sampling_arguments
from tests.export.conftest import Made
from tests.export.finished_run import FAMILIES, TOKEN8, Recipe, finished_run

pytest.importorskip("torchao")
pytest.importorskip("auto_round")
pytestmark = [
    pytest.mark.usefixtures("shared_loader"),
    pytest.mark.slow,  # whole pipelines are written, loaded and sampled
]

RECIPES = {"torchao": Recipe(activation=TOKEN8), "auto-round": Recipe(), "bf16": Recipe()}
CALLS: dict[str, dict[str, Any]] = {
    "DiTPipeline": {"class_labels": [1, 2]},
    "CogVideoXPipeline": {"prompt": "a red circle moving left", **sampling_arguments()},
}


def loaded(folder: Path) -> Any:
    """What the lines of the card make."""
    (lines,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    named: dict[str, Any] = {}
    exec(lines.replace("FOLDER", str(folder)), named)
    return named["pipeline"]


def assert_samples(pipeline: Any) -> None:
    pipeline.set_progress_bar_config(disable=True)
    call = CALLS[type(pipeline).__name__]
    found = pipeline(**{**call, "num_inference_steps": 2, "output_type": "np"})
    (made,) = (found[name] for name in ("images", "frames") if name in found)
    assert np.isfinite(np.asarray(made)).all()


@pytest.mark.parametrize("form", RECIPES)
@pytest.mark.parametrize("teacher", ["video", "image"])
def test_an_embedded_teacher_samples_as_its_card_says(
    teacher: str, form: str, run_of: Made, tmp_path: Path
) -> None:
    assert_samples(loaded(export(run_of(teacher, RECIPES[form]), form, tmp_path / "out")))


@pytest.mark.parametrize("form", RECIPES)
def test_a_tiny_dit_samples_as_its_card_says(form: str, tmp_path: Path) -> None:
    family = FAMILIES["dit"]
    # The pipeline takes class 1000 for the null class, whatever the network has.
    teacher = family.write(tmp_path / "teacher", pipeline=True, classes=1000)
    root = finished_run(tmp_path / "run", teacher, family, RECIPES[form])
    assert_samples(loaded(export(root, form)))
