"""Augmentation of a whole uint8 batch at once on its own device, every image with its own draw.

A transform here is called with (N, C, H, W) uint8 images and a generator on their device, a scheduled one also with which
images they are and the epoch. Any other callable in the list, such as a torchvision v2 transform, is called once per image, so
that it too draws for each image apart.
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from resnet_cifar.errors import ConfigError


class BatchTransform:
    """Base of the transforms that take a whole batch: `transform(images, generator)`, (N, C, H, W) uint8 to the same."""

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        raise NotImplementedError


class ScheduledTransform:
    """Base of those whose result depends on which image it is and on the epoch: `transform(images, index, epoch)`.

    `index` (N,) int64 holds the places of the images in the training set; `epoch` counts from 1.
    """

    def __call__(self, images: Tensor, index: Tensor, epoch: int) -> Tensor:
        raise NotImplementedError

    def share_of_pixels(self, height: int, epoch: int) -> float:
        """How many of their pixels images of `height` keep in this epoch: about what a training step costs."""
        return 1.0


class RandomCrop(BatchTransform):
    """Pad by `padding` pixels and cut `size` x `size` at a uniform offset: (N, C, H, W) to (N, C, size, size), uint8.

    As torchvision's `RandomCrop`, with a border that is black (`constant`) or the image mirrored at its edge (`reflect`).
    Raises ConfigError, when called, where `size` exceeds the padded image, or a reflected border the image.
    """

    def __init__(self, size: int, padding: int = 0, padding_mode: Literal["constant", "reflect"] = "constant") -> None:
        self.size, self.padding, self.padding_mode = size, padding, padding_mode

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        self._check(min(images.shape[2:]))
        padded = F.pad(images, [self.padding] * 4) if self.padding_mode == "constant" else self._reflected(images)
        number, channels, height, width = padded.shape
        top = _integers(height - self.size + 1, images, generator)
        left = _integers(width - self.size + 1, images, generator)
        # A row of a window is one run of bytes: all possible ones as a view, of which each image takes `size`.
        rows = _pixels(padded).flatten().unfold(0, self.size * channels, channels)
        first_row = torch.arange(number, device=images.device) * height + top
        row = first_row.unsqueeze(1) + torch.arange(self.size, device=images.device)
        cropped = rows.index_select(0, (row * width + left.unsqueeze(1)).flatten())
        return cropped.view(number, self.size, self.size, channels).permute(0, 3, 1, 2)

    def _check(self, side: int) -> None:
        if self.size > side + 2 * self.padding:
            raise ConfigError(
                f"RandomCrop: size={self.size} should be at most {side + 2 * self.padding}, "
                f"of images of {side} pixels with padding={self.padding}"
            )
        if self.padding_mode == "reflect" and self.padding >= side:
            raise ConfigError(
                f"RandomCrop: padding={self.padding} should be below {side}, the pixels there are to reflect"
            )

    def _reflected(self, images: Tensor) -> Tensor:
        # torch pads uint8 with constants only, so its own reflection of the pixels' positions is what is looked up.
        for axis in (2, 3):
            positions = torch.arange(images.shape[axis], dtype=torch.float32, device=images.device)
            reflected = F.pad(positions[None], [self.padding] * 2, mode="reflect")[0].long()
            images = images.index_select(axis, reflected)
        return images


class RandomHorizontalFlip(BatchTransform):
    """Mirror each image with probability `p`, as torchvision's `RandomHorizontalFlip`."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        flipped = torch.rand(len(images), device=images.device, generator=generator) < self.p
        return _mirrored(images, flipped)


class AlternatingFlip(ScheduledTransform):
    """Mirror each image in every second epoch, half of them in the odd ones: two epochs see each image both ways.

    Jordan, arXiv:2404.00498, section 3.6. Which half is the same for every seed.
    """

    def __call__(self, images: Tensor, index: Tensor, epoch: int) -> Tensor:
        coin = (index + 1) * 0x2545F4914F6CDD1D >> 40 & 1  # a bit of a multiplicative hash
        return _mirrored(images, (coin + epoch) % 2 == 0)


class ProgressiveResize(ScheduledTransform):
    """Square images grow from `first` pixels in epoch 1 to their full size in epoch `epochs`, and stay there.

    (N, C, H, H) uint8 to (N, C, h, h), h rounded down to a multiple of 4, so that pooling divides it. Progressive resizing as
    in fast.ai's DAWNBench entry (Howard et al., 2018); antialiased bilinear interpolation.
    """

    def __init__(self, first: int, epochs: int) -> None:
        self.first, self.epochs = first, epochs

    def __call__(self, images: Tensor, index: Tensor, epoch: int) -> Tensor:
        full = images.shape[-1]
        size = self._size(full, epoch)
        if size >= full:
            return images
        pixels = images if images.device.type == "cpu" else images.float()  # bytes are resized on a CPU only
        shrunk = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
        return shrunk if shrunk.dtype == torch.uint8 else shrunk.round_().clamp_(0, 255).to(torch.uint8)

    def share_of_pixels(self, height: int, epoch: int) -> float:
        return min(1.0, self._size(height, epoch) / height) ** 2

    def _size(self, full: int, epoch: int) -> int:
        if epoch >= self.epochs:
            return full
        done = max(0, epoch - 1) / max(1, self.epochs - 1)  # the LR finder is before epoch 1
        return int(self.first + (full - self.first) * done) // 4 * 4


class Cutout(BatchTransform):
    """Fill one square of `size` pixels a side per image, wholly inside it, with `fill` (per channel, 0..1); same shape out.

    Cutout of DeVries and Taylor, arXiv:1708.04552, whose squares may leave the image; in the distribution of torchvision's
    `RandomErasing(p=1, scale=(s, s), ratio=(1, 1))` with s = size^2 / (H W). Raises ConfigError, when called, where `size`
    exceeds the image.
    """

    def __init__(self, size: int, fill: Sequence[float]) -> None:
        self.size = size
        self.fill = torch.tensor([round(255 * value) for value in fill], dtype=torch.uint8)

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        number, channels, height, width = images.shape
        if self.size > min(height, width):
            raise ConfigError(
                f"Cutout: size={self.size} should be at most {min(height, width)}, the pixels of an image"
            )
        rows = self._inside(height, images, generator).unsqueeze(2)
        columns = self._inside(width, images, generator).unsqueeze(1)
        first_row = torch.arange(number, device=images.device).view(-1, 1, 1) * height
        inside = ((first_row + rows) * width + columns).flatten()
        erased = _pixels(images).clone()
        self.fill = self.fill.to(images.device)  # once: a copy to an accelerator waits for all that it still has to do
        erased.view(-1, channels).index_copy_(0, inside, self.fill.expand(len(inside), -1))
        return erased.permute(0, 3, 1, 2)

    def _inside(self, length: int, images: Tensor, generator: Generator) -> Tensor:
        start = _integers(length - self.size + 1, images, generator).unsqueeze(1)
        return start + torch.arange(self.size, device=images.device)


class Normalise:
    """(N, C, H, W) images, uint8 or floats in 0..1, to float32 with `mean` and `std` (per channel, 0..1) taken out.

    The result is channels last in memory, the faster layout for convolutions, or contiguous.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], channels_last: bool = True) -> None:
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1) for values in (mean, std))
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._whole_images: dict[tuple[torch.device, torch.Size, bool], tuple[Tensor, Tensor]] = {}

    def __call__(self, images: Tensor) -> Tensor:
        mean, std = self._as_whole_images(images)
        return images.to(torch.float32, memory_format=self.memory_format, copy=True).sub_(mean).div_(std)

    def undo(self, images: Tensor) -> Tensor:
        """Normalised images back to floats in 0..1."""
        return (images * self.std.to(images.device) + self.mean.to(images.device)).clamp(0, 1)

    def _as_whole_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        # Broadcast over channels last, the innermost loop would be 3 values long, four times slower. Made once: a copy to
        # an accelerator waits for all that it still has to do.
        key = images.device, images.shape[1:], images.dtype == torch.uint8
        if key not in self._whole_images:
            scale = 255.0 if images.dtype == torch.uint8 else 1.0
            mean, std = (
                (values * scale)
                .to(images.device)
                .expand(1, *images.shape[1:])
                .contiguous(memory_format=self.memory_format)
                for values in (self.mean, self.std)
            )
            self._whole_images[key] = mean, std
        return self._whole_images[key]


class Augmentation:
    """The transforms in their order, then normalisation: (N, C, H, W) uint8 to normalised float32."""

    def __init__(self, transforms: Sequence[Callable[..., Tensor]], normalise: Normalise) -> None:
        self.transforms, self.normalise = list(transforms), normalise

    def __call__(self, images: Tensor, generator: Generator, index: Tensor | None = None, epoch: int = 1) -> Tensor:
        """`index` (N,) are the images' places in the training set, for scheduled transforms; without it, 0 to N - 1."""
        if index is None:
            index = torch.arange(len(images), device=images.device)
        for transform in self.transforms:
            if isinstance(transform, BatchTransform):
                images = transform(images, generator)
            elif isinstance(transform, ScheduledTransform):
                images = transform(images, index, epoch)
            else:
                images = _per_image(transform, images, generator)
        return self.normalise(images)

    def share_of_pixels(self, height: int, epoch: int) -> float:
        """How many of their pixels images of `height` keep in this epoch: about what a training step costs."""
        scheduled = [transform for transform in self.transforms if isinstance(transform, ScheduledTransform)]
        return math.prod(transform.share_of_pixels(height, epoch) for transform in scheduled)


def _mirrored(images: Tensor, flipped: Tensor) -> Tensor:
    # On a CPU picking whole images from both is three times as fast as torch.where, which does not vectorise bytes.
    both = _pixels(torch.cat([images, images.flip(-1)]))
    number = torch.arange(len(images), device=images.device)
    return both.index_select(0, number + len(images) * flipped).permute(0, 3, 1, 2)


def _pixels(images: Tensor) -> Tensor:
    # (N, H, W, C), contiguous: no copy where the images are channels last, as a data set's are.
    return images.permute(0, 2, 3, 1).contiguous()


def _integers(high: int, images: Tensor, generator: Generator) -> Tensor:
    return torch.randint(high, (len(images),), device=images.device, generator=generator)


def _per_image(transform: Callable[[Tensor], Tensor], images: Tensor, generator: Generator) -> Tensor:
    # torchvision draws from torch's global generator, its RandomChoice and RandomOrder from Python's: lend them this
    # batch's seed and put their state back.
    seed = int(torch.randint(2**31, (1,), device=images.device, generator=generator))
    with untouched_generators(images.device):
        for lend in (torch.manual_seed, np.random.seed, random.seed):
            lend(seed)
        return torch.stack([transform(image) for image in images])


@contextlib.contextmanager
def untouched_generators(device: torch.device) -> Iterator[None]:
    """Put back torch's (on the CPU and a CUDA `device`), NumPy's and Python's random generators.

    A user's transform may draw from any.
    """
    of_numpy, of_python = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            np.random.set_state(of_numpy)
            random.setstate(of_python)
