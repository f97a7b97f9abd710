"""A^H A, A and A^H of packed maps as operators of torch: shapes for its compiler, and for gradients each other's adjoint.

`Lines` and `Planes` of `sense` call `run`; where gradients are recorded, the operator by the same name in `OPERATORS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from . import native

__all__ = ["OPERATORS", "plain", "run"]

Operator = Callable[[Tensor, Tensor, Tensor, int, list[int]], Tensor]
_A, _N, _I, _F = native.ADDRESS, native.LENGTH, native.INTEGER, native.FLOAT
_SIZES = [*[_N] * 5, _I]
_LINES = {
    "gram": native.Function("scs_lines_gram", _A, _A, _A, _A, _F, _A, *_SIZES),
    "forward": native.Function("scs_lines_forward", _A, _A, _A, _A, *_SIZES),
    "adjoint": native.Function("scs_lines_adjoint", _A, _A, _A, _A, *_SIZES),
}
_PLANES = {
    "gram": native.Function("scs_planes_gram", _A, _A, _N, _A, _A, _F, _A, *_SIZES),
    "forward": native.Function("scs_planes_forward", _A, _A, _N, _A, _A, *_SIZES),
    "adjoint": native.Function("scs_planes_adjoint", _A, _A, _N, _A, _A, *_SIZES),
}


def run(
    name: str,
    packed: Tensor,
    weights: Tensor,
    given: Tensor,
    coils: int,
    sizes: list[int],
    step: tuple[Tensor, float] | None = None,
) -> Tensor:
    """What the operator `name` gives, such as "lines_gram".

    packed, weights: as `Lines` or `Planes` made them. given: an image (*batch, z, y, x), or k-space (*batch, coil, z, y, x).
    sizes: (outer, n, inner) of lines, (z, y, x) of planes. step: with A^H y, (z, y, x), and share, a gram becomes
    x + share (A^H y - gram x).
    """
    form, _, kind = name.partition("_")
    given = plain(given)
    result = given.new_empty(_shape(kind, given, coils))
    weighted = [weights.data_ptr()] if form == "lines" else [weights.data_ptr(), len(weights)]
    of_data, share = step or (None, 0.0)
    stepping = [0 if of_data is None else of_data.data_ptr(), share] if kind == "gram" else []
    function = (_LINES if form == "lines" else _PLANES)[kind]
    batch = min(given.numel(), result.numel()) // max(1, math.prod(sizes))
    addresses = [packed.data_ptr(), *weighted, given.data_ptr(), *stepping, result.data_ptr()]
    function(*addresses, batch, coils, *sizes, native.threads())
    return result


def plain(x: Tensor) -> Tensor:
    """Contiguous, without lazy conjugation."""
    return x.resolve_conj().resolve_neg().contiguous()


def _shape(kind: str, given: Tensor, coils: int) -> tuple[int, ...]:
    if kind == "gram":
        return tuple(given.shape)
    ahead = given.shape[:-3] if kind == "forward" else given.shape[:-4]
    return (*ahead, *([coils] if kind == "forward" else []), *given.shape[-3:])


def _operator(name: str) -> Operator:
    """The operator scanside::name, which torch differentiates with respect to `given`."""
    form, _, kind = name.partition("_")
    of_adjoint = f"{form}_{ {'gram': 'gram', 'forward': 'adjoint', 'adjoint': 'forward'}[kind] }"

    def operator(packed: Tensor, weights: Tensor, given: Tensor, coils: int, sizes: list[int]) -> Tensor:
        return run(name, packed, weights, given, coils, sizes)

    def fake(packed: Tensor, weights: Tensor, given: Tensor, coils: int, sizes: list[int]) -> Tensor:  # noqa: ARG001
        return given.new_empty(_shape(kind, given, coils))

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401, ARG001 - as torch calls it
        packed, weights, _, *ctx.rest = inputs
        ctx.save_for_backward(packed, weights)

    def backward(ctx: Any, up: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        packed, weights = ctx.saved_tensors
        coils, sizes = ctx.rest
        return None, None, OPERATORS[of_adjoint](packed, weights, up, coils, sizes), None, None

    made = torch.library.custom_op(f"scanside::{name}", operator, mutates_args=())
    made.register_fake(fake)
    made.register_autograd(backward, setup_context=keep)
    return cast("Operator", made)


OPERATORS: dict[str, Operator] = {
    f"{form}_{kind}": _operator(f"{form}_{kind}") for form in ("lines", "planes") for kind in _LINES
}
"""By name."""
