"""DINOv2's files where no other library is needed to tell."""

import pytest

from jft.errors import WeightsError
from jft.models.zoo import FAMILIES

READ = FAMILIES["dinov2"].variant_from_config


def timm(size="small", **model_args):
    return {"architecture": f"vit_{size}_patch14_dinov2.lvd142m", "model_args": model_args}


@pytest.mark.parametrize("name", ["pre_norm", "nonsense"])
def test_an_argument_of_timms_that_is_not_known_is_refused(name):
    with pytest.raises(WeightsError, match=f"model_args '{name}' is not known here"):
        READ(timm(**{name: True}))


def test_timms_activation_is_read_where_it_plays_a_part():
    assert READ(timm())["gelu"] == "exact"
    assert READ(timm(act_layer="gelu_tanh"))["gelu"] == "tanh"
    assert "gelu" not in READ(timm("giant", act_layer="silu")), "its MLP is gated"
    with pytest.raises(WeightsError, match="act_layer 'mish' is not known"):
        READ(timm(act_layer="mish"))


def test_what_a_config_of_hugging_faces_leaves_out_is_as_transformers_takes_it():
    found = READ({"model_type": "dinov2", "hidden_size": 768, "patch_size": [14, 14]})
    assert (found["heads"], found["epsilon"], found["patch"]) == (12, 1e-6, 14)
    assert "heads" not in READ({"hidden_size": 768}), "no class is named"
    with pytest.raises(WeightsError, match="model_type 'vit' of the source is none of dinov2"):
        READ({"model_type": "vit"})
