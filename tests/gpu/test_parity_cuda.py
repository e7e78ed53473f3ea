"""The parity cases on a GPU: in float64 to a wider tolerance, and in bfloat16 as far as its eight bits go."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

PARITY = Path(__file__).resolve().parent.parent / "parity"
sys.path.insert(0, str(PARITY))

from parity_kit import Case, build, names_of, read_case  # noqa: E402
from test_parity import run_case  # noqa: E402

FOLDER = Path(os.environ.get("BOOTVIT_PARITY_DIR") or PARITY / "cases")
FLOAT64 = 1e-8  # sums in another order than on the CPU
BFLOAT16 = 0.03  # of the largest logit: 8 bits of mantissa through two or three blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 means float32: the coarse check of the kit is finer than TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def cases(*kinds: str) -> list[str]:
    """The cases of some kinds."""
    return [name for name in names_of(FOLDER) if read_case(FOLDER, name).facts.get("case") in kinds]


def on_gpu(name: str) -> Case:
    """A case whose networks and inputs are on the GPU."""
    case = read_case(FOLDER, name)
    case.device = torch.device("cuda")
    case.tolerance = FLOAT64
    return case


@pytest.mark.parametrize("name", cases("single", "mutual", "trajectory", "units"))
def test_float64(name: str, record_property: Callable[[str, object], None]) -> None:
    case = on_gpu(name)
    run_case(case)
    record_property("parity", f"{name} on CUDA: {case.worst:.1e} ({case.where})")


@pytest.mark.parametrize("name", cases("single", "mutual"))
def test_bfloat16(name: str, record_property: Callable[[str, object], None]) -> None:
    case = on_gpu(name)
    error = bfloat16_error(case)
    record_property("parity", f"{name} on CUDA in bfloat16: {error:.1e} of the largest logit")
    assert error < BFLOAT16


def bfloat16_error(case: Case) -> float:
    """The largest error of the eval logits under autocast, as a share of the largest logit."""
    case.precision = "bf16"
    learner, _ = build(case)
    learner.networks.eval()
    with torch.no_grad(), torch.autocast(case.device.type, torch.bfloat16):
        features = learner.networks.features(case.input("x").float())
    worst = 0.0
    for net, own in features.items():
        key = "output.eval" if len(features) == 1 else f"output.eval.{'vit' if net == 'vit' else 'cnn'}"
        expected = case.golden(key)
        worst = max(worst, float((own.logits.double().cpu() - expected).abs().max() / expected.abs().max()))
    return worst
