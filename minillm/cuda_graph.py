"""A decoding step as a CUDA graph: captured once, then replayed without starting its hundreds of kernels one by one."""

import functools
import sys

import torch

from minillm import runtime
from minillm.model import KVCache

BUCKET = 128  # positions by which a captured step's attention grows


class StaticCache(KVCache):
    """A KVCache for a step that is the same program for every token.

    `length` is a tensor on the device. Attention runs over the first `size` positions; those still empty are not valid.
    """

    def __init__(self, cache: KVCache, size: int):
        self.keys, self.values, self.valid = cache.keys, cache.values, cache.valid
        self.prefix, self.padded = cache.prefix, cache.padded
        self.size, self.length = size, torch.full((1,), cache.length, device=cache.valid.device)

    def extend(self, tokens, attention_mask=None):
        self.valid.index_fill_(1, self.length, True)
        return self.valid[:, :self.size]

    def append(self, layer: int, keys, values):
        for stored, new in ((self.keys[layer], keys), (self.values[layer], values)):
            stored.index_copy_(2, self.length, new.to(stored.dtype))
        return self.keys[layer][:, :, :self.size], self.values[layer][:, :, :self.size]


@functools.cache
def _capture_stream(device):
    """One stream for all captures: cuBLAS keeps a workspace for every stream that it was ever used on."""
    return torch.cuda.Stream(device)


class StaticStep:
    """The twin of `model(tokens[:, None], cache=cache)[:, -1]` that a CUDA graph can hold; elsewhere it just runs.

    The first step of a bucket just runs, the second is captured, and from then on it is replayed.
    """

    works = True  # no capture has failed in this process: one that did may leave the generators unusable for another
    newest = None  # the graph captured last; the next one shares its memory, which PyTorch would free late, in pieces

    def __init__(self, model, cache: KVCache):
        self.model, self.cache = model, cache
        self.static = self.graph = self.logits = None
        self.captures = cache.valid.is_cuda and StaticStep.works
        self.tokens = torch.zeros(len(cache.valid), 1, dtype=torch.long, device=cache.valid.device)

    def forward(self):
        return self.model(self.tokens, cache=self.static)[:, -1]

    def capture(self):
        self.graph, stream = torch.cuda.CUDAGraph(), _capture_stream(self.tokens.device)
        pool = (StaticStep.newest.pool(),) if StaticStep.newest else ()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                self.graph.capture_begin(*pool, capture_error_mode="thread_local")  # the loader's thread goes on
                try:
                    self.logits = self.forward()  # recorded, not computed
                finally:
                    self.graph.capture_end()
                    StaticStep.newest = self.graph
        except RuntimeError as error:
            reason = runtime.in_one_line(error)
            runtime.say(f"decoding without a CUDA graph, which is slower: {reason}", file=sys.stderr)
            self.captures = StaticStep.works = False
        torch.cuda.current_stream().wait_stream(stream)

    def __call__(self, tokens):
        """tokens (B,) -> logits (B, V); the next call may overwrite them."""
        self.tokens.copy_(tokens[:, None])
        new_bucket = self.static is None or self.cache.length == self.static.size
        if new_bucket:
            size = min((self.cache.length // BUCKET + 1) * BUCKET, self.cache.valid.shape[1])
            self.static, self.graph = StaticCache(self.cache, size), None
        self.cache.length += 1
        if self.captures and not new_bucket and self.graph is None:
            self.capture()
        if new_bucket or not self.captures:
            return self.forward()
        self.graph.replay()
        return self.logits
