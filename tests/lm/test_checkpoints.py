"""Models that people have: families without SDPA, mixtures of experts, composites, checkpoints that lack weights, and saving."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from retrograd import DataStream, Trainer
from retrograd.lm import adapters
from retrograd.lm.model import CausalLM, bound_model, load_causal_lm, load_tokenizer
from retrograd.lm.save import save_causal_lm
from retrograd.optim import adamw

COMMON: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
ENDS: dict[str, Any] = {"vocab_size": tiny.VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
EAGER = ["bloom", "gemma2", "gpt-j", "gpt-neo", "gpt-oss", "mamba"]
EXPERTS = ["gpt-oss", "mixtral", "qwen3-moe"]


def configuration(family: str) -> Any:
    import transformers as tf

    heads = {"num_heads": 2, "max_position_embeddings": 32, "intermediate_size": 24}
    small = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    found: dict[str, Callable[[], Any]] = {
        "bloom": lambda: tf.BloomConfig(**ENDS, hidden_size=16, n_layer=2, n_head=2),
        "gemma2": lambda: tf.Gemma2Config(**COMMON, head_dim=8, final_logit_softcapping=None),
        "gpt-j": lambda: tf.GPTJConfig(**ENDS, **small, rotary_dim=4),
        "gpt-neo": lambda: tf.GPTNeoConfig(**ENDS, **heads, hidden_size=16, num_layers=2,
                                           attention_types=[[["global", "local"], 1]]),
        "gpt-oss": lambda: tf.GptOssConfig(**COMMON, **experts, head_dim=8, rope_parameters=None,
                                           layer_types=["full_attention", "sliding_attention"]),
        "llama": lambda: tf.LlamaConfig(**COMMON),
        "mamba": lambda: tf.MambaConfig(**ENDS, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=2),
        "mixtral": lambda: tf.MixtralConfig(**COMMON, **experts),
        "qwen2-tied": lambda: tf.Qwen2Config(**COMMON, tie_word_embeddings=True),
        "qwen3-moe": lambda: tf.Qwen3MoeConfig(**COMMON, head_dim=8, num_experts=4, num_experts_per_tok=2,
                                               moe_intermediate_size=8),
    }  # fmt: skip
    return found[family]()


def saved(folder: Path, family: str) -> str:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(configuration(family))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # so that routers, caps and masks count
    module.save_pretrained(folder / family)
    tiny.save_tokenizer(folder / family)
    return str(folder / family)


def batch() -> tuple[dict[str, Tensor], Tensor]:
    ids = torch.randint(2, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 0] = mask[1, 6:] = False
    return {"input_ids": ids, "target_mask": mask}, mask.double() / 13


# --- families --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted({*EAGER, *EXPERTS}))
def test_the_objective_is_the_modules_and_is_differentiable_twice(tmp_path: Path, family: str) -> None:
    lm = load_causal_lm(saved(tmp_path, family), dtype="float64")
    inputs, coefficients = batch()
    plain = torch.zeros((), dtype=torch.float64)
    for row, length in ((0, 9), (1, 6)):
        ids = inputs["input_ids"][row : row + 1, :length]
        logits = bound_model(lm.module)(lm.params)(input_ids=ids).logits[0, :-1]
        plain += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum") / 13
    assert float(lm.objective(lm.params, inputs, coefficients)) == pytest.approx(float(plain), rel=1e-9)

    draw = torch.Generator().manual_seed(1)
    along = {name: torch.randn(x.shape, generator=draw, dtype=x.dtype) for name, x in lm.params.items()}

    def slope(step: float, keep: bool = False) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        leaves = {name: (x + step * along[name]).requires_grad_() for name, x in lm.params.items()}
        value = lm.objective(leaves, inputs, coefficients)
        return leaves, torch.autograd.grad(value, list(leaves.values()), create_graph=keep, materialize_grads=True)

    leaves, grads = slope(0.0, keep=True)
    pushed = sum((grad * along[name]).sum() for grad, name in zip(grads, leaves))
    assert isinstance(pushed, Tensor)
    product = torch.autograd.grad(pushed, list(leaves.values()), materialize_grads=True)
    measured = [(up - down) / 2e-6 for up, down in zip(slope(1e-6)[1], slope(-1e-6)[1])]
    size = sum(float(x.norm()) ** 2 for x in measured) ** 0.5

    def error(factor: float) -> float:
        return sum(float((factor * x - y).norm()) ** 2 for x, y in zip(product, measured)) ** 0.5 / size

    assert error(1.0) < 1e-6 < error(1.001)


@pytest.mark.parametrize(
    ("family", "dtype"), [("mixtral", "float32"), pytest.param("gpt-oss", "float64", marks=pytest.mark.slow)]
)
def test_mixtures_of_experts_run_with_both_engines(tmp_path: Path, family: str, dtype: str) -> None:
    source, kind = saved(tmp_path, family), getattr(torch, dtype)
    found = []
    for engine in ("double", "blocks"):
        lm = load_causal_lm(source, dtype=dtype)
        trainer, state = Trainer.initialize(lm.module, adamw(lr=1e-3, eps_root=1e-6), engine=engine)
        stream = DataStream([[5, 6, 7, 8, 9], [9, 10, 11], [12, 13, 14, 15, 16]], 2, dtype=kind)
        query = trainer.evaluate(trainer.train(state, stream), DataStream([[5, 6, 7, 8], [9, 10, 4]], 2, dtype=kind))
        found.append(trainer.backward(None, stream, query).weight_grads)
    torch.testing.assert_close(*found, rtol=1e-4 if dtype == "float32" else 1e-10, atol=0)


def test_the_text_part_of_a_composite_checkpoint(tmp_path: Path) -> None:
    import transformers as tf

    text = {**COMMON, "head_dim": 8, "intermediate_size_mlp": 24, "num_local_experts": 2}
    sight = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
             "image_size": 28, "patch_size": 14, "vision_output_dim": 16, "projector_input_dim": 16,
             "projector_output_dim": 16}  # fmt: skip
    torch.manual_seed(0)
    whole = tf.Llama4ForConditionalGeneration(tf.Llama4Config(text_config=text, vision_config=sight)).eval()
    whole.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"holds \d+ weights that the model does not use: multi_modal_projector"):
        lm = load_causal_lm(str(tmp_path))
    ids = batch()[0]["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(lm.module(input_ids=ids).logits, whole(input_ids=ids).logits)


# --- checkpoints that are not whole ----------------------------------------------------------------------------------


def broken(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **config: Any) -> str:
    source = saved(folder, "llama")
    weights, about = Path(source) / "model.safetensors", Path(source) / "config.json"
    save_file(change(load_file(weights)), weights, {"format": "pt"})
    about.write_text(json.dumps(json.loads(about.read_text()) | config))
    return source


def test_weights_that_a_checkpoint_lacks_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"lacks 21 of its weights, .*: lm_head.weight, .* and 16 more.*_orig_mod\.lm_he"
    ):
        load_causal_lm(broken(tmp_path, lambda x: {f"_orig_mod.{name}": weight for name, weight in x.items()}))
    with pytest.raises(ValueError, match=r"lacks 1 of its weights.*: model\.norm\.weight"):
        load_causal_lm(broken(tmp_path, lambda x: {k: v for k, v in x.items() if k != "model.norm.weight"}))
    with pytest.raises(ValueError, match=r"lacks 9 of its weights.*: model\.layers\.2\."):
        load_causal_lm(broken(tmp_path, dict, num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"lacks 1 of its weights.*: lm_head\.weight"):
        load_causal_lm(broken(tmp_path, lambda x: {k: v for k, v in x.items() if k != "lm_head.weight"}))


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"6 weights .*other shapes.*mlp.down_proj.weight \(\[16, 24\], not \[16, 40\]\)"
    ):
        load_causal_lm(broken(tmp_path, dict, intermediate_size=40))


def test_weights_that_go_unused_are_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"holds 9 weights that the model does not use: model\.layers\.1\."):
        load_causal_lm(broken(tmp_path, dict, num_hidden_layers=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_causal_lm(saved(tmp_path, "qwen2-tied"))  # one of two tied weights is in the file


# --- saving ----------------------------------------------------------------------------------------------------------


def adapted(source: str, target: str) -> CausalLM:
    from peft import LoraConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft tells of tied weights
        return load_causal_lm(source, lora=LoraConfig(r=2, target_modules=[target], task_type="CAUSAL_LM"))


def moved(lm: CausalLM) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {name: x + 0.2 * torch.randn(x.shape, generator=draw) for name, x in lm.params.items()}


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "q_proj"])
def test_adapters_on_tied_weights_are_saved_as_the_model_that_was_measured(tmp_path: Path, target: str) -> None:
    source = saved(tmp_path, "qwen2-tied")
    lm = adapted(source, target)
    params, ids = moved(lm), batch()[0]["input_ids"]
    save_causal_lm(tmp_path / "best", lm.module, load_tokenizer(source), params)
    found = load_causal_lm(str(tmp_path / "best")).module
    assert found.config.tie_word_embeddings == (target == "q_proj")
    expected = bound_model(lm.module)(params)(input_ids=ids).logits
    torch.testing.assert_close(found(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert (lm.module(input_ids=ids).logits - expected).abs().max() > 1e-2  # the module's own stay


def test_adapters_that_change_both_of_two_tied_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "_untie", lambda adapted: None)
    source = saved(tmp_path, "qwen2-tied")
    lm = adapted(source, "lm_head")
    with pytest.raises(ValueError, match=r"adapters cannot be merged .* logits move by .*Choose other --lora.target"):
        save_causal_lm(tmp_path / "best", lm.module, load_tokenizer(source), moved(lm))
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize("family", ["bloom", "gemma2", "gpt-oss", "mamba", "mixtral", "qwen2-tied"])
def test_a_saved_model_reads_back_bit_for_bit(tmp_path: Path, family: str) -> None:
    source = saved(tmp_path, family)
    lm = load_causal_lm(source)
    params = moved(lm)
    save_causal_lm(tmp_path / "best", lm.module, load_tokenizer(source), params)
    found = load_causal_lm(str(tmp_path / "best")).params
    assert found.keys() == params.keys()
    assert all(torch.equal(found[name], params[name]) for name in params)


def test_a_diverged_model_is_saved_as_it_is(tmp_path: Path) -> None:
    source = saved(tmp_path, "llama")
    lm = load_causal_lm(source)
    save_causal_lm(
        tmp_path / "best", lm.module, load_tokenizer(source), {name: x * torch.nan for name, x in lm.params.items()}
    )
    assert all(x.isnan().all() for x in load_causal_lm(str(tmp_path / "best")).params.values())


def test_what_does_not_read_back_is_refused_and_the_old_folder_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(tmp_path, "llama")
    lm, tokenizer = load_causal_lm(source), load_tokenizer(source)
    save_causal_lm(tmp_path / "best", lm.module, tokenizer)
    write = type(lm.module).save_pretrained

    def damaged(self: Any, folder: Path, **options: Any) -> None:
        write(self, folder, **options)
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"][3] += 1e-7
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(type(lm.module), "save_pretrained", damaged)
    with pytest.raises(
        ValueError, match=r"does not read back as the one measured: 1 of 21 tensors differ, model\.norm\.weight"
    ):
        save_causal_lm(tmp_path / "best", lm.module, tokenizer, moved(lm))
    kept = load_causal_lm(str(tmp_path / "best")).params
    assert all(torch.equal(kept[name], lm.params[name]) for name in kept)


@pytest.mark.parametrize("load", [load_tokenizer, load_causal_lm])
@pytest.mark.parametrize("name", ["./absent", "{0}/absent/model", "a/b/c", "~/absent-model"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(load: Any, name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the folder does not exist; /.* does"):
        load(name.format(tmp_path))


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(ValueError, match="the folder is a file"):
        load_tokenizer(str(tmp_path / "model"))
