"""--shard: for a GPU that holds the weights, but not gradients and optimizer states too: all are split over processes.

    torchrun --nproc_per_node 4 train_sft.py --model Qwen3-8B --optimizer adamw --shard

FSDP2 (torch.distributed.fsdp.fully_shard; the idea: arXiv 2304.11277): each process keeps its part of every parameter,
of its gradient and of AdamW's two averages. That is 1/N of the 16 bytes per parameter. A layer is gathered when its
turn comes, in the forward and in the backward pass, and split again after it.

All processes must run the same layers in the same order, since each gathers with the others. Evaluation and saving do
not fit that: one process answers more questions than another. For these the whole model is gathered (`on_whole`), 4
bytes per parameter, and is then an ordinary one. So a GPU must hold the weights, but not what training adds to them.
"""

import functools

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from minillm.errors import UserError


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


def shard(cfg, model, optimizers: list):
    """With --shard, split a CausalLM over the processes, in place: layer by layer, and the rest as one more part.

    optimizers: those of the model, without a state yet; they go on with the split parameters.
    """
    if not getattr(cfg, "shard", False) or not dist.is_initialized():
        return
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    cpu = next(model.parameters()).device.type == "cpu"
    mesh = dist.init_device_mesh("cpu" if cpu else "cuda", (dist.get_world_size(),))
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
        part.set_gradient_divide_factor(1.0)  # a sum, not a mean: each loss is divided by the tokens of all processes
        part.set_force_sum_reduction_for_comms(True)  # gloo has no sum that also scales
    register_fsdp_forward_method(model, "hidden")  # which is called without going through forward
    split = dict(model.named_parameters())
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [split[names[id(parameter)]] for parameter in group["params"]]


def is_sharded(model) -> bool:
    """Whether the model's parameters are split over the processes."""
    return isinstance(next(model.parameters()), DTensor)


def gather(model):
    """Make a sharded model an ordinary one, in every process. Returns a function that splits it again, as it was.

    What is changed in the meantime is lost. All processes must call it together. Any other model is left alone.
    """
    before = []

    def split():
        for module, own, kept in before:
            module._parameters.update(own)
            module.__dict__.update(kept)

    if not is_sharded(model):
        return split
    for part in (*model.model.layers, model):
        part.reshard()
    found = {}  # a tied parameter is gathered once
    for module in model.modules():
        own = {name: parameter for name, parameter in module._parameters.items() if isinstance(parameter, DTensor)}
        kept = {name: module.__dict__[name] for name in ("_forward_pre_hooks", "_forward_hooks", "hidden")
                if name in module.__dict__}
        before.append((module, own, kept))
        for name, parameter in own.items():
            if id(parameter) not in found:
                full = parameter.detach().full_tensor()
                found[id(parameter)] = torch.nn.Parameter(full, requires_grad=parameter.requires_grad)
            module._parameters[name] = found[id(parameter)]
        module.__dict__.pop("hidden", None)
        for name in kept.keys() - {"hidden"}:  # FSDP's hooks, which gather a layer
            module.__dict__[name] = type(kept[name])()
    return split


def on_whole(model, function):
    """The function, to be called in all processes together; within it a sharded model is an ordinary one."""
    @functools.wraps(function)
    def call(*args):
        split = gather(model)
        try:
            return function(*args)
        finally:
            split()

    return call


def gathered(value):
    """A dict or list as it is, with whole tensors on the CPU instead of split ones. All processes must call it."""
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(gathered(item) for item in value)
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def split_like(tensor, parameter):
    """A whole tensor, the same in all processes, split as the parameter is; itself where that is not split."""
    if not isinstance(parameter, DTensor):
        return tensor
    device = parameter.device_mesh.device_type
    return distribute_tensor(tensor.to(device), parameter.device_mesh, parameter.placements, src_data_rank=None)
