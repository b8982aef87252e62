"""What every export must keep, ours and one that a user wrote: whole or nothing, refusals early."""

from dataclasses import FrozenInstanceError, dataclass, fields
from typing import ClassVar

import pytest
import torch
from conftest import tiny_llama
from gguf_helpers import letter_tokenizer
from torch import nn

from prunekit.errors import CheckpointError, ExportError
from prunekit.exports import Export, Written
from prunekit.exports.gguf import Gguf
from prunekit.exports.onnx import Onnx


@dataclass(frozen=True, kw_only=True)
class Sizes(Export):
    """A user's own export: the shape of each parameter, a line each, in a folder."""

    name: ClassVar[str] = "sizes"
    separator: str = " "

    @property
    def target(self):
        return "sizes"

    def check_model(self, model):
        if not hasattr(model, "config"):
            raise ExportError("export=sizes: expected a model with a config")

    def create(self, path, model, tokenizer):
        path.mkdir()
        shapes = ((name, *map(str, p.shape)) for name, p in model.named_parameters())
        file = path / "sizes.txt"
        file.write_text("\n".join(self.separator.join(shape) for shape in shapes))
        return Written(file=file, about=f"{len(list(model.parameters()))} parameters")


EXPORTS = {
    "gguf": (Gguf, "gguf"),
    "onnx": (lambda: Onnx(check=False), "onnx"),
    "sizes": (Sizes, None),
}


@pytest.fixture(params=EXPORTS)
def export(request):
    make, package = EXPORTS[request.param]
    if package is not None:
        pytest.importorskip(package)
    return make()


@pytest.fixture(scope="module")
def model():
    return tiny_llama(layers=1).train()


@pytest.fixture(scope="module")
def tokenizer():
    return letter_tokenizer()


@pytest.fixture
def worked(monkeypatch):
    """The exports whose work began."""
    begun = []
    for kind in (Gguf, Onnx, Sizes):
        create = kind.create

        def note(self, *arguments, create=create):
            begun.append(self.name)
            return create(self, *arguments)

        monkeypatch.setattr(kind, "create", note)
    return begun


def test_it_is_a_frozen_dataclass_with_a_name(export):
    assert isinstance(export, Export) and type(export)() is not None
    assert type(export).name in {"gguf", "onnx", "sizes"}
    assert "name" not in {own.name for own in fields(export)}
    with pytest.raises(FrozenInstanceError):
        export.name = "other"


def test_the_whole_target_appears_and_the_model_is_left_as_it_was(
    export, model, tokenizer, tmp_path
):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    file = export.write(model, tokenizer, tmp_path / "new" / "folder")
    assert file.is_file() and file.stat().st_size > 0
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [export.target]
    assert file.relative_to(tmp_path / "new" / "folder").parts[0] == export.target
    assert model.training
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_model_it_cannot_hold_is_refused_before_any_work(export, tokenizer, tmp_path, worked):
    for refuse in (export.check_model, lambda m: export.write(m, tokenizer, tmp_path / "new")):
        with pytest.raises(ExportError, match="expected a"):
            refuse(nn.Linear(2, 2))
    assert worked == [] and not any(tmp_path.iterdir())


def test_an_error_in_the_middle_leaves_nothing(export, model, tokenizer, tmp_path, monkeypatch):
    def break_off(self, path, *rest):
        path.mkdir() if self.target in ("onnx", "sizes") else path.write_bytes(b"half")
        (path.parent / "more").write_bytes(b"half")
        raise error

    monkeypatch.setattr(type(export), "create", break_off)
    for error in (ExportError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            export.write(model, tokenizer, tmp_path / "a" / "b")
        assert not any(tmp_path.iterdir()), "the folders made for it neither"
    error = PermissionError(13, "Permission denied")
    with pytest.raises(CheckpointError, match="can't be written"):
        export.write(model, tokenizer, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_target_in_the_way_is_left_alone(export, model, tokenizer, tmp_path, worked):
    target = tmp_path / export.target
    if export.target == "model-f16.gguf":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "mine").touch()
    (tmp_path / "other").touch()
    with pytest.raises(ExportError, match=f"{export.target}: exists already"):
        export.write(model, tokenizer, tmp_path)
    assert worked == []
    assert {path.name for path in tmp_path.iterdir()} == {"other", export.target}
    with pytest.raises(CheckpointError, match="can't be written"):
        export.write(model, tokenizer, tmp_path / "other" / "folder")


def test_a_folder_with_other_files_is_no_obstacle(export, model, tokenizer, tmp_path, monkeypatch):
    def write_little(self, path, *_):
        path.write_bytes(b"all of it")
        return Written(file=path, about="a stand-in")

    monkeypatch.setattr(type(export), "create", write_little)
    (tmp_path / "report.json").write_text("{}")
    export.write(model, tokenizer, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", export.target}
    assert (tmp_path / "report.json").read_text() == "{}"
