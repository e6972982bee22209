"""Conversion of GGUF files: checked, dequantized once into a model folder in the Hugging Face format.

transformers reads the tensors, the model's shape and the vocabulary. What version 5.24 leaves out or reads wrongly is
corrected, one function each: settings in `gguf_config`, weights in `gguf_weights`; tied embeddings stored twice, end
tokens and the pre-tokenizer here.

The folder holds float16. A GGUF block is a float16 scale times integers of at most 8 bits, so float16 (11 bits of
precision) rounds by 0.02 %, far below the quantization itself (0.4 % at 8 bits, 5 to 10 % at 4), where bfloat16
(8 bits) would add 0.2 %. A file whose matrices are bfloat16 or float32 keeps that dtype.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from errno import ENOSPC
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsmerge_llm.errors import ConfigError, CorruptModelError, LoadError, UnsupportedModelError, ZSMergeError
from zsmerge_llm.models.converted import is_complete, put_in_place
from zsmerge_llm.models.file_locks import delete_leftovers, locked
from zsmerge_llm.models.gguf_config import overrides, own_config, set_query_scale, set_rope, set_window
from zsmerge_llm.models.gguf_gemma4 import read_gemma4
from zsmerge_llm.models.gguf_header import REMEDY, Header, read_header
from zsmerge_llm.models.gguf_weights import group_heads, read_gpt_oss, unused_tensors
from zsmerge_llm.models.log_filters import quiet_transformers
from zsmerge_llm.paths import check_folder, private_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

READERS = {"gpt-oss": read_gpt_oss, "gemma4": read_gemma4}
"""What reads the weights of architectures that transformers does not read."""

PARTIAL = ".partial-"
"""How the names of unfinished folders begin."""

CONVERTER_VERSION = 1
"""Version of the conversion, part of the folder's name. Raise it when the conversion changes."""

# llama.cpp ends an answer at these tokens too, beside the one that the file names
END_TOKENS = (
    *("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>"),
    *("<|end_of_text|>", "<end_of_turn>", "<|end|>", "<|eot|>"),
    *("<|return|>", "<|call|>", "<turn|>", "<|tool_response>"),
)
# vocabularies whose text llama.cpp splits at every digit, then as GPT-2 does
_SPLIT_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
_GPT2_SPLIT = {None, "default", "gpt-2", "phi-2", "mpt", "olmo"}
# vocabularies that do not split a word which is a token itself, and that begin a text with BOS by default
_IGNORE_MERGES = {"llama3", "llama-v3", "llama-bpe", "falcon3", "tekken"}


def folder_for(path: Path, cache: Path, digest: str | None = None) -> Path:
    """Return the folder of a converted file. Without a digest, path, size and modification time identify the file."""
    if digest is None:
        stat = path.stat()
        digest = hashlib.sha256(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()
    return cache / "converted" / f"{path.stem}-{digest[:16]}-v{CONVERTER_VERSION}"


def convert_once(path: Path, target: Path, report_status: Callable[[str], None]) -> Path:
    """Convert a file to the folder `target`, unless that is there and whole. Several processes may do so at once.

    Raises:
        ConfigError: the cache folder cannot be written, or others may write to it.
        LoadError: see `read_header`, or a file whose tensors do not fit the model.
    """
    if is_complete(target):
        check_folder(target)
        return target
    header = read_header(path)
    report_status("Converting GGUF (once)")
    with temporary_folder(target.parent) as folder, quiet_transformers():
        with _typed_errors(path):
            _convert(header, folder / "model")
        put_in_place(folder / "model", target)
    return target


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Make a temporary folder inside `parent`: within one file system a rename is atomic."""
    try:
        private_folder(parent)
        delete_leftovers(parent.glob(f"{PARTIAL}*"))
        temporary = tempfile.TemporaryDirectory(dir=parent, prefix=PARTIAL)
    except OSError as error:
        raise ConfigError(
            f"The cache folder {parent} cannot be written ({error.strerror}): set cache_dir or ZSMERGE_CACHE_DIR."
        ) from error
    with temporary as folder, locked(Path(folder)):
        yield Path(folder)


@contextmanager
def _typed_errors(path: Path) -> Iterator[None]:
    """Turn whatever transformers raises about a file into an error that names the file.

    Raises:
        LoadError: the cache folder has no room. CorruptModelError: anything else.
    """
    try:
        yield
    except ZSMergeError:
        raise
    except Exception as error:  # whatever a damaged file makes of transformers
        if isinstance(error, OSError) and error.errno == ENOSPC:
            raise LoadError(f"There is no room for what is made of {path} ({error}): free some space.") from error
        reason = next(iter(str(error).strip().splitlines()), "")
        raise CorruptModelError(
            f"{path} is damaged, or transformers cannot read it ({type(error).__name__}: {reason}): {REMEDY}."
        ) from error


def _convert(header: Header, target: Path) -> None:
    with temporary_folder(target.parent) as folder:
        file = _isolate(header.path, folder)
        tokenizer = _load_tokenizer(header, file)
        model = _load_dequantized(header, file)
    tied = _tie_embeddings(model, header)
    _check_complete(model, header, tied)
    set_rope(model.config, header)
    set_window(model.config, header)
    set_query_scale(model.config, header)
    _set_end_tokens(model, tokenizer, header)
    _save_folder(model, tokenizer, target)


def _isolate(path: Path, folder: Path) -> Path:
    """Return a link to the file in an empty folder: transformers would use a tokenizer.json beside the file."""
    link = folder / "model.gguf"
    for make in (os.symlink, os.link):
        try:
            make(path.resolve(), link)
            return link
        except OSError:  # no permission (Windows), or another file system
            continue
    return path


def read_config(path: Path) -> Any:
    """Return the transformers config of a file that is not converted yet. Its `dtype` is that of the conversion.

    Whether a file that holds an output layer is tied is not known before it is converted: it counts as not tied.

    Raises:
        LoadError: as `read_header`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    header = read_header(path)
    with _typed_errors(path):
        config: Any = own_config(header)
        if config is None:
            with quiet_transformers(), redirect_stderr(StringIO()):
                config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        for name, value in overrides(header).items():
            setattr(config, name, value)
        config.tie_word_embeddings = "output.weight" not in header.tensors
        config.dtype = _converted_dtype(header)
        kinds: Any = AutoModelForCausalLM._model_mapping
        config.architectures = [kinds[type(config)].__name__]
        set_window(config, header)
    return config


def _converted_dtype(header: Header) -> torch.dtype:
    import torch

    small = ("gate_inp", "conv.weight", "conv1d.weight", ".bias")  # routers, short convolutions, biases: always float32
    matrices = [t for name, t in header.tensors.items() if len(t.shape) > 1 and not any(part in name for part in small)]
    types = {t.tensor_type.name for t in matrices}
    return torch.float32 if "F32" in types else torch.bfloat16 if types == {"BF16"} else torch.float16


def _load_dequantized(header: Header, file: Path) -> PreTrainedModel:
    import torch

    for attempt in dict.fromkeys((_converted_dtype(header), torch.float32)):
        model = _load(header, file, attempt)
        if all(torch.isfinite(p).all() for p in model.parameters()):  # else a value overflows float16: load in float32
            return model
    raise CorruptModelError(f"{header.path} holds weights that are not finite: download it again.")


def _load(header: Header, file: Path, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    config = own_config(header)
    if config is not None and header.architecture in READERS:
        return READERS[header.architecture](header, config, dtype)
    settings = overrides(header) if config is None else {"config": config}
    with redirect_stderr(StringIO()):  # hides a progress bar that no setting turns off
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            **settings,
        )
    model, info = loaded
    if wrong := sorted(str(each) for each in info["mismatched_keys"]):
        raise CorruptModelError(f"{header.path} holds tensors of other shapes than its fields say: {wrong[0]}.")
    if header.architecture == "falcon":
        group_heads(model)
    return model


def _tie_embeddings(model: PreTrainedModel, header: Header) -> bool:
    """Tie the output layer to the embeddings if they are one matrix. Return whether the file held it twice.

    A file without output.weight is tied. llama.cpp's quantizer may store the matrix of a tied model twice, at two
    precisions (Qwen2.5: 5 and 8 bits). Two roundings of one matrix have a cosine similarity near 1, the two matrices
    of an untied model do not. The copy of more bits is used for both.
    """
    import torch
    from gguf import dequantize

    embedding, output = header.tensors["token_embd.weight"], header.tensors.get("output.weight")
    if output is None:
        model.config.tie_word_embeddings = True
        model.tie_weights()
        return False
    rows = slice(0, None, max(1, len(embedding.data) // 512))
    first, second = (torch.tensor(dequantize(t.data[rows], t.tensor_type)).flatten() for t in (embedding, output))
    if first.shape != second.shape or torch.cosine_similarity(first, second, dim=0) < 0.9:
        return False
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    finer = outputs if output.n_bytes > embedding.n_bytes else inputs
    inputs.weight = outputs.weight = finer.weight
    model.config.tie_word_embeddings = True
    return True


def _check_complete(model: PreTrainedModel, header: Header, tied: bool) -> None:
    """Refuse a file whose number of weights differs from the model's: transformers ignores tensors silently."""
    dropped = {"output.weight"} if tied else set()
    dropped |= unused_tensors(header, model.config)
    in_file = sum(t.n_elements for name, t in header.tensors.items() if name not in dropped and "rope_" not in name)
    in_model = sum(tensor.numel() for tensor in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    if in_file != in_model:
        raise UnsupportedModelError(
            f"{header.path} holds {in_file:,} weights, but a {header.architecture} model of its shape "
            f"has {in_model:,}: {REMEDY}."
        )


def _set_end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, header: Header) -> None:
    added = tokenizer.get_added_vocab()
    file_ids = (header.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    inside = {"<|end|>"} if "<|return|>" in added else set()  # ends a message of gpt-oss, whose answers have several
    ids = [i for i in file_ids if i is not None]
    ids += [added[token] for token in END_TOKENS if token in added and token not in inside]
    model.config.eos_token_id = model.generation_config.eos_token_id = list(dict.fromkeys(ids))


def _load_tokenizer(header: Header, file: Path) -> PreTrainedTokenizerBase:
    from tokenizers import Regex, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = header.fields.get("tokenizer.ggml.pre")
    adds_bos = split in _IGNORE_MERGES and "tokenizer.ggml.add_bos_token" not in header.fields
    settings: dict[str, Any] = {"add_bos_token": True} if adds_bos else {}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        file.parent, gguf_file=file.name, local_files_only=True, **settings
    )
    backend = tokenizer.backend_tokenizer
    byte_level = header.fields.get("tokenizer.ggml.model") == "gpt2"
    if split in _SPLIT_DIGITS:
        gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    elif split == "falcon":
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation("contiguous"), words, digits])
    elif byte_level and split not in _GPT2_SPLIT and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        logger.warning("%s names the unknown pre-tokenizer %r; GPT-2's is used: %s.", header.path.name, split, REMEDY)
    if split in ("qwen2", "qwen35"):
        backend.normalizer = normalizers.NFC()
    if split in _IGNORE_MERGES:
        backend.model.ignore_merges = True
    if length := header.get("context_length"):
        tokenizer.model_max_length = length
    return tokenizer


def _save_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    weights = {p.data_ptr(): (name, p) for name, p in reversed(model.state_dict().items())}  # tied weights once
    target.mkdir(mode=0o700)
    try:
        save_file(
            {name: p.contiguous() for name, p in weights.values()}, target / "model.safetensors", {"format": "pt"}
        )
    except (OSError, SafetensorError) as error:
        raise LoadError(
            f"The converted weights cannot be written to {target.parent} ({error}): free some space."
        ) from error
    config = model.config
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    if hasattr(config, "quantization_config"):  # the folder is no longer quantized
        del config.quantization_config
    model.generation_config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    config.save_pretrained(target)
