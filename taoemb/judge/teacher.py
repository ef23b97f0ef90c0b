"""Reasons for graded pairs, written by a stronger model behind an OpenAI-compatible server.

The teacher is told the grade and writes the chain that leads to it; a chain that cannot be read, or whose verdicts lead to another
grade, is asked for again and then given up (our choice; TaoSR1, arXiv 2508.12365, has a stronger model write and people check).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from taoemb.contrastive import check_positive
from taoemb.judge.agrl import Lattice
from taoemb.judge.examples import LINES, Example, parse
from taoemb.judge.prompts import JudgePrompt
from taoemb.judge.verdicts import fingerprint
from taoemb.shop_rules import ATTRIBUTE_VERDICTS, CATEGORY_VERDICTS

_TIMEOUT = 600.0  # seconds for a whole answer, which comes in one piece; our choice


@dataclass(frozen=True)
class TeacherConfig:
    """Who writes the reasons."""

    url: str = ""
    """Base of an OpenAI-compatible API, such as http://host:8000/v1; its key is read from OPENAI_API_KEY. Without one a generated shop's rules
    write the reasons, and pairs of other catalogs have none."""
    model: str = ""
    """Name under which the server knows the teacher."""
    tries: int = 3
    """Times that a pair is asked for until its reasons can be read and lead to its grade [ours]."""
    temperature: float = 0.7
    """Of the teacher's sampling [ours]."""
    max_tokens: int = 256
    """Longest answer [ours]."""
    concurrency: int = 16
    """Requests at a time."""

    def __post_init__(self) -> None:
        check_positive(self, "tries", "max_tokens", "concurrency")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: give 0 or more")
        if bool(self.url) != bool(self.model):
            raise ValueError(f"url={self.url!r}, model={self.model!r}: a teacher needs both")


class Teacher:
    """Writes reasons for what ``prompt`` shows of a pair; kept are those whose verdicts lead to its grade by the ``lattice``, by default the
    generated shop's.

    Raises ValueError for an address that is none, ImportError without httpx.
    """

    def __init__(self, config: TeacherConfig, prompt: JudgePrompt, lattice: Lattice | None = None) -> None:
        from taoemb.judge.chat_server import ChatServer

        self.config, self.prompt = config, prompt
        self.server = ChatServer(config.url, config.model, concurrency=config.concurrency, timeout=_TIMEOUT)
        self._table = prompt.scheme.labels((lattice or Lattice.load()).table)

    def write(self, examples: Sequence[Example], file: Path) -> list[Example]:
        """The examples, those without reasons with the teacher's where it found some. ``file`` keeps each answer: a call after a kill asks
        for the others alone.

        Raises `taoemb.judge.chat_server.JudgeServerError` when the server refuses or fails for good.
        """
        known = _read(file)
        chats = {row: self._chat(e) for row, e in enumerate(examples) if not e.reasons}
        keys = {row: fingerprint(self.config.model, self.config.temperature, self.config.max_tokens, self.config.tries, chat)
                for row, chat in chats.items()}  # fmt: skip
        asked = {"max_tokens": self.config.max_tokens, "temperature": self.config.temperature}
        waiting = list({key: row for row, key in keys.items() if key not in known}.values())  # pairs may read the same
        file.parent.mkdir(parents=True, exist_ok=True)
        with tqdm(total=len(waiting), desc="teacher", disable=None, leave=False) as bar:
            for trial in range(self.config.tries):
                rows, waiting = waiting, []
                asking = self.server.answers(
                    [chats[row] for row in rows], asked, _content, "check that it is a chat model"
                )
                with contextlib.closing(asking) as answers:
                    for n, text in answers:
                        row = rows[n]
                        reasons = self.readable(text, examples[row])
                        if not reasons and trial + 1 < self.config.tries:
                            waiting.append(row)
                            continue
                        known[keys[row]] = reasons
                        with file.open("ab") as stream:
                            stream.write((json.dumps([keys[row], reasons], ensure_ascii=False) + "\n").encode())
                        bar.update()
        return [replace(e, reasons=known[keys[row]]) if row in keys else e for row, e in enumerate(examples)]

    def readable(self, text: str, example: Example) -> str:
        """The lines of a chain in an answer; empty where it is none that leads to the example's grade."""
        said = text.rpartition("</think>")[2].replace("*", "")
        lines = [line.strip() for line in said.splitlines() if line.strip().startswith(LINES)]
        lines = [
            line.lower().rstrip(" .").capitalize() if line.startswith(("Category:", "Attributes:")) else line
            for line in lines
        ]
        reasons = "\n".join(lines)
        if sum(line.startswith("Product:") for line in lines) != 1:
            return ""
        scheme = self.prompt.scheme
        label = scheme.of_grade[example.grade]
        chain = parse(f"{scheme.answers[label]}\n{reasons}", "post", scheme)
        return reasons if chain.ok and self._table[chain.category, chain.attribute] == label else ""

    def _chat(self, example: Example) -> list[dict[str, str]]:
        scheme = self.prompt.scheme
        label = scheme.of_grade[example.grade]
        names = [f"{answer} - {name}" for answer, name in zip(scheme.answers, scheme.names, strict=True)]
        table = "\n".join(
            f"Category {category}, attributes {attribute}: {names[self._table[c, a]]}"
            for c, category in enumerate(CATEGORY_VERDICTS)
            for a, attribute in enumerate(ATTRIBUTE_VERDICTS)
        )
        system = (
            f"{self.prompt.system()}\n\nThe label of the pair is known; write the reasons that lead to it, these lines and nothing else:\n"
            "Product: what the query wants, and what this item is\n"
            "Conditions: each condition of the query: yes or no; the next: yes or no (leave the line out where there is none)\n"
            f"Category: one word of {', '.join(CATEGORY_VERDICTS)}\nAttributes: one word of {', '.join(ATTRIBUTE_VERDICTS)}\n\n"
            f"The two verdicts must give the label:\n{table}"
        )
        user = f"{self.prompt.user(example.query, example.item)}\nLabel: {names[label]}"
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def _content(body: Any) -> str:
    """Empty where the model wrote none: it thought for too long, or refused."""
    try:
        text = body["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        raise ValueError("an answer without choices[0].message.content") from None
    return text if isinstance(text, str) else ""


def _read(file: Path) -> dict[str, str]:
    """What was written so far, without the line that a kill cut."""
    if not file.exists():
        return {}
    whole = file.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    with file.open("r+b") as stream:
        stream.truncate(len(whole))
    return {str(key): str(reasons) for key, reasons in map(json.loads, whole.splitlines())}
