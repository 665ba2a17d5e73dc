"""Reward model: learn from pairs of answers to score an answer, as the person who compared them would.

The second step of InstructGPT (arXiv 2203.02155, Eq. 1, with two answers per prompt). r(x, y) is a scalar head on
the SFT model, read at the <|im_end|> that closes answer y to prompt x:

    loss = -log sigmoid(r(x, chosen) - r(x, rejected) - margin) - sft_coef * mean_t log p(chosen_t | before it)

Why Bradley-Terry: people cannot say how good an answer is on a scale, but which of two is better. Suppose that every
answer has a strength exp(r) > 0, whatever it is compared with, and wins in proportion to it:

    P(chosen beats rejected) = exp(r_chosen) / (exp(r_chosen) + exp(r_rejected)) = sigmoid(r_chosen - r_rejected)

The log-odds are then the difference of two scores. The likeliest r for the labels seen minimises -log P, the loss (with
margin 0). Its gradient in r_chosen is -sigmoid(r_rejected - r_chosen), and the opposite in r_rejected: 1/2 where both
score the same, and near 0 for a pair that is ranked clearly right. A number b(x) added to both scores cancels: only
differences of scores for one prompt mean something.
In memory: one model, its gradients and moments.

    python train_reward.py                                # the pairs in data/, from out/sft
    python train_reward.py --model out/grpo               # knows more right answers, so it ranks more pairs right
    python train_reward.py --sft_coef 0                   # InstructGPT's loss alone
    python train_reward.py --data mine.jsonl --model Qwen3-0.6B

A pair may have a "margin" by which its chosen answer should win (Llama 2, arXiv 2307.09288, Eq. 2). The folder opens in
transformers as a sequence classifier with one label.
Loss: reward_loss in minillm/losses.py. Tests: chapters 15 to 17.

Deviations: the head starts at random, and all weights are trained. No term centres the scores. The second term is the
SFT regularisation of GRM (arXiv 2406.10216, section 3.2) as a plain SFT loss: it keeps in the hidden states what the
language model knows about good answers, and so helps to tell wrong ones. It needs the LM head, which is trained where
it is tied to the embedding; otherwise it stays frozen and is not saved.
"""

from dataclasses import dataclass

from minillm import checkpoint, runtime
from minillm.config import flag, parse_config
from minillm.heads import RewardModel
from minillm.logprobs import linear_cross_entropy
from minillm.lora import apply_lora
from minillm.losses import reward_loss
from minillm.metrics import table
from minillm.optim import make_optimizers, schedule, set_lr, update
from minillm.preferences import PairLoader, load_pairs, rank_pairs, score_pairs
from minillm.run import Run, RunConfig

DATA, EVAL_DATA = "data/preference.jsonl", "data/preference_eval.jsonl"


@dataclass
class Config(RunConfig):
    model: str = flag("out/sft", "checkpoint folder to start from")
    data: list[str] = flag([DATA], "pairs of a chosen and a rejected answer, .jsonl or .jsonl.gz")
    eval_data: str = flag("", f"held-out pairs (default: {EVAL_DATA}, or 5 % of your own --data)")
    out: str = flag("out/reward", "folder to write")
    max_seq_len: int = flag(256, "tokens of prompt and answer; longer answers are cut", low=8, downloaded=1024)
    batch_size: int = flag(24, "pairs per micro-batch, all processes together", low=1, downloaded=2)
    grad_accum: int = flag(1, "micro-batches per optimizer step", low=1, downloaded=4)
    epochs: int = flag(8, "passes over the data", low=1, downloaded=1)
    sft_coef: float = flag(1.0, "weight of the SFT loss on the chosen answers (0: none)", low=0)
    peft: str = flag("none", "train all weights, or a LoRA and the head (--out: the merged model)",
                     choices=["none", "lora"])
    rank: int = flag(8, "lora: rank r of the update", low=1)
    alpha: float = flag(16.0, "lora: the update is scaled by alpha / r", low=0)
    lr: float = flag(5e-4, "peak learning rate", low=0, downloaded=1e-5, with_lora=1e-4)
    warmup_steps: int = flag(20, "steps of linear warm-up", low=0)
    weight_decay: float = flag(0.1, "weight decay of the matrices", low=0, downloaded=0.0)
    eval_every: int = flag(100, "steps between evaluations", low=1)


def main(cfg: Config) -> dict:
    # 1. Setup
    device = runtime.start(cfg.device, cfg.seed)
    checkpoint.choose_defaults(cfg, cfg.model)
    checkpoint.require_stage(cfg.model, "out/sft", "train_sft.py", max_seq_len=cfg.max_seq_len)
    tokenizer = checkpoint.load_tokenizer(cfg.model)
    eval_path = cfg.eval_data or (EVAL_DATA if cfg.data == [DATA] else "")
    run = Run(cfg, inputs=[cfg.model, *cfg.data, eval_path])
    if run.finished:
        return run.result

    # 2. Data
    train_data, eval_data = load_pairs(cfg.data, eval_path, tokenizer, cfg.max_seq_len, cfg.seed)
    loader = PairLoader(train_data, cfg.batch_size, cfg.seed)

    # 3. Models
    lm = checkpoint.load_model(cfg.model, device, frozen=cfg.peft == "lora")
    reward_model = RewardModel.from_lm(lm)  # the same backbone; a scalar head instead of the LM head
    tied = lm.config.tie_word_embeddings
    lm_head = lm.lm_head.weight if tied else lm.lm_head.weight.detach()  # for the SFT loss
    if cfg.peft == "lora":
        apply_lora(reward_model, cfg.rank, cfg.alpha)
        reward_model.score.requires_grad_()
    runtime.compile_backbone(reward_model, cfg.compile)

    # 4. Optimizer
    optimizers = make_optimizers(reward_model, cfg.lr, cfg.weight_decay)

    def evaluate() -> dict:
        scores = score_pairs(lambda b: reward_model(b.tokens, b.lengths), eval_data, cfg.batch_size, device)  # (N, 2)
        chosen_rewards, rejected_rewards = scores.mean(0).tolist()
        return {**rank_pairs(scores, eval_data.kinds),
                "chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards}

    # 5. Train
    total_steps = cfg.max_steps or loader.steps(cfg.epochs, cfg.grad_accum)
    run.start(reward_model, optimizers, loader, tokenizer, total_steps, evaluate)
    batches = iter(loader)
    for step in run:
        set_lr(optimizers, cfg.lr * schedule(step, total_steps, cfg.warmup_steps))
        micro_batches = [batch for batch in (next(batches) for _ in range(cfg.grad_accum)) if batch.n_pairs]
        n_pairs, n_targets = run.count(sum(batch.n_pairs for batch in micro_batches),
                                       sum(batch.n_chosen_tokens for batch in micro_batches))
        for batch in micro_batches:
            batch, n_tokens, n_chosen_tokens = batch.to(device), batch.n_tokens, batch.n_chosen_tokens
            with runtime.autocast(device):
                hidden = reward_model.model(batch.tokens)  # (2B, T, D): the chosen answers, then the rejected ones
            chosen_rewards, rejected_rewards = reward_model.read(hidden, batch.lengths).chunk(2)  # (B,) each
            loss = reward_loss(chosen_rewards, rejected_rewards, batch.margins, n_pairs)
            margins = (chosen_rewards - rejected_rewards).detach()
            run.add({"accuracy": (margins > 0).float().mean(), "margin": margins.mean()}, weight=batch.n_pairs)
            if cfg.sft_coef:
                chosen = slice(batch.n_pairs)
                sft_loss = linear_cross_entropy(hidden[chosen], lm_head, batch.tokens[chosen],
                                                batch.answer_mask[chosen], n_targets, batch.targets[:n_chosen_tokens])
                run.add({"reward_loss": loss, "sft_loss": sft_loss})
                loss = loss + cfg.sft_coef * sft_loss
            loss.backward()
            run.add({"loss": loss}, tokens=n_tokens)
        update(reward_model, optimizers, cfg.max_grad_norm)

    # 6. Result
    result = run.finish(train_data.stats)
    runtime.say(table([["stated confidence", "accuracy", "pairs"]] + result["reliability"]))
    return result


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
