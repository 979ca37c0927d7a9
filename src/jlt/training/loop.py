"""The training loop: draw, predict, weigh, update, average, log, save."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from jlt.assets.weights import weights_sha256
from jlt.config import TrainConfig
from jlt.data.loader import read_ahead
from jlt.data.order import SampleOrder
from jlt.data.store import LatentStore
from jlt.draws import derive_seed, normal_per_sample
from jlt.errors import JLTError
from jlt.files import lock_folder
from jlt.loss import denoising_loss
from jlt.networks.transformer import Transformer, build_network
from jlt.path import interpolate
from jlt.progress import say, track
from jlt.signals import Stopped, stop_on_signal
from jlt.training.checkpoint import Checkpoint, list_checkpoints, open_checkpoint, save_checkpoint
from jlt.training.draws import StepDraws, draw_step
from jlt.training.ema import EMA
from jlt.training.run import RunLog, prepare_run, require_same_run

DrawnBatch = tuple[StepDraws, Float[Tensor, "b c h w"], Int64[Tensor, "b"]]
"""The draws of a step, with the latents and labels that they ask for."""


@dataclass
class TrainState:
    """All that changes while training, and so all that a checkpoint holds."""

    network: Transformer
    optimizer: torch.optim.AdamW
    ema: EMA
    step: int
    draws_digest: str
    initial_weights: str
    seconds: float = 0.0
    """Time spent in training, over all sessions."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return every tensor to save, by file and name."""
        averages = {f"ema_{decay:g}": values for decay, values in self.ema.averages.items()}
        return {"network": _weights(self.network), "optimizer": self._moments(), **averages}

    def facts(self) -> dict[str, Any]:
        """Return what else a checkpoint holds, for `state.json`."""
        return {
            "draws": self.draws_digest,
            "initial_weights": self.initial_weights,
            "seconds": self.seconds,
            "device": next(self.network.parameters()).device.type,
        }

    def _moments(self) -> dict[str, Tensor]:
        return {
            f"{key}/{name}": value
            for name, parameter in self.network.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put a checkpoint's tensors in place."""
        self.network.load_state_dict(checkpoint.read("network.safetensors"))
        moments = checkpoint.read("optimizer.safetensors")
        for name, parameter in self.network.named_parameters():
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.optimizer.state[parameter] = {key: moments[f"{key}/{name}"].to(parameter.device) for key in keys}
        for decay in self.ema.averages:
            self.ema.load(decay, checkpoint.read(f"ema_{decay:g}.safetensors"))


def train(config: TrainConfig, store: LatentStore, run: Path, device: torch.device | str = "cpu") -> Path:
    """Train to `config.steps`, continuing from the newest checkpoint in `run`; return the last checkpoint's folder.

    Raises JLTError where the store does not fit the network, the folder holds another run or the loss is not finite,
    and Stopped after saving when the process was asked to end.
    """
    check_store(config, store)
    prepare_run(run, config, store.identity())
    with lock_folder(run):
        return _train(config, store, run, torch.device(device))


def _train(config: TrainConfig, store: LatentStore, run: Path, device: torch.device) -> Path:
    state = initial_state(config, device)
    complete = list_checkpoints(run)
    if complete:
        resume(state, open_checkpoint(complete[-1]), config, store.identity())
    if state.step >= config.steps:
        return complete[-1]
    log = RunLog(run, state.step)
    log.write("start", step=state.step, initial_weights=state.initial_weights, draws=state.draws_digest)
    with stop_on_signal() as stop, contextlib.closing(_read_batches(config, store, state)) as batches:
        for _ in track(_steps(config, batches, state, log), config.name, total=config.steps - state.step):
            if stop or state.step == config.steps or state.step % config.checkpoint_every == 0:
                folder = save_checkpoint(run, state.step, config, store.identity(), state.tensors(), state.facts())
            if stop and state.step < config.steps:
                raise Stopped(f"Stopped at step {state.step} of {config.steps}; {folder} is saved.")
    log.write("end", step=state.step, seconds=state.seconds, draws=state.draws_digest)
    return folder


def _read_batches(config: TrainConfig, store: LatentStore, state: TrainState) -> Generator[DrawnBatch, None, None]:
    """Yield the draws and latents of the remaining steps; while one is computed, a thread prepares the next."""
    order = SampleOrder(len(store), derive_seed(config.seed, "order"))
    draws = (draw_step(config, order, step, 0, config.batch_size) for step in range(state.step, config.steps))
    return read_ahead(store, draws, config.batch_size, next(state.network.parameters()).device)


def _steps(config: TrainConfig, batches: Iterable[DrawnBatch], state: TrainState, log: RunLog) -> Iterator[int]:
    """Yield after every update, logging each `log_every` steps."""
    forward: Callable[..., Tensor] = torch.compile(state.network) if config.compile else state.network
    losses: list[Tensor] = []
    last = time.perf_counter()
    begun = last - state.seconds
    for draws, latents, labels in batches:
        state.draws_digest = draws.digest(state.draws_digest)
        loss, grad_norm = update(config, state, forward, *prepare_batch(config, draws, latents, labels), draws.t)
        losses.append(loss)
        state.step += 1
        if state.step % config.log_every == 0 or state.step == config.steps:
            now = time.perf_counter()
            log.write(
                "step",
                step=state.step,
                loss=torch.stack(losses).mean().item(),
                learning_rate=learning_rate(config, state.step - 1),
                grad_norm=grad_norm,
                img_per_second=len(losses) * config.batch_size / (now - last),
            )
            losses, last = [], now
        state.seconds = time.perf_counter() - begun
        yield state.step


def prepare_batch(
    config: TrainConfig, draws: StepDraws, latents: Float[Tensor, "b c h w"], labels: Tensor
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"], Tensor]:
    """Return clean latents in float32, scaled noise and labels (the null class where dropped), where latents are."""
    x = latents.float()
    eps = config.noise_scale * normal_per_sample(draws.noise_seeds, x.shape[1:], x.device)
    labels = torch.where(draws.dropped, config.network.num_classes, labels)
    return x, eps, labels.to(x.device)


def update(
    config: TrainConfig,
    state: TrainState,
    forward: Callable[..., Tensor],
    x: Float[Tensor, "b c h w"],
    eps: Float[Tensor, "b c h w"],
    labels: Tensor,
    t: Float[Tensor, "b"],
) -> tuple[Tensor, float]:
    """Make one update and return the loss and the gradient norm before clipping; a non-finite one updates nothing."""
    sample = interpolate(x, eps, t.to(x.device))
    with torch.autocast(x.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        output = forward(sample.z, sample.t, labels)
    loss = denoising_loss(config.prediction, output.float(), sample, config.loss).mean()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(state.network.parameters(), config.optimizer.grad_clip).item()
    if not math.isfinite(grad_norm):
        raise JLTError(
            f"Step {state.step}: the loss is {loss.item():g} and the gradient norm {grad_norm:g}. Nothing was updated; "
            "lower the learning rate, or look for values in the latents that are not finite."
        )
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.ema.update()
    return loss.detach(), grad_norm


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of the update after `step` updates: linear warm-up, then constant."""
    return config.optimizer.learning_rate * min(1.0, (step + 1) / max(1, config.optimizer.warmup_steps))


def initial_state(config: TrainConfig, device: torch.device) -> TrainState:
    """Return the state before the first update: a function of the configuration alone."""
    network = build_network(config.network, derive_seed(config.seed, "weights")).to(device)
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    return TrainState(network, optimizer, EMA(network, config.ema), 0, "", weights_sha256(network.state_dict()))


def resume(state: TrainState, checkpoint: Checkpoint, config: TrainConfig, latents: Mapping[str, Any]) -> None:
    """Continue from a checkpoint of this very run; JLTError if it is of another one."""
    require_same_run(checkpoint, config, latents)
    stored = checkpoint.read_state()
    if stored["device"] != state.facts()["device"]:
        say(f"The run was on {stored['device']} so far: noise is a function of the kind of device, so it changes here.")
    if stored["initial_weights"] != state.initial_weights:
        say("The initial weights of this run come from another version of PyTorch; it continues from its checkpoint.")
    state.restore(checkpoint)
    state.step, state.draws_digest = checkpoint.step, stored["draws"]
    state.initial_weights, state.seconds = stored["initial_weights"], stored["seconds"]


def check_store(config: TrainConfig, store: LatentStore) -> None:
    """Raise a JLTError unless the run was made for latents of the store's shape, classes and orientations."""
    network, latents = config.network, store.shape
    if config.flips and not store.manifest.flips:
        raise JLTError(f"{store.folder} holds no mirrored latents: encode with flips, or train with --no-flips.")
    wanted = (network.channels, network.height, network.width, network.num_classes)
    found = (latents.channels, latents.height, latents.width, latents.num_classes)
    if wanted != found:
        raise JLTError(
            f"The network takes latents of {wanted[0]}x{wanted[1]}x{wanted[2]} with {wanted[3]} classes, "
            f"the store holds {found[0]}x{found[1]}x{found[2]} with {found[3]}."
        )


def _weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in network.state_dict().items()}
