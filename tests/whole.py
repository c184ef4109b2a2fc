"""A DeepSpeed engine's state, whole on every rank, by its own means: what checkpoints and parity are held to."""

from __future__ import annotations

import torch
from torch import Tensor


def full_parameters(engine) -> dict[str, Tensor]:
    """Every dense parameter, whole and in fp32 on CPU, whatever the ZeRO stage. Collective."""
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param

    stage, module = engine.zero_optimization_stage(), engine.module
    full = {}
    for name, parameter in module.named_parameters():
        value = safe_get_full_fp32_param(parameter) if parameter.requires_grad and stage > 0 else None
        if value is None:
            # Not trained, or not sharded; stage 3 cuts up even what is not trained.
            with zero.GatheredParameters([parameter], enabled=stage == 3):
                value = parameter.detach().clone()
        full[name] = value.detach().float().cpu().clone()
    for name in module.state_dict().keys() - full.keys():
        full[name] = module.get_buffer(name).detach().cpu().clone()
    return full


def full_optimizer_state(engine) -> dict[str, Tensor]:
    """AdamW's state by `parameter|kind`, and its count of `steps`, whatever the ZeRO stage. Collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    inner = optimizer if stage == 0 else optimizer.optimizer
    if not isinstance(inner, torch.optim.AdamW):
        return {}
    if stage in (1, 2):
        # DeepSpeed links the state in the first step, when only that of the first group is there.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, parameter in engine.module.named_parameters():
        for kind in ("exp_avg", "exp_avg_sq") if parameter.requires_grad else ():
            value = inner.state[parameter][kind] if stage == 0 else safe_get_full_optimizer_state(parameter, kind)
            found[f"{name}|{kind}"] = value.detach().cpu().clone()
    steps = {float(state["step"]) for state in inner.state.values()}
    assert len(steps) == 1, steps
    return found | {"steps": torch.tensor(steps.pop())}
