"""Every figure draws what it was given, says what matters in words, and leaves matplotlib as it was."""

import io

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from resnet_cifar import figures

CLASSES = ["airplane", "automobile", "bird"]
HISTORY = [
    {
        "epoch": epoch,
        "train_loss": 1 / epoch,
        "train_accuracy": 30.0 * epoch,
        "eval_loss": 2.0,
        "eval_accuracy": accuracy,
    }
    for epoch, accuracy in enumerate([40.0, 71.5, 70.25], start=1)
]


def pictures(count):
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def misclassified(count):
    return figures.misclassified_images(
        pictures(count), [1] * count, [0] * count, [0.9876] * count, CLASSES, "Mistakes"
    )


def explained(count, heat_map=1.0, against="correct"):
    heat_maps = np.full((count, 32, 32), heat_map)
    return figures.grad_cam(
        pictures(count),
        heat_maps,
        [1] * count,
        [0] * count,
        [0.9] * count,
        CLASSES,
        "layer_3",
        (4, 4),
        against,
        "Mistakes",
    )


FIGURES = {
    "sample_training_images": lambda: figures.sample_training_images(pictures(20), [2] * 20, CLASSES),
    "misclassified_images": lambda: misclassified(20),
    "grad_cam": lambda: explained(20),
    "loss_and_accuracy": lambda: figures.loss_and_accuracy(HISTORY, "test"),
    "loss_and_accuracy_of_one_epoch": lambda: figures.loss_and_accuracy(HISTORY[:1], "val"),
    "lr_finder": lambda: figures.lr_finder([0.001, 0.01, 0.1], [3.0, 1.0, 2.0], 0.01, "min_loss"),
    "lr_history": lambda: figures.lr_history([0.1, 0.2, 0.1, 0.0], 2),
    "lr_history_of_one_step": lambda: figures.lr_history([0.1], 98),
    "confusion_matrix": lambda: figures.confusion_matrix(np.diag([5, 0, 7]), CLASSES),
}


def texts(figure):
    return "\n".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def images_drawn(figure):
    return [axes.images[0].get_array() for axes in figure.axes if axes.images]


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn_1350_pixels_wide_and_matplotlib_stays_as_it_was(name):
    before = dict(matplotlib.rcParams)
    figure = FIGURES[name]()
    file = io.BytesIO()
    figure.savefig(file, format="raw")
    assert isinstance(figure, Figure)
    width, height = (round(inches * figure.dpi) for inches in figure.get_size_inches())
    assert width == 1350 and len(file.getvalue()) == 4 * width * height
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("draw", [misclassified, explained])
def test_captions_of_long_class_names_stay_in_the_figure_and_off_each_other(draw, monkeypatch):
    monkeypatch.setattr("test_figures.CLASSES", ["a-class-name-of-28-characters"] * 3)
    figure = draw(20)
    figure.draw_without_rendering()
    captions = [axes.title for axes in figure.axes if axes.title.get_text()]
    boxes = [caption.get_window_extent() for caption in captions]
    assert min(box.x0 for box in boxes) >= 0 and max(box.x1 for box in boxes) <= figure.bbox.x1
    assert not any(box.overlaps(other) for box in boxes for other in boxes if other is not box)
    assert min(caption.get_fontsize() for caption in captions) >= 9


def test_a_training_image_lies_under_its_class_unaltered():
    images = pictures(3)
    figure = figures.sample_training_images(images, [2, 0, 1], CLASSES)
    assert [axes.get_title("center") for axes in figure.axes] == ["bird", "airplane", "automobile"]
    np.testing.assert_array_equal(images_drawn(figure), images)


def test_images_are_drawn_pixel_by_pixel():
    assert misclassified(1).axes[0].images[0].get_interpolation() == "nearest"


@pytest.mark.parametrize("draw", [misclassified, explained])
@pytest.mark.parametrize("count", [1, 3, 20])
def test_every_image_has_a_panel(draw, count):
    figure = draw(count)
    assert len([axes for axes in figure.axes if "true:" in axes.get_title("center")]) == count


def test_a_misclassified_image_names_its_true_and_predicted_class_and_confidence():
    assert misclassified(1).axes[0].get_title("center") == "true: automobile\npredicted: airplane\nconfidence 98.8%"


def test_grad_cam_says_layer_map_size_and_class_it_is_against():
    assert "Grad-CAM against the predicted class: layer_3, 4x4 map" in texts(explained(1, against="predicted"))


def test_grad_cam_draws_the_image_itself_beside_the_overlay():
    panel = images_drawn(explained(1))[0]
    np.testing.assert_allclose(panel[:, :32], pictures(1)[0] / 255)
    hottest = matplotlib.colormaps[figures.HEAT_MAP_COLOURS](1.0)[:3]
    np.testing.assert_allclose(panel[:, -32:], (pictures(1)[0] / 255 + hottest) / 2)


@pytest.mark.parametrize("against, target", [("correct", "automobile"), ("predicted", "airplane")])
def test_a_map_of_zeros_is_said_in_words(against, target):
    assert f"no evidence\nfor {target}" in texts(explained(1, heat_map=0.0, against=against))
    assert "no evidence" not in texts(explained(1, against=against))


def test_pictures_without_labels_carry_their_names():
    figure = figures.grad_cam(
        pictures(1) / 255,
        np.ones((1, 32, 32)),
        None,
        [2],
        [0.5],
        CLASSES,
        "layer_2",
        (8, 8),
        "predicted",
        "Own",
        ["$me_$2_.jpg"],
    )
    assert figure.axes[0].get_title("center") == "$me_$2_.jpg\npredicted: bird (50.0%)"
    figure.canvas.draw()  # as mathematics the name could not be


def test_loss_and_accuracy_name_the_final_and_the_best_accuracy():
    shown = texts(figures.loss_and_accuracy(HISTORY, "test"))
    assert "final test 70.25%, best 71.50% (epoch 2)" in shown


def test_loss_and_accuracy_draw_the_history_of_the_split_they_name():
    loss, accuracy = figures.loss_and_accuracy(HISTORY, "val").axes
    assert {line.get_label(): list(line.get_ydata()) for line in accuracy.lines[:2]} == {
        "train": [30.0, 60.0, 90.0],
        "val": [40.0, 71.5, 70.25],
    }
    assert list(loss.lines[1].get_ydata()) == [2.0, 2.0, 2.0]


def test_a_loss_of_smoothed_labels_says_so_and_an_accuracy_does_not():
    loss, accuracy = figures.loss_and_accuracy(HISTORY, "test", label_smoothing=0.1).axes
    names = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in (loss, accuracy)]
    assert names == [["train, labels smoothed by 0.1", "test"], ["train", "test"]]


def test_a_single_epoch_has_a_visible_point_and_one_tick():
    figure = figures.loss_and_accuracy(HISTORY[:1], "test")
    figure.draw_without_rendering()
    for axes in figure.axes:
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]
        assert all(line.get_marker() == "o" for line in axes.lines)


def test_lr_finder_marks_the_chosen_lr_on_a_log_axis_and_names_it():
    figure = figures.lr_finder([0.001, 0.01, 0.1], [3.0, 1.0, 2.0], 0.01, "steepest")
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    assert axes.lines[-1].get_xydata().tolist() == [[0.01, 1.0]]
    assert "max LR 0.01, at the steepest descent" in texts(figure)


def test_lr_history_counts_in_epochs_and_names_the_peak():
    figure = figures.lr_history([0.1, 0.2, 0.3, 0.1], 2)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xdata(), [0.5, 1, 1.5, 2])
    assert "first 0.1, peak 0.3 at epoch 1.5, last 0.1" in texts(figure)


def test_a_constant_lr_has_no_peak():
    assert "0.001 in all steps" in texts(figures.lr_history([0.001] * 4, 2))


def test_confusion_matrix_has_true_classes_in_rows_and_counts_in_cells():
    figure = figures.confusion_matrix(np.array([[3, 1, 0], [0, 1200, 0], [0, 0, 0]]), CLASSES)
    axes = figure.axes[0]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells[1, 0] == "1" and cells[0, 1] == "0" and cells[1, 1] == "1,200"
    np.testing.assert_allclose(axes.images[0].get_array()[0], [0.75, 0.25, 0])
    assert "99.92% of 1,204 images correct" in texts(figure)


def test_no_more_classes_are_named_than_have_room():
    figure = figures.confusion_matrix(np.eye(100, dtype=int), [f"class {number}" for number in range(100)])
    axes = figure.axes[0]
    for axis in (axes.xaxis, axes.yaxis):
        named = [label.get_text() for label in axis.get_ticklabels()]
        assert named[:2] == ["class 0", "class 3"] and len(named) == 34


def test_a_class_name_is_no_formula():
    names = ["$10-$20", "$20-$30"]
    drawn = [
        figures.confusion_matrix(np.eye(2, dtype=int), names),
        figures.sample_training_images(np.zeros((2, 4, 4, 3)), [0, 1], names),
    ]
    for figure in drawn:
        texts = [text for text in figure.findobj(Text) if "$" in text.get_text()]
        assert texts and not any(text.get_parse_math() for text in texts)


def test_many_classes_have_colours_alone():
    figure = figures.confusion_matrix(np.eye(21, dtype=int), [str(number) for number in range(21)])
    assert not figure.axes[0].texts
