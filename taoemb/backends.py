"""Encoding without torch: ONNX Runtime and OpenVINO on the CPU, both from one exported ONNX file.

The whole model is exported, to the unit vectors: transformer, pooling, further modules and normalisation. int8 keeps the
weights of the matrix products as 8-bit blocks of 128 and rounds each token's activations block by block when it runs.

Left out, after measuring (all-MiniLM-L6-v2, one thread, against torch):

- ``onnxruntime.quantization.quantize_dynamic``: one activation scale for a whole batch, so that a text's vector depends on
  the texts that happen to be encoded with it (cosine .992 between batches, and .993 with torch);
- activations calibrated by nncf: 1.3 times as fast as this int8, but it needs texts, and the cosine falls from .999 to .997.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer
from torch import Tensor

from taoemb.files import checksum, read_manifest, replace_folder, write_manifest
from taoemb.types import FloatArray

Backend: TypeAlias = Literal["torch", "onnx", "onnx-int8", "openvino", "openvino-bf16", "openvino-int8"]
Run: TypeAlias = Callable[[dict[str, Any]], FloatArray]
"""From padded features (tensors ``[B, T]``) to unit vectors ``[B, D]``; may be called by several threads."""

EXACT: tuple[Backend, ...] = ("torch", "onnx", "openvino")
"""Backends whose vectors are torch's up to float32 rounding."""

_BLOCK = 128  # values that share a scale in int8; 32 costs a fifth of ONNX Runtime's speed, for cosine .9996 not .9991
_LEAST_COSINE = {"float32": 0.9999, "bf16": 0.999, "int8": 0.95}  # below it the export is broken, not imprecise
_FORMAT = 1
_KIND = "exported model"
_EXAMPLES = ["red shoes", "a longer text, so that the short ones are padded", "waterproof hiking boots, 42"]


def load_backend(model: SentenceTransformer, backend: Backend, cache: Path | None, identity: str) -> Run:
    """Export a model for a backend, or take the export from ``cache``, and load it on as many threads as torch uses.

    Args:
        model: in evaluation mode, on the CPU.
        backend: any but ``torch``.
        cache: folder that keeps exports; a corrupt or half one is made again. None: a temporary folder.
        identity: what tells this model from others in the cache.

    Raises ValueError when the model cannot run on the backend, ImportError that names the extra when a package is
    missing, and RuntimeError when the loaded model does not give torch's vectors.
    """
    _check_model(model, backend)
    runtime, _, precision = backend.partition("-")
    for package in ("onnx", "onnxscript", "onnxruntime"):  # openvino reads what the first two write
        _import(package, runtime)
    if runtime == "openvino":
        _import_openvino()
    load = _load_openvino if runtime == "openvino" else _load_onnx
    example = model.preprocess(_EXAMPLES)
    names = [name for name, value in example.items() if isinstance(value, Tensor)]
    if cache is None:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows: the file may still be open
            _export(model, example, Path(folder), precision == "int8")
            run = load(Path(folder) / "model.onnx", names, precision)
    else:
        run = load(_cached_export(model, example, cache, precision == "int8", identity), names, precision)
    _compare(model, run, backend, _LEAST_COSINE[precision or "float32"])
    return run


def _check_model(model: SentenceTransformer, backend: str) -> None:
    if backend not in get_args(Backend):
        raise ValueError(f"backend {backend!r} is none of {', '.join(get_args(Backend))}")
    if isinstance(model[0], StaticEmbedding):
        raise ValueError(f"backend {backend!r} is for transformers; static embeddings are fastest with backend='torch'")
    if not isinstance(model[0], Transformer):
        raise ValueError(
            f"backend {backend!r} is for models that start with a Transformer, not {type(model[0]).__name__}"
        )
    if any(model.prompts.values()) and any(isinstance(m, Pooling) and not m.include_prompt for m in model):
        raise ValueError(f"backend {backend!r} cannot leave the prompt out of the pooling; use backend='torch'")
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ValueError(f"backend {backend!r} runs on the CPU and the model is on {device}; give device='cpu'")


def _import(package: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        message = f'backend {extra!r} needs {package}; install with: pip install "taoemb[{extra}]"'
        raise ImportError(message) from error


# Export --------------------------------------------------------------------------------------------------------------


class _Graph(torch.nn.Module):
    """A model as a function from tensors to vectors; ``settings`` are the features that are no tensors."""

    def __init__(self, model: SentenceTransformer, settings: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        embedding: Tensor = self.model({**self.settings, **features})["sentence_embedding"]
        return embedding


def _export(model: SentenceTransformer, example: dict[str, Any], folder: Path, int8: bool) -> None:
    """Write ``model.onnx`` (its weights beside it) with free batch and sequence axes."""
    tensors = {name: value for name, value in example.items() if isinstance(value, Tensor)}
    graph = _Graph(model, {name: value for name, value in example.items() if name not in tensors})
    free = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in tensors}
    with _quiet(), torch.no_grad():
        try:
            torch.onnx.export(
                graph.eval(), (), folder / "model.onnx", kwargs={"features": tensors}, dynamo=True,
                dynamic_shapes={"features": free}, external_data=True, verbose=False,
                input_names=list(tensors), output_names=["unit_vectors"],  # "embedding" is the name of an inner node
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            raise ValueError("torch cannot export this model to ONNX; use backend='torch'") from error
        if int8:
            _quantise(folder)


def _quantise(folder: Path) -> None:
    """Turn the weights of ``model.onnx`` to 8-bit blocks, in place."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    config = DefaultWeightOnlyQuantConfig(block_size=_BLOCK, is_symmetric=True, bits=8, accuracy_level=4)  # 4: int8
    quantizer = MatMulNBitsQuantizer(onnx.load(folder / "model.onnx"), algo_config=config)
    quantizer.process()
    for file in folder.iterdir():
        file.unlink()
    quantizer.model.save_model_to_file(str(folder / "model.onnx"), use_external_data_format=True)


def _cached_export(model: SentenceTransformer, example: dict[str, Any], cache: Path, int8: bool, identity: str) -> Path:
    from filelock import FileLock  # torch depends on it

    config = model[0].auto_model.config.to_diff_dict()  # type: ignore[union-attr,operator]
    config.pop("_name_or_path", None)  # the same model in another folder
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers", "onnxscript", "onnxruntime")]
    text = json.dumps([_FORMAT, identity, config, int8, _BLOCK, versions], sort_keys=True, default=str)
    folder = cache / hashlib.sha256(text.encode()).hexdigest()[:32]
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / ".lock"):  # the workers of a server start together: one exports, the others wait
        if not _is_whole(folder):
            with replace_folder(folder, "export.json") as beside:
                _export(model, example, beside, int8)
                files = {file.name: checksum(file) for file in sorted(beside.iterdir())}
                write_manifest(beside / "export.json", {"kind": _KIND, "files": files})
    return folder / "model.onnx"


def _is_whole(folder: Path) -> bool:
    try:
        files = read_manifest(folder / "export.json")["files"]
        return all(checksum(folder / name) == wanted for name, wanted in files.items())
    except (FileNotFoundError, ValueError):
        return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporter says to its own developers from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "onnxruntime")]
    levels = [logger.level for logger in loggers]
    handler = logging.NullHandler()  # onnxruntime configures the root logger unless it has a handler
    logging.root.addHandler(handler)
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "# The axis name: .* will not be used", UserWarning)
            yield
    finally:
        logging.root.removeHandler(handler)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# Runtimes ------------------------------------------------------------------------------------------------------------


def _load_onnx(file: Path, names: list[str], precision: str) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    wanted = {entry.name for entry in session.get_inputs()}  # an input that the model does not read is gone

    def run(features: dict[str, Any]) -> FloatArray:
        arrays = {name: features[name].numpy() for name in names if name in wanted}
        (vectors,) = session.run(None, arrays)
        return np.asarray(vectors, dtype=np.float32)

    return run


def _load_openvino(file: Path, names: list[str], precision: str) -> Run:
    core = _import_openvino().Core()
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_CPU_PINNING": False,  # processes that share a machine would be pinned to the same cores
        "PERFORMANCE_HINT": "LATENCY",
        # By default it depends on the machine; one without bf16 arithmetic computes in float32 all the same.
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": _BLOCK if precision == "int8" else 0,
    }
    compiled = core.compile_model(core.read_model(file), "CPU", settings)
    wanted = {name for entry in compiled.inputs for name in entry.names}

    def run(features: dict[str, Any]) -> FloatArray:
        arrays = {name: features[name].numpy() for name in names if name in wanted}
        vectors = compiled.create_infer_request().infer(arrays)[0]  # one request is for one thread, and costs 10 µs
        return np.array(vectors, dtype=np.float32)  # a copy: the memory is the request's

    return run


def _import_openvino() -> ModuleType:
    """Import openvino without its telemetry, which else reports every import to the vendor before anybody is asked."""
    telemetry = "openvino_telemetry"
    silence = telemetry not in sys.modules
    try:
        if silence:
            sys.modules[telemetry] = None  # type: ignore[assignment]  # reads as not installed
        return _import("openvino", "openvino")
    finally:
        if silence:
            del sys.modules[telemetry]


def _compare(model: SentenceTransformer, run: Run, backend: str, least: float) -> None:
    """Raise RuntimeError unless a backend gives torch's vectors, for one text, for several, and short ones."""
    for texts in (_EXAMPLES[:1], ["a"], [*_EXAMPLES[1:], "b", " ".join(_EXAMPLES)]):
        features = model.preprocess(texts)
        vectors = run(features)
        with torch.inference_mode():
            wanted = model(features)["sentence_embedding"].numpy()
        cosine = float((vectors * wanted).sum(axis=1).min()) if vectors.shape == wanted.shape else 0.0
        if not cosine >= least:  # also NaN
            raise RuntimeError(f"backend {backend!r} does not give this model's vectors: cosine {cosine:.4f} with torch's "
                               f"where {least} is expected; use backend='torch'")  # fmt: skip
