"""What a config says of the networks: every mistake is named."""

import pytest

from unialign_jax.networks import build_networks

MODEL = {
    "transformer": {
        **{"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16},
        **{"in_channels": 12, "out_channels": 12},
    },
    "text_encoder": {"num_layers": 1},
    "pixel_codec": {"patch": 2},
}


def test_fields_have_defaults_tuples_may_be_lists_and_ints_are_floats():
    networks = build_networks(
        MODEL
        | {
            "pixel_codec": {"patch": 2, "scaling_factor": 2},
            "teacher": {"fullatt_block_indexes": [7, 15]},
        }
    )
    assert networks.transformer.config.width == 16 and networks.codec.config.scaling_factor == 2
    assert networks.teacher.config.fullatt_block_indexes == (7, 15)
    assert build_networks(MODEL | {"teacher": {}}).teacher is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer": None}, "model.transformer is missing"),
        ({"pixel_codec": None}, "one of autoencoder and pixel_codec, found neither"),
        ({"autoencoder": {"latent_channels": 4}}, "one of autoencoder and pixel_codec, found both"),
        ({"pixel_codec": {"scaling_factor": 2.0}}, "model.pixel_codec.patch: missing"),
        ({"pixel_codec": {"patch": "2"}}, "model.pixel_codec.patch: expected int, found '2'"),
        ({"text_encoder": {"num_layers": 1.0}}, "model.text_encoder.num_layers: expected int, found 1.0"),
        ({"pixel_codec": {"patch": 0}}, "model.pixel_codec.patch is 0, expected 1 or more"),
        ({"transformer": {"mask_token_id": -1}}, "model.transformer.mask_token_id is -1, expected 0 or more"),
        ({"text_encoder": {"num_heads": 0}}, "model.text_encoder.num_heads is 0, expected 1 or more"),
        ({"text_encoder": {"d_ff": None}}, "model.text_encoder.d_ff: expected int, found None"),
        ({"text_encoder": {"layers": 1}}, "model.text_encoder.layers: unknown key; known are .*num_layers"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        build_networks(MODEL | change)
