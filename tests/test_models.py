"""The ViT, the agents and the shared agent against slow, obvious code."""

import pytest
import timm
import torch
from helpers import tiny
from torch import Tensor, nn

from bootvit.errors import UserError
from bootvit.learner import Networks
from bootvit.load import load_config
from bootvit.models.agent import HeadTapConv
from bootvit.models.shapes import head_taps
from bootvit.models.shared import SharedMixer, shift_heads
from bootvit.models.vit import vit_features
from bootvit.models.zoo import build_vit
from bootvit.standalone.sparse import EntmaxAttention


@pytest.fixture(autouse=True)
def _float64() -> object:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def test_row_major_taps_are_places_of_the_window() -> None:
    assert head_taps(1, "row_major") == ((0, 0),)
    assert head_taps(6, "row_major") == ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 0), (0, 1))
    for heads in (2, 3, 4, 10, 12, 16, 26):
        with pytest.raises(UserError, match="cannot place"):
            head_taps(heads, "row_major")


def test_centred_taps_start_in_the_middle_and_take_any_count() -> None:
    assert head_taps(5, "centred") == ((0, 0), (-1, 0), (0, -1), (0, 1), (1, 0))
    for heads in range(1, 26):
        taps = head_taps(heads, "centred")
        assert len(set(taps)) == heads
        assert max(abs(c) for tap in taps for c in tap) <= (1 if heads <= 9 else 2)


def pixel_by_pixel(x: Tensor, matrices: list[Tensor], taps: tuple[tuple[int, int], ...], bias: Tensor) -> Tensor:
    """out[:, y, x] = bias + sum of matrix_h @ in[:, y + dy_h, x + dx_h], with zeros outside."""
    out = torch.zeros(x.shape[0], len(bias), *x.shape[2:])
    for row in range(x.shape[2]):
        for col in range(x.shape[3]):
            out[:, :, row, col] = bias
            for matrix, (dy, dx) in zip(matrices, taps, strict=True):
                if 0 <= row + dy < x.shape[2] and 0 <= col + dx < x.shape[3]:
                    out[:, :, row, col] += x[:, :, row + dy, col + dx] @ matrix.T
    return out


@pytest.mark.parametrize(
    ("heads", "rule"), [(1, "row_major"), (6, "row_major"), (9, "row_major"), (4, "centred"), (12, "centred")]
)
def test_head_tap_convolution(heads: int, rule: str) -> None:
    taps = head_taps(heads, rule)  # type: ignore[arg-type]
    conv = HeadTapConv(5, taps)
    nn.init.normal_(conv.bias)
    x = torch.randn(2, 5, 4, 6)
    slow = pixel_by_pixel(x, list(conv.weight.unbind(2)), taps, conv.bias)
    torch.testing.assert_close(conv(x), slow)


@pytest.mark.parametrize(("heads", "rule"), [(6, "row_major"), (9, "row_major"), (4, "centred"), (12, "centred")])
@pytest.mark.parametrize("value_bias", [False, True])
def test_shared_mixer_is_a_convolution_with_the_heads_matrices(heads: int, rule: str, value_bias: bool) -> None:
    width, taps = heads * 2, head_taps(heads, rule)  # type: ignore[arg-type]
    attention = timm.layers.Attention(width, num_heads=heads, qkv_bias=True)
    nn.init.normal_(attention.qkv.bias)
    nn.init.normal_(attention.proj.bias)
    x = torch.randn(2, width, 4, 5)
    w_v, w_o = attention.qkv.weight[2 * width :], attention.proj.weight
    matrices = [w_o[:, 2 * h : 2 * h + 2] @ w_v[2 * h : 2 * h + 2] for h in range(heads)]
    bias = attention.proj.bias + (w_o @ attention.qkv.bias[2 * width :] if value_bias else 0)
    slow = pixel_by_pixel(x, matrices, taps, bias)
    torch.testing.assert_close(SharedMixer(attention, taps, value_bias)(x), slow)


def test_shift_moves_each_head_by_its_tap() -> None:
    values = torch.arange(12.0).reshape(1, 2, 3, 2)  # two heads, one channel each
    shifted = shift_heads(values, ((0, 1), (-1, 0)))
    assert shifted[0, :, :, 0].tolist() == [[2, 4, 0], [8, 10, 0]]
    assert shifted[0, :, :, 1].tolist() == [[0, 0, 0], [1, 3, 5]]


def test_vit_features_are_the_blocks_outputs() -> None:
    vit = build_vit(tiny(method="vit"), 10).double().eval()
    images = torch.randn(2, 3, 8, 8)
    features = vit_features(vit, images)
    tokens = vit.pos_drop(torch.cat([vit.cls_token.expand(2, -1, -1), vit.patch_embed(images)], 1) + vit.pos_embed)
    for block, seen in zip(vit.blocks, features.blocks, strict=True):
        tokens = block(tokens)
        torch.testing.assert_close(seen.flatten(1, 2), tokens[:, 1:])
    torch.testing.assert_close(features.logits, vit.head(vit.norm(tokens)[:, 0]))
    torch.testing.assert_close(features.logits, vit(images))


def test_entmax_attention_with_softmax_weights_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, sparse = timm.layers.Attention(12, 3, qkv_bias=True), EntmaxAttention(12, 3, qkv_bias=True)
    sparse.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 5, 12)
    assert not torch.allclose(sparse(x), plain(x))
    monkeypatch.setattr("bootvit.standalone.sparse.sparse_weights", lambda scores, alpha: scores.softmax(-1))
    torch.testing.assert_close(sparse(x), plain(x))


def test_sparse_attention_compiles() -> None:
    attention = EntmaxAttention(12, 3, qkv_bias=True).float()
    x = torch.randn(2, 5, 12, dtype=torch.float32)
    compiled = torch.compile(attention, backend="aot_eager")
    torch.testing.assert_close(compiled(x), attention(x))


@pytest.mark.parametrize(
    ("name", "overrides", "parameters"),
    [
        ("cifar10/vit-small", [], 6_302_404),
        ("cifar10/agent-small", [], 8_728_516),
        ("cifar10/agent-small", ["model.agent.stem=resnet", "model.agent.downsample=[0,1]"], 8_682_756),
        ("cifar10/joint-small", [], 15_030_920),
        ("cifar10/shared-small", [], 6_560_264),
        ("cifar10/vit-small", ["model.vit.name=bootvit_base_patch16_224"], 21_704_164),
        ("cifar10/agent-small", ["model.vit.name=bootvit_base_patch16_224", "model.agent.name=agent_base"], 25_153_252),
    ],
)
def test_parameter_counts_are_the_papers(name: str, overrides: list[str], parameters: int) -> None:
    with torch.device("meta"):
        networks = Networks(load_config(name, overrides), 100)
    assert sum(p.numel() for p in networks.parameters()) == parameters


@pytest.mark.parametrize("method", ["joint", "shared"])
@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_wee_patch16_reg1_gap_256"]
)
def test_any_plain_vit_of_timm_is_bootstrapped(name: str, method: str) -> None:
    torch.set_default_dtype(torch.float32)
    own_sizes = dict.fromkeys(("width", "depth", "heads", "mlp_width", "patch"))
    config = tiny(method=method, model={"vit": {"name": name} | own_sizes}, data__image_size=32)
    networks = Networks(config, 10)
    features = networks.features(torch.randn(2, 3, 32, 32))
    assert [b.shape for b in features["vit"].blocks] == [b.shape for b in features["agent"].blocks]


def test_gradients_reach_the_shared_weights_from_both_networks() -> None:
    networks = Networks(tiny(method="shared"), 10).double()
    assert networks.vit is not None
    features = networks.features(torch.randn(2, 3, 8, 8))
    weight = networks.vit.blocks[0].attn.proj.weight
    for own in features.values():
        (gradient,) = torch.autograd.grad(own.logits.sum(), weight, retain_graph=True)
        assert gradient.abs().sum() > 0
    names = [n for n, _ in networks.named_parameters()]
    assert len(names) == len(set(names))
    assert not any("agent.blocks.0.mixer" in n for n in names)


def test_reference_initial_values() -> None:
    networks = Networks(
        tiny(method="joint", model__init="reference", model__vit__width=144, model__vit__mlp_width=400), 10
    )
    vit, agent = networks.vit, networks.agent
    assert vit is not None
    for tensor, std in [
        (vit.patch_embed.proj.weight, 1.0),
        (vit.pos_embed, 0.02),
        (vit.blocks[0].mlp.fc1.bias, 1.0),
        (agent.stem.weight, 1.0),  # type: ignore[union-attr]
        (agent.blocks[0].mlp[0].bias, 1.0),  # type: ignore[union-attr, index]
    ]:
        assert tensor.std().item() == pytest.approx(std, rel=0.15)
    bound = (6 / (4 * 144)) ** 0.5  # the fused q, k, v matrix, as Xavier sees it
    assert vit.blocks[0].attn.qkv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
