"""The reference's settings and checkpoints: translated, refused by name, imported and gone on from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import ONE, write
from safetensors.torch import load_file

from bootvit import checkpoint
from bootvit.__main__ import main
from bootvit.config import Config
from bootvit.data.batches import Batch
from bootvit.errors import UserError
from bootvit.learner import Learner
from bootvit.load import load_config
from bootvit.reference import WeightNames, read_settings, translate
from bootvit.reference.importing import import_checkpoint

CASES = Path(__file__).parent / "parity" / "cases"

VIT = """
model:
  name: vit
  transformer: {embed_dim: 384, num_encoder_layers: 12, num_heads: 6, dim_feedforward: 1536, dropout: Null,
                activation: gelu, final_norm: True, norm_eps: 1.0e-6}
  patch_embed: {name: vit_like, img_size: 224, patch_size: 16, image_channels: 3}
  pos_encoding: {name: learnable, dropout: Null}
training:
  optimizer: {name: AdamW, lr: 1.0e-3, weight_decay: 0.05}
  lr_schedule: {name: cosine_annealing, T_max: 240}
  train_epochs: 240
  clip_max_norm: 0.1
  print_interval: 50
  val_interval: 1000
  batch_size: 64
  num_workers: 8
loss: {name: ce_loss, weight_dict: {cls: 1.0}}
"""
CNN = """
model:
  name: cnn
  cnn_name: cnn_block
  input_proj: {name: resnet_like, image_channels: 3, activation: gelu, mid_channel: 64}
  conv_block: {name: conv_manyhead, bias: True, num_heads: 6}
  mlp_block: {name: mlp_cnn, dim_feedforward: 1536, dropout: 0.1}
  down_sample_layers: [2, 8]
  embed_dim: 384
  num_layers: 12
  norm: {name: bn}
  activation: gelu
  pre_norm: False
training:
  optimizer: {name: SGD, lr: 0.05, weight_decay: 5.0e-4}
  lr_schedule: {name: cosine_annealing, T_max: 100, warmup_iters: 5}
"""
DATA = """
dataset:
  name: cifar_100
  root: ~/datasets/cifar
  train: {split: train}
  val: {split: test}
  resize: 224
validation: {batch_size: 128, num_workers: 4}
"""
JOINT = f"""
mutual:
  cfg:
    name: base_mutual
    vit:
      cfg_path: config/vit/vit-base.yaml
      extract_layers: {[f"transformer.layers.{i}" for i in range(12)]}
      clip_max_norm: 2.0
    cnn:
      cfg_path: config/cnn/agent.yaml
      extract_layers: {[f"layers.{i}" for i in range(12)]}
  joint_training: False
  master: vit
training:
  train_epochs: 240
  sync_bn: True
  decay_strategy: {{use_decay: True, decay_items: [hint_vit, kd]}}
loss:
  name: base_mutual_loss
  weight_dict: {{cls: 1.0, kd: 0.5, hint_cnn: 0, hint_vit: 10.0}}
  loss_items: [cross_entropy, mutual_kd, mutual_hint]
  kd_temp: 4.0
  hint_cfg: {{start_id: 1, proj_student: False, embed_dim: 384, norm: True, auto_resample: True}}
"""


@pytest.fixture
def joint_file(tmp_path: Path) -> Path:
    """A joint setting whose sub-files are found from the folder above its `config/`."""
    write(tmp_path / "config/vit/vit-base.yaml", VIT)
    write(tmp_path / "config/cnn/agent.yaml", CNN)
    return write(tmp_path / "config/joint/joint.yaml", JOINT + DATA)


def test_a_single_network() -> None:
    config = translate(yaml.safe_load(VIT + DATA), "vit.yaml")
    assert config.method == "vit"
    assert (config.model.vit.width, config.model.vit.depth, config.model.vit.heads) == (384, 12, 6)
    assert (config.data.source, config.data.image_size, config.data.eval_batch_size) == ("cifar100", (224, 224), 128)
    assert (config.optim.clip_norm, config.optim.clip_when, config.schedule.per) == (0.1, "every", "epoch")
    assert (config.model.init, config.data.fraction_rule, config.data.resize) == ("reference", "reference", "pil")


def test_joint_training_takes_each_networks_own_optimiser(joint_file: Path) -> None:
    config = translate(read_settings(joint_file), str(joint_file))
    assert config.method == "joint"
    assert (config.optim.lr, config.optim.clip_norm, config.optim.clip_when) == (1e-3, 2.0, "first_step")
    agent = config.optim.agent
    assert (agent.name, agent.lr, agent.weight_decay, agent.clip_norm) == ("sgd", 0.05, 5e-4, "none")
    assert (config.schedule.period, config.schedule.agent.period, config.schedule.agent.warmup_epochs) == (240, 100, 5)
    objective = config.objective
    assert (objective.vit.ce, objective.vit.kd, objective.vit.hint, objective.agent.hint) == (1.0, 0.5, 10.0, 0.0)
    assert (objective.vit.decayed, objective.agent.decayed, objective.hint_pool) == (("kd", "hint"), ("kd",), "raster")
    assert (config.model.agent.stem, config.model.agent.downsample, config.model.agent.sync_norm) == (
        "resnet",
        (2, 8),
        True,
    )


def test_terms_that_decay_are_known_by_name(joint_file: Path) -> None:
    settings = read_settings(joint_file)
    strategy = settings["training"]["decay_strategy"]
    for items, vit, agent in (
        (["cls", "hint_cnn"], ("ce",), ("ce", "hint")),
        (["kd_vit", "cls_cnn"], (), ()),  # of shared training: the reference fades nothing here
    ):
        strategy["decay_items"] = items
        objective = translate(settings, "joint.yaml").objective
        assert (objective.vit.decayed, objective.agent.decayed) == (vit, agent)
    strategy["decay_items"] = ["hint"]
    with pytest.raises(UserError, match=r"decay_strategy\.decay_items: 'hint' is no term of a loss, only cls"):
        translate(settings, "joint.yaml")


def test_the_users_overrides_come_last() -> None:
    config = translate(yaml.safe_load(VIT), "vit.yaml", ["schedule.epochs=3", "data.source=fake"])
    assert (config.schedule.epochs, config.data.source) == (3, "fake")


def test_a_missing_sub_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "config/joint/joint.yaml", JOINT)
    with pytest.raises(UserError, match=r"config/vit/vit-base\.yaml"):
        read_settings(path)


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        ("model/transformer/pre_norm", False, r"model\.transformer\.pre_norm=False"),
        ("model/transformer/final_norm", False, "final_norm"),
        ("model/transformer/activation", "relu", "activation='relu'"),
        ("model/transformer/colour", "red", r"model\.transformer\.colour is not supported"),
        ("model/transformer/num_heads", 7, "heads=7"),
        ("model/patch_embed/image_channels", 1, "image_channels=1"),
        ("model/pos_encoding/name", "identity", r"pos_encoding\.name='identity'"),
        ("model/transformer/embed_dim", "wide", r"embed_dim='wide': expected an integer"),
        ("model/patch_embed/patch_size", "8x8", "patch_size='8x8'"),
        ("model/transformer", 3, r"model\.transformer: expected keys"),
        ("training/optimizer/lr", "fast", "lr='fast': expected a number"),
        ("model/name", "swin", r"model\.name='swin'"),
        ("model/pre_train", "x.pth", r"model\.pre_train is not supported"),
        ("training/optimizer/name", "Lamb", r"optimizer\.name='Lamb'"),
        ("training/optimizer/betas", [0.9, 0.95], "betas"),
        ("training/lr_schedule/name", "poly", "lr_schedule.name='poly'"),
        ("training/lr_schedule/eta_min", 1e-5, "eta_min"),
        ("loss/name", "focal", r"loss\.name='focal'"),
        ("dataset/name", "cub_200", r"dataset\.name='cub_200'"),
        ("dataset/resize", 256, r"dataset\.resize"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(place: str, value: object, named: str) -> None:
    settings = yaml.safe_load(VIT + DATA)
    *parents, last = place.split("/")
    section: Any = settings
    for key in parents:
        section = section[key]
    section[last] = value
    with pytest.raises(UserError, match=named) as caught:
        translate(settings, "vit.yaml")
    assert "vit.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        ("loss/hint_cfg/proj_student", True, "proj_student=True"),
        ("loss/loss_items", None, "loss_items=None: expected a list"),
        ("loss/hint_cfg/start_id", 2, "start_id=2"),
        ("loss/hint_cfg/embed_dim", 24, "embed_dim=24"),
        ("loss/hint_cfg/auto_resample", False, "auto_resample"),
        ("mutual/cfg/vit/extract_layers", ["transformer.layers.0"], "extract_layers"),
        ("mutual/joint_training", True, "base_mutual"),
        ("sub_configs/config/cnn/agent.yaml~model/num_layers", 6, "6 layers"),
        ("sub_configs/config/cnn/agent.yaml~model/conv_block/num_heads", 4, "4 heads"),
        ("sub_configs/config/cnn/agent.yaml~model/conv_block/bias", False, "bias=False"),
        ("sub_configs/config/cnn/agent.yaml~model/norm/name", "ln", r"norm\.name='ln'"),
        ("sub_configs/config/cnn/agent.yaml~model/down_sample_layers", [0, 1, 2, 3], "whole multiples"),
    ],
)
def test_pairs_that_cannot_be_trained_are_refused(joint_file: Path, place: str, value: object, named: str) -> None:
    settings = read_settings(joint_file)
    section: Any = settings
    if "~" in place:
        file, place = place.removeprefix("sub_configs/").split("~")
        section = settings["sub_configs"][file]
    *parents, last = place.split("/")
    for key in parents:
        section = section[key]
    section[last] = value
    with pytest.raises(UserError, match=named):
        translate(settings, "joint.yaml")


# -------------------------------------------------------------------------------------------- checkpoints


def kit_files(folder: Path, case: str, **saved: Any) -> tuple[Path, Path]:
    """A checkpoint and a YAML file as the reference would have written them for a case of the kit."""
    facts = json.loads((CASES / f"{case}.json").read_text())
    kept = {k: v for k, v in facts["config"].items() if k in ("model", "mutual", "loss", "training", "sub_configs")}
    settings = write(folder / f"{case}.yaml", yaml.safe_dump(kept))
    tensors = load_file(CASES / f"{case}.safetensors")
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    path = folder / f"{case}.pth"
    torch.save({"model": state, **saved}, path)
    return path, settings


def quick(folder: Path, *more: str) -> list[str]:
    """Overrides for a run of seconds on images made in memory."""
    return [
        f"ray.storage_path={folder}",
        "data.source=fake",
        "data.num_classes=7",
        "schedule.epochs=3",
        "tracking.enabled=false",
        *more,
    ]


def test_an_imported_run_is_evaluated_resumed_and_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, settings = kit_files(tmp_path, "joint", epoch=1, iter=8, lr_schedulers=[{"last_epoch": 2}] * 2)
    assert main(["import", str(path), "--config", str(settings), "--name", "old", *quick(tmp_path)]) == 0
    assert "2 epochs done" in capsys.readouterr().out
    run = tmp_path / "old"
    assert main(["eval", str(run), "--local", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["vit"]["total"] == counts["agent"]["total"] == 70
    from PIL import Image

    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    assert main(["predict", str(run), str(tmp_path / "red.png"), "--json"]) == 0
    assert {json.loads(line)["network"] for line in capsys.readouterr().out.splitlines()} == {"vit", "agent"}
    assert main(["train", str(run / "config.yaml"), "--resume", "--local"]) == 0
    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["epochs"]) == ("finished", 3)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {row["epoch"] for row in rows if row["name"] != "epoch"} == {2}  # epochs 0 and 1 are the reference's
    assert [row["value"] for row in rows if row["name"] == "epoch"] == [2, 3]


def test_importing_over_a_run_is_refused(tmp_path: Path) -> None:
    path, settings = kit_files(tmp_path, "joint")
    import_checkpoint(path, settings, quick(tmp_path), name="old")
    with pytest.raises(UserError, match="exists"):
        import_checkpoint(path, settings, quick(tmp_path), name="old")
    import_checkpoint(path, settings, quick(tmp_path), name="old", overwrite=True)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    path, _ = kit_files(tmp_path, "joint")
    _, settings = kit_files(tmp_path, "vit_entmax")
    with pytest.raises(UserError, match=r"models\.cnn\."):
        import_checkpoint(path, settings, quick(tmp_path), name="old")


def test_a_checkpoint_without_a_model_is_refused(tmp_path: Path) -> None:
    _, settings = kit_files(tmp_path, "vit_entmax")
    torch.save({"weights": {}}, tmp_path / "no.pth")
    with pytest.raises(UserError, match="no 'model'"):
        import_checkpoint(tmp_path / "no.pth", settings, quick(tmp_path))


def test_shared_weights_that_differ_are_refused(tmp_path: Path) -> None:
    path, settings = kit_files(tmp_path, "trajectory_shared")
    saved = torch.load(path)
    saved["model"]["models.cnn.layers.0.mlp_block.linear1.bias"] += 1
    torch.save(saved, path)
    with pytest.raises(UserError, match="differs from its other copy"):
        import_checkpoint(path, settings, quick(tmp_path), name="old")


VIT_ORDER = (
    "cls_token",
    "dist_token",
    "patch_embed",
    "pos_embed",
    "transformer.norm",
    "transformer.layers",
    "cls_head",
)
CNN_ORDER = ("input_proj", "layers", "bn", "linear")


def reference_order(names: list[str]) -> list[str]:
    """Names in the order of the reference's modules: the CNN first; in a layer the branches, then the norms."""

    def place(name: str) -> tuple[Any, ...]:
        net, rest = (name.split(".")[1], name.split(".", 2)[2]) if name.startswith("models.") else ("", name)
        order = CNN_ORDER if net == "cnn" else VIT_ORDER
        top = next(i for i, start in enumerate(order) if rest.startswith(start))
        layer = next((int(part) for part in rest.split(".") if part.isdigit()), -1)
        branches = ("cnn_block", "attention", "mlp", "norm1", "norm2")
        branch = next((i for i, word in enumerate(branches) if f".{word}" in rest), -1)
        module = rest.split(".")[-2] if "." in rest else rest
        parts = ("softmax", "linear_qkv", "linear_out", "linear1", "conv1", "linear2", "conv2")
        return net, top, layer, branch, parts.index(module) if module in parts else -1, not rest.endswith("weight")

    return sorted(names, key=place)


def numbered(learner: Learner, names: WeightNames, order: list[str]) -> list[dict[str, Any]]:
    """The state dicts of the reference's optimisers, cnn before vit: parameters by first appearance in `order`."""
    by_name = {names.theirs(name): p for name, p in learner.networks.named_parameters()}
    firsts: dict[int, torch.nn.Parameter] = {}
    for name in order:
        parameter = by_name.get(names.theirs(names.ours(name)))
        if parameter is not None:
            firsts.setdefault(id(parameter), parameter)
    out = []
    for group in reversed(learner.groups):
        mine = {id(p) for p in group.parameters}
        own = [p for p in firsts.values() if id(p) in mine]
        state = {i: dict(group.optimizer.state[p]) for i, p in enumerate(own)}
        for i, p in enumerate(own):
            if p.dim() == 3 and p.shape[0] == 1 and p.shape[1] > 1:  # the position table
                state[i] = {k: v.transpose(0, 1) if v.dim() else v for k, v in state[i].items()}
        out.append({"state": state, "param_groups": [{"params": list(range(len(own)))}]})
    return out


@pytest.mark.parametrize("case", ["joint", "trajectory_shared", "vit_entmax"])
def test_training_goes_on_with_the_moments(tmp_path: Path, case: str) -> None:
    _, settings = kit_files(tmp_path, case)
    settings.write_text(yaml.safe_dump(training(read_settings(settings))))
    config = translate(read_settings(settings), case, quick(tmp_path))
    learner, names = Learner(config, 7, ONE), WeightNames(config)
    x, labels = torch.randn(6, 3, 32, 32), torch.arange(6)
    for step in range(3):
        learner.step(Batch(x, labels, 6), step, 0, 0.0)
    state = names.dump(learner.networks.state_dict())
    aliases = json.loads((CASES / f"{case}.json").read_text())["scalars"].get("aliases", {})
    state |= {alias: state[name] for alias, name in aliases.items()}
    order = reference_order(list(state))
    optimizers = numbered(learner, names, order)
    saved = {"optimizer": optimizers[0]} if config.method == "vit" else {"optimizers": optimizers}
    torch.save({"model": {name: state[name] for name in order}, "epoch": 0, "iter": 3, **saved}, tmp_path / "it.pth")
    done = import_checkpoint(tmp_path / "it.pth", settings, quick(tmp_path), name="old")
    assert (done.moments, done.epoch) == (True, 1)
    again = Learner(load_config(str(done.run / "config.yaml")), 7, ONE)
    newest = checkpoint.newest(done.run / "checkpoints")
    assert newest is not None
    again.load_state_dict(checkpoint.load(newest)["learner"])
    for one in (learner, again):
        one.step(Batch(x, labels, 6), 3, 1, 1.0)
    for (name, a), b in zip(learner.networks.state_dict().items(), again.networks.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7, msg=name)


def training(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a case of one forward pass, with a training section."""
    rest = {"lr_schedule": {"name": "cosine_annealing", "T_max": 3}, "train_epochs": 3}
    return {"training": {"optimizer": {"name": "AdamW", "lr": 1e-3, "weight_decay": 0.05}} | rest} | settings


def test_names_go_both_ways() -> None:
    for case in ("joint", "trajectory_shared", "deit", "agent_base_res_like"):
        facts = json.loads((CASES / f"{case}.json").read_text())["config"]
        kept = {k: v for k, v in facts.items() if k in ("model", "mutual", "loss", "training", "sub_configs")}
        config: Config = translate(kept, case, ["data.image_size=64"] if case.startswith("agent") else [])
        names, networks = WeightNames(config), Learner(config, 7, ONE).networks
        state = networks.state_dict()
        back = names.load(names.dump(state), networks)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], state[name]) for name in state)
