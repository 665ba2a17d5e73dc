"""Chapter 26. Nothing is silently wrong: what a file or a folder means is understood, or it is refused by name.

After this chapter you know which forms of data are read, and why a key that would change the lesson is refused instead
of ignored.

Data files come in many forms. A form that is known is read; a key that would change what is learned is refused with
file and line; any other key is named once. Folders that hold no model get a line that says what to do.
"""

import gzip
import importlib.util
import io
import json
import math
import os
import re
import sys
from pathlib import Path

import pytest

import eval as evaluation
import train_dpo
import train_pretrain
import train_sft
from minillm import checkpoint, records, token_cache
from minillm.data import encode_conversation, encode_text, load_split
from minillm.errors import UserError
from minillm.model import CausalLM, ModelConfig
from minillm.preferences import encode_pair, load_pairs
from minillm.records import advice_on_folder, check_file, read_records, read_texts
from minillm.token_cache import load_dataset
from minillm.tokenizer import Config as TokenizerConfig
from minillm.tokenizer import main as tokenizer_main
from minillm.tokenizer import train_tokenizer
from tests.helpers import workers_start_at_once

BYTES = train_tokenizer(["a"], 259)  # one byte, one token
HI_YO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
RENDERED = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(token_cache, "CACHE", tmp_path / "cache")


def write(name, *records) -> str:
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return name


def one_line(call, *arguments, **options) -> str:
    """The message of the UserError that the call raises."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save_model(folder, context=64):
    checkpoint.save_model(folder, CausalLM(ModelConfig(
        vocab_size=BYTES.vocab_size, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        head_dim=8, intermediate_size=8, max_position_embeddings=context)), BYTES)


# ---------------------------------------------------------------------------------------------- forms of a conversation

FORMS = {
    "ours": {"conversations": HI_YO},
    "OpenAI": {"messages": HI_YO},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
    "ShareGPT under messages": {"messages": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Yo"}]},
    "Alpaca": {"instruction": "Hi", "input": "", "output": "Yo"},
    "Alpaca without input": {"instruction": "Hi", "input": None, "output": "Yo", "history": []},
    "prompt and completion": {"prompt": "Hi", "completion": "Yo"},
    "prompt and completion as messages": {"prompt": HI_YO[:1], "completion": HI_YO[1:]},
    "input and output": {"input": "Hi", "output": "Yo"},
    "question and response": {"question": "Hi", "response": "Yo"},
    "problem and solution": {"problem": "Hi", "solution": "Yo", "level": 5},
    "parts of content": {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"},
                                                                   {"type": "text", "text": "i"}]}, HI_YO[1]]},
    "a good example of KTO": {"prompt": "Hi", "completion": "Yo", "label": True},
    "a good example of KTO in LLaMA-Factory": {"messages": HI_YO, "kto_tag": True},
    "a merged table": {"messages": HI_YO, "instruction": None, "chosen": None, "rejected": None, "conversations": None},
    "a merged table of questions": {"messages": None, "instruction": None, "question": "Hi", "answer": "Yo"},
    "messages with both pairs of names": {"messages": [{**message, "from": None, "value": None} for message in HI_YO]},
    "from and value beside nothing": {"conversations": [
        {"from": "human", "value": "Hi", "role": None, "content": None}, {"from": "gpt", "value": "Yo", "role": None}]},
    "JSON text in a table": {"messages": json.dumps(HI_YO)},
    "DeepScaleR": {"problem": "Hi", "answer": "Yo", "solution": ""},
    "two names of the answer": {"instruction": "Hi", "output": "", "response": "Yo"},
}


@pytest.mark.parametrize("record", FORMS.values(), ids=FORMS)
def test_one_conversation_in_many_forms(capsys, record):
    """All are trained on alike, are the same questions, and give a tokenizer the same text."""
    path = write("a.jsonl", record)
    tokens, mask = load_dataset(encode_conversation, [path], BYTES, 64)[0]
    assert BYTES.decode(tokens) == RENDERED
    assert BYTES.decode(tokens[mask]) == "Yo<|im_end|>"
    assert [record["conversations"] for record in read_records(path)] == [HI_YO]
    assert list(read_texts([path])) == ["Hi", "Yo"]
    assert "unknown" not in capsys.readouterr().out


def test_think_text_that_stands_in_both_places_is_read_once():
    reply = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYo", "reasoning_content": "Hm."}
    read, = read_records(write("a.jsonl", {"messages": [HI_YO[0], reply]}))
    assert read["conversations"] == [HI_YO[0], {**HI_YO[1], "reasoning_content": "Hm."}]
    read, = read_records(write("a.jsonl", {"messages": [HI_YO[0], {**reply, "reasoning_content": ""}]}))
    assert read["conversations"] == [HI_YO[0], {"role": "assistant", "content": reply["content"]}]


def test_the_input_of_alpaca_follows_the_instruction():
    record, = read_records(write("a.jsonl", {"instruction": "Add.", "input": "1 and 2", "output": "3"}))
    assert record["conversations"] == [{"role": "user", "content": "Add.\n1 and 2"},
                                       {"role": "assistant", "content": "3"}]


@pytest.mark.parametrize("record, expected", [
    ({"prompt": "Hi", "input": "there", "output": "Yo"}, "Hi\nthere"),
    ({"prompt": "Hi", "context": "there", "response": "Yo"}, "Hi\nthere"),
    ({"question": "Hi", "input": "there", "context": "you", "answer": "Yo"}, "Hi\nthere\nyou"),
    ({"input": "Hi", "context": "there", "output": "Yo"}, "Hi\nthere"),
    ({"question": "Hi", "passage": "there", "answer": "Yo"}, "Hi\nthere"),  # BoolQ
    ({"question": "Hi", "article": "there", "answer": "Yo"}, "Hi\nthere"),  # RACE
    ({"instruction": "", "input": "Hi", "output": "Yo"}, "Hi"),
])
def test_all_that_belongs_to_a_question_is_in_it(record, expected):
    read, = read_records(write("a.jsonl", record))
    assert read["conversations"] == [{"role": "user", "content": expected}, HI_YO[1]]
    path = write("a.jsonl", {**{k: v for k, v in record.items() if k not in ("output", "response", "answer")},
                             "chosen": "Yo", "rejected": "No"})
    read, = read_records(path)
    assert read["prompt"] == [{"role": "user", "content": expected}]


@pytest.mark.parametrize("record, answer", [
    ({"question": "How many legs has a spider?", "choices": ["6", "4"], "answer": "8"}, "8"),
    ({"question": "2 + 2?", "choices": ["3", "4"], "answer": 4}, "4"),
    ({"question": "Which letter is first?", "choices": ["b", "c"], "answer": "a"}, "a"),
    ({"question": "Which?", "choices": None, "options": None, "answer": "B"}, "B"),
    ({"question": "Who sings?", "choices": ["cat", "dog"], "answer": "bird"}, "bird"),
])
def test_an_answer_in_words_stands_beside_the_other_choices(record, answer):
    read, = read_records(write("a.jsonl", record))
    assert read["answer"] == answer


@pytest.mark.parametrize("mark", ["weight", "loss_weight", "train", "train_on_turn"])
def test_a_message_may_be_left_out(mark):
    read, = read_records(write("a.jsonl", {"messages": [HI_YO[0], {**HI_YO[1], mark: 0}]}))
    assert read["conversations"] == [HI_YO[0], {**HI_YO[1], "train": False}]


@pytest.mark.parametrize("end", ["\n", "\n\n"])
def test_a_conversation_in_one_text_as_belle_and_hh_rlhf_have_it(end):
    text = end.join(["Human:Hi", "Assistant:Yo", "Human: Human: who?", "Assistant:"])
    read, = read_records(write("a.jsonl", {"instruction": text, "input": "", "output": "Me"}))
    assert [message["content"] for message in read["conversations"]] == ["Hi", "Yo", "Human: who?", "Me"]
    assert [message["role"] for message in read["conversations"]] == ["user", "assistant"] * 2


@pytest.mark.parametrize("record", [
    {"conversations": HI_YO, "system": "Be brief."},
    {"instruction": "Hi", "output": "Yo", "system": "Be brief."},
])
def test_a_system_message_beside_the_conversation_is_its_first_turn(record):
    dataset = load_dataset(encode_conversation, [write("a.jsonl", record)], BYTES, 64)
    assert BYTES.decode(dataset[0][0]) == "<|im_start|>system\nBe brief.<|im_end|>\n" + RENDERED


def write_text(name, text, encoding="utf-8") -> str:
    with open(name, "w", encoding=encoding) as file:
        file.write(text)
    return name


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "A.JSON.GZ"])
def test_a_json_array_is_read_like_lines(name):
    """Whatever the file is called; also compressed, and after a byte-order mark."""
    text = '\ufeff\n[ {"text": "one"},\n\n{\n"text": "two"} ,{"text": "three"}]\n'
    if name.endswith("GZ"):
        with gzip.open(name, "wt", encoding="utf-8") as file:
            file.write(text)
    else:
        write_text(name, text)
    assert [record["text"] for record in read_records(name)] == ["one", "two", "three"]
    assert list(read_texts([name])) == ["one", "two", "three"]
    assert load_dataset(encode_text, [name], BYTES, 64).stats["documents"] == 3


@pytest.mark.parametrize("text, message", [
    ('[{"text": "a"},\n{"txt": "b"}]', 'a.json:2: no key "text"; found: \'txt\''),
    ('[{"text": "a"},\n{"text": b}]', "a.json:2: not JSON (Expecting value, column 10)"),
    ('[{"text": "a"}\n{"text": "b"}]', "a.json:2: not JSON (the items of an array need commas between them"),
    ('[{"text": "a"}', "a.json:1: not JSON (the items of an array need commas between them, and a ] after the last"),
    ('[{"text": "a"}]\n[{"text": "b"}]', "a.json:2: text after the end of the array; a file is one array, or has"),
    ('["a"]', "a.json:1: must be a JSON object like {...}, not a str"),
    ("[]", "a.json: the file is empty"),
    ('[{"text": "a"},\n{"text": "b", "text": "c"}]', "a.json:2: not JSON (the name 'text' appears twice"),
])
def test_a_mistake_in_an_array_has_a_line_too(text, message):
    assert one_line(load_dataset, encode_text, [write_text("a.json", text)], BYTES, 64).startswith(message)


def test_a_prompt_alone_is_a_conversation_without_its_answer():
    record, = read_records(write("a.jsonl", {"prompt": "1 + 1?", "answer": "2"}))
    assert record == {"conversations": [{"role": "user", "content": "1 + 1?"}], "answer": "2"}


@pytest.mark.parametrize("record", [
    {"prompt": "Hi", "chosen": "Yo", "rejected": "No"},
    {"chosen": HI_YO, "rejected": [HI_YO[0], {"role": "assistant", "content": "No"}]},
    {"prompt": [{"from": "human", "value": "Hi"}], "chosen": [{"from": "gpt", "value": "Yo"}],
     "rejected": [{"from": "gpt", "value": "No"}]},
    {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Yo"},
     "rejected": {"from": "gpt", "value": "No"}},
    {"messages": HI_YO[:1], "chosen": HI_YO[1:], "rejected": [{"role": "assistant", "content": "No"}]},
    {"instruction": "Hi", "input": "", "chosen": "Yo", "rejected": "No"},
    {"question": "Hi", "chosen": "Yo", "rejected": "No", "system": ""},
    {"instruction": "Hi", "chosen_response": "Yo", "rejected_response": "No"},
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Yo", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
    {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "Yo", "rejected": "No"},
    {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Yo", "rejected": " No\n"},
    {"prompt": "Human: Hi\n\nAssistant:", "chosen": " Yo", "rejected": " No"},
    {"chosen": "\r\n\r\nHuman: Hi\r\n\r\nAssistant: Yo", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
    {"messages": HI_YO, "rejected_response": "No"},  # ms-swift
    {"prompt": None, "chosen": HI_YO, "rejected": [HI_YO[0], {"role": "assistant", "content": "No"}]},
    {"prompt": "Hi", "prompt_id": "x", "chosen": HI_YO, "score_chosen": 8.0,
     "rejected": [{**HI_YO[0], "id": 7}, {"role": "assistant", "content": "No"}]},
])
def test_the_prompt_of_a_pair_stays_in_front_of_both_answers(record):
    dataset = load_dataset(encode_pair, [write("a.jsonl", record)], BYTES, 64)
    assert BYTES.decode(dataset[0][0]) == RENDERED.removesuffix("\n")
    assert BYTES.decode(dataset[1][0]) == RENDERED.removesuffix("\n").replace("Yo", "No")


# --------------------------------------------------------------------------------------------------- refused by name

@pytest.mark.parametrize("record, message", [
    ({"conversations": [HI_YO[0], {**HI_YO[1], "weight": 0.5}]}, '"weight": 0.5; not supported'),
    ({"conversations": HI_YO, "weight": 0.5}, '"weight": 0.5 of a whole record is not supported'),
    ({"conversations": HI_YO, "loss_mask": [0, 1]}, '"loss_mask" is not supported; give a message of the assistant'),
    ({"conversations": [HI_YO[0], {**HI_YO[1], "mask": 1}]}, '"mask" is not supported; give a message'),
    ({"prompt": "Hi", "completion": "Yo", "label": False}, '"label" is false: this answer is a bad example'),
    ({"prompt": "Hi", "completion": "Yo", "label": 0}, '"label" is 0: this answer is a bad example'),
    ({"prompt": "Hi", "completion": "Yo", "label": "False"}, '"label" is "False": this answer is a bad example'),
    ({"prompt": "Hi", "response": "Yo", "label": "0"}, '"label" is "0": this answer is a bad example'),
    ({"conversations": HI_YO, "label": -1}, '"label" is -1: this answer is a bad example'),
    ({"messages": HI_YO, "kto_tag": False}, '"kto_tag" is false: this answer is a bad example'),
    ({"prompt": "Hi", "completion": "Yo", "text": "HiYo", "label": False}, '"label" is false: this answer is a bad'),
    ({"question": "Hi", "answer": "Yo", "history": 5}, '"history" must be a list of [question, answer]'),
    ({"conversations": [{**HI_YO[0], "loss": True}, HI_YO[1]]}, 'message 1 of "conversations" has "loss": true'),
    ({"conversations": [{**HI_YO[0], "thinking": "Hm."}, HI_YO[1]]}, 'message may have "reasoning_content"'),
    ({"conversations": [HI_YO[0], {**HI_YO[1], "reasoning": ["Hm."]}]}, '"reasoning_content" must be text, not list'),
    ({"conversations": [HI_YO[0], {**HI_YO[1], "reasoning": "Hm", "thinking": "Ah"}]}, "think text under two keys"),
    ({"conversations": [HI_YO[0], {**HI_YO[1], "function_call": {"name": "f"}}]}, "a call of a tool must be"),
    ({"conversations": [HI_YO[0], {**HI_YO[1], "function_call": {"name": "f", "arguments": {}},
                                   "tool_calls": [{"name": "g", "arguments": {}}]}]}, "calls of tools under two keys"),
    ({"conversations": [HI_YO[0], {**HI_YO[1], "tool_calls": [{"name": "f\0", "arguments": {}}]}]},
     "'f\\x00' cannot be the name of a tool"),
    ({"conversations": [HI_YO[0], {**HI_YO[1], "tool_calls": [{"name": "f", "arguments": "city=Paris"}]}]},
     '"arguments" of the call of \'f\' is not JSON: \'city=Paris\''),
    ({"conversations": [HI_YO[0], {**HI_YO[1], "tool_calls": [{"name": 'f"x', "arguments": {}}]}]},
     "'f\"x' cannot be the name of a tool"),
    ({"conversations": [HI_YO[0], {"role": "assistant", "content": "<think>Hm</think>Yo", "reasoning": "Ah"}]},
     "has think text under a key and other think text in its content"),
    ({"instruction": {"0": "Hi"}, "output": {"0": "Yo"}}, '"instruction" must be text or messages, not {"0": "Hi"};'),
    ({"instruction": ["Hi"], "output": ["Yo"]}, "of a table by columns make one object per row"),
    ({"question": "Hi", "answer": {"value": "Yo"}}, '"answer" must be text or messages, not {"value": "Yo"}'),
    ({"conversations": [{**HI_YO[0], "tools": [{"name": "f"}]}, {**HI_YO[1], "tools": [{"name": "g"}]}]},
     'message 2 of "conversations" has other "tools" than one before it; keep one list'),
    ({"prompt": "Hi", "answer": math.nan}, '"answer" is nan, which no reply can match'),
    ({"conversations": [HI_YO[0], {**HI_YO[1], "tool_calls": "f()"}]}, "the call of a tool is not JSON: 'f()'"),
    ({"conversations": HI_YO, "tools": "f"}, '"tools" is not JSON: \'f\''),
    ({"conversations": HI_YO, "tools": {"name": "f"}}, '"tools" must be a list of objects'),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, HI_YO[1]]}, "a part of the kind 'image_url'"),
    ({"messages": HI_YO[:1], "rejected_response": "No"}, 'no key "conversations"; found: '),
    ({"messages": HI_YO, "prompt": "Hello", "rejected": "No"}, 'no key "conversations"; found: '),
    ({"conversations": HI_YO, "images": ["cat.png"]}, '"images" is not supported'),
    ({"conversations": HI_YO, "video": "cat.mp4"}, '"video" is not supported'),
    ({"conversations": [{**HI_YO[0], "image_url": "cat.png"}, HI_YO[1]]}, '"image_url" is not supported'),
    ({"conversations": [HI_YO[0], {**HI_YO[1], "masked": True}]}, '"masked" is not supported; give a message'),
    ({"question": "Hi?", "A": "Yo", "B": "No", "answer": "B"}, '"answer" is the letter of a choice'),  # C-Eval
    ({"question": "Hi?", "options": {"A": "Yo", "B": "No"}, "answer": "B"}, '"answer" is the letter of a choice'),
    ({"question": "Hi?", "options": '["Yo", "No"]', "answer": "B"}, '"answer" is the letter of a choice'),
    ({"prompt": "<s>[INST] Hi [/INST]", "output": "Yo"}, "in the format of a chat template already (<s>[INST])"),
    ({"prompt": "Hi", "output": "Yo</s>"}, "in the format of a chat template already (</s>)"),
    ({"prompt": "<start_of_turn>user\nHi<end_of_turn>", "output": "Yo"}, "chat template already (<start_of_turn>)"),
    ({"prompt": "<|user|>\nHi", "output": "Yo"}, "in the format of a chat template already (<|user|>)"),
    ({"conversations": HI_YO, "history": [["a", "b"]]}, '"history" is not supported'),
    ({"question": "Which?", "choices": ["a", "b"], "answer": 1}, '"answer" is the number of a choice'),
    ({"question": "Which?", "choices": None, "options": ["cat", "dog"], "answer": 1}, '"answer" is the number of a'),
    ({"question": "Which?", "options": ["cat", "dog"], "answer": "B"}, '"answer" is the letter of a choice; write the'),
    ({"conversations": HI_YO[:1], "choices": ["cat", "dog"], "answer": "a"}, '"answer" is the letter of a choice'),
    ({"question": "Which?", "choices": ["cat", "dog"], "answer": "C"}, '"answer" is the letter of a choice'),
    ({"conversations": [{"role": "system", "content": "a"}, *HI_YO], "system": "b"}, "keep one of them"),
    ({"conversations": HI_YO, "system": ["Be brief."]}, '"system" must be text, not list'),
    ({"instruction": "Hi", "output": None}, '"output" must be text or a list of messages, not NoneType'),
    ({"instruction": 5, "output": "Yo"}, '"instruction" must be text or a list of messages, not int'),
    ({"prompt": 5, "completion": "Yo"}, '"prompt" must be text or a list of messages'),
    ({"conversations": [{"from": "narrator", "value": "x"}]}, "unknown role 'narrator'"),
    ({"conversations": [{"role": "user", "content": "a\0b"}, HI_YO[1]]}, r"holds a NUL character (\u0000); remove it"),
])
def test_what_would_change_the_lesson_is_refused(record, message):
    path = write("a.jsonl", {"conversations": HI_YO}, record)
    error = one_line(load_dataset, encode_conversation, [path], BYTES, 64)
    assert error.startswith("a.jsonl:2: ") and message in error


def test_a_pair_without_a_question_is_refused():
    """It would teach which answer is better to nothing."""
    sides = {"chosen": HI_YO[1:], "rejected": [{"role": "assistant", "content": "No"}]}
    path = write("a.jsonl", {"subject": "Hi", **sides})
    assert one_line(load_dataset, encode_pair, [path], BYTES, 64) == (
        'a.jsonl:1: nothing stands before the answer in "chosen"; put the question under "prompt"')


@pytest.mark.parametrize("record", [
    {"prompt": "Hi", "chosen": "Yo", "rejected": "No", "system": "Be brief."},
    {"prompt": "\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant:", "chosen": "Yo", "rejected": "No"},
    {"chosen": HI_YO, "rejected": [HI_YO[0], {"role": "assistant", "content": "No"}], "system_prompt": "Be brief."},
])
def test_a_system_message_beside_a_pair_is_its_first_turn(record):
    dataset = load_dataset(encode_pair, [write("a.jsonl", record)], BYTES, 64)
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert BYTES.decode(dataset[0][0]) == system + RENDERED.removesuffix("\n")
    assert BYTES.decode(dataset[1][0]) == system + RENDERED.removesuffix("\n").replace("Yo", "No")


def test_a_pair_that_begins_with_the_assistant_keeps_its_prompt_once():
    opened = [HI_YO[1], HI_YO[0]]
    sides = {"chosen": opened + HI_YO[1:], "rejected": [*opened, {"role": "assistant", "content": "No"}]}
    for record in (sides, {"prompt": opened, **sides}):
        dataset = load_dataset(encode_pair, [write("a.jsonl", record)], BYTES, 99)
        assert BYTES.decode(dataset[0][0]) == ("<|im_start|>assistant\nYo<|im_end|>\n" + RENDERED).removesuffix("\n")


@pytest.mark.parametrize("record, message", [
    ({"prompt": [HI_YO[0], {"role": "user", "content": "And?"}],
      "chosen": [{"role": "user", "content": "And?"}, *HI_YO], "rejected": HI_YO},
     '"chosen" must begin with the messages of "prompt"'),
    ({"prompt": HI_YO, "chosen": "Yes", "rejected": "No"}, 'the last message of "prompt" is an answer already'),
    ({"prompt": "Hi", "chosen": [HI_YO[1], *HI_YO], "rejected": [HI_YO[1], HI_YO[0], {**HI_YO[1], "content": "No"}]},
     '"chosen" begins with the assistant, and "prompt" stands in it later'),
    ({"prompt": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}], "Chosen": "Yo",
      "rejected": "No"}, 'no key "chosen"')])
def test_the_prompt_of_a_pair_must_fit_its_sides(record, message):
    assert message in one_line(load_dataset, encode_pair, [write("a.jsonl", record)], BYTES, 99)


def test_null_in_a_pair_is_as_if_the_key_were_not_there():
    sides = {"prompt": "Hi", "chosen": "Yo", "rejected": "No"}
    dataset = load_dataset(encode_pair, [write("a.jsonl", {**sides, "kind": None, "margin": None}, sides)], BYTES, 64)
    assert dataset.labels() == [["", 0.0], ["", 0.0]]
    blank = write("b.jsonl", {**sides, "margin": ""})
    assert '"margin" must be a number' in one_line(load_dataset, encode_pair, [blank], BYTES, 64)


def labels():
    """data/label_preferences.py, which is a script in a folder that is no package."""
    path = Path(token_cache.__file__).parent.parent / "data" / "label_preferences.py"
    spec = importlib.util.spec_from_file_location("label_preferences", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja", "generation_config.json",
                                  "adapter_config.json"])
def test_whatever_is_read_of_a_model_belongs_to_its_fingerprint(name):
    """--resume compares it: with another chat template or another end of a turn the run would go on with other data."""
    save_model("model")
    path = Path("model", name)
    path.write_text("{}", encoding="utf-8")
    before = records.fingerprint("model")
    path.write_text('{"a": 1}', encoding="utf-8")
    assert records.fingerprint("model") != before


def test_a_tokenizer_that_stays_smaller_says_so(capsys):
    write("a.jsonl", {"text": "abab"})
    tokenizer_main(TokenizerConfig(data=["a.jsonl"], vocab_size=300, out="t.json"))
    assert re.search(r"t.json: 2\d\d tokens; no pair of tokens is left for the other \d+ of --vocab_size",
                     capsys.readouterr().out)


def test_no_command_writes_over_what_it_reads():
    write("a.jsonl", {"text": "one"})
    for call in (lambda: tokenizer_main(TokenizerConfig(data=["a.jsonl"], vocab_size=262, out="./a.jsonl")),
                 lambda: evaluation.main(evaluation.Config(data="a.jsonl", json="a.jsonl")),
                 lambda: labels().main(labels().Config(prompts=["a.jsonl"], out="a.jsonl"))):
        assert one_line(call).endswith("a.jsonl: this command reads that file; give another name")
    assert Path("a.jsonl").read_text(encoding="utf-8") == '{"text": "one"}\n'


def test_the_last_question_alone_may_be_the_prompt_of_whole_conversations():
    sides = {side: [{"role": "system", "content": "a"}, *HI_YO, *HI_YO[:1], {"role": "assistant", "content": side}]
             for side in ("chosen", "rejected")}
    dataset = load_dataset(encode_pair, [write("a.jsonl", {"prompt": "Hi", **sides}, sides)], BYTES, 199)
    assert list(dataset[0][0]) == list(dataset[2][0])


@pytest.mark.parametrize("out", ["folder", "new/"])
def test_a_folder_is_no_name_of_a_file(out):
    write("a.jsonl", {"conversations": HI_YO})
    Path("folder").mkdir()
    assert one_line(evaluation.main, evaluation.Config(data="a.jsonl", json=out)) == (
        f"--json {out}: is a folder; give the name of a file")


def test_an_answer_of_a_pair_must_be_one_to_train_on():
    record = {"prompt": "Hi", "chosen": [{**HI_YO[1], "weight": 0}], "rejected": "No"}
    assert one_line(load_dataset, encode_pair, [write("a.jsonl", record)], BYTES, 64) == (
        'a.jsonl:1: the answer in "chosen" is marked as not to be trained on; remove the pair')


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}, {"loss": 0.0}, {"training": False}])
def test_an_answer_with_weight_0_is_read_and_not_learned(mark):
    messages = [HI_YO[0], {"role": "assistant", "content": "Bad", **mark}, HI_YO[0], {**HI_YO[1], "weight": 1}]
    tokens, mask = load_dataset(encode_conversation, [write("a.jsonl", {"messages": messages})], BYTES, 64)[0]
    assert BYTES.decode(tokens) == RENDERED.replace("Yo", "Bad") + RENDERED
    assert BYTES.decode(tokens[mask]) == "Yo<|im_end|>"


def test_marks_that_ask_for_what_is_done_anyway_are_accepted():
    """The assistant is trained on, the user is not."""
    user, assistant = {**HI_YO[0], "loss": False, "weight": 0}, {**HI_YO[1], "loss": True, "train": True, "weight": 1.0}
    dataset = load_dataset(encode_conversation, [write("a.jsonl", {"messages": [user, assistant]})], BYTES, 64)
    assert BYTES.decode(dataset[0][0]) == RENDERED


@pytest.mark.parametrize("encoding, name", [("utf-16", "UTF-16"), ("utf-32", "UTF-32")])
@pytest.mark.parametrize("text", ["hello\n", "白日依山盡，黃河入海流。"])
def test_utf_16_is_recognised_by_its_first_bytes(text, encoding, name):
    """Also where no byte of it is NUL, as in Chinese text."""
    for path in (write_text("a.txt", text, encoding), write_text("a.jsonl", json.dumps({"text": text}), encoding)):
        assert one_line(load_dataset, encode_text, [path], BYTES, 64) == (
            f"{path}:1: is {name}, not UTF-8; iconv -f {name} -t UTF-8 OLD > NEW converts such a file")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_without_first_bytes_nul_bytes_show_it(encoding):
    for path in (write_text("a.txt", "白日\n", encoding), write_text("a.jsonl", '{"text": "白日"}', encoding)):
        assert one_line(load_dataset, encode_text, [path], BYTES, 64).endswith(
            ":1: holds NUL bytes, as UTF-16 does; iconv -f UTF-16 -t UTF-8 OLD > NEW converts such a file")


def test_chinese_in_another_encoding_gets_the_command_that_converts_it():
    error = one_line(load_dataset, encode_text, [write_text("a.txt", "白日", "gb18030")], BYTES, 64)
    assert error == ("a.txt:1: not valid UTF-8 (byte 1 of the line); convert the file to UTF-8, a Chinese one perhaps "
                     "with iconv -f GB18030 -t UTF-8 OLD > NEW")


# --------------------------------------------------------------------------------------------------------- named once

def test_an_unknown_key_is_named_once_with_its_first_line(capsys):
    path = write("a.jsonl", {"text": "one", "id": 1, "url": "x"}, {"text": "two", "note": "a", "id": 2},
                 {"text": "three", "note": "b", "quality": 5})
    said = 'a.jsonl: unknown keys are ignored: "note" (line 2), "quality" (line 3)\n'
    for _ in range(2):  # the second time from the cache
        dataset = load_dataset(encode_text, [path], BYTES, 64)
        assert len(dataset) == 3 and capsys.readouterr().out.endswith(said)
    assert dataset.stats["unknown keys"] == [{"note": 2, "quality": 3}]
    assert len(list(read_records(path))) == 3
    assert capsys.readouterr().out == said


def test_the_keys_of_the_one_record_that_is_asked_for_are_named(capsys):
    """eval.py --tokens shows the first conversation of a file, to see how it is read."""
    path = write("a.jsonl", {"conversations": HI_YO, "note": 0}, {"conversations": HI_YO, "hint": 0})
    assert len(list(read_records(path, most=1))) == 1
    assert capsys.readouterr().out == 'a.jsonl: unknown keys are ignored: "note" (line 1)\n'


@pytest.mark.parametrize("record, said", [
    ({"conversations": HI_YO, "prompt": "Hm?"}, '"prompt" (line 1)'),
    ({"text": "a", "system": "Be brief.", "completion": "b"}, '"system" (line 1), "completion" (line 1)'),
    ({"chosen": HI_YO, "rejected": HI_YO, "messages": HI_YO, "note": 0}, '"messages" (line 1), "note" (line 1)'),
    ({"conversations": HI_YO, "label": 0, "note": 0}, '"note" (line 1)'),
])
def test_a_key_that_only_another_kind_of_record_has_is_unknown(capsys, record, said):
    list(read_records(write("a.jsonl", record)))
    assert f"a.jsonl: unknown keys are ignored: {said}" in capsys.readouterr().out


def test_the_messages_beside_a_pair_are_no_conversation():
    """UltraFeedback as it is published: to train on its messages, its pairs have to go."""
    record = {"prompt": "Hi", "messages": HI_YO, "chosen": HI_YO, "rejected": HI_YO}
    with pytest.raises(UserError, match=r'a.jsonl:1: no key "conversations", as "messages" beside .* remove these two'):
        load_dataset(encode_conversation, [write("a.jsonl", record)], BYTES, 64)


@pytest.mark.parametrize("text", ["<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
                                  "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"])
def test_a_prompt_in_the_format_of_a_template_is_refused_and_words_about_one_are_not(text):
    """It would be put into the template once more, its tokens spelled as ordinary text."""
    with pytest.raises(UserError, match='a.jsonl:1: "prompt" is written in the format of a chat template already'):
        list(read_records(write("a.jsonl", {"prompt": text, "answer": "1"})))
    read, = read_records(write("b.jsonl", {"prompt": "What does <|im_start|> mean?", "completion": "A turn."}))
    assert [message["content"] for message in read["conversations"]] == ["What does <|im_start|> mean?", "A turn."]


def test_the_level_of_a_question_may_be_a_number():
    """MATH-500."""
    (record,) = read_records(write("a.jsonl", {"problem": "1 + 1?", "answer": "2", "level": 2}))
    assert record["level"] == "2"


@pytest.mark.parametrize("encode, unread", [(encode_text, "conversations"), (encode_conversation, "text")])
def test_of_a_text_and_a_conversation_in_one_record_one_is_not_read(capsys, encode, unread):
    load_dataset(encode, [write("a.jsonl", {"text": "one", "conversations": HI_YO})], BYTES, 64)
    assert f'a.jsonl: unknown keys are ignored: "{unread}" (line 1)' in capsys.readouterr().out


def test_a_file_given_twice_is_blamed_for_its_own_keys(capsys):
    paths = [write("a.jsonl", {"text": "one"})] * 2 + [write("b.jsonl", {"text": "two", "x": 1})]
    load_dataset(encode_text, paths, BYTES, 64)
    assert capsys.readouterr().out.splitlines()[1:] == ['b.jsonl: unknown keys are ignored: "x" (line 1)']


@pytest.mark.parametrize("content, more", [("", {}), (" \n", {}), (None, {"tool_calls": "[]"}),
                                           ("", {"reasoning_content": "why"}), ("", {"reasoning_content": " "})])
def test_an_empty_reply_is_counted_and_does_not_teach_silence(capsys, content, more):
    silent = {"conversations": [HI_YO[0], {"role": "assistant", "content": content or "", **more}, *HI_YO]}
    dataset = load_dataset(encode_conversation, [write("a.jsonl", silent)], BYTES, 99)
    assert "; 1 empty replies, not trained on" in capsys.readouterr().out
    tokens, mask = dataset[0]
    assert BYTES.decode([token for token, trained in zip(tokens, mask) if trained]).strip() == "Yo<|im_end|>"
    assert one_line(load_dataset, encode_conversation, [write("b.jsonl", {"instruction": "Hi", "output": ""})], BYTES,
                    99).startswith("b.jsonl: nothing to train on (1 empty replies, not trained on; 1 without an ")


def test_each_file_has_a_line_of_its_own(capsys):
    paths = [write("a.jsonl", {"text": "one", "x": 1}), write("b.jsonl", {"text": "two"}),
             write("c.jsonl", {"text": "three"}, {"text": "four", "x": 1})]
    load_dataset(encode_text, paths, BYTES, 64)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ['a.jsonl: unknown keys are ignored: "x" (line 1)',
                         'c.jsonl: unknown keys are ignored: "x" (line 2)']


def test_several_processes_name_the_same_keys(capsys, monkeypatch):
    """A file is tokenised in chunks of about 260,000 characters, here in two processes."""
    path = write("a.jsonl", *({"text": "x" * 99_990, **more} for more in [{}] * 4 + [{"b": 1}] * 4 + [{"a": 1}]))
    monkeypatch.setattr(token_cache, "PARALLEL", 900_000)
    monkeypatch.setattr(token_cache, "allowed_threads", lambda: 2)
    workers_start_at_once(monkeypatch)
    load_dataset(encode_text, [path], BYTES, 200_000)
    assert 'a.jsonl: unknown keys are ignored: "b" (line 5), "a" (line 9)' in capsys.readouterr().out


def test_a_key_does_not_command_the_terminal(capsys):
    list(read_records(write("a.jsonl", {"text": "a", "\x1b[2J\nb": 1})))
    assert capsys.readouterr().out == 'a.jsonl: unknown keys are ignored: " [2J b" (line 1)\n'


@pytest.mark.parametrize("number, written", [
    ("1e16", "10000000000000000"), ("1e-7", "0.0000001"), ("2.50", "2.5"), ("7", "7")])
def test_an_answer_that_is_a_number_is_written_as_people_write_it(number, written):
    record, = read_records(write_text("a.jsonl", f'{{"prompt": "1 + 1?", "answer": {number}}}'))
    assert record["answer"] == written


def test_keys_of_messages_are_named_too_and_no_more_than_twenty(capsys):
    list(read_records(write("a.jsonl", {"messages": [{**HI_YO[0], "mood": "merry", "id": 7}, HI_YO[1]]})))
    assert capsys.readouterr().out == 'a.jsonl: unknown keys are ignored: "conversations: mood" (line 1)\n'
    list(read_records(write("b.jsonl", {"text": "a", **{f"key{i}": 0 for i in range(99)}})))
    said = capsys.readouterr().out
    assert '"key19" (line 1)' in said and "key20" not in said


# ------------------------------------------------------------------------------------------------ held out is held out

def test_an_evaluation_file_that_shares_conversations_is_counted(capsys):
    def talk(number):
        return {"conversations": [{"role": "user", "content": f"q{number}"}, HI_YO[1]]}

    train = write("train.jsonl", *(talk(i) for i in range(5)))
    shared, apart = write("shared.jsonl", talk(3), talk(4), talk(5)), write("apart.jsonl", talk(6))
    train_data, eval_data = load_split(encode_conversation, [train], shared, BYTES, 64, 0)
    assert (len(train_data), len(eval_data)) == (5, 3)
    assert "shared.jsonl: 2 of 3 held-out sequences are in the training data too; " in capsys.readouterr().out
    load_split(encode_conversation, [train], apart, BYTES, 64, 0)
    assert "held-out" not in capsys.readouterr().out


def test_an_evaluation_file_that_shares_pairs_is_counted(capsys):
    def pair(answer):
        return {"prompt": "Hi", "chosen": answer, "rejected": "No"}

    train, shared = write("train.jsonl", pair("a"), pair("b")), write("shared.jsonl", pair("b"), pair("c"))
    load_pairs([train], shared, BYTES, 64, 0)
    assert "shared.jsonl: 1 of 2 held-out pairs are in the training data too; " in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- messages that point to it

def test_folders_that_are_no_model_each_get_their_own_line(tmp_path):
    save_model("model")
    save_model("bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    (tmp_path / "adapter").mkdir()
    write("adapter/adapter_config.json", {"peft_type": "LORA"})
    (tmp_path / "empty").mkdir()

    checkpoint.require_stage("model")
    for folder, message in [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B does not exist; give a checkpoint folder (a model of the Hugging Face hub "
                            "is downloaded first: hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B)"),
        ("model/step9", "model/step9 does not exist; give a checkpoint folder"),
        ("model/model.safetensors", "model/model.safetensors is a file; give the folder that holds it, with "
                                    "config.json beside it"),
        ("adapter", "adapter holds an adapter, not a whole model; eval.py takes its base with --model and this with "
                    "--adapter; to train on, make a whole model: python -m minillm.peft adapter"),
        ("empty", "empty is no checkpoint folder: config.json is missing"),
        ("bare", "bare has no tokenizer.json; copy it from the model that this one was made of, or make it with "
                 "save_pretrained of transformers' AutoTokenizer"),
    ]:
        assert one_line(checkpoint.require_stage, folder) == message
        for script in (train_pretrain, train_sft, train_dpo):  # the model is looked at before the data
            assert one_line(script.main, script.Config(model=folder, data=["typo.jsonl"], device="cpu")) == message
        if folder != "adapter":
            assert one_line(evaluation.main, evaluation.Config(model=folder, device="cpu")) == message


def rewrite(path, change):
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    change(content)
    Path(path).write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("script", [train_pretrain, train_sft, train_dpo])
def test_a_model_is_looked_at_in_the_order_config_weights_tokenizer_chat_tokens(script):
    """Each repaired, the next one is named; the data file comes last, and nothing of it has been read by then."""
    config = script.Config(model="model", data=["typo.jsonl"], max_seq_len=64, device="cpu")
    save_model("model")
    tokenizer, weights = Path("model/tokenizer.json").read_bytes(), Path("model/model.safetensors").read_bytes()
    Path("model/tokenizer.json").unlink()
    write("model/vocab.json", {})
    os.rename("model/model.safetensors", "model/model-of-another-name.safetensors")
    rewrite("model/config.json", lambda content: content.update(model_type="mistral9"))

    assert 'model_type = "mistral9" is not supported' in one_line(script.main, config)
    rewrite("model/config.json", lambda content: content.update(model_type="qwen3", num_hidden_layers=2))
    assert one_line(script.main, config) == "model: model.safetensors is missing"
    Path("model/model.safetensors").write_bytes(weights)
    assert "the weights do not fit config.json: num_hidden_layers is 2" in one_line(script.main, config)
    rewrite("model/config.json", lambda content: content.update(num_hidden_layers=1))
    assert "model has vocab.json but no tokenizer.json" in one_line(script.main, config)
    Path("model/tokenizer.json").write_bytes(tokenizer.replace(b"<|im_end|>", b"<|im_END|>"))
    assert one_line(script.main, config).startswith("model: the tokenizer has no token <|im_end|>")
    Path("model/tokenizer.json").write_bytes(tokenizer)
    assert one_line(script.main, config) == "typo.jsonl: no such data file"


def test_a_reference_that_is_no_model_is_seen_before_the_data():
    save_model("model")
    config = train_dpo.Config(model="model", ref_model="nowhere", data=["typo.jsonl"], max_seq_len=64, device="cpu")
    assert one_line(train_dpo.main, config) == "nowhere does not exist; give a checkpoint folder"


@pytest.mark.parametrize("script", [train_pretrain, train_sft, train_dpo])
def test_rows_longer_than_the_context_are_refused(script):
    save_model("model", context=64)
    config = script.Config(model="model", data=["typo.jsonl"], max_seq_len=65, device="cpu")
    assert one_line(script.main, config) == ("--max_seq_len 65 is longer than the context of model, which is 64 tokens "
                                             "(max_position_embeddings); give at most that")
    config.max_seq_len = 64
    assert one_line(script.main, config) == "typo.jsonl: no such data file"


def test_a_stage_that_is_not_there_names_its_own_option(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PROJECT", tmp_path / "project")  # the project's own folder may have the stage
    assert one_line(checkpoint.require_stage, "out/reward", "out/reward", "train_reward.py", "--reward_model") == (
        "out/reward is not there yet: run python train_reward.py first, or give another --reward_model")
    (tmp_path / "out" / "sft.bak").mkdir(parents=True)
    assert one_line(checkpoint.require_stage, "out/sft", "out/sft", "train_sft.py") == (
        "out/sft is not there yet: run python train_sft.py first, or give another --model "
        "(out/sft.bak is an older run)")


def test_sft_says_that_an_older_pretrained_model_is_there(tmp_path, capsys):
    (tmp_path / "out" / "pretrain.bak").mkdir(parents=True)
    BYTES.save("tokenizer.json")
    one_line(train_sft.main, train_sft.Config(data=["typo.jsonl"], tokenizer="tokenizer.json", device="cpu"))
    assert capsys.readouterr().out == ("there is no out/pretrain, but an older run in out/pretrain.bak; "
                                       "--model out/pretrain.bak uses it\n")


def test_a_file_of_the_project_is_missed_in_another_folder(tmp_path):
    """The default paths are those of the project's folder; a file that is missing there too gets no such advice."""
    advice = advice_on_folder("data/sft.jsonl")
    assert advice.startswith("; run the command in the project's folder, ")
    assert one_line(check_file, "data/sft.jsonl") == "data/sft.jsonl: no such data file" + advice
    assert one_line(train_pretrain.main, train_pretrain.Config(device="cpu")) == (
        "data/tokenizer.json: there is no such tokenizer" + advice)
    assert advice_on_folder("data/typo.jsonl") == advice_on_folder(tmp_path / "sft.jsonl") == ""
    assert one_line(check_file, tmp_path) == f"{tmp_path}: is a folder; give the files in it"


# ------------------------------------------------------------------------------------------------------------ a pipe

@pytest.mark.parametrize("content, messages", [
    ("你好\n再见".encode(), ["你好", "再见"]),
    ("\ufeff你好\r\n".encode(), ["你好"]),
    ("你好\n".encode("gbk"), ["你好"]),
    ("你好\n".encode("gbk") + "再见\n".encode(), ["你好", "再见"]),
    (b"caf\xff\n", ["caf\ufffd"]),
    (b"", []),
])
def test_a_pipe_is_utf_8_unless_it_cannot_be(monkeypatch, content, messages):
    """As under a Chinese Windows, where the locale is GBK."""
    heard = []
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="gbk"))
    monkeypatch.setattr(evaluation, "speak", lambda *_: ("", False))
    monkeypatch.setattr(evaluation, "prepare", lambda model, tokenizer, said, cfg: (heard.append(said[-1]), said))
    assert evaluation.chat(None, None, evaluation.Config(chat=True), "cpu") == {"turns": len(messages)}
    assert [message["content"] for message in heard] == messages


def test_a_chat_without_standard_input_ends_quietly(monkeypatch, capsys):
    closed = io.StringIO()
    closed.close()
    for stdin in (None, closed):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert evaluation.chat(None, None, evaluation.Config(chat=True), "cpu") == {"turns": 0}
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_an_answer_with_weight_0_is_read_and_not_learned: `"weight": 1}` -> `"weight": 0}`. Nothing is left to learn:
#    an empty batch, or a line?
# 2. test_an_evaluation_file_that_shares_conversations_is_counted: `talk(3), talk(4), talk(5))` -> `talk(3), talk(3),
#    talk(5))`. How many of three are counted?
