"""The figures of benchmarks and plans as text, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jlt.report.wording import number, percent, text_table
from jlt.runtime.progress import format_seconds

DOES_NOT_FIT = "does not fit"
WAYS = {
    "loader": "the trainer's loader",
    "gather": "gather into new memory, not ahead",
    "memory_copy": "copy of batches in memory",
    "per_sample_alone": "per sample through safetensors",
    "per_sample_workers": "... in worker processes",
}
SECTIONS = {
    "work": "work",
    "memory": "memory of one process",
    "disk": "disk",
    "time": "time",
    "measured": "measured on this machine",
}
HOURS_AS_DAYS = 48
LARGE_NETWORK = 50e6
"""Parameters beyond those of the recipes for photographs."""
GOOD_MFU = 0.4
"""Share of the speed of a matrix product from which an update counts as fast: the assumption of `jlt plan`."""
GOOD_RATIO = 0.95
"""Share of the bare speed from which what surrounds it counts as cheap."""
PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")


def benchmark_table(result: Mapping[str, Any]) -> str:
    """Return all that a training benchmark found, the fastest batch size of each network starred."""
    first = result["measured"][0]
    how = f"{first['precision']}, {'compiled' if first['compile'] else 'eager'}"
    title = [f"the update, {how}", "img/s", "s/step", "GFLOP/s", "product's", "MFU", "peak GiB", "warm-up"]
    parts = [text_table(title, [_update(entry, result["best"]) for entry in result["measured"]])]
    for name, loop in result["loop"].items():
        rows = [[loop["error"], ""]] if "error" in loop else _loop(loop)
        parts.append(text_table([f"{name}, the training loop", ""], rows))
    for name, profile in result["profile"].items():
        rows = [[profile["error"], ""]] if "error" in profile else _profile(profile)
        parts.append(text_table([f"{name}, where a step goes", "share"], rows))
    for name, compared in result["compare"].items():
        title = [f"{name}, batch {compared[0]['batch_size']}", "img/s", "against eager", "peak GiB"]
        parts.append(text_table(title, [_variant(entry) for entry in compared]))
    return "\n\n".join([*parts, *filter(None, [*_judged(result), result["warning"]])])


def _judged(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield whether the fastest update of each network, and the loop around it, are fast."""
    for entry in result["measured"]:
        if entry["out_of_memory"] or result["best"][entry["preset"]] != entry["batch_size"]:
            continue
        good = entry["mfu"] >= GOOD_MFU
        verdict = (
            "at least what jlt plan assumes" if good else "less than jlt plan assumes; try --compile or larger batches"
        )
        yield f"{entry['preset']}: an update reaches {entry['mfu']:.0%} of the speed of a matrix product, {verdict}."
    for name, loop in result["loop"].items():
        if "ratio" in loop:
            good = loop["ratio"] >= GOOD_RATIO
            verdict = "little is lost" if good else "the rows above show whether it waits for data or for saving"
            yield f"{name}: the training loop reaches {loop['ratio']:.0%} of the speed of the bare update: {verdict}."


def _update(entry: Mapping[str, Any], best: Mapping[str, int]) -> list[str]:
    name = f"{entry['preset']}, batch {entry['batch_size']}"
    if entry["out_of_memory"]:
        return [f"{name}: {DOES_NOT_FIT}", *[""] * 7]
    star = " *" if best[entry["preset"]] == entry["batch_size"] else "  "
    rates = [number(entry[key]) for key in ("seconds_per_step", "gflops", "matmul_gflops")]
    memory, warmup = number(entry["peak_memory_gib"]), format_seconds(entry["warmup_seconds"])
    return [name, number(entry["img_per_second"]) + star, *rates, f"{entry['mfu']:.1%}", memory, warmup]


def _loop(loop: Mapping[str, Any]) -> list[list[str]]:
    growth = f"memory growth over {loop['growth_steps']} steps, MiB"
    return [
        ["images per second", number(loop["img_per_second"])],
        ["against the bare update", f"{loop['ratio']:.1%}"],
        ["waiting for data", percent(loop["waiting"])],
        ["pause of a save, s", number(loop["pause_seconds"])],
        ["writing it during the training, s", number(loop["write_seconds"])],
        [growth, number(loop["growth_mib"])],
    ]


def _profile(profile: Mapping[str, Any]) -> list[list[str]]:
    idle = {} if profile["idle"] is None else {"device idle, of the wall time": profile["idle"]}
    return [[name[:70], percent(share)] for name, share in {**profile["shares"], **idle}.items()]


def _variant(entry: Mapping[str, Any]) -> list[str]:
    if entry["out_of_memory"]:
        return [f"{entry['variant']}: {DOES_NOT_FIT}", "", "", ""]
    ratio = number(entry.get("ratio"))
    return [entry["variant"], number(entry["img_per_second"]), ratio, number(entry["peak_memory_gib"])]


def sample_benchmark_table(result: Mapping[str, Any]) -> str:
    """Return what a sampling benchmark found."""
    low, high = result["cfg_interval"]
    how = f"{result['precision']}, {'compiled' if result['compile'] else 'eager'}, batch {result['batch_size']}"
    title = f"{result['name']}, {result['steps']}-step {result['solver']}, {how}"
    rounds = ", ".join(number(ratio, 3) for ratio in result["ratio_by_round"])
    rows = [
        ["images per second, latents alone", number(result["img_per_second"])],
        ["images per second, decoded", number(result["img_per_second_decoded"])],
        [f"decoding alone ({result['autoencoder']})", number(result["decoded_per_second"])],
        ["evaluations per second and image (NFE/s)", number(result["nfe_per_second"])],
        ["NFE of a branch", str(result["nfe"])],
        [f"NFE with both branches in ({low:g}, {high:g})", str(result["rows_per_image"])],
        ["a plain loop, eager, images per second", number(result["plain_img_per_second"])],
        ["ratio, median of the rounds", number(result["ratio"], 3)],
        ["ratio, by round", rounds],
        ["ratio, both eager", number(result["eager_ratio"], 3)],
        ["matrix product, GFLOP/s", number(result["matmul_gflops"])],
        ["MFU", f"{result['mfu']:.1%}"],
        ["peak memory, GiB", number(result["peak_memory_gib"])],
    ]
    faster = "faster than" if result["ratio"] >= 1 else "slower than"
    sentence = f"Sampling is {faster} a plain loop of the same network, by a factor of {number(result['ratio'], 3)}."
    return f"{text_table([title, ''], rows)}\n\n{sentence}"


def geometry_benchmark_table(result: Mapping[str, Any]) -> str:
    """Return what a benchmark of measuring a space found."""
    rows = []
    for size, entry in result["tokens"].items():
        rounds = ", ".join(number(ratio, 2) for ratio in entry["ratio_by_round"])
        rows += [
            [f"patch {size}: covariance of tokens, latents per second", number(entry["latents_per_second"])],
            ["... a bare product of these tokens", number(entry["product_latents_per_second"])],
            [f"... ratio (rounds {rounds})", number(entry["ratio"], 2)],
        ]
    rows += [
        [f"a pass over {result['count']:,} latents, latents per second", number(result["latents_per_second"])],
        ["1,281,167 latents of ImageNet, minutes", number(result["imagenet_minutes"])],
        ["peak memory, MiB", number(result["peak_memory_mib"], 4)],
    ]
    table = text_table([f"latents of {_size(result)}, float64", ""], rows)
    return f"{table}\n\nA ratio near 1 is as fast as the product that the covariance is made of."


def encode_benchmark_table(measured: Mapping[str, Any]) -> str:
    """Return the figures of the encoding benchmark."""
    rows = [
        ["images per second, encoding", number(measured["img_per_second"])],
        ["images per second, autoencoder alone", number(measured["bare_img_per_second"])],
        ["ratio", f"{measured['ratio']:.1%}"],
        ["peak memory, MiB", number(measured["peak_memory_mib"], 4)],
    ]
    name, precision = measured["autoencoder"]["name"], measured["precision"]
    title = f"{name}, {measured['resolution']} px, batch {measured['batch_size']}, {precision}"
    good = measured["ratio"] >= GOOD_RATIO
    verdict = "little is lost" if good else "decoding or writing limits it; try more --workers"
    sentence = f"Encoding reaches {measured['ratio']:.0%} of the autoencoder's own speed: {verdict}."
    return f"{text_table([title, ''], rows)}\n\n{sentence}"


def data_benchmark_table(measured: Mapping[str, Any]) -> str:
    """Return the figures of a benchmark of reading."""
    rates, ratios = measured["latents_per_second"], measured["loader_ratio"]
    rows = [[label, f"{rates[way]:,.0f}", number(ratios[way])] for way, label in WAYS.items()]
    latents = f"{measured['latents']['count']} latents, {_size(measured)} {measured['dtype']}"
    table = text_table([f"{latents}, batch {measured['batch_size']}", "latents/s", "loader's ratio"], rows)
    return f"{table}\n\nThe loader does not slow down a training of up to {rates['loader']:,.0f} images per second."


def _size(result: Mapping[str, Any]) -> str:
    return "x".join(map(str, result["shape"]))


def plan_table(plan: Mapping[str, Any]) -> str:
    """Return a plan, a table per section, and whether the run fits."""
    config = plan["config"]
    where = "this machine's CPU" if plan["gpu"] == "cpu" else plan["gpu"]
    title = f"{config['name']} on {plan['processes']} x {where}, {config['precision']}, {config['parallel']}"
    title += ", compiled" if config["compile"] else ", eager"
    title += ", gradient checkpointing" if config["gradient_checkpointing"] else ""
    parts = [title]
    for section, heading in SECTIONS.items():
        rows = [[name.replace("_", " "), quantity(entry), entry["source"]] for name, entry in plan[section].items()]
        if rows:
            parts.append(text_table([heading, "", "source"], rows, left=(0, 2), widths={0: 25, 1: 16}))
    return "\n\n".join([*parts, _verdict(plan)])


def quantity(figure: Mapping[str, Any]) -> str:
    """Format a figure with its unit: 130,508,672, 20.1 GiB, 138 GFLOP, 989 TFLOP/s, 40.0%."""
    value, unit = figure["value"], figure["unit"]
    if unit == "bytes":
        return memory(value)
    if unit == "count":
        return f"{value:,}" if float(value).is_integer() else number(value)
    if unit in ("FLOP", "FLOP/s"):
        # The prefix that leaves one to three digits before the point.
        power = sum(value >= 1000**power for power in range(1, len(PREFIXES)))
        return f"{number(value / 1000**power)} {PREFIXES[power]}{unit}"
    if unit == "seconds":
        return f"{number(value)} s"
    return {"share": percent, "hours": _hours, "per second": number}[unit](value)


def memory(value: float) -> str:
    """Format bytes in GiB, smaller ones in MiB and KiB."""
    if value == 0:
        return "0"
    power = 3 if value >= 2**30 else 2 if value >= 2**20 else 1
    return f"{number(value / 2 ** (10 * power))} {('KiB', 'MiB', 'GiB')[power - 1]}"


def _hours(value: float) -> str:
    return f"{number(value)} h" if value >= 1 else format_seconds(3600 * value)


def _verdict(plan: Mapping[str, Any]) -> str:
    total, available = (memory(plan["memory"][name]["value"]) for name in ("total", "available"))
    if plan["fits"]:
        largest = plan["largest_micro_batch_size"]
        share = plan["work"]["micro_batch_size"]["value"] * plan["work"]["accumulation"]["value"]
        whole = f"A process's whole share of a batch, {share:,} samples, fits at once."
        part = f"The largest micro-batch that fits and divides a process's {share:,} samples is {largest}."
        return f"It fits: {total} of {available}. {whole if largest == share else part}"
    if not plan["ways_to_fit"]:
        return f"It does not fit: {total}, and there are {available}. No batch fits: take more or larger GPUs."
    ways = [
        [_options(way["settings"]), memory(way["bytes"]), _hours(way["seconds"] / 3600)] for way in plan["ways_to_fit"]
    ]
    table = text_table(["what would make it fit", "memory", "training"], ways)
    return f"It does not fit: {total}, and there are {available}.\n\n{table}"


def refusal(plan: Mapping[str, Any], together: int = 1) -> str:
    """State that a training does not fit on this machine, and the fastest settings with which it does."""
    total, available = (memory(plan["memory"][name]["value"]) for name in ("total", "available"))
    of = f", with {together} systems at a time (--workers 1 has one)" if together > 1 else ""
    text = f"{plan['config']['name']} needs {total} of memory, and there are {available}{of}."
    ways = sorted(plan["ways_to_fit"], key=lambda way: way["seconds"])
    if ways:
        needed, hours = memory(ways[0]["bytes"]), ways[0]["seconds"] / 3600
        length = _hours(hours) if hours < HOURS_AS_DAYS else f"{number(hours / 24, 2)} days"
        text += f" It fits with {_options(ways[0]['settings'])}: {needed}, about {length} of training."
    else:
        text += " No batch fits: take a smaller network."
    large = plan["work"]["parameters"]["value"] > LARGE_NETWORK
    return f"{text} The recipes laptop and photos are smaller." if large else text


def _options(settings: Mapping[str, Any]) -> str:
    """Return settings as options of the command line."""
    options = [(f"--{name.replace('_', '-')}", value) for name, value in settings.items()]
    return " ".join(option if value is True else f"{option} {value}" for option, value in options)
