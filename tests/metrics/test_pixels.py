"""Confusion matrices and their scores, PSNR and SSIM."""

import math

import numpy as np
import pytest
import torch

from srpkd.metrics.pixels import (
    TILE,
    WINDOW,
    class_accuracy,
    confusion_matrix,
    mean_iou,
    pixel_accuracy,
    psnr,
    similarity,
    ssim,
)


def test_confusion_matrix_by_hand():
    true = torch.tensor([[0, 0, 1], [2, 2, 2]])
    pred = torch.tensor([[0, 1, 1], [2, 0, 2]])
    expected = [[1, 1, 0], [0, 1, 0], [1, 0, 2]]  # rows: truth
    assert confusion_matrix(pred, true, 3).tolist() == expected


def test_scores_by_hand():
    conf = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 0, 2]])
    # unions: class 0 has 2 true + 2 predicted - 1 hit = 3; class 1 has 1 + 2 - 1 = 2; class 2 has 3 + 2 - 2 = 3
    assert mean_iou(conf) == pytest.approx((1 / 3 + 1 / 2 + 2 / 3) / 3)
    assert pixel_accuracy(conf) == pytest.approx(4 / 6)
    assert class_accuracy(conf) == pytest.approx((1 / 2 + 1 + 2 / 3) / 3)
    # averaged over two classes; predictions of the third still count as wrong
    assert mean_iou(conf, 2) == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_class_accuracy_leaves_out_classes_without_true_pixels():
    assert class_accuracy(torch.tensor([[3, 1, 0], [0, 0, 0], [0, 0, 2]])) == pytest.approx((3 / 4 + 1) / 2)
    assert math.isnan(class_accuracy(torch.zeros(2, 2)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int32])
def test_confusion_matrix_agrees_with_numpy(dtype):
    rng = np.random.default_rng(0)
    true, pred = rng.integers(0, 6, (2, 4, 16, 16))
    expected = np.zeros((6, 6), dtype=np.int64)
    np.add.at(expected, (true, pred), 1)
    conf = confusion_matrix(torch.from_numpy(pred).to(dtype), torch.from_numpy(true).to(dtype), 6)
    assert conf.dtype == torch.int64
    np.testing.assert_array_equal(conf.numpy(), expected)
    ious = [np.logical_and(pred == k, true == k).sum() / np.logical_or(pred == k, true == k).sum() for k in range(6)]
    assert mean_iou(conf) == pytest.approx(np.mean(ious), rel=1e-12)
    assert pixel_accuracy(conf) == pytest.approx((pred == true).mean(), rel=1e-12)


def test_matrices_of_batches_can_be_added():
    true, pred = torch.randint(6, (2, 8, 5, 5))
    parts = confusion_matrix(pred[:3], true[:3], 6) + confusion_matrix(pred[3:], true[3:], 6)
    assert torch.equal(parts, confusion_matrix(pred, true, 6))


def test_iou_of_absent_classes():
    true = torch.tensor([0, 0, 1, 1])
    assert mean_iou(confusion_matrix(true, true, 6)) == 1
    assert mean_iou(confusion_matrix(torch.tensor([0, 0, 2, 2]), true, 6)) == pytest.approx(1 / 3)


def test_scores_without_pixels_are_nan():
    conf = confusion_matrix(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 6)
    assert conf.shape == (6, 6)
    assert math.isnan(mean_iou(conf))
    assert math.isnan(pixel_accuracy(conf))


def test_invalid_class_maps():
    maps = torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"pred has shape \(2, 2\) and true \(4,\): expected the same shape"):
        confusion_matrix(maps, maps.flatten(), 6)
    with pytest.raises(ValueError, match=r"pred has classes 0..6: expected 0..5"):
        confusion_matrix(torch.tensor([0, 6]), torch.tensor([0, 0]), 6)
    with pytest.raises(ValueError, match=r"true has classes -1..0: expected 0..5"):
        confusion_matrix(torch.tensor([0, 0]), torch.tensor([0, -1]), 6)
    with pytest.raises(TypeError, match="integers"):
        confusion_matrix(maps.float(), maps, 6)


def test_psnr_is_the_mean_over_images():
    target = torch.zeros(2, 3, 4, 4)
    pred = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 0.02)])
    # 10 log10(4 / 0.04) = 20 dB and 10 log10(4 / 0.0004) = 40 dB; the joint MSE would give 23 dB
    assert psnr(pred, target) == pytest.approx(30, abs=1e-5)
    assert psnr(pred, target, data_range=1.0) == pytest.approx(30 - 20 * math.log10(2), abs=1e-5)


def test_psnr_agrees_with_numpy():
    pred, target = np.random.default_rng(0).uniform(-1, 1, (2, 5, 3, 8, 8))
    expected = np.mean([10 * np.log10(4 / np.mean((p - t) ** 2)) for p, t in zip(pred, target)])
    assert psnr(torch.from_numpy(pred), torch.from_numpy(target)) == pytest.approx(expected, rel=1e-12)


def test_psnr_of_equal_images_and_of_different_shapes():
    images = torch.rand(2, 3, 4, 4)
    assert psnr(images, images) == math.inf
    for metric in (psnr, ssim):  # without the check, SSIM would compare the first tiles of two large images
        with pytest.raises(ValueError, match="expected the same shape"):
            metric(images, images[:1])


def test_psnr_and_ssim_by_hand():
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    a = torch.full((3, 16, 16), 100, dtype=torch.uint8)
    b = torch.full((3, 16, 16), 110, dtype=torch.uint8)
    found = similarity([(a, b), (a, a + 1)])
    assert found["PSNR"] == pytest.approx((20 * np.log10(25.5) + 20 * np.log10(255)) / 2)
    c = (0.01 * 255) ** 2  # for uniform images only the luminance term remains
    expected = [(2 * 100 * x + c) / (100**2 + x**2 + c) for x in (110, 101)]
    assert found["SSIM"] == pytest.approx(np.mean(expected), abs=1e-12)
    deep = b.double() / 255
    assert similarity([(a, deep), (deep, a)]) == pytest.approx(similarity([(a, b), (b, a)]))
    with pytest.raises(ValueError, match="11 x 11"):
        similarity([(a[:, :10], a[:, :10])])


@pytest.mark.parametrize("shape", [(1, 3, 11, 11), (2, 3, 14, 12), (1, 1, 11, 20)])
def test_ssim_agrees_with_its_definition(shape):
    """Equations 13 to 16 of Wang et al. 2004 at each window inside the image: their code computes no other ones.

    Versions of torchmetrics differ in whether they count windows across the edges too, by 0.06 for small images.
    """
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    pred, target = np.random.default_rng(0).uniform(0, 255, (2, *shape))
    target = 0.7 * pred + 0.3 * target
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = []
    for x, y in zip(pred.reshape(-1, *shape[2:]), target.reshape(-1, *shape[2:])):
        for row in range(shape[2] - 10):
            for column in range(shape[3] - 10):
                a, b = (image[row : row + 11, column : column + 11] for image in (x, y))
                mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
                variance_a, variance_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
                covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
                luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
                found.append(luminance * (2 * covariance + c2) / (variance_a + variance_b + c2))
    assert ssim(torch.from_numpy(pred), torch.from_numpy(target), 255.0) == pytest.approx(np.mean(found), rel=1e-9)


@pytest.mark.parametrize("size", [(1, 1), (TILE, TILE), (TILE + 1, 2 * TILE - 1), (2 * TILE + 10, 20)])
def test_ssim_of_a_large_image_is_computed_in_tiles(size, monkeypatch):
    """torch's convolution in float64 takes 5 kB per window: a photo of 6000 x 4000 pixels would need 116 GB."""
    library = pytest.importorskip("torchmetrics.functional.image", reason="torchmetrics is not installed")
    whole, tiles = library.structural_similarity_index_measure, []

    def recorded(pred, target, **options):
        tiles.append(pred.shape)
        return whole(pred, target, **options)

    monkeypatch.setattr(library, "structural_similarity_index_measure", recorded)
    generator = torch.Generator().manual_seed(0)
    pred, noise = torch.rand(2, 2, 3, *(side + WINDOW - 1 for side in size), generator=generator)
    target = 0.7 * pred + 0.3 * noise
    _, at_pixels = whole(pred.double(), target.double(), sigma=1.5, data_range=1.0, return_full_image=True)
    assert ssim(pred, target, 1.0) == pytest.approx(at_pixels[..., 5:-5, 5:-5].mean().item(), rel=1e-12)
    assert max(max(shape[2:]) for shape in tiles) <= TILE + WINDOW - 1


def test_ssim_agrees_with_scikit_image():
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    pred, target = np.random.default_rng(0).integers(0, 256, (2, 3, 24, 30), dtype=np.uint8)
    target = (0.6 * pred + 0.4 * target).astype(np.uint8)
    expected = metrics.structural_similarity(
        pred, target, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
    )
    assert similarity([(torch.from_numpy(pred), torch.from_numpy(target))])["SSIM"] == pytest.approx(expected, rel=1e-9)
