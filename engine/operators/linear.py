"""The algebra of linear operators.

Operators carry the shapes of what they take (`domain`) and give (`range`), compose as mathematics writes it, and know
their adjoint::

    A = Sampling(mask, image) @ Fourier(coil_images, axes=(-2, -1)) @ CoilSensitivity(maps)
    A(x)            A x
    A.H(y)          A^H y
    A.gram          A^H A, in the fastest form that the operator has; solvers ask for nothing else
    2 * A + B       sums and multiples

Any number of batch axes may stand in front of the domain. Neutral elements vanish: `Identity @ A` is `A`, `1 * A` is `A`,
`A + Zero` is `A`.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Identity", "LinearOperator", "Zero", "adjoint_mismatch"]

Shape = tuple[int, ...]
Scalar = int | float | complex


class LinearOperator(abc.ABC):
    """A linear map from tensors of shape `domain` to tensors of shape `range`.

    A subclass calls `super().__init__(domain, range)` and writes `_forward` and `_backward`, each for tensors of any
    number of leading batch axes; it overrides `gram` where A^H A has a shorter form. Check it with `adjoint_mismatch`.
    """

    def __init__(self, domain: Sequence[int], range: Sequence[int]) -> None:  # noqa: A002 the word for it
        self._domain: Shape = tuple(domain)
        self._range: Shape = tuple(range)

    @property
    def domain(self) -> Shape:
        """Shape of the argument, without batch axes."""
        return self._domain

    @property
    def range(self) -> Shape:
        """Shape of the result, without batch axes."""
        return self._range

    @property
    def H(self) -> LinearOperator:  # noqa: N802 as in A^H
        """The adjoint: <A x, y> = <x, A.H y>."""
        return _Adjoint(self)

    @property
    def gram(self) -> LinearOperator:
        """A^H A, from `domain` to `domain`."""
        return self.H @ self

    @property
    def independent(self) -> tuple[int, ...]:
        """Axes of the domain, counted from the end, along which nothing depends on its neighbors: A acts on each by itself.

        Solvers of A x = b then treat what lies along them as so many problems of their own.
        """
        return ()

    def solve(
        self, right_side: Tensor, *, iterations: int, regularization: float, initial: Tensor | None = None
    ) -> Tensor | None:
        """Conjugate gradients for (A + regularization) x = right_side in one compiled call; None where there is none."""
        del right_side, iterations, regularization, initial
        return None

    def __call__(self, x: Tensor) -> Tensor:
        """A x; x has shape (*batch, *domain), the result (*batch, *range). Raises ValueError for any other shape."""
        self._check(x, self._domain, "argument", "domain")
        return self._forward(x)

    def __matmul__(self, other: LinearOperator) -> LinearOperator:
        """The product: first `other`, then this one. Raises ValueError where the shapes do not fit."""
        if not isinstance(other, LinearOperator):
            return NotImplemented
        if other.range != self.domain:
            raise ValueError(f"{self!r} @ {other!r}: the left takes {self.domain}, the right gives {other.range}")
        return _product(self, other)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        """The sum. Raises ValueError where the shapes differ."""
        if not isinstance(other, LinearOperator):
            return NotImplemented
        if (self.domain, self.range) != (other.domain, other.range):
            raise ValueError(f"{self!r} + {other!r}: domains and ranges must be equal")
        return _sum(self, other)

    def __mul__(self, factor: Scalar) -> LinearOperator:
        """The multiple by a number."""
        if not isinstance(factor, (int, float, complex)):
            return NotImplemented
        return _multiple(complex(factor), self)

    __rmul__ = __mul__

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._range} x {self._domain}>"

    @abc.abstractmethod
    def _forward(self, x: Tensor) -> Tensor:
        """A x, the shape being checked."""

    @abc.abstractmethod
    def _backward(self, y: Tensor) -> Tensor:
        """A^H y, the shape being checked."""

    def _check(self, x: Tensor, shape: Shape, what: str, where: str) -> None:
        # A tensor of too low a rank must not pass, so the tail is compared as a whole.
        if tuple(x.shape[max(x.ndim - len(shape), 0) :]) != shape:
            raise ValueError(f"{self!r}: {what} has shape {tuple(x.shape)}, its last axes must be the {where} {shape}")


class Identity(LinearOperator):
    """x to x."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__(shape, shape)

    @property
    def H(self) -> LinearOperator:  # noqa: N802
        """Itself."""
        return self

    @property
    def gram(self) -> LinearOperator:
        """Itself."""
        return self

    def _forward(self, x: Tensor) -> Tensor:
        return x

    def _backward(self, y: Tensor) -> Tensor:
        return y


class Zero(LinearOperator):
    """x to 0."""

    @property
    def H(self) -> LinearOperator:  # noqa: N802
        """The zero operator the other way."""
        return Zero(self.range, self.domain)

    def _forward(self, x: Tensor) -> Tensor:
        return x.new_zeros((*x.shape[: x.ndim - len(self.domain)], *self.range))

    def _backward(self, y: Tensor) -> Tensor:
        return y.new_zeros((*y.shape[: y.ndim - len(self.range)], *self.domain))


class _Adjoint(LinearOperator):
    """A^H of an operator that has no better form."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator.range, operator.domain)
        self._operator = operator

    @property
    def H(self) -> LinearOperator:  # noqa: N802
        return self._operator

    def __call__(self, x: Tensor) -> Tensor:
        self._operator._check(x, self.domain, "argument of the adjoint", "range")
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        return self._operator._backward(x)

    def _backward(self, y: Tensor) -> Tensor:
        return self._operator._forward(y)


class _Product(LinearOperator):
    """left @ right."""

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        super().__init__(right.domain, left.range)
        self._left, self._right = left, right

    @property
    def H(self) -> LinearOperator:  # noqa: N802
        return self._right.H @ self._left.H

    @property
    def gram(self) -> LinearOperator:
        # The left factor may have a short gram (masks, unitary transforms), which then serves the product too.
        return self._right.H @ self._left.gram @ self._right

    def _forward(self, x: Tensor) -> Tensor:
        return self._left._forward(self._right._forward(x))

    def _backward(self, y: Tensor) -> Tensor:
        return self._right._backward(self._left._backward(y))

    def __repr__(self) -> str:
        return f"({self._left!r} @ {self._right!r})"


class _Sum(LinearOperator):
    """left + right."""

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        super().__init__(left.domain, left.range)
        self._left, self._right = left, right

    @property
    def H(self) -> LinearOperator:  # noqa: N802
        return self._left.H + self._right.H

    def _forward(self, x: Tensor) -> Tensor:
        return self._left._forward(x) + self._right._forward(x)

    def _backward(self, y: Tensor) -> Tensor:
        return self._left._backward(y) + self._right._backward(y)

    def __repr__(self) -> str:
        return f"({self._left!r} + {self._right!r})"


class _Multiple(LinearOperator):
    """factor * operator."""

    def __init__(self, factor: complex, operator: LinearOperator) -> None:
        super().__init__(operator.domain, operator.range)
        self._factor, self._operator = factor, operator

    @property
    def H(self) -> LinearOperator:  # noqa: N802
        return self._operator.H * self._factor.conjugate()

    @property
    def gram(self) -> LinearOperator:
        return self._operator.gram * abs(self._factor) ** 2

    def _forward(self, x: Tensor) -> Tensor:
        return self._operator._forward(x) * _number(self._factor)

    def _backward(self, y: Tensor) -> Tensor:
        return self._operator._backward(y) * _number(self._factor.conjugate())

    def __repr__(self) -> str:
        return f"({_number(self._factor)} * {self._operator!r})"


def _number(factor: complex) -> Scalar:
    """A real number as such, so that real tensors stay real."""
    return factor.real if factor.imag == 0 else factor


def _product(left: LinearOperator, right: LinearOperator) -> LinearOperator:
    if isinstance(left, Zero) or isinstance(right, Zero):
        return Zero(right.domain, left.range)
    if isinstance(left, Identity):
        return right
    if isinstance(right, Identity):
        return left
    return _Product(left, right)


def _sum(left: LinearOperator, right: LinearOperator) -> LinearOperator:
    if isinstance(left, Zero):
        return right
    if isinstance(right, Zero):
        return left
    return _Sum(left, right)


def _multiple(factor: complex, operator: LinearOperator) -> LinearOperator:
    if factor == 0:
        return Zero(operator.domain, operator.range)
    if isinstance(operator, _Multiple):
        return _multiple(factor * operator._factor, operator._operator)
    if factor == 1 or isinstance(operator, Zero):
        return operator
    return _Multiple(factor, operator)


def adjoint_mismatch(
    operator: LinearOperator,
    *,
    dtype: torch.dtype = torch.complex64,
    device: torch.device | str = "cpu",
    batch: Sequence[int] = (),
    seed: int = 0,
) -> float:
    """How far `operator.H` is from the adjoint of `operator`: |<Ax, y> - <x, A^H y>| / (|Ax| |y|), for random x and y.

    A correct pair gives about 1e-7 in complex64 and 1e-16 in complex128. 0 where A x is 0 and so is A^H y.
    dtype: of x and y. batch: axes put in front of both. Raises ValueError where a result has the wrong shape.
    """
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn((*batch, *operator.domain), dtype=dtype, device=device, generator=generator)
    y = torch.randn((*batch, *operator.range), dtype=dtype, device=device, generator=generator)
    forward, backward = operator(x), operator.H(y)
    for name, result, like in (("A x", forward, y), ("A^H y", backward, x)):
        if result.shape != like.shape:
            raise ValueError(f"{operator!r}: {name} has shape {tuple(result.shape)}, promised is {tuple(like.shape)}")
    difference = abs(_inner(forward, y) - _inner(x, backward))
    size = _norm(forward) * _norm(y)
    return difference / size if size else difference


def _inner(x: Tensor, y: Tensor) -> complex:
    # Sums in double precision: the check must not add errors of its own.
    wide = torch.complex128
    return complex(torch.vdot(y.to(wide).flatten(), x.to(wide).flatten()).item())


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.to(torch.complex128)))
