"""Methods that decide from signals, and those that choose single elements."""

from jft.errors import ConfigError
from jft.freeze.entries import Entry
from jft.freeze.outline import Outline
from jft.freeze.recipe import Recipe

Period = float | int | str


def autofreeze(
    outline: Outline, *, intervals: int = 20, percentile: float = 50.0, batches: int = 8
) -> Recipe:
    """AutoFreeze (Liu et al. 2021, arXiv:2102.01386).

    Read in YuhanLiu11/AutoFreeze, freeze_intermediate_e2e_lr.py and README: the run has `intervals`
    equal intervals. At the end of each, with G_l the L1 norm of block l's summed gradient and
    eta_l = |G'_l - G_l| / G'_l its change since the one before, the cut moves to the first block
    whose eta reaches the percentile of those that train; embeddings freeze with the first block,
    and the optimizer begins anew. There the gradients of the whole interval are summed; here those
    of `batches` batches at its end.

    Args:
      outline: of the run.
      intervals: decisions in a run, one more than fall due.
      percentile: of the changes, 0 to 100.
      batches: of a probe.
    """
    outline.require("autofreeze", blocks=True)
    if intervals < 1:
        raise ConfigError(f"freeze.args.intervals: {intervals!r} should be 1 or more")
    every = f"{100 / intervals}%"
    args = {"q": percentile}
    return _rule("grad_change", "percentile_cut", args, every=every, batches=batches, state="reset")


def egeria(
    outline: Outline,
    *,
    every: Period = "2%",
    window: int = 3,
    tolerance: float = 0.1,
    rate_drop: float = 0.2,
    batches: int = 1,
) -> Recipe:
    """Egeria, also KGT (Wang et al. 2023, arXiv:2201.06227).

    From the abstract: the plasticity of the front block is the distance of its activations to those
    of a quantised copy of the model; the block freezes once that has become flat, and then the next
    one is at the front; everything trains again when the learning rate drops. How flatness is told,
    how often, and all defaults are unverified; see `jft.freeze.deciders.flat_cut`. The copy here is
    the model that the run starts from, in int8.

    Args:
      outline: of the run.
      every: period of decisions.
      window: decisions averaged, and flat in a row.
      tolerance: change, over the first value, that is still flat.
      rate_drop: share of the learning rate of the first freezing at which all thaws.
      batches: of a probe.
    """
    outline.require("egeria", blocks=True)
    args = {"window": window, "tolerance": tolerance, "rate_drop": rate_drop}
    return _rule("plasticity", "flat_cut", args, every=every, batches=batches)


def auto_rgn(
    outline: Outline,
    *,
    every: Period = "1ep",
    batches: int = 5,
    exclude: str | None = None,
    always: str = "head",
) -> Recipe:
    """Auto-RGN (Lee et al. 2023, arXiv:2210.11466).

    Read in anniesch/surgical-finetuning, main.py: at the beginning of each epoch, the ratio of
    gradient norm to weight norm of each tensor, averaged over 5 batches and divided by the largest,
    becomes the factor on its learning rate, with a new Adam; BatchNorm's tensors do not train. The
    set of all that trains stays, so that no compute is saved.

    Args:
      outline: of the run.
      every: period of decisions; the first is made before the first step.
      batches: of a probe.
      exclude: set expression that does not train; None is the BatchNorms, "" nothing.
      always: leaves that train at factor 1 where they have no ratio, being 0 (a fresh head).
    """
    args = {"exclude": _excluded(outline, exclude), "always": _known(outline, always)}
    return _rule(
        *("rel_grad", "relative_scale", args),
        every=every,
        batches=batches,
        first=True,
        state="reset",
    )


def auto_snr(
    outline: Outline,
    *,
    bound: float = 0.95,
    every: Period = "1ep",
    batches: int = 5,
    exclude: str | None = None,
    always: str = "head",
) -> Recipe:
    """Auto-SNR (Lee et al. 2023, arXiv:2210.11466).

    Read in anniesch/surgical-finetuning, main.py ("eb-criterion"): at the beginning of each epoch
    the tensors whose mean squared gradient over its variance, averaged over 5 batches, is below
    0.95 get learning rate 0, with a new Adam; BatchNorm's do not train. The ratio is not
    normalised in the code; the paper speaks of one in [0, 1] (unverified). Here a rate of 0 is
    freezing. There the head has no privilege.

    Args:
      outline: of the run.
      bound: least ratio of what trains.
      every: period of decisions; the first is made before the first step.
      batches: of a probe.
      exclude: set expression that does not train; None is the BatchNorms, "" nothing.
      always: set expression that trains whatever its ratio; "" is the published rule.
    """
    args = {"bound": bound, "exclude": _excluded(outline, exclude)}
    args["always"] = _known(outline, always)
    return _rule(
        *("grad_snr", "at_least", args), every=every, batches=batches, first=True, state="reset"
    )


def slimfit(
    outline: Outline, *, share: float = 0.9, every: Period = "2%", always: str | None = None
) -> Recipe:
    """SlimFit's inter-layer scheduling (Ardakani et al. 2023, arXiv:2305.18513).

    Read in arashardakani/SlimFit, ViT/CIFAR10.py: of the weights of products, embeddings and block
    norms, the 90 % with the smallest mean |dw / w| in their last update are frozen; all begin with
    a huge random value, so that each is visited; biases, final norm and head always train. There
    that is decided anew at every step. Here a set of leaves is a compiled step, so the default is
    50 decisions a run; every=1 is the published pace. There the optimizer keeps the moments of a
    frozen leaf; here it loses them, for leaves parked at different steps would each need a step of
    their own. It saves dW and optimizer state, no dX.

    Args:
      outline: of the run.
      share: of the leaves outside `always` that is frozen.
      every: period of decisions; the first is made before the first step.
      always: set expression that trains throughout; None is biases, final norm and head.
    """
    outline.require("slimfit", "bias")
    fixed = always if always is not None else f"bias + {outline.units[-1]}"
    if always is None and outline.blocks and "final" in outline.sets and "norm" in outline.sets:
        # A final stage may hold more than a norm, which is then ranked as any other weight.
        fixed = "bias + final & norm + head"
    args = {"share": share, "always": fixed}
    return _rule("rel_update", "freeze_lowest", args, every=every, first=True)


def spectrum(outline: Outline, *, share: float = 0.5, always: str | None = None) -> Recipe:
    """Spectrum (Hartford et al. 2024, arXiv:2406.06623).

    Read in cognitivecomputations/spectrum, spectrum.py: before training the modules of each type,
    the same place in every block, are ranked by the signal-to-noise ratio of their weight's
    spectrum, and the int(share * n) best train, with embeddings and head. There the user picks the
    types; here all matrices and kernels take part, and norms do not train. Default 50 % as there;
    the paper also has 25 %.

    Args:
      outline: of the run.
      share: of the modules of a type that trains.
      always: set expression that trains throughout; None is all that is in no block.
    """
    outline.require("spectrum", blocks=True)
    args = {"share": share, "always": outline.always if always is None else always}
    return _rule("weight_snr", "top_per_type", args)


def child_tuning(
    outline: Outline,
    *,
    variant: str = "D",
    share: float = 0.3,
    always: str | None = None,
    batches: int = 8,
) -> Recipe:
    """Child-Tuning (Xu et al. 2021, arXiv:2109.05687). It saves no compute: all gradients are made.

    Read in alibaba/AliceMind, ChildTuning. F: in each step each element's gradient is kept with
    probability `share` and divided by it, else 0, for all leaves. D: once, before training, the
    `share` of the elements of the blocks with the largest Fisher information is chosen; the others
    of the blocks stay, and what is in no block (embeddings, head) trains in full. There Fisher is
    the squared gradient of a batch, clipped, over the whole training set; here that of an example,
    over `batches` batches. The script takes D with 0.3.

    Args:
      outline: of the run.
      variant: "F" (free of the task) or "D" (driven by it).
      share: of the elements.
      always: of D: set expression that trains in full; None is all that is in no block.
      batches: of D's probe.
    """
    if variant not in ("F", "D"):
        raise ConfigError(f"freeze.args.variant: {variant!r} should be 'F' or 'D'")
    if variant == "F":
        return Recipe([{"train": "all", "elements": {"kind": "bernoulli", "share": share}}])
    outline.require("child_tuning", blocks=always is None)
    args = {"share": share, "always": outline.always if always is None else always}
    return _rule("fisher", "top_elements", args, batches=batches)


def fish(
    outline: Outline, *, share: float = 0.005, always: str = "head", batches: int = 8
) -> Recipe:
    """FISH mask (Sung et al. 2021, arXiv:2111.09839). It saves no compute: all gradients are made.

    Read in varunnair18/FISH, cifar10-fast/fisher.py: once, before training, the 0.5 % of all
    elements with the largest empirical Fisher information, the squared gradient of an example
    summed over 256 (CIFAR) or 1024 (GLUE) of them, are chosen; the head trains in full. There the
    head counts within the 0.5 %; here the share is of the other elements, which does not depend on
    the number of classes.

    Args:
      outline: of the run.
      share: of the elements outside `always`.
      always: set expression that trains in full.
      batches: of the probe.
    """
    args = {"share": share, "always": _known(outline, always)}
    return _rule("fisher", "top_elements", args, batches=batches)


def saft(
    outline: Outline, *, share: float = 0.001, always: str = "head", batches: int = 8
) -> Recipe:
    """SAFT (Nguyen et al. 2024, arXiv:2407.03036). It saves no compute: all gradients are made.

    From the abstract: only the elements with the largest gradient magnitude train, 0.1 % of them.
    That it is the mean gradient before training, and one choice for all leaves together, is
    unverified. CLIP has no head; a fresh one has to train in full.

    Args:
      outline: of the run.
      share: of the elements outside `always`.
      always: set expression that trains in full.
      batches: of the probe.
    """
    args = {"share": share, "always": _known(outline, always)}
    return _rule("grad_abs", "top_elements", args, batches=batches)


def _rule(signal: str, decide: str, args: dict, **keys: object) -> Recipe:
    entry: Entry = {"generator": "rule", "signal": signal, "decide": decide, "args": args}
    return Recipe([{**entry, **keys}])


def _known(outline: Outline, always: str) -> str:
    """The default "head", or "" for a model that has no such group."""
    return "" if always == "head" and "head" not in outline.sets else always


def _excluded(outline: Outline, exclude: str | None) -> str:
    if exclude is not None:
        return exclude
    return "batch_norm" if "batch_norm" in outline.sets else ""
