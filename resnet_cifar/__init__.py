"""The package as a library: what trains, evaluates and explains a model, with plain arguments and without a configuration.

Names, listed in `__init__.pyi`, are imported when they are first used: `import resnet_cifar` is instant, and the command line
starts without torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
