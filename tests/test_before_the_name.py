"""What cannot work is refused in one line before the run's name is taken: places, names, and batches of one image."""

import os
from pathlib import Path

import pytest
import torch
from helpers import ONE, TINY, tiny, write

from bootvit.__main__ import main
from bootvit.config import Config, dump_config, override
from bootvit.data.batches import Batch
from bootvit.errors import RunFailed, UserError
from bootvit.learner import Learner
from bootvit.load import load_config, make_config
from bootvit.models.checks import check_batches
from bootvit.runs import check_storage
from tune.run.data import check_data
from tune.run.folder import check_folder
from tune.spec.load import load_sweep


def at(storage: Path, name: str = "run") -> Config:
    return override(Config(), {"name": name, "ray": {"storage_path": str(storage)}})


def refused(config: Config, kind: type[Exception] = UserError) -> str:
    with pytest.raises(kind) as caught:
        check_storage(config)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ places


def test_a_place_may_be_new(tmp_path: Path) -> None:
    check_storage(at(tmp_path / "a" / "b"))
    (tmp_path / "a" / "b" / "run").mkdir(parents=True)
    check_storage(at(tmp_path / "a" / "b"))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    check_storage(at(tmp_path / "link" / "b"))


def test_a_place_that_is_a_file_or_below_one(tmp_path: Path) -> None:
    file = write(tmp_path / "results", "")
    for storage in (file, file / "a" / "b"):
        assert f"ray.storage_path={storage}: {file} is not a folder" in refused(at(storage))
    write(tmp_path / "run", "")
    assert f"{tmp_path / 'run'}: exists and is not a run" in refused(at(tmp_path))


def test_a_place_behind_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    for storage in (link, link / "a"):
        assert f"{link} is a link that leads nowhere" in refused(at(storage))


def test_a_place_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(path: Path, mode: int) -> bool:  # root may write everywhere, so the system's answer is replaced
        asked.append(path)
        return False

    monkeypatch.setattr(os, "access", refuse)
    assert f"{tmp_path} may not be written" in refused(at(tmp_path / "a"), RunFailed)
    assert asked == [tmp_path]


def test_names_and_paths_that_no_file_can_have(tmp_path: Path) -> None:
    check_storage(at(tmp_path, "n" * 200))
    assert "too long" in refused(at(tmp_path / ("n" * 300)))
    assert "too long" in refused(at(tmp_path.joinpath(*["n" * 200] * 19)))


def test_a_name_that_the_file_system_of_the_place_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"PC_NAME_MAX": 143, "PC_PATH_MAX": 4096}  # of an encrypted home folder
    monkeypatch.setattr(os, "pathconf", lambda path, what: limits[what])
    check_storage(at(tmp_path, "n" * 130))
    assert "at most 130 characters" in refused(at(tmp_path, "n" * 131))


def test_training_refuses_the_place_before_it_starts_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "results", "kept")
    write(tmp_path / "tiny.yaml", dump_config(make_config(TINY, "tiny")))
    monkeypatch.setattr("bootvit.driver.start_ray", lambda config: pytest.fail("Ray was started"))
    assert main(["train", "tiny.yaml", f"ray.storage_path={file}"]) == 2
    assert capsys.readouterr().err == (
        f"bootvit: error: ray.storage_path={file}: {file} is not a folder; give a folder, which may be new\n"
    )
    assert file.read_text() == "kept"


def sweep(folder: Path, *overrides: str) -> str:
    text = "name: s\nbase: digits/joint\nspace: {objective.vit.kd: {grid: [1, 2]}}\n"
    return str(write(folder / "sweep.yaml", text))


def test_a_sweep_refuses_the_place(tmp_path: Path) -> None:
    file = write(tmp_path / "results", "")
    with pytest.raises(UserError, match="is not a folder"):
        check_folder(load_sweep(sweep(tmp_path), [f"ray.storage_path={file}"]), resume=False, overwrite=False)
    loaded = load_sweep(sweep(tmp_path), [f"ray.storage_path={tmp_path}"])
    write(loaded.folder, "")
    with pytest.raises(UserError, match="exists and is not a run"):
        check_folder(loaded, resume=False, overwrite=False)


# ------------------------------------------------------------------------------------------- names of timm


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            "model.vit.name=vit_tiny_patch16_224.none",
            "timm knows no weights 'none' of vit_tiny_patch16_224; known: a",
        ),
        ("model.vit.name=bootvit_small_patch16_224.x", "timm knows no weights 'x' of bootvit_small_patch16_224"),
        ("model.agent.name=resnet18.none", "timm knows no weights 'none' of resnet18; known: a1_in1k"),
    ],
)
def test_a_tag_that_timm_does_not_know(given: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config("digits/joint", [given])
    assert given.replace("=", "='") in str(caught.value)
    assert expected in str(caught.value)


def test_a_tag_that_timm_knows() -> None:
    load_config("cifar10/resnet50", ["model.agent.name=resnet18.a1_in1k"])


# ---------------------------------------------------------------------------------------- batches of one image


def one(**changes: object) -> Config:
    """A batch of one image on a map of one position, but for what is changed."""
    small = {"model__vit__patch": 8, "data__batch_size": 1, "method": "agent"}
    return tiny(**{**small, **changes})


MAPS = [
    ({}, True),
    ({"method": "joint"}, True),
    ({"method": "shared"}, True),
    ({"model__agent__name": "agent_base"}, True),
    ({"model__agent__norm": "post"}, True),
    ({"model__vit__patch": 4}, False),
    ({"model__vit__patch": 4, "model__agent__downsample": [0]}, True),
    ({"model__vit__patch": 4, "model__agent__downsample": [1]}, True),
    ({"model__vit__patch": 2, "model__agent__downsample": [1]}, False),
    ({"model__agent__patch": 4}, False),
    ({"model__agent__stem": "resnet"}, True),
    ({"model__agent__stem": "resnet", "data__image_size": 16}, False),
    ({"model__agent__name": "resnet18", "objective__vit__hint": 0}, True),
    ({"model__agent__name": "resnet18", "objective__vit__hint": 0, "data__image_size": 40}, False),
]


@pytest.mark.parametrize(("changes", "fails"), MAPS, ids=str)
def test_one_image_is_refused_exactly_where_a_step_fails(changes: dict[str, object], fails: bool) -> None:
    config = one(**changes)
    side = config.image_size[0]
    batch = Batch(torch.rand(1, 3, side, side), torch.zeros(1, dtype=torch.int64), 1)
    learner = Learner(config, 10, ONE)
    if fails:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            learner.step(batch, 0, 0, 0.0)
        with pytest.raises(UserError, match=r"data.batch_size=1 leaves a worker one image.*data.batch_size=2"):
            check_batches(config, 100)
    else:
        learner.step(batch, 0, 0, 0.0)
        check_batches(config, 100)


@pytest.mark.parametrize(
    ("changes", "images", "refused"),
    [
        ({"data__batch_size": 2}, 100, False),
        ({"data__batch_size": 3, "ray__num_workers": 2}, 100, True),
        ({"data__batch_size": 4, "ray__num_workers": 2}, 100, False),
        ({"data__batch_size": 3, "ray__num_workers": 2, "model__agent__sync_norm": True}, 100, False),
        ({"model__agent__sync_norm": True}, 100, True),
        ({"data__batch_size": 64}, 1, True),
        ({"data__batch_size": 64}, 2, False),
        ({"data__batch_size": 64, "ray__num_workers": 2}, 3, True),
        ({"data__batch_size": 1, "method": "vit"}, 100, False),
    ],
    ids=str,
)
def test_what_a_worker_gets_of_a_batch(changes: dict[str, object], images: int, refused: bool) -> None:
    config = one(**changes)
    if not refused:
        check_batches(config, images)
        return
    with pytest.raises(UserError, match="leaves a worker one image") as caught:
        check_batches(config, images)
    cure = f"such as data.batch_size={2 * config.ray.num_workers}"
    assert (cure in str(caught.value)) == (images >= 2 * config.ray.num_workers)


def test_asking_a_cnn_draws_nothing() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    check_batches(one(model__agent__name="resnet18", objective__vit__hint=0, data__image_size=40), 100)
    assert torch.equal(torch.rand(4), wanted)


def test_training_refuses_one_image_before_the_name_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "tiny.yaml", dump_config(make_config(TINY, "tiny")))
    assert main(["train", "tiny.yaml", "--local", "data.batch_size=1", "model.vit.patch=8"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "data.batch_size=1 leaves a worker one image" in lines[0]
    assert not (tmp_path / "runs").exists()


def test_a_sweep_refuses_one_image(tmp_path: Path) -> None:
    loaded = load_sweep(sweep(tmp_path))
    fine, bad = (override(loaded.base, {"data": {"batch_size": n}, "model": {"vit": {"patch": 8}}}) for n in (2, 1))
    check_data(loaded, [fine])
    with pytest.raises(UserError, match="leaves a worker one image"):
        check_data(loaded, [fine, bad])
