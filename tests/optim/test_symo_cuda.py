"""Symo on a GPU: the same steps as on the CPU in float64, and what is made for GPUs alone against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import weingarten as wg
from tests.cases import generator, initialised, normal
from tests.devices import GPU, agree, on
from weingarten.matfun import evaluate
from weingarten.optim import AdamWScale, BothSides, Eigenbases, OneSide, Spectral
from weingarten.optim.polar import exact_polar, polar

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)


def narrow() -> nn.Module:
    return initialised(
        nn.Sequential(
            nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)
        )
    )


def trained(device, choice, steps=8, **settings):
    model, x, y = narrow().to(device), normal(8, 4).to(device), normal(8, 3, seed=1).to(device)
    given = {"example_inputs": x} if choice is None else {}
    optimizer = wg.Symo(model, 0.02, choice, refresh=3, **given, **settings)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}, optimizer


@pytest.mark.parametrize("choice", [OneSide(), BothSides()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("length", [AdamWScale(), Spectral()], ids=lambda c: type(c).__name__)
def test_symo(choice, length):
    found, _ = trained(GPU, choice, scaling=length)
    expected, _ = trained("cpu", choice, scaling=length)
    agree(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("choice", [None, Eigenbases()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("length", [AdamWScale(), Spectral()], ids=lambda c: type(c).__name__)
def test_symo_in_eigenbases(choice, length):
    """One gradient leaves a part of the basis to the device, in which a step depends on it; training goes as well."""
    found, _ = trained(GPU, choice, steps=40, scaling=length)
    expected, _ = trained("cpu", choice, steps=40, scaling=length)
    start = narrow()
    losses = []
    for params in (on(found, "cpu"), expected, dict(start.named_parameters())):
        output = torch.func.functional_call(start, params, normal(8, 4))
        losses.append(float((output - normal(8, 3, seed=1)).square().mean().detach()))
    assert losses[1] < 0.8 * losses[2]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)


def test_symo_goes_on_on_another_device(tmp_path):
    """A state from the GPU is loaded beside a model on the CPU, and the other way round."""
    for first, second in ((GPU, "cpu"), ("cpu", GPU)):
        _, optimizer = trained(first, None)
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        _, other = trained(second, None)
        other.load_state_dict(torch.load(tmp_path / "state.pt", map_location="cpu"))
        for p, state in other.state.items():
            for value in state.values():
                assert not isinstance(value, Tensor) or value.device == p.device


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_symo_under_autocast(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).to(GPU)
    x, y = torch.randn(256, 64, device=GPU), torch.randn(256, 64, device=GPU)
    optimizer, scaler = (
        wg.Symo(model, 0.01, example_inputs=x),
        torch.amp.GradScaler("cuda", enabled=dtype == torch.float16),
    )
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype):
            loss = (model(x) - y).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.filterwarnings("ignore:.*")  # of the compiler
def test_symo_with_compiled_model():
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(GPU),
        torch.randn(32, 8, device=GPU),
    )
    optimizer = wg.Symo(model, 0.01, example_inputs=x)
    compiled = torch.compile(model)
    first = float(compiled(x).detach().square().mean())
    for _ in range(10):
        optimizer.zero_grad()
        loss = compiled(x).square().mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < first


@pytest.mark.parametrize("shape", [(1024, 768), (768, 1024), (2, 640, 640)])
def test_polar_factors_in_half_precision(shape):
    """Singular values within a few percent of one, in the space of the exact factor."""
    g = torch.randn(shape, generator=generator(), dtype=torch.float64)
    found, exact = polar(g.float().to(GPU)), exact_polar(g)
    assert found.device == GPU
    error = (found.double().cpu() - exact).norm() / exact.norm()
    assert float(error) < 0.1


@pytest.mark.parametrize("n", [96, 512, 900])
def test_inverse_roots_of_large_blocks(n):
    """By products from 512 on, in float32; against the eigendecomposition in float64."""
    x = torch.randn(n, 2 * n, generator=generator(), dtype=torch.float64)
    matrix = x @ x.mT / (2 * n)
    values, basis = torch.linalg.eigh(matrix)
    exact = (basis * (values + 0.01).rsqrt()) @ basis.mT
    found = evaluate(wg.Power(-0.5, 0.01), matrix.float().to(GPU))
    assert found.device == GPU
    assert float((found.double().cpu() - exact).norm() / exact.norm()) < 1e-2
