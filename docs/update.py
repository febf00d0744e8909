"""Writes tables and quoted code of these pages from the code and from the committed results: `make pages`.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; `TABLES` has a function for each name.

The block after `<!-- code: FILE WHAT -->` is the source of a function, class, method or constant, or of `name[key]`,
an entry of a constant; without WHAT it is the whole file. FILE is a path, or a module of the package with dots.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from hf_lowrank.formats import pluralize
from hf_lowrank.methods import METHODS, settings_of
from hf_lowrank.metrics import CURVES, METRICS
from hf_lowrank.runs import measure_settings
from hf_lowrank.study import spec
from hf_lowrank.training.blocks import RESERVED
from hf_lowrank.training.recipe import DataSettings

PAGES = Path(__file__).parent
SECTIONS_OF_SIXTEEN = ("landscape", "interpolation", "spectra", "activations")
RESULTS = PAGES.parent / "benchmarks" / "results"
TABLE = re.compile(r"(<!-- table: ([\w -]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
CODE = re.compile(r"(<!-- code: (\S+)(?: (\S+))? -->\n```(\w+)\n).*?(^```$)", re.DOTALL | re.MULTILINE)
MIB = 2**20


def table(head: str, rows: Iterator[str] | list[str]) -> str:
    """A Markdown table; cells are separated by `|`."""
    columns = [cell.strip() for cell in head.split("|")]
    rule = "|".join("---:" if cell.endswith("→") else "---" for cell in columns)
    titles = " | ".join(cell.removesuffix("→").strip() for cell in columns)
    return "\n".join([f"| {titles} |", f"|{rule}|", *(f"| {row} |" for row in rows)])


def cell(text: str) -> str:
    """Text that does not end its cell."""
    return text.replace("|", "\\|").replace("\n", " ")


# Keys of files


def keys(settings: type[BaseModel], *, without: tuple[str, ...] = ()) -> str:
    """The keys of a block, as the code checks them."""

    def rows() -> Iterator[str]:
        for name, setting in settings_of(settings).items():  # type: ignore[arg-type]
            if name in without:
                continue
            key = settings.model_fields[name].alias or name
            default = "required" if setting.default is PydanticUndefined else f"`{yaml_of(setting.default)}`"
            description = setting.description.rstrip(".")
            yield f"`{key}` | {default} | {allowed(setting.allowed)} | {cell(description)}"

    return table("key | default | allowed | meaning", rows())


def allowed(words: str) -> str:
    """The allowed values as a recipe writes them."""
    words = re.sub(r"one of (.+?)(?= or |$)", lambda m: ", ".join(f"`{w}`" for w in m[1].split(", ")), words)
    return cell(words.replace("True or False", "`true`, `false`").replace("None", "`null`"))


def yaml_of(value: Any) -> str:
    """A default as YAML would have it."""
    return json.dumps(value) if isinstance(value, bool | list | dict) or value is None else str(value)


def reserved_training_keys() -> str:
    """The fields of `TrainingArguments` that a recipe may not set, by reason."""
    reasons: dict[str, list[str]] = {}
    for key, reason in RESERVED.items():
        reasons.setdefault(reason, []).append(f"`{key}`")
    return table("fields | instead, or why", [f"{', '.join(fields)} | {reason}" for reason, fields in reasons.items()])


def preset_values() -> str:
    """Every setting of a measurement with its value in each preset."""
    presets = {name: measure_settings.resolve_settings(name) for name in measure_settings.PRESETS}

    def rows() -> Iterator[str]:
        for path, field in _leaves(measure_settings.MeasureSettings):
            values = []
            for preset in presets.values():
                value: Any = preset
                for part in path.split("."):
                    value = getattr(value, part)
                values.append(f"`{yaml_of(value)}`")
            yield f"`{path}` | {' | '.join(values)} | {cell((field.description or '').rstrip('.'))}"

    return table(f"key | {' | '.join(presets)} | meaning", rows())


def _leaves(settings: type[BaseModel], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _leaves(field.annotation, f"{before}{name}.")
        else:
            yield f"{before}{name}", field


# Methods and metrics


def methods() -> str:
    """All methods, with their pages."""
    rows = [
        f"[{method.title}](../model_cards/{name}.md) | `{name}` | {method.kind} | {cell(method.summary)} | "
        f"{method.source or '—'}"
        for name, method in METHODS.items()
    ]
    return table("method | name in recipes | kind | what it does | source", rows)


def metrics(section: str | None = None) -> str:
    """The sixteen of a section, or all extras."""
    rows = [
        f"`{metric.id}` | {cell(metric.summary)} | {metric.unit or '—'} | {metric.better or 'neither'} | "
        f"{'yes' if metric.needs_baseline else 'no'}"
        for metric in METRICS.values()
        if (metric.extra if section is None else not metric.extra and metric.section == section)
    ]
    return table("id | what it is | unit | better | needs a baseline", rows)


def curves() -> str:
    """The curves that are measured along with a metric."""
    rows = [
        f"`{name}` | {sweep.title} | {', '.join(f'`{one}`' for one in sweep.metrics)} | {cell(sweep.summary)}"
        for name, sweep in CURVES.items()
    ]
    return table("rows of metric | curve | summarised by | how to read it", rows)


# Benchmarks


def result(name: str) -> Any:
    """A committed result."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


OFFICIAL = {"hf_lowrank GaLore": "galore-torch", "hf_lowrank Fira": "fira", "hf_lowrank APOLLO": "apollo-torch"}


def optimizer_steps(name: str) -> str:
    """Times of optimizer steps and bytes of state, with the ratio to the official package."""
    found = result(name)
    optimizers = found["results"][0]["optimizers"]

    def rows() -> Iterator[str]:
        for title, one in optimizers.items():
            plain, refresh = one["plain_step"], one["refresh"]
            added = f"{max(0.0, refresh['median']) * 1e3:.0f}" if refresh else "—"
            rival = optimizers.get(OFFICIAL.get(title, ""))
            ratio = f"{one['mean_step'] / rival['mean_step']:.2f}" if rival else "—"
            places = 1 if plain["median"] < 0.02 else 0
            low, middle, high, mean = (
                f"{seconds * 1e3:.{places}f}"
                for seconds in (plain["q1"], plain["median"], plain["q3"], one["mean_step"])
            )
            yield (f"{title} | {middle} [{low}, {high}] | {added} | {mean} | {ratio} | {one['state_bytes'] / MIB:.0f}")

    head = (
        "optimizer | plain step, ms → | a refresh adds, ms → | mean step, ms → | of the official one → | state, MiB →"
    )
    return table(head, rows())


def machine(name: str) -> str:
    """What a result was measured on, in one sentence."""
    found = result(name)
    where, versions = found["machine"], found["versions"]
    device = where.get("gpu") or f"{where['cpu']}, {where['threads']} threads"
    first = found["results"][0]
    return (
        f"LLaMA-{first['size'].upper()} shapes, {pluralize(first['layers'], 'block')}, {first['dtype']}; {device}; "
        f"torch {versions['torch']}; medians with quartiles. The mean step is that of a refresh every {found['gap']} "
        "steps."
    )


def optimizers(name: str) -> str:
    return f"{machine(name)}\n\n{optimizer_steps(name)}"


def layers() -> str:
    """Times of a block's layers, and what autograd keeps of a whole model."""
    found = result("adapters_cpu")["results"][0]
    rows = [
        f"{name} | {found['block_time_over_dense'].get(name, float('nan')):.2f} | {one['time_over_dense']:.2f} | "
        f"{one['kept_bytes'] / MIB:.0f}".replace("nan", "—")
        for name, one in found["model"].items()
    ]
    head = "layers | block, time over dense → | model, time over dense → | kept activations of the model, MiB →"
    return (
        f"LLaMA-{found['size'].upper()} shapes, rank {found['rank']}, {found['tokens']} tokens for a block and "
        f"{found['model_tokens']} for the model, {found['dtype']}, two CPU threads; forward and backward.\n\n"
        f"{table(head, rows)}"
    )


def memory_estimates() -> str:
    """How near the estimated peaks are to the measured ones."""

    def rows() -> Iterator[str]:
        for name, device in (("memory", "CPU"), ("memory_cuda", "one H200")):
            for scale in result(name)["results"]:
                allocator = max(abs(row["ratio_allocator"] - 1) for row in scale["rows"])
                process = [abs(row["ratio_process"] - 1) for row in scale["rows"] if "ratio_process" in row]
                cases = len(scale["rows"])
                grown = f"{max(process) * 100:.2f} %" if process else "—"
                yield f"{scale['scale']}, {device} | {cases} | {allocator * 100:.2f} % | {grown}"

    return table("model | cases → | largest error, of torch's allocator → | of the process → ", rows())


def memory_by_method() -> str:
    """The items of every method's memory at 60M, one sequence per step."""
    (scale,) = (one for one in result("memory")["results"] if one["scale"] == "60m")

    def rows() -> Iterator[str]:
        plain = [row for row in scale["rows"] if not row["gradient_checkpointing"]]
        for row in sorted(plain, key=lambda row: row["estimated"]):
            items = row["items"]
            parts = (items["weights"], items["gradients"], items["optimizer_state"], items["activations"])
            figures = " | ".join(f"{part / MIB:.0f}" for part in (*parts, row["estimated"], row["measured_allocator"]))
            yield f"{METHODS[row['method']].title} | {figures}"

    head = "method | weights → | gradients → | optimizer state → | activations → | estimated peak → | measured peak →"
    return f"LLaMA-60M, float32, {scale['batch_size']} sequence per step, MiB.\n\n{table(head, rows())}"


def measuring_costs() -> str:
    """What the metrics cost compared with the forward passes that they need."""
    parts = result("geometry")["parts"]
    rows = [
        f"{name} | {one['share_in_forward'] * 100:.0f} % of the time is in forward passes"
        for name, one in parts["landscape"].items()
    ]
    spectra, activations = parts["spectra"], parts["activations"]
    rows += [
        f"spectra (metrics 7–13) | {spectra['ratio']:.2f} of a plain `svdvals` loop over {spectra['matrices']} "
        f"matrices; {spectra['ratio_from_factors']:.2f} from factors",
        f"activations (metrics 14–16) | {activations['ratio']:.2f} of the two models' forward passes; "
        f"{parts['activation_memory']['beyond_models_mib']:.0f} MiB in addition to the models",
        f"memory of a landscape | {parts['memory_copy']['models_beside_one_batch']:.2f} models plus one batch; with "
        f"`memory: low` {parts['memory_low']['models_beside_one_batch']:.2f}",
    ]
    return table("what | cost", rows)


def measuring_processes() -> str:
    """How measuring scales over processes, compared with what the machine allows."""
    cases = result("measuring_processes")["cases"]
    rows = [
        f"{name} | {one['rows']} | {one['rows_that_differ'][count]} | {count} | "
        f"{one['of_linear'][count]['median']:.2f} | {one['machine_allows'][count]['median']:.2f}"
        for name, one in cases.items()
        for count in one["of_linear"]
    ]
    head = "case | rows → | rows that differ → | processes → | share of linear speed → | what the machine allows →"
    return table(head, rows)


def quick_comparison() -> str:
    """Every method of the short study, by its loss."""
    found = result("quick_comparison")
    unigram = found["methods"]["full_rank"]["unigram_loss"]
    rows = [
        f"{METHODS[name].title} | {one['loss']:.2f} | {one['above_chance']:.2f} | {one['step_over_adamw']:.2f} | "
        f"{one['weight_effective_rank']:.2f} | {one['random_sharpness']:.3f}"
        for name, one in sorted(found["methods"].items(), key=lambda pair: pair[1]["loss"])
    ]
    head = "method | loss, nats → | score above chance → | step over AdamW's → | effective rank → | random sharpness →"
    return (
        f"{found['steps']} steps at 1.3 M parameters, one seed, settings not tuned; a unigram model has a loss of "
        f"{unigram:.2f}. Times are processor time of whole training steps, on one thread.\n\n{table(head, rows)}"
    )


def ablations() -> str:
    """What parts of methods contribute, with intervals over seeds."""
    rows = [
        f"{part} | {one['with']:.3f} | {one['without']:.3f} | "
        f"{one['effect']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}] | {one['verdict']}"
        for part, one in result("ablations")["effects"].items()
    ]
    return table("part | loss with it → | without → | it lowers the loss by, nats → | verdict", rows)


def trainer_options() -> str:
    """How far the losses of ten steps with an option of Trainer are from those without it, as a share."""
    found = result("trainer_options")["results"]
    options = list(dict.fromkeys(option for row in found.values() for option in row))

    def rows() -> Iterator[str]:
        for option in options:
            cases = [row[option] for row in found.values()]
            refused = next((one["reason"].split(": ", 1)[-1] for one in cases if one["outcome"] == "refused"), "")
            equal = [one["all"] for one in cases if one["outcome"] == "equal"]
            other = len(cases) - len(equal) - sum(one["outcome"] == "refused" for one in cases)
            yield (
                f"`{option}` | {len(equal)} | {max(equal):.0e} | {other} | {cell(refused)}"
                if equal
                else (f"`{option}` | 0 | — | {other} | {cell(refused)}")
            )

    head = "option | methods with equal losses → | largest relative difference → | others → | refused with"
    return f"{len(found)} methods, ten steps each.\n\n{table(head, rows())}"


def architectures() -> str:
    """What became of every causal architecture with each method."""
    everything = result("architectures")["results"]
    found = {name: row for name, row in everything.items() if "small" not in row}
    methods_tried = list(next(iter(found.values())))
    rows = [
        f"{METHODS[name].title} | "
        + " | ".join(
            str(sum(row[name][0] == outcome for row in found.values())) for outcome in ("ok", "refused", "failed")
        )
        for name in methods_tried
    ]
    left = len(everything) - len(found)
    return f"{len(found)} architectures; {left} more have parts that cannot be made small.\n\n" + table(
        "method | ok → | refused by name → | failed → ", rows
    )


def streams() -> str:
    """The cost of going on late in a stream."""
    cases = {name: one for name, one in result("stream_seek").items() if name.endswith("files")}
    rows = [
        f"{name.replace('1 files', 'one file')} | {one['reading_s']:.1f} | "
        f"{one['seek_s']['median']:.2f} | {one['start_s']['median']:.2f}"
        for name, one in cases.items()
    ]
    head = "a million records in | reading up to the place, s → | resuming there, s → | starting a stream, s →"
    return table(head, rows)


def subspaces() -> str:
    """Loss by choice of subspace, and the energy that it captures."""
    found = result("subspace_quality")
    rows = [
        f"`{name}` | {loss:.3f} | {_share(found['least_energy_share'].get(name))}"
        for name, loss in found["mean_loss"].items()
    ]
    setting = found["setting"]
    return (
        f"{setting['steps']} steps of GaLore at rank {setting['rank']}, mean of three seeds; the seeds' losses spread "
        f"over {found['spread_of_seeds']:.3f}.\n\n"
        + table("subspace | final loss, nats → | least energy captured, of the exact basis's →", rows)
    )


def _share(value: float | None) -> str:
    return "1" if value is None else f"{value:.3f}"


def drills() -> str:
    """The committed results of the fault drills."""
    faults, hub, fuzz = result("fault_drill"), result("hub_drill"), result("fuzzing")
    distributed = result("distributed")
    struck, kept = faults["struck"], faults["outcomes"]
    inputs = sum(one["inputs"] for one in fuzz["formats"].values())
    failures = sum(len(one["failures"]) for one in fuzz["formats"].values())
    within = sum(row["within"] for row in distributed["rows"])
    rows = [
        f"`make drill`: kill, damage, fill the disk, … | {faults['drills']} drills, of which {struck} struck a run: "
        f"{kept['survived']} ended with the files of an uninterrupted run, {kept['refused']} with a message that "
        f"names the damage | {len(faults['breaches'])}",
        f"a Hub that fails and processes that are killed | {hub['plans']} plans, {hub['requests']} requests | "
        f"{len(hub['breaches'])}",
        f"mutated files of {len(fuzz['formats'])} formats | {inputs} inputs | {failures}",
        f"DDP and FSDP2 compared with one process | {len(distributed['rows'])} cases | "
        f"{len(distributed['rows']) - within}",
    ]
    return table("drill | how much | breaches →", rows)


def cluster() -> str:
    """Scaling of a study's units on Ray's nodes, next to local processes, and the cost of scheduling."""
    found = result("ray_study")
    parts = [found["scaling"][key] for key in ("ray_speed_up", "local_speed_up", "ray_over_local")]
    rows = [" | ".join([count, *(f"{part[count]['median']:.2f}" for part in parts)]) for count in parts[0]]
    units = found["scheduling"]["milliseconds_per_unit"]
    costs = ", ".join(f"{one['median']:.0f} ms each of {count}" for count, one in units.items())
    head = "workers | speed-up on Ray → | of local processes → | Ray's time over theirs →"
    return f"{table(head, rows)}\n\nScheduling units that end at once, on two nodes: {costs}."


TABLES: Mapping[str, Callable[[], str]] = {
    "data keys": lambda: keys(DataSettings),
    "reserved training keys": reserved_training_keys,
    "study keys": lambda: keys(spec.StudySettings, without=("sweep", "measure", "evaluate", "predict")),
    "member keys": lambda: keys(spec.MemberSettings),
    "sweep keys": lambda: keys(spec.SweepSettings),
    "study measure keys": lambda: keys(spec.MeasureSettings),
    "study evaluate keys": lambda: keys(spec.EvaluateSettings),
    "study predict keys": lambda: keys(spec.PredictSettings),
    "presets": preset_values,
    "methods": methods,
    **{f"{section} metrics": lambda section=section: metrics(section) for section in SECTIONS_OF_SIXTEEN},
    "extra metrics": metrics,
    "curves": curves,
    **{name.replace("_", " "): lambda name=name: optimizers(name) for name in (
        "optimizers_cpu", "optimizers_cuda", "optimizers_cuda_350m",
        "optimizers_cpu_350m_layer",
    )},
    "layers": layers,
    "memory estimates": memory_estimates,
    "memory by method": memory_by_method,
    "measuring costs": measuring_costs,
    "measuring processes": measuring_processes,
    "quick comparison": quick_comparison,
    "ablations": ablations,
    "trainer options": trainer_options,
    "architectures": architectures,
    "streams": streams,
    "subspaces": subspaces,
    "drills": drills,
    "cluster": cluster,
}  # fmt: skip


# Quoted code


def file_of(name: str) -> Path:
    """The file of a module with dots, or at a path relative to the repository."""
    root = PAGES.parent
    if "/" in name:
        return root / name
    folder = root.joinpath(*name.split("."))
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


def code(name: str, what: str | None) -> str:
    """The source of `what` in a file; of a method or an entry with its indentation removed.

    Raises:
        ValueError: the file has no such thing.
    """
    text = file_of(name).read_text(encoding="utf-8")
    if what is None:
        return text
    path, _, key = what.partition("[")
    node: ast.AST = ast.parse(text)
    for part in path.split("."):
        node = next((child for child in ast.iter_child_nodes(node) if part in _names(child)), node)
        if part not in _names(node):
            raise ValueError(f"{name} has no {what}")
    first, last = _lines(node)
    if key:
        first, last = _entry(node, key.rstrip("]"), f"{name} {what}")
    return dedent("\n".join(text.splitlines()[first - 1 : last])) + "\n"


def _names(node: ast.AST) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = (
        node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    )
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _lines(node: Any) -> tuple[int, int]:
    first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])
    return first, node.end_lineno


def _entry(node: ast.AST, key: str, what: str) -> tuple[int, int]:
    """The lines of the call in a constant that names `key`, or of the value of this key."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call):
            arguments = [*inner.args[:1], *(one.value for one in inner.keywords if one.arg == "name")]
            if any(isinstance(one, ast.Constant) and one.value == key for one in arguments):
                return _lines(inner)
        if isinstance(inner, ast.Dict):
            for one, value in zip(inner.keys, inner.values, strict=True):
                if isinstance(one, ast.Constant) and one.value == key:
                    return one.lineno, _lines(value)[1]
    raise ValueError(f"there is no {what}")


def updated(page: Path) -> str:
    """A page's text with its tables and its quoted code up to date."""
    text = page.read_text(encoding="utf-8")
    text = TABLE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)
    return CODE.sub(lambda found: f"{found[1]}{code(found[2], found[3])}{found[5]}", text)


def pages() -> list[Path]:
    """The pages that have a table or quoted code."""
    texts = {page: page.read_text(encoding="utf-8") for page in sorted(PAGES.glob("*.md"))}
    return [page for page, text in texts.items() if TABLE.search(text) or CODE.search(text)]


if __name__ == "__main__":
    for path in pages():
        path.write_text(updated(path), encoding="utf-8")
