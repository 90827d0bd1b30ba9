"""Does NaPO keep its gain where preferences are wrong? Methods, noise and seeds on the small world.

    python benchmarks/world_study.py prepare                 # exams, pairs, their built answers and their noise
    python benchmarks/world_study.py search  [--share 0/2]   # a learning rate for each method, on a seed of its own
    python benchmarks/world_study.py run     [--share 0/2]   # every method x noise x seed
    python benchmarks/world_study.py report                  # results/world_study.json, the table and the plot

Every run is `napo_jax.train` on the shipped base model: the same steps, batches and order for all methods. Noise is the
share of the preferences over built answers that are the wrong way round: there the built answer is the one preferred.
(Where it says the same as the chosen one there is no preference, and nothing to turn. The original pair is never
turned, and built answers weigh nothing in the methods of `QUIET`: one run stands for every noise.)

Learning rates are chosen by other pairs and other exams than those that are reported. They are tried by factors of two
until the best has one on either side that is not better. Intervals are over seeds, which draw the pairs, the noise and
the order; all are examined by the same questions.

The methods of `PICTURED` compare pictures too: with noise where the base model's own evidence finds what the chosen
answer names (MFPO), cropped (mDPO), noisy all over (CHiP), the most alike of another row (rDPO), without the thing that
the question is about (AdaViP). Of the answers they read the original pair alone.

Runs that are there are not done again; a folder belongs to one base model and one recipe, to which methods may be
added. `--share i/n` does every n-th method of the search or run of the study, so that n processes divide them; each
takes one core. `report` needs `pip install -e .[docs]`.

The last line of `report` is JSON; `gain_kept` is the accuracy, in points over the base model, that NaPO and DPO gain at
the most noise, null for a method of which a run broke down there.
"""

import argparse
import dataclasses
import functools
import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from napo_jax import build_bias, build_regions, build_retrieved
from napo_jax.command import exit_with_one_line
from napo_jax.config import ModelConfig
from napo_jax.demo import build_options
from napo_jax.journal import StoppedError, exit_when_stopped
from napo_jax.losses import dpo_loss, sft_loss, token_kl_loss
from napo_jax.methods import adavip, chip, mdpo, mfpo, napo, napo_released, rdpo
from napo_jax.metrics import Console
from napo_jax.model_source import find_model, load_leaves
from napo_jax.objective import Objective
from napo_jax.optim import unflatten
from napo_jax.pieces import write_durably
from napo_jax.sharding import MeshConfig, make_mesh
from napo_jax.speaker import load_speaker
from napo_jax.term import Term
from napo_jax.train import settings_of, train
from napo_jax.versions import versions
from napo_jax.world.configs import BASE, BETA, cure
from napo_jax.world.examine import Examiner, in_short, write_exams
from napo_jax.world.make_base import CARD, file_digest
from napo_jax.world.records import write_pairs

NOISE = (0, 20, 40)  # percent
SEEDS = (1, 2, 3, 4, 5)
PAIRS, STEPS = 2000, 60  # half of the demo's, for there are a hundred runs
SEARCH_SEED, SEARCH_NOISE = 11, 20
RATES = tuple(2e-4 * 2.0**power for power in range(-5, 6))  # that may be tried, from the middle
EXAM_SEEDS = {"exams": 0, "search_exams": 1000}  # what is added to the exams' own seeds
BUILT = ("question_only", "image_only")
RESULTS = Path(__file__).parent / "results" / "world_study.json"


def _dpo_of_all():
    pair = lambda name, other: Term(name, dpo_loss, "chosen", other, options={"beta": BETA})
    return Objective(
        (pair("preference", "rejected"), pair("language_bias", "question_only"), pair("vision_bias", "image_only"))
    )


def _with_terms(objective, change):
    return dataclasses.replace(objective, terms=tuple(map(change, objective.terms)))


def _fix_q(term):
    options = {"beta": BETA, "q": 0.5}
    return dataclasses.replace(term, options=options) if term.name != "preference" else term


def _with_batches(*terms):
    """Returns terms with the pairs of all others, which weigh nothing: they are there for the same batches."""
    there = {term.name for term in terms}
    rest = (dataclasses.replace(term, weight=0.0) for term in _dpo_of_all().terms if term.name not in there)
    return Objective((*terms, *rest))


METHODS = {
    "dpo": _dpo_of_all(),
    "napo": napo(beta=BETA),
    "napo_released": napo_released(beta=BETA),
    "fixed_q": _with_terms(napo(beta=BETA), _fix_q),
    "napo_static": napo(beta=BETA, weight=1.0),
    "dpo_original": _with_batches(_dpo_of_all().terms[0]),
    "sft": _with_batches(Term("likelihood", sft_loss, "chosen")),
    "mfpo": _with_batches(*mfpo(beta=BETA).terms),
    "mdpo": _with_batches(*mdpo(beta=BETA).terms),
    "chip": _with_batches(*chip(beta=BETA).terms),
    "rdpo": _with_batches(*rdpo(beta=BETA).terms),
    "adavip": _with_batches(*adavip(beta=BETA).terms),
}
PICTURED = ("mfpo", "mdpo", "chip", "rdpo", "adavip")
QUIET = ("dpo_original", "sft", *PICTURED)  # to which built answers are nothing, and so is their noise
# Where their pictures stand in the rows, where not under the usual name.
COLUMNS = {"mfpo": {"region": "marked_region"}, "rdpo": {"rejected_image": "retrieved_image"}}


def preferred_to(answer):
    """Returns the name of the answer that is held against a built one: its pair may be the wrong way round."""
    return f"over_{answer}"


def with_own_pairs(objective):
    """Returns the objective with a preferred answer of its own for each pair with a built one."""

    def change(term):
        built = term.other in BUILT
        return dataclasses.replace(term, preferred=preferred_to(term.other)) if built else term

    return _with_terms(objective, change)


def write_noisy(built, path, noise, seed, pictures=None):
    """Writes the pairs with a share of those over built answers turned round, of each kind on its own.

    Args:
      built: the file of the pairs with their built answers.
      path: of the file to write.
      noise: the share, in percent.
      seed: of those that are turned.
      pictures: {column: its values for the same rows} to add.
    """
    table = pq.read_table(built)
    for name, values in (pictures or {}).items():
        table = table.append_column(name, values)
    # A method that does not read an answer would keep a row that lacks it, and have another order.
    table = table.filter([None not in row for row in zip(*(table[name].to_pylist() for name in BUILT), strict=True)])
    for kind, name in enumerate(BUILT):
        wrong = np.random.default_rng([seed, kind]).random(table.num_rows) * 100 < noise
        good, biased = table["chosen"].to_pylist(), table[name].to_pylist()
        swap = lambda here, there, wrong=wrong: [b if w else a for a, b, w in zip(here, there, wrong, strict=True)]
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.array(swap(biased, good), pa.string()))
        table = table.append_column(preferred_to(name), pa.array(swap(good, biased), pa.string()))
    pq.write_table(table, f"{path}.new", row_group_size=256)
    Path(f"{path}.new").rename(path)


class Study:
    """The runs, in a folder."""

    def __init__(self, folder):
        """Takes the folder."""
        self.folder, self.console = Path(folder), Console()
        self.examiner = functools.cache(self._examiner)
        (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        mine, file = recipe(), self.folder / "recipe.json"
        there = json.loads(file.read_text()) if file.exists() else mine | {"methods": {}}
        if there | {"methods": mine["methods"] | there["methods"]} != mine:
            raise ValueError(f"{folder} is of another base model or recipe; name another with --folder")
        write_durably(epath.Path(file), json.dumps(mine))

    def prepare(self, seeds):
        """Writes the exams, the pairs with their built answers, and their noise, where they are not there yet."""
        for name, shift in EXAM_SEEDS.items():
            if not (self.folder / name).exists():
                aside = self.folder / f"{name}.new"
                shutil.rmtree(aside, ignore_errors=True)
                write_exams(aside, shift)
                aside.rename(self.folder / name)
        for seed in seeds:
            pairs, built = self.folder / f"pairs{seed}" / "pairs.parquet", self.folder / f"built{seed}"
            if not pairs.exists():
                pairs.parent.mkdir(exist_ok=True)
                write_pairs(pairs, PAIRS, seed=1000 + seed, pictures=True)
            build_bias.build(cure(), build_options(pairs, built), self.console)
            pictures = self._pictures(pairs, seed)
            for noise in NOISE:
                if not self._data(seed, noise).exists():
                    write_noisy(built / pairs.name, self._data(seed, noise), noise, seed, pictures)

    def _pictures(self, pairs, seed) -> dict[str, pa.ChunkedArray]:
        """Returns the columns that the image-side commands build, as a user would have them built."""
        plain = self.folder / f"plain{seed}" / pairs.name  # without what the world itself knows of regions and pictures
        if not plain.exists():
            plain.parent.mkdir(exist_ok=True)
            pq.write_table(pq.read_table(pairs).drop_columns(["region", "rejected_image"]), plain)
        config, asked = cure(), {"input": (str(plain),), "batch": 64}
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache=f"{self.folder}/cache"))
        marked, retrieved = (self.folder / f"{name}{seed}" for name in ("marked", "retrieved"))
        build_regions.build(config, build_regions.Options(output=str(marked), **asked), self.console)
        build_retrieved.build(config, build_retrieved.Options(output=str(retrieved), **asked), self.console)
        column = lambda folder, name: pq.read_table(folder / plain.name, columns=[name])[name]
        found = {
            "marked_region": column(marked, "region"),
            "retrieved_image": column(retrieved, "retrieved_image"),
        }
        for name, values in found.items():
            if values.null_count:  # such rows would be dropped by one method and kept by the others
                raise ValueError(f"{values.null_count} rows of {pairs} have no {name}")
        return found

    def _data(self, seed, noise):
        return self.folder / f"noise{noise}_{seed}.parquet"

    def _result(self, method, noise, seed, rate):
        return self.folder / "runs" / f"{method}_{noise}_{seed}_{rate:g}.json"

    def _examiner(self, exams):
        """Returns the `Examiner` and the model that it asks."""
        speaker = load_speaker(find_model(cure().model), make_mesh(MeshConfig()))
        return Examiner(self.folder / exams, speaker), speaker

    def base(self) -> dict:
        """Returns the base model's row, without noise and seed."""
        file = self.folder / "base.json"
        if not file.exists():
            examiner, _ = self.examiner("exams")
            write_durably(epath.Path(file), json.dumps(row(examiner.score(examiner()))))
        return json.loads(file.read_text())

    def search(self, methods):
        """Does the runs of the search for some methods: until no rate beside the best is left to try."""
        for method in methods:
            while missing := [rate for rate in self.next_rates(method) if self.result(method, rate) is None]:
                self.run([(method, SEARCH_NOISE, SEARCH_SEED, rate) for rate in missing], "search_exams")

    def result(self, method, rate) -> dict | None:
        """Returns what a run of the search gave, None if it was not done."""
        file = self._result(method, SEARCH_NOISE, SEARCH_SEED, rate)
        return json.loads(file.read_text()) if file.exists() else None

    def next_rates(self, method) -> list[float]:
        """Returns the best rate so far and those beside it."""
        accuracy = {rate: found["accuracy"] or 0.0 for rate in RATES if (found := self.result(method, rate))}
        best = RATES.index(max(accuracy, key=accuracy.get)) if accuracy else len(RATES) // 2
        if best in (0, len(RATES) - 1):
            raise ValueError(
                f"{method} does best at {RATES[best]:g}, the last of the rates that are tried: widen RATES"
            )
        return list(RATES[best - 1 : best + 2])

    def run(self, runs, exams):
        """Does runs that are not done yet."""
        runs = [run for run in runs if not self._result(*run).exists()]
        if not runs:
            return
        examiner, speaker = self.examiner(exams)
        for method, noise, seed, rate in runs:
            workdir = self.folder / "work" / f"{method}_{noise}_{seed}_{rate:g}"
            shutil.rmtree(workdir, ignore_errors=True)
            config = config_of(method)
            files = {"path": (str(self._data(seed, noise)),), "cache": f"{self.folder}/cache"}
            config = dataclasses.replace(
                config,
                data=dataclasses.replace(config.data, **files, seed=seed),
                optimizer=dataclasses.replace(config.optimizer, learning_rate=rate),
            )
            try:
                train(config, workdir, self.console)
                leaves = load_leaves(find_model(ModelConfig(path=str(workdir))), speaker.model, speaker.mesh)
                found = row(examiner.score(examiner(unflatten(leaves))))
            except StoppedError as reason:
                if reason.status != 1:
                    raise  # asked to end
                found = {"accuracy": None, "stopped": str(reason).partition(";")[0]}
            self.console.note(f"{method} noise {noise} seed {seed} rate {rate:g}: {found}")
            about = {"method": method, "noise": noise, "seed": seed, "learning_rate": rate}
            write_durably(epath.Path(self._result(method, noise, seed, rate)), json.dumps(about | found))
            shutil.rmtree(workdir)

    def read(self, method, noise, seed, rate) -> dict:
        """Returns the row of a run."""
        file = self._result(method, noise, seed, rate)
        if not file.exists():
            raise ValueError(f"{file} is missing: run `search`, then `run`, to their ends")
        return json.loads(file.read_text())

    def best_rates(self) -> dict[str, float]:
        """Returns the learning rate of each method: that of its best accuracy in the search."""
        rates = {}
        for method in METHODS:
            tried = {rate: self.result(method, rate) for rate in self.next_rates(method)}
            if None in tried.values():
                raise ValueError(f"the search for {method} is not done: run `search` to its end")
            rates[method] = max(tried, key=lambda rate: tried[rate]["accuracy"] or 0.0)
        return rates


def config_of(method):
    """Returns what a method's runs have in common."""
    config = cure()
    data = dataclasses.replace(
        config.data,
        columns={preferred_to(name): preferred_to(name) for name in BUILT} | COLUMNS.get(method, {}),
        held_out=0,
    )
    # CHiP's token term reads whole distributions of the reference, which are not kept.
    reference = "live" if any(term.loss is token_kl_loss for term in METHODS[method].terms) else "cache"
    steps = dataclasses.replace(config.train, steps=STEPS, log_every=20, reference=reference)
    return dataclasses.replace(config, data=data, train=steps, objective=with_own_pairs(METHODS[method]))


def recipe() -> dict:
    """Returns all that decides the results, for JSON."""
    methods = {method: settings_of(config_of(method)) for method in METHODS}
    for settings in methods.values():
        settings["model"]["path"] = settings["data"]["path"] = None  # their places; the card says what they are
    rows = {"pairs": PAIRS, "seeds": list(SEEDS), "noise": list(NOISE)}
    return {"base": file_digest(BASE / CARD), "methods": methods} | rows


def row(scores) -> dict:
    """Returns what a row says of an examined model, in percent; LP is None where no instance came so far."""
    short = in_short(scores)
    accuracy = (short["usual"] + short["changed"]) / 2
    return {
        name: None if value != value else round(value, 3) for name, value in (short | {"accuracy": accuracy}).items()
    }


def study_runs(rates):
    """Returns the runs of the study, seed by seed."""
    every = [(method, noise, seed) for seed in SEEDS for noise in NOISE for method in METHODS]
    return [(*run, rates[run[0]]) for run in every if run[0] not in QUIET or run[1] == 0]


def report(study):
    """Writes the rows and the plot; prints the table and the line of JSON."""
    rates = study.best_rates()
    rows = [{"method": "base", "noise": noise, "seed": seed} | study.base() for seed in SEEDS for noise in NOISE]
    rows += [study.read(*run) for run in study_runs(rates)]
    rows += [row | {"noise": noise} for row in rows if row["method"] in QUIET for noise in NOISE[1:]]
    search = [found for method in METHODS for rate in RATES if (found := study.result(method, rate))]
    RESULTS.parent.mkdir(exist_ok=True)
    lines = {name: ",\n".join(json.dumps(row) for row in some) for name, some in (("rows", rows), ("search", search))}
    parts = [f'"{name}": [\n{text}\n]' for name, text in lines.items()]
    RESULTS.write_text("{" + ",\n".join([*parts, f'"versions": {json.dumps(versions())}']) + "}\n")

    print("\n\n".join((table(rows), differences(rows), pictured(rows), "")))
    accuracies = lambda method, noise: values(rows, method, noise, "accuracy")
    plot(accuracies, Path(__file__).parents[1] / "docs/figures/world_study.svg")
    print("learning rates: " + ", ".join(f"{method} {rate:g}" for method, rate in rates.items()))
    print(
        json.dumps(
            {"benchmark": "world_study", "gain_kept": {method: gain(rows, method) for method in ("napo", "dpo")}}
        )
    )


def gain(rows, method) -> float | None:
    """Returns the mean accuracy over the base model's at the most noise, None if a run broke down there."""
    found = values(rows, method, NOISE[-1], "accuracy")
    base = values(rows, "base", NOISE[-1], "accuracy")
    return round(float(np.mean(found) - np.mean(base)), 2) if len(found) == len(SEEDS) else None


def values(rows, method, noise, name) -> list[float]:
    """Returns a number of all seeds that have it."""
    wanted = [row.get(name) for row in rows if (row["method"], row["noise"]) == (method, noise)]
    return [value for value in wanted if value is not None]


def table(rows) -> str:
    """Returns means and 95% intervals over the seeds, in Markdown."""
    columns = ("accuracy", "usual", "changed", "flood", "CK", "VP", "CB", "LP", "LP_accuracy", "pope_f1", "chair_i")
    lines = ["| method | noise | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for method in ("base", *METHODS):
        quiet = method in ("base", *QUIET)
        for noise in NOISE[: 1 if quiet else None]:
            cells = [interval(values(rows, method, noise, name), exact=method == "base") for name in columns]
            lines.append(f"| {method} | {'any' if quiet else noise} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences(rows) -> str:
    """Returns the accuracy of NaPO in its forms less that of DPO, seed by seed, in Markdown."""
    ours = [method for method in METHODS if method not in ("dpo", "sft", *PICTURED)]  # one of them knows no noise
    lines = ["| less dpo, in accuracy | " + " | ".join(f"noise {noise}" for noise in NOISE) + " |"]
    lines += ["|---|" + "---|" * len(NOISE)]
    for method in ours:
        cells = [_less(rows, method, "dpo", noise, "accuracy") for noise in NOISE]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pictured(rows) -> str:
    """Returns what comparing pictures adds to DPO on the same pair, seed by seed, in Markdown."""
    columns = ("accuracy", "usual", "changed", "CK", "VP", "pope_f1", "chair_i")
    lines = ["| less dpo_original | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for method in PICTURED:
        cells = [_less(rows, method, "dpo_original", NOISE[0], name) for name in columns]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _less(rows, method, other, noise, name) -> str:
    """Returns the interval of a number of one method less that of another, over the seeds that have both."""
    here = [row for row in rows if row["noise"] == noise]
    of = {(row["method"], row["seed"]): row.get(name) for row in here}
    pairs = [(of[method, seed], of[other, seed]) for seed in SEEDS]
    return interval([one - less for one, less in pairs if None not in (one, less)])


def interval(values, exact=False) -> str:
    """Returns the mean with half of its 95% interval, by Student's t, and of how many seeds, if not of all."""
    if not values:
        return "-"
    mean = f"{np.mean(values):.1f}"
    if exact:
        return mean
    few = f" ({len(values)}/{len(SEEDS)})" if len(values) < len(SEEDS) else ""
    if len(values) < 2:
        return mean + few
    quantile = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}[len(values)]
    return f"{mean} ± {quantile * np.std(values, ddof=1) / len(values) ** 0.5:.1f}{few}"


def plot(values, path):
    """Draws accuracy against noise, a line for each method, its seeds as points."""
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.use("svg")
    plt.rcParams.update({"svg.hashsalt": "napo_jax", "svg.fonttype": "none", "font.size": 10})
    drawn = [method for method in METHODS if method not in PICTURED]  # noise is nothing to these
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    colours = ("#c8553d", "#0b3c5d", "#328cc1", "#3aa17e", "#8a6bb1", "#d9a441", "#7a7f87")
    for place, (method, colour) in enumerate(zip(drawn, colours, strict=True)):
        at = np.array(NOISE) + (place - 3) * 0.5
        axes.plot(at, [np.mean(values(method, noise)) for noise in NOISE], color=colour, label=method, linewidth=2)
        for x, noise in zip(at, NOISE, strict=True):
            some = values(method, noise)
            axes.plot([x] * len(some), some, "o", color=colour, markersize=3, alpha=0.6)
    axes.axhline(np.mean(values("base", 0)), color="#9aa1ab", linewidth=1, linestyle="--", label="base")
    axes.set(
        xlabel="preferences over built answers that are the wrong way round, %", ylabel="accuracy, %", xticks=NOISE
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=2)
    figure.savefig(path, metadata={"Date": None})


def main():
    """Runs a part of the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("prepare", "search", "run", "report"))
    parser.add_argument("--folder", default="runs/world_study", help="where it is kept meanwhile")
    parser.add_argument("--share", default="0/1", help="i/n: every n-th run, from the i-th")
    options = parser.parse_args()
    os.environ["XLA_FLAGS"] = (
        f"--xla_cpu_multi_thread_eigen=false {os.environ.get('XLA_FLAGS', '')}"  # read with the first array
    )
    index, _, count = options.share.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"--share must be i/n with i from 0 to n - 1, got {options.share}")
    study, own = Study(options.folder), slice(int(index), None, int(count))
    if options.part in ("prepare", "report") and int(count) > 1:
        raise ValueError(f"{options.part} is not divided: leave --share out")
    jax.config.update("jax_compilation_cache_dir", str(study.folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    with exit_when_stopped():
        match options.part:
            case "prepare":
                study.prepare((SEARCH_SEED, *SEEDS))
            case "search":
                study.search(list(METHODS)[own])
            case "run":
                study.run(study_runs(study.best_rates())[own], "exams")
            case "report":
                report(study)


if __name__ == "__main__":
    exit_with_one_line(main)
