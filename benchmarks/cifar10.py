"""The paper's CIFAR-10 rows on one GPU, a command each, in the reference's setting or a recipe of today.

    python -m benchmarks.cifar10 joint-small --recipe strong --root data/cifar10

Goals: joint ViT-S 95.14 (the paper's), 97.2 under the strong recipe. Started again it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import yaml

from bootvit.__main__ import main as bootvit
from bootvit.files import read_json

ROWS = ("vit-small", "agent-small", "joint-small", "shared-small")
RECIPES = {"reference": "presets/reference", "strong": "presets/strong-224"}


def main(argv: list[str] | None = None) -> int:
    """The status of `bootvit train`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--recipe", choices=RECIPES, default="reference")
    parser.add_argument("--root", type=Path, required=True, help="the folder with CIFAR-10, as data.root")
    parser.add_argument("--runs", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("set", nargs="*", metavar="KEY=VALUE", help="such as schedule.epochs=100 or seed=1")
    args = parser.parse_intermixed_args(argv)
    args.runs.mkdir(parents=True, exist_ok=True)
    name = f"{args.row}-{args.recipe}"
    file = args.runs / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"extends": [f"cifar10/{args.row}", RECIPES[args.recipe]], "name": name}))
    places = [f"data.root={args.root.resolve()}", f"ray.storage_path={args.runs.resolve()}", "tracking.enabled=false"]
    status = bootvit(["train", str(file), "--local", "--resume", *places, *args.set])
    if status == 0:
        result = read_json(args.runs / name / "result.json")
        keys = ("name", "epochs", "steps", "final", "images_per_second", "seconds", "git")
        print(json.dumps({key: result[key] for key in keys}))
    return status


if __name__ == "__main__":
    sys.exit(main())
