"""A denoiser in a given precision, as a torch module and as an ONNX file.

TensorRT 11 has no precision flags: a network is computed in the types that its ONNX file names. So the network inside a
denoiser is cast, weights and all, before it is exported; input, output and the scaling by sigma stay float32.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .base import Precision, Shape, failing_as, parse_precision, quietly
from .fingerprint import function_digest, package_version

__all__ = ["INPUTS", "OPSETS", "OUTPUT", "at_precision", "example", "export_key", "to_onnx"]

INPUTS = ("x", "sigma")
OUTPUT = "out"
OPSETS: dict[Precision, int] = {"float32": 18, "bfloat16": 22, "float16": 18}
"""The oldest that have all we need: ONNX knows convolutions of bfloat16 since 22. TensorRT 11 reads up to 25."""


class _Cast(nn.Module):
    """A network computed in `dtype`, float32 at both ends."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network.to(dtype), dtype

    def forward(self, planes: Tensor) -> Tensor:
        out: Tensor = self.network(planes.to(self.dtype))
        return out.float()


def at_precision(model: nn.Module, precision: Precision, *, device: str = "cpu") -> nn.Module:
    """A copy of a denoiser for inference, its submodule `network` computed in `precision`, all else in float32.

    Raises ValueError where there is no such submodule and another precision than float32 is asked for.
    """
    made = copy.deepcopy(model).to(device=device, dtype=torch.float32).eval().requires_grad_(requires_grad=False)
    if precision == "float32":
        return made
    network = getattr(made, "network", None)
    if not isinstance(network, nn.Module):
        raise ValueError(f"{type(model).__name__} has no submodule `network` that could be computed in {precision}")
    made.network = _Cast(network, parse_precision(precision))
    return made


def example(shape: Shape, *, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Images and noise levels of a shape: any that are finite."""
    return torch.ones(shape.sizes, device=device), torch.full((shape.batch,), 0.5, device=device)


def export_key(model: nn.Module, shape: Shape, precision: Precision) -> dict[str, str]:
    """What an exported file depends on."""
    versions = {name: package_version(name) for name in ("torch", "onnx", "onnxscript", "scanside")}
    return {
        "function": function_digest(model),
        "shape": str(shape),
        "precision": precision,
        "opset": str(OPSETS[precision]),
    } | versions


def to_onnx(model: nn.Module, shape: Shape, precision: Precision) -> bytes:
    """An ONNX file of a denoiser of one shape: inputs `x` and `sigma`, output `out`, weights inside.

    Raises `RuntimeFailed` where torch cannot export it or the checker of ONNX finds fault with it.
    """
    with failing_as("export to ONNX"), quietly():
        import onnx

        program = torch.onnx.export(
            at_precision(model, precision),
            example(shape),
            dynamo=True,
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            opset_version=OPSETS[precision],
            optimize=True,
            verbose=False,
        )
        if program is None:
            raise RuntimeError("the exporter gave nothing")
        proto = program.model_proto
        onnx.checker.check_model(proto, full_check=True)
        return bytes(proto.SerializeToString())
