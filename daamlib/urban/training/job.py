"""A training that can be stopped at any moment and continued: checkpoint, moving average, learning rate."""

import argparse
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...io import atomic_write


@dataclass
class Job:
    """A network in training with its EMA copy; knows how to stop, to save and to continue."""

    module: torch.nn.Module
    path: Path
    args: argparse.Namespace
    rank: int
    world: int

    def __post_init__(self):
        self.device = torch.device(self.args.device)
        self.module.to(self.device)
        self.ema = copy.deepcopy(self.module).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=self.args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.samples, self.seconds, self.loss = 0, 0.0, []
        if self.path.exists():
            state = torch.load(self.path, map_location=self.device, weights_only=True)
            self.module.load_state_dict(state["module"])
            self.ema.load_state_dict(state["ema"])
            self.samples, self.seconds = state["samples"], state["seconds"]
            if "optimizer" in state:  # `restore` has none
                self.optimizer.load_state_dict(state["optimizer"])
        self.forward = self.module
        if self.world > 1:
            self.forward = torch.nn.parallel.DistributedDataParallel(self.module, gradient_as_bucket_view=True)
        self.started = self.saved = self.logged = time.monotonic()
        self.first = self.samples

    def autocast(self) -> torch.autocast:
        """bfloat16 where the hardware multiplies it (a GPU, or a CPU with AMX); without, it is 80x slower on a CPU."""
        fast = self.device.type != "cpu" or torch.cpu._is_amx_tile_supported()
        return torch.autocast(self.device.type, torch.bfloat16, enabled=fast)

    def rng(self) -> np.random.Generator:
        """A stream that differs by process and by starting point, so a continued run sees new noise."""
        return np.random.default_rng([self.args.seed, self.rank, self.samples])

    def step(self, loss: torch.Tensor, lr: float) -> None:
        """One optimiser step on a process's loss of `--batch` samples, at learning rate `lr`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.samples += self.args.batch * self.world
        updates = self.samples / (self.args.batch * self.world)
        decay = min(self.args.ema, (1 + updates) / (10 + updates))
        with torch.no_grad():
            averaged, current = list(self.ema.parameters()), list(self.module.parameters())
            torch._foreach_lerp_(averaged, current, 1 - decay)
        self.loss.append(loss.item())
        self._report()

    def _report(self) -> None:
        now = time.monotonic()
        if self.rank or now - self.logged < 20:
            return
        speed = (self.samples - self.first) / (now - self.started)
        print(
            f"{self.path.stem}: {self.samples} samples, loss {np.mean(self.loss):.4f}, {speed:.1f} samples/s",
            flush=True,
        )
        self.logged, self.loss = now, []
        if now - self.saved > 60 * self.args.save_minutes:
            self.save()

    def save(self) -> None:
        """Write the checkpoint, never leaving a half-written one."""
        if self.rank:
            return
        now = time.monotonic()
        self.seconds += now - self.saved
        self.saved = now
        state = {
            "module": self.module.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "samples": self.samples,
            "seconds": self.seconds,
        }
        with atomic_write(self.path) as temporary:
            torch.save(state, temporary)

    def learning_rate(self, *, decay_from: float = 1.0) -> float:
        """Linear warm-up, constant, then a cosine to 5 % over the part of `--samples` after `decay_from`."""
        warm = min(1.0, (self.samples + 1) / (200 * self.args.batch * self.world))
        done = self.samples / self.args.samples
        tail = max(0.0, done - decay_from) / max(1e-9, 1 - decay_from)
        return self.args.lr * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, tail))))
