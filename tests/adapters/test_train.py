"""`scanside train`, from folders of images to weights that a configuration can name."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from scanside.adapters.commands.train import TrainOptions, run_training
from scanside.adapters.files.ismrmrd import write_scan
from scanside.adapters.files.training_images import read_training_images
from scanside.engine.errors import ConfigError
from scanside.engine.priors.storage import ModelCard, load_weights
from scanside.engine.simulation.scan import simulate_scan

SMALL = {
    "network.widths": "8, 16",
    "training.crop": "32",
    "training.batch": "2",
    "training.steps": "4",
    "training.precision": "float32",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(6, 40, 40)) + 1j * rng.normal(size=(6, 40, 40))
    data = tmp_path / "data"
    data.mkdir()
    np.savez(data / "a.npz", image=images.astype(np.complex64))
    np.savez(data / "b.npz", image=np.stack([images.real, images.imag], 1).astype(np.float16)[:2])
    (data / "notes.txt").write_text("not an image")
    return data


def options(folder: Path, **more: object) -> TrainOptions:
    return TrainOptions(config="mri/online", data=folder, out=folder.parent / "out", overrides=SMALL, **more)


def test_a_folder_becomes_weights_with_a_card_and_a_picture(folder: Path) -> None:
    assert run_training(options(folder, name="mine")) == 0
    out = folder.parent / "out"
    denoiser, card = load_weights(str(out / "mine.safetensors"))
    assert (card.name, card.steps, card.images, card.batch) == ("mine", 4, 7, 2)
    assert set(card.metrics) == {"rmse_over_sigma_0.02", "rmse_over_sigma_0.05", "rmse_over_sigma_0.1"}
    assert denoiser(torch.zeros(1, 2, 40, 40), torch.tensor([0.1])).shape == (1, 2, 40, 40)
    assert (out / "sample.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_call_goes_on_where_the_first_ended(folder: Path) -> None:
    run_training(options(folder))
    longer = msgspec.structs.replace(options(folder), overrides=SMALL | {"training.steps": "6"})
    run_training(longer)
    card = msgspec.json.decode((folder.parent / "out" / "prior.json").read_bytes(), type=ModelCard)
    assert card.steps == 6


def test_training_through_the_loop_begins_with_given_weights(folder: Path) -> None:
    run_training(options(folder))
    first = str(folder.parent / "out" / "prior.safetensors")
    second = TrainOptions(
        config="mri/online", data=folder, out=folder.parent / "two", overrides=SMALL, through_loop=True, weights=first
    )
    assert run_training(second) == 0
    card = load_weights(str(folder.parent / "two" / "prior.safetensors"))[1]
    assert card.through_loop
    assert card.steps == 4


def test_images_are_read_from_every_kind_of_file(folder: Path) -> None:
    scan = simulate_scan(matrix=64, coils=4, acceleration=1)
    write_scan(folder / "c.h5", scan.header, scan.readouts(16))
    lines: list[str] = []
    images = read_training_images(folder, lines.append)
    assert [tuple(image.shape) for image in images] == [(2, 40, 40)] * 8 + [(2, 64, 64)]
    assert all(float(torch.hypot(*image.float()).max()) == pytest.approx(1, abs=2e-3) for image in images)
    assert lines == ["a.npz: 6 images", "b.npz: 2 images", "c.h5: 1 images"]
    truth, found = np.abs(scan.reference).ravel(), torch.hypot(*images[-1].float()).numpy().ravel()
    assert np.corrcoef(truth, found)[0, 1] > 0.99


def test_nifti_volumes_are_read_slice_by_slice(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    volume = np.random.default_rng(0).random((40, 36, 3), dtype=np.float32)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "v.nii.gz")
    images = read_training_images(tmp_path)
    assert [tuple(image.shape) for image in images] == [(2, 40, 36)] * 3
    np.testing.assert_allclose(images[1][0].numpy(), volume[..., 1] / volume[..., 1].max(), atol=1e-3)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no \.npz, .* files to train on"):
        read_training_images(tmp_path)
    np.savez(tmp_path / "small.npz", image=np.ones((4, 4)))
    with pytest.raises(ConfigError, match="no image of at least"):
        read_training_images(tmp_path)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.npz").write_bytes(b"not a zip")
    with pytest.raises(ConfigError, match=r"broken\.npz"):
        read_training_images(tmp_path)


def test_no_loop_without_stages(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no loop to train through"):
        run_training(TrainOptions(config="mri/sense", data=folder, out=folder / "out", through_loop=True))
