"""The custom ResNet of the assignment: 6,573,130 parameters at width 1, layer names as in its solution's table."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_CHANNELS = 16  # fewer are too few for torch's batch norm of bf16 in channels_last


class BatchNorm2d(nn.BatchNorm2d):
    """torch's batch norm, (N, C, H, W) to the same; on a CPU it trains on bf16 of few channels in channels_last as on NCHW.

    There torch's kernel for channels_last takes longer than its kernel for NCHW and the copies to it and back: experiments/speed.
    """

    def forward(self, x: Tensor) -> Tensor:
        few_in_bf16 = self.num_features < FEW_CHANNELS and x.dtype == torch.bfloat16 and x.device.type == "cpu"
        if not (few_in_bf16 and self.training) or x.is_contiguous() or torch.compiler.is_compiling():
            return super().forward(x)
        nchw, channels_last = torch.contiguous_format, torch.channels_last
        return _Layout.apply(super().forward(_Layout.apply(x, nchw, channels_last)), channels_last, nchw)


class _Layout(torch.autograd.Function):
    """A copy in one memory format, whose gradient goes back in another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: torch.memory_format, of_gradient: torch.memory_format) -> Tensor:
        ctx.of_gradient = of_gradient
        return x.contiguous(memory_format=layout)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.contiguous(memory_format=ctx.of_gradient), None, None


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps height and width; without bias, since batch norm follows and has its own."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)


def conv_pool_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    """(N, in_channels, H, W) to (N, out_channels, H/2, W/2)."""
    return nn.Sequential(conv3x3(in_channels, out_channels), nn.MaxPool2d(2), *bn_relu(out_channels))


def bn_relu(channels: int) -> tuple[BatchNorm2d, nn.ReLU]:
    """Batch norm and, in place (the backward pass needs nothing but its result), ReLU."""
    return BatchNorm2d(channels), nn.ReLU(inplace=True)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, `relu(F(x) + x)`: the basic block of He et al., arXiv:1512.03385.

    With `inner_shortcut=False` it is `relu(F(x))`, the Conv-BN-ReLU-Conv-BN-ReLU of the assignment's text.
    """

    def __init__(self, channels: int, inner_shortcut: bool) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, channels)
        self.bn1 = BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = BatchNorm2d(channels)
        self.shortcut = nn.Sequential() if inner_shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        if self.shortcut is not None:
            out = out + self.shortcut(x)
        return F.relu(out, inplace=True)


class CustomBlock(nn.Module):
    """X = Conv-MaxPool-BN-ReLU, R = residual block of X, output X + R: (N, C, H, W) to (N, out_channels, H/2, W/2)."""

    def __init__(self, in_channels: int, out_channels: int, inner_shortcut: bool) -> None:
        super().__init__()
        self.inner_layer = conv_pool_bn_relu(in_channels, out_channels)
        self.res_block = BasicBlock(out_channels, inner_shortcut)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner_layer(x)
        return x + self.res_block(x)


class CustomResNet(nn.Module):
    """The assignment's network: normalised images (N, 3, 32, 32), or of 8 to 39 pixels, to logits (N, num_classes).

    `width` multiplies the channel counts 64-128-256-512. `inner_shortcut=True` is the solution's residual block,
    `relu(F(x) + x)`, to which the layer adds X once more; `False` is the assignment's text, without the inner addition.
    `logit_scale` multiplies the logits: 0.125 in David Page, How to Train Your ResNet (2018).
    There is no softmax: cross entropy takes logits and applies its own log-softmax, a second one would flatten the gradients.
    """

    def __init__(
        self, num_classes: int = 10, width: float = 1.0, inner_shortcut: bool = True, logit_scale: float = 1.0
    ) -> None:
        super().__init__()
        prep, first, second, third = (max(1, round(width * channels)) for channels in (64, 128, 256, 512))
        self.prep_layer = nn.Sequential(conv3x3(3, prep), *bn_relu(prep))
        self.layer_1 = CustomBlock(prep, first, inner_shortcut)
        self.layer_2 = conv_pool_bn_relu(first, second)
        self.layer_3 = CustomBlock(second, third, inner_shortcut)
        # On 32x32 images the map is 4x4 here; ceil_mode pools the smaller maps of smaller training images whole, too.
        self.max_pool = nn.Sequential(nn.MaxPool2d(4, ceil_mode=True))
        self.fc = nn.Linear(third, num_classes)
        self.logit_scale = logit_scale

    def forward(self, images: Tensor) -> Tensor:
        x = self.prep_layer(images)
        x = self.layer_1(x)
        x = self.layer_2(x)
        x = self.layer_3(x)
        return self.fc(self.max_pool(x).flatten(1)) * self.logit_scale
