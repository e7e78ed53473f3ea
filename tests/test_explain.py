"""`bootvit explain`: each measure against slow, obvious code in float64 and against known cases; then the command."""

from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, tiny
from PIL import Image
from torch import Tensor

import bootvit
from bootvit.__main__ import main
from bootvit.config import merge
from bootvit.driver import train
from bootvit.explain.attention import attention_maps, mean_distance, rollout, seen_by_head, tap_share
from bootvit.explain.measure import look_inside, vit_taps
from bootvit.explain.run import recorded
from bootvit.explain.similarity import cka_matrix, hint_distances, linear_cka
from bootvit.learner import Networks
from bootvit.load import make_config
from bootvit.models.vit import vit_features
from bootvit.report import collect_folders, write_report
from bootvit.runs import RunFolder

TAPS = ((-1, 0), (0, 0), (1, 1))
GRID, PREFIX = (3, 4), 1


def attention(blocks: int = 1, images: int = 2, heads: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = GRID[0] * GRID[1] + PREFIX
    shape = (images, heads, tokens, tokens)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).softmax(-1) for _ in range(blocks)]


# ------------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__vit__attention": "entmax"},
        {"model__vit__name": "bootvit_small_distilled_patch16_224"},
        {"model__vit__dropout": 0.1},
    ],
    ids=str,
)
def test_maps_are_those_that_the_vit_computes_with(changes: dict[str, str]) -> None:
    """Put together again by hand, they give the ViT's own features."""
    vit = Networks(tiny(method="vit", **changes), 10).double().eval().vit
    assert vit is not None
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        maps = list(attention_maps(vit, images))
        x = vit._pos_embed(vit.patch_embed(images))
        for block, weights in zip(vit.blocks, maps, strict=True):
            values = block.attn.qkv(block.norm1(x))[..., 2 * vit.embed_dim :].unflatten(2, (9, -1))  # (B, N, H, K)
            mixed = torch.einsum("bhnm,bmhk->bnhk", weights, values).flatten(2)
            x = x + block.attn.proj(mixed)
            x = x + block.mlp(block.norm2(x))
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), atol=1e-6, rtol=0)
        own = x[:, vit.num_prefix_tokens :].unflatten(1, (4, 4))
        torch.testing.assert_close(own, vit_features(vit, images).blocks[-1], atol=1e-6, rtol=1e-6)


def test_rollout_is_the_product_of_half_identities_by_loops() -> None:
    maps = attention(blocks=3)
    size = maps[0].shape[-1]
    slow = torch.eye(size, dtype=torch.float64).repeat(2, 1, 1)
    for image, block in itertools.product(range(2), maps):
        before, after = slow[image].clone(), torch.zeros(size, size, dtype=torch.float64)
        for i, j in itertools.product(range(size), range(size)):
            for k in range(size):
                share = 0.5 * sum(float(block[image, head, i, k]) for head in range(3)) / 3 + 0.5 * (i == k)
                after[i, j] += share * before[k, j]
        slow[image] = after
    torch.testing.assert_close(rollout(maps), slow, atol=1e-12, rtol=0)


def test_rollout_of_known_maps() -> None:
    eye = torch.eye(5, dtype=torch.float64).expand(1, 2, 5, 5)
    torch.testing.assert_close(rollout([eye, eye]), eye[:, 0])
    even = torch.full((1, 2, 5, 5), 0.2, dtype=torch.float64)
    kept = 0.5**3  # what passes three blocks without ever being mixed
    expected = kept * eye[:, 0] + (1 - kept) * even[:, 0]
    torch.testing.assert_close(rollout([even] * 3), expected)


def test_what_the_classifier_sees_sums_to_one() -> None:
    rolled = rollout(attention(blocks=2))
    seen = seen_by_head(rolled, GRID, PREFIX, from_class_token=True)
    assert seen.shape == (2, *GRID)
    torch.testing.assert_close(seen.sum((1, 2)), torch.ones(2, dtype=torch.float64))
    row = rolled[1, 0, PREFIX:]
    torch.testing.assert_close(seen[1].flatten(), row / row.sum())
    mean = seen_by_head(rolled, GRID, PREFIX, from_class_token=False)
    rows = rolled[0, PREFIX:, PREFIX:].mean(0)
    torch.testing.assert_close(mean[0].flatten(), rows / rows.sum())


def test_distance_by_loops_and_for_known_maps() -> None:
    (maps,) = attention()
    patch = (2, 3)
    slow = [0.0] * 3
    places = [(row * patch[0], col * patch[1]) for row in range(GRID[0]) for col in range(GRID[1])]
    for image, head, query in itertools.product(range(2), range(3), range(len(places))):
        row = maps[image, head, PREFIX + query, PREFIX:].tolist()
        reach = sum(w * math.dist(places[query], place) for w, place in zip(row, places, strict=True)) / sum(row)
        slow[head] += reach / (2 * len(places))
    assert mean_distance(maps, GRID, patch, PREFIX).tolist() == pytest.approx(slow, abs=1e-12)
    itself = torch.eye(13, dtype=torch.float64).expand(1, 3, 13, 13)
    assert mean_distance(itself, GRID, patch, PREFIX).tolist() == [0, 0, 0]
    only_class = torch.zeros(1, 1, 13, 13, dtype=torch.float64)
    only_class[..., 0] = 1
    only_class[0, 0, 1] = 0
    only_class[0, 0, 1, 2] = 1  # one patch that looks at its neighbour to the right: the only one that counts
    assert mean_distance(only_class, GRID, patch, PREFIX).tolist() == [3]


def test_tap_share_by_loops_and_one_for_the_agents_own_maps() -> None:
    (maps,) = attention()
    rows, cols = GRID
    exact = torch.zeros(1, 3, 13, 13, dtype=torch.float64)
    slow = []
    for head, (dy, dx) in enumerate(TAPS):
        found = []
        for image, row, col in itertools.product(range(2), range(rows), range(cols)):
            if 0 <= row + dy < rows and 0 <= col + dx < cols:
                query, key = PREFIX + row * cols + col, PREFIX + (row + dy) * cols + col + dx
                found.append(float(maps[image, head, query, key]))
                exact[0, head, query, key] = 1
        slow.append(sum(found) / len(found))
    assert tap_share(maps, TAPS, GRID, PREFIX).tolist() == pytest.approx(slow, abs=1e-12)
    assert tap_share(exact, TAPS, GRID, PREFIX).tolist() == [1, 1, 1]
    even = torch.full((1, 3, 13, 13), 1 / 13, dtype=torch.float64)
    assert tap_share(even, TAPS, GRID, PREFIX).tolist() == pytest.approx([1 / 13] * 3)
    assert math.isnan(tap_share(even, [(3, 0)], GRID, PREFIX).item())


# ----------------------------------------------------------------------------------------------- similarity


def slow_cka(x: np.ndarray, y: np.ndarray) -> float:
    """By Gram matrices and HSIC, as Kornblith et al. define it."""
    count = len(x)
    centre = np.eye(count) - np.full((count, count), 1 / count)

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.trace(a @ centre @ b @ centre)) / (count - 1) ** 2

    gram_x, gram_y = x @ x.T, y @ y.T
    return hsic(gram_x, gram_y) / math.sqrt(hsic(gram_x, gram_x) * hsic(gram_y, gram_y))


def test_cka_is_hsics_and_knows_what_is_alike() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(20, 5)), random.normal(size=(20, 7))
    assert linear_cka(torch.tensor(x), torch.tensor(y)) == pytest.approx(slow_cka(x, y), abs=1e-12)
    turned = 3 * x @ np.linalg.qr(random.normal(size=(5, 5)))[0] + 1.5
    assert linear_cka(torch.tensor(x), torch.tensor(turned)) == pytest.approx(1)
    one, other = np.zeros((4, 1)), np.zeros((4, 1))
    one[:, 0], other[:, 0] = (1, -1, 1, -1), (1, 1, -1, -1)
    assert linear_cka(torch.tensor(one), torch.tensor(other)) == pytest.approx(0)
    assert math.isnan(linear_cka(torch.tensor(x), torch.ones(20, 2)))


def test_blocks_are_compared_position_by_position_on_the_smaller_map() -> None:
    vit = [torch.randn(3, 4, 4, 6, dtype=torch.float64) for _ in range(2)]
    agent = [torch.randn(3, 4, 4, 6, dtype=torch.float64), torch.randn(3, 2, 2, 6, dtype=torch.float64)]
    found = cka_matrix(vit, agent)

    def rows(feature: Tensor) -> np.ndarray:
        side = feature.shape[1] // 2
        return np.stack(
            [
                feature[image, r * side : (r + 1) * side, c * side : (c + 1) * side].mean((0, 1)).numpy()
                for image, r, c in itertools.product(range(3), range(2), range(2))
            ]
        )

    slow = [[slow_cka(rows(v), rows(a)) for a in agent] for v in vit]
    np.testing.assert_allclose(found.numpy(), slow, atol=1e-12)
    hint = hint_distances(vit, [agent[0], vit[1]], tiny().objective)
    norm = [
        (f - f.mean(-1, keepdim=True)) / (f.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        for f in (vit[0], agent[0])
    ]
    assert hint.tolist() == pytest.approx([float(((norm[0] - norm[1]) ** 2).mean()), 0.0])


def test_batches_of_any_size_see_the_same() -> None:
    networks = Networks(tiny(), 10).double()
    images = torch.randn(7, 3, 8, 8, dtype=torch.float64)
    whole, parts = look_inside(networks, [images]), look_inside(networks, images.split(3))
    for name in ("rollout", "distance", "tap_share", "cka", "hint"):
        np.testing.assert_allclose(getattr(whole, name), getattr(parts, name), atol=1e-10, err_msg=name)


def test_heads_without_a_place_are_said() -> None:
    taps, why = vit_taps(tiny(model__agent__taps="row_major"))
    assert taps is not None
    assert len(taps) == 9
    assert not why
    odd = tiny(method="vit", model__vit__heads=3, model__agent__taps="row_major")
    taps, why = vit_taps(odd)
    assert taps is None
    assert "cannot place 3 heads" in why


# -------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of each method, and one that looks inside of itself as it is trained."""
    folder = tmp_path_factory.mktemp("explain")
    for method in ("joint", "shared", "vit", "agent"):
        watched = {"explain_images": 5 if method == "joint" else 0}
        changes = {"name": method, "method": method, "tracking": watched, "ray": {"storage_path": str(folder)}}
        train(make_config(merge(TINY, changes | {"schedule": {"epochs": 3}}), "test"), local=True)
    return folder


FIGURES = {"attention.png", "heads.png", "agent.png", "epochs.png"}
DATA = {"explain.json", "heads.csv", "blocks.csv"}


@pytest.mark.parametrize("method", ["joint", "shared", "vit"])
def test_a_run_is_explained_in_figures_and_data(
    folder: Path, method: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["explain", str(folder / method), "--count", "5"]) == 0
    out = capsys.readouterr().out
    files = {path.name for path in (folder / method / "explain").iterdir()}
    assert files == DATA | (FIGURES if method != "vit" else FIGURES - {"agent.png"})
    found = json.loads((folder / method / "explain" / "explain.json").read_text())
    assert len(found["images"]) == 5
    assert np.array(found["images"][0]["rollout"]).shape == (4, 4)
    assert np.array(found["tap_share"]).shape == np.array(found["distance_px"]).shape == (2, 9)
    assert (found["cka"] is None) == (method == "vit")
    assert ("CKA and the hint's distance are left out: method=vit has no agent" in out) == (method == "vit")
    with (folder / method / "explain" / "heads.csv").open(newline="") as file:
        heads = list(csv.DictReader(file))
    assert float(heads[10]["distance_px"]) == pytest.approx(found["distance_px"][1][1], abs=1e-4)
    assert [int(row["tap_down"]) for row in heads[:9]] == [tap[0] for tap in found["taps"]]
    report = write_report(collect_folders([folder / method]), tmp_path)
    page = report[0].read_text()
    assert f"Inside {method}" in page
    assert (tmp_path / f"explain-{method}-heads.png").exists()


def test_what_training_noted_is_what_its_checkpoints_show(folder: Path) -> None:
    """The journal has all epochs, the folder the checkpoints of the last two."""
    run = bootvit.load_run(folder / "joint")
    noted = recorded(RunFolder(folder / "joint"))
    assert list(noted) == [1, 2, 3]
    seen = run.explain(count=5)
    assert list(seen.over_epochs) == [1, 2, 3]
    for epoch in (2, 3):
        for what, values in noted[epoch].items():
            np.testing.assert_allclose(seen.over_epochs[epoch][what], values, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(seen.over_epochs[3]["hint"], seen.inside.hint)
    assert {name for name in run.metrics["name"].to_pylist() if name.startswith("explain/cka")} == {
        "explain/cka/block1",
        "explain/cka/block2",
    }
    assert bootvit.load_run(folder / "shared").metrics["name"].to_pylist().count("explain/cka/block1") == 0


def test_given_images_are_explained_and_json_is_one_document(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    path = tmp_path / "x.png"
    Image.fromarray(pixels).save(path)
    run = bootvit.load_run(folder / "shared")
    seen = run.explain([path, pixels])
    np.testing.assert_array_equal(seen.inside.rollout[0], seen.inside.rollout[1])
    assert seen.labels == (None, None)
    assert seen.guesses[0] == next(iter(run.predict(path)[0]["vit"]))
    assert main(["explain", str(folder / "shared"), str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose(found["images"][0]["rollout"], seen.inside.rollout[0], atol=1e-5)
    assert main(["explain", str(folder / "shared"), str(tmp_path / "gone.png")]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_an_agent_alone_has_no_attention(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(folder / "agent")]) == 2
    assert capsys.readouterr().err == "bootvit: error: agent: method=agent has no ViT, and so no attention to explain\n"
