"""Several processes compute what one does: uneven shares, synchronised BatchNorm, exact evaluation."""

import gc
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import ONE, batch, tiny

from bootvit.data import Subset, open_splits
from bootvit.data.batches import Batch
from bootvit.learner import Learner, World
from bootvit.predictions import Answers

SIZE, STEPS = 7, 3  # not a multiple of two or three


# method: weights, counts, what was answered image by image
Result = dict[str, tuple[dict[str, torch.Tensor], dict[str, tuple[float, ...]], pa.Table | None]]


METHODS = ("vit", "joint", "shared")


def configured(method: str, size: int) -> dict[str, object]:
    """Several workers take each ViT's batch in two parts, one takes it as a whole: it has no batch norm."""
    optim = {"sam_rho": 0.05, "accumulate": 2 if method == "vit" and size > 1 else 1}
    optim |= {"ema": 0.5, "layer_decay": 0.9, "decay_vectors": False}
    model = {"agent": {"sync_norm": True}}
    return {"method": method, "model": model, "precision": "fp64", "optim": optim, "objective__label_smoothing": 0.1}


def part(whole: Batch, rank: int, size: int) -> Batch:
    rows = torch.tensor_split(torch.arange(len(whole.labels)), size)[rank]
    return Batch(whole.images.double()[rows], whole.labels[rows], whole.global_size, rows.numpy())


def train(method: str, world: World) -> Learner:
    weights = [0.5 + 0.1 * label for label in range(10)]
    learner = Learner(tiny(**configured(method, world.size)), 10, world, weights)
    for step in range(STEPS):
        own = part(batch(SIZE, seed=step), world.rank, world.size)
        if step == 1:  # labels of mixed images
            own = own._replace(labels=torch.nn.functional.one_hot(own.labels, 10) * 0.7 + 0.03)
        learner.step(own, step, 0, 0.1 * step)
    return learner


def weights_of(learner: Learner) -> dict[str, torch.Tensor]:
    """The last ones and the averaged ones."""
    state = learner.state_dict()
    return dict(state["networks"]) | {f"averaged {name}": value for name, value in state["ema"].items()}


def images() -> Subset:
    """As many as are evaluated, so that answers have keys."""
    test = open_splits(tiny().data).test
    assert test is not None
    return Subset(test.table, test.indices[:11])


def worker(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    out = {}
    for method in METHODS:
        learner = train(method, World(rank, size, torch.device("cpu")))
        mine = [part(batch(11, seed=9), rank, size)] if rank else []  # rank 0 has nothing to evaluate
        mine += [part(batch(11, seed=9), 0, size)] if rank == 1 else []
        answers = Answers()
        counts = {n: tuple(c) for n, c in learner.evaluate(mine, answers).items()}
        out[method] = (weights_of(learner), counts, answers.table("test", images(), rank, size))
    torch.save(out, f"{folder}/{rank}.pt")
    del learner
    gc.collect()  # what still holds the group when it is destroyed would end it while it has the GIL: a deadlock
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    folder = tmp_path_factory.mktemp("workers")
    mp.spawn(worker, args=(request.param, str(folder)), nprocs=request.param)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


@pytest.mark.parametrize("method", METHODS)
def test_workers_train_the_model_of_one_process(results: list[Result], method: str) -> None:
    alone = weights_of(train(method, ONE))
    for result in results:
        for name, value in result[method][0].items():
            torch.testing.assert_close(value, alone[name], rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", METHODS)
def test_workers_count_what_one_process_counts(results: list[Result], method: str) -> None:
    learner = train(method, ONE)
    counts = learner.evaluate([part(batch(11, seed=9), 0, 1)])
    for result in results:
        for net, seen in result[method][1].items():
            assert seen[:3] == tuple(counts[net])[:3]
            assert seen[3] == pytest.approx(counts[net].loss_sum, rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_workers_answer_what_one_process_answers(results: list[Result], method: str) -> None:
    answers = Answers()
    train(method, ONE).evaluate([part(batch(11, seed=9), 0, 1)], answers)
    alone = answers.table("test", images(), 0, 1)
    assert alone is not None
    assert all(result[method][2] is None for result in results[1:])
    together = results[0][method][2]
    assert together is not None
    assert together.column_names == alone.column_names
    for name in alone.column_names:
        if name.endswith("probability"):
            assert together[name].to_pylist() == pytest.approx(alone[name].to_pylist(), abs=1e-6)
        else:
            assert together[name].to_pylist() == alone[name].to_pylist(), name
    assert together["key"].to_pylist() == images().keys
