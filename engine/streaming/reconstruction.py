"""From a closed Cartesian frame to an image: which plain reconstruction fits what was measured, and what it needs."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
import torch

from ...kernels import streaming
from ..baselines.combine import root_sum_of_squares, zero_filled
from ..baselines.compressed_sensing import total_variation
from ..baselines.grappa import Grappa
from ..baselines.l1 import l1_espirit
from ..baselines.sake import sake
from ..baselines.sense import UniformSense, cg_sense
from ..config import SystemConfig
from ..errors import EngineError, NoImage
from ..messages import FrameKey
from ..operators.cartesian import CartesianSense
from ..preparation.coil_maps import espirit
from ..preparation.compression import coil_compression
from ..preparation.filters import resize_image
from ..preparation.partial_fourier import SampledRange, homodyne, pocs
from ..samplers.consistency import Measurement
from .frames import CartesianFrame
from .generative import PriorFrames
from .lanes import CartesianLane, ClosedFrame
from .results import Reconstruction, StageClock
from .sampling import Sampling, central_block

__all__ = ["CartesianReconstructor"]

Lattice = tuple[tuple[int, int], tuple[int, int]]

HEAVY = frozenset({"cg_sense", "l1_espirit", "total_variation", "grappa", "sake", "prior"})
NEEDS_MAPS = frozenset({"sense", "cg_sense", "l1_espirit", "total_variation"})
POCS_ITERATIONS = 2
"""More follow the low-resolution phase further than anatomy does: 0.064 NRMSE after 2, 0.082 after 10, 0.078 zero-filled
(SIAT brains, 5/8 of the rows)."""
UNIFORM_WEIGHT = 1e-3
"""Weight of the closed form, relative to the sensitivities' sum of squares of one: only keeps it finite where nothing is."""


class CartesianReconstructor:
    """Reconstructs the frames of one encoding space; keeps coil maps, GRAPPA weights and solvers per slice."""

    def __init__(self, config: SystemConfig, lane: CartesianLane) -> None:
        self.config = config
        self.lane = lane
        self.layout = layout = lane.layout
        self._axes = (-2,) if layout.depth == 1 else (-3, -2)
        space = layout.encoding
        self._same_grid = space.recon_matrix == (layout.width, layout.height, layout.depth) and all(
            abs(a - b) < 1e-3 * b
            for a, b in zip((layout.width_fov_mm, *space.encoded_fov_mm[1:]), space.recon_fov_mm, strict=True)
        )
        self._known_sampling: Sampling | None = None
        announced = layout.announced()
        self._undersampled = not announced.any() or any(Sampling.of(announced, layout).partial)
        self._maps: dict[int, torch.Tensor] = {}
        self._uniform: dict[int, tuple[Lattice, UniformSense]] = {}
        self._grappa: dict[int, tuple[tuple[int, int], Grappa]] = {}
        matrix = (layout.depth, layout.height, layout.width)
        self._prior: PriorFrames | None = None
        if config.reconstruction.method == "prior":
            self._prior = PriorFrames(config, matrix, lane.coils, needed=self._undersampled)

    @property
    def heavy(self) -> bool:
        """Whether a frame is work enough for several processor threads."""
        method = self.config.reconstruction.method
        return method in HEAVY and (method != "prior" or self._undersampled)

    def look_ahead(self, key: FrameKey) -> None:
        """Estimate the coil maps of a slice as soon as its calibration lines are in, while the scan goes on."""
        wanted = (self._wants_maps and key.slice not in self._maps) or self._wants_compression
        if not wanted:
            return
        held = self.lane.calibration_of(key)
        frame = self.lane.opened.get(key) if held is None else held[1]
        if frame is None:
            return
        size = min(self._lines, self.layout.height)
        first = self.layout.height // 2 - size // 2
        block = central_block(frame.counts >= self.layout.averages, size)
        # only exactly the central lines: which lines the maps come from must not depend on how the data was cut
        if block is not None and block[1] == slice(first, first + size):
            self._compress(frame.averaged()[:, block[0], block[1]])
            if self._wants_maps:
                self._maps[key.slice] = self._estimate(frame, block)
                self._prepare_solver(key)

    @property
    def _wants_compression(self) -> bool:
        wanted = self.config.preparation.compressed_channels
        return 0 < wanted < self.lane.coils and self.lane.compression is None

    def _compress(self, block: torch.Tensor) -> None:
        """Learn the virtual coils from fully measured lines around the center, if that is wanted and not done."""
        if self._wants_compression:
            self.lane.compress(coil_compression(block, self.config.preparation.compressed_channels))

    def _prepare_solver(self, key: FrameKey) -> None:
        """Make the closed-form solver for the lattice that the lines so far lie on; the last line then finds it ready."""
        frame = self.lane.opened.get(key)
        if frame is None or self.config.reconstruction.method not in ("auto", "sense", "prior"):
            return
        found = Sampling.of(frame.mask, self.layout).lattice
        if found is not None and found != ((1, 0), (1, 0)):
            self._solver(self._maps[key.slice], found, key.slice)

    def reconstruct(self, closed: ClosedFrame) -> Reconstruction:
        """Image of a closed frame. Data that is not finite is taken out once, and the image says so."""
        for result in self.estimates(closed):
            last = result
        return last

    def estimates(self, closed: ClosedFrame) -> Iterator[Reconstruction]:
        """Previews of the image of a closed frame, where its method has any, then the image."""
        frame = self._frame(closed)
        failure: Exception | None = None
        try:
            for result in self._attempts(closed, frame, ""):
                if result.preview or result.finite:
                    yield result
            if result.finite:
                return
        except (RuntimeError, ValueError) as error:  # decompositions refuse what is not finite
            failure = error
        dropped = sum(source.drop_non_finite() for source in self._sources(frame, closed.key))
        if failure is not None and not dropped:
            raise failure
        self._forget(closed.key.slice)
        if not frame.mask.any():
            raise NoImage("the data held no finite values")
        try:
            yield from self._attempts(closed, frame, "not_finite")
        finally:
            self._forget(closed.key.slice)  # the next frame may have better data

    def original(self, closed: ClosedFrame) -> Reconstruction:
        """The counterpart without a prior: of a generative image the plain one, of others the zero-filled one."""
        if self._prior is None:
            return self.fallback(closed)
        for result in self._attempts(closed, self._frame(closed), "", plain=True):
            last = result
        return last

    def fallback(self, closed: ClosedFrame) -> Reconstruction:
        """The zero-filled image, for when nothing better can be had."""
        frame, clock = self._frame(closed), StageClock()
        frame.drop_non_finite()
        sampling = Sampling.of(frame.mask, self.layout)
        image = self._zero_filled(frame)
        return self._result(image, "zero_filled", sampling, frame, clock, "fallback")

    def _sampling(self, mask: np.ndarray) -> Sampling:
        """Analysis of a mask; the one of the last frame serves again where, as nearly always, the mask is the same."""
        if self._known_sampling is None or not np.array_equal(self._known_sampling.mask, mask):
            self._known_sampling = Sampling.of(mask, self.layout)
        return self._known_sampling

    @property
    def _lines(self) -> int:
        return self.config.coil_maps.calibration_lines

    @staticmethod
    def _frame(closed: ClosedFrame) -> CartesianFrame:
        if not isinstance(closed.frame, CartesianFrame):
            raise TypeError(f"a Cartesian reconstruction got a {type(closed.frame).__name__}")
        return closed.frame

    def _attempts(
        self, closed: ClosedFrame, frame: CartesianFrame, reason: str, *, plain: bool = False
    ) -> Iterator[Reconstruction]:
        clock, key = StageClock(), closed.key
        if self._wants_compression:
            block = self._calibration_block(frame, key)
            if block is not None:
                self._compress(block)
        if self.lane.compression is not None and frame.coils != self.lane.coils:
            frame.compress(self.lane.compression.matrix)
        sampling = self._sampling(frame.mask)
        method = self._choose(sampling)
        generative = self._prior is not None and not plain and not sampling.full and method in NEEDS_MAPS
        if method in NEEDS_MAPS:
            with clock.stage("coil_maps"):
                found = self._ensure_maps(frame, key)
            if not found:
                method, reason = "zero_filled", reason or "no_calibration"
        if method == "grappa" and self._calibration_block(frame, key) is None:
            method, reason = "zero_filled", reason or "no_calibration"
        with clock.stage("reconstruction"):
            image = self._solve(method, frame, sampling, key)
        if generative and method in NEEDS_MAPS:
            yield from self._generated(image, frame, sampling, closed, clock, reason)
            return
        with clock.stage("finish"):
            if image.is_complex():
                image = self._resized(self._filled(image, sampling))
        yield self._net(self._result(image, self._named(method, sampling), sampling, frame, clock, reason), frame, key)

    def _net(self, result: Reconstruction, frame: CartesianFrame, key: FrameKey) -> Reconstruction:
        """The result with the net acceleration that embedded calibration lines leave."""
        extra = self._embedded(key)
        if extra is None:
            return result
        lines = int((frame.mask | extra.mask).sum())
        return msgspec.structs.replace(result, acceleration=frame.mask.size / lines)

    def _generated(
        self,
        plain: torch.Tensor,
        frame: CartesianFrame,
        sampling: Sampling,
        closed: ClosedFrame,
        clock: StageClock,
        reason: str,
    ) -> Iterator[Reconstruction]:
        """Estimates of the prior's loop that begins at the plain image; the plain image itself where the prior cannot run."""
        key, prior = closed.key, self._prior
        if prior is None:
            raise EngineError("a generative image without a prior")
        data, mask = self._all_lines(frame, key)
        lattice = sampling.lattice if int(mask.sum()) == sampling.lattice_lines else None
        measured = Measurement(
            data=data,
            mask=torch.from_numpy(mask)[..., None],
            maps=self._maps[key.slice],
            axes=self._axes,
            noise=0.0 if self.lane.transform.matrix is None else self.layout.averages**-0.5,
            lattice=None if lattice is None else ((lattice[1][0], lattice[0][0]), (lattice[1][1], lattice[0][1])),
        )
        for found in prior.run(measured, plain, where=key.slice, received=frame.received, clock=clock):
            with clock.stage("finish"):
                image = self._resized(found.image)
                spread = found.deviation
                deviation = None if spread is None else self._resized(spread.to(torch.complex64)).abs()
            method = found.method or self._choose(sampling)
            result = self._result(image, method, sampling, frame, clock, reason or found.reason)
            result = msgspec.structs.replace(
                result, provenance=found.provenance, deviation=deviation, preview=found.preview
            )
            yield self._net(result, frame, key)

    def _result(
        self,
        image: torch.Tensor,
        method: str,
        sampling: Sampling,
        frame: CartesianFrame,
        clock: StageClock,
        reason: str,
    ) -> Reconstruction:
        return Reconstruction(
            image=image,
            method=method,
            reason=reason,
            missing=sampling.missing,
            duplicates=frame.duplicates,
            outside=frame.outside,
            acceleration=sampling.acceleration,
            stages=clock.stages,
        )

    def _choose(self, sampling: Sampling) -> str:
        method = self.config.reconstruction.method
        if method not in ("auto", "prior"):
            if method == "grappa" and sampling.full:
                return "zero_filled"
            regular = sampling.lattice is not None or sampling.full
            return method if regular or method not in ("sense", "grappa") else "cg_sense"
        if sampling.full:
            return "sense" if any(sampling.partial) or self.layout.asymmetric else "zero_filled"
        if sampling.lattice is not None:
            return "sense"
        # a full scan that lost some lines looks most like its neighbors when they are left at zero
        announced = self.layout.announced()
        lost_few = bool(announced.any()) and 2 * sampling.missing < int(announced.sum())
        return "zero_filled" if lost_few else "cg_sense"

    def _named(self, method: str, sampling: Sampling) -> str:
        return "root_sum_of_squares" if method == "zero_filled" and sampling.full else method

    def _solve(self, method: str, frame: CartesianFrame, sampling: Sampling, key: FrameKey) -> torch.Tensor:
        settings = self.config.reconstruction
        if method == "zero_filled":
            return self._zero_filled(frame)
        if method == "grappa":
            return self._solve_grappa(frame, sampling, key)
        if method == "sake":
            return self._solve_sake(frame, key)
        maps = self._maps[key.slice]
        if method == "sense":
            solver = self._solver(maps, sampling.lattice or ((1, 0), (1, 0)), key.slice)
            return solver.solve(frame.averaged())
        data, mask = self._all_lines(frame, key)
        operator = CartesianSense(maps, torch.from_numpy(mask)[..., None], self._axes)
        if method == "l1_espirit":
            return l1_espirit(operator, data, weight=settings.regularization, iterations=settings.iterations)
        if method == "total_variation":
            return total_variation(operator, data, weight=settings.regularization, iterations=settings.iterations)
        return cg_sense(operator, data, iterations=settings.iterations, regularization=settings.regularization)

    def _embedded(self, key: FrameKey) -> CartesianFrame | None:
        """Calibration lines that were measured within the frame of `key`, as part of it."""
        held = self.lane.calibration_of(key)
        embedded = self.layout.encoding.calibration in ("embedded", "interleaved")
        return held[1] if held is not None and held[0] == key and embedded else None

    def _all_lines(self, frame: CartesianFrame, key: FrameKey) -> tuple[torch.Tensor, np.ndarray]:
        """K-space and mask of all lines of a frame, embedded calibration lines among them."""
        extra = self._embedded(key)
        if extra is None:
            return frame.averaged(), frame.mask
        more = extra.mask & ~frame.mask
        data = torch.where(torch.from_numpy(more)[..., None], extra.averaged(), frame.averaged())
        return data, frame.mask | more

    def _solver(self, maps: torch.Tensor, lattice: Lattice, where: int) -> UniformSense:
        """The closed form for a lattice; kept while maps and lattice stay the same."""
        (rz, oz), (ry, oy) = lattice
        known = self._uniform.get(where)
        if known is None or known[0] != lattice:
            known = (lattice, UniformSense(maps, (ry, rz), (oy, oz), regularization=UNIFORM_WEIGHT, axes=self._axes))
            self._uniform[where] = known
        return known[1]

    def _solve_grappa(self, frame: CartesianFrame, sampling: Sampling, key: FrameKey) -> torch.Tensor:
        """Filled k-space of all coils, combined by root sum of squares."""
        (rz, _), (ry, _) = sampling.lattice or ((1, 0), (1, 0))
        known = self._grappa.get(key.slice)
        if known is None or known[0] != (ry, rz):
            block, settings = self._calibration_block(frame, key), self.config.reconstruction
            if block is None:
                raise EngineError("GRAPPA needs calibration lines; `_attempt` takes another method without")
            weights = Grappa.calibrate(
                block, (ry, rz), kernel=settings.kernel, regularization=settings.regularization, hybrid=True
            )
            known = ((ry, rz), weights)
            self._grappa[key.slice] = known
        filled = known[1].apply(frame.averaged(), torch.from_numpy(frame.mask), hybrid=True)
        return self._root_sum_of_squares(self._to_image(filled))

    def _solve_sake(self, frame: CartesianFrame, key: FrameKey) -> torch.Tensor:
        """Coil images of filled k-space, combined by root sum of squares."""
        data, mask = self._all_lines(frame, key)
        seen = torch.from_numpy(mask)[..., None]
        images = sake(data, seen, iterations=self.config.reconstruction.iterations, axes=self._axes)
        return root_sum_of_squares(images if self._same_grid else self._resized(images))

    def _zero_filled(self, frame: CartesianFrame) -> torch.Tensor:
        """Root sum of squares with 0 for what was not measured."""
        kspace = frame.averaged()
        if not self._same_grid:
            return self._root_sum_of_squares(self._to_image(kspace))
        image = streaming.root_sum_of_squares(kspace[:, 0]) if self.layout.depth == 1 else None
        return zero_filled(kspace, axes=self._axes) if image is None else image[None]

    def _to_image(self, kspace: torch.Tensor) -> torch.Tensor:
        """Coil images of hybrid k-space, each axis beginning at its center, up to a phase that no magnitude sees."""
        images: torch.Tensor = torch.fft.ifftn(kspace, dim=self._axes, norm="ortho")
        return images

    def _root_sum_of_squares(self, images: torch.Tensor) -> torch.Tensor:
        """Combined image on the reconstructed matrix; only what must be rolled is, and that after the coils are one."""
        shift = [images.shape[axis] // 2 for axis in self._axes]
        if self._same_grid:
            return torch.roll(root_sum_of_squares(images), shift, self._axes)
        return root_sum_of_squares(self._resized(torch.roll(images, shift, self._axes)))

    @property
    def _wants_maps(self) -> bool:
        method = self.config.reconstruction.method
        if method in ("auto", "prior"):
            return self._undersampled or bool(self.lane.calibrations)
        return method in NEEDS_MAPS

    def _sources(self, frame: CartesianFrame, key: FrameKey) -> list[CartesianFrame]:
        """Where fully measured lines around the center may be found: calibration lines, else the frame itself."""
        held = self.lane.calibration_of(key)
        return [frame] if held is None else [held[1], frame]

    def _calibration_block(self, frame: CartesianFrame, key: FrameKey) -> torch.Tensor | None:
        """Fully measured k-space around the center, hybrid (coil, z, y, x)."""
        for source in self._sources(frame, key):
            block = central_block(source.mask, max(self._lines, 32))
            if block is not None:
                return source.averaged()[:, block[0], block[1]]
        return None

    def _ensure_maps(self, frame: CartesianFrame, key: FrameKey) -> bool:
        if self.config.coil_maps.refresh == "frame":
            self._forget(key.slice)
        if key.slice in self._maps:
            return True
        for source in self._sources(frame, key):
            block = central_block(source.mask, self._lines)
            if block is not None:
                self._maps[key.slice] = self._estimate(source, block)
                return True
        return False

    def _estimate(self, frame: CartesianFrame, block: tuple[slice, slice]) -> torch.Tensor:
        settings, layout = self.config.coil_maps, self.layout
        return espirit(
            frame.averaged()[:, block[0], block[1]],
            (layout.depth, layout.height, layout.width),
            kernel=settings.kernel,
            threshold=settings.threshold,
            crop=settings.crop,
            calibration_size=settings.calibration_lines,
            hybrid=True,
        )

    def _forget(self, where: int) -> None:
        for kept in (self._maps, self._uniform, self._grappa):
            kept.pop(where, None)

    def _filled(self, image: torch.Tensor, sampling: Sampling) -> torch.Tensor:
        """Estimate the side of k-space that partial Fourier or an asymmetric echo left out."""
        method, ranges = self.config.preparation.partial_fourier, self._partial_ranges(sampling)
        if method == "zero_filled" or not ranges:
            return image
        return homodyne(image, ranges) if method == "homodyne" else pocs(image, ranges, iterations=POCS_ITERATIONS)

    def _partial_ranges(self, sampling: Sampling) -> dict[int, SampledRange]:
        layout = self.layout
        ranges = {}
        for axis, part, size, partial in zip(
            (-3, -2), sampling.extent, (layout.depth, layout.height), sampling.partial, strict=True
        ):
            if partial:
                ranges[axis] = SampledRange(size, part.start, part.stop)
        if layout.asymmetric:
            scale, first = layout.width / layout.readout, layout.readout // 2 - layout.center_sample
            start, stop = max(0, round(first * scale)), round((first + layout.samples) * scale)
            ranges[-1] = SampledRange(layout.width, start, min(stop, layout.width))
        return ranges

    def _resized(self, image: torch.Tensor) -> torch.Tensor:
        space, layout = self.layout.encoding, self.layout
        fov = (layout.width_fov_mm, *space.encoded_fov_mm[1:])
        return resize_image(
            image, (layout.width, layout.height, layout.depth), fov, space.recon_matrix, space.recon_fov_mm
        )
