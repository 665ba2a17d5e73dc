"""--shard: a model that one GPU does not hold, split over the processes.

    torchrun --nproc_per_node 4 train_sft.py --model Qwen3-8B --optimizer adamw --shard

FSDP2 (torch.distributed.fsdp.fully_shard; the idea: arXiv 2304.11277): each process keeps its part of every parameter,
of its gradient and of AdamW's two moments. That is 1/N of the 16 bytes per parameter. A layer is gathered when its
turn comes, in the forward and in the backward pass, and split again after it. So a GPU holds its part and one or two
layers, of which embedding and head make one. At no time does it hold the whole model:

- It goes from its file to the GPU layer by layer. Main memory holds one layer of it per process at a time; the file
  is mapped, and the system keeps one copy of it for all processes. So is the state of a run that is resumed.
- Layers are gathered for evaluation as for training. All processes must then run the same layers in the same order, so
  they go on together until the last one has finished (generate.py).
- To be saved, it is gathered one tensor at a time, in the main memory of the first process alone.
- Autocast would keep bf16 copies of all layers. So its cache is off, and what a layer computed is computed again in
  the backward pass (--recompute) instead of being kept.
"""

import contextlib

import torch
import torch.distributed as dist

from minillm.errors import UserError
from minillm.runtime import in_lockstep, rank


def prepare(cfg):
    """Raise UserError where --shard is not possible, and switch off the compiler, which cannot look into gathering."""
    if not getattr(cfg, "shard", False):  # not every stage has it
        return
    advice = "--optimizer adamw and a smaller --lr" if getattr(cfg, "optimizer", "") == "muon" else ""
    if getattr(cfg, "peft", "") in ("prefix", "prompt"):
        advice = "another --peft"
    if advice:
        raise UserError(f"--shard: Muon needs whole matrices, and no process has them; give {advice}")
    cfg.compile = False


def is_on(cfg) -> bool:
    """Whether models are to be split: with --shard, under torchrun."""
    return getattr(cfg, "shard", False) and dist.is_initialized()


def home(cfg, device) -> torch.device:
    """Where to make a new model: on the device, or, where shard() is to split it, in main memory."""
    return torch.device("cpu") if is_on(cfg) else device


def shard(cfg, model, device):
    """With --shard, split a CausalLM over the processes, in place: layer by layer, and the rest as one more part."""
    if not is_on(cfg):
        return
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # takes a second

    if device.type == "mps":
        raise UserError("--shard: no backend moves tensors between processes on mps; leave it out, or --device cpu")
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (*model.model.layers, model):
        for parameter in part.parameters():
            if hasattr(parameter, "held_in"):  # still in its file, as load_model left it
                parameter.data = parameter.data.to(device, parameter.held_in)
        fully_shard(part, mesh=mesh)  # moves it to the device first
        part.set_gradient_divide_factor(1.0)  # a sum, not a mean: each loss is divided by the tokens of all processes
        part.set_force_sum_reduction_for_comms(True)  # gloo has no sum that also scales
    register_fsdp_forward_method(model, "hidden")  # which is called without going through forward
    model.model.recompute = True
    torch.set_autocast_cache_enabled(False)


def is_split(tensor) -> bool:
    """Whether this is a DTensor, of which each process holds only its part. (isinstance would need the import.)"""
    return hasattr(tensor, "device_mesh")


def local(tensor):
    """This process's part of a split tensor; any other one as it is."""
    return tensor.to_local() if is_split(tensor) else tensor


def gathered(value):
    """A dict or list as it is, with whole tensors in main memory instead of split ones; None for them in all processes
    but the first. All processes must call it together.
    """
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(gathered(item) for item in value)
    if not is_split(value):
        return value
    whole = value.detach().full_tensor()
    return whole.cpu() if rank() == 0 else None


@contextlib.contextmanager
def whole(model):
    """Inside the block the first process finds the trained parameters of a sharded model whole, in main memory.

    So it can be saved like any other model, but not run. All processes must enter together. Other models are left
    alone.
    """
    found, before = {}, []
    if in_lockstep(model):
        for part in (*model.model.layers, model):
            part.reshard()
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if is_split(parameter) and parameter.requires_grad:
                    before.append((module, name, parameter))
                    if id(parameter) not in found:  # a tied one is gathered once
                        found[id(parameter)] = gathered(parameter)
    try:
        for module, name, parameter in before if rank() == 0 else ():
            module._parameters[name] = torch.nn.Parameter(found[id(parameter)])
        yield
    finally:
        for module, name, parameter in before:
            module._parameters[name] = parameter


def split_like(tensor, parameter):
    """A whole tensor, the same in all processes, split as the parameter is; itself where that is not split."""
    if not is_split(parameter):
        return tensor
    from torch.distributed.tensor import DTensor

    mesh = parameter.device_mesh
    parts = tensor.chunk(mesh.size())  # of the rows, as FSDP2 splits them; the last processes may get none
    part = parts[mesh.get_local_rank()] if mesh.get_local_rank() < len(parts) else tensor[:0]
    part = part.to(local(parameter).device, copy=True)  # a view would keep the whole tensor
    return DTensor.from_local(part, mesh, parameter.placements, run_check=False, shape=tensor.shape,
                              stride=tensor.stride())
