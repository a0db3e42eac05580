"""`recon bench-step`: one optimizer step of S²Q-VDiT on a block of real size, timed.

Random weights of CogVideoX geometry; eager, compiled, and a plain forward and backward of the same
full-precision block, in turn, in one process. The second block must run without recompiling.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from recon.atomic import write_json
from recon.calibration.statistics import UnitRecord
from recon.cli.device import usable
from recon.engine import stage_data
from recon.engine.assembly import assembled, layer_groups
from recon.engine.gradient import flat_gradient, hand_out
from recon.engine.unit import OpenUnit
from recon.methods.s2q_vdit import S2QVDiT
from recon.models.cogvideox import CogVideoX
from recon.types import State


def bench_step(arguments: Sequence[str]) -> None:
    """Prints medians in seconds, ratios, and recompilations; json with --json."""
    options = _parser().parse_args(arguments)
    torch.manual_seed(0)
    device = usable(options.device)
    with tempfile.TemporaryDirectory() as folder:
        adapter = _network(Path(folder), options)
        result = _measure(adapter, options, device)
    if options.json:
        write_json(options.json, result)
    Console().print_json(data=result)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("recon bench-step", description=__doc__)
    parser.add_argument("--heads", type=int, default=30, help="Heads of 64 channels: 30 is 2B.")
    parser.add_argument("--text-tokens", type=int, default=226)
    parser.add_argument("--latent", type=int, nargs=3, default=(2, 40, 40), help="Frames, h, w.")
    parser.add_argument("--rotary", action="store_true", help="As 5B.")
    parser.add_argument("--runs", type=int, default=5, help="Timed steps of each kind.")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 matrix products.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=None, help="Also write the result here.")
    return parser


def _network(folder: Path, options: argparse.Namespace) -> CogVideoX:
    from diffusers import CogVideoXTransformer3DModel

    frames, height, width = options.latent
    network = CogVideoXTransformer3DModel(
        num_attention_heads=options.heads,
        num_layers=2,
        text_embed_dim=64,
        max_text_seq_length=options.text_tokens,
        sample_frames=4 * (frames - 1) + 1,
        sample_height=height,
        sample_width=width,
        use_rotary_positional_embeddings=options.rotary,
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    network.save_pretrained(folder, max_shard_size="100GB")
    index = {"_class_name": "CogVideoXPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    adapter = CogVideoX(str(folder), "bfloat16" if options.device != "cpu" else "auto")
    adapter.network_folder = folder
    return adapter


class _Learner:
    """One open unit outside a trainer."""

    def __init__(self, adapter: CogVideoX, block: int, state: State, device: torch.device) -> None:
        method = S2QVDiT(adapter=adapter, seed=block)
        unit = method.partition()[block]
        blocks = [adapter.block(unit.name, device)]
        groups = layer_groups(adapter, unit, blocks, skip_roles=())
        widths = {g.name: next(iter(g.linears.values())).in_features for g in groups}
        record = UnitRecord({name: torch.ones(n, device=device) for name, n in widths.items()})
        self.opened = OpenUnit(unit, groups, blocks, record)
        self.opened.layers = method.open_unit(self.opened)
        self.opened.student_blocks = assembled(unit, blocks, self.opened.layers)
        for name, layer in self.opened.layers.items():
            method.quantizers[name.replace(".", "/")] = layer
        method.quantizers.to(device)
        groups_of_parameters = method.parameter_groups(self.opened)
        for group in groups_of_parameters:
            del group["schedule"]
        self.optimizer = method.optimizer(groups_of_parameters)
        self.parameters = [p for group in groups_of_parameters for p in group["params"]]
        self.adapter, self.state = adapter, state
        with torch.no_grad():
            self.target = adapter.tokens(stage_data.run_blocks(adapter, blocks, state))

    def step(self, run: Callable[..., State], autocast: bool) -> None:
        """Forward, backward and optimizer step."""
        with torch.autocast(self.target.device.type, torch.bfloat16, enabled=autocast):
            opened = self.opened
            after = run(self.adapter, opened.student_blocks, opened.transforms, self.state)
            loss = (self.adapter.tokens(after).float() - self.target.float()).square().mean()
        hand_out(flat_gradient({"error": loss}, self.parameters).gradient, self.parameters)
        self.optimizer.step()

    def plain(self, autocast: bool) -> None:
        """Forward and backward of the full-precision block, gradients of weights and inputs."""
        block = self.opened.teacher_blocks[0].requires_grad_(True)
        with torch.autocast(self.target.device.type, torch.bfloat16, enabled=autocast):
            after = stage_data.run_blocks(self.adapter, [block], self.state)
            loss = self.adapter.tokens(after).float().square().mean()
        torch.autograd.grad(loss, [p for p in block.parameters() if p.requires_grad])
        block.requires_grad_(False)


def _measure(
    adapter: CogVideoX, options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    frames, height, width = options.latent
    sample = {
        "hidden_states": torch.randn(1, frames, 16, height, width),
        "encoder_hidden_states": torch.randn(1, options.text_tokens, 64),
        "timestep": torch.tensor([500]),
    }
    with torch.no_grad():
        state = adapter.embed(sample, device)
    compiled = torch.compile(stage_data.run_learning, dynamic=False)
    learner = _Learner(adapter, 0, state, device)
    started = time.monotonic()
    learner.step(compiled, options.autocast)
    first_compile = time.monotonic() - started
    kinds: dict[str, Callable[[], None]] = {
        "eager": lambda: learner.step(stage_data.run_learning, options.autocast),
        "compiled": lambda: learner.step(compiled, options.autocast),
        "plain": lambda: learner.plain(options.autocast),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for run in range(options.runs + 1):  # the first round warms up
        for name, step in kinds.items():
            taken = _timed(step, device)
            if run:
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    second = _Learner(adapter, 1, state, device)
    with torch.compiler.set_stance("fail_on_recompile"):  # raises if the next block recompiles
        second.step(compiled, options.autocast)
    return {
        "tokens": int(learner.target.shape[1]),
        "width": int(learner.target.shape[2]),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "autocast": bool(options.autocast),
        "seconds": medians,
        "compiled_over_eager": medians["compiled"] / medians["eager"],
        "compiled_over_plain": medians["compiled"] / medians["plain"],
        "first_compile_seconds": first_compile,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
    }


def _timed(step: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
