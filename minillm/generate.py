"""Sampling from a model with a key/value cache.

Prompts are padded on the left, so that all rows write the same cache position; each prompt is run once for its whole
group of samples; rows that have ended leave the batch.
"""

from dataclasses import dataclass

import torch

from minillm.model import KVCache


@dataclass
class Rollout:
    """What was sampled, one row per sample, padded on the right (so a plain causal forward pass scores it).

    tokens (B, T): prompt, response, padding. response_mask (B, T) bool: True on the response, its end token included.
    logprobs (B, T) float32: log-probability of each response token under the distribution that it was drawn from, 0 elsewhere.
    """

    tokens: torch.Tensor
    response_mask: torch.Tensor
    logprobs: torch.Tensor

    def responses(self) -> list:
        """The response of each row as a list of token ids, the end token included."""
        return [row[mask].tolist() for row, mask in zip(self.tokens, self.response_mask)]


def sample(logits, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, generator=None):
    """Draw one token per row of logits (B, V) -> tokens (B,), logprobs (B,) under that very distribution.

    Temperature 0 is argmax (logprob 0: it is certain). top_k > 0 keeps the k likeliest tokens; top_p < 1 keeps the
    fewest tokens whose probabilities reach top_p (nucleus sampling, arXiv 1904.09751).
    """
    if temperature == 0:
        tokens = logits.argmax(dim=-1)
        return tokens, torch.zeros_like(tokens, dtype=torch.float32)
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    if 0 < top_k < logprobs.shape[-1]:
        kth = logprobs.topk(top_k, dim=-1).values[:, -1:]
        logprobs = torch.log_softmax(logprobs.masked_fill(logprobs < kth, -torch.inf), dim=-1)
    if top_p < 1:
        ordered, order = logprobs.sort(dim=-1, descending=True)
        before = ordered.exp().cumsum(dim=-1) - ordered.exp()  # probability of all likelier tokens
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        ordered[:, 0] = ordered[:, 0].clamp(min=-1e4)  # the likeliest always stays, also at top_p 0
        logprobs = torch.log_softmax(torch.empty_like(ordered).scatter_(1, order, ordered), dim=-1)
    tokens = torch.multinomial(logprobs.exp(), 1, generator=generator)[:, 0]
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


@torch.no_grad()
def generate(model, prompts: list, max_new_tokens: int, end_id: int, temperature: float = 1.0, top_p: float = 1.0,
             top_k: int = 0, group_size: int = 1, pad_id: int = 0, generator=None) -> Rollout:
    """Sample group_size responses to each prompt (a list of token ids); rows of a group stand together.

    A response ends with end_id or after max_new_tokens. Raises ValueError for an empty prompt.
    """
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token")
    device = model.lm_head.weight.device
    P, N = max(map(len, prompts)), len(prompts) * group_size
    padded = torch.full((len(prompts), P), pad_id, dtype=torch.long)
    valid = torch.zeros(len(prompts), P, dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        padded[i, P - len(prompt):] = torch.tensor(prompt)
        valid[i, P - len(prompt):] = True
    padded, valid = padded.to(device), valid.to(device)

    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.lm_head.weight.dtype
    cache = KVCache(model.config, len(prompts), P + max_new_tokens, device, dtype)
    hidden = model.hidden(padded, attention_mask=None if valid.all() else valid, cache=cache)
    logits = model.lm_head(hidden[:, -1])  # (prompts, V): the last position alone
    if group_size > 1:
        logits = logits.repeat_interleave(group_size, dim=0)
        cache.select(torch.arange(len(prompts), device=device).repeat_interleave(group_size))

    responses = torch.full((N, max_new_tokens), pad_id, device=device)
    logprobs = torch.zeros(N, max_new_tokens, device=device)
    lengths = torch.zeros(N, dtype=torch.long, device=device)
    rows = torch.arange(N, device=device)  # which sample each row of the cache is
    running = torch.ones(N, dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        tokens, token_logprobs = sample(logits, temperature, top_p, top_k, generator)
        kept = rows[running]
        responses[kept, t], logprobs[kept, t] = tokens[running], token_logprobs[running]
        lengths[kept] += 1
        running = running & (tokens != end_id)
        alive = int(running.sum())
        if alive == 0 or t + 1 == max_new_tokens:
            break
        if alive < 0.75 * len(rows):  # copying the cache pays when a good part of the rows has ended
            keep = running.nonzero()[:, 0]
            cache.select(keep)
            rows, tokens, running = rows[keep], tokens[keep], running[keep]
        logits = model(tokens[:, None], cache=cache)[:, -1]

    # Left padding out, right padding in: prompt, response, padding.
    T = max(len(prompts[i // group_size]) + n for i, n in enumerate(lengths.tolist()))
    out = Rollout(torch.full((N, T), pad_id, device=device), torch.zeros(N, T, dtype=torch.bool, device=device), torch.zeros(N, T, device=device))
    for i, n in enumerate(lengths.tolist()):
        start = len(prompts[i // group_size])
        out.tokens[i, :start] = padded[i // group_size, P - start:]
        out.tokens[i, start:start + n] = responses[i, :n]
        out.response_mask[i, start:start + n] = True
        out.logprobs[i, start:start + n] = logprobs[i, :n]
    return out


@torch.no_grad()
def stream(model, prompt: list, max_new_tokens: int, end_id: int, temperature: float = 1.0, top_p: float = 1.0, generator=None):
    """Yield the tokens of one response as they are sampled; the end token is not yielded."""
    device = model.lm_head.weight.device
    cache = KVCache(model.config, 1, len(prompt) + max_new_tokens, device, model.lm_head.weight.dtype)
    tokens = torch.tensor([prompt], device=device)
    for _ in range(max_new_tokens):
        logits = model.lm_head(model.hidden(tokens, cache=cache)[:, -1])
        token, _ = sample(logits, temperature, top_p, generator=generator)
        if token.item() == end_id:
            return
        yield token.item()
        tokens = token[:, None]
