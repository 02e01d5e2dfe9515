"""Three tables and a figure of the runs of `tools.claims`, from their JSONs alone.

Differences are paired: two rows are compared seed by seed and image by image. Letters: N images.
"""

import json
from pathlib import Path

import numpy as np

from support.cli import UserError, atomic_write
from support.images import write_image
from support.metrics import bootstrap_interval
from support.panels import plot_panels

PAPER_DICE = {"cross": 0.327, "concat": 0.803, "trainable": 0.919, "lambda-1": 0.928}  # Table 6
SAME = ("data", "steps", "batch_size", "lr", "warmup", "ema")  # in all runs of a report
EXTRA = {"10x1": "10 steps - 1", "50x1": "50 steps - 1", "1x25": "25 samples - 1",
         "other": "zeros - noise"}  # fmt: skip
IN_FIGURE = ("base", "uniform", "uniform-eps", "terminal", "zeros", "no-z_t", "logits", "plain")


# ---- results ----


def load_results(folder, names):
    """The JSONs of a folder -> {row: {seed: result}}, in the order of `names`. Raises UserError if
    there is none, if one is damaged, or if they were not made alike.
    """
    found = {}
    for path in sorted(Path(folder).glob("*-*.json")):
        try:
            result = json.loads(path.read_text())
            settings = result["settings"]
            found.setdefault(settings["row"], {})[settings["seed"]] = result
            same = [settings[key] for key in SAME]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: not a result of this command") from None
        first = next(iter(next(iter(found.values())).values()))["settings"]
        if same != [first[key] for key in SAME]:
            raise UserError(f"{path}: not of the same {', '.join(SAME)} as the other files")
    results = {name: found[name] for name in names if name in found}
    if not results:
        raise UserError(f"{folder}: holds no result; run the command without --report first")
    return results


def thirds(result):
    """Dice of each validation image in each third of the run -> (3, N)."""
    curve = np.array([point["dice"] for point in result["curve"]])
    return np.stack([part.mean(0) for part in np.array_split(curve, 3)])


def plateau(result):
    """Dice of each validation image, the mean over the last third of the run -> (N,)."""
    return thirds(result)[2]


def difference(ours, theirs, groups):
    """{seed: (N,)} minus {seed: (N,)} -> the mean over images and over the seeds that both hold,
    the ends of its 95 % interval over images (None for one group), the mean of each seed.
    """
    pairs = np.array([np.subtract(ours[s], theirs[s]) for s in ours if s in theirs])
    low, high = bootstrap_interval(pairs.mean(0), np.array(groups))
    return pairs.mean(), low, high, pairs.mean(1)


def in_words(ours, theirs, groups):
    """A difference as a cell: its mean, its interval, and a * where chance hardly explains it: the
    interval leaves out 0, and all seeds, two or more, agree about the sign.
    """
    if not ours.keys() & theirs.keys():
        return "-"
    mean, low, high, seeds = difference(ours, theirs, groups)
    if low is None:
        return f"{mean:+.3f}"
    agree = len(seeds) > 1 and abs(np.sign(seeds).sum()) == len(seeds)
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f}){'*' if agree and low * high > 0 else ''}"


# ---- tables ----


def markdown(rows):
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def score_table(experiment, results):
    """{row: (compared with, changes)}, {row: {seed: result}} -> a line for each row with results;
    columns that hold nothing are left out.
    """
    extra = {
        k: title
        for k, title in EXTRA.items()
        if any(k in run["scores"] for runs in results.values() for run in runs.values())
    }
    lines = [["row", "compared with", "what differs", "paper", "Dice (seeds)", "difference",
              *extra.values(), "last third - second", "M parameters", "s"]]  # fmt: skip
    for name, runs in results.items():
        than, changes = experiment[name]
        groups = next(iter(runs.values()))["groups"]
        levels = {seed: plateau(run) for seed, run in runs.items()}
        others = {seed: plateau(run) for seed, run in results.get(than, {}).items()}
        means = [level.mean() for level in levels.values()]
        rise = np.mean([np.diff(thirds(run).mean(1))[1] for run in runs.values()])
        seconds = np.mean([run["seconds"] for run in runs.values()])
        parameters = next(iter(runs.values()))["parameters"]
        lines.append([
            name,
            than or "-",
            what_differs(than, changes),
            f"{PAPER_DICE[name]:.3f}" if name in PAPER_DICE else "-",
            f"{np.mean(means):.3f} ({', '.join(f'{mean:.3f}' for mean in means)})",
            in_words(levels, others, groups),
            *(more_calls(runs, key, groups) for key in extra),
            f"{rise:+.3f}",
            f"{parameters / 1e6:.1f}",
            f"{seconds:.0f}",
        ])  # fmt: skip
    columns = [column for column in zip(*lines) if set(column[1:]) != {"-"}]
    return markdown(list(zip(*columns)))


def what_differs(than, changes):
    if than is None:
        return "the paper's row 1" if changes else "nano's recipe"
    return ", ".join(f"{key} {value}" for key, value in changes.items())


def more_calls(runs, key, groups):
    """The last model's score `key` minus that of one step and one sample, as a cell; "other" as
    zeros minus noise, whichever of them the row was trained with.
    """
    first = next(iter(runs.values()))
    if key not in first["scores"]:
        return "-"
    pair = [{seed: run["scores"][k] for seed, run in runs.items()} for k in (key, "1x1")]
    if key == "other" and first["settings"]["start"] == "zeros":
        pair.reverse()
    return in_words(*pair, groups)


def error_table(results):
    """A line for each row with z_0 estimates: error / Dice by noise level, means over the seeds."""
    lines = []
    for name, runs in results.items():
        errors = [run["z_0_errors"] for run in runs.values() if run["z_0_errors"]]
        if errors:
            levels = list(errors[0])
            means = [np.mean([e[level] for e in errors], 0) for level in levels]
            lines.append([name, *(f"{error:.2f} / {dice:.2f}" for error, dice in means)])
            header = ["row", *(f"t = {x}" if x.isdigit() else x for x in levels)]
    return markdown([header, *lines]) if lines else "-"


def report(folder, experiments):
    """Write report.md and claims.png into the folder of the JSONs, and print the former.

    experiments: {name: {row: (the row it is compared with, {what differs: value})}}.
    """
    results = load_results(folder, [name for rows in experiments.values() for name in rows])
    run = next(iter(next(iter(results.values())).values()))
    seeds = sorted({seed for runs in results.values() for seed in runs})
    text = (
        f"{run['settings']['data']}, {len(run['groups'])} validation "
        f"images in {len(set(run['groups']))} groups; {run['samples']:,} samples a run in batches "
        f"of {run['settings']['batch_size']}, rate {run['settings']['lr']}, constant after the "
        f"warm-up, EMA {run['settings']['ema']}; seeds {', '.join(map(str, seeds))}; "
        f"{run['device']}, torch {run['torch']}, {run['jobs']} runs side by side. Dice is the mean "
        "over the last third of the run, one step, one sample. A difference is the mean over seeds "
        "and images, with its 95 % interval over images; * means that the interval leaves out 0 "
        "and all seeds agree. More steps and samples are scored with the last weights.\n"
    )
    parts = {x: {n: results[n] for n in rows if n in results} for x, rows in experiments.items()}
    for name, part in parts.items():
        if part:
            size = next(iter(next(iter(part.values())).values()))["settings"]["size"]
            text += f"\n## {name}: images of {size} px\n\n{score_table(experiments[name], part)}\n"
    text += ("\n## z_0 estimate of one call: mean |z_0~ - z_0| / Dice of its mask, by noise level"
             f"\n\n{error_table(results)}\n")  # fmt: skip
    with atomic_write(Path(folder) / "report.md") as temporary:
        temporary.write_text(text)
    write_image(Path(folder) / "claims.png", draw(*parts.values()))
    print(text)


# ---- the figure ----


def draw(faithful, helps):
    """Figure 3, the mask of the z_0 estimate by noise level, and the runs -> uint8 image."""
    steps, levels, curves = {}, {}, {}
    for name, runs in faithful.items():
        names = [key for key in next(iter(runs.values()))["scores"] if key.endswith("x1")]
        dice = [np.mean([run["scores"][key] for run in runs.values()]) for key in names]
        steps[name] = ([np.log10(int(key[:-2])) for key in names], dice)
        errors = [run["z_0_errors"] for run in runs.values()]
        ts = [key for key in errors[0] if key.isdigit()]
        levels[name] = (list(map(int, ts)), [np.mean([e[t][1] for e in errors]) for t in ts])
    for name in (name for name in IN_FIGURE if name in helps):
        curve = [run["curve"] for run in helps[name].values()]
        dice = [[np.mean(point["dice"]) for point in points] for points in curve]
        curves[name] = ([point["samples"] / 1000 for point in curve[0]], np.mean(dice, 0))
    logs = {f"{n}": np.log10(n) for n in (1, 2, 5, 10, 50)}
    return plot_panels([
        ("Dice against DDIM steps", steps, logs, (0, 1)),
        ("Dice of one call's z_0 estimate against t", levels, None, (0, 1)),
        ("Dice against thousands of samples seen", curves, None, (0, 1)),
    ])  # fmt: skip
