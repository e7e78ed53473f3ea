"""Models that cannot be built or paired, and batches too small for them, are refused before anything starts."""

from __future__ import annotations

from bootvit.config import Config
from bootvit.errors import UserError
from bootvit.models.shapes import (
    OURS,
    agent_maps,
    agent_patch,
    agent_taps,
    check_tag,
    mirrors,
    poolable,
    vit_grid,
    vit_shape,
)


def check_models(config: Config) -> None:
    """Refuse, before anything starts, models that cannot be built or paired: one line that names the key."""
    if "vit" in config.networks:
        _check_patch("model.vit.patch", vit_shape(config.model.vit).patch, config)
    if "agent" in config.networks:
        _check_agent(config)
    if len(config.networks) == 2:
        _check_pair(config)
    _check_optimizers(config)


def _check_optimizers(config: Config) -> None:
    own = {"optim.name": config.optim.name}
    if config.method == "joint" and config.optim.agent.name is not None:
        own["optim.agent.name"] = config.optim.agent.name
    for key, name in own.items():
        if name not in ("adamw", "sgd"):
            from bootvit.optim import check_optimizer

            check_optimizer(key, config.optim.model_copy(update={"name": name}))


def _check_patch(key: str, patch: tuple[int, int], config: Config) -> None:
    rows, cols = config.image_size
    if rows % patch[0] or cols % patch[1]:
        raise UserError(f"{key}={patch[0]}x{patch[1]} does not divide data.image_size={rows}x{cols}")


def _check_agent(config: Config) -> None:
    cfg = config.model.agent
    if not mirrors(cfg):
        import timm

        if not timm.is_model(cfg.name):
            raise UserError(f"model.agent.name={cfg.name!r}: expected agent_small, agent_base or a CNN of timm")
        check_tag("model.agent.name", cfg.name)
        if config.model.checkpoint_blocks:
            raise UserError(f"model.checkpoint_blocks=true: {cfg.name} is a CNN of timm, without blocks of ours")
        if config.method == "shared":
            raise UserError(
                f"model.agent.name={cfg.name!r} cannot share the ViT's weights: use agent_small or agent_base"
            )
        return
    if cfg.weights == "timm":
        raise UserError(f"model.agent.weights=timm: {cfg.name} is no model of timm; it starts from a run that has one")
    shape = vit_shape(config.model.vit)
    if cfg.stem == "patch":
        _check_patch("model.agent.patch", agent_patch(cfg, shape), config)
    heads = cfg.heads or shape.heads
    if config.method == "shared" and heads != shape.heads:
        raise UserError(f"model.agent.heads={heads}: a shared agent has the ViT's {shape.heads} heads")
    if config.method == "shared" or cfg.name == "agent_base":
        agent_taps(config)
    beyond = [i for i in cfg.downsample if i >= shape.depth]
    if beyond:
        raise UserError(
            f"model.agent.downsample={list(cfg.downsample)}: there is no block {beyond[0]} of {shape.depth}"
        )
    if min(agent_maps(config)[-1]) < 1:
        raise UserError(f"model.agent.downsample={list(cfg.downsample)}: the map is too small to be halved so often")


def _check_pair(config: Config) -> None:
    hints = {net: getattr(config.objective, net).hint for net in config.networks}
    wanted = next((net for net, weight in hints.items() if weight), None)
    if config.method == "shared":
        _check_sharable(config)
    if wanted is None:
        return
    key = f"objective.{wanted}.hint={hints[wanted]}"
    if not mirrors(config.model.agent):
        raise UserError(f"{key}: {config.model.agent.name} has no blocks that mirror the ViT's; set the hint to 0")
    grid = vit_grid(config)
    for i, sides in enumerate(agent_maps(config)):
        if not poolable(grid, sides, config.objective.hint_pool):
            raise UserError(
                f"{key}: block {i}'s maps, {grid[0]}x{grid[1]} (ViT) and {sides[0]}x{sides[1]} (agent), "
                f"are not whole multiples for hint_pool={config.objective.hint_pool}"
            )


def _check_sharable(config: Config) -> None:
    if config.model.vit.name in OURS:
        return
    import timm
    import torch
    from torch import nn

    with torch.device("meta"):
        vit = timm.create_model(config.model.vit.name)
    attn, mlp = vit.blocks[0].attn, vit.blocks[0].mlp
    plain = (
        hasattr(attn, "qkv") and hasattr(mlp, "fc1") and isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity)
    )
    if not plain or not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity) or getattr(attn, "gate", None):
        raise UserError(
            f"model.vit.name={config.model.vit.name!r}: method=shared needs fused q, k, v and a two-layer MLP; "
            "use method=joint"
        )


def check_batches(config: Config, train_images: int) -> None:
    """Refuse a share of one image where the agent's BatchNorm would see one value per channel, and fail.

    `train_images` is the number of images that the run trains on: a batch is at most so large.
    """
    workers, batch = config.ray.most, min(config.data.batch_size, train_images)
    passes = workers * parts_of(batch, workers, config.optim.accumulate)  # of images, each with statistics of its own
    together = config.model.agent.sync_norm and workers > 1  # every BatchNorm sees the shares of all workers
    if "agent" not in config.networks or batch // passes != 1 or together or _norms_take_one_image(config):
        return
    if config.data.batch_size < 2 * passes:
        given = f"data.batch_size={config.data.batch_size}"
    else:
        given = f"data.batch_size={config.data.batch_size} of {train_images} training images"
    by = [f"ray.num_workers={workers}"] * (workers > 1) + [f"optim.accumulate={config.optim.accumulate}"] * (
        config.optim.accumulate > 1
    )
    share = f"{given} with {' and '.join(by)}" if by else given
    raise UserError(
        f"{share} leaves a worker one image, and BatchNorm of model.agent.name={config.model.agent.name} then sees "
        "one value per channel, its map being 1x1: it needs two images a worker"
        + (f", such as data.batch_size={2 * passes}" if train_images >= 2 * passes else "")
    )


def parts_of(batch: int, workers: int, accumulate: int) -> int:
    """The parts in which every worker takes its share of a batch: as asked for, as far as each has an image."""
    return min(accumulate, max(batch // workers, 1))


def _norms_take_one_image(config: Config) -> bool:
    """Whether every BatchNorm of the agent has more than one value per channel in a batch of one image."""
    cfg = config.model.agent
    if mirrors(cfg):
        maps, depth = agent_maps(config), vit_shape(config.model.vit).depth
        rows, cols = maps[-1]
        halved = (rows // 2) * (cols // 2) if depth - 1 in cfg.downsample else rows * cols
        return min(halved, rows * cols) > 1
    import timm
    import torch

    with torch.random.fork_rng(), torch.no_grad():  # its maps are known only by asking it
        cnn = timm.create_model(cfg.name, num_classes=2, in_chans=config.data.channels)
        try:
            cnn.train()(torch.zeros(1, config.data.channels, *config.image_size))
        except ValueError as err:
            if "more than 1 value per channel" not in str(err):
                raise
            return False
    return True
