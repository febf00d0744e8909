"""The table of methods: how each builds a model, an optimizer, a schedule and callbacks, and which settings it has.

A method is one `Method` entry; nothing else in the package mentions a method by name. The package's own entries are in
`hf_lowrank.optim.methods` and `hf_lowrank.adapters.methods`; other packages add theirs through the entry point group
`hf_lowrank.methods`, whose entry points load to a `Method`. This module and the entries import neither torch nor
transformers, so that methods can be listed and settings checked without them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from hf_lowrank.errors import UserError, nearest
from hf_lowrank.formats import join_words

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback, TrainingArguments

# Modules whose `ENTRIES` are the package's own methods.
BUILT_IN = ("hf_lowrank.optim.methods", "hf_lowrank.adapters.methods")
ENTRY_POINT_GROUP = "hf_lowrank.methods"

Kind = Literal["baseline", "control", "optimizer", "layers", "restarts"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Marker = Literal["circle", "square", "diamond", "up", "down", "cross", "plus", "hexagon", "pentagon", "star"]


class MethodSettings(BaseModel):
    """Base of every method's settings: the keys of a recipe's `method:` block besides `name`. Unknown keys are errors.

    Each field has a description; choices are a `Literal`, bounds are pydantic constraints. Subclasses that share a
    field share its `Annotated` type and override only the default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# Descriptions of settings that most methods have.
TARGET_MODULES = (
    "linear layers to target: `auto` (attention and MLP), `all-linear`, name endings, or a regular expression"
)
SEED = "seed of the method's own random draws; None for the run's seed"


def explained(description: str, default: Any = ..., **choices: str) -> Any:
    """A pydantic field with its description, and the meaning of each choice of a `Literal` that needs one."""
    extra: Any = {"choices": choices} if choices else None
    return Field(default, description=description, json_schema_extra=extra)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of a method, as listings, tables and error messages describe it.

    Attributes:
        description: what it means, without a final full stop.
        default: its value when a recipe does not give it.
        choices: the allowed words, each with its meaning (or an empty string); empty for other types.
        allowed: the allowed values in words, to follow "must be".
    """

    name: str
    description: str
    default: Any
    choices: Mapping[str, str]
    allowed: str


def settings_of(settings: type[MethodSettings]) -> dict[str, Setting]:
    """The settings that a class declares or inherits, by name."""
    return {name: _setting(name, field) for name, field in settings.model_fields.items()}


def _setting(name: str, field: FieldInfo) -> Setting:
    meanings: Any = {}
    if isinstance(field.json_schema_extra, dict):
        meanings = field.json_schema_extra.get("choices", {})
    words = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    return Setting(
        name=name,
        description=field.description or "",
        default=field.get_default(call_default_factory=True),
        choices={word: meanings.get(word, "") for word in words},
        allowed=_allowed(field.annotation, field.metadata),
    )


TYPE_WORDS = {NoneType: "None", bool: "True or False", str: "a string", int: "an integer", float: "a number"}
BOUND_WORDS = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}


def _allowed(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}" if len(args) > 1 else str(args[0])
    if origin in (Union, UnionType):
        return " or ".join(_allowed(arg, metadata) for arg in sorted(args, key=lambda arg: arg is NoneType))
    if origin is list:
        return f"a list of {'strings' if args == (str,) else 'values'}"
    if origin is dict:
        return "a mapping of names to values"
    kind = TYPE_WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))
    bounds = {key: getattr(item, key) for item in metadata for key in BOUND_WORDS if hasattr(item, key)}
    if annotation not in (int, float) or not bounds:
        return kind
    if len(bounds) == 2:
        low = f"[{bounds['ge']}" if "ge" in bounds else f"({bounds['gt']}"
        high = f"{bounds['le']}]" if "le" in bounds else f"{bounds['lt']})"
        return f"{kind} in {low}, {high}"
    ((key, bound),) = bounds.items()
    return f"{kind} {BOUND_WORDS[key]} {bound}"


@cache
def _validators(settings: type[MethodSettings]) -> dict[str, TypeAdapter[Any]]:
    config = ConfigDict(strict=True, allow_inf_nan=False)
    return {
        name: TypeAdapter(Annotated[field.annotation, *field.metadata, Field()], config=config)  # type: ignore[arg-type]
        for name, field in settings.model_fields.items()
    }


def check_options(settings: type[MethodSettings], options: Mapping[str, Any], where: str) -> None:
    """Checks the values of `options` that `settings` declares; any subset of them may be given.

    Keys that `settings` does not declare are not looked at: an optimizer has options that are no method's settings,
    such as `lr`.

    Args:
        where: what has the options, for the message: a class name, or "parameter group 2".

    Raises:
        UserError: a value is not allowed, naming its key and what is allowed.
    """
    validators = _validators(settings)
    for key, value in options.items():
        if key in validators:
            try:
                validators[key].validate_python(value)
            except ValidationError:
                allowed = _setting(key, settings.model_fields[key]).allowed
                raise UserError(f"{key} of {where} must be {allowed}, got {value!r:.80}") from None


@dataclass(frozen=True)
class Look:
    """How a method is drawn.

    Attributes:
        light, dark: the colour on a light and on a dark background, `#rrggbb`, with a contrast of at least 3 : 1
            (WCAG 2.2, 1.4.11).
        dash: SVG dash lengths in line widths; empty for a solid line.
        marker: the shape of its points.
    """

    light: str
    dark: str
    dash: tuple[float, ...]
    marker: Marker


SOLID: tuple[float, ...] = ()
DASHED = (5.0, 2.5)
DOTTED = (1.5, 2.0)
DASH_DOTTED = (6.0, 2.0, 1.5, 2.0)

SPARE_LOOKS = (
    Look("#8c2f39", "#e0717c", DOTTED, "star"),
    Look("#3d5a80", "#8fb0da", DOTTED, "cross"),
    Look("#5b6b1f", "#b5c663", DOTTED, "circle"),
    Look("#80427a", "#cf93c9", DOTTED, "square"),
    Look("#a0522d", "#e39b76", DOTTED, "diamond"),
    Look("#2f6f6a", "#7cc4bd", DOTTED, "up"),
)


def spare_look(name: str) -> Look:
    """The look of a method that brings none: always the same one for the same name."""
    return SPARE_LOOKS[zlib.crc32(name.encode()) % len(SPARE_LOOKS)]


def dense_model(config: PreTrainedConfig, settings: Any, seed: int) -> PreTrainedModel:
    """The plain causal language model of `config`, freshly initialised from torch's global generator."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config)


@dataclass(frozen=True, kw_only=True)
class MethodPage:
    """What a method's page says besides its entry, in Markdown without headings.

    Attributes:
        idea: what it does, in a few sentences.
        formula: the step or the layer in plain text, one formula each.
        use: when to take it.
        cost: memory and time, compared with the dense weight.
        notes: published settings and pitfalls.
    """

    idea: str
    formula: tuple[str, ...]
    use: str
    cost: str
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way of pre-training.

    Attributes:
        name: its name in recipes and in the `method` column of measurements.
        title: its spelling in tables and pictures.
        summary: one sentence.
        kind: what it changes: nothing (the baseline), the optimizer, the layers, or the layers with restarts; the
            plain low-rank control has a kind of its own.
        settings: the typed settings of this method.
        source: the paper, e.g. `arXiv 2403.03507`.
        look: its colour, line style and marker; without one it gets a spare look that depends on its name.
        build_model: `(config, settings, seed) -> model`; the caller seeds torch's global generator, so every method
            draws the same initial weights.
        build_optimizer: `(model, settings, args) -> optimizer`; without it, or where it returns None, Trainer builds
            its own AdamW.
        build_scheduler: `(optimizer, settings, args, num_training_steps) -> scheduler`; without one, or where it
            returns None, Trainer has its own.
        callbacks: `(settings, args) -> callbacks`.
        page: what its page says besides all this; None for a page of the entry alone.
    """

    name: str
    title: str
    summary: str
    kind: Kind
    settings: type[MethodSettings]
    source: str = ""
    look: Look = None  # type: ignore[assignment]
    build_model: Callable[[PreTrainedConfig, Any, int], PreTrainedModel] = dense_model
    build_optimizer: Callable[[nn.Module, Any, TrainingArguments], Optimizer | None] | None = None
    build_scheduler: Callable[[Optimizer, Any, TrainingArguments, int], LRScheduler | None] | None = None
    callbacks: Callable[[Any, TrainingArguments], Sequence[TrainerCallback]] = lambda settings, args: ()
    page: MethodPage | None = None

    def optimizer(self, model: nn.Module, settings: Any, args: TrainingArguments) -> Optimizer | None:
        """Its optimizer; None leaves Trainer its own AdamW."""
        return None if self.build_optimizer is None else self.build_optimizer(model, settings, args)

    def __post_init__(self) -> None:
        if self.look is None:
            object.__setattr__(self, "look", spare_look(self.name))


class MethodTable(Mapping[str, Method]):
    """Methods by name, in the order of tables and legends; an unknown name is a `UserError` with the nearest names.

    The order is that of `KINDS` for the methods of `modules`, then plug-ins by name. Entries are loaded when the
    table is first read.

    Args:
        methods: entries to begin with.
        modules: names of modules whose `ENTRIES` are methods.
        group: the entry point group of other packages' methods.
    """

    def __init__(
        self, methods: Sequence[Method] = (), *, modules: Sequence[str] = (), group: str | None = None
    ) -> None:
        self._methods: dict[str, Method] = {}
        self._modules, self._group = modules, group
        for method in methods:
            self.register(method)

    def register(self, method: Method) -> None:
        """Adds an entry.

        Raises:
            ValueError: the name is taken.
        """
        if method.name in self._methods:
            raise ValueError(f"method {method.name!r} is already registered")
        self._methods[method.name] = method

    def _load(self) -> dict[str, Method]:
        modules, group = self._modules, self._group
        self._modules, self._group = (), None
        entries = [entry for module in modules for entry in import_module(module).ENTRIES]
        for entry in sorted(entries, key=lambda entry: KINDS.index(entry.kind)):
            self.register(entry)
        for point in sorted(entry_points(group=group), key=lambda point: point.name) if group else ():
            self.register(point.load())
        return self._methods

    def __getitem__(self, name: str) -> Method:
        methods = self._load()
        try:
            return methods[name]
        except KeyError:
            raise UserError(f"unknown method {name!r}; {nearest(name, methods)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._load()

    def __iter__(self) -> Iterator[str]:
        return iter(self._load())

    def __len__(self) -> int:
        return len(self._load())


METHODS = MethodTable(modules=BUILT_IN, group=ENTRY_POINT_GROUP)
"""Every method by its name: the package's own, then those of other packages."""


def setting_sections(methods: Mapping[str, Method]) -> list[tuple[str, list[Setting]]]:
    """Headings with settings: for each method what it adds or overrides, then what several methods share."""
    own = {method.settings for method in methods.values()}
    users: dict[type[MethodSettings], list[str]] = {}
    for method in methods.values():
        for cls in method.settings.__mro__:
            if cls is not MethodSettings and issubclass(cls, MethodSettings) and cls not in own:
                users.setdefault(cls, []).append(method.name)
    sections = []
    for method in methods.values():
        source = f" ({method.source})" if method.source else ""
        heading = f"{method.name}: {method.title}{source}. {method.summary}"
        sections.append((heading, _added(method.settings, users)))
    for cls in sorted(users, key=lambda cls: -len(users[cls])):
        sections.append((f"Settings of {join_words(users[cls])}", _added(cls, users)))
    return sections


def _added(cls: type[MethodSettings], shared: Collection[type[MethodSettings]]) -> list[Setting]:
    """The settings that the nearest base in `shared` lacks; of an overridden one, what is different."""
    inherited = settings_of(next((base for base in cls.__mro__[1:] if base in shared), MethodSettings))
    return [
        _difference(setting, inherited[name]) if name in inherited else setting
        for name, setting in settings_of(cls).items()
        if setting != inherited.get(name)
    ]


def _difference(setting: Setting, inherited: Setting) -> Setting:
    pairs = (setting.description, inherited.description), (setting.allowed, inherited.allowed)
    new = [text for text, known in pairs if text != known]
    choices = {word: meaning for word, meaning in setting.choices.items() if word not in inherited.choices}
    return replace(setting, description="; ".join(new), choices=choices)


def registered(name: str) -> Method | None:
    """The entry of a method; None for a name from elsewhere."""
    try:
        if name in METHODS:
            return METHODS[name]
    except ImportError:  # a broken plug-in must not keep a report from being written
        return None
    return None
