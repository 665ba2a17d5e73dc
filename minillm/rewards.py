"""Where rewards come from: the right answer, a reward model, an AI judge, or a function in a user's file.

A reward source scores a whole batch `[(messages, answers, example), ...]`: for each prompt its messages, the answers
sampled for it and its line of the data file, as forms.py reads it (a "solution" beside a "problem" is the last message
of its "conversations"). It returns one float per answer, in order. So a model can score the answers to all prompts
together. A function in a user's file sees one prompt at a time, like `answer_reward` here: it takes
`(messages, answers, example)` and returns one number per answer.
"""

import contextlib
import copy
import importlib.util
import inspect
import math
import os
import re
import sys
import traceback
from collections import Counter

import torch

from minillm import runtime
from minillm.chat import without_think
from minillm.checkpoint import check_tokenizer, load_model
from minillm.errors import UserError, is_out_of_memory
from minillm.generate import generate
from minillm.heads import load_reward_model
from minillm.tokenizer import Tokenizer
from minillm.verify import extract_answer, is_correct, question_of

FORMAT_CREDIT = 0.1
LARGEST = 1e15  # of a score: its square, of which a group's standard deviation is made, must fit float32


def answer_reward(messages, answers, example):
    """1 for the right answer, FORMAT_CREDIT for a reply that commits to one wrong answer of the right kind, else 0.

    The credit cannot be farmed: it is paid once, for one answer. Raises UserError if the example has no answer.
    """
    question, scores = question_of(messages), []
    if example.get("answer") is None:
        raise UserError(f'a prompt without "answer" cannot be checked: {question[:60]!r} (use another reward)')
    for answer in answers:
        committed = extract_answer(answer, example, question) is not None
        scores.append(1.0 if is_correct(answer, example, question) else FORMAT_CREDIT if committed else 0.0)
    return scores


# --------------------------------------------------------------------------------------------- rewards from a model
# A model reads text with its own tokenizer, so the policy may have a different one.

@torch.no_grad()
def _in_batches(score, sequences, device, batch_size=128):
    """score(tokens (N, T), lengths (N,)) -> (N,) for sequences of token ids, in batches padded on the right."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))  # similar lengths together: little padding
    scores = [0.0] * len(sequences)
    for start in range(0, len(order), batch_size):
        rows = order[start:start + batch_size]
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(sequences[i]) for i in rows], batch_first=True)
        lengths = torch.tensor([len(sequences[i]) for i in rows])
        for i, value in zip(rows, score(tokens.to(device), lengths.to(device)).tolist()):
            scores[i] = value
    return scores


def model_reward(folder, device="cpu"):
    """The reward source of a reward model's folder: its score at the <|im_end|> that closes the answer (heads.py).

    It is frozen, so its layers are held, and computed, in bf16 where the device has it. The head stays float32.
    Raises UserError for a folder without a reward model, and for more tokens than its context.
    """
    tokenizer = Tokenizer.load(folder)
    model = runtime.hold_in_bf16(load_reward_model(folder, device, tokenizer))
    check_tokenizer(model.config, tokenizer, folder)
    context = model.config.max_position_embeddings - len(model.closing)

    def source(batch):
        sequences = []
        for messages, answers, _ in batch:
            for answer in answers:
                # As in the pairs it was trained on (encode_pair): an empty think block precedes only an answer without
                # think text, some formats strip the answer, and the score is read at the end of the turn.
                said = [*messages, {"role": "assistant", "content": answer}]
                sequences.append(tokenizer.render(said, thinking=answer.lstrip().startswith("<think>"))[0])
                while sequences[-1][-1] != tokenizer.end_id:
                    sequences[-1].pop()
        if (longest := max(map(len, sequences), default=0)) > context:
            raise UserError(f"the reward model {folder} has a context of {context:,} tokens, and a prompt with its "
                            f"answer has {longest:,}; shorten the prompts or --max_new_tokens")
        with runtime.autocast(torch.device(device)):
            return _in_batches(model, sequences, device)

    return source


# --------------------------------------------------------------------------------------------- the judge

def judge_prompt(question, a, b, lang="en"):
    """The user message that asks which of two answers is better; the reply is "A" or "B".

    The judging conversations in the embedded data and the AI judge share this wording.
    """
    if lang == "zh":
        return f"问题：{question}\n回答A：{a}\n回答B：{b}\n哪个回答更好，A还是B？"
    return f"Question: {question}\nAnswer A: {a}\nAnswer B: {b}\nWhich answer is better, A or B?"


def question_text(messages):
    """The prompt as a judge sees it: the user's message, or all messages with their roles if there are several."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f'{m["role"]}: {m["content"]}' for m in messages)


def _language(messages):
    return "zh" if re.search("[\u4e00-\u9fff]", question_of(messages)) else "en"


class Judge:
    """A language model that is asked which of two answers is better (arXiv 2306.05685, pairwise comparison)."""

    def __init__(self, folder, device="cpu"):
        self.model, self.tokenizer = load_model(folder, device, frozen=True), Tokenizer.load(folder)
        self.device = device
        check_tokenizer(self.model.config, self.tokenizer, folder)
        self.verdicts = [self.tokenizer.encode(letter)[0] for letter in "AB"]

    def ask(self, prompts, batch_size=128):
        """The probability of the verdict "A" against "B" for each prompt of `judge_prompt`."""
        def probability_of_a(tokens, lengths):
            last = self.model.hidden(tokens)[torch.arange(len(tokens), device=tokens.device), lengths - 1]  # (N, D)
            return self.model.lm_head(last)[:, self.verdicts].float().softmax(dim=-1)[:, 0]

        messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
        sequences = [self.tokenizer.render(m, add_generation_prompt=True, thinking=False)[0] for m in messages]
        with torch.no_grad(), runtime.autocast(torch.device(self.device)):  # the layers may be held in bf16
            return _in_batches(probability_of_a, sequences, self.device, batch_size)

    def compare(self, questions, batch_size=128):
        """For each (messages, answer, other, example): the probability that `answer` is better, shown first and second.

        Without position bias both are the same. Their mean is free of the bias.
        """
        asked = [(question_text(messages), a, b, _language(messages)) for messages, a, b, _ in questions]
        prompts = [judge_prompt(q, a, b, lang) for q, a, b, lang in asked]
        prompts += [judge_prompt(q, b, a, lang) for q, a, b, lang in asked]
        verdicts = self.ask(prompts, batch_size)
        return [(first, 1 - second) for first, second in zip(verdicts, verdicts[len(asked):])]


def judge_reward(folder, device="cpu", max_new_tokens=64, batch_size=128):
    """The reward source of an AI judge (RLAIF, arXiv 2309.00267): the probability that an answer beats the judge's.

    The judge's own answer is greedy, of up to max_new_tokens, and the probability is the mean over both orders, so an
    equal answer gets 1/2. A fixed opponent keeps rewards comparable over the whole run. The judge is shown no think
    text. Raises UserError for a folder without a language model.
    """
    judge, own = Judge(folder, device), {}  # own: {prompt tokens: the judge's answer}
    tokenizer = judge.tokenizer

    def source(batch):
        prompts = [tuple(tokenizer.render(messages, add_generation_prompt=True, thinking=False)[0])
                   for messages, _, _ in batch]
        new = sorted({prompt for prompt in prompts if prompt not in own}, key=lambda prompt: (len(prompt), prompt))
        for i in range(0, len(new), batch_size):  # prompts of similar lengths together
            batched = new[i:i + batch_size]
            with runtime.autocast(torch.device(device)):
                rollout = generate(judge.model, [list(p) for p in batched], max_new_tokens, tokenizer.end_ids, 0.0)
            for prompt, response in zip(batched, rollout.responses()):
                own[prompt] = tokenizer.decode(response[:-1] if response[-1] in tokenizer.end_ids else response)
        pairs = [(messages, without_think(answer), own[prompt], example)
                 for prompt, (messages, answers, example) in zip(prompts, batch) for answer in answers]
        return [(first + second) / 2 for first, second in judge.compare(pairs)]

    return source


# --------------------------------------------------------------------------------------------- --reward

def reward_sources(specs) -> tuple:
    """(names, files): what the values of --reward name, without weights, and the files of functions among them."""
    names = [spec.rpartition("*")[2] for spec in specs]
    return names, [name.rpartition(":")[0] for name in names]


def load_rewards(specs, reward_model, judge, device="cpu", max_new_tokens=64):
    """{name: (weight, reward source)} for the values of --reward.

    A value is answer, model (the folder reward_model), judge (the folder judge) or path/to/file.py:function, with a
    weight in front if a weighted sum is wanted: "0.5*model". A function is named without its file if that is unique.
    The judge's own answers have up to max_new_tokens.
    Raises UserError for an unknown value, one that is given twice, and a file or function that cannot be used.
    """
    parsed = {}  # {(real path, function): (weight, name, path)}
    for spec in specs:
        weight, star, name = spec.rpartition("*")
        path, _, function = name.rpartition(":")
        try:
            weight = float(weight) if star else 1.0
        except ValueError:
            name = weight if name.replace(".", "", 1).isdecimal() else name  # "answer*0.5"
            raise UserError(f"--reward {spec}: the weight stands in front; write 0.5*{name}") from None
        if not math.isfinite(weight):
            raise UserError(f"--reward {spec}: the weight must be a finite number")
        if not path.endswith(".py") and name not in ("answer", "model", "judge"):
            raise UserError(f"--reward {spec}: must be answer, model, judge or path/to/file.py:function")
        key = os.path.realpath(path) if path else "", function
        if key in parsed:
            raise UserError(f"--reward: {name} is given twice")
        parsed[key] = weight, name, path

    found, times = {}, Counter(function for _, function in parsed)
    for (_, function), (weight, name, path) in parsed.items():
        if path:
            key = name if times[function] > 1 else function
            found[key] = weight, _one_prompt_at_a_time(key, _from_file(path, function))
        elif name == "answer":
            found[name] = weight, _one_prompt_at_a_time(name, answer_reward)
        else:
            found[name] = weight, (model_reward(reward_model, device) if name == "model" else
                                   judge_reward(judge, device, max_new_tokens))
    return found


def _from_file(path, name):
    """The function of a user's file, which may import files beside it."""
    if not os.path.isfile(path):
        raise UserError(f"--reward {path}:{name}: there is no such file")
    beside = _modules_beside(os.path.dirname(os.path.realpath(path)))
    spec = importlib.util.spec_from_file_location(f"reward_file:{os.path.realpath(path)}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    try:
        with beside():
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"--reward {path}:{name}: the file cannot be imported: {_what_and_where(error)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--reward {path}:{name}: the file defines no function {name}")
    right, takes = False, "arguments that it does not tell"
    try:
        signature = inspect.signature(function)  # ValueError: of a function written in C
        takes = str(signature)
        signature.bind("messages", "answers", "example")
        right = "completions" not in signature.parameters  # as in TRL
    except (TypeError, ValueError):
        pass
    if not right:
        raise UserError(f"--reward {path}:{name}: the function must take (messages, answers, example) and return one "
                        f"number per answer; this one takes {takes}")

    def call(*given):
        with beside():
            values = function(*given)
            return list(values) if inspect.isgenerator(values) else values  # it runs here

    return call


def _modules_beside(folder):
    """A context manager in which the files of this folder can be imported, and those imported before are known.

    Outside it they are not: another reward file may have a helper.py of its own.
    """
    own = {}

    @contextlib.contextmanager
    def beside():
        sys.modules.update(own)
        known = set(sys.modules) - set(own)
        sys.path.insert(0, folder)
        try:
            yield
        finally:
            sys.path.remove(folder)
            new = [name for name in set(sys.modules) - known if stands_here(name)]  # all, before the first one goes
            own.update((name, sys.modules.pop(name)) for name in new)

    def stands_here(name):
        module, top = sys.modules[name], name.partition(".")[0]
        places = [getattr(module, "__file__", None) or "", *getattr(module, "__path__", [])]
        installed = {top} & {"minillm", *sys.stdlib_module_names} or any("site-packages" in place for place in places)
        return not installed and any(os.path.realpath(place).startswith(folder + os.sep) for place in places)

    return beside


def _what_and_where(error):
    """One line: what was raised, and the innermost line of code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return " ".join(f"{type(error).__name__}: {error}".split()) + place


def _one_prompt_at_a_time(name, function):
    """The reward source of a function(messages, answers, example). Its mistakes are UserErrors that name the answer."""
    def source(batch):
        scores = []
        for messages, answers, example in batch:
            values = _call(name, function, messages, answers, example)
            place = f"{len(answers)} answers to {question_of(messages)[:80]!r}, the first {answers[0][:80]!r}"
            try:
                if isinstance(values, (str, bytes, dict, set)):
                    raise TypeError
                values = [float(value) for value in values]
            except (TypeError, ValueError):
                raise UserError(f"reward {name} must return a list of one number per answer; for {place}, it returned "
                                f"{values!r:.80}") from None
            if len(values) != len(answers):
                raise UserError(f"reward {name} returned {len(values)} values for {place}")
            scores += values
        return scores

    return source


def _call(name, function, messages, answers, example):
    try:
        return function(*copy.deepcopy((messages, answers, example)))  # copies, for it may change what it is given
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        culprit, reason = answers[0], error
        for answer in answers:
            try:
                function(*copy.deepcopy((messages, [answer], example)))
            except (Exception, SystemExit) as alone:
                culprit, reason = answer, alone
                break
        raise UserError(f"reward {name} failed on the answer {culprit[:80]!r} to {question_of(messages)[:80]!r}: "
                        f"{_what_and_where(reason)}") from None


def score_answers(rewards, batch):
    """Score the answers to several prompts -> (weighted sums, {name: that reward's own scores}).

    rewards: from load_rewards. batch: [(messages, answers, example), ...]. Sums and scores are lists of one list per
    prompt. Raises UserError, with the reward and the answer, if a function raises, returns the wrong number of values,
    or a score is not a finite number of sensible size.
    """
    components, totals = {}, [[0.0] * len(answers) for _, answers, _ in batch]
    for name, (weight, source) in rewards.items():
        scores = iter(source(batch))
        components[name] = [[next(scores) for _ in answers] for _, answers, _ in batch]
        for (messages, answers, _), values, total in zip(batch, components[name], totals):
            for i, (answer, value) in enumerate(zip(answers, values)):
                if not abs(value) < LARGEST:  # NaN, too
                    raise UserError(f"reward {name} gave {value} for the answer {answer[:80]!r} to "
                                    f"{question_of(messages)[:80]!r}; a score must be a number below {LARGEST:.0e}")
                total[i] += weight * value
    return totals, components
