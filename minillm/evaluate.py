"""Measuring a model on held-out data: loss, bits per byte, and what it answers."""

import math
import sys

import torch
from tqdm import tqdm

from minillm import runtime
from minillm.chat import without_think
from minillm.data import PackedLoader
from minillm.errors import UserError
from minillm.generate import eval_mode, generate
from minillm.logprobs import linear_cross_entropy
from minillm.metrics import evenly_spaced
from minillm.records import check_conversation, check_text, read_records
from minillm.runtime import autocast, gather, say, share, sum_over_processes, world_size
from minillm.verify import check_answer, gold_reward, is_correct

TOKENS_PER_BATCH = 2**16  # questions and replies in the cache at a time


@torch.no_grad()
def held_out_loss(model, dataset, row_length: int, device, batch_size: int = 16) -> dict:
    """{"val_loss": nats per trained token}, and for text {"bits_per_byte"} of the documents as they were written.

    The processes share the work; all get the same numbers.
    """
    total, count = 0.0, 0
    rows = min(batch_size, max(1, 2**14 // row_length))  # few long rows: their masks grow with the square of the length
    with eval_mode(model):
        for batch in PackedLoader(dataset, rows * world_size(), row_length, seed=0, shuffle=False).epoch_batches(0):
            batch = batch.to(device)
            with autocast(device):
                hidden = model.hidden(batch.tokens, doc_ids=batch.doc_ids)
            loss_sum = linear_cross_entropy(hidden, model.lm_head.weight, batch.tokens, batch.loss_mask, n_tokens=1,
                                            targets=batch.targets)
            total += loss_sum.item()
            count += batch.n_targets
    total, count = sum_over_processes(total), int(sum_over_processes(count))
    metrics = {"val_loss": total / max(1, count)}
    if dataset.stats.get("bytes"):
        metrics["bits_per_byte"] = total / math.log(2) / dataset.stats["bytes"]
    return metrics


# Questions: a conversation is asked up to its last assistant turn, and the model's reply is compared with "answer".

def read_questions(path, count: int = 0) -> list:
    """The checked lines of a file of conversations or prompts; [] without a file. Of more than `count` (0: no limit)
    that many are taken, evenly spaced, which is said. Raises UserError with file and line.
    """
    records = list(read_records(path, check_question)) if path else []
    if not 0 < count < len(records):
        return records
    say(f"asking {count:,} of the {len(records):,} questions in {path} (--max_questions)")
    return evenly_spaced(records, count)


def check_question(record: dict, where: str):
    """Raise UserError unless record is a conversation; "answer", "choices" and "task", where given, must be text."""
    check_conversation(record, where)
    answer, choices = record.get("answer"), record.get("choices", [])
    if answer is not None:
        check_text(answer, where, '"answer"')
        check_answer(answer, where)
    if not isinstance(choices, list):
        raise UserError(f'{where}: "choices" must be a list of texts')
    for choice in choices:
        check_text(choice, where, 'each of "choices"')
    for key in ("task", "level"):
        if record.get(key) is not None:
            check_text(record[key], where, f'"{key}"')


def prompt_messages(record: dict) -> list:
    """What the model is asked: the conversation without the assistant's turn at its end."""
    messages = record["conversations"]
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages


def fit_context(tokenizer, messages: list, limit: int, thinking: bool = False) -> tuple:
    """Drop the oldest turns until the prompt has at most `limit` tokens -> (tokens of the prompt, messages kept).

    A turn is a user's message and what follows it; system messages at the start always stay. Where the last turn alone
    is longer than `limit`, the tokens are still too many: that is for the caller to say.
    """
    first = next((i for i, m in enumerate(messages) if m["role"] not in ("system", "tools")), len(messages))
    system, rest = messages[:first], messages[first:]
    while True:
        tokens = tokenizer.render(system + rest, add_generation_prompt=True, thinking=thinking)[0]
        second_turn = next((i for i, m in enumerate(rest) if i > 0 and m["role"] == "user"), None)
        if len(tokens) <= limit or second_turn is None:
            return tokens, system + rest
        rest = rest[second_turn:]


def reply_to(model, tokenizer, records: list, device, max_new_tokens: int = 64, temperature: float = 0.0,
             top_p: float = 1.0, seed: int = 0, batch_size: int = 128, thinking: bool = False) -> tuple:
    """Let the model answer each record's prompt -> (texts, token counts, whether each ended by itself).

    thinking: in formats with think blocks the model may think first; otherwise its prompt has an empty block.

    A reply has at most half of the context, or what all prompts leave. Where prompt and reply do not fit, the oldest
    turns are dropped; a prompt whose last turn alone does not fit gets the empty reply. Both are counted and said. The
    processes share the work, and all get all replies; each record has random numbers of its own, so the replies do not
    depend on who computes them.
    """
    context = model.context
    if max_new_tokens > context // 2:  # more than half of it only where all prompts leave more
        lengths = [len(fit_context(tokenizer, prompt_messages(record), context, thinking)[0]) for record in records]
        max_new_tokens = min(max_new_tokens, max(context // 2, context - max(lengths, default=0)))
    prompts, shortened = [], 0
    for record in records:
        messages = prompt_messages(record)
        tokens, kept = fit_context(tokenizer, messages, context - max_new_tokens, thinking)
        prompts.append(tokens)
        shortened += len(kept) < len(messages) and len(tokens) <= context - max_new_tokens
    order = [i for i in range(len(prompts)) if len(prompts[i]) <= context - max_new_tokens]
    if shortened:
        say(f"{shortened:,} of {len(records):,} questions lost their oldest turns: "
            f"with {max_new_tokens} tokens of reply the model's context is {context:,}")
    if len(order) < len(records):
        say(f"{len(records) - len(order):,} of {len(records):,} questions were not asked and count as not answered: "
            f"with {max_new_tokens} tokens of reply they do not fit the model's context of {context:,}")

    order.sort(key=lambda i: len(prompts[i]))  # little padding
    uniforms = None
    if temperature > 0:
        generator = torch.Generator(device).manual_seed(seed)
        uniforms = torch.rand(len(records), max_new_tokens, generator=generator, device=device)
    lockstep, replies = runtime.in_lockstep(model), []
    order = order if lockstep else share(order)
    bar = tqdm(total=len(order), desc="answering", unit=" questions", delay=5, leave=False, disable=runtime.rank() > 0,
               mininterval=1 if sys.stderr.isatty() else 10)  # on stderr, and only where it takes long
    while order:
        size = min(batch_size, len(order))
        while size > 1 and size * (len(prompts[order[size - 1]]) + max_new_tokens) > TOKENS_PER_BATCH:
            size -= 1
        group, order = order[:size], order[size:]
        if lockstep:  # each process must take part in every group
            group = share(group) or group[:1]
        with autocast(device):
            rollout = generate(model, [prompts[i] for i in group], max_new_tokens, tokenizer.end_ids, temperature,
                               top_p, pad_id=tokenizer.pad_id, uniforms=None if uniforms is None else uniforms[group])
        replies += zip(group, rollout.responses())
        bar.update(len(group))
    bar.close()
    texts, counts, stopped = [""] * len(records), [0] * len(records), [False] * len(records)
    for i, response in [reply for replies in gather(replies) for reply in replies]:
        stopped[i] = response[-1] in tokenizer.end_ids
        counts[i] = len(response)
        texts[i] = tokenizer.decode(response[:-1] if stopped[i] else response)
    return texts, counts, stopped


def score(records: list, texts: list, counts: list, stopped: list) -> dict:
    """accuracy (exact match over questions with one answer), accuracy_by_task, stopped, reply_tokens, gold_reward.

    Where questions have a "level" of difficulty, accuracy_by_level too. Where no question has an answer, accuracy is
    None and accuracy_by_task is empty. Think text is not scored.
    """
    texts = [without_think(text) for text in texts]
    right, by_task, by_level = [], {}, {}
    for record, text in zip(records, texts):
        if record.get("answer") is not None:
            right.append(is_correct(text, record))
            by_task.setdefault(record.get("task") or "other", []).append(right[-1])
            if record.get("level"):
                by_level.setdefault(record["level"], []).append(right[-1])
    def mean(values):
        return sum(values) / len(values) if values else None

    levels = {"accuracy_by_level": {level: mean(by_level[level]) for level in sorted(by_level)}} if by_level else {}
    return {"accuracy": mean(right), "accuracy_by_task": {task: mean(values) for task, values in by_task.items()},
            **levels, "stopped": mean(stopped), "reply_tokens": mean(counts),
            "gold_reward": mean([gold_reward(text, record) for text, record in zip(texts, records)])}


def answer_questions(model, tokenizer, records: list, device, **options) -> dict:
    """score() of the model's replies (options: reply_to's) and "replies": [[question, reply], ...]; {} of no records.
    """
    if not records:
        return {}
    texts, counts, stopped = reply_to(model, tokenizer, records, device, **options)
    asked = [prompt_messages(record) for record in records]
    replies = [[messages[-1]["content"] if messages else "", text] for messages, text in zip(asked, texts)]
    return {**score(records, texts, counts, stopped), "replies": replies}


def sample_answers(model, tokenizer, records: list, device, times: int, max_new_tokens: int = 64,
                   temperature: float = 1.0, thinking: bool = False) -> tuple:
    """(score() under names that start with sampled_, texts) of `times` samples of each question, side by side.

    Greedy replies start near the top of what a model can do; samples show how its manners change.
    """
    repeated = [record for record in records for _ in range(times)]
    texts, counts, stopped = reply_to(model, tokenizer, repeated, device, max_new_tokens, temperature,
                                      thinking=thinking)
    scores = score(repeated, texts, counts, stopped)
    names = [name for name in ("gold_reward", "accuracy", "reply_tokens", "stopped") if scores[name] is not None]
    return {f"sampled_{name}": scores[name] for name in names}, texts


def continuations(model, tokenizer, dataset, device, count: int = 4, prompt_tokens: int = 12,
                  max_new_tokens: int = 40) -> str:
    """How the model continues the first tokens of a few held-out documents, as lines of text."""
    count = min(count, len(dataset))
    prompts = [dataset[i * len(dataset) // count][0][:prompt_tokens].tolist() for i in range(count)]
    with autocast(device):
        rollout = generate(model, prompts, max_new_tokens, tokenizer.endoftext_id, temperature=0.0,
                           pad_id=tokenizer.pad_id)
    lines = []
    for prompt, response in zip(prompts, rollout.responses()):
        response = [token for token in response if token != tokenizer.endoftext_id]
        # a document starts with <|endoftext|>
        line = f"{tokenizer.decode(prompt[1:])} >>> {tokenizer.decode(response)}"
        lines.append(line.replace("\n", " "))
    return "\n".join(lines)
