"""A scalar head on the backbone: the reward model (one score for an answer) and the value model (one for each token).

A reward folder is a one-label sequence classifier of transformers: the same tensors under the same names, so
AutoModelForSequenceClassification gives the same scores for the same tokens, and a downloaded reward model loads here.
One that was trained here is read at the token that ends the turn, <|im_end|>; one from elsewhere at the last token of
its chat template, as is usual there: in ChatML the line end after <|im_end|>.
"""

from pathlib import Path

import torch
from torch import nn

from minillm.checkpoint import (architecture_of, check_finite, check_sizes, check_weights, checkpoint_folder,
                                grow_vocabulary, load_model, load_weights, save_folder)
from minillm.errors import UserError
from minillm.hf_config import ARCHITECTURES, config_from_json
from minillm.lora import LoRALinear
from minillm.model import Backbone, CausalLM, ModelConfig, RotaryEmbedding
from minillm.safetensors import load_json, short


LABELS = {"reward": 0}  # in the config.json of a reward model that was trained here


class _ScalarModel(nn.Module):
    """Backbone and `score`, one weight vector (1, D) without bias, over the final (already normed) hidden states."""

    def __init__(self, config: ModelConfig, backbone: Backbone):
        super().__init__()
        self.config, self.model = config, backbone
        self.origin = None  # as in CausalLM
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        # arXiv 2009.01325, appendix B.1: variance 1 / (D + 1), so that scores start near 1 in size.
        nn.init.normal_(self.score.weight, std=(config.hidden_size + 1) ** -0.5)
        self.to(backbone.embed_tokens.weight.device)

    @classmethod
    def from_lm(cls, lm: CausalLM):
        """A new head on the backbone of a language model, which is shared, not copied."""
        model = cls(lm.config, lm.model)
        model.origin = lm.origin
        return model

    def scores(self, hidden):
        # In float32 also under autocast: bf16 knows only 128 scores between 2 and 4. And by mv: where CUDA multiplies
        # two matrices, it rounds float32 to TF32, which knows only 1,024.
        with torch.autocast(hidden.device.type, enabled=False):
            scores = torch.mv(hidden.float().flatten(0, -2), self.score.weight[0])  # (..., D) -> (N, D) -> (N,)
            return scores.view(hidden.shape[:-1])


class RewardModel(_ScalarModel):
    """One score for each sequence, read at its last token (InstructGPT, arXiv 2203.02155, section 3.5)."""

    closing = ()  # tokens that follow the end of the turn, where the score is to be read at the last of them

    def forward(self, tokens, lengths):
        """tokens (B, T) padded on the right, lengths (B,) without the padding -> scores (B,) float32.

        Attention is causal, so what follows the last token changes nothing and needs no mask. The last token is found
        by length: a search for the pad id goes wrong where the tokenizer's pad is also its end token.
        """
        for token in self.closing:
            tokens = torch.nn.functional.pad(tokens, (0, 1)).scatter(1, lengths[:, None], token)  # (B, T + 1)
            lengths = lengths + 1
        return self.read(self.model(tokens), lengths)

    def read(self, hidden, lengths):
        """hidden (B, T, D) of such tokens -> scores (B,) float32."""
        return self.scores(hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1])


class ValueModel(_ScalarModel):
    """One value for each token: the return that is expected after having seen the sequence up to it."""

    def __init__(self, config: ModelConfig, backbone: Backbone):
        super().__init__(config, backbone)
        self.bias = nn.Parameter(torch.zeros((), device=self.score.weight.device))

    @classmethod
    def from_reward_model(cls, reward_model: RewardModel):
        """A value model that starts as this reward model, whose backbone and head it takes over."""
        model = cls(reward_model.config, reward_model.model)
        model.score = reward_model.score
        return model

    @torch.no_grad()
    def normalise(self, mean: float, std: float):
        """Expect (score - mean) / std where it expected the score."""
        self.score.weight /= std
        self.bias.copy_((self.bias - mean) / std)

    def scores(self, hidden):
        return super().scores(hidden) + self.bias

    def forward(self, tokens):
        """tokens (B, T) padded on the right -> values (B, T) float32."""
        return self.scores(self.model(tokens))


def save_reward_model(folder, model: _ScalarModel, tokenizer, dtype: str = "auto"):
    """Write a ...ForSequenceClassification folder with one label; raises UserError when the disk refuses."""
    name = ARCHITECTURES[model.config.model_type].replace("ForCausalLM", "ForSequenceClassification")
    save_folder(folder, model.config, model.state_dict(), tokenizer, model.origin, dtype, architectures=[name],
                num_labels=1, id2label={"0": "reward"}, label2id=LABELS)


def merge_reward_model(model: RewardModel, base) -> RewardModel:
    """A reward model with a LoRA as a plain one on the CPU, merged in float32 into the weights of the folder `base`.

    The model itself may hold them rounded to bf16. One without a LoRA is returned as it is.
    """
    if not any(isinstance(layer, LoRALinear) for layer in model.modules()):
        return model
    whole = RewardModel.from_lm(load_model(base))
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, LoRALinear):  # one matrix after the other, in place: no second copy of all of them
                whole.get_submodule(name).weight += layer.scaling * layer.lora_B.cpu() @ layer.lora_A.cpu()
    whole.score.load_state_dict(model.score.state_dict())
    return whole


def is_reward_model(folder) -> bool:
    """Whether a folder holds a sequence classifier."""
    path = Path(folder) / "config.json"
    return path.is_file() and "SequenceClassification" in architecture_of(load_json(path), path)


def load_reward_model(folder, device="cpu", tokenizer=None) -> RewardModel:
    """The reward model of a folder. With its tokenizer it knows where one from elsewhere is to be read.

    Raises UserError when the folder is no one-label classifier of a supported architecture, or its weights do not fit.
    """
    folder = checkpoint_folder(Path(folder))
    document = load_json(folder / "config.json")
    if not is_reward_model(folder):
        raise UserError(f"{folder} is no reward model (it holds {short(document.get('architectures'))}); "
                        "python train_reward.py makes one")
    config = config_from_json(document, folder / "config.json")
    stored = load_weights(folder)
    config = grow_vocabulary(config, stored, folder)
    check_sizes(config, stored, folder)
    with torch.device("meta"):
        model = RewardModel(config, Backbone(config))
    check_weights(model.state_dict(), stored, folder)
    weights = {name: tensor.to(device, torch.float32, copy=True) for name, tensor in stored.items()}
    check_finite(weights, folder)
    model.load_state_dict(weights, assign=True)
    model.model.rotary = RotaryEmbedding(config).to(device)
    if tokenizer is not None and document.get("label2id") != LABELS:
        model.closing = tokenizer.encode(tokenizer.chat_format.after)
    return model
