"""What an evaluation found out: means by model and by pair, their meaning, and the table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from recon.atomic import write_json
from recon.callbacks.quality import bootstrap_interval

Row = dict[str, Any]

MODELS = ("full_precision", "round_to_nearest", "quantized")
PARTS = (*MODELS, "paired", "paired_round_to_nearest")
"""Keys of a row and of a result: a model's own numbers, or those of a pair with full precision."""
DEFINITIONS = {
    "psnr": "dB over all pixels of a sample, data range 1, capped at 100; mean over samples",
    "psnr_interval": "95 % percentile bootstrap of the mean over samples",
    "ssim": "structural similarity per frame, data range 1; mean over frames, then samples",
    "lpips": "LPIPS (AlexNet) per frame; mean over frames, then samples",
    "temporal_consistency": "1 - |dQ - dF| / (|dQ| + |dF|), L1 norms of frame-to-frame changes",
    "temporal_difference": "mean |dQ - dF| over pixels and frames (the L1 form of dtSSD)",
    "frame_similarity": "mean cosine similarity of consecutive frames, each less its mean",
    "fid": "Fréchet distance of features to the reference's; the fewer pictures, the larger: only "
    "equal counts and extractors compare",
    "kid": "kernel distance of features to the reference's (squared MMD, unbiased, below 0 where "
    "classes are balanced and equal); mean of subsets",
    "kid_std": "standard deviation of kid over the subsets",
    "precision": "share of pictures among the reference's nearest neighbours, equal counts",
    "recall": "share of the reference among the pictures' nearest neighbours, equal counts",
}


def report(
    trainer: Trainer,
    module: LightningModule,
    verb: str,
    result: dict[str, Any],
    rows: Sequence[Row],
    settings: Mapping[str, Any],
    definitions: Mapping[str, str],
    *,
    show: bool,
) -> None:
    """Logs the means and writes them with the rows to `<run folder>/<verb>.json`.

    Args:
        trainer: Its data module says what the numbers depend on.
        module: Logs; its class is the method.
        verb: `test` or `validate`.
        result: Means by model and by pair.
        rows: Of all ranks, in order.
        settings: Further ones.
        definitions: What each number means; those of the result are written.
        show: Print the table.
    """
    source = getattr(trainer, "datamodule", None)
    given: dict[str, Any] = getattr(source, "evaluation_settings", dict)()
    content = {
        **result,
        "settings": {
            **given,
            "method": type(module).__name__,
            **settings,
            "definitions": _definitions(result, definitions),
        },
        "samples": rows,
    }
    module.log_dict(
        {f"{verb}/{name}": value for name, value in scalars(result).items()},
        rank_zero_only=False,
        sync_dist=False,  # every rank holds all rows
    )
    if trainer.is_global_zero:
        root = Path(trainer.default_root_dir)
        root.mkdir(parents=True, exist_ok=True)
        write_json(root / f"{verb}.json", content)
        if show:
            show_table(content, verb)


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Means over the rows, by model and by pair; an oracle's answers become accuracies.

    Rows that lack a number (prompts an oracle cannot judge) do not count for it.
    """
    result: dict[str, Any] = {}
    for part in PARTS:
        found = [row[part] for row in rows if part in row]
        if not found:
            continue
        names = dict.fromkeys(name for numbers in found for name in numbers)
        result[part] = {name: _mean([n[name] for n in found if name in n]) for name in names}
        result[part]["count"] = len(found)
        if "psnr" in names:
            result[part]["psnr_interval"] = bootstrap_interval([n["psnr"] for n in found])
            result[part].setdefault("lpips", None)
    return result


def show_table(result: Mapping[str, Any], title: str) -> None:
    """The result as a table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    models = [name for name in MODELS if name in result]
    table = Table(title=f"{title}: {result['full_precision']['count']} samples")
    table.add_column("")
    for name in models:
        table.add_column(name.replace("_", " "), justify="right")
    columns = [{**result[name], **result.get(pair(name), {})} for name in models]
    names = dict.fromkeys(name for column in columns for name in column)
    for name in names:
        if name != "count" and not name.endswith("_interval"):
            table.add_row(name, *(_cell(name, column) for column in columns))
    console = Console()
    console.print(table)
    for line in _notes(result["settings"].get("distribution", {})):
        console.print(line, highlight=False)


def _notes(distribution: str | Mapping[str, Any]) -> list[str]:
    """Why numbers of the comparison with reference pictures are missing, a line each."""
    if isinstance(distribution, str):
        return [f"FID, KID, precision, recall: {distribution}."]
    reasons: Mapping[str, str] = distribution.get("left_out", {})
    return [f"{name}: not computed from {reason}." for name, reason in reasons.items()]


def _cell(name: str, column: Mapping[str, Any]) -> str:
    if name not in column:
        return "–"
    if column[name] is None:
        return "not available"
    interval = column.get("psnr_interval") if name == "psnr" else None
    spread = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
    return f"{column[name]:.2f}{spread}" if name == "psnr" else f"{column[name]:.4f}"


def scalars(result: Mapping[str, Any]) -> dict[str, float]:
    """Flat names: `psnr` of the pair, `quantized/colour`, `paired_round_to_nearest/psnr`."""
    flat = {}
    for part in PARTS:
        prefix = "" if part == "paired" else f"{part}/"
        for name, value in result.get(part, {}).items():
            if isinstance(value, float):
                flat[f"{prefix}{name}"] = value
    return flat


def _definitions(result: Mapping[str, Any], known: Mapping[str, str]) -> dict[str, str]:
    """What the numbers of `result` mean."""
    named = {name for part in result.values() if isinstance(part, Mapping) for name in part}
    return {name: text for name, text in known.items() if name in named}


def pair(model: str) -> str:
    """The part that pairs a model with full precision."""
    return "paired" if model == "quantized" else f"paired_{model}"


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values))
