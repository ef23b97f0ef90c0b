"""How catalog and query texts are cut into words, phrases and model codes.

Words are split at spaces and signs and lower-cased, and English plurals are folded, so that "Batteries" and "battery"
meet. A phrase is folded words joined by a space. The connectors and negations are English too; texts in another
language work less well, and texts without spaces between words do not work.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import lru_cache

from taoemb.catalog import Item

CONNECTORS = frozenset({
    "for", "with", "without", "and", "or", "of", "to", "in", "on", "by", "from", "at", "w", "incl", "including", "plus",
    "compatible", "per", "vs", "via",
})  # fmt: skip
"""Words that end a noun phrase: what follows them says what the item goes with, not what it is."""
STOP_WORDS = CONNECTORS | frozenset({
    "a", "an", "the", "that", "which", "is", "are", "i", "my", "me", "you", "your", "what", "best", "this", "it", "as",
    "no", "not", "but", "any", "anything", "some", "something",
})  # fmt: skip
"""Words that carry no facet of their own."""
YES, NO = frozenset({"true", "yes"}), frozenset({"false", "no", "none", "without"})
NEGATES_NEXT = frozenset({"without", "no", "not", "non", "nothing", "except", "excluding", "minus", "avoid", "sans"})
"""Words that rule out what follows; "free" rules out what stands before it."""
_ODD_SINGULAR = frozenset({"lens", "bus", "gas", "series", "plus", "less", "bias", "atlas", "canvas", "always", "news"})
_WORD = re.compile(r"\d+(?:[.,]\d+)+|[^\W_]+")
_MEASURED = re.compile(r"(?<![^\s(/x])\d+(?:[.,]\d+)*[\s-]([^\W\d_]+)")
_LIST = re.compile(r"[,;|/]|\s+&\s+")
_BREAK = re.compile(r"[,;|()\[\]–—]| - ")
_CATEGORY = re.compile(r"\s*(?:>|/|\||»|,|&|\band\b)\s*", re.IGNORECASE)


def surface_words(text: str) -> list[str]:
    """The lower-case words of a text; a decimal number is one word.

    >>> surface_words("Brother TN-2110 toner, 5.1 channels")
    ['brother', 'tn', '2110', 'toner', '5.1', 'channels']
    """
    return _WORD.findall(text.lower())


@lru_cache(maxsize=262_144)
def normal(word: str) -> str:
    """A lower-case word with the endings of English plurals folded.

    >>> [normal(w) for w in ("batteries", "switches", "mice", "glass", "usb", "shoes")]
    ['battery', 'switch', 'mice', 'glass', 'usb', 'shoe']
    """
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")) or word in _ODD_SINGULAR:
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "xes", "ches", "shes")) and len(word) > 4:
        return word[:-2]
    return word[:-1]


def words(text: str) -> list[str]:
    """The folded words of a text."""
    return [normal(word) for word in _WORD.findall(text.lower())]


@lru_cache(maxsize=262_144)
def phrase(text: str) -> str:
    """The folded words of a text joined by a space; cached, so for names and values rather than descriptions."""
    return " ".join(words(text))


def codes(text: str) -> frozenset[str]:
    """Model codes: pieces of at least 4 letters and digits that hold both, without their signs.

    >>> sorted(codes("Brother TN-2110 toner (HL-2140)"))
    ['hl2140', 'tn2110']
    """
    compact = (re.sub(r"[\W_]", "", piece) for piece in text.lower().split())
    return frozenset(c for c in compact if len(c) >= 4 and any(x.isdigit() for x in c) and any(x.isalpha() for x in c))


def measured_words(text: str) -> list[str]:
    """The lower-case words right after a number that is not part of a model code.

    >>> measured_words("Brother TN-2110 toner 16 GB 2600-page")
    ['gb', 'page']
    """
    return _MEASURED.findall(text.lower())


def is_word(word: str) -> bool:
    """Whether a folded word is letters only (no number, no model code)."""
    return word.isalpha()


@lru_cache(maxsize=262_144)
def attribute_values(value: str) -> tuple[str, ...]:
    """The folded single values of an attribute cell.

    >>> attribute_values("Black, Silver")
    ('black', 'silver')
    """
    return tuple(dict.fromkeys(filter(None, map(phrase, _LIST.split(value)))))


def category_names(category: str) -> list[str]:
    """The names in a category path, from the root to the leaf."""
    return [part for part in _CATEGORY.split(category.strip()) if part]


def negated_words(text_words: Sequence[str]) -> frozenset[str]:
    """Words that a text rules out: "without X", "no X", "X free", "free of X"."""
    found = set()
    for i, word in enumerate(text_words):
        if word in NEGATES_NEXT and i + 1 < len(text_words):
            found.add(text_words[i + 1])
        elif word == "free" and i + 2 < len(text_words) and text_words[i + 1] in ("of", "from"):
            found.add(text_words[i + 2])
        elif word == "free" and i:
            found.add(text_words[i - 1])
    return frozenset(word for word in found if is_word(word) and word not in STOP_WORDS)


def title_runs(item: Item, breakers: Collection[str]) -> list[list[str]]:
    """Runs of plain words in a title, in order, broken by signs, numbers, model codes, the brand and ``breakers``.

    The last words of a run are where English puts the head of a noun phrase ("camera remote *control* IR").
    What follows a connector ("for", "with") is left out.
    """
    brand = set(words(item.brand))
    runs: list[list[str]] = []
    for piece in _BREAK.split(item.title):
        run: list[str] = []
        for word in surface_words(piece):
            folded = normal(word)
            if folded in CONNECTORS:
                break
            if is_word(folded) and folded not in brand and len(folded) > 1 and folded not in breakers:
                run.append(word)
            elif run:
                runs.append(run)
                run = []
        if run:
            runs.append(run)
    return runs
