"""What GRPO and PPO share: prompts, the scores of sampled answers, and a rollout as mini-batches of micro-batches."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minillm.data import Loader, hold_out, to_device
from minillm.errors import UserError
from minillm.evaluate import check_question, prompt_messages, sample_answers
from minillm.generate import Rollout, generate
from minillm.logprobs import head_entropy, head_logprobs
from minillm.losses import whiten
from minillm.records import read_records
from minillm.rewards import score_answers
from minillm.runtime import autocast, gather, say, share, sum_tensor_over_processes, world_size

MOST_SAMPLED = 2_000  # sampled answers in an evaluation; there are at most 4 to each prompt


# Prompts: a conversation up to the turn that the model will write.

@dataclass
class Prompt:
    """tokens: what the model continues; messages: the same as a conversation; record: its line in the data file."""

    tokens: list
    messages: list
    record: dict


def check_prompt(record: dict, where: str):
    """Raise UserError unless record is a prompt: apart from an assistant's last turn it ends with a user or a tool."""
    check_question(record, where)
    messages = prompt_messages(record)
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        last = f'role {messages[-1]["role"]!r}' if messages else "nothing"
        raise UserError(f"{where}: a prompt must end with a user message (an assistant message after it is ignored), "
                        f"but this one ends with {last}")


def make_prompt(record: dict, tokenizer, thinking: bool = False) -> Prompt:
    """A line of a data file as a Prompt. thinking: as in reply_to (minillm/evaluate.py)."""
    messages = prompt_messages(record)
    return Prompt(tokenizer.render(messages, add_generation_prompt=True, thinking=thinking)[0], messages, record)


def load_prompts(paths: list, eval_path: str, tokenizer, room: int, seed: int, tasks=(),
                 need_answers: bool = False, thinking: bool = False) -> tuple:
    """Read prompts -> (training prompts, held-out prompts, stats).

    The held-out prompts are those of eval_path, or without such a file 5 % of those that `select` leaves (see
    hold_out). Prompts of more than `room` tokens are dropped from both sides. Held-out prompts, and what `select`
    drops, are not trained on. stats counts them all, and the counts are printed. Raises UserError for a bad line, with
    file and line, and if no prompt is left to train on.
    """
    files = ", ".join(map(str, paths))
    if room < 1:
        raise UserError("--max_new_tokens leaves no room for a prompt in --max_seq_len, which counts both; raise "
                        "--max_seq_len or lower --max_new_tokens")
    if thinking and not tokenizer.chat_format.think:
        raise UserError(f"--thinking: the model's chat format ({tokenizer.chat_format.name}) has no think blocks; "
                        "leave it out")
    if eval_path:  # first, because it is the smaller one and may have a mistake
        held_out = [make_prompt(record, tokenizer, thinking) for record in read_records(eval_path, check_prompt)]
    everything = [make_prompt(record, tokenizer, thinking) for record in read_records(paths, check_prompt)]
    known = {prompt.record["task"] for prompt in everything if prompt.record.get("task")}
    if unknown := [task for task in tasks if task not in known]:
        raise UserError(f"{files}: --tasks {' '.join(unknown)}: no prompt has such a task; "
                        f"found: {', '.join(sorted(known)) or 'none'}")
    fitting = [prompt for prompt in everything if len(prompt.tokens) <= room]
    if eval_path:
        held_out = [prompt for prompt in held_out if len(prompt.tokens) <= room]
        hidden = {tuple(prompt.tokens) for prompt in held_out}
    else:
        usable = select(fitting, tasks, need_answers)  # held out of these, so that both sides are measured alike
        held_out = [usable[i] for i in hold_out([hash(tuple(prompt.tokens)) for prompt in usable], seed)]
        hidden = {tuple(prompt.tokens) for prompt in held_out}
        if usable and not held_out:
            say("there is only one prompt: it is used for training and for evaluation")
            held_out = usable[:1]
    seen = [prompt for prompt in fitting if tuple(prompt.tokens) not in hidden]
    train = select(seen, tasks, need_answers)
    stats = {"prompts": len(everything), "longer than there is room for": len(everything) - len(fitting),
             "held out": len(fitting) - len(seen), "of other tasks or without an answer": len(seen) - len(train)}
    reasons = "; ".join(f"{count:,} {reason}" for reason, count in stats.items() if count and reason != "prompts")
    say(f"{files}: {len(train):,} of {len(everything):,} prompts to train on" + (f" ({reasons})" if reasons else ""))
    if not train:
        if not fitting:
            advice = f"a prompt has room for {room} tokens (--max_seq_len minus --max_new_tokens)"
        elif not seen:
            advice = "the held-out file contains them all"
        elif need_answers and not select(seen, (), need_answers):
            advice = ('no prompt has an "answer", which --reward answer needs; use --reward model, --reward judge '
                      "or a file of your own")
        else:
            advice = f"those of --tasks {' '.join(tasks)} are not among the rest"
        raise UserError(f"{files}: no prompt is left to train on ({reasons}); {advice}")
    if not select(held_out, tasks, need_answers):
        wanted = [*['an "answer"'] * need_answers, *['one of --tasks as its "task"'] * bool(tasks)]
        wanted = wanted if held_out else [f"at most {room} tokens (--max_seq_len minus --max_new_tokens)"]
        say(f"{eval_path}: no prompt that has {' and '.join(wanted)}, so held-out rewards are not measured")
    return train, held_out, stats


def select(prompts: list, tasks=(), need_answers: bool = False) -> list:
    """The prompts whose "task" is one of `tasks` (if any are given) and that have an "answer" (if one is needed)."""
    return [prompt for prompt in prompts if (not tasks or prompt.record.get("task") in tasks)
            and not (need_answers and prompt.record.get("answer") is None)]


class PromptLoader(Loader):
    """Batches of prompts (lists of Prompt), all full: the last one of an epoch is filled up with the first prompts.

    Every process gets the whole batch: sample_rollout and score_rollout share the work.
    """

    def __init__(self, prompts: list, batch_size: int, seed: int):
        super().__init__(prompts, batch_size, seed, shared=False)

    def order(self, epoch: int):
        """Yield the prompts of an epoch, by number."""
        size, count = self.batch_size, len(self.dataset)
        order = np.random.default_rng([self.seed, epoch]).permutation(count)
        yield from np.resize(order, -(-count // size) * size).tolist()

    def collate(self, numbers: list) -> list:
        """Numbers -> the prompts."""
        return [self.dataset[i] for i in numbers]


# Sampled answers, and their scores.

def sample_rollout(policy, prompts: list, max_new_tokens: int, end_id, temperature: float, generator,
                   group_size: int = 1, pad_id: int = 0) -> Rollout:
    """group_size answers to each Prompt. Each process samples its share, and all get the whole rollout. end_id: as in
    generate.

    The random numbers of all answers are drawn first, so the answers do not depend on the number of processes.
    """
    device = next(policy.parameters()).device
    uniforms = torch.rand(len(prompts), group_size, max_new_tokens, generator=generator, device=device)  # (N, G, T)
    mine, rollout = share(prompts), None
    if mine:
        with autocast(device):
            rollout = generate(policy, [prompt.tokens for prompt in mine], max_new_tokens, end_id, temperature,
                               group_size=group_size, pad_id=pad_id, uniforms=share(uniforms).flatten(0, 1))
    if world_size() == 1:
        return rollout
    found = gather(rollout and Rollout(rollout.tokens.cpu(), rollout.response_mask.cpu(), rollout.logprobs.cpu()))
    width, joined = max(one.tokens.shape[1] for one in found if one), [None] * len(prompts)
    for first, one in enumerate(found):
        if one:
            missing = (0, width - one.tokens.shape[1])
            rows = zip(torch.nn.functional.pad(one.tokens, missing, value=pad_id).split(group_size),
                       torch.nn.functional.pad(one.response_mask, missing).split(group_size),
                       torch.nn.functional.pad(one.logprobs, missing).split(group_size))
            joined[first::world_size()] = rows
    return Rollout(*(to_device(torch.cat(column), device) for column in zip(*joined)))  # (prompts * group_size, width)


def read_answers(rollout, tokenizer) -> tuple:
    """(texts, ended): each answer without its end token, and whether it had one, (B,) bool on the CPU."""
    responses = rollout.responses()
    ended = [response[-1] in tokenizer.end_ids for response in responses]
    texts = [tokenizer.decode(response[:-1] if end else response) for response, end in zip(responses, ended)]
    return texts, torch.tensor(ended)


def score_rollout(rewards: dict, prompts: list, texts: list, device) -> tuple:
    """Score G answers to each of N prompts -> (scores (N, G), {name of a reward: its own scores, unweighted, (N, G)}).

    rewards: from load_rewards. texts: N * G answers, those to one prompt next to each other. The scores are float32, on
    the device. Each process scores its share, and all get all scores. Raises UserError if a reward function fails.
    """
    size = len(texts) // len(prompts)
    asked = [(prompt.messages, texts[i * size:(i + 1) * size], prompt.record) for i, prompt in enumerate(prompts)]
    with torch.no_grad():
        found = gather(score_answers(rewards, share(asked)) if share(asked) else None)
    total, components = torch.zeros(len(prompts), size), {name: torch.zeros(len(prompts), size) for name in found[0][1]}
    for first, scored in enumerate(found):
        if scored:
            total[first::world_size()] = torch.tensor(scored[0])
            for name, component in components.items():
                component[first::world_size()] = torch.tensor(scored[1][name])
    return to_device(total, device), {name: to_device(scores, device) for name, scores in components.items()}


def sampled_scores(policy, tokenizer, prompts: list, rewards: dict, device, max_new_tokens: int,
                   temperature: float, thinking: bool = False) -> dict:
    """Sample answers and average: sampled_reward, sampled_reward_std, sampled_gold_reward, sampled_accuracy, ...

    Each prompt gets as many answers (up to 4) as MOST_SAMPLED allows. With a single answer to each of 400 prompts, half
    of them right, the standard error of the mean would be 2.5 points. Returns {} for no prompts.
    """
    if not prompts:
        return {}
    times = max(1, min(4, MOST_SAMPLED // len(prompts)))
    records = [prompt.record for prompt in prompts]
    metrics, texts = sample_answers(policy, tokenizer, records, device, times, max_new_tokens, temperature,
                                    thinking)
    total, components = score_rollout(rewards, prompts, texts, device)
    named = {"reward": total}
    if len(components) > 1:
        named |= {f"reward_{name}": scores for name, scores in components.items()}
    return {**metrics, **{f"sampled_{name}": scores.mean().item() for name, scores in named.items()},
            # In float64, so that equal rewards have a std of exactly 0: PPO divides by it.
            "sampled_reward_std": total.cpu().double().std(correction=0).item()}


# A rollout as mini-batches of micro-batches.

@dataclass
class MicroBatch:
    """b answers of a rollout that have similar lengths, cropped to the longest: rows of t tokens.

    The results of later steps are stored here too, next to the answers they belong to.
    """

    tokens: Tensor  # (b, t): prompt, answer, padding on the right
    mask: Tensor  # (b, t - 1) bool, aligned with the logprobs: True on the answer
    last: Tensor  # (b,): the column of the mask that holds the answer's last token
    n_tokens: int  # tokens of the answers
    targets: Tensor | None = None  # where they are in tokens.flatten()
    scores: Tensor | None = None  # (b,): one for each answer
    advantages: Tensor | None = None  # (b,) in GRPO, (b, t - 1) in PPO
    old_logprobs: Tensor | None = None  # (b, t - 1), like the next four
    logprobs: Tensor | None = None  # of the last pass over the rollout, for save_rollout
    ref_logprobs: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None


@dataclass
class MiniBatch:
    """This process's share of the answers of one optimizer step."""

    micro_batches: list  # of MicroBatch
    n_sequences: int  # answers, including those that were not kept
    n_tokens: int  # tokens of the answers that were kept


def split_rollout(rollout, num_minibatches: int, grad_accum: int, generator, scores=None, advantages=None,
                  keep=None) -> list:
    """Shuffle a rollout's answers and split them into num_minibatches MiniBatches of up to grad_accum MicroBatches
    (without CUDA into more MicroBatches where that is needed to keep each at 32 answers or fewer).

    Every process takes its share of each MiniBatch, which may be none.

    scores, advantages (B,), optional: one number for each answer, split in the same way. keep (B,) bool, optional: the
    answers that have a gradient; the others are counted in n_sequences, but nothing is computed for them. generator: a
    CPU generator. All shapes are known on the CPU, so the update never waits for the device.
    """
    device, mask = rollout.tokens.device, rollout.response_mask[:, 1:]
    answers = rollout.response_mask.cpu()  # (B, T)
    lengths, counts = rollout.lengths.cpu(), answers.sum(1)  # (B,): prompt and answer; the answer alone
    keep = torch.ones(len(lengths), dtype=torch.bool) if keep is None else keep.cpu()

    def micro_batch(rows):
        longest, at = int(lengths[rows].max()), to_device(rows, device)
        return MicroBatch(
            tokens=rollout.tokens[at, :longest], mask=mask[at, :longest - 1],
            last=to_device(lengths[rows] - 2, device),  # the mask starts at the second token
            n_tokens=int(counts[rows].sum()),
            targets=to_device(answers[rows, :longest].flatten().nonzero()[:, 0], device),
            scores=None if scores is None else scores[at],
            advantages=None if advantages is None else advantages[at])

    def mini_batch(rows):
        kept = rows[keep[rows]]
        kept = share(kept[lengths[kept].argsort()])
        # A CPU gains by running short answers apart from long ones, with less padding; a GPU by fewer launches. On mps
        # products over 32,767 tokens are wrong: see logprobs.product.
        pieces = grad_accum if device.type == "cuda" else max(grad_accum, -(-len(kept) // 32))
        micro_batches = [micro_batch(piece) for piece in kept.tensor_split(pieces) if len(piece)]
        return MiniBatch(micro_batches, len(share(rows)), n_tokens=sum(batch.n_tokens for batch in micro_batches))

    order = torch.randperm(len(lengths), generator=generator)
    return [mini_batch(rows) for rows in order.tensor_split(num_minibatches)]


def batch_texts(batch: MicroBatch, tokenizer) -> list:
    """(prompt, answer) of each row as text, with the special tokens: an answer shows whether it ended by itself."""
    starts = (batch.mask.int().argmax(dim=1) + 1).tolist()  # the mask starts at token 1
    ends = (batch.last + 2).tolist()
    return [(tokenizer.decode(row[:start]), tokenizer.decode(row[start:end]))
            for row, start, end in zip(batch.tokens.tolist(), starts, ends)]


def response_logprobs(model, batch: MicroBatch, temperature: float = 1.0, with_entropy: bool = False):
    """Log-probabilities of the answers' tokens, (b, t - 1), 0 elsewhere.

    with_entropy: return also the mean entropy, in nats, of the distributions of these tokens, a scalar. The padding is
    on the right, so a causal model needs no attention mask.
    """
    with autocast(batch.tokens.device):
        hidden = model.hidden(batch.tokens)  # (b, t, D)
        logprobs = head_logprobs(hidden, model.lm_head.weight, batch.tokens, temperature, batch.mask, batch.targets)
        if not with_entropy:
            return logprobs
        entropy = head_entropy(hidden.detach(), model.lm_head.weight, batch.mask, temperature, batch.targets)
        return logprobs, entropy


def response_values(value_model, batch: MicroBatch) -> Tensor:
    """The critic's values, (b, t - 1): column t holds its guess just before the token whose logprob is in column t."""
    with autocast(batch.tokens.device):
        return value_model(batch.tokens)[:, :-1]


def whiten_advantages(micro_batches: list, device):
    """Whiten the advantages in place (losses.whiten), over all micro-batches of the rollout and all processes."""
    advantages, mask = flatten(micro_batches, device, "advantages", "mask")
    whitened = whiten(advantages[None], mask[None], reduce=sum_tensor_over_processes)[0]
    for batch, values in zip(micro_batches, whitened.split([batch.mask.numel() for batch in micro_batches])):
        batch.advantages = values.view(batch.mask.shape)  # (b, t - 1)


def explained_variance(micro_batches: list, device) -> Tensor:
    """1 - Var(returns - old_values) / Var(returns) over the tokens of all micro-batches and all processes.

    It is 1 for a perfect critic, 0 for one that always expects the same, and below 0 for one that is worse than that.
    """
    returns, old_values, mask = flatten(micro_batches, device, "returns", "old_values", "mask")

    def variance(x):
        total, count = sum_tensor_over_processes(torch.stack([torch.where(mask, x, 0.0).sum(), mask.sum()]))
        squares = sum_tensor_over_processes(torch.where(mask, (x - total / count) ** 2, 0.0).sum())
        return squares / count

    return 1 - variance(returns - old_values) / variance(returns).clamp(min=1e-8)


def flatten(micro_batches: list, device, *names) -> list:
    """One long vector of each of these (b, t - 1) tensors, over all micro-batches; without any it is empty."""
    def joined(name):
        nothing = torch.zeros(0, dtype=torch.bool if name == "mask" else torch.float32, device=device)
        return torch.cat([nothing, *(getattr(batch, name).flatten() for batch in micro_batches)])

    return [joined(name) for name in names]
