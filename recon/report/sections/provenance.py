"""How to repeat the run: command, configuration, what it depended on, versions."""

import re
from dataclasses import dataclass
from typing import Any

import recon
from recon.report.run import Run


@dataclass(frozen=True)
class Provenance:
    """What the section shows."""

    typed: str
    """Command line that started the run, in the folder it was started in; empty if unknown."""
    again: str
    """Command that makes the run anew from its configuration."""
    config: str
    fingerprint: dict[str, Any]
    versions: dict[str, str]
    seconds: dict[str, float]
    """Wall-clock seconds by part: the only numbers, with memory, that a repetition changes."""
    memory: dict[str, int]
    """Peak bytes by place."""


def build(run: Run) -> Provenance:
    """The section of one run."""
    again = f"recon fit --config config.yaml --trainer.default_root_dir {run.root}-again"
    return Provenance(
        run.typed,
        again,
        run.config_text.strip(),
        run.manifest.get("fingerprint", {}),
        _versions(run),
        run.summary.get("seconds", {}),
        run.summary.get("peak_memory_bytes", {}),
    )


def _versions(run: Run) -> dict[str, str]:
    fingerprint = run.manifest.get("fingerprint", {})
    found = {
        key.removeprefix("versions."): str(value)
        for key, value in fingerprint.items()
        if key.startswith("versions.")
    }
    lightning = re.match(r"# lightning\.pytorch==(\S+)", run.config_text)
    if lightning:
        found["lightning"] = lightning[1]
    if run.calibration is not None:
        for name, version in run.calibration.details.get("versions", {}).items():
            found.setdefault(name, str(version))
    return {**found, "this page": f"recon {recon.__version__}"}
