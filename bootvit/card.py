"""The model card of an export: what the network is, what it was trained on and how, and how well it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bootvit.config import Config, Network
from bootvit.data.facts import DataFacts
from bootvit.result import read_result
from bootvit.tracking.tags import data_name

METHODS = {
    "vit": "a vision Transformer alone",
    "agent": "a CNN alone",
    "joint": "a vision Transformer and an agent CNN, each on weights of its own, which learn from one another",
    "shared": "a vision Transformer and an agent CNN on one set of weights, which learn from one another",
}
ROLES = {"vit": "the vision Transformer", "agent": "the agent CNN"}


def model_card(
    config: Config, run_dir: Path, net: Network, facts: DataFacts, usage: str, *, library: str, best: bool
) -> str:
    """Markdown with Hugging Face's header; `usage` is Python that loads the folder. What nobody knows is said so."""
    data, optim, schedule = config.data, config.optim, config.schedule
    rows, cols = facts.preparation.size
    named = ", ".join(facts.classes[:20]) + (f" and {len(facts.classes) - 20} more" if len(facts.classes) > 20 else "")
    source = data_name(data.source, data.root)
    share = f"{100 * data.fraction:g}% of the training images of each class"
    recipe = {
        "method": f"{config.method}: {METHODS[config.method]}; this is {ROLES[net]}",
        "model": config.model.vit.name if net == "vit" else config.model.agent.name,
        "started from": (getattr(config.model, net).weights and "given weights") or "random weights",
        "epochs": schedule.epochs,
        "optimiser": f"{optim.name}, learning rate {optim.lr:g}, weight decay {optim.weight_decay:g}",
        "batch": data.batch_size,
        "seed": config.seed,
        "weights of the losses": weights_of(config),
    }
    return "\n".join(
        [
            "---",
            f"library_name: {library}",
            "pipeline_tag: image-classification",
            "license: unknown",
            "---",
            "",
            f"# {config.name}: {ROLES[net]}",
            "",
            f"An image classifier for {len(facts.classes)} classes ({named}), trained with bootvit on little data.",
            "",
            "## Use",
            "",
            "```python",
            usage.rstrip(),
            "```",
            "",
            "## Data",
            "",
            f"- data set: {source}, {share}"
            + (f", less {100 * data.held_out:g}% held out" if data.held_out else "")
            + (f" (fingerprint `{facts.fingerprint}`)" if facts.fingerprint else ""),
            "- licence of the images, and so of what may be done with these weights: unknown; whoever passes them on "
            "must find out",
            f"- images are RGB, {'resized' if facts.preparation.kind == 'resize' else 'resized and cropped'} to "
            f"{rows}x{cols} pixels",
            "",
            "## Training",
            "",
            *(f"- {key}: {value}" for key, value in recipe.items()),
            "",
            "## Accuracy",
            "",
            *accuracy(run_dir, net, best=best),
            "",
        ]
    )


def weights_of(config: Config) -> str:
    """Those of every network's terms."""
    parts = []
    for net in config.networks:
        own = getattr(config.objective, net)
        terms = ("ce", "kd", "hint") if len(config.networks) == 2 else ("ce",)
        parts.append(f"{net} " + ", ".join(f"{term} {getattr(own, term):g}" for term in terms))
    return "; ".join(parts)


def accuracy(run_dir: Path, net: Network, *, best: bool) -> list[str]:
    """Lines of a list: the final epoch's numbers, or of `best` those by which it was chosen."""
    path = run_dir / "result.json"
    result: dict[str, Any] = dict(read_result(path)) if path.exists() else {}
    if best:
        own = result.get("best", {}).get(net)
        if own is None:
            return ["- not known"]
        return [
            f"- top-1 {own['top1']:.2f}%, top-5 {own['top5']:.2f}%, the best of the run (after epoch {own['epoch']}): "
            "chosen by such numbers, so they are too high"
        ]
    found = [
        f"- {where}: top-1 {scores[net]['top1']:.2f}%, top-5 {scores[net]['top5']:.2f}% (final epoch)"
        for key, where in (("final", "evaluation"), ("held_out", "held-out training images"))
        if (scores := result.get(key)) and net in scores
    ]
    return found or ["- not known: the run has not finished"]
