"""What parameters name as ``module:function``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from bnncore import data
from bnncore.networks.parts import NetworkError


def imported(name: str, key: str) -> Callable[..., Any]:
    """The function that ``module:function`` names.

    Raises:
        NetworkError: there is none; names the parameter `key`.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(despite_torchvision(importlib.import_module, module), attribute)
    except Exception as error:  # of the user's module: any kind
        raise NetworkError(
            f"{key}: cannot import {name!r}: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise NetworkError(f"{key}: expected {name!r} to be a function, got {found!r:.80}")
    return found


def despite_torchvision(call: Callable[..., Any], *args: Any) -> Any:
    """``call(*args)``, also where it imports a torchvision of another build than torch."""
    try:
        return call(*args)
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    data.torchvision_datasets()
    return call(*args)
