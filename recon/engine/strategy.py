"""Several processes without the DDP wrapper."""

from typing import Any

from lightning.pytorch.strategies import DDPStrategy


class ReconStrategy(DDPStrategy):
    """DDP's processes and collectives, no wrapper: the engine averages the gradients itself.

    DDP lists the parameters that need gradients once, when it is built. Here another set learns
    in every stage, so that the ranks would drift apart from the second stage on, silently.
    """

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("process_group_backend", None)
        super().__init__(**kwargs)

    def configure_ddp(self) -> None:
        """Wraps nothing."""
