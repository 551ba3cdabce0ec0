"""A recipe: the specs of every stage, read from one YAML file, checked before anything runs.

All of a recipe enters keys, but for the fields that a spec calls unkeyed.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

import flows.recipes
from tasks.corpus.archive import ArchiveSpec
from tasks.corpus.blocks import BlocksSpec
from tasks.corpus.documents import DocumentsSpec
from tasks.corpus.examples import ExamplesSpec
from tasks.corpus.tokenizer import TokenizerSpec
from tasks.corpus.tokens import TokensSpec
from tasks.errors import RecipeError
from tasks.report.report import ReportSpec
from tasks.training.adapter import AdapterSpec
from tasks.training.evaluation import EvaluationSpec
from tasks.training.finetuned import FinetunedSpec
from tasks.training.gate import HARNESS, GateSpec
from tasks.training.pretrained import PretrainedSpec
from tasks.training.published import PublishedSpec

AdapterName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]

RECIPES_DIR = Path(flows.recipes.__file__).parent


class Recipe(BaseModel):
    """One corpus to one pretrained, finetuned and adapted model; a section that is absent is a stage left out."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", description="names the recipe in runs and reports")
    description: str = Field("", description="one line for people")
    archive: ArchiveSpec | None = Field(None, description="the published corpus")
    documents: DocumentsSpec = Field(DocumentsSpec(), description="cleaning, split and shards")
    tokenizer: TokenizerSpec | None = Field(
        None, description="a published tokenizer, or one trained on the documents; absent: the published model's own"
    )
    tokens: TokensSpec = Field(TokensSpec(), description="documents to ids")
    blocks: BlocksSpec = Field(BlocksSpec(), description="ids to rows of one length")
    published: PublishedSpec | None = Field(None, description="a base model that is taken as it was published")
    pretrained: PretrainedSpec | None = Field(None, description="a base model that is trained here")
    conversations: ArchiveSpec | None = Field(None, description="the published SFT conversations")
    held_out: ArchiveSpec | None = Field(None, description="conversations kept out of training, for accuracy")
    examples: ExamplesSpec | None = Field(None, description="conversations to packed ids and labels")
    finetuned: FinetunedSpec | None = Field(None, description="the instruction-tuned model")
    adapter: AdapterSpec | None = Field(None, description="the adapter")
    adapters: dict[AdapterName, AdapterSpec] = Field(
        default_factory=dict, description="adapters to be compared, by name; each is a branch of the same run"
    )
    evaluation: EvaluationSpec | None = Field(None, description="what every model is measured on")
    gates: dict[str, GateSpec] = Field(default_factory=dict, description="bounds that a model must keep, by the model's section")
    report: ReportSpec = Field(ReportSpec(), description="the page")

    @property
    def base(self) -> Literal["published", "pretrained"]:
        """The section of the model that everything later stands on."""
        return "published" if self.published else "pretrained"

    @property
    def every_adapter(self) -> dict[str, AdapterSpec]:
        """By the name of its node: adapter, and adapter_<name> for each of those to be compared."""
        alone = {"adapter": self.adapter} if self.adapter else {}
        return {**alone, **{f"adapter_{name}": spec for name, spec in self.adapters.items()}}

    @model_validator(mode="after")
    def _begins(self) -> "Recipe":
        if self.archive is None and self.published is None:
            raise ValueError("archive: absent, and so is published; a recipe begins with a corpus, or with a published model")
        if self.pretrained and self.published:
            raise ValueError("published: the recipe has pretrained too; a base is trained here or published, leave one out")
        if self.tokenizer is None and self.published is None:
            raise ValueError("tokenizer: absent; it must be given where no published model brings one")
        if self.published and self.tokenizer and self.tokenizer.train:
            raise ValueError("tokenizer.train: a published model has ids of its own tokenizer; leave the section tokenizer out")
        of_corpus = {"documents", "tokens", "blocks"} & self.model_fields_set
        if self.archive is None and of_corpus:
            raise ValueError(
                f"{min(of_corpus)}: needs the section archive, which is absent; add it or leave {min(of_corpus)} out"
            )
        return self

    @model_validator(mode="after")
    def _sections_fit(self) -> "Recipe":
        needs = {
            "pretrained": ("archive",),
            "examples": ("conversations",),
            "held_out": ("examples",),
            "conversations": ("examples",),
            "finetuned": (self.base, "examples"),
            "adapter": (self.adapter.base if self.adapter else "pretrained", "examples"),
            "evaluation": (self.base,),
        }
        for section, required in needs.items():
            for other in required:
                if getattr(self, section) is not None and getattr(self, other) is None:
                    raise ValueError(f"{section}: needs the section {other}, which is absent; add it or leave {section} out")
        for name, spec in self.adapters.items():
            for other in (spec.base, "examples"):
                if getattr(self, other) is None:
                    raise ValueError(f"adapters.{name}: needs the section {other}, which is absent; add it or leave {name} out")
        return self

    @model_validator(mode="after")
    def _gates_fit(self) -> "Recipe":
        models = [*(name for name in (self.base, "finetuned") if getattr(self, name)), *self.every_adapter]
        for name, gate in self.gates.items():
            where = f"gates.{name}"
            if name not in models:
                raise ValueError(f"{where}: the recipe has no such model; it has {', '.join(models)}")
            if self.evaluation is None:
                raise ValueError(f"{where}: needs the section evaluation, which is absent; add it or leave the gate out")
            if gate.worse_than_parent and name == self.base:
                raise ValueError(f"{where}.worse_than_parent: {name} is made from no other model; state at_most or at_least")
            for figure in sorted(gate.figures):
                section = self._measured_with(figure)
                if getattr(self, section) is None:
                    raise ValueError(f"{where}: {figure} is measured with {section}, which is absent; add it or leave it out")
        return self

    def _measured_with(self, figure: str) -> str:
        if figure.startswith(HARNESS):
            return "evaluation"
        return {"validation": "archive", "examples": "examples"}.get(figure.split("_", maxsplit=1)[0], "held_out")

    @model_validator(mode="after")
    def _sizes_fit(self) -> "Recipe":
        config = (self.pretrained.model.config or {}) if self.pretrained else {}
        positions, vocabulary = config.get("max_position_embeddings"), config.get("vocab_size")
        sizes = {"blocks.block_size": self.blocks.block_size} if self.archive else {}
        if self.examples:
            sizes["examples.block_size"] = self.examples.block_size
        for where, size in sizes.items():
            if isinstance(positions, int) and size > positions:
                raise ValueError(
                    f"{where}: {size} is over the model's {positions} positions "
                    "(pretrained.model.config.max_position_embeddings); lower the one or raise the other"
                )
        trained = self.tokenizer.train if self.tokenizer else None
        if trained and isinstance(vocabulary, int) and trained.vocab_size > vocabulary:
            raise ValueError(
                f"tokenizer.train.vocab_size: {trained.vocab_size} ids do not fit the model's {vocabulary} "
                "(pretrained.model.config.vocab_size); lower the one or raise the other"
            )
        return self


def recipe_names() -> list[str]:
    """The names of the recipes that come with seqmill."""
    return sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))


def recipe_path(name_or_path: str) -> Path:
    """The file that a recipe's name or path means. Raises RecipeError where there is none."""
    packaged = RECIPES_DIR / f"{name_or_path}.yaml"
    given = Path(name_or_path).expanduser()
    if name_or_path in recipe_names():
        return packaged
    if given.suffix in {".yaml", ".yml"} and given.is_file():
        return given
    raise RecipeError(f"{name_or_path}: no such recipe or .yaml file; recipes are {', '.join(recipe_names())}")


def load_recipe(name_or_path: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read, override and check a recipe. ``overrides``: dotted field to value. Raises RecipeError, in one line."""
    path = recipe_path(name_or_path)
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 (a SafeLoader, see below)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as UTF-8 text ({error}); mend the file") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {_yaml_problem(error)}; mend the line") from error
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: {type(value).__name__} found; a recipe is a mapping of sections")
    # A section x-... is for anchors: what several sections share is written once.
    value = {section: fields for section, fields in value.items() if not str(section).startswith("x-")}
    for field, override in (overrides or {}).items():
        _set(value, field, override)
    try:
        # Through JSON, so that strict mode takes lists for tuples and nothing else for anything else.
        return Recipe.model_validate_json(json.dumps(value, allow_nan=False))
    except ValidationError as error:
        raise RecipeError(f"{path}: {_one_line(error)}") from None
    except (TypeError, ValueError, RecursionError) as error:  # a date; an infinity; an alias to itself
        raise RecipeError(f"{path}: {error}; a recipe holds finite numbers, strings, lists and mappings") from None


def parse_overrides(settings: Sequence[str]) -> dict[str, Any]:
    """``["blocks.block_size=128"]`` to ``{"blocks.block_size": 128}``; the value is read as YAML. Raises RecipeError."""
    overrides = {}
    for setting in settings:
        field, equals, text = setting.partition("=")
        if not equals or not field.strip():
            raise RecipeError(f"--set {setting}: no field=value found; write it as --set blocks.block_size=1024")
        try:
            overrides[field.strip()] = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader, see below)
        except yaml.YAMLError:
            raise RecipeError(f"--set {setting}: {text!r} is not a YAML value; quote it") from None
    return overrides


class _Loader(yaml.SafeLoader):
    """YAML as people write numbers: PyYAML reads 1e-4, without a dot, as a string. A field written twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {first: list(rest) for first, rest in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_FLOAT = r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789"))


def _set(value: dict[str, Any], field: str, override: Any) -> None:
    first, every, rest = field.partition(".*.")
    if every:  # adapters.*.num_steps: of all that the section has
        names = list(value.get(first) or {})
        if not names:
            raise RecipeError(f"--set {field}: the recipe has no {first}; name a section that it has")
        for name in names:
            _set(value, f"{first}.{name}.{rest}", override)
        return
    *parents, last = field.split(".")
    for depth, name in enumerate(parents):
        below = value.setdefault(name, {})
        if below is None:
            below = value[name] = {}
        if not isinstance(below, dict):
            raise RecipeError(f"--set {field}: {'.'.join(parents[: depth + 1])} is {below!r}, which has no fields; name a field")
        value = below
    value[last] = override


def _yaml_problem(error: yaml.YAMLError) -> str:
    """What is wrong, and in which line and column."""
    mark = getattr(error, "problem_mark", None)
    what = " ".join(str(getattr(error, "problem", None) or error).split())
    return f"{what} in line {mark.line + 1}, column {mark.column + 1}" if mark else what


def _one_line(error: ValidationError) -> str:
    """The first thing wrong, where it is, and what would be right."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    others = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_fields(first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        advice = f"did you mean {close[0]}?" if close else f"fields are {', '.join(known)}"
        return f"{where}: unknown field{others}; {advice}"
    if first["type"] == "value_error":
        return f"{where}{': ' if where else ''}{first['ctx']['error']}{others}"
    if first["type"] == "missing":
        return f"{where}: absent{others}; it must be given"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{where}: found {first['input']!r}{others}; {message}"


def _known_fields(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Recipe
    parts = iter(location)
    for part in parts:
        annotation = model.model_fields[str(part)].annotation
        if get_origin(annotation) is dict:
            next(parts, None)  # a name that the recipe gives, such as an adapter's
        options = [annotation, *getattr(annotation, "__args__", ())]
        model = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return list(model.model_fields)
