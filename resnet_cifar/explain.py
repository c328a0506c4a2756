"""Which images to look at, and which of their pixels speak for a class; plus a user's own pictures as images."""

import copy
import difflib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from resnet_cifar.errors import ConfigError, DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """Images to show, in order: their indices, predictions and confidences (0..1), each (n,), and what they are."""

    indices: np.ndarray
    predictions: np.ndarray
    confidences: np.ndarray
    title: str


def select_images(logits: Tensor, labels: Tensor, num_images: int = 20, evaluated_on: str = "test") -> Selection:
    """The most confident mistakes, at most `num_images`, or where there are none the least confident images.

    Logits are (N, K), labels (N,); the title says which of the two, of how many in `evaluated_on` (test or val).
    """
    # float64: many confident mistakes round to 1.0 in float32, and their order would be lost.
    confidences, predictions = (array.numpy() for array in logits.detach().cpu().double().softmax(dim=1).max(dim=1))
    mistakes = np.flatnonzero(predictions != labels.cpu().numpy())
    images = f"{len(predictions):,} {evaluated_on} images"
    if len(mistakes):
        indices = mistakes[np.argsort(-confidences[mistakes], kind="stable")][:num_images]
        if len(indices) < len(mistakes):
            title = f"{len(indices)} most confident of {len(mistakes):,} mistakes in {images}"
        else:
            title = f"{'The only mistake' if len(mistakes) == 1 else f'All {len(mistakes)} mistakes'} in {images}"
    else:
        indices = np.argsort(confidences, kind="stable")[:num_images]
        title = f"No mistakes in {images}: the {len(indices)} least confident instead"
    return Selection(indices, predictions[indices], confidences[indices], title)


def check_layer(model: nn.Module, layer: str) -> None:
    """Raise `ConfigError`, naming the nearest, unless `layer` is a module path of the model; to ask before training."""
    paths = [path for path, _ in getattr(model, "_orig_mod", model).named_modules() if path]
    if layer not in paths:
        nearest = difflib.get_close_matches(layer, paths, n=3, cutoff=0)
        raise ConfigError(f"explain.layers: the model has no module '{layer}'.\nNearest: {', '.join(nearest)}.")


def grad_cam(model: nn.Module, images: Tensor, targets: Tensor, layer: str) -> tuple[np.ndarray, tuple[int, int]]:
    """Where in each image `layer` finds evidence for a class; Grad-CAM, Selvaraju et al., arXiv:1610.02391.

    Normalised images (N, 3, H, W), a class per image (N,) and a module path such as `layer_3` give heat maps (N, H, W),
    each scaled to 0..1, and the size (h, w) of the map behind them. All zeros: nothing there speaks for the class.

    The score is the class's own logit; layer 3 is taken at its output, 4x4 as it is: only a max-pool and `fc` follow,
    so the channel weights are the class's row of `fc`, and the map is the CAM of Zhou et al., arXiv:1512.04150. The 8x8
    convolution inside the layer looks finer and says less: of four places the pooling passes one's gradient. The logit
    minus the other class's, or the log-probability, marks where the other class is not: mostly background.

    Leaves no trace: it works on a copy of the uncompiled module, in float32 and eval mode, under any grad mode or autocast.
    Raises `ConfigError` where `layer` is no module of the model or puts out no map.
    """
    # Late: pytorch-grad-cam imports cv2, scipy and scikit-learn.
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model = getattr(model, "_orig_mod", model)
    check_layer(model, layer)
    map_sizes: list[tuple[int, int]] = []

    def keep_map(output: Tensor) -> Tensor:
        if output.ndim != 4 or output.shape[-2:] == (1, 1):
            raise ConfigError(
                f"explain.layers: '{layer}' puts out {tuple(output.shape)}, no map.\nName a layer before it."
            )
        map_sizes.append((output.shape[-2], output.shape[-1]))
        return output.clone()  # a ReLU in place behind the layer would overwrite what was kept

    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        explained = copy.deepcopy(model).float().requires_grad_(False)
        cam = GradCAM(explained, [explained.get_submodule(layer)], reshape_transform=keep_map)
        # Not `with cam`: its __exit__ swallows every IndexError.
        try:
            inputs = images.detach().float().clone().requires_grad_()
            heat_maps = cam(inputs, [ClassifierOutputTarget(target) for target in targets.tolist()])
        finally:
            cam.activations_and_grads.release()
    return heat_maps, map_sizes[0]


def load_pictures(folder: str | Path, size: int) -> tuple[list[str], Tensor]:
    """A folder's pictures by name, as uint8 (N, 3, size, size): turned upright, on white, the middle square, resized.

    Other files, and folders in it, are skipped with a warning. Raises `DataError` where there is no folder or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "is no folder" if folder.exists() else "is not there"
        raise DataError(f"'{folder}' {found}.\nGive a folder that holds pictures: explain.images=<folder>.")
    names, pictures = [], []
    for path in sorted(path for path in folder.iterdir() if path.is_file() or path.is_dir()):
        name = os.fsencode(path.name).decode(errors="replace")  # a name can be of any bytes
        if path.is_dir():
            log.warning("Skipped the folder %s: pictures are taken from '%s' alone.", name, folder)
            continue
        try:
            pictures.append(_load_picture(path, size))
            names.append(name)
        except Exception as error:  # a damaged file makes Pillow raise almost anything
            log.warning("Skipped %s, not a readable picture: %s", name, error)
    if not pictures:
        raise DataError(f"No readable picture in '{folder}'.\nPut .png, .jpg or .webp files straight into it.")
    return names, torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def _load_picture(path: Path, size: int) -> np.ndarray:
    from PIL import Image, ImageOps

    with Image.open(path) as opened:
        picture = ImageOps.exif_transpose(opened)
        if picture.mode.startswith("I;16") or (picture.mode == "I" and opened.format in ("PNG", "PPM")):
            # 16 bits of grey, which convert() would clip to white
            picture = Image.fromarray((np.asarray(picture) / 257).astype(np.uint8))
        elif picture.mode in ("I", "F", "LAB"):  # their white is not known, or Pillow cannot convert them
            raise ValueError(
                f"its pixels are of Pillow's mode {picture.mode}: save it with 8 or 16 bits for each colour"
            )
        picture = picture.convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS))
