"""Methods whose trainable set never changes."""

from jft.errors import ConfigError
from jft.freeze.outline import Outline
from jft.freeze.recipe import Recipe


def full(outline: Outline) -> Recipe:
    """Everything trains for the whole run."""
    del outline
    return Recipe([{"train": "all"}])


def linear_probe(outline: Outline) -> Recipe:
    """Only the head trains."""
    outline.require("linear_probe", "head")
    return Recipe([{"train": "head"}])


def last_k(outline: Outline, *, k: int = 1) -> Recipe:
    """The last `k` blocks, whatever follows them, and the head train."""
    outline.require("last_k", blocks=True)
    _check_count(outline, "k", k)
    return Recipe([{"train": outline.above(outline.first_block + outline.blocks - k)}])


def first_k(outline: Outline, *, k: int = 1) -> Recipe:
    """The stem, the first `k` blocks and the head train: the mirror image of `last_k`.

    It saves dW alone, for the gradient has to reach the stem.
    """
    outline.require("first_k", "head", blocks=True)
    _check_count(outline, "k", k)
    stem = outline.units[: outline.first_block]
    return Recipe([{"train": " + ".join([*stem, f"block[:{k}]", *outline.between(0, k), "head"])}])


def surgical(
    outline: Outline,
    *,
    start: int = 0,
    stop: int | None = None,
    stem: bool = True,
    always: str = "head",
) -> Recipe:
    """Surgical fine-tuning: one run of consecutive blocks (Lee et al. 2023, arXiv:2210.11466).

    Read in anniesch/surgical-finetuning, main.py: one stage of a ResNet trains with Adam, the first
    together with the stem. The first fits a shift of the input, a middle one a shift of features,
    the last one a shift of the output. There the classes stay and the head is frozen; here it
    trains, for a fresh head has to (always="" freezes it).

    Args:
      outline: of the run.
      start: first block.
      stop: the block after the last; None is a quarter of the blocks, as there are four stages.
      stem: whether the stem trains with block 0.
      always: set expression that trains beside the blocks.
    """
    outline.require("surgical", blocks=True)
    if stop is None:
        stop = min(start + max(1, outline.blocks // 4), outline.blocks)
    if not 0 <= start < stop <= outline.blocks:
        raise ConfigError(
            f"freeze.args: blocks start={start!r} to stop={stop!r} should have"
            f" 0 <= start < stop <= {outline.blocks}"
        )
    parts = [*(outline.units[: outline.first_block] if stem and start == 0 else ())]
    parts += [f"block[{start}:{stop}]", *outline.between(start, stop)]
    parts += [always] if always else []
    return Recipe([{"train": " + ".join(parts)}])


def attention_only(outline: Outline) -> Recipe:
    """Attention, position embeddings and head train (Touvron et al. 2022, arXiv:2203.09795).

    Read in facebookresearch/deit, main.py, --attn-only: every tensor of the attention modules, the
    position embedding and the head; norms, MLPs and the patch projection are frozen.
    """
    outline.require("attention_only", "attn", "head")
    position = ["position"] if "position" in outline.sets else []
    return Recipe([{"train": " + ".join(["attn", *position, "head"])}])


def bitfit(outline: Outline) -> Recipe:
    """Every bias and the head train (Ben Zaken et al. 2022, arXiv:2106.10199).

    Read in benzakenelad/BitFit, GLUEvaluator.py: all terms called "bias", those of norms among
    them, and the classifier.
    """
    outline.require("bitfit", "bias", "head")
    return Recipe([{"train": "bias + head"}])


def norm_only(outline: Outline) -> Recipe:
    """Scale and bias of every norm, and the head, train.

    BatchNorm: Frankle et al. 2021 (arXiv:2003.00152), with a random network and no head there;
    LayerNorm: arXiv:2211.08682. Both unverified beyond their abstracts.
    """
    outline.require("norm_only", "norm", "head")
    return Recipe([{"train": "norm + head"}])


def layerwise_decay(outline: Outline, *, rate: float = 0.75) -> Recipe:
    """Everything trains, each layer at `rate` times the learning rate of the one above it.

    Read in facebookresearch/mae, util/lr_decay.py (He et al. 2022, arXiv:2111.06377; first by Clark
    et al. 2020, arXiv:2003.10555): with L blocks, embeddings have rate ** (L + 1), block b has
    rate ** (L - b), final norm and head have 1. It saves nothing. Default 0.75 as there; ViT-B was
    tuned with 0.65.
    """
    del outline
    return Recipe([{"train": "all", "lr_scale": {"name": "depth_decay", "rate": rate}}])


def _check_count(outline: Outline, name: str, count: int) -> None:
    if not 1 <= count <= outline.blocks:
        raise ConfigError(
            f"freeze.args.{name}: {count!r} should be a whole number of blocks,"
            f" 1 to {outline.blocks}"
        )
