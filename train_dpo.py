"""Direct preference optimization (DPO): learn from pairs of answers without a reward model and without sampling.

DPO (arXiv 2305.18290, Eq. 7). The policy itself is read as a reward model: its implicit reward for an answer y to a
prompt x is beta * (log pi(y|x) - log pi_ref(y|x)), where the reference pi_ref is the model before training, frozen:

    loss = -log sigmoid(reward(x, chosen) - reward(x, rejected))

Why: RLHF looks for the policy with a high reward r that stays close to the reference,

    max over pi of   E_{y ~ pi}[r(x, y)] - beta KL(pi || pi_ref)
                  =  beta log Z(x) - beta KL(pi || pi*)       pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x)

where Z(x) makes pi* sum to 1 and does not depend on pi. So the best policy is pi*. Solved for the reward,

    r(x, y) = beta (log pi*(y|x) - log pi_ref(y|x)) + beta log Z(x)

In the difference of two answers to one prompt Z cancels, though nobody can compute it. Put into the Bradley-Terry loss
of train_reward.py, with the policy in place of pi*, that is the loss above. With z the difference of the rewards, its
gradient is -beta sigmoid(-z) (grad log pi(chosen) - grad log pi(rejected)): pairs that are ranked wrong weigh most.
In memory: the policy, its gradients and moments; of the reference only two numbers for each pair, computed beforehand.

    python train_dpo.py                                   # the pairs in data/, from out/sft
    python train_dpo.py --loss ipo                        # IPO (arXiv 2310.12036, Eq. 17): the margin has a target
    python train_dpo.py --data mine.jsonl --model Qwen3-0.6B

The first line of the log shows ln 2 (IPO: 1 / (2 beta)^2): before its first update the policy is the reference (unless
--ref_model names another). Watch chosen_logprobs: the loss falls as long as the rejected answer falls faster, even when
the chosen one falls too.
Losses: dpo_loss and ipo_loss in minillm/losses.py. Tests: chapters 15 to 17.

Deviations: log-probabilities of IPO are averages over an answer's tokens, as its authors advise. AdamW, not
RMSprop. The default beta of 0.5 is the paper's for summaries (elsewhere 0.1); for a downloaded model it is 0.1.
"""

from dataclasses import dataclass

from minillm import checkpoint, runtime, shard
from minillm.config import flag, parse_config
from minillm.errors import UserError
from minillm.evaluate import answer_questions, read_questions, sample_answers
from minillm.lora import apply_lora
from minillm.losses import dpo_loss, ipo_loss
from minillm.optim import make_optimizers, schedule, set_lr, update
from minillm.preferences import (PairLoader, answer_logprobs, check_same_tokenizer, load_pairs, pair_logprobs,
                                 rank_pairs, reference_logprobs)
from minillm.run import Run, RunConfig

DATA, EVAL_DATA, QUESTIONS = "data/preference.jsonl", "data/preference_eval.jsonl", "data/sft_eval.jsonl"


@dataclass
class Config(RunConfig):
    model: str = flag("out/sft", "checkpoint folder to start from")
    ref_model: str = flag("", "checkpoint folder of the frozen reference (default: --model)")
    data: list[str] = flag([DATA], "pairs of a chosen and a rejected answer, .jsonl or .jsonl.gz")
    eval_data: str = flag("", f"held-out pairs (default: {EVAL_DATA}, or 5 % of your own --data)")
    out: str = flag("out/dpo", "folder to write")
    max_seq_len: int = flag(256, "tokens of prompt and answer; longer answers are cut", low=8, downloaded=1024)
    batch_size: int = flag(24, "pairs per micro-batch, all processes together", low=1, downloaded=2)
    grad_accum: int = flag(1, "micro-batches per optimizer step", low=1, downloaded=4)
    epochs: int = flag(2, "passes over the data", low=1, downloaded=1)
    loss: str = flag("dpo", "dpo or ipo", choices=["dpo", "ipo"])
    beta: float = flag(0.5, "how strongly the policy is held to the reference (usual: 0.1 to 0.5)", low=1e-6,
                       downloaded=0.1)
    label_smoothing: float = flag(0.0, "probability that a label is wrong (conservative DPO)", low=0, high=0.5)
    peft: str = flag("none", "train all weights, or a LoRA (--out then holds the adapter)", choices=["none", "lora"])
    rank: int = flag(8, "lora: rank r of the update", low=1)
    alpha: float = flag(16.0, "lora: the update is scaled by alpha / r", low=0)
    lr: float = flag(2e-5, "peak learning rate", low=0, downloaded=1e-6, with_lora=2e-5)
    warmup_steps: int = flag(10, "steps of linear warm-up", low=0)
    weight_decay: float = flag(0.0, "weight decay of the matrices", low=0)
    log_every: int = flag(10, "steps between log lines", low=1)
    max_questions: int = flag(200, "held-out questions asked in an evaluation, of a larger file evenly spaced", low=1)
    max_new_tokens: int = flag(64, "tokens of a reply to such a question", low=1)
    eval_every: int = flag(200, "steps between evaluations", low=1)
    shard: bool = flag(False, "under torchrun, split weights, gradients and AdamW's moments over the processes")


def main(cfg: Config) -> dict:
    # 1. Setup
    device = runtime.start(cfg.device, cfg.seed)
    checkpoint.choose_defaults(cfg, cfg.model)
    checkpoint.require_stage(cfg.model, "out/sft", "train_sft.py", max_seq_len=cfg.max_seq_len)
    if cfg.ref_model:
        checkpoint.require_stage(cfg.ref_model, option="--ref_model", max_seq_len=cfg.max_seq_len)
    if cfg.loss != "dpo" and cfg.label_smoothing:
        raise UserError(f"--label_smoothing {cfg.label_smoothing} belongs to --loss dpo; leave it out with {cfg.loss}")
    tokenizer = checkpoint.load_tokenizer(cfg.model)
    eval_path = cfg.eval_data or (EVAL_DATA if cfg.data == [DATA] else "")
    run = Run(cfg, inputs=[cfg.model, cfg.ref_model, *cfg.data, eval_path])
    if run.finished:
        return run.result

    # 2. Data
    train_data, eval_data = load_pairs(cfg.data, eval_path, tokenizer, cfg.max_seq_len, cfg.seed)
    questions = read_questions(QUESTIONS if eval_path == EVAL_DATA else "", cfg.max_questions)
    loader = PairLoader(train_data, cfg.batch_size, cfg.seed)

    # 3. Models
    policy = checkpoint.load_model(cfg.model, device, frozen=cfg.peft == "lora", mapped=shard.is_on(cfg))
    if cfg.peft == "lora":
        apply_lora(policy, cfg.rank, cfg.alpha)
    ref_model = policy  # before its first update the policy is the reference: one copy is enough
    if cfg.ref_model:
        split = shard.is_on(cfg)  # FSDP needs one dtype within a layer, so nothing is held in bf16 then
        ref_model = checkpoint.load_model(cfg.ref_model, device, frozen=not split, mapped=split)
        check_same_tokenizer(tokenizer, checkpoint.load_tokenizer(cfg.ref_model), cfg.ref_model)
    for model in {policy, ref_model}:
        runtime.compile_backbone(model, cfg.compile)
        shard.shard(cfg, model, device)
    # The reference scores the batches of training, by the same program, so that the first margins are exactly 0.
    average = cfg.loss == "ipo"  # of the log-probabilities of an answer's tokens; DPO takes their sum
    ref_logprobs = reference_logprobs(ref_model, loader, device, average).to(device)  # (N, 2)
    ref_eval_logprobs = pair_logprobs(ref_model, eval_data, cfg.batch_size, device, average)
    del ref_model, model  # these numbers are all that training needs of the reference

    # 4. Optimizer
    optimizers = make_optimizers(policy, cfg.lr, cfg.weight_decay)

    def evaluate() -> dict:
        rewards = cfg.beta * (pair_logprobs(policy, eval_data, cfg.batch_size, device, average) - ref_eval_logprobs)
        chosen_rewards, rejected_rewards = rewards.mean(0).tolist()
        sampled, _ = sample_answers(policy, tokenizer, questions, device, 2, cfg.max_new_tokens)
        return {**rank_pairs(rewards, eval_data.kinds),
                "chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards,
                **sampled, **answer_questions(policy, tokenizer, questions, device, max_new_tokens=cfg.max_new_tokens)}

    # 5. Train
    total_steps = cfg.max_steps or loader.steps(cfg.epochs, cfg.grad_accum)
    run.start(policy, optimizers, loader, tokenizer, total_steps, evaluate)
    batches = iter(loader)
    for step in run:
        set_lr(optimizers, cfg.lr * schedule(step, total_steps, cfg.warmup_steps))
        micro_batches = [next(batches) for _ in range(cfg.grad_accum)]  # empty ones too: --shard needs all processes
        n_pairs = run.count(sum(batch.n_pairs for batch in micro_batches))
        for batch in micro_batches:
            batch, n_tokens = batch.to(device), batch.n_tokens
            with runtime.autocast(device):
                hidden = policy.hidden(batch.tokens)  # (2B, T, D): the chosen answers, then the rejected ones
                logprobs = answer_logprobs(hidden, policy.lm_head.weight, batch, average)  # (2B,)
            chosen_logprobs, rejected_logprobs = logprobs.chunk(2)
            ref_chosen_logprobs, ref_rejected_logprobs = ref_logprobs[batch.pairs].unbind(1)
            four = chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs
            if cfg.loss == "dpo":
                loss, stats = dpo_loss(*four, cfg.beta, cfg.label_smoothing, n_pairs)
            else:
                loss, stats = ipo_loss(*four, cfg.beta, n_pairs)
            loss.backward()
            run.add({"loss": loss}, tokens=n_tokens)
            run.add({**stats, "chosen_logprobs": chosen_logprobs.mean()}, weight=batch.n_pairs)
        update(policy, optimizers, cfg.max_grad_norm)

    # 6. Result
    return run.finish(train_data.stats)


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
