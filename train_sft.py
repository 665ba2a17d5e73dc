"""Supervised fine-tuning (SFT): show a model conversations, and train it on what the assistant says.

The first step of InstructGPT (arXiv 2203.02155, section 3.5). The loss is the mean negative log-likelihood of the
assistant's tokens y, given everything before them:

    loss = - sum_t mask_t log p(y_t | y_<t) / sum_t mask_t

Why a mask: the log-likelihood of a conversation is that of what the user says plus that of what the assistant answers,

    log p(question, answer) = log p(question) + log p(answer | question)

and only the second is to be learned: the model should answer, not imitate its users. The sum runs over all tokens, and
loss_mask keeps the terms of the answer and of the <|im_end|> that closes it; without that one the model never learns to
stop. A question is still read, so its hidden states get gradients, through attention. n_targets counts the supervised
tokens of all micro-batches and processes: in a mean of their means, a token would weigh more the fewer targets its
micro-batch has.
In memory: as in train_pretrain.py.

    python train_sft.py                                   # the data in data/, from out/pretrain when it is there
    python train_sft.py --data mine.jsonl --model Qwen3-0.6B     # a downloaded model has defaults of its own

Loss: linear_cross_entropy in minillm/logprobs.py (sft_loss in losses.py is its plain twin). Tests: chapters 5 and 7.

Deviations: conversations are packed into rows (attention and positions stay within each conversation), which changes
the speed and no gradient. By default Muon trains the hidden matrices.
"""

import os
from dataclasses import dataclass

from minillm import checkpoint, runtime, shard
from minillm.config import by_hand, check_random_weights, flag, parse_config
from minillm.data import PackedLoader, encode_conversation, load_split
from minillm.evaluate import answer_questions, held_out_loss, read_questions
from minillm.logprobs import linear_cross_entropy
from minillm.model import PRESETS, CausalLM, packed_forward, preset_config
from minillm.optim import make_optimizers, schedule, set_lr, update
from minillm.run import Run, RunConfig
from minillm.tokenizer import Tokenizer

DATA, EVAL_DATA, PRETRAINED = "data/sft.jsonl", "data/sft_eval.jsonl", "out/pretrain"


@dataclass
class Config(RunConfig):
    model: str = flag("", f"checkpoint folder to start from (default: {PRETRAINED}, or random weights without it)")
    data: list[str] = flag([DATA], "conversations, .jsonl or .jsonl.gz")
    eval_data: str = flag("", f"held-out conversations (default: {EVAL_DATA}, or 5 % of your own --data)")
    out: str = flag("out/sft", "folder to write")
    preset: str = flag("tiny", "architecture; if given, training starts from random weights", choices=list(PRESETS))
    tokenizer: str = flag("data/tokenizer.json", "tokenizer; if given, training starts from random weights")
    max_seq_len: int = flag(256, "tokens per row; longer conversations are cut", low=8, downloaded=1024)
    batch_size: int = flag(7, "rows of max_seq_len tokens per micro-batch, all processes together", low=1, downloaded=2)
    grad_accum: int = flag(1, "micro-batches per optimizer step", low=1, downloaded=4)
    epochs: int = flag(3, "passes over the data", low=1, downloaded=3)
    optimizer: str = flag("muon", "Muon for the hidden matrices, or AdamW for all", choices=["muon", "adamw"],
                          downloaded="adamw")
    lr: float = flag(2e-3, "peak learning rate", low=0, downloaded=2e-5)
    warmup_steps: int = flag(50, "steps of linear warm-up", low=0)
    weight_decay: float = flag(0.1, "weight decay of the matrices", low=0, downloaded=0.0)
    max_questions: int = flag(200, "held-out questions asked in an evaluation, of a larger file evenly spaced", low=1)
    max_new_tokens: int = flag(64, "tokens of a reply to such a question", low=1)
    eval_every: int = flag(1000, "steps between evaluations", low=1)
    recompute: bool = flag(False, "activation checkpointing: less memory, slower")
    shard: bool = flag(False, "under torchrun, split weights, gradients and AdamW's moments over the processes")


def main(cfg: Config) -> dict:
    # 1. Setup
    device = runtime.start(cfg.device, cfg.seed)
    check_random_weights(cfg)
    fresh = by_hand(cfg, "preset", "tokenizer")  # either of them asks for random weights
    source = cfg.model or (PRETRAINED if os.path.exists(f"{PRETRAINED}/model.safetensors") and not fresh else "")
    if source:
        checkpoint.choose_defaults(cfg, source)
        checkpoint.require_stage(source, max_seq_len=cfg.max_seq_len)
    elif os.path.exists(f"{PRETRAINED}.bak") and not fresh:
        runtime.say(f"there is no {PRETRAINED}, but an older run in {PRETRAINED}.bak; --model {PRETRAINED}.bak uses it")
    checkpoint.check_tokenizer_file(source or cfg.tokenizer)
    tokenizer = checkpoint.load_tokenizer(source) if source else Tokenizer.load(cfg.tokenizer)
    eval_path = cfg.eval_data or (EVAL_DATA if cfg.data == [DATA] else "")
    run = Run(cfg, inputs=[source or cfg.tokenizer, *cfg.data, eval_path])
    if run.finished:
        return run.result

    # 2. Data
    train_data, eval_data = load_split(encode_conversation, cfg.data, eval_path, tokenizer, cfg.max_seq_len, cfg.seed)
    questions = read_questions(eval_path, cfg.max_questions)
    loader = PackedLoader(train_data, cfg.batch_size, cfg.max_seq_len, cfg.seed)

    # 3. Models
    if source:
        model = checkpoint.load_model(source, device, mapped=shard.is_on(cfg))
    else:
        why = "" if fresh else f"no {PRETRAINED} (train_pretrain.py makes it): "
        runtime.say(f"{why}starting from random weights, preset {cfg.preset}")
        config = preset_config(cfg.preset, tokenizer.vocab_size, cfg.max_seq_len)
        model = CausalLM(config).to(shard.home(cfg, device))
    model.model.recompute = cfg.recompute
    shard.shard(cfg, model, device)
    forward = packed_forward(model, cfg.compile, loader.row_length)

    # 4. Optimizer
    optimizers = make_optimizers(model, cfg.lr, cfg.weight_decay, muon=cfg.optimizer == "muon")

    def evaluate() -> dict:
        return {**held_out_loss(model, eval_data, cfg.max_seq_len, device),
                **answer_questions(model, tokenizer, questions, device, max_new_tokens=cfg.max_new_tokens)}

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
            # the loss mask: what the assistant says, and the <|im_end|> that closes it
            loss = linear_cross_entropy(hidden, model.lm_head.weight, batch.tokens, batch.loss_mask, n_targets,
                                        batch.targets)
            loss.backward()
            run.add({"loss": loss}, tokens=n_tokens)
        update(model, optimizers, cfg.max_grad_norm)

    # 6. Result
    return run.finish(train_data.stats)


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
