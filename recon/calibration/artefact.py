"""The calibration set on disk: an ordinary `datasets` folder and a marker, written last.

`datasets.load_from_disk(folder)` opens it without recon. Each tensor of a sample is a column of
its own name that holds {"dtype", "shape", "data"}: the raw little-endian bytes, because Arrow has
no bfloat16 and a detour over another type would not be exact by construction. To read one:

    field = row["hidden_states"]
    flat = torch.frombuffer(bytearray(field["data"]), dtype=getattr(torch, field["dtype"]))
    tensor = flat.view(field["shape"])

`calibration.json` beside it holds the fingerprint, the scores of the whole pool and a checksum of
every data file. The folder is written under another name and renamed when complete, so a killed
run leaves nothing that looks finished.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from recon.atomic import whole_folder, write_json
from recon.errors import CalibrationError, NumericsError
from recon.types import Sample

MARKER = "calibration.json"
FORMAT = 1
"""Raised whenever an older reader would misread the folder."""

Split = Literal["calibration", "held_out"]
Fingerprint = Mapping[str, str | int | float | bool | None]
"""Flat: a refusal names one key and two values."""

_CHANGED = "was changed after it was written. Restore it, or delete the folder and fit again."


@dataclass(frozen=True)
class Row:
    """One sample of the set and where it comes from."""

    sample: Sample
    """Batch axis 1 (conditional branch, or a conversation) or 2 (unconditional, conditional)."""
    prompt: str
    step: int | None
    """Sampling step, 0 is the first; None where nothing is sampled."""
    seed: int | None
    """Seed of the prompt's initial noise; None where there is none."""
    change: float | None
    """C_diff, S²Q-VDiT eq. 3; None where there are no steps."""
    gram: float | None
    """C_quant, S²Q-VDiT eq. 6; None where it was not measured."""
    score: float | None
    """What the sample was ranked by; None for held-out samples, which are not ranked."""
    split: Split
    reason: str
    """Why it was chosen, a sentence."""


class Samples(Sequence[Sample]):
    """Samples of one split, read from disk one at a time."""

    def __init__(self, rows: Any, tensors: tuple[str, ...]) -> None:
        self._rows = rows
        self._tensors = tensors

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self._rows[index]
        held = {name: row[name] for name in self._tensors}
        # Samples of one set may differ in what they hold: a text has no pixels.
        return {name: _decode(field) for name, field in held.items() if field is not None}

    def facts(self, index: int) -> dict[str, Any]:
        """Prompt, step, seed, scores and reason of one sample, without its tensors."""
        row = self._rows[index]
        return {name: value for name, value in row.items() if name not in self._tensors}


@dataclass(frozen=True)
class CalibrationSet:
    """A finished calibration set, opened from its folder."""

    folder: Path
    samples: Samples
    """What is calibrated on."""
    held_out: Samples
    """From other prompts, for errors that were not trained on."""
    details: dict[str, Any]
    """The content of `calibration.json`."""

    @property
    def fingerprint(self) -> str:
        """Hash of the settings, prompts and teacher that made the set."""
        return digest(self.details["fingerprint"])

    @classmethod
    def load(cls, folder: str | Path, expected: Fingerprint | None = None) -> "CalibrationSet":
        """Open a set, after its checksums and fingerprint.

        Args:
            folder: What `write_set` made.
            expected: The fingerprint the set must carry; None accepts any.

        Raises:
            CalibrationError: The folder is missing, unfinished, damaged, or made for another
                configuration or teacher.
        """
        folder = Path(folder)
        details = _read_marker(folder)
        if expected is not None:
            _compare(folder, details["fingerprint"], expected)
        _check_files(folder, details["files"])
        from datasets import Value, load_from_disk  # heavy: only when a set is opened

        rows = load_from_disk(str(folder))
        tensors = tuple(n for n, kind in rows.features.items() if not isinstance(kind, Value))
        splits = {
            name: Samples(
                rows.select([i for i, s in enumerate(rows["split"]) if s == name]), tensors
            )
            for name in ("calibration", "held_out")
        }
        return cls(folder, splits["calibration"], splits["held_out"], details)


def write_set(
    folder: str | Path,
    rows: Callable[[], Iterable[Row]],
    fingerprint: Fingerprint,
    details: Mapping[str, Any],
    tensors: Sequence[str] | None = None,
) -> None:
    """Write a set; the folder is there when it is complete, and not before.

    Args:
        folder: Target; a set that is there is replaced.
        rows: Gives the rows, one at a time: the samples need not fit in memory together.
        fingerprint: What a later run must match to reuse the set.
        details: Further facts for `calibration.json`, such as the scores of the whole pool.
        tensors: Names of the tensors that samples may hold; None: all hold those of the first.

    Raises:
        NumericsError: A tensor holds NaN or Inf. Nothing is left behind.
    """
    with whole_folder(Path(folder)) as aside:
        count = _write_rows(aside, rows, tensors)
        files = {p.name: _describe(p) for p in sorted(aside.iterdir())}
        content = {"format": FORMAT, "rows": count, "fingerprint": dict(fingerprint)}
        content |= {"files": files, "versions": _versions(), **details}
        write_json(aside / MARKER, content)


def digest(fingerprint: Fingerprint) -> str:
    """Hash of a fingerprint, independent of the order of its keys."""
    text = json.dumps(dict(fingerprint), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def require_finite(sample: Sample, prompt: str, step: int | None) -> None:
    """Refuse a sample with NaN or Inf in it.

    Raises:
        NumericsError: Names the tensor, the prompt and the step.
    """
    for name, tensor in sample.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            place = "" if step is None else f" step {step},"
            raise NumericsError(
                f"{name} of prompt {prompt!r},{place} holds NaN or Inf. The full-precision "
                "teacher itself breaks there: check its weights, or set a wider dtype "
                "(float32 or bfloat16 instead of float16)."
            )


def _encode(tensor: Tensor) -> dict[str, Any]:
    flat = tensor.detach().cpu().contiguous()
    return {
        "dtype": str(flat.dtype).removeprefix("torch."),
        "shape": list(flat.shape),
        "data": flat.reshape(-1).view(torch.uint8).numpy().tobytes(),
    }


def _decode(field: Mapping[str, Any]) -> Tensor:
    dtype = getattr(torch, field["dtype"])
    if not field["data"]:
        return torch.empty(field["shape"], dtype=dtype)
    # The copy makes the tensor writable and aligned.
    return torch.frombuffer(bytearray(field["data"]), dtype=dtype).view(field["shape"])


def _encode_row(row: Row) -> dict[str, Any]:
    require_finite(row.sample, row.prompt, row.step)
    facts = {"prompt": row.prompt, "step": row.step, "seed": row.seed, "C_diff": row.change}
    facts |= {"C_quant": row.gram, "score": row.score, "split": row.split, "reason": row.reason}
    return {name: _encode(tensor) for name, tensor in row.sample.items()} | facts


def _write_rows(
    aside: Path, rows: Callable[[], Iterable[Row]], tensors: Sequence[str] | None
) -> int:
    """The `datasets` files of the rows; returns how many rows there are."""
    import datasets  # heavy: only when a set is written
    from datasets.arrow_writer import ArrowWriter

    encoded: Iterator[dict[str, Any]] = map(_encode_row, rows())
    first = next(encoded)
    text, whole, real = (datasets.Value(kind) for kind in ("string", "int64", "float64"))
    tensor = {
        "dtype": text,
        "shape": datasets.List(whole),
        "data": datasets.Value("large_binary"),  # 64-bit offsets: a column may pass 2 GB
    }
    held = [name for name, value in first.items() if isinstance(value, dict)]
    features = dict.fromkeys(held if tensors is None else tensors, tensor)
    features |= {"prompt": text, "step": whole, "seed": whole, "C_diff": real, "C_quant": real}
    features |= {"score": real, "split": text, "reason": text}
    spill = aside / "rows"
    spill.mkdir()
    # One row per batch: no more than one sample is in memory.
    with ArrowWriter(
        path=str(spill / "rows.arrow"), features=datasets.Features(features), writer_batch_size=1
    ) as writer:
        lacking = dict.fromkeys(features)
        writer.write(lacking | first)
        for row in encoded:
            writer.write(lacking | row)
        count, _ = writer.finalize()
    was_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        datasets.Dataset.from_file(str(spill / "rows.arrow")).save_to_disk(str(aside))
    finally:
        if not was_off:
            datasets.enable_progress_bars()
    shutil.rmtree(spill)
    return int(count)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())  # the marker must not reach the disk before the data
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": checksum}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "datasets", "diffusers", "transformers")}


def _read_marker(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CalibrationError(f"{folder} is not a folder. Run `recon fit` to calibrate first.")
    path = folder / MARKER
    try:
        details = json.loads(path.read_text(encoding="utf-8"))
        known = details["format"]
        missing = {"fingerprint", "files", "rows"} - set(details)
    except FileNotFoundError:
        raise CalibrationError(
            f"{folder} has no {MARKER}, which is written last: the set is unfinished or no "
            "calibration set. Delete the folder and fit again."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CalibrationError(f"{path} cannot be read ({error}): it {_CHANGED}") from error
    if known != FORMAT or missing:
        raise CalibrationError(
            f"{path} has format {known} and lacks {sorted(missing)}; this version reads format "
            f"{FORMAT}. Delete the folder and fit again."
        )
    return dict(details)


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    for name, saved in files.items():
        path = folder / name
        present = _describe(path) if path.is_file() else {"bytes": None, "sha256": None}
        for field, value in saved.items():
            if present[field] != value:
                raise CalibrationError(
                    f"{path}: {field} is {present[field]}, saved as {value}. The file is missing "
                    f"or {_CHANGED}"
                )


def _compare(folder: Path, saved: Fingerprint, present: Fingerprint) -> None:
    for field in sorted({*saved, *present}):
        before, now = saved.get(field), present.get(field)
        if before != now or (field in saved) != (field in present):
            raise CalibrationError(
                f"The calibration set in {folder} was made for another configuration: {field} was "
                f"{before!r}, is {now!r}. Set it back, choose another run folder "
                "(trainer.default_root_dir), or set data.init_args.stale: rebuild."
            )
