"""`python -m tools.demo_model train` makes the demo model, `... judge` scores it. See docs/demo-model.md."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path

import torch

from tools.demo_model import making, scores
from tools.demo_model.recipe import SMOKE, Recipe

SHIPPED = Path(__file__).parents[2] / "darkroom" / "models" / "demo"
MARK_BEFORE, MARK_AFTER = "<!-- scores -->\n", "\n<!-- end of scores -->"
NUMBERS = {field.name: field.default for field in fields(Recipe) if type(field.default) in (int, float, str)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model", description=__doc__)
    parser.add_argument("--threads", type=int, default=0, help="of the CPU (default: all)")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="from nothing to the folder; a stopped run goes on where it was")
    train.add_argument("--work", type=Path, default=Path("build/demo_model"), help="where what is done is kept")
    train.add_argument("--out", type=Path, help="the folder that is made (default: WORK/demo)")
    train.add_argument("--begin", type=Path, metavar="FOLDER", help="go on from this pipeline instead of from nothing")
    train.add_argument("--smoke", action="store_true", help="every stage for seconds; what comes out draws nothing")
    for name, default in NUMBERS.items():
        train.add_argument(f"--{name.replace('_', '-')}", type=type(default), help=f"default: {default}")

    judge = commands.add_parser("judge", help="scores of a folder, on held-out combinations")
    judge.add_argument("folder", type=Path, nargs="?", default=SHIPPED, help="default: what is shipped")
    judge.add_argument("--number", type=int, default=500, help="of pictures in each row (default: 500)")
    usual = scores.Drawing()
    judge.add_argument("--steps", type=int, default=usual.steps, help=f"default: {usual.steps}")
    judge.add_argument("--guidance", type=float, default=usual.guidance, help=f"default: {usual.guidance}")
    judge.add_argument("--page", type=Path, help="write them there too, between the two comments that say so")

    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.command == "judge":
        how = scores.Drawing(steps=given.steps, guidance=given.guidance)
        found = scores.report(given.folder, given.number, how)
        print(found)
        if given.page:
            before, rest = given.page.read_text().split(MARK_BEFORE)
            given.page.write_text(f"{before}{MARK_BEFORE}\n{found}\n{MARK_AFTER}{rest.split(MARK_AFTER)[1]}")
        return
    chosen = {name: getattr(given, name) for name in NUMBERS if getattr(given, name) is not None}
    out = given.out or given.work / "demo"
    making.make(replace(SMOKE if given.smoke else Recipe(), **chosen), given.work, out, given.begin)
    print(f"{out}: {making.size_of(out) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
