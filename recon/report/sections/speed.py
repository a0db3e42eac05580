"""How fast an export is beside full precision, as `recon bench` measured it."""

from dataclasses import dataclass
from typing import Any

from recon.report.run import Run


@dataclass(frozen=True)
class Speed:
    """What the section shows."""

    networks: list[dict[str, Any]]
    """Name, floating type, bytes on disk and at the peak, median seconds by what was timed."""
    timed: list[str]
    ratios: dict[str, dict[str, float]]
    """Full precision's seconds over the export's, by floating type and by what was timed."""
    device: str
    threads: int
    rounds: int
    sampling_steps: int
    integer_products: bool
    """Whether the device multiplies 8-bit integers faster than floating numbers."""


def build(run: Run) -> Speed | None:
    """The section of one run; None where nothing was timed."""
    found = run.json("bench.json")
    if not found:
        return None
    return Speed(
        found["networks"],
        list(found["networks"][0]["seconds"]),
        found["times_faster"],
        found["device"],
        found["threads"],
        found["runs"],
        found["sampling_steps"],
        found["integer_dot_products"],
    )
