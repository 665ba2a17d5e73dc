"""What the reinforcement-learning scripts share: prompts, the scores of what was sampled, demonstrations to replay."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from minillm.data import PackedLoader, check_conversation, encode_conversation, new_stats, read_records, to_device
from minillm.errors import UserError
from minillm.evaluate import check_question, prompt_messages, reply_to, score
from minillm.generate import eval_mode
from minillm.rewards import score_answers
from minillm.runtime import autocast

MOST_REPLAYED = 20_000  # conversations; they stay in memory
MOST_SAMPLED = 2_000  # answers, of at most 4 to each prompt, when a policy is evaluated


# Prompts: the conversation up to the turn that the model is to say.

@dataclass
class Prompt:
    """tokens: what the model continues; messages: the same as a conversation; record: the whole line of the data file."""

    tokens: list
    messages: list
    record: dict


def check_prompt(record: dict, where: str):
    """Raise UserError unless record is a prompt: its last message, but for an assistant's, is a user's (or a tool's)."""
    check_question(record, where)
    messages = prompt_messages(record)
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        last = f'role {messages[-1]["role"]!r}' if messages else "nothing"
        raise UserError(f'{where}: a prompt ends with a message of the user (an assistant\'s after it is ignored); this one ends with {last}')


def load_prompts(paths: list, eval_path: str, tokenizer, room: int, seed: int, tasks=(), need_answers: bool = False, say=print) -> tuple:
    """(training prompts, held-out prompts, stats): held out is eval_path, or else 5 % (at most 500) of the prompts, by seed.

    Left out are prompts of more than `room` tokens, and for training also those that are held out and those that `select`
    drops. How many is said and stands in stats. Raises UserError for bad lines, with file and line, and when nothing is left.
    """
    def read(path_or_paths):
        for record in read_records(path_or_paths, check_prompt):
            messages = prompt_messages(record)
            yield Prompt(tokenizer.render(messages, add_generation_prompt=True)[0], messages, record)

    files = ", ".join(map(str, paths))
    everything = list(read(paths))
    fitting = [prompt for prompt in everything if len(prompt.tokens) <= room]
    if eval_path:
        held_out = [prompt for prompt in read(eval_path) if len(prompt.tokens) <= room]
    else:  # a prompt that occurs twice is held out twice, or not at all
        distinct = list({tuple(prompt.tokens): prompt for prompt in fitting}.values())
        count = min(500, -(-len(distinct) // 20))
        held_out = [distinct[i] for i in np.sort(np.random.default_rng(seed).choice(len(distinct), count, replace=False))]
    hidden = {tuple(prompt.tokens) for prompt in held_out}
    if not eval_path and len(hidden) == len(distinct) == 1:
        say("a single prompt: it is trained on and evaluated on")
        hidden = set()
    seen = [prompt for prompt in fitting if tuple(prompt.tokens) not in hidden]
    train = select(seen, tasks, need_answers)
    stats = {"prompts": len(everything), "longer than there is room for": len(everything) - len(fitting),
             "held out": len(fitting) - len(seen), "of other tasks or without an answer": len(seen) - len(train)}
    left_out = "; ".join(f"{count:,} {reason}" for reason, count in stats.items() if count and reason != "prompts")
    say(f"{files}: {len(train):,} of {len(everything):,} prompts to train on" + f" ({left_out})" * bool(left_out))
    if not train:
        raise UserError(f"{files}: no prompt is left to train on ({left_out}); a prompt has room for {room} tokens, --max_seq_len less --max_new_tokens")
    return train, held_out, stats


def select(prompts: list, tasks=(), need_answers: bool = False) -> list:
    """The prompts whose "task" is one of `tasks`, where any are given, and that have an "answer", where it is needed."""
    return [p for p in prompts if (not tasks or p.record.get("task") in tasks) and not (need_answers and p.record.get("answer") is None)]


class PromptLoader(PackedLoader):
    """Endless batches of prompts (lists of Prompt), shuffled anew each epoch.

    Every batch is full: where the epoch does not divide evenly, its first prompts come again at its end.
    """

    def __init__(self, prompts: list, batch_size: int, seed: int, rank: int = 0, world: int = 1):
        super().__init__(prompts, batch_size, 0, seed, rank, world)

    def rows(self, epoch: int):
        """Yield the prompts of an epoch, as numbers."""
        size, count = self.batch_size * self.world, len(self.dataset)
        yield from np.resize(np.random.default_rng([self.seed, epoch]).permutation(count), -(-count // size) * size).tolist()

    def collate(self, rows: list) -> list:
        """Numbers -> the prompts."""
        return [self.dataset[i] for i in rows]


# Scores of what was sampled.

def read_answers(rollout, tokenizer) -> tuple:
    """(texts, ended): each answer without its end token, and whether it ended by itself (B,) bool on the CPU."""
    responses = rollout.responses()
    ended = [response[-1] == tokenizer.end_id for response in responses]
    texts = [tokenizer.decode(response[:-1] if end else response) for response, end in zip(responses, ended)]
    return texts, torch.tensor(ended)


def score_rollout(rewards: dict, prompts: list, texts: list, device) -> tuple:
    """(rewards (N, G), {name: its part, unweighted, (N, G)}) of G answers to each of N prompts, float32 on the device.

    rewards: as load_rewards gives them. Raises UserError for a reward function that fails.
    """
    size = len(texts) // len(prompts)
    asked = [(p.messages, texts[i * size:(i + 1) * size], p.record) for i, p in enumerate(prompts)]
    with torch.no_grad(), autocast(device):
        total, parts = score_answers(rewards, asked)
    return to_device(torch.tensor(total), device), {name: to_device(torch.tensor(part), device) for name, part in parts.items()}


def sampled_scores(policy, tokenizer, prompts: list, rewards: dict, device, max_new_tokens: int, temperature: float) -> dict:
    """Means over sampled answers, as many to each prompt as MOST_SAMPLED allows: sampled_reward (and _std), sampled_gold_reward,
    sampled_accuracy, ...; of no prompt {}. Of one answer each to 400 prompts, half of them right, the mean is uncertain by 2.5 points."""
    if not prompts:
        return {}
    records = [prompt.record for prompt in prompts for _ in range(max(1, min(4, MOST_SAMPLED // len(prompts))))]
    with eval_mode(policy):
        texts, counts, ended = reply_to(policy, tokenizer, records, device, max_new_tokens, temperature)
    scores = score(records, texts, counts, ended)
    total, parts = score_rollout(rewards, prompts, texts, device)
    named = {"reward": total, **({f"reward_{name}": part for name, part in parts.items()} if len(parts) > 1 else {})}
    return {**{f"sampled_{name}": scores[name] for name in ("gold_reward", "accuracy", "reply_tokens", "stopped") if scores[name] is not None},
            **{f"sampled_{name}": value.mean().item() for name, value in named.items()}, "sampled_reward_std": total.std(correction=0).item()}


# What is trained together.

class MicroBatch(NamedTuple):
    """Some rows of a rollout: their numbers (b,) on the device, how long the longest is, how many tokens their answers have."""

    rows: torch.Tensor
    longest: int
    n_tokens: int


def split_rollout(rows, lengths, counts, mini_batches: int, grad_accum: int, device) -> list:
    """The rows, in this order, as mini_batches lists of at most grad_accum MicroBatches, each of rows of similar length.

    rows (n,): numbers of rows; lengths, counts (B,): tokens of every row, and of its answer. All on the CPU: the update then
    need not wait for the device to know a shape.
    """
    def micro_batch(part):
        return MicroBatch(to_device(part, device), int(lengths[part].max()), int(counts[part].sum()))

    return [[micro_batch(part) for part in mini[lengths[mini].argsort()].tensor_split(grad_accum) if len(part)]
            for mini in rows.tensor_split(mini_batches)]


# Demonstrations to replay beside the reward.

class Conversations:
    """Encoded conversations in memory, for a PackedLoader: without those whose "task" is in `without`."""

    def __init__(self, paths: list, tokenizer, max_seq_len: int, without=(), say=print):
        self.sequences, stats, skipped = [], new_stats("chat"), 0
        for record in read_records(paths, check_conversation):
            if record.get("task") is not None and record["task"] in without:
                skipped += 1
            elif len(self.sequences) < MOST_REPLAYED:
                self.sequences += encode_conversation(record["conversations"], tokenizer, max_seq_len, stats)
        if not self.sequences:
            raise UserError(f"{', '.join(map(str, paths))}: no conversation to replay is left; give another --sft_data, or --sft_coef 0")
        notes = f", {skipped:,} of the tasks that are trained left out" * bool(skipped)
        notes += f" (no more than the first {MOST_REPLAYED:,} are kept)" * (len(self.sequences) >= MOST_REPLAYED)
        say(f"{', '.join(map(str, paths))}: {len(self.sequences):,} conversations to replay{notes}")

    def __len__(self):
        return len(self.sequences)

    def __getitem__(self, i):
        return self.sequences[i]

    def lengths(self, indices):
        """The numbers of tokens of these conversations."""
        return np.array([len(self.sequences[i][0]) for i in indices])

    def reopen(self):
        """Nothing to map: they are in memory."""


class States:
    """Several things with state() and load_state(), saved and restored as one."""

    def __init__(self, **parts):
        self.parts = parts

    def state(self) -> dict:
        """{name: state}"""
        return {name: part.state() for name, part in self.parts.items()}

    def load_state(self, state: dict):
        """Give each part the state of its name."""
        for name, part in self.parts.items():
            part.load_state(state[name])
