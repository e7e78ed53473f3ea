"""Exported networks compute what the run's networks compute, without bootvit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import ONE, tiny

from bootvit import checkpoint
from bootvit.__main__ import main
from bootvit.config import Config
from bootvit.errors import UserError
from bootvit.export import export
from bootvit.learner import Learner
from bootvit.models.sizes import ROWS
from bootvit.runs import claim


def saved_run(folder: Path, **changes: Any) -> tuple[Config, Learner, Path]:
    """A run with a checkpoint of random weights."""
    config = tiny(ray__storage_path=str(folder), **changes)
    learner = Learner(config, 10, ONE)
    learner.networks.eval()
    run, _ = claim(config, resume=False, overwrite=False)
    data = {"classes": [str(i) for i in range(10)], "mean": [0.5] * 3, "std": [0.2] * 3, "fingerprint": ""}
    state = {"learner": learner.state_dict(), "progress": {}, "data": data}
    checkpoint.save(run.checkpoints, state, epoch=1, step=1, final=False)
    return config, learner, run.path


def logits(learner: Learner, network: str, images: torch.Tensor) -> torch.Tensor:
    """What the run's network says."""
    with torch.no_grad():
        return learner.networks.features(images)[network].logits  # type: ignore[index]


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_plain_timm_gives_identical_logits(tmp_path: Path, eps: float) -> None:
    config, learner, run = saved_run(tmp_path, model__vit__norm_eps=eps)
    folder = export(config, run, "timm", network="vit")
    images = torch.randn(3, 3, 8, 8)
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, timm, torch\n"
        f"model = timm.create_model('local-dir:{folder}', pretrained=True).eval()\n"
        "assert not any(name.startswith('bootvit') for name in sys.modules)\n"
        f"with torch.no_grad(): torch.save(model(torch.load('{tmp_path}/images.pt')), '{tmp_path}/out.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch.equal(torch.load(tmp_path / "out.pt"), logits(learner, "vit", images))
    described = json.loads((folder / "config.json").read_text())
    model = timm.create_model(described["architecture"], num_classes=10, **described["model_args"])
    assert model.load_state_dict(learner.networks.vit.state_dict())


def test_a_cnn_of_timm_is_exported(tmp_path: Path) -> None:
    config, learner, run = saved_run(tmp_path, method="agent", model__agent__name="resnet10t", data__image_size=32)
    folder = export(config, run, "timm")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        # the learner lays out a CNN in memory in another way, which sums in another order
        torch.testing.assert_close(model(images), logits(learner, "agent", images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "network", "named"),
    [
        ({"model__vit__attention": "entmax"}, "vit", "attention=entmax"),
        ({"model__vit__norm_eps": 1e-4}, "vit", "norm_eps=0.0001"),
        ({}, "agent", "agent_small"),
        ({"method": "vit"}, "agent", "--network agent"),
    ],
)
def test_what_plain_timm_cannot_load_is_refused(tmp_path: Path, changes: Any, network: str, named: str) -> None:
    config, _, run = saved_run(tmp_path, **changes)
    with pytest.raises(UserError, match=named):
        export(config, run, "timm", network=network)


@pytest.mark.parametrize(
    ("changes", "network"),
    [
        ({"method": "shared"}, "agent"),
        ({"method": "shared"}, "vit"),
        ({"method": "vit", "model__vit__attention": "entmax", "model__vit__depth": 1}, "vit"),
    ],
)
def test_onnx_computes_the_same_for_any_batch(tmp_path: Path, changes: Any, network: str) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    config, learner, run = saved_run(tmp_path, **changes)
    file = export(config, run, "onnx", network=network)
    graph = onnx.load(file)
    onnx.checker.check_model(graph)
    for size in (1, 5):
        images = torch.randn(size, 3, 8, 8)
        (out,) = ReferenceEvaluator(graph).run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), logits(learner, network, images), rtol=1e-4, atol=1e-4)
    facts = json.loads(file.with_suffix(".json").read_text())
    assert (facts["network"], facts["image_size"], len(facts["classes"])) == (network, [8, 8], 10)


@pytest.mark.parametrize("network", ["vit", "agent"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torchscript_computes_the_same_for_any_batch(tmp_path: Path, network: str) -> None:
    config, learner, run = saved_run(tmp_path, method="shared")
    file = export(config, run, "torchscript", network=network)
    module = torch.jit.load(file)  # type: ignore[no-untyped-call]
    for size in (1, 5):
        images = torch.randn(size, 3, 8, 8)
        torch.testing.assert_close(module(images), logits(learner, network, images), rtol=1e-5, atol=1e-5)


def test_the_command_prints_where_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, run = saved_run(tmp_path)
    out = tmp_path / "model.pt"
    assert main(["export", str(run), "--format", "torchscript", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert main(["export", str(run), "--format", "caffe"]) == 2
    assert "--format caffe: expected timm, onnx, torchscript" in capsys.readouterr().err


def test_models_lists_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == ROWS.keys()
    shared = rows["shared-small"]
    assert shared["parameters"]["100"] == 6_560_264
    assert sum(shared["gflops"].values()) < sum(shared["gflops_plain_convolution"].values())
    assert rows["vit-base"]["gflops"]["vit"] == pytest.approx(9.1971, abs=5e-5)
