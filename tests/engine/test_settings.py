"""Trainer settings that would end a run normally with wrong contents."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    OnExceptionCheckpoint,
    Timer,
)
from lightning.pytorch.strategies import DDPStrategy

from recon.engine import ReconStrategy
from recon.engine.settings import refuse_unsafe_trainer
from recon.errors import ConfigError
from recon.methods.rtn import RoundToNearest
from recon.models.cogvideox import CogVideoX
from tests.engine.tiny_run import FixedData, trainer_for


def test_the_trainer_of_the_command_line_is_accepted(tmp_path: Path) -> None:
    refuse_unsafe_trainer(trainer_for(tmp_path), "RoundToNearest")
    refuse_unsafe_trainer(
        trainer_for(tmp_path, devices=2, strategy=ReconStrategy()), "RoundToNearest"
    )
    refuse_unsafe_trainer(trainer_for(tmp_path, limit_train_batches=1.0), "RoundToNearest")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reload_dataloaders_every_n_epochs": 0}, r"every_n_epochs is 0.*write 1"),
        ({"reload_dataloaders_every_n_epochs": 2}, r"every_n_epochs is 2.*write 1"),
        ({"max_epochs": 1}, "max_epochs is 1: stages would be missing; write -1"),
        ({"max_epochs": None}, "max_epochs is None: stages would be missing; write -1"),
        ({"max_steps": 30}, "max_steps is 30: stages would be cut short"),
        ({"max_time": "00:00:01:00"}, "The callback Timer .*trainer.max_time"),
        ({"limit_train_batches": 5}, "limit_train_batches is 5: stages would be cut short"),
        ({"limit_train_batches": 1}, "limit_train_batches is 1: stages would be cut short"),
        ({"limit_train_batches": 0.5}, "limit_train_batches is 0.5: stages would be cut short"),
        ({"overfit_batches": 3}, "overfit_batches is 3: stages would be cut short"),
        ({"fast_dev_run": True}, "fast_dev_run is True: stages would be cut short"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches is 2.*half their course"),
        (
            {"use_distributed_sampler": True, "devices": 2, "strategy": "recon"},
            "use_distributed_sampler is True: the engine deals the samples itself; write false",
        ),
    ],
)
def test_a_setting_that_cuts_or_mixes_stages_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    if settings.get("strategy") == "recon":
        settings = {**settings, "strategy": ReconStrategy()}
    trainer = trainer_for(tmp_path, **settings)
    with pytest.raises(ConfigError, match=message):
        refuse_unsafe_trainer(trainer, "RoundToNearest")


@pytest.mark.parametrize(
    "callback",
    [EarlyStopping("recon/loss"), Timer("00:00:01:00"), OnExceptionCheckpoint("somewhere")],
    ids=lambda callback: type(callback).__name__,
)
def test_a_callback_that_stops_stages_is_refused(tmp_path: Path, callback: Callback) -> None:
    trainer = trainer_for(tmp_path, callback)
    with pytest.raises(ConfigError, match=f"callback {type(callback).__name__} .*send SIGTERM"):
        refuse_unsafe_trainer(trainer, "RoundToNearest")


class MixedTrainer:
    """A trainer at 16-mixed, which needs a GPU to be made."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self.precision = trainer, "16-mixed"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


def test_a_gradient_scaler_is_refused(tmp_path: Path) -> None:
    trainer: Any = MixedTrainer(trainer_for(tmp_path))
    with pytest.raises(ConfigError, match=r"precision is 16-mixed.*write bf16-mixed or 32-true"):
        refuse_unsafe_trainer(trainer, "RoundToNearest")


@pytest.mark.parametrize("strategy", ["ddp", "auto", DDPStrategy(static_graph=True)], ids=str)
def test_plain_ddp_is_refused_with_the_reason(tmp_path: Path, strategy: Any) -> None:
    trainer = trainer_for(tmp_path, devices=2, strategy=strategy)
    message = (
        "AdaRound trains a different set of parameters in every stage, but DDPStrategy fixes that "
        r"set.*Set trainer\.strategy to recon\.engine\.ReconStrategy"
    )
    with pytest.raises(ConfigError, match=message):
        refuse_unsafe_trainer(trainer, "AdaRound")


def test_a_fit_from_python_is_refused_as_well(teacher: Path, samples: Path, tmp_path: Path) -> None:
    module = RoundToNearest(adapter=CogVideoX(str(teacher)))
    trainer = trainer_for(tmp_path / "run", reload_dataloaders_every_n_epochs=0)
    with pytest.raises(ConfigError, match="reload_dataloaders_every_n_epochs is 0"):
        trainer.fit(module, FixedData(str(samples)))
