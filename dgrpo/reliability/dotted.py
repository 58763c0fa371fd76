"""What a setting names as `package.module:attribute`: the user's own code, which may be wrong in any way."""

import importlib
import traceback
from typing import Any


def imported(setting: str, name: str) -> Any:
    """The attribute that `package.module:attribute` names.

    Raises:
        ValueError: the module cannot be imported, with its own error and the line that raised it; or it has no such
            attribute.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if f.filename not in (__file__, importlib.__file__) and f.filename[0] != "<"]
        place = f", {own[-1].filename} line {own[-1].lineno}" if own else ""
        reason = f"{type(error).__name__}: {error}{place}"
        raise ValueError(f"{setting}: cannot import {module_name!r} of {name!r} ({reason}).") from error
    if not hasattr(module, attribute):
        raise ValueError(f"{setting}: module {module_name!r} has no {attribute!r}.")
    return getattr(module, attribute)
