"""Odd and damaged configs, sweep files and overrides: each must load, or end in one short line of our own.

`python -m benchmarks.fuzz_configs --count 2000 --seed 0` prints the counts by outcome; status 1 if one of them was
anything else. Input i is a function of (seed, i) alone, so `--first I --count 1` repeats one.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import yaml

from bootvit.config import SHIPPED, Config, all_keys, dump_config
from bootvit.errors import RunFailed, UserError
from bootvit.load import load_config
from tune.spec.load import load_sweep
from tune.spec.schema import SweepFile
from tune.spec.space import check_space

LONGEST = 1000  # characters of an error's line
TINY = "digits/joint"
SWEEP = {"name": "s", "base": TINY, "space": {"objective.vit.kd": {"grid": [1, 2]}}}
WORDS = (
    *("2024-11-25", "2001-12-14t21:59:43.10-05:00", "12:30:00", "1:30", "007", "0o17", "0x1F", "1_000", "1e3", "1e400"),
    *(".inf", "-.inf", ".nan", "9" * 30, "9" * 400, "9" * 5000, "-1", "0", "1", "2", "1.5", "-0.0", "1e-400", "+1"),
    *("yes", "no", "on", "off", "true", "False", "null", "~", "''", '""', '" "', "none", "auto", "timm", "digits"),
    *("[]", "{}", "[1]", "[1, 2]", "[[1]]", "{a: 1}", "{1: x}", "{null: x}", "{on: x}", "? [a]", "? {a: b}", "- 1"),
    *("!!binary aGk=", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!timestamp 2024-01-01", "!!python/none x"),
    *("!!int x", "!!int ''", "!!float x", "!!bool x", "!!null x", "!!str 5", "!!map [1]", "!!seq {a: 1}", "!!merge x"),
    *("!x y", "!<tag:x> y", "!!value =", "=", "<<", "<<: 1", "<<: {seed: 1}", "{<<: [1]}", "&a [*a]", "&a {b: *a}"),
    *("*b", "&", "*", "%", "@x", "`x", "|", ">", "|\n  a\n  b", "--- 1", "...", "# x", "a #b", "#", "a: b: c", "\t"),
    *("\x00", "\x07", "\x85", "\u2028", "\ufeff", "\ud800", '"\\ud800"', '"\\0"', '"\\x07"', "ünï", "🙂", "\u202e"),
    *("a" * 300, "a" * 5000, "/" * 300, "../" * 300, "~", "~/x", "~nobody-here/x", "s3://b/x", "s3:", "s3:/b", "file:///x"),
    *("[" * 60, "[" * 3000, "{a: " * 60, "{a: " * 1000, "[" * 50 + "]" * 50, "[" * 400 + "]" * 400, "'", '"', "{", "}"),
    *("[x, #", "{a: b #c}", "x\ny", "x\ry: 1", "vit_tiny_patch16_224.none", "hf_hub:x/y", "resnet50", "vgg11"),
)  # fmt: skip
LAUGHS = "\n".join(["a0: &a0 [x, x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))])
MERGES = "\n".join(["m0: &m0 {x: 1}", *(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}" for i in range(1, 9))])
TEXTS = (
    *("", "\n", "# only a comment\n", "- 1\n- 2\n", "text", "1", "--- {}\n---\n{}\n", "%YAML 9\n---\n{}", "null", "[]"),
    *(LAUGHS, MERGES, "seed: 1\nseed: 2", "data: {root: a, root: b}", "\tseed: 1", "seed:\t1", "seed: 1\n\tname: x"),
    *("extends: odd.yaml", "extends: [1]", "extends: null", "extends: {a: b}", "extends: .", 'extends: "a\\0b"'),
    *(f"extends: {'x' * 3000}", "base: 1", "base: []", "base: .", 'base: "\\0"', "space: 1", "space: [1]", "set: 1"),
    *("space: {}", "space: {1: {grid: [1]}}", "space: {a: 1}", "space: {'': {grid: [1]}}", "space: {.: {grid: [1]}}"),
    *("set: {'': 1}", "set: {a: {b: {}}}", "set: {a..b: 1}", "seeds: [1, 1]", "space: {seed.x: {grid: [1]}}"),
)  # fmt: skip
BYTES = (
    b"\xff\xfes\x00e\x00",
    b"\xef\xbb\xbfseed: 1\n",
    b"name: caf\xe9\n",
    b"\x00" * 50,
    b"seed: 1\r\nname: x\r\n",
    b"\x80",
)


def word(rng: random.Random) -> str:
    """An odd value, or several of them, or one that is damaged."""
    text = rng.choice(WORDS)
    kind = rng.randrange(6)
    if kind == 0:
        return f"[{text}, {rng.choice(WORDS)}]"
    if kind == 1:
        return f"{{{rng.choice(WORDS)}: {text}}}"
    if kind == 2 and text:
        at = rng.randrange(len(text))
        return text[:at] + rng.choice("#:[]{}'\"&*!|>%@`,?- \t\n\\/.0") + text[at:]
    return text


def key(rng: random.Random, sweep: bool) -> str:
    """A key of the schema, a part of one, or no key."""
    one = rng.choice(all_keys(SweepFile if sweep and rng.random() < 0.7 else Config))
    kind = rng.randrange(12)
    if kind == 0:
        return one.rpartition(".")[0] or one
    if kind == 1:
        return one + rng.choice([".x", "x", ".", "..y", ".0"])
    if kind == 2 and sweep:
        return (
            rng.choice(["set.", "space."])
            + rng.choice(all_keys(Config))
            + rng.choice(["", ".grid", ".when", ".uniform"])
        )
    return one


def text_of(rng: random.Random, sweep: bool) -> bytes:
    """A file."""
    kind = rng.randrange(10)
    if kind == 0:
        return rng.choice(BYTES)
    if kind == 1:
        return rng.choice(TEXTS).encode()
    base = yaml.safe_dump(SWEEP) if sweep else rng.choice(["", "name: x\n", dump_config(load_config(TINY))])
    lines = base.splitlines()
    for _ in range(rng.randrange(1, 4)):
        lines.insert(rng.randrange(len(lines) + 1), nested(key(rng, sweep), word(rng)) if kind < 7 else word(rng))
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    if kind == 9:
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.randbytes(rng.randrange(4)) + data[at + rng.randrange(20) :]
    return data


def nested(name: str, value: str) -> str:
    """`a.b`, v as the line `a: {b: v}`."""
    *path, last = name.split(".")
    return "".join(f"{part}: {{" for part in path) + f"{last}: {value}" + "}" * len(path)


def overrides_of(rng: random.Random, sweep: bool) -> list[str]:
    """Some of a command line."""
    out = [f"{key(rng, sweep)}={word(rng)}" for _ in range(rng.choice([0, 0, 1, 1, 2]))]
    if rng.random() < 0.05:
        out.append(rng.choice(["", "=", "x", "=x", "a b=1", "--x=1", "data.root", "seed==1", "é=1", "seed =1"]))
    return out


def outcome(folder: Path, rng: random.Random) -> str:
    """What loading one input ends in."""
    sweep = rng.random() < 0.4
    path = folder / "odd.yaml"
    plain = rng.random() < 0.3  # a sound file, so that the overrides count
    sound = yaml.safe_dump(SWEEP if sweep else {"extends": str(SHIPPED / f"{TINY}.yaml")})
    path.write_bytes(sound.encode() if plain else text_of(rng, sweep))
    overrides = overrides_of(rng, sweep)
    try:
        if sweep:
            check_space(load_sweep(str(path), overrides))
        else:
            config = load_config(str(path), overrides)
            again = path.with_name("again.yaml")
            again.write_text(dump_config(config), encoding="utf-8")
            if load_config(str(again)) != config:
                return "WRONG: printed, it is another run"
    except (UserError, RunFailed) as err:
        line = str(err)
        short = line.strip() and line.isprintable() and len(line) <= LONGEST
        return type(err).__name__ if short else f"WRONG: no short printable line: {line[:200]!r}"
    except Exception as err:  # every other kind is what this program looks for
        return f"WRONG: {type(err).__name__}: {str(err)[:200]!r}"
    return "loaded"


def run(count: int, seed: int, first: int = 0) -> dict[str, list[int]]:
    """{outcome: the inputs that ended so}."""
    found: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, first + count):
            found.setdefault(outcome(Path(folder), random.Random(f"{seed} {number}")), []).append(number)
    return found


def main(count: int, seed: int, first: int = 0) -> int:
    """Print the counts by outcome; 1 if there was a wrong one."""
    found = run(count, seed, first)
    counts = Counter({what: len(numbers) for what, numbers in found.items()})
    print(json.dumps({"count": count, "seed": seed, "outcomes": dict(counts.most_common())}, indent=2))
    wrong = [what for what in found if what.startswith("WRONG")]
    for what in wrong:
        print(f"{what}: inputs {found[what][:5]}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    sys.exit(main(given.count, given.seed, given.first))
