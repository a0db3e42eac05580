"""Two gloo processes through the command line: the bytes of one at the same global batch."""

import json
from pathlib import Path

import pytest

from tests.cli.command import codes, finished, fit_arguments, with_calibration

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

BATCH = ("--model.batch_size", "2")
METHODS = {"s2q_vdit": ("--model.epochs", "4"), "adaround": ("--model.steps", "8")}
UNAVERAGED = """
import sys
from recon.calibration import ranks
from recon.engine import gradient
from recon.cli import main

class Alone:
    total = staticmethod(lambda tensor: tensor.mul_(ranks.world()))  # each keeps its own gradient

gradient.ranks = Alone
main(sys.argv[1:])
"""


def run(root: Path, arguments: list[str]) -> Path:
    status = finished(arguments, root.parent / "log")
    assert status == 0, (root.parent / "log").read_text()[-3000:]
    return root


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_leave_the_bytes_of_one(method: str, pipeline: Path, tmp_path: Path) -> None:
    roots = []
    for count in ("1", "2"):
        root = tmp_path / count / "run"
        more = (*METHODS[method], *BATCH, "--trainer.devices", count)
        run(root, fit_arguments(root, pipeline, *more, config=method))
        roots.append(root)
    one, two = roots
    assert codes(one) == codes(two)
    # The selection too: every score and the reason of every choice.
    chosen = [json.loads((r / "calibration" / "calibration.json").read_text()) for r in roots]
    assert chosen[0]["scores"] == chosen[1]["scores"]
    # state.json holds an identifier that `datasets` draws anew for every folder.
    samples = [{k: v for k, v in c["files"].items() if k.endswith(".arrow")} for c in chosen]
    assert samples[0] == samples[1] != {}
    summaries = [json.loads((r / "summary.json").read_text()) for r in roots]
    assert summaries[0]["error"] == pytest.approx(summaries[1]["error"], rel=1e-12)
    assert summaries[1]["block_forwards_per_sample"] == 6


def test_without_averaging_the_result_is_another(
    pipeline: Path, finished_run: Path, tmp_path: Path
) -> None:
    """The control: the comparison above can fail."""
    script = tmp_path / "unaveraged.py"
    script.write_text(UNAVERAGED)
    import os
    import subprocess
    import sys

    one = with_calibration(tmp_path / "one" / "run", finished_run)
    run(one, fit_arguments(one, pipeline, *METHODS["s2q_vdit"], *BATCH))
    two = with_calibration(tmp_path / "two" / "run", finished_run)
    more = (*METHODS["s2q_vdit"], *BATCH, "--trainer.devices", "2")
    with (tmp_path / "log").open("wb") as log:
        subprocess.run(
            [sys.executable, str(script), *fit_arguments(two, pipeline, *more)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, check=True,
            timeout=240, cwd=tmp_path,
        )  # fmt: skip
    assert codes(one) != codes(two)
