"""Weights on disk: a safetensors file and, beside it, a model card (JSON) that says what they are and what they came from.

Weights that ship with the package are named by a word, `mri_online`; others by the path of their file. The card holds the
SHA-256 of the weights, and weights that do not match their card are refused.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as written_tensors
from torch import Tensor

from ...kernels.files import write_whole
from ..config_priors import NetworkConfig, Precondition
from ..errors import ConfigError
from . import weights
from .denoiser import Denoiser

__all__ = ["ModelCard", "load_weights", "read_checkpoint", "save_weights", "shipped_weights"]

STORAGE = torch.float16
"""Weights are stored in half precision; they are of the order of 0.1."""


class ModelCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a set of weights is, and what it came from."""

    name: str
    description: str = ""
    network: NetworkConfig = NetworkConfig()
    precondition: Precondition = "homogeneous"
    sigma_data: float = 0.15
    parameters: int = 0
    sigma: tuple[float, float] = (0.002, 1.0)
    """Least and greatest noise level of training, for images of greatest magnitude 1."""
    transform: str = "identity"
    """Domain that the network was trained in."""
    data: str = ""
    """What was trained on, in words."""
    subjects: str = ""
    images: int = 0
    steps: int = 0
    batch: int = 0
    seed: int = 0
    loss: str = ""
    through_loop: bool = False
    """Whether the weights were trained further through the reconstruction loop."""
    metrics: dict[str, float] = {}
    """Measured on images that were not trained on."""
    sha256: str = ""
    """Of the safetensors file."""


def save_weights(path: Path, denoiser: Denoiser, card: ModelCard) -> ModelCard:
    """Write weights to `path` (.safetensors) and their card beside it (.json); returns the card with its SHA-256."""
    tensors = {name: p.detach().to(STORAGE).contiguous() for name, p in denoiser.named_parameters()}
    data = written_tensors(tensors)
    card = msgspec.structs.replace(
        card, sha256=hashlib.sha256(data).hexdigest(), parameters=sum(t.numel() for t in tensors.values())
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data)
    write_whole(path.with_suffix(".json"), msgspec.json.format(msgspec.json.encode(card), indent=2) + b"\n")
    return card


def shipped_weights() -> list[str]:
    """Names of the weights that come with the package."""
    files = resources.files(weights).iterdir()
    return sorted(item.name.removesuffix(".safetensors") for item in files if item.name.endswith(".safetensors"))


def load_weights(name: str) -> tuple[Denoiser, ModelCard]:
    """A denoiser ready for use, in float32, and its card.

    name: of shipped weights, or the path of a safetensors file. Raises `ConfigError` where there is none of that name, where
    the card is missing or does not match the weights.
    """
    stored, described = _files(name)
    try:
        data, card = stored.read_bytes(), msgspec.json.decode(described.read_bytes(), type=ModelCard)
    except OSError as error:
        raise ConfigError(f"weights {name}: {error}; shipped are: {', '.join(shipped_weights()) or 'none'}") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"model card of the weights {name}: {error}") from None
    found = hashlib.sha256(data).hexdigest()
    if found != card.sha256:
        raise ConfigError(f"weights {name}: SHA-256 is {found}, the model card says {card.sha256 or 'nothing'}")
    return _filled(data, card, name), card


def _files(name: str) -> tuple[Traversable, Traversable]:
    if name.endswith(".safetensors"):
        path = Path(name)
        return path, path.with_suffix(".json")
    folder = resources.files(weights)
    if name not in shipped_weights():
        raise ConfigError(f"unknown weights {name[:80]!r}; shipped are: {', '.join(shipped_weights()) or 'none'}")
    return folder.joinpath(f"{name}.safetensors"), folder.joinpath(f"{name}.json")


def _filled(data: bytes, card: ModelCard, name: str) -> Denoiser:
    denoiser = Denoiser.of_size(card.network, precondition=card.precondition, sigma_data=card.sigma_data)
    try:
        denoiser.load_state_dict({key: value.float() for key, value in read_tensors(data).items()})
    except (SafetensorError, RuntimeError) as error:
        raise ConfigError(f"weights {name} do not fit the network of their card: {str(error)[:300]}") from None
    return denoiser.eval().requires_grad_(requires_grad=False)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint of training. Raises `ConfigError` where it is damaged."""
    try:
        return read_tensors(path.read_bytes())
    except SafetensorError as error:
        raise ConfigError(f"{path}: not a checkpoint: {error}; delete it to start anew") from None
