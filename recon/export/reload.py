"""The check that makes an export one: another process loads it and gets the same outputs."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recon.errors import ExportError
from recon.export import fresh
from recon.export.finished import Finished
from recon.export.format import Format, Written
from recon.export.layer import weights_only
from recon.export.public import public_network

FOLDER = "verify"


@dataclass(frozen=True)
class Difference:
    """Between two networks' outputs for the same inputs, over all of them."""

    largest: float
    """Largest absolute difference."""
    relative: float
    """Root mean square of the difference over that of the outputs."""
    tolerance: float
    """Largest `relative` that passes."""

    @classmethod
    def between(
        cls, found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float
    ) -> "Difference":
        """Of `found` from `expected`; NaN passes no tolerance."""
        error = torch.cat(
            [(a.double() - b.double()).flatten() for a, b in zip(found, expected, strict=True)]
        )
        power = torch.cat([b.double().flatten() for b in expected]).square().mean()
        relative = (error.square().mean() / power).sqrt()
        return cls(float(error.abs().max()), float(relative), tolerance)

    @property
    def passes(self) -> bool:
        """Whether it is no larger than it may be."""
        return self.relative <= self.tolerance


@dataclass(frozen=True)
class Reference:
    """What a run computes on the inputs that its exports are checked with."""

    inputs: Path
    """The calls, in one file."""
    outputs: list[Tensor]
    """Of `recon.load`, or of it without quantised activations for a format of weights only."""
    activation_noise: float
    """Relative difference that quantising activations makes."""

    @classmethod
    def of(cls, finished: Finished, form: Format, folder: Path) -> "Reference":
        """Saves the calls in `folder` and runs them.

        Args:
            finished: The run.
            form: Says whether activations count.
            folder: Where `inputs.safetensors` and `outputs.safetensors` are written to.
        """
        adapter = finished.native.adapter
        calls = [adapter.call_arguments(sample, "cpu") for sample in finished.samples]
        inputs = folder / "inputs.safetensors"
        save_file(fresh.flattened(calls), inputs)
        quantized = fresh.outputs(finished.native.network(), calls)
        layers = finished.layers
        for layer in layers.values():
            weights_only(layer)
        plain = fresh.outputs(public_network(finished, layers), calls)
        expected = plain if form.weights_only else quantized
        noise = Difference.between(quantized, plain, 0.0).relative
        save_file(_numbered(expected), folder / "outputs.safetensors")
        return cls(inputs, expected, noise)


def check(
    form: Format,
    written: Written,
    finished: Finished,
    reference: Reference,
    in_memory: Sequence[Tensor] | None,
) -> dict[str, Any]:
    """Loads what was written in a fresh process, and compares.

    Args:
        form: Says what becomes of a layer's numbers.
        written: Its network is not looked at, so that it can be released before.
        finished: The run.
        reference: What the run computes.
        in_memory: What `outputs_in_memory` gave.

    Returns:
        What was loaded, by what, and both differences, for export.json.

    Raises:
        ExportError: It does not load, its layers are not the ones that were written, one of their
            numbers is not the run's, or its outputs differ by more than the format states.
    """
    found, facts = _loaded(written, finished, reference)
    expected = sorted(finished.native.manifest["layers"]) if written.quantized else []
    if facts["quantized"] != expected:
        odd = sorted(set(facts["quantized"]) ^ set(expected))
        raise ExportError(
            f"The export was loaded with {len(facts['quantized'])} quantised layers, and "
            f"{len(expected)} were written; they differ in {', '.join(odd[:4])}. It was removed."
        )
    if facts["recon_imported"] and written.library != "recon":
        raise ExportError("Loading the export imported recon, so that it proves nothing.")
    _refuse_other_numbers(form, written, finished, facts["numbers"])
    tolerance = written.run_tolerance
    if written.rounds_otherwise:
        # Two independent roundings differ by the root of 2 of what either does.
        tolerance = max(tolerance, 2 * reference.activation_noise)
    differences = {"run": Difference.between(found, reference.outputs, tolerance)}
    if in_memory is not None:
        differences["file"] = Difference.between(found, in_memory, written.file_tolerance)
    meaning = {"run": "recon.load", "file": "what was written"}
    # A damaged file also differs from the run: the file is the nearer cause.
    for name, difference in sorted(differences.items()):
        if not difference.passes:
            raise ExportError(
                f"The export was loaded by {facts['class']}, and its outputs differ from "
                f"{meaning[name]} by {difference.relative:.2e} of their size (at most "
                f"{difference.largest:.2e}); {difference.tolerance:.2e} is allowed. It was "
                "removed. Please report it with the versions of the libraries; native is exact."
            )
    return {
        "loaded_by": facts["class"],
        "quantized_layers": len(facts["quantized"]),
        "layer_classes": facts["kinds"],
        "dtype": written.dtype,
        "calls": len(found),
        "seconds": facts["seconds"],
        "difference": {name: asdict(difference) for name, difference in differences.items()},
        "activation_noise": reference.activation_noise,
    }


def _refuse_other_numbers(
    form: Format, written: Written, finished: Finished, found: Mapping[str, fresh.Numbers]
) -> None:
    """Does nothing if the loaded layers compute with the numbers of the run, each of them.

    Outputs alone do not tell: where codes fall otherwise at ties, a wrong step size hides.
    """
    other = []
    for name, layer in form.as_loaded(finished, getattr(torch, written.dtype)):
        expected, seen = fresh.numbers(layer), found[name]
        other += [
            f"{what} of {name}"
            for what in {**expected, **seen}
            if expected.get(what) != seen.get(what)
        ]
    if other:
        raise ExportError(
            f"The export was loaded with other numbers than the run's: {', '.join(other[:4])}"
            f"{f' and {len(other) - 4} more' if len(other) > 4 else ''}. Every one must be the "
            "same. It was removed. Please report it with the versions of the libraries; native is "
            "exact."
        )


def outputs_in_memory(written: Written, reference: Reference) -> list[Tensor] | None:
    """What the network computes before its file is read back; None if there is none.

    Raises:
        ExportError: Factors were moved into other tensors, and it does not compute the same.
    """
    network = written.network
    if network is None:
        return None
    inputs, dtype = load_file(reference.inputs), getattr(torch, written.dtype)
    if written.folding_tolerance is not None:
        found = fresh.outputs(network, fresh.unflattened(inputs, torch.float32))
        difference = Difference.between(found, reference.outputs, written.folding_tolerance)
        if not difference.passes:
            raise ExportError(
                "With the factors of channels moved into other layers, the network's outputs "
                f"differ from recon.load by {difference.relative:.2e} of their size; "
                f"{difference.tolerance:.2e} is allowed. Please report it; native is exact."
            )
    calls = fresh.unflattened(inputs, dtype)
    return fresh.outputs(network if dtype == torch.float32 else network.to(dtype), calls)


def _loaded(
    written: Written, finished: Finished, reference: Reference
) -> tuple[list[Tensor], dict[str, Any]]:
    public = type(finished.empty).__name__
    layers = list(finished.native.manifest["layers"])
    return answered(
        written.library, public, written.folder, written.dtype, reference.inputs, layers
    )


def answered(
    library: str,
    public: str,
    folder: Path,
    dtype: str,
    inputs: Path,
    layers: Sequence[str] = (),
) -> tuple[list[Tensor], dict[str, Any]]:
    """What a process of its own loads and computes, and what it saw of it.

    Args:
        library: Whose loader.
        public: Name of the class.
        folder: What the loader is given.
        dtype: Floating type.
        inputs: File of calls; the folder it stands in is written to.
        layers: Those whose numbers it tells.

    Raises:
        ExportError: The process failed.
    """
    # Whole paths, so that it does not matter which folder the process works in.
    aside = inputs.absolute().with_name("loaded.safetensors")
    facts, request = aside.with_suffix(".facts"), aside.with_suffix(".request")
    content = {
        "library": library,
        "class": public,
        "folder": str(folder.absolute()),
        "dtype": dtype,
        "layers": list(layers),
        "threads": torch.get_num_threads(),
        "inputs": str(inputs.absolute()),
        "outputs": str(aside),
        "facts": str(facts),
    }
    request.write_text(json.dumps(content))
    start(request, library)
    found = load_file(aside)
    content = json.loads(facts.read_text())
    for file in (aside, facts, request):
        file.unlink()
    return [found[str(number)] for number in range(len(found))], content


def start(request: Path, library: str) -> None:
    """Answers a request in a process of its own.

    Raises:
        ExportError: The process failed; with the end of what it said.
    """
    # -P: the folder of the script, which is inside recon, must not be on the path.
    ended = subprocess.run(
        [sys.executable, "-P", fresh.__file__, str(request)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode != 0:
        raise ExportError(unloadable(library, ended.stderr))


def unloadable(library: str, said: str) -> str:
    """The message about an export that a library cannot load."""
    last = "\n".join(said.strip().splitlines()[-4:])
    return (
        f"The export was written, and {library} cannot load and run it. It was removed. The end of "
        f"what was said:\n{last}"
    )


def _numbered(outputs: Sequence[Tensor]) -> dict[str, Tensor]:
    return {str(number): tensor.contiguous() for number, tensor in enumerate(outputs)}
