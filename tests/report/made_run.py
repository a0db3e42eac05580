"""A run folder with everything that a report can show, made by hand in a second."""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from recon.callbacks.samples import LABELS, side_by_side, write_picture, write_video
from tests.export.finished_run import FAMILIES, TOKEN8, Recipe, finished_run

SCRIPT = "<script>document.title = 'taken'</script> & a <b>red</b> circle"
"""A prompt that would be markup."""
COMMAND = "recon fit --config configs/ptq4dit.yaml --data.prompts 'my <b>prompts</b>.txt'"
PROMPTS = (SCRIPT, "a blue ring")
SEEDS = (11, 12)
STEPS = 6
LOSSES = (0.9, 0.4, 0.2)
"""At the logged steps of every unit."""


def made_run(root: Path, family: str = "dit") -> Path:
    """A finished, tested and exported run."""
    teacher = FAMILIES[family].write(root.with_name(f"{root.name}-teacher"))
    recipe = Recipe(activation=TOKEN8, rotated=True, scaled=("attention_input",), clip_logit=4.0)
    finished_run(root, teacher, FAMILIES[family], recipe)
    manifest = change(root / "quantized" / "manifest.json", **_history(root))
    errors = [unit["error_after"] for unit in manifest["unit_errors"]]
    change(root / "calibration" / "calibration.json", **_scores())
    write(root / "summary.json", _summary(len(errors)))
    write(root / "test.json", _evaluation())
    write(root / "test_steps.json", _step_errors())
    (root / "config.yaml").write_text("# lightning.pytorch==2.6.6\nmodel:\n  note: <b>\n")
    (root / "command.txt").write_text(f"{COMMAND}\n")
    _write_metrics(root / "metrics.csv", manifest["unit_errors"])
    _write_samples(root / "samples")
    (root / "exports" / "native").mkdir(parents=True)
    write(root / "exports" / "native" / "export.json", _export())
    write(root / "bench.json", _speed())
    write(root / "plan.json", _plan())
    return root


def copied(root: Path, to: Path) -> Path:
    """The same run in another folder, to be changed."""
    return Path(shutil.copytree(root, to))


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def change(path: Path, **entries: Any) -> dict[str, Any]:
    """Sets entries of a json file, and returns all of them."""
    content: dict[str, Any] = {**json.loads(path.read_text(encoding="utf-8")), **entries}
    write(path, content)
    return content


def _history(root: Path) -> dict[str, Any]:
    manifest = json.loads((root / "quantized" / "manifest.json").read_text())
    numbered = (re.match(r"\D+\d+", name) for name in manifest["layers"])
    blocks = list(dict.fromkeys(found[0] for found in numbered if found))
    return {
        "method": "PTQ4DiT",
        "layers": {
            name: {**facts, "error_before": 0.01 + 0.001 * n, "error_after": 0.004 * (n + 1)}
            for n, (name, facts) in enumerate(manifest["layers"].items())
        },
        "units": {block: [block] for block in blocks},
        "unit_errors": [
            {
                "error_before": 0.0123456 * (n + 1),
                "error_after": 0.00345678 * (n + 1),
                "rounding_accepted": 1.0,
                "step": 30 * (n + 1),
                "seconds": 1.5 + n,
            }
            for n in range(len(blocks))
        ],
    }


def _scores() -> dict[str, Any]:
    scores = [
        {
            "prompt": prompt,
            "step": step,
            "C_diff": 0.01 * (step + 1) + 0.001 * prompt,
            "C_quant": 100.0 - step,
            "chosen": 1 if (prompt, step) == (1, 5) else None,
        }
        for prompt in range(len(PROMPTS))
        for step in range(STEPS)
    ]
    return {
        "scores": scores,
        "prompts": {"calibration": list(PROMPTS), "held_out": ["another"]},
        "samples": {"calibration": 1, "held_out": 2},
        "histogram": {str(step): int(step == 5) for step in range(STEPS)},
        "rank_correlation": -0.8765,
    }


def _summary(units: int) -> dict[str, Any]:
    return {
        "method": "PTQ4DiT",
        "teacher": "teacher",
        "bits": {"weight": 4, "activation": 8},
        "units": units,
        "blocks": units,
        "block_forwards_per_sample": 2.0 * units,
        "seconds": {"calibration": 0.25, "reconstruction": 2.75, "total": 3.25},
        "peak_memory_bytes": {"host": 637521920, "device": 0},
        "size_bytes": {"full_precision": 4718592, "quantized": 1269760},
        "error": {"round_to_nearest": 0.01410085647, "reconstructed": 0.00198812716},
    }


def _evaluation() -> dict[str, Any]:
    rows = [
        {
            "prompt": prompt,
            "seed": seed,
            "paired": {"psnr": 38.25 + n, "ssim": 0.98},
            "paired_round_to_nearest": {"psnr": 31.5 + n, "ssim": 0.95},
        }
        for n, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True))
    ]
    return {
        "full_precision": {"all": 0.9791666, "count": 2},
        "round_to_nearest": {"all": 0.9479166, "count": 2},
        "quantized": {"all": 0.9583333, "count": 2},
        "paired": {"psnr": 38.75, "ssim": 0.98, "count": 2, "psnr_interval": [38.25, 39.25],
                   "lpips": None},
        "paired_round_to_nearest": {"psnr": 32.0, "ssim": 0.95, "count": 2,
                                    "psnr_interval": [31.5, 32.5], "lpips": None},
        "settings": {"steps": STEPS, "definitions": {"psnr": "dB over all pixels"}},
        "samples": rows,
    }  # fmt: skip


def _step_errors() -> dict[str, Any]:
    errors = [
        {"timestep": 999.0 - 150 * n, "round_to_nearest": 0.0234 * (n + 1), "quantized": 0.00567}
        for n in range(STEPS)
    ]
    return {"prompts": list(PROMPTS), "seeds": list(SEEDS), "steps": STEPS, "errors": errors}


def _export() -> dict[str, Any]:
    return {
        "format": "native",
        "library": "recon",
        "bytes": {"folder": 4318934, "quantized_linears": 1269760, "ratio": 0.26909722},
        "reload": {
            "difference": {"run": {"largest": 0.02, "relative": 0.00466853, "tolerance": 0.0106646}}
        },
        "runs_as": ["recon.load: simulation on any hardware, no gain in speed"],
        "notes": [],
    }


def _speed() -> dict[str, Any]:
    networks = [
        {
            "network": name,
            "dtype": dtype,
            "disk_bytes": 4318934 + number,
            "peak_bytes": 637521920 + number,
            "seconds": {"step, eager": 0.0625 + number, "sample, eager": 1.5 + number},
        }
        for number, (name, dtype) in enumerate(
            [("full precision", "float32"), ("torchao", "float32")]
        )
    ]
    return {
        "device": "AVX2 CPU",
        "integer_dot_products": False,
        "threads": 2,
        "torch": "2.13.0",
        "sampling_steps": STEPS,
        "runs": 5,
        "networks": networks,
        "times_faster": {"float32": {"step, eager": 0.0588235, "sample, eager": 0.6}},
    }


def _plan() -> dict[str, Any]:
    return {
        "memory": {"host": 693899264, "device": 0},
        "disk": {"artefacts": {"calibration": 1145030, "quantized": 4269711}},
        "disk_peak": 9876543,
        "seconds": {"calibration": 0.75, "reconstruction": 2.5},
        "why_untimed": "",
        "exports": [
            {"format": "native", "bytes": 4319511, "obstacles": []},
            {"format": "torchao", "bytes": 0, "obstacles": ["rotations", "6-bit inputs"]},
        ],
        "refusals": [],
    }


def _write_metrics(path: Path, history: list[dict[str, float]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "recon/loss", "unit/index", "unit/error_before",
                         "unit/error_after", "unit/rounding_accepted", "unit/seconds"])  # fmt: skip
        for index, unit in enumerate(history):
            for logged, loss in enumerate(LOSSES):
                writer.writerow([30 * index + 10 * logged + 9, loss / (index + 1)] + [""] * 5)
            writer.writerow([unit["step"], "", index, unit["error_before"], unit["error_after"],
                             unit["rounding_accepted"], unit["seconds"]])  # fmt: skip


def _write_samples(folder: Path) -> None:
    """A picture and a film, named as the callback that keeps samples names them."""
    frames = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    labels = list(LABELS.values())
    slug = "script-document-title-taken-script-a-b-red-b-circle"
    write_picture(folder / f"test_{slug}_11.png", side_by_side([frames[0]] * 3, labels))
    write_video(folder / "test_a-blue-ring_12.gif", side_by_side([frames] * 3, labels))
