"""Folders of adapters as models: merged they are the adapted model, continued they are what is trained, else refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig as Lora
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from retrograd.cli import main
from retrograd.lm.checkpoint import load_module, read_config
from retrograd.lm.model import load_causal_lm, load_tokenizer
from retrograd.settings.train import LoraConfig, TrainConfig, check_training

IDS = torch.arange(2, 18).view(2, 8)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_model(folder / "base", "qwen2-tied")
    tiny.save_model(folder / "words")  # whose tokenizer knows words; a Qwen tokenizer parts texts otherwise
    tiny.save_jsonl(folder / "train.jsonl", tiny.sentences(6))
    tiny.save_jsonl(folder / "query.jsonl", tiny.sentences(2, seed=1))
    for name, targets in (("adapter", ["q_proj", "down_proj"]), ("tied", ["embed_tokens"])):
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64)
        torch.manual_seed(1)
        model = get_peft_model(base, Lora(r=2, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora" in key:
                    parameter.normal_(std=0.2)
        model.save_pretrained(folder / name)
        torch.save(model(input_ids=IDS).logits.detach(), folder / f"{name}.pt")
    return folder


def logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        return module(input_ids=IDS).logits


@pytest.mark.parametrize("name", ["adapter", "tied"])
def test_merged_and_continued_are_the_adapted_model(world: Path, name: str) -> None:
    expected = torch.load(world / f"{name}.pt")
    base = load_module(str(world / "base"), torch.float64)
    merged, continued = (load_module(str(world / name), torch.float64, how) for how in ("merge", "continue"))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(logits(continued), expected, rtol=1e-12, atol=1e-12)
    assert (logits(base) - expected).norm() > 1e-2 * expected.norm()  # the adapters do something
    assert all(p.requires_grad for p in merged.parameters())
    trained = [key for key, p in continued.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora" in key for key in trained)


def test_a_folder_has_its_bases_configuration_and_tokenizer(world: Path) -> None:
    assert read_config(str(world / "adapter")).hidden_size == 16
    assert load_tokenizer(str(world / "adapter")).get_vocab() == load_tokenizer(str(world / "base")).get_vocab()


def test_training_says_which_and_leaves_a_model_that_loads(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", str(world / "adapter"), "--data.dataset", str(world / "train.jsonl"), "--train.lr", "1e-2"]
    given += ["--tokenizer", str(world / "words")]
    assert main(["train", str(tmp_path / "none"), *given]) == 2
    assert "is a folder of adapters for" in (told := capsys.readouterr().err)
    assert "--lora.adapter continue" in told
    before = load_causal_lm(str(world / "adapter")).params
    frozen = load_causal_lm(str(world / "base")).params
    for how in ("merge", "continue"):
        assert main(["train", str(tmp_path / how), *given, "--lora.adapter", how]) == 0
        after = load_causal_lm(str(tmp_path / how / "model")).params
        changed = {name for name, x in after.items() if not torch.allclose(x, before[name], atol=1e-6)}
        assert ("model.embed_tokens.weight" in changed) == (how == "merge")
        assert changed
        if how == "continue":
            other = {name for name, x in after.items() if not torch.equal(x, frozen[name])}
            assert changed <= other == {name for name in after if "q_proj.weight" in name or "down_proj" in name}
    query = ["--query.dataset", str(world / "query.jsonl"), "--lora.adapter", "continue", "--dtype", "float64"]
    assert main(["magic", str(tmp_path / "magic"), *given, *query, "--train.eps_root", "1e-6"]) == 0
    assert main(["verify", str(tmp_path / "magic")]) == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(rank=2, adapter="continue"), "--lora.rank is 2, with 0 target modules: leave both out"),
        (LoraConfig(target_modules=("q_proj",), adapter="continue"), "with 1 target modules"),
    ],
)
def test_settings_that_contradict_each_other(config: LoraConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_training(TrainConfig(), config)


def test_a_plan_counts_what_would_be_trained(world: Path) -> None:
    from retrograd.plan.weightless import weightless

    def counted(how: Any) -> int:
        found = weightless(
            str(world / "adapter"), "float32", torch.device("cpu"), LoraConfig(adapter=how), TrainConfig()
        )
        return sum(leaf.numel() for leaf in found.params.values())

    for how in ("merge", "continue"):
        loaded = load_causal_lm(str(world / "adapter"), adapter=how)  # type: ignore[arg-type]
        assert counted(how) == sum(leaf.numel() for leaf in loaded.params.values())
    with pytest.raises(ValueError, match="is a folder of adapters for"):
        counted(None)


def test_adapters_that_do_not_fit_are_refused(world: Path, tmp_path: Path) -> None:
    def changed(name: str, **values: Any) -> Path:
        shutil.copytree(world / "adapter", tmp_path / name)
        path = tmp_path / name / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return tmp_path / name

    tiny.save_model(tmp_path / "other", "gpt2-tied")
    for folder, message in (
        (changed("kind", peft_type="IA3"), "adapters of the kind 'IA3'; LORA alone"),
        (changed("nowhere", base_model_name_or_path=None), "names no base_model_name_or_path"),
        (changed("gone", base_model_name_or_path=str(tmp_path / "none")), "cannot load model .*none"),
        (changed("another", base_model_name_or_path=str(tmp_path / "other")), "do not fit their base model: "),
        (changed("wider", r=3), "4 of 8 tensors|8 of 8 tensors are missing, left over or of another shape"),
    ):
        with pytest.raises(ValueError, match=message):
            load_causal_lm(str(folder))
    lacking = changed("lacking")
    weights = load_file(lacking / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, lacking / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="1 of 7 tensors are missing, left over or of another shape"):
        load_causal_lm(str(lacking))
    (lacking / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json is not JSON.*Save the adapters again"):
        load_causal_lm(str(lacking))
    with pytest.raises(ValueError, match=r"--lora.adapter continue: model .* is no folder of adapters"):
        load_module(str(world / "base"), torch.float32, "continue")
