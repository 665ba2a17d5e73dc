"""Log-probabilities of tokens, with the one-position shift: from logits, and from hidden states in chunks.

token_logprobs is the plain form. head_logprobs, linear_cross_entropy and head_entropy run the LM head a chunk of tokens
at a time, so that memory does not grow with tokens x vocabulary; they give the same numbers (tests: chapter 5).
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

# How many logits head_logprobs computes at a time: on a CPU what its cache can hold (8 MiB in fp32), on a GPU enough to
# keep it busy. Compiled, at temperature 1, they are held in bf16 alone, and few large chunks are launched sooner.
LOGITS_PER_CHUNK = {"cpu": 2**21, "gpu": 2**24, "compiled": 2**27}
LOGITS_KEPT = 2**23  # up to this many (32 MiB), in float32 on a CPU, are kept: to make them again takes longer there


# What this file and losses.py share.

def fp32(x: Tensor) -> Tensor:
    """Half precision as float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x inside the mask and 0 outside, in float32."""
    # torch.where and not x * mask: inf * 0 and NaN * 0 are NaN, forward and backward.
    return torch.where(mask, fp32(x), 0.0)


def denominator(given, default):
    """What a loss divides by: the given count of the whole optimizer step, or else this call's; at least 1."""
    n = default if given is None else given
    return n.clamp(min=1) if isinstance(n, Tensor) else max(n, 1)


def check_shapes(shape: str, **tensors: Tensor) -> None:
    """Broadcasting turns a wrong shape into a wrong number without a word, so every shape is checked."""
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    one, *others = set(shapes.values())
    if others or (shape != "..." and len(one) != len(shape.split(","))):
        raise ValueError(f"expected one shape ({shape}), got " + ", ".join(f"{k} {v}" for k, v in shapes.items()))
    for name, x in tensors.items():
        if name.endswith("mask") and x.dtype != torch.bool:
            raise ValueError(f"{name} must be a bool tensor, got {x.dtype}")


def check_sequences(name: str, states: Tensor, tokens: Tensor, temperature: float = 1.0) -> None:
    """Raise ValueError unless states (B, T, ...), tokens (B, T) and the temperature fit together."""
    if states.dim() != 3 or tokens.shape != states.shape[:2]:
        shapes = f"{tuple(states.shape)} and {tuple(tokens.shape)}"
        raise ValueError(f"expected {name} (B, T, ...) and tokens (B, T), got {shapes}")
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens must be integers, got {tokens.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}: greedy decoding has no logprobs")


# From logits: the plain form.

def shift(states: Tensor, tokens: Tensor) -> tuple:
    """The one-position shift: what a model says at position t is about the token at t + 1.

    Whatever else stands beside the result (a mask, a reward) is aligned with it by [:, 1:].
    states (B, T, ...): logits or hidden states.  tokens (B, T). Returns (states (B, T - 1, ...), targets (B, T - 1)).
    """
    return states[:, :-1], tokens[:, 1:].long()


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token given the tokens before it.

    logprobs[b, t] = log_softmax(logits[b, t] / temperature)[tokens[b, t + 1]]

    logits (B, T, V): the model's output; row t predicts token t + 1, so the last row is not used.
    tokens (B, T): integer token ids. A mask (B, T) belongs beside the result as mask[:, 1:].
    temperature: that of the distribution which sampled the tokens; it divides the logits, not the logprobs.
    Returns (B, T - 1). Raises ValueError for shapes that do not fit, tokens that are not integers, temperature <= 0.
    """
    check_sequences("logits", logits, tokens, temperature)
    logits, targets = shift(logits, tokens)  # (B, T-1, V), (B, T-1)
    if temperature != 1.0:
        logits = fp32(logits) / temperature
    return F.log_softmax(fp32(logits), dim=-1).gather(-1, targets[..., None])[..., 0]


# From hidden states: the LM head in chunks.

def _check_head(hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 1.0) -> None:
    check_sequences("hidden", hidden, tokens, temperature)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[2]:
        raise ValueError(f"expected weight (V, {hidden.shape[2]}), got {tuple(weight.shape)}")


def head_logprobs(hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 1.0, mask=None,
                  targets=None) -> Tensor:
    """token_logprobs(hidden @ weight.T, tokens, temperature) without ever holding the (B, T, V) logits.

    The logits are made a chunk of tokens at a time, forward, and made again backward, so that memory does not grow
    with tokens x vocabulary (the idea of Cut Your Losses, arXiv 2411.09009, in plain PyTorch). A few of them
    (LOGITS_KEPT) are kept instead, where that is faster; the result has the same bits. Matrix products run
    in the dtype of hidden, or in autocast's; log-softmax in float32; the weight's gradient is summed in float32.
    A token whose logprob gets gradient 0 (outside the loss mask) adds nothing at all, even if its hidden state is NaN.

    hidden (B, T, D): after the final norm.  weight (V, D): the LM head (with tied embeddings, the embedding).
    tokens, temperature, result: as in token_logprobs. Differentiable once, in hidden and weight.
    mask (B, T - 1) bool, optional: the tokens that are wanted; the others' logprobs are 0, and on a CPU cost nothing.
    targets (N,), optional, beside a mask: the places of the wanted tokens in tokens.flatten(). With them a GPU leaves
    the other logits out, too; to find the places by the mask, the program would have to wait for it.
    Raises ValueError for shapes that do not fit, tokens that are not integers, temperature <= 0, or a mask that is not
    bool.
    """
    _check_head(hidden, weight, tokens, temperature)
    batch, length, width = hidden.shape
    states, after = shift(hidden, tokens)  # (B, T-1, D), (B, T-1)
    if mask is not None:
        check_shapes("B, T", mask=mask, tokens=after)
        if _picks_rows(hidden):
            picked = _HeadLogprobs.apply(states[mask], weight, after[mask], temperature)
            return torch.zeros(mask.shape, dtype=picked.dtype).masked_scatter(mask, picked)
        if targets is not None:
            picked = _target_logprobs(hidden, weight, tokens, targets, temperature)
            return picked.new_zeros(tokens.numel()).scatter(0, targets, picked).view(tokens.shape)[:, 1:]
    logprobs = _HeadLogprobs.apply(states.reshape(-1, width), weight, after.reshape(-1), temperature)
    logprobs = logprobs.view(batch, max(length - 1, 0))  # (B (T-1),) -> (B, T-1)
    return logprobs if mask is None else masked(logprobs, mask)


def _picks_rows(x: Tensor) -> bool:
    # Elsewhere the program would have to wait until the device knows how many rows the mask picks.
    return x.device.type == "cpu"


def _states_before(hidden: Tensor, targets: Tensor) -> Tensor:
    """hidden (B, T, D) -> (N, D): the states before these places in the flattened tokens, of which none may be the
    first of a row."""
    return hidden.flatten(0, 1).index_select(0, targets - 1)


def _target_logprobs(hidden, weight, tokens, targets, temperature: float = 1.0) -> Tensor:
    """The log-probabilities of tokens.flatten()[targets], (N,)."""
    return _HeadLogprobs.apply(_states_before(hidden, targets), weight, tokens.flatten()[targets].long(), temperature)


compiled = False  # runtime.compile_layers sets it: on a GPU the functions of a chunk are then compiled as well


def _is_compiled(x: Tensor) -> bool:
    return compiled and x.device.type != "cpu"


@functools.cache
def _program(function):
    return torch.compile(function)


def _run(function, *given):
    """function(*given), the function of a chunk. Compiled, its passes over the logits become one or two.

    One program serves all chunks of at least two tokens; one of a single token would be another.
    """
    tensors = [x for x in given if isinstance(x, Tensor)]
    if not _is_compiled(tensors[0]) or len(tensors[0]) < 2:
        return function(*given)
    for x in tensors:
        torch._dynamo.maybe_mark_dynamic(x, 0)
    return _program(function)(*given)


def _logits(states: Tensor, head: Tensor, temperature: float) -> Tensor:
    """states (n, D) @ head.T / temperature, (n, V). Without a division they keep the dtype of the product: a softmax
    that is asked for float32 reads bf16, and a pass over all of them is saved."""
    logits = states @ head.T
    return logits if temperature == 1.0 else fp32(logits).div_(temperature)


def _chunk_logprobs(logits: Tensor, targets: Tensor, dtype) -> Tensor:
    """logits (n, V), targets (n,) -> (n,) in dtype."""
    return logits.log_softmax(-1, dtype=dtype).gather(-1, targets[:, None])[:, 0]


def _chunk_gradient(logits: Tensor, targets: Tensor, grad: Tensor, temperature: float, dtype) -> Tensor:
    """The gradient of states @ head.T, (n, V) in dtype, from that of the log-probabilities, grad (n,):

    d logprob / d logits = (onehot(target) - softmax(logits)) / temperature
    """
    g = grad[:, None]
    result = logits.softmax(-1, dtype=grad.dtype).mul_(-g)
    if torch.compiler.is_compiling():  # unlike scatter_add_ it becomes one pass with the rest; the same numbers
        tokens = torch.arange(logits.shape[1], device=logits.device)
        result = torch.where(tokens == targets[:, None], result + g, result)
    else:
        result.scatter_add_(-1, targets[:, None], g)
    return (result if temperature == 1.0 else result.div_(temperature)).to(dtype)


def product(a: Tensor, b: Tensor, device_type: str) -> Tensor:
    """a (n, k) @ b (k, m). On mps a sum of smaller products: in PyTorch below 2.14 it is wrong, and says nothing, on
    Apple's M1 and M2 for k of 32,767 or more (pytorch/pytorch issue 195163): the vocabularies of most models.
    """
    if device_type != "mps":
        return a @ b
    return sum(x @ y for x, y in zip(a.split(2**14, dim=1), b.split(2**14)))


def _chunk_entropy(logits: Tensor) -> Tensor:
    """logits (n, V) -> (n,), in float32."""
    logprobs = fp32(logits).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


class _HeadLogprobs(torch.autograd.Function):
    """hidden (N, D), weight (V, D), targets (N,) -> logprobs (N,), in chunks of rows."""

    @staticmethod
    def chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
        # At least 512 rows: each chunk adds to the weight's gradient, which is as large as the vocabulary.
        kind = "cpu" if hidden.device.type == "cpu" else "gpu"
        size = max(LOGITS_PER_CHUNK["compiled" if _is_compiled(hidden) else kind] // weight.shape[0], 512)
        return [slice(start, start + size) for start in range(0, hidden.shape[0], size)]

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.temperature = temperature
        ctx.save_for_backward(hidden, weight, targets)
        keep = device == "cpu" and ctx.dtype == torch.float32 and any(ctx.needs_input_grad)
        ctx.logits = [] if keep and hidden.shape[0] * weight.shape[0] <= LOGITS_KEPT else None
        logprobs = torch.empty(hidden.shape[0], dtype=fp32(hidden[:0]).dtype, device=hidden.device)
        with torch.autocast(device, enabled=False):
            head = weight.to(ctx.dtype)
            for rows in _HeadLogprobs.chunks(hidden, weight):
                logits = _logits(hidden[rows].to(ctx.dtype), head, temperature)
                logprobs[rows] = _run(_chunk_logprobs, logits, targets[rows], logprobs.dtype)
                if ctx.logits is not None:
                    ctx.logits.append(logits)
        return logprobs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, targets = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad = grad.contiguous()  # that of a sum is a single number, expanded: it would be another program
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=grad.dtype) if need_weight else None
        kept, ctx.logits = ctx.logits, None  # no longer needed, though the graph may live on
        with torch.autocast(hidden.device.type, enabled=False):
            head = weight.to(ctx.dtype)
            for chunk, rows in enumerate(_HeadLogprobs.chunks(hidden, weight)):
                unused = grad[rows, None] == 0
                states = hidden[rows].to(ctx.dtype).masked_fill(unused, 0)  # 0 * NaN would be NaN
                if kept is None:
                    logits = _logits(states, head, ctx.temperature)
                else:
                    logits = kept[chunk].masked_fill_(unused, 0)
                grad_logits = _run(_chunk_gradient, logits, targets[rows], grad[rows], ctx.temperature, ctx.dtype)
                if need_hidden:
                    grad_hidden[rows] = product(grad_logits, head, hidden.device.type).to(hidden.dtype)
                if need_weight:
                    grad_weight += grad_logits.T @ states
        return grad_hidden, grad_weight.to(weight.dtype) if need_weight else None, None, None


@torch.no_grad()
def head_entropy(hidden: Tensor, weight: Tensor, mask: Tensor, temperature: float = 1.0, targets=None) -> Tensor:
    """Mean entropy, in nats, of the distributions that the tokens inside the mask were drawn from.

    entropy = -sum_v p_v log p_v, with p = softmax(hidden[b, t] @ weight.T / temperature) for a token at t + 1

    hidden (B, T, D), weight (V, D), temperature, targets: as in head_logprobs, and in chunks as there.  mask (B, T - 1)
    bool, as beside the logprobs. Returns a scalar, 0 with no token inside the mask; no gradient.
    Raises ValueError for shapes that do not fit or a mask that is not bool. From whole distributions: a mean of
    -logprob over sampled tokens is a noisy estimate of it, and after an update not even that.
    """
    check_shapes("B, T", mask=mask, hidden=hidden[:, :-1, 0])
    states, total = hidden[:, :-1], torch.zeros((), device=hidden.device)
    if _picks_rows(hidden):
        states, mask = states[mask], mask[mask]
    elif targets is not None:
        states = _states_before(hidden, targets)
        mask = torch.ones(len(targets), dtype=torch.bool, device=hidden.device)
    states, mask = states.reshape(-1, hidden.shape[-1]), mask.reshape(-1)  # (N, D), (N,)
    for rows in _HeadLogprobs.chunks(states, weight):
        logits = _logits(states[rows], weight.to(states.dtype), temperature)
        total = total + masked(_run(_chunk_entropy, logits), mask[rows]).sum()
    return total / mask.sum().clamp(min=1)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, tokens: Tensor, loss_mask: Tensor, n_tokens=None,
                         targets=None) -> Tensor:
    """sft_loss(hidden @ weight.T, tokens, loss_mask, n_tokens): the same number, with the logits of head_logprobs.

    hidden (B, T, D), weight (V, D): as in head_logprobs; the rest as in sft_loss. What this saves is the logits of
    tokens that nobody supervises (in a conversation most of them), and memory: a chunk of logits is held at a time.
    targets (N,), optional: where loss_mask.flatten() is True (Batch.targets), as in head_logprobs. The first token of a
    row must not be among them.
    """
    check_shapes("B, T", tokens=tokens, loss_mask=loss_mask)
    _check_head(hidden, weight, tokens)
    mask = loss_mask[:, 1:]
    if targets is not None and not _picks_rows(hidden):
        return -_target_logprobs(hidden, weight, tokens, targets).sum() / denominator(n_tokens, len(targets))
    return -head_logprobs(hidden, weight, tokens, mask=mask).sum() / denominator(n_tokens, mask.sum())
