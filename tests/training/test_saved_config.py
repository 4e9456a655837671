"""Comparing a resumed run's config with the saved one."""

import json

import ml_collections
import pytest

from unialign_jax.training import saved_config
from unialign_jax.training.run_config import ConfigError
from unialign_jax.training.saved_config import (
    ConfigChanged,
    as_json,
    check_same,
    check_unchanged,
    differences,
    library_versions,
)


def make_config(**changes):
    config = ml_collections.ConfigDict(
        {
            "steps": 100,
            "optimizer": {"learning_rate": 1e-4, "betas": (0.9, 0.99)},
            "init": {"checkpoint": ml_collections.config_dict.placeholder(str)},
            "allow_changed": (),
            "protocol": "unialignment",
            "resume_step": ml_collections.config_dict.placeholder(int),
        }
    ).lock()
    config.update_from_flattened_dict(changes)
    return config


def test_json_round_trip_compares_equal():
    config = as_json(make_config())
    assert config["optimizer"]["betas"] == [0.9, 0.99]
    assert config["init"]["checkpoint"] is None
    assert differences(json.loads(json.dumps(config)), config) == {}


def test_each_difference_is_shown_and_refused():
    changed = as_json(make_config(**{"steps": 200, "optimizer.learning_rate": 3e-5, "init.checkpoint": "dir"}))
    with pytest.raises(ConfigChanged) as error:
        check_unchanged(as_json(make_config()), changed, ())
    for part in (
        "steps was 100, is 200",
        "optimizer.learning_rate was 0.0001, is 3e-05",
        "init.checkpoint was None, is 'dir'",
        "--config.allow_changed=init.checkpoint,optimizer.learning_rate,steps",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("key", "was", "now"),
    [("seed", 1, 2), ("data.sources.edit.weight", 1.0, 2.0), ("data.sources.edit.task", "edit", "perceive")],
)
def test_what_the_order_of_samples_follows_from_is_never_allowed(key, was, now):
    def nested(value):
        for part in reversed(key.split(".")):
            value = {part: value}
        return value

    with pytest.raises(ConfigChanged, match=f"{key} was .*can't change in a run.*use another --workdir, with init"):
        check_unchanged(nested(was), nested(now), (key,))


@pytest.mark.parametrize("allowed", [("steps", "optimizer"), ("steps,optimizer.learning_rate",)])
def test_allowed_keys_pass_and_are_returned(allowed):
    changed = as_json(make_config(**{"steps": 200, "optimizer.learning_rate": 3e-5}))
    found = check_unchanged(as_json(make_config()), changed, allowed)
    assert found == {"steps": (100, 200), "optimizer.learning_rate": (1e-4, 3e-5)}


def test_a_key_allows_what_is_below_it_but_not_its_namesakes():
    saved = {"data": {"path": "a"}, "data_seed": 1, "other": {"data": 1}}
    with pytest.raises(ConfigChanged) as error:
        check_unchanged(saved, {"data": {"path": "b"}, "data_seed": 2, "other": {"data": 2}}, ("data",))
    assert "data_seed was 1" in str(error.value) and "other.data was 1" in str(error.value)
    assert "data.path was" not in str(error.value)


def test_keys_that_exist_on_one_side_only():
    assert differences({"a": {"b": 1, "c": {"d": 2}}}, {"a": {"b": 1}, "e": {}}) == {
        "a.c.d": (2, None),
        "e": (None, {}),
    }


def test_how_to_resume_is_no_difference():
    changed = as_json(make_config(**{"resume_step": 5, "allow_changed": ("steps",), "protocol": "plain"}))
    assert check_unchanged(as_json(make_config()), changed, ()) == {}


def test_processes_with_other_configs_are_refused(monkeypatch):
    one, other = as_json(make_config()), as_json(make_config(**{"optimizer.learning_rate": 3e-5}))
    monkeypatch.setattr(saved_config.agreement, "gather", lambda config: [config, config, other])
    with pytest.raises(ConfigError, match="process 0 and process 2 differ .optimizer.learning_rate: 0.0001 and"):
        check_same(one)
    monkeypatch.undo()
    check_same(one)


def test_versions_are_recorded():
    assert library_versions()["jax"].count(".") >= 2
