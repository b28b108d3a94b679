"""Whether a module may be passed by: its weights used, or another method called, instead of the module itself.

Adapters, hooks and offloading act in a module's call: an adapter (PEFT) stands in the module's place, a hook (steering,
logging, sharding) runs around it, and offloading (Accelerate) brings the weights before its forward and takes them away after
it. What would pass by one of them steps aside.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules import module as torch_module

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


def why_hooked(module: nn.Module) -> str | None:
    """What acts in a call of the module alone, whatever its class; None if nothing does."""
    if "forward" in vars(module):
        return "its forward was replaced, as Accelerate does to offload weights"
    for name, kind in _HOOKS.items():
        if getattr(module, name):
            return f"{kind} is on it"
    if any(getattr(torch_module, name) for name in _GLOBAL_HOOKS):
        return "a hook is on every module"
    return None


def why_called(module: nn.Module) -> str | None:
    """Why a module that is to be a plain one, such as a linear layer, has to be called instead of having its weights read; None
    if it has not."""
    if not type(module).__module__.startswith(_OWN_MODULES):
        return f"{type(module).__name__} stands in its place"
    return why_hooked(module)


def why_any_called(model: nn.Module) -> str | None:
    """The same of the first module in the whole model that has to be called, by its name; and of weights that are no plain
    tensors, as quantised and sharded ones. The mixers of other packages are called in any case, with all that they hold."""
    foreign: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if hasattr(module, "state_type") and why_called(module) is not None:
            foreign = (*foreign, f"{name}.")
        ours = any(base.__module__.startswith("factorization_memory.") for base in type(module).__mro__)
        reason = why_hooked(module) if ours or f"{name}.".startswith(foreign) else why_called(module)
        for key, weight in vars(module)["_parameters"].items():
            if reason is None and weight is not None and type(weight) not in _WEIGHTS:
                reason = f"its {key} is a {type(weight).__name__}"
        if reason is not None:
            return f"{name or 'the model'}: {reason}"
    return None


def device_of(module: nn.Module) -> torch.device:
    """Where a call of the module computes: where its weights are or, if they are offloaded, where Accelerate brings them."""
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
