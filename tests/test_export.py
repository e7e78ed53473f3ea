"""Exported networks compute what the run's networks compute, without bootvit."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from helpers import ONE, tiny, write
from PIL import Image

from bootvit import checkpoint
from bootvit.__main__ import main
from bootvit.config import Config
from bootvit.data.facts import DataFacts, Preparation
from bootvit.errors import RunFailed, UserError
from bootvit.export import ENDINGS, crop_of, export
from bootvit.files import write_json
from bootvit.learner import Learner, Networks
from bootvit.models.plain import plain
from bootvit.models.sizes import ROWS
from bootvit.result import new_result
from bootvit.runs import claim
from bootvit.standalone.images import centre_crop
from bootvit.standalone.networks import load

CLASSES = tuple(f"class {i}" for i in range(10))


def saved_run(folder: Path, kind: Any = "resize", **changes: Any) -> tuple[Config, Learner, Path]:
    """A run with a checkpoint of random weights, biases and BatchNorm statistics: no two of them are equal."""
    config = tiny(ray__storage_path=str(folder), **changes)
    learner = Learner(config, 10, ONE)
    with torch.no_grad():
        for parameter in learner.networks.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    learner.networks.features(torch.randn(4, 3, *config.image_size))
    learner.networks.eval()
    run, _ = claim(config, resume=False, overwrite=False)
    preparation = Preparation(kind, config.image_size, (0.5, 0.4, 0.3), (0.2, 0.21, 0.22))
    facts = DataFacts(CLASSES, "abc", preparation)
    state = {"learner": learner.state_dict(), "progress": {}, "data": facts.to_dict()}
    checkpoint.write(run.checkpoints, checkpoint.pack(state), epoch=1, step=1, final=False)
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
    # not to the last bit on every processor: our weights lie in memory channels last, timm's do not
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), logits(learner, "vit", images), rtol=0, atol=1e-6)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    own = learner.networks.vit.state_dict() if learner.networks.vit is not None else {}
    assert set(weights) == set(own)
    assert all(torch.equal(weights[name], own[name]) for name in own)
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
        pytest.param(
            {"method": "vit", "model__vit__attention": "entmax", "model__vit__depth": 1}, "vit", marks=pytest.mark.slow
        ),
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


@pytest.mark.parametrize("network", ["vit", "agent"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torchscript_computes_the_same_for_any_batch(tmp_path: Path, network: str) -> None:
    config, learner, run = saved_run(tmp_path, method="shared")
    module = script(export(config, run, "torchscript", network=network))
    for size in (1, 5):
        images = torch.randn(size, 3, 8, 8)
        torch.testing.assert_close(module(images), logits(learner, network, images), rtol=1e-5, atol=1e-5)


def script(file: Path, extra: dict[str, Any] | None = None) -> Any:
    """A TorchScript file as others read it."""
    return torch.jit.load(file, _extra_files=extra)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("network", ["vit", "agent"])
def test_pt2_computes_the_same_for_any_batch(tmp_path: Path, network: str) -> None:
    config, learner, run = saved_run(tmp_path, method="shared")
    inside = {"facts.json": ""}
    program = torch.export.load(export(config, run, "pt2", network=network), extra_files=inside)
    for size in (1, 5):
        images = torch.randn(size, 3, 8, 8)
        torch.testing.assert_close(program.module()(images), logits(learner, network, images), rtol=1e-5, atol=1e-5)
    assert json.loads(inside["facts.json"])["classes"] == list(CLASSES)


# ------------------------------------------------------------------------------- the agent as an ordinary CNN

AGENTS = [
    {"method": "shared"},
    {"method": "shared", "model__agent__value_bias": False, "model__agent__norm": "post"},
    {"method": "shared", "model__vit__heads": 6, "model__agent__taps": "row_major", "model__agent__downsample": [0]},
    {"method": "shared", "model__vit__heads": 3, "model__agent__taps": "centred"},
    {"method": "joint", "model__agent__stem": "resnet", "data__image_size": 32, "objective__vit__hint": 0.0},
    {"method": "joint", "model__agent__name": "agent_base", "model__agent__heads": 6},
]


@pytest.mark.parametrize("changes", AGENTS, ids=str)
def test_an_agent_of_conv2d_layers_computes_the_same_to_the_last_digits(changes: dict[str, Any]) -> None:
    """In float64, where a wrong tap, bias or norm would not pass as rounding."""
    networks = Networks(tiny(**changes), 10).double()
    with torch.no_grad():
        for parameter in networks.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        side = 32 if "data__image_size" in changes else 8
        networks.features(torch.randn(4, 3, side, side))
        agent = networks.eval().agent
        assert agent is not None
        cnn = plain(networks.config, agent)[0].double()
        images = torch.randn(2, 3, side, side, dtype=torch.float64)
        torch.testing.assert_close(cnn(images), agent(images).logits, rtol=1e-10, atol=1e-10)
    kinds = {type(module).__name__ for module in cnn.modules() if not list(module.children())}
    assert kinds <= {"Conv2d", "BatchNorm2d", "GELU", "Linear", "MaxPool2d"}


def without_bootvit(code: str, folder: Path) -> Any:
    """What a process that cannot import bootvit saves as out.pt."""
    blocked = "import sys; sys.modules['bootvit'] = None\nimport torch\nimages = torch.load('images.pt')\n"
    saved = (
        "\nassert not any(n.startswith('bootvit.') for n in sys.modules)\ntorch.save(torch.as_tensor(out), 'out.pt')"
    )
    subprocess.run([sys.executable, "-c", blocked + code + saved], cwd=folder, check=True)
    return torch.load(folder / "out.pt")


LOADED = {
    "timm": "import timm\nout = timm.create_model('local-dir:NAME', pretrained=True).eval()(images).detach()",
    "torch": "sys.path.insert(0, 'NAME')\nfrom bootvit_networks.networks import load\n"
    "out = load('NAME').module(images).detach()",
    "torchscript": "out = torch.jit.load('NAME.pt')(images).detach()",
    "pt2": "out = torch.export.load('NAME.pt2').module()(images).detach()",
    "onnx": "import onnxruntime\nsession = onnxruntime.InferenceSession('NAME.onnx')\n"
    "assert session.get_modelmeta().custom_metadata_map['network'] == 'NETWORK'\n"
    "(out,) = session.run(None, {'images': images.numpy()})",
}


@pytest.mark.slow
@pytest.mark.parametrize("network", ["vit", "agent"])
def test_every_file_is_loaded_where_there_is_no_bootvit(tmp_path: Path, network: str) -> None:
    """In each format, the shared agent also as Conv2d layers; onnxruntime reads the metadata too."""
    config, learner, run = saved_run(tmp_path, method="shared")
    images = torch.randn(5, 3, 8, 8)
    torch.save(images, tmp_path / "images.pt")
    for form, code in LOADED.items():
        for convolutions in (False, True):
            if (form == "timm" and network == "agent") or (convolutions and (form == "timm" or network == "vit")):
                continue
            name = f"{form}-{convolutions}"
            ending = "" if form in ("timm", "torch") else ENDINGS[form]
            export(config, run, form, network=network, out=tmp_path / f"{name}{ending}", convolutions=convolutions)
            out = without_bootvit(code.replace("NAME", name).replace("NETWORK", network), tmp_path)
            torch.testing.assert_close(out, logits(learner, network, images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "network"),
    [
        ({"method": "shared"}, "agent"),
        ({"model__vit__attention": "entmax"}, "vit"),
        ({"model__vit__name": "bootvit_small_distilled_patch16_224"}, "vit"),
        ({"method": "agent", "model__agent__name": "resnet10t", "data__image_size": 32}, "agent"),
    ],
    ids=str,
)
def test_a_torch_folder_is_the_network_again(tmp_path: Path, changes: Any, network: str) -> None:
    config, learner, run = saved_run(tmp_path, **changes)
    folder = export(config, run, "torch", network=network)
    images = torch.randn(3, 3, *config.image_size)
    with torch.no_grad():
        torch.testing.assert_close(load(folder).module(images), logits(learner, network, images), rtol=1e-4, atol=1e-4)
    assert export(config, run, "torch", network=network) == folder  # again: replaced


@pytest.mark.parametrize(
    ("changes", "form", "network", "said"),
    [
        ({}, "onnx", "vit", "--convolutions: only an agent"),
        ({"method": "vit"}, "onnx", None, "--convolutions: only an agent"),
        ({}, "timm", None, "the agent is no model of timm"),
        ({"method": "agent", "model__agent__name": "resnet10t", "data__image_size": 32}, "onnx", None, "a CNN of timm"),
    ],
)
def test_only_our_agent_is_made_of_convolutions(
    tmp_path: Path, changes: Any, form: str, network: str | None, said: str
) -> None:
    config, _, run = saved_run(tmp_path, **changes)
    with pytest.raises(UserError, match=said):
        export(config, run, form, network=network, convolutions=True)


def test_a_card_says_what_is_known_and_what_is_not(tmp_path: Path) -> None:
    config, _, run = saved_run(tmp_path, method="shared", data__held_out=0.2)
    result = new_result(config, "finished", 3, fingerprint="abc", digest="d")
    result["final"] = {"vit": {"top1": 41.5, "top5": 80.0}, "agent": {"top1": 50.0, "top5": 90.0}}
    text = (export(config, run, "timm", network="vit") / "README.md").read_text()
    assert "- not known: the run has not finished" in text
    write_json(run / "result.json", result)
    text = (export(config, run, "timm", network="vit") / "README.md").read_text()
    for line in (
        "license: unknown",
        "library_name: timm",
        "- data set: digits, 10% of the training images of each class, less 20% held out (fingerprint `abc`)",
        "- epochs: 3",
        "- evaluation: top-1 41.50%, top-5 80.00% (final epoch)",
        "- weights of the losses: vit ce 1, kd 1, hint 1; agent ce 1, kd 1, hint 0",
    ):
        assert line in text.splitlines()
    assert "must find out" in text
    card = (export(config, run, "torch", network="agent") / "README.md").read_text()
    assert "top-1 50.00%" in card
    assert "bootvit_networks" in card


# ---------------------------------------------------------------------------------------- what a file holds

WIDTH, DEPTH, HIDDEN = 18, 2, 24  # of tiny()
ALONE = {  # what each network computes with: of the shared agent's ViT no queries and keys, and no value bias by itself
    ("joint", "vit"): lambda nets: nets.vit,
    ("joint", "agent"): lambda nets: nets.agent,
    ("shared", "vit"): lambda nets: nets.vit,
    ("shared", "agent"): lambda nets: nets.agent,
}
BORROWED = DEPTH * (2 * WIDTH * WIDTH + WIDTH + 2 * WIDTH * HIDDEN + HIDDEN + WIDTH)


@pytest.mark.parametrize(("method", "network"), ALONE)
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_file_of_one_network_holds_no_other(tmp_path: Path, method: str, network: str) -> None:
    import onnx
    from onnx import numpy_helper

    config, learner, run = saved_run(tmp_path, method=method)
    own = ALONE[method, network](learner.networks)
    borrowed = BORROWED if (method, network) == ("shared", "agent") else 0
    module = script(export(config, run, "torchscript", network=network))
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in own.parameters()) + borrowed
    assert sum(b.numel() for b in module.buffers()) == sum(b.numel() for b in own.buffers())
    graph = onnx.load(export(config, run, "onnx", network=network)).graph
    arrays = [numpy_helper.to_array(one) for one in graph.initializer]
    numbers = sum(array.size for array in arrays if array.dtype.kind == "f" and array.size > 1)
    counted = sum(t.numel() for t in (*own.parameters(), *own.buffers()) if t.is_floating_point()) + borrowed
    assert counted * 0.98 < numbers <= counted  # the exporter folds norms into what they follow


@pytest.mark.parametrize(
    ("kind", "size", "timms"),
    [
        ("resize", 8, (1.0, "squash")),
        ("centre_crop", 8, (8 / 9, "center")),
        ("centre_crop", [8, 16], (0.875, "center")),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_file_says_what_it_is_of(tmp_path: Path, kind: str, size: Any, timms: tuple[float, str]) -> None:
    import onnx

    config, _, run = saved_run(tmp_path, kind, method="vit", data__image_size=size)
    rows, cols = config.image_size
    wanted = {
        "network": "vit",
        "classes": list(CLASSES),
        "image_size": [rows, cols],
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.21, 0.22],
        "kind": kind,
        "resize_to": [rows, cols] if kind == "resize" else [9, cols * 256 // 224],
        "interpolation": "bilinear",
        "crop_pct": timms[0],
        "crop_mode": timms[1],
        "fingerprint": "abc",
    }
    inside = {"facts.json": ""}
    file = export(config, run, "torchscript")
    script(file, inside)
    assert json.loads(inside["facts.json"]) == json.loads(file.with_suffix(".json").read_text()) == wanted
    file = export(config, run, "onnx")
    held = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    texts = ("network", "kind", "interpolation", "crop_mode", "fingerprint")
    assert {key: held[key] if key in texts else json.loads(held[key]) for key in wanted} == wanted
    assert json.loads(file.with_suffix(".json").read_text()) == wanted


# ------------------------------------------------------------------------------------- the images' preparation

SHAPES = [(33, 47), (47, 33), (96, 96), (7, 300), (301, 40), (225, 257)]  # (rows, columns) of images


def shown(shape: tuple[int, int]) -> Image.Image:
    """An image of noise."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["resize", "centre_crop"])
@pytest.mark.parametrize("size", [8, 32, 96, 224, [8, 24], [40, 24], [80, 96], [95, 10], [160, 224]], ids=str)
def test_timms_own_transform_gives_our_pixels_and_probabilities(tmp_path: Path, kind: str, size: Any) -> None:
    patch = [size, size] if isinstance(size, int) else size
    config, learner, run = saved_run(tmp_path, kind, method="vit", data__image_size=size, model__vit__patch=patch)
    model = timm.create_model(f"local-dir:{export(config, run, 'timm')}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    for shape in SHAPES:
        rows, cols = config.image_size
        image = shown(shape)
        ours = (
            image.resize((cols, rows), Image.Resampling.BILINEAR)
            if kind == "resize"
            else centre_crop(image, (rows, cols))
        )
        scaled = torch.from_numpy(np.array(ours)).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.21, 0.22)))
        assert torch.equal(transform(image), (scaled - mean) / std)
        with torch.no_grad():
            theirs = model(transform(image)[None]).softmax(1)
            wanted = logits(learner, "vit", ((scaled - mean) / std)[None]).softmax(1)
            torch.testing.assert_close(theirs, wanted, rtol=0, atol=1e-6)  # laid out otherwise in memory


@pytest.mark.parametrize("side", [443, 815, 890, 1780])  # here side / (side / 506) is 505.99…
def test_a_crop_share_is_not_lost_to_rounding(side: int) -> None:
    share = crop_of(Preparation("centre_crop", (side, side), (0.5,) * 3, (0.2,) * 3))["crop_pct"]  # type: ignore[arg-type]
    assert math.floor(side / share) == round(side * 256 / 224)


def test_another_preparation_than_timms_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _, run = saved_run(tmp_path, "centre_crop", method="vit", data__image_size=96, model__vit__patch=96)
    monkeypatch.setattr("bootvit.export.crop_of", lambda _: {"crop_pct": 0.875, "crop_mode": "center"})  # 109, not 110
    with pytest.raises(RunFailed, match="timm prepares an image of 37x53 for 96x96 otherwise"):
        export(config, run, "timm")
    assert list((run / "export").iterdir()) == []


def test_an_export_is_fine_tuned_for_other_classes(tmp_path: Path) -> None:
    config, learner, run = saved_run(tmp_path, method="vit")
    model = timm.create_model(f"local-dir:{export(config, run, 'timm')}", pretrained=True, num_classes=3)
    assert model.head.weight.shape == (3, WIDTH)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, learner.networks.vit.blocks[1].mlp.fc1.weight)  # type: ignore[union-attr, index]


# ------------------------------------------------------------------------------------------------- places


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _, run = saved_run(tmp_path / "run")
    folder = tmp_path / "out"
    folder.mkdir()

    def broken(*_: Any, **__: Any) -> None:
        raise RunFailed("no facts")

    for form, name in (("torchscript", "a.pt"), ("onnx", "a.onnx"), ("timm", "a")):
        with monkeypatch.context() as patched:
            patched.setattr("bootvit.export.write_json", broken)  # the last that is written
            with pytest.raises(RunFailed):
                export(config, run, form, network="vit", out=folder / name)
        assert list(folder.iterdir()) == []
    export(config, run, "timm", network="vit", out=folder / "a")
    before = (folder / "a" / "config.json").stat().st_mtime_ns
    export(config, run, "timm", network="vit", out=folder / "a")  # again: replaced
    assert (folder / "a" / "config.json").stat().st_mtime_ns > before
    assert [child.name for child in folder.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("form", "out", "said"),
    [
        ("onnx", "nowhere/a.onnx", "there is no folder"),
        ("torchscript", "file/a.pt", "there is no folder"),
        ("timm", "nowhere/a", "there is no folder"),
        ("timm", "file", "is a file; --format timm writes a folder"),
        ("timm", "folder", "there are other files in this folder"),
        ("onnx", "folder", "is a folder; --format onnx writes a file"),
        ("onnx", "a.json", "use .onnx"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, out: str, said: str
) -> None:
    _, _, run = saved_run(tmp_path)
    write(tmp_path / "file", "mine")
    write(tmp_path / "folder/notes.txt", "mine")
    there = sorted(tmp_path.rglob("*"))
    place = tmp_path / out
    assert main(["export", str(run), "--format", form, "--network", "vit", "--out", str(place)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"bootvit: error: --out {place}: ")
    assert said in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == there


def test_the_command_prints_where_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, run = saved_run(tmp_path)
    out = tmp_path / "model.pt"
    assert main(["export", str(run), "--format", "torchscript", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert main(["export", str(run), "--format", "caffe"]) == 2
    assert "--format caffe: expected timm, torch, onnx, pt2, torchscript" in capsys.readouterr().err


def test_models_lists_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == ROWS.keys()
    shared = rows["shared-small"]
    assert shared["parameters"]["100"] == 6_560_264
    assert sum(shared["gflops"].values()) < sum(shared["gflops_plain_convolution"].values())
    assert rows["vit-base"]["gflops"]["vit"] == pytest.approx(9.1971, abs=5e-5)
