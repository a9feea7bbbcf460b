"""An objective is the model's own, or refused: heads, packing, windows, causality, rotary scaling, nested settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_blocks import build, error, results, stream
from torch import Tensor
from torch.nn import functional as F

from retrograd import Trainer
from retrograd.core.engine import Blocks, Double
from retrograd.core.step import micro_batches
from retrograd.data.rows import Rows, pad
from retrograd.lm import generate as greedy
from retrograd.lm import layout
from retrograd.lm.chain import decoder_chain
from retrograd.lm.engines import Load, choose_engine
from retrograd.lm.layout import Form, Layout, twice_differentiable
from retrograd.lm.model import CausalLM, causal_objective, load_causal_lm, objective_of, trainable
from retrograd.lm.proof import form_of, prove
from retrograd.optim import sgd
from retrograd.query.proof import prove_answers

pytestmark = pytest.mark.usefixtures("proved_anew")

COMMON = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
          "num_attention_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 0,
          "pad_token_id": 2}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 1}


def made(config: Any, scale: float = 8.0, cls: Any = None) -> Any:
    """A model whose weights are as large as a trained one's, in float64."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    try:
        module = cls(config) if cls else AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except ValueError:  # it has no such attention
        module = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim > 1:
                p.mul_(scale)
    return module.double().eval()


def batch(module: Any, lengths: list[list[int]]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Rows of documents of these lengths, packed where a row has several; and the documents."""
    draw = torch.Generator().manual_seed(5)
    rows = [[torch.randint(3, tiny.VOCABULARY, (n,), generator=draw) for n in row] for row in lengths]
    count = iter(range(100))
    owners = [torch.cat([torch.full((len(d),), next(count)) for d in row]) for row in rows]
    masks = [torch.cat([torch.arange(len(d)) > 0 for d in row]) for row in rows]
    packed = any(len(row) > 1 for row in lengths)
    parts = [[x.numpy() for x in xs] for xs in ([torch.cat(row) for row in rows], masks, owners)]
    inputs = pad(Rows(*parts, next(count), {}, packed=packed), range(len(rows)))
    return inputs, [document for row in rows for document in row]


def differs(module: Any, lengths: list[list[int]], objective: Any = None) -> float:
    """|objective − Σ losses by the module's own forward pass, each document alone|, in nats."""
    inputs, documents = batch(module, lengths)
    objective = objective or causal_objective(module)[0]
    with torch.no_grad(), twice_differentiable(torch.float64):
        own = [F.cross_entropy(module(input_ids=d[None]).logits[0, :-1], d[1:], reduction="sum") for d in documents]
        found = objective(trainable(module)[0], inputs, inputs["target_mask"].double())
    return float((found - torch.stack(own).sum()).abs())


ROWS, PACKED = [[12], [5], [9]], [[5, 7], [4, 3, 2]]


class TestHeads:
    """A soft cap or a scale of the logits, also where logits are small or zero at the start."""

    @pytest.mark.parametrize("scale", [0.0, 0.01, 8.0])
    def test_a_soft_cap_is_seen_at_any_size(self, scale: float) -> None:
        from transformers import NanoChatConfig

        module = made(NanoChatConfig(**GROUPED), scale)
        assert not form_of(module).fused
        with torch.no_grad():
            module.lm_head.weight.normal_(std=20.0)
            module.model.embed_tokens.weight.normal_()
        assert differs(module, ROWS) < 1e-9
        assert differs(module, ROWS, objective_of(Layout(module, Form(fused=True)))) > 1

    def test_a_scale_is_seen(self) -> None:
        from transformers import CohereConfig

        module = made(CohereConfig(**GROUPED, logit_scale=1.0001))
        assert not form_of(module).fused
        assert form_of(made(CohereConfig(**GROUPED, logit_scale=1.0))).fused

    def test_a_plain_head_is_fused(self) -> None:
        assert form_of(build("llama-gqa")) == Form(True, True, True, True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["gpt2-tied", "mistral"])
def test_a_proof_leaves_every_bit(family: str, dtype: torch.dtype) -> None:
    module = build(family, dtype).train()
    with torch.no_grad():
        next(p for p in module.parameters() if p.ndim < 2).zero_()
        next(p for p in module.parameters() if p.ndim > 1)[0] = 1e-40 if dtype == torch.float32 else 0.0
    before = [(p.clone(), p.data_ptr()) for p in module.parameters()]
    state = torch.get_rng_state()
    form_of(module)
    assert all(torch.equal(p, x) and p.data_ptr() == at for p, (x, at) in zip(module.parameters(), before, strict=True))
    assert all(part.training for part in module.modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_a_diverged_model_is_proved_by_its_structure(value: float) -> None:
    """It can be looked at; what it was made of stays as it is."""
    module = build("llama-gqa")
    with torch.no_grad():
        module.model.layers[0].mlp.up_proj.weight.fill_(value)
    assert form_of(module) == Form(True, True, True, True)
    after = module.model.layers[0].mlp.up_proj.weight
    assert torch.equal(after.nan_to_num(7), torch.full_like(after, value).nan_to_num(7))
    bidirectional = build("llama-gqa")
    plain = bidirectional.model.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        out = plain(*arguments, **options)
        out.last_hidden_state = out.last_hidden_state + out.last_hidden_state.mean(1, keepdim=True)
        return out

    bidirectional.model.forward = forward
    with torch.no_grad():
        bidirectional.model.layers[0].mlp.up_proj.weight.fill_(value)
    with pytest.raises(ValueError, match="not a causal language model"):
        form_of(bidirectional)


class TestPacking:
    """Documents of a packed row do not see each other, or are taken apart."""

    def check(self, config: Any, masks: bool) -> None:
        module = made(config)
        assert form_of(module).masks == masks
        assert differs(module, ROWS) < 1e-8
        assert differs(module, PACKED) < 1e-8
        wrong = objective_of(Layout(module, form_of(module)._replace(masks=True)))
        if not masks and module.config._attn_implementation != "eager":
            assert differs(module, PACKED, wrong) > 1e-3

    def test_convolutions(self) -> None:
        from transformers import Lfm2Config

        layers = ["conv", "full_attention"]
        self.check(Lfm2Config(**GROUPED, layer_types=layers, block_auto_adjust_ff_dim=False), False)

    def test_state_spaces(self) -> None:
        from transformers import MambaConfig

        self.check(MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4), False)

    def test_a_boolean_mask_that_eager_attention_adds(self) -> None:
        from transformers import GPTNeoConfig

        self.check(
            GPTNeoConfig(vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, max_position_embeddings=64,
                         attention_types=[[["global", "local"], 1]], window_size=5), False,
        )  # fmt: skip

    def test_positions_that_the_model_numbers(self) -> None:
        from transformers import BloomConfig

        self.check(BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2), False)

    def test_chunks_longer_than_a_window_are_taken_apart(self) -> None:
        module = build("mistral", sliding_window=6)
        assert form_of(module).masks
        assert differs(module, PACKED) < 1e-9
        assert differs(module, [[9, 3], [8, 4]]) < 1e-9
        inputs = batch(module, [[2, 4], [3, 2]])[0]
        assert "position_ids" in Layout(module, form_of(module)).arguments(inputs)

    def test_tokens_of_documents_keep_their_weights(self) -> None:
        """∂/∂c is each token's loss, at its own place in the packed row."""
        from transformers import MambaConfig

        module = made(MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4))
        inputs, documents = batch(module, PACKED)
        c = inputs["target_mask"].double().requires_grad_()
        (found,) = torch.autograd.grad(causal_objective(module)[0](trainable(module)[0], inputs, c), c)
        with torch.no_grad(), twice_differentiable(torch.float64):
            own = [
                F.cross_entropy(module(input_ids=d[None]).logits[0, :-1], d[1:], reduction="none") for d in documents
            ]
        assert torch.allclose(found[inputs["target_mask"]], torch.cat(own), atol=1e-9)
        assert (found[~inputs["target_mask"]] == 0).all()

    def test_both_engines_take_documents_apart(self) -> None:
        from transformers import Lfm2Config

        layers = ["conv", "full_attention"]
        module = made(Lfm2Config(**GROUPED, layer_types=layers, block_auto_adjust_ff_dim=False), 4.0)
        params, data = trainable(module)[0], stream(packed=True)
        assert not form_of(module).masks
        found = [results(engine, params, micro_batches(data[0], 2), data.weights, 2)
                 for engine in (Blocks(decoder_chain(module)), Double(causal_objective(module)[0]))]  # fmt: skip
        assert error(found[0], found[1]) < 1e-9


class TestCausality:
    def test_bidirectional_models_are_refused(self, tmp_path: Path) -> None:
        from transformers import BertConfig, BertLMHeadModel

        made(BertConfig(**COMMON), cls=BertLMHeadModel).float().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"not a causal language model: with another token 11 .* nats"):
            load_causal_lm(str(tmp_path))

    def test_also_where_attention_has_no_output_yet(self) -> None:
        """Zero-initialised output projections hide it until the first step."""
        from transformers import BertConfig, BertLMHeadModel

        module = made(BertConfig(**COMMON), cls=BertLMHeadModel)
        with torch.no_grad():
            for name, p in module.named_parameters():
                if "attention.output.dense" in name:
                    p.zero_()
        with pytest.raises(ValueError, match="not a causal language model"):
            Trainer.initialize(module, sgd(lr=0.1))

    def test_the_same_model_as_a_decoder_is_taken(self) -> None:
        from transformers import BertConfig, BertLMHeadModel

        assert differs(made(BertConfig(**COMMON, is_decoder=True), cls=BertLMHeadModel), ROWS) < 1e-9


class TestRotaryScaling:
    def phi(self, **rope: Any) -> Any:
        from transformers import LlamaConfig, Phi3Config

        if rope["rope_type"] == "dynamic":
            return made(LlamaConfig(**{**GROUPED, "max_position_embeddings": 12}, rope_parameters=rope))
        return made(Phi3Config(**GROUPED, original_max_position_embeddings=8, rope_parameters=rope))

    def longrope(self) -> Any:
        factors = {"short_factor": [1.0] * 4, "long_factor": [3.0, 4.0, 5.0, 6.0]}
        return self.phi(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=8, **factors)

    def test_rows_beyond_the_bound_enter_alone(self) -> None:
        module = self.longrope()
        assert differs(module, ROWS) < 1e-9
        assert differs(module, [[8], [5]]) < 1e-9
        assert differs(module, [[5, 7], [4, 3]]) < 1e-9
        assert differs(module, [[9, 3], [4, 3]]) < 1e-9
        together = Layout(module, form_of(module)._replace(joins=False))
        vars(together)["beside"] = {}
        assert differs(module, ROWS, objective_of(together)) > 1e-3

    def test_what_enters_alone_has_its_whole_length(self) -> None:
        """A document of 9 tokens has the long frequencies, also if its last tokens are no targets."""
        module = self.longrope()
        inputs, documents = batch(module, [[9], [5]])
        inputs["target_mask"][0, 6:] = False
        found = causal_objective(module)[0](trainable(module)[0], inputs, inputs["target_mask"].double())
        with torch.no_grad(), twice_differentiable(torch.float64):
            own = [
                F.cross_entropy(module(input_ids=d[None]).logits[0, :-1], d[1:], reduction="none") for d in documents
            ]
        assert abs(float(found.detach() - own[0][:5].sum() - own[1].sum())) < 1e-9

    def test_engines(self) -> None:
        module = self.longrope()
        objective = causal_objective(module)[0]
        assert choose_engine("auto", module, objective, Load(2, 9, 1, 0)).name == "double"
        with pytest.raises(ValueError, match=r"rows that enter together: beyond 8 tokens .* longrope"):
            choose_engine("blocks", module, objective, Load(2, 9, 1, 0))
        with pytest.raises(ValueError, match="cannot be cut into a chain"):  # it writes its frequencies in place
            choose_engine("blocks", module, objective, Load(2, 8, 1, 0))
        inputs = batch(module, ROWS)[0]
        with pytest.raises(ValueError, match="one after the other"):
            Layout(module, form_of(module)).arguments(inputs)

    def test_dynamic_scaling_is_refused_beyond_its_bound(self) -> None:
        module = self.phi(rope_type="dynamic", rope_theta=1e4, factor=2.0)
        assert differs(module, ROWS) < 1e-9
        with pytest.raises(ValueError, match=r"rows of 14 tokens are longer than the 12 .* Use rows of at most 12"):
            differs(module, [[14], [5]])


class TestNestedSettings:
    def gemma(self) -> Any:
        import transformers as tf

        text = {**GROUPED, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8,
                "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
        vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "image_size": 28, "patch_size": 14}  # fmt: skip
        config = tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, boi_token_index=37,
                                 eoi_token_index=38, image_token_index=39)  # fmt: skip
        return made(config, cls=tf.Gemma3ForConditionalGeneration)

    def test_window(self) -> None:
        module = self.gemma()
        assert Layout(module, form_of(module)).window == 6
        assert differs(module, [[20], [11]]) < 1e-9
        assert differs(module, [[9, 8], [4, 12]]) < 1e-9
        assert differs(module, [[5], [3]]) < 1e-9

    def test_it_can_be_loaded(self, tmp_path: Path) -> None:
        from retrograd.query.load import context_length

        self.gemma().float().save_pretrained(tmp_path)
        settings, longest = context_length(load_causal_lm(str(tmp_path)), None, "data")
        assert (settings.vocab_size, longest) == (40, 64)


def test_a_window_that_the_settings_do_not_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows longer than it are not joined: the trial has seen that."""
    monkeypatch.setattr(layout, "windows", lambda module: [])
    module = build("mistral", sliding_window=6)
    assert not form_of(module).joins
    assert differs(module, ROWS) < 1e-9


class TestWhatIsWrongIsRefused:
    def loaded(self, family: str = "llama-gqa") -> CausalLM:
        module = build(family)
        objective, fused = causal_objective(module)
        return CausalLM(module, trainable(module)[0], objective, fused)

    def test_a_right_one_is_not(self) -> None:
        proof = prove(self.loaded(), longest=20)
        assert proof.lengths == (12, 20)
        assert proof.logits >= 50
        assert proof.error <= proof.tolerance < 1e-5

    def test_an_objective_that_is_a_little_off(self) -> None:
        lm = self.loaded()
        off = CausalLM(lm.module, lm.params, lambda p, x, c: 1.0001 * lm.objective(p, x, c), lm.fused)
        with pytest.raises(ValueError, match=r"cannot be attributed: its rows give other losses .* nats for a token"):
            prove(off)

    def test_continuations(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = greedy.causal_logits
        monkeypatch.setattr(greedy, "causal_logits", lambda lm: lambda *given: -plain(lm)(*given))
        with pytest.raises(ValueError, match="its continuations give other losses"):
            prove_answers(self.loaded())

    def test_a_model_that_reads_no_document_alone(self) -> None:
        module = build("llama-gqa")
        module.model.forward = lambda *given, **named: 1 / 0
        with pytest.raises(ValueError, match=r"cannot read a document of 12 tokens by itself.*ZeroDivisionError"):
            causal_objective(module)

    def test_a_model_that_draws_random_numbers(self) -> None:
        module = build("llama-gqa")
        plain = module.model.embed_tokens.forward
        module.model.embed_tokens.forward = lambda ids: plain(ids) * (1 + 1e-4 * torch.rand(()))
        with pytest.raises(ValueError, match=r"gives other losses, by .* when it reads the same 12 tokens again"):
            causal_objective(module)

    def test_a_model_of_which_rounding_leaves_nothing(self) -> None:
        module = build("llama-gqa", torch.float32)
        module.model.norm.register_forward_pre_hook(lambda _, x: (torch.sin(1e8 * x[0]),))
        with pytest.raises(ValueError, match=r"cannot be told from rounding"):
            causal_objective(module)

    def test_rows_that_change_what_is_beside_them(self) -> None:
        """They enter one after the other; `blocks` cannot."""
        module = build("llama-gqa")
        plain = module.model.forward

        def forward(*arguments: Any, **options: Any) -> Any:
            out = plain(*arguments, **options)
            out.last_hidden_state = out.last_hidden_state - 0.1 * out.last_hidden_state.mean(0, keepdim=True)
            return out

        module.model.forward = forward
        assert form_of(module) == Form(True, False, False, False)
        assert differs(module, ROWS) < 1e-9
        assert differs(module, PACKED) < 1e-9
        with pytest.raises(ValueError, match="cannot be cut into a chain"):
            decoder_chain(module)


def test_a_certificate_says_it(tmp_path: Path) -> None:
    """See test_verify for the rest."""
    from retrograd.trust.verify import _objective_check

    tiny.save_model(tmp_path)
    lm = load_causal_lm(str(tmp_path))

    found = _objective_check(lm, 15)
    assert found.verdict == "passed"
    assert "12 to 15 tokens" in found.words
    off = CausalLM(lm.module, lm.params, lambda p, x, c: 1.001 * lm.objective(p, x, c), lm.fused)
    assert _objective_check(off, 15).verdict == "failed"
