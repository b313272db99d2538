"""What differs on a GPU: masks without the compiled kernel, flags unread, cuDNN, loss scalers.

Where there is no GPU these tests are skipped and say so; what they share with the CPU is tested
there.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nmflow
import reference
from harness import (
    Run,
    all_hold,
    assert_near,
    assert_same,
    dense_of,
    parameters_of,
    reference_step,
    through_file,
    twin,
)
from models import BY_ID as FAMILY
from models import FAMILIES, MLP, Family, loss_of
from nmflow.errors import StateError, WeightError
from settings import ADAM, BY_ID, CASES, INTERVAL_CASES, MORE_CASES, OPTIMIZERS, TOTAL, Case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PATTERNS = ["1:4", "2:4", "3:4", "1:16", "3:8", "4:32", "16:256", "1:256", "1:8@4", "2:4@3"]


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """Products in the dtype they are given, in one order of summation."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    torch.backends.cudnn.deterministic = False


def _on(run: Run, count: int = TOTAL, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [x.cuda() for x in run.family.batches(count, dtype)]


# --- masks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("ties", ["few", "many", "all"])
def test_masks_are_those_of_the_cpu(pattern: str, dtype: torch.dtype, ties: str) -> None:
    """Ties go to the lowest index, on whatever device and in whatever order it works."""
    w = torch.randn(48, 768, dtype=torch.float64)
    if ties == "many":
        w = (2 * w).round() / 2
    elif ties == "all":
        w = w.sign()
    w = w.to(dtype)
    n, m, panel = reference.parse(pattern)
    found = nmflow.mask(w.cuda(), pattern)
    assert found.device.type == "cuda"
    assert torch.equal(found.cpu(), nmflow.mask(w, pattern))
    if panel == 1:  # whose sums the reference rounds otherwise
        assert torch.equal(found.cpu(), reference.keep(w, n, m))
    assert nmflow.holds(w.cuda() * found, pattern)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("pattern", ["1:4", "2:4", "1:8@4"])
def test_masks_refuse_what_has_no_order(pattern: str, value: float) -> None:
    w = torch.randn(8, 32, device="cuda")
    w[3, 5] = value
    with pytest.raises(WeightError, match="NaN or an infinity"):
        nmflow.mask(w, pattern)


# --- recipes ----------------------------------------------------------------------------------


def _equals_the_reference(family: Family, case: Case, optimizer: str) -> None:
    make = OPTIMIZERS[optimizer]
    run = Run(family, case, make, attached=False, device="cuda")
    ref = twin(run, make)
    run.attach()
    for k, x in enumerate(_on(run)):
        assert_near(parameters_of(run.model), ref.weights(), f"step {k}")
        assert_near(dense_of(run), ref.dense_weights(), f"dense, step {k}")
        run.step(x)
        reference_step(ref, x)
    assert_near(parameters_of(run.model), ref.weights(), "at the end")
    run.flow.finalize()
    assert case.kind == "Dense" or all_hold(run.model, family.targets, family.pattern)


@pytest.mark.parametrize("case", [*CASES, *MORE_CASES, *INTERVAL_CASES[:4]], ids=lambda c: c.id)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_recipes(case: Case, optimizer: str) -> None:
    if case.kind == "STEP" and optimizer not in ADAM:
        pytest.skip("STEP freezes Adam's second moment")
    _equals_the_reference(MLP, case, optimizer)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.id)
@pytest.mark.parametrize("case", ["sr-ste", "mdgf-exp-masked", "settling", "hybrid-masked"])
def test_families(family: Family, case: str) -> None:
    """Among them recurrent networks, whose weights cuDNN keeps in one piece of memory."""
    _equals_the_reference(family, BY_ID[case], "adamw-fused")


def test_recurrent_weights_stay_in_one_piece(recwarn: pytest.WarningsRecorder) -> None:
    run = Run(FAMILY["lstm"], BY_ID["mdgf-linear"], dtype=torch.float32, device="cuda")
    run.train(_on(run, dtype=torch.float32))
    assert not [w for w in recwarn if "not part of single contiguous chunk" in str(w.message)]


@pytest.mark.parametrize("options", [{"fused": True}, {"capturable": True, "foreach": True}])
def test_learning_rate_in_a_tensor(options: dict[str, Any]) -> None:
    """Settling draws by the learning rate, which such an optimizer may keep on the device."""
    rate = torch.tensor(0.02, device="cuda")

    def make(p: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(p, lr=rate.clone(), **options)

    run = Run(MLP, BY_ID["settling"], make, attached=False, device="cuda")
    ref = twin(run, make)
    run.attach()
    for x in _on(run):
        run.step(x)
        reference_step(ref, x)
    assert_near(parameters_of(run.model), ref.weights())


# --- loss scalers and autocast ------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw-foreach", "adamw-fused", "sgd"])
@pytest.mark.parametrize("case", ["sr-ste", "mdgf-linear-masked", "settling", "one-shot"])
def test_loss_scaler(case: str, optimizer: str) -> None:
    """float16 with two steps of infinite gradients, the first among them: they do not count."""
    make = OPTIMIZERS[optimizer]
    run = Run(MLP, BY_ID[case], make, dtype=torch.float32, attached=False, device="cuda")
    ref = twin(run, make)
    run.attach()
    mine, theirs = (torch.amp.GradScaler("cuda", init_scale=2.0**10) for _ in range(2))
    for i, x in enumerate(_on(run, TOTAL + 2, torch.float32)):
        factor = float("inf") if i in (0, 5) else 1.0
        losses = []
        for forward, optim in ((run.model, run.optimizer), (ref, ref.optimizer)):
            optim.zero_grad()
            with torch.autocast("cuda", dtype=torch.float16):
                losses.append(loss_of(forward(x).float()) * factor)
        mine.scale(losses[0]).backward()
        mine.step(run.optimizer)
        mine.update()
        theirs.scale(losses[1]).backward()
        theirs.unscale_(ref.optimizer)
        if factor == 1.0:
            ref.regularise()
        theirs.step(ref.optimizer)
        theirs.update()
        ref.k += factor == 1.0
        assert run.flow.steps_done == ref.k
        assert_near(parameters_of(run.model), ref.weights(), f"after {i}")
    assert run.flow.steps_done == TOTAL


def test_bf16_weights() -> None:
    run = Run(FAMILY["encoder-layer"], BY_ID["settling"], dtype=torch.bfloat16, device="cuda")
    run.train(_on(run, dtype=torch.bfloat16))
    assert all_hold(run.model, run.family.targets, run.family.pattern)


def test_a_weight_that_is_not_finite_is_named_a_step_later() -> None:
    """On a device the flag is read before the next step, so that no step waits for it."""
    run = Run(MLP, BY_ID["mdgf-linear"], dtype=torch.float32, device="cuda")
    x = _on(run, 1, torch.float32)[0]
    run.step(x)
    for p in run.model.parameters():
        p.grad = torch.full_like(p, float("inf"))
    run.optimizer.step()
    with pytest.raises(WeightError, match=r"'0\.weight' holds a NaN or an infinity"):
        run.step(x)


# --- state, compilation, sharding ---------------------------------------------------------------


@pytest.mark.parametrize("case", ["mdgf-exp-masked", "settling", "mdgf-frozen", "one-shot"])
@pytest.mark.parametrize(("first", "then"), [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_resume(case: str, first: str, then: str) -> None:
    """A run that goes on on another device: its weights as there, its masks of the same step."""
    one = Run(MLP, BY_ID[case], device=first)
    batches = MLP.batches(TOTAL)
    one.train([x.to(first) for x in batches[:9]])
    states = through_file([one.model.state_dict(), one.optimizer.state_dict()])
    other = Run(MLP, BY_ID[case], attached=False, seed=1, device=then)
    other.attach()
    other.model.load_state_dict(states[0])
    other.optimizer.load_state_dict(states[1])
    assert other.flow.steps_done == 9
    for now in (parameters_of, dense_of):
        arg = (lambda r: r.model) if now is parameters_of else (lambda r: r)
        moved = {name: w.to(then) for name, w in now(arg(one)).items()}
        assert_same(now(arg(other)), moved)
    one.train([x.to(first) for x in batches[9:]])
    other.train([x.to(then) for x in batches[9:]])
    moved = {name: w.to(then) for name, w in parameters_of(one.model).items()}
    assert_near(parameters_of(other.model), moved)


@pytest.mark.parametrize("case", ["settling", "sr-ste", "hybrid"])
def test_compiled(case: str) -> None:
    """Inductor's kernels read W̃ at the address that they were compiled for."""
    family = FAMILY["encoder-layer"]
    run = Run(family, BY_ID[case], dtype=torch.float32, attached=False, device="cuda")
    plain = Run(family, BY_ID[case], dtype=torch.float32, device="cuda")
    run.attach()
    model = torch.compile(run.model, mode="reduce-overhead", fullgraph=True)
    for x in _on(run, dtype=torch.float32):
        run.optimizer.zero_grad()
        loss_of(model(x)).backward()
        run.optimizer.step()
        plain.step(x)
    for (name, a), b in zip(
        parameters_of(run.model).items(), parameters_of(plain.model).values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3, msg=name)
    assert all_hold(run.model, family.targets, family.pattern)


@pytest.mark.parametrize("case", ["settling", "sr-ste", "mdgf-exp-masked"])
def test_forward_and_backward_in_a_graph(case: str) -> None:
    """Replays find W̃ and gradients where they were; `step()` is outside, and may be capturable."""

    def make(p: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(p, lr=torch.tensor(0.02, device="cuda"), capturable=True)

    graphed, plain = (
        Run(MLP, BY_ID[case], make, dtype=torch.float32, device="cuda") for _ in range(2)
    )
    batches = _on(plain, dtype=torch.float32)
    x, model, optimizer = batches[0].clone(), graphed.model, graphed.optimizer
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            loss_of(model(x)).backward()
            optimizer.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss_of(model(x)).backward()
    for batch in batches:
        x.copy_(batch)
        optimizer.zero_grad(set_to_none=False)
        graph.replay()
        optimizer.step()
        plain.step(batch)
    assert graphed.flow.steps_done == plain.flow.steps_done == TOTAL
    for (name, a), b in zip(
        parameters_of(model).items(), parameters_of(plain.model).values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "case", ["mdgf-exp-masked", "settling", "sr-ste", "one-shot", "mdgf-frozen", "ste-interval"]
)
def test_whole_steps_in_graphs(case: str) -> None:
    """Replays are steps: the recipe's numbers move, and a new phase is captured anew."""

    def make(p: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(p, lr=torch.tensor(0.02, device="cuda"), capturable=True)

    graphed, plain = (
        Run(MLP, BY_ID[case], make, dtype=torch.float32, device="cuda") for _ in range(2)
    )
    batches = _on(plain, dtype=torch.float32)
    x = batches[0].clone()

    def train() -> torch.Tensor:
        graphed.optimizer.zero_grad(set_to_none=True)
        loss = loss_of(graphed.model(x))
        loss.backward()
        graphed.optimizer.step()
        return loss.detach()

    step, said = graphed.flow.graphed(train), []
    for batch in batches:
        x.copy_(batch)
        loss = step()
        said.append(step.why)
        assert torch.isfinite(loss)
        plain.step(batch)
        for a, b in zip(
            parameters_of(graphed.model).values(), parameters_of(plain.model).values(), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=f"{said}")
    assert graphed.flow.steps_done == TOTAL
    assert said.count("") >= TOTAL // 3, said
    graphed.model.get_parameter("0.weight").data.mul_(1.5)
    step()
    with pytest.raises(StateError, match=r"0\.weight"):
        step()


def test_sharded_on_one_gpu(tmp_path: Path) -> None:
    """FSDP2 over NCCL with one process: DTensors on a device."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not dist.is_nccl_available():
        pytest.skip("torch has no NCCL")
    store = f"file://{tmp_path}/store"
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    dist.init_process_group("nccl", init_method=store, rank=0, world_size=1)
    try:
        plain = Run(MLP, BY_ID["settling"], device="cuda")
        run = Run(MLP, BY_ID["settling"], attached=False, device="cuda")
        fully_shard(run.model, mesh=init_device_mesh("cuda", (1,)))
        run.optimizer = OPTIMIZERS["adamw-foreach"](run.model.parameters())
        run.attach()
        for x in _on(run):
            run.step(x)
            plain.step(x)
        whole = {n: p.full_tensor().detach() for n, p in run.model.named_parameters()}  # type: ignore[attr-defined]
        assert_near(whole, parameters_of(plain.model))
    finally:
        dist.destroy_process_group()


# --- after training -----------------------------------------------------------------------------


def test_memory_between_steps() -> None:
    """One dense copy of the targeted weights, and nothing else."""

    def held(recipe: bool) -> int:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        model = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024)).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if recipe:
            flow = nmflow.attach(
                model, optimizer, nmflow.Settling(), "1:16", include="*", total_steps=10
            )
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 1024, device="cuda")).square().mean().backward()
            optimizer.step()
        optimizer.zero_grad()
        if recipe:
            assert flow.steps_done == 3
        return torch.cuda.memory_allocated() - before

    held(False)  # what CUDA's libraries allocate for themselves at their first use
    dense = held(False)
    assert held(True) - dense == pytest.approx(2 * 1024 * 4096 * 4, rel=0.02)


def test_compress_there_and_back() -> None:
    """Layers on a GPU stay dense and say why; packed ones that are moved there stay right."""
    torch.manual_seed(0)
    layers = nn.Linear(256, 512), nn.Linear(512, 256)
    for layer in layers:
        layer.weight.data *= nmflow.mask(layer.weight, "1:16")
    model = nn.Sequential(layers[0], nn.GELU(), layers[1]).eval()
    x = torch.randn(5, 256)
    wanted = model(x)
    on_gpu = copy.deepcopy(model).cuda()
    on_gpu = nmflow.compress(on_gpu, tokens=(1,))
    torch.testing.assert_close(on_gpu(x.cuda()).cpu(), wanted, rtol=1e-4, atol=1e-5)
    packed = nmflow.compress(model, tokens=(1,), measure=False)
    moved = packed.cuda()
    torch.testing.assert_close(moved(x.cuda()).cpu(), wanted, rtol=1e-4, atol=1e-5)
    back = moved.cpu()
    torch.testing.assert_close(back(x), wanted, rtol=1e-4, atol=1e-5)
