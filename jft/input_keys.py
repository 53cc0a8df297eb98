"""The config keys of what a run starts from: model, weights, data, augmentation."""

from jft.values import Key

INPUT_KEYS: dict[str, Key] = {
    "seed": Key(
        0,
        int,
        "the only source of randomness: fresh leaves, data order, augmentation, dropout",
        low=0,
        high=2**32 - 1,  # jax keeps 32 bits of it
    ),
    "model.name": Key("efficientnet_lite0", str, "architecture; `jft models` lists them"),
    "model.args": Key({}, dict, "fields of the model, `--config.model.args.patch=8`"),
    "init.source": Key(
        None,
        str | None,
        "starting weights: pkg:DISTRIBUTION/path, file:PATH, hf:OWNER/NAME[@REVISION][/PATH] or"
        " random:SEED; None trains from scratch",
    ),
    "init.fresh": Key(
        [], list, "patterns of leaves that may start fresh (a head whose classes differ always may)"
    ),
    "init.dtype": Key(
        "float32",
        str,
        "of the parameters: float32, exact casts of a source in fewer bits; source, as it has them"
        " (half the memory of a bfloat16 file, but updates below 1/256 of a number are lost)",
        choices=("float32", "source"),
    ),
    "data.name": Key(
        "folder",
        str,
        "kind of data: folder, table, webdataset, hf, tfds, npz, csv (of pixels), sklearn;"
        " `jft data list` has their options",
    ),
    "data.path": Key(
        None,
        str | None,
        "file, folder, pkg:DISTRIBUTION/path, hf:owner/name, or the name of a scikit-learn set",
    ),
    "data.args": Key({}, dict, "options of that kind of data"),
    "data.val_fraction": Key(
        0.1,
        float,
        "share of the training examples held out as split `val`; unused when the data has one",
        low=0,
        high=1,
    ),
    "data.test_fraction": Key(
        0.0,
        float,
        "share of all examples held out as split `test`; unused when the data has one",
        low=0,
        high=1,
    ),
    "data.train_examples": Key(
        None, int | None, "train on only so many examples, balanced over classes", low=1
    ),
    "data.sampling": Key(
        "shuffle",
        str,
        "how often an epoch visits each class: shuffle, as the data has it; balanced, all equally;"
        " sqrt, by the square root of its size",
        choices=("shuffle", "balanced", "sqrt"),
    ),
    "data.image_size": Key(
        None, int | None, "side of the model's input in pixels; None is the model's own", low=1
    ),
    "data.channels": Key(
        None, int | None, "channels of the model's input; None is the model's own, 3", low=1
    ),
    "data.bands": Key(
        None, list | None, "bands of each picture that count, from 0, `[3, 2, 1]`; None is all"
    ),
    "data.depth": Key(
        None,
        int | None,
        "bits of a value that reach the device, 8 or 16; None keeps 16 where all images have more"
        " than 8",
        low=8,
        high=16,
    ),
    "data.range": Key(
        None,
        list | None,
        "values that become black and white, [low, high] or one such pair a band; None is the whole"
        " range of 8 or 16 bits",
    ),
    "data.mean": Key(
        None, list | None, "mean of each channel, on the scale 0..255; None is the weights' own"
    ),
    "data.std": Key(
        None, list | None, "deviation of each channel, same scale; None is the weights' own"
    ),
    "data.workers": Key(
        0, int, "processes that decode images; 0 decodes in threads", low=0, free=True
    ),
    "data.bad_image_quota": Key(
        0.0,
        float,
        "share of a split's images that may be unreadable and are left out; above 0 at least one",
        low=0,
        high=1,
    ),
    "data.cache": Key(
        "off",
        str,
        "decode every image once, before augmentation: disk keeps them in the user's cache folder"
        " for later runs, memory for this one",
        choices=("off", "disk", "memory"),
        free=True,
    ),
    "data.check": Key(
        "auto",
        str,
        "images that are looked at before a run: all; auto: all of up to 1,000 (100 MB), of up to"
        " 50,000 files the beginning; off",
        choices=("auto", "off", "all"),
        free=True,
    ),
    "augment.flip": Key(True, bool, "mirror half of the training images left to right"),
    "augment.crop": Key(
        "none", str, "random part of the image for training", choices=("none", "random_resized")
    ),
    "augment.scale": Key(
        [0.5, 1.0], list, "random_resized: smallest and largest share of the area"
    ),
    "augment.ratio": Key(
        [0.75, 4 / 3], list, "random_resized: smallest and largest width over height"
    ),
    "augment.ops": Key(
        "",
        str,
        'what follows crop and flip, "rotate(30) | colour(0.4, 0.4) | erase(0.25)"; see'
        " docs/augmentation.md",
    ),
    "augment.mixup": Key(
        0.0, float, "mixup: alpha of the Beta distribution of shares; 0 mixes nothing", low=0
    ),
    "augment.cutmix": Key(
        0.0, float, "cutmix: alpha of the Beta distribution of shares; 0 cuts nothing", low=0
    ),
    "augment.mix_prob": Key(
        1.0, float, "share of the images that mixup or cutmix mixes", low=0, high=1
    ),
    "augment.cutmix_share": Key(
        0.5, float, "of the mixed images, those by cutmix where mixup is on too", low=0, high=1
    ),
}
