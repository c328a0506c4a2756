"""Which images are chosen, whether the heat maps are Grad-CAM's and leave no trace, and how pictures are read."""

import gc
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from resnet_cifar.custom_resnet import CustomResNet
from resnet_cifar.errors import ConfigError, DataError
from resnet_cifar.explain import check_layer, grad_cam, load_pictures, select_images


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CustomResNet(width=0.125)


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


TARGETS = torch.tensor([0, 3, 5, 9])


def logits_of(predictions, sureness):
    logits = torch.zeros(len(predictions), 3)
    logits[torch.arange(len(predictions)), torch.tensor(predictions)] = torch.tensor(sureness)
    return logits


def test_the_most_confident_mistakes_come_first():
    logits = logits_of([0, 1, 2, 1, 0], [9.0, 2.0, 4.0, 3.0, 5.0])
    selection = select_images(logits, torch.tensor([0, 0, 0, 0, 0]), 2, "test")
    assert selection.indices.tolist() == [2, 3]
    assert selection.predictions.tolist() == [2, 1]
    assert selection.confidences[0] == pytest.approx(np.exp(4) / (np.exp(4) + 2))
    assert selection.title == "2 most confident of 3 mistakes in 5 test images"


def test_mistakes_that_float32_rounds_to_certainty_keep_their_order():
    selection = select_images(logits_of([1, 1, 1], [20.0, 30.0, 25.0]), torch.tensor([0, 0, 0]), 3, "test")
    assert selection.indices.tolist() == [1, 2, 0]


@pytest.mark.parametrize("labels, count, title", [([0, 1, 0], 2, "All 2 mistakes"), ([2, 1, 0], 1, "The only mistake")])
def test_fewer_mistakes_than_asked_for_are_shown_alone(labels, count, title):
    selection = select_images(logits_of([2, 1, 2], [1.0, 2.0, 3.0]), torch.tensor(labels), 20, "val")
    assert len(selection.indices) == count
    assert selection.title == f"{title} in 3 val images"


def test_without_mistakes_the_least_confident_are_shown_and_the_title_says_so():
    selection = select_images(logits_of([0, 1, 2], [3.0, 1.0, 2.0]), torch.tensor([0, 1, 2]), 2, "test")
    assert selection.indices.tolist() == [1, 2]
    assert selection.title == "No mistakes in 3 test images: the 2 least confident instead"


def test_layer_3_gives_the_class_activation_map_of_the_fc_weights(model, images):
    heat_maps, map_size = grad_cam(model, images, TARGETS, "layer_3")
    model.eval()
    with torch.no_grad():
        features = model.layer_3(model.layer_2(model.layer_1(model.prep_layer(images))))
    expected = torch.einsum("nkhw,nk->nhw", features, model.fc.weight.detach()[TARGETS]).relu()
    expected = nn.functional.interpolate(expected[:, None], size=32, mode="bilinear")[:, 0]
    expected -= expected.amin((1, 2), keepdim=True)
    expected /= expected.amax((1, 2), keepdim=True) + 1e-7  # a map of zeros stays one
    assert map_size == (4, 4)
    np.testing.assert_allclose(heat_maps, expected.numpy(), atol=1e-4)


def test_maps_are_image_sized_and_span_0_to_1_and_name_their_size(model, images):
    heat_maps, map_size = grad_cam(model, images, TARGETS, "layer_2")
    assert map_size == (8, 8)
    assert heat_maps.shape == (4, 32, 32) and heat_maps.dtype == np.float32
    assert heat_maps.min() == 0 and heat_maps.max() == pytest.approx(1, abs=1e-5)


def test_nothing_that_speaks_for_the_class_gives_zeros(model, images):
    with torch.no_grad():
        model.fc.weight[TARGETS[0]] = -1  # layer 3 ends in a sum of ReLUs: every contribution is negative
    heat_maps, _ = grad_cam(model, images, TARGETS, "layer_3")
    assert not heat_maps[0].any()
    assert heat_maps[1].any()


def test_grad_cam_leaves_no_trace(model, images):
    model.train()
    model.layer_2.eval()
    model.prep_layer.requires_grad_(False)
    model.fc.weight.grad = torch.full_like(model.fc.weight, 7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]

    grad_cam(model, images, TARGETS, "layer_3")

    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.prep_layer.parameters())
    assert model.layer_3.inner_layer[0].weight.requires_grad
    assert (model.fc.weight.grad == 7).all() and model.fc.bias.grad is None
    assert not any(module._forward_hooks for module in model.modules())
    assert not images.requires_grad


def test_it_keeps_no_tensors(model, images):
    def alive():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    grad_cam(model, images, TARGETS, "layer_3")
    before = alive()
    kept = [grad_cam(model, images, TARGETS, "layer_3") for _ in range(3)]
    assert len(kept) == 3 and alive() == before


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_the_callers_grad_mode_and_autocast_change_nothing(model, images, context):
    expected, _ = grad_cam(model, images, TARGETS, "layer_2")
    with context():
        heat_maps, _ = grad_cam(model, images, TARGETS, "layer_2")
    np.testing.assert_array_equal(heat_maps, expected)


def test_channels_last_weights_and_images_give_the_same_maps(model, images):
    expected, _ = grad_cam(model, images, TARGETS, "layer_3")
    model.to(memory_format=torch.channels_last)
    heat_maps, _ = grad_cam(model, images.to(memory_format=torch.channels_last), TARGETS, "layer_3")
    np.testing.assert_allclose(heat_maps, expected, atol=1e-3)


def test_a_compiled_model_is_explained_by_the_module_inside_it(model, images):
    expected, _ = grad_cam(model, images, TARGETS, "layer_3")
    heat_maps, _ = grad_cam(torch.compile(model), images, TARGETS, "layer_3")
    np.testing.assert_array_equal(heat_maps, expected)


def test_a_relu_in_place_behind_the_layer_changes_nothing(model, images):
    expected, _ = grad_cam(model, images, TARGETS, "layer_3.inner_layer.2")
    model.layer_3.inner_layer[3].inplace = True
    heat_maps, _ = grad_cam(model, images, TARGETS, "layer_3.inner_layer.2")
    np.testing.assert_array_equal(heat_maps, expected)


def test_an_unknown_layer_is_refused_with_the_nearest(model):
    with pytest.raises(ConfigError, match=r"no module 'layer3'.\nNearest: layer_3"):
        check_layer(model, "layer3")


@pytest.mark.parametrize("layer", ["fc", "max_pool"])
def test_a_layer_without_a_map_is_refused(model, images, layer):
    with pytest.raises(ConfigError, match="no map"):
        grad_cam(model, images, TARGETS, layer)


def test_pictures_come_sorted_square_and_in_rgb_and_what_else_is_there_is_named_and_skipped(tmp_path, caplog):
    Image.new("RGB", (60, 40), (255, 0, 0)).save(tmp_path / "b.png")
    Image.new("L", (10, 10), 128).save(tmp_path / "a.png")
    Image.new("P", (50, 90)).save(tmp_path / "c.gif")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "more").mkdir()
    with caplog.at_level(logging.WARNING):
        names, pictures = load_pictures(tmp_path, 32)
    assert names == ["a.png", "b.png", "c.gif"]
    assert pictures.shape == (3, 3, 32, 32) and pictures.dtype == torch.uint8
    assert (pictures[0] == 128).all()
    assert pictures[1, :, 16, 16].tolist() == [255, 0, 0]
    assert "Skipped notes.txt" in caplog.text
    assert "Skipped the folder more" in caplog.text


def test_a_name_of_any_bytes_is_a_text(tmp_path):
    Image.new("RGB", (4, 4)).save(Path(os.fsdecode(os.fsencode(tmp_path) + b"/gr\xfcn.png")), format="png")
    assert load_pictures(tmp_path, size=32)[0] == ["gr\ufffdn.png"]


def test_transparency_is_white(tmp_path):
    Image.new("RGBA", (8, 8), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert (load_pictures(tmp_path, 8)[1] == 255).all()


def test_sixteen_bit_grey_keeps_its_greys(tmp_path):
    Image.fromarray(np.full((8, 8), 128 * 257, dtype=np.uint16)).save(tmp_path / "grey.png")
    assert (load_pictures(tmp_path, 8)[1] == 128).all()


@pytest.mark.parametrize("pixels", [np.full((8, 8), 200, dtype=np.int32), np.full((8, 8), 0.5, dtype=np.float32)])
def test_a_picture_whose_white_is_unknown_is_skipped_and_not_taken_for_black(tmp_path, caplog, pixels):
    Image.fromarray(pixels).save(tmp_path / "map.tiff")
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    assert load_pictures(tmp_path, 8)[0] == ["picture.png"]
    assert "Skipped map.tiff" in caplog.text and "8 or 16 bits" in caplog.text


def test_the_middle_of_a_wide_picture_is_kept(tmp_path):
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (load_pictures(tmp_path, 10)[1] == 200).all()


def test_a_camera_held_sideways_is_turned_upright(tmp_path):
    sideways = np.zeros((20, 20, 3), dtype=np.uint8)
    sideways[:, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees clockwise
    Image.fromarray(sideways).save(tmp_path / "sideways.png", exif=exif)
    picture = load_pictures(tmp_path, 20)[1][0]
    assert (picture[:, 2] == 255).all() and (picture[:, 17] == 0).all()


@pytest.mark.parametrize(
    "folder, message", [("missing", "is not there"), ("grey.png", "is no folder"), (".", "No readable picture")]
)
def test_a_folder_without_pictures_is_a_data_error(tmp_path, folder, message):
    if folder == "grey.png":
        (tmp_path / folder).touch()
    with pytest.raises(DataError, match=message):
        load_pictures(tmp_path / folder, 32)
