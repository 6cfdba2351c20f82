"""Exports that others load: SAM's own classes, plain PEFT, onnxruntime, and the READMEs' own code as it stands."""

import errno
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from huggingface_hub import ModelCard as HubCard
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from support.models import image_batch, trained_adapter

from fedsam_core import export as exporting
from fedsam_core.data.preprocess import prepare_image
from fedsam_core.errors import CheckpointError, DataError
from fedsam_core.evaluation.inference import segment_scan
from fedsam_core.export import check_merged, export
from fedsam_core.sam import onnx as onnx_module
from fedsam_core.sam.adapters import BuiltModel
from fedsam_core.sam.backbones import ModelConfig, build_segmenter
from fedsam_core.sam.checkpoints import save_official
from fedsam_core.sam.official import in_registry, official_logits, official_sam
from fedsam_core.selection import LayerSelection, preset
from fedsam_core.trained import Trained, load_trained

FLAP, PRETRAINED = preset("flap", 4), preset("lora", 4)
SAM_HEAD = LayerSelection.model_validate(
    {"name": "tokens", "lora": {"encoder": ["q", "v"], "rank": 4}, "train": ["mask_tokens", "hypernetworks"]}
)
SCALED = LayerSelection.model_validate(
    {
        "name": "scaled",
        "lora": {"encoder": ["q", "mlp"], "decoder": ["v"], "rank": 4, "alpha": 6, "block_ranks": {1: 2}},
        "train": ["head"],
        "local": ["lora.scale"],
    }
)
HEADS = [(FLAP, "flap"), (SAM_HEAD, "sam"), (PRETRAINED, "pretrained")]
LOGITS = 1e-4  # the promise; what is measured is 100 times less


def model(folder: Path, selection: LayerSelection, size: int = 32, **how: Any) -> tuple[Trained, torch.Tensor]:
    """A trained model and its logits for `image_batch(size)`."""
    trained = load_trained(trained_adapter(folder / "source", selection, size=size, **how), how.get("checkpoint"))
    with torch.no_grad():
        return trained, trained.segmenter(image_batch(size))


def off(found: Any, expected: torch.Tensor) -> float:
    return float((torch.as_tensor(found) - expected).abs().max())


def run_code(readme: Path, number: int = 0, **given: Any) -> dict[str, Any]:
    """Runs a README's Python block in its folder; `given` stands in for its example images."""
    code = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)[number]
    if "images" in given:
        code, replaced = re.subn(r"(images = )(torch\.rand|np\.random)\(?.*", r"\1given", code)
        assert replaced == 1
    names: dict[str, Any] = {"given": given.get("images")}
    exec(compile(code, str(readme), "exec"), names)
    return names


# window 7 of vit_t against grids of 2 (padded), 7 (one window) and 10 (four, padded)
@pytest.mark.parametrize("size", [32, 112, 160])
@pytest.mark.parametrize(("selection", "head"), HEADS)
def test_segment_anythings_own_classes_compute_the_same(
    selection: LayerSelection, head: str, size: int, tmp_path: Path
) -> None:
    trained, expected = model(tmp_path, selection, size)
    assert trained.card.model.head == head
    (exported,) = export(trained, tmp_path, ["merged"])
    assert exported.file == tmp_path / "merged" / "sam.pth"
    assert exported.size == exported.file.stat().st_size
    sam = official_sam(trained.card.model)
    assert type(sam) is Sam
    sam.load_state_dict(torch.load(exported.file, weights_only=True), strict=True)
    assert off(official_logits(sam, image_batch(size), trained.card.model), expected) < LOGITS / 10
    assert float(expected.std()) > 100 * LOGITS


@pytest.mark.parametrize(("selection", "head"), HEADS)
def test_the_merged_readmes_code_works(
    selection: LayerSelection, head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, expected = model(tmp_path, selection)
    export(trained, tmp_path, ["merged"])
    monkeypatch.chdir(tmp_path / "merged")
    readme = (tmp_path / "merged" / "README.md").read_text()
    assert "fedsam_core" not in readme
    assert ("LayerNorm2d" in readme) == (head == "flap")
    assert "synthetic scans, which a program made" in readme
    names = run_code(tmp_path / "merged" / "README.md", images=image_batch())
    assert off(names["segment"](image_batch()), expected) < LOGITS / 10
    assert float((names["labels"] != expected.argmax(dim=1)).float().mean()) < 1e-3  # but where two classes are even


@pytest.mark.parametrize(("selection", "classes"), [("lora", 2), ("lora-decoder", 3)])
def test_sams_registry_loads_what_has_its_size_and_tokens(selection: str, classes: int, tmp_path: Path) -> None:
    lora = preset(selection, 4)
    config = ModelConfig(backbone="vit_b", image_size=1024, head="sam")
    segmenter = build_segmenter(config, classes, lora, seed=1)
    built = BuiltModel.of(segmenter)
    assert in_registry(built)
    assert not in_registry(built.model_copy(update={"image_size": 512}))
    assert not in_registry(built.model_copy(update={"head": "flap"}))
    assert not in_registry(built.model_copy(update={"head": "sam", "classes": 2}))
    save_official(segmenter, tmp_path / "sam.pth")
    sam = sam_model_registry["vit_b"](checkpoint=tmp_path / "sam.pth")
    assert torch.equal(
        sam.image_encoder.blocks[3].attn.qkv.bias[768:1536], segmenter.image_encoder.blocks[3].attn.k_proj.bias
    )


@pytest.mark.parametrize("selection", [FLAP, preset("decoder")], ids=["peft", "plain"])
@pytest.mark.parametrize("on_checkpoint", [False, True])
def test_the_adapters_card_and_code_work(
    selection: LayerSelection, on_checkpoint: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "export" / "adapter" / "sam.pth" if on_checkpoint else None
    if on_checkpoint:
        start = build_segmenter(ModelConfig(backbone="vit_t", image_size=64), 4, preset("lora"), seed=9)
        save_official(start, tmp_path / "sam.pth")
    source = tmp_path / "sam.pth" if on_checkpoint else None
    trained, expected = model(tmp_path, selection, checkpoint=source)
    (exported,) = export(trained, tmp_path / "export", ["adapter"])
    peft = selection is FLAP
    assert exported.file.name == ("adapter_model.safetensors" if peft else "trained.safetensors")
    for path in (tmp_path / "source").iterdir():
        assert (tmp_path / "export" / "adapter" / path.name).read_bytes() == path.read_bytes()
    readme = tmp_path / "export" / "adapter" / "README.md"
    card = HubCard.load(readme)
    assert card.data.library_name == ("peft" if peft else "fedsam")
    assert card.data.license is None
    assert {"segment-anything", "federated-learning"} <= set(card.data.tags)
    for told in (
        "synthetic scans",
        "not a medical device",
        "0.750",
        "-100 to 200 become 0 to 1",
        "axial",
        selection.name,
    ):
        assert told in readme.read_text()
    monkeypatch.chdir(readme.parent)
    if checkpoint is not None:
        (tmp_path / "sam.pth").rename(checkpoint)
    names = run_code(readme, images=image_batch())
    assert torch.equal(names["logits"], expected)
    if peft:
        names = run_code(readme, 1)
        with torch.no_grad():
            assert off(names["model"](image_batch()), expected) < 1e-6
    assert len(re.findall("```python", readme.read_text())) == (2 if peft else 1)


def test_onnx_agrees_with_torch_for_any_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, expected = model(tmp_path, FLAP)
    rng = np.random.default_rng(0)
    scan = nib.Nifti1Image(rng.normal(40, 80, (20, 26, 9)).astype(np.float32), np.diag([-1.0, 1.2, 3, 1]))
    (tmp_path / "onnx").mkdir()
    nib.save(scan, tmp_path / "onnx" / "scan.nii.gz")
    prepared = prepare_image(tmp_path / "onnx" / "scan.nii.gz", trained.card.preprocess, "ct")
    mask = segment_scan(trained.segmenter, prepared, trained.slices, 32, batch_size=4)
    assert 0 < (mask > 0).mean() < 1
    (tmp_path / "onnx" / "scan.nii.gz").rename(tmp_path / "scan.nii.gz")

    (exported,) = export(trained, tmp_path, ["onnx"])
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == {"segmenter.onnx", "card.json", "README.md"}
    graph = onnx.load(exported.file)
    assert graph.opset_import[0].version >= 17
    data = exported.file.read_bytes()
    for path in (str(Path(torch.__file__).parents[1]), str(Path(exporting.__file__).parents[1])):
        assert path.encode() not in data  # nothing of this machine

    session = onnxruntime.InferenceSession(exported.file, providers=["CPUExecutionProvider"])
    assert [one.type for one in session.get_inputs()] == ["tensor(float)"]
    assert session.get_outputs()[0].shape[1:] == [3, 32, 32]
    for batch in (1, 2, 3):
        (logits,) = session.run(None, {"images": image_batch()[:batch].numpy()})
        assert off(logits, expected[:batch]) < LOGITS / 10
    card = json.loads(session.get_modelmeta().custom_metadata_map["fedsam.card"])
    assert card == json.loads((tmp_path / "onnx" / "card.json").read_text())
    assert card["classes"] == ["kidney", "tumour"]

    monkeypatch.chdir(tmp_path / "onnx")
    readme = tmp_path / "onnx" / "README.md"
    assert "synthetic scans" in readme.read_text()
    names = run_code(readme, images=image_batch().numpy())
    assert (names["labels"] != expected.argmax(dim=1).numpy()).mean() < 1e-3
    (tmp_path / "scan.nii.gz").rename(tmp_path / "onnx" / "scan.nii.gz")
    run_code(readme, 1)
    written = nib.load(tmp_path / "onnx" / "mask.nii.gz")
    assert (np.asarray(written.dataobj) != mask).mean() < 1e-3
    np.testing.assert_allclose(written.affine, scan.affine)


def test_a_sites_own_lora_scale_is_in_every_format(tmp_path: Path) -> None:
    trained, expected = model(tmp_path, SCALED)
    for value in trained.segmenter.parameters():
        if value.shape == (1,):
            assert value.item() != 1
    adapter, merged, onnx_file = export(trained, tmp_path, ["adapter", "merged", "onnx"])
    assert adapter.file.name == "trained.safetensors"  # PEFT has no place for the factors
    with torch.no_grad():
        assert torch.equal(load_trained(tmp_path / "adapter").segmenter(image_batch()), expected)
        assert off(load_trained(tmp_path / "merged").segmenter(image_batch()), expected) < LOGITS / 10
    sam = official_sam(trained.card.model)
    sam.load_state_dict(torch.load(merged.file, weights_only=True), strict=True)
    assert off(official_logits(sam, image_batch(), trained.card.model), expected) < LOGITS / 10
    session = onnxruntime.InferenceSession(onnx_file.file, providers=["CPUExecutionProvider"])
    assert off(session.run(None, {"images": image_batch().numpy()})[0], expected) < LOGITS / 10


def test_large_onnx_weights_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_module, "LARGEST", 0)
    trained, expected = model(tmp_path, PRETRAINED, size=64)
    files = export(trained, tmp_path, ["onnx"])
    assert [one.file.name for one in files] == ["segmenter.onnx", "segmenter.onnx.data"]
    readme = " ".join((tmp_path / "onnx" / "README.md").read_text().split())
    assert "Keep `segmenter.onnx.data`, the weights, beside it" in readme
    session = onnxruntime.InferenceSession(files[0].file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": image_batch(64).numpy()})
    assert off(logits, expected) < LOGITS / 10
    altered = onnx.load(files[0].file)
    altered.graph.initializer[0].raw_data = bytes(len(altered.graph.initializer[0].raw_data))
    onnx.save(altered, tmp_path / "altered.onnx")
    with pytest.raises(CheckpointError, match=r"altered.onnx: a logit differs from torch's by .*, over 0.001"):
        onnx_module.check_onnx(tmp_path / "altered.onnx", image_batch(64), expected)


def spoiled(name: str, write: Callable[..., Any]) -> Callable[..., Any]:
    """`write`, and then one weight in the file is another one."""

    def save(segmenter: Any, path: Path) -> None:
        write(segmenter, path)
        state = torch.load(path, weights_only=True)
        state[name] = 1.5 * state[name]
        torch.save(state, path)

    return save


def test_what_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, _ = model(tmp_path, FLAP)
    before = {path: path.read_bytes() for path in (tmp_path / "source").iterdir()}
    export(trained, tmp_path, ["merged"])
    good = (tmp_path / "merged" / "sam.pth").read_bytes()
    name = "image_encoder.blocks.1.mlp.lin1.weight"
    monkeypatch.setattr(exporting, "save_official", spoiled(name, save_official))
    with pytest.raises(
        CheckpointError, match=r"sam.pth: a logit of segment_anything's differs by .* nothing is written"
    ):
        export(load_trained(tmp_path / "source"), tmp_path, ["merged"])
    assert (tmp_path / "merged" / "sam.pth").read_bytes() == good
    with pytest.raises(CheckpointError, match="differs by"):
        export(load_trained(tmp_path / "source"), tmp_path / "new", ["merged"])
    assert list((tmp_path / "new").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"source", "merged", "new"}
    assert {path: path.read_bytes() for path in (tmp_path / "source").iterdir()} == before


def test_a_file_that_sam_does_not_load_is_told(tmp_path: Path) -> None:
    trained, expected = model(tmp_path, FLAP)
    export(trained, tmp_path, ["merged"])
    other = trained.card.model_copy(
        update={"model": trained.card.model.model_copy(update={"classes": 1}), "classes": ("one",)}
    )
    with pytest.raises(CheckpointError, match=r"sam.pth: segment_anything does not load it \(.*Unexpected key"):
        check_merged(tmp_path / "merged" / "sam.pth", other, image_batch(), expected)


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    trained, _ = model(tmp_path, FLAP)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"merged exists and is not an exported model: choose another folder"):
        export(trained, tmp_path, ["merged"])
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match=r"file/adapter: cannot write \(File exists\)"):
        export(trained, tmp_path / "file", ["adapter"])
    (tmp_path / "source").rename(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"adapter is the model that is to be exported: choose another folder"):
        export(load_trained(tmp_path / "adapter"), tmp_path, ["adapter"])


def test_a_merged_checkpoint_gives_no_adapter_but_itself_again(tmp_path: Path) -> None:
    trained, expected = model(tmp_path, FLAP)
    export(trained, tmp_path, ["merged"])
    again = load_trained(tmp_path / "merged")
    with pytest.raises(CheckpointError, match="merged is a merged checkpoint, which has no adapter any more"):
        export(again, tmp_path / "again", ["adapter", "merged"])
    export(again, tmp_path / "again", ["merged"])
    with torch.no_grad():
        assert off(load_trained(tmp_path / "again" / "merged").segmenter(image_batch()), expected) < LOGITS / 10


def test_the_disk_that_is_full_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, _ = model(tmp_path, FLAP)
    opened = Path.open

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "no space left on device")

    def full(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return Full() if mode == "wb" else opened(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(DataError, match=r"merged: the disk is full; free some space"):
        export(trained, tmp_path, ["merged"])
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
