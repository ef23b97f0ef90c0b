"""The folder index/ is the package taoemb.index: in the sdist, in the wheel, installed, and in a plain checkout."""

import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import taoemb
import taoemb.index

ROOT = Path(__file__).resolve().parents[1]


def copy_checkout(folder: Path) -> Path:
    """What a build needs, away from the tree, so that nothing built earlier takes part and nothing is left behind."""
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("taoemb", "index"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def build(checkout: Path, *options: str) -> Path:
    out = checkout / "dist"
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *options, str(checkout)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def python(code: str, path: Path, cwd: Path) -> str:
    """Run code in a fresh interpreter that finds taoemb below ``path`` first."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, so that a file missing there is missing here."""
    return build(copy_checkout(tmp_path_factory.mktemp("sdist") / "checkout"))


def test_the_wheel_holds_the_package_and_no_top_level_index(wheel: Path) -> None:
    found = names(wheel)
    assert {name.split("/")[0] for name in found if ".dist-info/" not in name} == {"taoemb"}
    modules = {f"taoemb/{path.relative_to(ROOT / 'taoemb').as_posix()}" for path in (ROOT / "taoemb").rglob("*.py")}
    modules |= {f"taoemb/index/{path.name}" for path in (ROOT / "index").glob("*.py")}
    data = {f"taoemb/{path.relative_to(ROOT / 'taoemb').as_posix()}" for path in (ROOT / "taoemb").rglob("*.yaml")}
    assert "taoemb/index/exact.py" in modules
    assert "taoemb/judge/__init__.py" in modules
    assert {"taoemb/shop/rules.yaml", "taoemb/judge/recipes/agrl.yaml"} <= data
    assert {name for name in found if ".dist-info/" not in name} == modules | data | {"taoemb/py.typed"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in found)


def test_a_checkout_without_symlinks_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    (checkout / "taoemb" / "index").unlink()
    (checkout / "taoemb" / "index").write_text("../index")  # what git writes where it cannot make a symlink
    assert names(build(checkout, "--wheel")) == names(wheel)


def test_the_installed_wheel_imports_taoemb_index(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True)
    printed = python(
        "import taoemb.index; print(taoemb.index.ExactIndex.__module__, taoemb.index.__file__)", target, tmp_path
    )
    assert printed == f"taoemb.index.exact {target / 'taoemb' / 'index' / '__init__.py'}"


def test_a_checkout_that_is_not_installed_imports_taoemb_index(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    printed = python("import taoemb.index.exact as m; print(m.__name__, m.__file__)", checkout, tmp_path)
    assert printed == f"taoemb.index.exact {checkout / 'taoemb' / 'index' / 'exact.py'}"


def test_the_version_has_one_source(wheel: Path) -> None:
    assert metadata(wheel)["Version"] == taoemb.__version__


def test_requirements_are_ranges_that_the_tried_versions_satisfy(wheel: Path) -> None:
    tried: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            constraint = Requirement(line)
            (pin,) = constraint.specifier
            assert pin.operator == "=="
            if constraint.marker is None or constraint.marker.evaluate():
                tried[constraint.name.lower()] = pin.version
    untried = {"faiss-gpu", "trl", "peft", "wandb"}
    requirements = [Requirement(text) for text in metadata(wheel).get_all("Requires-Dist", [])]
    assert {requirement.name.lower() for requirement in requirements} <= tried.keys() | untried
    for requirement in requirements:
        assert all(part.operator not in ("==", "===", "~=") for part in requirement.specifier), requirement
        if requirement.name not in untried:
            assert requirement.specifier.contains(tried[requirement.name.lower()]), requirement


def test_importing_taoemb_loads_no_heavy_package() -> None:
    heavy = ("torch", "faiss", "sentence_transformers", "transformers", "pyarrow", "numpy")
    code = f"import sys, taoemb, taoemb.index; dir(taoemb); print([m for m in {heavy} if m in sys.modules])"
    assert python(code, ROOT, ROOT) == "[]"


@pytest.mark.parametrize("module", [taoemb, taoemb.index])
def test_every_public_name_resolves(module: object) -> None:
    public: list[str] = module.__all__  # type: ignore[attr-defined]
    for name in public:
        assert getattr(module, name) is not None
    assert set(public) <= set(dir(module))
    owners: dict[str, str] = module._OWNERS  # type: ignore[attr-defined]
    for name, owner in owners.items():
        assert name in public
        assert getattr(importlib.import_module(owner), name) is getattr(module, name)


@pytest.mark.parametrize("module", [taoemb, taoemb.index])
def test_a_name_that_is_not_public_is_an_attribute_error(module: object) -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Encodr'; public names: "):
        _ = module.Encodr  # type: ignore[attr-defined]
