"""The sides of the comparison: each trains the same network on the same CIFAR-10 and tells a stopwatch of every step.

`ours` is this package as `run.py` sets it up, `assignment` the loop that a student would write, `lightning` and
`lightning_tuned` the same under PyTorch Lightning, `bare_step` the network's step alone, on one batch that lies ready.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from time import perf_counter
from unittest.mock import patch

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms
from tqdm import tqdm

from resnet_cifar import custom_resnet, parts
from resnet_cifar.compose import compose, parse_arguments
from resnet_cifar.custom_resnet import CustomResNet
from resnet_cifar.distributed import ALONE, World
from resnet_cifar.loop import Progress, autocast, train_epoch
from resnet_cifar.training import build_training

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]
WORKERS = 2
MAX_LR = 0.01
STEPS_ON_GPU = (200, 50)  # of a turn, and how many of these are not counted


@dataclass(frozen=True)
class Setting:
    """What is trained, on what, and how many optimizer steps, of which the first `warmup` are not counted."""

    width: float
    steps: int
    warmup: int
    data_root: str
    device: torch.device
    precision: str  # what trainer.precision=auto comes to
    batch_size: int = 512
    train_size: int | None = None  # all


class Stopwatch:
    """Images/s from the end of the last warm-up step to the end of the last step; a GPU is waited for only there."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.steps, self.started, self.stopped = setting, 0, 0.0, 0.0

    def step(self) -> bool:
        """Note the end of a step; True after the last."""
        self.steps += 1
        if self.steps not in (self.setting.warmup, self.setting.steps):
            return False
        wait_for(self.setting.device)
        if self.steps == self.setting.warmup:
            self.started = perf_counter()
            return False
        self.stopped = perf_counter()
        return True

    @property
    def images_per_second(self) -> float:
        counted = self.setting.steps - self.setting.warmup
        return counted * self.setting.batch_size / (self.stopped - self.started)


def wait_for(device: torch.device) -> None:
    """Until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class TurnWatch(Stopwatch):
    """A stopwatch that sends what it measured through `connection`, and holds its side until it is that side's turn again."""

    def __init__(self, setting: Setting, connection: Connection) -> None:
        super().__init__(setting)
        self.connection, self.wanted = connection, True

    def step(self) -> bool:
        """Note the end of a step; True after the last of the last turn."""
        if not super().step():
            return False
        self.connection.send(self.images_per_second)
        self.steps = 0
        self.wanted = self.connection.recv()
        return not self.wanted


def configuration(setting: Setting) -> DictConfig:
    """The configuration of `run.py` for this setting."""
    overrides = (f"model.width={setting.width}", f"data.root={setting.data_root}", f"scheduler.max_lr={MAX_LR}")
    sizes = (f"data.batch_size={setting.batch_size}", f"data.train_size={setting.train_size or 'null'}")
    # Not `auto`, which on a GPU machine is not the CPU that was asked for.
    arguments = parse_arguments([*overrides, *sizes, f"trainer.device={setting.device}"])
    return compose(arguments).jobs[0][0]


def ours(setting: Setting, watch: Stopwatch, world: World = ALONE, compiled: bool = False) -> None:
    """(a) This package: the parts and the loop of `run.py`, precision auto."""
    cfg = configuration(setting)
    cfg.trainer.compile = compiled
    train = parts.load_train_and_val(cfg.data)[0].to(setting.device)
    training = build_training(cfg, parts.build_parts(cfg, train.classes), train, MAX_LR, world)
    for epoch in range(1, training.epochs + 1):
        for _ in train_epoch(training, train, Progress(epoch=epoch)):
            if watch.step():
                return


def ours_with_torchs_batch_norm(setting: Setting, watch: Stopwatch) -> None:
    """(a') The same, but for the batch norm of `few_channels`."""
    with torchs_batch_norm():
        ours(setting, watch)


def few_channels(setting: Setting) -> bool:
    """Whether our network's batch norm is not torch's."""
    on_cpu = setting.device.type == "cpu" and setting.precision == "bf16"
    return on_cpu and CustomResNet(width=setting.width).prep_layer[1].num_features < custom_resnet.FEW_CHANNELS


def plain_network(setting: Setting) -> CustomResNet:
    """The network as others would write it, with torch's batch norm."""
    with torchs_batch_norm():
        return CustomResNet(width=setting.width)


def torchs_batch_norm() -> contextlib.AbstractContextManager:
    """Networks that are built here have torch's batch norm in the place of ours."""
    return patch.object(custom_resnet, "BatchNorm2d", nn.BatchNorm2d)


def student_loader(setting: Setting, workers: int = WORKERS, **options: bool) -> DataLoader:
    """The assignment's transforms, image by image, in worker processes: crop, flip, normalise, an 8x8 cutout of zeros."""
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
            transforms.RandomErasing(p=1, scale=(1 / 16, 1 / 16), ratio=(1, 1), value=0),
        ]
    )
    images = datasets.CIFAR10(setting.data_root, train=True, transform=transform)
    pin_memory = setting.device.type == "cuda"
    return DataLoader(images, setting.batch_size, True, num_workers=workers, pin_memory=pin_memory, **options)


def assignment(setting: Setting, watch: Stopwatch) -> None:
    """(b) The loop of the assignment as a student writes it: DataLoader, default layout, float32, Adam, tqdm."""
    loader, model = student_loader(setting), plain_network(setting).to(setting.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-7)
    scheduler = OneCycleLR(optimizer, MAX_LR, epochs=24, steps_per_epoch=len(loader), pct_start=5 / 24)
    criterion, correct, seen = nn.CrossEntropyLoss(), 0, 0
    model.train()
    for _epoch in range(24):
        bar = tqdm(loader)
        for images, labels in bar:
            images, labels = images.to(setting.device), labels.to(setting.device)
            optimizer.zero_grad()
            logits = model(images)
            loss = criterion(logits, labels)
            loss.backward()
            optimizer.step()
            scheduler.step()
            correct += (logits.argmax(1) == labels).sum().item()
            seen += len(labels)
            bar.set_description(f"loss={loss.item():.4f} accuracy={100 * correct / seen:.2f}")
            if watch.step():
                return


def lightning(setting: Setting, watch: Stopwatch) -> None:
    """(c) The same under PyTorch Lightning with its MLflow logger."""
    _lightning(setting, watch, precision="32-true", channels_last=False)


def lightning_tuned(setting: Setting, watch: Stopwatch) -> None:
    """(c') Lightning as its manual advises: bf16-mixed where the hardware has it, channels last, a worker a core that stays."""
    precision = "bf16-mixed" if setting.precision == "bf16" else "32-true"
    workers = torch.get_num_threads()  # the cores that this process may use, not all that the machine has
    _lightning(setting, watch, precision, channels_last=True, workers=workers, persistent_workers=True)


def _lightning(setting: Setting, watch: Stopwatch, precision: str, channels_last: bool, **options: int) -> None:
    import lightning as L
    from lightning.pytorch.loggers import MLFlowLogger

    loader = student_loader(setting, **options)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = plain_network(setting).to(memory_format=layout)

        def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
            images, labels = batch
            logits = self.model(images.contiguous(memory_format=layout))
            loss = F.cross_entropy(logits, labels)
            self.log("train_loss", loss, prog_bar=True)
            self.log("train_accuracy", (logits.argmax(1) == labels).float().mean(), prog_bar=True)
            return loss

        def configure_optimizers(self) -> dict:
            optimizer = torch.optim.Adam(self.parameters(), lr=1e-3, weight_decay=1e-7)
            schedule = OneCycleLR(optimizer, MAX_LR, epochs=24, steps_per_epoch=len(loader), pct_start=5 / 24)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    class Watched(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
            trainer.should_stop = watch.step()

    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_epochs=24,
            accelerator="gpu" if setting.device.type == "cuda" else "cpu",
            devices=[setting.device.index or 0] if setting.device.type == "cuda" else 1,
            precision=precision,
            logger=MLFlowLogger("speed", tracking_uri=f"sqlite:///{folder}/mlflow.db", artifact_location=folder),
            callbacks=[Watched()],
            default_root_dir=folder,
        )
        trainer.fit(Module(), loader)


def bare_step(setting: Setting, watch: Stopwatch) -> None:
    """(d) Forward, backward and Adam's step on one batch that lies ready, channels last, our precision."""
    model = CustomResNet(width=setting.width).to(setting.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-7)
    images = torch.randn(setting.batch_size, 3, 32, 32, device=setting.device).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (setting.batch_size,), device=setting.device)
    for _ in count():
        with autocast(setting.device, setting.precision):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if watch.step():
            return


def bare_step_kept_memory(setting: Setting, watch: Stopwatch) -> None:
    """(d') The same, with freed memory kept as ours keeps it: the ceiling for our loop."""
    if setting.device.type == "cpu":
        parts.keep_freed_memory()
    bare_step(setting, watch)


def matrix_product_flops(device: torch.device, precision: str, size: int = 4096, seconds: float = 2.0) -> float:
    """FLOP/s of the best of the products of two square matrices that fit into `seconds`, after one to warm up.

    On a GPU the best ten in a row: waiting for a single one would cost it a twentieth.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    left @ right
    best, ends, in_a_row = float("inf"), perf_counter() + seconds, 10 if device.type == "cuda" else 1
    while perf_counter() < ends:
        started = perf_counter()
        for _ in range(in_a_row):
            left @ right
        wait_for(device)
        best = min(best, (perf_counter() - started) / in_a_row)
    return 2 * size**3 / best


def flop_per_image(width: float) -> int:
    """FLOP of the convolutions and the linear layer to train on one image: two per multiply-add, forward and backward.

    Counted by torch on a real step: the backward pass of each layer costs twice its forward pass, but for the first
    convolution, whose input needs no gradient. Batch norm, pooling, activations and optimizer are not in it.
    """
    model, labels = CustomResNet(width=width), torch.zeros(2, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(torch.zeros(2, 3, 32, 32)), labels).backward()
    return counter.get_total_flops() // 2


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Progress bars are drawn, and go nowhere."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def training_rate(train: Callable[[Setting, Stopwatch], None], setting: Setting) -> float:
    """Images/s of one side."""
    watch = Stopwatch(setting)
    torch.manual_seed(0)
    with silent():
        train(setting, watch)
    return watch.images_per_second


def train_in_turns(train: Callable[[Setting, Stopwatch], None], setting: Setting, connection: Connection) -> None:
    """Train and send images/s, or the error that ended it, for each turn that is asked for through `connection`."""
    torch.manual_seed(0)
    watch = TurnWatch(setting, connection)
    try:
        with silent():
            train(setting, watch)
        if watch.wanted:
            raise RuntimeError("A side has only 24 epochs, too few for these turns: give less --steps or --repeats.")
    except Exception as error:
        connection.send(error)


def arithmetic_limit(setting: Setting) -> float:
    """(e) Images/s if a training step were nothing but matrix products at their measured speed."""
    return matrix_product_flops(setting.device, setting.precision) / flop_per_image(setting.width)
