"""ZCA whitening: against the definition written out in numpy, as a step of the pixels, and as a part of a data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data import WHITENED, Dataset
from tests.files import image_folder
from utils.method.images import EPS, EXACT, ImageSet, Normalize, Whiten, moments, to_unit
from utils.method.pixels import PixelSGD
from utils.runs.card import WHITENING, how_to_use
from utils.runs.export import export_safetensors, readme
from utils.runs.formats import read
from utils.runs.sets import DistilledSet
from utils.system.errors import UsageError

CPU = torch.device("cpu")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SHAPE = (3, 4, 4)


def photos(n: int, seed: int = 0) -> Tensor:
    """Random images with neighbours alike, (n, 3, 4, 4) uint8."""
    x = torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    x = torch.nn.functional.avg_pool2d(x, 3, stride=1) + 0.3 * x.mean(1, keepdim=True)[..., 1:5, 1:5]
    return (x * 90 + 128).clamp(0, 255).byte()


def exact() -> Whiten:
    """In float64."""
    return Whiten(photos(500), MEAN, STD, dtype=torch.float64)


def normalised(images: Tensor) -> np.ndarray:
    """Images as the definition has them before whitening, (N, D)."""
    x = (images.numpy() / 255 - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    return x.reshape(len(x), -1)


NORMALIZERS: dict[str, Callable[[], Normalize]] = {"mean and std": lambda: Normalize(MEAN, STD), "zca": exact}
each = pytest.mark.parametrize("make", NORMALIZERS.values(), ids=NORMALIZERS.keys())


# --- The definition ---------------------------------------------------------------------------------------------------


def test_mean_and_covariance_are_exact_over_several_chunks() -> None:
    images = photos(2 * EXACT + 7)
    images[:EXACT] = torch.where(images[:EXACT] < 128, 0, 255)  # the largest products
    mean, covariance = moments(images)
    x = images.flatten(1).numpy().astype(np.int64)
    assert mean.dtype == covariance.dtype == torch.float64 and mean.shape == SHAPE
    np.testing.assert_allclose(mean.flatten() * 255, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(covariance * 255**2, np.cov(x.T), rtol=1e-9, atol=1e-9)


def test_whitened_images_are_those_of_the_definition() -> None:
    images = photos(500)
    x = normalised(images)
    values, vectors = np.linalg.eigh(np.cov(x.T))
    root = sum(np.outer(u, u) / np.sqrt(s + EPS) for s, u in zip(values, vectors.T, strict=True))
    found = exact()(images.double() / 255)
    assert found.shape == images.shape and found.dtype == torch.float64
    np.testing.assert_allclose(found.flatten(1), (x - x.mean(0)) @ root, rtol=0, atol=1e-6)  # std is float32


def test_constant_pixels_and_a_single_image_stay_finite() -> None:
    images = photos(20)
    images[:, :, 0] = 7
    for few in (images, images[:1]):
        whitened = Whiten(few, MEAN, STD)(few)
        assert whitened.isfinite().all() and whitened[:, :, 0].abs().max() < 1e-5


# --- As the other normalisation ---------------------------------------------------------------------------------------


@each
def test_bytes_and_floats_agree_and_keep_their_precision(make: Callable[[], Normalize]) -> None:
    normalize, images = make(), photos(5, seed=1)
    single, double = normalize(images), normalize(images.double() / 255)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(normalize(to_unit(images)), single, rtol=0, atol=0)
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-5)
    torch.testing.assert_close(Whiten(photos(500), MEAN, STD)(images), exact()(images), rtol=0, atol=1e-5)


# --- The step of pixels -----------------------------------------------------------------------------------------------


@each
def test_a_preconditioned_gradient_is_that_of_the_jacobian(make: Callable[[], Normalize]) -> None:
    normalize, x = make(), photos(1).double() / 255
    j = torch.autograd.functional.jacobian(normalize, x).view(48, 48)
    g = torch.randn(2, 3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inverse = torch.linalg.inv(j)
    wanted = (g.flatten(2) @ (inverse @ inverse.T).T).view(g.shape)
    torch.testing.assert_close(normalize.preconditioned(g), wanted, rtol=1e-9, atol=1e-12)
    for part in (g[0], g[0, 0]):
        assert normalize.preconditioned(part).shape == part.shape
    assert normalize.preconditioned(g.float()).dtype == torch.float32
    odd = g.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)  # channels last, as autograd may give it
    torch.testing.assert_close(normalize.preconditioned(odd), wanted, rtol=1e-9, atol=1e-12)


@each
def test_the_joint_step_on_pixels_is_plain_sgd_on_normalised_images(make: Callable[[], Normalize]) -> None:
    normalize = make()
    generator = torch.Generator().manual_seed(0)
    a, target = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((48, 48), (6, 48)))

    def loss(z: Tensor) -> Tensor:
        """A quadratic of normalised images (6, C, H, W)."""
        return (z.flatten(1) @ a - target).square().mean()

    pixels = (photos(6).double() / 255).unflatten(0, (2, 3))
    z = normalize(pixels.flatten(0, 1)).requires_grad_()
    sgd = torch.optim.SGD([z], lr=0.05, momentum=0.5)
    ours = PixelSGD(pixels.clone(), lr=0.05, momentum=0.5, joint=normalize)
    start = pixels.clone()
    for _ in range(5):
        sgd.zero_grad()
        loss(z).backward()
        sgd.step()
        x = ours.lookahead().requires_grad_()
        ours.step(torch.autograd.grad(loss(normalize(x.flatten(0, 1))), x)[0])
        torch.testing.assert_close(normalize(ours.pixels.flatten(0, 1)), z.detach(), rtol=1e-8, atol=1e-9)
    assert (ours.pixels - start).abs().max() > 1e-3


# --- Of a data set ----------------------------------------------------------------------------------------------------


def digits(whiten: str = "zca") -> Dataset:
    return Dataset("digits", device=CPU, whiten=whiten)


def test_training_and_test_images_are_whitened_by_the_training_images() -> None:
    dataset, plain = digits(), digits("none")
    assert type(plain.normalize) is Normalize and isinstance(dataset.normalize, Whiten)
    assert dataset.train.normalize is dataset.test.normalize is dataset.normalize
    wanted = Whiten(plain.train.images, *plain.statistics)  # grouped, which makes no difference
    torch.testing.assert_close(dataset.normalize.matrix, wanted.matrix)
    torch.testing.assert_close(dataset.normalize.centre, wanted.centre)
    assert torch.equal(dataset.train.images, plain.train.images) and dataset.statistics == plain.statistics


@pytest.mark.parametrize("first", ["train", "test", "normalize"])
def test_the_matrix_is_computed_once_whatever_is_asked_for_first(first: str, caplog: pytest.LogCaptureFixture) -> None:
    dataset = digits()
    with caplog.at_level("INFO", "dream"):
        getattr(dataset, first)
        found = [dataset.normalize, dataset.train.normalize, dataset.test.normalize]
    assert len(set(found)) == 1 and len(dataset.train) == 1347
    assert caplog.messages == ["whitening: the covariance of 1347 images of 64 numbers"]
    assert isinstance(found[0], Whiten)
    assert torch.equal(found[0].matrix, Whiten(dataset.train.images, *dataset.statistics).matrix)


def test_a_folder_is_whitened_with_its_own_statistics(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"a": 9, "b": 6})
    for mean, std in ((None, None), ([0.5] * 3, [0.25] * 3)):
        dataset = Dataset("folder", device=CPU, image_folder=root, mean=mean, std=std, whiten="zca")
        assert isinstance(dataset.normalize, Whiten) and len(dataset.train) == 15
        assert dataset.train.batch(torch.arange(15))[0].mean(0).abs().max() < 1e-5


def test_images_of_too_many_numbers_are_refused_before_they_are_read(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"a": 1, "b": 1}, shape=(49, 49, 3))
    with pytest.raises(UsageError, match=rf"--whiten zca: .*{WHITENED}.*3 x 49 x 49.*--size"):
        Dataset("folder", device=CPU, image_folder=root, whiten="zca")
    assert Dataset("folder", device=CPU, image_folder=root, size=48, whiten="zca").side == 48
    assert Dataset("folder", device=CPU, image_folder=root).side == 49


# --- Of an exported set -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whiten", [True, False])
def test_an_export_says_that_images_were_whitened(whiten: bool, tmp_path: Path) -> None:
    normalize = exact() if whiten else Normalize(MEAN, STD)
    images, labels = to_unit(photos(2)), torch.arange(2)
    card = {
        "dataset": "folder", "image_folder": None, "ipc": 1, "factor": 1, "decode_type": "single",
        "value_range": [0.0, 1.0], "normalized": False, "normalization": {"mean": list(MEAN), "std": list(STD)},
        "settings": {"whiten": "zca"} if whiten else {}, "store": "float32", "shape": [3, 4, 4],
    }  # fmt: skip
    decoded = ImageSet(images, labels, classes=2, normalize=normalize)
    assert (WHITENING in how_to_use(card, 4)) == whiten
    assert (WHITENING in readme(decoded, ["a", "b"], class_names=["a", "b"], stored=2, card=card)) == whiten
    export_safetensors(tmp_path / "set.safetensors", DistilledSet(images, labels, None), card=card)
    assert read(tmp_path / "set.safetensors").card == {**card, "source_datasets": ["folder"]}
