"""Which model a source's arrays belong to, told from their names and shapes."""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft.errors import ConfigError, WeightsError
from jft.models import forms
from jft.models import table as tables
from jft.models.family import Family, adapt_preprocess
from jft.models.table import Table
from jft.models.zoo import FAMILIES, Model, make_model, model_args
from jft.weights import naming as namings
from jft.weights.agreement import stated_fields
from jft.weights.preprocessing import stated_side
from jft.weights.source import Source

CLASSES = 1000  # where no head says how many there are
# A hostile file could have jft build models without end: none is tried beyond these.
_LEAVES = 20_000
_SIDE = 4_096  # of an image or a grid, where no tensor is as large
_CHANNELS = 3
_PREFIX = ("cls_token", "dist_token", "registers")  # [1, count, D], beside the position embeddings
# Fields by which a family's variants are told apart: one that is asked for by name keeps its own.
_SIZES = re.compile(
    r"(?!symmetric_)(\w+_)?(features|widths?|depths?|heads|blocks|registers)|divisor|patch|projection"
    r"|bottleneck|gated|layer_scale|response_norm"
)

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Match:
    """A family whose names a source has.

    Attributes:
      family: of models.
      table: the naming style that knows most of the names.
      known: names that it knows.
      ignored: names that it deliberately leaves unread.
      shapes: {path: shape} of what it knows, in the model's layout.
      optional: paths among them whose source name may be left unread.
      fields: module fields that the source states.
      variant: whose leaves have just these shapes; None where none has.
      args: what `make_model` must be given for that, beside the name and the classes.
      stated_size: side of the images that the source's files state.
      refusal: why the family does not have what the source's config.json tells of; None where it
        does, or where there is none.
      reason: what the nearest variant has otherwise, where no variant has just these shapes.
    """

    family: Family
    table: Table
    known: int
    ignored: int
    shapes: Shapes = field(repr=False)
    optional: frozenset[str] = field(repr=False)
    fields: Mapping[str, Any]
    variant: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    stated_size: int | None = None
    refusal: str | None = None
    reason: str | None = None

    @property
    def num_classes(self) -> int | None:
        """Classes of the source's head; None where it has none."""
        head = [shape for path, shape in self.shapes.items() if re.fullmatch(self.table.head, path)]
        return head[0][-1] if head and head[0] else None

    @property
    def channels(self) -> int:
        """Channels of the images that the first convolution reads."""
        first = self.shapes.get(self.family.first_conv or "", ())
        return first[2] if len(first) == 4 and first[2] else _CHANNELS

    @property
    def patch(self) -> int:
        """Side of the kernel that reads the image, in pixels; 0 where it is not known."""
        first = self.shapes.get(self.family.first_conv or "", ())
        return first[0] if len(first) == 4 else 0

    @property
    def image_size(self) -> int | None:
        """Side of the images in pixels, where position embeddings or the source's config tell it.

        What the config states counts where the embeddings have as many whole patches.
        """
        patch = self.patch
        for path, shape in self.shapes.items():
            folder, _, name = path.rpartition("/")
            if name == "pos_embedding" and len(shape) == 3 and patch:
                for extra in self._prefix_tokens(folder):
                    side = math.isqrt(max(shape[1] - extra, 0))
                    if side and side * side == shape[1] - extra:
                        stated = self.stated_size or 0
                        return stated if stated // patch == side else side * patch
                return None
        return self.stated_size

    def _prefix_tokens(self, folder: str) -> tuple[int, int, int]:
        """How many tokens before the patches may have a position: the class token, all, none."""
        shapes = [self.shapes.get(f"{folder}/{name}", ()) for name in _PREFIX]
        counts = [shape[1] if len(shape) == 3 else 0 for shape in shapes]
        return counts[0], sum(counts), 0


def recognise(source: Source, arrays: Mapping[str, np.ndarray]) -> list[Match]:
    """The families that know most of a source's names, each with its best model.

    Families may share names: where one has a model of just the source's shapes, it is chosen. Those
    that refuse the source's config.json are left out, unless all do.
    """
    found = [match for family in FAMILIES.values() for match in _matches(family, source, arrays)]
    most = max((match.known for match in found), default=0)
    matches = _with_variants([match for match in found if match.known == most])
    fitting = [match for match in matches if match.variant] or matches
    # Of one family's tables that tie, the first.
    return list({match.family.name: match for match in reversed(fitting)}.values())[::-1]


def fitting_model(name: str, source: Source, arrays: Mapping[str, np.ndarray]) -> Model:
    """A variant as a source's weights need it: its classes, image size and channels.

    What else it states, as an epsilon, an activation or a stride, is taken from the source too;
    another width, depth or number of heads is not, so that weights of another variant do not fit.

    Raises:
      ConfigError: there is no such variant.
      WeightsError: the family does not have what the source's config.json tells of.
    """
    plain = make_model(name=name, num_classes=CLASSES)
    matches = _matches(plain.family, source, arrays) if plain.family else []
    if not matches:
        return plain
    matches = _with_variants(matches)
    match = next((match for match in matches if match.variant), matches[0])
    if match.refusal:
        raise WeightsError(match.refusal)
    defaults = model_args(name)
    args = {
        key: value
        for key, value in match.fields.items()
        if key in defaults
        and defaults[key] != value
        and not _SIZES.fullmatch(key)
        and _plausible(value, match)
    }
    return _model(name, args, match)


def recognised_model(source: Source, arrays: Mapping[str, np.ndarray]) -> Model:
    """The one model that a source's names and shapes belong to.

    Raises:
      WeightsError: there is none, or more than one.
    """
    found = recognise(source, arrays)
    matches = [match for match in found if match.variant]
    names = [str(match.variant) for match in matches]
    if not names:
        if found and found[0].refusal:
            raise WeightsError(found[0].refusal)
        nearest = next((f": {match.reason}" for match in found if match.reason), "")
        raise WeightsError(
            f"source {source.text!r}: no model has just these names and shapes{nearest}; jft"
            " weights show tells which families know them, --model=NAME fits them to a model"
        )
    if len(names) > 1:
        raise WeightsError(
            f"source {source.text!r}: could be {', '.join(names)}; choose with --model=NAME"
        )
    return _model(names[0], matches[0].args, matches[0])


def _matches(family: Family, source: Source, arrays: Mapping[str, np.ndarray]) -> list[Match]:
    """One match a table that knows most of the names."""
    if len(arrays) > _LEAVES:
        return []
    arrays = namings.without_module_prefix(arrays)[0].outline()  # names, shapes and dtypes
    found = tables.best_tables(family.tables, arrays)
    return [_match(family, table, source, arrays) for table in found]


def _match(family: Family, table: Table, source: Source, arrays: Mapping[str, np.ndarray]) -> Match:
    prefix, known = table.prefix_for(arrays)
    depths = table.depths_of(arrays, prefix)
    shapes: Shapes = {}
    optional, heads = set(), None
    for name, array in arrays.items():
        for path, origin in table.paths_of(name, prefix, depths):
            optional |= {path} if table.ignored(name) else set()
            heads = forms.heads_of(origin.form, array) or heads
            try:
                shapes[path] = forms.to_jft(origin, array).shape
            except ValueError:
                shapes[path] = ()
    left = [name for name in arrays if table.ignored(name) or table.only_before_head(name)]
    ignored = sum(not table.knows(name, prefix) for name in left)
    fields, refusal = {}, None
    try:
        headless = not any(re.fullmatch(table.head, path) for path in shapes)
        fields = stated_fields(family, source, table, headless)
    except WeightsError as error:
        about = f"source {source.text!r}: "
        refusal = about + str(error).removeprefix(about)
    if heads:
        fields = fields | {"heads": heads}
    if depths and hasattr(family.module, "depths"):
        fields = {"depths": depths} | fields
    return Match(
        family,
        table,
        known,
        ignored,
        shapes,
        frozenset(optional),
        fields,
        stated_size=stated_side(source),
        refusal=refusal,
    )


def _with_variants(matches: list[Match]) -> list[Match]:
    """The matches with their variants; those that refuse the source's config only if all do."""
    accepted = [match for match in matches if match.refusal is None]
    return [_with_variant(match) for match in accepted] or matches


def _with_variant(match: Match) -> Match:
    """The match with the variant that needs the fewest arguments for the source's shapes."""
    wanted = []
    for order, name in enumerate(match.family.variants):
        defaults = model_args(name)
        args = {k: v for k, v in match.fields.items() if k in defaults and defaults[k] != v}
        wanted.append((len(args) + len(_resized(name, match)), order, name, args))
    nearest: tuple[tuple[int, int], str | None] = ((-1, 0), None)
    for _, _, name, args in sorted(wanted, key=lambda one: one[:2]):
        if not _plausible(args, match):
            continue
        try:
            model = _model(name, args, match)
        except ConfigError as error:
            near, reason = (0, 0), f"{name} with what its config.json says: {error}"
        else:
            near, reason = _difference(model, match)
        if reason is None:
            return replace(match, variant=name, args=args | _resized(name, match))
        nearest = max(nearest, (near, reason), key=lambda one: one[0])  # the first of equals
    return replace(match, reason=nearest[1])


def _resized(name: str, match: Match) -> dict[str, int]:
    """{"image_size": pixels} where the source's images are of another size than the variant's."""
    size, own = match.image_size, model_args(name)["image_size"]
    if size is None or size == own:
        return {}
    # Pixels beyond the last whole patch play no part: where the size is derived from the grid, it
    # is one of several that have this grid.
    derived = size != match.stated_size
    return {} if derived and own // match.patch == size // match.patch else {"image_size": size}


def _plausible(args: Any, match: Match) -> bool:
    """Whether the source could hold a model of such numbers, which is made and compared if so."""
    if isinstance(args, Mapping):
        return all(_plausible(value, match) for value in args.values())
    if isinstance(args, tuple | list):
        return all(_plausible(value, match) for value in args)
    largest = max((side for shape in match.shapes.values() for side in shape), default=0)
    return not isinstance(args, int) or args <= max(_SIDE, largest)


def _model(name: str, args: Mapping[str, Any], match: Match) -> Model:
    args = {**args, **_resized(name, match)}
    made = make_model(name=name, args=args, num_classes=match.num_classes or CLASSES)
    return replace(made, preprocess=adapt_preprocess(made.preprocess, match.channels))


def _difference(model: Model, match: Match) -> tuple[tuple[int, int], str | None]:
    """(how near they are, where a model first differs from the source; None where nowhere).

    What takes little time and rules out most variants is compared first: the stages, then the
    leaves of the first stage, then all leaves.
    """
    stages = {path.split("/")[0] for path in match.shapes}
    needed = {path.split("/")[0] for path in match.shapes.keys() - match.optional}
    for stage in model.stages:
        if stage[-1].isdigit() and stage not in stages:
            return (1, 0), f"{model.variant} has a stage {stage!r}, the source has none"
    if more := needed - set(model.stages):
        return (1, 0), f"the source has a stage {min(more)!r}, {model.variant} has none"
    wrong = _differing(model, match, _first_leaves(model), model.stages[:1])
    if wrong:
        return (2, -len(wrong)), wrong[0]
    leaves = {path: leaf.shape for path, (_, leaf) in namings.abstract_leaves(model).items()}
    wrong = _differing(model, match, leaves, None)
    return (3, -len(wrong)), wrong[0] if wrong else None


def _first_leaves(model: Model) -> Shapes:
    """{path: shape} of the first stage's leaves."""
    image = jax.ShapeDtypeStruct((1, *namings.image_shape_of(model, None)), jnp.float32)
    first = functools.partial(model.module.init, stop=1)
    joined = namings.join(jax.eval_shape(first, jax.random.key(0), image))
    return {path: leaf.shape for path, (_, leaf) in joined.items()}


def _differing(
    model: Model, match: Match, leaves: Shapes, stages: tuple[str, ...] | None
) -> list[str]:
    """What differs between a model's leaves and the source's, of these stages or of all."""
    if match.num_classes is None:
        leaves = {p: s for p, s in leaves.items() if not re.fullmatch(match.table.head, p)}
    found = {
        path: shape
        for path, shape in match.shapes.items()
        if (stages is None or path.split("/")[0] in stages)
        and (path in leaves or path not in match.optional)
    }
    wrong = []
    for path, shape in leaves.items():
        if found.get(path) != shape:
            theirs = list(found[path]) or "another layout" if path in found else "none"
            wrong.append(f"{model.variant} has {path!r} {list(shape)}, the source {theirs}")
    more = found.keys() - leaves.keys()
    return wrong + [
        f"the source has {path!r} {list(found[path])}, {model.variant} none"
        for path in found
        if path in more
    ]
