"""What the command line's parts share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

F = TypeVar("F", bound=Callable[..., None])
Seed = Annotated[int, typer.Option(help="Of every random choice; the same seed gives the same bytes.")]
Out = Annotated[Path, typer.Option(help="Folder to write.")]
Backend = Annotated[
    str,
    typer.Option(
        help="What computes embeddings: torch, or on a CPU onnx, onnx-int8, openvino, openvino-bf16, openvino-int8."
    ),
]
RESUMES = ("demo", "train", "encode", "index_refresh", "judge_score", "judge_train", "judge_distill", "benchmark")


def told_apart(command: F) -> F:
    """Mistakes of the caller end with one line and exit status 2, Ctrl-C with 130; anything else is a bug and shows its
    traceback."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError:  # the reader, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at the end
            raise typer.Exit(1) from None
        except (ValueError, TypeError, KeyError, OSError, ImportError, FloatingPointError) as error:
            text = error.args[0] if isinstance(error, KeyError) else error
            typer.echo(f"error: {text}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            resumes = command.__name__ in RESUMES
            typer.echo("interrupted" + ": the same command goes on from where it was" * resumes, err=True)
            raise typer.Exit(130) from None

    return run  # type: ignore[return-value]
