"""A teacher without diffusers: a seeded random walk in place of a denoising trajectory."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from recon.models.video_pipeline import Visit

FRAMES, CHANNELS, HEIGHT, WIDTH, TEXT = 3, 4, 6, 8, 5


class FakePipeline:
    """Has `trajectory`, as VideoPipeline; counts and can break."""

    def __init__(self, owner: "FakeAdapter") -> None:
        self.owner = owner

    def trajectory(
        self, prompt: str, seed: int, steps: int, guidance: float, visit: Visit
    ) -> Tensor:
        self.owner.sampled.append(prompt)
        torch.rand(1)  # a pipeline may touch the global generator
        generator = torch.Generator().manual_seed(seed)
        rows = 2 if guidance > 1 else 1
        text = torch.randn(rows, TEXT, 16, generator=generator).bfloat16()
        latent = torch.randn(FRAMES, CHANNELS, HEIGHT, WIDTH, generator=generator)
        for step in range(steps + self.owner.extra_calls):
            if (prompt, step) == self.owner.breaks_at:
                latent = latent * torch.nan
            visit(
                step,
                {
                    "hidden_states": latent.expand(rows, -1, -1, -1, -1).bfloat16(),
                    "encoder_hidden_states": text,
                    "timestep": torch.full((rows,), 1000 - step),
                },
            )
            move = torch.randn(latent.shape, generator=generator)
            latent.mul_(0.9).add_(move, alpha=0.3)  # in place: the latent's memory is reused
        return latent


class FakeAdapter:
    """The part of ModelAdapter that calibration reads."""

    def __init__(self, weights: str = "w0", config: Mapping[str, Any] | None = None) -> None:
        self.weights = weights
        self.config = {"patch_size": 2} if config is None else config
        self.sampled: list[str] = []
        self.checked = 0
        self.breaks_at: tuple[str, int] | None = None
        self.extra_calls = 0

    def check(self) -> None:
        self.checked += 1

    def identity(self) -> dict[str, str]:
        return {"class": "fake", "weights": self.weights}

    def compute_dtype(self, device: object) -> torch.dtype:
        return torch.bfloat16

    def pipeline(self, device: object, network: object = None) -> FakePipeline:
        return FakePipeline(self)

    def embed(self, sample: dict[str, Tensor], device: object) -> dict[str, Tensor]:
        video = sample["hidden_states"].float().flatten(2).transpose(1, 2)
        return {"video": video, "text": sample["encoder_hidden_states"].float()[..., :FRAMES]}

    def tokens(self, state: dict[str, Tensor]) -> Tensor:
        return torch.cat([state["text"], state["video"]], dim=1)

    def token_streams(self, state: dict[str, Tensor]) -> dict[str, slice]:
        return {"text": slice(0, TEXT), "video": slice(TEXT, None)}
