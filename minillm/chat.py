"""Chat formats: a conversation as text, in pieces of which some are trained on.

A format is a row of a small table (ChatFormat). Which one a tokenizer gets is read off its special tokens and off the
chat template beside it; the template itself, a program in the language Jinja, is never run. `render` writes what the
template would write. It builds the loss mask while it writes, and keeps a message's text apart from the format's own.

    CHATML    <|im_start|>role\\ncontent<|im_end|>\\n                        tokenizers that are trained here
    SMOLLM2   the same, with a default system message                      (Qwen2 has another default)
    QWEN25    also: answers of tools as turns of the user                  Qwen2.5; Qwen3 of July 2025 has no default
    QWEN3     also: think text, which only the turns after the last question keep
    LLAMA3    <|start_header_id|>role<|end_header_id|>\\n\\ncontent<|eot_id|>, after <|begin_of_text|>

A message is {"role", "content"}. An assistant may also have "reasoning_content" (think text) and "tool_calls" (a list
of {"name", "arguments"}), and is not trained on where "train" is False. A first message of the role "tools" holds, as
JSON text, the list of the tools that may be called. All formats write them in the notation of Qwen.
"""

import hashlib
import json
import re
from typing import NamedTuple

from minillm.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
EMPTY_THINK = "<think>\n\n</think>\n\n"
TOOLS = ("# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
         "You are provided with function signatures within <tools></tools> XML tags:\n<tools>{}\n</tools>\n\n"
         "For each function call, return a json object with function name and arguments within "
         "<tool_call></tool_call> XML tags:\n<tool_call>\n"
         '{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>')


class ChatFormat(NamedTuple):
    """A conversation is `first`, then for each turn: start, role, header_end, content, end, after."""

    name: str
    first: str = ""
    start: str = IM_START
    header_end: str = "\n"
    end: str = IM_END
    after: str = "\n"
    default_system: str = ""  # where a conversation has no system message
    tools_as_user: bool = False  # answers of tools are turns of the user, several in a row a single turn
    think: bool = False  # the last turn always has a think block; one may also stand in the content
    trim: bool = False  # content is stripped of white space


CHATML = ChatFormat("ChatML")
SMOLLM2 = ChatFormat("ChatML with a default system message",
                     default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face")
QWEN25 = ChatFormat("Qwen2.5", tools_as_user=True,
                    default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
QWEN3 = ChatFormat("Qwen3", tools_as_user=True, think=True)
LLAMA3 = ChatFormat("Llama 3", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", "",
                    trim=True)

# Chat templates whose text these formats write, by `fingerprint`.
KNOWN = {
    "f950548988e50713": CHATML,  # the plainest one
    "bf0c34b1af07f37d": SMOLLM2,  # and Qwen2, with its own default
    "7b38da0303a45315": QWEN25,
    "edcd73b0e30a780c": QWEN3,
    "2df317a15cbc983d": QWEN3,  # its first version
    "aa39eed4cbfdd57a": QWEN3._replace(name="Qwen3 without think blocks", think=False),  # Instruct-2507
    "ba03a121d097859c": LLAMA3,
    "b48c47f644389271": LLAMA3,  # its first version, which always ends with the prompt for a reply
}

# The default system message in a template for ChatML; the settings at the start of one that `template_of` wrote.
_DEFAULT_SYSTEM = re.compile(r"(?<=<\|im_start\|>system\n)[^<>{}|'+]+(?=<\|im_end\|>)")
_SETTINGS = re.compile(r'\{%- set default_system = (".*?") %\}\{%- set tools_as_user = (true|false) %\}'
                       r"\{%- set think = (true|false) %\}\n")


class Piece(NamedTuple):
    """Some text of a conversation. special: it is one control token. trained: the model learns to write it."""

    text: str
    special: bool = False
    trained: bool = False


def fingerprint(template: str) -> str:
    """A hash of a chat template, whatever default system message it has."""
    return hashlib.sha256(_DEFAULT_SYSTEM.sub("", _plain(template)).encode()).hexdigest()[:16]


def _plain(template):
    return template.replace("\\n", "\n").replace("\r\n", "\n").strip()


def choose_format(added, template: str = "") -> tuple:
    """(the format of a tokenizer, whether it writes what the template would).

    added: the texts of the tokenizer's added tokens. template: the Jinja template beside it, if there is one.
    """
    known = KNOWN.get(fingerprint(template))
    if LLAMA3.end in added and IM_END not in added:
        return LLAMA3, not template or known == LLAMA3 or template == template_of(LLAMA3)
    if not template:
        by_token = {"<think>": QWEN3, "<tool_call>": QWEN25, "<repo_name>": SMOLLM2}
        return next((chat for token, chat in by_token.items() if token in added), CHATML), True
    if settings := _SETTINGS.match(template):
        chat = CHATML._replace(default_system=json.loads(settings[1]), tools_as_user=settings[2] == "true",
                               think=settings[3] == "true")
        return chat, template == template_of(chat)
    default = _DEFAULT_SYSTEM.search(_plain(template))
    chat = known or CHATML._replace(tools_as_user="<tool_response>" in template, think="<think>" in template)
    return chat._replace(default_system=default[0] if default else ""), known is not None


def check_message(message, number: int) -> tuple:
    """(role, content) of the message with this number (from 1). Raises UserError."""
    if not isinstance(message, dict):
        raise UserError(f"message {number} must have a role and content, but is a {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise UserError(f"message {number} has the role {role!r}; known are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise UserError(f"message {number} has content that is not text, but {type(content).__name__}")
    return role, content


def last_question(messages: list) -> int:
    """The index of the last message of a user; without one, that of the last message. An answer of a tool that is
    written as a user's message does not count."""
    for i in reversed(range(len(messages))):
        content = messages[i]["content"]
        wrapped = content.startswith("<tool_response>") and content.endswith("</tool_response>")
        if messages[i]["role"] == "user" and not wrapped:
            return i
    return len(messages) - 1


def split_think(message: dict) -> tuple:
    """(think text, content) of an assistant's message that may hold its think text within its content."""
    reasoning, content = message.get("reasoning_content"), message["content"]
    if reasoning is None and "</think>" in content:
        before, *_, content = content.split("</think>")
        return before.rstrip("\n").split("<think>")[-1].lstrip("\n"), content.lstrip("\n")
    return reasoning or "", content


def thought_and_said(chat: ChatFormat, message: dict) -> tuple:
    """(think text, content) of an assistant's message as this format has them: only where it has think blocks is such
    text within the content taken out of it."""
    return split_think(message) if chat.think else (message.get("reasoning_content") or "", message["content"])


def without_think(text: str) -> str:
    """A reply without the think text before it, as it stands in the history of a chat."""
    return re.sub(r"\A\s*<think>.*?(</think>\s*|\Z)", "", text, flags=re.S)


def write_calls(calls: list, after_content: bool) -> str:
    """An assistant's calls of tools, as they follow its content."""
    texts = []
    for call in calls:
        arguments = call["arguments"]
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        texts.append(f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {arguments}}}\n</tool_call>')
    return ("\n" if texts and after_content else "") + "\n".join(texts)


def write_tools(tools: list) -> str:
    """The part of the system message that lists the tools."""
    return TOOLS.format("".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools))


def render(chat: ChatFormat, messages: list, add_generation_prompt: bool = False, thinking: bool = True) -> list:
    """A conversation as a list of Pieces. Raises UserError for an unknown role and for content that is not text.

    The prompt for a reply consists of the first pieces of the conversation with that reply. thinking: the reply begins
    with the think block, where the format has one; otherwise an empty block is part of the prompt, and is not trained.
    """
    messages, tools = list(messages), []
    if messages and isinstance(messages[0], dict) and messages[0].get("role") == "tools":
        tools = json.loads(messages.pop(0)["content"])
    checked = [check_message(message, number) for number, message in enumerate(messages, 1)]
    pieces = [Piece(chat.first, special=True)] if chat.first else []
    *header_end, gap = re.split(r"(?<=>)", chat.header_end)  # ["<|end_header_id|>", "\n\n"], or just ["\n"]

    def add_header(role, content=""):  # the content of all but an assistant is encoded together with the line end
        pieces.append(Piece(chat.start, special=True))
        if header_end:
            pieces.extend([Piece(role), Piece(header_end[0], special=True), Piece(gap + content)])
        else:
            pieces.append(Piece(role + gap + content))

    def add_end(trained=False):
        pieces.append(Piece(chat.end, special=True, trained=trained))
        if chat.after:
            pieces.append(Piece(chat.after))

    system = None
    if checked and checked[0][0] == "system":
        system = checked[0][1]
    elif checked and chat.default_system:
        system = chat.default_system
    if tools:
        system = ("" if system is None else system + "\n\n") + write_tools(tools)
    if system is not None:
        add_header("system", system.strip() if chat.trim else system)
        add_end()

    question = last_question(messages)
    for i, (role, content) in enumerate(checked):
        if role == "system" and i == 0:
            continue
        if role == "tool" and chat.tools_as_user:
            answer = f"<tool_response>\n{content}\n</tool_response>"
            if i and checked[i - 1][0] == "tool":
                pieces[-1] = Piece(f"{pieces[-1].text}\n{answer}")  # the turn is still open
            else:
                add_header("user", answer)
            if i + 1 == len(checked) or checked[i + 1][0] != "tool":
                add_end()
            continue
        if role != "assistant":
            add_header(role, content.strip() if chat.trim else content)
            add_end()
            continue
        trained, block, last = messages[i].get("train", True), "", i + 1 == len(checked)
        reasoning, content = thought_and_said(chat, messages[i])
        calls = write_calls(messages[i].get("tool_calls") or [], after_content=bool(content))
        if i > question and (reasoning or chat.think and last):
            block, content = f"<think>\n{reasoning.strip(chr(10))}\n</think>\n\n", content.lstrip("\n")
        add_header("assistant")
        if block == EMPTY_THINK:
            pieces.append(Piece(block, trained=trained and thinking))
            block = ""
        text = block + content + calls
        pieces.append(Piece(text.strip() if chat.trim else text, trained=trained))
        add_end(trained)
    if add_generation_prompt:
        add_header("assistant")
        if chat.think and not thinking:
            pieces.append(Piece(EMPTY_THINK))
    return pieces


def lost_think(messages: list, chat: ChatFormat = CHATML) -> int:
    """How many turns of an assistant lose their think text in `render`: those before the last question, or all of a
    conversation without one."""
    return sum(bool(thought_and_said(chat, message)[0]) for message in messages[:last_question(messages) + 1]
               if message["role"] == "assistant")


# --------------------------------------------------- the template ---------------------------------------------------

def template_of(chat: ChatFormat) -> str:
    """What `render` does, in the language of transformers' apply_chat_template."""
    if chat.header_end != "\n":
        first, start, header_end, end = (text.replace("\n", r"\n") for text in chat[1:5])
        turn = f"{{{{ '{start}' + message['role'] + '{header_end}' + message['content'] | trim + '{end}' }}}}"
        prompt = f"{{% if add_generation_prompt %}}{{{{ '{start}assistant{header_end}' }}}}{{% endif %}}"
        return f"{first}{{% for message in messages %}}{turn}{{% endfor %}}{prompt}"
    before, after = (json.dumps(part.replace("{{", "{").replace("}}", "}")) for part in TOOLS.split("{}"))
    settings = (f"{{%- set default_system = {json.dumps(chat.default_system)} %}}"
                f"{{%- set tools_as_user = {str(chat.tools_as_user).lower()} %}}"
                f"{{%- set think = {str(chat.think).lower()} %}}\n")
    return settings + CHATML_TEMPLATE.replace("BEFORE_TOOLS", before).replace("AFTER_TOOLS", after)


CHATML_TEMPLATE = r"""
{%- set ns = namespace(question=messages|length - 1, content='', reasoning='', open=false) %}
{%- for message in messages %}
    {%- if message.role == 'user' and not (message.content.startswith('<tool_response>') and
            message.content.endswith('</tool_response>')) %}
        {%- set ns.question = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- set has_system = messages and messages[0].role == 'system' %}
{%- set system = messages[0].content if has_system else default_system if messages else '' %}
{%- if has_system or system or tools %}
    {{- '<|im_start|>system\n' + system }}
    {%- if tools %}
        {{- '\n\n' if has_system or system else '' }}
        {{- BEFORE_TOOLS }}
        {%- for tool in tools %}
            {{- '\n' }}{{- tool | tojson }}
        {%- endfor %}
        {{- AFTER_TOOLS }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' and tools_as_user %}
        {{- '' if ns.open else '<|im_start|>user' }}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- set ns.open = not loop.last and messages[loop.index0 + 1].role == 'tool' %}
        {{- '' if ns.open else '<|im_end|>\n' }}
    {%- elif message.role != 'assistant' %}
        {%- if not (loop.first and has_system) %}
            {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
        {%- endif %}
    {%- else %}
        {%- set ns.content = message.content or '' %}
        {%- set ns.reasoning = message.reasoning_content or '' %}
        {%- if think and message.reasoning_content is not string and '</think>' in ns.content %}
            {%- set ns.reasoning = ns.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set ns.content = ns.content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.question and (ns.reasoning or (think and loop.last)) %}
            {{- '<think>\n' + ns.reasoning.strip('\n') + '\n</think>\n\n' + ns.content.lstrip('\n') }}
        {%- else %}
            {{- ns.content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- set called = call.function or call %}
            {{- '\n' if ns.content or not loop.first else '' }}
            {{- '<tool_call>\n{"name": "' + called.name + '", "arguments": ' }}
            {{- called.arguments if called.arguments is string else called.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if think and enable_thinking is defined and not enable_thinking %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}""".lstrip("\n")
