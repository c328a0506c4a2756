"""The network as others use it: raw pictures in, logits out, nothing to prepare."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class DeployedModel(nn.Module):
    """A copy of `network` on the CPU in evaluation mode, its normalisation built in.

    Takes pictures (N, H, W, 3) of uint8 RGB and returns logits (N, num_classes). `mean` and `std` are per channel, of
    images scaled to 0-1. The copy is neither compiled nor channels_last: what is exported should run anywhere.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = copy.deepcopy(getattr(network, "_orig_mod", network))
        self.network.to("cpu", torch.float32, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.register_buffer("mean", torch.tensor(list(mean)))
        self.register_buffer("std", torch.tensor(list(std)))
        self.eval().requires_grad_(False)

    def forward(self, pictures: Tensor) -> Tensor:
        images = (pictures.float() / 255 - self.mean) / self.std
        return self.network(images.permute(0, 3, 1, 2))
