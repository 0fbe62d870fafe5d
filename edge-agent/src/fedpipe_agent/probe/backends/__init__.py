# SPDX-License-Identifier: Apache-2.0
"""Where facts about GPUs come from: a module for each kind of driver, asked in the order of their names."""

from importlib import import_module
from pkgutil import iter_modules

from ..reading import Backend

BACKENDS: tuple[Backend, ...] = tuple(
    import_module(f".{name}", __name__) for name in sorted(module.name for module in iter_modules(__path__))
)
