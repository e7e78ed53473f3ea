"""Cases of single operations, subsets, schedules and metrics, and settings that must be refused."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import torch
from parity_kit import Case, ParityError, config_of, settings
from parity_networks import check_decay_setting
from PIL import Image
from timm.layers import Attention

from bootvit.config import DataConfig, ScheduleConfig, pair
from bootvit.data import Preparation, open_splits
from bootvit.data.batches import preprocess
from bootvit.data.cifar import MEAN, STD
from bootvit.data.fractions import reference_picks
from bootvit.data.sources import IMAGENET
from bootvit.data.table import RGB
from bootvit.errors import UserError
from bootvit.learner import Counts, Learner, World, count
from bootvit.models.agent import HeadTapConv
from bootvit.models.shapes import head_taps
from bootvit.models.shared import SharedMixer
from bootvit.objective import block_hint, kd_loss
from bootvit.optim import learning_rate
from bootvit.reference.files import Node
from bootvit.reference.training import SOURCES, read_schedule
from bootvit.standalone.convolutions import resnet_stem
from bootvit.standalone.sparse import sparse_weights

EIGHT_BITS = 1e-6  # preprocessing, recorded in float32


# ----------------------------------------------------------------------------------------- single operations


def run_units(case: Case) -> None:
    """Many-head and shared convolution, entmax, KD, the hint's three resamplings, the stem."""
    config = case.config
    for heads in config["manyhead_heads"]:
        check_manyhead(case, heads)
    for heads in config["shared_heads"]:
        check_shared(case, heads)
    for alpha in config["entmax_alphas"]:
        check_entmax(case, alpha)
    for temperature in config["kd_temps"]:
        check_kd(case, temperature)
    for name in config["hint_maps"]:
        check_hint(case, name)
    check_stem(case, config["stem_mid"])
    for heads, outcome in case.scalars["manyhead_head_support"].items():
        check_support(case, int(heads), outcome)
    if "hint_non_integer_ratio" in case.scalars:
        maps = torch.zeros(1, 3, 3, 4), torch.zeros(1, 2, 2, 4)
        case.equal("hint of no integer ratio", refused(lambda: block_hint(*maps, "raster"), ValueError), True)


def check_manyhead(case: Case, heads: int) -> None:
    """One matrix a head, at the head's place."""
    conv = HeadTapConv(case.tensors["input.map"].shape[1], head_taps(heads, "row_major")).to(case.device).double()
    conv.load_state_dict({key: case.input(f"manyhead{heads}.{key}") for key in ("weight", "bias")})
    case.close(f"manyhead{heads}", conv(case.input("map")), case.golden(f"output.manyhead{heads}"))


def check_shared(case: Case, heads: int) -> None:
    """The attention's weights as attention and as a convolution, with the convolution's gradients."""
    name = f"shared{heads}"
    width = case.tensors[f"input.{name}.out_weight"].shape[0]
    attention = Attention(width, num_heads=heads, qkv_bias=True).to(case.device).double()
    attention.load_state_dict(
        {
            f"{ours}.{kind}": case.input(f"{name}.{theirs}_{kind}")
            for ours, theirs in (("qkv", "qkv"), ("proj", "out"))
            for kind in ("weight", "bias")
        }
    )
    mixed = attention(case.input("seq").transpose(0, 1)).transpose(0, 1)
    case.close(f"{name}.attention", mixed, case.golden(f"output.{name}.attention"))
    x = case.input("shared_map").requires_grad_()
    out = SharedMixer(attention, head_taps(heads, "row_major"), value_bias=False)(x)
    case.close(f"{name}.conv", out, case.golden(f"output.{name}.conv"))
    (out * case.input("shared_cotangent")).sum().backward()
    grads = {
        "x": x.grad,
        "qkv_weight": attention.qkv.weight.grad,
        "out_weight": attention.proj.weight.grad,
        "out_bias": attention.proj.bias.grad,
    }
    for key, value in case.recorded(f"grad.{name}.").items():
        case.close(f"grad.{name}.{key}", grads[key], value)
    case.equal(f"{name}: no gradient", attention.qkv.bias.grad is None, case.scalars[f"{name}_qkv_bias_grad_is_none"])


def check_entmax(case: Case, alpha: float) -> None:
    """Sparse weights, and the gradients to the scores and to alpha."""
    name = f"entmax{alpha}"
    z = case.input("entmax_z").requires_grad_()
    learned = torch.tensor(alpha, dtype=torch.float64, device=case.device, requires_grad=True)
    out = sparse_weights(z, learned)
    case.close(name, out, case.golden(f"output.{name}"))
    (out * case.input("entmax_cotangent")).sum().backward()
    case.close(f"grad.{name}.z", z.grad, case.golden(f"grad.{name}.z"))
    case.close(f"{name}_alpha_grad", learned.grad, case.scalars[f"{name}_alpha_grad"])


def check_kd(case: Case, temperature: float) -> None:
    """The loss and the student's gradient."""
    student = case.input("kd_student").requires_grad_()
    loss = kd_loss(student, case.input("kd_teacher"), temperature)
    case.close(f"kd_T{temperature}", loss, case.scalars[f"kd_T{temperature}"])
    loss.backward()
    case.close("grad.kd", student.grad, case.golden(f"grad.kd_T{temperature}.student"))


def check_hint(case: Case, name: str) -> None:
    """Both directions, and without LayerNorm; only the student has a gradient."""
    name = f"hint_{name}"
    cnn = case.input(f"{name}.cnn").permute(0, 2, 3, 1).requires_grad_()  # (batch, rows, cols, width)
    tokens = case.input(f"{name}.vit")[1:].transpose(0, 1).unsqueeze(1).requires_grad_()  # raster order is all it needs
    pairs = {"vit": (tokens, cnn), "cnn": (cnn, tokens)}
    for net, (student, teacher) in pairs.items():
        loss = block_hint(student, teacher.detach(), "raster")
        case.close(f"{name}_{net}_student", loss, case.scalars[f"{name}_{net}_student"])
        loss.backward()
    plain = block_hint(tokens, cnn, "raster", norm=False)
    case.close(f"{name}_no_norm", plain, case.scalars[f"{name}_no_norm"])
    case.close(f"grad.{name}.cnn", cnn.grad.permute(0, 3, 1, 2), case.golden(f"grad.{name}.cnn"))
    expected = case.golden(f"grad.{name}.vit")  # zero for the class token
    case.close(f"grad.{name}.vit", tokens.grad.squeeze(1).transpose(0, 1), expected[1:])
    case.close(f"grad.{name}.vit[0]", torch.zeros_like(expected[:1]), expected[:1])


def check_stem(case: Case, middle: int) -> None:
    """The ResNet-like stem in eval mode."""
    stem = resnet_stem(case.tensors["input.stem.conv2.bias"].shape[0], middle).to(case.device).double().eval()
    places = {"conv1": "0", "norm": "1", "conv2": "4"}
    names = [key.removeprefix("input.stem.") for key in case.tensors if key.startswith("input.stem.")]
    stem.load_state_dict({f"{places[n.split('.')[0]]}.{n.split('.')[1]}": case.input(f"stem.{n}") for n in names})
    case.close("stem", stem(case.input("image")), case.golden("output.stem"))


def check_support(case: Case, heads: int, outcome: str) -> None:
    """A head count that the reference can run, with its window, or one that it cannot."""
    works = outcome.startswith("ok")
    case.equal(f"{heads} heads refused", refused(lambda: head_taps(heads, "row_major"), UserError), not works)
    if works:
        side = int(outcome.rsplit(maxsplit=1)[-1])
        reach = side // 2
        places = [(h // side - reach, h % side - reach) for h in range(heads)]
        case.equal(f"{heads} heads", list(head_taps(heads, "row_major")), places)


def refused(call: Any, kind: type[Exception]) -> bool:
    """Whether a call raises this error."""
    try:
        call()
    except kind:
        return True
    return False


# ------------------------------------------------------------------------------------------------- fractions


def run_fraction(case: Case) -> None:
    """Which images are kept: the rule itself, then image folders with every class and with some."""
    sizes = case.config["class_sizes"]
    for label, size in enumerate(sizes):
        for fraction in case.config["fractions"]:
            key = f"class{label}_n{size}_f{fraction}"
            picks = reference_picks(size, label, fraction)
            case.equal(key, picks.tolist(), case.scalars["picks"][key])
            case.close(key, torch.from_numpy(picks.copy()), case.golden(f"output.{key}"))
    fraction = case.scalars["folder_fraction"]
    everything = {f"class_{label:02}": size for label, size in enumerate(sizes)}
    case.equal("folder_full_count", len(kept_images(everything, 1.0)), case.scalars["folder_full_count"])
    expected = sorted((key, label) for key, label in case.scalars["folder_instances"])
    case.equal("folder_instances", kept_images(everything, fraction), expected)
    order = case.scalars["manual_classes"]  # labels follow the list, seeds the sorted names among the listed
    listed = kept_images({name: everything[name] for name in order}, fraction)
    relabelled = sorted((key, order.index(key.split("/")[0])) for key, _ in listed)
    case.equal("manual_instances", relabelled, sorted((k, n) for k, n in case.scalars["manual_instances"]))


def kept_images(classes: dict[str, int], fraction: float) -> list[tuple[str, int]]:
    """(key, label) of the training images that an image folder with these class sizes yields.

    Where a class would be left without an image, the reference goes on without it and we refuse: then the rule alone.
    """
    kept = {name: round(size * fraction) for name, size in classes.items()}
    if not all(kept.values()):
        picked = [
            (f"{name}/img_{place:04}.JPEG", label)
            for label, (name, size) in enumerate(sorted(classes.items()))
            for place in reference_picks(size, label, fraction)
        ]
        return sorted(picked)
    pixel = io.BytesIO()
    Image.new("RGB", (8, 8)).save(pixel, "JPEG")
    with tempfile.TemporaryDirectory() as folder:
        for name, size in classes.items():
            for split in ("train", "val"):
                (Path(folder) / split / name).mkdir(parents=True)
                for i in range(size if split == "train" else 1):
                    (Path(folder) / split / name / f"img_{i:04}.JPEG").write_bytes(pixel.getvalue())
        data = DataConfig(source="imagefolder", root=folder, fraction=fraction, fraction_rule="reference")
        train = open_splits(data).train
        return sorted(zip(train.keys, train.labels.tolist(), strict=True))


# ------------------------------------------------------------------------------------- schedules and metrics


def run_misc(case: Case) -> None:
    """Learning rates, decay, accuracy, normalisation, evaluation preprocessing."""
    for row in case.scalars["lr"]:
        check_rates(case, row)
    for row in case.scalars["decay"]:
        check_decay(case, row)
    check_accuracy(case)
    for name, constants in case.scalars["normalisation"].items():
        mean, std = constants_of(name)
        case.close(f"{name} mean", torch.tensor(mean), torch.tensor(constants[0]))
        case.close(f"{name} std", torch.tensor(std), torch.tensor(constants[1]))
    for name, row in case.config["preproc"].items():
        check_preprocessing(case, name, row)


def check_rates(case: Case, row: dict[str, Any]) -> None:
    """The rate at every epoch and after the last."""
    given = row["lr_schedule"]
    sections = read_schedule(None if given is None else Node(given, "lr_schedule"))
    schedule = ScheduleConfig(per="epoch", epochs=len(row["lr_by_epoch"]) - 1, **sections)
    for epoch, value in enumerate(row["lr_by_epoch"]):
        case.close(f"lr {given} {epoch}", learning_rate(schedule, row["base_lr"], epoch), value)


def check_decay(case: Case, row: dict[str, Any]) -> None:
    """The factor of every weight's terms, through the settings of the mutual losses that have them."""
    strategy = {"use_decay": row["use_decay"], "decay_items": row["decay_items"]}
    for item, values in row["by_epoch"].items():
        for epoch, value in zip(row["epochs"], values, strict=True):
            check_decay_setting(case, strategy, item, epoch, row["train_epochs"], value)


def check_accuracy(case: Case) -> None:
    """Over all images, and as the mean of the batches' (quirk 20); the reference computes in float32."""
    logits, labels = case.input("logits"), case.input("label")
    whole = counts_of(logits, labels)
    case.close("top-1", whole.top1 / 100, case.scalars["accuracy"]["top1"], EIGHT_BITS)
    case.close("top-5", whole.top5 / 100, case.scalars["accuracy"]["top5"], EIGHT_BITS)
    expected = case.scalars["accuracy_mean_of_batches"]
    sizes = expected["batches"]
    parts = [counts_of(a, b) for a, b in zip(logits.split(sizes), labels.split(sizes), strict=True)]
    case.close("top-1 by batch", sum(p.top1 for p in parts) / len(parts) / 100, expected["top1"], EIGHT_BITS)
    case.close("top-5 by batch", sum(p.top5 for p in parts) / len(parts) / 100, expected["top5"], EIGHT_BITS)


def counts_of(logits: torch.Tensor, labels: torch.Tensor) -> Counts:
    """The evaluation's counts of one batch."""
    correct, correct5, total, loss = count(logits, labels).tolist()
    return Counts(int(correct), int(correct5), int(total), loss)


def constants_of(name: str) -> tuple[RGB, RGB]:
    """(mean, std) of a data set of the reference."""
    source = SOURCES[name]
    return IMAGENET if source == "imagenet" else (MEAN[source], STD)


def check_preprocessing(case: Case, name: str, row: dict[str, Any]) -> None:
    """One image as evaluation sees it."""
    image = Image.fromarray(case.tensors[f"input.{name}_image"].numpy())
    mean, std = constants_of(row["dataset"])
    kind = "centre_crop" if SOURCES[row["dataset"]] == "imagenet" else "resize"
    pixels = preprocess([image], Preparation(kind, pair(row["resize"]), mean, std))[0]
    case.close(name, pixels, case.golden(f"output.{name}"), EIGHT_BITS)


# ------------------------------------------------------------------------------------------------- refusals


def run_failure(case: Case) -> None:
    """Settings that must be refused with one clear line, at the latest by the first forward."""
    try:
        config = config_of(case, image_size_of(case))
        learner = Learner(config, case.config["num_classes"], World(0, 1, case.device))
        learner.networks.features(torch.zeros(2, 3, *config.image_size, dtype=torch.float64, device=case.device))
    except UserError as err:
        case.equal("lines of the message", len(str(err).splitlines()), 1)
        return
    raise ParityError(f"{case.name}: settings that the reference fails at were accepted")


def image_size_of(case: Case) -> list[int]:
    """Images for a CNN whose settings do not say their size: eight patches, or 64 pixels, a side."""
    stem = settings(case).get("model", {}).get("input_proj", {})
    patch = stem.get("patch_size", 8)
    return [8 * side for side in (patch if isinstance(patch, list) else [patch, patch])]
