"""What the first step is tried for: derivatives that are another update's are refused, honest models are not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional as F

from retrograd import DataStream, Trainer
from retrograd.core.engine import Double
from retrograd.core.optim import SGD, AdamW
from retrograd.core.step import Recipe, Training, initial_state
from retrograd.lm.model import trainable
from retrograd.optim import sgd
from retrograd.proofs import first_step

DTYPES = [torch.float64, torch.float32]
_Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none")


def tried(
    module: nn.Module, x: Tensor, dtype: torch.dtype, optimizer: Any = None, loss: _Loss = cross_entropy, **options: Any
) -> None:
    """One call of `train`, of a single step."""
    module = module.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    data = {"x": x, "y": torch.arange(len(x)) % 3}
    trainer, state = Trainer.initialize(
        module, optimizer or sgd(0.1),
        lambda params, batch: loss(functional_call(module, params, (batch["x"],)), batch["y"]), **options,
    )  # fmt: skip
    trainer.train(state, DataStream(data, len(x), dtype=dtype))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def vectors(rows: int = 6, width: int = 8) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1))


class Layer(nn.Module):
    """A linear layer behind a function of its input's image."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inside, self.head, self.function = nn.Linear(8, 6), nn.Linear(6, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.inside(x)))


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, bar: Tensor) -> Tensor:
        return bar * (1 - ctx.saved_tensors[0].tanh().square())


class _Constant(_Once):
    """A backward that forgets that its slope depends on x."""

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> Tensor:
        return bar * (1 - ctx.saved_tensors[0].detach().tanh().square())


WRONG: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "weight-norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 3)), r"original1 \(WeightNorm\) the derivative"),
    "old-weight-norm": (lambda: nn.utils.weight_norm(nn.Linear(8, 3)), r"weight_v \(Linear\) the derivative"),
    "straight-through": (lambda: Layer(lambda z: z + ((4 * z).round() / 4 - z).detach()), "by differences and"),
    "detached-norm": (lambda: Layer(lambda z: 4 * z / z.detach().norm()), r"inside.weight \(Linear\)"),
    "forgetful-backward": (lambda: Layer(_Constant.apply), r"inside.weight \(Linear\)"),
    "once-differentiable": (lambda: Layer(_Once.apply), "Something there hides from autograd"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(WRONG))
def test_a_derivative_that_is_not_the_steps_is_refused_by_name(name: str, dtype: torch.dtype) -> None:
    make, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        tried(seeded(make), vectors(), dtype)


def test_tensors_of_float32_that_a_loss_holds_are_raised_to_float64() -> None:
    own = torch.ones(3)

    def weighted(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, weight=own, reduction="none")

    tried(seeded(lambda: Layer(torch.tanh)), vectors(), torch.float32, loss=weighted)
    tried(seeded(lambda: Layer(torch.relu)), vectors(), torch.float32, loss=weighted)
    with pytest.raises(ValueError, match=r"inside.weight \(Linear\)"):
        tried(seeded(WRONG["forgetful-backward"][0]), vectors(), torch.float32, loss=weighted)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", ["weight-norm", "old-weight-norm", "detached-norm", "once-differentiable"])
def test_and_refused_at_float32_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_step, "FULL", -1)
    with pytest.raises(ValueError, match="Something there hides from autograd"):
        tried(seeded(WRONG[name][0]), vectors(), torch.float32)


class Image(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x.view(len(x), 1, 4, 4))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x.view(len(x), 4, 4))[0][:, -1])


class Attention(nn.Module):
    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.attention, self.head, self.weights = (
            nn.MultiheadAttention(4, 2, batch_first=True),
            nn.Linear(4, 3),
            weights,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(len(x), 4, 4)
        return self.head(self.attention(x, x, x, need_weights=self.weights)[0].mean(1))


class Encoder(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=dropout, batch_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x.view(len(x), 4, 4)).mean(1))


HONEST: dict[str, Callable[[], nn.Module]] = {
    "tanh": lambda: nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)),
    "relu": lambda: nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)),
    "silu-norm": lambda: nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.LayerNorm(16), nn.Linear(16, 3)),
    "convolution": lambda: Image(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)),
    "group-norm": lambda: Image(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(64, 3)),
    "batch-norm": lambda: Image(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)),
    "spectral-norm": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(16, 8)), nn.Tanh(), nn.Linear(8, 3)),
    "recurrent": Recurrent,
    "attention": lambda: Attention(False),
    "attention-with-weights": lambda: Attention(True),
    "encoder": Encoder,
    "linear": lambda: nn.Linear(16, 3),
    "zeros": lambda: nn.Sequential(nn.Linear(16, 8), nn.Tanh(), zeroed(nn.Linear(8, 3))),
}  # fmt: skip


def zeroed(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    return layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(HONEST))
def test_honest_models_pass(name: str, dtype: torch.dtype) -> None:
    tried(seeded(HONEST[name]), vectors(12, 16), dtype)


@pytest.mark.parametrize("name", list(HONEST))
def test_honest_models_pass_at_float32_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a loss does not run in float64, with five seeds."""
    monkeypatch.setattr(first_step, "FULL", -1)
    for seed in range(4):
        torch.manual_seed(seed)
        tried(HONEST[name](), vectors(12, 16), torch.float32)


@pytest.mark.parametrize("full", [1 << 27, -1], ids=["float64", "float32"])
def test_wide_layers_with_kinks_pass(full: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of thousands of kinks: some lie between θ − hu and θ + hu at most sizes."""
    monkeypatch.setattr(first_step, "FULL", full)
    wide = lambda: nn.Sequential(nn.Linear(16, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 3))  # noqa: E731
    tried(seeded(wide), vectors(256, 16), torch.float32)


@pytest.mark.parametrize("loss", [
    lambda z, y: (z - F.one_hot(y, 3)).square().sum(1), lambda z, y: F.softplus(-z[:, 0]) + z[:, 1] ** 4,
    lambda z, y: (z - 1).abs().sum(1), lambda z, y: z[:, 0],
], ids=["square", "softplus", "absolute", "linear"])  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_honest_losses_pass(loss: _Loss, dtype: torch.dtype) -> None:
    tried(seeded(HONEST["relu"]), vectors(12, 16), dtype, loss=loss)


def test_a_loss_without_a_second_derivative_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"cannot be differentiated twice, which scores need: .*multi_margin"):
        tried(
            seeded(HONEST["tanh"]), vectors(12, 16), torch.float32,
            loss=lambda z, y: F.multi_margin_loss(z, y, reduction="none"),
        )  # fmt: skip


def test_dropout_that_is_replayed_passes() -> None:
    tried(seeded(lambda: Encoder(0.2)), vectors(12, 16), torch.float32, dropout=True)


def test_optimizers_of_torchopt() -> None:
    torchopt = pytest.importorskip("torchopt")
    honest = [
        torchopt.sgd(0.1, momentum=0.9, nesterov=True), torchopt.adam(1e-2, eps_root=1e-8), torchopt.adam(1e-3),
        torchopt.adamw(1e-3, weight_decay=0.1), torchopt.rmsprop(1e-2), torchopt.adagrad(1e-2),
        torchopt.sgd(torchopt.schedule.linear_schedule(0.1, 0.0, 10, 0)),
        torchopt.chain(torchopt.sgd(lr=0.1)),
    ]  # fmt: skip
    for dtype, optimizer in itertools.product(DTYPES, honest):
        tried(seeded(HONEST["tanh"]), vectors(12, 16), dtype, optimizer)
    for limit in (1e-3, 0.1, 10.0):  # of gradients at the first step and later
        with pytest.raises(ValueError, match=r"optimizer torchopt.*update by its gradient is .* max_grad_norm"):
            clipped = torchopt.chain(torchopt.clip_grad_norm(limit), torchopt.sgd(lr=0.1))
            tried(seeded(HONEST["tanh"]), vectors(12, 16), torch.float32, clipped)
    for dtype in DTYPES:
        with pytest.raises(ValueError, match="the derivative of the optimizer torchopt"):
            tried(seeded(HONEST["tanh"]), vectors(12, 16), dtype, torchopt.adam(1e-2, use_accelerated_op=True))


class Counting:
    """A pair whose step count is its own."""

    def __init__(self) -> None:
        self.count = 0

    def init(self, params: Any) -> Any:
        return {}

    def update(self, grads: Any, state: Any, params: Any = None) -> Any:
        self.count += 1
        return {name: -0.1 / self.count * g for name, g in grads.items()}, state


class InPlace(Counting):
    def update(self, grads: Any, state: Any, params: Any = None) -> Any:
        return {name: g.mul_(-0.1) for name, g in grads.items()}, state


class Decaying(Counting):
    """A decay that autograd does not see."""

    def update(self, grads: Any, state: Any, params: Any = None) -> Any:
        return {name: -0.1 * g - 0.1 * params[name].detach() ** 2 for name, g in grads.items()}, state


@pytest.mark.parametrize(("pair", "message"), [
    (Counting(), "taken twice from the same state, gives two results"), (InPlace(), "changes its arguments in place"),
    (Decaying(), r"Decaying's update by its parameters is .* \(at (0|2)\.weight"),
], ids=["counting", "in-place", "decaying"])  # fmt: skip
def test_optimizers_that_are_no_functions(pair: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tried(seeded(HONEST["tanh"]), vectors(12, 16), torch.float32, pair)


class Drawing(nn.Module):
    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.head, self.draw = nn.Linear(8, 3), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.draw(x))


def test_a_step_that_is_no_function_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gives two results: the gradient of head.weight \(Linear\) differs"):
        tried(seeded(lambda: Drawing(lambda x: x + 0.1 * torch.randn_like(x))), vectors(), torch.float64)
    calls = itertools.count(1)
    with pytest.raises(ValueError, match="gives two results"):
        tried(seeded(lambda: Drawing(lambda x: x / next(calls))), vectors(), torch.float64)
    spectral = seeded(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 3)))
    with pytest.raises(ValueError, match=r"changes the buffer parametrizations.weight.0._u \(SpectralNorm\)"):
        tried(spectral, vectors(), torch.float64, dropout=True)

    class Limited(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4, max_norm=0.1), nn.Linear(4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids))

    with pytest.raises(ValueError, match="max_norm"):
        tried(seeded(Limited), torch.arange(6), torch.float64)


def test_a_loss_that_no_parameter_reaches_is_refused() -> None:
    module, data = seeded(lambda: Layer(torch.tanh)), {"x": vectors(), "y": torch.arange(6) % 3}

    def past(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return cross_entropy(module(batch["x"]), batch["y"])

    def half(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        hidden = torch.tanh(module.inside(batch["x"]))
        return cross_entropy(hidden @ params["head.weight"].T + params["head.bias"], batch["y"])

    def nothing(params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return batch["x"].square().sum(1)

    for loss, message in (
        (past, "reads inside.weight, inside.bias, head.weight and 1 more of the module itself"),
        (half, "reads inside.weight, inside.bias of the module itself"),
        (nothing, "none of the 4 parameters reaches the loss"),
    ):
        trainer, state = Trainer.initialize(module, sgd(0.5), loss)
        with pytest.raises(ValueError, match=message):
            trainer.train(state, DataStream(data, 3))


@pytest.mark.parametrize(("full", "rows"), [(1 << 26, 2), (1, 1)])
def test_of_a_large_model_one_row_is_tried(full: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_step, "FULL", full)
    module, read = seeded(lambda: nn.Linear(8, 3)), set[int]()
    stream = DataStream({"x": vectors(), "y": torch.arange(6) % 3}, 6)

    def objective(params: dict[str, Tensor], batch: Any, factors: Tensor) -> Tensor:
        read.add(len(batch["x"]))
        return torch.sum(cross_entropy(functional_call(module, params, (batch["x"],)), batch["y"]) * factors)

    training = Training(Recipe(SGD(0.1), None, None), Double(objective), stream, stream.weights)
    first_step.prove(training, initial_state(training.recipe, trainable(module)[0]), module, objective, rows=2)
    assert read == {rows}


def test_the_module_is_left_as_it_was() -> None:
    """Tried in float64, and put back: the same tensors, in the same memory."""
    module = seeded(HONEST["batch-norm"])
    before = {name: (x.data_ptr(), x.dtype, x.clone()) for name, x in module.state_dict().items()}
    params = trainable(module)[0]
    stream = DataStream({"x": vectors(12, 16), "y": torch.arange(12) % 3}, 4)

    def objective(params: dict[str, Tensor], batch: Any, factors: Tensor) -> Tensor:
        return torch.sum(cross_entropy(functional_call(module, params, (batch["x"],)), batch["y"]) * factors)

    for optimizer in (SGD(0.1, 0.9), AdamW(1e-3)):
        recipe = Recipe(optimizer, 1.0, 2)
        training = Training(recipe, Double(objective), stream, stream.weights)
        module.eval()
        first_step.prove(training, initial_state(recipe, params), module, objective)
    for name, x in module.state_dict().items():
        pointer, dtype, value = before[name]
        assert (x.data_ptr(), x.dtype) == (pointer, dtype), name
        assert torch.equal(x, value), name


@pytest.mark.usefixtures("proved_anew")
def test_a_command_refuses_a_model_that_is_no_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXMLP

    from retrograd import cli

    tiny.save_model(tmp_path / "model")
    data = str(tiny.save_jsonl(tmp_path / "train.jsonl", tiny.sentences(8)))
    plain = GPTNeoXMLP.forward
    monkeypatch.setattr(GPTNeoXMLP, "forward", lambda self, x: plain(self, x) + 1e-3 * torch.randn_like(x))
    arguments = ["magic", str(tmp_path / "run"), "--model", str(tmp_path / "model"), "--data.dataset", data,
                 "--query.dataset", data, "--device", "cpu"]  # fmt: skip
    assert cli.main(arguments) != 0
    assert "draws random numbers or keeps something of what it has read" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "scores.pt").exists()
