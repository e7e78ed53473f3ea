"""What a job is given: sources and the configs it names; never data, runs or secrets."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from bootvit.errors import UserError
from cluster.command import Command
from cluster.staging import PACKAGES, ROOT, stage

NEEDED = """
pyproject.toml bootvit/cli.py bootvit/models/tokens.py bootvit/paper.json tune/space.py cluster/submit.py
configs/digits/joint.yaml
"""
UNWANTED = """
.env .git/config .venv/lib.py .hidden.yaml README.md auth_token mlflow.db runs/a/checkpoints/1.pt data/x.bin
bootvit/.env bootvit/.ipynb_checkpoints/cli.py configs/.local.yaml
bootvit/data/batch.bin bootvit/__pycache__/cli.pyc bootvit/key.pem configs/.secret.yaml
configs/my-token.json configs/credentials.yaml configs/aws_secret.json tune/mlruns/x.db
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A working folder with everything that people leave in one."""
    root = tmp_path / "work"
    for name in (NEEDED + UNWANTED).split():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"content of {name}")
    return root


def command(*files: Path, words: tuple[str, ...] = ("train", "CONFIG")) -> Command:
    return Command(words, 1, files[0], frozenset(files), "run", None)


def staged(target: Path) -> set[str]:
    return {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}


def test_only_what_the_job_needs_is_copied(root: Path, tmp_path: Path) -> None:
    (root / "configs" / "linked.yaml").symlink_to(root / "auth_token")
    (root / "configs" / "outside.yaml").symlink_to(Path("/etc/hostname"))
    words = stage(command(root / "configs/digits/joint.yaml"), tmp_path / "out", root)
    assert staged(tmp_path / "out") == set(NEEDED.split())
    assert words == ("train", "configs/digits/joint.yaml")
    assert (tmp_path / "out/bootvit/cli.py").read_text() == "content of bootvit/cli.py"


def test_a_config_from_elsewhere_comes_with_all_that_it_extends(root: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "token-count.yaml"  # named by the command, so it comes whatever it is called
    mine.parent.mkdir()
    mine.write_text("extends: ../work/configs/digits/joint.yaml")
    (mine.parent / "data.bin").write_text("not named")
    words = stage(command(mine, root / "configs/digits/joint.yaml"), tmp_path / "out", root)
    assert words == ("train", "submitted/mine/token-count.yaml")
    extra = {"submitted/mine/token-count.yaml", "submitted/work/configs/digits/joint.yaml"}
    assert staged(tmp_path / "out") == set(NEEDED.split()) | extra
    assert (tmp_path / "out/submitted/mine/../work/configs/digits/joint.yaml").is_file()


def test_only_the_config_among_the_words_changes(root: Path, tmp_path: Path) -> None:
    given = ("train", "digits/joint", "name=it's $HOME; rm -rf *", "--resume")
    words = stage(command(root / "configs/digits/joint.yaml", words=given), tmp_path / "out", root)
    assert words == ("train", "configs/digits/joint.yaml", *given[2:])
    assert shlex.split(shlex.join(words)) == list(words)


def test_too_much_is_refused_with_the_biggest_files(root: Path, tmp_path: Path) -> None:
    (root / "bootvit" / "big.json").write_bytes(b"x" * 3 * 2**20)
    with pytest.raises(UserError, match=r"3\.0 MiB, more than 2 MiB.*bootvit/big\.json \(3\.0 MiB\)"):
        stage(command(root / "configs/digits/joint.yaml"), tmp_path / "out", root, limit=2 * 2**20)
    assert not (tmp_path / "out").exists()


def test_this_checkout_is_small_and_whole(tmp_path: Path) -> None:
    config = tmp_path / "x.yaml"
    config.write_text("{}")
    stage(command(config), tmp_path / "out")
    sources = {p.relative_to(ROOT).as_posix() for name in PACKAGES for p in (ROOT / name).rglob("*.py")}
    assert sources <= staged(tmp_path / "out")
    assert sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file()) < 2 * 2**20
