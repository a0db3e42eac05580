"""What `recon table` runs on each of the embedded teachers, and which numbers it prints."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Method = tuple[tuple[str, ...], tuple[str, ...]]
"""Configurations under `configs`, the later ones over the earlier, and extra arguments."""

NO_SDS = ("--data.sds.metric", "random")
NO_STD = ("--model.std.lambda_min", "1.0")
NO_BALANCE = ("--model.balance", "none")
NO_RECONSTRUCTION = ("--model.reconstruct", "false")
ON_IMAGES = "models/image_teacher"
ON_QUESTIONS = "models/vlm_teacher"
AS_LONG_AS_PTQ4DIT = ("--model.steps", "300", "--model.lr", "4e-2")
AS_LONG_AS_Q_VLM = ("--model.steps", "200", "--model.lr", "4e-2")
EPOCHS_AS_LONG_AS_Q_VLM = ("--model.epochs", "25")
"""Steps of Q-VLM: 64 samples in batches of 8."""
NO_SEARCH = ("--model.shrinks", "[1.0]")
NO_ROUNDING = ("--model.rounding", "none")
LAYERWISE = ("--model.partition_by", "layerwise")
FULL_RANGE = ("--model.percentiles", "[1.0]")
QUANTIZED_VISION = ("--model.quantize_vision", "true")
NO_VEO = ("--model.veo.enabled", "false")
TUNED_VISION = (*QUANTIZED_VISION, "--model.veo.enabled", "true")
FEATURES_ALONE = (
    *("--model.veo.params", "[act_ranges,rounding]", "--model.veo.answer_weight", "0"),
    *("--model.veo.entropy_weight", "0", "--model.veo.output_share", "0"),
    *("--model.veo.epochs", "25", "--model.veo.patience", "25"),
)

Results = Mapping[str, Any]
"""The content of a run's `test.json`."""


@dataclass(frozen=True)
class Column:
    """A number that a test gives of every network."""

    title: str
    form: str
    """How it is written."""
    of: Callable[[Results, str], float]
    """Of a test and a network: `full_precision`, `round_to_nearest` or `quantized`."""


def _paired(name: str, of_itself: float) -> Callable[[Results, str], float]:
    """A number of a network beside full precision, which has `of_itself` beside itself."""
    pairs = {"quantized": "paired", "round_to_nearest": "paired_round_to_nearest"}
    return lambda test, model: float(test[pairs[model]][name]) if model in pairs else of_itself


def _own(name: str) -> Callable[[Results, str], float]:
    """A number that each network has by itself."""
    return lambda test, model: float(test[model][name])


OF_SAMPLES = (
    Column("paired PSNR, dB", "{:.2f}", _paired("psnr", float("inf"))),
    Column("SSIM", "{:.4f}", _paired("ssim", 1.0)),
    Column("oracle, all right", "{:.3f}", _own("all")),
)
OF_ANSWERS = (
    Column("KL to full precision, nats", "{:.4f}", _paired("kl", 0.0)),
    Column("same answer", "{:.3f}", _paired("same_answer", 1.0)),
    Column("right answer", "{:.3f}", _own("accuracy")),
)


@dataclass(frozen=True)
class Teacher:
    """What the table runs on one of the embedded teachers, and where it keeps it."""

    methods: dict[str, Method]
    """Of each row. Round-to-nearest is measured beside every row."""
    selection: str
    """How configurations choose their calibration samples; a name for sets that are shared."""
    bits: tuple[str, ...]
    """Weight and activation bits where none are given."""
    folder: Path
    """Run folders where none is given."""
    columns: tuple[Column, ...] = OF_SAMPLES


TEACHERS: dict[str, Teacher] = {
    "video": Teacher(
        {
            "smoothquant": (("smoothquant",), ()),
            "gptq": (("gptq",), ()),
            "adaround": (("adaround",), ()),
            "s2q_vdit": (("s2q_vdit",), ()),
            "s2q_base": (("s2q_vdit",), (*NO_SDS, *NO_STD)),
            "s2q_sds": (("s2q_vdit",), NO_STD),
            "s2q_std": (("s2q_vdit",), NO_SDS),
        },
        selection="salient",
        bits=("4:6", "4:4"),
        folder=Path("runs/table"),
    ),
    "image": Teacher(
        {
            "smoothquant": (("smoothquant", ON_IMAGES), ()),
            "gptq": (("gptq", ON_IMAGES), ()),
            "adaround": (("adaround", ON_IMAGES), AS_LONG_AS_PTQ4DIT),
            "ptq4dit": (("ptq4dit",), ()),
            "ptq4dit_faithful": (("ptq4dit_faithful",), ()),
            "ptq4dit_reconstruction": (("ptq4dit",), NO_BALANCE),
            "ptq4dit_from_weight": (("ptq4dit",), ("--model.rounding_start", "weight")),
            "ptq4dit_balancing": (("ptq4dit",), NO_RECONSTRUCTION),
            "ptq4dit_neither": (("ptq4dit",), (*NO_BALANCE, *NO_RECONSTRUCTION)),
            "ptq4dit_mean": (("ptq4dit",), ("--model.salience", "mean")),
            "ptq4dit_max": (("ptq4dit",), ("--model.salience", "max")),
            "ptq4dit_midpoint": (("ptq4dit",), ("--model.salience", "midpoint")),
        },
        selection="stratified",
        bits=("8:8", "4:8", "4:4"),
        folder=Path("runs/table_image"),
    ),
    "vlm": Teacher(
        {
            "smoothquant": (("smoothquant", ON_QUESTIONS), ()),
            "gptq": (("gptq", ON_QUESTIONS), ()),
            "adaround": (("adaround", ON_QUESTIONS), AS_LONG_AS_Q_VLM),
            "signround": (("q_vlm",), (*LAYERWISE, *NO_SEARCH)),
            "s2q_base": (("s2q_vdit", ON_QUESTIONS), (*NO_STD, *EPOCHS_AS_LONG_AS_Q_VLM)),
            "q_vlm": (("q_vlm",), ()),
            "q_vlm_dp": (("q_vlm",), ("--model.partition_by", "dp")),
            "q_vlm_fixed": (("q_vlm",), ("--model.partition_by", "fixed")),
            "q_vlm_quant_error": (("q_vlm",), ("--model.proxy", "quant_error")),
            "q_vlm_ded": (("q_vlm",), ("--model.proxy", "ded")),
            "q_vlm_layerwise": (("q_vlm",), LAYERWISE),
            "q_vlm_rounding": (("q_vlm",), NO_SEARCH),
            "q_vlm_search": (("q_vlm",), NO_ROUNDING),
            "q_vlm_search_fixed": (("q_vlm",), (*NO_ROUNDING, "--model.partition_by", "fixed")),
            "q_vlm_search_layerwise": (("q_vlm",), (*NO_ROUNDING, *LAYERWISE)),
            "q_vlm_neither": (("q_vlm",), (*NO_ROUNDING, *NO_SEARCH)),
            "q_vlm_gptq": (("q_vlm",), ("--model.rounding", "gptq")),
            "q_vlm_mbq": (("q_vlm",), ("--model.image_weight", "mbq")),
            "q_vlm_vision": (("q_vlm",), QUANTIZED_VISION),
            "q_vlm_veo": (("q_vlm",), TUNED_VISION),
            "q_vlm_vision_rounding": (("q_vlm",), (*TUNED_VISION, *FEATURES_ALONE)),
            "q_vlm_paper": (("q_vlm_paper",), ()),
            "q_vlm_paper_cdm": (("q_vlm_paper",), NO_VEO),
            "q_vlm_paper_layerwise": (("q_vlm_paper",), (*NO_VEO, *LAYERWISE)),
            "q_vlm_paper_neither": (("q_vlm_paper",), (*NO_VEO, *LAYERWISE, *FULL_RANGE)),
        },
        selection="given",
        bits=("4:16", "4:8", "4:4"),
        folder=Path("runs/table_vlm"),
        columns=OF_ANSWERS,
    ),
}
