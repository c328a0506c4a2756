"""Each batched transform has the distribution of torchvision's own, and every image its own draw."""

import random

import numpy as np
import pytest
import torch
from torchvision import transforms
from torchvision.transforms import v2

from resnet_cifar.augment import (
    AlternatingFlip,
    Augmentation,
    Cutout,
    Normalise,
    ProgressiveResize,
    RandomCrop,
    RandomHorizontalFlip,
)
from resnet_cifar.errors import ConfigError

N = 8100
IDENTITY = Normalise([0.0] * 3, [1 / 255] * 3, channels_last=True)  # pixel values as they are, as floats
TURNED = transforms.RandomChoice([transforms.RandomRotation((angle, angle)) for angle in (0, 90)])  # Python's `random`


def brighter(image):
    return image + np.random.randint(9)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def coordinates(n):
    """(n, 3, 32, 32) images whose pixels tell where they come from: row + 1, column + 1 and 200."""
    rows, columns = torch.meshgrid(torch.arange(1, 33), torch.arange(1, 33), indexing="ij")
    return torch.stack([rows, columns, torch.full((32, 32), 200)]).to(torch.uint8).expand(n, -1, -1, -1)


def chi_squared(counts):
    expected = counts.sum() / counts.numel()
    return ((counts - expected) ** 2 / expected).sum().item()


def crop_offsets(cropped):
    """Row and column offsets (0..8) of each crop, read off its middle pixel."""
    return cropped[:, 0, 16, 16].long() - 13, cropped[:, 1, 16, 16].long() - 13


def test_crop_offsets_are_uniform():
    top, left = crop_offsets(RandomCrop(32, padding=4)(coordinates(N), generator()))
    counts = torch.bincount(top * 9 + left, minlength=81).float()
    assert len(counts) == 81
    assert chi_squared(counts) < 131.1  # 99.98% of the chi-squared distribution with 80 degrees of freedom


def test_crop_pads_with_zeros_and_keeps_the_pixels():
    images = coordinates(200)
    cropped = RandomCrop(32, padding=4)(images, generator())
    for image, top, left in zip(cropped, *crop_offsets(cropped), strict=True):
        padded = torch.nn.functional.pad(images[0], [4] * 4)
        assert torch.equal(image, padded[:, top : top + 32, left : left + 32])


def test_crop_can_reflect_the_image_at_its_border():
    images = coordinates(200)
    cropped = RandomCrop(32, padding=4, padding_mode="reflect")(images, generator())
    for image, top, left in zip(cropped, *crop_offsets(cropped), strict=True):
        padded = torch.nn.functional.pad(images[0].float(), [4] * 4, mode="reflect")
        assert torch.equal(image.float(), padded[:, top : top + 32, left : left + 32])


@pytest.mark.parametrize(
    ("crop", "reason"),
    [
        (RandomCrop(41, padding=4), "size=41 should be at most 40"),
        (RandomCrop(32, padding=32, padding_mode="reflect"), "padding=32 should be below 32"),
    ],
)
def test_a_crop_that_images_have_no_pixels_for_is_refused(crop, reason):
    with pytest.raises(ConfigError, match=reason):
        crop(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.Generator())


def test_crop_reaches_what_torchvision_reaches():
    torch.manual_seed(0)
    theirs = torch.stack([v2.RandomCrop(32, padding=4)(image) for image in coordinates(1500)])
    ours = RandomCrop(32, padding=4)(coordinates(1500), generator())
    assert {tuple(image.flatten().tolist()) for image in theirs} == {tuple(image.flatten().tolist()) for image in ours}


def test_half_of_the_images_are_flipped():
    images = coordinates(N)
    flipped = RandomHorizontalFlip(0.5)(images, generator())
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert torch.equal(flipped[~mirrored], images[~mirrored])
    assert abs(mirrored.float().mean().item() - 0.5) < 4 * 0.5 / N**0.5  # four standard deviations


@pytest.mark.parametrize(("p", "expected"), [(0.0, 0), (1.0, 64)])
def test_flip_probability_is_kept_at_its_ends(p, expected):
    images = coordinates(64)
    flipped = RandomHorizontalFlip(p)(images, generator())
    assert (flipped != images).flatten(1).any(1).sum() == expected


def mirrored(index, epoch):
    images = coordinates(len(index))
    flipped = AlternatingFlip()(images, index, epoch)
    return (flipped == images.flip(-1)).flatten(1).all(1)


def test_alternating_flip_mirrors_half_of_the_images_and_the_others_in_the_next_epoch():
    index = torch.arange(N)
    first = mirrored(index, epoch=1)
    assert abs(first.float().mean().item() - 0.5) < 4 * 0.5 / N**0.5  # four standard deviations
    assert torch.equal(mirrored(index, epoch=2), ~first) and torch.equal(mirrored(index, epoch=3), first)


def test_alternating_flip_goes_by_the_image_and_not_by_its_place_in_the_batch():
    order = torch.randperm(N, generator=generator())
    assert torch.equal(mirrored(order, epoch=1), mirrored(torch.arange(N), epoch=1)[order])


def test_progressive_resize_follows_the_epochs_and_ends_at_full_size():
    resize = Augmentation([ProgressiveResize(first=16, epochs=8)], IDENTITY)
    sizes = [tuple(resize(coordinates(2), generator(), epoch=epoch).shape[-2:]) for epoch in range(1, 10)]
    assert sizes == [(size, size) for size in (16, 16, 20, 20, 24, 24, 28, 32, 32)]


@pytest.mark.parametrize("epochs", [1, 2, 8])
def test_progressive_resize_has_its_first_size_before_the_first_epoch_and_ends_at_full_size(epochs):
    resize = ProgressiveResize(first=16, epochs=epochs)
    assert [resize(coordinates(2), torch.zeros(2), epoch).shape[-1] for epoch in (0, epochs)] == [16, 32]
    assert resize(coordinates(2)[..., :30, :30], torch.zeros(2), epochs).shape[-1] == 30  # no multiple of 4


def test_the_cost_of_an_epoch_is_its_share_of_pixels():
    resize = Augmentation([AlternatingFlip(), ProgressiveResize(first=16, epochs=8)], IDENTITY)
    assert [resize.share_of_pixels(32, epoch) for epoch in (1, 5, 8)] == [0.25, 0.5625, 1.0]
    assert Augmentation([ProgressiveResize(first=32, epochs=2)], IDENTITY).share_of_pixels(28, 1) == 1.0


def test_progressive_resize_averages_what_it_shrinks():
    halved = ProgressiveResize(first=16, epochs=2)(coordinates(1), torch.zeros(1), 1)
    rows = halved[0, 0, 2:-2, 0].float()  # antialiased, a pixel covers two rows and a bit: 2i + 1.5, rounded
    assert (rows - (2 * torch.arange(2, 14) + 1.5)).abs().max() <= 0.5


def erased_corners(erased, fill):
    """Row and column of each square's corner, and whether the filled pixels are exactly one 8x8 square."""
    filled = (erased == fill).all(1)
    top, left = filled.any(2).int().argmax(1), filled.any(1).int().argmax(1)
    squares = torch.zeros_like(filled)
    for square, row, column in zip(squares, top, left, strict=True):
        square[row : row + 8, column : column + 8] = True
    return top, left, torch.equal(filled, squares)


def test_cutout_is_one_square_inside_at_a_uniform_place():
    erased = Cutout(8, fill=[0.0] * 3)(coordinates(N), generator())
    top, left, is_square = erased_corners(erased, 0)
    assert is_square
    counts = torch.bincount(top * 25 + left, minlength=625).float()
    assert len(counts) == 625
    assert chi_squared(counts) < 752.0  # 99.97% with 624 degrees of freedom


def test_cutout_reaches_what_random_erasing_reaches():
    torch.manual_seed(0)
    erase = v2.RandomErasing(p=1, scale=(1 / 16, 1 / 16), ratio=(1, 1), value=0)
    theirs = torch.stack([erase(image) for image in coordinates(3000)])
    their_top, their_left, is_square = erased_corners(theirs, 0)
    assert is_square
    ours = Cutout(8, fill=[0.0] * 3)(coordinates(3000), generator())
    top, left, _ = erased_corners(ours, 0)
    for place in (their_top, their_left, top, left):
        assert set(place.tolist()) == set(range(25))


def test_cutout_fills_with_the_mean():
    mean, std = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]
    augment = Augmentation([Cutout(32, fill=mean)], Normalise(mean, std, channels_last=True))
    assert augment(coordinates(4), generator()).abs().max() < 0.5 / 255 / min(std)  # uint8 holds it to half a level


def test_two_images_of_a_batch_differ():
    augment = Augmentation([RandomCrop(32, 4), RandomHorizontalFlip(), Cutout(8, [0.5] * 3)], IDENTITY)
    first, second, *_ = augment(coordinates(16), generator())
    assert not torch.equal(first, second)


def test_a_torchvision_transform_draws_for_each_image():
    augment = Augmentation([v2.RandomCrop(32, padding=4)], IDENTITY)
    top, left = crop_offsets(augment(coordinates(200), generator()))
    assert len({*zip(top.tolist(), left.tolist(), strict=True)}) > 60


def test_transforms_leave_the_global_generators_alone():
    state, of_python, of_numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    Augmentation([v2.RandomCrop(32, padding=4), TURNED, brighter], IDENTITY)(coordinates(4), generator())
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == of_python
    assert (np.random.get_state()[1] == of_numpy).all()


def test_a_torchvision_transform_to_floats_is_normalised_alike():
    normalise = Normalise([0.5] * 3, [0.25] * 3, channels_last=True)
    as_floats = Augmentation([v2.ToDtype(torch.float32, scale=True)], normalise)(coordinates(2), generator())
    assert torch.allclose(as_floats, normalise(coordinates(2)), atol=1e-6)


def test_draws_depend_on_the_generator_alone():
    augment = Augmentation([RandomCrop(32, 4), v2.RandomHorizontalFlip(), TURNED, brighter], IDENTITY)
    assert torch.equal(augment(coordinates(32), generator(3)), augment(coordinates(32), generator(3)))
    assert not torch.equal(augment(coordinates(32), generator(3)), augment(coordinates(32), generator(4)))


def test_normalise_is_torchvisions_and_can_be_undone():
    mean, std = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator())
    normalise = Normalise(mean, std, channels_last=False)
    expected = v2.Normalize(mean, std)(images / 255)
    assert torch.allclose(normalise(images), expected, atol=1e-5)
    assert torch.allclose(normalise.undo(normalise(images)), images / 255, atol=1e-6)


@pytest.mark.parametrize("channels_last", [True, False])
def test_normalised_images_have_the_asked_layout(channels_last):
    augmented = Augmentation([RandomCrop(32, 4)], Normalise([0.5] * 3, [0.5] * 3, channels_last))(
        coordinates(4), generator()
    )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert augmented.is_contiguous(memory_format=layout)
