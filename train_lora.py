"""Parameter-efficient fine-tuning (PEFT): supervised fine-tuning in which the model stays frozen and little is trained.

The loss is that of train_sft.py; what differs is section 3, where the trained parameters are put on the frozen model:

    lora     y = W x + alpha / r * B A x beside every matrix W          minillm/lora.py      arXiv 2106.09685
    dora     the same, and the length of each row of W                  minillm/lora.py      arXiv 2402.09353
    adapter  h + W_up gelu(W_down h) after attention and MLP            minillm/adapter.py   arXiv 1902.00751
    prefix   keys and values before those of every document             minillm/prefix.py    arXiv 2101.00190
    prompt   input vectors before every document                        minillm/prefix.py    arXiv 2104.08691

    python train_lora.py                                  # teaches data/identity.jsonl to out/sft, writes out/lora
    python train_lora.py --peft dora --rank 16 --alpha 32 --merge --out out/dora
    python eval.py --model out/sft --adapter out/lora --chat

The folder written is small and has the format of the PEFT package, which opens it (it has no bottleneck adapters).

Deviations: conversations are packed into rows, as in train_sft.py; what differs from a method's paper stands at the top
of its file. Each method has a learning rate of its own. Prefixes and prompts are trained by Muon (arXiv 2502.16982) as
one matrix, a row for each virtual token, instead of AdamW: a prefix then needs no reparametrisation MLP. A prompt takes
many passes at a small rate: at a larger one it gives one of the new answers, seldom the one that was asked for.
"""

from dataclasses import asdict, dataclass

import torch

from minillm import checkpoint, runtime
from minillm.adapter import apply_bottleneck, save_bottleneck
from minillm.config import flag, parse_config
from minillm.data import PackedLoader, load_split
from minillm.errors import UserError
from minillm.evaluate import answer_questions, held_out_loss, read_questions
from minillm.generate import eval_mode
from minillm.lora import TARGETS, apply_lora, merge_lora, save_lora
from minillm.losses import sft_loss_from_hidden
from minillm.metrics import Progress, before_after, show_replies
from minillm.model import packed_forward
from minillm.optim import make_optimizers, schedule, set_lr
from minillm.peft import load_adapter
from minillm.prefix import apply_prefix, apply_prompt, save_prefix
from minillm.tokenizer import Tokenizer

DATA, EVAL_DATA = "data/identity.jsonl", "data/identity_eval.jsonl"
LR = {"lora": 2e-3, "dora": 2e-3, "adapter": 5e-3, "prefix": 1e-1, "prompt": 1e-2}
EPOCHS = {"lora": 20, "dora": 20, "adapter": 20, "prefix": 20, "prompt": 90}
VIRTUAL_TOKENS = {"prefix": 64, "prompt": 256}
SAVE = {"lora": save_lora, "dora": save_lora, "adapter": save_bottleneck, "prefix": save_prefix, "prompt": save_prefix}


@dataclass
class Config:
    model: str = flag("out/sft", "checkpoint folder of the base model, which stays frozen")
    data: list[str] = flag([DATA], "conversations, .jsonl or .jsonl.gz")
    eval_data: str = flag("", f"held-out conversations (default: {EVAL_DATA}, or 5 % of your own --data)")
    out: str = flag("out/lora", "folder to write the adapter to")
    peft: str = flag("lora", "the method", choices=list(LR))
    rank: int = flag(8, "lora, dora: rank r of the update", low=1)
    alpha: float = flag(16.0, "lora, dora: the update is scaled by alpha / r", low=0)
    rslora: bool = flag(False, "lora, dora: scale by alpha / sqrt(r) instead (arXiv 2312.03732)")
    dropout: float = flag(0.0, "lora, dora: dropout on the input of the update", low=0, high=0.99)
    target_modules: list[str] = flag(list(TARGETS), "lora, dora: names of the linear layers")
    bottleneck: int = flag(16, "adapter: size of the bottleneck", low=1)
    placement: str = flag("houlsby", "adapter: after attention and MLP, or (pfeiffer) after the MLP only", choices=["houlsby", "pfeiffer"])
    virtual_tokens: int = flag(0, f"prefix, prompt: length P (default: {', '.join(f'{k} {v}' for k, v in VIRTUAL_TOKENS.items())})", low=0)
    prefix_mlp: int = flag(0, "prefix: hidden units of the reparametrisation MLP (0: none, and the prefix starts from --start_text); 256 wants --lr 2e-2", low=0)
    start_text: str = flag("Dear reader, here is what I know about myself and my work.", "prompt (and prefix without MLP): words to start from")
    bf16: bool = flag(False, "hold the frozen base in bf16: half the memory")
    merge: bool = flag(False, "lora, dora: also write the whole merged model, to OUT/merged")
    max_seq_len: int = flag(256, "tokens per row; longer conversations are cut", low=8)
    batch_size: int = flag(8, "rows per micro-batch", low=1)
    grad_accum: int = flag(1, "micro-batches per optimizer step", low=1)
    epochs: int = flag(0, f"passes over the data (default: {', '.join(f'{k} {v}' for k, v in EPOCHS.items())})", low=0)
    max_steps: int = flag(0, "optimizer steps; overrides --epochs", low=0)
    lr: float = flag(0.0, f"peak learning rate (default: {', '.join(f'{k} {v:g}' for k, v in LR.items())})", low=0)
    warmup_steps: int = flag(10, "optimizer steps of linear warm-up", low=0)
    recompute: bool = flag(False, "activation checkpointing: less memory, slower")
    max_grad_norm: float = flag(1.0, "longer gradients are scaled down to this norm", low=1e-6)
    log_every: int = flag(20, "optimizer steps between log lines", low=1)
    save_every: int = flag(100, "optimizer steps between checkpoints", low=1)
    resume: bool = flag(False, "continue the run in --out")
    device: str = flag("", "cuda, mps or cpu (default: the best that is here)")
    seed: int = flag(0, "seed of everything random", low=0)
    compile: bool = flag(True, "torch.compile (on CUDA)")


def main(cfg: Config) -> dict:
    # 1. Setup
    device = runtime.start(cfg.device, cfg.seed)
    checkpoint.require_stage(cfg.model, "out/sft", "train_sft.py")
    if cfg.merge and cfg.peft not in ("lora", "dora"):
        raise UserError(f"--merge: {cfg.peft} is no change of the weights; only lora and dora can be merged")
    run = checkpoint.start_run(cfg.out, cfg.resume, asdict(cfg), inputs=[cfg.model, *cfg.data])
    if run and run["finished"]:
        return run["metrics"]

    # 2. Data
    tokenizer = Tokenizer.load(cfg.model)
    eval_path = cfg.eval_data or (EVAL_DATA if cfg.data == [DATA] else "")
    train_data, eval_data = load_split("chat", cfg.data, eval_path, tokenizer, cfg.max_seq_len, cfg.seed, runtime.say)
    questions = read_questions(eval_path) if eval_path else []
    loader = PackedLoader(train_data, cfg.batch_size, cfg.max_seq_len, cfg.seed, runtime.rank(), runtime.world_size())
    total_steps = cfg.max_steps or -(-sum(loader.batches(e) for e in range(cfg.epochs or EPOCHS[cfg.peft])) // cfg.grad_accum)

    # 3. Models: the base is frozen, and only what is put on it here is trained
    model = checkpoint.load_model(cfg.model, device, torch.bfloat16 if cfg.bf16 else torch.float32)
    checkpoint.check_tokenizer(model, tokenizer, cfg.model)
    total = sum(p.numel() for p in model.parameters())
    virtual_tokens = cfg.virtual_tokens or VIRTUAL_TOKENS.get(cfg.peft)
    if cfg.peft in ("lora", "dora"):
        apply_lora(model, cfg.rank, cfg.alpha, cfg.target_modules, cfg.dropout, cfg.rslora, dora=cfg.peft == "dora")
    elif cfg.peft == "adapter":
        apply_bottleneck(model, cfg.bottleneck, cfg.placement)
    elif cfg.peft == "prefix":
        apply_prefix(model, virtual_tokens, tokenizer.encode(cfg.start_text), cfg.prefix_mlp)
    else:
        apply_prompt(model, virtual_tokens, tokenizer.encode(cfg.start_text))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    runtime.say(f"{cfg.peft}: training {trained:,} parameters ({trained / total:.2%}) beside {total:,} frozen ones")
    model.model.recompute = cfg.recompute
    forward = packed_forward(model, cfg.compile and runtime.can_compile(device))

    # 4. Optimizer: its state too is only that of the trained parameters
    peak_lr = cfg.lr or LR[cfg.peft]
    optimizers = make_optimizers(model, peak_lr, weight_decay=0.0, betas=(0.9, 0.99), muon=cfg.peft in ("prefix", "prompt"))

    def evaluate() -> dict:
        with eval_mode(model):  # without dropout
            metrics = held_out_loss(model, eval_data, cfg.max_seq_len, device)
        return {**metrics, **answer_questions(model, tokenizer, questions, device)} if questions else metrics

    # 5. Train
    step, before = checkpoint.restore_run(run, model, optimizers, loader) if run else (0, evaluate())
    progress = Progress(cfg.out, total_steps, step, show=runtime.rank() == 0)
    interrupt, batches, losses = runtime.Interrupt(), iter(loader), []
    while step < total_steps:
        lr = peak_lr * schedule(step, total_steps, cfg.warmup_steps)
        set_lr(optimizers, lr)
        micro_batches = [next(batches) for _ in range(cfg.grad_accum)]
        n_tokens = runtime.sum_over_processes(sum(int(b.loss_mask.sum()) for b in micro_batches))  # of the whole step
        losses.append(torch.zeros((), device=device))
        for batch in micro_batches:
            batch = batch.to(device)
            with runtime.autocast(device):
                hidden = forward(batch.tokens, doc_ids=batch.doc_ids)
            loss = sft_loss_from_hidden(hidden, model.lm_head.weight, batch.tokens, batch.loss_mask, n_tokens)
            loss.backward()
            losses[-1] += loss.detach()
        runtime.sum_gradients(model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        progress.step(int(runtime.sum_over_processes(sum(b.n_tokens for b in micro_batches))))

        stop_now = interrupt.requested()
        save_now = step % cfg.save_every == 0 or step == total_steps or stop_now
        if step % cfg.log_every == 0 or save_now:
            progress.log(step, loss=runtime.finite_mean(losses, step, cfg.out), lr=lr)
            losses.clear()
        if save_now:
            checkpoint.save_run(cfg.out, step, model, tokenizer, optimizers, loader, before,
                                save=lambda out: SAVE[cfg.peft](model, out, cfg.model))
        if stop_now:
            interrupt.close()
            return progress.interrupted(step)

    # 6. Save
    interrupt.close()
    after = {**evaluate(), "trained_parameters": trained}
    runtime.say(before_after(before, after))
    if questions:
        runtime.say(show_replies(questions, before["replies"], after["replies"]))
    if cfg.merge and runtime.rank() == 0:
        whole = load_adapter(checkpoint.load_model(cfg.model), cfg.out)  # in float32, also when --bf16 trained beside bf16
        merge_lora(whole)
        checkpoint.save_model(f"{cfg.out}/merged", whole, tokenizer)
    return progress.finish(train_data.stats, before, after, runtime.peak_memory_mb(device))


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
