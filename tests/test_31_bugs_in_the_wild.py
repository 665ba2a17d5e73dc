"""Chapter 31: bugs from the wild. Each test is a public report: the wrong number that people got, and the right one.

After this chapter you will recognise twenty mistakes that real training code has made, all of them silent: the loss
falls, the run ends, and what was trained is something else. Each docstring begins with the project and the number of
the report (https://github.com/PROJECT/issues/NUMBER; pull requests answer to the same address). In a test, `wrong` is
what the reported code computes, written out here; the other number is minillm's. Both are worked by hand.

Most were fixed long ago, and several reports are questions that were answered with "you are right". The point is not
who was wrong, but that a loss can be wrong and still be a number.
"""

import ast
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minillm.checkpoint import save_model
from minillm.errors import UserError
from minillm.generate import generate
from minillm.heads import RewardModel
from minillm.lora import LoRALinear, apply_lora
from minillm.losses import (dpo_loss, gae, group_advantages, grpo_loss, kl_k3, ppo_policy_loss, sft_loss,
                            token_logprobs, whiten)
from minillm.model import CausalLM, ModelConfig
from minillm.peft import load_adapter, save_adapter
from minillm.preferences import encode_pair
from minillm.rollouts import response_logprobs, split_rollout
from minillm.safetensors import load_json, save_json
from minillm.tokenizer import train_tokenizer
from tests.helpers import close

LN2 = 0.6931471805599453


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["It is red. It is blue."] * 3, 280)


def small_lm(tokenizer, hidden_size=16):
    torch.manual_seed(0)
    return CausalLM(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=hidden_size, num_hidden_layers=1,
                                num_attention_heads=1, num_key_value_heads=1, head_dim=8, intermediate_size=16,
                                max_position_embeddings=64))


def logits_for(probabilities):
    """Logits (1, T + 1, 2) that give token 0 these probabilities, one after another (the last row predicts nothing)."""
    p = torch.tensor([*probabilities, 0.5])
    return torch.stack([p, 1 - p], dim=-1).log()[None]


# ---------------------------------------------------------------- the ratio

def test_a_sequence_ratio_in_place_of_the_token_ratio():
    """rasbt/reasoning-from-scratch#243: the clip of GRPO was applied to the ratio of whole answers.

    Three tokens of a good answer (advantage 1), each 1.1 times as probable as before. Every one is inside the clip of
    1.2 and is pushed on: loss -1.1, slope -1.1 / 3 each. The ratio of the answer is 1.1^3 = 1.331, outside the clip:
    loss -1.2, and nothing is learned from it any more. The longer the answer, the sooner it stops.
    """
    logprobs = torch.full((1, 3), math.log(1.1), requires_grad=True)
    old, mask, advantage = torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool), torch.tensor([1.0])
    ratio = (logprobs - old).sum(1).exp()
    wrong = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    close(wrong, -1.2)
    close(torch.autograd.grad(wrong, logprobs)[0], [[0.0, 0.0, 0.0]])
    loss, _ = grpo_loss(logprobs, old, None, advantage, mask, beta=0.0)
    close(loss, -1.1)
    close(torch.autograd.grad(loss, logprobs)[0], [[-1.1 / 3, -1.1 / 3, -1.1 / 3]])


def test_logprobs_minus_their_own_copy_in_an_off_policy_step():
    """huggingface/trl#3493: some parts of a rollout were trained after an update with `logprobs - logprobs.detach()`.

    That expression is a ratio of 1 with a gradient, and right only while the policy is still the one that sampled. Here
    it has moved: the token went from log-probability -1 to -0.5, ratio e^0.5 = 1.648721. A good token is clipped: slope
    0, it has moved enough. A bad one must come back with slope 1.648721. The expression says -1 and 1.
    """
    for advantage, right, mistaken in ((1.0, 0.0, -1.0), (-1.0, 1.6487213, 1.0)):
        logprobs = torch.tensor([[-0.5]], requires_grad=True)
        wrong = -((logprobs - logprobs.detach()).exp() * advantage).sum()
        close(torch.autograd.grad(wrong, logprobs)[0], [[mistaken]])
        loss, _ = grpo_loss(logprobs, torch.tensor([[-1.0]]), None, torch.tensor([advantage]), torch.tensor([[True]]),
                            beta=0.0)
        close(torch.autograd.grad(loss, logprobs)[0], [[right]])


def test_a_ratio_that_is_not_1_under_autocast():
    """jingyaogong/minimind#813: the old log-probabilities came out of autocast in float32, the new ones in bf16.

    Six hundred equally likely tokens: log(1/600) = -6.396930. Between 4 and 8 bf16 knows multiples of 1/32 only, and
    takes -6.40625. So the ratio of a policy to itself is e^-0.009320 = 0.990723, for every such token, in every step.
    token_logprobs takes the softmax in float32 whatever it is given and wherever it is called.
    """
    logits, tokens = torch.zeros(1, 2, 600, dtype=torch.bfloat16), torch.tensor([[0, 7]])
    wrong = F.log_softmax(logits, dim=-1)[0, 0, 7].float()
    close(wrong, -6.40625)
    new = token_logprobs(logits, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        old = token_logprobs(logits, tokens)
    close((wrong - old[0, 0]).exp(), 0.9907232)
    close(new, [[-6.3969297]])
    assert torch.equal(new, old)


def test_scored_with_another_temperature_than_sampled():
    """huggingface/trl#3029: answers were sampled at one temperature and scored at temperature 1.

    Two tokens with probabilities 3/4 and 1/4. At temperature 1/2 the odds are squared: 9/10 and 1/10. Scored without
    the temperature, the likely token has ratio 0.75 / 0.9 = 0.833333 and the other one 0.25 / 0.1 = 2.5, before any
    update. The second is clipped at once.
    """
    logits, tokens = logits_for([0.75, 0.75]), torch.tensor([[0, 0, 1]])
    sampled = token_logprobs(logits, tokens, temperature=0.5)
    close(sampled.exp(), [[0.9, 0.1]])
    wrong = token_logprobs(logits, tokens)
    close((wrong - sampled).exp(), [[0.8333333, 2.5]])


def test_the_rollouts_own_logprobs_carry_no_gradient(tokenizer):
    """thu-ml/tianshou#397, starry-sky6688/MARL-Algorithms#81: why not use the log-probabilities of the rollout?

    Because sampling runs without a graph. A policy loss made of them is a constant: alone its backward pass fails,
    beside a critic's loss nobody notices, and the policy never moves. So the tokens go through the policy once more.
    Two equally likely tokens and advantage 1: d(-log p) / d logits = p - onehot = (-1/2, 1/2).
    """
    policy, value = torch.zeros(1, 2, 2, requires_grad=True), torch.zeros(1, 1, requires_grad=True)
    tokens, one, mask = torch.tensor([[1, 0]]), torch.ones(1, 1), torch.tensor([[True]])
    with torch.no_grad():
        from_rollout = token_logprobs(policy, tokens)
    wrong, _ = ppo_policy_loss(from_rollout, from_rollout, one, mask)
    (wrong + (value - 1).square().sum()).backward()
    assert policy.grad is None and value.grad.item() == -2
    loss, _ = ppo_policy_loss(token_logprobs(policy, tokens), from_rollout, one, mask)
    loss.backward()
    close(policy.grad, [[[-0.5, 0.5], [0.0, 0.0]]])

    model = small_lm(tokenizer)
    rollout = generate(model, [[5, 6]], 3, end_id=-1, generator=torch.Generator().manual_seed(0))
    batch = split_rollout(rollout, 1, 1, torch.Generator().manual_seed(0))[0].micro_batches[0]
    assert not rollout.logprobs.requires_grad and response_logprobs(model, batch).requires_grad


# ---------------------------------------------------------------- advantages

def test_advantages_from_rewards_in_place_of_returns():
    """natolambert/rlhf-book#216, hpcaitech/ColossalAI#4491: the advantage was reward - value at each token.

    The score 1 comes with the last token; the critic expects 0.2, 0.4, 0.6. Reward - value is -0.2, -0.4, 0.4: the two
    tokens that led to a good answer are punished for not being its end. What counts is all that follows, the return:
    1 - 0.2, 1 - 0.4, 1 - 0.6.
    """
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.2, 0.4, 0.6]])
    close(rewards - values, [[-0.2, -0.4, 0.4]])
    close(gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gae_lambda=1.0)[0], [[0.8, 0.6, 0.4]])


def test_padding_leaks_into_the_returns():
    """natolambert/rlhf-book#216: the backward sum of rewards began in the padding.

    Policy and reference also disagree about padding, so a KL penalty stands there too, here -0.5 twice. Summed from the
    right end it takes 1 away from every return: the good answer is worth 0.
    """
    rewards = torch.tensor([[0.0, 0.0, 1.0, -0.5, -0.5]])
    wrong = rewards.flip(1).cumsum(1).flip(1)
    close(wrong[:, :3], [[0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, False, False]])
    close(gae(rewards, torch.zeros(1, 5), mask, gae_lambda=1.0)[1], [[1.0, 1.0, 1.0, 0.0, 0.0]])


def test_padding_in_the_mean_of_the_advantages():
    """NovaSky-AI/SkyRL#1305: whitening took the mean over padding and the variance without it.

    Advantages 1 and 3, and two positions of padding. The mean over four is 1, so the first token is neutral and the
    second good. The mean of the two is 2: one is below it, one above, by 1 / sqrt(2) standard deviations.
    """
    x, mask = torch.tensor([[1.0, 3.0, 0.0, 0.0]]), torch.tensor([[True, True, False, False]])
    close((x - x.mean())[mask], [0.0, 2.0])
    close(whiten(x, mask), [[-0.7071068, 0.7071068, 0.0, 0.0]])


def test_padding_in_an_advantage_of_the_whole_answer():
    """areal-project/AReaL#1346: the advantages of an answer were averaged over padding as well.

    Two tokens with advantage 1, and 10 in two positions of padding: the average over four is 5.5, so the loss is -5.5
    and the gradient five times too large. In minillm the loss of the same tensors is -1; and where an answer has one
    advantage it is one number, (B,), which no padding can join.
    """
    advantages, mask = torch.tensor([[1.0, 1.0, 10.0, 10.0]]), torch.tensor([[True, True, False, False]])
    zero = torch.zeros(1, 4)
    close(-advantages.mean(1), [-5.5])
    close(ppo_policy_loss(zero, zero, advantages, mask)[0], -1.0)
    with pytest.raises(ValueError, match=r"expected advantages \(B,\)"):
        grpo_loss(zero, zero, None, advantages, mask, beta=0.0)


def test_one_mean_for_the_groups_of_all_prompts():
    """XU-YIJIE/grpo-flat#2: rewards were compared with those of the whole batch, not with those of the same prompt.

    An easy question, answered right twice, and a hard one, answered wrong twice. Compared with the batch the easy
    answers are good and the hard ones bad (0.5 / 0.577350 = 0.866025), although there is nothing to choose between
    either pair. Within the groups every advantage is 0.
    """
    rewards = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    close((rewards - rewards.mean()) / rewards.std(), [[0.8660254, 0.8660254], [-0.8660254, -0.8660254]])
    assert torch.equal(group_advantages(rewards), torch.zeros(2, 2))


def test_k3_cancels_where_policy_and_reference_nearly_agree():
    """google/tunix#2315: the KL estimator that cannot be negative was negative.

    d = 1e-6: exp(d) - d - 1 is d^2 / 2 = 5.0e-13. In float32 exp(d) is 1.00000095, which has lost all but one digit of
    d, and the difference is -5.96e-8: the wrong sign, and 100,000 times too large. expm1(d) - d keeps what matters.
    """
    d = torch.tensor(1e-6)
    close((d.exp() - d - 1) * 1e8, -5.9604645)
    assert 0 <= kl_k3(-d, torch.zeros(())) < 1e-12
    close(kl_k3(torch.tensor(-1e-6).double(), torch.zeros(()).double()).float() * 1e13, 5.0000017)


# ---------------------------------------------------------------- masks and denominators

def test_a_micro_batch_in_which_nothing_is_supervised():
    """karpathy/nanochat#618: with small batches the loss of supervised fine-tuning was NaN from the first step.

    A micro-batch that holds nothing but the user's tokens has a mean over zero tokens, 0 / 0, and its NaN spoils the
    gradients of all others in the step. In minillm it adds 0: what is left is the other micro-batch, ln 2 over 1 token.
    """
    nothing = F.cross_entropy(torch.zeros(3, 2), torch.full((3,), -100), ignore_index=-100)
    assert nothing.isnan()
    logits, tokens = torch.zeros(2, 2, 2, requires_grad=True), torch.tensor([[0, 1], [0, 1]])
    mask = torch.tensor([[False, False], [False, True]])
    loss = sum(sft_loss(logits[i:i + 1], tokens[i:i + 1], mask[i:i + 1], n_tokens=1) for i in range(2))
    loss.backward()
    close(loss, LN2)
    close(logits.grad, [[[0.0, 0.0], [0.0, 0.0]], [[0.5, -0.5], [0.0, 0.0]]])


def test_accumulation_divided_by_the_number_of_micro_batches():
    """huggingface/transformers#34191, ml-explore/mlx-lm#1413: the mean of the micro-batches' means.

    A short answer whose one token has probability 1/8 (3 ln 2), a long one whose three have 1/2 each (ln 2). Four
    tokens, 6 ln 2 in all: 1.5 ln 2 = 1.039721. The mean of the two means is (3 + 1) / 2 ln 2 = 1.386294, as if the
    short answer's token counted three times as much as the others.
    """
    short, long = logits_for([1 / 8]), logits_for([1 / 2, 1 / 2, 1 / 2])
    batches = [(x, torch.zeros(1, x.shape[1], dtype=torch.long), torch.ones(1, x.shape[1], dtype=torch.bool))
               for x in (short, long)]
    close(sum(sft_loss(*batch) for batch in batches) / 2, 2 * LN2)
    close(sum(sft_loss(*batch, n_tokens=4) for batch in batches), 1.5 * LN2)


def test_the_mask_is_shifted_by_one():
    """pytorch/torchtitan#2755, verl-project/verl#3562: the mask was cut for the labels in another place than they were.

    Two tokens of a prompt, an answer of one token (probability 1/4) and its end (1/2): (2 + 1) / 2 ln 2 = 1.039721. The
    labels begin at the second token; a mask that still hides two of them hides the answer and trains its end alone:
    ln 2. Moved the other way it trains the prompt's second token (probability 1) and the answer, (0 + 2) / 2 ln 2, and
    never the end.
    """
    logits, tokens = logits_for([1.0 - 1e-7, 1 / 4, 1 / 2]), torch.zeros(1, 4, dtype=torch.long)
    mask = torch.tensor([[False, False, True, True]])
    losses = -token_logprobs(logits, tokens)  # of tokens 1, 2, 3
    close(losses[:, 2:].mean(), LN2)
    close(losses[mask[:, 1:].roll(-1, 1)].mean(), LN2)
    close(sft_loss(logits, tokens, mask), 1.5 * LN2)


def test_padding_with_the_end_token_hides_the_end(tokenizer):
    """mlabonne/llm-course#33, huggingface/trl#976: with pad = eos the end was hidden along with the padding.

    "Yo" and its end are three supervised tokens at a byte each. A mask that leaves out every token equal to the pad
    keeps two, and the model talks until it is cut. Here the pad is a token of its own, which no turn contains.
    """
    tokens, mask = tokenizer.render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}])
    supervised = [t for t, trained in zip(tokens, mask) if trained]
    assert tokenizer.decode(supervised) == "Yo<|im_end|>" and len(supervised) == 3
    pad = tokenizer.end_id  # the mistake
    assert tokenizer.decode([t for t in supervised if t != pad]) == "Yo"
    assert tokenizer.pad_id != tokenizer.end_id and tokenizer.pad_id not in tokens


# ---------------------------------------------------------------- what is read, and where

def test_a_second_end_token_is_ignored(tmp_path, tokenizer):
    """Blaizzy/mlx-vlm#309, NVIDIA/TensorRT-Model-Connect#640: of two end tokens only one was looked for.

    A chat model ends its turn with <|im_end|>, and sometimes the text with <|endoftext|>. A list of two ids stands in
    generation_config.json for that; who reads the first one alone goes on sampling after the other. The reply "a"
    <|endoftext|> "b" <|im_end|> has 4 tokens for such a reader and 2 for one that knows both.
    """
    save_model(tmp_path, small_lm(tokenizer), tokenizer)
    ends = load_json(tmp_path / "generation_config.json")["eos_token_id"]
    assert ends == [tokenizer.end_id, tokenizer.endoftext_id]
    reply = [*tokenizer.encode("a"), tokenizer.endoftext_id, *tokenizer.encode("b"), tokenizer.end_id]
    assert reply.index(ends[0]) + 1 == 4
    assert min(reply.index(end) for end in ends) + 1 == 2


def test_the_prompt_of_a_pair_is_lost(tokenizer):
    """OpenRLHF/OpenRLHF#909: with the prompt under a key of its own, chosen and rejected became other texts than with
    the prompt inside them.

    The same pair in both forms must be the same tokens. Without its prompt the answer would be 3 tokens, "no" and the
    end, and log p(answer) in place of log p(answer | prompt): the pair would say that "no" is good, to whatever.
    """
    question, good, bad = ({"role": role, "content": text}
                           for role, text in (("user", "Is it?"), ("assistant", "no"), ("assistant", "aye")))
    inside = {"chosen": [question, good], "rejected": [question, bad]}
    beside = {"prompt": [question], "chosen": [good], "rejected": [bad]}
    (chosen, mask, _), (rejected, _) = encode_pair(beside, "line 1", tokenizer, 64, Counter())
    assert encode_pair(inside, "line 1", tokenizer, 64, Counter())[0][:2] == (chosen, mask)
    prompt = tokenizer.render([question], add_generation_prompt=True)[0]
    wrong = tokenizer.render([good])[0]
    assert tokenizer.decode(wrong) == "<|im_start|>assistant\nno<|im_end|>\n"  # what is left without it
    assert tokenizer.decode(chosen) == "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\nno<|im_end|>"
    assert chosen[:len(prompt)] == rejected[:len(prompt)] == prompt and sum(mask) == 3 == len(chosen) - len(prompt)


def test_only_one_side_of_a_pair_hides_its_prompt():
    """OpenRLHF/OpenRLHF#294: the mask was made for the chosen sides alone, so the rejected ones kept their prompts.

    As long as policy and reference agree about the prompt that changes nothing. Once the policy finds the prompt more
    probable by 2 (it will: it is trained to), the rejected side looks better by 2. Both answers gained 1: the margin is
    0 and the loss ln 2. With the prompt on one side it is -2, and the loss -log sigmoid(-2) = 2.126928.
    """
    zero = torch.zeros(1)
    answers, prompt = torch.tensor([1.0]), torch.tensor([2.0])
    close(dpo_loss(answers, answers, zero, zero, beta=1.0)[0], LN2)
    close(dpo_loss(answers, answers + prompt, zero, zero, beta=1.0)[0], 2.1269280)


def test_the_score_is_read_at_the_first_pad(tokenizer):
    """huggingface/transformers#35352: the last token was found as "the one before the first pad".

    Where the pad is also the end of a turn, the first one stands after the question: the model scores the question.
    Five tokens, of which the third and the fifth are such an end, with scores 1 to 5: read before the first pad it is
    2, whatever the answer was. minillm is told the lengths.
    """
    model = RewardModel.from_lm(small_lm(tokenizer, hidden_size=1))
    model.score.weight.data.fill_(1.0)
    hidden, tokens, pad = torch.arange(1.0, 6.0).view(1, 5, 1), torch.tensor([[7, 8, 2, 9, 2]]), 2
    first_pad = (tokens == pad).int().argmax(dim=1)
    close(model.scores(hidden)[0, first_pad - 1], [2.0])
    close(model.read(hidden, torch.tensor([5])), [5.0])


def test_an_adapter_that_changed_its_base(tmp_path, tokenizer):
    """huggingface/transformers#34468, huggingface/peft#1626: PiSSA moves a part of W into B A and leaves W without it.

    W = [[2, 0], [0, 1]]. Its principal part [[2, 0], [0, 0]] becomes B A; the base keeps [[0, 0], [0, 1]]. Together
    they are W. The adapter's file holds A and B alone: put on the W that everybody else has, they make [[4, 0],
    [0, 1]], and x = (1, 1) gives (4, 1) in place of (2, 1). An adapter that says so in its config is refused by name.
    """
    base = nn.Linear(2, 2, bias=False)
    base.weight.data = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    wrong = LoRALinear(base, r=1, alpha=1)
    wrong.lora_A.data, wrong.lora_B.data = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [0.0]])
    close(wrong(torch.ones(2)), [4.0, 1.0])
    base.weight.data[0, 0] = 0.0
    close(wrong(torch.ones(2)), [2.0, 1.0])

    save_adapter(apply_lora(small_lm(tokenizer), r=2, alpha=4), tmp_path, base="base")
    save_json(tmp_path / "adapter_config.json",
              {**load_json(tmp_path / "adapter_config.json"), "init_lora_weights": "pissa"})
    with pytest.raises(UserError, match='init_lora_weights = "pissa"'):
        load_adapter(small_lm(tokenizer), tmp_path)


# ---------------------------------------------------------------- the chapter itself

def test_every_bug_names_its_report():
    """Project and number, at the beginning of the docstring."""
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    bugs = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")][:-1]
    assert len(bugs) >= 20
    for bug in bugs:
        assert re.match(r"[\w.-]+/[\w.-]+#\d+[,:]", ast.get_docstring(bug)), bug.name


# ---------------------------------------------------------------- two questions
# Change the number, say what you expect, and run the test. A failure shows what came out.
# 1. test_a_sequence_ratio_in_place_of_the_token_ratio: `math.log(1.1)` -> `math.log(1.05)`. Is the wrong ratio still
#    clipped?
# 2. test_a_ratio_that_is_not_1_under_autocast: `torch.zeros(1, 2, 600` -> `torch.zeros(1, 2, 256`. Is bf16 now above
#    or below ln 1/256 = -5.545177?
