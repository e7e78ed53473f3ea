"""How long it takes from `pip install` to a first own model: README's lines on images, in a fresh environment.

    python -m benchmarks.first_model --repeats 3

Each repetition makes a virtual environment, installs this checkout and what it needs (`constraints.txt`; from pip's
cache, which a repetition before the first one fills), draws 120 images of three kinds, and runs `data suggest`, `train`
and `predict` as README has them, with fewer epochs. The median of each part goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 20  # of the 240 that `data suggest` writes, so that it measures what a newcomer waits for
DRAW = """
import numpy as np
from pathlib import Path
from PIL import Image, ImageDraw

random = np.random.default_rng(0)
for kind in ("circle", "square", "triangle"):
    Path("shapes", kind).mkdir(parents=True)
    for number in range(40):
        rows, cols = random.integers(40, 77, 2)
        image = Image.new("RGB", (int(cols), int(rows)), tuple(random.integers(0, 100, 3).tolist()))
        draw, colour = ImageDraw.Draw(image), tuple(random.integers(150, 256, 3).tolist())
        box = (8, 8, int(cols) - 8, int(rows) - 8)
        if kind == "circle":
            draw.ellipse(box, fill=colour)
        elif kind == "square":
            draw.rectangle(box, fill=colour)
        else:
            draw.polygon([(cols // 2, 8), (8, rows - 8), (cols - 8, rows - 8)], fill=colour)
        image.save(f"shapes/{kind}/{number}.png")
"""


def repetition(extra: str, pip: list[str]) -> dict[str, float]:
    """Seconds of every part, in a folder that is removed."""
    with tempfile.TemporaryDirectory() as place:
        here, seconds = Path(place), {}
        binary = here / "venv" / "bin"
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        env |= {"PATH": f"{binary}:{env['PATH']}", "BOOTVIT_CACHE": str(here / "cache")}

        def timed(part: str, *command: str, out: str | None = None) -> None:
            began = time.monotonic()
            done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{' '.join(command)}: status {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
            if out:
                (here / out).write_text(done.stdout)
            seconds[part] = round(time.monotonic() - began, 2)

        timed("venv", sys.executable, "-m", "venv", "venv")
        left_out = shutil.ignore_patterns(".git", ".venv", "runs", "mlruns", "__pycache__", "build")
        source = shutil.copytree(ROOT, here / "source", ignore=left_out)
        constraints = str(ROOT / "constraints.txt")
        timed("pip install", "python", "-m", "pip", "install", "-q", "-c", constraints, *pip, f"{source}{extra}")
        timed("draw", "python", "-c", DRAW)
        timed("data suggest", "bootvit", "data", "suggest", "shapes", out="shapes.yaml")
        quick = [f"schedule.epochs={EPOCHS}", "schedule.warmup_epochs=1"]
        timed("train", "bootvit", "train", "shapes.yaml", "--local", *quick)
        timed("predict", "bootvit", "predict", "shapes", "shapes/circle")
        seconds.pop("draw")
        return seconds | {"total": round(sum(seconds.values()), 2)}


def main() -> None:
    """Repeat, print, and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--extra", default="", help="such as [all]")
    parser.add_argument("--pip", action="append", default=[], help="an option of pip's, such as --no-index")
    arguments = parser.parse_args()
    repetition(arguments.extra, arguments.pip)  # fills pip's cache and the system's
    runs = [repetition(arguments.extra, arguments.pip) for _ in range(arguments.repeats)]
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    medians = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
    document: dict[str, Any] = {
        "what": f"seconds from an empty folder to a first own model (bootvit{arguments.extra}, {EPOCHS} epochs)",
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "load at the end": os.getloadavg(),
        "medians": medians,
        "runs": runs,
    }
    print(json.dumps(document, indent=2))
    name = f"first-model_{os.cpu_count()}-core-CPU_{document['date']}.json"
    (ROOT / "benchmarks" / "results" / name).write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
