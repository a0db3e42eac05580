"""Trainer settings under which a run would end normally with wrong contents."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, OnExceptionCheckpoint, Timer
from lightning.pytorch.strategies import SingleDeviceStrategy

from recon.engine.strategy import ReconStrategy
from recon.errors import ConfigError


def refuse_unsafe_trainer(owner: Trainer, method: str) -> None:
    """Does nothing if every stage of `trainer.fit` will run whole, on its own data, in step.

    Raises:
        ConfigError: A setting cuts a stage short, feeds it another stage's data, or lets
            processes drift apart. Source: Lightning 2.6.6, where each of them is silent.
    """
    trainer: Any = owner  # the connectors set half of its attributes, unseen by type checkers
    fit, processes = trainer.fit_loop, trainer.num_devices * trainer.num_nodes
    rules = [
        # These two first: they set others of the settings below.
        ("fast_dev_run", trainer.fast_dev_run, not trainer.fast_dev_run, _CUT),
        ("overfit_batches", trainer.overfit_batches, trainer.overfit_batches == 0, _CUT),
        (
            "reload_dataloaders_every_n_epochs",
            trainer.reload_dataloaders_every_n_epochs,
            trainer.reload_dataloaders_every_n_epochs == 1,
            "every stage needs its own samples; write 1",
        ),
        ("max_epochs", fit.max_epochs, fit.max_epochs == -1, "stages would be missing; write -1"),
        ("max_steps", fit.epoch_loop.max_steps, fit.epoch_loop.max_steps == -1, _CUT),
        (
            "limit_train_batches",
            trainer.limit_train_batches,
            # The whole number 1 is one batch, the fraction 1.0 all of them.
            trainer.limit_train_batches is None
            or (
                isinstance(trainer.limit_train_batches, float) and trainer.limit_train_batches == 1
            ),
            _CUT,
        ),
        (
            "accumulate_grad_batches",
            trainer.accumulate_grad_batches,
            trainer.accumulate_grad_batches == 1,
            "schedules would reach half their course; write 1 and set model.batch_size",
        ),
        (
            "use_distributed_sampler",
            True,
            processes == 1 or not trainer._accelerator_connector.use_distributed_sampler,
            "the engine deals the samples itself; write false",
        ),
        (
            "precision",
            trainer.precision,
            trainer.precision != "16-mixed",
            "its gradient scaler may skip a step on one process alone; write bf16-mixed or 32-true",
        ),
    ]
    for key, value, allowed, remedy in rules:
        if not allowed:
            raise ConfigError(f"trainer.{key} is {value}: {remedy}.")
    for callback in trainer.callbacks:
        if isinstance(callback, EarlyStopping | Timer | OnExceptionCheckpoint):
            raise ConfigError(
                f"The callback {type(callback).__name__} (trainer.max_time adds a Timer) would "
                "close a stage half trained or continue an old run silently. Remove it; to stop a "
                "run, send SIGTERM, and continue with --ckpt_path last."
            )
    if not isinstance(trainer.strategy, SingleDeviceStrategy | ReconStrategy):
        raise ConfigError(
            f"{method} trains a different set of parameters in every stage, but "
            f"{type(trainer.strategy).__name__} fixes that set when fit begins and would let the "
            "ranks drift apart. Set trainer.strategy to recon.engine.ReconStrategy."
        )


_CUT = "stages would be cut short and closed as if complete; remove it and lower the method's steps"
