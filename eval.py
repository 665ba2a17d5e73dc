"""Evaluation and chat: what a model has learned, in numbers and in its own words.

    python eval.py                                        # a table: out/sft on the held-out data in data/
    python eval.py --model out/dpo --json dpo.json        # another model; the same numbers as a file
    python eval.py --compare out/sft out/dpo              # two models on the same questions, side by side
    python eval.py --model Qwen3-0.6B --data mine.jsonl   # your own held-out conversations, questions or texts
    python eval.py --model out/reward                     # a reward model: which answers of held-out pairs it prefers
    python eval.py --model out/dpo --ref out/sft --reward_model out/reward   # preferences, scored replies
    python eval.py --tokens                               # a conversation token by token: loss mask, log-probabilities
    python eval.py --tokens --compare out/sft out/dpo     # how the log-probability of each token changed
    python eval.py --tokens --data out/ppo/rollout.jsonl  # sampled answers: advantage and ratio of each token
    python eval.py --chat --temperature 0.7 --top_p 0.9   # /help lists the commands
    python eval.py --prompt "What is 12 + 30?"            # prints one reply and nothing else

The numbers:
    val_loss          mean negative log-likelihood of the assistant's tokens (of a text: of all tokens), in nats
    bits_per_byte     -log2 p of held-out text / its UTF-8 bytes: comparable between tokenizers
    accuracy          share of replies that commit to exactly the right answer, where a question has one
    stopped           share of replies that ended by themselves within --max_new_tokens
    reply_tokens      mean length of a reply
    gold_reward       mean of correct, polite and brief (minillm/verify.py)
    reward            mean score of the replies by --reward_model
    preference_accuracy   share of held-out pairs whose chosen answer scores higher; of a language model by its implicit
                      reward, log p(answer | prompt) minus that under --ref

--top_p is nucleus sampling (arXiv 1904.09751); the evaluation asks each question once and takes the
likeliest token (temperature 0) unless told otherwise.
"""

import codecs
import contextlib
import os
import sys
from dataclasses import dataclass

import torch

from minillm import checkpoint, runtime
from minillm.chat import without_think
from minillm.config import flag, parse_config
from minillm.data import encode_conversation, encode_text, without_silence
from minillm.errors import UserError
from minillm.evaluate import (answer_questions, check_question, fit_context, held_out_loss, prompt_messages,
                              read_questions)
from minillm.generate import stream
from minillm.heads import is_reward_model, load_reward_model
from minillm.metrics import compare, numbers, show_replies
from minillm.peft import load_adapter
from minillm.preferences import (PairDataset, check_same_tokenizer, encode_pair, pair_logprobs, rank_pairs,
                                 score_pairs)
from minillm.records import advice_on_folder, is_text, read_records
from minillm.rewards import load_rewards, score_answers
from minillm.safetensors import check_file_out, load_json, save_json
from minillm.token_cache import load_dataset
from minillm.token_view import check_rollout, logprobs_of, show_rollout, show_tokens, token_texts
from minillm.tokenizer import Tokenizer

MODEL, EVAL_DATA, EVAL_TEXT = "out/sft", "data/sft_eval.jsonl", "data/pretrain_eval.jsonl"
EVAL_PAIRS = "data/preference_eval.jsonl"
HELP = "/reset forgets the conversation, /quit ends the chat (so does Ctrl-D), Ctrl-C stops a reply"
PAIRS_PER_BATCH = 24
REPLIES = ["temperature", "top_p", "max_new_tokens", "max_questions", "thinking", "seed"]
UNREAD = {"--chat": ["data", "ref", "reward_model", "json", "max_seq_len", "max_questions"],
          "--prompt": ["data", "ref", "reward_model", "max_seq_len", "max_questions"],
          "--tokens": ["ref", "reward_model", "system", "max_seq_len", *REPLIES],
          "a reward model": ["system", *REPLIES], "an evaluation": ["system"]}


@dataclass
class Config:
    model: str = flag("", f"checkpoint folder (default: {MODEL})")
    adapter: list[str] = flag([], "folder of an adapter for the model; of several, each gets a column in the table")
    data: str = flag("", f"held-out conversations, questions, texts or pairs (default: {EVAL_DATA} and {EVAL_TEXT}; "
                     f"pairs: {EVAL_PAIRS})")
    ref: str = flag("", "reference of a policy: also measure which answers of held-out pairs it prefers")
    reward_model: str = flag("", "folder of a reward model that scores the replies")
    json: str = flag("", "also write the numbers, or the reply to --prompt, to this file")
    chat: bool = flag(False, "talk with the model")
    prompt: str = flag(None, "print the reply to this message")
    compare: list[str] = flag([], "two checkpoint folders, to be shown side by side")
    tokens: bool = flag(False, "show the first conversation of --data token by token, or the answers of a rollout")
    system: str = flag("", "system message for --chat and --prompt")
    temperature: float = flag(0.0, "0 takes the likeliest token, 1 samples from the model's distribution", low=0)
    top_p: float = flag(1.0, "sample from the likeliest tokens that together have this probability", low=0, high=1)
    max_new_tokens: int = flag(0, "longest reply (default: 64 in an evaluation, 512 in --chat and --prompt; with "
                               "--thinking 1024 and 2048)", low=0)
    max_seq_len: int = flag(256, "tokens per row for val_loss; longer conversations are cut", low=8)
    max_questions: int = flag(200, "of a larger file this many questions are asked, evenly spaced", low=1)
    thinking: bool = flag(False, "let a model that can think do so before it answers (Qwen3)")
    device: str = flag("", "cuda, mps or cpu (default: the best that is available)")
    seed: int = flag(0, "seed of the sampling", low=0)


def main(cfg: Config) -> dict:
    # 1. Setup
    if [bool(cfg.chat), cfg.prompt is not None, bool(cfg.compare)].count(True) > 1:
        raise UserError("--chat, --prompt and --compare exclude each other")
    if cfg.json:
        check_file_out("--json", cfg.json, [cfg.data] if cfg.data else [])
    if cfg.tokens and (cfg.chat or cfg.prompt is not None):
        raise UserError("--tokens shows a conversation of --data; leave out --chat and --prompt")
    mode = "--chat" if cfg.chat else "--prompt" if cfg.prompt is not None else "--tokens" if cfg.tokens else ""
    mode = mode or ("a reward model" if cfg.model and is_reward_model(cfg.model) else "an evaluation")
    if unread := [f"--{name}" for name in UNREAD[mode] if getattr(cfg, name) != getattr(Config(), name)]:
        raise UserError(f"{mode} makes no use of {', '.join(unread)}; leave out what it does not use")
    if cfg.top_p < 1 and not cfg.temperature:
        raise UserError(f"--top_p {cfg.top_p:g} changes nothing at --temperature 0, which takes the likeliest token; "
                        "give a temperature such as 1, or leave it out")
    if cfg.compare and (len(cfg.compare) != 2 or cfg.model or cfg.adapter):
        raise UserError("--compare takes two folders, and no --model or --adapter beside them")
    if (cfg.chat or cfg.prompt is not None or cfg.tokens) and len(cfg.adapter) > 1:
        raise UserError(f"--adapter {' '.join(cfg.adapter)}: for --chat, --prompt and --tokens, give one")
    if cfg.tokens and cfg.data and kind_of(cfg.data) == "advantages":
        return view_rollout(cfg)
    device = runtime.start(cfg.device, cfg.seed)
    if cfg.model and is_reward_model(cfg.model):
        return measure_reward_model(cfg, device)

    # 2. Models
    columns = cfg.compare or [cfg.model]
    model, tokenizer = load(columns[0], device)
    if cfg.adapter:
        load_adapter(model, cfg.adapter[0], cfg.model or MODEL)

    if cfg.thinking and not tokenizer.chat_format.think:
        raise UserError(f"--thinking: {columns[0] or MODEL} has no think blocks in its chat format "
                        f"({tokenizer.chat_format.name}); leave it out")

    # 3. Talk
    if cfg.chat:
        return chat(model, tokenizer, cfg, device)
    if cfg.prompt is not None:
        return answer_prompt(model, tokenizer, cfg, device)
    if cfg.tokens:
        return view_tokens(model, tokenizer, cfg, device)

    # 4. Measure
    files = [cfg.data] if cfg.data else [EVAL_DATA, EVAL_TEXT]
    records = questions_of(files[0], cfg.max_questions)
    if cfg.reward_model and not records:
        raise UserError(f"--reward_model scores the replies to questions, and {files[0]} holds none")
    results = [measure(model, tokenizer, files, records, cfg, device)]
    for folder in cfg.compare[1:]:
        model = None  # two large models need not fit side by side
        model, tokenizer = load(folder, device)
        results.append(measure(model, tokenizer, files, records, cfg, device))
    for folder in cfg.adapter[1:]:
        load_adapter(model, folder, cfg.model or MODEL)  # in place of the one before, on the same base
        results.append(measure(model, tokenizer, files, records, cfg, device))

    # 5. Show
    columns = cfg.compare or cfg.adapter or [cfg.model or MODEL]
    runtime.say(compare(columns, results))
    if records:
        runtime.say("\n" + show_replies(columns, [result["replies"] for result in results]))
    results = [{"model": folder, "data": files, "questions": len(records), **numbers(result)}
               for folder, result in zip(columns, results)]
    result = results[0] if len(results) == 1 else {"compared": results}
    if cfg.json:
        save_json(cfg.json, result)
    return result


def load(folder: str, device) -> tuple:
    """(model, tokenizer) of a checkpoint folder. The folder of an adapter brings the base that it names."""
    if not folder and not os.path.isdir(MODEL):
        raise UserError(f"there is no {MODEL} yet: run python train_sft.py first, or give a checkpoint folder "
                        f"with --model{advice_on_folder(MODEL)}")
    folder, adapter = folder or MODEL, None
    settings = os.path.join(folder, "adapter_config.json")
    if os.path.isfile(settings) and not os.path.isfile(os.path.join(folder, "config.json")):
        base = load_json(settings).get("base_model_name_or_path") or ""
        if not isinstance(base, str) or not os.path.isdir(base):
            raise UserError(f"{folder} is an adapter for {base or 'a model it does not name'}, which is not here; "
                            "give its base with --model and this with --adapter")
        folder, adapter = base, folder
    checkpoint.require_stage(folder)
    tokenizer = checkpoint.load_tokenizer(folder)
    model = checkpoint.load_model(folder, device)
    return (load_adapter(model, adapter, folder) if adapter else model), tokenizer


# Measuring

def kind_of(path: str) -> str:
    """The key by which a file's schema is known: "conversations", "text", "chosen" (data/README.md), "advantages"."""
    if is_text(path):
        return "text"
    first = next(read_records(path))
    for kind in ("conversations", "text", "chosen", "advantages"):
        if kind in first:
            return kind
    raise UserError(f'{path}:1: neither "conversations" nor "text" nor "chosen" is there; '
                    f'found: {", ".join(map(repr, first)) or "nothing"}')


def questions_of(path: str, count: int) -> list:
    """At most `count` records of a file of conversations, evenly spaced; of texts or pairs none."""
    if kind_of(path) != "conversations":
        return []
    return read_questions(path, count)


def measure(model, tokenizer, files: list, records: list, cfg: Config, device) -> dict:
    """All numbers for one model: those of the first file, and the bits per byte of a second one."""
    row_length = min(cfg.max_seq_len, model.context)
    metrics = {}
    for path in files:
        kind = kind_of(path)
        if kind == "chosen":
            if not cfg.ref:
                raise UserError(f"{path} holds pairs: give --ref, or the folder of a reward model with --model")
            continue
        if kind == "advantages":
            raise UserError(f"{path} is a rollout; --tokens shows it")
        # Questions without a reply of the assistant (prompts for reinforcement learning) have no loss.
        if kind == "text" or any(m["role"] == "assistant" for r in records for m in r["conversations"]):
            encode = encode_text if kind == "text" else encode_conversation
            loss = held_out_loss(model, load_dataset(encode, [path], tokenizer, row_length), row_length, device)
            metrics = {**loss, **metrics}  # val_loss is that of the conversations
        if kind == "conversations":
            limit = cfg.max_new_tokens or (1024 if cfg.thinking else 64)
            metrics |= answer_questions(model, tokenizer, records, device, max_new_tokens=limit, thinking=cfg.thinking,
                                        temperature=cfg.temperature, top_p=cfg.top_p, seed=cfg.seed)
    if cfg.reward_model and records:
        asked = [(prompt_messages(record), [reply], record) for record, (_, reply) in zip(records, metrics["replies"])]
        scores, _ = score_answers(load_rewards(["model"], cfg.reward_model, "", device), asked)
        metrics["reward"] = sum(score for score, in scores) / len(scores)
    if cfg.ref:
        pairs = held_out_pairs(cfg, tokenizer, row_length)
        ref_model, ref_tokenizer = load(cfg.ref, device)
        check_same_tokenizer(tokenizer, ref_tokenizer, cfg.ref)
        logprobs, ref_logprobs = (pair_logprobs(m, pairs, PAIRS_PER_BATCH, device) for m in (model, ref_model))
        ranked = rank_pairs(logprobs - ref_logprobs, pairs.kinds)
        metrics |= {name: ranked[name] for name in ("preference_accuracy", "accuracy_by_kind")}  # others depend on beta
    return metrics


def held_out_pairs(cfg: Config, tokenizer, max_seq_len: int):
    """The pairs of --data, or of data/preference_eval.jsonl where --data holds something else."""
    path = cfg.data if cfg.data and kind_of(cfg.data) == "chosen" else EVAL_PAIRS
    dataset = load_dataset(encode_pair, [path], tokenizer, max_seq_len)
    return PairDataset(dataset, range(len(dataset) // 2))


def measure_reward_model(cfg: Config, device) -> dict:
    """All numbers for a reward model: how it ranks held-out pairs, and how sure it is."""
    if cfg.chat or cfg.prompt is not None or cfg.tokens or cfg.adapter or cfg.ref or cfg.reward_model:
        raise UserError(f"{cfg.model} is a reward model: it scores answers and gives none; "
                        "leave out --chat, --prompt, --tokens, --adapter, --ref and --reward_model")
    if cfg.data and kind_of(cfg.data) != "chosen":
        raise UserError(f"{cfg.data} holds no pairs; a reward model is measured on pairs: give a file of them, or "
                        f"leave out --data for {EVAL_PAIRS}")
    tokenizer = Tokenizer.load(cfg.model)
    model = load_reward_model(cfg.model, device, tokenizer)
    checkpoint.check_tokenizer(model.config, tokenizer, cfg.model)
    pairs = held_out_pairs(cfg, tokenizer, min(cfg.max_seq_len, model.config.max_position_embeddings))
    scores = score_pairs(lambda batch: model(batch.tokens, batch.lengths), pairs, PAIRS_PER_BATCH, device)
    chosen_rewards, rejected_rewards = scores.mean(0).tolist()
    metrics = {**rank_pairs(scores, pairs.kinds),
               "chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards}
    runtime.say(compare([cfg.model], [metrics]))
    result = {"model": cfg.model, "pairs": len(pairs), **metrics}
    if cfg.json:
        save_json(cfg.json, result)
    return result


def view_tokens(model, tokenizer, cfg: Config, device) -> dict:
    """--tokens: the first conversation of --data, each token with its mask and log-probability, or the change of it."""
    path = cfg.data or EVAL_DATA
    if kind_of(path) != "conversations":
        raise UserError(f"{path} holds no conversations; --tokens shows one")
    [record] = read_records(path, check_question, most=1)
    tokens, mask = tokenizer.render(without_silence(record["conversations"], tokenizer.chat_format))
    context = model.context
    if len(tokens) > context:
        note(f"the conversation has {len(tokens):,} tokens; the first {context:,}, the model's context, are shown")
    tokens, mask = tokens[:context], mask[:context]
    texts, colour = token_texts(tokenizer, tokens), sys.stdout.isatty()
    logprobs = logprobs_of(model, tokens, device)
    result = {"tokens": tokens, "mask": mask, "logprobs": logprobs}
    if cfg.compare:
        model = None
        model, other_tokenizer = load(cfg.compare[1], device)
        check_same_tokenizer(tokenizer, other_tokenizer, cfg.compare[1])
        after = logprobs_of(model, tokens, device)
        result["change"] = [None, *(new - old for new, old in zip(after[1:], logprobs[1:]))]
        runtime.say(show_tokens(texts, result["change"], "change", colour))
    else:
        runtime.say(show_tokens(texts, mask, "mask", colour))
        runtime.say(show_tokens(texts, logprobs, "logprob", colour))
    if cfg.json:
        save_json(cfg.json, result)
    return result


def view_rollout(cfg: Config) -> dict:
    """--tokens with a rollout.jsonl: sampled answers, each token with its advantage and its ratio. No model runs."""
    if cfg.model or cfg.adapter or cfg.compare:
        raise UserError(f"{cfg.data} holds the numbers of its own policy; leave out --model, --adapter and --compare")
    answers = list(read_records(cfg.data, check_rollout))
    for answer in answers:
        runtime.say(show_rollout(answer, sys.stdout.isatty()))
    if cfg.json:
        save_json(cfg.json, {"answers": answers})
    return {"answers": answers}


# Talking

def longest_reply(cfg: Config) -> int:
    """Tokens of a reply in --chat and --prompt."""
    return cfg.max_new_tokens or (2048 if cfg.thinking else 512)


def note(text: str):
    """A remark beside the conversation: on stderr, so that stdout holds nothing but replies."""
    print(f"({text})", file=sys.stderr, flush=True)


def speak(model, tokenizer, prompt: list, cfg: Config, generator, device) -> tuple:
    """Print a reply while it is sampled -> (its text, whether Ctrl-C stopped it)."""
    limit = min(longest_reply(cfg), model.context - len(prompt))
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character's bytes may be spread over several tokens
    tokens = []
    try:
        with runtime.autocast(device):  # as in the evaluation
            for token in stream(model, prompt, limit, tokenizer.end_ids, cfg.temperature, cfg.top_p, generator):
                tokens.append(token)
                print(decoder.decode(tokenizer.decode_bytes([token])), end="", flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        return tokenizer.decode(tokens), True
    print(decoder.decode(b"", final=True), flush=True)
    if len(tokens) == limit:
        note(f"cut after {limit} tokens; --max_new_tokens allows for more")
    return tokenizer.decode(tokens), False


def prepare(model, tokenizer, messages: list, cfg: Config) -> tuple:
    """(prompt, messages kept) with room for the reply; UserError where the newest message alone is too long."""
    context = model.context
    limit = context - min(longest_reply(cfg), context // 2)
    prompt, kept = fit_context(tokenizer, messages, limit, cfg.thinking)
    if len(prompt) > limit:
        raise UserError(f"the message is too long: {len(prompt):,} tokens, and beside the reply there is room for "
                        f"{limit:,} in the model's context of {context:,}; shorten it")
    return prompt, kept


def answer_prompt(model, tokenizer, cfg: Config, device) -> dict:
    """--prompt: one reply."""
    if not cfg.prompt.strip():
        raise UserError("--prompt is empty; give the message to answer")
    prompt, _ = prepare(model, tokenizer, system_message(cfg) + [{"role": "user", "content": cfg.prompt}], cfg)
    text, stopped = speak(model, tokenizer, prompt, cfg, torch.Generator(device).manual_seed(cfg.seed), device)
    if stopped:
        sys.exit(130)
    if cfg.json:
        save_json(cfg.json, {"prompt": cfg.prompt, "reply": text})
    return {"reply": text}


def system_message(cfg: Config) -> list:
    return [{"role": "system", "content": cfg.system}] if cfg.system else []


def read_stdin_as_utf8() -> str:
    """A pipe holds UTF-8, whatever the locale is. Returns the locale's encoding, for lines that are not UTF-8."""
    encoding = getattr(sys.stdin, "encoding", None) or "utf-8"
    if hasattr(sys.stdin, "reconfigure"):
        if sys.stdin.isatty():
            sys.stdin.reconfigure(errors="replace")
        else:
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # keeps bytes that are not UTF-8
    return encoding


def chat(model, tokenizer, cfg: Config, device) -> dict:
    """--chat: lines from the terminal or a pipe, a reply to each; the history is kept while it fits the context."""
    if sys.stdin is None or sys.stdin.closed:
        return {"turns": 0}
    terminal, encoding = sys.stdin.isatty(), read_stdin_as_utf8()
    if terminal:
        with contextlib.suppress(ImportError):  # arrow keys and history in input(); Windows has its own
            import readline  # noqa: F401
        print(HELP)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    history, turns = system_message(cfg), 0
    while True:
        try:
            line = input("> " if terminal else "").strip().lstrip("\ufeff")
        except (EOFError, KeyboardInterrupt):
            if terminal:
                print()
            break
        if any("\udc80" <= character <= "\udcff" for character in line):  # bytes that were not UTF-8
            line = line.encode("utf-8", "surrogateescape").decode(encoding, "replace")
        if line == "/quit":
            break
        elif line == "/reset":
            history = system_message(cfg)
            note("a new conversation begins")
        elif line == "/help":
            note(HELP)
        elif line.startswith("/") and line[1:].isalpha():
            note(f"there is no command {line}; {HELP}")
        elif line:
            messages = history + [{"role": "user", "content": line}]
            try:
                prompt, kept = prepare(model, tokenizer, messages, cfg)
            except UserError as error:
                note(str(error))
                continue
            if len(kept) < len(messages):
                note(f"the context of {model.context:,} tokens is full: "
                     f"the oldest {len(messages) - len(kept)} messages are forgotten")
            text, _ = speak(model, tokenizer, prompt, cfg, generator, device)
            history = kept + [{"role": "assistant", "content": without_think(text)}]
            turns += 1
    return {"turns": turns}


if __name__ == "__main__":
    main(parse_config(Config, __doc__))
