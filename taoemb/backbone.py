"""What of an encoder is trained, and how: towers, LoRA, bfloat16, gradient checkpointing, compilation.

Left out: weights in less than float32 (Adam's small steps round to nothing there), a base model that two LoRA towers
share (each has its own), and heads trained beside LoRA.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Router, Transformer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from taoemb.encoder import Encoder, module_settings
from taoemb.pretrained import has_adapter, remove_adapters

if TYPE_CHECKING:
    from peft import LoraConfig

Tower = Literal["shared", "query_only", "two_tower"]


@dataclass(frozen=True)
class BackboneConfig:
    """Which weights are trained, and at what cost in memory. All but the towers is for transformers, not for static
    embeddings. Names follow transformers and peft."""

    tower: Tower | None = None
    """``shared``: one model embeds queries and items. ``query_only``: items keep the start model's embeddings, so that their index
    never changes, and a copy for queries is trained. ``two_tower``: both are trained, each with weights of its own. None:
    ``two_tower`` for a model that has two towers and for static embeddings that learn more than relevance, else ``shared`` (our
    choice; benchmarks/LOG.md)."""
    tower_sharing: float = 0.3
    """With ``two_tower``: what a tower learns from the other, as a share of the other's gradient that is added to its own. 0: nothing;
    at 1 the towers would never part. Towers of different modules or tokens share nothing. Our method and default, measured with static
    embeddings alone (benchmarks/LOG.md)."""
    lora_rank: int = 0
    """Rank of the LoRA adapters, 8 to 64 say, the only weights that are then trained; 0 trains all weights."""
    lora_alpha: int = 32
    """What an adapter adds is scaled by ``lora_alpha / lora_rank``."""
    lora_dropout: float = 0.0
    """Dropout before the adapters; stage 2 trains without dropout."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """Ends of the names of the linear layers that get an adapter, such as q_proj and v_proj; ``all-linear``: all of them."""
    merge_lora: bool = True
    """A saved model has plain weights, the adapters merged into them. False keeps adapters, beside the start model: loading needs
    peft, and moving the folder needs its path corrected; two towers cannot be saved so."""
    bf16: bool = False
    """Compute in bfloat16 (autocast), faster where the hardware can. Weights, optimiser and vectors stay float32."""
    gradient_checkpointing: bool = False
    """Keep no activations inside a transformer's layers and compute them again in the backward pass: a third more time for a
    small part of the memory."""
    torch_compile: bool = False
    """Compile the transformer's layers at their first use, which takes a minute and, on a CPU, a C++ compiler."""

    def __post_init__(self) -> None:
        if self.tower not in (None, *get_args(Tower)):
            raise ValueError(f"tower={self.tower!r}: give {', '.join(get_args(Tower))}")
        if not 0 <= self.tower_sharing < 1:
            raise ValueError(f"tower_sharing={self.tower_sharing}: give a share from 0 to below 1; "
                             "for towers that never part give tower='shared'")  # fmt: skip
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank={self.lora_rank}: give a rank such as 16, or 0 to train all weights")
        if self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha={self.lora_alpha}: give a number greater than 0")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout}: give a share from 0 to below 1")
        _check_saved(self, self.tower)
        if not self.lora_targets or ("all-linear" in self.lora_targets and len(self.lora_targets) > 1):
            raise ValueError(f"lora_targets={list(self.lora_targets)}: give names of layers, or 'all-linear' alone")


def prepare(encoder: Encoder, config: BackboneConfig, *, one_tower: bool = False) -> None:
    """Make an encoder ready for training, in place: build its towers, add adapters, freeze what is not trained.

    ``one_tower`` gives static embeddings one where the config names none, as stage 1 and relevance alone want it.

    It may already be so, from an earlier call or because it was saved so: towers and adapters are kept and trained on.
    Without LoRA, adapters that the model carries are merged into its weights first. New adapters change no embedding,
    and their random part is the same at every start, so that a resumed run finds the model it began with.

    Raises ValueError when the model does not fit the config (a static model, a backend that does not train, two towers
    for ``tower="shared"``, other adapters), ImportError that names the extra when peft is missing.
    """
    if encoder.backend != "torch":
        raise ValueError(f"backend {encoder.backend!r} only encodes; load the model with backend='torch' to train it")
    _check_transformer(encoder.model, config)
    lora = _lora_config(config) if config.lora_rank else None
    split = isinstance(encoder.model[0], Router) or (
        encoder.static and not one_tower and not _module_arguments(encoder.model)
    )
    tower = config.tower or ("two_tower" if split else "shared")
    _check_saved(config, tower)
    _build_towers(encoder.model, tower)
    trained: Any = encoder.model
    if tower == "query_only":
        trained = encoder.model[0].sub_modules["query"]  # type: ignore[index]
    if lora is None:
        remove_adapters(encoder.model, merge=True)
    else:
        _add_adapters(trained, lora, encoder.device)
    encoder.model.requires_grad_(False)
    for name, parameter in trained.named_parameters():
        parameter.requires_grad_(not config.lora_rank or "lora_" in name)
    if tower == "query_only":
        encoder.model[0].sub_modules["document"].requires_grad_(False)  # type: ignore[index]
    if not encoder.trainable_parameters():
        raise ValueError(f"tower={tower!r}: the model's queries have no weights that its items do not use too; "
                         "give a model with one tower, or tower='two_tower'")  # fmt: skip
    for layer in _layers(trained):
        _recompute(layer, config.gradient_checkpointing)
        if config.torch_compile:
            for part in layer.children() if config.gradient_checkpointing else [layer]:  # checkpoints stay outside
                part.compile(dynamic=True)
    encoder.bf16, encoder.merge_lora = config.bf16, config.merge_lora
    encoder.tower_sharing = config.tower_sharing if tower == "two_tower" and _alike(encoder.model) else 0.0


def _check_transformer(model: SentenceTransformer, config: BackboneConfig) -> None:
    wanted = [
        name for name in ("lora_rank", "bf16", "gradient_checkpointing", "torch_compile") if getattr(config, name)
    ]
    if wanted and not any(isinstance(module, Transformer) for module in model.modules()):
        first = type(model[0]).__name__
        raise ValueError(f"{', '.join(wanted)}: for transformers, and this model starts with {first}; leave it off")
    layered = [name for name in wanted if name in ("gradient_checkpointing", "torch_compile")]
    if layered and not any(True for _ in _layers(model)):
        raise ValueError(f"{', '.join(layered)}: transformers does not mark the layers of this model; leave it off")


def _layers(module: nn.Module) -> Iterator[GradientCheckpointingLayer]:
    return (layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer))


# Towers --------------------------------------------------------------------------------------------------------------


def _build_towers(model: SentenceTransformer, tower: Tower) -> None:
    """Put all modules but the normalisation twice into a Router, unless there is one."""
    if isinstance(model[0], Router):
        if tower == "shared":
            raise ValueError("tower='shared': the model has two towers; give 'query_only' or 'two_tower'")
        return
    if tower == "shared":
        return
    if arguments := _module_arguments(model):
        raise ValueError(f"tower={tower!r}: the model's modules take arguments of their own ({arguments}), "
                         "which no Router passes on; give tower='shared'")  # fmt: skip
    modules: list[Any] = list(model)[:-1]
    router = Router.for_query_document(query_modules=copy.deepcopy(modules), document_modules=modules)
    del model[: len(modules)]
    model.insert(0, router)


def _module_arguments(model: SentenceTransformer) -> dict[str, Any]:
    return {name: given for name, given in (model.module_kwargs or {}).items() if given}


def _alike(model: SentenceTransformer) -> bool:
    """Whether a weight of one tower means what the same weight of the other does: same modules, shapes and tokens."""
    first: Any = model[0]
    query, item = (first.sub_modules[kind] for kind in ("query", "document"))
    shapes = [[(name, p.shape) for name, p in tower.named_parameters()] for tower in (query, item)]
    return (list(module_settings(query)) == list(module_settings(item)) and shapes[0] == shapes[1]
            and query[0].tokenizer.get_vocab() == item[0].tokenizer.get_vocab())  # fmt: skip


def _check_saved(config: BackboneConfig, tower: Tower | None) -> None:
    if config.lora_rank and not config.merge_lora and tower not in (None, "shared"):
        raise ValueError(f"merge_lora=false, tower={tower!r}: transformers cannot load the adapters of a Router; give "
                         "merge_lora=true, or tower='shared'")  # fmt: skip


# LoRA ----------------------------------------------------------------------------------------------------------------


def _lora_config(config: BackboneConfig) -> LoraConfig:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError('lora_rank needs peft; install with: pip install "taoemb[lora]"') from error
    targets = "all-linear" if config.lora_targets == ("all-linear",) else list(config.lora_targets)
    return LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=targets
    )


def _add_adapters(trained: nn.Module, lora: LoraConfig, device: torch.device) -> None:
    """Add an adapter to each transformer that has none."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for module in trained.modules():
            if not isinstance(module, Transformer):
                continue
            torch.manual_seed(0)  # two towers begin alike, so that they can share gradients
            if has_adapter(module):
                for known in module.auto_model.peft_config.values():
                    _check_same(known, lora)
                continue
            try:
                module.auto_model.add_adapter(copy.deepcopy(lora))  # which notes in it what it belongs to
            except ValueError as error:
                raise ValueError(f"lora_targets={lora.target_modules}: {error}") from error


def _check_same(known: LoraConfig, asked: LoraConfig) -> None:
    """Raises ValueError where a model's adapters are not those that the settings ask for."""
    for name in ("r", "lora_alpha", "lora_dropout"):
        if getattr(known, name) != getattr(asked, name):
            setting = "lora_rank" if name == "r" else name
            raise ValueError(f"{setting}={getattr(asked, name)}: the model carries adapters with {getattr(known, name)}; give the same, "
                             "or a model saved with merge_lora=true")  # fmt: skip
    targets = asked.target_modules  # of "all-linear" peft keeps the names that it found
    if targets != "all-linear" and set(targets or ()) != set(known.target_modules or ()):
        raise ValueError(f"lora_targets={sorted(targets or ())}: the model carries adapters of {sorted(known.target_modules or ())}; "
                         "give the same, or a model saved with merge_lora=true")  # fmt: skip


# Gradient checkpointing ----------------------------------------------------------------------------------------------


def _recompute(layer: GradientCheckpointingLayer, on: bool) -> None:
    """Checkpoint a layer in every mode: transformers would do so only in training mode, and stage 2 trains in evaluation
    mode, without dropout."""
    now = layer.__dict__.get("forward")
    if isinstance(now, functools.partial) and now.func is checkpoint:
        del layer.forward
    if on:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
