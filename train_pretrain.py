"""Pretraining: a transformer learns to predict the next token of plain text.

The objective of GPT-3 (arXiv 2005.14165), over every token x of every document:

    loss = - mean_t log p(x_t | x_<t)

Why this one: by the chain rule the probability of a document is p(x) = prod_t p(x_t | x_<t), so the log-likelihood of
all text is a sum with one term for each token, and to maximise it is to predict the next token. Its expectation is

    E[-log p(x)] = H(text) + KL(text || model)

so the expected loss cannot fall below the entropy of the text: what training lowers is the KL divergence, the distance
from the model's distribution to the text's. The loss begins near ln(vocabulary), 8.03 for 3,072 tokens, where all are
equally likely. In the logits of one token its gradient is (softmax(logits) - onehot(x_t)) / n_targets: what was said
goes up, everything else goes down by its own probability.
In memory: weights, gradients and the optimizer's moments (16 bytes a parameter with AdamW, 12 with Muon, which has one
moment), and the activations, which grow with batch_size x max_seq_len.

    python train_pretrain.py                                       # the text in data/, tiny preset
    python train_pretrain.py --data novel.txt wiki.jsonl.gz --preset small --max_seq_len 1024

Loss: linear_cross_entropy in minillm/logprobs.py. Tests: chapters 5 and 7.

Deviations: documents are packed into rows, and attention stays within each document (GPT-3 lets it run across). By
default Muon (arXiv 2502.16982) trains the hidden matrices, which learns faster than AdamW alone.
"""

from dataclasses import dataclass

from minillm import checkpoint, runtime, shard
from minillm.config import check_random_weights, flag, parse_config
from minillm.data import PackedLoader, encode_text, load_split
from minillm.evaluate import continuations, held_out_loss
from minillm.logprobs import linear_cross_entropy
from minillm.model import PRESETS, CausalLM, packed_forward, preset_config
from minillm.optim import make_optimizers, schedule, set_lr, update
from minillm.run import Run, RunConfig
from minillm.tokenizer import Tokenizer

DATA, EVAL_DATA = "data/pretrain.jsonl", "data/pretrain_eval.jsonl"


@dataclass
class Config(RunConfig):
    model: str = flag("", "checkpoint folder to continue from (default: random weights)")
    data: list[str] = flag([DATA], 'text: {"text": ...} in .jsonl or .jsonl.gz, or .txt')
    eval_data: str = flag("", f"held-out text (default: {EVAL_DATA}, or 5 % of your own --data)")
    out: str = flag("out/pretrain", "folder to write")
    preset: str = flag("tiny", "architecture, for random weights only", choices=list(PRESETS))
    tokenizer: str = flag("data/tokenizer.json", "tokenizer, for random weights only")
    max_seq_len: int = flag(192, "tokens per row; longer documents become several pieces", low=8, downloaded=1024)
    batch_size: int = flag(8, "rows of max_seq_len tokens per micro-batch, all processes together", low=1, downloaded=2)
    grad_accum: int = flag(1, "micro-batches per optimizer step", low=1, downloaded=4)
    epochs: int = flag(5, "passes over the data", low=1, downloaded=1)
    optimizer: str = flag("muon", "Muon for the hidden matrices, or AdamW for all", choices=["muon", "adamw"],
                          downloaded="adamw")
    lr: float = flag(4e-3, "peak learning rate", low=0, downloaded=2e-5)
    warmup_steps: int = flag(50, "steps of linear warm-up", low=0)
    weight_decay: float = flag(0.1, "weight decay of the matrices", low=0)
    recompute: bool = flag(False, "activation checkpointing: less memory, slower")
    shard: bool = flag(False, "under torchrun, split weights, gradients and AdamW's moments over the processes")


def main(cfg: Config) -> dict:
    # 1. Setup
    device = runtime.start(cfg.device, cfg.seed)
    check_random_weights(cfg)
    if cfg.model:
        checkpoint.choose_defaults(cfg, cfg.model)
        checkpoint.require_stage(cfg.model, max_seq_len=cfg.max_seq_len)
    checkpoint.check_tokenizer_file(cfg.model or cfg.tokenizer)
    tokenizer = checkpoint.load_tokenizer(cfg.model) if cfg.model else Tokenizer.load(cfg.tokenizer)
    eval_path = cfg.eval_data or (EVAL_DATA if cfg.data == [DATA] else "")
    run = Run(cfg, inputs=[cfg.model or cfg.tokenizer, *cfg.data, eval_path])
    if run.finished:
        return run.result

    # 2. Data
    train_data, eval_data = load_split(encode_text, cfg.data, eval_path, tokenizer, cfg.max_seq_len, cfg.seed)
    loader = PackedLoader(train_data, cfg.batch_size, cfg.max_seq_len, cfg.seed)

    # 3. Models
    if cfg.model:
        model = checkpoint.load_model(cfg.model, device, mapped=shard.is_on(cfg))
    else:
        config = preset_config(cfg.preset, tokenizer.vocab_size, cfg.max_seq_len)
        model = CausalLM(config).to(shard.home(cfg, device))
    model.model.recompute = cfg.recompute
    shard.shard(cfg, model, device)
    forward = packed_forward(model, cfg.compile, loader.row_length)

    # 4. Optimizer
    optimizers = make_optimizers(model, cfg.lr, cfg.weight_decay, muon=cfg.optimizer == "muon")

    def evaluate() -> dict:
        return held_out_loss(model, eval_data, cfg.max_seq_len, device)

    # 5. Train
    total_steps = cfg.max_steps or loader.steps(cfg.epochs, cfg.grad_accum)
    run.start(model, optimizers, loader, tokenizer, total_steps, evaluate)
    batches = iter(loader)
    for step in run:
        set_lr(optimizers, cfg.lr * schedule(step, total_steps, cfg.warmup_steps))
        micro_batches = [next(batches) for _ in range(cfg.grad_accum)]
        n_targets = run.count(sum(batch.n_targets for batch in micro_batches))
        for batch in micro_batches:
            batch, n_tokens = batch.to(device), batch.n_tokens
            with runtime.autocast(device):
                hidden = forward(batch.tokens, batch.doc_ids, batch.blocks)  # (B, T, D)
            # the loss mask: every token of a document but its first
            loss = linear_cross_entropy(hidden, model.lm_head.weight, batch.tokens, batch.loss_mask, n_targets,
                                        batch.targets)
            loss.backward()
            run.add({"loss": loss}, tokens=n_tokens)
        update(model, optimizers, cfg.max_grad_norm)

    # 6. Result
    result = run.finish(train_data.stats)
    runtime.say(continuations(model, tokenizer, eval_data, device))
    return result


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
