"""Parameter-efficient fine-tuning (PEFT): supervised fine-tuning in which the model stays frozen and little is trained.

The loss is that of train_sft.py. What differs is section 3, which puts the trained parameters on the frozen model:

    lora     y = W x + alpha / r * B A x beside every matrix W          minillm/lora.py      arXiv 2106.09685
    dora     the same, and the length of each row of W                  minillm/lora.py      arXiv 2402.09353
    adapter  h + W_up gelu(W_down h) after attention and MLP            minillm/adapter.py   arXiv 1902.00751
    prefix   keys and values before those of every document             minillm/prefix.py    arXiv 2101.00190
    prompt   input vectors before every document                        minillm/prefix.py    arXiv 2104.08691

What LoRA assumes: the change of W (out, in) that a new task needs has a low rank, so it is written as a product of
B (out, r) and A (r, in). With s = alpha / r and g the gradient of the loss in y,

    d loss / d B = s g (A x)^T          d loss / d A = s B^T g x^T

B starts at 0: the first output is the base's, and in the first step only B moves. A starts at random: with both at 0
neither would ever move. r (in + out) numbers are trained instead of in x out.
In memory: the base, without gradients and moments, and at most 16 bytes for each number that is trained. The
activations stay: the gradient has to pass through the frozen layers (--recompute).

    python train_lora.py                                  # teaches data/identity.jsonl to out/sft, writes out/lora
    python train_lora.py --peft dora --rank 16 --alpha 32 --merge --out out/dora
    python train_lora.py --data new.jsonl new.jsonl old.jsonl   # new data, read twice, with a share of the old
    python eval.py --model out/sft --adapter out/lora --chat

Trained on new data alone, the model forgets what else it could do, whatever the method. A small share of old data among
the new ones prevents that.

The folder written is small and in the format of the PEFT package, which opens all kinds but --peft adapter.
Tests: chapters 12 to 14.

Deviations: conversations are packed into rows, as in train_sft.py; where a method differs from its paper, the top of
its file says so. The rank is high for so small a model, and dropout is on: without it the answers are learned too, but
fewer rephrased questions get them. The default learning rate depends on the method, and prompt tuning reads the
data 60 times, the others 20. Prefixes and prompts are trained by Muon (arXiv 2502.16982) as one matrix with a row for
each virtual token, not by AdamW: a prefix then needs no reparametrisation MLP. A prompt needs many passes at a small
rate: at a larger one it learns the new answers, but mixes them up. Even so it learns only a part of them: it can do no
more than steer a frozen model of a million parameters. In its paper it catches up with fine-tuning at eleven billion.
"""

from dataclasses import dataclass

import torch

from minillm import checkpoint, runtime, shard
from minillm.adapter import apply_bottleneck
from minillm.config import flag, parse_config
from minillm.data import PackedLoader, encode_conversation, load_split
from minillm.errors import UserError
from minillm.evaluate import answer_questions, held_out_loss, read_questions
from minillm.logprobs import linear_cross_entropy
from minillm.lora import TARGETS, apply_lora, merge_lora
from minillm.model import packed_forward
from minillm.optim import make_optimizers, schedule, set_lr, update
from minillm.peft import load_adapter
from minillm.prefix import apply_prefix, apply_prompt
from minillm.run import Run, RunConfig

DATA, EVAL_DATA = "data/identity.jsonl", "data/identity_eval.jsonl"
LR = {"lora": 2e-3, "dora": 2e-3, "adapter": 5e-3, "prefix": 1e-1, "prompt": 1e-2}
VIRTUAL_TOKENS = {"prefix": 64, "prompt": 256}


@dataclass
class Config(RunConfig):
    model: str = flag("out/sft", "checkpoint folder of the base model, which stays frozen")
    data: list[str] = flag([DATA], "conversations, .jsonl or .jsonl.gz")
    eval_data: str = flag("", f"held-out conversations (default: {EVAL_DATA}, or 5 % of your own --data)")
    out: str = flag("out/lora", "folder to write the adapter to")
    peft: str = flag("lora", "the method", choices=list(LR))
    rank: int = flag(32, "lora, dora: rank r of the update", low=1, downloaded=8)
    alpha: float = flag(64.0, "lora, dora: the update is scaled by alpha / r", low=0, downloaded=16.0)
    rslora: bool = flag(False, "lora, dora: scale by alpha / sqrt(r) instead (arXiv 2312.03732)")
    dropout: float = flag(0.1, "lora, dora: dropout on the input of the update", low=0, high=0.99, downloaded=0.0)
    target_modules: list[str] = flag(list(TARGETS), "lora, dora: names of the linear layers")
    bottleneck: int = flag(16, "adapter: size of the bottleneck", low=1)
    placement: str = flag("houlsby", "adapter: after attention and MLP, or (pfeiffer) after the MLP only",
                          choices=["houlsby", "pfeiffer"])
    virtual_tokens: int = flag(0, "prefix, prompt: length P (default: prefix 64, prompt 256)", low=0)
    start_text: str = flag("Dear reader, here is what I know about myself and my work.",
                           "prefix, prompt: words to start from")
    bf16: bool = flag(False, "hold all of the frozen base in bf16, its embeddings too (slow without bf16 instructions)")
    merge: bool = flag(False, "lora, dora: also write the whole merged model, to OUT/merged")
    max_seq_len: int = flag(256, "tokens per row; longer conversations are cut", low=8, downloaded=1024)
    batch_size: int = flag(8, "rows of max_seq_len tokens per micro-batch, all processes together", low=1, downloaded=2)
    grad_accum: int = flag(1, "micro-batches per optimizer step", low=1, downloaded=4)
    epochs: int = flag(0, "passes over the data (default: 20, prompt 60)", low=0, downloaded=3)
    max_questions: int = flag(200, "held-out questions asked in an evaluation, of a larger file evenly spaced", low=1)
    max_new_tokens: int = flag(64, "tokens of a reply to such a question", low=1)
    lr: float = flag(0.0, f"peak learning rate (default: {', '.join(f'{k} {v:g}' for k, v in LR.items())})", low=0,
                     downloaded=2e-4)
    warmup_steps: int = flag(10, "steps of linear warm-up", low=0)
    save_every: int = flag(100, "steps between checkpoints", low=1)
    recompute: bool = flag(False, "activation checkpointing: less memory, slower")
    shard: bool = flag(False, "under torchrun, split weights, gradients and AdamW's moments over the processes")


def main(cfg: Config) -> dict:
    # 1. Setup
    device = runtime.start(cfg.device, cfg.seed)
    checkpoint.choose_defaults(cfg, cfg.model, keep=["lr"] if cfg.peft in ("prefix", "prompt") else [])
    checkpoint.require_stage(cfg.model, "out/sft", "train_sft.py", max_seq_len=cfg.max_seq_len)
    if cfg.merge and cfg.peft not in ("lora", "dora"):
        raise UserError(f"--merge: {cfg.peft} is no change of the weights; only lora and dora can be merged")
    tokenizer = checkpoint.load_tokenizer(cfg.model)
    eval_path = cfg.eval_data or (EVAL_DATA if cfg.data == [DATA] else "")
    run = Run(cfg, inputs=[cfg.model, *cfg.data, eval_path])
    if run.finished:
        return run.result

    # 2. Data
    train_data, eval_data = load_split(encode_conversation, cfg.data, eval_path, tokenizer, cfg.max_seq_len, cfg.seed)
    questions = read_questions(eval_path, cfg.max_questions)
    loader = PackedLoader(train_data, cfg.batch_size, cfg.max_seq_len, cfg.seed)

    # 3. Models: the base is frozen, and only what is put on it here is trained
    dtype = runtime.dtype_to_hold(cfg.bf16, device)
    hold = cfg.peft != "prefix"  # in bf16 at once; for a prefix only below, after the base has computed it
    model = checkpoint.load_model(cfg.model, device, dtype, frozen=hold, mapped=shard.is_on(cfg))
    total = sum(p.numel() for p in model.parameters())
    virtual_tokens = cfg.virtual_tokens or VIRTUAL_TOKENS.get(cfg.peft)
    if cfg.peft in ("lora", "dora"):
        apply_lora(model, cfg.rank, cfg.alpha, cfg.target_modules, cfg.dropout, cfg.rslora, dora=cfg.peft == "dora")
    elif cfg.peft == "adapter":
        apply_bottleneck(model, cfg.bottleneck, cfg.placement)
    elif cfg.peft == "prefix":
        apply_prefix(model, virtual_tokens, tokenizer.encode(cfg.start_text))  # runs the base
        runtime.hold_in_bf16(model)
    else:
        apply_prompt(model, virtual_tokens, tokenizer.encode(cfg.start_text))
    if cfg.max_seq_len > model.context:
        raise UserError(f"--max_seq_len {cfg.max_seq_len}: beside {virtual_tokens} virtual tokens there is room for "
                        f"{model.context} in the model's context; give at most that")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    runtime.say(f"{cfg.peft}: training {trained:,} parameters ({trained / total:.2%}) beside {total:,} frozen ones")
    model.model.recompute = cfg.recompute
    shard.shard(cfg, model, device)
    forward = packed_forward(model, cfg.compile, loader.row_length)

    # 4. Optimizer: its state too is only that of the trained parameters
    peak_lr = cfg.lr or LR[cfg.peft]
    muon = cfg.peft in ("prefix", "prompt")
    optimizers = make_optimizers(model, peak_lr, weight_decay=0.0, betas=(0.9, 0.99), muon=muon)

    def evaluate() -> dict:
        return {**held_out_loss(model, eval_data, cfg.max_seq_len, device),
                **answer_questions(model, tokenizer, questions, device, max_new_tokens=cfg.max_new_tokens)}

    # 5. Train
    epochs = cfg.epochs or (60 if cfg.peft == "prompt" else 20)
    total_steps = cfg.max_steps or loader.steps(epochs, cfg.grad_accum)
    run.start(model, optimizers, loader, tokenizer, total_steps, evaluate)
    batches = iter(loader)
    for step in run:
        set_lr(optimizers, peak_lr * schedule(step, total_steps, cfg.warmup_steps))
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
    if cfg.merge and runtime.rank() == 0:
        whole = load_adapter(checkpoint.load_model(cfg.model), cfg.out)  # in float32, also after training beside bf16
        merge_lora(whole)
        checkpoint.save_model(f"{cfg.out}/merged", whole, tokenizer, cfg.save_dtype)
    return run.finish(train_data.stats, trained_parameters=trained)


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
