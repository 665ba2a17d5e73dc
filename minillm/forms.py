"""The forms in which people write conversations and pairs of answers, each turned into the one that is trained on.

    {"conversations": [message, ...]}                       a conversation, or a prompt for reinforcement learning
    {"prompt": [message, ...], "chosen": [message, ...], "rejected": [message, ...]}        a pair of answers

A message is {"role", "content"}, with "reasoning_content", "tool_calls" and "train": False where they apply (chat.py).
data/README.md has a table of the forms. What changes the lesson and is not understood raises UserError, with file and
line.
"""

import contextlib
import json
import math
import re
from decimal import Decimal

from minillm.errors import UserError
from minillm.verify import is_verifiable

# Other names of the roles: ShareGPT, OpenAI, Llama 3, OpenAssistant.
ROLE_NAMES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
              "model": "assistant", "developer": "system", "function": "tool", "observation": "tool", "ipython": "tool"}
CONVERSATIONS = ("conversations", "messages", "conversation")
QUESTIONS = ("instruction", "question", "problem", "query", "prompt", "input")
ANSWERS = ("output", "completion", "response", "answer", "solution")
BESIDE = ("input", "context", "passage", "article")  # what a question is about
# Nothing reads these; where one is filled, its content would be lost silently.
UNREAD_IN_MESSAGE = ("images", "image", "image_url", "videos", "video", "audios", "audio")
UNREAD = (*UNREAD_IN_MESSAGE, "history")
BAD = ("false", "-1", "-1.0", "undesirable", "bad")  # labels of an answer that nobody should learn
LETTERS = list("ABCDEFGHIJ")  # of the choices of a question
WEIGHTS = ("weight", "loss_weight", "loss", "train", "training", "trainable", "train_on_turn")  # of a message
# Of parts of a message.
MASKS = ("loss_mask", "loss_masks", "mask", "masked", "train_on_input", "train_detail", "training_detail")
# A conversation as text, in Anthropic's HH-RLHF and in copies of it; how it begins, and where a turn does.
HH = re.compile(r"\s*(System|Human):(?s:.*)\n\nAssistant:|\n\n(Human|Assistant):")
HH_TURN = re.compile(r"(?:\A\s*|\n\n(?!System))(System|Human|Assistant):")
BELLE = re.compile(r"\s*Human:(?s:.*)\nAssistant:\s*\Z")  # one whose turns may begin after a single line end
BELLE_TURN = re.compile(r"(?:\A\s*|\n\s*)(Human|Assistant):")
RENDERED = re.compile(r"\A\s*(<\|(im_start|begin_of_text|start_header_id|user|system|assistant)\|>|<start_of_turn>|"
                      r"(<s>\s*)?\[INST\])|(<\|(im_end|eot_id)\|>|<end_of_turn>|</s>)\s*\Z")
HH_ROLES = {"System": "system", "Human": "user", "Assistant": "assistant"}


def normalise(record: dict, where: str) -> dict:
    """A record in the form above; `where` ("file:line") begins the message of the UserError. A text stays a text."""
    empty = {*CONVERSATIONS, *QUESTIONS, "chosen", "rejected", "choices", "options"}  # columns of a merged table
    record = {key: value for key, value in record.items() if value is not None or key not in empty}
    check_marks(record, where)
    for side in ("chosen", "rejected"):
        if f"{side}_response" in record and side not in record:
            record[side] = record.pop(f"{side}_response")
    if type(record.get("answer")) in (int, float):
        record["answer"] = digits_of(record["answer"], where)
    if type(record.get("level")) is int:  # MATH-500
        record["level"] = str(record["level"])
    check_choice(record, where)
    name = next((name for name in CONVERSATIONS if name in record), None)
    if name and isinstance(record[name], str) and record[name].lstrip().startswith("["):
        record[name] = parsed(record[name], f'"{name}"', where)  # a column of a CSV file
    if name and "rejected" in record and "chosen" not in record and "prompt" not in record and answered(record[name]):
        *record["prompt"], last = record.pop(name)  # ms-swift: what was chosen is the end of the conversation
        record["chosen"] = [last]
    if "chosen" in record or "rejected" in record:
        pair_of(record, where)
        names = ("prompt", "chosen", "rejected")
    else:
        if name:
            record["conversations"] = record.pop(name)
        else:
            conversation_of(record, where)
        names = ("conversations",)
    for name in names:
        if isinstance(record.get(name), list):
            record[name] = messages_of(record[name], f'{where}: message {{}} of "{name}"')
    if any(name in record for name in names):
        put_in_front(record, names, where)
        for key in UNREAD:
            check_empty(record, key, where)
    return record


def answered(messages) -> bool:
    """Whether this is a list of messages that ends with one of the assistant's."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    role = last.get("role") or last.get("from") if isinstance(last, dict) else None
    return isinstance(role, str) and ROLE_NAMES.get(role, role) == "assistant"


def digits_of(answer, where: str) -> str:
    """A number as people write it, which str() does not do from 1e16 on and below 0.0001. Raises UserError for NaN."""
    if isinstance(answer, float) and not math.isfinite(answer):
        raise UserError(f'{where}: "answer" is {answer}, which no reply can match; leave the key out where there is no '
                        "right answer")
    return f"{Decimal(str(answer)):f}"


def check_marks(record: dict, where: str):
    """Raise UserError for a record that is marked as bad, that is to count more or less than others, or with a mask."""
    check_masks(record, where)
    replies = ANSWERS[:3]
    answered = "text" not in record or any(name in record for name in (*replies, *CONVERSATIONS))
    for key in ("label", "kto_tag"):
        label = str(record.get(key)).lower()
        # Beside other keys 0 can be the number of a category. In Parquet, false is 0.
        if answered and label in BAD or label in ("0", "0.0") and any(name in record for name in replies):
            raise UserError(f'{where}: "{key}" is {json.dumps(record[key])}: this answer is a bad example, as in data '
                            "for KTO, which minillm does not have; keep the records whose label is true, or make pairs "
                            "of chosen and rejected (or remove the key, if it means something else)")
    for key in ("weight", "sample_weight", "loss_weight", "loss", "train"):
        if key in record and (record[key] not in (None, 1) or isinstance(record[key], str)):
            raise UserError(f'{where}: "{key}": {json.dumps(record[key])[:80]} of a whole record is not supported: all '
                            "records count the same; remove the record, or the key")


def check_choice(record: dict, where: str):
    """Raise UserError for an answer that is the number or the letter of a choice: a prompt does not hold the choices.
    """
    answer, choices = record.get("answer"), record.get("choices") or record.get("options")
    if isinstance(choices, str):
        with contextlib.suppress(ValueError, RecursionError):
            choices = json.loads(choices)
    if isinstance(choices, dict):
        choices = list(choices.values())
    named = [record[letter] for letter in LETTERS[:5] if record.get(letter) is not None]  # C-Eval
    choices = choices or (named if len(named) > 1 else [])
    if not isinstance(answer, str) or not isinstance(choices, list) or not choices:
        return
    words = [str(choice).strip() for choice in choices]
    most = len(words) + 1  # they may be the other ones alone
    number = answer.isdecimal() and int(answer) <= most and not any(word.isdecimal() for word in words)
    letter = answer.upper() in LETTERS[:most] and not any(len(word) == 1 for word in words)
    if number or letter:
        raise UserError(f'{where}: "answer" is the {"number" if number else "letter"} of a choice; write the words of '
                        "the right answer")


def check_masks(found: dict, where: str):
    """Raise UserError for a record or a message that says which of its parts to train on."""
    for key in MASKS:
        if found.get(key) is not None:
            raise UserError(f'{where}: "{key}" is not supported; give a message of the assistant "train": false to '
                            "leave it out, and remove the key")


def check_empty(found: dict, key: str, where: str):
    """Raise UserError if this key is filled: nothing reads it."""
    if found.get(key):
        raise UserError(f'{where}: "{key}" is not supported; write it into the content of a message, or remove it')


# A question and its answer.

def conversation_of(record: dict, where: str):
    """Replace a question, and its answer if there is one, by "conversations"."""
    question = next((name for name in QUESTIONS if name in record), None)
    # Beside a "prompt" an "answer" is what a reply is checked against.
    names = ANSWERS[:3] if question == "prompt" else ANSWERS
    answer = next((name for name in names if record.get(name)), None) or next(
        (name for name in names if record.get(name) is not None), "output" if "output" in record else None)
    if question is None or answer is None and (question == "input" or "text" in record):
        return
    if answer == "answer" and record.get("solution"):
        answer = "solution"
    reply = record[answer] if answer else None
    if answer == "answer":
        if not isinstance(reply, str) or not is_verifiable(reply):
            del record["answer"]  # prose, which no reply can be checked against
    elif answer:
        del record[answer]
    messages = question_of(record, question, where)
    del record[question]
    if answer:
        messages = messages + as_messages(reply, "assistant", where, answer)
    record["conversations"] = messages


def question_of(record: dict, name: str, where: str) -> list:
    """The messages of a question: earlier turns, and what belongs to it on a new line, both taken out of the record."""
    question = record[name]
    extra = [part for part in (record.pop(key, None) for key in BESIDE if key != name) if part]
    if extra:
        for part in (question, *extra):
            if not isinstance(part, str):
                raise UserError(f'{where}: "{name}" and what belongs to it must be text, not {type(part).__name__}')
        question = "\n".join([question, *extra] if question else extra)
    turns, history = [], record.pop("history", None) or []
    for turn in history if isinstance(history, list) else [history]:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(part, str) for part in turn)):
            raise UserError(f'{where}: "history" must be a list of [question, answer]')
        turns += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return turns + as_messages(question, "user", where, name)


def as_messages(value, role: str, where: str, name: str) -> list:
    """Text as a message of this role (as in HH-RLHF: as several); messages as they are. Raises UserError."""
    if isinstance(value, str):
        if is_hh(value):
            value = value.replace("\r\n", "\n")
            _, *parts = (HH_TURN if HH.match(value) else BELLE_TURN).split(value)
            messages = [{"role": HH_ROLES[who], "content": text.strip()} for who, text in zip(parts[::2], parts[1::2])]
            if messages[-1] == {"role": "assistant", "content": ""}:  # the place of the answer
                messages.pop()
            return messages
        if RENDERED.search(value):
            raise UserError(f'{where}: "{name}" is written in the format of a chat template already '
                            f"({RENDERED.search(value)[0].strip()}); give the messages themselves")
        return [{"role": role, "content": value}]
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list):
        raise UserError(f'{where}: "{name}" must be text or a list of messages, not {type(value).__name__}')
    if not all(isinstance(message, dict) and ("role" in message or "from" in message) for message in messages):
        shown = json.dumps(value, ensure_ascii=False)[:80]
        raise UserError(f'{where}: "{name}" must be text or messages, not {shown}; of a table by columns make one '
                        "object per row")
    return messages


def is_hh(text) -> bool:
    """Whether this is a conversation as HH-RLHF writes it."""
    text = text.replace("\r\n", "\n") if isinstance(text, str) else ""
    return HH.match(text) is not None or BELLE.match(text) is not None


# Pairs of answers.

def pair_of(record: dict, where: str):
    """Make messages of both sides of a pair, and put what stands for the prompt under "prompt"."""
    sides = [side for side in ("chosen", "rejected") if side in record]
    named = next((name for name in (*CONVERSATIONS, *QUESTIONS) if name in record), None)
    for side in sides:
        whole = is_hh(record[side])
        if isinstance(record[side], str) and not whole and named and is_hh(record[named]):
            record[side] = record[side].strip()  # as in an answer that stands after its prompt in one text
        if isinstance(record[side], str) and not whole and not named:
            raise UserError(f'{where}: nothing stands before the answer in "{side}"; put the question under "prompt"')
        record[side] = as_messages(record[side], "assistant", where, side)
    first = (record.get("chosen") or [{}])[0]
    role = first.get("role", first.get("from")) if isinstance(first, dict) else None
    if "prompt" in record:
        record["prompt"] = question_of(record, "prompt", where)
    elif named and role not in ("system", "user", "human", "developer"):
        if named in CONVERSATIONS:
            record["prompt"] = as_messages(record.pop(named), "user", where, named)
        else:
            record["prompt"] = question_of(record, named, where)
            del record[named]


# Messages.

def messages_of(messages: list, where: str) -> list:
    """Messages in the form above. `where` has a place {} for the number. Those that are no objects stay as they are."""
    result, tools = [], None
    for number, message in enumerate(messages, 1):
        if isinstance(message, dict):
            message = message_of(message, where.format(number))
            if found := message.pop("tools", None):
                found = tools_message(found, where.format(number))
                if tools not in (None, found):
                    raise UserError(f'{where.format(number)} has other "tools" than one before it; keep one list')
                tools = found
        result.append(message)
    return [tools, *result] if tools else result


def message_of(message: dict, where: str) -> dict:
    """One message in the form above; the tools that it lists stay under "tools"."""
    message = {key: value for key, value in message.items() if value is not None or key not in ("from", "value")}
    if {"from", "value"} <= set(message) and message.get("role") is None:
        message["role"], message["content"] = message.pop("from"), message.pop("value")
    role, calls = message.get("role"), None
    if role == "function_call":  # ShareGPT: the call is the content
        role, calls = "assistant", message.get("content")
        message["content"] = ""
    if isinstance(role, str):
        role = message["role"] = ROLE_NAMES.get(role, role)
    calls = [found for found in (calls, message.pop("tool_calls", None), message.pop("function_call", None)) if found]
    reasoning = [message.pop(key) for key in ("reasoning_content", "reasoning", "thinking")
                 if message.get(key) is not None]
    for what, found in (("the calls of tools", calls), ("the think text", reasoning)):
        if any(other != found[0] for other in found[1:]):
            raise UserError(f"{where} has {what} under two keys, and they differ; keep one of them")
    calls = calls_of(calls[0], where) if calls else None
    check_masks(message, where)
    for key in UNREAD_IN_MESSAGE:
        check_empty(message, key, where)
    if isinstance(message.get("content"), list):
        message["content"] = "".join(text_of(part, where) for part in message["content"])
    if reasoning and str(message.get("content")).lstrip().startswith("<think>"):
        before, _, after = message["content"].partition("</think>")
        if reasoning[0] == "":  # it is in the content alone
            reasoning = []
        elif before.replace("<think>", "", 1).strip() != str(reasoning[0]).strip():
            raise UserError(f"{where} has think text under a key and other think text in its content; keep one of them")
        else:
            message["content"] = after.lstrip("\n")
    if role != "assistant":
        for key, value in (("tool_calls", calls), ("reasoning_content", any(reasoning))):
            if value:
                raise UserError(f'{where}: only an assistant\'s message may have "{key}"')
    else:
        if reasoning:
            if not isinstance(reasoning[0], str):
                raise UserError(f'{where}: "reasoning_content" must be text, not {type(reasoning[0]).__name__}')
            message["reasoning_content"] = reasoning[0]
        if calls:
            message["tool_calls"] = calls
        if message.get("content") is None and (calls or any(reasoning)):
            message["content"] = ""
    read_weight(message, where)
    return message


def text_of(part, where: str) -> str:
    """The text of a part of a message's content, {"type": "text", "text": ...}."""
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise UserError(f"{where} has a part of the kind {kind!r}; only text is supported")


def parsed(value, what: str, where: str):
    """The value itself, or what the JSON text in it says."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: {what} is not JSON: {value[:80]!r}") from None


def calls_of(calls, where: str) -> list:
    """Calls of tools as [{"name", "arguments"}, ...]."""
    calls = parsed(calls, "the call of a tool", where)
    result = []
    for call in calls if isinstance(calls, list) else [calls]:
        inner = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or "arguments" not in inner:
            raise UserError(f'{where}: a call of a tool must be {{"name": ..., "arguments": ...}}, '
                            f"not {json.dumps(call, ensure_ascii=False)[:80]}")
        name, arguments = inner["name"], inner["arguments"] if inner["arguments"] != "" else {}
        parsed(arguments, f'"arguments" of the call of {name[:40]!r}', where)
        if json.dumps(name, ensure_ascii=False) != f'"{name}"':  # it is written into JSON as it is
            raise UserError(f"{where}: {name[:40]!r} cannot be the name of a tool")
        result.append({"name": name, "arguments": arguments})
    return result


def tools_message(tools, where: str) -> dict:
    """The message of the role "tools" that lists them."""
    tools = parsed(tools, '"tools"', where)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f'{where}: "tools" must be a list of objects, or that as JSON text')
    return {"role": "tools", "content": json.dumps(tools, ensure_ascii=False)}


def read_weight(message: dict, where: str):
    """Replace "weight", "loss" and "train" by "train": False where an assistant's message is not to be trained on."""
    assistant = message.get("role") == "assistant"
    marks = {key: message.pop(key) for key in WEIGHTS if key in message}
    for key, value in marks.items():
        if value is None or not assistant and (key == "weight" or value == 0):
            continue
        if not assistant or isinstance(value, str) or value not in (0, 1):
            raise UserError(f'{where} has "{key}": {json.dumps(value)[:80]}; not supported: an assistant\'s message is '
                            "trained on (1, true) or not (0, false), and no other one is; remove the key")
        if not value:
            message["train"] = False


def put_in_front(record: dict, names: tuple, where: str):
    """Move "tools" and "system" from beside the messages in front of them."""
    tools = parsed(record.pop("tools", None) or record.pop("functions", None) or [], '"tools"', where)
    tools = [tools_message(tools, where)] if tools else []
    system = record.pop("system", None) or record.pop("system_prompt", None) or ""
    if not isinstance(system, str):
        raise UserError(f'{where}: "system" must be text, not {type(system).__name__}')
    for name in names:
        messages = record.get(name)
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            continue  # not well formed: the check of messages says so
        roles = [message.get("role") for message in messages]
        if name in ("chosen", "rejected") and roles[0] in ("assistant", "tool"):
            continue  # an answer; what stands before it is in the prompt
        if tools and roles[0] == "tools":
            if messages[0] != tools[0]:
                raise UserError(f'{where}: "tools" stand beside the messages and in one of them; keep one list')
            messages = messages[1:]
        own_tools = messages[:1] if messages[0].get("role") == "tools" else []
        messages = messages[len(own_tools):]
        said = [message.get("content") for message in messages[:1] if message.get("role") == "system"]
        if system and said and said != [system]:
            raise UserError(f'{where}: "system" stands beside messages that have a system message; keep one of them')
        front = [{"role": "system", "content": system}] if system and not said else []
        record[name] = [*tools, *own_tools, *front, *messages]
