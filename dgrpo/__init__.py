"""Reinforcement learning from verifiable rewards for masked diffusion language models."""

import functools
import importlib.abc
import importlib.util
import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dgrpo import estimators
    from dgrpo.logprobs import per_token_logps
    from dgrpo.models import load_model
    from dgrpo.sampling import Rollout, SamplerConfig, generate
    from dgrpo.trainers import (
        DiffuGRPOConfig,
        DiffuGRPOTrainer,
        MaskedSFTConfig,
        MaskedSFTTrainer,
        VRPOConfig,
        VRPOTrainer,
    )
    from dgrpo.views import MaskedViews

__version__ = "0.1.0"

# Imported when first asked for: torch, TRL and transformers take seconds, which `dgrpo --help` should not.
_HOMES = {
    "dgrpo.estimators": ("estimators",),
    "dgrpo.logprobs": ("per_token_logps",),
    "dgrpo.models": ("load_model",),
    "dgrpo.sampling": ("Rollout", "SamplerConfig", "generate"),
    "dgrpo.trainers": (
        "DiffuGRPOConfig",
        "DiffuGRPOTrainer",
        "MaskedSFTConfig",
        "MaskedSFTTrainer",
        "VRPOConfig",
        "VRPOTrainer",
    ),
    "dgrpo.views": ("MaskedViews",),
}

__all__ = [
    "DiffuGRPOConfig",
    "DiffuGRPOTrainer",
    "MaskedSFTConfig",
    "MaskedSFTTrainer",
    "MaskedViews",
    "Rollout",
    "SamplerConfig",
    "VRPOConfig",
    "VRPOTrainer",
    "estimators",
    "generate",
    "load_model",
    "per_token_logps",
]


_AUTO = "transformers.models.auto.configuration_auto"


def _register_on_first_use(auto) -> None:
    """Lets transformers' auto classes find the families: all of them ask AutoConfig first."""
    original = auto.AutoConfig.__dict__["from_pretrained"]

    @functools.wraps(original.__func__)
    def from_pretrained(cls, *args, **kwargs):
        auto.AutoConfig.from_pretrained = original
        import_module("dgrpo.models")
        return cls.from_pretrained(*args, **kwargs)

    auto.AutoConfig.from_pretrained = classmethod(from_pretrained)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Does so as soon as somebody imports these classes: importing dgrpo alone stays light."""

    def find_spec(self, name, path, target=None):
        if name != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                _register_on_first_use(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]  # of this one loader
        return spec


if _AUTO in sys.modules:
    _register_on_first_use(sys.modules[_AUTO])
else:
    sys.meta_path.insert(0, _WhenImported())


def __getattr__(name: str):
    for home, names in _HOMES.items():
        if name in names:
            module = import_module(home)
            # A module of its own, or a name in one.
            found = module if home == f"dgrpo.{name}" else getattr(module, name)
            globals()[name] = found
            return found
    raise AttributeError(f"module 'dgrpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
