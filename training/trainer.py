"""A training that can be stopped at any moment and continued by the same command, in one process or several."""

import argparse
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from daamlib.io import atomic_write


def add_options(parser: argparse.ArgumentParser, **defaults) -> None:
    """Add the options of every training; `defaults` are those of one."""
    parser.add_argument("--work", type=Path, default=Path("checkpoints/urban-tiny"), help="checkpoints and caches")
    parser.add_argument("--out", type=Path, help="the folder of the weights in float16")
    parser.add_argument("--scenes", type=int, default=32_000, help="rendered training scenes")
    parser.add_argument("--samples", type=int, default=math.inf, help="stop when so many were seen in all")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop this command after so long")
    parser.add_argument("--batch", type=int, default=32, help="samples of a step and process")
    parser.add_argument("--lr", type=float, default=6e-4, help="the highest learning rate")
    parser.add_argument("--decay-from", type=float, help="part of the training after which the rate falls as a cosine")
    parser.add_argument("--ema", type=float, default=0.999, help="how much of the averaged weights a step keeps")
    parser.add_argument("--seed", type=int, default=0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda", "mps"], default=device)
    parser.add_argument("--processes", type=int, default=1, help="data-parallel processes on this machine")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process, on a CPU")
    parser.add_argument("--save-minutes", type=float, default=3, help="between two checkpoints")
    parser.set_defaults(**defaults)


def launch(train: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run `train(args)` in this process or, with `--processes`, in several, each on a separate CPU core or GPU."""
    if args.processes == 1:
        return _worker(train, args)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # accelerate's default is every core
    config = LaunchConfig(
        1, 1, args.processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="urban", max_restarts=0
    )
    elastic_launch(config, _worker)(train, args)


def _worker(train: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
        if args.processes > 1:
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"]) % len(cores)]})
    train(args)


class Trainer:
    """A network in training with the moving average of its weights, its optimiser and its checkpoint.

    The checkpoint holds the states of the network ("module"), of the average ("ema") and of the optimiser, and the
    samples and seconds that they took. It is written every `--save-minutes` and replaced as a whole.

    Attributes:
        forward: the network to call, in bfloat16 where the hardware multiplies it: on a GPU, or a CPU with AMX or
            AVX512-BF16; other CPUs are 80 times slower in it.
        device: where it computes.
        samples: how many it has seen in all.
    """

    def __init__(self, module: torch.nn.Module, path: Path, args: argparse.Namespace):
        """Begin, or go on from the checkpoint.

        Args:
            module: the network.
            path: of the checkpoint.
            args: the options of `add_options`.

        Raises:
            ValueError: if `--device` is not there.
        """
        if not getattr(torch, args.device).is_available():
            raise ValueError(f"--device {args.device}: PyTorch {torch.__version__} finds none here")
        fast = args.device != "cpu" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        self._accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision="bf16" if fast else "no")
        self.device = self._accelerator.device
        self.samples, self._seconds, self._path, self._args = 0, 0.0, path, args
        self._per_step = args.batch * self._accelerator.num_processes  # samples
        self._module = module.to(self.device)
        # with the buffers: a batch norm's statistics are to be those of the averaged weights
        self._average = AveragedModel(module, multi_avg_fn=self._update, use_buffers=True)
        optimizer = torch.optim.AdamW(module.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
            module.load_state_dict(state["module"])
            self._average.module.load_state_dict(state["ema"])
            self.samples, self._seconds = state["samples"], state["seconds"]
            self._average.n_averaged.fill_(self.samples // self._per_step)
            if "optimizer" in state:  # `restore` has none
                optimizer.load_state_dict(state["optimizer"])
        self.forward, self._optimizer = self._accelerator.prepare(module, optimizer)
        # differs by process and by starting point: a training that goes on sees new noise
        stream = np.random.SeedSequence([args.seed, self._accelerator.process_index, self.samples])
        torch.manual_seed(int(stream.generate_state(1)[0]))
        self._losses: list[torch.Tensor] = []
        self._progress = 0.0  # the part of the samples or the minutes, whichever is further, that is over
        self._started = self._saved = self._logged = time.monotonic()
        self._first = self.samples

    def _update(self, averaged, current, updates) -> None:
        """One update of the moving average, whose memory is short at first."""
        decay = min(self._args.ema, float((1 + updates) / (10 + updates)))
        get_ema_multi_avg_fn(decay)(averaged, current, updates)

    def goes_on(self) -> bool:
        """Return whether samples and minutes are left; if not, save the training, which has ended."""
        minutes = (time.monotonic() - self._started) / 60
        over = minutes / self._args.minutes if self._args.minutes else 1.0
        self._progress = max(self.samples / self._args.samples, over)
        if self._accelerator.num_processes > 1:  # by the clock of the first
            self._progress = float(broadcast(torch.tensor(self._progress, device=self.device)))
        if self._progress >= 1:
            self.save()
            self._accelerator.end_training()
        return self._progress < 1

    def _learning_rate(self) -> float:
        """Linear warm-up of 200 steps, constant, then a cosine to 5 % over the part after `--decay-from`."""
        warm = min(1.0, (self.samples + 1) / (200 * self._per_step))
        begin = self._args.decay_from
        tail = max(0.0, self._progress - begin) / max(1e-9, 1 - begin)
        return self._args.lr * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, tail))))

    def step(self, loss: torch.Tensor) -> None:
        """One optimiser step on a process's loss of `--batch` samples."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self._optimizer.zero_grad()
        self._accelerator.backward(loss)
        self._accelerator.clip_grad_norm_(self._module.parameters(), 1.0)
        self._optimizer.step()
        self._average.update_parameters(self._module)
        self.samples += self._per_step
        self._losses.append(loss.detach())
        now = time.monotonic()
        if now - self._logged > 20:
            mean, speed = torch.stack(self._losses).mean(), (self.samples - self._first) / (now - self._started)
            report = f"{self._path.stem}: {self.samples} samples, loss {mean:.4f}, {speed:.1f} samples/s"
            self._accelerator.print(report, flush=True)
            self._logged, self._losses = now, []
        if now - self._saved > 60 * self._args.save_minutes:
            self.save()

    def save(self) -> None:
        """Write the checkpoint, never leaving a half-written one."""
        if not self._accelerator.is_main_process:
            return
        now = time.monotonic()
        self._seconds, self._saved = self._seconds + now - self._saved, now
        states = {"module": self._module, "ema": self._average.module, "optimizer": self._optimizer}
        state = {name: holder.state_dict() for name, holder in states.items()}
        with atomic_write(self._path) as temporary:
            torch.save({**state, "samples": self.samples, "seconds": self._seconds}, temporary)
