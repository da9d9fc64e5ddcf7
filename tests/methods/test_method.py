"""Methods and presets."""

from __future__ import annotations

import json
import math

import pytest

from nse_tools import methods
from nse_tools.errors import SettingError
from nse_tools.steps.post_process import CompressGrowth, DampTopDirections, KeepLargest

RELEASED = {  # method.md §4
    "gpt2-xl": ((13, 14, 15, 16, 17), 0.5, 20, 10_000, 35, 150, 1.0),
    "gpt-j-6b": ((3, 4, 5, 6, 7, 8), 0.5, 25, 15_000, 15, 100, 0.8),
    "llama3-8b": ((4, 5, 6, 7, 8), 0.1, 25, 15_000, 2.5, 50, 1.0),
}


@pytest.mark.parametrize("preset", RELEASED)
def test_presets_have_the_released_settings(preset: str) -> None:
    m = methods.nse(preset)
    found = (
        m.layers,
        m.values.v_lr,
        m.values.v_num_grad_steps,
        m.solver.mom2_update_weight,
        m.schedule.alpha,
        m.schedule.upper_bound,
        m.neurons.neuron_threshold,
    )
    assert found == RELEASED[preset]
    assert (m.values.clamp_norm_factor, m.values.v_weight_decay, m.values.kl_factor, m.schedule.passes) == (0.75, 0.5, 0.0625, 2)
    assert (m.values.values_under, m.solver.use_previous_keys, m.neurons.per, m.schedule.band_unit, m.values.v_loss_threshold) == (
        "original",
        True,
        "batch",
        "absolute",
        0.05,
    )
    assert m.preset == preset
    assert m.name == "nse"


def test_the_shapes_that_presets_were_made_for() -> None:
    shapes = {name: tuple(p["model"][k] for k in ("n_layers", "d_model", "d_ff")) for name, p in methods.presets().items()}
    assert shapes == {
        "gpt2-xl": (48, 1600, 6400),
        "gpt-j-6b": (28, 4096, 16384),
        "llama3-8b": (32, 4096, 14336),
        "smollm2-135m": (30, 576, 1536),
        "smollm2-135m-recipe": (30, 576, 1536),
    }


def test_a_preset_like_another_has_its_tables_but_for_settings_of_its_own() -> None:
    base, recipe = (methods.presets()[name] for name in ("smollm2-135m", "smollm2-135m-recipe"))
    assert recipe.keys() == base.keys()
    assert all(recipe[table] == base[table] for table in base if table not in ("nse", "alphaedit"))
    assert recipe["nse"].keys() > base["nse"].keys()
    assert (recipe["nse"]["v_lr"], recipe["nse"]["solver"]) == (base["nse"]["v_lr"], "null_space")
    name = "smollm2-135m-recipe"
    assert methods.alphaedit(name).with_(name="nse") == methods.nse(name)


def test_the_relatives_differ_from_nse_where_they_should() -> None:
    nse, memit, seq = (make("gpt-j-6b") for make in (methods.nse, methods.memit, methods.memit_seq))
    for other, history in ((memit, False), (seq, True)):
        assert tuple(map(other.setting, ("values_under", "neuron_threshold", "passes", "use_previous_keys"))) == (
            "current",
            1.0,
            1,
            history,
        )
        assert (other.schedule.alpha, other.schedule.upper_bound) == (0.0, math.inf)
        assert all(other.setting(s) == nse.setting(s) for s in ("layers", "v_lr", "mom2_update_weight"))
    assert methods.memit("gpt2-xl").setting("mom2_update_weight") == methods.memit_seq("gpt2-xl").setting("mom2_update_weight") == 20_000
    assert methods.memit("gpt2-xl", mom2_update_weight=5.0).setting("mom2_update_weight") == 5


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("v_lr", 0),
        ("v_lr", -0.1),
        ("v_lr", "fast"),
        ("v_lr", float("nan")),
        ("v_lr", True),
        ("v_num_grad_steps", 0),
        ("v_num_grad_steps", 2.5),
        ("v_loss_threshold", -1),
        ("v_stop_at_argmax", -1),
        ("v_stop_at_argmax", 1.5),
        ("norm_anchor", 1),
        ("v_weight_decay", -1),
        ("clamp_norm_factor", 0),
        ("kl_factor", -1),
        ("neuron_threshold", 0),
        ("neuron_threshold", 1.01),
        ("passes", 0),
        ("passes", 1.5),
        ("alpha", -1),
        ("mom2_update_weight", -1),
        ("max_condition", 0),
        ("per", "layer"),
        ("values_under", "old"),
        ("band_unit", "percent"),
        ("use_previous_keys", 1),
        ("spread", "odd"),
        ("ridge", -1),
        ("layers", ()),
        ("layers", (3, 2)),
        ("layers", (2, 2)),
        ("layers", (-1,)),
        ("layers", (1.0,)),
        ("layers", ("1",)),
    ],
)
def test_values_out_of_range_name_the_setting(setting: str, value: object) -> None:
    with pytest.raises(SettingError, match=rf"{setting}=.*expected"):
        methods.nse(**{setting: value})


@pytest.mark.parametrize(
    ("make", "setting", "value"),
    [
        (lambda **s: methods.alphaedit(**s), "nullspace_unit", "share"),
        (lambda **s: methods.alphaedit(**s), "nullspace_threshold", 0),
        (DampTopDirections, "top_share", 0),
        (DampTopDirections, "top_damping", 1.5),
        (KeepLargest, "keep_share", 0),
        (KeepLargest, "keep_share", 1.1),
        (CompressGrowth, "compress_base", 1),
    ],
)
def test_values_of_parts_out_of_range_name_the_setting(make, setting: str, value: object) -> None:
    with pytest.raises(SettingError, match=rf"{setting}=.*expected"):
        make(**{setting: value})


@pytest.mark.parametrize(
    ("setting", "value"), [("neuron_score", "norm"), ("solver", "cholesky"), ("selection_rule", "exceed"), ("post_process", ["both"])]
)
def test_a_part_that_does_not_exist_is_named(setting: str, value: object) -> None:
    with pytest.raises(SettingError, match="There is no (neuron score|solver|selection rule|post process) '"):
        methods.nse(**{setting: value})


def test_the_band_must_have_an_inside() -> None:
    with pytest.raises(SettingError, match="alpha=3.0: expected a norm below upper_bound=2.0"):
        methods.nse(None, name="x", layers=(1,), alpha=3.0, upper_bound=2.0)
    with pytest.raises(SettingError, match="alpha"):
        methods.nse(None, name="x", layers=(1,)).with_(alpha=1.0, upper_bound=1.0)


def test_the_null_space_needs_a_ridge() -> None:
    with pytest.raises(SettingError, match="ridge=0.0.*solver='null_space'"):
        methods.nse(None, name="x", layers=(1,), solver="null_space", ridge=0.0)
    with pytest.raises(SettingError, match="ridge"):
        methods.alphaedit(ridge=0)


@pytest.mark.parametrize("setting", ["post_process", "passes", "spread", "keep_share"])
@pytest.mark.parametrize("make", [methods.rome, methods.ft])
def test_settings_that_a_family_does_not_have_are_refused(make, setting: str) -> None:
    with pytest.raises(SettingError, match=f"There is no setting '{setting}'"):
        make(**{setting: 1})


def test_a_setting_of_another_part_says_whose_it_is() -> None:
    with pytest.raises(SettingError, match="'keep_share' of 'nse'. It is a setting of 'keep_largest', which this method does not use"):
        methods.nse(keep_share=0.4)


def test_the_edited_layers_are_all_or_the_ends() -> None:
    assert methods.nse(None, name="x", layers=(1, 3, 4)).edited_layers == (1, 3, 4)
    assert methods.nse(None, name="x", layers=(1, 3, 4), spread="ends").edited_layers == (1, 4)
    assert methods.nse(None, name="x", layers=(3,), spread="ends").edited_layers == (3,)
    assert methods.nse(None, name="x", layers=(1, 3, 4), spread="replay").edited_layers == (1, 3, 4)
    assert [
        methods.nse(None, name="x", layers=layers, spread=s).needs_first_values
        for layers in ((1, 3), (3,))
        for s in ("even", "ends", "replay")
    ] == [
        *(False, True, True),
        *(False, False, False),
    ]


@pytest.mark.parametrize(
    ("wrong", "right"), [("neuron_treshold", "neuron_threshold"), ("learning_rate_v_lr", "v_lr"), ("layer", "layers"), ("pases", "passes")]
)
def test_an_unknown_setting_is_answered_with_the_nearest(wrong: str, right: str) -> None:
    for call in (lambda: methods.nse(**{wrong: 1}), lambda: methods.nse(None, name="x", layers=(1,)).with_(**{wrong: 1})):
        with pytest.raises(SettingError) as seen:
            call()
        assert f"There is no setting {wrong!r}" in str(seen.value)
        assert right in str(seen.value)


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(SettingError, match="no preset 'gpt2xl'. Did you mean 'gpt2-xl'"):
        methods.nse("gpt2xl")
    with pytest.raises(SettingError, match="layers=…|layers="):
        methods.nse(None)
    assert methods.nse(None, layers=(1, 2)).preset is None


def test_a_method_is_frozen_and_goes_through_plain_data() -> None:
    method = methods.nse(layers=[1, 3], neuron_threshold=0.5)
    assert method.layers == (1, 3)
    assert method.last_layer == 3
    assert methods.from_dict(json.loads(json.dumps(method.to_dict()))) == method
    assert method.with_(passes=3) == methods.nse(layers=[1, 3], neuron_threshold=0.5, passes=3)
    assert len({method, methods.nse(layers=[1, 3], neuron_threshold=0.5)}) == 1
    with pytest.raises(AttributeError):
        method.schedule.passes = 3
    frame = method.to_frame().set_index("setting").value
    assert frame["neuron_threshold"] == 0.5
    assert frame.to_dict() == method.settings()
