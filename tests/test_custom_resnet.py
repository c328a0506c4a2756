"""The network against the assignment's table, number for number."""

import pytest
import torch
from torchinfo import summary

from resnet_cifar.custom_resnet import BasicBlock, BatchNorm2d, CustomResNet

# Layer, kernel, input and output shape at batch 20, parameters, mult-adds: the solution's table of the assignment.
TABLE = [
    ("CustomResNet", None, [20, 3, 32, 32], [20, 10], None, None),
    ("prep_layer", None, [20, 3, 32, 32], [20, 64, 32, 32], None, None),
    ("prep_layer.0", [3, 3], [20, 3, 32, 32], [20, 64, 32, 32], 1_728, 35_389_440),
    ("prep_layer.1", None, [20, 64, 32, 32], [20, 64, 32, 32], 128, 2_560),
    ("prep_layer.2", None, [20, 64, 32, 32], [20, 64, 32, 32], None, None),
    ("layer_1", None, [20, 64, 32, 32], [20, 128, 16, 16], None, None),
    ("layer_1.inner_layer", None, [20, 64, 32, 32], [20, 128, 16, 16], None, None),
    ("layer_1.inner_layer.0", [3, 3], [20, 64, 32, 32], [20, 128, 32, 32], 73_728, 1_509_949_440),
    ("layer_1.inner_layer.1", 2, [20, 128, 32, 32], [20, 128, 16, 16], None, None),
    ("layer_1.inner_layer.2", None, [20, 128, 16, 16], [20, 128, 16, 16], 256, 5_120),
    ("layer_1.inner_layer.3", None, [20, 128, 16, 16], [20, 128, 16, 16], None, None),
    ("layer_1.res_block", None, [20, 128, 16, 16], [20, 128, 16, 16], None, None),
    ("layer_1.res_block.conv1", [3, 3], [20, 128, 16, 16], [20, 128, 16, 16], 147_456, 754_974_720),
    ("layer_1.res_block.bn1", None, [20, 128, 16, 16], [20, 128, 16, 16], 256, 5_120),
    ("layer_1.res_block.conv2", [3, 3], [20, 128, 16, 16], [20, 128, 16, 16], 147_456, 754_974_720),
    ("layer_1.res_block.bn2", None, [20, 128, 16, 16], [20, 128, 16, 16], 256, 5_120),
    ("layer_1.res_block.shortcut", None, [20, 128, 16, 16], [20, 128, 16, 16], None, None),
    ("layer_2", None, [20, 128, 16, 16], [20, 256, 8, 8], None, None),
    ("layer_2.0", [3, 3], [20, 128, 16, 16], [20, 256, 16, 16], 294_912, 1_509_949_440),
    ("layer_2.1", 2, [20, 256, 16, 16], [20, 256, 8, 8], None, None),
    ("layer_2.2", None, [20, 256, 8, 8], [20, 256, 8, 8], 512, 10_240),
    ("layer_2.3", None, [20, 256, 8, 8], [20, 256, 8, 8], None, None),
    ("layer_3", None, [20, 256, 8, 8], [20, 512, 4, 4], None, None),
    ("layer_3.inner_layer", None, [20, 256, 8, 8], [20, 512, 4, 4], None, None),
    ("layer_3.inner_layer.0", [3, 3], [20, 256, 8, 8], [20, 512, 8, 8], 1_179_648, 1_509_949_440),
    ("layer_3.inner_layer.1", 2, [20, 512, 8, 8], [20, 512, 4, 4], None, None),
    ("layer_3.inner_layer.2", None, [20, 512, 4, 4], [20, 512, 4, 4], 1_024, 20_480),
    ("layer_3.inner_layer.3", None, [20, 512, 4, 4], [20, 512, 4, 4], None, None),
    ("layer_3.res_block", None, [20, 512, 4, 4], [20, 512, 4, 4], None, None),
    ("layer_3.res_block.conv1", [3, 3], [20, 512, 4, 4], [20, 512, 4, 4], 2_359_296, 754_974_720),
    ("layer_3.res_block.bn1", None, [20, 512, 4, 4], [20, 512, 4, 4], 1_024, 20_480),
    ("layer_3.res_block.conv2", [3, 3], [20, 512, 4, 4], [20, 512, 4, 4], 2_359_296, 754_974_720),
    ("layer_3.res_block.bn2", None, [20, 512, 4, 4], [20, 512, 4, 4], 1_024, 20_480),
    ("layer_3.res_block.shortcut", None, [20, 512, 4, 4], [20, 512, 4, 4], None, None),
    ("max_pool", None, [20, 512, 4, 4], [20, 512, 1, 1], None, None),
    ("max_pool.0", 4, [20, 512, 4, 4], [20, 512, 1, 1], None, None),
    ("fc", None, [20, 512], [20, 10], 5_130, 102_600),
]


@pytest.fixture(scope="module")
def measured():
    columns = ("kernel_size", "input_size", "output_size", "num_params", "mult_adds")
    return summary(CustomResNet(), input_size=(20, 3, 32, 32), depth=4, col_names=columns, verbose=0, device="cpu")


def test_every_layer_is_the_solutions(measured):
    rows = []
    for layer in measured.summary_list:
        name = ".".join([*_parents(layer), layer.var_name]) if layer.depth else layer.var_name
        # torchinfo gives a table cell to leaves alone, and counts a layer's own mult-adds only there.
        own = layer.is_leaf_layer and layer.num_params > 0
        rows.append(
            (
                name,
                layer.kernel_size,
                layer.input_size,
                layer.output_size,
                layer.num_params if own else None,
                layer.macs if own else None,
            )
        )
    assert rows == TABLE


def _parents(layer):
    names = []
    while layer.parent_info is not None and layer.parent_info.depth > 0:
        layer = layer.parent_info
        names.insert(0, layer.var_name)
    return names


def test_totals_are_the_solutions(measured):
    assert measured.total_params == measured.trainable_params == 6_573_130
    assert round(measured.total_mult_adds / 1e9, 2) == 7.59


def test_residual_block_of_the_solution_adds_its_input():
    block, x = zeroed_block(inner_shortcut=True)
    assert torch.equal(block(x), x.relu())


def test_residual_block_of_the_text_does_not_add_its_input():
    block, x = zeroed_block(inner_shortcut=False)
    assert torch.equal(block(x), torch.zeros_like(x))


def zeroed_block(inner_shortcut):
    """A block whose convolutions give zero, so that only what its input adds is left."""
    block = BasicBlock(4, inner_shortcut).eval()
    for convolution in (block.conv1, block.conv2):
        torch.nn.init.zeros_(convolution.weight)
    return block, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_both_readings_have_the_same_parameters():
    shapes = [
        {name: parameter.shape for name, parameter in CustomResNet(inner_shortcut=reading).named_parameters()}
        for reading in (True, False)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("width", [0.125, 0.5, 2.0])
def test_width_multiplies_every_channel_count(width):
    convolutions = [m for m in CustomResNet(width=width).modules() if isinstance(m, torch.nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [int(width * n) for n in (64, 128, 128, 128, 256, 512, 512, 512)]


def test_output_is_logits_of_the_number_of_classes():
    logits = CustomResNet(num_classes=7, width=0.125)(torch.randn(3, 3, 32, 32))
    assert logits.shape == (3, 7)
    assert not torch.allclose(logits.sum(1), torch.ones(3))  # no softmax
    assert not torch.allclose(logits.exp().sum(1), torch.ones(3))  # no log-softmax


def test_logits_can_be_scaled():
    torch.manual_seed(0)
    plain, scaled = CustomResNet(width=0.125).eval(), CustomResNet(width=0.125, logit_scale=0.125).eval()
    scaled.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(scaled(images), plain(images) * 0.125)


def test_smaller_images_are_pooled_whole():
    network = CustomResNet(width=0.125).eval()
    for size in (16, 24):
        assert network(torch.randn(2, 3, size, size)).shape == (2, 10)


NCHW, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


@pytest.mark.parametrize(
    ("channels", "dtype", "training", "layout", "torchs"),
    [
        (8, torch.bfloat16, True, CHANNELS_LAST, NCHW),
        (8, torch.bfloat16, True, NCHW, NCHW),
        (16, torch.bfloat16, True, CHANNELS_LAST, CHANNELS_LAST),
        (8, torch.float32, True, CHANNELS_LAST, CHANNELS_LAST),
        (8, torch.bfloat16, False, CHANNELS_LAST, CHANNELS_LAST),
    ],
)
def test_batch_norm_is_torchs_and_few_channels_of_bf16_train_as_nchw(channels, dtype, training, layout, torchs):
    generator = torch.Generator().manual_seed(0)
    images = (torch.randn(16, channels, 9, 9, generator=generator) * 3 + 1).to(dtype)
    results = []
    for layer, its_layout in ((BatchNorm2d(channels), layout), (torch.nn.BatchNorm2d(channels), torchs)):
        x = images.contiguous(memory_format=its_layout).requires_grad_()
        normalised = layer.train(training)(x)
        loss = (normalised.relu_().float() ** 3).sum()
        gradients = torch.autograd.grad(loss, (x, layer.weight, layer.bias))
        assert all(each.is_contiguous(memory_format=its_layout) for each in (normalised, gradients[0]))
        results.append([normalised, *gradients, layer.running_mean, layer.running_var])
    for mine, its in zip(*results, strict=True):
        assert torch.equal(mine, its)
