"""What every method keeps: a fit leaves a run folder that loads anywhere, with what it says."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file, save_file
from torch import Tensor

import recon
from recon.engine import Reconstruction
from recon.engine.fingerprint import NEUTRAL, settings
from recon.engine.foresight import closed_layers, opened_layers
from recon.engine.result import linear_bytes
from recon.engine.sampling import network
from recon.errors import CheckpointMismatch
from recon.layers.quant_linear import QuantLinear
from recon.methods.adaround import AdaRound
from recon.methods.gptq import GPTQ
from recon.methods.ptq4dit import PTQ4DiT
from recon.methods.q_vlm import QVLM
from recon.methods.rtn import RoundToNearest
from recon.methods.s2q_vdit import S2QVDiT
from recon.methods.smoothquant import SmoothQuant
from recon.models.cogvideox import CogVideoX
from recon.quantizers.packing import unpack
from recon.quantizers.spec import QuantSpec
from tests.engine.tiny_run import HELD_OUT, SAMPLES, fit
from tests.models.tiny import tiny_sample

CPU = torch.device("cpu")
METHODS: dict[type[Reconstruction], dict[str, Any]] = {
    S2QVDiT: {"epochs": 1},
    RoundToNearest: {},
    SmoothQuant: {},
    GPTQ: {},
    AdaRound: {"steps": 4, "lr": 0.05},
    PTQ4DiT: {"steps": 4, "lr": 0.05},
    QVLM: {"steps": 4, "shrinks": (1.0, 0.8), "partition_by": "layerwise", "audited": 0},
}
SUMMARY = {
    "method": None,
    "teacher": None,
    "bits": {"weight", "activation"},
    "units": None,
    "blocks": None,
    "block_forwards_per_sample": None,
    "seconds": {"calibration", "reconstruction", "total"},
    "peak_memory_bytes": {"host", "device"},
    "size_bytes": {"full_precision", "quantized"},
    "error": {"round_to_nearest", "reconstructed"},
}
LOAD = """
import sys
import torch
from safetensors.torch import load_file, save_file
import recon
torch.set_num_threads(1)
sample = load_file(sys.argv[1])
outputs = {}
for run in sys.argv[3:]:
    with torch.no_grad():
        (outputs[run],) = recon.load(run)(**sample, return_dict=False)
save_file(outputs, sys.argv[2])
"""


@dataclass(frozen=True)
class Run:
    root: Path
    module: Reconstruction
    output: Tensor
    """Of the network that the run evaluates, for `sample`."""


@pytest.fixture(scope="module")
def sample(teacher: Path) -> dict[str, Tensor]:
    return tiny_sample(CogVideoX(str(teacher)).empty_network().config, seed=77, timestep=321)


@pytest.fixture(scope="module")
def runs(
    teacher: Path, samples: Path, sample: dict[str, Tensor], tmp_path_factory: Any
) -> dict[type[Reconstruction], Run]:
    made = {}
    for kind, arguments in METHODS.items():
        root = tmp_path_factory.mktemp(kind.__name__)
        module = kind(adapter=CogVideoX(str(teacher)), threads=1, compile=False, **arguments)
        fit(root, module, samples)
        with torch.no_grad():
            (output,) = network(module, "quantized", CPU)(**sample, return_dict=False)
        made[kind] = Run(root, module, output)
    return made


@pytest.fixture(scope="module")
def loaded(
    runs: dict[type[Reconstruction], Run], sample: dict[str, Tensor], tmp_path_factory: Any
) -> dict[str, Tensor]:
    """Outputs of every run, copied away from its calibration, in one fresh process."""
    folder = tmp_path_factory.mktemp("elsewhere")
    save_file(sample, folder / "sample.safetensors")
    for kind, run in runs.items():
        (run.root / "quantized").rename(folder / kind.__name__)
        (run.root / "quantized").symlink_to(folder / kind.__name__)
    arguments = ["sample.safetensors", "outputs.safetensors", *(kind.__name__ for kind in runs)]
    command = [sys.executable, "-c", LOAD, *arguments]
    subprocess.run(command, cwd=folder, check=True, timeout=120)
    return load_file(folder / "outputs.safetensors")


methods = pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)


@methods
def test_the_summary_has_the_keys_of_the_issue_and_no_others(
    kind: type[Reconstruction], runs: dict[type[Reconstruction], Run], teacher: Path
) -> None:
    run = runs[kind]
    content = json.loads((run.root / "summary.json").read_text())
    assert list(content) == list(SUMMARY)
    for key, inner in SUMMARY.items():
        if inner is not None:
            assert set(content[key]) == inner
    assert content["method"] == kind.__name__
    assert content["teacher"] == str(teacher)
    assert content["bits"] == {"weight": 4, "activation": 6}
    assert (content["units"], content["blocks"]) == (3, 3)
    # GPTQ behind the quantised prefix looks at each of the four calibration samples once more.
    again = 3 * SAMPLES / (SAMPLES + HELD_OUT) if kind is GPTQ else 0
    assert content["block_forwards_per_sample"] == 6 + again
    assert content["error"] == run.module.final_error
    assert content["seconds"]["total"] >= content["seconds"]["reconstruction"] > 0
    assert content["peak_memory_bytes"]["host"] > 10**8


@methods
def test_a_fresh_process_loads_the_network_that_was_evaluated_bit_for_bit(
    kind: type[Reconstruction], runs: dict[type[Reconstruction], Run], loaded: dict[str, Tensor]
) -> None:
    assert torch.equal(loaded[kind.__name__], runs[kind].output)


@methods
def test_a_row_has_no_more_values_than_the_grid(
    kind: type[Reconstruction], runs: dict[type[Reconstruction], Run]
) -> None:
    layers = runs[kind].module.quantizers.values()
    assert len(list(layers)) == 3 * 8
    for layer in layers:
        assert isinstance(layer, QuantLinear)
        assert layer.codes is not None
        codes = unpack(layer.codes, 4, layer.in_features)
        assert (int(codes.min()), int(codes.max())) >= (-8, -8)
        for row in layer.quantized_weight()[:4]:
            assert row.unique().numel() <= 2**4


@methods
def test_the_reported_error_is_that_of_the_evaluated_network(
    kind: type[Reconstruction], runs: dict[type[Reconstruction], Run], samples: Path, teacher: Path
) -> None:
    module = runs[kind].module
    held_out = runs[kind].module.trainer.datamodule.calibration_set.held_out  # type: ignore[attr-defined]
    whole = {form: network(module, form, CPU) for form in ("full_precision", "quantized")}
    wrong = power = 0.0
    for index in range(HELD_OUT):
        with torch.no_grad():
            outputs = {k: n(**held_out[index], return_dict=False)[0] for k, n in whole.items()}
        target = outputs["full_precision"].double()
        wrong += float((outputs["quantized"].double() - target).square().sum())
        power += float(target.square().sum())
    assert module.final_error["reconstructed"] == pytest.approx(wrong / power, rel=1e-3)


def test_round_to_nearest_is_its_own_yardstick(runs: dict[type[Reconstruction], Run]) -> None:
    error = runs[RoundToNearest].module.final_error
    assert error["reconstructed"] == error["round_to_nearest"] > 0
    others = {run.module.final_error["round_to_nearest"] for run in runs.values()}
    assert others == {error["round_to_nearest"]}  # one yardstick for all methods


def test_s2q_vdit_is_ahead_of_round_to_nearest(runs: dict[type[Reconstruction], Run]) -> None:
    error = runs[S2QVDiT].module.final_error
    assert error["reconstructed"] < 0.6 * error["round_to_nearest"]


@methods
def test_every_argument_is_kept_under_its_own_name(
    kind: type[Reconstruction], teacher: Path
) -> None:
    import inspect

    module = kind(adapter=CogVideoX(str(teacher)), **METHODS[kind])
    names = {
        name
        for owner in kind.__mro__
        if owner.__module__.startswith("recon.") and "__init__" in vars(owner)
        for name, parameter in inspect.signature(owner).parameters.items()
        if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    found = {key.split(".")[0] for key in settings(module)}
    assert found == names - NEUTRAL
    json.dumps(settings(module))  # plain values only


@methods
def test_two_runs_leave_the_same_bytes(
    kind: type[Reconstruction], runs: dict[type[Reconstruction], Run], teacher: Path,
    samples: Path, tmp_path: Path,
) -> None:  # fmt: skip
    module = kind(adapter=CogVideoX(str(teacher)), threads=1, compile=False, **METHODS[kind])
    fit(tmp_path, module, samples)
    for name in ("quantized.safetensors", "network.safetensors", "config.json"):
        assert (tmp_path / "quantized" / name).read_bytes() == (
            runs[kind].root / "quantized" / name
        ).read_bytes()


# The folder `quantized/`


@pytest.fixture
def copied(runs: dict[type[Reconstruction], Run], tmp_path: Path) -> Path:
    import shutil

    source = (runs[S2QVDiT].root / "quantized").resolve()
    shutil.copytree(source, tmp_path / "run" / "quantized")
    return tmp_path / "run"


def spoil_nothing(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def spoil_codes(folder: Path) -> None:
    path = folder / "quantized.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def spoil_version(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 3', '"format_version": 99'))


def spoil_adapter(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace("recon.models.cogvideox.CogVideoX", "json.dumps"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_nothing, r"manifest\.json is missing: .* is no finished result"),
        (spoil_codes, r"quantized\.safetensors is missing or differs"),
        (spoil_version, "has format_version 99, this recon reads 3"),
        (spoil_adapter, "names the adapter json.dumps, which is no ModelAdapter"),
    ],
)
def test_a_damaged_result_is_refused(
    copied: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(copied / "quantized")
    with pytest.raises(CheckpointMismatch, match=message):
        recon.load(copied)


def test_four_bit_codes_take_four_bits(copied: Path) -> None:
    saved = load_file(copied / "quantized" / "quantized.safetensors")
    manifest = json.loads((copied / "quantized" / "manifest.json").read_text())
    for name, facts in manifest["layers"].items():
        codes = saved[f"{name}.codes"]
        assert codes.nbytes * 2 == facts["out_features"] * facts["in_features"]
    shared = {facts["transform"] for facts in manifest["layers"].values()}
    stored = {key.removesuffix(".transform.left") for key in saved if key.endswith(".left")}
    assert shared == stored
    assert len(stored) == 3 * 6  # one per distinct input
    assert QuantSpec(**manifest["weight"]).num_bits == 4


# Planning


@methods
def test_the_foreseen_layers_are_those_that_a_fit_leaves(
    kind: type[Reconstruction], runs: dict[type[Reconstruction], Run], teacher: Path
) -> None:
    module = kind(adapter=CogVideoX(str(teacher)), threads=1, compile=False, **METHODS[kind])
    foreseen = closed_layers(module, module.foreseen_units())
    left = {name.replace("/", "."): part for name, part in runs[kind].module.quantizers.items()}
    assert list(foreseen) == list(left)
    for name, layer in left.items():
        expected = {key: (t.shape, t.dtype) for key, t in layer.state_dict().items()}
        assert {k: (t.shape, t.dtype) for k, t in foreseen[name].state_dict().items()} == expected
    assert linear_bytes(foreseen.values()) == linear_bytes(left.values())


@methods
def test_what_learns_is_foreseen(
    kind: type[Reconstruction], teacher: Path, samples: Path, tmp_path: Path
) -> None:
    module = kind(adapter=CogVideoX(str(teacher)), threads=1, compile=False, **METHODS[kind])
    expected = {
        name: {key: p.shape for key, p in layer.named_parameters()}
        for name, layer in opened_layers(module, module.foreseen_units()[0]).items()
    }
    seen: dict[str, dict[str, Any]] = {}

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if pl_module.index == 0:
                for name, layer in pl_module.opened.layers.items():
                    seen[name] = {key: p.shape for key, p in layer.named_parameters()}

    fit(tmp_path, module, samples, Look())
    assert seen == expected
    assert any(parts for parts in seen.values()) == (
        kind not in (RoundToNearest, SmoothQuant, GPTQ)
    )
