"""Small LLaVAs of transformers' own classes, drawn, and what they compute, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from hypothesis import strategies as st

from tests.config.test_jsonl import tokenizer_folder

VOCABULARY, POSITIONS = 41, 64
TOWERS = {
    "clip": (transformers.CLIPVisionConfig, ("default", "full")),
    "siglip2": (transformers.SiglipVisionConfig, ("full",)),
}
TEXTS: Mapping[str, tuple[Any, Mapping[str, tuple[Any, ...]]]] = {
    "llama": (transformers.LlamaConfig, {"attention_bias": (True, False), "mlp_bias": (False, True)}),
    "mistral": (transformers.MistralConfig, {"sliding_window": (9, None)}),
    "qwen2": (
        transformers.Qwen2Config,
        {"use_sliding_window": (False, True), "sliding_window": (9,), "max_window_layers": (1,)},
    ),
}


@st.composite
def drawn_llavas(draw: st.DrawFn, kind: str) -> Any:
    """A config of transformers' class with a tower of a kind."""
    tower_class, strategies = TOWERS[kind]
    heads, head_dim, layers = draw(st.sampled_from([(3, 8, 3), (2, 6, 2), (2, 10, 4)]))
    tower = tower_class(
        hidden_size=heads * head_dim,
        intermediate_size=draw(st.sampled_from([40, 28])),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=draw(st.sampled_from([18, 12])),
        patch_size=draw(st.sampled_from([4, 6])),
        hidden_act=draw(st.sampled_from(["quick_gelu", "gelu_pytorch_tanh", "gelu"])),
        layer_norm_eps=draw(st.sampled_from([1e-2, 1e-5])),
    )
    text_class, settings = TEXTS[draw(st.sampled_from(list(TEXTS)))]
    kv_heads, group, width = draw(st.sampled_from([(2, 2, 6), (1, 3, 4), (3, 2, 4)]))
    text = text_class(
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
        hidden_size=kv_heads * group * width,
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        intermediate_size=draw(st.sampled_from([26, 40])),
        num_hidden_layers=draw(st.sampled_from([2, 1])),
        rms_norm_eps=draw(st.sampled_from([1e-2, 1e-6])),
        rope_parameters={"rope_type": "default", "rope_theta": 50.0},
        tie_word_embeddings=draw(st.sampled_from([False, True])),
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **{key: draw(st.sampled_from(values)) for key, values in settings.items()},
    )
    return transformers.LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=draw(st.sampled_from([VOCABULARY - 1, 0])),
        vision_feature_layer=draw(st.sampled_from([-2, *range(-layers, 0), *range(1, layers + 1)])),
        vision_feature_select_strategy=draw(st.sampled_from(strategies)),
        projector_hidden_act=draw(st.sampled_from(["gelu", "relu", "silu"])),
    )


def build(config: Any, seed: int) -> Any:
    """A model with weights in which nothing hides: fan-in matrices, norms that scale, biases that are not 0."""
    with torch.random.fork_rng():
        model = transformers.LlavaForConditionalGeneration._from_config(
            config, dtype=torch.float64, attn_implementation="eager"
        )
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                values = rng.standard_normal(parameter.shape) / np.sqrt(np.prod(parameter.shape[1:]))
            elif name.endswith("bias"):
                values = rng.uniform(-0.3, 0.3, parameter.shape)
            elif name.endswith("class_embedding"):
                values = rng.standard_normal(parameter.shape)
            else:
                values = rng.uniform(0.5, 1.5, parameter.shape)
            parameter.copy_(torch.from_numpy(values))
    return model.eval()


def image_tokens(config: Any) -> int:
    """Tokens that an image has in transformers."""
    tower = config.vision_config
    patches = (tower.image_size // tower.patch_size) ** 2
    return patches + (config.vision_feature_select_strategy == "full" and tower.model_type.startswith("clip"))


Places = Sequence[Sequence[int]]
"""Of each row, how many tokens stand before each of its images."""


def with_images(config: Any, row: Sequence[int], places: Sequence[int]) -> torch.Tensor:
    """The ids (1, S) that transformers takes for a row of text with images."""
    image = [config.image_token_index] * image_tokens(config)
    ids: list[int] = []
    for place in range(len(row) + 1):
        ids += [*image * list(places).count(place), *row[place : place + 1]]
    return torch.tensor([ids])


def seen(pixels: np.ndarray, places: Sequence[int]) -> dict[str, torch.Tensor]:
    """What transformers takes for the images of a row, as many of (N, 3, h, w) as there are places."""
    return {"pixel_values": torch.from_numpy(pixels[: len(places)])} if places else {}


def logits_of_text(model: Any, pixels: np.ndarray, tokens: np.ndarray, positions: Places) -> torch.Tensor:
    """(B, T, V) of transformers, of pixels (B, N, 3, h, w): of each token those that the next one is drawn from."""
    rows = []
    for row, own, places in zip(tokens.tolist(), pixels, positions, strict=True):
        ids = with_images(model.config, row, places)
        logits = model(ids, **seen(own, places), use_cache=False).logits[0]
        text = (ids[0] != model.config.image_token_index).nonzero()[:, 0].tolist()
        rows.append(logits[[*(place - 1 for place in text[1:]), -1]])
    return torch.stack(rows)


def continuations(model: Any, pixels: np.ndarray, prompts: np.ndarray, positions: Places, count: int) -> np.ndarray:
    """Greedy, of transformers; prompts of one length."""
    rows = []
    for row, own, places in zip(prompts.tolist(), pixels, positions, strict=True):
        ids = with_images(model.config, row, places)
        options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        out = model.generate(ids, **seen(own, places), attention_mask=torch.ones_like(ids), **options)
        rows.append(out[0, ids.shape[1] :].numpy())
    return np.stack(rows)


IMAGE_TEXT = "<image>"
PARTS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""A chat template that wants the content of messages as a list."""


def llava_folder(folder: Path, template: str | None = PARTS, positions: int = 128, heads: int = 3) -> Path:
    """A small LLaVA in float32 as transformers saves it, with a byte-level tokenizer that has a token for an image."""
    tokenizer_folder(folder, template)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([IMAGE_TEXT])
    tokenizer.save(str(folder / "tokenizer.json"))
    tower = transformers.CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=heads,
        image_size=12,
        patch_size=6,
    )
    text = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size() + 1,
        max_position_embeddings=positions,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        num_hidden_layers=2,
    )
    image_token = tokenizer.token_to_id(IMAGE_TEXT)
    assert image_token is not None
    config = transformers.LlavaConfig(vision_config=tower, text_config=text, image_token_index=image_token)
    build(config, seed=1).float().save_pretrained(folder)
    return folder
