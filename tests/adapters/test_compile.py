"""`scanside compile` on a real configuration with real weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scanside.adapters.cli import app
from scanside.engine.config_priors import NetworkConfig
from scanside.engine.priors.denoiser import Denoiser
from scanside.engine.priors.storage import ModelCard, save_weights
from typer.testing import CliRunner, Result


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = NetworkConfig(widths=(8, 16), blocks=1)
    denoiser = Denoiser.of_size(config)
    for weight in denoiser.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_weights(path, denoiser, ModelCard(name="small", network=config))
    return path


@pytest.fixture
def site(weights: Path, tmp_path: Path) -> Path:
    """A folder with a configuration that uses the weights, in two stages."""
    (tmp_path / "mri").mkdir()
    (tmp_path / "mri" / "mine.toml").write_text(
        f'description = "Mine"\n[[stages]]\nprior.weights = "{weights}"\n[[stages]]\nprior.weights = "{weights}"\n'
    )
    return tmp_path


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["compile", *(str(word) for word in words)])


def test_each_network_and_size_is_compiled_once_and_kept(site: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    words = ["mri/mine", "--configs", site, "--cache", cache, "--matrix", "16x24", "--matrix", "16"]
    result = run(*words)
    assert result.exit_code == 0, result.output
    heads = [line for line in result.stdout.splitlines() if "images" in line]
    assert [line.partition("images ")[2] for line in heads] == ["1 x 2 x 16 x 24", "1 x 2 x 16 x 16"]
    chosen = [line for line in result.stdout.splitlines() if " chosen " in line]
    assert len(chosen) == 2
    assert result.stdout.splitlines()[-1] == f"kept in {cache}"
    kept = sorted(cache.iterdir())
    assert kept
    again = run(*words)
    assert again.exit_code == 0, again.output
    assert sorted(cache.iterdir()) == kept
    compiled = [line for line in again.stdout.splitlines() if line.startswith(("openvino", "onnxruntime"))]
    assert all("from the cache" in line for line in compiled if "unavailable" not in line)


def test_weights_alone_and_a_runtime_by_name(weights: Path, tmp_path: Path) -> None:
    result = run(
        weights,
        "--cache",
        tmp_path / "cache",
        "--matrix",
        "16",
        "-P",
        "runtime.runtime=torch",
        "-P",
        "runtime.device=cpu",
    )
    assert result.exit_code == 0, result.output
    (chosen,) = [line for line in result.stdout.splitlines() if " chosen " in line]
    assert chosen.split()[:3] == ["torch", "float32", "chosen"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mri/sense"], "configuration mri/sense uses no network"),
        (["mri/nothing"], "unknown configuration 'mri/nothing'"),
        (["missing.safetensors"], "missing.safetensors"),
        (["mri/sense", "--matrix", "256x"], "--matrix '256x': expected HEIGHTxWIDTH"),
        (["mri/sense", "--matrix", "99999x2"], "sizes from 1 to 4096"),
        (["mri/sense", "-P", "runtime.runtime=cuda"], "runtime.runtime = 'cuda': allowed: auto"),
    ],
)
def test_what_cannot_be_compiled_is_said(words: list[str], said: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_damaged_file_is_mentioned(weights: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    words = [weights, "--cache", tmp_path / "cache", "--matrix", "16", "-P", "runtime.runtime=onnxruntime"]
    assert run(*words, "-P", "runtime.device=cpu").exit_code == 0
    (kept,) = (tmp_path / "cache").glob("onnx-*")
    kept.write_bytes(b"damaged")
    result = run(*words, "-P", "runtime.device=cpu")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("damaged; it will be made anew") == 1
