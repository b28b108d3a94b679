"""Whether a module may be bypassed: its weights read, or another method called, instead of its `forward`.

Adapters, hooks and offloading act in a module's call: an adapter (PEFT) replaces the module, a hook (steering, logging,
sharding) wraps it, and offloading (Accelerate) loads the weights before its forward and unloads them after it. A fast
path that would bypass one of them is not taken.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.parametrize import is_parametrized

_HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
}
_GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)
_OWN_MODULES = ("torch.nn.modules.", "factorization_memory.")
_WEIGHTS = (torch.Tensor, nn.Parameter)
Module = TypeVar("Module", bound=nn.Module)


def why_hooked(module: nn.Module) -> str | None:
    """Why the module must be called, whatever its class: a hook or offloading; None if it need not be."""
    if "forward" in vars(module):
        return "its forward was replaced, as Accelerate does to offload weights"
    for name, kind in _HOOKS.items():
        if getattr(module, name):
            return f"it has {kind}"
    if any(getattr(torch_module, name) for name in _GLOBAL_HOOKS):
        return "a global module hook is registered"
    return None


def why_called(module: nn.Module) -> str | None:
    """Why a module expected to be plain, such as a linear layer, must be called instead of having its weights read; None if it
    need not be."""
    if not type(module).__module__.startswith(_OWN_MODULES):
        return f"{type(module).__name__} replaces it"
    return why_hooked(module)


def why_any_called(model: nn.Module) -> str | None:
    """The same for the first module of the model that must be called, with its name; and for weights that are not plain
    tensors, such as quantised or sharded ones, or are computed anew whenever they are read. Mixers of other packages, with all
    their submodules, are always called."""
    foreign: tuple[str, ...] = ()
    for name, module in model.named_modules():
        parametrized = is_parametrized(module)
        if hasattr(module, "state_type") and not parametrized and why_called(module) is not None:
            foreign = (*foreign, f"{name}.")
        ours = any(base.__module__.startswith("factorization_memory.") for base in type(module).__mro__)
        reason = why_hooked(module) if ours or f"{name}.".startswith(foreign) else why_called(module)
        if reason is None and parametrized:
            reason = f"its {next(iter(cast(Any, module.parametrizations)))} is parametrized"
        for key, weight in vars(module)["_parameters"].items():
            if reason is None and weight is not None and type(weight) not in _WEIGHTS:
                reason = f"its {key} is a {type(weight).__name__}"
        if reason is not None:
            return f"{name or 'the model'}: {reason}"
    return None


def behind_adapters(module: Module) -> Module:
    """The module itself behind the adapters that PEFT puts in its place: for its sizes, which they leave as they are."""
    while isinstance(base := vars(module)["_modules"].get("base_layer"), nn.Module):
        module = cast(Module, base)
    return module


def device_of(module: nn.Module) -> torch.device:
    """Device that a call of the module computes on: that of its weights or, if they are offloaded, the one Accelerate loads
    them to."""
    weight = next(module.parameters())
    if not weight.is_meta:
        return weight.device
    for part in module.modules():
        hook: Any = vars(part).get("_hf_hook")
        for one in getattr(hook, "hooks", (hook,)):
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(cast(Any, device))
    return weight.device
