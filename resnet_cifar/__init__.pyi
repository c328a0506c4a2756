from . import figures
from .augment import (
    AlternatingFlip,
    Augmentation,
    BatchTransform,
    Cutout,
    Normalise,
    ProgressiveResize,
    RandomCrop,
    RandomHorizontalFlip,
    ScheduledTransform,
)
from .custom_resnet import CustomResNet
from .data import Digits, Images, as_images, hold_out, steps_per_epoch, training_batches
from .deployed_model import DeployedModel
from .distributed import World
from .errors import ConfigError, DataError, DivergedError
from .explain import Selection, grad_cam, load_pictures, select_images
from .loop import EpochRecord, Evaluation, Progress, StepRecord, Training, evaluate, fit
from .lr_finder import RangeTest, range_test, suggest
from .muon import Muon
from .report import explain_mistakes, model_summary

__all__ = [
    "AlternatingFlip",
    "Augmentation",
    "BatchTransform",
    "ConfigError",
    "CustomResNet",
    "Cutout",
    "DataError",
    "DeployedModel",
    "Digits",
    "DivergedError",
    "EpochRecord",
    "Evaluation",
    "Images",
    "Muon",
    "Normalise",
    "Progress",
    "ProgressiveResize",
    "RandomCrop",
    "RandomHorizontalFlip",
    "RangeTest",
    "ScheduledTransform",
    "Selection",
    "StepRecord",
    "Training",
    "World",
    "as_images",
    "evaluate",
    "explain_mistakes",
    "figures",
    "fit",
    "grad_cam",
    "hold_out",
    "load_pictures",
    "model_summary",
    "range_test",
    "select_images",
    "steps_per_epoch",
    "suggest",
    "training_batches",
]
