"""The package as a library: what trains, evaluates and explains a model, with plain arguments and without a configuration.

Names are imported when they are first used: `import resnet_cifar` is instant, and the command line starts without torch.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "augment": (
        *("AlternatingFlip", "Augmentation", "Cutout", "Normalise", "ProgressiveResize", "RandomCrop"),
        "RandomHorizontalFlip",
    ),
    "custom_resnet": ("CustomResNet",),
    "data": ("Digits", "Images", "as_images", "hold_out", "steps_per_epoch", "training_batches"),
    "deployed_model": ("DeployedModel",),
    "explain": ("grad_cam", "load_pictures", "select_images"),
    "loop": ("EpochRecord", "Evaluation", "Progress", "StepRecord", "Training", "evaluate", "fit"),
    "lr_finder": ("RangeTest", "range_test", "suggest"),
    "muon": ("Muon",),
    "report": ("explain_mistakes", "model_summary"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["figures", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name == "figures":
        return import_module("resnet_cifar.figures")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
