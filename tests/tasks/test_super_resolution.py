"""Super-resolution: how low resolution is made, what PSNR and SSIM are, splits, patches, folders of pictures."""

import dataclasses
import gzip
import hashlib
import math
import os
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from archzoo.tasks import fashion_mnist, super_resolution
from archzoo.tasks.idx import FILES
from archzoo.tasks.super_resolution import Pairs, SuperResolution, enlarge, luma, psnr, shrink, ssim
from archzoo.tasks.task import DatasetError

needs_data = pytest.mark.skipif(not os.environ.get("ARCHZOO_DATA"), reason="ARCHZOO_DATA names no data folder")
Image = pytest.importorskip("PIL.Image")
GENERATOR = np.random.RandomState(0)


def noise(*shape):
    return torch.tensor(np.random.RandomState(1).rand(*shape))


@pytest.fixture(scope="module")
def photos():
    return SuperResolution()


# --- resizing ----------------------------------------------------------------------------------------------------


def cubic(x):
    """The kernel of MATLAB's imresize, Keys' with a = -0.5."""
    x = np.abs(x)
    return np.where(x <= 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x <= 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0.0))


def imresize_matrix(size, scale):
    """What MATLAB's imresize multiplies a column of `size` pixels by, after the source of its `contributions`."""
    squeeze = min(scale, 1.0)
    width = 4 / squeeze
    u = np.arange(1, round(size * scale) + 1) / scale + 0.5 * (1 - 1 / scale)
    indices = np.floor(u - width / 2)[:, None] + np.arange(math.ceil(width) + 2)
    weights = squeeze * cubic(squeeze * (u[:, None] - indices))
    weights /= weights.sum(1, keepdims=True)
    mirror = np.concatenate([np.arange(size), np.arange(size)[::-1]])
    matrix = np.zeros((len(u), size))
    for row in range(len(u)):
        np.add.at(matrix[row], mirror[np.mod(indices[row].astype(int) - 1, 2 * size)], weights[row])
    return torch.tensor(matrix)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_low_resolution_is_that_of_imresize(scale):
    high = noise(2, 3, 7 * scale, 9 * scale)
    expected = imresize_matrix(7 * scale, 1 / scale) @ high @ imresize_matrix(9 * scale, 1 / scale).T
    torch.testing.assert_close(shrink(high, scale), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_enlargement_is_that_of_imresize(scale):
    low = noise(2, 3, 7, 9)
    expected = imresize_matrix(7, scale) @ low @ imresize_matrix(9, scale).T
    torch.testing.assert_close(enlarge(low, scale), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_low_resolution_is_that_of_pillow_away_from_the_border(scale):
    high = noise(1, 1, 12 * scale, 10 * scale).float()
    small = Image.fromarray(high[0, 0].numpy()).resize((10, 12), Image.Resampling.BICUBIC)
    ours = shrink(high, scale)[0, 0]
    torch.testing.assert_close(ours[2:-2, 2:-2], torch.tensor(np.asarray(small))[2:-2, 2:-2], rtol=0, atol=1e-6)


# --- metrics -----------------------------------------------------------------------------------------------------


def test_luma_is_matlabs():
    colours = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]).view(5, 3, 1, 1)
    expected = torch.tensor([16, 235, 81.481, 144.553, 40.966])
    torch.testing.assert_close(luma(colours).flatten() * 255, expected)


def test_psnr_is_that_of_each_image():
    from torchmetrics.functional.image import peak_signal_noise_ratio

    target = noise(3, 1, 12, 13)
    output = target + noise(3, 1, 12, 13) * torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1, 1)
    expected = [peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in zip(output, target, strict=True)]
    torch.testing.assert_close(psnr(output, target), torch.stack(expected))
    assert psnr(torch.full((1, 1, 2, 2), 0.6), torch.full((1, 1, 2, 2), 0.5)).item() == pytest.approx(20, abs=1e-4)
    assert psnr(target, target).tolist() == [math.inf] * 3


def test_ssim_is_that_of_scikit_image():
    """Its definition with gaussian_weights, sigma=1.5, use_sample_covariance=False, data_range=1, by SciPy."""
    from scipy.ndimage import gaussian_filter

    def blur(image):
        return gaussian_filter(image, 1.5, truncate=3.5, mode="reflect")

    target = noise(2, 1, 24, 19)
    output = (target + 0.3 * noise(2, 1, 19, 24).mT).clamp(0, 1)
    expected = []
    for x, y in zip(output[:, 0].numpy(), target[:, 0].numpy(), strict=True):
        ux, uy = blur(x), blur(y)
        vx, vy, vxy = blur(x * x) - ux * ux, blur(y * y) - uy * uy, blur(x * y) - ux * uy
        c1, c2 = 0.01**2, 0.03**2
        full = ((2 * ux * uy + c1) * (2 * vxy + c2)) / ((ux**2 + uy**2 + c1) * (vx + vy + c2))
        expected.append(full[5:-5, 5:-5].mean())
    assert ssim(output, target).tolist() == pytest.approx(expected, abs=1e-12)
    assert ssim(target, target).tolist() == pytest.approx([1, 1], abs=1e-12)


def test_ssim_is_that_of_torchmetrics_where_its_window_is_inside():
    from torchmetrics.functional.image import structural_similarity_index_measure

    target = noise(2, 3, 24, 19)
    output = (target + 0.2 * noise(2, 3, 19, 24).mT).clamp(0, 1)
    _, full = structural_similarity_index_measure(
        output, target, data_range=1.0, reduction="none", return_full_image=True
    )
    expected = full[..., 5:-5, 5:-5].mean((1, 2, 3)).tolist()
    assert ssim(output, target).tolist() == pytest.approx(expected, abs=1e-6)


def test_photographs_are_compared_as_the_field_does_it(photos):
    """Against NumPy: clamped, in 8 bits, Y of BT.601, without `scale` pixels at the border, peak 255."""
    _, target = photos.test[0]
    output = target + 0.1 * torch.randn_like(target)
    shown = np.round(np.clip(output.numpy().astype(np.float64), 0, 1) * 255)
    truth = np.round(target.numpy().astype(np.float64) * 255)
    assert np.abs(truth / 255 - target.numpy()).max() < 1e-6  # 8 bits to begin with
    weights = np.array([65.481, 128.553, 24.966]).reshape(3, 1, 1) / 255
    difference = ((shown - truth) * weights).sum(0)[2:-2, 2:-2]
    expected = 10 * np.log10(255**2 / (difference**2).mean())
    metrics = photos.metrics()
    metrics.update(output[None], target[None])
    figures = {key: value.item() for key, value in metrics.compute().items()}
    assert figures["psnr"] == pytest.approx(expected, abs=1e-4)
    assert figures["loss"] == pytest.approx(np.abs((output - target).numpy()).mean(), rel=1e-4)
    assert 0 < figures["ssim"] < 0.9
    frame = torch.ones_like(target)
    frame[..., 2:-2, 2:-2] = 0
    assert psnr(*photos.comparable((target + frame)[None], target[None])).item() == math.inf
    faint = torch.full_like(target, 0.4 / 255)
    assert psnr(*photos.comparable((target + faint)[None], target[None])).item() == math.inf


def test_metrics_are_means_over_the_images(photos):
    target = torch.stack([photos.test[0][1], photos.test[1][1]])
    output = target + torch.tensor([0.05, 0.2]).view(2, 1, 1, 1)
    whole, parts = photos.metrics(), photos.metrics()
    whole.update(output, target)
    for i in (0, 1):
        parts.update(output[i : i + 1], target[i : i + 1])
    single = psnr(*photos.comparable(output, target))
    assert single[0] > single[1] + 5
    for key, value in whole.compute().items():
        assert value.item() == pytest.approx(parts.compute()[key].item(), rel=1e-6)
    assert whole.compute()["psnr"].item() == pytest.approx(single.mean().item())
    assert (photos.score, photos.mode) == ("psnr", "max")


def test_flat_outputs_are_taken_too(photos):
    low, target = photos.train.__getitems__([0, 1])
    output = photos.bicubic(low)
    assert photos.loss(output.flatten(1), target) == photos.loss(output, target) == F.l1_loss(output, target)
    assert torch.equal(*(photos.comparable(o, target)[0] for o in (output, output.flatten(1))))
    assert photos.output_size == target[0].numel()
    assert photos.input_shape == tuple(low[0].shape)


def test_summary_is_beside_bicubic(photos):
    """The field's bicubic, whole images, on the test split; its own gain is 0."""
    expected = []
    for low, target in (photos.test[0], photos.test[1]):
        matrices = [imresize_matrix(side, 2) for side in low.shape[-2:]]
        output = (matrices[0] @ low.double() @ matrices[1].T)[None]
        expected.append([measure(*photos.comparable(output, target[None])).item() for measure in (psnr, ssim)])
    figures = photos.summarize([{"step": 1, "val/psnr": 1.0}, {"step": 2, "val/psnr": 60.0}], nn.Identity())
    assert [figures["bicubic_psnr"], figures["bicubic_ssim"]] == pytest.approx(np.mean(expected, 0), abs=1e-3)
    metrics = photos.metrics()
    for low, target in (photos.val[0], photos.val[1]):
        metrics.update(photos.bicubic(low[None]), target[None])
    own = metrics.compute()["psnr"].item()
    assert figures["val_gain"] == pytest.approx(60 - own, abs=1e-3)
    for evaluations in ([{"val/psnr": own}], [{"val/psnr": math.nan}, {"val/psnr": own}]):
        assert photos.summarize(evaluations, nn.Identity())["val_gain"] == pytest.approx(0, abs=1e-3)
    assert math.isnan(photos.summarize([{"val/psnr": math.nan}], nn.Identity())["val_gain"])


# --- splits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_photographs_are_split_by_columns_before_they_are_shrunk(scale):
    from sklearn.datasets import load_sample_image

    task = SuperResolution(scale=scale)
    sources = [torch.tensor(load_sample_image(name)).permute(2, 0, 1) for name in ("china.jpg", "flower.jpg")]
    regions = sorted(super_resolution.REGIONS.values())
    for (_, end), (begin, _) in zip(regions, regions[1:], strict=False):
        assert begin - end >= 16  # no block of JPEG, 16 pixels with its colours, is of two regions
    for name, (begin, end) in super_resolution.REGIONS.items():
        [(low, high)] = getattr(task, name).stacks
        assert len(low) == 2
        for image, source in zip(high, sources, strict=True):
            assert torch.equal(image, source[:, : 427 // scale * scale, begin:end])
        alone = shrink(high.double(), scale).clamp(0, 255)
        assert (low.double() - alone).abs().max() <= 0.5 + 1e-3
    assert (len(task.val), len(task.test)) == (2, 2)
    assert task.input_shape == (3, 24, 24)
    assert task.output_size == 3 * (24 * scale) ** 2


def test_fewer_photographs_to_train_on():
    one, two = SuperResolution(train_size=1), SuperResolution()
    assert 2 * len(one.train) == len(two.train)
    assert torch.equal(one.train[3][0], two.train[3][0])
    assert len(one.test) == 2


def numbered(count, height, width, scale, colours=1):
    """A stack whose values tell pixels apart, at both resolutions."""
    low = torch.arange(count * colours * height * width).view(count, colours, height, width).float()
    return low, low.repeat_interleave(scale, -1).repeat_interleave(scale, -2)


def test_patches_cover_every_image_and_both_resolutions_agree():
    pairs = Pairs([numbered(2, 9, 12, 3), numbered(1, 5, 5, 3)], 3, patch=4)
    assert len(pairs) == 2 * 4 * 5 + 2 * 2
    low, high = pairs.__getitems__(list(range(len(pairs))))
    assert low.shape == (44, 1, 4, 4)
    assert torch.equal(high, low.repeat_interleave(3, -1).repeat_interleave(3, -2))
    assert set(low[:40].flatten().tolist()) == set(range(2 * 9 * 12))
    assert set(low[40:].flatten().tolist()) == set(range(25))
    for index in (0, 19, 20, 39, 40, 43):
        assert torch.equal(pairs[index][0], low[index])
        assert torch.equal(pairs[index][1], high[index])
    for index in (-1, 44):
        with pytest.raises(IndexError, match=f"index={index}: must be from 0 to 43"):
            pairs[index]


def test_augmentation_shows_every_patch_in_its_eight_orientations():
    stack = numbered(1, 4, 6, 2, colours=3)
    plain, turned = Pairs([stack], 2, patch=4), Pairs([stack], 2, patch=4, augment=True)
    assert len(turned) == 8 * len(plain) == 16
    for patch in range(2):
        low, high = turned.__getitems__(list(range(8 * patch, 8 * patch + 8)))
        assert len({tuple(image.flatten().tolist()) for image in low}) == 8
        assert torch.equal(low[0], plain[patch][0])
        assert torch.equal(high, low.repeat_interleave(2, -1).repeat_interleave(2, -2))
        assert torch.equal(low.sort(-1).values.sum((1, 2, 3)), low[0].sum().expand(8))


def test_images_that_make_no_batch_are_said_so():
    mixed = Pairs([numbered(1, 5, 5, 2), numbered(1, 5, 6, 2)], 2)
    assert mixed.__getitems__([1])[0].shape == (1, 1, 5, 6)
    with pytest.raises(ValueError, match=r"several sizes, as 5 x 5 and 5 x 6, .* trainer\.eval_batch_size=1"):
        mixed.__getitems__([0, 1])
    with pytest.raises(ValueError, match="patch=6: an image of 5 x 6 pixels at low resolution is smaller"):
        Pairs([numbered(1, 5, 6, 2)], 2, patch=6)
    with pytest.raises(ValueError, match="augment=True: an image of 5 x 6 pixels cannot be turned; give a patch"):
        Pairs([numbered(1, 5, 6, 2)], 2, augment=True)


# --- Fashion-MNIST -----------------------------------------------------------------------------------------------


def idx(images):
    header = bytes([0, 0, 8, images.ndim]) + b"".join(size.to_bytes(4, "big") for size in images.shape)
    return gzip.compress(header + images.tobytes())


@pytest.fixture
def fashion(monkeypatch, tmp_path):
    """Forty images stand in for the 60,000, and ten for the test set; six are held out."""
    train, test = (GENERATOR.randint(0, 256, (n, 28, 28)).astype(np.uint8) for n in (40, 10))
    contents = {FILES[0]: idx(train), FILES[2]: idx(test)}
    sha256 = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    monkeypatch.setattr(fashion_mnist, "SOURCE", dataclasses.replace(fashion_mnist.SOURCE, sha256=sha256))
    monkeypatch.setattr(super_resolution, "FASHION_HELD_OUT", 6)
    (tmp_path / "fashion_mnist").mkdir()
    for name, data in contents.items():
        (tmp_path / "fashion_mnist" / name).write_bytes(data)
    return tmp_path, torch.tensor(train)[:, None] / 255, torch.tensor(test)[:, None] / 255


def test_grey_images_follow_the_reference_protocol(fashion):
    folder, train, test = fashion
    task = SuperResolution(dataset="fashion_mnist", patch=None, train_size=20, data_dir=folder)
    assert (task.input_shape, task.output_size) == ((1, 14, 14), 784)
    for split, images in ((task.train, train[:20]), (task.val, train[-6:]), (task.test, test[:6])):
        low, high = split.__getitems__(list(range(len(split))))
        torch.testing.assert_close(high, images)
        expected = F.interpolate(images, size=(14, 14), mode="bicubic", antialias=True).clamp(0, 1)
        torch.testing.assert_close(low, expected)
    low, high = task.test.__getitems__([0, 1])
    output = F.interpolate(low, size=(28, 28), mode="bicubic")
    assert torch.equal(task.bicubic(low), output)
    error = (output.clamp(0, 1) - high).double().square().mean((1, 2, 3))
    assert psnr(*task.comparable(output, high)).tolist() == pytest.approx((-10 * error.log10()).tolist(), rel=1e-6)
    third = SuperResolution(dataset="fashion_mnist", patch=None, scale=3, data_dir=folder)
    assert (third.input_shape, third.output_size, len(third.train)) == ((1, 9, 9), 27**2, 34)
    assert third.bicubic(third.test[0][0][None]).shape == (1, 1, 27, 27)
    cut = SuperResolution(dataset="fashion_mnist", patch=8, augment=True, data_dir=folder)
    assert (cut.input_shape, len(cut.train)) == ((1, 8, 8), 34 * 9 * 8)
    with pytest.raises(ValueError, match="patch=24: an image of 14 x 14 pixels at low resolution is smaller"):
        SuperResolution(dataset="fashion_mnist", data_dir=folder)


@needs_data
def test_baseline_of_the_reference_protocol_is_the_measured_one():
    """19.31 dB is the specification's figure."""
    task = SuperResolution(dataset="fashion_mnist", patch=None, train_size=20_000)
    assert (len(task.train), len(task.val), len(task.test)) == (20_000, 2000, 2000)
    low, high = task.test.stacks[0]
    assert psnr(*task.comparable(task.bicubic(low), high / 255)).mean().item() == pytest.approx(19.31, abs=0.005)


# --- folders of pictures -----------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """A training set of twelve pictures of several sizes, and a test set laid out as EDSR's."""
    train, test = tmp_path / "super_resolution" / "Mine", tmp_path / "super_resolution" / "Set5" / "HR"
    train.mkdir(parents=True)
    test.mkdir(parents=True)
    for number in range(12):
        pixels = GENERATOR.randint(0, 256, (40 + number, 51, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(train / f"{number:04}.png")
    Image.fromarray(GENERATOR.randint(0, 256, (31, 32)).astype(np.uint8)).save(test / "grey.PNG", "PNG")
    Image.fromarray(GENERATOR.randint(0, 256, (30, 30, 3)).astype(np.uint8)).save(test / "colour.png")
    (test / "readme.txt").write_text("not a picture")
    return tmp_path


def test_pictures_of_a_folder_are_read_and_tested_on_those_of_another(pictures):
    task = SuperResolution(dataset="Mine", test_set="Set5", patch=10, data_dir=pictures)
    assert [tuple(high.shape) for _, high in task.train.stacks] == [(1, 3, (40 + n) // 2 * 2, 50) for n in range(11)]
    assert [tuple(high.shape) for _, high in task.val.stacks] == [(1, 3, 50, 50)]
    assert [tuple(low.shape) for low, _ in task.test.stacks] == [(1, 3, 15, 15), (1, 3, 15, 16)]
    grey = task.test[1][1]
    assert torch.equal(grey[0], grey[1])
    metrics = task.metrics()
    for low, target in (task.test[0], task.test[1]):
        metrics.update(task.bicubic(low[None]), target[None])
    assert metrics.compute()["psnr"].item() == pytest.approx(task.baseline["test/psnr"])
    few = SuperResolution(dataset="Mine", test_set="Set5", patch=10, train_size=2, data_dir=pictures)
    assert len(few.train.stacks) == 2
    on_photos = SuperResolution(test_set="Set5", data_dir=pictures)
    assert torch.equal(on_photos.test[1][0], task.test[1][0])
    assert on_photos.val[0][0].shape == (3, 213, 42)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_set": "Set14"}, r"test_set='Set14': there is no folder .*Set14 with PNG pictures; .*benchmark\.tar"),
        ({"test_set": "Manga109"}, r"Manga109.*http://www\.manga109\.org"),
        ({"dataset": "DIV2K", "test_set": "Set5"}, r"dataset='DIV2K': there is no folder .*vision\.ee\.ethz\.ch"),
        ({"dataset": "photo", "test_set": "Set5"}, r"dataset='photo': .* did you mean 'photos'"),
        ({"test_set": "../super_resolution/Set5"}, "there is no folder"),
        ({"test_set": "Empty"}, "there is no folder .*Empty with PNG pictures"),
        ({"dataset": "Single", "test_set": "Set5"}, r"dataset='Single': .*a\.png is the only picture; add one"),
        ({"test_set": "Small"}, r"a\.png: 16 x 40 pixels are less than 17 each way"),
        ({"test_set": "Broken"}, r"cannot read the picture .*a\.png"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(map(str, value.values())).replace("/", "."),
)
def test_pictures_that_are_not_to_be_had_are_said_so(pictures, options, message):
    for name, size in (("Single", (40, 40)), ("Small", (16, 40))):
        (pictures / "super_resolution" / name).mkdir()
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(pictures / "super_resolution" / name / "a.png")
    (pictures / "super_resolution" / "Empty").mkdir()
    (pictures / "super_resolution" / "Broken").mkdir()
    (pictures / "super_resolution" / "Broken" / "a.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match=message):
        SuperResolution(data_dir=pictures, **options)


def test_without_any_folder_the_data_folder_is_named(tmp_path):
    with pytest.raises(DatasetError, match=re.escape(str(tmp_path / "super_resolution" / "Set5"))):
        SuperResolution(test_set="Set5", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 1}, "scale=1: must be a whole number from 2 to 4"),
        ({"scale": 2.0}, "scale=2.0"),
        ({"patch": 0}, "patch=0"),
        ({"patch": 500}, "patch=500: an image of 213 x 198 pixels at low resolution is smaller"),
        ({"train_size": 0}, "train_size=0: must be a whole number from 1 to 2"),
        ({"train_size": 3}, "train_size=3"),
        ({"patch": None, "augment": True}, "cannot be turned"),
        ({"dataset": "fashion_mnist", "test_set": "Set5"}, "test_set='Set5': dataset 'fashion_mnist' is grey"),
        ({"dataset": "Mine"}, "test_set=None: dataset 'Mine' has no test images of its own"),
        ({"dataset": "Mine", "test_set": "Mine"}, "test_set='Mine': these images are trained on"),
        ({"dataset": "Mine", "test_set": "Set5", "patch": None}, "patch=None: the training images have 6 sizes"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()),
)
def test_wrong_option_is_named(pictures, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SuperResolution(data_dir=pictures, **options)
