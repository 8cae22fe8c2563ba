import copy
import math
import subprocess
import sys

import pytest
import torch
from fastgpt_kernels import FusedAdamW, UnsupportedInput, grad_norm
from fastgpt_kernels.testing import assert_close
from fastgpt_kernels.torch_ops import adamw as torch_adamw

SIZES = [(1,), (7,), (3, 341), (70_001,), (0,), (8_192,), (16_384,)]
GROUPS = [{"weight_decay": 0.1}, {"weight_decay": 0.0, "lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6}]
SCALE = 0.37
FORMS = ["adamw", "gpt1"]


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


def masters_of(device, sizes=SIZES):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=generator).to(device).requires_grad_() for size in sizes]


def gradients_at(step, masters):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(m.shape, generator=generator).mul(10.0 ** (place % 5 - 4)) for place, m in enumerate(masters)]


def grouped(masters):
    return [{"params": masters[place::2]} | group for place, group in enumerate(GROUPS)]


def constants_of(place):
    return {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8} | GROUPS[place % 2]


def written_out(masters, form, dtype, steps, scale):
    """Both forms as their papers have them, on copies of the masters: values and moments."""
    results = []
    for place, master in enumerate(masters):
        c = constants_of(place)
        beta1, beta2 = c["betas"]
        p = master.detach().cpu().to(dtype, copy=True)
        m, v = torch.zeros_like(p), torch.zeros_like(p)
        for t in range(1, steps + 1):
            g = gradients_at(t, masters)[place].to(dtype) * scale
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g**2
            c1, c2 = 1 - beta1**t, 1 - beta2**t
            if form == "adamw":
                p = p - c["lr"] * (m / c1 / ((v / c2).sqrt() + c["eps"]) + c["weight_decay"] * p)
            else:
                rate = c["lr"] * math.sqrt(c2) / c1
                p = p - rate * (m / (v.sqrt() + c["eps"]) + c["weight_decay"] * p)
        results += [p, m, v]
    return results


def values_and_moments(optimizer, masters):
    states = [optimizer.state[master] for master in masters]
    return [
        x.detach().cpu().double()
        for m, s in zip(masters, states, strict=True)
        for x in (m, s["exp_avg"], s["exp_avg_sq"])
    ]


def run(optimizer, masters, steps, scale=1.0, premultiplied=False, first=1, **arguments):
    for t in range(first, first + steps):
        for master, gradient in zip(masters, gradients_at(t, masters), strict=True):
            master.grad = gradient.to(master.device) * (scale if premultiplied else 1.0)
        optimizer.step(**arguments)


def make(masters, backend, **arguments):
    return FusedAdamW(grouped(masters), backend=backend, **arguments)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale_as", ["number", "tensor"])
def test_several_updates_are_as_close_to_the_mathematics_as_torch(form, scale_as, device, backend):
    masters, steps = masters_of(device), 6
    oracle = written_out(masters, form, torch.float64, steps, SCALE)
    theirs = [x.double() for x in written_out(masters, form, torch.float32, steps, SCALE)]
    if form == "adamw":
        peers = masters_of(device)
        peer = torch.optim.AdamW(grouped(peers))
        run(peer, peers, steps, SCALE, premultiplied=True)
        theirs = values_and_moments(peer, peers)
    optimizer = make(masters, backend, form=form)
    scale = SCALE if scale_as == "number" else torch.tensor(SCALE, device=device)
    run(optimizer, masters, steps, gradient_scale=scale)
    ours = values_and_moments(optimizer, masters)
    kept = [place for place, x in enumerate(oracle) if x.numel()]
    ours, theirs, oracle = ([xs[place] for place in kept] for xs in (ours, theirs, oracle))
    assert_close(ours, theirs, oracle, [torch.float32] * len(kept))
    assert all(optimizer.state[master]["step"].item() == steps for master in masters)


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.3, 0.9999), (0.9, 0.2)])
def test_any_betas_are_taken(betas, device, backend):
    masters = masters_of(device, [(300,)])
    optimizer = FusedAdamW(masters, betas=betas, backend=backend)
    peers, exact = masters_of(device, [(300,)]), [masters_of("cpu", [(300,)])[0].detach().double().requires_grad_()]
    others = [torch.optim.AdamW(xs, betas=betas) for xs in (peers, exact)]
    for t in range(1, 5):
        for xs in (masters, peers, exact):
            xs[0].grad = gradients_at(t, xs)[0].to(xs[0].device, xs[0].dtype)
        for o in (optimizer, *others):
            o.step()
    ours, theirs, oracle = (
        values_and_moments(o, xs) for o, xs in ((optimizer, masters), (others[0], peers), (others[1], exact))
    )
    assert_close(ours, theirs, oracle, [torch.float32] * 3)


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_differ_where_the_bias_correction_does(form, device, backend):
    # with a gradient of zero only the decay is left: GPT-1's is multiplied by sqrt(c2) / c1
    master = torch.ones(5, device=device, requires_grad=True)
    master.grad = torch.zeros_like(master)
    FusedAdamW([master], lr=0.1, weight_decay=0.5, form=form, backend=backend).step()
    rate = 0.1 if form == "adamw" else 0.1 * math.sqrt(0.001) / 0.1
    torch.testing.assert_close(master.detach().cpu(), torch.full((5,), 1.0 - 0.5 * rate))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_working_copies_are_the_masters_rounded(dtype, device, backend):
    masters = masters_of(device)
    copies = [torch.full(m.shape, 7.0, dtype=dtype, device=device) for m in masters[:-1]]
    optimizer = make(masters, backend, working=zip(masters[:-1], copies, strict=True))
    run(optimizer, masters, 2)
    for master, rounded in zip(masters[:-1], copies, strict=True):
        if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
            # the interpreter truncates
            spacing = master.detach().abs().clamp(min=1e-30).log2().floor().exp2() * 2.0**-7
            assert ((rounded.float() - master).abs() <= spacing).all()
        else:
            assert torch.equal(rounded, master.detach().to(dtype))


def test_working_copies_can_be_named_after_the_optimizer_is_made(device, backend):
    results = []
    for named_later in (False, True):
        masters = masters_of(device)
        copies = [torch.full(m.shape, 7.0, dtype=torch.float16, device=device) for m in masters]
        pairs = list(zip(masters, copies, strict=True))
        optimizer = make(masters, backend, working=None if named_later else pairs)
        if named_later:
            optimizer.set_working(pairs)
            with pytest.raises(UnsupportedInput, match=r"working copy 1 is torch\.float32"):
                optimizer.set_working([pairs[0], (masters[1], copies[1].float())])
        run(optimizer, masters, 2)
        results.append([*masters, *copies])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("scale", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_nothing_changes_where_the_scale_is_not_finite(scale, as_tensor, device, backend):
    masters = masters_of(device)
    copies = [torch.full(m.shape, 7.0, dtype=torch.float16, device=device) for m in masters]
    optimizer = make(masters, backend, working=dict(zip(masters, copies, strict=True)))
    scale = torch.tensor([scale], device=device) if as_tensor else scale
    run(optimizer, masters, 1, gradient_scale=scale)
    assert all(torch.equal(a, b) for a, b in zip(masters, masters_of(device), strict=True))
    run(optimizer, masters, 1)
    before = copy.deepcopy([list(optimizer.state.values()), masters, copies])
    run(optimizer, masters, 1, gradient_scale=scale)
    after = [list(optimizer.state.values()), masters, copies]
    for old, new in zip(before[0], after[0], strict=True):
        assert all(torch.equal(old[name], new[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    for olds, news in zip(before[1:], after[1:], strict=True):
        assert all(torch.equal(old, new) for old, new in zip(olds, news, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_16_bits_are_read_as_they_are(dtype, device, backend):
    results = []
    for low in (False, True):
        masters = masters_of(device, [(1_001,), (30,)])
        optimizer = FusedAdamW(masters, backend=backend)
        for master, gradient in zip(masters, gradients_at(1, masters), strict=True):
            gradient = gradient.to(device, dtype)
            if low:
                master.grad_dtype = None
            master.grad = gradient if low else gradient.float()
        optimizer.step()
        results.append(values_and_moments(optimizer, masters))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_parameters_without_a_gradient_are_left_alone(device, backend):
    masters = masters_of(device, [(5,), (9,)])
    optimizer = FusedAdamW(masters, backend=backend)
    optimizer.step()
    masters[1].grad = torch.ones_like(masters[1])
    optimizer.step()
    assert torch.equal(masters[0], masters_of(device, [(5,)])[0]) and masters[0] not in optimizer.state
    assert optimizer.state[masters[1]]["step"].item() == 1


def test_tensors_of_any_alignment_and_strides_are_taken(device, backend):
    memory, gradient = torch.randn(5_001, device=device), torch.randn(5_000, device=device)
    results = []
    for start in (0, 1):
        master = torch.empty(5_001, device=device)[start : start + 5_000].requires_grad_()
        with torch.no_grad():
            master.copy_(memory[:5_000])
        # a gradient of every second element, or of one stride
        master.grad = torch.stack([gradient, gradient], 1)[:, 0] if start else gradient.clone()
        FusedAdamW([master], backend=backend).step()
        results.append(master.detach().clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("form", FORMS)
def test_a_repeat_gives_the_same_bits(form, device, backend):
    results = []
    for _ in range(2):
        masters = masters_of(device)
        optimizer = make(masters, backend, form=form)
        run(optimizer, masters, 3, gradient_scale=SCALE)
        results.append(values_and_moments(optimizer, masters))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_learning_rate_may_be_a_tensor(device, backend):
    results = []
    for as_tensor in (False, True):
        masters = masters_of(device, [(40,)])
        optimizer = FusedAdamW(masters, lr=torch.tensor(9.0, device=device) if as_tensor else 9.0, backend=backend)
        for t, rate in enumerate((1e-3, 1e-2), start=1):
            if as_tensor:
                optimizer.param_groups[0]["lr"].fill_(rate)
            else:
                optimizer.param_groups[0]["lr"] = rate
            run(optimizer, masters, 1, first=t)
        results.append(masters[0].detach().clone())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("fused", [None, True])
def test_a_state_goes_over_to_torch_and_back(fused, device, backend):
    masters = masters_of(device)
    optimizer = make(masters, backend)
    run(optimizer, masters, 2)

    peers = [m.detach().clone().requires_grad_() for m in masters]
    peer = torch.optim.AdamW(grouped(peers), fused=fused)
    peer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(peer, peers, 1, first=3)

    for group in peer.param_groups:
        group["fused"] = fused
    again = [m.detach().clone().requires_grad_() for m in peers]
    back = make(again, backend)
    back.load_state_dict(copy.deepcopy(peer.state_dict()))
    run(back, again, 1, first=4)
    run(optimizer, masters, 2, first=3)
    exact, pytorch = (
        written_out(masters_of(device), "adamw", dtype, 4, 1.0) for dtype in (torch.float64, torch.float32)
    )
    results = values_and_moments(optimizer, masters), values_and_moments(back, again), pytorch, exact
    kept = [place for place, x in enumerate(exact) if x.numel()]
    whole, handed_over, pytorch, exact = ([xs[place].double() for place in kept] for xs in results)
    for ours in (whole, handed_over):
        assert_close(ours, pytorch, exact, [torch.float32] * len(kept))
    assert back.state[again[0]]["step"].item() == 4
    assert back.param_groups[1]["betas"] == (0.8, 0.95)


def test_a_state_of_its_own_is_taken_up_bit_for_bit(device, backend):
    masters = masters_of(device)
    copies = [torch.empty_like(m, dtype=torch.float16) for m in masters]
    optimizer = make(masters, backend, form="gpt1", working=zip(masters, copies, strict=True))
    run(optimizer, masters, 2)
    twin = copy.deepcopy(optimizer)
    other = [m.detach().clone().requires_grad_() for m in masters]
    loaded = make(other, backend, form="gpt1")
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twins = [p for group in twin.param_groups for p in group["params"]]
    run(optimizer, masters, 1, first=3)
    run(loaded, other, 1, first=3)
    assert all(torch.equal(a, b) for a, b in zip(masters, other, strict=True))
    ordered = [*masters[::2], *masters[1::2]]
    for t, (mine, its) in enumerate(zip(ordered, twins, strict=True)):
        its.grad = mine.grad.clone()
        assert t or not torch.equal(mine, its)
    twin.step()
    assert all(torch.equal(a, b) for a, b in zip(ordered, twins, strict=True))


def test_amsgrad_is_refused(backend):
    master = torch.zeros(3, requires_grad=True)
    state = torch.optim.AdamW([master], amsgrad=True).state_dict()
    with pytest.raises(UnsupportedInput, match="group 0 has amsgrad"):
        FusedAdamW([master], backend=backend).load_state_dict(state)


def test_it_serves_flat_partitions_as_deepspeed_does(device, backend):
    # the weights that it is made with are replaced by flat float32 parts, one of them empty, one without a gradient
    weights = [torch.randn(30, 7).to(device, torch.bfloat16).requires_grad_() for _ in range(2)]
    optimizer = FusedAdamW([{"params": weights[:1]}, {"params": weights[1:], "weight_decay": 0.0}], backend=backend)
    parts = [torch.cat([w.detach().float().flatten() for w in weights]), torch.zeros(0, device=device)]
    whole = parts[0].clone()
    for group, part in zip(optimizer.param_groups, parts, strict=True):
        group["params"] = [part]
        part.grad = torch.ones_like(part)
    optimizer.step()
    assert optimizer.state[parts[1]]["step"].item() == 1
    parts[1].grad = None
    parts[0].grad = torch.full_like(parts[0], 0.5)
    optimizer.step()
    peer = torch.optim.AdamW([whole])
    for value in (1.0, 0.5):
        whole.grad = torch.full_like(whole, value)
        peer.step()
    torch.testing.assert_close(parts[0], whole)
    # stage 3: the parameters of a group are exchanged between calls
    optimizer.param_groups[0]["params"] = [whole]
    optimizer.param_groups[1]["params"] = []
    optimizer.step()
    assert optimizer.state[whole]["step"].item() == 1 and optimizer.state[parts[0]]["step"].item() == 2


def test_a_closure_is_called_with_gradients_on(device, backend):
    master = torch.ones(3, device=device, requires_grad=True)
    optimizer = FusedAdamW([master], backend=backend)

    def closure():
        optimizer.zero_grad()
        loss = (master**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert (master < 1.0).all()


def test_torch_s_schedulers_work(device, backend):
    master = torch.ones(3, device=device, requires_grad=True)
    optimizer = FusedAdamW([master], lr=1.0, weight_decay=0.0, backend=backend)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step == 0 else 1.0)
    master.grad = torch.ones_like(master)
    optimizer.step()
    assert (master == 1.0).all()
    schedule.step()
    optimizer.step()
    assert (master < 0.5).all()


def test_every_reason_against_the_constants_is_given():
    master = torch.zeros(3, requires_grad=True)
    with pytest.raises(UnsupportedInput) as error:
        FusedAdamW([master], lr=-1.0, betas=(0.9, 1.0), eps=math.nan, weight_decay=-0.1)
    assert error.value.reasons == (
        "lr is -1.0; it must be at least 0 and finite",
        "betas are (0.9, 1.0); they must be two numbers, at least 0 and below 1",
        "eps is nan; it must be at least 0 and finite",
        "weight_decay is -0.1; it must be at least 0 and finite",
    )
    with pytest.raises(UnsupportedInput, match="lr is -2; it must be at least 0"):
        FusedAdamW([{"params": [master], "lr": -2}])
    with pytest.raises(UnsupportedInput) as error:
        FusedAdamW([master], form="adam", backend="cuda", working={master: torch.zeros(4)})
    assert error.value.reasons == (
        "form is 'adam'; it must be 'adamw' or 'gpt1'",
        "backend is 'cuda'; it must be 'auto', 'triton' or 'torch'",
        "working copy 0 is torch.float32; supported: float16, bfloat16",
        "working copy 0 has shape (4,) and its parameter (3,)",
    )


def test_every_reason_against_the_tensors_is_given_and_nothing_changes(backend):
    good, half = torch.ones(3, requires_grad=True), torch.ones(3, dtype=torch.float16, requires_grad=True)
    sparse, slanted = torch.ones(3, requires_grad=True), torch.ones(3, 4).t().requires_grad_()
    elsewhere, complex_ = torch.ones(3, device="meta"), torch.ones(3, dtype=torch.complex64)
    optimizer = FusedAdamW([good, half, half.detach(), sparse, slanted, elsewhere, complex_], backend=backend)
    for x in optimizer.param_groups[0]["params"]:
        x.grad = torch.ones_like(x)
    sparse.grad = torch.ones(3).to_sparse()
    with pytest.raises(UnsupportedInput) as error:
        optimizer.step(gradient_scale=torch.ones(2))
    remedy = "an optimizer keeps float32, and 16-bit weights as working copies of it"
    assert error.value.reasons == (
        f"parameter 1 of group 0 (and 1 more) is torch.float16; {remedy}",
        "parameter 3 of group 0 has a gradient of layout torch.sparse_coo; it must be dense",
        "parameter 4 of group 0 is not contiguous",
        "parameter 5 of group 0 is on meta and others on cpu",
        f"parameter 6 of group 0 is torch.complex64; {remedy}",
        "parameter 6 of group 0 has a gradient of torch.complex64; supported: float32, float16, bfloat16",
        "gradient_scale is a tensor of 2 x torch.float32; it must be one floating-point number",
    )
    assert (good == 1.0).all() and not optimizer.state


def test_triton_on_a_cpu_is_refused_outside_the_interpreter(environment):
    code = """
import sys, torch, fastgpt_kernels
assert "triton" not in sys.modules, "importing the package imports Triton"
master = torch.ones(3, requires_grad=True)
master.grad = torch.ones(3)
fastgpt_kernels.FusedAdamW([master]).step()
assert "fastgpt_kernels.adamw" not in sys.modules, "a step on the CPU imports the kernels"
try:
    fastgpt_kernels.FusedAdamW([master], backend="triton").step()
except fastgpt_kernels.UnsupportedInput as problem:
    print(problem)
"""
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "the parameters are on cpu; a GPU is needed, or TRITON_INTERPRET=1 from the start" in ran.stdout, ran.stderr


@pytest.mark.gpu
def test_a_cuda_graph_replays_updates(device):
    def prepared():
        masters = masters_of(device)
        copies = [torch.zeros_like(m, dtype=torch.bfloat16) for m in masters]
        rate = torch.tensor(1e-3, device=device)
        optimizer = FusedAdamW(masters, lr=rate, working=zip(masters, copies, strict=True))
        for master, gradient in zip(masters, gradients_at(1, masters), strict=True):
            master.grad = gradient.to(device)
        return masters, optimizer, rate, torch.ones((), device=device)

    def updates(step, rate, scale):
        for new_rate, new_scale in ((1e-2, 0.5), (1e-3, math.nan), (1e-4, 2.0)):
            rate.fill_(new_rate)
            scale.fill_(new_scale)
            step()

    masters, optimizer, rate, scale = prepared()
    optimizer.step(gradient_scale=scale)
    updates(lambda: optimizer.step(gradient_scale=scale), rate, scale)
    replayed, optimizer, rate, scale = prepared()
    optimizer.step(gradient_scale=scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step(gradient_scale=scale)
    updates(graph.replay, rate, scale)
    assert all(torch.equal(a, b) for a, b in zip(masters, replayed, strict=True))


@pytest.mark.gpu
def test_tables_that_would_be_copied_during_a_capture_are_refused(device):
    master = torch.ones(3, device=device, requires_grad=True)
    master.grad = torch.ones_like(master)
    optimizer = FusedAdamW([master])
    optimizer.step()
    master.grad = torch.ones_like(master)
    with pytest.raises(RuntimeError, match="make the same call once"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@pytest.mark.gpu
def test_the_host_never_waits(device):
    masters = masters_of(device)
    optimizer = make(masters, "triton")
    scale = torch.ones((), device=device)
    run(optimizer, masters, 2, gradient_scale=scale)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for master in masters:
            master.grad = torch.ones_like(master)
        optimizer.step(gradient_scale=scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_parameter_takes_the_gradient_of_its_working_copy(device, backend):
    torch.manual_seed(0)
    start, gradient = torch.randn(70_000, device=device), torch.randn(70_000, device=device).half()
    results = []
    for given_to_copy in (True, False):
        master = start.clone().requires_grad_()
        working = start.half()
        optimizer = FusedAdamW([master], lr=0.01, backend=backend, working=[(master, working)])
        if given_to_copy:
            working.grad = gradient.clone()
        else:
            master.grad = gradient.float()
        optimizer.step(gradient_scale=0.5)
        assert torch.equal(working, master.detach().half())
        results.append(master.detach())
    assert torch.equal(*results) and not torch.equal(results[0], start)


def test_pieces_of_any_size_give_the_same_update(monkeypatch):
    torch.manual_seed(0)
    start, gradient = torch.randn(3, 1000), torch.randn(3, 1000).bfloat16()
    results = []
    for size in (16, 10_000):
        monkeypatch.setattr(torch_adamw, "UPDATE_CHUNK", size)
        master, working = start.clone().requires_grad_(), start.bfloat16()
        working.grad = gradient.clone()
        optimizer = FusedAdamW([master], lr=0.01, backend="torch", working=[(master, working)])
        for _ in range(3):
            optimizer.step(gradient_scale=0.5)
        results.append((master.detach(), working))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_moments_of_a_parameter_that_lay_otherwise_are_laid_anew(backend, device):
    transposed = torch.randn(3, 4, device=device).t().requires_grad_()
    theirs = torch.optim.AdamW([transposed], lr=0.1)
    transposed.grad = torch.randn(4, 3, device=device)
    theirs.step()
    master = transposed.detach().contiguous().requires_grad_()
    ours = FusedAdamW([master], lr=0.1, backend=backend)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))  # PyTorch shares tensors
    transposed.grad = torch.randn(4, 3, device=device)
    master.grad = transposed.grad.clone()
    theirs.step()
    ours.step()
    torch.testing.assert_close(master, transposed)


def test_moments_that_do_not_fit_are_refused_before_anything_changes(backend, device):
    small, large = (torch.zeros(n, device=device).requires_grad_() for n in (4, 200_000))
    small.grad = torch.ones_like(small)
    theirs = torch.optim.AdamW([small])
    theirs.step()
    ours = FusedAdamW([large], backend=backend)
    ours.load_state_dict(theirs.state_dict())
    large.grad = torch.ones_like(large)
    with pytest.raises(UnsupportedInput, match=r"parameter 0 of group 0 has exp_avg of shape \(4,\) float32"):
        ours.step()
    assert not large.any()


def test_a_state_that_is_refused_changes_nothing(backend, device):
    master = torch.zeros(4, device=device).requires_grad_()
    ours = FusedAdamW([master], lr=0.25, backend=backend)
    for other in (torch.optim.AdamW([master], lr=0.7, amsgrad=True), torch.optim.Adam([master], weight_decay=0.1)):
        with pytest.raises(UnsupportedInput, match="group 0 "):
            ours.load_state_dict(other.state_dict())
        assert ours.param_groups[0]["lr"] == 0.25 and not ours.param_groups[0].get("amsgrad")


@pytest.mark.parametrize("lr", [-1.0, math.nan, math.inf])
def test_a_learning_rate_that_is_none_is_refused_at_the_step(lr, backend, device):
    master = torch.ones(4, device=device).requires_grad_()
    master.grad = torch.ones_like(master)
    optimizer = FusedAdamW([master], backend=backend)
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(UnsupportedInput, match=f"group 0: lr is {lr}"):
        optimizer.step()
    assert (master == 1).all()


def test_pytorch_s_defaults_for_new_tensors_change_nothing(device, backend):
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                master = torch.ones(5, dtype=torch.float32, device=device).requires_grad_()
                master.grad = torch.full((5,), 0.5, dtype=torch.float32, device=device)
                FusedAdamW([master], backend=backend).step(gradient_scale=0.5)
                assert grad_norm([]).device.type == "cpu" and grad_norm([]).dtype == torch.float32
                norm = grad_norm([master.grad])
        finally:
            torch.set_default_dtype(torch.float32)
        results.append((master.detach(), norm))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_backward_through_an_older_graph_is_refused(device, backend):
    master = torch.ones(4, device=device).requires_grad_()
    loss = (master * master).sum()
    loss.backward(retain_graph=True)
    FusedAdamW([master], backend=backend).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
