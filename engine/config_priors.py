"""Tables of a configuration for systems with a learned prior: the sampler, the stages of its program, and their training.

A system repeats its stages over a schedule of noise levels. One stage is

    u = T z,  u' = u + r (D_sigma(u + n) - u),  z' = T^+ u',  z'' = DC(z'),  z = X(z'')

with a transform T, a prior D, a sampler rule that says r, n and sigma, data consistency DC and a constraint X; see
`scanside.engine.samplers`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

__all__ = [
    "ConstraintConfig",
    "DataConfig",
    "NetworkConfig",
    "Precondition",
    "PriorConfig",
    "SamplerConfig",
    "StageConfig",
    "TrainingConfig",
    "TransformConfig",
]

Count = Annotated[int, msgspec.Meta(ge=1, le=100000)]
Amount = Annotated[float, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Width = Annotated[int, msgspec.Meta(ge=4, le=1024)]
Precondition = Literal["edm", "homogeneous"]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]

Rule = Literal[
    "proximal", "annealed_langevin", "predictor_corrector", "mean_reverting", "gradient", "energy", "ddim", "heun"
]


class SamplerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The schedule of noise levels and the rule that moves the estimate at each."""

    rule: Rule = "proximal"
    """`proximal`: few relaxed steps with momentum; `gradient`: of a denoising autoencoder, with momentum; the others by their
    usual names."""
    levels: Count = 8
    """Noise levels, or iterations where the level does not change."""
    steps: Annotated[int, msgspec.Meta(ge=0, le=100000)] = 1
    """Steps at each level (annealed Langevin), or corrector steps (predictor-corrector), of which there may be none."""
    sigma: tuple[Positive, Positive] = (0.15, 0.01)
    """First and last noise level, for images of greatest magnitude 1."""
    spacing: Literal["geometric", "edm", "cosine"] = "geometric"
    """Between the levels; `edm` as Karras et al. 2022 with exponent 7, `cosine` for the mean-reverting equation."""
    sigma_steps: tuple[Positive, ...] = ()
    """Noise levels one by one, in place of `sigma` and `spacing`. Where `levels` is not their number they are knots, which lie
    evenly along the run with straight lines between their logarithms; so are `relaxation_steps` and `momentum_steps`."""
    relaxation: Positive = 1.0
    """Step r of `proximal` and `gradient`; `annealed_langevin` steps by it times sigma^2."""
    relaxation_steps: tuple[Positive, ...] = ()
    """`proximal` and `gradient`: r of each step, in place of `relaxation`."""
    momentum: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    momentum_steps: tuple[Annotated[float, msgspec.Meta(gt=-1, lt=1)], ...] = ()
    """`proximal` and `gradient`: momentum of each step, in place of `momentum`; one below 0 takes back part of the last move."""
    step_size: Positive = 1.0
    """Of `energy`: how far along the gradient."""
    snr: Positive = 0.075
    """Size of a corrector step of `predictor_corrector`."""
    eta: Share = 0.0
    """Share of fresh noise in `ddim`."""
    noise_copies: Count = 1
    """Copies with noise of their own, over which the prior's answer is averaged."""
    input_noise: Amount = 0.0
    """Noise added before the prior sees the image, in units of its noise level."""
    jacobian: bool = False
    """`gradient`: the whole gradient of the autoencoder's error, by one backward pass; else its mean shift."""
    inject: bool = True
    """Whether `annealed_langevin`, `predictor_corrector` and `mean_reverting` keep the noise that they draw; without it they
    follow its mean."""
    start: Literal["zero_filled", "given", "noise"] = "given"
    """Where to start: zero-filled, the plain image (or the previous frame), or noise of the first level."""
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0

    @property
    def ends(self) -> tuple[float, float]:
        """First and last noise level."""
        return (self.sigma_steps[0], self.sigma_steps[-1]) if self.sigma_steps else self.sigma


class PriorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which network a stage uses, and how."""

    weights: str = ""
    """Shipped weights by name, or the path of a safetensors file with its model card beside it."""
    sigma: Amount = 0.0
    """Noise level that the network is told, whatever the schedule says; 0: that of the schedule."""
    sigma_range: tuple[Positive, Positive] | None = None
    """First and last noise level of this stage, in units of its domain; the levels between go as those of the schedule do."""
    turn: Annotated[float, msgspec.Meta(ge=0, lt=360)] = 0.0
    """Degrees by which the phase of the image is turned for the network, more by as much at each move: no phase is special,
    but a network has learned that only roughly, and what it does to one phase another one does not repeat."""
    domain: Literal["own", "image", "filtered"] = "own"
    """`own`: the network knows the domain of the transform; `image`: it knows plain images, which serves every transform
    that keeps lengths; `filtered`: it knows images that the k-space weights and the window filtered, which is weighted
    k-space after an inverse Fourier transform (see `scanside.engine.priors.domains`)."""


class DataConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the estimate is brought into agreement with what was measured."""

    kind: Literal["none", "hard", "sense", "proximal", "gradient", "replace", "complete", "deconvolve"] = "proximal"
    """`hard`: measured k-space of each coil takes its place; `sense`: the same with coil maps round it; `proximal`: the
    regularized least-squares image next to the estimate, in closed form where there is one, else by conjugate gradients;
    `replace`: measured rows of a state that is data itself; `complete`: of the rows that an image predicts for a full ring
    the measured ones take their place, their neighbours follow; `deconvolve`: those rows were seen through a transducer."""
    iterations: Count = 4
    """Of conjugate gradients."""
    weight: Amount = 1.0
    """Step of `gradient`; for `proximal` a factor on (noise of the data / noise level)^2."""
    floor: Amount = 0.003
    """`proximal`: the noise of the data counts as at least this, relative to the image."""


class ConstraintConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What else is asked of the estimate."""

    kind: Literal["none", "low_rank", "clip"] = "none"
    """`low_rank`: of the Hankel matrix of k-space over all coils (SAKE) or frames; `clip`: real and imaginary part to
    +- limit."""
    over: Literal["coils", "frames"] = "coils"
    """Of `low_rank`: what stands side by side in the Hankel matrix; frames are those of `reconstruction.frames`."""
    window: Annotated[int, msgspec.Meta(ge=2, le=32)] = 6
    rank: Annotated[int, msgspec.Meta(ge=1)] = 54
    """Of `low_rank`; one of window^2 times the number of coils or more asks nothing, as of one coil alone, but for `share`."""
    share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """Of `low_rank`: the rank is at most this share of window^2 times the number of coils, so that few are asked something, too.
    What it asks of one coil is that the object does not fill the field of view."""
    energy: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """Of `low_rank`: the rank is no higher than what holds this share of the energy of the Hankel matrix, each time anew."""
    limit: Positive = 1.0
    each_move: bool = False
    """Ask after each move of a level, predictor and correctors, not only after the last."""
    data_after: bool = False
    """Bring the data in once more after."""


class TransformConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The domain of a prior."""

    kind: Literal["image", "haar", "kspace", "kspace_haar", "filtered", "hankel", "arc"] = "image"
    """The image; its undecimated Haar bands; weighted k-space without its center; Haar bands of k-space; the image that
    k-space weights and window filter; the matrix of the windows of weighted k-space; the signals of a ring without the third
    of it that is furthest from what was measured."""
    copies: Annotated[int, msgspec.Meta(ge=1, le=16)] = 1
    """How often the channels are repeated."""
    split: bool = False
    """Real and imaginary part as two members of the batch, not as two channels."""
    weight_scale: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """c of the k-space weight (c^2 ((kx/Nx)^2 + (ky/Ny)^2))^p."""
    weight_power: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """p of the k-space weight; 0 leaves k-space as it is."""
    window: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Points per axis of the k-space center that the prior does not see."""
    window_shape: Literal["square", "disc"] = "square"
    hankel_window: Annotated[int, msgspec.Meta(ge=2, le=32)] = 8
    """Points per side of the windows of `hankel`."""
    hankel_stride: Annotated[int, msgspec.Meta(ge=1, le=32)] = 1
    """Of `hankel`: windows begin on every so-manyth line of k-space only, which costs less."""


class StageConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One stage of a program."""

    prior: PriorConfig = PriorConfig()
    transform: TransformConfig = TransformConfig()
    data: DataConfig = DataConfig()
    constraint: ConstraintConfig = ConstraintConfig()
    branch: bool = False
    """Start from where the stage before started, and merge with its outcome instead of following it."""
    merge: Share = 0.5
    """Share of this stage in a merge; the stage before has the rest."""


class NetworkConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Size of a network."""

    channels: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 2
    """Planes of the image: 2 for real and imaginary part."""
    conditions: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    """Further planes that the network is shown and does not change, after those of the image."""
    widths: tuple[Width, ...] = (32, 64, 128)
    """Features at each resolution, from fine to coarse."""
    blocks: Annotated[int, msgspec.Meta(ge=1, le=16)] = 2
    """Residual blocks at each resolution, going down and going up."""
    shuffle: Annotated[int, msgspec.Meta(ge=1, le=8)] = 2
    """Side of the pixel blocks that become channels at the entry."""

    @property
    def multiple(self) -> int:
        """Both sides of an image are multiples of this."""
        return self.shuffle << (len(self.widths) - 1)


class TrainingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a prior is trained."""

    steps: Annotated[int, msgspec.Meta(ge=1)] = 30000
    batch: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 16
    crop: Annotated[int, msgspec.Meta(ge=8, le=2048)] = 96
    """Pixels per side of the patches. Domains such as k-space are those of whole images; patches are cut from them after."""
    learning_rate: Positive = 6e-4
    rise: Annotated[int, msgspec.Meta(ge=1)] = 200
    """Steps over which the rate rises to its value."""
    decay: Share = 0.15
    """Last part of the run, over which the rate falls to zero."""
    average: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.999
    """Decay of the moving average of the weights."""
    precondition: Precondition = "edm"
    """How the network is built into a denoiser; see `scanside.engine.priors.denoiser`."""
    loss: Literal["edm", "plain"] = "edm"
    """`edm`: squared error divided by its expected size at each noise level; `plain`: as denoising autoencoders."""
    sigma: tuple[Positive, Positive] = (0.002, 1.0)
    """Least and greatest noise level, for images of greatest magnitude 1."""
    sigma_levels: tuple[Positive, ...] = ()
    """Train on these levels only, instead of on all between the two, uniform in the logarithm."""
    scale: tuple[Positive, Positive] = (0.4, 1.2)
    """Images are multiplied by a random factor between these."""
    phase: bool = True
    """Turn the phase of complex images at random, with a random slope of up to a turn over 128 pixels."""
    turn: bool = True
    """Flip and turn images at random."""
    shapes: Share = 0.0
    """Share of complex images that are random phantoms in place of those given: edges and contrasts that no anatomy has."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """`auto`: bfloat16 where the processor computes with it, for it is slower than float32 elsewhere."""
    denoising_share: Share = 0.2
    """Through the loop: share of the batches that are plain denoising."""
    coil_share: Share = 0.2
    """Through the loop: share of the batches with several coils."""
    loop_steps: tuple[Count, Count] = (4, 8)
    """Through the loop: fewest and most steps of a run, whatever `sampler.levels` says."""
    loop_emphasis: Annotated[float, msgspec.Meta(ge=0, le=100)] = 2.0
    """Through the loop: the image after step k of J weighs (k / J) to this power; 0: all alike, large: the last one alone."""
    scenes: Annotated[int, msgspec.Meta(ge=2, le=100000)] = 800
    """Photoacoustics: simulated scenes to train on."""
    flawed: Share = 0.0
    """Photoacoustics: share of the scenes with what no model knows: uneven views, motion, echoes, a probe off its circle."""
    images: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Train on the first so many images only; 0: on all."""
    hankel_window: Annotated[int, msgspec.Meta(ge=0, le=32)] = 0
    """Cut patches from the Hankel matrix of windows of so many points per side, in place of the planes (HKGM); 0: do not."""
    hankel_coils: Annotated[int, msgspec.Meta(ge=1, le=64)] = 8
    """Simulated coils of that matrix."""
    seed: int = 0
