"""Sampling from a model with a key/value cache.

Prompts are padded on the left, so that all rows write the same cache position. Each prompt is run once for its whole
group of samples. Rows that have ended leave the batch. On CUDA a decoding step is a graph, captured once and then
replayed (cuda_graph.py), and the program checks only now and then which rows have ended, because each check waits for
the device.
"""

import contextlib
from dataclasses import dataclass

import torch

from minillm import runtime
from minillm.cuda_graph import StaticStep
from minillm.errors import UserError
from minillm.model import KVCache

CHECK_EVERY = 16  # tokens between two checks of which rows have ended, where a check waits for the device
FEW_ROWS, FEW_WEIGHTS = 16, 2**21  # up to here a CPU decodes faster in float32: to start a bf16 product costs too much


@dataclass
class Rollout:
    """What was sampled, one row per sample, padded on the right (so a plain causal forward pass scores it).

    tokens (B, T): prompt, response, padding. response_mask (B, T) bool: True on the response, its end token included.
    logprobs (B, T) float32: log-probability of each response token under the distribution that it was drawn from, and 0
    elsewhere. Training computes its own, so that both sides of a ratio come from one kernel; tests compare the two.
    """

    tokens: torch.Tensor
    response_mask: torch.Tensor
    logprobs: torch.Tensor

    @property
    def lengths(self):
        """(B,): tokens of prompt and response together."""
        places = torch.arange(1, self.tokens.shape[1] + 1, device=self.tokens.device)
        return (places * self.response_mask).amax(dim=1)

    @property
    def n_tokens(self) -> int:
        """Sampled tokens."""
        return int(self.response_mask.sum())

    def responses(self) -> list:
        """The response of each row as a list of token ids, the end token included."""
        return [row[mask].tolist() for row, mask in zip(self.tokens.cpu(), self.response_mask.cpu())]


def sample(logits, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, generator=None, uniforms=None):
    """Draw one token per row of logits (B, V) -> tokens (B,), logprobs (B,) under that very distribution.

    Temperature 0 is argmax (logprob 0: it is certain). top_k > 0 keeps the k likeliest tokens, of equal ones those with
    the smaller ids; top_p < 1 then keeps the fewest of the likeliest whose probabilities reach top_p, and at least one
    (nucleus sampling, arXiv 1904.09751). uniforms (B,): a random number in [0, 1) for each row (default: from the
    generator). Raises ValueError for a negative temperature, top_p or top_k.
    """
    if not temperature >= 0 or not top_p >= 0 or top_k < 0:
        raise ValueError(f"temperature {temperature}, top_p {top_p} and top_k {top_k} must not be negative")
    if temperature == 0:
        tokens = logits.argmax(dim=-1)
        return tokens, torch.zeros_like(tokens, dtype=torch.float32)
    logits = logits.float()
    if temperature != 1:  # the largest logit becomes 0 first: a tiny temperature must not make infinities of it
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    if top_p < 1 or top_k > 0:
        ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
        if top_k > 0:
            ordered[:, top_k:] = -torch.inf
            ordered = torch.log_softmax(ordered, dim=-1)
        probabilities = ordered.exp()
        dropped = probabilities.cumsum(dim=-1) - probabilities >= top_p  # the likelier ones reach top_p without it
        dropped[:, 0] = False
        ordered = torch.log_softmax(ordered.masked_fill(dropped, -torch.inf), dim=-1)
        logprobs = torch.empty_like(ordered).scatter_(1, order, ordered)
    # Side by side the probabilities fill [0, 1); the token in whose part the random number lies is drawn. One number
    # for each row is enough, so a row draws the same token whatever other rows are in its batch.
    if uniforms is None:
        uniforms = torch.rand(len(logprobs), generator=generator, device=logprobs.device)
    ends = logprobs.exp().cumsum(dim=-1)  # (B, V): where each token's part ends
    tokens = torch.searchsorted(ends, uniforms[:, None] * ends[:, -1:], right=True).clamp(max=logprobs.shape[-1] - 1)
    # A sum in parallel may grow by a rounding error where the probability is 0.
    impossible = logprobs.gather(1, tokens) == -torch.inf
    tokens = torch.where(impossible, logprobs.argmax(dim=-1, keepdim=True), tokens)  # (B, 1)
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]


@contextlib.contextmanager
def eval_mode(model):
    """Inside the block dropout is off (a LoRA may have it); after it the model is in the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def _own_copies():
    """Autocast's bf16 copies of the weights live for this generation only: the weights change before and after it."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


@contextlib.contextmanager
def _decoding(model, rows: int):
    """Decode this many rows without gradients, and in float32 where that is faster (few rows on a CPU)."""
    weights = list(model.parameters())
    kind = weights[0].device.type
    few = kind == "cpu" and rows <= FEW_ROWS and sum(w.numel() for w in weights) <= FEW_WEIGHTS
    few = few and all(w.dtype == torch.float32 for w in weights)  # a frozen base may be held in bf16
    if few or not torch.is_autocast_enabled(kind):
        # inference_mode is a tenth faster on small models. On CUDA a captured graph may not mix it with no_grad, nor
        # may sharding: training goes on with the tensors that it gathers layers into.
        plain = kind == "cuda" or runtime.in_lockstep(model)
        with torch.no_grad() if plain else torch.inference_mode(), torch.autocast(kind, enabled=False):
            yield
        return
    # Autocast keeps its bf16 copy of a weight, instead of making a new one for every token, only outside inference_mode
    # and only of weights that require a gradient. Of a sharded model it keeps none.
    frozen = [] if runtime.in_lockstep(model) else [w for w in weights if not w.requires_grad]
    try:
        for w in frozen:
            w.requires_grad = True
        with torch.no_grad():
            yield
    finally:
        for w in frozen:
            w.requires_grad = False


def _new_cache(model, rows: int, prompt_length: int, max_new_tokens: int) -> KVCache:
    context = model.context
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; at least 1 is needed")
    if prompt_length + max_new_tokens > context:
        raise UserError(f"a prompt of {prompt_length:,} tokens and {max_new_tokens:,} new ones do not fit the model's "
                        f"context of {context:,}; shorten the prompt or ask for fewer new tokens")
    weight = next(model.parameters())
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return KVCache(model.config, rows, prompt_length + max_new_tokens, weight.device, dtype)


def generate(model, prompts: list, max_new_tokens: int, end_id, temperature: float = 1.0, top_p: float = 1.0,
             top_k: int = 0, group_size: int = 1, pad_id: int = 0, generator=None,
             static: bool | None = None, uniforms=None) -> Rollout:
    """Sample group_size responses to each prompt (a list of token ids); rows of a group stand together.

    A response ends with end_id (one id, or a list of them) or after max_new_tokens. static: decode with StaticStep
    (default: on CUDA). uniforms (responses, max_new_tokens): the random number in [0, 1) of each token (default: from
    the generator).
    Raises ValueError for no prompt, an empty prompt or max_new_tokens < 1, UserError where the longest prompt and
    max_new_tokens exceed the model's context.
    """
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token")
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
    P, N, device = int(prompt_lengths.max()), len(prompts) * group_size, next(model.parameters()).device
    padded = torch.tensor([[pad_id] * (P - len(prompt)) + prompt for prompt in prompts], device=device)
    prompt_lengths = prompt_lengths.to(device)
    valid = torch.arange(P, device=device) >= P - prompt_lengths[:, None]
    if uniforms is None:
        uniforms = torch.rand(N, max_new_tokens, generator=generator, device=device)

    with eval_mode(model), _own_copies(), _decoding(model, N):
        cache = _new_cache(model, len(prompts), P, max_new_tokens)
        hidden = model.hidden(padded, attention_mask=None if valid.all() else valid, cache=cache)
        logits = model.lm_head(hidden[:, -1])  # (prompts, V): the last position alone
        if group_size > 1:
            logits = logits.repeat_interleave(group_size, dim=0)  # (N, V)
            cache.select(torch.arange(len(prompts), device=device).repeat_interleave(group_size))

        responses = torch.full((N, max_new_tokens), pad_id, device=device)
        logprobs = torch.zeros(N, max_new_tokens, device=device)
        rows = torch.arange(N, device=device)  # which sample each row of the cache is
        running = torch.ones(N, dtype=torch.bool, device=device)
        ends = torch.tensor([end_id] if isinstance(end_id, int) else end_id, device=device)
        lockstep = runtime.in_lockstep(model)  # then each process decodes until the last one has finished
        static = device.type == "cuda" and not lockstep if static is None else static
        step = StaticStep(model, cache) if static else None
        for t in range(max_new_tokens):
            tokens, token_logprobs = sample(logits, temperature, top_p, top_k, uniforms=uniforms[rows, t])
            responses[rows, t], logprobs[rows, t] = tokens, token_logprobs  # what follows an end is masked out below
            running = running & (tokens[:, None] != ends).all(dim=1)
            if t + 1 == max_new_tokens:
                break
            if not static or t % CHECK_EVERY == CHECK_EVERY - 1:
                alive = int(running.sum())
                if (runtime.sum_over_processes(alive) if lockstep else alive) == 0:
                    break
                # Copying the cache pays when many rows have ended.
                if 0 < alive < (0.5 if static else 0.75) * len(rows):
                    keep = running.nonzero()[:, 0]
                    cache.select(keep)
                    rows, tokens, running = rows[keep], tokens[keep], running[keep]
                    step = StaticStep(model, cache) if static else None
            logits = step(tokens) if static else model(tokens[:, None], cache=cache)[:, -1]

    ended = (responses[:, :, None] == ends).any(dim=2)
    lengths = torch.where(ended.any(dim=1), ended.int().argmax(dim=1) + 1, max_new_tokens)  # up to its first end token
    # From left to right padding: column c of the result is column c + padding of [padding, prompt, response].
    prompt_lengths = prompt_lengths.repeat_interleave(group_size)[:, None]  # (N, 1)
    last = prompt_lengths + lengths[:, None]
    column = torch.arange(int(last.max()), device=device)
    source = (column + P - prompt_lengths).clamp(max=P + max_new_tokens - 1)
    tokens = torch.cat([padded.repeat_interleave(group_size, dim=0), responses], dim=1).gather(1, source)
    logprobs = torch.cat([torch.zeros(N, P, device=device), logprobs], dim=1).gather(1, source)
    response_mask = (column >= prompt_lengths) & (column < last)
    return Rollout(tokens.masked_fill(column >= last, pad_id), response_mask, logprobs.masked_fill(~response_mask, 0.0))


def stream(model, prompt: list, max_new_tokens: int, end_id, temperature: float = 1.0, top_p: float = 1.0,
           generator=None):
    """Yield the tokens of one response as they are sampled; the end token is not yielded. Raises as generate does."""
    if not prompt:
        raise ValueError("the prompt needs at least one token")
    with _decoding(model, 1):
        cache = _new_cache(model, 1, len(prompt), max_new_tokens)
    tokens = torch.tensor([prompt], device=cache.valid.device)
    with eval_mode(model), _own_copies():
        for _ in range(max_new_tokens):
            with _decoding(model, 1):  # not around the yield: what the caller does meanwhile is not decoding
                logits = model.lm_head(model.hidden(tokens, cache=cache)[:, -1])
                tokens = sample(logits, temperature, top_p, generator=generator)[0][:, None]
            token = tokens.item()
            if token == end_id or isinstance(end_id, list) and token in end_id:
                return
            yield token
