"""Small PaliGemmas of transformers' own classes, drawn, and what they compute, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from hypothesis import strategies as st

from tests.tokenizers import byte_level, save

VOCABULARY, POSITIONS = 41, 64
GEMMAS: dict[str, Any] = {"gemma": transformers.GemmaConfig, "gemma2": transformers.Gemma2Config}


@st.composite
def drawn_paligemmas(draw: st.DrawFn, kind: str) -> Any:
    """A config of transformers' class with a Gemma of a kind."""
    heads, head_dim, layers = draw(st.sampled_from([(3, 8, 3), (2, 6, 2), (2, 10, 4)]))
    tower = transformers.SiglipVisionConfig(
        hidden_size=heads * head_dim,
        intermediate_size=draw(st.sampled_from([40, 28])),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=draw(st.sampled_from([12, 18])),
        patch_size=draw(st.sampled_from([4, 6])),
        hidden_act=draw(st.sampled_from(["gelu_pytorch_tanh", "gelu"])),
        layer_norm_eps=draw(st.sampled_from([1e-2, 1e-5])),
        vision_use_head=draw(st.sampled_from([False, True])),
    )
    kv_heads, group, width = draw(st.sampled_from([(1, 4, 6), (2, 2, 10), (1, 3, 4)]))
    second: dict[str, Any] = {
        "query_pre_attn_scalar": draw(st.sampled_from([9, 16])),
        "sliding_window": draw(st.sampled_from([5, POSITIONS])),
        "attn_logit_softcapping": draw(st.sampled_from([2.0, None])),
        "final_logit_softcapping": draw(st.sampled_from([1.5, None])),
    }
    text = GEMMAS[kind](
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
        hidden_size=draw(st.sampled_from([28, 40])) // kv_heads // group * kv_heads * group,
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=width,
        intermediate_size=draw(st.sampled_from([26, 46])),
        num_hidden_layers=draw(st.sampled_from([2, 3])),
        rms_norm_eps=draw(st.sampled_from([1e-2, 1e-6])),
        rope_parameters={"rope_type": "default", "rope_theta": 50.0},
        attention_bias=draw(st.sampled_from([False, True])),
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **(second if kind == "gemma2" else {}),
    )
    return transformers.PaliGemmaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=draw(st.sampled_from([VOCABULARY - 1, VOCABULARY + 2])),
        projection_dim=text.hidden_size,
        hidden_size=text.hidden_size,
    )


def build(config: Any, seed: int) -> Any:
    """A model with weights in which nothing hides: fan-in matrices, norms that scale, biases that are not 0."""
    with torch.random.fork_rng():
        model = transformers.PaliGemmaForConditionalGeneration._from_config(
            config, dtype=torch.float64, attn_implementation="eager"
        )
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                values = rng.standard_normal(parameter.shape) / np.sqrt(np.prod(parameter.shape[1:]))
            elif name.endswith("bias"):
                values = rng.uniform(-0.3, 0.3, parameter.shape)
            else:
                low = 0.5 if "vision_tower" in name else -0.5
                values = rng.uniform(low, low + 1, parameter.shape)
            parameter.copy_(torch.from_numpy(values))
    return model.eval()


def image_tokens(config: Any) -> int:
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2


def of_row(config: Any, pixels: np.ndarray, tokens: np.ndarray, prompt: int) -> dict[str, torch.Tensor]:
    """What transformers takes for the images (N, 3, h, w) and tokens (T,) of a row, of which so many are the prompt."""
    image = np.full(len(pixels) * image_tokens(config), config.image_token_index)
    ids = np.concatenate([image, tokens])[None]
    types = np.arange(ids.shape[1])[None] >= len(image) + prompt
    shown = {"pixel_values": torch.from_numpy(pixels)} if len(pixels) else {}
    return {"input_ids": torch.from_numpy(ids), "token_type_ids": torch.from_numpy(types.astype(np.int64)), **shown}


def logits_of_text(
    model: Any, pixels: Sequence[np.ndarray], tokens: np.ndarray, prompts: Sequence[int]
) -> torch.Tensor:
    """(B, T, V) of transformers, row by row."""
    rows = [of_row(model.config, *row) for row in zip(pixels, tokens, prompts, strict=True)]
    return torch.cat([model(**row, use_cache=False).logits[:, -tokens.shape[1] :] for row in rows])


def continuations(model: Any, pixels: Sequence[np.ndarray], prompts: np.ndarray, count: int) -> np.ndarray:
    """Greedy, of transformers, row by row; prompts of one length."""
    found = []
    for images, prompt in zip(pixels, prompts, strict=True):
        row = of_row(model.config, images, prompt, len(prompt))
        mask = torch.ones_like(row["input_ids"])
        out = model.generate(**row, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)
        found.append(out[0, mask.shape[1] :].numpy())
    return np.stack(found)


IMAGE_TEXT = "<image>"


def paligemma_folder(folder: Path, post: bool = False) -> Path:
    """A small PaliGemma in float32 as transformers saves it, with a byte-level tokenizer that has a token for an image.

    Args:
        post: the tokenizer itself puts the id that begins a text before it.
    """
    tokenizer = byte_level(post)
    tokenizer.add_special_tokens([IMAGE_TEXT])
    save(folder, tokenizer)
    tower = transformers.SiglipVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=12, patch_size=4,
        vision_use_head=False,
    )  # fmt: skip
    text = transformers.GemmaConfig(
        vocab_size=tokenizer.get_vocab_size() + 1, max_position_embeddings=128, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    config = transformers.PaliGemmaConfig(
        vision_config=tower, text_config=text, projection_dim=32, hidden_size=32,
        image_token_index=tokenizer.token_to_id(IMAGE_TEXT),
    )  # fmt: skip
    build(config, seed=1).float().save_pretrained(folder)
    return folder


def processor_of(folder: Path) -> Any:
    """That of transformers, of a folder's tokenizer."""
    pictures: Any = transformers.SiglipImageProcessorPil(size={"height": 12, "width": 12})
    pictures.image_seq_length = 9
    return transformers.PaliGemmaProcessor(pictures, transformers.PreTrainedTokenizerFast.from_pretrained(folder))
