"""A user's own data set, model and callback, named by a config: here, under Ray, and in what is handed over."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import TINY, write
from PIL import Image

import bootvit
from bootvit.__main__ import main
from bootvit.config import merge
from bootvit.data import open_table
from bootvit.errors import RunFailed, UserError
from bootvit.extensions import import_all
from bootvit.load import load_config
from cluster.command import check_command
from cluster.staging import stage

MINE = '''
from pathlib import Path

import numpy as np
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

SEEN = []


class Shades:
    """Two shades of noise, as arrays."""

    classes = ("dark", "light")

    def __init__(self, split):
        self.count = 20 if split == "train" else 10

    def __len__(self):
        return self.count

    def __getitem__(self, place):
        low = 120 * (place % 2)
        return np.random.default_rng(place).integers(low, low + 100, (8, 8, 3), dtype=np.uint8), place % 2


@register_model
def my_tiny_vit(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
    return VisionTransformer(**{"patch_size": 2, "embed_dim": 18, "depth": 1, "num_heads": 9, "mlp_ratio": 2} | kwargs)


def told(config, report):
    with (Path(config.ray.storage_path) / "told.txt").open("a") as file:
        file.write(f"{config.name} {report.epoch}\\n")


def fails(config, report):
    raise RuntimeError("no disk")
'''
OWN = {
    "name": "own",
    "imports": ["mine"],
    "on_epoch": ["mine:told"],
    "method": "vit",
    "model": {
        "vit": {"name": "my_tiny_vit", "width": None, "depth": None, "heads": None, "mlp_width": None, "patch": None}
    },
    "data": {"source": "dataset", "dataset": "mine:Shades", "fraction": 1.0, "batch_size": 10},
    "schedule": {"epochs": 2},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a config in a folder of its own, and the module beside it."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "study" / "mine.py", MINE)
    write(tmp_path / "study" / "own.yaml", yaml.safe_dump(merge(TINY, OWN)))
    yield tmp_path
    sys.modules.pop("mine", None)


def test_a_config_trains_on_them_and_what_is_handed_over_has_them(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = bootvit.train("study/own.yaml", local=True)
    assert run.config.imports == (str(here / "study" / "mine.py"),)
    assert (here / "runs" / "told.txt").read_text() == "own 1\nown 2\n"
    assert run.data.classes == ("dark", "light")
    assert run.result["final"]["vit"]["top1"] == 100.0
    assert len(run.networks["vit"].blocks) == 1
    pixels = np.full((8, 8, 3), 200, np.uint8)
    Image.fromarray(pixels).save(here / "light.png")

    capsys.readouterr()
    assert main(["export", "own", "--format", "torch", "--out", str(here / "out")]) == 0
    code = "import sys; sys.modules['bootvit'] = None; sys.argv = ['x', 'light.png']\n" + (
        "import runpy; sys.path.insert(0, 'out'); runpy.run_module('bootvit_networks', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=False)
    said = json.loads(done.stdout)
    assert said["image"] == "light.png"
    assert said["classes"] == pytest.approx(run.predict(pixels)[0]["vit"], abs=2e-6)


def test_a_data_set_in_memory_is_kept_beside_the_run(here: Path) -> None:
    class Shades(list):  # type: ignore[type-arg]
        classes = ("dark", "light")

    def shades(count: int) -> Shades:
        random = np.random.default_rng(count)
        return Shades(
            (random.integers(120 * (n % 2), 120 * (n % 2) + 100, (8, 8, 3), np.uint8), n % 2) for n in range(count)
        )

    changes = {"schedule.epochs": 2, "data.fraction": 1.0, "tracking.enabled": False}
    run = bootvit.train("digits/vit", changes, data=(shades(40), shades(10)), local=True)
    assert run.data.classes == ("dark", "light")
    assert run.config.data.root == str(here / "runs" / "digits-vit-data")
    assert bootvit.load_run("digits-vit").evaluate()["vit"]["total"] == 10
    with pytest.raises(UserError, match="item 0: "):
        bootvit.train("digits/vit", {"name": "other"}, data=[1, 2], local=True)
    assert not (here / "runs" / "other-data").exists()


def test_a_job_takes_the_module_along(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = ["ray.storage_path=/shared", "tracking.enabled=false"]
    command = check_command(["train", "study/own.yaml", *places])
    words = stage(command, here / "job")
    assert (here / "job" / "mine.py").read_text() == MINE
    sys.modules.pop("mine")
    (here / "study" / "mine.py").unlink()
    monkeypatch.syspath_prepend(str(here / "job"))  # as on a worker: the job's folder is on PYTHONPATH
    monkeypatch.chdir(here / "job")
    copied = str(here / "job" / "mine.py")
    assert load_config(words[1], places).imports == (copied,)
    sys.modules.pop("mine")
    import_all(["/another/node/mine.py"])  # where the job's folder has another path: by its name
    assert sys.modules["mine"].__file__ == copied


@pytest.mark.slow
def test_they_are_there_on_workers_of_ray(here: Path) -> None:
    assert main(["train", "study/own.yaml", "ray.num_workers=2"]) == 0
    assert (here / "runs" / "told.txt").read_text() == "own 1\nown 2\n"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("imports=[yours]", "imports: yours: no such module"),
        ("on_epoch=[told]", "expected MODULE:NAME"),
        ("on_epoch=['mine:nothing']", "has no such name"),
        ("on_epoch=['other:told']", "`imports` does not list 'other'"),
        ("model.vit.name=my_tiny_vitt", "is not a model of timm"),
    ],
)
def test_a_mistake_is_one_line(here: Path, override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_config("study/own.yaml", [override])


def test_a_broken_module_and_a_callback_that_fails(here: Path) -> None:
    write(here / "broken.py", "import numpy\n1 / 0\n")
    with pytest.raises(UserError, match=r"imports: .*broken\.py: ZeroDivisionError: division by zero"):
        load_config("study/own.yaml", ["imports=[broken]"])
    with pytest.raises(RunFailed, match="on_epoch=mine:fails: RuntimeError: no disk"):
        bootvit.train("study/own.yaml", {"on_epoch": ["mine:fails"]}, local=True)


def test_images_of_every_form(tmp_path: Path) -> None:
    grey = np.arange(60, dtype=np.uint8).reshape(6, 10)
    rgb = np.repeat(grey[:, :, None], 3, axis=2)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    forms = [grey, rgb, Image.fromarray(grey), tmp_path / "a.png", (tmp_path / "a.png").read_bytes()]
    write(tmp_path / "forms.py", "GIVEN = []\ndef make(split):\n    return GIVEN if split == 'train' else None\n")
    config = write(tmp_path / "c.yaml", yaml.safe_dump(merge(TINY, {"imports": ["forms"]})))
    data = load_config(str(config), ["data.source=dataset", "data.dataset=forms:make"]).data
    given = sys.modules["forms"].GIVEN
    try:
        given += [(image, place % 2) for place, image in enumerate(forms)]
        table = open_table(data, "train")
        assert table is not None
        assert all(np.array_equal(np.asarray(table.images.open(row)), rgb) for row in range(len(forms)))  # type: ignore[union-attr]
        assert table.classes == ("0", "1")
        assert open_table(data, "test") is None
        given.append((grey.astype(float), 0))
        with pytest.raises(UserError, match=r"item 5: an image of shape \(6, 10\) and float64; expected"):
            open_table(data, "train")
        given[:] = [(grey, "cat")]
        with pytest.raises(UserError, match=r"data\.dataset=forms:make: train: item 0"):
            open_table(data, "train")
    finally:
        sys.modules.pop("forms")
