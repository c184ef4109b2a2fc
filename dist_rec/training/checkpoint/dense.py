"""The dense part of a checkpoint: what this rank holds of the engine's parameters and optimizer, out and in again.

A rank writes the ranges that ZeRO gave it, as they lie in its memory, and reads the ranges it needs: nothing is
gathered, whatever the stage, and any stage and world size reads what any other wrote, to the bit. Where all ranks hold
everything (stage 0, buffers, parameters that are not trained), they share the writing.

Parameters are saved in fp32: the master weights, of which a bf16 model is a copy that is made anew after loading.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...errors import UserError
from .boxes import Box
from .manifest import BUFFER, MOST_FAULTS, PARAMETER
from .reader import Saved

# What each optimizer keeps for each element, beside AdamW's count of steps.
OPTIMIZER_STATES = {torch.optim.AdamW: ("exp_avg", "exp_avg_sq"), torch.optim.SGD: ()}


@dataclass(frozen=True)
class Range:
    """One range of one dense parameter or buffer, row-major.

    Attributes:
        shape: of the whole parameter.
        box: the range, in one dimension.
        tensors: the live memory by kind, each `[box.size]`.
        replicated: whether every rank holds the same.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    tensors: dict[str, Tensor]
    replicated: bool


class DenseState:
    """A DeepSpeed engine's parameters, buffers and optimizer state, as this rank holds them.

    Makes the optimizer's state where no step has made it yet.
    """

    def __init__(self, engine) -> None:
        self.engine, self.stage = engine, engine.zero_optimization_stage()
        self.optimizer = engine.optimizer if self.stage == 0 else engine.optimizer.optimizer
        try:
            self.kinds = OPTIMIZER_STATES[type(self.optimizer)]
        except KeyError:
            raise RuntimeError(f"no rule for the state of {type(self.optimizer).__name__}") from None
        if self.stage == 0:
            self.owned = [p for group in self.optimizer.param_groups for p in group["params"]]
        elif self.stage == 3:
            self.owned = engine.optimizer.fp32_partitioned_groups_flat
        else:
            self.owned = engine.optimizer.single_partition_of_fp32_groups
        for tensor in self.owned:
            state = self.optimizer.state[tensor]
            for kind in self.kinds:
                if kind not in state:
                    state[kind] = torch.zeros_like(tensor, requires_grad=False)
            if self.kinds and "step" not in state:
                state["step"] = torch.tensor(0.0)

    @property
    def steps(self) -> int:
        """Steps that the optimizer has counted; 0 if it does not count."""
        counted = {int(self.optimizer.state[tensor]["step"]) for tensor in self.owned if self.kinds}
        if len(counted) > 1:
            raise RuntimeError(f"the dense optimizer has counted different steps: {sorted(counted)}")
        return counted.pop() if counted else 0

    @steps.setter
    def steps(self, steps: int) -> None:
        for tensor in self.owned if self.kinds else []:
            self.optimizer.state[tensor]["step"].fill_(steps)

    def layout(self) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        """Whole shape and kinds of every parameter and buffer, the same on all ranks."""
        module, found = self.engine.module, {}
        for name, parameter in module.named_parameters():
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            found[name] = (shape, (PARAMETER, *(self.kinds if parameter.requires_grad else ())))
        return found | {name: (tuple(buffer.shape), (BUFFER,)) for name, buffer in buffers(module).items()}

    def ranges(self) -> list[Range]:
        """Everything that this rank holds, empty tensors left out. No collective."""
        found = []
        for name, parameter in self.engine.module.named_parameters():
            found += self._of_parameter(name, parameter)
        for name, buffer in buffers(self.engine.module).items():
            found.append(_replicated(name, buffer, {BUFFER: buffer.view(-1)}))
        return [one for one in found if one.box.volume]

    def _of_parameter(self, name: str, parameter: nn.Parameter) -> list[Range]:
        trained = parameter.requires_grad
        if self.stage == 3:
            return self._partition(name, parameter)
        if not trained or self.stage == 0:
            state = self.optimizer.state[parameter] if trained else {}
            states = {kind: state[kind].view(-1) for kind in self.kinds} if trained else {}
            return [_replicated(name, parameter, {PARAMETER: parameter.data.view(-1), **states})]
        mapping = parameter._hp_mapping
        if mapping is None:
            return []
        # The mapping's own views of the optimizer state are missing for all groups but the first.
        state = self.optimizer.state[self.owned[mapping.param_group_index]]
        at = mapping.get_hp_fragment_address()
        tensors = {PARAMETER: mapping.get_hp_fragment().data}
        tensors |= {kind: state[kind].narrow(0, at.start, at.numel) for kind in self.kinds}
        box = Box((mapping.lp_fragment_address.start,), (mapping.lp_fragment_address.numel,))
        return [Range(name, tuple(parameter.shape), box, tensors, replicated=False)]

    def _partition(self, name: str, parameter: nn.Parameter) -> list[Range]:
        """Stage 3 cuts every parameter into equal parts, the last one padded, even what is not trained."""
        part, rank = parameter.partition_numel(), dist.get_rank()
        count = min(part, parameter.ds_numel - rank * part)
        if count <= 0:
            return []
        if parameter.requires_grad:
            group, start, _ = self.engine.optimizer.grad_position[self.engine.optimizer.get_param_id(parameter)]
            master = self.owned[group]
            local = {PARAMETER: master.data.narrow(0, start, part)}
            local |= {kind: self.optimizer.state[master][kind].narrow(0, start, part) for kind in self.kinds}
        else:
            local = {PARAMETER: parameter.ds_tensor.data}
        tensors = {kind: tensor.narrow(0, 0, count) for kind, tensor in local.items()}
        box = Box((rank * part,), (count,))
        return [Range(name, tuple(parameter.ds_shape), box, tensors, replicated=False)]

    def refresh(self) -> None:
        """Make the model's parameters anew from the master weights. Collective."""
        optimizer = self.engine.optimizer
        if self.stage == 3:
            for group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            optimizer.checkpoint_event_epilogue()
        elif self.stage > 0:
            optimizer.update_lp_params()


def buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to a module's state."""
    kept = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}


def _replicated(name: str, tensor: Tensor, tensors: dict[str, Tensor]) -> Range:
    return Range(name, tuple(tensor.shape), Box.whole((tensor.numel(),)), tensors, replicated=True)


def mine(ranges: list[Range], rank: int, ranks: int) -> list[Range]:
    """Those of `ranges` that this rank writes: its own, and its share of what all ranks hold."""
    written, load = [], [0] * ranks
    for one in ranges:
        if one.replicated:
            least = load.index(min(load))
            load[least] += one.box.volume * len(one.tensors)
            if least != rank:
                continue
        written.append(one)
    return written


def load_dense_into_engine(saved: Saved, engine, with_optimizer: bool = True) -> None:
    """Fill the engine's parameters, buffers and optimizer state. Collective.

    Args:
        saved: a verified checkpoint.
        engine: of any ZeRO stage and precision, trained already or not.
        with_optimizer: also the optimizer's state; else it stays as it is.

    Raises:
        UserError: the checkpoint's model or optimizer is not the engine's.
    """
    state = DenseState(engine)
    wanted = state.layout()
    if not with_optimizer:
        wanted = {name: (shape, kinds[:1]) for name, (shape, kinds) in wanted.items()}
    _check(saved, wanted, with_optimizer)
    if state.stage == 3:
        # Frees the whole copies of small parameters, which `refresh` gathers anew.
        engine.optimizer.checkpoint_event_prologue()
    for one in state.ranges():
        for kind in wanted[one.name][1]:
            saved.fill(one.name, saved.manifest.dense[one.name], kind, one.box, one.tensors[kind])
    if with_optimizer:
        state.steps = saved.manifest.dense_steps
    state.refresh()


def load_dense(saved: Saved, model: nn.Module) -> None:
    """Fill the parameters and buffers of an unsharded model.

    Raises:
        UserError: the checkpoint is of another model.
    """
    tensors = {name: (PARAMETER, parameter.data) for name, parameter in model.named_parameters()}
    tensors |= {name: (BUFFER, buffer) for name, buffer in buffers(model).items()}
    _check(saved, {name: (tuple(tensor.shape), (kind,)) for name, (kind, tensor) in tensors.items()}, False)
    for name, (kind, tensor) in tensors.items():
        if tensor.numel():
            flat = tensor.view(-1)
            saved.fill(name, saved.manifest.dense[name], kind, Box.whole(flat.shape), flat)


def _check(saved: Saved, wanted: dict[str, tuple[tuple[int, ...], tuple[str, ...]]], exactly: bool) -> None:
    """Raise UserError unless the checkpoint has these names, shapes and kinds, and, if `exactly`, no other kinds."""
    found = saved.manifest.dense
    faults = [f"{name} is not in the model" for name in found.keys() - wanted.keys()]
    faults += [f"{name} is not in the checkpoint" for name in wanted.keys() - found.keys()]
    for name in found.keys() & wanted.keys():
        shape, kinds = wanted[name]
        if found[name].shape != list(shape):
            faults.append(f"{name} is {found[name].shape}, the model wants {list(shape)}")
        saved_kinds = found[name].kinds.keys()
        if not saved_kinds >= set(kinds) or (exactly and saved_kinds != set(kinds)):
            faults.append(f"{name} has {', '.join(saved_kinds)}, dense.optimizer wants {', '.join(kinds)}")
    if faults:
        lines = "\n".join(f"  - {fault}" for fault in sorted(faults)[:MOST_FAULTS])
        raise UserError(
            f"checkpoint {saved.folder} is of another model than the config ({len(faults)} differences):\n{lines}"
        )
