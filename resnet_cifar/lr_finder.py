"""The learning-rate range test of Smith, arXiv:1506.01186, by torch-lr-finder on a copy of the model."""

import contextlib
import copy
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from resnet_cifar.augment import untouched_generators
from resnet_cifar.errors import DivergedError
from resnet_cifar.loop import Precision, autocast


@dataclass(frozen=True)
class RangeTest:
    """Learning rates of the first parameter group and the loss met at each, float64 (n,), n at most `num_iter`.

    Losses are batch means, smoothed exponentially (0.05 of the new one), as torch-lr-finder does.
    """

    lrs: np.ndarray
    losses: np.ndarray


def range_test(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    end_lr: float = 0.1,
    num_iter: int = 100,
    step_mode: Literal["exp", "linear"] = "exp",
    precision: Precision = "fp32",
    label_smoothing: float = 0.0,
) -> RangeTest:
    """Train a copy from the optimizer's learning rate up to `end_lr` over `num_iter` batches; Smith, arXiv:1506.01186.

    `batches` are normalised images (N, C, H, W) and labels (N,) on the model's device. Model, optimizer and the random
    generators (Python's, NumPy's, torch's on CPU and CUDA) are left as they were. It ends early where the loss exceeds five
    times its lowest value, torch-lr-finder's default.

    Raises:
        ValueError: there are fewer than `num_iter` batches, or `num_iter` is 1.
        RuntimeError: the optimizer has a scheduler already: build that one afterwards.
    """
    from torch_lr_finder import LRFinder, TrainDataLoaderIter

    class Batches(TrainDataLoaderIter):
        def __init__(self) -> None:
            self._iterator = iter(batches)
            self.count = 0

        def __next__(self) -> tuple[Tensor, Tensor]:
            for batch in self._iterator:
                self.count += 1
                return batch
            raise ValueError(
                f"batches ended after {self.count} of num_iter={num_iter} iterations: give more, or lower num_iter"
            )

    # One deepcopy of both keeps the copied optimizer on the copied parameters.
    model, optimizer = copy.deepcopy((model, optimizer))
    device = next(model.parameters()).device
    model.forward = autocast(device, precision)(model.forward)

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)  # as in the training loop

    finder = LRFinder(model, optimizer, criterion, device=device)
    silence = io.StringIO()  # torch-lr-finder prints, and draws a bar of its own
    with untouched_generators(device), contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        finder.range_test(Batches(), end_lr=end_lr, num_iter=num_iter, step_mode=step_mode)
    return RangeTest(np.array(finder.history["lr"]), np.array(finder.history["loss"]))


def suggest(curve: RangeTest, select: Literal["min_loss", "steepest", "valley"] = "min_loss") -> float:
    """The learning rate that `select` picks from the curve.

    `min_loss` is the lowest loss, as in the assignment; `steepest` the steepest fall, as torch-lr-finder; `valley` half way
    down the longest falling subsequence, as fastai.

    Raises:
        DivergedError: the curve has fewer than two finite losses to choose by.
    """
    finite = np.isfinite(curve.losses)
    if finite.sum() < 2:
        raise DivergedError(
            "The LR finder met no finite loss, so there is no learning rate to choose.\n"
            "Lower optimizer.lr, where it starts, or give a number: scheduler.max_lr=0.01"
        )
    lrs, losses = curve.lrs[finite], curve.losses[finite]
    return float(lrs[SELECT[select](losses)])


def _min_loss(losses: np.ndarray) -> int:
    return int(losses.argmin())


def _steepest(losses: np.ndarray) -> int:
    """Where the loss falls fastest along the grid, its first 10 and last 5 points aside: torch-lr-finder's own suggestion."""
    skipped = 10 if len(losses) > 20 else 0
    return skipped + int(np.gradient(losses[skipped : len(losses) - skipped // 2]).argmin())


def _valley(losses: np.ndarray) -> int:
    """Half way down the longest falling subsequence of the losses: fastai's `valley`, its default since 2.3."""
    length = np.ones(len(losses), dtype=int)
    for i in range(1, len(losses)):
        falling = losses[:i] > losses[i]
        if falling.any():
            length[i] = length[:i][falling].max() + 1
    end = int(length.argmax())
    start = end - int(length[end])
    third = (end - start) // 3
    return max(0, start + third + third // 2)


SELECT: dict[str, Callable[[np.ndarray], int]] = {"min_loss": _min_loss, "steepest": _steepest, "valley": _valley}
