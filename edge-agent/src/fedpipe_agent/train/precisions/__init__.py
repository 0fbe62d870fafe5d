# SPDX-License-Identifier: Apache-2.0
"""How the agent loads each precision of the frozen base, and the layer that proves its kernel.

Each module here registers what it implements; `fedpipe_api.precisions` has the facts.
"""

from importlib import import_module
from pkgutil import iter_modules

from fedpipe_api.precisions import Precision

from .implementation import IMPLEMENTATIONS, Implementation, compute_type, import_bitsandbytes, import_peft

__all__ = ["IMPLEMENTATIONS", "Implementation", "compute_type", "import_bitsandbytes", "import_peft"]

for _module in iter_modules(__path__):
    import_module(f".{_module.name}", __name__)

if _missing := sorted(set(Precision) - IMPLEMENTATIONS.keys()):
    raise ImportError(f"no module of {__name__} implements precision {_missing[0]}")
