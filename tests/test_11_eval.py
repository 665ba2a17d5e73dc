"""Chapter 11: asking the model. Held-out loss, bits per byte, accuracy, and a chat that knows where its context ends.

After this chapter you can turn a loss into bits per byte, and say what accuracy is averaged over.

A model that gives each of 512 tokens the same probability spends log2 512 = 9 bits and ln 512 = 6.2383 nats on a token.
The texts "abc" and "defgh" have 3 and 5 bytes, and as many tokens where nothing is merged; each ends with one token
more. So 4 + 6 = 10 tokens are predicted, 90 bits are spent on 8 bytes: 11.25 bits per byte.

The toy model of this chapter has learned eight conversations by heart, in a tokenizer without merges (259 tokens: three
special ones and the bytes). Then a reply has as many tokens as bytes, and one that ends it.
"""

import io
import json
import os
import subprocess
import sys

import pytest
import torch

import eval as evaluation
import minillm.evaluate
from minillm import checkpoint
from minillm.data import encode_conversation, encode_text
from minillm.token_cache import load_dataset
from minillm.errors import UserError
from minillm.evaluate import (answer_questions, fit_context, held_out_loss, prompt_messages, read_questions, reply_to,
                              score)
from minillm.generate import generate
from minillm.heads import RewardModel, save_reward_model
from minillm.losses import sft_loss
from minillm.lora import apply_lora
from minillm.peft import save_adapter
from minillm.model import CausalLM, ModelConfig
from minillm.tokenizer import train_tokenizer
from tests.helpers import close

CPU = torch.device("cpu")
BYTES = train_tokenizer(["a"], 259)
HELLO = "你好，🙂！"  # 3 + 3 + 3 + 4 + 3 bytes
QUESTIONS = [  # what the user says, what the assistant says; a list: a conversation of several turns
    (["1+1?", "2"], {"task": "add", "answer": "2"}),
    (["2+2?", "4"], {"task": "add", "answer": "4"}),
    (["Sky?", "It is blue."], {"task": "fact", "answer": "blue"}),
    (["Grass?", "It is green."], {"task": "fact", "answer": "green", "choices": ["red"]}),
    (["Hi", HELLO], {"task": "talk"}),
    (["I am Bo", "Hi Bo"], {}),
    (["I am Bo", "Hi Bo", "Name?", "Bo"], {"task": "talk"}),
    (["Name?", "What?"], {}),
]


def conversation(turns):
    return [{"role": role, "content": content} for role, content in zip(["user", "assistant"] * 9, turns)]


RECORDS = [{"conversations": conversation(turns), **rest} for turns, rest in QUESTIONS]


def train(end_is_trained=True) -> CausalLM:
    """Overfit the eight conversations; optionally with the mistake that the end of a turn is masked out of the loss."""
    torch.manual_seed(0)
    model = CausalLM(ModelConfig(vocab_size=259, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                 num_key_value_heads=2,
                                 head_dim=16, intermediate_size=128, max_position_embeddings=128))
    rendered = [BYTES.render(record["conversations"]) for record in RECORDS]
    T = max(len(tokens) for tokens, _ in rendered)
    tokens = torch.tensor([t + [BYTES.pad_id] * (T - len(t)) for t, _ in rendered])
    mask = torch.tensor([m + [False] * (T - len(m)) for _, m in rendered])
    if not end_is_trained:
        mask &= tokens != BYTES.end_id
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(90):
        loss = sft_loss(model(tokens), tokens, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def model():
    return train()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("eval") / "toy"
    checkpoint.save_model(path, model, BYTES)
    return str(path)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("minillm.token_cache.CACHE", tmp_path_factory.mktemp("cache"))


def write(path, records) -> str:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return str(path)


def run(**options):
    return evaluation.main(evaluation.Config(device="cpu", **options))


# Numbers

def uniform_model() -> CausalLM:
    model = CausalLM(ModelConfig(vocab_size=512, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                                 num_key_value_heads=1, head_dim=8, intermediate_size=8))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model


@pytest.mark.parametrize("row_length, batch_size", [(64, 16), (64, 1), (9, 2), (3, 16)])
def test_bits_per_byte_of_a_uniform_model(tmp_path, row_length, batch_size):
    """However the documents are packed, and also where they are cut into pieces: 10 tokens, 8 bytes."""
    texts = load_dataset(encode_text, write(tmp_path / "t.jsonl", [{"text": "abc"}, {"text": "defgh"}]), BYTES,
                         row_length)
    metrics = held_out_loss(uniform_model(), texts, row_length, CPU, batch_size)
    assert close(metrics["bits_per_byte"], 11.25) and close(metrics["val_loss"], 6.2383246)


def test_loss_of_conversations_is_per_trained_token_and_has_no_bits_per_byte(tmp_path):
    chats = load_dataset(encode_conversation, write(tmp_path / "c.jsonl", RECORDS), BYTES, 64)
    metrics = held_out_loss(uniform_model(), chats, 64, CPU)
    assert set(metrics) == {"val_loss"} and close(metrics["val_loss"], 6.2383246)


def test_loss_does_not_depend_on_packing(tmp_path, model):
    """Means of batches must not be averaged: the batches hold different numbers of trained tokens."""
    path = write(tmp_path / "c.jsonl", RECORDS)
    losses = [held_out_loss(model, load_dataset(encode_conversation, path, BYTES, row), row, CPU, size)["val_loss"]
              for row, size in [(64, 16), (64, 1), (90, 2), (100, 3)]]
    # bf16 autocast, where the CPU has it, rounds differently for other shapes
    assert max(losses) - min(losses) < 2e-3 * max(losses) + 1e-4


def test_dropout_is_off_while_measuring(tmp_path, model):
    chats = load_dataset(encode_conversation, write(tmp_path / "c.jsonl", RECORDS), BYTES, 64)
    expected = held_out_loss(model, chats, 64, CPU)
    copy = CausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.model.layers[0].mlp = torch.nn.Sequential(copy.model.layers[0].mlp, torch.nn.Dropout(0.9))
    copy.train()
    assert held_out_loss(copy, chats, 64, CPU) == expected and copy.training


def test_score_of_five_replies():
    """Right, wrong and right on three questions with an answer; "stupid" is rude, and 25 words are not brief.

    Correct, polite, brief: (1 1 1), (0 1 1), (1 0 1), and without an answer (1 1) and (1 0):
    (1 + 2/3 + 2/3 + 1 + 1/2) / 5 = 23/30.
    """
    records = [{"conversations": conversation(["?"]), **rest} for rest in
               [{"answer": "7", "task": "add"}, {"answer": "7", "task": "add"}, {"answer": "red"}, {"task": "talk"},
                {"answer": None}]]
    metrics = score(records, ["It is 7.", "It is 8.", "Red. Stupid.", "Hello.", "word " * 25], [4, 4, 3, 2, 25],
                    [True] * 4 + [False])
    assert metrics["accuracy_by_task"] == {"add": 0.5, "other": 1.0}
    assert close([metrics["accuracy"], metrics["stopped"], metrics["reply_tokens"], metrics["gold_reward"]],
                 [2 / 3, 0.8, 7.6, 23 / 30])


# Replies

def test_overfitted_replies_are_word_for_word_and_end_by_themselves(model):
    texts, counts, stopped = reply_to(model, BYTES, RECORDS, CPU)
    assert texts == ["2", "4", "It is blue.", "It is green.", HELLO, "Hi Bo", "Bo", "What?"]
    assert stopped == [True] * 8
    assert counts == [2, 2, 12, 13, 17, 6, 3, 6]  # bytes, and the end of the turn


@pytest.mark.slow
def test_without_the_end_of_the_turn_in_the_loss_no_reply_ends():
    """The classic mistake: <|im_end|> is not supervised (often because pad and end are one token, and pad is masked).
    """
    texts, counts, stopped = reply_to(train(end_is_trained=False), BYTES, RECORDS, CPU)
    assert stopped == [False] * 8 and counts == [64] * 8
    assert [text.startswith(r["conversations"][-1]["content"]) for text, r in zip(texts, RECORDS)] == [True] * 8


def test_replies_do_not_depend_on_the_batch_or_on_the_order(model):
    texts, _, _ = reply_to(model, BYTES, RECORDS[::-1], CPU, batch_size=3)
    assert texts == ["What?", "Bo", "Hi Bo", HELLO, "It is green.", "It is blue.", "4", "2"]
    first, again, other = (reply_to(model, BYTES, RECORDS, CPU, temperature=3.0, seed=s)[0] for s in (0, 0, 1))
    assert first == again != other
    assert reply_to(model, BYTES, RECORDS, CPU, temperature=3.0, top_p=0.0)[0] == texts[::-1]


def test_questions_that_do_not_fit_the_context_are_counted_and_said(model, capsys):
    """The context has 128 tokens, 64 are for the reply. "u" n times makes a prompt of 8 + n + 11 tokens; a turn before
    it, of "u" m times and a reply "a", 8 + m + 13 + 1 more."""
    ask = lambda *turns: {"conversations": conversation(turns)}
    records = [ask("u" * 45), ask("u" * 46), ask("u" * 14, "a", "u" * 9), ask("u" * 15, "a", "Hi")]
    kept = [len(fit_context(BYTES, r["conversations"], 64)[1]) for r in records]
    assert kept == [1, 1, 3, 3]
    records += [ask("u" * 23, "a", "Hi"), ask("u" * 60, "a", "u" * 60)]
    texts, counts, stopped = reply_to(model, BYTES, records, CPU)
    assert [c > 0 for c in counts] == [True, False, True, True, True, False]
    assert texts[4] == HELLO, "without the turn that did not fit"
    assert texts[1] == texts[5] == "" and not stopped[1] and not stopped[5]
    said = capsys.readouterr().out
    assert "1 of 6 questions lost their oldest turns" in said and "2 of 6 questions were not asked" in said
    reply_to(model, BYTES, RECORDS, CPU)
    assert capsys.readouterr().out == ""


def test_a_reply_may_be_longer_than_half_of_the_context_where_all_prompts_leave_room(model):
    """The context has 128 tokens. Prompts of 20 and 30 tokens leave 98 to both replies; one of 70 no more than half."""
    short = [{"conversations": conversation(["u" * (n - 19)])} for n in (20, 30)]
    asked = []

    def lengths(records, **options):
        asked.clear()
        reply_to(model, BYTES, records, CPU, **options)
        return asked[0]

    plain = minillm.evaluate.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minillm.evaluate, "generate",
                      lambda *given, **more: asked.append(given[2]) or plain(*given, **more))
        assert lengths(short, max_new_tokens=90) == 90
        assert lengths(short, max_new_tokens=500) == 98
        assert lengths([*short, {"conversations": conversation(["u" * 51])}], max_new_tokens=500) == 64
        assert lengths([*short, {"conversations": conversation(["u" * 51])}], max_new_tokens=40) == 40


def test_the_context_forgets_the_oldest_turns_and_keeps_the_system_message():
    """Lengths: system 10 + n, user 8 + n, assistant 13 + n, the header of the reply 11 tokens."""
    system, old, new = [{"role": "system", "content": "s"}], conversation(["aa", "b"]), conversation(["ccc"])
    whole = system + old + conversation(["c", "d"]) + new  # 11 + 10 + 14 + 9 + 14 + 11 + 11 = 80
    for limit, kept in [(80, whole), (79, system + conversation(["c", "d"]) + new),
                        (56, system + conversation(["c", "d"]) + new),
                        (55, system + new), (33, system + new), (32, system + new)]:
        tokens, messages = fit_context(BYTES, whole, limit)
        assert messages == kept
        assert tokens == BYTES.render(kept, add_generation_prompt=True)[0]
    assert len(tokens) == 33, "longer than the limit of 32: nothing was left to drop"


def test_what_is_asked_is_the_conversation_without_its_last_reply():
    turns = conversation(["a", "b", "c", "d"])
    assert prompt_messages({"conversations": turns}) == turns[:3]
    assert prompt_messages({"conversations": turns[:3]}) == turns[:3]
    tool = [*turns[:2], {"role": "tool", "content": "3"}]
    assert prompt_messages({"conversations": tool}) == tool
    assert prompt_messages({"conversations": [{"role": "assistant", "content": "x"}]}) == []


# eval.py: the table

def test_table_and_json_hold_the_same_numbers(tmp_path, folder, capsys):
    data = write(tmp_path / "mine.jsonl", RECORDS)
    result = run(model=folder, data=data, json=str(tmp_path / "new" / "numbers.json"))
    assert json.loads((tmp_path / "new" / "numbers.json").read_text(encoding="utf-8")) == result
    assert os.listdir(tmp_path / "new") == ["numbers.json"]
    assert result["accuracy"] == 1 and result["accuracy_by_task"] == {"add": 1, "fact": 1}
    assert result["stopped"] == 1 and result["reply_tokens"] == 61 / 8 and result["gold_reward"] == 1
    assert 0 < result["val_loss"] < 0.1 and "bits_per_byte" not in result
    assert result["questions"] == 8 and result["data"] == [data] and result["model"] == folder
    shown = capsys.readouterr().out
    for line in ("| accuracy     | 1.000", "|   fact       | 1.000", "| Grass?   | It is green."):
        assert line in shown


def test_embedded_data_are_the_default(tmp_path, folder, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "sft_eval.jsonl", RECORDS)
    write(tmp_path / "data" / "pretrain_eval.jsonl", [{"text": "abc"}])
    with pytest.raises(UserError, match="no out/sft yet: run python train_sft.py first"):
        run()
    checkpoint.save_model("out/sft", checkpoint.load_model(folder), BYTES)
    result = run()
    conversations, text = run(data="data/sft_eval.jsonl"), run(data="data/pretrain_eval.jsonl")
    assert {"val_loss", "bits_per_byte", "accuracy", "accuracy_by_task", "stopped", "reply_tokens",
            "gold_reward"} <= set(result)
    assert result["val_loss"] == conversations["val_loss"] != text["val_loss"], "the loss is that of the conversations"
    assert result["bits_per_byte"] == text["bits_per_byte"]
    assert "accuracy" not in text and text["questions"] == 0


def test_prompts_without_replies_and_conversations_without_answers(tmp_path, folder, capsys):
    """The first have no loss, the second no accuracy: null in the file, and a dash in the table."""
    prompts = [{**r, "conversations": prompt_messages(r)} for r in RECORDS[:4]]
    result = run(model=folder, data=write(tmp_path / "prompts.jsonl", prompts))
    assert result["accuracy"] == 1 and "val_loss" not in result
    talk = [{"conversations": r["conversations"]} for r in RECORDS]
    result = run(model=folder, data=write(tmp_path / "talk.jsonl", talk), json=str(tmp_path / "talk.json"))
    assert '"accuracy": null' in (tmp_path / "talk.json").read_text() and result["accuracy_by_task"] == {}
    assert "| accuracy     | -" in capsys.readouterr().out and result["stopped"] == 1


def test_of_a_large_file_some_questions_are_asked_evenly_spaced(tmp_path, folder, capsys):
    result = run(model=folder, data=write(tmp_path / "many.jsonl", RECORDS * 5), max_questions=3)
    shown = capsys.readouterr().out
    assert result["questions"] == 3 and "asking 3 of the 40 questions" in shown
    assert "| 1+1?" in shown and "| Name?" in shown  # the first and the last


def test_compare_shows_two_models_on_the_same_questions(tmp_path, folder, capsys):
    torch.manual_seed(1)
    checkpoint.save_model(tmp_path / "random", CausalLM(checkpoint.load_config(folder)), BYTES)
    result = run(compare=[folder, str(tmp_path / "random")], data=write(tmp_path / "d.jsonl", RECORDS * 2),
                 json=str(tmp_path / "c.json"))
    good, bad = result["compared"]
    assert good["model"] == folder and good["accuracy"] == 1 and bad["accuracy"] == 0
    assert bad["val_loss"] > 4 > 0.1 > good["val_loss"]
    assert json.loads((tmp_path / "c.json").read_text()) == result
    table, replies = capsys.readouterr().out.split("| question")
    accuracy = next(line for line in table.splitlines() if line.startswith("| accuracy "))
    assert [cell.strip() for cell in accuracy.split("|")[2:4]] == ["1.000", "0.000"]
    assert folder in replies.splitlines()[0] and "random" in replies.splitlines()[0]
    assert len(replies.splitlines()) == 12, "head, line, ten questions"
    assert "| It is blue." in replies


def test_adapters_are_tried_on_one_base(tmp_path, folder):
    """A LoRA is zero at first and changes nothing; one whose second matrix is large breaks the replies."""
    data = write(tmp_path / "d.jsonl", RECORDS)
    for name, strength in [("none", 0.0), ("strong", 1.0)]:
        torch.manual_seed(0)
        model = checkpoint.load_model(folder)
        apply_lora(model, 4, 8.0)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_().mul_(strength)
        save_adapter(model, str(tmp_path / name), base=folder)
    base = run(model=folder, data=data)
    none, strong = (str(tmp_path / name) for name in ("none", "strong"))
    first, second = run(model=folder, data=data, adapter=[none, strong])["compared"]
    assert first["val_loss"] == base["val_loss"] and first["accuracy"] == 1
    assert second["val_loss"] > 10 * base["val_loss"] and second["accuracy"] < 1
    assert run(model=folder, data=data, adapter=[strong])["val_loss"] == second["val_loss"]
    assert run(model=strong, data=data)["val_loss"] == second["val_loss"], "an adapter's folder names its base"


# eval.py: --prompt and --chat

def test_prompt_prints_the_reply_and_nothing_else(folder, capsys):
    assert run(model=folder, prompt="Hi") == {"reply": HELLO}
    out, err = capsys.readouterr()
    assert out == HELLO + "\n" and err.startswith("cpu, ") and err.count("\n") == 1, "on stderr: where it runs"
    assert run(model=folder, prompt="Sky?", max_new_tokens=5) == {"reply": "It is"}
    out, err = capsys.readouterr()
    assert out == "It is\n" and "cut after 5 tokens" in err


def test_replies_are_streamed_in_whole_characters(folder, monkeypatch):
    """Every byte is a token here; what is printed while only a part of 你 is known must be nothing."""
    pieces = []
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys.stdout, "write", pieces.append)
    run(model=folder, prompt="Hi")
    assert [p for p in pieces if p] == ["你", "好", "，", "🙂", "！", "\n"]


def talk(monkeypatch, capsys, *lines, **options):
    """Pipe lines into the chat -> (turns, what it printed, its notes)."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    result = run(chat=True, **options)
    out, err = capsys.readouterr()
    return result["turns"], out.splitlines(), err


def test_chat_keeps_the_history_until_reset(folder, monkeypatch, capsys):
    turns, replies, notes = talk(monkeypatch, capsys, "I am Bo", "", "Name?", "/reset", "Name?", "/help", "/quit", "Hi",
                                 model=folder)
    assert turns == 3 and replies == ["Hi Bo", "Bo", "What?"]
    assert "a new conversation begins" in notes and "/quit ends the chat" in notes


def test_chat_ends_with_its_input_and_names_unknown_commands(folder, monkeypatch, capsys):
    # a byte order mark, a Windows line
    turns, replies, notes = talk(monkeypatch, capsys, "/rest", "\ufeffHi\r", model=folder)
    assert turns == 1 and replies == [HELLO] and "there is no command /rest" in notes


def test_chat_forgets_the_oldest_turn_when_the_context_is_full(folder, monkeypatch, capsys):
    """112 tokens are for the prompt, 16 for the reply. "I am Bo" and "Hi Bo" have 33 tokens, "Name?" with the header
    24, "Bo" 15: the second "Name?" still fits (85), the third (113) does not."""
    turns, replies, notes = talk(monkeypatch, capsys, "I am Bo", "Name?", "Name?", "Hi", model=folder,
                                 max_new_tokens=16)
    assert turns == 4 and "forgotten" not in notes
    seen = []
    monkeypatch.setattr(evaluation, "fit_context", lambda tokenizer, messages, *rest:
                        seen.append(messages) or fit_context(tokenizer, messages, *rest))
    turns, replies, notes = talk(monkeypatch, capsys, "I am Bo", "Name?", "Name?", "Name?", "Hi", model=folder,
                                 max_new_tokens=16)
    assert turns == 5 and replies[:2] == ["Hi Bo", "Bo"]
    assert "the context of 128 tokens is full: the oldest 2 messages are forgotten" in notes
    assert [messages[0]["content"] for messages in seen] == ["I am Bo"] * 4 + ["Name?"], "forgotten once and for all"


def test_a_message_longer_than_the_context_gets_one_line_and_is_not_remembered(folder, monkeypatch, capsys):
    turns, replies, notes = talk(monkeypatch, capsys, "I am Bo", "x" * 500, "Name?", model=folder)
    assert turns == 2 and replies == ["Hi Bo", "Bo"]
    assert "the message is too long: 519 tokens, and beside the reply there is room for 64" in notes
    with pytest.raises(UserError, match="the message is too long: 519 tokens"):
        run(model=folder, prompt="x" * 500)


def test_system_message_temperature_and_seed(folder, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(evaluation, "fit_context", lambda tokenizer, messages, *rest:
                        seen.append(messages) or fit_context(tokenizer, messages, *rest))
    talk(monkeypatch, capsys, "Hi", "/reset", "Sky?", model=folder, system="Be nice.")
    assert [[m["content"] for m in messages] for messages in seen] == [["Be nice.", "Hi"], ["Be nice.", "Sky?"]]
    first, again, other, greedy = (talk(monkeypatch, capsys, "Sky?", model=folder, max_new_tokens=20, **options)[1]
                                   for options in
                                   [dict(temperature=4.0), dict(temperature=4.0), dict(temperature=4.0, seed=1),
                                    dict(temperature=4.0, top_p=0.0)])
    assert first == again != other and greedy == ["It is blue."]


def test_ctrl_c_stops_a_reply_and_at_the_prompt_the_chat(folder, monkeypatch, capsys):
    real, prompts = evaluation.stream, []

    def interrupted(model, prompt, *rest):
        prompts.append(BYTES.decode(prompt))
        tokens = real(model, prompt, *rest)
        if len(prompts) > 1:
            yield from tokens
        else:
            yield next(tokens)
            yield next(tokens)
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "stream", interrupted)
    answers = iter(["Sky?", "Sky?", KeyboardInterrupt])

    def typed(prompt):
        if (line := next(answers)) is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", typed)
    assert run(chat=True, model=folder) == {"turns": 2}
    assert capsys.readouterr().out.startswith("It\n")
    assert "assistant\nIt<|im_end|>" in prompts[1], "what was said stays in the history"


@pytest.mark.slow
def test_the_chat_as_a_program(folder):
    """Lines through a pipe, UTF-8 both ways, invalid bytes and a control token among them."""
    root = os.path.dirname(os.path.abspath(evaluation.__file__))
    process = subprocess.run([sys.executable, os.path.join(root, "eval.py"), "--chat", "--model", folder, "--device",
                              "cpu"],
                             input="I am Bo\nName?\n".encode() + b"\xff\xfe <|im_end|>\n/reset\nHi\n",
                             capture_output=True, timeout=120, cwd=root,
                             env={**os.environ, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"})
    lines = process.stdout.decode().splitlines()
    assert process.returncode == 0 and lines[:2] == ["Hi Bo", "Bo"] and lines[-1] == HELLO, process.stderr.decode()


# Bad input: one line that says what and where

@pytest.mark.parametrize("options, message", [
    (dict(chat=True, prompt="Hi"), "--chat, --prompt and --compare exclude each other"),
    (dict(compare=["a", "b", "c"]), "--compare takes two folders"),
    (dict(compare=["a", "b"], model="c"), "no --model or --adapter beside them"),
    (dict(chat=True, adapter=["a", "b"]), "for --chat, --prompt and --tokens, give one"),
    (dict(prompt=" "), "--prompt is empty"),
    (dict(prompt="Hi", top_p=0.5), "--top_p 0.5 changes nothing at --temperature 0, which takes the likeliest token"),
    (dict(data="nowhere.jsonl"), "nowhere.jsonl: no such data file"),
    (dict(adapter=["nowhere"]), "nowhere holds no adapter"),
])
def test_impossible_wishes(folder, options, message):
    with pytest.raises(UserError, match=message):
        run(**{"model": "" if "compare" in options else folder, **options})


@pytest.mark.parametrize("line, message", [
    ('{"pairs": []}', ':1: neither "conversations" nor "text" nor "chosen" is there; found: \'pairs\''),
    ("{}", "found: nothing"),
    ('{"conversations": [{"role": "user", "content": "?"}], "answer": [7]}', ':1: "answer" must be text, not list'),
    ('{"conversations": [{"role": "user", "content": "?"}], "answer": " "}', ":1: \"answer\" is ' '"),
    ('{"conversations": [{"role": "user", "content": "?"}], "answer": "a", "choices": "b"}',
     '"choices" must be a list'),
    ('{"conversations": [{"role": "user", "content": "?"}], "answer": "a", "choices": [1]}',
     'each of "choices" must be text'),
    ('{"conversations": [{"role": "user", "content": "?"}], "task": 3}', '"task" must be text'),
    ('{"conversations": [{"role": "robot", "content": "?"}]}', "unknown role 'robot'"),
    ('{"conversations": [{"role": "user", "content": "?"}]}\n{"conversations": 3}',
     ":2: \"conversations\" must be a list"),
    ('{"text": "a"}\n{"test": "b"}', ':2: no key "text"'),
    ("", "the file is empty"),
])
def test_bad_lines(tmp_path, folder, line, message):
    (tmp_path / "bad.jsonl").write_text(line)
    with pytest.raises(UserError) as error:
        run(model=folder, data=str(tmp_path / "bad.jsonl"))
    assert message in str(error.value) and "bad.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_embedded_questions_are_valid_and_hold_every_task():
    root = os.path.dirname(os.path.abspath(evaluation.__file__))
    tasks = {r["task"] for r in read_questions(os.path.join(root, evaluation.EVAL_DATA))}
    assert tasks == {"add", "subtract", "compare", "sort", "count", "reverse", "fact", "talk"}


# Flags that a mode does not read

@pytest.mark.parametrize("mode, unread", [
    (dict(chat=True), ["data", "ref", "reward_model", "json", "max_questions"]),
    (dict(prompt="Hi"), ["data", "ref", "reward_model", "max_seq_len"]),
    (dict(tokens=True), ["ref", "reward_model", "system", "temperature", "top_p", "max_new_tokens", "thinking"]),
    ({}, ["system"]), (dict(compare=["a", "b"]), ["system"])])
def test_a_flag_that_would_change_nothing_is_refused(tmp_path, folder, mode, unread):
    flags = {name: str(tmp_path / name) for name in unread}
    flags |= dict(temperature=0.5, top_p=0.5, max_new_tokens=5, max_questions=5, max_seq_len=16, thinking=True)
    for some in ([name] for name in unread), [unread]:
        for names in some:
            with pytest.raises(UserError, match=f"makes no use of {', '.join(f'--{name}' for name in names)}; leave"):
                run(**{"model": "" if "compare" in mode else folder, **mode, **{name: flags[name] for name in names}})
    assert not list(tmp_path.iterdir())


def test_the_reply_to_a_prompt_as_a_file(tmp_path, folder, capsys):
    run(model=folder, prompt="Hi", json=str(tmp_path / "reply.json"))
    assert json.loads((tmp_path / "reply.json").read_text(encoding="utf-8")) == {"prompt": "Hi", "reply": HELLO}
    assert capsys.readouterr().out == HELLO + "\n"


def test_a_reward_model_is_measured_on_the_file_that_was_given_or_on_none(tmp_path, folder, monkeypatch):
    """Not on data/preference_eval.jsonl: that is what it takes without --data."""
    reward = str(tmp_path / "reward")
    save_reward_model(reward, RewardModel.from_lm(checkpoint.load_model(folder)), BYTES)
    data, texts = write(tmp_path / "mine.jsonl", RECORDS), write(tmp_path / "texts.jsonl", [{"text": "abc"}])
    for path in data, texts:
        with pytest.raises(UserError, match=f"{path} holds no pairs; .* or leave out --data for data/preference_eval"):
            run(model=reward, data=path)
    with pytest.raises(UserError, match="a reward model makes no use of --system, --temperature, --seed; leave out"):
        run(model=reward, system="Be kind.", temperature=0.5, seed=1)
    pairs = [{side: conversation(["?", text]) for side, text in (("chosen", "a"), ("rejected", "b"))}]
    monkeypatch.setattr(evaluation, "EVAL_PAIRS", write(tmp_path / "pairs.jsonl", pairs * 3))
    assert run(model=reward)["pairs"] == 3
    assert run(model=reward, data=write(tmp_path / "own.jsonl", pairs))["pairs"] == 1


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_bits_per_byte_of_a_uniform_model: `{"text": "defgh"}` -> `{"text": "de"}`. Do the bits per byte rise or
#    fall? And the loss?
# 2. test_score_of_five_replies: `"It is 8."` -> `"It is 7."`. Which of the five numbers stay?
