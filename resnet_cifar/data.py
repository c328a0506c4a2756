"""A data set as uint8 tensors: loading, subsets, the held-out split, and shuffled batches on the device."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from resnet_cifar.distributed import ALONE, World
from resnet_cifar.errors import ConfigError, DataError

# The held-out images are the same for every seed, so that runs with different seeds are compared on the same images.
SPLIT_SEED = 0


@dataclass(frozen=True)
class Images:
    """Images (N, C, H, W) uint8, labels (N,) int64 and the class names."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "Images":
        return replace(self, images=self.images[index], labels=self.labels[index])

    def to(self, device: torch.device | str) -> "Images":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


class LabelledImages(Protocol):
    """What a dataset class must have, as torchvision's CIFAR10 has it: `data` (N, H, W, C) uint8, `targets` (N,), `classes`."""

    @property
    def data(self) -> np.ndarray: ...

    @property
    def targets(self) -> Sequence[int]: ...

    @property
    def classes(self) -> Sequence[str]: ...


class Digits:
    """scikit-learn's 1,797 handwritten digits, 8x8 enlarged to 32x32x3, in a fixed stratified split of 1,437 and 360."""

    def __init__(self, train: bool) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        enlarged = F.interpolate(torch.from_numpy(digits.images)[:, None], size=(32, 32), mode="bilinear")
        pixels = (enlarged * (255 / 16)).round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
        train_set, test_set = train_test_split(
            np.arange(len(pixels)), test_size=360, random_state=SPLIT_SEED, stratify=digits.target
        )
        chosen = train_set if train else test_set
        self.data, self.targets = pixels[chosen], digits.target[chosen].tolist()
        self.classes = [str(name) for name in digits.target_names]


def as_images(dataset: LabelledImages) -> Images:
    """The whole data set as tensors, channels last in memory; pixels that are contiguous (N, H, W, C) are not copied.

    Raises `DataError` where its `data` are no such pixels, its `targets` no labels of theirs, or two `classes` of one name.
    """
    missing = [f"`{name}`" for name in ("data", "targets", "classes") if not hasattr(dataset, name)]
    if missing:
        raise DataError(f"{type(dataset).__name__} has no {' and no '.join(missing)}, as torchvision's CIFAR10 has.")
    array = np.asarray(dataset.data)
    if array.ndim != 4 or array.dtype != np.uint8:
        raise DataError(
            f"The `data` of {type(dataset).__name__} should be (N, H, W, C) uint8: they are {array.shape} {array.dtype}."
        )
    if min(array.strides) < 0:  # which torch does not have
        array = array.copy()
    pixels = torch.from_numpy(array).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    labels, classes = torch.as_tensor(dataset.targets, dtype=torch.long), tuple(map(str, dataset.classes))
    if labels.shape != (len(array),) or not set(labels.tolist()) <= set(range(len(classes))):
        raise DataError(
            f"The `targets` of {type(dataset).__name__} should be {len(array)} numbers, one for each image,\n"
            f"from 0 to {len(classes) - 1}, since there are {len(classes)} `classes`."
        )
    if len(set(classes)) < len(classes):  # tables and figures tell them apart by name
        raise DataError(f"Two `classes` of {type(dataset).__name__} have the same name: give each its own.")
    return Images(pixels, labels, classes)


def dataset_error(error: Exception, root: str | None, subfolder: str = "") -> DataError:
    """What to tell a user whose data set could not be loaded from `root`, where it lies in `subfolder`."""
    offline = "or run offline: experiment=quickstart"
    place = Path(root or "", subfolder)
    state = "is damaged or incomplete (its checksums differ)" if root and place.is_dir() else "is not there"
    if isinstance(error, URLError):
        return DataError(
            f"The data set in {place} {state} and cannot be downloaded: {error.reason}.\n"
            f"Give the folder that holds {subfolder or 'it'}: data.root=<folder>,\n{offline}"
        )
    if (
        root and not place.exists() and "Dataset not found" in str(error)
    ):  # torchvision's, where it is not to download it
        return DataError(
            f"There is no {place}. Give the folder that holds {subfolder or 'it'}: data.root=<folder>,\n{offline}"
        )
    reason = " ".join(str(error).split())[:160]
    again = f"Delete {place} to download it again, give" if subfolder and place.exists() else "Give"
    return DataError(
        f"The data set in data.root={root} cannot be loaded: {type(error).__name__}: {reason}\n"
        f"{again} another folder: data.root=<folder>,\n{offline}"
    )


def subset(images: Images, size: int | None, key: str, beside: str = "") -> Images:
    """The first `size` images (all when None), the same ones for every seed; an error says what `key` is `beside`."""
    if size is None:
        return images
    if size > len(images):
        left = f"{len(images)} images{beside}"
        raise ConfigError(f"{key}={size}: there are only {left}; give at most that, or null for all.")
    return images[:size]


def hold_out(train: Images, val_size: int) -> tuple[Images, Images]:
    """The training images without `val_size` randomly chosen ones, and those held out; the same ones for every seed.

    Raises:
        ConfigError: `val_size` is negative, or leaves no training image.
    """
    if not 0 <= val_size < len(train):
        raise ConfigError(f"data.val_size={val_size}: must be from 0 to less than the {len(train)} training images.")
    order = torch.randperm(len(train), generator=Generator().manual_seed(SPLIT_SEED))
    kept, held_out = order[val_size:].sort().values, order[:val_size].sort().values
    return train[kept], train[held_out]


def seed_of(*key: int) -> int:
    """A seed that depends on `key` (numbers from 0) alone; zeros at its end count for nothing."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def seeded(*key: int, device: torch.device | str = "cpu") -> Generator:
    """A generator on `device` with the seed of `key`.

    Order and augmentation draw from such generators, keyed by seed and epoch or step: a run that is resumed in the
    middle sees the same images as one that was never interrupted, with no generator state to keep.
    """
    return Generator(device).manual_seed(seed_of(*key))


def steps_per_epoch(images: Images, batch_size: int) -> int:
    """The number of batches, the last, smaller one included."""
    return -(-len(images) // batch_size)


def shuffled_batches(
    images: Images, batch_size: int, seed: int, epoch: int, skip: int = 0
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The batches of one epoch in an order set by `seed` and `epoch`, from batch `skip` on.

    Each is images (N, C, H, W) uint8, labels (N,), and the images' places (N,) in `images`.
    """
    order = torch.randperm(len(images), generator=seeded(seed, 0, epoch)).to(images.labels.device)
    pixels = images.images.permute(0, 2, 3, 1)  # whole images are contiguous rows in this view
    for index in order.split(batch_size)[skip:]:
        yield pixels.index_select(0, index).permute(0, 3, 1, 2), images.labels.index_select(0, index), index


def training_batches(
    images: Images,
    augment: Callable[[Tensor, Generator, Tensor, int], Tensor],
    batch_size: int,
    seed: int,
    epoch: int,
    skip: int = 0,
    world: World = ALONE,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The augmented batches of one epoch: images (N, C, H, W) float32, normalised, and labels (N,) int64, on their device.

    `epoch` counts from 1 (the LR finder's first is 0); `skip` batches are left out at its beginning. Order and draws are set
    by `seed`, `epoch` and the place in the epoch alone. Of several processes each augments the whole batch and yields its
    share: every image gets the draw that it would get from one process.
    """
    batches = shuffled_batches(images, batch_size, seed, epoch, skip)
    for batch, (pixels, labels, index) in enumerate(batches, start=skip):
        augmented = augment(pixels, seeded(seed, 1, epoch, batch, device=pixels.device), index, epoch)
        yield world.take(augmented), world.take(labels)
