"""At which sampling steps the quantised network errs, measured beside an evaluation."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from recon.atomic import write_json
from recon.calibration import ranks
from recon.callbacks.evaluating import Evaluating
from recon.callbacks.gathering import gather_rows
from recon.engine.reconstruction import Reconstruction
from recon.engine.step_errors import FORMS, relative_errors, squared_errors
from recon.errors import ConfigError


class StepErrors(Evaluating):
    """Writes `test_steps.json` (or `validate_steps.json`), and prints it.

    Of each sampling step the relative squared error of one call of the network, rounded to nearest
    and quantised, on what full-precision sampling puts into it. Four calls of the network a step
    and prompt, more than the evaluation itself takes.

    Args:
        prompts: How many of the evaluation's prompts are followed, the first ones; 0: none.
    """

    def __init__(self, prompts: int = 0) -> None:
        if prompts < 0:
            raise ConfigError(
                f"step_errors.prompts must be at least 0, got {prompts}. Give a number of prompts, "
                "or 0 to measure none."
            )
        self.prompts = prompts

    def begin(self, trainer: Trainer) -> None:
        """Refuses, while nothing has been sampled, data whose evaluation has no steps.

        Raises:
            ConfigError: The data module does not sample.
        """
        data = _data(trainer)
        if self.prompts and not hasattr(data, "evaluation_requests"):
            raise ConfigError(
                f"step_errors.prompts is {self.prompts}, but {type(data).__name__} evaluates "
                "without sampling: there are no steps. Leave it at 0."
            )

    def finish(self, trainer: Trainer, module: LightningModule, verb: str) -> None:
        """Follows this rank's share of the prompts."""
        if not self.prompts:
            return
        assert isinstance(module, Reconstruction)
        data = _data(trainer)
        requests = data.evaluation_requests()[: self.prompts]
        rows = [
            {"prompt": prompt, "seed": seed, "found": squared_errors(module, prompt, seed)}
            for prompt, seed in requests[ranks.rank() :: ranks.world()]
        ]
        rows = gather_rows(rows, module.run_device)
        if not trainer.is_global_zero:
            return
        content = {
            "prompts": [row["prompt"] for row in rows],
            "seeds": [row["seed"] for row in rows],
            **data.sampling_settings(),
            "definition": "|form - teacher|^2 / |teacher|^2 of one call, summed over the prompts",
            "errors": relative_errors([row["found"] for row in rows]),
        }
        write_json(Path(trainer.default_root_dir) / f"{verb}_steps.json", content)
        _show(content["errors"], len(rows))


def _data(trainer: Trainer) -> Any:
    return trainer.datamodule  # type: ignore[attr-defined] # Lightning sets it, and declares it not


def _show(errors: list[dict[str, float]], prompts: int) -> None:
    table = Table(title=f"Error of one call at each sampling step, prompts: {prompts}")
    for head in ("step", "timestep", *(form.replace("_", " ") for form in FORMS), "ratio"):
        table.add_column(head, justify="right")
    for step, row in enumerate(errors):
        nearest, quantized = row["round_to_nearest"], row["quantized"]
        ratio = f"{quantized / nearest:.3f}" if nearest else "–"
        cells = (f"{row['timestep']:.0f}", f"{nearest:.3e}", f"{quantized:.3e}", ratio)
        table.add_row(str(step), *cells)
    Console().print(table)
