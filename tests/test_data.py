"""Data sets as tensors, subsets, the held-out split and the order of batches."""

from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision

from resnet_cifar.data import (
    Digits,
    Images,
    as_images,
    dataset_error,
    hold_out,
    seeded,
    shuffled_batches,
    steps_per_epoch,
    subset,
    training_batches,
)
from resnet_cifar.errors import ConfigError, DataError


def numbered(n=100):
    """Images whose pixels are their index."""
    pixels = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 32, 32)
    return Images(pixels.contiguous(memory_format=torch.channels_last), torch.arange(n), ("a", "b"))


def test_digits_are_split_1437_to_360_with_every_class_in_proportion():
    train, test = as_images(Digits(train=True)), as_images(Digits(train=False))
    assert train.images.shape == (1437, 3, 32, 32) and test.images.shape == (360, 3, 32, 32)
    shares = [images.labels.bincount() / len(images) for images in (train, test)]
    assert torch.allclose(*shares, atol=0.005)


def test_digits_of_the_two_splits_are_different_images():
    train, test = (as_images(Digits(train)).images.flatten(1) for train in (True, False))
    assert not {row.numpy().tobytes() for row in test} & {row.numpy().tobytes() for row in train}


def test_images_share_memory_with_the_data_set():
    class DataSet:
        data = np.zeros((2, 32, 32, 3), dtype=np.uint8)
        targets = (0, 1)
        classes = ("a", "b")

    images = as_images(DataSet())
    DataSet.data[1, 5, 6, 2] = 7
    assert images.images[1, 2, 5, 6] == 7


def test_pixels_in_any_order_of_memory_become_channels_last():
    blue_first = np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 3, 32, 32).transpose(0, 2, 3, 1)[..., ::-1]
    images = as_images(SimpleNamespace(data=blue_first, targets=[0, 1], classes=("a", "b"))).images
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(images.permute(0, 2, 3, 1), blue_first)


def test_pixels_of_another_shape_or_type_are_refused():
    for pixels in (np.zeros((2, 28, 28), dtype=np.uint8), np.zeros((2, 32, 32, 3))):
        with pytest.raises(DataError, match=r"should be \(N, H, W, C\) uint8"):
            as_images(SimpleNamespace(data=pixels, targets=[0, 1], classes=("a", "b")))


@pytest.mark.parametrize("targets", [[0], [0, 2], [0, -1], [[0, 1]]])
def test_targets_that_are_no_labels_of_the_images_are_refused(targets):
    pixels = np.zeros((2, 32, 32, 3), dtype=np.uint8)
    with pytest.raises(DataError, match=r"should be 2 numbers, one for each image,\nfrom 0 to 1"):
        as_images(SimpleNamespace(data=pixels, targets=targets, classes=("a", "b")))


def test_a_data_set_without_names_of_its_classes_is_refused():
    with pytest.raises(DataError, match="has no `targets` and no `classes`"):
        as_images(SimpleNamespace(data=np.zeros((2, 32, 32, 3), dtype=np.uint8)))


def test_classes_of_one_name_are_refused():
    pixels = np.zeros((2, 32, 32, 3), dtype=np.uint8)
    with pytest.raises(DataError, match="have the same name"):
        as_images(SimpleNamespace(data=pixels, targets=[0, 1], classes=("crane", "crane")))


def test_a_data_set_that_needs_no_files_is_not_to_be_deleted():
    assert "Delete" not in str(dataset_error(RuntimeError("x"), None))


def test_labels_of_any_integer_type_become_int64():
    pixels, labels = np.zeros((2, 32, 32, 3), dtype=np.uint8), np.array([0, 1], dtype=np.int32)
    assert as_images(SimpleNamespace(data=pixels, targets=labels, classes=("a", "b"))).labels.dtype == torch.int64


def test_names_of_classes_are_plain_text_that_a_checkpoint_can_hold():
    pixels, names = np.zeros((2, 32, 32, 3), dtype=np.uint8), np.array(["cat", "dog"])
    classes = as_images(SimpleNamespace(data=pixels, targets=[0, 1], classes=names)).classes
    assert [type(name) for name in classes] == [str, str]


def test_cifar10_is_the_real_one(cifar10):
    test = as_images(torchvision.datasets.CIFAR10(cifar10, train=False))
    assert test.images.shape == (10_000, 3, 32, 32)
    assert test.labels.bincount().tolist() == [1000] * 10
    assert test.classes[:3] == ("airplane", "automobile", "bird")


def test_a_subset_is_the_first_images():
    assert subset(numbered(), 7, "data.train_size").labels.tolist() == list(range(7))
    assert len(subset(numbered(), None, "data.train_size")) == 100


def test_a_subset_larger_than_the_data_set_is_refused():
    with pytest.raises(ConfigError, match=r"data\.train_size=101"):
        subset(numbered(), 101, "data.train_size")


def test_held_out_images_are_no_training_images_and_always_the_same():
    train, val = hold_out(numbered(), 20)
    assert sorted([*train.labels.tolist(), *val.labels.tolist()]) == list(range(100))
    torch.manual_seed(123)
    assert torch.equal(hold_out(numbered(), 20)[1].labels, val.labels)


def test_an_epoch_has_every_image_once_and_the_smaller_batch_last():
    batches = list(shuffled_batches(numbered(), 32, seed=0, epoch=1))
    assert [len(labels) for _, labels, _ in batches] == [32, 32, 32, 4]
    assert steps_per_epoch(numbered(), 32) == 4
    assert sorted(torch.cat([labels for _, labels, _ in batches]).tolist()) == list(range(100))


def test_images_stay_with_their_labels_and_places():
    for images, labels, index in shuffled_batches(numbered(), 32, seed=0, epoch=1):
        assert torch.equal(images[:, 0, 0, 0].long(), labels) and torch.equal(index, labels)


def order(**key):
    return torch.cat([labels for _, labels, _ in shuffled_batches(numbered(), 32, **key)]).tolist()


def test_order_is_set_by_seed_and_epoch():
    assert order(seed=0, epoch=1) == order(seed=0, epoch=1)
    assert order(seed=0, epoch=1) != order(seed=0, epoch=2)
    assert order(seed=0, epoch=1) != order(seed=1, epoch=1)


def test_skipped_batches_change_nothing_about_the_rest():
    def draw(images, generator, index, epoch):
        return images + torch.randint(0, 100, (len(images), 1, 1, 1), generator=generator)

    whole = [images for images, _ in training_batches(numbered(), draw, 32, seed=0, epoch=3)]
    rest = [images for images, _ in training_batches(numbered(), draw, 32, seed=0, epoch=3, skip=2)]
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], rest, strict=True))


def test_generators_of_different_keys_differ():
    draws = {
        torch.rand(1, generator=seeded(*key)).item()
        for key in [(0, 0, 1), (0, 1, 1), (1, 0, 1), (0, 1, 1, 1), (2**31, 0, 1)]
    }
    assert len(draws) == 5


def test_a_failed_download_names_the_offline_command():
    message = str(dataset_error(URLError("no route to host"), "data", "cifar-10-batches-py"))
    assert "is not there" in message and "no route to host" in message
    assert "run offline: experiment=quickstart" in message and len(message.splitlines()) <= 3


def test_a_data_set_with_wrong_checksums_is_called_damaged(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    message = str(dataset_error(URLError("no route to host"), str(tmp_path), "cifar-10-batches-py"))
    assert "is damaged" in message and len(message.splitlines()) <= 3


def test_a_folder_that_is_not_there_is_not_to_be_deleted(tmp_path):
    missing = RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
    message = str(dataset_error(missing, str(tmp_path), "cifar-10-batches-py"))
    assert message.startswith(f"There is no {tmp_path}/cifar-10-batches-py.") and "Delete" not in message


def test_a_download_that_failed_says_why(tmp_path):
    message = str(dataset_error(OSError(28, "No space left on device"), str(tmp_path), "cifar-10-batches-py"))
    assert "No space left on device" in message and len(message.splitlines()) <= 3


def test_a_folder_that_cannot_be_read_is_named():
    message = str(dataset_error(PermissionError(13, "Permission denied"), "/somewhere"))
    assert "/somewhere" in message and "Permission denied" in message and len(message.splitlines()) <= 3
