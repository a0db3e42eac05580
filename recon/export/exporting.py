"""One run into one format: refuse, write aside, load in a fresh process, compare, rename."""

from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import recon
from recon.atomic import write_json
from recon.engine.resume import digest
from recon.errors import ExportError
from recon.export import reload
from recon.export.auto_round import AutoRound
from recon.export.bf16 import Bf16
from recon.export.card import card
from recon.export.compressed_tensors import CompressedTensors
from recon.export.finished import Finished
from recon.export.folder import REPORT, complete_or_absent, refuse_full, refuse_taken
from recon.export.format import Format, Written
from recon.export.native import NativeFormat
from recon.export.torchao import TorchAo

FORMATS: dict[str, Format] = {
    form.name: form
    for form in (NativeFormat(), TorchAo(), AutoRound(), CompressedTensors(), Bf16())
}

VERSIONED = ("torch", "diffusers", "transformers", "torchao", "compressed-tensors", "auto-round")


def export(root: Path, name: str, out: Path | None = None, *, force: bool = False) -> Path:
    """Writes a finished run in a format, and reads it back through the public loader.

    Args:
        root: Run folder.
        name: One of `FORMATS`.
        out: Folder of the export; None: `<root>/exports/<name>`.
        force: Replace an export that is there.

    Returns:
        The folder. `export.json` in it holds differences, bytes and what runs it.

    Raises:
        ExportError: The format is unknown or cannot hold the run, a library is missing, the folder
            is taken, the disk is full, or what was written does not load as it should.
        CheckpointMismatch: The run did not finish, or its parts belong to different runs.
    """
    form = format_named(name)
    target = out or root / "exports" / name
    refuse_taken(target, force=force)
    finished = Finished.open(root)
    refuse_misfit(form, finished)
    form.require_packages()
    refuse_full(target, _expected_bytes(form, finished))
    with complete_or_absent(target) as folder:
        checks = folder / reload.FOLDER
        checks.mkdir()
        reference = reload.Reference.of(finished, form, checks)
        written = form.write(finished, folder)
        in_memory = reload.outputs_in_memory(written, reference)
        written = replace(written, network=None)  # the other process needs the memory
        seen = reload.check(form, written, finished, reference, in_memory)
        if written.library != "recon":
            finished.copy_parts(folder)
        report = _report(form, finished, written, seen)
        (folder / "README.md").write_text(card(report, finished, written.folder == folder))
        _write_report(folder, report)
    return target


def format_named(name: str) -> Format:
    """One of `FORMATS`.

    Raises:
        ExportError: There is none of this name.
    """
    form = FORMATS.get(name)
    if form is None:
        raise ExportError(f"--format is {name!r}, which is none of {', '.join(FORMATS)}.")
    return form


def refuse_misfit(form: Format, finished: Finished) -> None:
    """Does nothing if the format can hold the run.

    Raises:
        ExportError: Says what it cannot hold, and which formats can.
    """
    found = form.obstacles(finished)
    if not found:
        return
    others = [other for other in FORMATS.values() if not other.obstacles(finished)]
    holding = ", ".join(f"{o.name}{' (weights only)' if o.weights_only else ''}" for o in others)
    reasons = ".\n".join(found)
    raise ExportError(
        f"Format {form.name} cannot hold this run, and nothing is approximated:\n{reasons}.\n"
        f"Formats that hold it: {holding}."
    )


def _expected_bytes(form: Format, finished: Finished) -> int:
    manifest = finished.native.manifest
    bits = sum(
        f["out_features"] * f["in_features"] * form.stored_bits(f["weight"]["num_bits"])
        for f in manifest["layers"].values()
    )
    beside = [finished.native.folder / "network.safetensors"]
    for part in finished.parts:
        beside += [file for file in part.rglob("*") if file.is_file()] if part.is_dir() else [part]
    return bits // 8 + sum(file.stat().st_size for file in beside)


def _report(
    form: Format, finished: Finished, written: Written, seen: dict[str, Any]
) -> dict[str, Any]:
    """The content of export.json, but for the bytes of the folder."""
    manifest = finished.native.manifest
    full = sum(2 * f["out_features"] * f["in_features"] for f in manifest["layers"].values())
    return {
        "format": form.name,
        "library": written.library,
        "class": type(finished.empty).__name__,
        "run": str(finished.root),
        **finished.describing,
        "fingerprint": digest(manifest["fingerprint"]),
        "bytes": {
            "quantized_linears": written.linear_bytes,
            "bf16_linears": full,
            "ratio": written.linear_bytes / full,
        },
        "reload": seen,
        "load_dtype": written.load_dtype,
        "runs_as": list(written.runs_as),
        "notes": [*written.notes, *_missing_parts(finished, written)],
        "whole_pipeline": bool(finished.parts) and written.library != "recon",
        "versions": {"recon": recon.__version__, **_versions()},
    }


def _write_report(folder: Path, report: dict[str, Any]) -> None:
    """Writes export.json with the bytes of every file in the folder, of which it is one."""
    told, counted = -1, 0
    while told != counted:
        told = counted
        write_json(folder / REPORT, {**report, "bytes": {"folder": told, **report["bytes"]}})
        counted = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _missing_parts(finished: Finished, written: Written) -> list[str]:
    if finished.parts or written.library == "recon":
        return []
    return [f"The teacher's folder {finished.teacher} is not there: this is the network alone."]


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
