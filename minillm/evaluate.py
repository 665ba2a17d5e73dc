"""Measuring a model on held-out data: loss, bits per byte, and what it answers."""

import math

import torch

from minillm.data import PackedLoader, TokenDataset
from minillm.generate import generate
from minillm.losses import sft_loss
from minillm.rewards import gold_reward, is_correct
from minillm.runtime import autocast


@torch.no_grad()
def held_out_loss(model, dataset: TokenDataset, row_length: int, device, batch_size: int = 16) -> dict:
    """{"val_loss": nats per trained token}, and for text {"bits_per_byte"} of the documents as they were written."""
    total, count = 0.0, 0
    for batch in PackedLoader(dataset, batch_size, row_length, seed=0, shuffle=False).epoch_batches(0):
        batch = batch.to(device)
        with autocast(device):
            logits = model(batch.tokens, doc_ids=batch.doc_ids)
        total += sft_loss(logits, batch.tokens, batch.loss_mask, n_tokens=1).item()  # a sum
        count += int(batch.loss_mask.sum())
    metrics = {"val_loss": total / max(1, count)}
    if dataset.stats["bytes"]:
        metrics["bits_per_byte"] = total / math.log(2) / dataset.stats["bytes"]
    return metrics


def prompt_messages(record: dict) -> list:
    """The messages up to and including the last one from the user: what the model is asked."""
    messages = record["conversations"]
    last = max((i for i, m in enumerate(messages) if m["role"] in ("user", "tool")), default=len(messages) - 1)
    return messages[:last + 1]


def reply_to(model, tokenizer, records: list, device, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0,
             batch_size: int = 128) -> tuple:
    """Let the model answer each record's prompt -> (texts, token counts, whether each ended by itself)."""
    generator = torch.Generator(device).manual_seed(seed)
    prompts = [tokenizer.render(prompt_messages(r), add_generation_prompt=True)[0] for r in records]
    limit = model.config.max_position_embeddings - max_new_tokens
    prompts = [p[-limit:] for p in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    texts, counts, stopped = [""] * len(records), [0] * len(records), [False] * len(records)
    for start in range(0, len(order), batch_size):
        group = order[start:start + batch_size]
        with autocast(device):
            rollout = generate(model, [prompts[i] for i in group], max_new_tokens, tokenizer.end_id, temperature,
                               pad_id=tokenizer.pad_id, generator=generator)
        for i, response in zip(group, rollout.responses()):
            stopped[i] = response[-1] == tokenizer.end_id
            counts[i] = len(response)
            texts[i] = tokenizer.decode(response[:-1] if stopped[i] else response)
    return texts, counts, stopped


def score(records: list, texts: list, counts: list, stopped: list) -> dict:
    """accuracy (exact match over questions with one answer), accuracy_by_task, stopped, reply_tokens, gold_reward."""
    right, by_task = [], {}
    for record, text in zip(records, texts):
        if "answer" in record:
            right.append(is_correct(text, record))
            by_task.setdefault(record.get("task", "other"), []).append(right[-1])
    mean = lambda values: sum(values) / len(values) if values else None
    return {"accuracy": mean(right), "accuracy_by_task": {task: mean(v) for task, v in by_task.items()}, "stopped": mean(stopped),
            "reply_tokens": mean(counts), "gold_reward": mean([gold_reward(t, r) for t, r in zip(texts, records)])}


def answer_questions(model, tokenizer, records: list, device, **options) -> dict:
    """score() of the model's replies (options as in reply_to), and the replies themselves under "replies"."""
    texts, counts, stopped = reply_to(model, tokenizer, records, device, **options)
    return {**score(records, texts, counts, stopped), "replies": texts}


def continuations(model, tokenizer, dataset, device, count: int = 4, prompt_tokens: int = 12, max_new_tokens: int = 40) -> str:
    """The model goes on from the beginnings of a few held-out documents, as lines of text."""
    prompts = [dataset[i * len(dataset) // count][0][:prompt_tokens].tolist() for i in range(count)]
    with autocast(device):
        rollout = generate(model, prompts, max_new_tokens, tokenizer.endoftext_id, temperature=0.0, pad_id=tokenizer.pad_id)
    clean = lambda ids: tokenizer.decode([i for i in ids if i != tokenizer.endoftext_id])
    return "\n".join(f"{clean(p)} >>> {clean(r)}".replace("\n", " ") for p, r in zip(prompts, rollout.responses()))
