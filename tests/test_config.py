import dataclasses
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from taoemb.config import ConfigError, describe, diff, from_dict, load_config, save_config, to_dict


@dataclass(frozen=True, slots=True)
class Optimizer:
    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    name: Literal["adamw", "sgd"] = "adamw"
    """Update rule;
    the usual two."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"got lr={self.lr}; allowed: more than 0")


@dataclass
class Judge:
    model: str
    """Path or hub id."""
    threshold: float | None = None


@dataclass
class Train:
    steps: int = 100
    """How many updates."""
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=0.5))
    judge: Judge | None = None
    """Nothing is judged where it is null."""
    fields: tuple[str, ...] = ("title", "brand")
    weights: dict[str, float] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=lambda: [1, 2])
    temperature: float | Literal["auto"] = "auto"
    resume: bool = False
    out: Path = Path("runs/x")
    note: str = ""


def load(tmp_path: Path, text: str, *overrides: str) -> Train:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return load_config(Train, path, overrides)


def test_no_file_and_an_empty_file_are_the_defaults(tmp_path: Path) -> None:
    assert load_config(Train) == Train() == load(tmp_path, "") == from_dict(Train, {})


def test_values_of_every_kind_are_read(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
        steps: 7
        optimizer: {lr: 1e-5, betas: [0, 1], name: sgd}
        judge: {model: 'a/b', threshold: 2}
        fields: [title]
        weights: {quality: 1, relevance: .5}
        sizes: [3]
        temperature: 1E2
        resume: true
        out: somewhere
        note: yes
        """,
    )
    assert config == Train(
        steps=7,
        optimizer=Optimizer(lr=1e-5, betas=(0.0, 1.0), name="sgd"),
        judge=Judge("a/b", 2.0),
        fields=("title",),
        weights={"quality": 1.0, "relevance": 0.5},
        sizes=[3],
        temperature=100.0,
        resume=True,
        out=Path("somewhere"),
        note="yes",
    )
    assert isinstance(config.optimizer.betas[0], float)
    assert isinstance(config.out, Path)


def test_a_nested_key_keeps_what_the_parent_declares_for_its_siblings(tmp_path: Path) -> None:
    assert load(tmp_path, "optimizer: {name: sgd}").optimizer == Optimizer(lr=0.5, name="sgd")
    assert load(tmp_path, "judge: {model: m}").judge == Judge("m")


@pytest.mark.parametrize(
    ("text", "key", "given", "allowed"),
    [
        ("steps: 1.5", "steps", "1.5 (float)", "int"),
        ("steps: true", "steps", "True (bool)", "int"),
        ("steps: '3'", "steps", "'3' (str)", "int"),
        ("steps: 010", "steps", "'010' (str)", "int"),
        ("steps: null", "steps", "None (NoneType)", "int"),
        ("resume: 1", "resume", "1 (int)", "bool"),
        ("resume: yes", "resume", "'yes' (str)", "bool"),
        ("note: 3", "note", "3 (int)", "str"),
        ("out: 3", "out", "3 (int)", "Path"),
        ("optimizer: {lr: fast}", "optimizer.lr", "'fast' (str)", "float"),
        ("optimizer: {lr: true}", "optimizer.lr", "True (bool)", "float"),
        ("optimizer: {lr: .nan}", "optimizer.lr", "nan (float)", "float"),
        ("optimizer: {lr: .inf}", "optimizer.lr", "inf (float)", "float"),
        ("optimizer: {name: adam}", "optimizer.name", "'adam' (str)", "'adamw' | 'sgd'"),
        ("optimizer: {betas: [1]}", "optimizer.betas", "[1] (list)", "tuple[float, float]"),
        ("optimizer: {betas: [1, x]}", "optimizer.betas[1]", "'x' (str)", "float"),
        ("optimizer: 3", "optimizer", "3 (int)", "a mapping with the keys lr, betas, name"),
        ("fields: title", "fields", "'title' (str)", "tuple[str, ...]"),
        ("sizes: [1, 2.5]", "sizes[1]", "2.5 (float)", "int"),
        ("weights: {a: b}", "weights.a", "'b' (str)", "float"),
        ("temperature: none", "temperature", "'none' (str)", "float | 'auto'"),
        ("judge: {model: m, threshold: x}", "judge.threshold", "'x' (str)", "float | null"),
    ],
)
def test_a_value_of_the_wrong_type_names_key_value_and_what_is_allowed(
    tmp_path: Path, text: str, key: str, given: str, allowed: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert caught.value.key == key
    assert str(caught.value) == f"{key}: got {given}; allowed: {allowed}"


@pytest.mark.parametrize(
    ("text", "key", "nearest", "level"),
    [
        ("stepz: 3", "stepz", "steps", "keys: fields, judge"),
        ("optimizer: {lrr: 3}", "optimizer.lrr", "optimizer.lr", "keys of optimizer: betas, lr, name"),
        ("lr: 3", "lr", "optimizer.lr", "keys: fields, judge"),
        ("optimizer: {threshold: 3}", "optimizer.threshold", "judge.threshold", "keys of optimizer: betas"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_valid_one(
    tmp_path: Path, text: str, key: str, nearest: str, level: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert caught.value.key == key
    assert f"did you mean {nearest}?" in str(caught.value)
    assert level in str(caught.value)


def test_a_key_unlike_any_other_gets_no_suggestion(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^zzz: unknown key; keys: fields, judge, "):
        load(tmp_path, "zzz: 1")


def test_a_missing_required_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^judge\.model: is required; give str$"):
        from_dict(Train, {"judge": {"threshold": 0.5}})


def test_a_check_of_the_dataclass_is_reported_at_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^optimizer: got lr=-1\.0; allowed: more than 0$"):
        load(tmp_path, "optimizer: {lr: -1}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("steps: 1\nsteps: 2", "'steps' is given twice"),
        ("optimizer: {lr: 1, lr: 2}", "'lr' is given twice"),
        ("1: 2", "the key 1 is not text"),
        ("steps: [", "while parsing"),
        ("- steps", "holds list at its top level"),
        ("out: !!python/name:os.system", "could not determine a constructor"),
    ],
)
def test_yaml_that_is_no_plain_mapping_is_refused_with_the_file(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert problem in str(caught.value)
    assert str(tmp_path / "c.yaml") in str(caught.value)


def test_overrides_win_over_the_file_and_later_ones_over_earlier_ones(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "steps: 1\nnote: file",
        "steps=2",
        "steps=3",
        "optimizer.lr=1e-4",
        "fields=[brand, title]",
        "resume=true",
    )
    expected = Train(steps=3, note="file", fields=("brand", "title"), resume=True)
    assert config == dataclasses.replace(expected, optimizer=Optimizer(lr=1e-4))


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("note=123", "note", "123"),
        ("note=a=b: c", "note", "a=b: c"),
        ("note=", "note", ""),
        ("note=null", "note", "null"),
        ("out=a/b", "out", Path("a/b")),
        ("temperature=auto", "temperature", "auto"),
        ("temperature=2", "temperature", 2.0),
        ("judge=null", "judge", None),
        ("judge={model: m}", "judge", Judge("m")),
        ("judge.model=3", "judge", Judge("3")),
        ("weights={a: 1}", "weights", {"a": 1.0}),
        ("weights.a=1", "weights", {"a": 1.0}),
    ],
)
def test_an_override_is_read_by_the_type_of_its_key(override: str, name: str, value: Any) -> None:
    config = load_config(Train, None, [override])
    assert getattr(config, name) == value
    assert type(getattr(config, name)) is type(value)


def test_an_override_can_enter_what_another_one_set() -> None:
    assert load_config(Train, None, ["judge={model: m}", "judge.threshold=0.5"]).judge == Judge("m", 0.5)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("steps", "cannot read the override 'steps'; write KEY=VALUE"),
        ("=3", "cannot read the override"),
        ("optimizer..lr=3", "cannot read the override"),
        ("optimizer.lr=fast", "optimizer.lr: got 'fast' (str); allowed: float"),
        ("steps=[", "cannot read the override of steps as YAML"),
        ("optimiser.lr=1", "did you mean optimizer"),
        ("optimizer.name=adam", "optimizer.name: got 'adam'; allowed: 'adamw' | 'sgd'"),
        ("steps.a=1", "steps: is 5, so the override 'steps.a=1' has nothing to set"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, override: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "steps: 5", override)
    assert problem in str(caught.value)


texts = st.text(max_size=12) | st.sampled_from(
    ["1e-3", "yes", "null", "~", "0x1f", "1:30", "012", "2026-01-01", "=", "<<", "a\x85b", "红 鞋"]
)
numbers = st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.builds(
        Train,
        steps=st.integers(),
        optimizer=st.builds(
            Optimizer,
            lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
            betas=st.tuples(numbers, numbers),
        ),
        judge=st.none() | st.builds(Judge, model=texts, threshold=st.none() | numbers),
        fields=st.lists(texts, max_size=3).map(tuple),
        weights=st.dictionaries(texts, numbers, max_size=3),
        sizes=st.lists(st.integers(), max_size=3),
        temperature=st.just("auto") | numbers,
        resume=st.booleans(),
        note=texts,
    )
)
def test_saving_and_loading_gives_an_equal_config(config: Train) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        save_config(config, path)
        loaded = load_config(Train, path)
        assert loaded == config
        assert diff(loaded, config) == []
        assert [entry.name for entry in Path(folder).iterdir()] == ["config.yaml"]
        yaml.safe_load(path.read_text(encoding="utf-8"))  # and other readers take it for YAML


def test_to_dict_holds_plain_values() -> None:
    plain = to_dict(Train(judge=Judge("m")))
    assert plain["judge"] == {"model": "m", "threshold": None}
    assert plain["fields"] == ["title", "brand"]
    assert plain["out"] == "runs/x"
    assert from_dict(Train, plain) == Train(judge=Judge("m"))


def test_diff_lists_the_dotted_keys_that_differ() -> None:
    a = Train(judge=Judge("m"), weights={"a": 1.0, "b": 1.0})
    b = Train(steps=1, optimizer=Optimizer(lr=2.0), judge=Judge("n"), weights={"a": 2.0})
    assert diff(a, b) == ["judge.model", "optimizer.lr", "steps", "weights.a", "weights.b"]
    assert diff(Train(), Train(judge=Judge("m"))) == ["judge"]
    assert diff(a, a) == []


def test_describe_lists_every_key_with_type_default_and_doc() -> None:
    settings = {setting.key: setting for setting in describe(Train)}
    assert list(settings)[:6] == ["steps", "optimizer.lr", "optimizer.betas", "optimizer.name", "judge", "judge.model"]
    assert settings["steps"].doc == "How many updates."
    assert settings["optimizer.lr"].default == 0.5  # as Train declares it
    assert settings["optimizer.name"].type == "'adamw' | 'sgd'"
    assert settings["optimizer.name"].doc == "Update rule; the usual two."
    assert settings["judge"].default is None
    assert settings["judge"].doc == "Nothing is judged where it is null."
    assert settings["judge.model"].default is dataclasses.MISSING
    assert settings["judge.threshold"].type == "float | null"
    assert settings["note"].doc == ""


def test_the_default_of_every_described_key_can_be_given_as_an_override() -> None:
    for setting in describe(Train):
        if setting.default is dataclasses.MISSING:
            continue
        text = setting.default if isinstance(setting.default, str | Path) else json.dumps(setting.default)
        config: Any = load_config(Train, None, ["judge.model=m", f"{setting.key}={text}"])
        for name in setting.key.split("."):
            config = getattr(config, name)
        assert config == setting.default, setting.key


@dataclass(frozen=True)
class Child(Optimizer):
    steps: int = 1
    """Of the child."""


@dataclass
class Odd:
    tags: set[str] = field(default_factory=set)


def test_docs_are_inherited() -> None:
    docs = {setting.key: setting.doc for setting in describe(Child)}
    assert docs == {
        "lr": "Peak learning rate.",
        "betas": "",
        "name": "Update rule; the usual two.",
        "steps": "Of the child.",
    }


def test_a_field_type_that_cannot_be_configured_is_a_programming_error() -> None:
    with pytest.raises(TypeError, match=r"tags: a config field cannot have the type set\[str\]"):
        from_dict(Odd, {"tags": ["a"]})


def test_config_needs_no_torch() -> None:
    code = "import sys, taoemb.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
