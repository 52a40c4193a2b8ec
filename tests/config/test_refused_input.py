"""Bad input that only one reader in its place can find: each error names the field, its value and what is allowed."""

from __future__ import annotations

import fcntl
import json
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from shared_config.contract.decoding import check_dtype
from shared_config.contract.int8 import check_weights_dtype, quantised
from shared_config.contract.specs import Constant, ParameterSpec, given
from shared_config.contract.vision import job_table
from shared_config.data.corpus import _standard_library_files, rows_corpus
from shared_config.data.jsonl import CONVERSATIONS, Row
from shared_config.data.mixture import MixedData
from shared_config.data.prepare import Encoding, prepare
from shared_config.data.prepared import prepared_index
from shared_config.data.template import ChatTemplate
from shared_config.data.tokenizer import ByteTokenizer, load_library_tokenizer
from shared_config.errors import ConfigError, UserError
from shared_config.interchange.activations import DTYPES, read_activations
from shared_config.interchange.token_index import INDEX, UNFINISHED, read_index
from shared_config.interchange.toml import number_of, section_of
from shared_config.interchange.vision import read_tower, tokens_per_image
from shared_config.interchange.with_images import image_model_content
from shared_config.loader import load_config
from shared_config.parity.foreign.layout import parse_op
from shared_config.parity.request import make_request
from tests.tokenizers import save, words

SPEC = ParameterSpec((2, 3), Constant(0.0), (None, None))
LLAVA = {"model_type": "llava", "vision_config": {}, "text_config": {}}
PALIGEMMA = {
    "model_type": "paligemma",
    "vision_config": {"model_type": "siglip_vision_model"},
    "text_config": {"model_type": "gemma", "hidden_size": 32},
    "projection_dim": 32,
}
OLMO = [
    "--model.family",
    "olmo2",
    "--model.qk_norm",
    "true",
    "--model.norm_placement",
    "after",
    "--model.qk_norm_over",
    "width",
]
IMAGES = ["--vlm.arch", "joint_decoder", "--vlm.max_text_len", "8", "--vision_encoder.type"]


def folder_of(folder: Path, **files: object) -> Path:
    """A folder with JSON files."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


PLAIN: dict[str, tuple[Callable[[], object], str]] = {
    "dtype": (lambda: check_dtype("float8"), r"^dtype = 'float8': must be one of .*bfloat16"),
    "weights' dtype": (lambda: check_weights_dtype("int4"), r"^weights_dtype = 'int4': must be one of .*int8"),
    "infinite": (lambda: quantised(np.array([[1.0, np.inf]]), "q_proj"), "^q_proj: must be finite to be held as int8"),
    "no number": (lambda: quantised(np.array([[np.nan, 1.0]]), "q_proj"), "^q_proj: must be finite"),
    "axes": (
        lambda: ParameterSpec((2, 3), Constant(0.0), (None,)),
        r"^axes = \(None,\): must name each axis of shape = \(2, 3\)",
    ),
    "declared": (lambda: given([("weight", SPEC)]), "^declared parameters = .*: must be a mapping from names to"),  # type: ignore[arg-type]
    "declared shapes": (lambda: given({"weight": SPEC, "bias": (2,)}), "^declared parameters = .*must be a mapping"),
    "true": (lambda: number_of({"a": {"b": True}}, "a", "b", 1.0), "^a.b = True: must be a number"),
    "text": (lambda: number_of({"a": {"b": "3"}}, "a", "b", 1.0), "^a.b = '3': must be a number"),
    "few numbers": (lambda: parse_op("split"), "split takes 1 to 1 numbers, not 0"),
    "many numbers": (lambda: parse_op("split 2 3"), "split takes 1 to 1 numbers, not 2"),
    "no heads": (lambda: parse_op("split 0"), "must have 1 head or more"),
    "request": (
        lambda: make_request(load_config("debug"), dtype="fp8", seed=0),
        "^dtype = 'fp8': needs train.mixed_precision = 'fp8', not ",
    ),
    "width": (
        lambda: job_table(load_config("debug", [*IMAGES, "clip", "--vision_encoder.path", "there"])),
        "^vision_encoder.feature_dim = 0: type 'clip' does not say its width",
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_values(name: str) -> None:
    call, message = PLAIN[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_numbers_and_declarations_that_are_fine() -> None:
    assert number_of({"a": {"b": 3}}, "a", "b", 1.0) == 3
    assert number_of({"a": 2}, "a", "b", 1.5) == number_of({}, "a", "b", 1.5) == 1.5
    assert section_of(None, "a") == section_of({"a": [1]}, "a") == {}
    assert dict(given(MappingProxyType({"weight": SPEC}))) == {"weight": SPEC}
    assert tokens_per_image(load_config("debug")) == 0


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ({**LLAVA, "vision_feature_layer": 99}, "clip", r"config\.json: vision_feature_layer = 99: must be"),
        (LLAVA, "siglip2", r"vision_config\.model_type = 'clip_vision_model': type 'siglip2' needs siglip"),
        ({**LLAVA, "image_token_index": -1}, "clip", r"config\.json: image_token_index = -1"),
        (PALIGEMMA, "clip", r"model_type = 'siglip_vision_model': type 'clip' needs another tower"),
        ({**PALIGEMMA, "projection_dim": 24}, "siglip2", r"config\.json: projection_dim = 24"),
        ({"model_type": "clip_vision_model"}, "siglip2", r"model_type = 'clip_vision_model': type 'siglip2' needs"),
        ({"model_type": "clip", "vision_config": [1]}, "clip", r"vision_config = \[1\]: must be an object"),
        ({"model_type": "clip_vision_model", "layer_norm_eps": "small"}, "clip", "layer_norm_eps = 'small': must be a"),
        ({"model_type": "clip_vision_model", "num_channels": 4}, "clip", "num_channels = 4: must be 3"),
        ({"model_type": "siglip2_vision_model"}, "siglip2", "NaFlex"),
    ],
)
def test_towers(content: dict[str, object], kind: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_tower(folder_of(tmp_path, config=content), kind)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--adapter.type", "linear"], "^adapter.type = 'linear': must be 'mlp_2layer'$"),
        (["--adapter.hidden_dim", "24"], "^adapter.hidden_dim = 24: must be 0 or model.dim = 4096$"),
        (["--video.min_frames", "1", "--video.max_frames", "2"], "^video: must be absent, as a LLaVA sees one pi"),
        (OLMO, r"^model.family = 'olmo2': must be llama or mistral or qwen2$"),
    ],
)
def test_what_no_llava_is(overrides: list[str], message: str, tmp_path: Path) -> None:
    config = load_config(str(folder_of(tmp_path, config=LLAVA)), overrides)
    with pytest.raises(ConfigError, match=message):
        image_model_content(config)


@pytest.mark.parametrize(("preset", "arch"), [("debug", None), ("debug_vlm_mot", "mot")])
def test_models_of_other_architectures_are_no_llava(preset: str, arch: str | None) -> None:
    with pytest.raises(ConfigError, match=f"^vlm.arch = {arch!r}: must be 'joint_decoder'$"):
        image_model_content(load_config(preset))


def test_types_of_activations_are_an_object(tmp_path: Path) -> None:
    file = tmp_path / "activations.npz"
    np.savez(file, x=np.zeros(2), __dtypes__=np.array("[1]"))
    with pytest.raises(UserError, match=f"^{file}: can't be read as a file of activations: {DTYPES} must hold a JSON"):
        read_activations(file)


def test_shards_are_objects(tmp_path: Path) -> None:
    fields = {"version": 1, "dtype": "uint16", "tokenizer": "a", "tokenizer_hash": "b", "sources": "c"}
    numbers = {"vocab_size": 9, "bos": 1, "eos": 2, "documents": 0, "tokens": 0}
    folder = folder_of(tmp_path, **{INDEX.removesuffix(".json"): {**fields, **numbers, "shards": [3]}})
    with pytest.raises(UserError, match=rf"{INDEX}: shards\[0\] = 3: must be an object"):
        read_index(folder)


def test_folders_of_tokens_that_are_not_finished_or_being_made(tmp_path: Path) -> None:
    assert prepared_index("") is None
    assert prepared_index(str(tmp_path)) is None
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("hello")
    with (tmp_path / UNFINISHED).open("w") as journal:
        with pytest.raises(UserError, match=rf"^data.path = '{tmp_path}': is not finished; run kempnerforge prepare"):
            prepared_index(str(tmp_path))
        fcntl.flock(journal, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=f"^{tmp_path}: another process is preparing it$"):
            prepare([_elsewhere(tmp_path)], tmp_path, Encoding("bytes"))


def _elsewhere(tmp_path: Path) -> Path:
    """A folder of text that is not within the one that is written."""
    folder = tmp_path.parent / f"{tmp_path.name}-text"
    folder.mkdir()
    (folder / "a.txt").write_text("hello")
    return folder


def test_a_python_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=f"^{tmp_path}: this Python has no sources .*; set data.path$"):
        _standard_library_files()


def test_conversations_are_no_stream(tmp_path: Path) -> None:
    for row in [Row("a.jsonl:1", kind) for kind in CONVERSATIONS]:
        with pytest.raises(UserError, match=r"^data.path = 'there': holds conversations, which are no stream"):
            rows_corpus("there", [row], ByteTokenizer(), 0.1, 300)


def test_batches_count_from_0() -> None:
    data = MixedData.__new__(MixedData)
    with pytest.raises(ValueError, match=r"^index = -1: must be at least 0$"):
        data.batch(-1)


def test_tokenizers_that_can_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder_of(tmp_path, tokenizer={}) / "tokenizer.json"
    with pytest.raises(UserError, match=f"^{file}: not a tokenizer that can be read"):
        load_library_tokenizer(file)
    with pytest.raises(UserError, match=f"^data.tokenizer = '{tmp_path / 'none'}': "):
        load_library_tokenizer(tmp_path / "none" / "tokenizer.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=f"^data.tokenizer = '{tmp_path}': reading it needs the package 'tokenizers'"):
        load_library_tokenizer(file)


def test_templates_name_the_token_of_images_and_need_their_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path, words(), chat_template="{{ messages[0].content }}")
    assert ChatTemplate(folder, 3).encode_prompt([{"role": "user", "content": "world"}]) == [4]
    with pytest.raises(UserError, match=f"^vlm.image_token_id = 99: must be the id of a token of {folder}$"):
        ChatTemplate(folder, 99)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match=f"^{folder}: its chat template needs the package 'jinja2'"):
        ChatTemplate(folder)
