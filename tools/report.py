"""The page of docs/reproduce.sh: `python -m tools.report runs/reproduce-cvc` writes its report.md.

Each number of the paper stands beside ours. Ours come from summary.json, which tools.evaluate wrote
to the folders stability, efficiency and curve of the run. Nothing is measured here.
"""

import json
from pathlib import Path

from support.cli import ArgumentParser, UserError, atomic_write, run_command

SCORES = {  # the paper's Dice and IoU
    "cvc": (0.958, 0.926),
    "kvasir": (0.949, 0.921),
    "refuge2": (0.894, 0.818),
    "btcv": (0.928, None),
    "sts3d": (0.894, None),
}
SPEED = {1: (8.36, 0.9276), 10: (2.01, 0.9209)}  # Table 4, BTCV: DDIM steps: samples/s, Dice
STABILITY = {  # Table 5, BTCV: our name and its level: the paper's numbers for masks and scores
    ("lpips", "data_set"): (0.0199, 0.0143),
    ("psnr", "instance"): (27.63, 31.55),
    ("ssim", "instance"): (0.9796, 0.9764),
    ("ms_ssim", "instance"): (0.9897, 0.9909),
}
CHOICES = ("init", "lr", "warmup", "steps", "batch_size", "precision", "augment", "seed")


def parse_args(argv=None):
    parser = ArgumentParser("Write report.md: the paper's numbers beside those of a run.")
    parser.add_argument("run", help="the folder of docs/reproduce.sh")
    return parser.parse_args(argv)


def read(path, key):
    """A JSON file that holds `key`. Raises UserError."""
    try:
        content = json.loads(path.read_text())
        content[key]
        return content
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        raise UserError(f"{path}: missing, damaged or without {key}; docs/reproduce.sh writes it"
                        ) from None  # fmt: skip


def text(value):
    """A number with four digits, "-" for None."""
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def table(title, header, *rows):
    """-> Markdown: the title, and a table below it."""
    rows = [header, ["---"] * len(header), *rows]
    return "\n".join([f"## {title}", "", *(f"| {' | '.join(map(text, row))} |" for row in rows)])


def choices_table(args, model):
    rows = [("U-Net", model["preset"]), ("pixels", model["image_size"])]
    rows += [(choice, args[choice]) for choice in CHOICES]
    return table("The run", ("choice", "value"), *rows)


def scores_table(data, scores):
    rows = []
    for title, theirs in zip(("Dice", "IoU"), SCORES.get(data, (None, None))):
        ours = scores[title.lower()]
        rows.append((title, theirs, ours["mean"], f"{text(ours['low'])} to {text(ours['high'])}"))
    return table("Scores, single step", ("", "paper", "here", "95 % interval"), *rows)


def speed_table(speeds, dice):
    """`dice`: {DDIM steps: Dice}."""
    rows = []
    for row in speeds:
        theirs = SPEED.get(row["steps"], (None, None))
        rows.append((row["steps"], *theirs, row["images_per_second"], dice.get(row["steps"])))
    header = ("DDIM steps", "paper, samples/s", "paper, Dice", "here, samples/s", "here, Dice")
    return table("Efficiency, Table 4 (the paper: BTCV, one V100; here: networks alone)", header,
                 *rows)  # fmt: skip


def stability_table(stability):
    rows = []
    for (key, level), theirs in STABILITY.items():
        ours = [stability.get(f"{key} of {kind}") for kind in ("masks", "probabilities")]
        rows.append((key, *theirs, *(found and found[level]["mean"] for found in ours)))
    header = ("", "paper, masks", "paper, scores", "here, masks", "here, scores")
    return table("Stability, Table 5 (the paper: BTCV)", header, *rows)


def page(config, scored, speed, curve):
    """-> Markdown, from the run's config.json and the three summaries."""
    model, n, unit = config["model"], scored["n"], scored["unit"]
    dice = {row["steps"]: row["dice"] for row in curve.get("curve", ())}
    curve_table = table("Dice against DDIM steps, Figure 3", ("steps", *dice),
                        ("Dice here", *dice.values()))  # fmt: skip
    parts = (
        f"# SDSeg on {model['data']}: the paper and this run",
        f"{n} {unit}s of the {scored['part']} part; {scored['device']}, model {scored['sha256']}",
        choices_table(config["args"], model),
        scores_table(model["data"], scored["scores"]),
        speed_table(speed["efficiency"], dice),
        stability_table(scored["stability"]),
        curve_table + "\n\n![Dice against DDIM steps](curve/curve.png)",
    )
    return "\n\n".join(parts) + "\n"


def main(args):
    run = Path(args.run)
    parts = ("stability", "stability"), ("efficiency", "efficiency"), ("curve", "scores")
    summaries = [read(run / part / "summary.json", key) for part, key in parts]
    markdown = page(read(run / "config.json", "model"), *summaries)
    with atomic_write(run / "report.md") as path:
        path.write_text(markdown)
    print(f"{run / 'report.md'}: the paper's numbers beside those of this run")


if __name__ == "__main__":
    run_command(lambda: main(parse_args()))
