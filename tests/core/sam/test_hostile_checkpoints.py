"""A .pth file is a pickle, and whoever made it may mean harm: none is ever run."""

import ast
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsam_core.errors import CheckpointError
from fedsam_core.sam.backbones import ModelConfig, build_segmenter
from fedsam_core.selection import preset

ROOT = Path(__file__).parents[3]


class Evil:
    """Unpickling it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return self.mark.write_text, ("executed",)


def as_zip(value: object, path: Path) -> None:
    torch.save(value, path)


def as_legacy(value: object, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def as_pickle(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


@pytest.mark.parametrize("write", [as_zip, as_legacy, as_pickle])
@pytest.mark.parametrize("where", ["whole", "value", "beside weights"])
def test_a_malicious_checkpoint_is_refused_and_not_run(write: Any, where: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "executed", tmp_path / "sam.pth"
    evil = Evil(mark)
    weights = {"image_encoder.pos_embed": torch.zeros(1, 2, 2, 192)}
    hidden = {"value": {"image_encoder.pos_embed": evil}, "beside weights": {**weights, "x": evil}}
    write(hidden.get(where, evil), path)
    with pytest.raises(CheckpointError, match=r"sam\.pth is truncated or not a checkpoint"):
        build_segmenter(ModelConfig(backbone="vit_t", image_size=32, checkpoint=path), 1, preset("lora", 4), seed=0)
    assert not mark.exists()
    # The file is what it claims to be: with the check switched off it would have run.
    with suppress(RuntimeError):  # it is no checkpoint, which torch finds out too late
        torch.load(path, weights_only=False)
    assert mark.read_text() == "executed"


def calls(tree: ast.AST) -> list[tuple[str, dict[str, str]]]:
    """Every call as it is written, with its keywords."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(ast.unparse(c.func), {k.arg: ast.unparse(k.value) for k in c.keywords if k.arg}) for c in found]


def test_nothing_in_the_product_unpickles_or_runs_what_it_reads() -> None:
    files = [path for package in ("fedsam_core", "cluster", "pipelines") for path in (ROOT / package).rglob("*.py")]
    made = [(path, *call) for path in files for call in calls(ast.parse(path.read_text()))]
    assert len(made) > 1000
    loads = [keywords for _, name, keywords in made if name == "torch.load"]
    assert loads
    assert all(keywords.get("weights_only") == "True" for keywords in loads)
    forbidden = ["pickle.load", "pickle.loads", "cloudpickle.loads", "joblib.load", "marshal.loads", "torch.jit.load"]
    forbidden += ["yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system", "os.popen"]
    assert not [(path, name) for path, name, _ in made if name in forbidden]
    assert not [(path, name) for path, name, keywords in made if keywords.get("shell") == "True"]
    assert not [(path, name) for path, name, keywords in made if keywords.get("allow_pickle") == "True"]
