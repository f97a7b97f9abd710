"""`scanside train`: a prior from a folder of images, or from simulated photoacoustic scenes, as weights with a model card."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from safetensors.torch import save as written_tensors
from scanside.adapters.files.png import write_png
from scanside.adapters.files.training_images import read_training_images
from scanside.adapters.process import tune_process
from scanside.engine.config import ConfigStore, SystemConfig, read_config, with_overrides
from scanside.engine.config_priors import StageConfig, TransformConfig
from scanside.engine.errors import ConfigError
from scanside.engine.priors.denoiser import Denoiser
from scanside.engine.priors.domains import network_domain, network_planes
from scanside.engine.priors.photoacoustic_training import PhotoacousticTrainer, simulate
from scanside.engine.priors.storage import ModelCard, load_weights, read_checkpoint, save_weights
from scanside.engine.priors.through_loop import LoopTrainer
from scanside.engine.priors.training import Trainer, validation_errors
from scanside.engine.samplers.photoacoustic import LEVEL, domain_of
from scanside.engine.simulation.photoacoustic_scenes import Recorded
from scanside.kernels.files import write_whole
from torch import Tensor

from .output import console, progress_bar

__all__ = ["TrainOptions", "run_training"]

_SIGMAS = (0.02, 0.05, 0.1)
"""Noise levels at which the model card tells the error."""
_SHARES = (0.2, 0.5, 1.0)
"""The same for domains other than the image, in standard deviations of the data."""
_WIDEST = 512
"""Planes for validation are no larger than this."""


class TrainOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to train, on what, and where to put it."""

    config: str
    data: Path | None = None
    """Folder of images; None for photoacoustics, whose scenes are simulated."""
    out: Path = Path("scanside-training")
    name: str = "prior"
    overrides: dict[str, str] = {}
    folders: Sequence[Path] = ()
    through_loop: bool = False
    stage: int = 1
    """Train the prior of this stage, from 1 on."""
    weights: str = ""
    """Weights to begin with; empty: new ones."""
    held_out: float = 0.08
    """Share of the images, the last ones, that is kept for validation."""
    save_every: int = 500
    threads: int = 0


class _Run:
    """One training in its folder: checkpoint, weights, card, pictures."""

    def __init__(self, options: TrainOptions, config: SystemConfig, images: Sequence[Any], where: Console) -> None:
        self.options, self.config, self.console = options, config, where
        kept = min(len(images) - 1, max(1, round(options.held_out * len(images)))) if options.held_out else 0
        self.images, self.validation = images[: len(images) - kept], images[len(images) - kept :]
        self.subjects = f"all but the last {kept} images"
        self.domain, self.count = TransformConfig(), len(self.images)
        if config.stages and config.kind == "mri" and not options.through_loop:
            self._take_to_domain(_stage(config, options.stage))
        self.trainer = self._trainer()
        self.checkpoint = options.out / "checkpoint.safetensors"
        if self.checkpoint.exists():
            self.trainer.restore(read_checkpoint(self.checkpoint))
            where.print(f"going on at step {self.trainer.done}")

    def _take_to_domain(self, stage: StageConfig) -> None:
        """Images as the network of the stage sees them; what is trained on and what is kept stay apart."""
        settings = self.config.training
        self.domain = network_domain(stage)
        self.count = min(self.count, settings.images or self.count)
        self.images = network_planes(self.images, stage, settings)
        self.validation = [_middle(plane) for plane in network_planes(self.validation[:4], stage, settings)]

    @property
    def levels(self) -> tuple[float, ...]:
        """Noise levels at which the model card tells the error."""
        if self.domain == TransformConfig():
            return _SIGMAS
        spread = self.trainer.denoiser.sigma_data
        return tuple(float(f"{share * spread:.2g}") for share in _SHARES)

    def _trainer(self) -> Trainer:
        config, settings = self.config, self.config.training
        torch.manual_seed(settings.seed)
        denoiser = load_weights(self.options.weights)[0] if self.options.weights else None
        if denoiser is None:
            spread = LEVEL if config.kind == "pat" else _spread(self.images)
            denoiser = Denoiser.of_size(config.network, precondition=settings.precondition, sigma_data=spread)
        denoiser.train().requires_grad_(requires_grad=True)
        if config.kind == "pat":
            return PhotoacousticTrainer(denoiser, self.images, settings, config.stages, config.sampler)
        if self.options.through_loop:
            return LoopTrainer(denoiser, self.images, settings, config.stages, config.sampler)
        return Trainer(denoiser, self.images, settings, slopes=self.domain == TransformConfig())

    def go(self, progress: Progress, task: TaskID) -> None:
        """Train to the last step; what was reached is kept however this ends."""
        trainer, steps, losses = self.trainer, self.config.training.steps, list[float]()
        begun, first = time.monotonic(), trainer.done
        try:
            while trainer.done < steps:
                losses.append(trainer.step())
                rate = (trainer.done - first) / (time.monotonic() - begun)
                recent = statistics.fmean(losses[-100:])
                progress.update(task, completed=trainer.done, description=f"loss {recent:.3f}, {rate:.1f} steps/s")
                if trainer.done % self.options.save_every == 0 and trainer.done < steps:
                    self.save()
                    self.console.print(f"step {trainer.done}: loss {recent:.4f}, {rate:.2f} steps/s")
        finally:
            self.save()

    def save(self) -> ModelCard:
        """Write checkpoint, averaged weights with their card, and a picture."""
        write_whole(self.checkpoint, written_tensors(self.trainer.state()))
        averaged = self.trainer.averaged()
        card = save_weights(self.options.out / f"{self.options.name}.safetensors", averaged, self._card(averaged))
        if self.config.kind == "mri" and self.validation and self.validation[0].shape[0] == 2:
            self._picture(averaged)
        return card

    def _card(self, averaged: Denoiser) -> ModelCard:
        settings, some = self.config.training, self.validation[:4]
        metrics = {}
        if some and self.config.kind == "mri":
            found = {
                sigma: [validation_errors(averaged, image[None], (sigma,))[sigma] for image in some]
                for sigma in self.levels
            }
            metrics = {f"rmse_over_sigma_{sigma:g}": round(statistics.fmean(v), 4) for sigma, v in found.items()}
        return ModelCard(
            name=self.options.name,
            description=self.config.description,
            network=averaged.network.config,  # type: ignore[arg-type]
            precondition=averaged.precondition,
            sigma_data=averaged.sigma_data,
            sigma=settings.sigma,
            transform=domain_of(self.config.stages) if self.config.kind == "pat" else _described(self.domain),
            data=self.options.data.name if self.options.data else "simulated scenes: vessels, discs, tissue",
            subjects=self.subjects,
            images=self.count,
            steps=self.trainer.done,
            batch=settings.batch,
            seed=settings.seed,
            loss=settings.loss,
            through_loop=self.options.through_loop or self.config.kind == "pat",
            metrics=metrics,
        )

    def _picture(self, averaged: Denoiser) -> None:
        """Clean, noisy and denoised, side by side."""
        clean, level = self.validation[0].float(), self.levels[-1]
        generator = torch.Generator().manual_seed(0)
        noisy = clean + level * torch.randn(clean.shape, generator=generator)
        with torch.no_grad():
            found = averaged(noisy[None], torch.tensor([level]))[0]
        shown = [np.hypot(*image.numpy()) for image in (clean, noisy, found)]
        write_png(self.options.out / "sample.png", np.concatenate(shown, axis=1), (0.0, float(shown[0].max())))


def _stage(config: SystemConfig, number: int) -> StageConfig:
    if not 1 <= number <= len(config.stages):
        raise ConfigError(f"--stage {number}: {config.name} has stages 1 to {len(config.stages)}")
    return config.stages[number - 1]


def _middle(plane: Tensor) -> Tensor:
    top, left = (max(0, size - _WIDEST) // 2 for size in plane.shape[-2:])
    return plane[:, top : top + _WIDEST, left : left + _WIDEST]


def _described(domain: TransformConfig) -> str:
    """What is not as in a plain image, in one line."""
    plain = msgspec.to_builtins(TransformConfig())
    changed = {key: value for key, value in msgspec.to_builtins(domain).items() if value != plain[key]}
    return ", ".join(f"{key} {value}" for key, value in changed.items()) or "image"


def _spread(images: Sequence[Tensor]) -> float:
    mean = statistics.fmean(float(image.float().square().mean()) for image in images[:200])
    return round(math.sqrt(mean), 4)


def _scenes(config: SystemConfig, where: Console) -> list[Recorded]:
    """Simulated scenes; takes about 50 ms each."""
    count, domain = config.training.scenes, domain_of(config.stages)
    with progress_bar(where, "scenes") as progress:
        made = simulate(count, config.training.seed, domain, flawed=config.training.flawed)
        return list(progress.track(made, total=count, description=f"simulating {config.name}"))


def _config(options: TrainOptions) -> SystemConfig:
    path = Path(options.config)
    if options.config.endswith(".toml"):
        config = read_config(path.read_text("utf-8"), name=f"{path.parent.name}/{path.stem}", source=str(path))
    else:
        config = ConfigStore(options.folders).get(options.config)
    if options.through_loop and not config.stages:
        raise ConfigError(f"{options.config} has no [[stages]], so there is no loop to train through")
    return with_overrides(config, options.overrides, source="-P")


def run_training(options: TrainOptions) -> int:
    """Train a prior; returns the exit code. Goes on where a checkpoint in the output folder ends.

    Raises ConfigError for a wrong configuration, images that do not fit it, or a damaged checkpoint.
    """
    tune_process()
    config, where = _config(options), console(stderr=True)
    if options.threads:
        torch.set_num_threads(options.threads)
    if config.kind == "pat":
        if options.data is not None:
            raise ConfigError(
                f"{config.name} trains on simulated scenes; leave --data out, and say how many: -P training.scenes=800"
            )
        if not config.stages:
            raise ConfigError(
                f"{config.name} has no [[stages]], so there is no prior to train; one that has: pat/online"
            )
        images: Sequence[Any] = _scenes(config, where)
    elif options.data is None:
        raise ConfigError(f"{config.name} trains on images; give their folder with --data")
    else:
        images = read_training_images(options.data, lambda line: where.print(line, markup=False))
    options.out.mkdir(parents=True, exist_ok=True)
    run = _Run(options, config, images, where)
    where.print(f"{len(run.images)} images to train on, {len(run.validation)} kept for validation")
    with progress_bar(where, "steps") as progress:
        run.go(progress, progress.add_task(config.name, total=config.training.steps, completed=run.trainer.done))
    console().print(f"{options.out / options.name}.safetensors: {run.trainer.done} steps", markup=False)
    return 0
