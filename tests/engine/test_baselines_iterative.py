"""Iterative and direct reconstructions, against dense float64 solves, exact density and BART."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scanside.engine.baselines.combine import root_sum_of_squares, sense_combine, zero_filled
from scanside.engine.baselines.l1 import intensity_scale, l1_espirit, l1_espirit_steps, soft_threshold
from scanside.engine.baselines.radial import density_compensation, gridding, noncartesian_sense, radial_density
from scanside.engine.baselines.sense import UniformSense, cg_sense
from scanside.engine.baselines.solvers import (
    conjugate_gradient_steps,
    conjugate_gradients,
    fista,
    fista_steps,
    largest_eigenvalue,
)
from scanside.engine.operators import CartesianSense, Fourier, NonUniformFourier, Sampling, Wavelet
from scanside.engine.simulation.coils import coil_maps
from scanside.engine.simulation.phantom import shepp_logan

DOUBLE = torch.complex128


@pytest.fixture(autouse=True)
def one_thread():
    """Arrays this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def random_mask(*shape, seed=0, part=0.5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < part


def dense(operator):
    unit = torch.eye(math.prod(operator.domain), dtype=DOUBLE)
    return operator(unit.reshape(-1, *operator.domain)).reshape(len(unit), -1).T


def dense_solve(operator, data, regularization):
    matrix = dense(operator)
    normal = matrix.mH @ matrix + regularization * torch.eye(matrix.shape[1], dtype=DOUBLE)
    return torch.linalg.solve(normal, matrix.mH @ data.flatten()).reshape(operator.domain)


def error(a, b):
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def phantom(size, coils=4):
    """Image (1, size, size) and coil maps of unit norm (coils, 1, size, size)."""
    maps = coil_maps(coils).image((size, size))
    maps /= np.sqrt((np.abs(maps) ** 2).sum(0))
    image = shepp_logan().image((size, size))
    return torch.from_numpy(image).to(torch.complex64)[None], torch.from_numpy(maps).to(torch.complex64)[:, None]


def psnr(image, reference):
    image, reference = np.abs(np.asarray(image)).squeeze(), np.abs(np.asarray(reference)).squeeze()
    return 10 * math.log10(reference.max() ** 2 / np.mean((image - reference) ** 2))


# Solvers


@given(seed=st.integers(0, 2**31), regularization=st.floats(0.01, 1.0), warm=st.booleans())
@settings(max_examples=15, deadline=None)
def test_conjugate_gradients_reach_the_dense_solution(seed, regularization, warm):
    operator = CartesianSense(random(3, 1, 5, 4, seed=seed), random_mask(5, 4, seed=seed))
    data = random(2, 3, 1, 5, 4, seed=seed + 1)
    initial = random(2, 1, 5, 4, seed=seed + 2) if warm else None
    image = cg_sense(operator, data, iterations=60, regularization=regularization, initial=initial)
    for one, its_data in zip(image, data, strict=True):
        assert error(one, dense_solve(operator, its_data, regularization)) < 1e-8


def test_members_of_a_batch_do_not_see_each_other():
    operator = CartesianSense(random(3, 1, 6, 6), random_mask(6, 6))
    data = random(2, 3, 1, 6, 6) * torch.tensor([1.0, 1e3]).reshape(2, 1, 1, 1, 1)
    together = cg_sense(operator, data, iterations=4, regularization=0.1)
    for one, its_data in zip(together, data, strict=True):
        assert error(one, cg_sense(operator, its_data, iterations=4, regularization=0.1)) < 1e-12


def test_conjugate_gradients_stand_still_at_the_solution():
    operator = Sampling(torch.tensor([1.0, 2.0, 0.0]), (3,))
    solved = conjugate_gradients(operator.gram, torch.tensor([2.0, 4.0, 0.0]), iterations=50)
    assert torch.allclose(solved, torch.tensor([2.0, 1.0, 0.0]))
    assert torch.equal(conjugate_gradients(operator.gram, torch.zeros(3), iterations=5), torch.zeros(3))


def test_a_gram_may_return_its_argument():
    y = random(1, 4, 4)
    image = cg_sense(Fourier((1, 4, 4), dtype=DOUBLE), y, iterations=3, regularization=0.5)
    assert error(image, Fourier((1, 4, 4), dtype=DOUBLE).H(y) / 1.5) < 1e-12


def test_conjugate_views_are_taken():
    x, maps = random(3, 1, 8, 8), random(3, 1, 8, 8, seed=1)
    assert torch.equal(root_sum_of_squares(x.conj()), root_sum_of_squares(x))
    operator = CartesianSense(maps.conj(), random_mask(8, 8))
    resolved = CartesianSense(maps.conj().resolve_conj(), random_mask(8, 8))
    assert (
        error(cg_sense(operator, x.conj(), iterations=3), cg_sense(resolved, x.conj().resolve_conj(), iterations=3))
        < 1e-12
    )
    folded = UniformSense(maps.conj(), (2, 1)).solve(x.conj())
    assert error(folded, UniformSense(maps.conj().resolve_conj(), (2, 1)).solve(x.conj().resolve_conj())) < 1e-12


def test_steps_are_those_of_the_solver():
    operator = CartesianSense(random(3, 1, 6, 6), random_mask(6, 6))
    right_side = operator.H(random(3, 1, 6, 6, seed=1))
    steps = [x.clone() for x in conjugate_gradient_steps(operator.gram, right_side, iterations=5)]
    for count, x in enumerate(steps, start=1):
        assert torch.equal(x, conjugate_gradients(operator.gram, right_side, iterations=count))


@pytest.mark.parametrize("solver", [lambda g, b: conjugate_gradients(g, b, iterations=0), largest_eigenvalue])
def test_no_iterations_are_refused(solver):
    gram = Fourier((4, 4)).gram
    with pytest.raises(ValueError, match="iterations is 0"):
        solver(gram, torch.zeros(4, 4)) if solver is not largest_eigenvalue else solver(
            gram, torch.zeros(1), iterations=0
        )


def test_largest_eigenvalue():
    operator = CartesianSense(random(3, 1, 5, 4), random_mask(5, 4)).gram
    exact = torch.linalg.eigvalsh(dense(operator)).max()
    found = largest_eigenvalue(operator, random(1), iterations=300)
    assert found <= exact * (1 + 1e-9)
    assert found > 0.999 * exact


def test_fista_descends_to_the_minimum():
    operator = CartesianSense(random(3, 1, 6, 6), random_mask(6, 6))
    data, weight = random(3, 1, 6, 6, seed=1), 0.5
    right_side = operator.H(data)

    def objective(x):
        return float(0.5 * (operator(x) - data).abs().square().sum() + weight * x.abs().sum())

    def proximal(x, step):
        return soft_threshold(x, weight * step)

    values = [objective(x) for x in fista_steps(operator.gram, right_side, proximal, iterations=200)]
    long = fista(operator.gram, right_side, proximal, iterations=5000, step=0.5 / operator.gram_bound)
    assert values[0] < objective(torch.zeros_like(long))
    assert all(later < earlier for earlier, later in itertools.pairwise(values[:9]))
    assert values[-1] <= objective(long) * (1 + 1e-6)
    # The optimality condition of the long run: the gradient lies in weight times the subgradient of |x|.
    gradient = right_side - operator.gram(long)
    assert float(gradient.abs().max()) <= weight * (1 + 1e-6)
    inside = long.abs() > 1e-6
    assert torch.allclose(gradient[inside], weight * (long / long.abs())[inside], atol=1e-5)


def test_soft_threshold_shrinks_magnitudes_and_keeps_phases():
    x = torch.tensor([3 + 4j, 0.3 + 0.4j, 0j])
    assert torch.allclose(soft_threshold(x, 1.0), torch.tensor([2.4 + 3.2j, 0j, 0j]))
    assert torch.allclose(soft_threshold(torch.tensor([-3.0, 0.5]), 1.0), torch.tensor([-2.0, 0.0]))
    assert torch.equal(soft_threshold(x, 0.0), x)


# Combination


def test_root_sum_of_squares_and_combination():
    images, maps = random(2, 3, 1, 4, 5), random(3, 1, 4, 5, seed=1)
    maps[:, :, 0] = 0
    assert torch.allclose(root_sum_of_squares(images), images.abs().square().sum(1).sqrt())
    x = random(2, 1, 4, 5, seed=2)
    combined = sense_combine(maps * x[:, None], maps)
    assert torch.allclose(combined[..., 1:, :], x[..., 1:, :])
    assert not combined[..., 0, :].any()
    with pytest.raises(ValueError, match="images has shape"):
        sense_combine(images, maps[:2])


@pytest.mark.parametrize("axes", [(-2,), (-2, -1), (-3, -2, -1)])
@pytest.mark.parametrize("shape", [(1, 8, 6), (3, 7, 5)])
def test_zero_filled_inverts_full_sampling(axes, shape):
    maps, x = random(4, *shape), random(*shape, seed=1)
    kspace = Fourier((4, *shape), axes, dtype=DOUBLE)(maps * x)
    assert error(zero_filled(kspace, maps, axes=axes), x) < 1e-12
    assert error(zero_filled(kspace, axes=axes), root_sum_of_squares(maps * x)) < 1e-12


# Uniform SENSE

LATTICES = [
    ((1, 8, 5), (4, 1), (0, 0), (-3, -2)),
    ((1, 12, 5), (3, 1), (1, 0), (-2,)),
    ((1, 10, 4), (2, 1), (1, 0), (-2, -1)),
    ((6, 12, 3), (3, 2), (2, 1), (-3, -2)),
    ((9, 6, 4), (2, 3), (1, 1), (-3, -2, -1)),
    ((1, 9, 4), (1, 1), (0, 0), (-2,)),
]


@pytest.mark.parametrize(("shape", "acceleration", "offset", "axes"), LATTICES)
@pytest.mark.parametrize("regularization", [0.0, 0.05])
def test_uniform_sense_is_the_dense_solution(shape, acceleration, offset, axes, regularization):
    maps = random(8, *shape)
    sense = UniformSense(maps, acceleration, offset, regularization=regularization, axes=axes)
    operator = CartesianSense(maps, sense.mask, axes)
    data = random(8, *shape, seed=1)
    expected = dense_solve(operator, data, regularization)
    assert sense.exact
    assert error(sense.solve(torch.stack([data, 2 * data]))[1], 2 * expected) < 1e-6
    (oy, oz), (ry, rz) = offset, acceleration
    assert torch.equal(sense.solve_lines(data[:, oz::rz, oy::ry]), sense.solve(data))
    single = UniformSense(maps.to(torch.complex64), acceleration, offset, regularization=regularization, axes=axes)
    assert error(single.solve(data.to(torch.complex64)), expected) < 1e-3


@pytest.mark.parametrize(("shape", "acceleration", "offset", "axes"), LATTICES)
def test_g_factor_is_that_of_the_inverse_matrix(shape, acceleration, offset, axes):
    maps = random(8, *shape)
    maps[..., 0] = 0
    sense = UniformSense(maps, acceleration, offset, axes=axes)
    matrix = dense(CartesianSense(maps, sense.mask, axes))
    noise = torch.linalg.pinv(matrix.mH @ matrix, rcond=1e-9, hermitian=True).diagonal().real
    full = maps.abs().square().sum(0).flatten()
    expected = (noise * full / math.prod(acceleration)).sqrt().reshape(shape)
    assert torch.allclose(sense.g_factor(), expected, rtol=1e-5)
    assert not sense.g_factor()[..., 0].any()


def smooth_scan(shape):
    """A blob and eight smooth maps of root sum of squares 1, both far narrower in k-space than the matrix; float64."""
    z, y, x = torch.meshgrid(*((torch.arange(n).double() - n // 2) / n for n in shape), indexing="ij")
    image = torch.exp(-40 * (z**2 * (shape[0] > 1) + (y - 0.05) ** 2 + (x + 0.02) ** 2)) * torch.exp(2j * y + 1j * z)
    angles = torch.arange(8).double() * math.pi / 4
    seen = [torch.exp(2.5 * (y * a.cos() + (z - x) * a.sin()) + 1j * (3 * y * a.sin() + z * a.cos())) for a in angles]
    maps = torch.stack(seen)
    return image, maps / maps.abs().square().sum(0).sqrt()


@pytest.mark.parametrize("offset", range(3))
@pytest.mark.parametrize("shape", [(1, 128, 4), (1, 127, 4), (32, 64, 4)])
def test_uniform_sense_finds_the_image_where_lines_do_not_fold(shape, offset):
    image, maps = smooth_scan(shape)
    acceleration, where = ((3, 1), (offset, 0)) if shape[0] == 1 else ((2, 3), (offset % 2, offset))
    sense = UniformSense(maps, acceleration, where)
    data = CartesianSense(maps, sense.mask, (-3, -2))(image)
    assert not sense.exact
    assert error(sense.solve(data), image) < 2e-3
    (oy, oz), (ry, rz) = where, acceleration
    assert torch.equal(sense.solve_lines(data[:, oz::rz, oy::ry]), sense.solve(data))
    noise = sense.g_factor()
    assert noise.shape == shape
    assert float(noise.median()) >= 1 - 1e-3
    with pytest.raises(ValueError, match="its last axes must be"):
        sense.solve_lines(data)


def test_uniform_sense_reads_no_other_lines():
    image, maps = smooth_scan((1, 128, 4))
    sense = UniformSense(maps, (3, 1), (1, 0))
    data = CartesianSense(maps, torch.ones(1, 1, 1), (-2,))(image)
    assert torch.equal(sense.solve(data), sense.solve(data * sense.mask))


def test_uniform_sense_leaves_dark_pixels_dark():
    maps = random(4, 1, 8, 6)
    maps[..., 2] = 0
    image = UniformSense(maps, (2, 1)).solve(random(4, 1, 8, 6, seed=1))
    assert torch.isfinite(torch.view_as_real(image)).all()
    assert not image[..., 2].any()


@pytest.mark.parametrize(
    ("acceleration", "offset", "axes", "says"),
    [
        ((0, 1), (0, 0), (-2,), "along y"),
        ((2, 1), (2, 0), (-2,), "offset 2 along y"),
        ((1, 2), (0, 0), (-2,), "along z"),
        ((2, 1), (0, 0), (-1,), "must be among axes"),
        ((2, 1), (0, 0), (1,), "allowed are"),
    ],
)
def test_wrong_lattices_are_refused(acceleration, offset, axes, says):
    with pytest.raises(ValueError, match=says):
        UniformSense(random(4, 1, 8, 8), acceleration, offset, axes=axes)


def test_uniform_sense_wants_the_k_space_of_its_maps():
    with pytest.raises(ValueError, match=r"kspace has shape \(4, 1, 8, 6\)"):
        UniformSense(random(4, 1, 8, 8), (2, 1)).solve(random(4, 1, 8, 6))


# Sparse and non-Cartesian


def test_l1_espirit_beats_plain_sense_and_repeats_itself():
    image, maps = phantom(64)
    mask = random_mask(64, 64, part=0.35)
    mask[26:38, 26:38] = True
    operator = CartesianSense(maps, mask)
    data = operator(image) + 0.02 * random(4, 1, 64, 64, seed=5).to(torch.complex64)
    sparse = l1_espirit(operator, data, weight=0.01, iterations=40)
    assert psnr(sparse, image) > psnr(cg_sense(operator, data, regularization=0.01), image) + 2
    assert torch.equal(sparse, l1_espirit(operator, data, weight=0.01, iterations=40))
    # The weight goes with the scale of the data, so the image scales with them.
    assert error(l1_espirit(operator, 1e3 * data, weight=0.01, iterations=40), 1e3 * sparse) < 1e-3
    assert error(list(l1_espirit_steps(operator, data, weight=0.01, iterations=40))[-1], sparse) == 0


def test_hybrid_data_give_the_same_scale_and_image():
    image, maps = phantom(64)
    mask = random_mask(64, 1, part=0.4)
    mask[24:40] = True
    operator, hybrid = CartesianSense(maps, mask), CartesianSense(maps, mask, (-2,))
    data, hybrid_data = operator(image), hybrid(image)
    assert math.isclose(intensity_scale(operator, data), intensity_scale(hybrid, hybrid_data), rel_tol=1e-4)
    whole = l1_espirit(operator, data, iterations=5)
    assert error(l1_espirit(hybrid, hybrid_data, iterations=5), whole) < 1e-4


def test_scale_of_nothing_is_one():
    image, maps = phantom(32)
    operator = CartesianSense(maps, torch.ones(32, 32, dtype=torch.bool))
    assert intensity_scale(operator, torch.zeros_like(maps)) == 1
    assert not l1_espirit(operator, torch.zeros_like(maps), iterations=2).any()
    assert 0.3 < float(intensity_scale(operator, operator(image))) < 1.5


def radial(spokes, size):
    angle = torch.arange(spokes) * math.pi / spokes
    radius = (torch.arange(2 * size) - size) / 2
    return torch.stack([radius * angle.cos()[:, None], radius * angle.sin()[:, None]], dim=-1)


def test_density_of_a_full_radial_scan_is_the_ramp():
    trajectory = radial(128, 64)
    density, ramp = density_compensation(trajectory, (1, 64, 64)), radial_density(trajectory)
    inner = torch.linalg.vector_norm(trajectory, dim=-1) < 28
    assert error(density[inner], ramp[inner]) < 0.05
    assert math.isclose(float(ramp.sum()), math.pi / 4 * 64**2, rel_tol=0.02)


@pytest.mark.parametrize("shape", [(1, 12, 10), (6, 8, 8)])
def test_density_of_the_cartesian_grid_is_one(shape):
    axes = [torch.arange(size) - size // 2.0 for size in shape if size > 1]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flip(-1)
    density = density_compensation(grid.reshape(1, -1, len(axes)), shape)
    assert torch.allclose(density, torch.ones(()), atol=0.02)


def test_radial_ramp_is_two_dimensional():
    with pytest.raises(ValueError, match="3 dimensions"):
        radial_density(torch.zeros(2, 4, 3))


def test_gridding_and_iterative_sense_of_radial_scans():
    image, maps = phantom(64)
    image = image * (maps.abs().sum(0) > 0)
    full, few = radial(128, 64), radial(24, 64)
    measured = {len(k): NonUniformFourier(k, maps.shape, accuracy=1e-6)(maps * image) for k in (full, few)}
    gridded = gridding(measured[128], full, (1, 64, 64), maps=maps)
    assert psnr(gridded, image) > 24
    assert psnr(gridding(measured[128], full, (1, 64, 64)), image) > 22
    plain = psnr(gridding(measured[24], few, (1, 64, 64), maps=maps), image)
    assert psnr(noncartesian_sense(measured[24], few, maps), image) > plain + 3


# BART


@pytest.fixture
def bart(tmp_path):
    """A function (command, arrays in) to the array out; arrays are [coil, z, y, x] or [z, y, x]."""
    if shutil.which("bart") is None:
        pytest.skip("the program bart is not installed")

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(command, **arrays):
        for name, array in arrays.items():
            dims = [*array.shape[::-1], *[1] * (16 - array.ndim)]
            (tmp_path / f"{name}.hdr").write_text("# Dimensions\n" + " ".join(map(str, dims)) + "\n")
            np.asarray(array, np.complex64).tofile(tmp_path / f"{name}.cfl")
        subprocess.run(
            ["bart", *command.split(), "out"], cwd=tmp_path, check=True, capture_output=True, env=environment
        )
        dims = [int(word) for word in (tmp_path / "out.hdr").read_text().split("\n")[1].split()]
        return np.fromfile(tmp_path / "out.cfl", np.complex64).reshape(dims[::-1]).squeeze()

    return run


@pytest.fixture
def small_scan():
    """A noisy 64 x 64 phantom: image, operator, k-space."""
    image, maps = phantom(64)
    mask = random_mask(64, 64, part=0.3)
    mask[20:44, 20:44] = True
    operator = CartesianSense(maps, mask)
    return image, operator, maps, operator(image) + mask * 0.02 * random(4, 1, 64, 64, seed=5).to(torch.complex64)


@pytest.mark.peer
@pytest.mark.parametrize("regularization", [0.005, 0.1])
def test_cg_sense_is_that_of_bart(bart, small_scan, regularization):
    _, operator, maps, data = small_scan
    theirs = bart(f"pics -S -l2 -r{regularization} -i30 k s", k=data, s=maps)
    ours = cg_sense(operator, data, iterations=30, regularization=regularization)
    assert error(ours[0], torch.from_numpy(theirs)) < 1e-4


@pytest.mark.peer
@pytest.mark.parametrize(("option", "seed"), [("-n", None), ("", 0)])
def test_l1_espirit_is_as_good_as_that_of_bart(bart, small_scan, option, seed):
    image, operator, maps, data = small_scan
    theirs = bart(f"pics -S {option} -R W:3:0:0.005 -i100 k s", k=data, s=maps)
    # BART counts the filters from three pixels further on.
    wavelet = Wavelet(operator.domain, wavelet="db2", shift=(3, 3))
    ours = l1_espirit(operator, data, weight=0.005, iterations=100, wavelet=wavelet, seed=seed, end_on_data=True)
    assert abs(psnr(ours, image) - psnr(theirs, image)) < 0.3
    assert error(ours[0], torch.from_numpy(theirs)) < (0.02 if seed is None else 0.05)
