"""`_target_` paths from the configuration to objects: the one place that says which may be called, and calls them."""

import inspect
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import hydra.utils
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from resnet_cifar.errors import ConfigError
from resnet_cifar.suggestions import did_you_mean, dotted

# What may stand in a `_target_`: classes of these modules, and functions where a library offers models as functions.
CLASSES = (
    "resnet_cifar",
    "torch.nn",
    "torch.optim",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.transforms",
)
FUNCTIONS = ("torchvision.models",)
ALLOWED = f"a class in {', '.join(CLASSES)}; your own belong into the folder resnet_cifar/"


def is_allowed(path: str) -> bool:
    """Whether a `_target_`, as text, lies in a module whose classes may be called; imports nothing."""
    return all(part.isidentifier() for part in path.split(".")) and _inside(path.rpartition(".")[0], CLASSES)


def resolve(path: str) -> Any:
    """The class or function a `_target_` names; its own module, not only the path to it, must be an allowed one.

    The path is a module and a name in it, so no attribute of a module is walked through (`torch.optim.optimizer.torch.load`).
    Raises ConfigError when the path is not allowed or nothing is there.
    """
    module_path, _, name = path.rpartition(".")
    refused = ConfigError(f"_target_={path} is not allowed: it should be {ALLOWED}")
    if not is_allowed(path):
        raise refused
    try:
        target = getattr(import_module(module_path), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"_target_={path} cannot be imported: {error}") from error
    allowed = CLASSES if inspect.isclass(target) else FUNCTIONS if inspect.isfunction(target) else ()
    if not allowed or not _inside(target.__module__, allowed):
        raise refused
    return target


def check_arguments(node: DictConfig, *supplied: str) -> None:
    """Raise ConfigError when a `_target_` in the node is not allowed, or would not take the keywords written beside it.

    `supplied` names the arguments that the code adds to the outermost one when it is built, such as `params`.
    """
    nodes = list(target_nodes(OmegaConf.to_container(node, resolve=True)))
    for number, arguments in enumerate(nodes):
        target = resolve(arguments["_target_"])
        keywords = {key: value for key, value in arguments.items() if not key.startswith("_")}
        if number == 0:
            keywords |= dict.fromkeys(supplied)
        signature = inspect.signature(target)
        bind = signature.bind_partial if arguments.get("_partial_") else signature.bind
        try:
            bind(*arguments.get("_args_", ()), **keywords)
        except TypeError as error:
            unknown = [key for key in keywords if key not in signature.parameters]
            hint = did_you_mean(unknown[0], signature.parameters) if unknown else ""
            if unknown and not hint and number == 0 and unknown[0] not in supplied:
                hint = _take_out(node, unknown[0])
            raise ConfigError(f"{target.__name__}() {error}{hint} (_target_: {arguments['_target_']})") from error


def instantiate(node: DictConfig, **supplied: Any) -> Any:
    """Build what a node's `_target_` names from the plain values beside it; `supplied` wins over a key of the same name.

    Raises ConfigError for a target that is not allowed and for arguments it refuses; other errors pass as they are.
    """
    check_arguments(node, *supplied)
    try:
        # Partial first: merged into the configuration, `supplied` would be copied, and an optimizer's parameters with it.
        build = hydra.utils.instantiate(node, _partial_=True, _convert_="all")
        return build(**supplied)
    except (TypeError, ValueError, InstantiationException) as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        if isinstance(cause, TypeError | ValueError | InstantiationException):
            refused = re.search(r"unexpected keyword argument '(\w+)'$", str(cause))  # by what **kwargs went on to
            key = refused[1] if refused else ""
            hint = _take_out(node, key) if key in node and key not in supplied else ""
            raise ConfigError(f"{node['_target_'].rpartition('.')[2]}() cannot be built: {cause}{hint}") from error
        raise cause from None


def _take_out(node: DictConfig, key: str) -> str:
    return f"; take it out: ~{dotted(node._get_full_key(key))}"


def target_nodes(container: Any) -> Iterator[Mapping]:
    """Every mapping with a `_target_` in a tree of plain dicts and lists, outermost first."""
    if isinstance(container, Mapping):
        if "_target_" in container:
            yield container
        container = list(container.values())
    if isinstance(container, list):
        for value in container:
            yield from target_nodes(value)


def _inside(path: str, modules: tuple[str, ...]) -> bool:
    return any(path == module or path.startswith(f"{module}.") for module in modules)
