"""Training through `model.fit`: tokens/s, step time, first step, peak memory, and the matmul limit.

    python benchmarks/train.py [--short] [--profile] [--output DIR] [--data_dir DIR]

Setting "300K": the wikitext2 recipes as they are (at most 300K parameters, vocabulary 2,048, length
256, batch 128), some under the policy mixed_bfloat16, and ELiTA's published equations taken
literally, with Keras' defaults and with XLA.
Setting "large" (not with --short): the same recipes at width 512, 6 blocks, length 1,024, batch 8.
Setting "deep" (not with --short): the 12 blocks of gla-gpt2-wikitext2 from random embeddings, as
the recipe compiles them, as one program of XLA, and without XLA.

Every case trains in a child process of its own, cases in turn, so the peak memory is its own. The
matmul limit is the time that a step's matrix products take at the GEMM rate, measured in the same
child right after: where the rates of two cases differ, something else was running, and the ratio
step_over_limit is the fairer one. Speed does not depend on the text: without --data_dir token ids
are random.

`--profile` says instead where a step of `elita_gated`, `gla` and `transformer` in the setting
"300K" goes, by kind of work.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import baselines
import harness
import keras
import numpy as np
import step_profile
import tensorflow as tf
from cases import (
    LITERAL,
    Case,
    StepTimes,
    load_recipe,
    matmul_flops,
    token_windows,
    training_cases,
)
from matplotlib.figure import Figure

# Steps that are not timed: the first traces and compiles, the second warms up.
SKIPPED_STEPS = 2
# How far the sizes of the package's ELiTA and of the literal one may be apart.
SIZE_BOUND = 0.05
# Of the loss, whose logits are made of bfloat16 features.
MIXED_BOUND = 1e-2
# Rows of the first batch on which the loss is checked.
PARITY_ROWS = 4
PROFILED = ("elita_gated", "gla", "transformer")
TINY = ("vocabulary_size=50", "num_layers=2", "hidden_dim=12", "num_heads=3")


def parities(cases: list[Case], windows: np.ndarray) -> dict[str, float]:
    """The error of every case's loss; a model and the literal one must be of one size."""
    errors, sizes = {}, {}
    for case in cases:
        bound = harness.PARITY_BOUND if case.policy == "float32" else MIXED_BOUND
        errors[case.name] = harness.require_parity(case.name, parity(case, windows), bound)
        sizes[case.name] = case.build().count_params()
    if LITERAL in sizes:
        difference = sizes[LITERAL] / sizes["elita"] - 1
        harness.require_parity("size of the baseline", abs(difference), SIZE_BOUND)
    return errors


def parity(case: Case, windows: np.ndarray) -> float:
    """Error of the loss that `fit` computes against materialised logits in float64."""
    token_ids, labels = windows[:PARITY_ROWS, :-1], windows[:PARITY_ROWS, 1:]
    if case.literal:
        case = case._replace(recipe=load_recipe("elita-wikitext2", TINY))
        token_ids, labels = token_ids[:, :17] % 50, labels[:, :17] % 50
    model = case.build()
    harness.randomize(model)
    loss = model.evaluate({"token_ids": token_ids}, labels, len(labels), verbose=0)
    if case.literal:
        logits = baselines.literal_elita_logits(model, token_ids)
    else:
        exact = case.build("float64")
        exact.set_weights(model.get_weights())
        logits = keras.ops.convert_to_numpy(exact({"token_ids": token_ids}))
    return harness.relative_error([loss], [baselines.mean_cross_entropy(logits, labels)])


def measure(case: Case, windows: np.ndarray) -> dict[str, Any]:
    """Train on all the windows once and say what it took."""
    before = harness.peak_memory()
    model, times = case.build(), StepTimes()
    inputs, labels = {"token_ids": windows[:, :-1]}, windows[:, 1:]
    # Batches of one shape, as those of the recipes.
    batches = tf.data.Dataset.from_tensor_slices((inputs, labels))
    batches = batches.batch(case.recipe.batch_size, drop_remainder=True)
    model.fit(batches, callbacks=[times], verbose=0)
    return {
        "parameters": model.count_params(),
        "step_seconds": times.seconds[SKIPPED_STEPS:],
        "first_step_seconds": times.seconds[0],
        "memory_before_model_bytes": before,
        "peak_memory_bytes": harness.peak_memory(),
        "matmul_flops": matmul_flops(model, case.recipe),
        "gemm_flops_per_second": harness.gemm_rate(),
    }


def result(case: Case, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians over all turns of a case, and the largest peak."""
    recipe = case.recipe
    step = statistics.median(s for run in runs for s in run["step_seconds"])
    rate = statistics.median(run["gemm_flops_per_second"] for run in runs)
    limit = runs[0]["matmul_flops"] / rate
    return {
        "step_seconds": step,
        "steps": sum(len(run["step_seconds"]) for run in runs),
        "tokens_per_second": recipe.batch_size * recipe.context_length / step,
        "first_step_seconds": statistics.median(run["first_step_seconds"] for run in runs),
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        "memory_before_model_bytes": runs[0]["memory_before_model_bytes"],
        "matmul_limit_seconds": limit,
        "step_over_limit": step / limit,
        "matmul_flops": runs[0]["matmul_flops"],
        "gemm_flops_per_second": rate,
        "parameters": runs[0]["parameters"],
        "jit_compile": case.jit_compile,
        "policy": case.policy,
        "batch": recipe.batch_size,
        "length": recipe.context_length,
        "vocabulary_size": recipe.vocabulary_size,
        "width": recipe.hidden_dim,
        "blocks": recipe.num_layers,
    }


def run(cases: list[Case], options: argparse.Namespace, report: harness.Report) -> None:
    """Check all cases of a setting, then let them take turns."""
    setting, recipe = cases[0].setting, cases[0].recipe
    steps, turns = (7, 1) if options.short else (8, 2)
    windows = harness.in_child(token_windows, recipe, steps, options.data_dir)
    harness.progress(f"{setting}: parity of {len(cases)} cases")
    errors = harness.in_child(parities, cases, windows)
    runs: dict[str, list[dict[str, Any]]] = {case.name: [] for case in cases}
    for turn in range(turns):
        for case in cases:
            harness.progress(f"{setting}: {case.name}, turn {turn + 1} of {turns}")
            runs[case.name].append(harness.in_child(measure, case, windows))
    results = {case.name: result(case, runs[case.name]) for case in cases}
    first, *_ = results
    for name, fields in results.items():
        ratio = {f"over_{first}": fields["step_seconds"] / results[first]["step_seconds"]}
        checked = {"parity_error": errors[name], "tokens": str(options.data_dir or "random")}
        report.write(setting=setting, case=name, **fields, **ratio, **checked)


def profiles(report: harness.Report, data_dir: Path | None) -> None:
    """Where a step goes, a line of every case."""
    cases = [case for case in training_cases(short=True) if case.name in PROFILED]
    windows = harness.in_child(token_windows, cases[0].recipe, step_profile.STEPS, data_dir)
    errors = harness.in_child(parities, cases, windows)
    for case in cases:
        harness.progress(f"profile of {case.name}")
        found = harness.in_child(step_profile.profile, case, windows)
        report.write(case=case.name, **found, parity_error=errors[case.name])
    report.save(step_profile.plot(report.lines))


def plot(lines: list[dict[str, Any]]) -> Figure:
    """Bars of every case: step with the matmul limit, first step, memory; a row per setting."""
    settings = list(dict.fromkeys(line["setting"] for line in lines))
    title = "Training through model.fit; lines: the matmul limit, and memory before the model"
    figure, axes = harness.panels(len(settings), 3, title)
    columns = (
        ("step_seconds", "step (s)", 1.0, "matmul_limit_seconds"),
        ("first_step_seconds", "first step: trace, compile (s)", 1.0, None),
        (
            "peak_memory_bytes",
            "peak memory (GB)",
            1e9,
            "memory_before_model_bytes",
        ),
    )
    for row, setting in zip(axes, settings, strict=True):
        chosen = [line for line in lines if line["setting"] == setting][::-1]
        names = [line["case"] for line in chosen]
        for panel, (field, label, unit, floor) in zip(row, columns, strict=True):
            bars = panel.barh(names, [line[field] / unit for line in chosen], color="tab:blue")
            panel.bar_label(bars, fmt="%.2f", padding=2)
            panel.margins(x=0.15)
            panel.set(title=f"{setting}: {label}")
            if floor:
                for height, line in enumerate(chosen):
                    panel.plot(
                        [line[floor] / unit] * 2, [height - 0.4, height + 0.4], color="black"
                    )
    for panel in axes[:, 1:].flat:
        panel.set_yticklabels([])
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Check, train, write."""
    options = harness.parse(__doc__, arguments, profile="only: where a step goes")
    if options.profile:
        profiles(harness.Report("profile", options), options.data_dir)
        return
    report = harness.Report("train", options)
    by_setting: dict[str, list[Case]] = {}
    for case in training_cases(options.short):
        by_setting.setdefault(case.setting, []).append(case)
    for chosen in by_setting.values():
        run(chosen, options, report)
    report.save(plot(report.lines))


if __name__ == "__main__":
    main()
