"""Starting from somebody's weights: a run's, an export's, a file's."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import ONE, tiny, write
from safetensors.torch import save_file
from torch import Tensor

from bootvit import checkpoint
from bootvit.__main__ import main
from bootvit.config import Config, dump_config
from bootvit.data.facts import DataFacts, Preparation
from bootvit.errors import UserError
from bootvit.export import export
from bootvit.learner import Learner, Networks
from bootvit.loop import fit
from bootvit.runs import claim
from bootvit.weights import check_weights, warm_start

CLASSES = tuple(f"class {i}" for i in range(10))


def saved_run(folder: Path, **changes: Any) -> tuple[Path, Learner]:
    """A run with a checkpoint of random weights, none of which a fresh network has."""
    config = tiny(ray__storage_path=str(folder), name="source", seed=7, **changes)
    learner = Learner(config, 10, ONE)
    with torch.no_grad():
        for tensor in (*learner.networks.parameters(), *learner.networks.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor), alpha=0.1)
    run, _ = claim(config, resume=False, overwrite=False)
    facts = DataFacts(CLASSES, "abc", Preparation("resize", config.image_size, (0.5,) * 3, (0.2,) * 3))  # type: ignore[arg-type]
    state = {"learner": learner.state_dict(), "progress": {}, "data": facts.to_dict()}
    checkpoint.write(run.checkpoints, checkpoint.pack(state), epoch=1, step=4, final=False)
    return run.path, learner


def started(
    weights: Path | str, net: str = "vit", classes: tuple[str, ...] = CLASSES, **changes: Any
) -> tuple[Networks, dict[str, Tensor], str]:
    """(networks that start from these weights, what they were before, what is said of it)."""
    config = tiny(**{"method": "joint"} | changes | {f"model__{net}__weights": str(weights)})
    torch.manual_seed(1)
    networks = Networks(config, len(classes))
    before = {name: tensor.clone() for name, tensor in networks.state_dict().items()}
    notes = warm_start(networks, config, classes)
    assert notes == check_weights(config, classes)
    assert len(notes) == 1
    return networks, before, notes[0].removeprefix(f"model.{net}.weights={weights}: ")


def same(one: torch.nn.Module | None, other: torch.nn.Module | None) -> bool:
    """Whether two networks have the same weights and buffers."""
    assert one is not None
    assert other is not None
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --------------------------------------------------------------------------------------------- what we write


@pytest.mark.parametrize("form", ["run", "checkpoint", "moved checkpoint", "export", "export's file"])
def test_a_network_starts_from_what_we_write(tmp_path: Path, form: str) -> None:
    run, learner = saved_run(tmp_path)
    source = {"run": run, "checkpoint": run / "checkpoints" / "step-00000004.safetensors"}.get(
        form, tmp_path / "moved.safetensors"
    )
    if form == "moved checkpoint":
        shutil.copy(run / "checkpoints" / "step-00000004.safetensors", source)
    elif form.startswith("export"):
        config = tiny(ray__storage_path=str(tmp_path), name="source", seed=7)
        source = export(config, run, "timm", network="vit") / ("model.safetensors" if form.endswith("file") else "")
    networks, before, note = started(source)
    assert same(networks.vit, learner.networks.vit)
    assert all(torch.equal(t, networks.state_dict()[n]) for n, t in before.items() if n.startswith("agent."))
    assert note == f"{len(learner.networks.vit.state_dict())} of the network's 32 tensors"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (CLASSES[::-1], "a fresh head: its own is for other classes, or for the same in another order"),
        (CLASSES[:9], "a fresh head: its own is for other classes, or for the same in another order"),
    ],
)
@pytest.mark.parametrize("form", ["run", "export"])
def test_a_head_is_for_the_same_classes_in_the_same_order(tmp_path: Path, names: Any, said: str, form: str) -> None:
    run, learner = saved_run(tmp_path)
    source = run
    if form == "export":
        source = export(tiny(ray__storage_path=str(tmp_path), name="source", seed=7), run, "timm", network="vit")
    networks, before, note = started(source, classes=names)
    assert networks.vit is not None
    assert learner.networks.vit is not None
    assert note == f"30 of the network's 32 tensors; {said}"
    assert torch.equal(networks.vit.head.weight, before["vit.head.weight"])
    assert torch.equal(networks.vit.norm.weight, learner.networks.vit.norm.weight)


@pytest.mark.parametrize(
    ("old", "new"),
    [([8, 8], [12, 12]), ([8, 24], [12, 20]), ([8, 32], [16, 16]), ([16, 16], [8, 32])],  # the last two: equal counts
    ids=str,
)
@pytest.mark.parametrize("form", ["run", "export"])
def test_position_tables_are_resized_from_the_grid_they_had(tmp_path: Path, old: Any, new: Any, form: str) -> None:
    changes = {"method": "vit", "data__image_size": old}
    run, learner = saved_run(tmp_path, **changes)
    source = run
    if form == "export":
        source = export(tiny(ray__storage_path=str(tmp_path), name="source", seed=7, **changes), run, "timm")
    networks, _, note = started(source, method="vit", data__image_size=new)
    table = learner.networks.vit.pos_embed  # type: ignore[union-attr]
    grid = table[:, 1:].detach().unflatten(1, (old[0] // 2, old[1] // 2)).permute(0, 3, 1, 2)
    side = (new[0] // 2, new[1] // 2)
    wanted = torch.nn.functional.interpolate(grid, side, mode="bicubic", antialias=True).flatten(2).mT
    torch.testing.assert_close(networks.vit.pos_embed[:, 1:], wanted)  # type: ignore[union-attr]
    assert torch.equal(networks.vit.pos_embed[:, :1], table[:, :1])  # type: ignore[union-attr]
    assert note == "32 of the network's 32 tensors"


def test_tensors_that_are_not_used_are_named(tmp_path: Path) -> None:
    run, learner = saved_run(tmp_path, method="vit", model__vit__depth=3)
    networks, before, note = started(run, model__vit__mlp_width=30, model__vit__attention="entmax")
    assert networks.vit is not None
    assert note == (
        "26 of the network's 34 tensors; 2 not in the file (blocks.0.attn.alpha, blocks.1.attn.alpha); "
        "12 not in the network (blocks.2.norm1.weight, blocks.2.norm1.bias, …); "
        "6 of another shape (blocks.0.mlp.fc1.weight: (24, 18), here (30, 18); …)"
    )
    assert torch.equal(networks.vit.blocks[1].mlp.fc1.weight, before["vit.blocks.1.mlp.fc1.weight"])
    assert torch.equal(networks.vit.blocks[1].attn.qkv.weight, learner.networks.vit.blocks[1].attn.qkv.weight)  # type: ignore[union-attr, index]


def test_agents_start_from_a_runs_agent(tmp_path: Path) -> None:
    run, learner = saved_run(tmp_path)
    networks, before, _ = started(run, "agent")
    assert same(networks.agent, learner.networks.agent)
    assert all(torch.equal(t, networks.state_dict()[n]) for n, t in before.items() if n.startswith("vit."))
    networks, before, note = started(run, "agent", method="shared")  # its mixers and MLPs are the ViT's
    own, theirs = networks.agent.state_dict(), learner.networks.agent.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    assert "12 not in the network (blocks.0.mixer.weight, blocks.0.mixer.bias, …)" in note
    assert all(torch.equal(t, networks.state_dict()[n]) for n, t in before.items() if n.startswith("vit."))


def test_a_cnn_of_timm_starts_from_a_run_and_from_a_file(tmp_path: Path) -> None:
    changes = {"method": "agent", "model__agent__name": "resnet10t", "data__image_size": 32}
    run, learner = saved_run(tmp_path, **changes)
    networks, _, note = started(run, "agent", **changes)
    assert same(networks.agent, learner.networks.agent)
    donor = timm.create_model("resnet10t", num_classes=3)
    torch.save({"state_dict": donor.state_dict()}, tmp_path / "resnet.pth.tar")
    networks, _, note = started(tmp_path / "resnet.pth.tar", "agent", **changes)
    assert torch.equal(networks.agent.cnn.layer1[0].conv1.weight, donor.layer1[0].conv1.weight)  # type: ignore[union-attr, index]
    assert note.endswith("a fresh head: its own is for 3 classes, not 10")


# ---------------------------------------------------------------------------------------------- timm's format

TIMMS = {"width": None, "heads": None, "mlp_width": None, "patch": None, "name": "vit_tiny_patch16_224", "depth": 2}


def timms(**changes: Any) -> Any:
    """A ViT of timm."""
    return timm.create_model("vit_tiny_patch16_224", depth=2, **{"num_classes": 7} | changes)


@pytest.mark.parametrize("form", [".pth", ".bin", ".safetensors", "model", "state_dict", "module."])
def test_fine_tuning_starts_from_a_file_at_another_size_and_class_count(tmp_path: Path, form: str) -> None:
    source = timms()
    tensors = source.state_dict()
    file = tmp_path / ("vit" + (form if form.startswith(".") else ".pth"))
    if form == ".safetensors":
        save_file(tensors, file)
    elif form == "module.":
        torch.save({"epoch": 3, "model": {f"module.{name}": tensor for name, tensor in tensors.items()}}, file)
    else:
        torch.save(tensors if form.startswith(".") else {form: tensors, "epoch": 3}, file)
    networks, _, note = started(file, method="vit", model__vit=TIMMS, data__image_size=48)
    model = networks.vit
    assert model is not None
    assert model.head.out_features == 10
    assert model.pos_embed.shape == (1, 1 + 9, 192)
    torch.testing.assert_close(model.pos_embed[:, :1], source.pos_embed[:, :1])  # the class token's row is kept
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)  # type: ignore[union-attr]
    assert torch.equal(model.patch_embed.proj.weight, source.patch_embed.proj.weight)
    assert note == "30 of the network's 32 tensors; a fresh head: its own is for 7 classes, not 10"


def test_a_files_head_is_used_for_as_many_classes_and_that_is_said(tmp_path: Path) -> None:
    source = timms(num_classes=10)
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    networks, _, note = started(tmp_path / "vit.pth", method="vit", model__vit=TIMMS, data__image_size=224)
    assert same(networks.vit, source)
    assert note == "32 of the network's 32 tensors; its head is used: 10 classes as here, of unknown names"


@pytest.mark.parametrize("head", [True, False])
def test_googles_format_is_read(tmp_path: Path, head: bool) -> None:
    source = timms(num_classes=10)
    np.savez(tmp_path / "vit.npz", **googles(source, head))
    networks, _, note = started(tmp_path / "vit.npz", method="vit", model__vit=TIMMS, data__image_size=224)
    assert networks.vit is not None
    assert torch.equal(networks.vit.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    assert torch.equal(networks.vit.head.weight, source.head.weight) == head
    assert note.startswith("32 of" if head else "30 of the network's 32 tensors; it has no head: a fresh one")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(UserError, match=r"other\.npz: timm does not read this as a vit_tiny_patch16_224"):
        started(tmp_path / "other.npz", method="vit", model__vit=TIMMS, data__image_size=224)


def googles(vit: Any, head: bool) -> dict[str, Any]:
    """A ViT's weights by Google's names, in its layout."""
    s = {name: tensor.numpy() for name, tensor in vit.state_dict().items()}
    out = {
        "embedding/kernel": s["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": s["patch_embed.proj.bias"],
        "cls": s["cls_token"],
        "Transformer/posembed_input/pos_embedding": s["pos_embed"],
        "Transformer/encoder_norm/scale": s["norm.weight"],
        "Transformer/encoder_norm/bias": s["norm.bias"],
    }
    if head:
        out |= {"head/kernel": s["head.weight"].T, "head/bias": s["head.bias"]}
    for i in range(2):
        ours, theirs = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        for norm, name in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            out |= {f"{theirs}{name}/scale": s[f"{ours}{norm}.weight"], f"{theirs}{name}/bias": s[f"{ours}{norm}.bias"]}
        mixed = f"{theirs}MultiHeadDotProductAttention_1/"
        for j, name in enumerate(("query", "key", "value")):
            rows = slice(192 * j, 192 * (j + 1))
            out[f"{mixed}{name}/kernel"] = s[f"{ours}attn.qkv.weight"][rows].T.reshape(192, 3, 64)
            out[f"{mixed}{name}/bias"] = s[f"{ours}attn.qkv.bias"][rows].reshape(3, 64)
        out[f"{mixed}out/kernel"] = s[f"{ours}attn.proj.weight"].T.reshape(3, 64, 192)
        out[f"{mixed}out/bias"] = s[f"{ours}attn.proj.bias"]
        for j in (0, 1):
            out[f"{theirs}MlpBlock_3/Dense_{j}/kernel"] = s[f"{ours}mlp.fc{j + 1}.weight"].T
            out[f"{theirs}MlpBlock_3/Dense_{j}/bias"] = s[f"{ours}mlp.fc{j + 1}.bias"]
    return out


# --------------------------------------------------------------------------------------------------- mistakes


def odd_places(folder: Path) -> None:
    """Places that are no weights, and some that do not fit."""
    (folder / "empty.pth").touch()
    write(folder / "text.pth", "hello")
    write(folder / "text.safetensors", "hello")
    write(folder / "folder/notes.txt", "mine")
    torch.save({"x.weight": torch.zeros(3)}, folder / "other.pth")
    torch.save([torch.zeros(3)], folder / "list.pth")
    torch.save({"epoch": 3}, folder / "nothing.pth")
    torch.save({"model": Learner}, folder / "code.pth")
    torch.save(timm.create_model("resnet10t").state_dict(), folder / "resnet.pth")
    write(folder / "young/config.yaml", dump_config(tiny()))
    saved_run(folder / "wide", method="vit", model__vit__width=36)
    run, _ = saved_run(folder / "runs", method="agent")
    (folder / "cut.safetensors").write_bytes((run / "checkpoints" / "step-00000004.safetensors").read_bytes()[:5000])


MISTAKES = [
    ("vit", "nowhere.pth", "there is no such file or folder; expected a run's folder, its checkpoint, a timm export"),
    ("vit", "empty.pth", "empty.pth is empty"),
    ("vit", "text.pth", "text.pth is not a readable file of tensors"),
    ("vit", "text.safetensors", "text.safetensors is not a readable file of tensors"),
    ("vit", "cut.safetensors", "cut.safetensors is not a readable file of tensors"),
    ("vit", "code.pth", "code.pth is not a readable file of tensors and plain values"),
    ("vit", "folder", "this folder is neither a run nor a timm export"),
    ("vit", "young", "this run has no usable checkpoint"),
    ("vit", "other.pth", "none of its 1 tensors fits this network"),
    (
        "vit",
        "wide/source",
        "none of its 32 tensors fits this network, heads aside: 28 of another shape (cls_token: (1,",
    ),
    ("vit", "resnet.pth", "tensors fits this network"),
    ("vit", "list.pth", "holds no weights by name, but a list"),
    ("vit", "nothing.pth", "nothing.pth holds no weights"),
    ("vit", "runs/source", "this run has no vit, only agent"),
    ("vit", "https://host/vit.pth", "download it, and give the file's path"),
    ("vit", "timm", "timm has no weights of bootvit_small_patch16_224"),
    ("agent", "timm", "agent_small is no model of timm"),
    ("agent", "resnet.pth", "tensors fits this network"),
    ("agent", "nowhere.pth", "there is no such file or folder"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `odd_places`."""
    folder = tmp_path_factory.mktemp("places")
    odd_places(folder)
    return folder


@pytest.mark.parametrize(("net", "place", "said"), MISTAKES)
@pytest.mark.parametrize("local", [True, False])
def test_a_mistake_is_one_line_before_the_name_is_taken(
    places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], net: str, place: str, said: str, local: bool
) -> None:
    given = place if place == "timm" or "://" in place else str(places / place)
    config = write(tmp_path / "run.yaml", dump_config(tiny(ray__storage_path=str(tmp_path / "runs"))))
    assert main(["train", str(config), f"model.{net}.weights={given}", *(["--local"] if local else [])]) == 2
    err = capsys.readouterr().err
    assert f"model.{net}.weights={given}: " in err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_runs_own_folder_is_not_its_beginning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = saved_run(tmp_path / "runs")
    config = write(tmp_path / "run.yaml", dump_config(tiny(ray__storage_path=str(tmp_path / "runs"), name="source")))
    assert main(["train", str(config), f"model.vit.weights={run}", "--local", "--overwrite"]) == 2
    assert "lies in this run's own folder, which starts anew: use another name=" in capsys.readouterr().err
    assert (run / "checkpoints" / "step-00000004.safetensors").exists()


def test_a_sweep_checks_before_its_first_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write(tmp_path / "base.yaml", dump_config(tiny(data__held_out=0.2)))
    content = {
        "name": "sweep",
        "base": str(base),
        "space": {"model.vit.weights": {"grid": [None, str(tmp_path / "nowhere.pth")]}},
        "set": {"ray.storage_path": str(tmp_path / "runs")},
    }
    file = write(tmp_path / "sweep.yaml", json.dumps(content))
    assert main(["sweep", str(file), "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"bootvit: error: {file}: model.vit.weights={tmp_path}/nowhere.pth: there is no such file")
    assert err.count("\n") == 1


# ------------------------------------------------------------------------------------------- once, at the start


def test_weights_are_read_when_a_run_begins_and_never_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = saved_run(tmp_path / "from")
    moved = tmp_path / "source.safetensors"
    shutil.copy(source / "checkpoints" / "step-00000004.safetensors", moved)

    def config(name: str) -> Config:
        return tiny(ray__storage_path=str(tmp_path / "runs"), name=name, model__vit__weights=str(moved))

    def tensors(name: str) -> dict[str, Tensor]:
        saved = checkpoint.newest(tmp_path / "runs" / name / "checkpoints")
        assert saved is not None
        return checkpoint.load(saved)["learner"]["networks"]  # type: ignore[no-any-return]

    fit(config("whole"), ONE, claim(config("whole"), resume=False, overwrite=False)[0])
    fresh = tiny(ray__storage_path=str(tmp_path / "runs"), name="fresh")
    fit(fresh, ONE, claim(fresh, resume=False, overwrite=False)[0])
    assert not torch.equal(tensors("whole")["vit.norm.weight"], tensors("fresh")["vit.norm.weight"])

    class Stopped(Exception):
        pass

    def stop(_: Any) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        fit(config("cut"), ONE, claim(config("cut"), resume=False, overwrite=False)[0], on_epoch=stop)
    moved.unlink()
    file = write(tmp_path / "cut.yaml", dump_config(config("cut")))
    assert main(["train", str(file), "--local", "--resume"]) == 0
    one, other = tensors("whole"), tensors("cut")
    assert all(torch.equal(one[name], other[name]) for name in one)
    run = str(tmp_path / "runs" / "cut")
    assert main(["eval", run, "--local"]) == 0
    assert main(["export", run, "--format", "timm"]) == 0
    assert "error" not in capsys.readouterr().err
