"""Masks and kernels of attention: who may look at whom, and softmax(q k^T / sqrt(d)) v on each kind of hardware.

Shape symbols as in model.py: B rows, T queries, S keys, H heads, K key/value heads, d head_dim.
"""

import functools
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from minillm import runtime

BLOCK = 128  # tokens of a block of flex attention, which has no kernel for shorter rows
SMALLER = {"num_stages": 1, **dict.fromkeys(("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"), 32)}
KERNEL_OPTIONS = {}  # of flex attention: none, or SMALLER from the moment that can_flex finds it necessary


def document_positions(doc_ids):
    """doc_ids (B, T), equal within a document -> positions (B, T) that restart at 0 with each document."""
    index = torch.arange(doc_ids.shape[1], device=doc_ids.device).expand_as(doc_ids)
    starts = torch.ones_like(doc_ids, dtype=torch.bool)
    starts[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def attention_mask_2d(attention_mask, doc_ids, T: int, past: int, device, prefix: int = 0):
    """Who may look at whom: bool (B, 1, T, prefix + S), True = may; None when plain causal attention is enough.

    attention_mask (B, S) bool: False = padding, never looked at. doc_ids (B, T): only within one document. past: keys
    before those of the T tokens (with attention_mask it may be a tensor, for a static cache). prefix: keys before the S
    others, which every token looks at.
    """
    if attention_mask is None and doc_ids is None and (past + prefix == 0 or T == 1):
        return None
    S = past + T if attention_mask is None else attention_mask.shape[1]
    query, key = past + torch.arange(T, device=device)[:, None], torch.arange(S, device=device)
    allowed = (key <= query)[None]  # (1, T, S)
    if doc_ids is not None:
        allowed = allowed & (doc_ids[:, :, None] == doc_ids[:, None, :])
    if attention_mask is not None:
        allowed = allowed & attention_mask[:, None, :]
    # A padding token looks at itself: a softmax over nothing would be NaN.
    return F.pad(allowed | (key == query)[None], (prefix, 0), value=True)[:, None]


def document_blocks(doc_ids, block: int = BLOCK) -> tuple:
    """What document_block_mask needs for packed rows, in NumPy, so that the loader's thread can make it.

    doc_ids (B, T) -> counts (4, B, 1, n) and lists (4, B, 1, n, n), int32, of n blocks. The four: for each block of
    queries those of keys that are read through the mask, and those that hold only allowed pairs; then both the other
    way round, for each block of keys. A list begins with the blocks that it is about, and counts says how many.

    The first and the last document of each block are enough to know that: within a row the ids never fall, except for
    the -1 of padding at its end.
    """
    T = doc_ids.shape[1]
    ordered = np.where(doc_ids < 0, T, doc_ids)
    first = ordered[:, ::block]  # (B, n), as last
    last = np.pad(ordered, ((0, 0), (0, -T % block)), constant_values=T + 1)[:, block - 1::block]
    key = np.arange(first.shape[1])
    query = key[:, None]
    some = (key <= query) & (last[:, None, :] >= first[:, :, None])  # (B, n of queries, n of keys)
    whole = (key < query) & (first[:, None, :] == last[:, :, None])
    kinds = some & ~whole, whole
    chosen = np.stack([*kinds, *(kind.swapaxes(1, 2) for kind in kinds)])[:, :, None]  # (4, B, 1, n, n); the 1: heads
    return chosen.sum(-1, dtype=np.int32), (~chosen).argsort(axis=-1, kind="stable").astype(np.int32)


def document_block_mask(doc_ids, counts, lists, block: int = BLOCK) -> BlockMask:
    """attention_mask_2d for packed rows, doc_ids (B, T), in the form of flex attention (arXiv 2412.05496).

    counts, lists: document_blocks(doc_ids) as tensors. They say which blocks of queries and keys hold no allowed pair
    and are skipped, and which hold only allowed pairs and need no mask.
    """
    def same_document(b, h, query, key):
        return (key <= query) & (doc_ids[b, query] == doc_ids[b, key])

    T = doc_ids.shape[1]
    pairs = [tensor for pair in zip(counts, lists) for tensor in pair]
    return BlockMask((T, T), *pairs, BLOCK_SIZE=(block, block), mask_mod=same_document)


@functools.cache
def can_flex(device, heads: int, kv_heads: int, head_dim: int, recompute: bool = False) -> bool:
    """Whether compiled flex attention of this shape works there, forward and backward: it is tried, once.

    Its kernels are tuned for large GPUs. On those with less shared memory (RTX 3090, 4090) some head_dims fit only in
    smaller blocks, so these are tried next. Says, in one line, what had to be given up. On CUDA only.
    """
    if device.type != "cuda":
        return False
    try:
        try:
            _compile_flex(device, heads, kv_heads, head_dim, recompute)
        except Exception as error:
            # Triton's words: "out of resource: shared memory, Required: 131074, Hardware limit: 101376"
            if not any(words in str(error).lower() for words in ("out of resource", "shared memory")):
                raise
            KERNEL_OPTIONS.update(SMALLER)
            _compile_flex(device, heads, kv_heads, head_dim, recompute)
            runtime.say(f"flex attention in smaller blocks: {runtime.in_one_line(error)}", file=sys.stderr)
    except Exception as error:  # as with torch.compile, there are many
        runtime.say(f"no flex attention, so long packed rows take longer: {runtime.in_one_line(error)}",
                    file=sys.stderr)
        return False
    return True


def _compile_flex(device, heads: int, kv_heads: int, head_dim: int, recompute: bool):
    """Forward and backward of flex attention on a row of three documents, as a layer runs it. Raises if it fails."""
    doc_ids = np.arange(2 * BLOCK)[None] // 100
    blocks = [torch.from_numpy(array).to(device) for array in document_blocks(doc_ids)]
    mask = document_block_mask(torch.from_numpy(doc_ids).to(device), *blocks)
    q, k, v = (torch.ones(1, n, 2 * BLOCK, head_dim, dtype=runtime.precision(device), device=device, requires_grad=True)
               for n in (heads, kv_heads, kv_heads))

    # In one piece: a break would leave flex attention uncompiled, and so it holds all pairs of tokens at once.
    compiled = torch.compile(attend, fullgraph=True)
    out = checkpoint(compiled, q, k, v, mask, use_reentrant=False) if recompute else compiled(q, k, v, mask)
    out.sum().backward()
    q.grad.sum().item()  # wait: a kernel may fail when it runs


def document_lengths(doc_ids) -> list:
    """attention_mask_2d for packed rows, doc_ids (B, T), as lists: the lengths of each row's documents, in order."""
    return [row.unique_consecutive(return_counts=True)[1].tolist() for row in doc_ids]


def one_by_one(device_type: str, T: int) -> bool:
    """Whether the documents of packed rows of T tokens are attended to one by one.

    In long rows most pairs of tokens span two documents, and a CPU's kernels skip none. In bf16 two_products makes rows
    of up to 512 cheap enough.
    """
    return device_type == "cpu" and T > (512 if torch.is_autocast_enabled("cpu") else 256)


def attend(q, k, v, mask):
    """softmax(q k^T / sqrt(d)) v -> (B, H, T, d) for q (B, H, T, d) and k, v (B, K, S, d).

    mask: what attention_mask_2d, document_block_mask or document_lengths returns.
    """
    (B, H, T, d), (K, S) = q.shape, k.shape[1:3]
    if isinstance(mask, list):  # one document after the other
        found = []
        for row, lengths in enumerate(mask):
            for document in zip(*(x[row:row + 1].split(lengths, dim=2) for x in (q, k, v))):
                found.append(attend(*document, None))  # three tensors (1, heads, length, d) -> (1, H, length, d)
        return torch.cat(found, dim=2).view(H, B, T, d).transpose(0, 1)  # (1, H, B T, d) -> (B, H, T, d)
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=H != K, kernel_options=KERNEL_OPTIONS)
    if two_products(q.device.type, q.dtype, T, S, mask is not None):
        causal = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        return _attend_in_two_products(q, k, v, causal if mask is None else mask)
    if T == 1:  # decoding: the query heads that share a key head take the place of queries, and no key is copied
        return F.scaled_dot_product_attention(q.reshape(B, K, H // K, d), k, v, attn_mask=mask).reshape(B, H, 1, d)
    k, v = k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1)  # (B, H, S, d)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def two_products(device_type: str, dtype, T: int, S: int, masked: bool) -> bool:
    """Whether attention of T queries and S keys is computed as the formula is written, without a fused kernel.

    In bf16 on short rows PyTorch's kernel for CPUs takes twice as long. Its kernels for Apple's GPUs (mps) are wrong in
    some releases: for a few queries (decoding), where rows of unequal length have a mask, and in causal bf16.
    """
    if device_type == "mps":
        return dtype == torch.bfloat16 or T <= 8
    return device_type == "cpu" and dtype == torch.bfloat16 and (T > 1 or masked) and T * S <= 2**18


def _attend_in_two_products(q, k, v, mask):
    """The formula as written: scores = q k^T / sqrt(d), then softmax(scores) v."""
    (B, H, T, d), (K, S) = q.shape, k.shape[1:3]
    q = q.reshape(B, K, H // K * T, d) * d**-0.5  # the query heads that share a key head, side by side
    scores = (q @ k.transpose(-1, -2)).view(B, H, T, S)  # from (B, K, H/K T, S)
    forbidden = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)
    weights = (scores + forbidden).softmax(dim=-1)  # not add_: its gradient would be copied twice, scores being a view
    return (weights.view(B, K, H // K * T, S) @ v).view(B, H, T, d)
